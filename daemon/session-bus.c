/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Session: the vtable, and how a path is found. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/bus-objects.h"
#include "daemon/file-transfer.h"
#include "daemon/former-owner.h"
#include "daemon/options.h"
#include "daemon/users.h"
#include "engine/model.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

/* What Save wrote has four bytes a token, and little else. */
#define SAVED_BYTES_MAX(context) (4 * (size_t)(context) + 4096)

/* ---- requests with a stream ---- */

/*
 * A reply that the caller's socket had no room for. Should this process end before it is sent, the
 * caller has no stream, and asks again.
 */
struct unsent_reply {
    struct service *service;
    sd_bus *bus;
    uint64_t request;
};

static void unsent_reply_free(void *userdata)
{
    struct unsent_reply *u = userdata;

    sd_bus_unref(u->bus);
    free(u);
}

static bool is_sent(sd_bus *bus)
{
    uint64_t n;

    return sd_bus_is_open(bus) > 0 && sd_bus_get_n_queued_write(bus, &n) >= 0 && n == 0;
}

static int on_post(sd_event_source *source, void *userdata)
{
    struct unsent_reply *u = userdata;

    if (!is_sent(u->bus) && sd_bus_is_open(u->bus) > 0)
        return 0;
    session_set_answered(u->service->sessions, u->request, is_sent(u->bus));
    sd_event_source_set_floating(source, false);
    sd_event_source_disable_unref(source);
    return 0;
}

static void watch_reply(struct service *s, sd_bus *bus, uint64_t request)
{
    struct unsent_reply *u = NULL;
    sd_event_source *source;

    if (!is_sent(bus))
        u = malloc(sizeof(*u));
    if (!u || sd_event_add_post(s->event, &source, on_post, u) < 0) {
        free(u);
        session_set_answered(s->sessions, request, true);
        return;
    }
    *u = (struct unsent_reply){.service = s, .bus = bus, .request = request};
    sd_bus_ref(bus);
    sd_event_source_set_destroy_callback(source, unsent_reply_free);
    sd_event_source_set_floating(source, true);
    sd_event_source_unref(source);
}

static int start_stream(sd_bus_message *m, struct found_session *f, struct job_request *request,
                        sd_bus_error *error)
{
    CLEANUP(closep) int fd = -EBADF;
    struct error err = {0};
    uint64_t id;
    int r;

    r = client_session_generate(f->session, request, &fd, &id, &err);
    if (r < 0)
        return bus_fail(f->service, error, r, &err);
    r = sd_bus_reply_method_return(m, "ht", fd, id); /* sends a duplicate */
    if (r < 0)
        session_set_answered(f->service->sessions, id, false);
    else
        watch_reply(f->service, sd_bus_message_get_bus(m), id);
    return r;
}

static int generate(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;
    const struct model *model = engine_thread_model(session_set_engine(f->service->sessions));
    CLEANUP(job_request_done) struct job_request request = {0};
    struct error err = {0};
    int r;

    r = options_read_generate(m, model_generation(model), &request, &err);
    return r < 0 ? bus_error_set(error, r, &err) : start_stream(m, f, &request, error);
}

static int append(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    CLEANUP(job_request_done) struct job_request request = {0};
    struct error err = {0};
    int r;

    r = options_read_append(m, &request, &err);
    return r < 0 ? bus_error_set(error, r, &err) : start_stream(m, userdata, &request, error);
}

static int cancel(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    client_session_cancel(f->session);
    return sd_bus_reply_method_return(m, NULL);
}

static int close_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    client_session_free(f->session);
    return sd_bus_reply_method_return(m, NULL);
}

/* Whose owner is a client that is here would lose it against its will, were it another's now. */
static int may_adopt(const struct found_session *f, struct error *err)
{
    if (client_session_lingers(f->session))
        return error_set(err, EOPNOTSUPP, "the session lingers: it does not end with anybody");
    if (client_session_owner(f->session) == &f->client->sessions ||
        former_owners_may_adopt(f->service->former, client_session_owner(f->session)) >= 0)
        return 0;
    return error_set(err, EBUSY, "the session ends with another client, which is here");
}

static int adopt(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;
    struct error err = {0};
    int r;

    r = options_read_none(m, &err);
    if (r >= 0)
        r = may_adopt(f, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    if (client_session_owner(f->session) != &f->client->sessions)
        client_session_set_owner(f->session, &f->client->sessions);
    former_owners_something_went(f->service->former);
    return sd_bus_reply_method_return(m, NULL);
}

/* ---- requests that are answered when they are done ---- */

/* What is left of a call until then. The session is known by its number: it may be closed. */
struct late {
    struct pending_call *call;
    struct service *service;
    struct user *user;
    uint64_t session;
    struct session_options options; /* fork */
    int fd;                         /* save; the message's */
};

static void late_free(struct late *l)
{
    pending_call_free(l->call);
    session_options_done(&l->options);
    user_unref(l->user);
    free(l);
}

static void late_freep(struct late **l)
{
    if (*l)
        late_free(*l);
}

static void late_fail(struct late *l, int r, const struct error *err)
{
    if (r == -EDQUOT)
        session_set_count_refused(l->service->sessions);
    pending_call_fail(TAKE_PTR(l->call), r, err);
    late_free(l);
}

static void late_fail_stopping(struct late *l)
{
    struct error err;

    error_set(&err, ESHUTDOWN, "the daemon is about to end");
    late_fail(l, -ESHUTDOWN, &err);
}

/* What became of the session, unless it has gone: then that is answered. */
static struct client_session *late_session(struct late *l)
{
    struct client_session *s = session_set_find(l->service->sessions, l->session);
    struct error err;

    if (!s) {
        error_set(&err, ESRCH, "the session was closed meanwhile");
        late_fail(l, -ESRCH, &err);
    }
    return s;
}

static int late_new(struct late **ret, struct found_session *f, sd_bus_message *m)
{
    struct late *l = calloc(1, sizeof(*l));
    int r;

    if (!l)
        return -ENOMEM;
    r = pending_call_new(&l->call, f->client, m);
    if (r < 0) {
        free(l);
        return r;
    }
    l->service = f->service;
    l->user = user_ref(f->client->user);
    l->session = client_session_id(f->session);
    *ret = l;
    return 0;
}

static int need_late(struct late **ret, struct found_session *f, sd_bus_message *m,
                     sd_bus_error *error)
{
    int r = late_new(ret, f, m);

    return r < 0 ? bus_error_set(error, r, NULL) : 0;
}

static void on_forked(struct job *j, void *userdata)
{
    struct late *l = userdata;
    struct client_session_options options = {
        .class = l->options.class, .label = l->options.label, .linger = l->options.linger};
    struct client_session *s, *forked = NULL;
    struct client *client = l->call->client;
    struct error err = {0};
    int r;

    if (j->result < 0) {
        late_fail(l, j->result, &j->error);
        return;
    }
    s = late_session(l);
    if (!s)
        return;
    if (client || options.linger) { /* else there is nobody for it */
        r = client_session_new_forked(&forked, s, client ? &client->sessions : NULL, &options, j,
                                      &err);
        if (r < 0) {
            late_fail(l, r, &err);
            return;
        }
    }
    if (client)
        sd_bus_reply_method_return(l->call->message, "o", client_session_path(forked));
    late_free(l);
}

static int fork_now(struct found_session *f, sd_bus_message *m, sd_bus_error *error)
{
    CLEANUP(late_freep) struct late *l = NULL;
    struct client_session_options options;
    struct error err = {0};
    int r;

    r = need_late(&l, f, m, error);
    if (r < 0)
        return r;
    l->options.class = client_session_class(f->session);
    r = options_read_fork(m, &l->options, &err);
    options = (struct client_session_options){
        .class = l->options.class, .label = l->options.label, .linger = l->options.linger};
    if (r >= 0)
        r = client_session_fork(f->session, &f->client->sessions, &options, on_forked, l, &err);
    if (r < 0)
        return bus_fail(f->service, error, r, &err);
    l = NULL;
    return 1;
}

/* After the permission to linger, which may have taken a while. */
static int fork_lingering(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    struct found_session f = {.service = c->service, .client = c};
    int r = session_of_path(c, sd_bus_message_get_path(m), &f.session, error);

    return r < 0 ? r : fork_now(&f, m, error);
}

static int fork_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    CLEANUP(session_options_done) struct session_options options = {0};
    struct found_session *f = userdata;
    struct error err = {0};
    int r;

    r = options_read_fork(m, &options, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    r = sd_bus_message_rewind(m, true);
    if (r < 0)
        return r;
    return options.linger
               ? client_authorise(f->client, ACTION_USE_BACKGROUND, m, fork_lingering, error)
               : fork_now(f, m, error);
}

/* Of those that return nothing. */
static void on_plain(struct job *j, void *userdata)
{
    struct late *l = userdata;

    if (j->result < 0) {
        late_fail(l, j->result, &j->error);
        return;
    }
    if (l->call->client)
        sd_bus_reply_method_return(l->call->message, NULL);
    late_free(l);
}

static int rewind_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct job_request request = {.kind = JOB_REWIND};
    CLEANUP(late_freep) struct late *l = NULL;
    struct found_session *f = userdata;
    struct error err = {0};
    int r;

    r = sd_bus_message_read(m, "u", &request.rewind_to);
    if (r < 0)
        return r;
    r = need_late(&l, f, m, error);
    if (r < 0)
        return r;
    r = client_session_ask(f->session, &request, on_plain, l, &err);
    if (r < 0)
        return bus_fail(f->service, error, r, &err);
    l = NULL;
    return 1;
}

static void on_written(void *userdata, int r, struct buffer *data)
{
    struct late *l = userdata;
    struct error err;

    (void)data;
    if (r == -ESHUTDOWN) {
        late_fail_stopping(l);
        return;
    }
    if (r < 0) {
        error_set(&err, -r, "the file: cannot write: %s", strerror(-r));
        late_fail(l, r == -ENOSPC || r == -EDQUOT ? -ENOSPC : -EIO, &err);
        return;
    }
    if (l->call->client)
        sd_bus_reply_method_return(l->call->message, NULL);
    late_free(l);
}

static int transfer_refused(int r, struct error *err)
{
    return r == -EDQUOT ? error_set(err, EDQUOT,
                                    "files: requested 1, available 0: too many are being read or "
                                    "written for this user already")
                        : error_set(err, -r, "the file: %s", strerror(-r));
}

static void on_saved(struct job *j, void *userdata)
{
    struct late *l = userdata;
    struct error err = {0};
    int r = j->result;

    if (r < 0) {
        late_fail(l, r, &j->error);
        return;
    }
    r = file_write_start(l->service->event, l->user, l->fd, &j->saved, on_written, l);
    if (r < 0)
        late_fail(l, transfer_refused(r, &err), &err);
}

static int save(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct job_request request = {.kind = JOB_SAVE};
    CLEANUP(late_freep) struct late *l = NULL;
    struct found_session *f = userdata;
    struct error err = {0};
    int r, flags;

    r = need_late(&l, f, m, error);
    if (r >= 0)
        r = sd_bus_message_read(m, "h", &l->fd);
    if (r < 0)
        return r;
    flags = fcntl(l->fd, F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY || (flags & O_PATH)) {
        error_set(&err, EINVAL, "the file: is not open for writing");
        return bus_error_set(error, EINVAL, &err);
    }
    r = client_session_ask(f->session, &request, on_saved, l, &err);
    if (r < 0)
        return bus_fail(f->service, error, r, &err);
    l = NULL;
    return 1;
}

static void on_read(void *userdata, int r, struct buffer *data)
{
    struct job_request request = {.kind = JOB_RESTORE};
    struct late *l = userdata;
    struct client_session *s;
    struct error err = {0};

    if (r == -ESHUTDOWN) {
        late_fail_stopping(l);
        return;
    }
    if (r < 0) {
        error_set(&err, -r,
                  r == -EFBIG ? "the file: is larger than any saved session that fits here"
                              : "the file: cannot be read: %s",
                  strerror(-r));
        late_fail(l, r == -EFBIG ? -EPROTO : -EIO, &err);
        return;
    }
    s = late_session(l);
    if (!s)
        return;
    request.saved = *data;
    *data = (struct buffer){0};
    r = client_session_ask(s, &request, on_plain, l, &err);
    job_request_done(&request);
    if (r < 0)
        late_fail(l, r, &err);
}

static int restore(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    CLEANUP(late_freep) struct late *l = NULL;
    struct found_session *f = userdata;
    struct error err = {0};
    int r, fd, flags;

    r = need_late(&l, f, m, error);
    if (r >= 0)
        r = sd_bus_message_read(m, "h", &fd);
    if (r < 0)
        return r;
    flags = fcntl(fd, F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) == O_WRONLY || (flags & O_PATH)) {
        error_set(&err, EINVAL, "the file: is not open for reading");
        return bus_error_set(error, EINVAL, &err);
    }
    if (client_session_is_busy(f->session)) {
        error_set(&err, EBUSY, "a request of this session still runs");
        return bus_error_set(error, EBUSY, &err);
    }
    r = file_read_start(f->service->event, f->client->user, fd,
                        SAVED_BYTES_MAX(client_session_context_max(f->session)), on_read, l);
    if (r < 0)
        return bus_fail(f->service, error, transfer_refused(r, &err), &err);
    l = NULL;
    return 1;
}

/* ---- properties ---- */

static int get_owner(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "u", (uint32_t)client_session_user(f->session)->uid);
}

/* An administrator who looks on is not shown what others call theirs. */
static int get_label(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;
    bool own = f->client->user == client_session_user(f->session);

    return sd_bus_message_append(reply, "s", own ? client_session_label(f->session) : "");
}

static int get_model(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "s", session_set_model_name(f->service->sessions));
}

static int get_class(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "s",
                                 scheduler_class_name(client_session_class(f->session)));
}

static int get_linger(sd_bus *bus, const char *path, const char *interface, const char *property,
                      sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "b", client_session_lingers(f->session));
}

static int get_created(sd_bus *bus, const char *path, const char *interface, const char *property,
                       sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "t", client_session_created_usec(f->session));
}

static int get_context_max(sd_bus *bus, const char *path, const char *interface,
                           const char *property, sd_bus_message *reply, void *userdata,
                           sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "u", client_session_context_max(f->session));
}

/* Those that change. */
static int get_info(sd_bus *bus, const char *path, const char *interface, const char *property,
                    sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;
    struct client_session_info i;

    client_session_get_info(f->session, &i);
    if (strcmp(property, "State") == 0)
        return sd_bus_message_append(reply, "s", i.state);
    if (strcmp(property, "ContextUsed") == 0)
        return sd_bus_message_append(reply, "u", i.context_used);
    if (strcmp(property, "QueuePosition") == 0)
        return sd_bus_message_append(reply, "u", i.queue_position);
    if (strcmp(property, "EstimatedStartUSec") == 0)
        return sd_bus_message_append(reply, "t", i.estimate_usec);
    if (strcmp(property, "PromptTokens") == 0)
        return sd_bus_message_append(reply, "t", i.prompt_tokens);
    if (strcmp(property, "CompletionTokens") == 0)
        return sd_bus_message_append(reply, "t", i.completion_tokens);
    return sd_bus_message_append(reply, "t", i.kv_bytes);
}

#define CONST SD_BUS_VTABLE_PROPERTY_CONST
#define CHANGES SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE

const sd_bus_vtable session_vtable[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD_WITH_ARGS("Generate", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("h", stream, "t", request), generate,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Append", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("h", stream, "t", request), append,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("Cancel", NULL, NULL, cancel, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Fork", SD_BUS_ARGS("a{sv}", options), SD_BUS_RESULT("o", session),
                            fork_session, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Rewind", SD_BUS_ARGS("u", tokens), SD_BUS_NO_RESULT, rewind_session,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Save", SD_BUS_ARGS("h", file), SD_BUS_NO_RESULT, save,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Restore", SD_BUS_ARGS("h", file), SD_BUS_NO_RESULT, restore,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("Close", NULL, NULL, close_session, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Adopt", SD_BUS_ARGS("a{sv}", options), SD_BUS_NO_RESULT, adopt,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_SIGNAL_WITH_ARGS("RequestFinished",
                            SD_BUS_ARGS("t", request, "s", reason, "a{sv}", details), 0),
    SD_BUS_PROPERTY("Owner", "u", get_owner, 0, CONST),
    SD_BUS_PROPERTY("Label", "s", get_label, 0, CONST),
    SD_BUS_PROPERTY("Model", "s", get_model, 0, CONST),
    SD_BUS_PROPERTY("Class", "s", get_class, 0, CONST),
    SD_BUS_PROPERTY("Linger", "b", get_linger, 0, CONST),
    SD_BUS_PROPERTY("CreatedUSec", "t", get_created, 0, CONST),
    SD_BUS_PROPERTY("State", "s", get_info, 0, CHANGES),
    SD_BUS_PROPERTY("ContextUsed", "u", get_info, 0, CHANGES),
    SD_BUS_PROPERTY("ContextMax", "u", get_context_max, 0, CONST),
    SD_BUS_PROPERTY("QueuePosition", "u", get_info, 0, CHANGES),
    SD_BUS_PROPERTY("EstimatedStartUSec", "t", get_info, 0, 0),
    SD_BUS_PROPERTY("PromptTokens", "t", get_info, 0, 0),
    SD_BUS_PROPERTY("CompletionTokens", "t", get_info, 0, 0),
    SD_BUS_PROPERTY("KvBytes", "t", get_info, 0, 0),
    SD_BUS_VTABLE_END,
};

/* ---- how a path is found ---- */

/* "17", as a path has it: no sign, no zero in front. */
static bool parse_id(const char *text, uint64_t *ret)
{
    uint64_t v = 0;

    if (text[0] < '1' || text[0] > '9')
        return false;
    for (; *text >= '0' && *text <= '9'; text++)
        if (ckd_mul(&v, v, 10) || ckd_add(&v, v, (uint64_t)(*text - '0')))
            return false;
    *ret = v;
    return *text == 0;
}

int session_of_path(struct client *c, const char *path, struct client_session **ret,
                    sd_bus_error *error)
{
    bool is_below = strncmp(path, LLM_SESSION_PATH "/", strlen(LLM_SESSION_PATH "/")) == 0;
    const char *name = is_below ? path + strlen(LLM_SESSION_PATH "/") : path;
    struct client_session *session = NULL;
    struct error err = {0};
    uint64_t id;

    if (is_below && parse_id(name, &id))
        session = session_set_find(c->service->sessions, id);
    if (!session || client_session_user(session) != c->user) {
        error_set(&err, ESRCH, "session %.200s: there is no such session", name);
        return bus_error_set(error, ESRCH, &err);
    }
    *ret = session;
    return 0;
}

int session_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
                 void **ret_found, sd_bus_error *ret_error)
{
    struct served *v = userdata;
    struct client *client;
    int r;

    if (strcmp(path, LLM_SESSION_PATH) == 0)
        return 0; /* the folder of them */
    r = served_client(v, sd_bus_get_current_message(bus), &client, ret_error);
    if (r < 0)
        return r;
    v->found = (struct found_session){.service = v->service, .client = client};
    r = session_of_path(client, path, &v->found.session, ret_error);
    if (r < 0)
        return r;
    *ret_found = &v->found;
    return 1;
}

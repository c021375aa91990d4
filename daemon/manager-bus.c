/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Manager: the vtable and nothing else. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/bus-objects.h"
#include "daemon/bus.h"
#include "daemon/gpu.h"
#include "daemon/log.h"
#include "daemon/memory-pressure.h"
#include "daemon/options.h"
#include "daemon/users.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

/* ---- sessions ---- */

static int make_session(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    CLEANUP(session_options_done) struct session_options options = {0};
    struct session_set *sessions = c->service->sessions;
    struct client_session *session;
    struct error err = {0};
    int r;

    r = options_read_session(m, &options, &err);
    if (r >= 0 && options.model && session_set_engine(sessions) &&
        !session_set_serves(sessions, options.model))
        r = error_set(&err, ENOENT, "model: '%.200s' is not served here, '%.200s' is",
                      options.model, session_set_model_name(sessions));
    if (r >= 0 && !session_set_engine(sessions) && c->service->failure)
        r = error_set(&err, EAGAIN, "no model is loaded: %s", c->service->failure);
    if (r >= 0)
        r = client_session_new(&session, sessions, c->user, &c->sessions,
                               &(struct client_session_options){.context = options.context,
                                                                .class = options.class,
                                                                .label = options.label,
                                                                .linger = options.linger},
                               &err);
    if (r < 0)
        return bus_fail(c->service, error, r, &err);
    return sd_bus_reply_method_return(m, "o", client_session_path(session));
}

static int make_lingering_session(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    return client_authorise(c, ACTION_USE_BACKGROUND, m, make_session, error);
}

static int create_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    CLEANUP(session_options_done) struct session_options options = {0};
    struct error err = {0};
    struct client *c;
    int r;

    r = served_client(userdata, m, &c, error);
    if (r < 0)
        return r;
    r = options_read_session(m, &options, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    return client_authorise(c, ACTION_USE, m,
                            options.linger ? make_lingering_session : make_session, error);
}

static int append_session(sd_bus_message *reply, const struct client *c,
                          const struct client_session *s)
{
    const struct user *user = client_session_user(s);
    struct client_session_info i;

    client_session_get_info(s, &i);
    return sd_bus_message_append(reply, "(osussuuttu)", client_session_path(s),
                                 user == c->user ? client_session_label(s) : "",
                                 (uint32_t)user->uid, scheduler_class_name(client_session_class(s)),
                                 i.state, i.context_used, client_session_context_max(s),
                                 i.prompt_tokens, i.completion_tokens, i.queue_position);
}

static int list_sessions(struct client *c, sd_bus_message *m, bool all)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    int r;

    r = sd_bus_message_new_method_return(m, &reply);
    if (r >= 0)
        r = sd_bus_message_open_container(reply, 'a', "(osussuuttu)");
    for (struct client_session *s = session_set_first(c->service->sessions); r >= 0 && s;
         s = client_session_next(s))
        if (all || client_session_user(s) == c->user)
            r = append_session(reply, c, s);
    if (r >= 0)
        r = sd_bus_message_close_container(reply);
    return r < 0 ? r : sd_bus_send(NULL, reply, NULL);
}

static int list_all_sessions(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    return list_sessions(c, m, true);
}

/* Who calls, and whether the one option there is asks for everybody's sessions. */
static int read_caller_and_all(sd_bus_message *m, void *userdata, struct client **ret,
                               bool *ret_all, sd_bus_error *error)
{
    struct error err = {0};
    int r;

    r = served_client(userdata, m, ret, error);
    if (r < 0)
        return r;
    r = options_read_all(m, ret_all, &err);
    return r < 0 ? bus_error_set(error, r, &err) : 0;
}

static int method_list_sessions(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    bool all;
    int r;

    r = read_caller_and_all(m, userdata, &c, &all, error);
    if (r < 0)
        return r;
    return all ? client_authorise(c, ACTION_INSPECT_SESSIONS, m, list_all_sessions, error)
               : list_sessions(c, m, false);
}

static int subscribe_all(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    c->subscription = SUBSCRIBED_ALL;
    return sd_bus_reply_method_return(m, NULL);
}

static int subscribe(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    bool all;
    int r;

    r = read_caller_and_all(m, userdata, &c, &all, error);
    if (r < 0)
        return r;
    if (all)
        return client_authorise(c, ACTION_INSPECT_SESSIONS, m, subscribe_all, error);
    c->subscription = SUBSCRIBED_OWN;
    return sd_bus_reply_method_return(m, NULL);
}

static int unsubscribe(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    int r;

    r = served_client(userdata, m, &c, error);
    if (r < 0)
        return r;
    c->subscription = SUBSCRIBED_NOT;
    return sd_bus_reply_method_return(m, NULL);
}

/* ---- measuring ---- */

static void on_measured(struct job *j, void *userdata)
{
    struct pending_call *p = userdata;

    if (j->result < 0) {
        pending_call_fail(p, j->result, &j->error);
        return;
    }
    if (p->client)
        sd_bus_reply_method_return(p->message, "u", j->n_tokens);
    pending_call_free(p);
}

static int measure_now(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    CLEANUP(job_request_done) struct job_request request = {0};
    CLEANUP(freep) char *path = NULL;
    struct client_session *session;
    struct pending_call *p = NULL;
    struct error err = {0};
    int r;

    r = options_read_measure(m, &request, &path, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    if (path) {
        r = session_of_path(c, path, &session, error);
        if (r < 0)
            return r;
    }
    r = pending_call_new(&p, c, m);
    if (r >= 0)
        r = path ? client_session_ask(session, &request, on_measured, p, &err)
                 : session_set_measure(c->service->sessions, c->user, &request, on_measured, p,
                                       &err);
    if (r < 0) {
        pending_call_free(p);
        return bus_fail(c->service, error, r, &err);
    }
    return 1;
}

static int measure(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    int r;

    r = served_client(userdata, m, &c, error);
    return r < 0 ? r : client_authorise(c, ACTION_USE, m, measure_now, error);
}

/* ---- models ---- */

static int list_models(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    struct served *v = userdata;
    struct service *s = v->service;
    struct error err = {0};
    int r;

    r = options_read_none(m, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    r = sd_bus_message_new_method_return(m, &reply);
    if (r >= 0)
        r = sd_bus_message_open_container(reply, 'a', "(sstsb)");
    for (size_t i = 0; r >= 0 && s->models && i < model_store_n(s->models); i++) {
        const struct stored_model *model = model_store_get(s->models, i);

        r = sd_bus_message_append(reply, "(sstsb)", model->name, model_state_name(s, model),
                                  model->bytes, model->description ? model->description : "",
                                  model_is_default(s, model));
    }
    if (r >= 0)
        r = sd_bus_message_close_container(reply);
    return r < 0 ? r : sd_bus_send(NULL, reply, NULL);
}

static int need_store(const struct service *s, struct error *err)
{
    return s->models ? 0 : error_set(err, EOPNOTSUPP, "this daemon keeps no models");
}

/* Of the store's failures those that have no name on the bus. */
static int store_error(int r)
{
    return r == -EROFS ? -EOPNOTSUPP : r;
}

static int set_default_model(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    struct error err = {0};
    const char *name;
    int r;

    r = sd_bus_message_read(m, "s", &name);
    if (r < 0)
        return r;
    r = options_read_none(m, &err);
    if (r >= 0)
        r = need_store(c->service, &err);
    if (r >= 0)
        r = service_set_default_model(c->service, name, &err);
    if (r < 0)
        return bus_error_set(error, store_error(r), &err);
    return sd_bus_reply_method_return(m, NULL);
}

static void on_installed(void *userdata, const char *name, int r)
{
    struct service *s = userdata;
    struct error err = {0};

    if (r >= 0 && service_set_default_model(s, name, &err) < 0)
        log_warning("%s is installed, and cannot be made the default: %s", name, err.text);
}

static int install_model(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    CLEANUP(freep) char *path = NULL;
    struct install_options options;
    struct error err = {0};
    const char *name;
    int r, fd;

    r = sd_bus_message_read(m, "hs", &fd, &name);
    if (r < 0)
        return r;
    r = options_read_install(m, &options, &err);
    if (r >= 0)
        r = need_store(c->service, &err);
    if (r >= 0)
        r = model_store_install(c->service->models, fd, name, options.replace,
                                options.set_default ? on_installed : NULL, c->service, &err);
    if (r >= 0)
        r = sd_bus_path_encode(LLM_MODEL_PATH, name, &path);
    if (r < 0)
        return bus_error_set(error, store_error(r), &err);
    return sd_bus_reply_method_return(m, "o", path);
}

static int remove_model(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    struct error err = {0};
    const char *name;
    int r;

    r = sd_bus_message_read(m, "s", &name);
    if (r < 0)
        return r;
    r = options_read_none(m, &err);
    if (r >= 0 && strcmp(name, session_set_model_name(c->service->sessions)) == 0)
        r = error_set(&err, EBUSY, "%.200s: is loaded; make another one the default first", name);
    if (r >= 0)
        r = need_store(c->service, &err);
    if (r >= 0)
        r = model_store_remove(c->service->models, name, &err);
    if (r < 0)
        return bus_error_set(error, store_error(r), &err);
    return sd_bus_reply_method_return(m, NULL);
}

static int managing_models(sd_bus_message *m, struct served *v, client_method go,
                           sd_bus_error *error)
{
    struct client *c;
    int r;

    r = served_client(v, m, &c, error);
    return r < 0 ? r : client_authorise(c, ACTION_MANAGE_MODELS, m, go, error);
}

static int method_set_default_model(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    return managing_models(m, userdata, set_default_model, error);
}

static int method_install_model(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    return managing_models(m, userdata, install_model, error);
}

static int method_remove_model(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    return managing_models(m, userdata, remove_model, error);
}

/* ---- figures ---- */

struct lanes {
    struct engine_statistics statistics;
    struct placement_info placement;
    struct lane_info info[ENGINE_LANES];
    char explanation[256];
};

/* Of a GPU that there is, or could be. *ret_reason: why it is not used; "" */
static const char *gpu_state(const struct service *s, const struct lanes *l,
                             const char **ret_reason)
{
    const char *failure = gpu_failure(s->gpu);

    *ret_reason = "";
    if (l->info[LANE_GPU].failure[0])
        failure = l->info[LANE_GPU].failure;
    if (failure) {
        *ret_reason = failure;
        return "failed";
    }
    if (!gpu_device(s->gpu))
        return "none";
    if (!l->info[LANE_GPU].works)
        return "waiting";
    switch (l->placement.state) {
    case PLACEMENT_WORKS:
        break;
    case PLACEMENT_UNMEASURED:
        *ret_reason = "how fast it is has not been measured yet";
        return "unmeasured";
    case PLACEMENT_ON_BATTERY:
        *ret_reason = "the machine runs on its battery";
        return "on-battery";
    case PLACEMENT_BACKS_OFF:
        *ret_reason = "others use it, and it is left to them for a while";
        return "backs-off";
    }
    return "in-use";
}

static int append_lanes(sd_bus_message *reply, const struct service *s, const struct lanes *l)
{
    static const char *const names[ENGINE_LANES] = {[LANE_CPU] = "cpu", [LANE_GPU] = "gpu"};
    const struct placement_rates *rates = &l->placement.rates;
    const char *reason, *state = gpu_state(s, l, &reason);
    const struct vulkan_device *device = gpu_device(s->gpu);
    int r;

    r = sd_bus_message_append(reply, "{sv}{sv}{sv}{sv}{sv}{sv}", "placement", "s", l->explanation,
                              "gpu", "s", device ? vulkan_device_name(device) : "", "gpu-state",
                              "s", state, "gpu-reason", "s", reason, "both-prefill-measured", "d",
                              rates->both_prefill, "both-decode-measured", "d",
                              rates->both_decode);
    for (int i = 0; i < ENGINE_LANES && r >= 0; i++) {
        const struct lane_statistics *x = &l->statistics.lanes[i];
        const struct lane_rates *y = &rates->lane[i];
        const struct {
            const char *name;
            uint64_t number;
            double rate;
        } entries[] = {{"prompt-tokens", x->prompt_rows, -1},
                       {"completion-tokens", x->decoded_rows, -1},
                       {"busy-usec", x->usec, -1},
                       {"prefill-measured", 0, y->prefill},
                       {"decode-measured", 0, y->decode},
                       {"decode-many-measured", 0, y->decode_many}};
        char name[48];

        for (size_t j = 0; j < ARRAY_SIZE(entries) && r >= 0; j++) {
            snprintf(name, sizeof(name), "%s-%s", names[i], entries[j].name);
            r = entries[j].rate < 0
                    ? sd_bus_message_append(reply, "{sv}", name, "t", entries[j].number)
                    : sd_bus_message_append(reply, "{sv}", name, "d", entries[j].rate);
        }
    }
    return r;
}

static void get_lanes(const struct service *s, struct lanes *ret)
{
    struct engine_thread *engine = session_set_engine(s->sessions);

    *ret = (struct lanes){.explanation = ""};
    session_set_get_statistics(s->sessions, &ret->statistics);
    if (!engine)
        return;
    engine_thread_get_placement(engine, &ret->placement);
    engine_thread_get_lanes(engine, ret->info);
    engine_thread_explain(engine, ret->explanation, sizeof(ret->explanation));
}

static int get_statistics(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    struct served *v = userdata;
    struct session_set *sessions = v->service->sessions;
    const struct engine_statistics *i;
    struct lanes lanes;
    int r;

    get_lanes(v->service, &lanes);
    i = &lanes.statistics;
    r = sd_bus_message_new_method_return(m, &reply);
    if (r >= 0)
        r = sd_bus_message_open_container(reply, 'a', "{sv}");
    if (r >= 0)
        r = sd_bus_message_append(
            reply, "{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}", "requests", "t", i->requests,
            "requests-cancelled", "t", i->requests_cancelled, "requests-failed", "t",
            i->requests_failed, "requests-refused", "t", session_set_n_refused(sessions),
            "prompt-tokens", "t", i->prompt_tokens, "completion-tokens", "t", i->completion_tokens,
            "steps", "t", i->steps, "preemptions", "t", i->preemptions, "kv-given-back", "t",
            i->kv_given_back, "uptime-usec", "t", clients_uptime_usec(v->service->clients));
    if (r >= 0)
        r = sd_bus_message_append(
            reply, "{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}{sv}", "queued", "u", i->queued,
            "running", "u", i->running, "sessions", "u", session_set_n_sessions(sessions),
            "clients", "u", clients_n(v->service->clients), "kv-bytes-used", "t", i->kv_bytes_used,
            "kv-bytes-max", "t", i->kv_bytes_max, "kv-spilled", "t", i->kv_spilled, "kv-restored",
            "t", i->kv_restored, "kv-bytes-spilled", "t", i->kv_bytes_spilled, "memory-pressure",
            "u", memory_pressure_level(v->service->pressure), "prefill-rate", "d", i->prefill_rate,
            "decode-rate", "d", i->decode_rate);
    if (r >= 0)
        r = append_lanes(reply, v->service, &lanes);
    if (r >= 0)
        r = sd_bus_message_close_container(reply);
    return r < 0 ? r : sd_bus_send(NULL, reply, NULL);
}

/* ---- quotas ---- */

static int get_quota(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    struct engine_thread *engine = session_set_engine(c->service->sessions);
    struct user_limits l;
    const struct user *user;
    uint32_t uid;
    int r;

    r = sd_bus_message_read(m, "u", &uid);
    if (r < 0)
        return r;
    users_get_limits(c->service->users, uid, &l);
    user = users_find(c->service->users, uid);
    r = sd_bus_message_new_method_return(m, &reply);
    if (r >= 0)
        r = sd_bus_message_append(
            reply, "a{sv}", 8, "max-sessions", "u", l.max_sessions, "max-kv-bytes", "t",
            l.max_kv_bytes, "max-queued", "u", l.max_queued, "weight", "u", l.weight,
            "tokens-per-minute", "u", l.tokens_per_minute, "sessions", "u",
            user ? user->n_sessions : 0, "kv-bytes", "t",
            engine ? engine_thread_account_kv_bytes(engine, uid) : UINT64_C(0), "queued", "u",
            user ? user->n_queued : 0);
    return r < 0 ? r : sd_bus_send(NULL, reply, NULL);
}

static int method_get_quota(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    uint32_t uid;
    int r;

    r = served_client(userdata, m, &c, error);
    if (r < 0)
        return r;
    r = sd_bus_message_read(m, "u", &uid);
    if (r >= 0)
        r = sd_bus_message_rewind(m, true);
    if (r < 0)
        return r;
    return uid == c->who.uid ? get_quota(c, m, error)
                             : client_authorise(c, ACTION_MANAGE_QUOTAS, m, get_quota, error);
}

static int set_quota(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    struct engine_thread *engine = session_set_engine(c->service->sessions);
    struct error err = {0};
    struct user_limits l;
    uint32_t uid;
    int r;

    r = sd_bus_message_read(m, "u", &uid);
    if (r < 0)
        return r;
    users_get_limits(c->service->users, uid, &l);
    r = options_read_quota(m, &l, &err);
    if (r >= 0)
        r = users_set_limits(c->service->users, uid, &l);
    if (r < 0)
        return bus_error_set(error, r, &err);
    if (engine)
        engine_thread_set_weight(engine, uid, l.weight);
    return sd_bus_reply_method_return(m, NULL);
}

static int method_set_quota(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    int r;

    r = served_client(userdata, m, &c, error);
    return r < 0 ? r : client_authorise(c, ACTION_MANAGE_QUOTAS, m, set_quota, error);
}

/* ---- properties ---- */

static int get_version(sd_bus *bus, const char *path, const char *interface, const char *property,
                       sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    return sd_bus_message_append(reply, "s", LLMD_VERSION);
}

static int get_instance(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "s", v->service->instance);
}

static const char *state_name(const struct service *s)
{
    if (session_set_is_stopping(s->sessions))
        return "stopping";
    switch (s->state) {
    case SERVICE_LOADING:
        return "loading";
    case SERVICE_READY:
        return "ready";
    case SERVICE_DEGRADED:
        return "degraded";
    case SERVICE_STOPPING:
        return "stopping";
    }
    return "stopping";
}

static int get_state(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "s", state_name(v->service));
}

static int get_load_progress(sd_bus *bus, const char *path, const char *interface,
                             const char *property, sd_bus_message *reply, void *userdata,
                             sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "d", v->service->load_progress);
}

static int get_models(sd_bus *bus, const char *path, const char *interface, const char *property,
                      sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;
    const struct model_store *models = v->service->models;
    int r;

    r = sd_bus_message_open_container(reply, 'a', "s");
    for (size_t i = 0; r >= 0 && models && i < model_store_n(models); i++)
        r = sd_bus_message_append(reply, "s", model_store_get(models, i)->name);
    return r < 0 ? r : sd_bus_message_close_container(reply);
}

static int get_default_model(sd_bus *bus, const char *path, const char *interface,
                             const char *property, sd_bus_message *reply, void *userdata,
                             sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "s", default_model(v->service));
}

static int get_model(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "s", session_set_model_name(v->service->sessions));
}

static int get_backends(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;
    struct engine_thread *engine = session_set_engine(v->service->sessions);
    const char *failure = gpu_failure(v->service->gpu);
    struct lane_info lanes[ENGINE_LANES];
    char failed[sizeof(struct error) + 32];

    if (!engine)
        return sd_bus_message_append(reply, "as", 0);
    engine_thread_get_lanes(engine, lanes);
    if (lanes[LANE_GPU].failure[0])
        failure = lanes[LANE_GPU].failure;
    if (!failure)
        return sd_bus_message_append(reply, "as", 1, engine_thread_description(engine));
    snprintf(failed, sizeof(failed), "vulkan, not used: %s", failure);
    return sd_bus_message_append(reply, "as", 2, engine_thread_description(engine), failed);
}

static int get_sessions(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "u", session_set_n_sessions(v->service->sessions));
}

static int get_kv_bytes(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;
    struct engine_thread *engine = session_set_engine(v->service->sessions);
    uint64_t used = 0, most = 0;

    if (engine)
        engine_thread_kv_bytes(engine, &used, &most);
    return sd_bus_message_append(reply, "t", strcmp(property, "KvBytesUsed") == 0 ? used : most);
}

#define CHANGES SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE

const sd_bus_vtable manager_vtable[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD_WITH_ARGS("CreateSession", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("o", session), create_session,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("ListSessions", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("a(osussuuttu)", sessions), method_list_sessions,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("ListModels", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("a(sstsb)", models), list_models,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("SetDefaultModel", SD_BUS_ARGS("s", name, "a{sv}", options),
                            SD_BUS_NO_RESULT, method_set_default_model, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("InstallModel", SD_BUS_ARGS("h", file, "s", name, "a{sv}", options),
                            SD_BUS_RESULT("o", model), method_install_model,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("RemoveModel", SD_BUS_ARGS("s", name, "a{sv}", options),
                            SD_BUS_NO_RESULT, method_remove_model, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Measure", SD_BUS_ARGS("a{sv}", options), SD_BUS_RESULT("u", tokens),
                            measure, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("GetStatistics", SD_BUS_NO_ARGS, SD_BUS_RESULT("a{sv}", statistics),
                            get_statistics, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("GetQuota", SD_BUS_ARGS("u", uid), SD_BUS_RESULT("a{sv}", quota),
                            method_get_quota, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("SetQuota", SD_BUS_ARGS("u", uid, "a{sv}", quota), SD_BUS_NO_RESULT,
                            method_set_quota, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Subscribe", SD_BUS_ARGS("a{sv}", options), SD_BUS_NO_RESULT, subscribe,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("Unsubscribe", NULL, NULL, unsubscribe, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_SIGNAL("Restarted", NULL, 0),
    SD_BUS_PROPERTY("Version", "s", get_version, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("Instance", "s", get_instance, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("State", "s", get_state, 0, CHANGES),
    SD_BUS_PROPERTY("LoadProgress", "d", get_load_progress, 0, 0),
    SD_BUS_PROPERTY("Models", "as", get_models, 0, CHANGES),
    SD_BUS_PROPERTY("DefaultModel", "s", get_default_model, 0, CHANGES),
    SD_BUS_PROPERTY("Model", "s", get_model, 0, CHANGES),
    SD_BUS_PROPERTY("Backends", "as", get_backends, 0, CHANGES),
    SD_BUS_PROPERTY("Sessions", "u", get_sessions, 0, 0),
    SD_BUS_PROPERTY("KvBytesUsed", "t", get_kv_bytes, 0, 0),
    SD_BUS_PROPERTY("KvBytesMax", "t", get_kv_bytes, 0, 0),
    SD_BUS_VTABLE_END,
};

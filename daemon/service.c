/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A model comes in three steps: a thread opens the file (model_loader), the loop makes an engine of
 * it, and another thread reads it into memory (prefetch) while the engine serves already. A model
 * that is to replace another one is opened first and waits as `next` until no session is open; so
 * an exchange that fails leaves what was there.
 *
 * The daemon ends in two steps: service_stop() lets nobody in and stops all requests; when the last
 * stream has said why, the loop ends. Readers who do not take it are cut after a grace.
 */

#include "daemon/service.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "backends/vulkan/vulkan.h"
#include "base/cleanup.h"
#include "daemon/arguments.h"
#include "daemon/authority.h"
#include "daemon/build-identity.h"
#include "daemon/bus-host.h"
#include "daemon/bus.h"
#include "daemon/calibration-file.h"
#include "daemon/client-session.h"
#include "daemon/client.h"
#include "daemon/config.h"
#include "daemon/confinement.h"
#include "daemon/engine-thread.h"
#include "daemon/fd-store.h"
#include "daemon/file-transfer.h"
#include "daemon/former-owner.h"
#include "daemon/gpu.h"
#include "daemon/log.h"
#include "daemon/memory-pressure.h"
#include "daemon/model-loader.h"
#include "daemon/model-store.h"
#include "daemon/notify.h"
#include "daemon/places.h"
#include "daemon/power.h"
#include "daemon/prefetch-child.h"
#include "daemon/prefetch.h"
#include "daemon/recovery.h"
#include "daemon/saved-session.h"
#include "daemon/server.h"
#include "daemon/unit-job.h"
#include "daemon/users.h"
#include "engine/model-fault.h"
#include "engine/model-file.h"
#include "engine/model.h"

#define GRACE_USEC 2000000u    /* for readers to take what a stopped request still has to say */
#define EXCHANGE_USEC 5000000u /* for readers of the last model's streams, before it goes */
#define POWER_USEC 30000000u   /* between two looks at whether there is mains */
#define LOAD_EXTEND_USEC UINT64_C(60000000)

struct numbers {
    uint32_t sessions, clients, running, queued;
    uint32_t pressure, mib_spilled;
};

struct service_private {
    struct config *config;
    struct places places;
    struct notify *notify;
    struct model_loader *loader;
    struct prefetch *prefetch;
    struct prefetch_child *reader; /* of the first model, until prefetch has it; or NULL */
    bool reader_is_told;           /* which file that is */
    int state_fd;                  /* the state folder; -EBADF: there is none, -errno */
    char *loading;                 /* what the loader opens: a name, or a path */
    struct model *next;
    char *next_name;
    sd_event_source *idle_timer, *grace_timer, *exchange_timer, *power_timer;
    char calibration_key[CALIBRATION_KEY]; /* of the engine with its GPU; read by its thread */
    sd_event_source *status_source;        /* post: NULL where nobody wants to know */
    sd_event_source *end_source;           /* deferred: the loop ends */
    struct unit_job *job;                  /* asked for, after a signal to stop */
    int signal;                            /* that one */
    sd_event_source *fault_source;         /* a model's file has changed */
    struct numbers told;                   /* in the last status line */
    unsigned pressure_said;
    bool recovered;     /* what another process left was looked at */
    bool open;          /* clients are let in */
    bool ready;         /* READY=1 was said */
    bool failed;        /* a private daemon that cannot serve */
    bool model_changed; /* why it stops */
    struct error failure;
};

static void consider_idleness(struct service *s);

/* ---- what others see ---- */

static struct numbers count(const struct service *s)
{
    struct numbers n = {.sessions = session_set_n_sessions(s->sessions),
                        .clients = clients_n(s->clients)};
    struct engine_statistics statistics = {0};

    if (s->engine)
        engine_thread_get_statistics(s->engine, &statistics);
    n.running = statistics.running;
    n.queued = statistics.queued;
    n.pressure = memory_pressure_level(s->pressure);
    n.mib_spilled = (uint32_t)(statistics.kv_bytes_spilled >> 20);
    return n;
}

/* "", or what there is to say of memory. */
static void memory_text(const struct numbers *n, char *ret, size_t size)
{
    ret[0] = 0;
    if (n->pressure > 0)
        snprintf(ret, size, "; memory is short, level %u of %u", n->pressure, PRESSURE_MOST);
    if (n->mib_spilled > 0)
        snprintf(ret + strlen(ret), size - strlen(ret), "; %u MiB of KV on disk", n->mib_spilled);
}

static void show_status(struct service *s)
{
    struct service_private *p = s->private;
    struct numbers n = count(s);
    char memory[96];

    p->told = n;

    switch (s->state) {
    case SERVICE_STOPPING:
        notify_status(p->notify, "Stopping");
        return;
    case SERVICE_LOADING:
        if (s->model)
            notify_status(p->notify, "Loading %s: %d %%", s->model_name,
                          (int)(s->load_progress * 100));
        else
            notify_status(p->notify, "Opening %s", p->loading ? p->loading : "the model");
        return;
    case SERVICE_DEGRADED:
        if (!s->model) {
            notify_status(p->notify, "No model: %s", s->failure ? s->failure : "none is installed");
            return;
        }
        break;
    case SERVICE_READY:
        break;
    }
    memory_text(&n, memory, sizeof(memory));
    notify_status(p->notify, "Serving %s: %u session%s of %u client%s, %u running, %u queued%s%s",
                  s->model_name, n.sessions, n.sessions == 1 ? "" : "s", n.clients,
                  n.clients == 1 ? "" : "s", n.running, n.queued,
                  s->state == SERVICE_DEGRADED ? "; another model could not be loaded" : "",
                  memory);
}

/* After whatever the loop did: who comes and what begins is told to nobody else. */
static int on_status(sd_event_source *source, void *userdata)
{
    struct service *s = userdata;
    struct numbers n = count(s);

    (void)source;
    if (memcmp(&n, &s->private->told, sizeof(n)) != 0)
        show_status(s);
    return 0;
}

static void set_state(struct service *s, enum service_state state)
{
    if (s->state != state && s->state != SERVICE_STOPPING) {
        s->state = state;
        bus_manager_changed(s, BUS_STATE);
    }
    show_status(s);
}

static void say_ready(struct service *s)
{
    struct service_private *p = s->private;
    int fd = s->arguments->ready_fd;

    if (p->ready)
        return;
    p->ready = true;
    notify_ready(p->notify);
    if (fd >= 0) {
        dprintf(fd, "READY=1\n");
        close(fd);
    }
}

static bool engine_is_alive(void *userdata)
{
    struct service *s = userdata;

    return !s->engine || engine_thread_is_alive(s->engine);
}

/* ---- the model ---- */

static void set_failure(struct service *s, const char *text)
{
    free(s->failure);
    s->failure = text ? strdup(text) : NULL;
}

/* A file's name without folder and suffix, as the session set has it. */
static char *name_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path, *dot = strrchr(name, '.');

    return dot && dot > name ? strndup(name, (size_t)(dot - name)) : strdup(name);
}

static bool is_usable(const struct stored_model *m)
{
    return m && m->state == MODEL_AVAILABLE;
}

/* The one called default; the only one besides demo; demo. */
static const struct stored_model *only_model(const struct model_store *store)
{
    const struct stored_model *only = NULL;
    size_t n = 0;

    if (is_usable(model_store_find(store, "default")))
        return model_store_find(store, "default");
    for (size_t i = 0; i < model_store_n(store); i++) {
        const struct stored_model *m = model_store_get(store, i);

        if (!is_usable(m) || strcmp(m->name, "demo") == 0)
            continue;
        only = m;
        n++;
    }
    if (n == 1)
        return only;
    return n == 0 && is_usable(model_store_find(store, "demo")) ? model_store_find(store, "demo")
                                                                : NULL;
}

/* Where a name or a path leads; *ret is malloc'ed. 0, -ENOENT, -EAGAIN, -ENOMEM */
static int path_of(struct service *s, const char *model, char **ret, struct error *err)
{
    const struct stored_model *m = model_store_find(s->models, model);

    if (m && m->state == MODEL_INSTALLING)
        return error_set(err, EAGAIN, "model '%s' is still being installed", m->name);
    if (m && m->state == MODEL_FAILED)
        return error_set(err, ENOENT, "model '%s': %s", m->name,
                         m->failure ? m->failure : "is not usable");
    if (!m && !strchr(model, '/') && access(model, F_OK) < 0)
        return error_set(err, ENOENT,
                         "there is no model '%.100s'; see llmctl model list, or install one with "
                         "llmctl model install FILE",
                         model);
    *ret = strdup(m ? m->path : model);
    return *ret ? 0 : error_set(err, ENOMEM, "out of memory");
}

/* Which model to begin with: 0: *ret_path, -ENOENT, -errno */
static int choose_model(struct service *s, char **ret_path, struct error *err)
{
    const char *wanted[] = {model_store_default(s->models), s->config->model};
    const struct stored_model *m;

    if (s->arguments->model)
        return path_of(s, s->arguments->model, ret_path, err);
    for (size_t i = 0; i < 2; i++) {
        if (!wanted[i])
            continue;
        if (path_of(s, wanted[i], ret_path, err) >= 0)
            return 0;
        log_warning("the default model cannot be had: %s", err ? err->text : wanted[i]);
    }
    m = only_model(s->models);
    if (m) {
        *ret_path = strdup(m->path);
        return *ret_path ? 0 : error_set(err, ENOMEM, "out of memory");
    }
    if (wanted[0] || wanted[1])
        return -ENOENT; /* err says it */
    if (model_store_n(s->models) > 0)
        return error_set(err, ENOENT,
                         "several models are installed and none is the default: choose one with "
                         "llmctl model default NAME");
    return error_set(err, ENOENT,
                     "no model is installed: make one with llm-import, then llmctl model install "
                     "FILE");
}

static void take_down(struct service *s)
{
    struct service_private *p = s->private;

    session_set_set_engine(s->sessions, NULL, 0);
    p->prefetch = prefetch_free(p->prefetch);
    s->engine = engine_thread_free(s->engine);
    s->model = model_free(s->model);
    free(s->model_name);
    s->model_name = strdup("");
}

static void loaded(struct service *s)
{
    set_failure(s, NULL);
    set_state(s, SERVICE_READY);
    log_with(LOG_INFO, &(struct log_fields){.message_id = LOG_ID_READY, .model = s->model_name},
             "serving %s with %s", model_file_path(model_get_file(s->model)),
             engine_thread_description(s->engine));
    say_ready(s);
    consider_idleness(s);
}

static void on_prefetch(void *userdata)
{
    struct service *s = userdata;
    struct service_private *p = s->private;

    s->load_progress = prefetch_progress(p->prefetch);
    if (!p->ready)
        notify_extend(p->notify, LOAD_EXTEND_USEC);
    if (!prefetch_is_over(p->prefetch)) {
        show_status(s);
        return;
    }
    p->prefetch = prefetch_free(p->prefetch);
    engine_thread_set_loading(s->engine, false);
    if (s->state == SERVICE_LOADING)
        loaded(s);
}

static void set_weights(struct service *s)
{
    int r = 0;

    for (size_t i = 0; s->engine && i < s->config->n_users && r >= 0; i++) {
        struct user_limits limits;

        config_limits(s->config, s->config->users[i].uid, &limits);
        r = engine_thread_set_weight(s->engine, s->config->users[i].uid, limits.weight);
    }
    if (r < 0)
        log_error("not all users have the weight that the configuration gives them: %s",
                  strerror(-r));
}

struct engine_options service_engine_options(const struct arguments *a, const struct config *c)
{
    struct engine_options o = a->engine;

    if (!a->has_activations)
        o.activations = c->activations;
    if (!a->has_kv_type)
        o.kv_type = c->kv_type;
    if (!o.cpu_level)
        o.cpu_level = c->cpu_level;
    if (o.n_threads == 0)
        o.n_threads = c->n_threads;
    if (!a->has_pinning)
        o.no_pinning = !c->pin_threads;
    if (o.kv_bytes == 0)
        o.kv_bytes = c->kv_bytes;
    return o;
}

/* The manager has one pool: this engine's. */
static void keep_kv(struct service *s)
{
    int fd = engine_thread_kv_fd(s->engine);

    if (engine_thread_kv_adopted(s->engine))
        return;
    fd_store_remove(s->store, "kv");
    if (fd >= 0) /* else K and V are a GPU's, which sees no memory of others', and go with us */
        fd_store_push(s->store, "kv", &fd, 1);
}

/* Once, before clients are let in: they find everything as it was. */
static void recover(struct service *s)
{
    struct service_private *p = s->private;
    bool inherited;

    if (p->recovered)
        return;
    p->recovered = true;
    if (!s->engine) {
        recovery_give_up(s, &s->recovered);
        fd_store_drop(s->store, "kv");
    } else {
        recovery_run(s, &s->recovered);
    }
    /* Without sessions, who was here before finds nothing of its own. */
    if (recovery_instance(s, !s->engine || s->recovered.n_sessions == 0, s->instance, &inherited) <
        0)
        log_error("this instance has no name: clients cannot tell it from others");
    else
        s->recovered.took_back = inherited;
    fd_store_drop_rest(s->store);
}

static enum placement_mode backend(const struct service *s)
{
    return s->arguments->has_backend ? s->arguments->backend : s->config->backend;
}

/* Engine thread. */
static void on_calibrated(void *userdata, const struct calibration_result *c)
{
    struct service *s = userdata;
    const char *folder = s->private->places.cache;
    int r = calibration_write(folder, s->private->calibration_key,
                              vulkan_device_name(gpu_device(s->gpu)), c);

    if (r < 0)
        log_warning("%s: how fast CPU and GPU are is not kept, and is measured again next time: %s",
                    folder, strerror(-r));
}

/* Of the engine that is new, and has no GPU yet. */
static void set_calibration(struct service *s)
{
    struct service_private *p = s->private;
    struct calibration_result known;
    struct error err = {0};
    int r;

    if (!gpu_device(s->gpu) || backend(s) != PLACE_AUTO)
        return;
    if (!p->places.cache || calibration_key(p->calibration_key, s->model, gpu_device(s->gpu),
                                            engine_thread_description(s->engine)) < 0) {
        engine_thread_set_calibration(s->engine, NULL, NULL, NULL);
        return;
    }
    r = calibration_read(p->places.cache, p->calibration_key, &known, &err);
    if (r < 0 && r != -ENOENT)
        log_notice("how fast CPU and GPU are is measured again: %s",
                   err.text[0] ? err.text : strerror(-r));
    engine_thread_set_calibration(s->engine, r < 0 ? NULL : &known, on_calibrated, s);
}

/* Looked at while there is a GPU that it matters to; which may have been lost, and come back. */
static void look_at_power(struct service *s)
{
    if (!s->engine || !gpu_device(s->gpu))
        return;
    engine_thread_retry_gpu(s->engine, false);
    engine_thread_set_on_battery(s->engine,
                                 !s->config->gpu_on_battery && power_on_battery(POWER_SUPPLIES));
    sd_event_source_set_time_relative(s->private->power_timer, POWER_USEC);
    sd_event_source_set_enabled(s->private->power_timer, SD_EVENT_ONESHOT);
}

static int on_power_due(sd_event_source *source, uint64_t usec, void *userdata)
{
    (void)source;
    (void)usec;
    look_at_power(userdata);
    return 0;
}

/* Engine thread. */
static void on_gpu_rests(void *userdata)
{
    gpu_rests(userdata);
}

/* Of a model that is open. No session is. 0: it serves; -errno: there is no engine now */
static int make_engine(struct service *s, struct model *m, struct error *err)
{
    struct engine_options options = service_engine_options(s->arguments, s->config);
    uint32_t context = s->arguments->context, most = model_config(m)->context_max;
    uint8_t identity[SAVED_MODEL_BYTES], kv_identity[BUILD_IDENTITY_BYTES];
    int r;

    if (context > most)
        return error_set(err, EINVAL, "--context %u: the model has %u tokens at most", context,
                         most);
    if (context == 0 && s->config->context > most)
        log_warning("Context=%u: the model has %u tokens at most, which is taken",
                    s->config->context, most);
    else if (context == 0)
        context = s->config->context;
    if (saved_session_model(model_get_file(m), identity) >= 0 &&
        build_identity(identity, kv_identity) >= 0) {
        options.kv_identity = kv_identity;
        options.has_kv_fd = fd_store_next(s->store, "kv", &options.kv_fd) > 0;
    }
    options.gpu = gpu_device(s->gpu);
    r = engine_thread_new(&s->engine, m, &options, err);
    if (options.has_kv_fd)
        close(options.kv_fd);
    if (r < 0)
        return r;
    keep_kv(s);
    r = session_set_set_engine(s->sessions, s->engine, context);
    if (r < 0) {
        s->engine = engine_thread_free(s->engine);
        return error_set(err, -r, "cannot set up the sessions: %s", strerror(-r));
    }
    free(s->model_name);
    s->model_name = strdup(session_set_model_name(s->sessions));
    engine_thread_set_spill_folder(s->engine, s->private->state_fd);
    engine_thread_set_placement(s->engine, gpu_device(s->gpu) ? backend(s) : PLACE_CPU);
    engine_thread_set_gpu_rests(s->engine, on_gpu_rests, s->gpu);
    set_calibration(s);
    look_at_power(s);
    set_weights(s);
    return 0;
}

/*
 * Lets clients in, once it is known what there is for them. Until then those who started us by
 * connecting, or by calling, wait; else the first thing that they heard would be that there is no
 * model. A private daemon's starter waits for READY=1.
 */
static int open_doors(struct service *s, struct error *err)
{
    struct service_private *p = s->private;
    int r;

    if (p->open)
        return 0;
    p->open = true;
    former_owners_begin(s->former);
    r = server_start(s->server, err);
    if (r < 0 || s->scope == SCOPE_PRIVATE || s->arguments->no_bus)
        return r;
    r = bus_host_new(&s->bus, s);
    return r < 0 ? error_set(err, -r, "cannot set up the bus: %s", strerror(-r)) : 0;
}

static void give_up(struct service *s, int r, const struct error *err)
{
    s->private->failed = true;
    s->private->failure = *err;
    sd_event_exit(s->event, r);
}

/* s->model has an engine. */
static void begin_serving(struct service *s)
{
    struct service_private *p = s->private;
    struct error err = {0};
    int r;

    recover(s);
    r = open_doors(s, &err);
    if (r < 0) {
        give_up(s, r, &err);
        return;
    }
    bus_manager_changed(s, BUS_MODEL | BUS_BACKENDS);
    s->load_progress = 0;
    r = -EOPNOTSUPP;
    if (s->config->prefetch)
        r = prefetch_new(&p->prefetch, s->event, s->model, TAKE_PTR(p->reader), on_prefetch, s);
    engine_thread_set_loading(s->engine, r >= 0);
    if (r < 0 || s->scope == SCOPE_PRIVATE || p->ready) {
        /* What is not in memory yet comes when it is wanted; nobody waits for all of it. */
        if (r < 0)
            s->load_progress = 1;
        loaded(s);
    } else {
        set_state(s, SERVICE_LOADING);
    }
}

static void load_failed(struct service *s, int r, const struct error *err)
{
    struct service_private *p = s->private;
    struct error why = {0};

    p->reader = prefetch_child_free(p->reader);
    if (s->scope == SCOPE_PRIVATE) {
        give_up(s, r, err);
        return;
    }
    log_with(LOG_ERR, &(struct log_fields){.message_id = LOG_ID_MODEL_FAILED, .model = p->loading},
             "%s", err->text[0] ? err->text : strerror(-r));
    if (!s->engine)
        set_failure(s, err->text[0] ? err->text : strerror(-r));
    set_state(s, SERVICE_DEGRADED);
    recover(s);
    r = open_doors(s, &why);
    if (r < 0) {
        give_up(s, r, &why);
        return;
    }
    say_ready(s); /* others are to be able to install a better one */
}

/* `next` takes the place of what is there, which no session uses. */
static void exchange(struct service *s)
{
    struct service_private *p = s->private;
    struct model *old = NULL;
    struct error err = {0};
    int r;

    sd_event_source_set_enabled(p->exchange_timer, SD_EVENT_OFF);
    session_set_set_engine(s->sessions, NULL, 0);
    p->prefetch = prefetch_free(p->prefetch);
    s->engine = engine_thread_free(s->engine);
    old = TAKE_PTR(s->model);
    s->model = TAKE_PTR(p->next);
    free(TAKE_PTR(p->next_name));
    r = make_engine(s, s->model, &err);
    if (r >= 0) {
        model_free(old);
        begin_serving(s);
        return;
    }
    model_free(s->model);
    s->model = old;
    if (!old || make_engine(s, old, NULL) < 0)
        take_down(s);
    load_failed(s, r, &err);
}

static void try_exchange(struct service *s)
{
    struct service_private *p = s->private;
    int enabled = SD_EVENT_OFF;

    if (!p->next || session_set_n_sessions(s->sessions) > 0)
        return;
    if (session_set_is_quiet(s->sessions)) {
        exchange(s);
        return;
    }
    /* Somebody has yet to read what ended sessions answered. */
    sd_event_source_get_enabled(p->exchange_timer, &enabled);
    if (enabled == SD_EVENT_OFF) {
        sd_event_source_set_time_relative(p->exchange_timer, EXCHANGE_USEC);
        sd_event_source_set_enabled(p->exchange_timer, SD_EVENT_ONESHOT);
    }
}

static int on_exchange_late(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct service *s = userdata;

    (void)source;
    (void)usec;
    if (s->private->next && session_set_n_sessions(s->sessions) == 0)
        session_set_cut_streams(s->sessions); /* leads to service_something_went() */
    return 0;
}

static void on_opened(void *userdata, struct model *m, int r, const struct error *err)
{
    struct service *s = userdata;
    struct service_private *p = s->private;

    p->loader = model_loader_free(p->loader);
    if (service_is_stopping(s)) {
        model_free(m);
        return;
    }
    if (r < 0) {
        load_failed(s, r, err);
        return;
    }
    free(p->next_name);
    p->next_name = TAKE_PTR(p->loading);
    model_free(p->next);
    p->next = m;
    try_exchange(s);
    if (p->next)
        log_info("%s is opened; it is served when the sessions of %s are closed", p->next_name,
                 s->model_name);
}

/* Begins to open the file; what was being opened is given up. */
static int load(struct service *s, const char *path, struct error *err)
{
    struct service_private *p = s->private;
    int r;

    p->loader = model_loader_free(p->loader);
    p->next = model_free(p->next);
    free(p->loading);
    p->loading = name_of(path);
    if (p->reader_is_told)
        p->reader = prefetch_child_free(p->reader);
    p->reader_is_told = true;
    r = model_loader_new(&p->loader, s->event, path, p->reader, on_opened, s);
    if (r < 0)
        return error_set(err, -r, "%s: cannot be opened: %s", path, strerror(-r));
    if (!s->engine)
        set_state(s, SERVICE_LOADING);
    return 0;
}

static void load_first(struct service *s)
{
    CLEANUP(freep) char *path = NULL;
    struct error err = {0};
    int r;

    r = choose_model(s, &path, &err);
    if (r >= 0)
        r = load(s, path, &err);
    if (r < 0)
        load_failed(s, r, &err);
}

int service_set_default_model(struct service *s, const char *name, struct error *err)
{
    CLEANUP(freep) char *path = NULL;
    struct service_private *p = s->private;
    int r;

    if (!model_store_find(s->models, name))
        return error_set(err, ENOENT, "there is no model '%.100s'; see llmctl model list", name);
    r = path_of(s, name, &path, err);
    if (r < 0)
        return r;
    r = model_store_set_default(s->models, name, err);
    if (r < 0)
        return r;
    bus_manager_changed(s, BUS_DEFAULT_MODEL);
    if (s->engine && strcmp(s->model_name, name) == 0) {
        p->loader = model_loader_free(p->loader); /* it was on its way out, and stays */
        p->next = model_free(p->next);
        if (s->state == SERVICE_DEGRADED)
            set_state(s, SERVICE_READY); /* what could not be had is no longer wanted */
        return 0;
    }
    return load(s, path, err);
}

static void on_models_changed(void *userdata, const char *name, enum store_change what)
{
    struct service *s = userdata;
    const struct stored_model *m;

    if (!s->models || service_is_stopping(s))
        return; /* while it is being made, or taken down */
    m = model_store_find(s->models, name);
    switch (what) {
    case STORE_CAME:
        bus_model_added(s, name);
        break;
    case STORE_WENT:
        bus_model_removed(s, name);
        break;
    case STORE_CHANGED:
        bus_model_changed(s, name);
        break;
    }
    if (what != STORE_CHANGED)
        bus_manager_changed(s, BUS_MODELS);
    /* What a daemon without a model waits for. */
    if (is_usable(m) && !s->engine && !s->private->loader && !s->private->next)
        load_first(s);
}

/* ---- coming and going ---- */

static bool is_idle(const struct service *s)
{
    const struct service_private *p = s->private;

    if (clients_n(s->clients) > 0 || session_set_n_sessions(s->sessions) > 0 ||
        !session_set_is_quiet(s->sessions) || p->loader || p->next)
        return false;
    for (size_t i = 0; i < model_store_n(s->models); i++)
        if (model_store_get(s->models, i)->state == MODEL_INSTALLING)
            return false;
    return true;
}

static uint64_t idle_usec(const struct service *s)
{
    return s->arguments->has_idle ? s->arguments->idle_usec : s->config->idle_usec;
}

static void consider_idleness(struct service *s)
{
    sd_event_source *timer = s->private->idle_timer;
    int enabled = SD_EVENT_OFF;

    if (idle_usec(s) == 0 || !is_idle(s)) {
        sd_event_source_set_enabled(timer, SD_EVENT_OFF);
        return;
    }
    sd_event_source_get_enabled(timer, &enabled);
    if (enabled != SD_EVENT_OFF)
        return; /* it has been idle for a while already */
    sd_event_source_set_time_relative(timer, idle_usec(s));
    sd_event_source_set_enabled(timer, SD_EVENT_ONESHOT);
}

/*
 * sd-bus flushes its connections when the loop exits, and waits for peers who never said a word or
 * do not read. So there are none by then; and they cannot be closed from below their own callbacks.
 */
static int on_end(sd_event_source *source, void *userdata)
{
    struct service *s = userdata;

    (void)source;
    file_transfers_abandon();
    s->bus = bus_host_free(s->bus);
    server_close_all(s->server);
    sd_event_exit(s->event, 0);
    return 0;
}

void service_something_went(struct service *s)
{
    if (service_is_stopping(s)) {
        if (session_set_is_quiet(s->sessions))
            sd_event_source_set_enabled(s->private->end_source, SD_EVENT_ONESHOT);
        return;
    }
    if (!s->private->idle_timer)
        return; /* not yet complete */
    former_owners_something_went(s->former);
    server_something_went(s->server);
    try_exchange(s);
    consider_idleness(s);
    show_status(s);
}

static void on_something_went(void *userdata)
{
    service_something_went(userdata);
}

static void stop(struct service *s)
{
    set_state(s, SERVICE_STOPPING);
    notify_stopping(s->private->notify);
    server_stop(s->server);
    session_set_stop(s->sessions);
}

static int on_idle(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct service *s = userdata;

    (void)source;
    (void)usec;
    if (!is_idle(s) || service_is_stopping(s))
        return 0;
    if ((s->bus && !bus_host_leave(s->bus)) || !server_leave(s->server) || !is_idle(s)) {
        consider_idleness(s); /* somebody is about to come, or just came */
        return 0;
    }
    log_info("nobody is here any more; leaving");
    stop(s);
    sd_event_source_set_enabled(s->private->end_source, SD_EVENT_ONESHOT);
    return 0;
}

static int on_grace_over(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct service *s = userdata;

    (void)usec;
    /* A pass of a GPU can be long, or never end; nobody has been told anything until it is over,
     * and without that there is no end either way. The grace is for those who do not read. */
    if (session_set_has_jobs(s->sessions)) {
        sd_event_source_set_time_relative(source, GRACE_USEC);
        sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
        return 0;
    }
    session_set_cut_streams(s->sessions); /* its changes lead to service_something_went() */
    return 0;
}

/* Streams that nobody reads are cut in the end. */
static void stop_with_grace(struct service *s)
{
    stop(s);
    sd_event_source_set_time_relative(s->private->grace_timer, GRACE_USEC);
    sd_event_source_set_enabled(s->private->grace_timer, SD_EVENT_ONESHOT);
    service_something_went(s);
}

static void stop_by_signal(struct service *s)
{
    log_with(LOG_INFO, &(struct log_fields){.message_id = LOG_ID_STOPPING}, "stopping (signal %d)",
             s->private->signal);
    stop_with_grace(s);
}

/*
 * What a kill would leave is all that the next process needs, at any instruction: so an orderly
 * restart goes the same way, and there is only one.
 */
static _Noreturn void leave_to_the_next(struct service *s)
{
    fd_store_leave(s->store);
    log_with(LOG_INFO, &(struct log_fields){.message_id = LOG_ID_STOPPING},
             "stopping to be started again; %u sessions go on then",
             session_set_n_sessions(s->sessions));
    notify_stopping(s->private->notify);
    _exit(EXIT_SUCCESS);
}

static void on_unit_job(void *userdata, bool restarts)
{
    struct service *s = userdata;

    s->private->job = NULL;
    if (service_is_stopping(s))
        return;
    if (restarts)
        leave_to_the_next(s);
    stop_by_signal(s);
}

static int on_stop_signal(sd_event_source *source, const struct signalfd_siginfo *info,
                          void *userdata)
{
    struct service *s = userdata;
    struct service_private *p = s->private;
    sd_bus *bus = s->bus ? bus_host_bus(s->bus) : NULL;

    (void)source;
    if (service_is_stopping(s)) {
        session_set_cut_streams(s->sessions); /* asked twice: no grace */
        return 0;
    }
    p->signal = (int)info->ssi_signo;
    if (p->job) /* asked twice: nor is it waited for what systemd says */
        p->job = unit_job_free(p->job);
    else if (p->signal == SIGTERM && session_set_n_sessions(s->sessions) > 0 && bus &&
             unit_job_ask(&p->job, s->event, bus, on_unit_job, s) >= 0)
        return 0;
    stop_by_signal(s);
    return 0;
}

static bool has_changed(const struct model *m)
{
    return m && !model_file_is_intact(model_get_file(m));
}

/*
 * The file of a model was shortened or written over. Of the one that is served not a word can be
 * said any more, so the daemon ends: whoever starts it again gets what is there then.
 */
static int on_model_fault(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct service *s = userdata;
    struct service_private *p = s->private;
    struct error err;
    uint64_t n;

    (void)source;
    (void)revents;
    (void)!read(fd, &n, sizeof(n));
    if (service_is_stopping(s))
        return 0;
    if (has_changed(p->next)) {
        error_set(&err, ENOTRECOVERABLE, "%s: the file changed before it was used",
                  model_file_path(model_get_file(p->next)));
        p->next = model_free(p->next);
        load_failed(s, -ENOTRECOVERABLE, &err);
    }
    if (!has_changed(s->model) || p->failed)
        return 0;
    log_with(LOG_ERR,
             &(struct log_fields){.message_id = LOG_ID_MODEL_CHANGED, .model = s->model_name},
             "%s: the model's file changed while it was in use, or cannot be read any more; "
             "stopping. Models are to be replaced by llmctl model install, or by renaming",
             model_file_path(model_get_file(s->model)));
    p->model_changed = true;
    stop_with_grace(s);
    return 0;
}

/* ---- memory ---- */

static void say_pressure(unsigned level)
{
    static const char *const what[PRESSURE_MOST + 1] = {
        "memory is no longer short",
        "memory is short: what is free goes back to the system",
        "memory is short: KV caches of idle sessions go to disk, or are given up",
        "memory is short: there are no new sessions until it is not",
    };

    log_with(level > 1 ? LOG_NOTICE : LOG_INFO,
             &(struct log_fields){
                 .message_id = LOG_ID_MEMORY_PRESSURE, .has_pressure = true, .pressure = level},
             "%s", what[level]);
}

static void on_pressure(void *userdata, unsigned level, bool rises)
{
    struct service *s = userdata;

    if (level != s->private->pressure_said) /* the highest may be reached again and again */
        say_pressure(level);
    s->private->pressure_said = level;
    if (rises && s->engine)
        engine_thread_relieve(s->engine, level);
    session_set_set_low_memory(s->sessions, level >= PRESSURE_MOST);
    show_status(s);
}

/* ---- the configuration ---- */

static bool has_section(const struct config *c, uid_t uid)
{
    for (size_t i = 0; i < c->n_users; i++)
        if (c->users[i].uid == uid)
            return true;
    return false;
}

/* Of a reload only what it changes: who was given others by SetQuota keeps them. */
static int apply_limits(struct service *s, const struct config *old)
{
    int r = 0;

    users_set_defaults(s->users, &s->config->limits);
    for (size_t i = 0; i < s->config->n_users && r >= 0; i++) {
        uid_t uid = s->config->users[i].uid;
        struct user_limits limits, before;

        config_limits(s->config, uid, &limits);
        if (old && has_section(old, uid)) {
            config_limits(old, uid, &before);
            if (config_same_limits(&limits, &before))
                continue;
        }
        r = users_set_limits(s->users, uid, &limits);
    }
    for (size_t i = 0; old && i < old->n_users && r >= 0; i++)
        if (!has_section(s->config, old->users[i].uid))
            r = users_clear_limits(s->users, old->users[i].uid);
    return r;
}

static void apply(struct service *s, const struct config *old)
{
    log_set_level(s->config->log_level);
    if (apply_limits(s, old) < 0)
        log_error("out of memory: not all users have the limits that the configuration gives them");
    session_set_linger_usec(s->sessions, s->config->linger_usec);
    server_set_max_connections(s->server, s->config->max_connections);
    set_weights(s);
    if (old && s->private->idle_timer) {
        sd_event_source_set_enabled(s->private->idle_timer, SD_EVENT_OFF);
        consider_idleness(s);
    }
}

static void reload(struct service *s)
{
    CLEANUP(config_freep) struct config *config = NULL;
    struct service_private *p = s->private;
    struct error err = {0};
    char restart[256];
    int r;

    r = config_load(&config, s->scope, s->arguments->config_file, NULL, &err);
    if (r < 0 || config->n_warnings > 0) {
        log_with(LOG_ERR, &(struct log_fields){.message_id = LOG_ID_CONFIG_REFUSED},
                 "the configuration is left as it was: %s",
                 r < 0 ? err.text : "something in the files is wrong, see above");
        return;
    }
    if (config_need_restart(p->config, config, restart, sizeof(restart)) > 0)
        log_notice("%s will be looked at when llmd is started the next time", restart);
    s->config = config;
    apply(s, p->config);
    config_free(p->config);
    p->config = TAKE_PTR(config);
    if (model_store_refresh(s->models) < 0)
        log_error("out of memory: the list of models may be old");
    if (s->engine)
        engine_thread_retry_gpu(s->engine, true);
    log_with(LOG_INFO, &(struct log_fields){.message_id = LOG_ID_CONFIG_RELOADED},
             "the configuration was read again");
}

static int on_reload_signal(sd_event_source *source, const struct signalfd_siginfo *info,
                            void *userdata)
{
    struct service *s = userdata;

    (void)source;
    (void)info;
    if (service_is_stopping(s))
        return 0;
    notify_reloading(s->private->notify);
    reload(s);
    notify_ready(s->private->notify);
    return 0;
}

/* ---- the whole ---- */

static int new_timer(struct service *s, sd_event_source **ret, sd_event_time_handler_t handler)
{
    int r = sd_event_add_time_relative(s->event, ret, CLOCK_MONOTONIC, 0, 0, handler, s);

    return r < 0 ? r : sd_event_source_set_enabled(*ret, SD_EVENT_OFF);
}

/* The handler stays when the service goes, and so does the descriptor. */
static int watch_models(struct service *s)
{
    static int fd = -EBADF;
    int r;

    if (fd < 0) {
        fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        r = fd < 0 ? -errno : model_fault_handle(fd);
        if (r < 0) {
            closep(&fd);
            fd = -EBADF;
            return r;
        }
    }
    return sd_event_add_io(s->event, &s->private->fault_source, fd, EPOLLIN, on_model_fault, s);
}

/* Both are opened here because nothing can be where there is a sandbox. */
static int prepare_for_pressure(struct service *s)
{
    struct service_private *p = s->private;
    struct error err = {0};
    int r;

    if (p->places.state) /* without it: as when it cannot be written to */
        p->state_fd = open(p->places.state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (p->places.state && p->state_fd < 0)
        p->state_fd = -errno;
    r = memory_pressure_new(&s->pressure, s->event, on_pressure, s, &err);
    if (r < 0 && r != -ENOMEM) {
        log_warning("nobody tells when memory is short: %s", err.text);
        return 0;
    }
    return r;
}

static int new_parts(struct service *s, struct error *err)
{
    struct service_private *p = s->private;
    struct server_options server;
    int r;

    r = fd_store_take(&s->store);
    if (r < 0)
        return error_set(err, -r, "cannot take inherited descriptors: %s", strerror(-r));
    r = places_find(&p->places, s->scope, s->config, s->arguments->socket, err);
    if (r < 0)
        return r;
    /* Before a model is opened, so that of two daemons one gives up at once. */
    server = (struct server_options){.path = p->places.socket,
                                     .any_user = s->scope == SCOPE_SYSTEM,
                                     .max_connections = s->config->max_connections};
    r = server_new(&s->server, s, &server, err);
    if (r < 0)
        return r;
    /* Before there are threads. A daemon without one reads its model by a thread. */
    if (s->config->prefetch && (r = prefetch_child_new(&p->reader)) < 0 && r != -ENOSYS)
        log_warning("no process reads the model ahead: %s", strerror(-r));
    if ((r = watch_models(s)) < 0 || (r = prepare_for_pressure(s)) < 0 ||
        (r = notify_new(&p->notify, s->event, engine_is_alive, s)) < 0 ||
        (r = session_set_new(&s->sessions, s->event, on_something_went, s)) < 0 ||
        (session_set_keep(s->sessions, s->store), r = users_new(&s->users, &s->config->limits)) <
            0 ||
        (r = authority_new(&s->authority, s->scope == SCOPE_SYSTEM)) < 0 ||
        (r = clients_new(&s->clients, s)) < 0 || (r = former_owners_new(&s->former, s)) < 0 ||
        (r = sd_event_add_defer(s->event, &p->end_source, on_end, s)) < 0 ||
        (r = sd_event_source_set_enabled(p->end_source, SD_EVENT_OFF)) < 0 ||
        (r = new_timer(s, &p->grace_timer, on_grace_over)) < 0 ||
        (r = new_timer(s, &p->exchange_timer, on_exchange_late)) < 0 ||
        (r = new_timer(s, &p->idle_timer, on_idle)) < 0 ||
        (r = new_timer(s, &p->power_timer, on_power_due)) < 0 ||
        (r = sd_event_add_signal(s->event, NULL, SIGTERM, on_stop_signal, s)) < 0 ||
        (r = sd_event_add_signal(s->event, NULL, SIGINT, on_stop_signal, s)) < 0 ||
        (r = sd_event_add_signal(s->event, NULL, SIGHUP, on_reload_signal, s)) < 0)
        return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    if (getenv("NOTIFY_SOCKET")) {
        r = sd_event_add_post(s->event, &p->status_source, on_status, s);
        if (r < 0)
            return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    }
    apply(s, NULL);
    return 0;
}

/* It loads libraries, which nothing can do later. */
static int find_gpu(struct service *s, struct error *err)
{
    const struct arguments *a = s->arguments;
    struct gpu_options options = {.mode = backend(s),
                                  .device = a->device ? a->device : s->config->device,
                                  .scope = s->scope,
                                  .cache_folder = s->private->places.cache};

    return gpu_find(&s->gpu, &options, err);
}

/* It reads the beginning of every model that there is, whoever has put it there. */
static int list_models(struct service *s, struct error *err)
{
    const struct places *places = &s->private->places;
    struct model_store_options options = {.event = s->event,
                                          .state_dir = places->state,
                                          .folders = (const char *const *)places->folders,
                                          .n_folders = places->n_folders,
                                          .changed = on_models_changed,
                                          .userdata = s};

    return model_store_new(&s->models, &options, err);
}

int service_new(struct service **ret, const struct arguments *arguments, struct config *config,
                struct error *err)
{
    CLEANUP(service_freep) struct service *s = calloc(1, sizeof(*s));
    int r;

    if (s)
        s->private = calloc(1, sizeof(*s->private));
    if (!s || !s->private) {
        config_free(config);
        return error_set(err, ENOMEM, "out of memory");
    }
    s->config = s->private->config = config;
    s->private->state_fd = -EBADF;
    s->arguments = arguments;
    s->scope = arguments->scope;
    s->state = SERVICE_LOADING;
    s->model_name = strdup("");
    r = sd_event_default(&s->event);
    if (r < 0)
        return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    r = new_parts(s, err);
    /* No model was read and no client was heard yet, and there is one thread. */
    if (r >= 0)
        r = find_gpu(s, err);
    if (r >= 0)
        r = confine_daemon(s, &s->private->places, s->gpu, err);
    if (r >= 0)
        r = list_models(s, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(s);
    return 0;
}

int service_run(struct service *s, struct error *err)
{
    struct service_private *p = s->private;
    int r;

    load_first(s);
    consider_idleness(s);
    r = sd_event_loop(s->event);
    if (p->failed) {
        *err = p->failure;
        return r < 0 ? r : -EIO;
    }
    if (r < 0)
        return error_set(err, -r, "the event loop failed: %s", strerror(-r));
    return p->model_changed;
}

struct service *service_free(struct service *s)
{
    struct service_private *p;

    if (!s)
        return NULL;
    p = s->private;
    s->state = SERVICE_STOPPING;
    file_transfers_abandon();
    if (p) {
        model_loader_free(p->loader);
        prefetch_free(p->prefetch);
        prefetch_child_free(p->reader);
        model_free(p->next);
    }
    bus_host_free(s->bus);
    server_free(s->server);
    former_owners_free(s->former);
    if (s->sessions)
        session_set_close_all(s->sessions);
    clients_free(s->clients);
    if (s->sessions)
        session_set_free(s->sessions);
    authority_free(s->authority);
    users_free(s->users);
    memory_pressure_free(s->pressure);
    engine_thread_free(s->engine);
    model_free(s->model);
    model_store_free(s->models);
    gpu_save_cache(s->gpu); /* in a folder of `places` */
    gpu_free(s->gpu);
    if (s->store) { /* an orderly end leaves nothing to go on with */
        fd_store_remove(s->store, "kv");
        fd_store_remove(s->store, "instance");
        fd_store_free(s->store);
    }
    if (p) {
        notify_free(p->notify);
        unit_job_free(p->job);
        sd_event_source_disable_unref(p->status_source);
        sd_event_source_disable_unref(p->end_source);
        sd_event_source_disable_unref(p->fault_source);
        sd_event_source_disable_unref(p->idle_timer);
        sd_event_source_disable_unref(p->grace_timer);
        sd_event_source_disable_unref(p->exchange_timer);
        sd_event_source_disable_unref(p->power_timer);
        closep(&p->state_fd);
        places_done(&p->places);
        config_free(p->config);
        free(p->loading);
        free(p->next_name);
        free(p);
    }
    sd_event_unref(s->event);
    free(s->model_name);
    free(s->failure);
    free(s);
    return NULL;
}

void service_freep(struct service **s)
{
    *s = service_free(*s);
}

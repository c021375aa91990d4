/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmctl monitor: the daemon's signals as they come, a line each. Every signal becomes a JSON
 * object first; lines for people are made of its members. No signal holds anything of a prompt or
 * an answer.
 */

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/json.h"
#include "client/llmctl-bus.h"
#include "client/llmctl-output.h"
#include "ipc/buffer.h"

#define NAME_MAX_BYTES 64

static void help(void)
{
    puts("Usage: llmctl monitor [OPTION...]\n"
         "Prints what happens to sessions and models, a line an event, until it is interrupted. "
         "What\n"
         "is asked and answered is not told.\n"
         "\n"
         "  -a, --all                      everybody's sessions, not only yours\n"
         "      --json                     a JSON object an event\n" GLOBAL_HELP);
}

struct monitor {
    int status; /* of the output */
    bool stop;
};

/* ---- signals to JSON ---- */

/* "ContextUsed" and "prompt-tokens" to "context_used" and "prompt_tokens"; USec is one word. */
static void field_name(const char *name, char out[NAME_MAX_BYTES])
{
    size_t n = 0;

    for (size_t i = 0; name[i] && n + 2 < NAME_MAX_BYTES; i++) {
        char c = name[i];
        bool upper = c >= 'A' && c <= 'Z';

        if (upper && i > 0 && !(name[i - 1] >= 'A' && name[i - 1] <= 'Z'))
            out[n++] = '_';
        out[n++] = upper ? (char)(c - 'A' + 'a') : c == '-' ? '_' : c;
    }
    out[n] = 0;
}

/* 0; *ret is NULL for what has no place here. */
static int basic_to_json(sd_bus_message *m, char type, struct json_object **ret)
{
    union {
        const char *s;
        uint32_t u;
        uint64_t t;
        double d;
        int b;
    } v;
    int r = sd_bus_message_read_basic(m, type, &v);

    if (r < 0)
        return r;
    switch (type) {
    case 's':
    case 'o':
        *ret = json_object_new_string(v.s);
        break;
    case 'u':
        *ret = json_object_new_uint64(v.u);
        break;
    case 't':
        *ret = json_object_new_uint64(v.t);
        break;
    case 'd':
        *ret = json_object_new_double(v.d);
        break;
    case 'b':
        *ret = json_object_new_boolean(v.b);
        break;
    }
    return *ret ? 0 : -ENOMEM;
}

static int list_to_json(sd_bus_message *m, struct json_object **ret)
{
    CLEANUP(json_object_putp) struct json_object *list = json_object_new_array();
    const char *text;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "s");
    while (r >= 0 && (r = sd_bus_message_read_basic(m, 's', &text)) > 0) {
        struct json_object *item = json_object_new_string(text);

        if (!list || !item || json_object_array_add(list, item) < 0) {
            json_object_put(item);
            return -ENOMEM;
        }
    }
    if (r >= 0)
        r = sd_bus_message_exit_container(m);
    if (r >= 0)
        *ret = TAKE_PTR(list);
    return r;
}

/* Adds each entry of an a{sv} that has a type of ours. */
static int add_dictionary(sd_bus_message *m, struct json_object *o)
{
    char field[NAME_MAX_BYTES], type;
    const char *name, *contents;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "{sv}");
    while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "sv")) > 0) {
        struct json_object *value = NULL;

        r = sd_bus_message_read_basic(m, 's', &name);
        if (r < 0 || (r = sd_bus_message_peek_type(m, &type, &contents)) < 0)
            return r;
        if (strcmp(contents, "as") != 0 &&
            (strlen(contents) != 1 || !strchr("soutdb", contents[0]))) {
            r = sd_bus_message_skip(m, "v");
        } else {
            r = sd_bus_message_enter_container(m, 'v', contents);
            if (r >= 0)
                r = contents[0] == 'a' ? list_to_json(m, &value)
                                       : basic_to_json(m, contents[0], &value);
            if (r >= 0)
                r = sd_bus_message_exit_container(m);
        }
        if (r >= 0)
            r = sd_bus_message_exit_container(m);
        if (value) {
            field_name(name, field);
            if (json_object_object_add(o, field, value) < 0) {
                json_object_put(value);
                return -ENOMEM;
            }
        }
        if (r < 0)
            return r;
    }
    return r < 0 ? r : sd_bus_message_exit_container(m);
}

static int add_string(struct json_object *o, const char *name, const char *value)
{
    struct json_object *s = json_object_new_string(value);

    if (!s || json_object_object_add(o, name, s) < 0) {
        json_object_put(s);
        return -ENOMEM;
    }
    return 0;
}

static int add_number(struct json_object *o, const char *name, uint64_t value)
{
    struct json_object *n = json_object_new_uint64(value);

    if (!n || json_object_object_add(o, name, n) < 0) {
        json_object_put(n);
        return -ENOMEM;
    }
    return 0;
}

/* "session": N, "model": NAME, or nothing for the daemon itself. */
static int add_object(struct json_object *o, const char *path)
{
    CLEANUP(freep) char *name = NULL;

    if (strncmp(path, LLM_SESSION_PATH "/", strlen(LLM_SESSION_PATH "/")) == 0)
        return add_number(o, "session", session_id(path));
    if (sd_bus_path_decode(path, LLM_MODEL_PATH, &name) > 0)
        return add_string(o, "model", name);
    return 0;
}

static const char *kind_of(const char *path)
{
    if (strncmp(path, LLM_SESSION_PATH "/", strlen(LLM_SESSION_PATH "/")) == 0)
        return "session";
    return strncmp(path, LLM_MODEL_PATH "/", strlen(LLM_MODEL_PATH "/")) == 0 ? "model" : "daemon";
}

static int add_event(struct json_object *o, const char *path, const char *what)
{
    char event[NAME_MAX_BYTES];
    int r;

    snprintf(event, sizeof(event), "%s-%s", kind_of(path), what);
    r = add_string(o, "event", event);
    return r < 0 ? r : add_object(o, path);
}

static bool is_ours(const char *interface)
{
    return strncmp(interface, LLM_BUS_NAME ".", strlen(LLM_BUS_NAME ".")) == 0;
}

static int read_changed(sd_bus_message *m, struct json_object *o)
{
    const char *interface;
    int r;

    r = sd_bus_message_read_basic(m, 's', &interface);
    if (r < 0 || !is_ours(interface))
        return r < 0 ? r : -ENOTSUP;
    r = add_event(o, sd_bus_message_get_path(m), "changed");
    return r < 0 ? r : add_dictionary(m, o);
}

static int read_added(sd_bus_message *m, struct json_object *o)
{
    const char *path, *interface;
    int r;

    r = sd_bus_message_read_basic(m, 'o', &path);
    if (r >= 0)
        r = add_event(o, path, "added");
    if (r >= 0)
        r = sd_bus_message_enter_container(m, 'a', "{sa{sv}}");
    while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "sa{sv}")) > 0) {
        r = sd_bus_message_read_basic(m, 's', &interface);
        if (r >= 0)
            r = is_ours(interface) ? add_dictionary(m, o) : sd_bus_message_skip(m, "a{sv}");
        if (r >= 0)
            r = sd_bus_message_exit_container(m);
    }
    return r;
}

static int read_removed(sd_bus_message *m, struct json_object *o)
{
    const char *path;
    int r = sd_bus_message_read_basic(m, 'o', &path);

    return r < 0 ? r : add_event(o, path, "removed");
}

static int read_finished(sd_bus_message *m, struct json_object *o)
{
    const char *reason;
    uint64_t request;
    int r;

    r = sd_bus_message_read(m, "ts", &request, &reason);
    if (r >= 0)
        r = add_event(o, sd_bus_message_get_path(m), "finished");
    if (r >= 0)
        r = add_number(o, "request", request);
    if (r >= 0)
        r = add_string(o, "reason", reason);
    return r < 0 ? r : add_dictionary(m, o);
}

/* ---- output ---- */

/* "12:00:01 session 3 changed state=decode context_used=12" */
static int print_line(struct json_object *o)
{
    struct json_object *event, *subject = NULL;
    const char *kind, *what, *value;
    time_t now = time(NULL);
    char line[1024];
    struct tm tm;
    size_t n = 0;

    json_object_object_get_ex(o, "event", &event);
    kind = json_object_get_string(event);
    what = strchr(kind, '-');
    if (localtime_r(&now, &tm))
        n = strftime(line, sizeof(line), "%H:%M:%S ", &tm);
    n += (size_t)snprintf(line + n, sizeof(line) - n, "%.*s", (int)(what - kind), kind);
    if (json_object_object_get_ex(o, "session", &subject) ||
        json_object_object_get_ex(o, "model", &subject))
        n += (size_t)snprintf(line + n, sizeof(line) - n, " %s", json_object_get_string(subject));
    if (n < sizeof(line))
        n += (size_t)snprintf(line + n, sizeof(line) - n, " %s", what + 1);
    json_object_object_foreach(o, name, member)
    {
        if (n >= sizeof(line) || member == subject || member == event ||
            strcmp(name, "time_usec") == 0)
            continue;
        value = json_object_get_string(member);
        n += (size_t)snprintf(line + n, sizeof(line) - n, " %s=%s", name, value ? value : "");
    }
    n = n < sizeof(line) ? n : sizeof(line) - 1;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?'; /* a label must not speak to the terminal */
    line[n] = '\n';
    return output_put(line, n + 1);
}

static int print_event(struct json_object *o)
{
    int flags = JSON_C_TO_STRING_NOSLASHESCAPE;
    struct buffer text = {0};
    const char *json;
    int status;

    if (global.json == JSON_OFF)
        return print_line(o);
    flags |= global.json == JSON_PRETTY ? JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED : 0;
    json = json_object_to_json_string_ext(o, flags);
    if (!json || buffer_append(&text, json, strlen(json)) < 0 || buffer_append(&text, "\n", 1) < 0)
        status = complain(STATUS_FAILED, "out of memory");
    else
        status = output_put(text.data, text.n);
    buffer_done(&text);
    return status;
}

static int on_signal(sd_bus_message *m, void *userdata, sd_bus_error *e)
{
    static const struct {
        const char *member;
        int (*read)(sd_bus_message *m, struct json_object *o);
    } kinds[] = {
        {"PropertiesChanged", read_changed},
        {"InterfacesAdded", read_added},
        {"InterfacesRemoved", read_removed},
        {"RequestFinished", read_finished},
    };
    CLEANUP(json_object_putp) struct json_object *o = json_object_new_object();
    struct monitor *monitor = userdata;
    int r = -ENOTSUP;

    (void)e;
    if (monitor->stop)
        return 0;
    if (!o || add_number(o, "time_usec", clock_usec(CLOCK_REALTIME)) < 0)
        r = -ENOMEM;
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]) && r == -ENOTSUP; i++)
        if (sd_bus_message_is_signal(m, NULL, kinds[i].member))
            r = kinds[i].read(m, o);
    if (r >= 0)
        monitor->status = print_event(o);
    else if (r == -ENOMEM)
        monitor->status = complain(STATUS_FAILED, "out of memory");
    monitor->stop = monitor->status != STATUS_OK; /* signals of others, and of tomorrow, go by */
    return 0;
}

/* ---- the verb ---- */

static int subscribe(struct llm_connection *c, bool all)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "Subscribe", &m);
    if (status != STATUS_OK)
        return status;
    r = all ? sd_bus_message_append(m, "a{sv}", 1, "all", "b", 1)
            : sd_bus_message_append(m, "a{sv}", 0);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    return bus_call(c, m, NULL);
}

/* *matched: the connection on which it is all there already, or NULL; a reference. */
static int set_up(struct llm_connection *c, bool all, struct monitor *monitor, sd_bus **matched)
{
    int status = STATUS_OK;
    sd_bus *bus;

    do { /* the calls themselves may lead to another connection */
        bus = llm_connection_bus(c);
        if (bus != *matched)
            status = bus_match(c, LLM_ROOT_PATH, NULL, NULL, on_signal, monitor);
        if (status != STATUS_OK)
            return status;
        sd_bus_unref(*matched);
        *matched = sd_bus_ref(bus);
        status = bus_watch_end(c);
        if (status == STATUS_OK)
            status = subscribe(c, all);
    } while (status == STATUS_OK && llm_connection_bus(c) != bus);
    return status;
}

/* On a socket nobody signals it, since whoever would hear it has to connect first. */
static void tell_restarted(struct monitor *monitor)
{
    CLEANUP(json_object_putp) struct json_object *o = json_object_new_object();

    if (!o || add_number(o, "time_usec", clock_usec(CLOCK_REALTIME)) < 0 ||
        add_event(o, LLM_ROOT_PATH, "restarted") < 0)
        monitor->status = complain(STATUS_FAILED, "out of memory");
    else
        monitor->status = print_event(o);
    monitor->stop = monitor->status != STATUS_OK;
}

static int watch(struct llm_connection *c, bool all)
{
    struct monitor monitor = {0};
    sd_bus *matched = NULL;
    int status;

    status = set_up(c, all, &monitor, &matched);
    if (status == STATUS_OK)
        note("watching; Ctrl-C ends it");
    while (status == STATUS_OK && !monitor.stop) {
        status = bus_wait_again(c, &monitor.stop, -1, 0);
        if (status != BUS_AGAIN)
            break;
        status = set_up(c, all, &monitor, &matched);
        if (status == STATUS_OK) /* not before: now nothing that follows is missed */
            tell_restarted(&monitor);
    }
    sd_bus_unref(matched);
    return status == STATUS_OK ? monitor.status : status;
}

int verb_monitor(int argc, char **argv)
{
    static const struct option table[] = {{"all", no_argument, NULL, 'a'}, {0}};
    static const struct verb_options options = {"a", table, help};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    int option, status = STATUS_FAILED;
    bool all = false;

    while ((option = next_option(&options, argc, argv, &status)) >= 0)
        all = true; /* the only one */
    if (option == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    return status == STATUS_OK ? watch(c, all) : status;
}

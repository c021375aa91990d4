/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmctl top: what the daemon does, again and again. On a terminal it takes the alternate screen
 * and leaves the shell's as it was, whatever ends it; elsewhere the same table is printed as often
 * as was asked for, once by default.
 */

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/json.h"
#include "base/number.h"
#include "client/llmctl-manager.h"
#include "client/llmctl-output.h"
#include "client/llmctl-show.h"
#include "ipc/buffer.h"

#define USEC_PER_SEC 1000000u

/* How a session was when it was looked at last. */
struct sample {
    uint64_t id, completion_tokens;
};

struct top {
    bool all, screen; /* screen: the terminal is ours */
    bool try_all;     /* everybody's sessions, as long as that needs no password */
    uint64_t rounds;  /* 0: until it is ended */
    uint64_t delay_usec;
    struct sample *samples; /* [n_samples], of the last round */
    size_t n_samples;
    uint64_t sampled_usec; /* 0: there was none */
};

static void help(void)
{
    puts("Usage: llmctl top [OPTION...]\n"
         "Shows what the daemon does and its sessions, anew each second; q leaves. Not on a "
         "terminal,\n"
         "or with --once: prints it once.\n"
         "\n"
         "  -a, --all                      everybody's sessions, also where that needs a password\n"
         "  -1, --once                     print it once, as it is now\n"
         "  -n, --rounds=N                 so many times\n"
         "  -d, --delay=SECONDS            time between two of them, default 1\n" GLOBAL_HELP);
}

/* ---- the terminal ---- */

static struct termios terminal_before;
static volatile sig_atomic_t terminal_changed;
static volatile sig_atomic_t keys_taken;

static void screen_enter(void)
{
    static const char text[] = "\033[?1049h\033[?25l"; /* alternate screen, no cursor */

    if (isatty(STDIN_FILENO) && tcgetattr(STDIN_FILENO, &terminal_before) == 0) {
        struct termios t = terminal_before;

        t.c_lflag &= (tcflag_t) ~(ICANON | ECHO);
        t.c_cc[VMIN] = 1;
        t.c_cc[VTIME] = 0;
        keys_taken = tcsetattr(STDIN_FILENO, TCSANOW, &t) == 0;
    }
    terminal_changed = 1;
    (void)!write(STDOUT_FILENO, text, sizeof(text) - 1);
}

/* Async-signal-safe. */
static void screen_leave(void)
{
    static const char text[] = "\033[?25h\033[?1049l";

    if (!terminal_changed)
        return;
    terminal_changed = 0;
    (void)!write(STDOUT_FILENO, text, sizeof(text) - 1);
    if (keys_taken)
        tcsetattr(STDIN_FILENO, TCSANOW, &terminal_before);
    keys_taken = 0;
}

static void on_end(int number)
{
    screen_leave();
    signal(number, SIG_DFL);
    raise(number);
}

static void on_stop(int number)
{
    (void)number;
    screen_leave();
    raise(SIGSTOP);
    screen_enter(); /* somebody has continued us */
}

static void screen_begin(void)
{
    struct sigaction end = {.sa_handler = on_end}, stop = {.sa_handler = on_stop};

    sigaction(SIGTERM, &end, NULL);
    sigaction(SIGHUP, &end, NULL);
    sigaction(SIGQUIT, &end, NULL);
    sigaction(SIGTSTP, &stop, NULL);
    screen_enter();
}

/* ---- what there is ---- */

static const struct table_column columns[] = {
    {"ID", "session", TABLE_NUMBER, false},
    {"LABEL", "label", TABLE_TEXT, true},
    {"USER", "uid", TABLE_USER, false},
    {"CLASS", "class", TABLE_TEXT, false},
    {"STATE", "state", TABLE_TEXT, false},
    {"TOK/S", "rate", TABLE_RATE, false},
    {"QUEUE", "queue_position", TABLE_NUMBER, false},
    {"KV", "kv_bytes", TABLE_BYTES, false},
    {"USED", "context_used", TABLE_NUMBER, false},
    {"CONTEXT", "context_max", TABLE_NUMBER, false},
};

static int list(struct llm_connection *c, bool all, bool may_ask, sd_bus_message **ret,
                sd_bus_error *e)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    int r;

    r = sd_bus_message_new_method_call(llm_connection_bus(c), &m, llm_connection_destination(c),
                                       LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "ListSessions");
    if (r >= 0 && !may_ask)
        r = sd_bus_message_set_allow_interactive_authorization(m, 0);
    if (r >= 0)
        r = all ? sd_bus_message_append(m, "a{sv}", 1, "all", "b", 1)
                : sd_bus_message_append(m, "a{sv}", 0);
    return r < 0 ? r : bus_try(c, m, ret, e);
}

static int list_sessions(struct llm_connection *c, struct top *top, sd_bus_message **ret)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r;

    if (!top->all && top->try_all) {
        r = list(c, true, /* may_ask= */ false, ret, &e);
        if (r != -EACCES &&
            !sd_bus_error_has_name(&e, SD_BUS_ERROR_INTERACTIVE_AUTHORIZATION_REQUIRED))
            return r == 0 ? STATUS_OK : status_of_call(r, &e);
        top->try_all = false;
        sd_bus_error_free(&e);
    }
    r = list(c, top->all, /* may_ask= */ true, ret, &e);
    return r == 0 ? STATUS_OK : status_of_call(r, &e);
}

/* One own session's KV cache. What objects there are is told in one call. */
struct kv {
    uint64_t id, bytes;
};

struct kv_list {
    struct kv *items; /* [n] */
    size_t n, n_allocated;
};

static int add_kv(struct kv_list *l, uint64_t id, uint64_t bytes)
{
    if (l->n == l->n_allocated) {
        size_t n = l->n ? l->n * 2 : 64;
        struct kv *grown = reallocarray(l->items, n, sizeof(*grown));

        if (!grown)
            return -ENOMEM;
        l->items = grown;
        l->n_allocated = n;
    }
    l->items[l->n++] = (struct kv){id, bytes};
    return 0;
}

static int read_objects(sd_bus_message *m, struct kv_list *l)
{
    static const struct bus_property property = {"KvBytes", 't', 0};
    const char *path, *interface;
    uint64_t bytes;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "{oa{sa{sv}}}");
    while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "oa{sa{sv}}")) > 0) {
        r = sd_bus_message_read_basic(m, 'o', &path);
        if (r >= 0)
            r = sd_bus_message_enter_container(m, 'a', "{sa{sv}}");
        while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "sa{sv}")) > 0) {
            r = sd_bus_message_read_basic(m, 's', &interface);
            if (r >= 0 && strcmp(interface, LLM_SESSION_INTERFACE) == 0) {
                bytes = 0;
                r = bus_read_properties(m, &property, 1, &bytes);
                if (r >= 0)
                    r = add_kv(l, session_id(path), bytes);
            } else if (r >= 0) {
                r = sd_bus_message_skip(m, "a{sv}");
            }
            if (r >= 0)
                r = sd_bus_message_exit_container(m);
        }
        if (r >= 0)
            r = sd_bus_message_exit_container(m);
        if (r >= 0)
            r = sd_bus_message_exit_container(m);
    }
    return r;
}

static int get_kv(struct llm_connection *c, struct kv_list *l)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    int status;

    status =
        bus_new(c, LLM_ROOT_PATH, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", &m);
    if (status == STATUS_OK)
        status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    return read_objects(reply, l) < 0 ? complain_of_answer() : STATUS_OK;
}

static const struct sample *find_sample(const struct top *top, uint64_t id)
{
    for (size_t i = 0; i < top->n_samples; i++)
        if (top->samples[i].id == id)
            return &top->samples[i];
    return NULL;
}

static int fill(struct table *t, sd_bus_message *m, struct top *top, const struct kv_list *kv)
{
    const char *path, *label, *class, *state;
    uint32_t uid, used, most, position;
    uint64_t prompt, completion, now = now_usec();
    struct sample *samples = NULL, *grown;
    size_t n = 0, n_allocated = 0, i;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "(osussuuttu)");
    while (r >= 0 &&
           (r = sd_bus_message_read(m, "(osussuuttu)", &path, &label, &uid, &class, &state, &used,
                                    &most, &prompt, &completion, &position)) > 0) {
        uint64_t id = session_id(path);
        const struct sample *before = find_sample(top, id);

        if (n == n_allocated) {
            n_allocated = n ? n * 2 : 64;
            grown = reallocarray(samples, n_allocated, sizeof(*grown));
            if (!grown) {
                r = -ENOMEM;
                break;
            }
            samples = grown;
        }
        samples[n++] = (struct sample){id, completion};
        table_add_number(t, id);
        table_add_text(t, label);
        table_add_number(t, uid);
        table_add_text(t, class);
        table_add_text(t, state);
        if (before && now > top->sampled_usec && completion >= before->completion_tokens)
            table_add_double(t, (double)(completion - before->completion_tokens) * USEC_PER_SEC /
                                    (double)(now - top->sampled_usec));
        else
            table_add_none(t);
        table_add_number(t, position);
        for (i = 0; i < kv->n && kv->items[i].id != id;)
            i++;
        if (i < kv->n)
            table_add_number(t, kv->items[i].bytes);
        else
            table_add_none(t); /* another user's */
        table_add_number(t, used);
        table_add_number(t, most);
    }
    if (r < 0) {
        free(samples);
        return r == -ENOMEM ? complain(STATUS_FAILED, "out of memory") : complain_of_answer();
    }
    free(top->samples);
    top->samples = samples;
    top->n_samples = n;
    top->sampled_usec = now;
    return STATUS_OK;
}

/* ---- showing it ---- */

static void summary(const struct llm_connection *c, const struct manager *m, char *out, size_t n)
{
    char up[32], used[32], most[32], rates[96] = "";

    format_duration(m->uptime_usec, up, sizeof(up));
    format_bytes(m->kv_bytes_used, used, sizeof(used));
    format_bytes(m->kv_bytes_max, most, sizeof(most));
    if (m->has_statistics)
        snprintf(rates, sizeof(rates), ", %" PRIu32 " running, %" PRIu32 " queued, %.1f tokens/s",
                 m->running, m->queued, m->decode_rate);
    snprintf(out, n, "llmd %s (%s), %s, model %s%s%s\n%" PRIu32 " session%s%s, KV %s of %s\n\n",
             m->version, scope_name(c), m->state,
             m->model[0] ? m->model : (m->default_model[0] ? m->default_model : "-"),
             m->has_statistics ? ", up " : "", m->has_statistics ? up : "", m->sessions,
             m->sessions == 1 ? "" : "s", rates, used, most);
}

/* Lines of text, cut to the screen, over what was there. */
static int draw(const char *text, size_t n_lines)
{
    struct buffer out = {0};
    int r, status;

    r = buffer_append(&out, "\033[H", 3);
    for (size_t line = 0; line + 1 < n_lines && *text && r >= 0; line++) {
        size_t n = strcspn(text, "\n");

        r = buffer_append(&out, text, n);
        if (r >= 0)
            r = buffer_append(&out, "\033[K\r\n", 5);
        text += n + (text[n] == '\n');
    }
    if (r >= 0)
        r = buffer_append(&out, "\033[J", 3);
    status = r < 0 ? complain(STATUS_FAILED, "out of memory") : output_put(out.data, out.n);
    buffer_done(&out);
    return status;
}

static int show_text(const struct llm_connection *c, struct top *top, const struct manager *m,
                     struct table *t)
{
    struct table_format format = {.people = true, .no_legend = global.no_legend};
    CLEANUP(freep) char *rows = NULL, *whole = NULL;
    char head[1024];
    size_t lines;
    int r;

    terminal_size(&format.width, &lines);
    summary(c, m, head, sizeof(head));
    for (size_t i = 0; head[i]; i++)
        if ((unsigned char)head[i] < 0x20 && head[i] != '\n')
            head[i] = '?';
    r = table_format_rows(t, &format, &rows);
    if (r < 0 || asprintf(&whole, "%s%s", global.no_legend ? "" : head, rows) < 0) {
        whole = NULL;
        return complain(STATUS_FAILED, "out of memory");
    }
    return top->screen ? draw(whole, lines) : output_put(whole, strlen(whole));
}

static int show_json(const struct manager *m, struct table *t)
{
    CLEANUP(json_object_putp) struct json_object *o = json_object_new_object();
    struct json_object *sessions = NULL;
    int r;

    r = o ? table_to_json(t, &sessions) : -ENOMEM;
    if (r < 0)
        return complain(STATUS_FAILED, "out of memory");
    json_object_object_add(o, "time_usec", json_object_new_uint64(clock_usec(CLOCK_REALTIME)));
    json_object_object_add(o, "state", json_object_new_string(m->state));
    json_object_object_add(o, "model", json_object_new_string(m->model));
    json_object_object_add(o, "running", json_object_new_uint64(m->running));
    json_object_object_add(o, "queued", json_object_new_uint64(m->queued));
    json_object_object_add(o, "prefill_rate", json_object_new_double(m->prefill_rate));
    json_object_object_add(o, "decode_rate", json_object_new_double(m->decode_rate));
    json_object_object_add(o, "kv_bytes_used", json_object_new_uint64(m->kv_bytes_used));
    json_object_object_add(o, "kv_bytes_max", json_object_new_uint64(m->kv_bytes_max));
    json_object_object_add(o, "sessions", sessions);
    r = json_print(o);
    fflush(stdout); /* each round as it is made */
    return r;
}

static int one_round(struct llm_connection *c, struct top *top)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    struct manager manager = {0};
    struct kv_list kv = {0};
    int status;

    status = manager_get(c, &manager);
    if (status == STATUS_OK)
        status = list_sessions(c, top, &m);
    if (status == STATUS_OK)
        status = get_kv(c, &kv);
    if (status == STATUS_OK && table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        status = complain(STATUS_FAILED, "out of memory");
    if (status == STATUS_OK)
        status = fill(t, m, top, &kv);
    if (status == STATUS_OK)
        status = global.json != JSON_OFF ? show_json(&manager, t) : show_text(c, top, &manager, t);
    free(kv.items);
    manager_done(&manager);
    return status;
}

/* Until the next round. *ret_leave: q was pressed */
static int wait_for_round(struct llm_connection *c, const struct top *top, bool *ret_leave)
{
    uint64_t until = now_usec() + top->delay_usec;
    char keys[16];
    ssize_t n;
    int status;

    for (;;) {
        uint64_t now = now_usec();
        struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};

        if (now >= until)
            return STATUS_OK;
        status = bus_wait_again(c, NULL, keys_taken ? STDIN_FILENO : -1, until - now);
        if (status == BUS_AGAIN)
            status = bus_watch_end(c);
        if (status != STATUS_OK)
            return status;
        if (!keys_taken || poll(&p, 1, 0) <= 0)
            continue;
        n = read(STDIN_FILENO, keys, sizeof(keys));
        if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
            keys_taken = 0; /* the terminal is gone */
        for (ssize_t i = 0; i < n; i++)
            if (keys[i] == 'q' || keys[i] == 'Q')
                *ret_leave = true;
        if (*ret_leave)
            return STATUS_OK;
        if (n > 0)
            return STATUS_OK; /* any other key: now */
    }
}

static int watch(struct llm_connection *c, struct top *top)
{
    bool leave = false;
    int status;

    status = bus_watch_end(c);
    for (uint64_t round = 1; status == STATUS_OK; round++) {
        status = one_round(c, top);
        if (status != STATUS_OK || (top->rounds > 0 && round == top->rounds))
            break;
        if (!top->screen && global.json == JSON_OFF)
            status = output_put("\n", 1);
        if (status == STATUS_OK)
            status = wait_for_round(c, top, &leave);
        if (leave)
            break;
    }
    return status;
}

static int parse_arguments(struct top *top, int argc, char **argv)
{
    static const struct option table[] = {
        {"all", no_argument, NULL, 'a'},
        {"once", no_argument, NULL, '1'},
        {"rounds", required_argument, NULL, 'n'},
        {"delay", required_argument, NULL, 'd'},
        {0},
    };
    static const struct verb_options options = {"a1n:d:", table, help};
    int option, status = STATUS_FAILED;
    bool counted = false, once = false;
    double seconds;

    while ((option = next_option(&options, argc, argv, &status)) >= 0) {
        switch (option) {
        case 'a':
            top->all = true;
            break;
        case '1':
            once = true;
            break;
        case 'n':
            if (number_parse(optarg, UINT64_MAX, &top->rounds) < 0 || top->rounds == 0)
                return usage_error("--rounds wants a number, not %s", optarg);
            counted = true;
            break;
        case 'd':
            if (!parse_double(optarg, &seconds) || !(seconds >= 0.1 && seconds <= 86400))
                return usage_error("--delay wants 0.1 to 86400 seconds, not %s", optarg);
            top->delay_usec = (uint64_t)(seconds * USEC_PER_SEC);
            break;
        }
    }
    if (option == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    if (once && counted)
        return usage_error("--once and --rounds exclude each other");
    top->screen = isatty(STDOUT_FILENO) && !once && global.json == JSON_OFF;
    if (once || (!counted && !top->screen))
        top->rounds = 1;
    return -1;
}

int verb_top(int argc, char **argv)
{
    struct top top = {.try_all = true, .delay_usec = USEC_PER_SEC};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    int status;

    status = parse_arguments(&top, argc, argv);
    if (status != -1)
        return status;
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    deadlines_hold();
    if (top.screen) {
        before_message = screen_leave; /* or it would vanish with the screen */
        before_exit = screen_leave;
        screen_begin();
    }
    status = watch(c, &top);
    screen_leave();
    free(top.samples);
    return status;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What a client may say, to the daemon's real objects, engine and all. The first byte tells what
 * the rest is:
 *   'R'  bytes after the authentication, as they are.
 *   'C'  calls, each encoded anew and well: method, path, arguments and options are chosen by
 *        bytes, so that mutations stay messages and reach what reads options.
 * Between inputs the daemon must come to rest with nothing left.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "ipc/names.h"
#include "tests/in-process.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define CALLS_MAX 24
#define PATHS_MAX 8
#define KEPT_MAX 4
#define DEPTH_MAX 4
#define STRANGER 65533

struct input {
    const uint8_t *at, *end;
};

static uint8_t take(struct input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

/* A number of bytes that are there. */
static size_t take_length(struct input *in)
{
    size_t n = take(in), left = (size_t)(in->end - in->at);

    return MIN(n, left);
}

static uint64_t take_u64(struct input *in)
{
    uint64_t x = 0;

    for (int i = 0; i < 8; i++)
        x = x << 8 | take(in);
    return x;
}

/* ---- calls ---- */

static const struct method {
    const char *interface, *name, *signature;
    bool is_session; /* else the root's */
} methods[] = {
    {LLM_MANAGER_INTERFACE, "CreateSession", "a{sv}", false},
    {LLM_SESSION_INTERFACE, "Generate", "a{sv}", true},
    {LLM_SESSION_INTERFACE, "Append", "a{sv}", true},
    {LLM_SESSION_INTERFACE, "Fork", "a{sv}", true},
    {LLM_SESSION_INTERFACE, "Rewind", "u", true},
    {LLM_SESSION_INTERFACE, "Save", "h", true},
    {LLM_SESSION_INTERFACE, "Restore", "h", true},
    {LLM_SESSION_INTERFACE, "Cancel", "", true},
    {LLM_SESSION_INTERFACE, "Close", "", true},
    {LLM_MANAGER_INTERFACE, "ListSessions", "a{sv}", false},
    {LLM_MANAGER_INTERFACE, "ListModels", "a{sv}", false},
    {LLM_MANAGER_INTERFACE, "Measure", "a{sv}", false},
    {LLM_MANAGER_INTERFACE, "GetStatistics", "", false},
    {LLM_MANAGER_INTERFACE, "GetQuota", "u", false},
    {LLM_MANAGER_INTERFACE, "SetQuota", "ua{sv}", false},
    {LLM_MANAGER_INTERFACE, "Subscribe", "a{sv}", false},
    {LLM_MANAGER_INTERFACE, "Unsubscribe", "", false},
    {LLM_MANAGER_INTERFACE, "InstallModel", "hsa{sv}", false},
    {LLM_MANAGER_INTERFACE, "RemoveModel", "sa{sv}", false},
    {"org.freedesktop.DBus.Properties", "Get", "ss", true},
    {"org.freedesktop.DBus.Properties", "GetAll", "s", true},
    {"org.freedesktop.DBus.Properties", "Set", "ssv", true},
    {"org.freedesktop.DBus.Introspectable", "Introspect", "", true},
    {"org.freedesktop.DBus.ObjectManager", "GetManagedObjects", "", false},
    {"org.freedesktop.DBus.Peer", "Ping", "", true},
    {LLM_SESSION_INTERFACE, "Adopt", "a{sv}", true},
};

static const struct option {
    const char *name, *type;
} options[] = {
    {"prompt", "s"},
    {"max-tokens", "u"},
    {"messages", "a(ss)"},
    {"raw", "b"},
    {"format", "s"},
    {"prompt-fd", "h"},
    {"temperature", "d"},
    {"top-k", "u"},
    {"top-p", "d"},
    {"min-p", "d"},
    {"repetition-penalty", "d"},
    {"presence-penalty", "d"},
    {"frequency-penalty", "d"},
    {"penalty-last-n", "u"},
    {"seed", "t"},
    {"deterministic", "b"},
    {"stop", "as"},
    {"logit-bias", "a{ud}"},
    {"logprobs", "b"},
    {"top-logprobs", "u"},
    {"ignore-end", "b"},
    {"model", "s"},
    {"context", "u"},
    {"class", "s"},
    {"label", "s"},
    {"linger", "b"},
    {"all", "b"},
    {"session", "o"},
    {"replace", "b"},
    {"default", "b"},
    {"max-sessions", "u"},
    {"max-kv-bytes", "t"},
    {"max-queued", "u"},
    {"weight", "u"},
    {"tokens-per-minute", "u"},
};

static const char *const other_types[] = {"s", "u", "b",  "d",     "t",     "h",     "o", "y",
                                          "i", "x", "as", "a(ss)", "a{ud}", "a{sv}", "v", "au"};

static const char *const words[] = {
    "user",
    "model",
    "assistant",
    "system",
    "json",
    "text",
    "idle",
    "batch",
    "",
    "interactive",
    "a",
    LLM_MANAGER_INTERFACE,
    "org.llmd.Llm1.Session",
    "State",
};

struct run {
    struct in_process *daemon;
    sd_bus *bus;
    struct input in;
    char *paths[PATHS_MAX];
    size_t n_paths;
    sd_bus_message *kept[KEPT_MAX]; /* replies whose streams stay open */
};

/* [up to 64 KiB], malloc'ed: a word, or bytes of the input, some of them repeated. */
static char *take_string(struct input *in)
{
    uint8_t how = take(in);
    size_t n, times;
    char *s;

    if (how < ARRAY_SIZE(words))
        return strdup(words[how]);
    n = take_length(in);
    times = how & 0x80 ? (size_t)1 << (how & 7) : 1;
    s = malloc(n * times + 1);
    assert(s);
    for (size_t i = 0; i < times; i++)
        for (size_t j = 0; j < n; j++)
            s[i * n + j] = in->at[j] ? (char)in->at[j] : ' ';
    s[n * times] = 0;
    in->at += n;
    return s;
}

static double take_double(struct input *in)
{
    static const double known[] = {0, 1, 0.5, 100, -1, 1e308, -0.0};
    uint8_t how = take(in);
    uint64_t bits;
    double x;

    if (how < ARRAY_SIZE(known))
        return known[how];
    bits = take_u64(in);
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static int take_fd(struct input *in)
{
    uint8_t how = take(in);
    size_t n;
    int fd;

    switch (how % 6) {
    case 0:
    case 1:
    case 2:
        fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        n = take_length(in);
        assert(fd >= 0 && write(fd, in->at, n) == (ssize_t)n);
        in->at += n;
        if (how % 6 == 1)
            assert(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK) == 0);
        if (how % 6 == 2)
            assert(ftruncate(fd, 16 << 20) == 0);
        return fd;
    case 3:
        return open("/dev/full", O_RDWR | O_CLOEXEC);
    case 4:
        return open("/", O_RDONLY | O_CLOEXEC);
    default:
        return open("/dev/null", O_WRONLY | O_CLOEXEC);
    }
}

static const char *take_path(struct run *run)
{
    uint8_t how = take(&run->in);

    if (run->n_paths > 0 && how < 0xf0)
        return run->paths[how % run->n_paths];
    return how & 1 ? LLM_SESSION_PATH "/1" : LLM_ROOT_PATH;
}

static int append(struct run *run, sd_bus_message *m, const char *type, int depth);

static int append_array(struct run *run, sd_bus_message *m, const char *item, int depth)
{
    uint8_t n = take(&run->in) & 0x1f;
    int r = sd_bus_message_open_container(m, 'a', item);

    for (uint8_t i = 0; r >= 0 && i < n && run->in.at < run->in.end; i++)
        r = append(run, m, item, depth);
    return r < 0 ? r : sd_bus_message_close_container(m);
}

/* a{sv}: names we know or not, of their type or not. */
static int append_options(struct run *run, sd_bus_message *m, int depth)
{
    uint8_t n = take(&run->in) & 0x0f;
    int r = sd_bus_message_open_container(m, 'a', "{sv}");

    for (uint8_t i = 0; r >= 0 && i < n; i++) {
        uint8_t which = take(&run->in), how = take(&run->in);
        const struct option *o = &options[which % ARRAY_SIZE(options)];
        CLEANUP(freep) char *name = which == 0xff ? take_string(&run->in) : strdup(o->name);
        const char *type = how < 0xf0 ? o->type : other_types[how & 0x0f];

        assert(name);
        if ((r = sd_bus_message_open_container(m, 'e', "sv")) >= 0 &&
            (r = sd_bus_message_append_basic(m, 's', name)) >= 0 &&
            (r = sd_bus_message_open_container(m, 'v', type)) >= 0 &&
            (r = append(run, m, type, depth)) >= 0 && (r = sd_bus_message_close_container(m)) >= 0)
            r = sd_bus_message_close_container(m);
    }
    return r < 0 ? r : sd_bus_message_close_container(m);
}

/* One complete type. */
static int append(struct run *run, sd_bus_message *m, const char *type, int depth)
{
    struct input *in = &run->in;
    CLEANUP(freep) char *s = NULL;
    uint8_t which;
    uint64_t x;
    double d;
    int fd, r;

    if (depth > DEPTH_MAX)
        return -ELOOP;
    switch (type[0]) {
    case 's':
        s = take_string(in);
        return sd_bus_message_append_basic(m, 's', s);
    case 'o':
        return sd_bus_message_append_basic(m, 'o', take_path(run));
    case 'u':
    case 'i':
    case 'y':
        which = take(in);
        x = which < 0x80 ? which : take_u64(in);
        return sd_bus_message_append(m, (const char[]){type[0], 0}, (int)x);
    case 't':
    case 'x':
        return sd_bus_message_append(m, (const char[]){type[0], 0}, take_u64(in));
    case 'b':
        return sd_bus_message_append(m, "b", take(in) & 1);
    case 'd':
        d = take_double(in);
        return sd_bus_message_append_basic(m, 'd', &d);
    case 'h':
        fd = take_fd(in);
        assert(fd >= 0);
        r = sd_bus_message_append(m, "h", fd); /* a duplicate */
        close(fd);
        return r;
    case 'v':
        which = take(in);
        type = other_types[which % ARRAY_SIZE(other_types)];
        if ((r = sd_bus_message_open_container(m, 'v', type)) < 0 ||
            (r = append(run, m, type, depth + 1)) < 0)
            return r;
        return sd_bus_message_close_container(m);
    case '(':
        if ((r = sd_bus_message_open_container(m, 'r', "ss")) < 0 ||
            (r = append(run, m, "s", depth)) < 0 || (r = append(run, m, "s", depth)) < 0)
            return r;
        return sd_bus_message_close_container(m);
    case '{':
        if ((r = sd_bus_message_open_container(m, 'e', "ud")) < 0 ||
            (r = append(run, m, "u", depth)) < 0 || (r = append(run, m, "d", depth)) < 0)
            return r;
        return sd_bus_message_close_container(m);
    default: /* an array */
        return strcmp(type, "a{sv}") == 0 ? append_options(run, m, depth + 1)
                                          : append_array(run, m, type + 1, depth + 1);
    }
}

/* Keeps what a reply gives: a path to call, a stream to leave open. Takes the reply. */
static void keep(struct run *run, const struct method *method, sd_bus_message *reply, bool open)
{
    const char *path;

    if (sd_bus_message_is_method_error(reply, NULL)) {
        const sd_bus_error *e = sd_bus_message_get_error(reply);

        assert(e->name);
        /* sd-bus's own texts repeat names as they came. */
        if (strncmp(e->name, LLM_ERROR_PREFIX, strlen(LLM_ERROR_PREFIX)) == 0)
            assert(e->message && e->message[0] && !strchr(e->message, '\n'));
    } else if (sd_bus_message_has_signature(reply, "o") && run->n_paths < PATHS_MAX &&
               sd_bus_message_read(reply, "o", &path) > 0) {
        run->paths[run->n_paths] = strdup(path);
        assert(run->paths[run->n_paths]);
        run->n_paths++;
    } else if (open && sd_bus_message_has_signature(reply, "ht")) {
        for (size_t i = 0; i < KEPT_MAX; i++)
            if (!run->kept[i]) {
                run->kept[i] = reply;
                return;
            }
    }
    (void)method;
    sd_bus_message_unref(reply);
}

static const char *split(const char **signature, char out[16])
{
    size_t n = **signature == 'a' ? strlen(*signature) : 1; /* an array is the last */

    memcpy(out, *signature, n);
    out[n] = 0;
    *signature += n;
    return out;
}

static int call(struct run *run)
{
    uint8_t which = take(&run->in);
    const struct method *method = &methods[which % ARRAY_SIZE(methods)];
    bool open = which & 0x80;
    const char *path = method->is_session ? take_path(run) : LLM_ROOT_PATH;
    sd_bus_message *m = NULL, *reply;
    char type[16];
    int r;

    r = sd_bus_message_new_method_call(run->bus, &m, NULL, path, method->interface, method->name);
    for (const char *s = method->signature; r >= 0 && *s;)
        r = append(run, m, split(&s, type), 0);
    if (r >= 0)
        r = in_process_call(run->daemon, run->bus, m, &reply);
    if (r >= 0)
        keep(run, method, reply, open);
    sd_bus_message_unref(m);
    /* What sd-bus does not let us send is not the daemon's business. */
    return r == -ECONNRESET ? r : 0;
}

static void run_calls(struct in_process *daemon, const uint8_t *data, size_t n)
{
    struct run run = {.daemon = daemon, .in = {data, data + n}};
    uid_t uid = take(&run.in) & 1 ? STRANGER : getuid();
    int r = in_process_bus(daemon, uid, &run.bus);

    assert(r >= 0);
    for (int i = 0; i < CALLS_MAX && run.in.at < run.in.end && r >= 0; i++)
        r = call(&run);
    for (size_t i = 0; i < KEPT_MAX; i++)
        sd_bus_message_unref(run.kept[i]);
    for (size_t i = 0; i < run.n_paths; i++)
        free(run.paths[i]);
    sd_bus_close_unref(run.bus);
}

/* ---- bytes ---- */

/* Answers are read and thrown away, with their descriptors. */
static bool drain(int fd)
{
    char data[4096];
    ssize_t n;

    while ((n = recv(fd, data, sizeof(data), MSG_DONTWAIT)) > 0)
        ;
    return n < 0 && errno == EAGAIN;
}

static void run_bytes(struct in_process *daemon, const uint8_t *data, size_t n)
{
    static const char hello[] = "\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n";
    int fd = in_process_connect(daemon, getuid());
    bool is_open;

    assert(fd >= 0);
    assert(send(fd, hello, sizeof(hello) - 1, MSG_NOSIGNAL) == sizeof(hello) - 1);
    in_process_run(daemon);
    is_open = drain(fd);
    while (is_open && n > 0) {
        ssize_t sent = send(fd, data, n, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent > 0) {
            data += sent;
            n -= (size_t)sent;
        }
        in_process_run(daemon);
        is_open = drain(fd) && (sent > 0 || errno == EAGAIN);
    }
    shutdown(fd, SHUT_WR);
    in_process_run(daemon);
    drain(fd);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct in_process daemon;
    static bool started;

    if (!started) {
        /* Half a context is enough to fill, and soon full. */
        in_process_start(&daemon, LLMD_SOURCE_ROOT "/models/demo.llmd", /* context= */ 96);
        started = true;
    }
    if (n == 0)
        return 0;
    if (data[0] == 'R')
        run_bytes(&daemon, data + 1, n - 1);
    else if (data[0] == 'C')
        run_calls(&daemon, data + 1, n - 1);
    in_process_settle(&daemon);
    return 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The objects as several users see them, in one process. */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/client.h"
#include "daemon/users.h"
#include "ipc/names.h"
#include "tests/chat-model.h"
#include "tests/in-process.h"

#define ROOT_UID 0 /* may do everything */
#define ALICE 60001
#define BOB 60002
#define CONTEXT 2000
#define PROPERTIES "org.freedesktop.DBus.Properties"
#define OBJECT_MANAGER "org.freedesktop.DBus.ObjectManager"

static struct in_process daemon_here;

/* ---- calls ---- */

static sd_bus *connect_as(uid_t uid)
{
    sd_bus *bus;

    assert(in_process_bus(&daemon_here, uid, &bus) == 0);
    return bus;
}

static sd_bus_message *new_call(sd_bus *bus, const char *path, const char *interface,
                                const char *member)
{
    sd_bus_message *m;

    assert(sd_bus_message_new_method_call(bus, &m, NULL, path, interface, member) >= 0);
    return m;
}

/* Takes m. The answer, which may be an error. */
static sd_bus_message *ask(sd_bus *bus, sd_bus_message *m)
{
    sd_bus_message *reply;

    assert(in_process_call(&daemon_here, bus, m, &reply) == 0);
    sd_bus_message_unref(m);
    return reply;
}

/* Takes m, which must succeed. */
static sd_bus_message *good(sd_bus *bus, sd_bus_message *m)
{
    sd_bus_message *reply = ask(bus, m);

    if (sd_bus_message_is_method_error(reply, NULL)) {
        fprintf(stderr, "%s\n", sd_bus_message_get_error(reply)->message);
        abort();
    }
    return reply;
}

/* Takes m, which must fail with that name, and that in its text. */
static void bad(sd_bus *bus, sd_bus_message *m, const char *name, const char *text)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = ask(bus, m);
    const sd_bus_error *e = sd_bus_message_get_error(reply);
    char whole[128];

    snprintf(whole, sizeof(whole), "%s%s", LLM_ERROR_PREFIX, name);
    if (!sd_bus_message_is_method_error(reply, whole) || !strstr(e->message, text)) {
        fprintf(stderr, "%s: %s; wanted is %s: %s\n", e ? e->name : "no error", e ? e->message : "",
                whole, text);
        abort();
    }
}

static sd_bus_message *manager_call(sd_bus *bus, const char *member)
{
    return new_call(bus, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, member);
}

static sd_bus_message *session_call(sd_bus *bus, const char *path, const char *member)
{
    return new_call(bus, path, LLM_SESSION_INTERFACE, member);
}

/* With one option of type s, b or u; name NULL: none. */
static sd_bus_message *with_option(sd_bus_message *m, const char *name, const char *type, ...)
{
    va_list ap;

    assert(sd_bus_message_open_container(m, 'a', "{sv}") >= 0);
    if (name) {
        assert(sd_bus_message_open_container(m, 'e', "sv") >= 0);
        assert(sd_bus_message_append(m, "s", name) >= 0);
        assert(sd_bus_message_open_container(m, 'v', type) >= 0);
        va_start(ap, type);
        assert(sd_bus_message_appendv(m, type, ap) >= 0);
        va_end(ap);
        assert(sd_bus_message_close_container(m) >= 0);
        assert(sd_bus_message_close_container(m) >= 0);
    }
    assert(sd_bus_message_close_container(m) >= 0);
    return m;
}

static sd_bus_message *plain(sd_bus_message *m)
{
    return with_option(m, NULL, NULL);
}

/* Takes a reply with an object path. */
static char *path_in(sd_bus_message *reply)
{
    const char *path;
    char *copy;

    assert(sd_bus_message_read(reply, "o", &path) > 0);
    copy = strdup(path);
    assert(copy);
    sd_bus_message_unref(reply);
    return copy;
}

static char *create(sd_bus *bus)
{
    return path_in(good(bus, plain(manager_call(bus, "CreateSession"))));
}

static void done(sd_bus *bus, sd_bus_message *m)
{
    sd_bus_message_unref(good(bus, m));
}

static uint64_t number(sd_bus *bus, const char *path, const char *interface, const char *name)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL, *reply = NULL;
    const char *contents;
    uint64_t t = 0;
    uint32_t u = 0;
    char type;

    m = new_call(bus, path, PROPERTIES, "Get");
    assert(sd_bus_message_append(m, "ss", interface, name) >= 0);
    reply = good(bus, TAKE_PTR(m));
    assert(sd_bus_message_peek_type(reply, &type, &contents) > 0);
    assert(sd_bus_message_enter_container(reply, 'v', contents) > 0);
    assert(strcmp(contents, "t") == 0 ? sd_bus_message_read(reply, "t", &t) > 0
                                      : sd_bus_message_read(reply, "u", &u) > 0);
    return t + u;
}

static uint64_t used(sd_bus *bus, const char *path)
{
    return number(bus, path, LLM_SESSION_INTERFACE, "ContextUsed");
}

/* Reads a request's stream to its end: the last line. The fd is the reply's. */
static char *last_record(sd_bus_message *reply)
{
    char *text = NULL, *end, *start;
    size_t n = 0, allocated = 0;
    ssize_t got;
    int fd;

    assert(sd_bus_message_read(reply, "h", &fd) > 0);
    assert(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
    for (;;) {
        if (allocated - n < 65536) {
            allocated += 1u << 20;
            text = realloc(text, allocated);
            assert(text);
        }
        got = read(fd, text + n, allocated - n - 1);
        if (got == 0)
            break;
        if (got < 0) {
            assert(errno == EAGAIN);
            sd_event_run(daemon_here.service.event, 1000);
            continue;
        }
        n += (size_t)got;
    }
    sd_bus_message_unref(reply);
    assert(n > 1 && text[n - 1] == '\n');
    text[n - 1] = 0;
    end = strrchr(text, '\n');
    start = strdup(end ? end + 1 : text);
    free(text);
    return start;
}

/* A raw prompt of n bytes that is appended: n + 1 tokens in an empty session. */
static void append(sd_bus *bus, const char *path, size_t n)
{
    CLEANUP(freep) char *text = malloc(n + 1), *end = NULL;
    sd_bus_message *m = session_call(bus, path, "Append");

    memset(text, 'x', n);
    text[n] = 0;
    assert(sd_bus_message_append(m, "a{sv}", 2, "prompt", "s", text, "raw", "b", 1) >= 0);
    end = last_record(good(bus, m));
    assert(strcmp(end, "{\"type\":\"end\",\"reason\":\"appended\"}") == 0);
}

/* A request that goes on until it is stopped, since nobody reads. Its answer holds the stream. */
static sd_bus_message *endless(sd_bus *bus, const char *path)
{
    sd_bus_message *m = session_call(bus, path, "Generate");

    assert(sd_bus_message_append(m, "a{sv}", 3, "prompt", "s", "x", "ignore-end", "b", 1,
                                 "top-logprobs", "u", 64) >= 0);
    return good(bus, m);
}

static void close_bus(sd_bus *bus)
{
    sd_bus_close_unref(bus);
    in_process_run(&daemon_here);
}

/* ---- signals ---- */

/* Those that came to one client, as "Member path" lines. */
struct heard {
    char text[16384];
    sd_bus_slot *slot;
    sd_bus *bus;
    char reason[32], label[80];
};

static int on_signal(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct heard *h = userdata;
    const char *member = sd_bus_message_get_member(m), *path = sd_bus_message_get_path(m), *s;
    size_t n = strlen(h->text);
    uint64_t id;

    (void)error;
    if (sd_bus_message_is_signal(m, LLM_SESSION_INTERFACE, "RequestFinished")) {
        assert(sd_bus_message_read(m, "ts", &id, &s) > 0);
        snprintf(h->reason, sizeof(h->reason), "%s", s);
    } else if (strcmp(member, "InterfacesAdded") == 0) {
        assert(sd_bus_message_read(m, "o", &path) > 0);
        assert(sd_bus_message_enter_container(m, 'a', "{sa{sv}}") > 0);
        assert(sd_bus_message_enter_container(m, 'e', "sa{sv}") > 0);
        assert(sd_bus_message_skip(m, "s") > 0);
        assert(sd_bus_message_enter_container(m, 'a', "{sv}") > 0);
        while (sd_bus_message_enter_container(m, 'e', "sv") > 0) {
            assert(sd_bus_message_read(m, "s", &s) > 0);
            if (strcmp(s, "Label") == 0) {
                assert(sd_bus_message_read(m, "v", "s", &s) > 0);
                snprintf(h->label, sizeof(h->label), "%s", s);
            } else {
                assert(sd_bus_message_skip(m, "v") > 0);
            }
            assert(sd_bus_message_exit_container(m) > 0);
        }
    } else if (strcmp(member, "InterfacesRemoved") == 0) {
        assert(sd_bus_message_read(m, "o", &path) > 0);
    }
    snprintf(h->text + n, sizeof(h->text) - n, "%s %s\n", member, path);
    return 0;
}

static void listen_to(struct heard *h, sd_bus *bus)
{
    *h = (struct heard){.bus = bus};
    assert(sd_bus_match_signal(bus, &h->slot, NULL, NULL, NULL, NULL, on_signal, h) >= 0);
}

static bool has_heard(const struct heard *h, const char *member, const char *path)
{
    char line[256];

    snprintf(line, sizeof(line), "%s %s\n", member, path);
    return strstr(h->text, line);
}

/* Signals and answers come in order: with the answer to a call all before it are there. */
static void listen(struct heard *h)
{
    number(h->bus, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "Sessions");
}

static void wait_to_hear(struct heard *h, const char *member, const char *path)
{
    while (!has_heard(h, member, path))
        listen(h);
}

/* ---- tests ---- */

static bool introspected(sd_bus *bus, const char *id)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    const char *xml;
    char node[64];

    reply = good(
        bus, new_call(bus, LLM_SESSION_PATH, "org.freedesktop.DBus.Introspectable", "Introspect"));
    assert(sd_bus_message_read(reply, "s", &xml) > 0);
    snprintf(node, sizeof(node), "name=\"%s\"", id);
    return strstr(xml, node);
}

static bool managed(sd_bus *bus, const char *path)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    bool found = false;
    const char *at;

    reply = good(bus, new_call(bus, LLM_ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects"));
    assert(sd_bus_message_enter_container(reply, 'a', "{oa{sa{sv}}}") > 0);
    while (sd_bus_message_enter_container(reply, 'e', "oa{sa{sv}}") > 0) {
        assert(sd_bus_message_read(reply, "o", &at) > 0);
        found = found || strcmp(at, path) == 0;
        assert(sd_bus_message_skip(reply, "a{sa{sv}}") > 0);
        assert(sd_bus_message_exit_container(reply) > 0);
    }
    return found;
}

/* How many sessions it lists; *ret_label: of the last. */
static size_t listed(sd_bus *bus, bool all, char *ret_label, size_t room)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    const char *path, *label, *class, *state;
    uint32_t uid, in_use, most, position;
    uint64_t prompt, completion;
    size_t n = 0;

    reply = good(bus, with_option(manager_call(bus, "ListSessions"), "all", "b", all));
    assert(sd_bus_message_enter_container(reply, 'a', "(osussuuttu)") > 0);
    while (sd_bus_message_read(reply, "(osussuuttu)", &path, &label, &uid, &class, &state, &in_use,
                               &most, &prompt, &completion, &position) > 0) {
        snprintf(ret_label, room, "%s", label);
        n++;
    }
    return n;
}

static void test_foreign(void)
{
    static const char *const methods[] = {"Generate", "Append", "Fork"};
    sd_bus *alice = connect_as(ALICE), *also = connect_as(ALICE), *bob = connect_as(BOB),
           *root = connect_as(ROOT_UID);
    CLEANUP(freep)
    char *path = path_in(
        good(alice, with_option(manager_call(alice, "CreateSession"), "label", "s", "mine")));
    CLEANUP(freep) char *path_of_lingering = NULL;
    const char *id = strrchr(path, '/') + 1;
    char label[80];
    sd_bus_message *m;

    assert(introspected(alice, id) && introspected(also, id) && !introspected(bob, id));
    assert(managed(alice, path) && managed(also, path) && !managed(bob, path));
    assert(listed(also, false, label, sizeof(label)) == 1 && strcmp(label, "mine") == 0);
    assert(listed(bob, false, label, sizeof(label)) == 0);
    assert(used(also, path) == 0);
    for (size_t i = 0; i < 3; i++)
        bad(bob, plain(session_call(bob, path, methods[i])), "NoSuchSession",
            ": there is no such session");
    bad(root, session_call(root, path, "Close"), "NoSuchSession", ": there is no such session");
    bad(bob, with_option(manager_call(bob, "Measure"), "session", "o", path), "InvalidPrompt", "");
    bad(bob, with_option(manager_call(bob, "ListSessions"), "all", "b", 1), "NotAuthorized",
        "inspect-sessions");
    bad(bob, with_option(manager_call(bob, "Subscribe"), "all", "b", 1), "NotAuthorized", "");
    m = manager_call(bob, "SetDefaultModel");
    assert(sd_bus_message_append(m, "s", "model") >= 0);
    bad(bob, plain(m), "NotAuthorized", "manage-models");
    assert(listed(root, true, label, sizeof(label)) == 1 && strcmp(label, "") == 0);

    /* Only what nobody has can be adopted; by its owner, to no effect. */
    done(alice, plain(session_call(alice, path, "Adopt")));
    bad(also, plain(session_call(also, path, "Adopt")), "Busy", "another client");
    bad(bob, plain(session_call(bob, path, "Adopt")), "NoSuchSession", "");
    bad(root, plain(session_call(root, path, "Adopt")), "NoSuchSession", "");
    bad(alice, with_option(session_call(alice, path, "Adopt"), "force", "b", 1), "InvalidOption",
        "force");
    done(also, session_call(also, path, "Close"));
    path_of_lingering =
        path_in(good(alice, with_option(manager_call(alice, "CreateSession"), "linger", "b", 1)));
    bad(alice, plain(session_call(alice, path_of_lingering, "Adopt")), "NotSupported", "lingers");
    done(alice, session_call(alice, path_of_lingering, "Close"));
    assert(listed(alice, false, label, sizeof(label)) == 0);
    free(TAKE_PTR(path));
    path = create(alice);
    close_bus(alice);
    bad(also, session_call(also, path, "Cancel"), "NoSuchSession", strrchr(path, '/') + 1);
    close_bus(also);
    close_bus(bob);
    close_bus(root);
}

static void test_signals(void)
{
    struct heard own, other, all, owner;
    sd_bus *alice = connect_as(ALICE), *also = connect_as(ALICE), *bob = connect_as(BOB),
           *root = connect_as(ROOT_UID);
    CLEANUP(freep) char *path = NULL, *end = NULL;
    sd_bus_message *stream;

    listen_to(&owner, alice);
    listen_to(&own, also);
    listen_to(&other, bob);
    listen_to(&all, root);
    done(also, plain(manager_call(also, "Subscribe")));
    done(bob, plain(manager_call(bob, "Subscribe")));
    done(root, with_option(manager_call(root, "Subscribe"), "all", "b", 1));
    path = path_in(
        good(alice, with_option(manager_call(alice, "CreateSession"), "label", "s", "mine")));
    wait_to_hear(&own, "InterfacesAdded", path);
    wait_to_hear(&all, "InterfacesAdded", path);
    assert(strcmp(own.label, "mine") == 0 && strcmp(all.label, "") == 0);
    stream = endless(alice, path);
    wait_to_hear(&own, "PropertiesChanged", path);
    done(alice, session_call(alice, path, "Cancel"));
    end = last_record(stream);
    assert(strstr(end, "cancelled"));
    wait_to_hear(&owner, "RequestFinished", path); /* not subscribed, but its own */
    wait_to_hear(&own, "RequestFinished", path);
    assert(strcmp(own.reason, "cancelled") == 0);
    assert(!has_heard(&owner, "InterfacesAdded", path));
    assert(!has_heard(&owner, "PropertiesChanged", path));
    done(also, manager_call(also, "Unsubscribe"));
    own.text[0] = 0;
    done(alice, session_call(alice, path, "Close"));
    wait_to_hear(&all, "InterfacesRemoved", path);
    listen(&own);
    assert(own.text[0] == 0);
    listen(&other);
    assert(other.text[0] == 0);
    sd_bus_slot_unref(own.slot);
    sd_bus_slot_unref(other.slot);
    sd_bus_slot_unref(all.slot);
    sd_bus_slot_unref(owner.slot);
    close_bus(alice);
    close_bus(also);
    close_bus(bob);
    close_bus(root);
}

static void set_quota(sd_bus *root, uid_t uid, const char *name, const char *type, uint64_t value)
{
    sd_bus_message *m = manager_call(root, "SetQuota");

    assert(sd_bus_message_append(m, "u", (uint32_t)uid) >= 0);
    done(root, *type == 't' ? with_option(m, name, type, value)
                            : with_option(m, name, type, (uint32_t)value));
}

static uint64_t quota(sd_bus *bus, uid_t uid, const char *wanted)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = manager_call(bus, "GetQuota"), *reply = NULL;
    const char *name, *contents;
    uint64_t found = UINT64_MAX, t;
    uint32_t u;

    assert(sd_bus_message_append(m, "u", (uint32_t)uid) >= 0);
    reply = good(bus, TAKE_PTR(m));
    assert(sd_bus_message_enter_container(reply, 'a', "{sv}") > 0);
    while (sd_bus_message_enter_container(reply, 'e', "sv") > 0) {
        assert(sd_bus_message_read(reply, "s", &name) > 0);
        assert(sd_bus_message_peek_type(reply, NULL, &contents) > 0);
        if (*contents == 't') {
            assert(sd_bus_message_read(reply, "v", "t", &t) > 0);
        } else {
            assert(sd_bus_message_read(reply, "v", "u", &u) > 0);
            t = u;
        }
        if (strcmp(name, wanted) == 0)
            found = t;
        assert(sd_bus_message_exit_container(reply) > 0);
    }
    return found;
}

static sd_bus_message *with_fd(sd_bus_message *m, int fd)
{
    assert(sd_bus_message_append(m, "h", fd) >= 0);
    return m;
}

static void test_quotas(void)
{
    sd_bus *alice = connect_as(ALICE), *bob = connect_as(BOB), *root = connect_as(ROOT_UID);
    CLEANUP(freep)
    char *one = create(alice), *two = create(alice), *bobs = create(bob), *end = NULL;
    CLEANUP(freep) char *restored = NULL;
    sd_bus_message *m, *stream;
    int file;

    m = manager_call(bob, "SetQuota");
    assert(sd_bus_message_append(m, "u", (uint32_t)BOB) >= 0);
    bad(bob, plain(m), "NotAuthorized", "manage-quotas");
    m = manager_call(bob, "GetQuota");
    assert(sd_bus_message_append(m, "u", (uint32_t)ALICE) >= 0);
    bad(bob, m, "NotAuthorized", "manage-quotas");

    set_quota(root, ALICE, "max-sessions", "u", 2);
    assert(quota(alice, ALICE, "max-sessions") == 2 && quota(root, ALICE, "sessions") == 2);
    bad(alice, plain(manager_call(alice, "CreateSession")), "QuotaExceeded",
        "requested 1, available 0");
    bad(alice, plain(session_call(alice, one, "Fork")), "QuotaExceeded", "sessions:");
    sd_bus_message_unref(good(bob, plain(manager_call(bob, "CreateSession"))));

    set_quota(root, ALICE, "max-queued", "u", 1);
    stream = endless(alice, one);
    assert(quota(alice, ALICE, "queued") == 1);
    bad(alice, with_option(session_call(alice, two, "Generate"), "prompt", "s", "x"),
        "QuotaExceeded", "requests: requested 1, available 0");
    bad(alice, with_option(manager_call(alice, "Measure"), "prompt", "s", "x"), "QuotaExceeded",
        "requests:");
    append(bob, bobs, 10);
    done(alice, session_call(alice, one, "Cancel"));
    end = last_record(stream);
    while (quota(alice, ALICE, "queued") > 0)
        ;

    /* The session that asks, or one at work, holds too much; what idle ones hold would be taken. */
    append(alice, one, 10);
    set_quota(root, ALICE, "max-kv-bytes", "t", 1);
    assert(quota(alice, ALICE, "kv-bytes") > 1);
    bad(alice, with_option(session_call(alice, one, "Generate"), "prompt", "s", "x"),
        "QuotaExceeded", "KV bytes:");
    append(alice, two, 10);
    assert(quota(alice, ALICE, "kv-bytes") > 1);
    set_quota(root, ALICE, "max-kv-bytes", "t", 0);

    /* What is in the bucket may be passed by the request that finds something in it. */
    set_quota(root, ALICE, "tokens-per-minute", "u", 100);
    append(alice, two, 1500);
    while (quota(alice, ALICE, "queued") > 0)
        ;
    bad(alice, with_option(session_call(alice, two, "Generate"), "prompt", "s", "x"),
        "QuotaExceeded", "tokens per minute");
    append(bob, bobs, 10);
    set_quota(root, ALICE, "tokens-per-minute", "u", 0);
    append(alice, two, 10);

    /* What is restored is computed as well, with the next request. */
    assert((file = memfd_create("saved", MFD_CLOEXEC)) >= 0);
    done(alice, with_fd(session_call(alice, two, "Save"), file));
    done(alice, session_call(alice, one, "Close"));
    restored = create(alice);
    assert(lseek(file, 0, SEEK_SET) == 0);
    set_quota(root, ALICE, "tokens-per-minute", "u", 100);
    done(alice, with_fd(session_call(alice, restored, "Restore"), file));
    bad(alice, with_option(session_call(alice, restored, "Generate"), "prompt", "s", "x"),
        "QuotaExceeded", "tokens per minute");
    close(file);
    close_bus(alice);
    close_bus(bob);
    close_bus(root);
}

static uint32_t measure(sd_bus *bus, const char *text, const char *session)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = manager_call(bus, "Measure"), *reply = NULL;
    uint32_t tokens;

    if (session)
        assert(sd_bus_message_append(m, "a{sv}", 3, "prompt", "s", text, "raw", "b", 1, "session",
                                     "o", session) >= 0);
    else
        assert(sd_bus_message_append(m, "a{sv}", 2, "prompt", "s", text, "raw", "b", 1) >= 0);
    reply = good(bus, TAKE_PTR(m));
    assert(sd_bus_message_read(reply, "u", &tokens) > 0);
    return tokens;
}

static sd_bus_message *with_tokens(sd_bus_message *m, uint32_t n)
{
    assert(sd_bus_message_append(m, "u", n) >= 0);
    return m;
}

static void test_life(void)
{
    sd_bus *alice = connect_as(ALICE);
    CLEANUP(freep) char *path = create(alice), *fork = NULL, *fresh = create(alice), *end = NULL;
    CLEANUP(closep) int file = memfd_create("saved", MFD_CLOEXEC);
    sd_bus_message *stream;

    assert(measure(alice, "hello", NULL) == 6);
    append(alice, path, 99);
    assert(used(alice, path) == 100);
    assert(number(alice, path, LLM_SESSION_INTERFACE, "PromptTokens") == 100);
    assert(number(alice, path, LLM_SESSION_INTERFACE, "KvBytes") > 0);
    assert(measure(alice, "hello", path) == 5);
    fork = path_in(good(alice, plain(session_call(alice, path, "Fork"))));
    assert(strcmp(fork, path) != 0 && used(alice, fork) == 100);
    done(alice, with_tokens(session_call(alice, fork, "Rewind"), 40));
    assert(used(alice, fork) == 40 && used(alice, path) == 100);
    bad(alice, with_tokens(session_call(alice, fork, "Rewind"), 41), "InvalidOption", "tokens:");

    done(alice, with_fd(session_call(alice, path, "Save"), file));
    assert(lseek(file, 0, SEEK_SET) == 0);
    done(alice, with_fd(session_call(alice, fresh, "Restore"), file));
    assert(used(alice, fresh) == 100);
    append(alice, fresh, 10);
    assert(used(alice, fresh) == 110);
    assert(lseek(file, 0, SEEK_SET) == 0);
    bad(alice, with_fd(session_call(alice, fresh, "Restore"), file), "InvalidState", "empty");
    free(TAKE_PTR(fresh));
    fresh = create(alice);
    assert(lseek(file, 1, SEEK_SET) == 1);
    bad(alice, with_fd(session_call(alice, fresh, "Restore"), file), "InvalidState", "");
    assert(ftruncate(file, 1 << 20) == 0);
    bad(alice, with_fd(session_call(alice, fresh, "Restore"), file), "InvalidState", "larger");

    /* While a request runs there is no other, but measuring. */
    stream = endless(alice, path);
    assert(measure(alice, "hello", fork) == 5);
    bad(alice, plain(session_call(alice, path, "Fork")), "Busy", "");
    bad(alice, with_tokens(session_call(alice, path, "Rewind"), 0), "Busy", "");
    bad(alice, with_fd(session_call(alice, path, "Save"), file), "Busy", "");
    bad(alice, with_option(session_call(alice, path, "Append"), "prompt", "s", "x"), "Busy", "");
    done(alice, session_call(alice, path, "Close"));
    end = last_record(stream);
    assert(strstr(end, "closed"));
    close_bus(alice);
}

static sd_bus_message *later;

static int on_later(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    (void)userdata;
    (void)error;
    if (!later)
        later = sd_bus_message_ref(m);
    return 0;
}

static int on_too_long(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    uint32_t *n_refused = userdata;

    (void)error;
    if (sd_bus_message_is_method_error(m, LLM_ERROR_PREFIX "QuotaExceeded")) {
        assert(strstr(sd_bus_message_get_error(m)->message, "prompt bytes: requested"));
        ++*n_refused;
    }
    return 0;
}

/* Texts come faster than they can be tokenised: those that wait are not to fill the memory. */
static void test_many_long_prompts(void)
{
    sd_bus *alice = connect_as(ALICE), *bob = connect_as(BOB);
    CLEANUP(freep) char *path = create(alice), *bobs = create(bob);
    CLEANUP(closep) int file = memfd_create("prompt", MFD_CLOEXEC);
    const struct user *user = users_find(daemon_here.service.users, ALICE);
    sd_bus_slot *slots[40];
    uint32_t n_refused = 0;

    assert(file >= 0 && ftruncate(file, LLM_PROMPT_BYTES_MAX) == 0);
    for (size_t i = 0; i < ARRAY_SIZE(slots); i++) {
        CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = manager_call(alice, "Measure");

        assert(sd_bus_message_append(m, "a{sv}", 3, "prompt-fd", "h", file, "raw", "b", 1,
                                     "session", "o", path) >= 0);
        assert(sd_bus_call_async(alice, &slots[i], m, on_too_long, &n_refused, UINT64_MAX) >= 0);
    }
    while (n_refused == 0) {
        sd_event_run(daemon_here.service.event, 1000);
        while (sd_bus_process(alice, NULL) > 0)
            ;
        assert(user->prompt_bytes <= 8 * LLM_PROMPT_BYTES_MAX);
    }
    append(bob, bobs, 10);
    done(alice, session_call(alice, path, "Close")); /* stops those that wait */
    while (user->n_queued > 0)
        sd_event_run(daemon_here.service.event, 1000);
    assert(user->prompt_bytes == 0);
    for (size_t i = 0; i < ARRAY_SIZE(slots); i++)
        sd_bus_slot_unref(slots[i]);
    close_bus(alice);
    close_bus(bob);
}

/* Descriptors that block for ever hold up nobody, and there are only so many. */
static void test_stuck_files(void)
{
    sd_bus *alice = connect_as(ALICE), *bob = connect_as(BOB);
    CLEANUP(freep) char *path = create(alice), *bobs = create(bob);
    sd_bus_slot *slots[4];
    int pipes[2], only_read;

    assert(pipe2(pipes, O_CLOEXEC) == 0);
    for (size_t i = 0; i < 4; i++) {
        CLEANUP(freep) char *empty = create(alice);
        CLEANUP(sd_bus_message_unrefp)
        sd_bus_message *m = with_fd(session_call(alice, empty, "Restore"), pipes[0]);

        assert(sd_bus_call_async(alice, &slots[i], m, on_later, NULL, UINT64_MAX) >= 0);
    }
    bad(alice, with_fd(session_call(alice, path, "Restore"), pipes[0]), "QuotaExceeded",
        "requested 1, available 0");
    assert(!later);
    append(bob, bobs, 10);
    only_read = open("/dev/null", O_RDONLY | O_CLOEXEC);
    bad(alice, with_fd(session_call(alice, path, "Save"), only_read), "InvalidOption", "writing");
    bad(alice, with_fd(session_call(alice, path, "Restore"), pipes[1]), "InvalidOption", "reading");
    close(only_read);

    /* They end when there is something to be read, or nobody who writes. */
    close(pipes[1]);
    while (!later) {
        sd_event_run(daemon_here.service.event, 1000);
        while (sd_bus_process(alice, NULL) > 0)
            ;
    }
    assert(sd_bus_message_is_method_error(later, LLM_ERROR_PREFIX "InvalidState"));
    sd_bus_message_unref(later);
    close(pipes[0]);
    for (size_t i = 0; i < 4; i++)
        sd_bus_slot_unref(slots[i]);
    close_bus(alice);
    close_bus(bob);
}

static void test_lingering(void)
{
    sd_bus *alice = connect_as(ALICE), *also;
    struct session_set *sessions = daemon_here.service.sessions;
    CLEANUP(freep)
    char *path =
        path_in(good(alice, with_option(manager_call(alice, "CreateSession"), "linger", "b", 1)));
    sd_bus_message *stream;

    append(alice, path, 9);
    close_bus(alice);
    also = connect_as(ALICE);
    assert(used(also, path) == 10);
    stream = endless(also, path); /* it is not idle now, however long that takes */
    session_set_linger_usec(sessions, 1);
    assert(number(also, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "Sessions") == 1);
    done(also, session_call(also, path, "Cancel"));
    while (session_set_n_sessions(sessions) > 0)
        sd_event_run(daemon_here.service.event, 1000);
    bad(also, session_call(also, path, "Close"), "NoSuchSession", strrchr(path, '/') + 1);
    session_set_linger_usec(sessions, UINT64_C(3600000000));
    sd_bus_message_unref(stream);
    close_bus(also);
}

/* Whoever asks and does not take the answers is dropped, and nobody else notices. */
static void test_reads_nothing(void)
{
    sd_bus *alice = connect_as(ALICE), *bob = connect_as(BOB);
    CLEANUP(freep) char *path = create(alice);
    uint64_t cookie; /* asked for, or no answer is wanted */
    size_t n = 0;

    while (daemon_here.n_connections == 2) {
        sd_bus_message *m =
            new_call(alice, LLM_ROOT_PATH, "org.freedesktop.DBus.Introspectable", "Introspect");

        if (sd_bus_send(alice, m, &cookie) < 0)
            break;
        sd_bus_message_unref(m);
        in_process_run(&daemon_here);
        assert(++n < 10000);
    }
    assert(daemon_here.n_connections == 1);
    assert(session_set_n_sessions(daemon_here.service.sessions) == 0);
    free(TAKE_PTR(path));
    path = create(bob);
    append(bob, path, 10);
    close_bus(alice);
    close_bus(bob);
}

/* Calls that wait for the engine when their client goes; the session is another connection's. */
static void test_vanishes(void)
{
    static const char *const members[] = {"Fork", "Append", "Generate"};
    sd_bus *keeper = connect_as(ALICE);
    CLEANUP(freep) char *kept = create(keeper);

    append(keeper, kept, 50);
    for (int i = 0; i < 30; i++) {
        sd_bus *alice = connect_as(ALICE);
        CLEANUP(freep) char *path = create(alice);
        uint64_t cookie;

        for (size_t k = 0; k < 3; k++) {
            CLEANUP(sd_bus_message_unrefp)
            sd_bus_message *m = session_call(alice, k == 0 ? kept : path, members[k]);

            if (k == 0)
                plain(m);
            else
                with_option(m, "prompt", "s", "x");
            assert(sd_bus_send(alice, m, &cookie) >= 0);
        }
        assert(sd_bus_flush(alice) >= 0);
        for (int k = 0; k < i % 4; k++)
            sd_event_run(daemon_here.service.event, 0);
        close_bus(alice);
    }
    while (daemon_here.n_connections > 1 || !session_set_is_quiet(daemon_here.service.sessions))
        sd_event_run(daemon_here.service.event, 1000);
    assert(session_set_n_sessions(daemon_here.service.sessions) == 1);
    close_bus(keeper);
    while (daemon_here.n_connections > 0)
        sd_event_run(daemon_here.service.event, 1000);
    assert(session_set_n_sessions(daemon_here.service.sessions) == 0);
    assert(clients_n(daemon_here.service.clients) == 0);
    assert(!users_find(daemon_here.service.users, ALICE));
}

static void test_connections(void)
{
    sd_bus *all[1000], *bob = connect_as(BOB);
    size_t n = 0, most = user_limits_default.max_connections;

    assert(most + 1 < 1000);
    while (n <= most && in_process_bus(&daemon_here, ALICE, &all[n]) >= 0)
        n++;
    assert(n == most);
    close_bus(connect_as(BOB));
    while (n > 0)
        close_bus(all[--n]);
    while (users_find(daemon_here.service.users, ALICE) &&
           users_find(daemon_here.service.users, ALICE)->n_connections > 0)
        sd_event_run(daemon_here.service.event, 1000);
    close_bus(connect_as(ALICE));
    close_bus(bob);
}

int main(int argc, char **argv)
{
    assert(argc == 2);
    chat_model_write(argv[1], 64, CHAT_MODEL_CONTEXT);
    in_process_start(&daemon_here, argv[1], CONTEXT);
    test_foreign();
    test_signals();
    test_life();
    test_stuck_files();
    test_many_long_prompts();
    test_lingering();
    test_reads_nothing();
    test_vanishes();
    test_connections();
    test_quotas();
    in_process_settle(&daemon_here);
    in_process_stop(&daemon_here);
    return 0;
}

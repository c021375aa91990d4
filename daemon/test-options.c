/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* What Generate and Append make of `seed` and `deterministic`, given or not. */

#include <stdarg.h>
#include <sys/socket.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/job.h"
#include "daemon/options.h"
#include "engine/model.h"

#undef NDEBUG
#include <assert.h>

static sd_bus *bus;

/* Whether it is deterministic: options as sd_bus_message_append() takes them, prompt included. */
static bool is_deterministic(enum job_kind kind, const char *types, ...)
{
    static const struct model_generation defaults;
    struct job_request q = {0};
    struct error err = {0};
    sd_bus_message *m;
    va_list values;
    bool deterministic;

    assert(sd_bus_message_new_method_call(bus, &m, NULL, "/", "a.b", "C") >= 0);
    va_start(values, types);
    assert(sd_bus_message_appendv(m, types, values) >= 0);
    va_end(values);
    assert(sd_bus_message_seal(m, 1, 0) >= 0);
    assert((kind == JOB_APPEND ? options_read_append(m, &q, &err)
                               : options_read_generate(m, &defaults, &q, &err)) == 0);
    assert(q.kind == kind);
    deterministic = q.deterministic;
    job_request_done(&q);
    sd_bus_message_unref(m);
    return deterministic;
}

int main(void)
{
    const uint64_t seed = 5;
    int ends[2];

    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    assert(sd_bus_new(&bus) >= 0 && sd_bus_set_fd(bus, ends[0], ends[0]) >= 0);
    assert(sd_bus_start(bus) >= 0);

    assert(!is_deterministic(JOB_GENERATE, "a{sv}", 1, "prompt", "s", "x"));
    assert(is_deterministic(JOB_GENERATE, "a{sv}", 2, "prompt", "s", "x", "seed", "t", seed));
    assert(is_deterministic(JOB_GENERATE, "a{sv}", 2, "deterministic", "b", 1, "prompt", "s", "x"));
    assert(
        !is_deterministic(JOB_GENERATE, "a{sv}", 2, "deterministic", "b", 0, "prompt", "s", "x"));
    /* What is said counts, in any order. */
    assert(!is_deterministic(JOB_GENERATE, "a{sv}", 3, "deterministic", "b", 0, "seed", "t", seed,
                             "prompt", "s", "x"));
    assert(!is_deterministic(JOB_GENERATE, "a{sv}", 3, "seed", "t", seed, "deterministic", "b", 0,
                             "prompt", "s", "x"));
    assert(is_deterministic(JOB_GENERATE, "a{sv}", 3, "seed", "t", seed, "deterministic", "b", 1,
                            "prompt", "s", "x"));
    assert(!is_deterministic(JOB_APPEND, "a{sv}", 1, "prompt", "s", "x"));
    assert(is_deterministic(JOB_APPEND, "a{sv}", 2, "prompt", "s", "x", "deterministic", "b", 1));
    sd_bus_unref(bus);
    close(ends[1]);
    return 0;
}

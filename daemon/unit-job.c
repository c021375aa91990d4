/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Three questions, each about the answer to the one before: the unit of this process, the job of
 * that unit, the type of that job. All of them together have one deadline: a service manager that
 * is busy, or a bus that is stopped as well, keeps nobody waiting.
 */

#include "daemon/unit-job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"

#define DEADLINE_USEC UINT64_C(1000000)
#define SYSTEMD "org.freedesktop.systemd1"

struct unit_job {
    sd_bus *bus; /* a reference */
    sd_bus_slot *slot;
    sd_event_source *deadline;
    unit_job_answer answer;
    void *userdata;
};

struct unit_job *unit_job_free(struct unit_job *j)
{
    if (!j)
        return NULL;
    sd_bus_slot_unref(j->slot);
    sd_bus_unref(j->bus);
    sd_event_source_disable_unref(j->deadline);
    free(j);
    return NULL;
}

static int finish(struct unit_job *j, bool restarts)
{
    unit_job_answer answer = j->answer;
    void *userdata = j->userdata;

    unit_job_free(j);
    answer(userdata, restarts);
    return 0;
}

static int on_deadline(sd_event_source *source, uint64_t usec, void *userdata)
{
    (void)source;
    (void)usec;
    return finish(userdata, false);
}

static int ask_property(struct unit_job *j, const char *path, const char *interface,
                        const char *name, sd_bus_message_handler_t handler)
{
    j->slot = sd_bus_slot_unref(j->slot);
    return sd_bus_call_method_async(j->bus, &j->slot, SYSTEMD, path,
                                    "org.freedesktop.DBus.Properties", "Get", handler, j, "ss",
                                    interface, name);
}

static int on_type(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    const char *type = "";

    (void)error;
    if (sd_bus_message_is_method_error(m, NULL) || sd_bus_message_read(m, "v", "s", &type) < 0)
        type = "";
    return finish(userdata, strcmp(type, "restart") == 0 || strcmp(type, "try-restart") == 0);
}

static int on_job(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct unit_job *j = userdata;
    const char *path;
    uint32_t id;

    (void)error;
    if (sd_bus_message_is_method_error(m, NULL) ||
        sd_bus_message_read(m, "v", "(uo)", &id, &path) < 0 ||
        id == 0 || /* somebody has sent the signal by hand */
        ask_property(j, path, SYSTEMD ".Job", "JobType", on_type) < 0)
        return finish(j, false);
    return 0;
}

static int on_unit(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct unit_job *j = userdata;
    const char *path;

    (void)error;
    if (sd_bus_message_is_method_error(m, NULL) || sd_bus_message_read(m, "o", &path) < 0 ||
        ask_property(j, path, SYSTEMD ".Unit", "Job", on_job) < 0)
        return finish(j, false);
    return 0;
}

int unit_job_ask(struct unit_job **ret, sd_event *event, sd_bus *bus, unit_job_answer answer,
                 void *userdata)
{
    struct unit_job *j = calloc(1, sizeof(*j));
    int r;

    if (!j)
        return -ENOMEM;
    j->bus = sd_bus_ref(bus);
    j->answer = answer;
    j->userdata = userdata;
    r = sd_event_add_time_relative(event, &j->deadline, CLOCK_MONOTONIC, DEADLINE_USEC, 1000,
                                   on_deadline, j);
    if (r >= 0)
        r = sd_bus_call_method_async(bus, &j->slot, SYSTEMD, "/org/freedesktop/systemd1",
                                     SYSTEMD ".Manager", "GetUnitByPID", on_unit, j, "u",
                                     (uint32_t)getpid());
    if (r < 0) {
        unit_job_free(j);
        return r;
    }
    *ret = j;
    return 0;
}

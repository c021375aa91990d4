/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-manager.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

static const struct bus_property properties[] = {
    {"Version", 's', offsetof(struct manager, version)},
    {"State", 's', offsetof(struct manager, state)},
    {"LoadProgress", 'd', offsetof(struct manager, load_progress)},
    {"DefaultModel", 's', offsetof(struct manager, default_model)},
    {"Model", 's', offsetof(struct manager, model)},
    {"Backends", 'S', offsetof(struct manager, backends)},
    {"Sessions", 'u', offsetof(struct manager, sessions)},
    {"KvBytesUsed", 't', offsetof(struct manager, kv_bytes_used)},
    {"KvBytesMax", 't', offsetof(struct manager, kv_bytes_max)},
};

static const struct bus_property statistics[] = {
    {"requests", 't', offsetof(struct manager, requests)},
    {"requests-cancelled", 't', offsetof(struct manager, requests_cancelled)},
    {"requests-failed", 't', offsetof(struct manager, requests_failed)},
    {"requests-refused", 't', offsetof(struct manager, requests_refused)},
    {"prompt-tokens", 't', offsetof(struct manager, prompt_tokens)},
    {"completion-tokens", 't', offsetof(struct manager, completion_tokens)},
    {"uptime-usec", 't', offsetof(struct manager, uptime_usec)},
    {"kv-bytes-spilled", 't', offsetof(struct manager, kv_bytes_spilled)},
    {"memory-pressure", 'u', offsetof(struct manager, memory_pressure)},
    {"queued", 'u', offsetof(struct manager, queued)},
    {"running", 'u', offsetof(struct manager, running)},
    {"clients", 'u', offsetof(struct manager, clients)},
    {"prefill-rate", 'd', offsetof(struct manager, prefill_rate)},
    {"decode-rate", 'd', offsetof(struct manager, decode_rate)},
    {"placement", 's', offsetof(struct manager, placement)},
    {"gpu", 's', offsetof(struct manager, gpu)},
    {"gpu-state", 's', offsetof(struct manager, gpu_state)},
    {"gpu-reason", 's', offsetof(struct manager, gpu_reason)},
    {"cpu-prompt-tokens", 't', offsetof(struct manager, cpu_prompt_tokens)},
    {"cpu-completion-tokens", 't', offsetof(struct manager, cpu_completion_tokens)},
    {"cpu-prefill-measured", 'd', offsetof(struct manager, cpu_prefill)},
    {"cpu-decode-measured", 'd', offsetof(struct manager, cpu_decode)},
    {"cpu-decode-many-measured", 'd', offsetof(struct manager, cpu_decode_many)},
    {"gpu-prompt-tokens", 't', offsetof(struct manager, gpu_prompt_tokens)},
    {"gpu-completion-tokens", 't', offsetof(struct manager, gpu_completion_tokens)},
    {"gpu-prefill-measured", 'd', offsetof(struct manager, gpu_prefill)},
    {"gpu-decode-measured", 'd', offsetof(struct manager, gpu_decode)},
    {"gpu-decode-many-measured", 'd', offsetof(struct manager, gpu_decode_many)},
    {"both-prefill-measured", 'd', offsetof(struct manager, both_prefill)},
    {"both-decode-measured", 'd', offsetof(struct manager, both_decode)},
};

void manager_done(struct manager *m)
{
    for (size_t i = 0; m->backends && m->backends[i]; i++)
        free(m->backends[i]);
    free(m->backends);
    for (size_t i = 0; i < ARRAY_SIZE(m->messages); i++)
        sd_bus_message_unref(m->messages[i]);
    *m = (struct manager){0};
}

static int get_statistics(struct llm_connection *c, struct manager *m)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *call = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "GetStatistics", &call);
    if (status != STATUS_OK)
        return status;
    r = bus_try(c, call, &m->messages[1], &e);
    if (r < 0 && sd_bus_error_has_name(&e, SD_BUS_ERROR_UNKNOWN_METHOD))
        return STATUS_OK;
    if (r != 0)
        return status_of_call(r, &e);
    if (bus_read_properties(m->messages[1], statistics, ARRAY_SIZE(statistics), m) < 0)
        return complain_of_answer();
    m->has_statistics = true;
    return STATUS_OK;
}

int manager_get(struct llm_connection *c, struct manager *ret)
{
    struct manager m = {.version = "", .state = "", .default_model = "", .model = ""};
    int status;

    status = bus_get_properties(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, properties,
                                ARRAY_SIZE(properties), &m, &m.messages[0]);
    if (status == STATUS_OK)
        status = get_statistics(c, &m);
    if (status != STATUS_OK) {
        manager_done(&m);
        return status;
    }
    *ret = m;
    return STATUS_OK;
}

const char *scope_name(const struct llm_connection *c)
{
    switch (llm_connection_scope(c)) {
    case LLM_SCOPE_SYSTEM:
        return "system";
    case LLM_SCOPE_USER:
        return "user";
    case LLM_SCOPE_PRIVATE:
        return "private";
    case LLM_SCOPE_ANY: /* a path: where --socket does not name one, the private daemon's */
        break;
    }
    return global.socket ? "socket" : "private";
}

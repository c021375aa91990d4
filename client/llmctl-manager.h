/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* manager: what the daemon says of itself, for status and top. */

#include "client/llmctl-bus.h"

struct manager {
    const char *version, *state, *default_model, *model;
    char **backends;
    double load_progress; /* 0 to 1 */
    uint32_t sessions;
    uint64_t kv_bytes_used, kv_bytes_max;

    bool has_statistics; /* else an older daemon, and the rest is not meant */
    uint64_t requests, requests_cancelled, requests_failed, requests_refused;
    uint64_t prompt_tokens, completion_tokens, uptime_usec;
    uint32_t queued, running, clients;
    uint32_t memory_pressure; /* 0: none, to 3 */
    uint64_t kv_bytes_spilled;
    double prefill_rate, decode_rate; /* tokens a second */

    const char *gpu_state; /* NULL: an older daemon, and the rest is not meant */
    const char *placement, *gpu, *gpu_reason;
    uint64_t gpu_prompt_tokens, gpu_completion_tokens, cpu_prompt_tokens, cpu_completion_tokens;
    double cpu_prefill, cpu_decode, cpu_decode_many; /* measured, tokens a second; 0: not */
    double gpu_prefill, gpu_decode, gpu_decode_many, both_prefill, both_decode;

    sd_bus_message *messages[2]; /* what the strings are in */
};

/* Two calls that the daemon answers at once, whatever it computes. A status */
int manager_get(struct llm_connection *c, struct manager *ret);
void manager_done(struct manager *m);

/* "system", "user", "private" or "socket". */
const char *scope_name(const struct llm_connection *c);

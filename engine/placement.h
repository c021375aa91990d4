/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * placement: which lane does which kind of work. Pure numbers: it is told how fast the lanes are,
 * what there is to do and what passes took, and has no clock, thread or memory of its own. Engine
 * thread.
 *
 * By mode: `cpu` and `gpu` give all to one lane; `hybrid` gives prompts to the GPU while somebody
 * decodes on the processor, so that neither waits for the other, and to whoever is free where
 * nobody does; decoding is the processor's. `auto` is hybrid. Where there is no GPU's lane, or no
 * more, all is the processor's.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/engine.h"

enum placement_mode {
    PLACE_AUTO,
    PLACE_CPU,
    PLACE_GPU,
    PLACE_HYBRID,
};

/* "auto", "cpu", "vulkan", "hybrid": as people write it. */
const char *placement_mode_name(enum placement_mode m);
int placement_mode_parse(const char *name, enum placement_mode *ret); /* 0, -EINVAL */

/* Tokens per second of a long prompt, one session, eight sessions together; 0: not known. */
struct lane_rates {
    double prefill, decode, decode_many;
};

struct placement_rates {
    struct lane_rates lane[ENGINE_LANES];
    double both_prefill, both_decode; /* both lanes at once, sums */
};

struct placement {
    enum placement_mode mode;
    bool has_gpu; /* its lane is there */
    struct placement_rates rates;
};

void placement_init(struct placement *p, enum placement_mode mode);
void placement_set_rates(struct placement *p, const struct placement_rates *rates);
void placement_set_gpu(struct placement *p, bool has_gpu);

struct placement_load {
    uint32_t n_decoding, n_prompts; /* requests that could go on */
    bool on_battery;
    uint64_t now_usec;
};

/* Bits, 1 << lane: those that may take prompts' rows (and what is computed again), and decoding. */
struct placement_choice {
    unsigned prefill, decode;
};
void placement_choose(const struct placement *p, const struct placement_load *load,
                      struct placement_choice *ret);

/* The one lane of deterministic requests: the same whatever the load is, as long as it is there. */
enum engine_lane placement_fixed_lane(const struct placement *p);

/*
 * A pass is over. took_usec: from its start, at least: where its end was seen late it is what is
 * certain; gpu_usec: time the device itself worked, 0: not known. The difference is what it waited.
 */
void placement_learn(struct placement *p, enum engine_lane lane, uint32_t rows, uint64_t took_usec,
                     uint64_t gpu_usec, uint64_t now_usec);

/* Who does what and why, for people, one line: "prompts: GPU; decoding: CPU". */
void placement_explain(const struct placement *p, char *buf, size_t n);

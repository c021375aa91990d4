/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * placement: which lane does which kind of work. Pure numbers: it is told how fast the lanes are,
 * what there is to do and what passes took, and has no clock, thread or memory of its own. Engine
 * thread.
 *
 * `cpu` and `vulkan` give all to one lane. `hybrid` gives prompts to the GPU while somebody decodes
 * on the processor, so that neither waits for the other, and to whoever is free where nobody does;
 * decoding is the processor's.
 *
 * `auto` goes by what was measured (placement_set_rates()), and uses no GPU before:
 *   - Decoding is done by whoever does it faster for so many sessions, and split between both where
 *     both at once were measured faster than the better one alone.
 *   - While one lane decodes, prompts are read by the other, if it reads at least 0.3 times as
 * fast. Beside decoding a prompt has three fifths of its lane at most, since the scheduler makes a
 * step 2.5 times as long with it, and those who decode have what is left: so elsewhere, at 0.3, a
 *     prompt takes twice the time, and everybody else gets 2.5 times the tokens meanwhile.
 *   - Else prompts are read by whoever reads faster; several at once by both, where that was
 * measured to be faster. A choice is left for one that is a good deal better only, and not within a
 * quarter of a second.
 *
 * `auto` leaves the GPU alone while others want it: after three passes in a row that waited for the
 * device longer than it worked (or, where that cannot be known, took four times what they should)
 * for 5 seconds, and twice as long, up to a minute, where the first pass after that is such a one
 * again. Ten good passes make up for it. On battery `auto` and `hybrid` leave it alone.
 *
 * Where there is no GPU's lane, or no more, all is the processor's.
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

/* Bits, 1 << lane: those that may take prompts' rows (and what is computed again), and decoding. */
struct placement_choice {
    unsigned prefill, decode;
};

/* What keeps a GPU that is there from being used, or nothing does. */
enum placement_state {
    PLACEMENT_WORKS,
    PLACEMENT_UNMEASURED, /* one of the lanes' rates is not known, and they are to decide */
    PLACEMENT_ON_BATTERY,
    PLACEMENT_BACKS_OFF, /* others use it */
};

struct placement {
    enum placement_mode mode;
    bool has_gpu; /* its lane is there */
    struct placement_rates rates;

    /* its own */
    enum placement_state state; /* as of the last choice */
    bool has_choice;
    struct placement_choice choice;
    uint64_t choice_usec;   /* when it was made */
    uint64_t until_usec;    /* backs off until then */
    uint64_t pause_usec;    /* how long it did last; 0: not lately */
    bool is_probation;      /* no pass was seen since */
    unsigned n_bad, n_good; /* passes in a row */
};

void placement_init(struct placement *p, enum placement_mode mode);
void placement_set_rates(struct placement *p, const struct placement_rates *rates);
void placement_set_gpu(struct placement *p, bool has_gpu);

/* Whether `auto` can go by the rates: of prompts and of decoding, of both lanes. */
bool placement_rates_suffice(const struct placement_rates *r);
bool placement_is_measured(const struct placement *p); /* by those it has */

struct placement_load {
    uint32_t n_decoding, n_prompts; /* requests that could go on */
    bool on_battery;                /* and the GPU is not to be used there */
    uint64_t now_usec;
};

/* True: ::state has changed, and with it what placement_explain() says. */
bool placement_choose(struct placement *p, const struct placement_load *load,
                      struct placement_choice *ret);

/* The one lane of deterministic requests: the same whatever the load is, as long as it is there. */
enum engine_lane placement_fixed_lane(const struct placement *p);

/*
 * A pass is over. took_usec: from its start, at least: where its end was seen late it is what is
 * certain; gpu_usec: time the device itself worked, 0: not known. The difference is what it waited.
 */
void placement_learn(struct placement *p, enum engine_lane lane, uint32_t rows, uint64_t took_usec,
                     uint64_t gpu_usec, uint64_t now_usec);

/*
 * Who does what and why, for people, one line:
 * "prompts: GPU beside decoding, else CPU (tokens/s: CPU 412, GPU 152); decoding: CPU (15.1,
 * GPU 6.3)"
 */
void placement_explain(const struct placement *p, char *buf, size_t n);

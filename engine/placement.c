/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/placement.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/checked.h"

#define ON_CPU (1u << LANE_CPU)
#define ON_GPU (1u << LANE_GPU)
#define BOTH (ON_CPU | ON_GPU)

#define MANY 8u             /* sessions of decode_many */
#define SPLIT_LEAST 4u      /* sessions that decode, to be worth a split: half of those measured */
#define BETTER 1.15         /* than the lane that does it now */
#define SPLIT_BETTER 1.1    /* both at once, than one alone */
#define BESIDE_LEAST 0.3    /* of the rate of the lane that decodes: see placement.h */
#define BESIDE_STAYS 0.25   /* likewise, once it is so */
#define HOLD_USEC 250000u   /* for a choice to last */
#define PAUSE_USEC 5000000u /* the first time */
#define PAUSE_MOST 60000000u
#define BAD_PASSES 3u
#define GOOD_PASSES 10u
#define WAIT_LEAST 20000u  /* usec of waiting that nobody minds */
#define LATE_FACTOR 4.0    /* of what a pass should take */
#define LATE_LEAST 50000.0 /* usec beyond that */

static const char *const mode_names[] = {
    [PLACE_AUTO] = "auto", [PLACE_CPU] = "cpu", [PLACE_GPU] = "vulkan", [PLACE_HYBRID] = "hybrid"};

const char *placement_mode_name(enum placement_mode m)
{
    return mode_names[m];
}

int placement_mode_parse(const char *name, enum placement_mode *ret)
{
    for (size_t i = 0; i < ARRAY_SIZE(mode_names); i++)
        if (strcmp(name, mode_names[i]) == 0) {
            *ret = (enum placement_mode)i;
            return 0;
        }
    return -EINVAL;
}

void placement_init(struct placement *p, enum placement_mode mode)
{
    *p = (struct placement){.mode = mode};
}

void placement_set_rates(struct placement *p, const struct placement_rates *rates)
{
    p->rates = *rates;
    p->has_choice = false;
    if (p->state == PLACEMENT_UNMEASURED && placement_is_measured(p))
        p->state = PLACEMENT_WORKS;
}

void placement_set_gpu(struct placement *p, bool has_gpu)
{
    p->has_gpu = has_gpu;
    p->has_choice = false;
    p->until_usec = p->pause_usec = 0;
    p->is_probation = false;
    p->n_bad = p->n_good = 0;
}

bool placement_rates_suffice(const struct placement_rates *r)
{
    for (int l = 0; l < ENGINE_LANES; l++)
        if (!(r->lane[l].prefill > 0) || !(r->lane[l].decode > 0))
            return false;
    return true;
}

bool placement_is_measured(const struct placement *p)
{
    return placement_rates_suffice(&p->rates);
}

/* ---- choosing by rates ---- */

/* Of n sessions that decode; between one and MANY on a straight line. */
static double decode_rate(const struct lane_rates *r, uint32_t n)
{
    double part = (MAX(MIN(n, MANY), 1u) - 1) / (double)(MANY - 1);

    return r->decode_many > 0 ? r->decode + part * (r->decode_many - r->decode) : r->decode;
}

/* now: the lanes that do it, 0: none yet. */
static unsigned faster(double cpu, double gpu, unsigned now)
{
    if (now == ON_CPU)
        return gpu > cpu * BETTER ? ON_GPU : ON_CPU;
    if (now == ON_GPU)
        return cpu > gpu * BETTER ? ON_CPU : ON_GPU;
    return gpu > cpu ? ON_GPU : ON_CPU;
}

static unsigned choose_decoding(const struct placement_rates *r, uint32_t n, unsigned now)
{
    double cpu = decode_rate(&r->lane[LANE_CPU], n), gpu = decode_rate(&r->lane[LANE_GPU], n);
    double best = MAX(decode_rate(&r->lane[LANE_CPU], MANY), decode_rate(&r->lane[LANE_GPU], MANY));

    if (n + (now == BOTH) >= SPLIT_LEAST &&
        r->both_decode > best * (now == BOTH ? 1.0 : SPLIT_BETTER))
        return BOTH;
    return faster(cpu, gpu, now);
}

static unsigned choose_prompts(const struct placement_rates *r, const struct placement_load *load,
                               unsigned decode, unsigned now)
{
    double cpu = r->lane[LANE_CPU].prefill, gpu = r->lane[LANE_GPU].prefill;

    if (load->n_decoding > 0 && decode != BOTH) {
        unsigned other = BOTH & ~decode;
        double ratio = decode == ON_CPU ? gpu / cpu : cpu / gpu;

        return ratio >= (now == other ? BESIDE_STAYS : BESIDE_LEAST) ? other : decode;
    }
    if (load->n_prompts > 1 && r->both_prefill > MAX(cpu, gpu) * (now == BOTH ? 1.0 : SPLIT_BETTER))
        return BOTH;
    return faster(cpu, gpu, now);
}

static void choose_by_rates(const struct placement *p, const struct placement_load *load,
                            struct placement_choice *ret)
{
    struct placement_choice now = p->has_choice ? p->choice : (struct placement_choice){0, 0};

    ret->decode = choose_decoding(&p->rates, load->n_decoding, now.decode);
    ret->prefill = choose_prompts(&p->rates, load, ret->decode, now.prefill);
}

static enum placement_state state_of(const struct placement *p, const struct placement_load *load)
{
    bool is_auto = p->mode == PLACE_AUTO;

    if (load->on_battery && (is_auto || p->mode == PLACE_HYBRID))
        return PLACEMENT_ON_BATTERY;
    if (is_auto && !placement_is_measured(p))
        return PLACEMENT_UNMEASURED;
    return is_auto && load->now_usec < p->until_usec ? PLACEMENT_BACKS_OFF : PLACEMENT_WORKS;
}

static void choose(struct placement *p, const struct placement_load *load,
                   struct placement_choice *ret)
{
    *ret = (struct placement_choice){ON_CPU, ON_CPU};
    if (!p->has_gpu || p->state != PLACEMENT_WORKS) {
        p->has_choice = false;
        return;
    }
    switch (p->mode) {
    case PLACE_CPU:
        break;
    case PLACE_GPU:
        *ret = (struct placement_choice){ON_GPU, ON_GPU};
        break;
    case PLACE_HYBRID:
        ret->prefill = load->n_decoding > 0 ? ON_GPU : BOTH;
        break;
    case PLACE_AUTO:
        if (load->n_decoding + load->n_prompts == 0)
            p->has_choice = false;
        if (p->has_choice && load->now_usec - p->choice_usec < HOLD_USEC) {
            *ret = p->choice;
            break;
        }
        choose_by_rates(p, load, ret);
        if (!p->has_choice || ret->prefill != p->choice.prefill || ret->decode != p->choice.decode)
            p->choice_usec = load->now_usec;
        p->choice = *ret;
        p->has_choice = load->n_decoding + load->n_prompts > 0;
        break;
    }
}

bool placement_choose(struct placement *p, const struct placement_load *load,
                      struct placement_choice *ret)
{
    enum placement_state before = p->state;

    p->state = state_of(p, load);
    choose(p, load, ret);
    return p->has_gpu && p->state != before;
}

enum engine_lane placement_fixed_lane(const struct placement *p)
{
    return p->has_gpu && p->mode == PLACE_GPU ? LANE_GPU : LANE_CPU;
}

/* ---- learning ---- */

/* A pass of so many rows, at most; 0: not known. */
static double should_take_usec(const struct lane_rates *r, uint32_t rows)
{
    double rate = rows > MANY ? r->prefill : decode_rate(r, rows);

    return rate > 0 ? MAX(rows / rate, r->decode > 0 ? 1 / r->decode : 0) * 1e6 : 0;
}

static bool is_bad(const struct placement *p, uint32_t rows, uint64_t took_usec, uint64_t gpu_usec)
{
    double should = should_take_usec(&p->rates.lane[LANE_GPU], rows);
    uint64_t waited = took_usec - MIN(took_usec, gpu_usec);

    if (gpu_usec > 0)
        return waited > MAX(gpu_usec, WAIT_LEAST);
    return should > 0 && (double)took_usec > should * LATE_FACTOR + LATE_LEAST;
}

void placement_learn(struct placement *p, enum engine_lane lane, uint32_t rows, uint64_t took_usec,
                     uint64_t gpu_usec, uint64_t now_usec)
{
    if (lane != LANE_GPU || p->mode != PLACE_AUTO || rows == 0)
        return;
    if (!is_bad(p, rows, took_usec, gpu_usec)) {
        p->n_bad = 0;
        p->is_probation = false;
        if (++p->n_good >= GOOD_PASSES)
            p->pause_usec = 0;
        return;
    }
    p->n_good = 0;
    if (++p->n_bad < BAD_PASSES && !p->is_probation)
        return;
    p->pause_usec = p->pause_usec > 0 ? MIN(2 * p->pause_usec, PAUSE_MOST) : PAUSE_USEC;
    p->until_usec = now_usec + p->pause_usec;
    p->is_probation = true;
    p->n_bad = 0;
}

/* ---- words ---- */

static const char *lanes_name(unsigned lanes)
{
    return lanes == ON_CPU ? "CPU" : lanes == ON_GPU ? "GPU" : "GPU and CPU";
}

static void rate_text(double rate, char ret[16])
{
    snprintf(ret, 16, rate >= 99.95 ? "%.0f" : "%.1f", MIN(rate, 1e9));
}

/* " (412 tokens/s, CPU 152)": of whoever does it, then the other. */
static void rates_text(unsigned lanes, double cpu, double gpu, double both, const char *unit,
                       char *buf, size_t n)
{
    char a[16], b[16], c[16];

    buf[0] = 0;
    if (!(cpu > 0) || !(gpu > 0))
        return;
    rate_text(cpu, a);
    rate_text(gpu, b);
    rate_text(both, c);
    if (lanes == BOTH)
        snprintf(buf, n, " (%s%s, CPU %s, GPU %s)", c, unit, a, b);
    else if (lanes == ON_CPU)
        snprintf(buf, n, " (%s%s, GPU %s)", a, unit, b);
    else
        snprintf(buf, n, " (%s%s, CPU %s)", b, unit, a);
}

static const char *reason(const struct placement *p)
{
    if (!p->has_gpu || p->mode == PLACE_CPU)
        return "";
    switch (p->state) {
    case PLACEMENT_WORKS:
        break;
    case PLACEMENT_UNMEASURED:
        return "; the GPU's rates are not measured yet";
    case PLACEMENT_ON_BATTERY:
        return "; on battery the GPU is not used";
    case PLACEMENT_BACKS_OFF:
        return "; others use the GPU, which is left to them for now";
    }
    return "";
}

void placement_explain(const struct placement *p, char *buf, size_t n)
{
    const struct placement_load loads[] = {{.n_prompts = 2}, {1, 1, false, 0}, {MANY, 1, false, 0}};
    struct placement_choice c[ARRAY_SIZE(loads)], *alone = &c[0], *one = &c[1], *many = &c[2];
    const struct lane_rates *cpu = &p->rates.lane[LANE_CPU], *gpu = &p->rates.lane[LANE_GPU];
    char prompts[64], decoding[64], several[64] = "", beside[48] = "";
    struct placement q = *p;

    for (size_t i = 0; i < ARRAY_SIZE(loads); i++) {
        q.has_choice = false;
        choose(&q, &loads[i], &c[i]);
    }
    if (alone->prefill != one->prefill)
        snprintf(beside, sizeof(beside), "%s beside decoding, else ", lanes_name(one->prefill));
    rates_text(alone->prefill, cpu->prefill, gpu->prefill, p->rates.both_prefill, " tokens/s",
               prompts, sizeof(prompts));
    rates_text(one->decode, cpu->decode, gpu->decode, 0, "", decoding, sizeof(decoding));
    if (many->decode != one->decode)
        rates_text(many->decode, cpu->decode_many, gpu->decode_many, p->rates.both_decode, "",
                   several, sizeof(several));
    snprintf(buf, n, "prompts: %s%s%s; decoding: %s%s%s%s%s%s", beside, lanes_name(alone->prefill),
             prompts, lanes_name(one->decode), decoding,
             many->decode != one->decode ? ", several: " : "",
             many->decode != one->decode ? lanes_name(many->decode) : "", several, reason(p));
}

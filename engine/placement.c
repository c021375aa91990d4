/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/placement.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/checked.h"

#define ON_CPU (1u << LANE_CPU)
#define ON_GPU (1u << LANE_GPU)

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
}

void placement_set_gpu(struct placement *p, bool has_gpu)
{
    p->has_gpu = has_gpu;
}

void placement_choose(const struct placement *p, const struct placement_load *load,
                      struct placement_choice *ret)
{
    *ret = (struct placement_choice){ON_CPU, ON_CPU};
    if (!p->has_gpu)
        return;
    switch (p->mode) {
    case PLACE_CPU:
        break;
    case PLACE_GPU:
        *ret = (struct placement_choice){ON_GPU, ON_GPU};
        break;
    case PLACE_AUTO:
    case PLACE_HYBRID:
        ret->prefill = load->n_decoding > 0 ? ON_GPU : ON_GPU | ON_CPU;
        break;
    }
}

enum engine_lane placement_fixed_lane(const struct placement *p)
{
    return p->has_gpu && p->mode == PLACE_GPU ? LANE_GPU : LANE_CPU;
}

void placement_learn(struct placement *p, enum engine_lane lane, uint32_t rows, uint64_t took_usec,
                     uint64_t gpu_usec, uint64_t now_usec)
{
    (void)p, (void)lane, (void)rows, (void)took_usec, (void)gpu_usec, (void)now_usec;
}

static const char *lanes_name(unsigned lanes)
{
    return lanes == ON_CPU ? "CPU" : lanes == ON_GPU ? "GPU" : "GPU and CPU";
}

void placement_explain(const struct placement *p, char *buf, size_t n)
{
    struct placement_load busy = {.n_decoding = 1, .n_prompts = 1};
    struct placement_choice c;

    placement_choose(p, &busy, &c);
    snprintf(buf, n, "prompts: %s; decoding: %s", lanes_name(c.prefill), lanes_name(c.decode));
}

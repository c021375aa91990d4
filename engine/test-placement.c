/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include "engine/placement.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/checked.h"

enum { CPU = 1u << LANE_CPU, GPU = 1u << LANE_GPU };

static void check(enum placement_mode mode, bool has_gpu, uint32_t n_decoding, unsigned prefill,
                  unsigned decode)
{
    struct placement_load load = {.n_decoding = n_decoding, .n_prompts = 1};
    struct placement_choice c;
    struct placement p;

    placement_init(&p, mode);
    placement_set_gpu(&p, has_gpu);
    placement_choose(&p, &load, &c);
    assert(c.prefill == prefill && c.decode == decode);
}

static void check_modes(void)
{
    static const enum placement_mode all[] = {PLACE_AUTO, PLACE_CPU, PLACE_GPU, PLACE_HYBRID};

    for (size_t i = 0; i < ARRAY_SIZE(all); i++)
        for (uint32_t n = 0; n < 2; n++)
            check(all[i], false, n, CPU, CPU);
    for (uint32_t n = 0; n < 2; n++) {
        check(PLACE_CPU, true, n, CPU, CPU);
        check(PLACE_GPU, true, n, GPU, GPU);
        check(PLACE_HYBRID, true, n, n ? GPU : GPU | CPU, CPU);
        check(PLACE_AUTO, true, n, n ? GPU : GPU | CPU, CPU);
    }
}

static void check_fixed(void)
{
    struct placement p;

    placement_init(&p, PLACE_GPU);
    assert(placement_fixed_lane(&p) == LANE_CPU);
    placement_set_gpu(&p, true);
    assert(placement_fixed_lane(&p) == LANE_GPU);
    placement_init(&p, PLACE_HYBRID);
    placement_set_gpu(&p, true);
    assert(placement_fixed_lane(&p) == LANE_CPU);
    placement_init(&p, PLACE_AUTO);
    placement_set_gpu(&p, true);
    assert(placement_fixed_lane(&p) == LANE_CPU);
}

static void check_words(void)
{
    static const char *const names[] = {"auto", "cpu", "vulkan", "hybrid"};
    enum placement_mode m = PLACE_GPU;
    struct placement p;
    char text[64];

    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        assert(placement_mode_parse(names[i], &m) == 0 && m == (enum placement_mode)i);
        assert(strcmp(placement_mode_name(m), names[i]) == 0);
    }
    assert(placement_mode_parse("gpu", &m) == -EINVAL && m == PLACE_HYBRID);
    placement_init(&p, PLACE_HYBRID);
    placement_explain(&p, text, sizeof(text));
    assert(strcmp(text, "prompts: CPU; decoding: CPU") == 0);
    placement_set_gpu(&p, true);
    placement_explain(&p, text, sizeof(text));
    assert(strcmp(text, "prompts: GPU; decoding: CPU") == 0);
    placement_explain(&p, text, 8);
    assert(strcmp(text, "prompts") == 0);
}

int main(void)
{
    check_modes();
    check_fixed();
    check_words();
    return 0;
}

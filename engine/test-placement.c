/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include "engine/placement.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
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
        check(PLACE_AUTO, true, n, CPU, CPU);
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
    char text[128];

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
    assert(strcmp(text, "prompts: GPU beside decoding, else GPU and CPU; decoding: CPU") == 0);
    placement_explain(&p, text, 8);
    assert(strcmp(text, "prompts") == 0);
}

/* ---- auto, by rates ---- */

#define SECOND UINT64_C(1000000)

/* A GPU that reads faster and decodes slower, as one that shares the CPU's memory. */
static const struct placement_rates usual = {
    .lane = {{.prefill = 100, .decode = 20, .decode_many = 60},
             {.prefill = 400, .decode = 10, .decode_many = 50}},
    .both_prefill = 420,
    .both_decode = 62};

static struct placement measured(const struct placement_rates *r)
{
    struct placement p;

    placement_init(&p, PLACE_AUTO);
    placement_set_gpu(&p, true);
    placement_set_rates(&p, r);
    return p;
}

static void choose_at(struct placement *p, uint64_t now, uint32_t n_decoding, uint32_t n_prompts,
                      unsigned prefill, unsigned decode)
{
    struct placement_load load = {n_decoding, n_prompts, false, now};
    struct placement_choice c;

    placement_choose(p, &load, &c);
    if (c.prefill != prefill || c.decode != decode)
        fprintf(stderr, "%u decode, %u prompts: %u, %u instead of %u, %u\n", n_decoding, n_prompts,
                c.prefill, c.decode, prefill, decode);
    assert(c.prefill == prefill && c.decode == decode);
}

/* A first choice. */
static void choose_first(const struct placement_rates *r, uint32_t n_decoding, uint32_t n_prompts,
                         unsigned prefill, unsigned decode)
{
    struct placement p = measured(r);

    choose_at(&p, SECOND, n_decoding, n_prompts, prefill, decode);
}

static void check_unmeasured(void)
{
    for (int i = 0; i < 4; i++) {
        struct placement_rates r = usual;
        struct lane_rates *l = &r.lane[i % 2];
        struct placement p;

        *(i < 2 ? &l->prefill : &l->decode) = 0;
        p = measured(&r);
        assert(!placement_is_measured(&p));
        choose_at(&p, 1, 0, 1, CPU, CPU);
        choose_at(&p, 2, 1, 1, CPU, CPU);
        assert(p.state == PLACEMENT_UNMEASURED);
        placement_set_rates(&p, &usual);
        assert(placement_is_measured(&p));
        choose_at(&p, 3, 1, 1, GPU, CPU);
        assert(p.state == PLACEMENT_WORKS);
    }
}

static void check_prompts(void)
{
    struct placement_rates r = usual;

    /* Whoever reads faster, alone or beside decoding. */
    choose_first(&r, 0, 1, GPU, CPU);
    choose_first(&r, 3, 1, GPU, CPU);
    /* Slower, but not by so much that those who decode shall suffer. */
    r.lane[LANE_GPU].prefill = 31;
    choose_first(&r, 0, 1, CPU, CPU);
    choose_first(&r, 3, 1, GPU, CPU);
    r.lane[LANE_GPU].prefill = 29;
    choose_first(&r, 3, 1, CPU, CPU);
    /* Where the GPU decodes, the same the other way round. */
    r = usual;
    r.lane[LANE_GPU].decode = 30;
    choose_first(&r, 1, 1, GPU, GPU);
    r.lane[LANE_CPU].prefill = 121;
    choose_first(&r, 1, 1, CPU, GPU);
    /* Several at once, where that was measured to be faster. */
    r = usual;
    choose_first(&r, 0, 2, GPU, CPU);
    r.both_prefill = 441;
    choose_first(&r, 0, 2, GPU | CPU, CPU);
    choose_first(&r, 0, 1, GPU, CPU);
    choose_first(&r, 1, 2, GPU, CPU);
}

static void check_decoding(void)
{
    struct placement_rates r = usual;

    /* Whoever is faster for so many: at five they are equal. */
    r.lane[LANE_GPU] = (struct lane_rates){.prefill = 400, .decode = 10, .decode_many = 67.5};
    choose_first(&r, 1, 0, GPU, CPU);
    choose_first(&r, 4, 0, GPU, CPU);
    choose_first(&r, 6, 0, GPU, GPU); /* the CPU reads too slowly to be of use beside it */
    choose_first(&r, 20, 0, GPU, GPU);
    /* Split where both are faster than the better one. */
    r = usual;
    r.both_decode = 65;
    choose_first(&r, 8, 0, GPU, CPU);
    r.both_decode = 67;
    choose_first(&r, 8, 1, GPU, GPU | CPU);
    choose_first(&r, 4, 1, GPU, GPU | CPU);
    choose_first(&r, 3, 1, GPU, CPU);
    /* Not known: one, as if more came to no more. */
    r.lane[LANE_CPU].decode_many = r.lane[LANE_GPU].decode_many = r.both_decode = 0;
    choose_first(&r, 8, 1, GPU, CPU);
    r.lane[LANE_GPU].decode = 21;
    choose_first(&r, 8, 0, GPU, GPU);
}

static void check_staying(void)
{
    struct placement_rates r = usual;
    struct placement p = measured(&r);

    /* A choice lasts a while, whatever comes and goes. */
    p.rates.both_prefill = 500;
    choose_at(&p, SECOND, 1, 1, GPU, CPU);
    choose_at(&p, SECOND + 249999, 0, 2, GPU, CPU);
    choose_at(&p, SECOND + 250000, 0, 2, GPU | CPU, CPU);
    choose_at(&p, SECOND + 499999, 1, 2, GPU | CPU, CPU);
    choose_at(&p, SECOND + 500000, 1, 2, GPU, CPU);
    /* But not longer than there is anything to do. */
    choose_at(&p, SECOND + 500001, 0, 0, GPU, CPU);
    choose_at(&p, SECOND + 500002, 0, 2, GPU | CPU, CPU);

    /* What is only a little better is left as it is. */
    p = measured(&r);
    choose_at(&p, SECOND, 1, 1, GPU, CPU);
    p.rates.lane[LANE_GPU].decode = 22.9;
    choose_at(&p, 2 * SECOND, 1, 1, GPU, CPU);
    p.rates.lane[LANE_GPU].decode = 23.1;
    choose_at(&p, 3 * SECOND, 1, 1, GPU, GPU);
    p.rates.lane[LANE_GPU].decode = 18;
    choose_at(&p, 4 * SECOND, 1, 1, GPU, GPU);
    p.rates.lane[LANE_GPU].decode = 17;
    choose_at(&p, 5 * SECOND, 1, 1, GPU, CPU);
    p.rates.lane[LANE_GPU].prefill = 26; /* beside decoding */
    choose_at(&p, 6 * SECOND, 1, 1, GPU, CPU);
    p.rates.lane[LANE_GPU].prefill = 24;
    choose_at(&p, 7 * SECOND, 1, 1, CPU, CPU);
    p.rates.both_decode = 67;
    choose_at(&p, 8 * SECOND, 4, 0, CPU, GPU | CPU);
    p.rates.both_decode = 61;
    choose_at(&p, 9 * SECOND, 3, 0, CPU, GPU | CPU);
    choose_at(&p, 10 * SECOND, 2, 0, CPU, CPU);
}

/* ---- backing off ---- */

/* A pass of ten rows that the device worked at for 100 ms. */
static void pass(struct placement *p, bool waits, uint64_t now)
{
    placement_learn(p, LANE_GPU, 10, waits ? 201 * SECOND / 1000 : 199 * SECOND / 1000, SECOND / 10,
                    now);
}

static bool backs_off(struct placement *p, uint64_t now)
{
    struct placement_load load = {1, 1, false, now};
    struct placement_choice c;

    placement_choose(p, &load, &c);
    assert(p->state == PLACEMENT_BACKS_OFF ? c.prefill == CPU && c.decode == CPU
                                           : p->state == PLACEMENT_WORKS && c.prefill == GPU);
    return p->state == PLACEMENT_BACKS_OFF;
}

static void check_backing_off(void)
{
    struct placement p = measured(&usual);
    uint64_t now = 100 * SECOND, pause = 5 * SECOND;

    /* Three in a row. */
    for (int i = 0; i < 9; i++) {
        pass(&p, i % 3 != 2, now);
        assert(!backs_off(&p, now));
    }
    pass(&p, true, now);
    pass(&p, true, now);
    assert(!backs_off(&p, now));
    pass(&p, true, now);
    /* Twice as long each time that it finds nothing better, a minute at most. */
    for (int i = 0; i < 6; i++) {
        assert(backs_off(&p, now) && backs_off(&p, now + pause - 1));
        assert(!backs_off(&p, now + pause));
        now += pause;
        pass(&p, true, now);
        pause = MIN(2 * pause, 60 * SECOND);
    }
    assert(pause == 60 * SECOND);
    /* Some good passes do not make it forget, ten do. */
    now += pause;
    for (int i = 0; i < 9; i++)
        pass(&p, false, now);
    for (int i = 0; i < 3; i++)
        pass(&p, true, now);
    assert(backs_off(&p, now + 60 * SECOND - 1) && !backs_off(&p, now + 60 * SECOND));
    now += 60 * SECOND;
    for (int i = 0; i < 10; i++)
        pass(&p, false, now);
    pass(&p, true, now);
    pass(&p, true, now);
    assert(!backs_off(&p, now));
    pass(&p, true, now);
    assert(backs_off(&p, now + 5 * SECOND - 1) && !backs_off(&p, now + 5 * SECOND));
    /* Another device, or the same anew. */
    placement_set_gpu(&p, true);
    assert(!backs_off(&p, now));
}

/* Where the device's own time is not known, by what passes should take: 400 rows a second here, one
 * row a tenth of a second. */
static void check_late(void)
{
    static const struct {
        uint32_t rows;
        uint64_t msec; /* of the longest that is fine */
    } cases[] = {{400, 4050}, {1, 450}, {8, 690}, {10, 450}};

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct placement p = measured(&usual);

        for (int late = 0; late < 2; late++)
            for (int n = 0; n < 3; n++) {
                assert(!backs_off(&p, SECOND));
                placement_learn(&p, LANE_GPU, cases[i].rows,
                                (cases[i].msec + (uint64_t)late) * 1000, 0, SECOND);
            }
        assert(backs_off(&p, SECOND));
    }
}

static void check_what_is_not_asked(void)
{
    static const enum placement_mode forced[] = {PLACE_GPU, PLACE_HYBRID};
    struct placement_load load = {1, 1, true, SECOND};
    struct placement_choice c;
    struct placement p;

    /* Who is told to use it does so. */
    for (size_t i = 0; i < ARRAY_SIZE(forced); i++) {
        p = measured(&usual);
        p.mode = forced[i];
        for (int n = 0; n < 4; n++)
            pass(&p, true, SECOND);
        assert(!backs_off(&p, SECOND));
    }
    /* The other lane waits for nobody. */
    p = measured(&usual);
    for (int n = 0; n < 4; n++)
        placement_learn(&p, LANE_CPU, 10, SECOND, 1, SECOND);
    assert(!backs_off(&p, SECOND));

    /* A battery. */
    assert(placement_choose(&p, &load, &c) && p.state == PLACEMENT_ON_BATTERY);
    assert(c.prefill == CPU && c.decode == CPU && !placement_choose(&p, &load, &c));
    load.on_battery = false;
    assert(placement_choose(&p, &load, &c) && c.prefill == GPU);
    load.on_battery = true;
    p.mode = PLACE_HYBRID;
    placement_choose(&p, &load, &c);
    assert(c.prefill == CPU && c.decode == CPU);
    p.mode = PLACE_GPU;
    placement_choose(&p, &load, &c);
    assert(c.prefill == GPU && c.decode == GPU);
}

static void expect_words(const struct placement *p, const char *words)
{
    char text[256];

    placement_explain(p, text, sizeof(text));
    if (strcmp(text, words) != 0)
        fprintf(stderr, "says: %s\nnot:  %s\n", text, words);
    assert(strcmp(text, words) == 0);
}

static void check_reasons(void)
{
    struct placement_rates r = usual;
    struct placement p = measured(&r);
    struct placement_load load = {1, 1, true, SECOND};
    struct placement_choice c;

    expect_words(&p, "prompts: GPU (400 tokens/s, CPU 100); decoding: CPU (20.0, GPU 10.0)");
    r.lane[LANE_GPU].prefill = 99.5;
    p = measured(&r);
    expect_words(&p, "prompts: GPU beside decoding, else GPU and CPU (420 tokens/s, CPU 100, GPU "
                     "99.5); decoding: CPU (20.0, GPU 10.0)");
    r = usual;
    r.both_decode = 80;
    p = measured(&r);
    expect_words(&p, "prompts: GPU (400 tokens/s, CPU 100); decoding: CPU (20.0, GPU 10.0), "
                     "several: GPU and CPU (80.0, CPU 60.0, GPU 50.0)");
    p = measured(&usual);
    placement_choose(&p, &load, &c);
    expect_words(&p, "prompts: CPU (100 tokens/s, GPU 400); decoding: CPU (20.0, GPU 10.0); on "
                     "battery the GPU is not used");
    p = measured(&usual);
    for (int i = 0; i < 3; i++)
        pass(&p, true, SECOND);
    backs_off(&p, SECOND);
    expect_words(&p, "prompts: CPU (100 tokens/s, GPU 400); decoding: CPU (20.0, GPU 10.0); "
                     "others use the GPU, which is left to them for now");
    placement_set_rates(&p, &(struct placement_rates){0});
    load.on_battery = false;
    placement_choose(&p, &load, &c);
    expect_words(&p, "prompts: CPU; decoding: CPU; the GPU's rates are not measured yet");
}

int main(void)
{
    check_modes();
    check_fixed();
    check_words();
    check_unmeasured();
    check_prompts();
    check_decoding();
    check_staying();
    check_backing_off();
    check_late();
    check_what_is_not_asked();
    check_reasons();
    return 0;
}

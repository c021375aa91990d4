/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* That each level's probes of this machine run, with one thread and with several. Rates are real.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "backends/backend.h"
#include "backends/cpu/probe.h"
#include "base/cleanup.h"

static void check_rate(const struct probe_rate *r)
{
    assert(isfinite(r->median) && r->median > 0 && r->median <= r->max && isfinite(r->max));
}

static void test_level(const char *level, uint32_t n_threads)
{
    CLEANUP(probe_freep) struct probe *p = NULL;
    struct probe_rate rate;
    struct error err;

    assert(probe_new(&p, level, n_threads, /* pin= */ false, &err) == 0);
    assert(probe_n_threads(p) == n_threads);
    assert(probe_read(p, (size_t)4 << 20, &rate) == 0);
    check_rate(&rate);
    printf("%s, %u threads: %.3g B/s", level, n_threads, rate.max);
    for (enum probe_multiplier m = 0; m < N_PROBE_MULTIPLIERS; m++) {
        int r = probe_multiply(p, m, &rate);

        assert(r == 0 || r == -ENOTSUP);
        if (strcmp(level, "avx2") == 0 || strcmp(level, "avx512") == 0)
            assert((r == 0) == (m != PROBE_BF16));
        if (r == 0) {
            check_rate(&rate);
            printf(", %.3g op/s", rate.max);
        }
    }
    putchar('\n');
}

int main(void)
{
    static const char *const levels[] = {"reference", "avx2", "avx512", "amx"};
    const struct backend_limits limits = {1, 64, 1};
    struct probe *p;
    struct error err;

    for (size_t i = 0; i < 4; i++) {
        CLEANUP(backend_freep) struct backend *b = NULL;

        if (backend_cpu_new(&b, levels[i], 1, &limits, &err) < 0) {
            printf("%s\n", err.text);
            continue;
        }
        test_level(levels[i], 1);
        test_level(levels[i], 2);
    }
    assert(probe_new(&p, "sse", 1, false, &err) == -EINVAL && strstr(err.text, "sse"));
    return 0;
}

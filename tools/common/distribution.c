/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/common/distribution.h"

#include <math.h>

double log_sum_exp(const float *x, size_t n)
{
    double max = (double)x[0], sum = 0;

    for (size_t i = 1; i < n; i++)
        max = fmax(max, (double)x[i]);
    for (size_t i = 0; i < n; i++)
        sum += exp((double)x[i] - max);
    return max + log(sum);
}

double kl_divergence(const float *p, const float *q, size_t n)
{
    double log_p = log_sum_exp(p, n), log_q = log_sum_exp(q, n), kld = 0;

    for (size_t i = 0; i < n; i++) {
        double lp = (double)p[i] - log_p, lq = (double)q[i] - log_q;

        kld += exp(lp) * (lp - lq);
    }
    return kld;
}

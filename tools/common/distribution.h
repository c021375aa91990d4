/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* distribution: how far two rows of logits are apart, as distributions over the vocabulary. */

#include <stddef.h>

/* log(sum(exp(x))), in double; NaN if any of x[n] is. n >= 1 */
double log_sum_exp(const float *x, size_t n);

/* Kullback-Leibler divergence of the logits q[n] from p[n], nats; not finite if a logit is not. */
double kl_divergence(const float *p, const float *q, size_t n);

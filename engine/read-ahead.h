/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdint.h>

#include "backends/weight.h"

/*
 * Has the system read rows ids[n] of w, each < n_out, from the file that w's memory is mapped from,
 * and does not wait for it: whoever touches them later waits for what is not there yet. A wish that
 * cannot be refused in a way that matters. w in LAYOUT_ROWS. Any thread.
 */
void read_ahead_rows(const struct weight *w, const uint32_t *ids, uint32_t n);

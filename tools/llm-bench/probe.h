/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* probe: how fast this machine reads memory, the limit that decoding runs into. */

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct probe {
    double bytes_per_second; /* of the fastest pass */
    size_t bytes;            /* read in one pass */
    unsigned n_threads;
};

/*
 * Reads data [bytes] with n_threads threads (0: as many as cores this process may use), each its
 * own part, several times over; data NULL: an anonymous mapping made and gone for it.
 * 0, -ENOMEM
 */
int probe_bandwidth(struct probe *ret, const void *data, size_t bytes, unsigned n_threads,
                    struct error *err);

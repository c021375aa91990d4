/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * read-ahead: what the system is told about how a model's mapping will be read. Wishes, all of
 * them: where one is refused, reading is slower and nothing else. Any thread.
 */

#include <stddef.h>
#include <stdint.h>

#include "backends/weight.h"

/*
 * Has the system read rows ids[n] of w, each < n_out, from the file that w's memory is mapped from,
 * and does not wait for it: whoever touches them later waits for what is not there yet. w is in
 * LAYOUT_ROWS.
 */
void read_ahead_rows(const struct weight *w, const uint32_t *ids, uint32_t n);

/*
 * Asks that map[size], the mapping of a whole file, is read and mapped in huge pages, but for the
 * pages that table[table_bytes] has to itself (NULL: no such part). Before anything of it is
 * touched.
 */
void read_ahead_in_huge_pages(const void *map, size_t size, const void *table, size_t table_bytes);

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* Tables on standard output, as --json, --no-legend, --no-pager and the terminal ask for. */

#include <stdbool.h>
#include <stddef.h>

#include "client/table.h"

/* All rows. On a terminal a last line counts them ("3 sessions"), and more of them than it has
 * lines go through a pager. A status */
int show_table(struct table *t, const char *singular, const char *plural);

/* The first row, a line a column, or one JSON object. A status */
int show_record(struct table *t);

/* Columns and lines of the terminal on standard output; 0: it is none. */
void terminal_size(size_t *ret_columns, size_t *ret_lines);

static inline void table_freep(struct table **t)
{
    table_free(*t);
}

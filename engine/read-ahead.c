/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The table of per-layer embeddings is a third of a model, and a token needs a few kilobytes of it,
 * so it is not kept in memory on purpose. Touching a row that is not there costs a page fault, one
 * after the other, each of them a read from the disk with whatever the system reads around it. Told
 * beforehand, the system reads all rows of a step at the same time, and just those.
 *
 * The rest is read again and again, from end to end. Pages of 2 MiB save address translations, but
 * a page cache is filled in small pages wherever somebody has touched single bytes, with all that
 * the system reads around them; for a mapping that asks for huge pages a fault reads one.
 */

#include "engine/read-ahead.h"

#include <assert.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"

/*
 * A smaller table is in memory after a few faults. Asking takes some 2 us, which is nothing beside
 * a step of a large model, but would be seen in one of a small model.
 */
#define TABLE_MIN ((size_t)8 << 20)

void read_ahead_rows(const struct weight *w, const uint32_t *ids, uint32_t n)
{
    size_t row = weight_row_bytes(w->type, w->n_in), page = (size_t)sysconf(_SC_PAGESIZE);

    assert(w->layout == LAYOUT_ROWS);
    if (row * w->n_out < TABLE_MIN)
        return;
    for (uint32_t i = 0; i < n; i++) {
        uintptr_t begin = (uintptr_t)w->data + ids[i] * row, end = begin + row;

        assert(ids[i] < w->n_out);
        if (i > 0 && ids[i] == ids[i - 1])
            continue;
        begin &= ~(uintptr_t)(page - 1);
        (void)madvise((void *)begin, end - begin, MADV_WILLNEED);
    }
}

static void ask_for_huge_pages(uintptr_t from, uintptr_t to)
{
    if (from < to)
        (void)madvise((void *)from, to - from, MADV_HUGEPAGE);
}

void read_ahead_in_huge_pages(const void *map, size_t size, const void *table, size_t table_bytes)
{
    uintptr_t begin = (uintptr_t)map, end = begin + size;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = end, to = end;

    if (table) {
        from = ALIGN_UP((uintptr_t)table, page);
        to = ((uintptr_t)table + table_bytes) & ~(page - 1);
    }
    if (from >= to) {
        ask_for_huge_pages(begin, end);
        return;
    }
    ask_for_huge_pages(begin, from);
    ask_for_huge_pages(to, end);
}

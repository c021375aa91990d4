/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What a recorded pass must find anew each time: where the KV pages of its rows are, and the rows'
 * positions. The rows' table stays where it is, since its address is recorded; the page tables that
 * it points to are laid out anew each time in memory that all passes share.
 */

#include "backends/vulkan/vulkan-backend.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

#define BLOCK ((size_t)64 << 10)

/* The least of the page tables; they double from there. */
#define MIN_PAGES ((size_t)4096)

/* The first and last page that a row sees. */
static uint32_t first_page(const struct kv_row *row, uint32_t window)
{
    return window && row->pos >= window ? (row->pos - window + 1) / KV_PAGE : 0;
}

static uint32_t last_page(const struct kv_row *row)
{
    return row->pos / KV_PAGE;
}

/*
 * Rows of one session follow each other and have one page table: they share it here as well. From
 * row `first` on, how many do; *ret_low and *ret_high are the pages that any of them sees.
 */
static uint32_t run(const struct vulkan_kv_table *t, uint32_t first, uint32_t *ret_low,
                    uint32_t *ret_high)
{
    uint32_t low = UINT32_MAX, high = 0, i;

    for (i = first; i < t->n && t->rows[i].pages == t->rows[first].pages; i++) {
        low = MIN(low, first_page(&t->rows[i], t->window));
        high = MAX(high, last_page(&t->rows[i]));
    }
    *ret_low = low;
    *ret_high = high;
    return i - first;
}

static size_t count(const struct vulkan_kv_table *t)
{
    uint32_t low, high;
    size_t sum = 0;

    for (uint32_t i = 0; i < t->n;) {
        i += run(t, i, &low, &high);
        sum += (size_t)high - low + 1;
    }
    return sum;
}

static struct address address_of(VkDeviceAddress a)
{
    return (struct address){(uint32_t)a, (uint32_t)(a >> 32)};
}

/* There is room for its pages. */
static void write(struct vulkan_backend *v, struct vulkan_kv_table *t)
{
    uint32_t low, high;

    for (uint32_t i = 0; i < t->n;) {
        uint32_t n = run(t, i, &low, &high);
        struct address *pages = (struct address *)v->kv_pages.host + v->kv_pages_used;
        /* of page 0, which may lie before the memory: only what is seen is read */
        VkDeviceAddress origin =
            v->kv_pages.address + 8 * ((VkDeviceAddress)v->kv_pages_used - low);

        for (uint32_t k = low; k <= high; k++)
            pages[k - low] = vulkan_address(v, t->rows[i].pages[k], 1);
        v->kv_pages_used += (size_t)high - low + 1;
        for (uint32_t j = i; j < i + n; j++)
            t->host[j] = (struct device_kv_row){address_of(origin), t->rows[j].pos, 0};
        i += n;
    }
}

void vulkan_kv_refresh(struct vulkan_backend *v, struct vulkan_kv_tables *t)
{
    size_t have = v->kv_pages.bytes / 8, need = 0;

    for (size_t i = 0; i < t->n_tables; i++)
        need += count(&t->tables[i]);
    if (need > have) {
        int r;

        /* Nothing is under way, and what is recorded finds the tables through the rows. */
        vulkan_block_free(v->device, &v->kv_pages);
        r = vulkan_block_new(v->device, 8 * MAX(need, MAX(2 * have, MIN_PAGES)), VULKAN_HOST,
                             &v->kv_pages);
        if (r < 0) {
            vulkan_fail(v, r, "page tables");
            return;
        }
    }
    v->kv_pages_used = 0;
    for (size_t i = 0; i < t->n_tables; i++)
        write(v, &t->tables[i]);
}

/* Memory of a pass for the rows of one more table. */
static int add_rows(struct vulkan_backend *v, struct vulkan_kv_tables *t,
                    struct vulkan_kv_table *table)
{
    size_t bytes = table->n * sizeof(*table->host);
    struct vulkan_block *b = t->n_blocks ? &t->blocks[t->n_blocks - 1] : NULL;

    if (!b || bytes > b->bytes - t->used) {
        int r;

        b = reallocarray(t->blocks, t->n_blocks + 1, sizeof(*b));
        if (!b)
            return -ENOMEM;
        t->blocks = b;
        b += t->n_blocks;
        r = vulkan_block_new(v->device, MAX(bytes, BLOCK), VULKAN_HOST, b);
        if (r < 0)
            return r;
        t->n_blocks++;
        t->used = 0;
    }
    table->host = (struct device_kv_row *)((char *)b->host + t->used);
    table->address = b->address + t->used;
    t->used += bytes;
    return 0;
}

static int add(struct vulkan_backend *v, struct vulkan_kv_tables *t, struct vulkan_kv_table *table)
{
    int r;

    if (t->n_tables == t->max_tables) {
        size_t max = t->max_tables ? 2 * t->max_tables : 16;
        struct vulkan_kv_table *more = reallocarray(t->tables, max, sizeof(*more));

        if (!more)
            return -ENOMEM;
        t->tables = more;
        t->max_tables = max;
    }
    r = add_rows(v, t, table);
    if (r == 0)
        t->tables[t->n_tables++] = *table;
    return r;
}

struct address vulkan_kv_rows(struct vulkan_backend *v, const struct kv_row *rows, uint32_t n,
                              uint32_t window)
{
    struct vulkan_kv_table table = {.rows = rows, .n = n, .window = window};
    struct vulkan_kv_tables *t;
    size_t i;
    int r = 0;

    if (n == 0 || !vulkan_is_recording(v))
        return (struct address){};
    t = &v->current->kv;
    /* Storing and attention of one layer ask for the same rows. */
    for (i = 0; i < t->n_tables; i++)
        if (t->tables[i].rows == rows && t->tables[i].n == n)
            break;
    if (i == t->n_tables) {
        r = add(v, t, &table);
    } else if (t->tables[i].window == 0 || (window && window <= t->tables[i].window)) {
        return address_of(t->tables[i].address);
    } else {
        t->tables[i].window = window;
    }
    if (r < 0) {
        vulkan_fail(v, r, "row tables");
        return (struct address){};
    }
    if (count(&t->tables[i]) <= v->kv_pages.bytes / 8 - v->kv_pages_used)
        write(v, &t->tables[i]);
    else
        vulkan_kv_refresh(v, t);
    return address_of(t->tables[i].address);
}

void vulkan_kv_clear(struct vulkan_backend *v, struct vulkan_kv_tables *t)
{
    /* The last block is the largest, or as large as any: one is enough for most passes. */
    while (t->n_blocks > 1) {
        vulkan_block_free(v->device, &t->blocks[0]);
        t->blocks[0] = t->blocks[--t->n_blocks];
    }
    t->n_tables = 0;
    t->used = 0;
}

void vulkan_kv_free(struct vulkan_backend *v, struct vulkan_kv_tables *t)
{
    for (size_t i = 0; i < t->n_blocks; i++)
        vulkan_block_free(v->device, &t->blocks[i]);
    free(t->blocks);
    free(t->tables);
    *t = (struct vulkan_kv_tables){};
}

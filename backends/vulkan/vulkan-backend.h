/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * vulkan-backend: what the files with operations (matmul.c, rows.c, attention.c, sparse.c) need.
 *
 * An operation finds out the device's addresses of what it was given (vulkan_address()), puts them
 * and its sizes into push constants, and dispatches. That is recorded: of a pass that is kept, it
 * happens once, so everything that may differ the next time is read from memory by the shader.
 * Every dispatch sees what those before it wrote. Operations cannot fail: after a failure they
 * record nothing, and backend_submit() says so.
 */

#include "backends/vulkan/device.h"
#include "shaders/push.h"

struct vulkan_region;
struct vulkan_pass;

/* What dispatches read and write, by the host's addresses. */
#define VULKAN_RANGES 16

struct vulkan_range {
    uintptr_t start, end;
};

struct vulkan_accesses {
    struct vulkan_range reads[VULKAN_RANGES], writes[VULKAN_RANGES];
    uint32_t n_reads, n_writes;
    bool is_unknown; /* there are others besides */
};

/* In how many a pass is cut at most. */
#define VULKAN_PARTS 512

/* How many passes are kept. */
#define VULKAN_PASSES 32

enum vulkan_stage {
    STAGE_IDLE,      /* nothing issued that was not waited for */
    STAGE_RECORDING, /* `current` takes commands */
    STAGE_READY,     /* it takes no more */
    STAGE_SUBMITTED, /* it is under way */
};

struct vulkan_backend {
    struct backend base;
    struct backend_ops ops;
    struct vulkan_device *device;
    char failure[160]; /* empty: none */
    struct vulkan_backend *next_abandoned;

    /* memory.c */
    struct vulkan_region *regions; /* by address */
    size_t n_regions, max_regions;
    size_t last_region;           /* where the last address was found */
    struct vulkan_block *scratch; /* the last is in use, the others by passes recorded before */
    size_t n_scratch;

    /* pass.c */
    VkCommandPool pool;
    VkQueryPool queries;          /* NULL: no timestamps */
    VkSemaphore done;             /* timeline: counts parts, n_submitted when all is done */
    uint64_t n_submitted, n_done; /* n_done: when it was looked at last */
    uint64_t alive_usec;          /* when all was submitted, or a part seen to be done */
    uint64_t gpu_usec;
    enum vulkan_stage stage;
    struct vulkan_pass *current;
    bool in_pass;             /* between begin() and end() */
    VkCommandBuffer commands; /* the part of it that is recorded */
    enum vulkan_pipeline bound;
    uint64_t work;                             /* of that part */
    struct vulkan_accesses since, next;        /* since the last barrier; of the next dispatch */
    struct vulkan_pass *passes[VULKAN_PASSES]; /* kept; NULL: free */
    struct vulkan_pass *loose;                 /* of operations outside of passes */
    uint64_t n_begun;                          /* the clock of who was used last */

    /* kv-rows.c */
    struct vulkan_block kv_pages; /* page tables of the current pass */
    size_t kv_pages_used;         /* entries */
};

static inline struct vulkan_backend *vulkan_backend(struct backend *b)
{
    return (struct vulkan_backend *)b;
}

static inline const struct vulkan_capabilities *vulkan_has(const struct vulkan_backend *v)
{
    return &v->device->has;
}

/* Where the device has p. NULL gives 0. All of it lies in one piece of memory that came from
 * backend_alloc() or that backend_map() was told of: anything else is a bug of the caller's. */
struct address vulkan_address(struct vulkan_backend *v, const void *p, size_t bytes);

/*
 * An array of n struct device_kv_row (shaders/push.h), kept up to date at each replay of the pass.
 * Of a row the pages of the positions pos - window + 1..pos have an entry; window 0: of all.
 */
struct address vulkan_kv_rows(struct vulkan_backend *v, const struct kv_row *rows, uint32_t n,
                              uint32_t window);

/* Memory of the device's for what the current operation's dispatches hand to each other; the next
 * operation's may be the same. Its content is undefined. Each call gives the whole again: one that
 * needs several parts asks once. Aligned to 256. */
struct address vulkan_scratch(struct vulkan_backend *v, size_t bytes);

/* n rows of k floats, ld apart; NULL gives 0 */
static inline struct address vulkan_rows_address(struct vulkan_backend *v, const float *p,
                                                 uint32_t n, size_t k, size_t ld)
{
    return vulkan_address(v, p, p ? ((n - 1) * ld + k) * sizeof(*p) : 0);
}

/* address + bytes */
static inline struct address vulkan_offset(struct address a, uint64_t bytes)
{
    uint64_t sum = ((uint64_t)a.high << 32 | a.low) + bytes;

    return (struct address){(uint32_t)sum, (uint32_t)(sum >> 32)};
}

/* x * y * z work groups, each number at most 65535; none where one is 0. push_bytes <= 128, a
 * multiple of 4. */
void vulkan_dispatch(struct vulkan_backend *v, enum vulkan_pipeline p, const void *push,
                     size_t push_bytes, uint32_t x, uint32_t y, uint32_t z);

/*
 * What the next dispatch reads and writes. Where all of it is said, weights aside, the dispatch may
 * run beside those before it that it has nothing to do with; one of which nothing is said waits for
 * all. Who uses scratch memory or KV pages says nothing.
 */
void vulkan_reads(struct vulkan_backend *v, const void *p, size_t bytes);
void vulkan_writes(struct vulkan_backend *v, const void *p, size_t bytes);

/* How much the dispatches just made have to do, about: a pass is cut where it has become much. What
 * has little to do says nothing. */
void vulkan_work(struct vulkan_backend *v, uint64_t multiplications);

/* Each sets the operations of its file. */
void vulkan_use_matmul(struct backend_ops *ops);
void vulkan_use_rows(struct backend_ops *ops);
void vulkan_use_attention(struct backend_ops *ops);
void vulkan_use_sparse(struct backend_ops *ops);

/* kv-store.c, in vulkan_use_rows() */
void vulkan_kv_store(struct backend *b, const struct kv_store_args *a);

/* ---- between the files of the backend itself ---- */

/* The first failure stays: what happened, in words, from `r` (an errno) at `where`. */
void vulkan_fail(struct vulkan_backend *v, int r, const char *where);

/* memory.c */
void *vulkan_alloc(struct backend *b, size_t bytes);
void vulkan_release(struct backend *b, void *p, size_t bytes);
size_t vulkan_map_limit(const struct backend *b);
int vulkan_map(struct backend *b, const void *p, size_t bytes, enum backend_memory kind);
void vulkan_unmap(struct backend *b, const void *p);
void vulkan_memory_free(struct vulkan_backend *v);

/* pass.c */
int vulkan_passes_new(struct vulkan_backend *v);
void vulkan_passes_free(struct vulkan_backend *v);
bool vulkan_begin(struct backend *b, uint64_t key);
void vulkan_end(struct backend *b);
int vulkan_submit(struct backend *b);
int vulkan_wait(struct backend *b, uint64_t timeout_usec);
/* Starts recording if need be. False: after a failure, nothing is to be recorded. */
bool vulkan_is_recording(struct vulkan_backend *v);
/* Until nothing is issued that was not waited for. 0 or -ENODEV */
int vulkan_settle(struct vulkan_backend *v);
/* Copies `bytes` of one block into another, at once. 0 or -ENODEV */
int vulkan_copy(struct vulkan_backend *v, const struct vulkan_block *from,
                const struct vulkan_block *to, size_t to_offset, size_t bytes);

/* hazards.c: whether the dispatch that comes now needs a barrier before it, which is then made. */
bool vulkan_must_wait(struct vulkan_backend *v);

/* kv-rows.c: the row tables of one pass */
struct vulkan_kv_table {
    const struct kv_row *rows;
    uint32_t n, window;
    struct device_kv_row *host; /* what the device reads: [n] */
    VkDeviceAddress address;
};

struct vulkan_kv_tables {
    struct vulkan_kv_table *tables;
    size_t n_tables, max_tables;
    struct vulkan_block *blocks; /* the tables' memory: the last is being filled */
    size_t n_blocks;
    size_t used; /* bytes of the last block */
};

/* Writes all tables of the pass anew from the rows as they are now. */
void vulkan_kv_refresh(struct vulkan_backend *v, struct vulkan_kv_tables *t);
void vulkan_kv_clear(struct vulkan_backend *v, struct vulkan_kv_tables *t); /* for another use */
void vulkan_kv_free(struct vulkan_backend *v, struct vulkan_kv_tables *t);

struct vulkan_part {
    VkCommandBuffer commands;
    VkTimelineSemaphoreSubmitInfo timeline;
    uint64_t value; /* that `done` has afterwards */
};

struct vulkan_pass {
    uint64_t key, last_used;
    struct vulkan_part *parts; /* [n_parts], one after the other; max_parts have a buffer */
    VkSubmitInfo *submits;     /* likewise */
    uint32_t n_parts, max_parts;
    bool is_complete; /* can be replayed */
    struct vulkan_kv_tables kv;
};

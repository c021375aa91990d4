/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A backend that must be told of all memory is given the model in pieces as large as it takes, cut
 * between tensors. Not among them is the table of per-layer embeddings: it is the largest part of
 * the file, a step reads a few rows of it, and what a device sees has to stay in memory.
 */

#include "engine/lane.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"

/* What a piece is rounded to, to either side, by a device that imports pages. */
#define MAP_ALIGN ((uintptr_t)4096)

/* Tensors this far apart have something else between them, which nobody reads. */
#define GAP_MAX ((uintptr_t)65536)

/* A run of tensors. */
struct piece {
    uintptr_t begin, end;
    const char *name; /* the first one's */
};

static bool fits(const struct piece *p, size_t limit)
{
    uintptr_t begin = p->begin & ~(MAP_ALIGN - 1), end;

    return !ckd_align(&end, p->end, MAP_ALIGN) && end - begin <= limit;
}

static int map_piece(struct backend *b, const struct piece *p, struct error *err)
{
    int r;

    if (p->begin == p->end)
        return 0;
    r = backend_map(b, (const void *)p->begin, p->end - p->begin, BACKEND_WEIGHTS);
    if (r == -E2BIG)
        return error_set(err, E2BIG, "%s: %zu bytes are more than the device takes at once",
                         p->name, (size_t)(p->end - p->begin));
    if (r < 0) {
        const char *why = backend_failure(b);

        return error_set(err, -r, "%s and what follows, %zu bytes: the device cannot see them: %s",
                         p->name, (size_t)(p->end - p->begin), why ? why : strerror(-r));
    }
    return 0;
}

static int map_weights(struct lane *l, struct error *err)
{
    const struct model_file *f = model_get_file(l->engine->model);
    const void *table = l->engine->weights->ple_embed.data;
    size_t limit = backend_map_limit(l->backend);
    struct piece p = {0};
    int r;

    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const struct model_tensor *t = model_file_tensor(f, i);
        uintptr_t at = (uintptr_t)t->weight.data;
        struct piece longer = {p.begin, at + t->bytes, p.name};

        if (t->weight.data == table)
            continue;
        if (p.begin < p.end && at >= p.end && at - p.end <= GAP_MAX && fits(&longer, limit)) {
            p = longer;
            continue;
        }
        r = map_piece(l->backend, &p, err);
        if (r < 0)
            return r;
        p = (struct piece){at, at + t->bytes, t->name};
    }
    return map_piece(l->backend, &p, err);
}

int lane_map_pages(struct lane *l)
{
    int r;

    if (lane_failure(l))
        return -ENODEV;
    r = kv_pool_map(l->engine->pool, l->backend);
    if (r < 0 && !backend_failure(l->backend))
        snprintf(l->failure, sizeof(l->failure), "it cannot see the KV cache: %s",
                 r == -EOPNOTSUPP ? "memory that others see is not for it" : strerror(-r));
    return r < 0 ? -ENODEV : 0;
}

const char *lane_failure(const struct lane *l)
{
    const char *why = backend_failure(l->backend);

    return why || l->failure[0] == '\0' ? why : l->failure;
}

int lane_new(struct lane **ret, struct engine *e, enum engine_lane id, struct backend *b,
             enum activation_type activations, bool maps, struct error *err)
{
    struct lane *l = calloc(1, sizeof(*l));
    int r;

    if (!l) {
        if (b != e->pool_backend)
            backend_free(b);
        return error_set(err, ENOMEM, "out of memory");
    }
    *l = (struct lane){.engine = e,
                       .id = id,
                       .backend = b,
                       .own = b,
                       .activations = activations,
                       .maps = maps,
                       .max_rows = engine_lane_max_rows(e, id)};
    r = forward_init(l);
    if (r < 0)
        error_set(err, -r, "no memory for the activations of %u rows", l->max_rows);
    if (r == 0 && maps)
        r = map_weights(l, err);
    if (r < 0) {
        lane_free(l);
        return r;
    }
    *ret = l;
    return 0;
}

struct lane *lane_free(struct lane *l)
{
    if (!l)
        return NULL;
    forward_done(l);
    if (l->own != l->engine->pool_backend)
        backend_free(l->own);
    free(l);
    return NULL;
}

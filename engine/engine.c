/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What an engine is made of: options, lanes, the pool. The processor's lane is always there, also
 * where all steps are to be another's: it reads the table of per-layer embeddings for that one, and
 * goes on where that one is lost.
 */

#include "engine/engine.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"

#define DEFAULT_MAX_ROWS 256
#define DEFAULT_MAX_LOGITS 16
#define MOST_ROWS 65536u
#define GPU_MAX_ROWS 64u

/* A quarter of the machine's memory; at most one of what may be mapped, or be in a file. */
static uint64_t default_kv_bytes(void)
{
    static const int limits[] = {RLIMIT_AS, RLIMIT_FSIZE};
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t bytes =
        pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size / 4 : (uint64_t)1 << 30;

    for (size_t i = 0; i < ARRAY_SIZE(limits); i++) {
        struct rlimit limit;

        if (getrlimit(limits[i], &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
            bytes = MIN(bytes, (uint64_t)limit.rlim_cur / 4);
    }
    return bytes;
}

/* Values in the widest row that any matrix reads. */
static uint32_t widest_input(const struct model_config *c)
{
    uint32_t n = MAX(MAX(c->hidden, c->n_heads * c->head_dim), MAX(c->laurel_rank, c->ple_width));

    for (uint32_t l = 0; l < c->n_layers; l++)
        n = MAX(n, c->layers[l].ffn_width);
    return ALIGN_UP(n, 64u);
}

static enum activation_type or_default(enum activation_type a, enum activation_type normal)
{
    return a == ACTIVATIONS_AUTO ? normal : a;
}

static bool keeps_f16(const struct engine *e, const struct engine_options *o)
{
    switch (o->kv_type) {
    case KV_F16:
        return true;
    case KV_F32:
        return false;
    case KV_AUTO:
        break;
    }
    return (e->home == LANE_GPU ? e->gpu_activations
                                : or_default(o->activations, ACTIVATIONS_INT8)) == ACTIVATIONS_INT8;
}

const char *activations_name(enum activation_type a)
{
    return a == ACTIVATIONS_INT8 ? "int8" : "f32";
}

static void describe(struct engine *e)
{
    const struct lane *cpu = e->lanes[LANE_CPU], *gpu = e->lanes[LANE_GPU];
    uint32_t n_threads = cpu->own->vtable->n_threads(cpu->own);
    size_t at;

    at = (size_t)snprintf(e->description, sizeof(e->description),
                          "cpu/%s, %u thread%s, %s activations, %s KV", cpu->own->ops->name,
                          n_threads, n_threads == 1 ? "" : "s", activations_name(cpu->activations),
                          kv_pool_shape(e->pool)->f16 ? "f16" : "f32");
    if (gpu && at < sizeof(e->description))
        snprintf(e->description + at, sizeof(e->description) - at, "; %s%s%s%s, %s activations",
                 gpu->own->ops->name, e->gpu ? " (" : "", e->gpu ? gpu_name(e) : "",
                 e->gpu ? ")" : "", activations_name(gpu->activations));
}

static int new_frequencies(struct engine *e)
{
    const float theta[2] = {e->config->rope_theta, e->config->rope_theta_sliding};
    uint32_t half = e->config->head_dim / 2;

    for (int i = 0; i < 2; i++) {
        e->inv_freq[i] = calloc(half, sizeof(double));
        if (!e->inv_freq[i])
            return -ENOMEM;
        for (uint32_t k = 0; k < half; k++)
            e->inv_freq[i][k] = pow((double)theta[i], -(double)k / half);
    }
    return 0;
}

static int new_pool(struct engine *e, const struct engine_options *options, struct error *err)
{
    const struct model_config *c = e->config;
    const struct lane *cpu = e->lanes[LANE_CPU];
    struct kv_shape shape = {c->n_heads_kv, c->head_dim, keeps_f16(e, options)};
    struct kv_kind kind = {.shape = {c->n_heads_kv, c->head_dim, KV_PAGE, shape.f16}};
    uint8_t gpu[KV_IDENTITY];
    struct kv_pool_options o = {
        .bytes_max = options->kv_bytes ? options->kv_bytes : default_kv_bytes(),
        .fd = options->has_kv_fd ? options->kv_fd : -1,
        .memory = e->pool_backend,
        .gpu = e->gpu ? gpu : NULL,
    };
    int r;

    if (options->kv_identity)
        memcpy(kind.identity, options->kv_identity, sizeof(kind.identity));
    snprintf(kind.arithmetic, sizeof(kind.arithmetic), "%s/%s", cpu->backend->ops->name,
             activations_name(cpu->activations));
    if (e->gpu && gpu_identify(e, gpu) < 0)
        return error_set(err, ENOMEM, "no memory for the engine");
    r = kv_pool_new(&e->pool, &shape, &kind, &o);
    if (r == -EINVAL)
        return error_set(err, EINVAL, "a KV budget of %llu bytes does not hold one page of %zu",
                         (unsigned long long)o.bytes_max, kv_page_bytes(&shape));
    if (r < 0)
        return error_set(err, -r, "no memory file for %llu bytes of KV cache: %s",
                         (unsigned long long)o.bytes_max, strerror(-r));
    return 0;
}

int engine_new(struct engine **ret, const struct model *m, const struct engine_options *options,
               struct error *err)
{
    CLEANUP(engine_freep) struct engine *e = NULL;
    const struct model_config *c = model_config(m);
    struct backend *b;
    int r;

    if (options->max_rows > MOST_ROWS || options->max_logits > MOST_ROWS)
        return error_set(err, EINVAL, "at most %u rows and logits fit one step", MOST_ROWS);
    if (c->head_dim > BACKEND_MAX_HEAD_DIM)
        return error_set(err, EINVAL, "%s: head_dim %u is above what backends take, %u",
                         model_file_path(model_get_file(m)), c->head_dim, BACKEND_MAX_HEAD_DIM);
    e = calloc(1, sizeof(*e));
    if (!e)
        return error_set(err, ENOMEM, "no memory for the engine");
    e->model = m;
    e->config = c;
    e->weights = model_weights(m);
    e->home = options->home;
    e->gpu = options->gpu;
    e->gpu_activations = or_default(options->gpu_activations, ACTIVATIONS_F32);
    e->first_gpu_activations = e->gpu_activations;
    e->max_rows = options->max_rows ? options->max_rows : DEFAULT_MAX_ROWS;
    e->max_logits = options->max_logits ? options->max_logits : DEFAULT_MAX_LOGITS;
    e->max_logits = MIN(e->max_logits, e->max_rows);
    e->widest = widest_input(c);

    if ((uint64_t)e->max_rows * c->n_heads > UINT32_MAX) /* backends count pairs of the two */
        return error_set(err, EINVAL, "%s: n_heads %u is too many for steps of %u rows",
                         model_file_path(model_get_file(m)), c->n_heads, e->max_rows);
    e->limits = (struct backend_limits){e->max_rows, MAX(e->widest, c->n_layers * c->ple_width),
                                        c->n_heads};
    if (new_frequencies(e) < 0)
        return error_set(err, ENOMEM, "no memory for the engine");
    if (e->gpu)
        gpu_prepare(e);
    r = backend_cpu_new(&b, options->cpu_level, options->n_threads, &e->limits, err);
    if (r < 0)
        return r;
    if (!options->no_pinning)
        backend_cpu_pin(b);
    r = lane_new(&e->lanes[LANE_CPU], e, LANE_CPU, b,
                 or_default(options->activations, ACTIVATIONS_INT8), false, err);
    if (r == 0)
        r = new_pool(e, options, err);
    if (r < 0)
        return r;
    describe(e);
    *ret = TAKE_PTR(e);
    return 0;
}

struct engine *engine_free(struct engine *e)
{
    if (!e)
        return NULL;
    assert(e->n_sessions == 0);
    if (e->lanes[LANE_GPU])
        engine_remove_gpu(e);
    kv_pool_free(e->pool);
    lane_free(e->lanes[LANE_CPU]);
    backend_free(e->pool_backend);
    free(e->inv_freq[0]);
    free(e->inv_freq[1]);
    free(e);
    return NULL;
}

void engine_freep(struct engine **e)
{
    engine_free(*e);
}

const struct model *engine_model(const struct engine *e)
{
    return e->model;
}

uint32_t engine_lane_max_rows(const struct engine *e, enum engine_lane lane)
{
    return lane == LANE_GPU ? MIN(e->max_rows, GPU_MAX_ROWS) : e->max_rows;
}

uint32_t engine_max_rows(const struct engine *e)
{
    return engine_lane_max_rows(e, e->home);
}

uint32_t engine_max_logits(const struct engine *e)
{
    return e->max_logits;
}

const char *engine_description(const struct engine *e)
{
    return e->description;
}

void engine_memory(const struct engine *e, struct engine_memory *ret)
{
    *ret = (struct engine_memory){
        .kv_bytes_used = kv_pool_bytes_used(e->pool),
        .kv_bytes_max = kv_pool_bytes_max(e->pool),
    };
    for (int i = 0; i < ENGINE_LANES; i++) {
        const struct lane *l = e->lanes[i];

        if (l)
            ret->scratch_bytes += l->scratch_bytes + l->own->vtable->scratch_bytes(l->own);
    }
}

int engine_add_lane(struct engine *e, struct backend *b, struct error *err)
{
    struct lane *l;
    int r;

    if (e->lanes[LANE_GPU]) {
        if (b != e->pool_backend)
            backend_free(b);
        return error_set(err, EALREADY, "the engine has a GPU already");
    }
    r = lane_new(&l, e, LANE_GPU, b, e->gpu_activations, true, err);
    if (r < 0)
        return r;
    r = lane_map_pages(l);
    if (r < 0) {
        error_set(err, -r, "%s", lane_failure(l));
        kv_pool_unmap(e->pool);
        lane_free(l);
        return r;
    }
    e->lanes[LANE_GPU] = l;
    describe(e);
    return 0;
}

bool engine_has_gpu(const struct engine *e)
{
    return e->lanes[LANE_GPU] != NULL;
}

void engine_remove_gpu(struct engine *e)
{
    struct lane *l = e->lanes[LANE_GPU];
    bool lets_go;

    if (!l)
        return;
    engine_settle(e, LANE_GPU);
    e->has_removed = l->state == STEP_SETTLED;
    e->removed_result = l->result;
    for (size_t i = 0; e->has_removed && i < l->n_items; i++)
        l->items[i].ret_logits = NULL;
    kv_pool_unmap(e->pool);
    lets_go = l->own != e->pool_backend && !backend_hangs(l->own);
    e->lanes[LANE_GPU] = lane_free(l);
    if (lets_go)
        kv_pool_reclaim(e->pool);
    if (e->pool)
        describe(e);
}

struct backend *engine_lane_backend(const struct engine *e, enum engine_lane lane)
{
    return e->lanes[lane] ? e->lanes[lane]->backend : NULL;
}

const char *engine_lane_failure(const struct engine *e, enum engine_lane lane)
{
    return e->lanes[lane] ? lane_failure(e->lanes[lane]) : NULL;
}

int engine_kv_fd(const struct engine *e)
{
    return kv_pool_fd(e->pool);
}

bool engine_kv_adopted(const struct engine *e)
{
    return kv_pool_is_adopted(e->pool);
}

void engine_adopted(struct engine *e)
{
    kv_pool_adopted_all(e->pool);
}

uint64_t engine_give_back(struct engine *e)
{
    return kv_pool_give_back(e->pool);
}

struct backend *engine_backend(const struct engine *e)
{
    return e->lanes[e->home] ? e->lanes[e->home]->backend : NULL;
}

void engine_set_backend(struct engine *e, struct backend *b)
{
    e->lanes[e->home]->backend = b;
}

uint64_t engine_kv_bytes(const struct engine *e, uint32_t n_tokens)
{
    return kv_cache_bytes_max(kv_pool_shape(e->pool), e->config, n_tokens, e->max_rows);
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A tensor is done in pieces of whole stripes of rows, or at once where its layout runs across all
 * rows (cols). Within a piece every thread takes groups of PACK_ROWS rows: reads them, decodes or
 * passes them through, and packs them into their place. Two piece buffers alternate: a thread of
 * its own hashes and writes the one while the next is filled.
 */

#include "tools/import/convert.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/import/dequantize.h"
#include "tools/import/pack.h"
#include "tools/import/quantize.h"

#define PIECE_BYTES ((size_t)8 << 20)
#define MAX_THREADS 31 /* besides the first; beyond that the disk is the limit */

/* Hands buffers to the thread that appends them; at most one is in its hands. */
struct appender {
    struct model_writer *writer;
    pthread_t thread;
    pthread_mutex_t lock; /* all below */
    pthread_cond_t changed;
    const void *data; /* NULL: nothing to do */
    size_t n;
    bool closing;
    int result; /* of the first append that failed */
    struct error error;
};

static void *append_all(void *userdata)
{
    struct appender *a = userdata;

    pthread_mutex_lock(&a->lock);
    for (;;) {
        struct error error;
        const void *data;
        size_t n;
        int r = 0;

        while (!a->data && !a->closing)
            pthread_cond_wait(&a->changed, &a->lock);
        if (!a->data)
            break;
        data = a->data;
        n = a->n;
        if (a->result == 0) {
            pthread_mutex_unlock(&a->lock);
            r = model_writer_append(a->writer, data, n, &error);
            pthread_mutex_lock(&a->lock);
        }
        if (r < 0) {
            a->result = r;
            a->error = error;
        }
        a->data = NULL;
        pthread_cond_broadcast(&a->changed);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

static int appender_init(struct appender *a, struct model_writer *w, struct error *err)
{
    int r;

    *a = (struct appender){.writer = w};
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->changed, NULL);
    r = pthread_create(&a->thread, NULL, append_all, a);
    if (r > 0) {
        pthread_cond_destroy(&a->changed);
        pthread_mutex_destroy(&a->lock);
        return error_set(err, r, "cannot start a thread: %s", strerror(r));
    }
    return 0;
}

/* Waits until everything handed over is written; returns the first failure. */
static int appender_wait(struct appender *a, struct error *err)
{
    int r;

    pthread_mutex_lock(&a->lock);
    while (a->data)
        pthread_cond_wait(&a->changed, &a->lock);
    r = a->result;
    if (r < 0 && err)
        *err = a->error;
    pthread_mutex_unlock(&a->lock);
    return r;
}

/* data stays the appender's until the next wait. */
static int appender_put(struct appender *a, const void *data, size_t n, struct error *err)
{
    int r = appender_wait(a, err);

    if (r < 0)
        return r;
    pthread_mutex_lock(&a->lock);
    a->data = data;
    a->n = n;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    return 0;
}

static void appender_done(struct appender *a)
{
    appender_wait(a, NULL);
    pthread_mutex_lock(&a->lock);
    a->closing = true;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    pthread_join(a->thread, NULL);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
}

/* What one thread needs for a group of PACK_ROWS rows, carved from one block that only grows. */
struct scratch {
    void *block;
    size_t allocated;
    uint8_t *raw;  /* [PACK_ROWS] rows as in the source */
    float *row;    /* one whole source row, decoded */
    float *floats; /* [PACK_ROWS][n_in], the columns that stay */
    uint16_t *words;
    int8_t *q, *row_q; /* [PACK_ROWS][n_in]; one whole source row */
    uint16_t *d, *row_d;
};

/* Takes n bytes at *at of the block; before there is one, only counts. */
static void *carve(const struct scratch *s, size_t *at, size_t n)
{
    void *p = s->block ? (char *)s->block + *at : NULL;

    *at += ALIGN_UP(n, (size_t)WEIGHT_ALIGN);
    return p;
}

/* Both widths are below 2^32 and rows of the source exist in a file: the sum fits 64 bits. */
static size_t carve_all(struct scratch *s, const struct plan_item *item)
{
    size_t values = (size_t)PACK_ROWS * item->n_in, source_values = item->source->n_in, at = 0;

    s->raw = carve(s, &at, PACK_ROWS * item->source->row_bytes);
    s->row = carve(s, &at, source_values * sizeof(*s->row));
    s->floats = carve(s, &at, values * sizeof(*s->floats));
    s->words = carve(s, &at, values * sizeof(*s->words));
    s->q = carve(s, &at, values);
    s->d = carve(s, &at, values / WEIGHT_BLOCK * sizeof(*s->d));
    s->row_q = carve(s, &at, source_values);
    s->row_d = carve(s, &at, (source_values / WEIGHT_BLOCK + 1) * sizeof(*s->row_d));
    return at;
}

static bool scratch_prepare(struct scratch *s, const struct plan_item *item)
{
    struct scratch empty = {0};
    size_t n = carve_all(&empty, item);

    if (n > s->allocated) {
        free(s->block);
        s->allocated = 0;
        s->block = aligned_alloc(WEIGHT_ALIGN, n);
        if (!s->block)
            return false;
        s->allocated = n;
    }
    carve_all(s, item);
    return true;
}

static int not_finite(const struct source *s, const struct plan_item *item, uint32_t row,
                      struct error *err)
{
    return error_set(err, EINVAL,
                     "%s: tensor %s: row %u has a value or scale that is infinite or "
                     "not a number",
                     s->files[item->source->file].path, item->source->name, row);
}

static int too_large(const struct source *s, const struct plan_item *item, uint32_t row,
                     struct error *err)
{
    return error_set(err, EINVAL,
                     "%s: tensor %s: row %u has a value too large for %s; choose "
                     "another type with --weights",
                     s->files[item->source->file].path, item->source->name, row,
                     weight_type_name(item->type));
}

/* An f16 or a bf16 pattern whose exponent is all ones. */
static bool words_finite(enum weight_type type, const uint16_t *words, size_t n)
{
    uint16_t mask = type == WEIGHT_F16 ? 0x7c00 : 0x7f80;
    unsigned bad = 0;

    for (size_t i = 0; i < n; i++)
        bad |= (words[i] & mask) == mask;
    return !bad;
}

static bool floats_finite(const float *x, size_t n)
{
    unsigned bad = 0;

    for (size_t i = 0; i < n; i++) {
        uint32_t u;

        memcpy(&u, x + i, sizeof(u));
        bad |= (u & 0x7f800000) == 0x7f800000;
    }
    return !bad;
}

/*
 * One source row to row i of the scratch's arrays. Each conversion checks the whole row for what
 * is not finite, also the columns that are cut off.
 */
static int convert_row(const struct source *s, const struct plan_item *item,
                       struct scratch *scratch, uint32_t source_row, uint32_t i, struct error *err)
{
    const struct source_tensor *t = item->source;
    const uint8_t *raw = scratch->raw + i * t->row_bytes;
    size_t at = (size_t)i * item->n_in;

    if (item->conversion == CONVERT_QUANTS) {
        dequantize_q(t->type, raw, t->n_in, scratch->row_q, scratch->row_d);
        if (!words_finite(WEIGHT_F16, scratch->row_d, t->n_in / WEIGHT_BLOCK))
            return not_finite(s, item, source_row, err);
        for (uint32_t c = 0; c < item->n_columns; c++) {
            const struct plan_range *columns = &item->columns[c];

            memcpy(scratch->q + at, scratch->row_q + columns->first, columns->n);
            memcpy(scratch->d + at / WEIGHT_BLOCK, scratch->row_d + columns->first / WEIGHT_BLOCK,
                   columns->n / WEIGHT_BLOCK * sizeof(uint16_t));
            at += columns->n;
        }
        return 0;
    }
    if (item->conversion == CONVERT_WORDS) {
        uint16_t *begin = scratch->words + at;

        for (uint32_t c = 0; c < item->n_columns; c++) {
            memcpy(scratch->words + at, raw + (size_t)item->columns[c].first * 2,
                   (size_t)item->columns[c].n * 2);
            at += item->columns[c].n;
        }
        return words_finite(item->type, begin, item->n_in) ? 0
                                                           : not_finite(s, item, source_row, err);
    }
    dequantize(t->type, raw, t->n_in, scratch->row);
    if (!floats_finite(scratch->row, t->n_in))
        return not_finite(s, item, source_row, err);
    if (item->clip > 0)
        for (uint32_t k = 0; k < t->n_in; k++)
            scratch->row[k] = fminf(fmaxf(scratch->row[k], -item->clip), item->clip);
    for (uint32_t c = 0; c < item->n_columns; c++) {
        memcpy(scratch->floats + at, scratch->row + item->columns[c].first,
               (size_t)item->columns[c].n * sizeof(float));
        at += item->columns[c].n;
    }
    at = (size_t)i * item->n_in;
    if (item->conversion == CONVERT_QUANTIZE) {
        if (!quantize(item->type, scratch->floats + at, item->n_in, scratch->q + at,
                      scratch->d + at / WEIGHT_BLOCK))
            return too_large(s, item, source_row, err);
    } else if (item->type != WEIGHT_F32) {
        for (uint32_t k = 0; k < item->n_in; k++)
            scratch->words[at + k] = item->type == WEIGHT_F16
                                         ? half_from_float(scratch->floats[at + k])
                                         : bf16_from_float(scratch->floats[at + k]);
        if (!words_finite(item->type, scratch->words + at, item->n_in))
            return too_large(s, item, source_row, err);
    }
    return 0;
}

/* The source's row of row i of the item, and how many follow it in both. */
static uint32_t source_row(const struct plan_item *item, uint32_t i, uint32_t *ret_n)
{
    const struct plan_range *r = item->rows;

    for (; i >= r->n; r++)
        i -= r->n;
    *ret_n = r->n - i;
    return r->first + i;
}

/* Rows [first, first + n), n <= PACK_ROWS, of the item into data, which begins with row `base`. */
static int convert_group(const struct source *s, const struct plan_item *item,
                         struct scratch *scratch, uint32_t base, uint32_t first, uint32_t n,
                         void *data, struct error *err)
{
    struct weight w = {item->type, item->layout, item->n_out, item->n_in, NULL};
    int r;

    if (item->layout != LAYOUT_COLS)
        w.n_out -= base;
    for (uint32_t i = 0; i < n;) {
        uint32_t follow, from = source_row(item, first + i, &follow), count = MIN(n - i, follow);

        r = source_read(s, item->source, from, count, scratch->raw + i * item->source->row_bytes,
                        err);
        if (r < 0)
            return r;
        for (uint32_t k = 0; k < count; k++, i++) {
            r = convert_row(s, item, scratch, from + k, i, err);
            if (r < 0)
                return r;
        }
    }
    if (weight_type_is_quantized(item->type))
        pack_quants(&w, data, first - base, n, scratch->q, scratch->d);
    else if (item->type == WEIGHT_F32)
        pack_floats(&w, data, first - base, n, scratch->floats);
    else
        pack_words(&w, data, first - base, n, scratch->words);
    return 0;
}

/* A piece being converted; threads take its groups one by one. */
struct piece {
    const struct source *source;
    const struct plan_item *item;
    uint32_t first, n, n_groups;
    void *data;
    atomic_uint next;    /* group */
    atomic_int result;   /* of the first failure; its text is in error */
    struct error *error; /* with the team's lock */
};

/*
 * The threads that convert. They sleep between pieces (a team of OpenMP would spin, at the cost of
 * whoever else wants the cores). Every piece is announced by a new round; the calling thread works
 * along and waits until all others have left the piece.
 */
struct team {
    unsigned n_threads; /* besides the caller */
    pthread_t threads[MAX_THREADS];
    struct scratch scratch; /* of the caller */
    pthread_mutex_t lock;   /* all below */
    pthread_cond_t changed;
    struct piece *piece;
    unsigned round, n_busy;
    bool closing;
};

static void work(struct team *team, struct piece *p, struct scratch *scratch)
{
    bool ready = scratch_prepare(scratch, p->item);

    for (;;) {
        unsigned group = atomic_fetch_add(&p->next, 1);
        struct error error;
        int r, none = 0;
        uint32_t row;

        if (group >= p->n_groups || atomic_load(&p->result) != 0)
            return;
        row = p->first + group * PACK_ROWS;
        r = ready ? convert_group(p->source, p->item, scratch, p->first, row,
                                  MIN(p->first + p->n - row, (uint32_t)PACK_ROWS), p->data, &error)
                  : error_set(&error, ENOMEM, "%s: out of memory", p->source->path);
        if (r < 0 && atomic_compare_exchange_strong(&p->result, &none, r)) {
            pthread_mutex_lock(&team->lock);
            if (p->error)
                *p->error = error;
            pthread_mutex_unlock(&team->lock);
        }
    }
}

static void *work_always(void *userdata)
{
    struct team *team = userdata;
    struct scratch scratch = {0};
    unsigned round = 0;

    pthread_mutex_lock(&team->lock);
    for (;;) {
        struct piece *p;

        while (team->round == round && !team->closing)
            pthread_cond_wait(&team->changed, &team->lock);
        if (team->closing)
            break;
        round = team->round;
        p = team->piece;
        pthread_mutex_unlock(&team->lock);
        work(team, p, &scratch);
        pthread_mutex_lock(&team->lock);
        if (--team->n_busy == 0)
            pthread_cond_broadcast(&team->changed);
    }
    pthread_mutex_unlock(&team->lock);
    free(scratch.block);
    return NULL;
}

/* As many threads as there are cores for this process; fewer do as well. */
static void team_init(struct team *team)
{
    cpu_set_t cpus;
    unsigned n = 1;

    *team = (struct team){0};
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->changed, NULL);
    if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0)
        n = (unsigned)CPU_COUNT(&cpus);
    for (n = MIN(n - 1, (unsigned)MAX_THREADS); team->n_threads < n; team->n_threads++)
        if (pthread_create(&team->threads[team->n_threads], NULL, work_always, team) != 0)
            return;
}

static void team_done(struct team *team)
{
    pthread_mutex_lock(&team->lock);
    team->closing = true;
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
    for (unsigned i = 0; i < team->n_threads; i++)
        pthread_join(team->threads[i], NULL);
    pthread_cond_destroy(&team->changed);
    pthread_mutex_destroy(&team->lock);
    free(team->scratch.block);
}

/* Rows [first, first + n) of the item, into data. */
static int convert_piece(struct team *team, const struct source *s, const struct plan_item *item,
                         uint32_t first, uint32_t n, void *data, struct error *err)
{
    struct piece p = {
        .source = s,
        .item = item,
        .first = first,
        .n = n,
        .n_groups = DIV_ROUND_UP(n, PACK_ROWS),
        .data = data,
        .error = err,
    };
    bool alone = p.n_groups < 4 || team->n_threads == 0; /* less work than waking somebody */

    if (!alone) {
        pthread_mutex_lock(&team->lock);
        team->piece = &p;
        team->round++;
        team->n_busy = team->n_threads;
        pthread_cond_broadcast(&team->changed);
        pthread_mutex_unlock(&team->lock);
    }
    work(team, &p, &team->scratch);
    if (!alone) {
        pthread_mutex_lock(&team->lock);
        while (team->n_busy > 0)
            pthread_cond_wait(&team->changed, &team->lock);
        pthread_mutex_unlock(&team->lock);
    }
    return atomic_load(&p.result);
}

int convert_announce(const struct plan *p, struct model_writer *w, struct error *err)
{
    for (size_t i = 0; i < p->n_items; i++) {
        const struct plan_item *item = &p->items[i];
        int r = model_writer_add_tensor(w, item->name, item->type, item->layout, item->n_out,
                                        item->n_in, err);

        if (r < 0)
            return r;
    }
    return 0;
}

struct buffers {
    void *data[2];
    size_t allocated[2];
    unsigned next;
};

/* The buffer that is not with the appender, zeroed. */
static void *next_buffer(struct buffers *b, size_t n)
{
    unsigned i = b->next;

    b->next = !i;
    if (n > b->allocated[i] || b->allocated[i] > 2 * MAX(n, PIECE_BYTES)) {
        free(b->data[i]);
        b->data[i] = NULL;
        b->allocated[i] = 0;
        b->data[i] = aligned_alloc(WEIGHT_ALIGN, MAX(n, PIECE_BYTES)); /* multiples of it */
        if (!b->data[i])
            return NULL;
        b->allocated[i] = MAX(n, PIECE_BYTES);
    }
    return memset(b->data[i], 0, n);
}

static int write_item(const struct source *s, const struct plan_item *item, struct team *team,
                      struct appender *a, struct buffers *buffers, uint64_t *done,
                      convert_progress progress, void *userdata, struct error *err)
{
    uint32_t piece = item->n_out;

    /* Pieces of whole groups, which are whole stripes. */
    if (item->layout != LAYOUT_COLS && item->bytes > PIECE_BYTES) {
        size_t row_bytes = DIV_ROUND_UP(item->bytes, item->n_out);

        piece = (uint32_t)MIN(PIECE_BYTES / row_bytes / PACK_ROWS * PACK_ROWS, (size_t)item->n_out);
        piece = MAX(piece, (uint32_t)PACK_ROWS);
    }
    for (uint32_t row = 0; row < item->n_out; row += MIN(piece, item->n_out - row)) {
        uint32_t n = MIN(piece, item->n_out - row);
        size_t bytes;
        void *data;
        int r;

        if (progress && progress(userdata, *done))
            return error_set(err, ECANCELED, "interrupted");
        r = weight_size(item->type, item->layout, n, item->n_in, &bytes);
        if (r < 0)
            return error_set(err, -r, "%s: tensor %s: too large", s->path, item->name);
        data = next_buffer(buffers, ALIGN_UP(bytes, (size_t)WEIGHT_ALIGN));
        if (!data)
            return error_set(err, ENOMEM, "%s: out of memory", s->path);
        r = convert_piece(team, s, item, row, n, data, err);
        if (r < 0)
            return r;
        r = appender_put(a, data, bytes, err);
        if (r < 0)
            return r;
        *done += bytes;
    }
    return 0;
}

int convert_write(const struct source *s, const struct plan *p, struct model_writer *w,
                  convert_progress progress, void *userdata, struct error *err)
{
    struct buffers buffers = {0};
    struct appender a;
    struct team team;
    uint64_t done = 0;
    int r;

    r = appender_init(&a, w, err);
    if (r < 0)
        return r;
    team_init(&team);
    for (size_t i = 0; i < p->n_items && r == 0; i++)
        r = write_item(s, &p->items[i], &team, &a, &buffers, &done, progress, userdata, err);
    if (r == 0)
        r = appender_wait(&a, err);
    team_done(&team);
    appender_done(&a);
    free(buffers.data[0]);
    free(buffers.data[1]);
    if (r == 0 && progress)
        progress(userdata, done);
    return r;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/request-bytes.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "ipc/names.h"

/* 1: without FLAG_DETERMINISTIC, when there was nothing else. */
#define VERSION 2u

/* Bits of the flags. */
enum {
    FLAG_RAW = 1,
    FLAG_IGNORE_END = 2,
    FLAG_SPECIAL = 4,
    FLAG_LOGPROBS = 8,
    FLAG_DETERMINISTIC = 16,
    FLAGS_ALL = 31,
};

/* ---- writing ---- */

static int put_u32(struct buffer *b, uint32_t v)
{
    v = htole32(v);
    return buffer_append(b, &v, sizeof(v));
}

static int put_u64(struct buffer *b, uint64_t v)
{
    v = htole64(v);
    return buffer_append(b, &v, sizeof(v));
}

static int put_float(struct buffer *b, float f)
{
    uint32_t v;

    memcpy(&v, &f, sizeof(v));
    return put_u32(b, v);
}

static int put_text(struct buffer *b, const char *text, size_t n)
{
    int r = put_u32(b, (uint32_t)n); /* bounded by LLM_PROMPT_BYTES_MAX */

    return r < 0 ? r : buffer_append(b, text, n);
}

static int put_options(struct buffer *b, const struct job_request *q)
{
    const struct generation_options *o = &q->options;
    const struct sampler_options *s = &o->sampler;
    const float numbers[] = {
        s->temperature,      s->top_p, s->min_p, s->repetition_penalty, s->presence_penalty,
        s->frequency_penalty};
    int r;

    for (size_t i = 0; i < ARRAY_SIZE(numbers); i++)
        if ((r = put_float(b, numbers[i])) < 0)
            return r;
    if ((r = put_u32(b, s->top_k)) < 0 || (r = put_u32(b, s->penalty_last_n)) < 0 ||
        (r = put_u32(b, s->n_logprobs)) < 0 || (r = put_u64(b, s->seed)) < 0 ||
        (r = put_u32(b, o->max_tokens)) < 0 || (r = put_u32(b, (uint32_t)s->n_bias)) < 0)
        return r;
    for (size_t i = 0; i < s->n_bias; i++)
        if ((r = put_u32(b, q->bias[i].id)) < 0 || (r = put_float(b, q->bias[i].bias)) < 0)
            return r;
    r = put_u32(b, (uint32_t)o->n_stop);
    for (size_t i = 0; r >= 0 && i < o->n_stop; i++)
        r = put_text(b, q->stop[i], strlen(q->stop[i]));
    return r;
}

int request_bytes_write(struct buffer *out, const struct job_request *q)
{
    uint32_t flags = (q->raw ? FLAG_RAW : 0u) | (q->options.ignore_end ? FLAG_IGNORE_END : 0u) |
                     (q->options.special ? FLAG_SPECIAL : 0u) |
                     (q->options.logprobs ? FLAG_LOGPROBS : 0u) |
                     (q->deterministic ? FLAG_DETERMINISTIC : 0u);
    int r;

    if ((r = put_u32(out, VERSION)) < 0 || (r = put_u32(out, q->kind == JOB_APPEND)) < 0 ||
        (r = put_u32(out, q->format == JOB_TEXT)) < 0 || (r = put_u32(out, flags)) < 0 ||
        (r = put_options(out, q)) < 0)
        return r;
    r = put_u32(out, (uint32_t)q->n_messages);
    for (size_t i = 0; r >= 0 && i < q->n_messages; i++) {
        r = put_u32(out, (uint32_t)q->messages[i].role);
        if (r >= 0)
            r = put_text(out, q->messages[i].text, q->messages[i].n);
    }
    return r;
}

/* ---- reading ---- */

/* After something was missing all that is taken is 0, and `failed` stays. */
struct reader {
    const unsigned char *data;
    size_t n;
    bool failed;
};

static const void *take(struct reader *r, size_t n)
{
    const void *p = r->data;

    if (r->failed || n > r->n) {
        r->failed = true;
        return NULL;
    }
    r->data += n;
    r->n -= n;
    return p;
}

static uint32_t take_u32(struct reader *r)
{
    const void *p = take(r, sizeof(uint32_t));
    uint32_t v = 0;

    if (p)
        memcpy(&v, p, sizeof(v));
    return le32toh(v);
}

static uint64_t take_u64(struct reader *r)
{
    const void *p = take(r, sizeof(uint64_t));
    uint64_t v = 0;

    if (p)
        memcpy(&v, p, sizeof(v));
    return le64toh(v);
}

static float take_float(struct reader *r)
{
    uint32_t v = take_u32(r);
    float f;

    memcpy(&f, &v, sizeof(f));
    return f;
}

/* At most `most`, else it has failed. */
static uint32_t take_count(struct reader *r, uint32_t most)
{
    uint32_t v = take_u32(r);

    if (v <= most)
        return v;
    r->failed = true;
    return 0;
}

/* A copy with a NUL behind it. 0, -EBADMSG, -ENOMEM */
static int take_text(struct reader *r, uint32_t most, char **ret, size_t *ret_n)
{
    uint32_t n = take_count(r, most);
    const void *p = take(r, n);
    char *text;

    if (!p)
        return -EBADMSG;
    text = malloc((size_t)n + 1);
    if (!text)
        return -ENOMEM;
    memcpy(text, p, n);
    text[n] = 0;
    *ret = text;
    *ret_n = n;
    return 0;
}

static int take_stops(struct reader *r, struct job_request *q)
{
    uint32_t n = take_count(r, LLM_STOP_MAX);
    size_t bytes;
    int e;

    if (r->failed)
        return -EBADMSG;
    if (n == 0)
        return 0;
    q->stop = calloc(n, sizeof(q->stop[0]));
    if (!q->stop)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++) {
        e = take_text(r, LLM_STOP_BYTES_MAX, &q->stop[i], &bytes);
        if (e < 0)
            return e;
        q->options.n_stop++;
        if (bytes == 0 || strlen(q->stop[i]) != bytes)
            return -EBADMSG;
    }
    q->options.stop = (const char *const *)q->stop;
    return 0;
}

static int take_bias(struct reader *r, struct job_request *q)
{
    uint32_t n = take_count(r, LLM_LOGIT_BIAS_MAX);

    if (r->failed)
        return -EBADMSG;
    if (n == 0)
        return 0;
    q->bias = calloc(n, sizeof(q->bias[0]));
    if (!q->bias)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        q->bias[i] = (struct logit_bias){.id = take_u32(r), .bias = take_float(r)};
    q->options.sampler.bias = q->bias;
    q->options.sampler.n_bias = n;
    return r->failed ? -EBADMSG : 0;
}

static int take_options(struct reader *r, struct job_request *q)
{
    struct sampler_options *s = &q->options.sampler;
    int e;

    s->temperature = take_float(r);
    s->top_p = take_float(r);
    s->min_p = take_float(r);
    s->repetition_penalty = take_float(r);
    s->presence_penalty = take_float(r);
    s->frequency_penalty = take_float(r);
    s->top_k = take_u32(r);
    s->penalty_last_n = take_u32(r);
    s->n_logprobs = take_count(r, LLM_TOP_LOGPROBS_MAX);
    s->seed = take_u64(r);
    q->options.max_tokens = take_u32(r);
    e = take_bias(r, q);
    return e < 0 ? e : take_stops(r, q);
}

static int take_messages(struct reader *r, struct job_request *q)
{
    uint32_t n = take_count(r, LLM_MESSAGES_MAX), left = LLM_PROMPT_BYTES_MAX;
    int e;

    if (r->failed || (q->raw && n != 1))
        return -EBADMSG;
    if (n == 0)
        return 0;
    q->messages = calloc(n, sizeof(q->messages[0]));
    if (!q->messages)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++) {
        struct job_message *m = &q->messages[q->n_messages++];

        m->role = (enum chat_role)take_count(r, CHAT_MODEL);
        e = take_text(r, left, &m->text, &m->n);
        if (e < 0)
            return e;
        left -= (uint32_t)m->n;
    }
    return 0;
}

static int read_request(struct reader *r, struct job_request *q)
{
    uint32_t version = take_u32(r), flags;
    int e;

    if (version < 1 || version > VERSION)
        return -EBADMSG;
    q->kind = take_count(r, 1) ? JOB_APPEND : JOB_GENERATE;
    q->format = take_count(r, 1) ? JOB_TEXT : JOB_RECORDS;
    flags = take_count(r, version < 2 ? FLAG_DETERMINISTIC - 1 : FLAGS_ALL);
    q->deterministic = version < 2 || flags & FLAG_DETERMINISTIC;
    q->raw = flags & FLAG_RAW;
    q->options.ignore_end = flags & FLAG_IGNORE_END;
    q->options.special = flags & FLAG_SPECIAL;
    q->options.logprobs = flags & FLAG_LOGPROBS;
    e = take_options(r, q);
    if (e >= 0)
        e = take_messages(r, q);
    if (e < 0)
        return e;
    return r->failed || r->n > 0 ? -EBADMSG : 0;
}

int request_bytes_read(struct job_request *ret, const void *data, size_t n, struct error *err)
{
    CLEANUP(job_request_done) struct job_request q = {0};
    struct reader r = {.data = data, .n = n};
    int e = read_request(&r, &q);

    if (e == -EBADMSG)
        return error_set(err, EBADMSG, "the record is not sound: what was asked cannot be read");
    if (e < 0)
        return error_set(err, -e, "out of memory");
    *ret = q;
    q = (struct job_request){0};
    return 0;
}

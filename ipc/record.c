/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Writing is direct. Reading is a recursive-descent parser over one line: strings are decoded in
 * place, for a decoded string is never longer than its text, so a record costs no allocation and
 * lives exactly as long as its line. Which member may hold what stands in record_member() and
 * top_member(); everything not named there is checked for being JSON and skipped.
 */

#include "ipc/record.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/checked.h"
#include "base/utf8.h"

#define DEPTH_MAX 16 /* of values that are skipped */

/* ---- writing ---- */

static int put(struct buffer *out, const char *text)
{
    return buffer_append(out, text, strlen(text));
}

static int put_string(struct buffer *out, const char *text, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    size_t room, start = 0;
    int r;

    /* Once for all: a byte becomes at most \u00XX, an invalid one three bytes. */
    if (ckd_mul(&room, n, 6) || ckd_add(&room, room, 2))
        return -ENOMEM;
    r = buffer_reserve(out, room);
    if (r < 0)
        return r;

    out->data[out->n++] = '"';
    for (size_t i = 0; i < n;) {
        uint32_t c;
        size_t used = utf8_next(text + i, n - i, &c);
        const char *instead = NULL;
        char escape[8];

        if (used == 0) {
            instead = "\xef\xbf\xbd";
            used = 1;
        } else if (c == '"') {
            instead = "\\\"";
        } else if (c == '\\') {
            instead = "\\\\";
        } else if (c == '\n') {
            instead = "\\n";
        } else if (c < 0x20 || c == 0x7f) {
            memcpy(escape, "\\u00", 4);
            escape[4] = hex[c >> 4];
            escape[5] = hex[c & 15];
            escape[6] = 0;
            instead = escape;
        }
        if (instead) {
            memcpy(out->data + out->n, text + start, i - start);
            out->n += i - start;
            memcpy(out->data + out->n, instead, strlen(instead));
            out->n += strlen(instead);
            start = i + used;
        }
        i += used;
    }
    if (n > start)
        memcpy(out->data + out->n, text + start, n - start);
    out->n += n - start;
    out->data[out->n++] = '"';
    return 0;
}

/* Six decimals, by integers: printf's comma or point is the locale's. */
static int put_decimal(struct buffer *out, double v)
{
    char text[48];
    double magnitude = fabs(v);
    uint64_t millionths;

    if (!isfinite(v) || magnitude > 1e12)
        return put(out, "null");
    millionths = (uint64_t)(magnitude * 1e6 + 0.5);
    snprintf(text, sizeof(text), "%s%" PRIu64 ".%06" PRIu64, v < 0 && millionths > 0 ? "-" : "",
             millionths / 1000000, millionths % 1000000);
    return put(out, text);
}

static int put_unsigned(struct buffer *out, const char *before, uint64_t v)
{
    char text[96];

    snprintf(text, sizeof(text), "%s%" PRIu64, before, v);
    return put(out, text);
}

static int put_token(struct buffer *out, const char *before, uint32_t id, double logprob)
{
    int r;

    if ((r = put_unsigned(out, before, id)) < 0 || (r = put(out, ",\"logprob\":")) < 0)
        return r;
    return put_decimal(out, logprob);
}

static int write_delta(struct buffer *out, const struct record *record)
{
    int r;

    if ((r = put(out, "{\"type\":\"delta\",\"text\":")) < 0 ||
        (r = put_string(out, record->text, record->n_text)) < 0)
        return r;
    if (record->has_token) {
        if ((r = put_token(out, ",\"id\":", record->id, record->logprob)) < 0 ||
            (r = put(out, ",\"entropy\":")) < 0 || (r = put_decimal(out, record->entropy)) < 0)
            return r;
        for (size_t i = 0; i < record->n_top; i++) {
            const struct record_top *t = &record->top[i];

            if ((r = put_token(out, i == 0 ? ",\"top\":[{\"id\":" : ",{\"id\":", t->id,
                               t->logprob)) < 0 ||
                (r = put(out, ",\"text\":")) < 0 || (r = put_string(out, t->text, t->n_text)) < 0 ||
                (r = put(out, "}")) < 0)
                return r;
        }
        if (record->n_top > 0 && (r = put(out, "]")) < 0)
            return r;
    }
    return put(out, "}\n");
}

static int write_usage(struct buffer *out, const struct record *record)
{
    int r;

    if ((r = put_unsigned(out, "{\"type\":\"usage\",\"prompt_tokens\":", record->prompt_tokens)) <
            0 ||
        (r = put_unsigned(out, ",\"completion_tokens\":", record->completion_tokens)) < 0 ||
        (r = put_unsigned(out, ",\"cached_tokens\":", record->cached_tokens)) < 0)
        return r;
    return put(out, "}\n");
}

static int write_end(struct buffer *out, const struct record *record)
{
    int r;

    if ((r = put(out, "{\"type\":\"end\",\"reason\":")) < 0 ||
        (r = put_string(out, record->reason, strlen(record->reason))) < 0)
        return r;
    return put(out, "}\n");
}

static int write_error(struct buffer *out, const struct record *record)
{
    int r;

    if ((r = put(out, "{\"type\":\"error\",\"name\":")) < 0 ||
        (r = put_string(out, record->name, strlen(record->name))) < 0 ||
        (r = put(out, ",\"message\":")) < 0 ||
        (r = put_string(out, record->message, strlen(record->message))) < 0)
        return r;
    if (record->has_sizes && ((r = put_unsigned(out, ",\"requested\":", record->requested)) < 0 ||
                              (r = put_unsigned(out, ",\"available\":", record->available)) < 0))
        return r;
    return put(out, "}\n");
}

static int write_queued(struct buffer *out, const struct record *record)
{
    int r;

    if ((r = put_unsigned(out, "{\"type\":\"queued\",\"position\":", record->position)) < 0 ||
        (r = put_unsigned(out, ",\"estimated_usec\":", record->estimated_usec)) < 0)
        return r;
    return put(out, "}\n");
}

static int write_progress(struct buffer *out, const struct record *record)
{
    int r;

    if ((r = put_unsigned(out, "{\"type\":\"progress\",\"done\":", record->done)) < 0 ||
        (r = put_unsigned(out, ",\"total\":", record->total)) < 0)
        return r;
    return put(out, "}\n");
}

int record_write(struct buffer *out, const struct record *record)
{
    size_t n = out->n;
    int r = 0;

    switch (record->type) {
    case RECORD_UNKNOWN:
        r = -EINVAL;
        break;
    case RECORD_DELTA:
        r = write_delta(out, record);
        break;
    case RECORD_USAGE:
        r = write_usage(out, record);
        break;
    case RECORD_END:
        r = write_end(out, record);
        break;
    case RECORD_ERROR:
        r = write_error(out, record);
        break;
    case RECORD_QUEUED:
        r = write_queued(out, record);
        break;
    case RECORD_PROGRESS:
        r = write_progress(out, record);
        break;
    }
    if (r < 0)
        out->n = n; /* never half a line */
    return r;
}

/* ---- reading ---- */

struct cursor {
    char *p, *end;
};

struct text {
    const char *data;
    size_t n;
};

static void skip_space(struct cursor *c)
{
    while (c->p < c->end && (*c->p == ' ' || *c->p == '\t' || *c->p == '\r' || *c->p == '\n'))
        c->p++;
}

/* Skips space and then takes the character if it is the one; false leaves it. */
static bool take(struct cursor *c, char wanted)
{
    skip_space(c);
    if (c->p == c->end || *c->p != wanted)
        return false;
    c->p++;
    return true;
}

static int hex4(struct cursor *c, uint32_t *ret)
{
    uint32_t v = 0;

    if (c->end - c->p < 4)
        return -EBADMSG;
    for (int i = 0; i < 4; i++) {
        char d = *c->p++;

        if (d >= '0' && d <= '9')
            v = v << 4 | (uint32_t)(d - '0');
        else if (d >= 'a' && d <= 'f')
            v = v << 4 | (uint32_t)(d - 'a' + 10);
        else if (d >= 'A' && d <= 'F')
            v = v << 4 | (uint32_t)(d - 'A' + 10);
        else
            return -EBADMSG;
    }
    *ret = v;
    return 0;
}

/* After "\u". Surrogates must come as a pair. */
static int unicode_escape(struct cursor *c, uint32_t *ret)
{
    uint32_t high, low;

    if (hex4(c, &high) < 0 || (high >= 0xdc00 && high < 0xe000))
        return -EBADMSG;
    if (high >= 0xd800 && high < 0xdc00) {
        if (c->end - c->p < 2 || c->p[0] != '\\' || c->p[1] != 'u')
            return -EBADMSG;
        c->p += 2;
        if (hex4(c, &low) < 0 || low < 0xdc00 || low >= 0xe000)
            return -EBADMSG;
        high = 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    }
    *ret = high;
    return 0;
}

/* Decodes in place and ends it with a NUL, where the closing quote was or before it. */
static int parse_string(struct cursor *c, struct text *ret)
{
    char *out, *start;
    uint32_t code;
    size_t used;

    if (!take(c, '"'))
        return -EBADMSG;
    out = start = c->p;
    while (c->p < c->end) {
        unsigned char ch = (unsigned char)*c->p;

        if (ch == '"') {
            c->p++;
            *out = 0;
            *ret = (struct text){start, (size_t)(out - start)};
            return 0;
        }
        if (ch != '\\') {
            used = utf8_next(c->p, (size_t)(c->end - c->p), &code);
            if (used == 0 || code < 0x20)
                return -EBADMSG;
            memmove(out, c->p, used);
            out += used;
            c->p += used;
            continue;
        }
        if (c->end - c->p < 2)
            return -EBADMSG;
        c->p += 2;
        switch (c->p[-1]) {
        case '"':
        case '\\':
        case '/':
            *out++ = c->p[-1];
            break;
        case 'b':
            *out++ = '\b';
            break;
        case 'f':
            *out++ = '\f';
            break;
        case 'n':
            *out++ = '\n';
            break;
        case 'r':
            *out++ = '\r';
            break;
        case 't':
            *out++ = '\t';
            break;
        case 'u':
            if (unicode_escape(c, &code) < 0)
                return -EBADMSG;
            out += utf8_put(code, out); /* at most 3 of 6, or 4 of 12 bytes */
            break;
        default:
            return -EBADMSG;
        }
    }
    return -EBADMSG;
}

/* A string that C code may take as such. */
static int parse_c_string(struct cursor *c, const char **ret)
{
    struct text t;

    if (parse_string(c, &t) < 0 || memchr(t.data, 0, t.n))
        return -EBADMSG;
    *ret = t.data;
    return 0;
}

static bool is_digit(const struct cursor *c)
{
    return c->p < c->end && *c->p >= '0' && *c->p <= '9';
}

/* JSON's grammar of numbers, without strtod(): that one reads by the program's locale. */
static int parse_number(struct cursor *c, double *ret)
{
    double v = 0;
    int shift = 0, exponent = 0;
    bool negative, exponent_negative = false;

    negative = take(c, '-');
    if (!is_digit(c))
        return -EBADMSG;
    if (*c->p == '0') {
        c->p++;
        if (is_digit(c))
            return -EBADMSG;
    }
    for (; is_digit(c); c->p++)
        v = v * 10 + (*c->p - '0');
    if (c->p < c->end && *c->p == '.') {
        c->p++;
        if (!is_digit(c))
            return -EBADMSG;
        for (; is_digit(c); c->p++) {
            if (v < 1e17) { /* beyond a double's precision */
                v = v * 10 + (*c->p - '0');
                shift--;
            }
        }
    }
    if (c->p < c->end && (*c->p == 'e' || *c->p == 'E')) {
        c->p++;
        if (c->p < c->end && (*c->p == '+' || *c->p == '-'))
            exponent_negative = *c->p++ == '-';
        if (!is_digit(c))
            return -EBADMSG;
        for (; is_digit(c); c->p++)
            if (exponent < 10000)
                exponent = exponent * 10 + (*c->p - '0');
    }
    shift += exponent_negative ? -exponent : exponent;
    if (v > 0 && shift < 0) {
        double by = 1;

        for (int i = 0; i < -shift && v > 0; i++) {
            by *= 10;
            if (by > 1e300) {
                v /= by;
                by = 1;
            }
        }
        v /= by;
    }
    for (int i = 0; i < shift && v > 0 && isfinite(v); i++)
        v *= 10;
    if (!isfinite(v))
        return -EBADMSG;
    *ret = negative ? -v : v;
    return 0;
}

static int parse_u64(struct cursor *c, uint64_t *ret)
{
    uint64_t v = 0;

    skip_space(c);
    if (!is_digit(c) || (*c->p == '0' && c->end - c->p > 1 && c->p[1] >= '0' && c->p[1] <= '9'))
        return -EBADMSG;
    for (; is_digit(c); c->p++)
        if (ckd_mul(&v, v, 10) || ckd_add(&v, v, (unsigned)(*c->p - '0')))
            return -EBADMSG;
    if (c->p < c->end && (*c->p == '.' || *c->p == 'e' || *c->p == 'E'))
        return -EBADMSG;
    *ret = v;
    return 0;
}

static int parse_u32(struct cursor *c, uint32_t *ret)
{
    uint64_t v;

    if (parse_u64(c, &v) < 0 || v > UINT32_MAX)
        return -EBADMSG;
    *ret = (uint32_t)v;
    return 0;
}

static bool take_word(struct cursor *c, const char *word)
{
    size_t n = strlen(word);

    skip_space(c);
    if ((size_t)(c->end - c->p) < n || memcmp(c->p, word, n) != 0)
        return false;
    c->p += n;
    return true;
}

static int parse_logprob(struct cursor *c, double *ret)
{
    if (take_word(c, "null")) {
        *ret = NAN;
        return 0;
    }
    return parse_number(c, ret);
}

static int skip_value(struct cursor *c, int depth)
{
    struct text t;
    double d;

    skip_space(c);
    if (c->p == c->end || depth > DEPTH_MAX)
        return -EBADMSG;
    switch (*c->p) {
    case '"':
        return parse_string(c, &t);
    case '{':
        c->p++;
        if (take(c, '}'))
            return 0;
        do {
            if (parse_string(c, &t) < 0 || !take(c, ':') || skip_value(c, depth + 1) < 0)
                return -EBADMSG;
        } while (take(c, ','));
        return take(c, '}') ? 0 : -EBADMSG;
    case '[':
        c->p++;
        if (take(c, ']'))
            return 0;
        do {
            if (skip_value(c, depth + 1) < 0)
                return -EBADMSG;
        } while (take(c, ','));
        return take(c, ']') ? 0 : -EBADMSG;
    case 't':
        return take_word(c, "true") ? 0 : -EBADMSG;
    case 'f':
        return take_word(c, "false") ? 0 : -EBADMSG;
    case 'n':
        return take_word(c, "null") ? 0 : -EBADMSG;
    default:
        return parse_number(c, &d);
    }
}

/* Members, as a set, to see doubles and gaps. */
enum member {
    M_TYPE = 1 << 0,
    M_TEXT = 1 << 1,
    M_ID = 1 << 2,
    M_LOGPROB = 1 << 3,
    M_ENTROPY = 1 << 4,
    M_TOP = 1 << 5,
    M_PROMPT_TOKENS = 1 << 6,
    M_COMPLETION_TOKENS = 1 << 7,
    M_CACHED_TOKENS = 1 << 8,
    M_REASON = 1 << 9,
    M_NAME = 1 << 10,
    M_MESSAGE = 1 << 11,
    M_REQUESTED = 1 << 12,
    M_AVAILABLE = 1 << 13,
    M_POSITION = 1 << 14,
    M_ESTIMATED_USEC = 1 << 15,
    M_DONE = 1 << 16,
    M_TOTAL = 1 << 17,
};

static bool is(const struct text *key, const char *name)
{
    return key->n == strlen(name) && memcmp(key->data, name, key->n) == 0;
}

/* Which member a key names; 0: one that this version does not know. */
static unsigned member_of(const struct text *key)
{
    static const struct {
        const char *name;
        unsigned member;
    } members[] = {
        {"type", M_TYPE},
        {"text", M_TEXT},
        {"id", M_ID},
        {"logprob", M_LOGPROB},
        {"entropy", M_ENTROPY},
        {"top", M_TOP},
        {"prompt_tokens", M_PROMPT_TOKENS},
        {"completion_tokens", M_COMPLETION_TOKENS},
        {"cached_tokens", M_CACHED_TOKENS},
        {"reason", M_REASON},
        {"name", M_NAME},
        {"message", M_MESSAGE},
        {"requested", M_REQUESTED},
        {"available", M_AVAILABLE},
        {"position", M_POSITION},
        {"estimated_usec", M_ESTIMATED_USEC},
        {"done", M_DONE},
        {"total", M_TOTAL},
    };

    for (size_t i = 0; i < ARRAY_SIZE(members); i++)
        if (is(key, members[i].name))
            return members[i].member;
    return 0;
}

static int parse_top(struct cursor *c, struct record_top *ret)
{
    unsigned seen = 0;

    if (!take(c, '{'))
        return -EBADMSG;
    do {
        struct text key, text;
        unsigned m;
        int r;

        if (parse_string(c, &key) < 0 || !take(c, ':'))
            return -EBADMSG;
        m = member_of(&key) & (M_ID | M_LOGPROB | M_TEXT);
        if (seen & m)
            return -EBADMSG;
        seen |= m;
        if (m == M_ID) {
            r = parse_u32(c, &ret->id);
        } else if (m == M_LOGPROB) {
            r = parse_logprob(c, &ret->logprob);
        } else if (m == M_TEXT) {
            r = parse_string(c, &text);
            if (r == 0) {
                ret->text = text.data;
                ret->n_text = text.n;
            }
        } else {
            r = skip_value(c, 1);
        }
        if (r < 0)
            return r;
    } while (take(c, ','));
    return take(c, '}') && seen == (M_ID | M_LOGPROB | M_TEXT) ? 0 : -EBADMSG;
}

static int parse_tops(struct cursor *c, struct record *record)
{
    if (!take(c, '['))
        return -EBADMSG;
    if (take(c, ']'))
        return 0;
    do {
        if (record->n_top == RECORD_TOP_MAX || parse_top(c, &record->top[record->n_top]) < 0)
            return -EBADMSG;
        record->n_top++;
    } while (take(c, ','));
    return take(c, ']') ? 0 : -EBADMSG;
}

static int parse_member(struct cursor *c, unsigned member, struct record *record, struct text *type)
{
    struct text t;

    switch (member) {
    case M_TYPE:
        return parse_string(c, type);
    case M_TEXT:
        if (parse_string(c, &t) < 0)
            return -EBADMSG;
        record->text = t.data;
        record->n_text = t.n;
        return 0;
    case M_ID:
        return parse_u32(c, &record->id);
    case M_LOGPROB:
        return parse_logprob(c, &record->logprob);
    case M_ENTROPY:
        return parse_logprob(c, &record->entropy);
    case M_TOP:
        return parse_tops(c, record);
    case M_PROMPT_TOKENS:
        return parse_u32(c, &record->prompt_tokens);
    case M_COMPLETION_TOKENS:
        return parse_u32(c, &record->completion_tokens);
    case M_CACHED_TOKENS:
        return parse_u32(c, &record->cached_tokens);
    case M_REASON:
        return parse_c_string(c, &record->reason);
    case M_NAME:
        return parse_c_string(c, &record->name);
    case M_MESSAGE:
        return parse_c_string(c, &record->message);
    case M_REQUESTED:
        return parse_u64(c, &record->requested);
    case M_AVAILABLE:
        return parse_u64(c, &record->available);
    case M_POSITION:
        return parse_u32(c, &record->position);
    case M_ESTIMATED_USEC:
        return parse_u64(c, &record->estimated_usec);
    case M_DONE:
        return parse_u64(c, &record->done);
    case M_TOTAL:
        return parse_u64(c, &record->total);
    default:
        return skip_value(c, 1);
    }
}

/* The type decides which members must be there. */
static int finish(struct record *record, const struct text *type, unsigned seen)
{
    static const unsigned usage = M_PROMPT_TOKENS | M_COMPLETION_TOKENS | M_CACHED_TOKENS;
    static const unsigned token = M_ID | M_LOGPROB | M_ENTROPY;
    static const unsigned sizes = M_REQUESTED | M_AVAILABLE;
    static const unsigned queued = M_POSITION | M_ESTIMATED_USEC;
    static const unsigned progress = M_DONE | M_TOTAL;

    if (!(seen & M_TYPE))
        return -EBADMSG;
    if (is(type, "delta")) {
        record->type = RECORD_DELTA;
        record->has_token = (seen & token) == token;
        return (seen & M_TEXT) && (record->has_token || !(seen & (token | M_TOP))) ? 0 : -EBADMSG;
    }
    if (is(type, "usage")) {
        record->type = RECORD_USAGE;
        return (seen & usage) == usage ? 0 : -EBADMSG;
    }
    if (is(type, "end")) {
        record->type = RECORD_END;
        return seen & M_REASON ? 0 : -EBADMSG;
    }
    if (is(type, "error")) {
        record->type = RECORD_ERROR;
        record->has_sizes = (seen & sizes) == sizes;
        return (seen & M_NAME) && (seen & M_MESSAGE) ? 0 : -EBADMSG;
    }
    if (is(type, "queued")) {
        record->type = RECORD_QUEUED;
        return (seen & queued) == queued ? 0 : -EBADMSG;
    }
    if (is(type, "progress")) {
        record->type = RECORD_PROGRESS;
        return (seen & progress) == progress ? 0 : -EBADMSG;
    }
    record->type = RECORD_UNKNOWN;
    return 0;
}

int record_parse(char *line, size_t n, struct record *ret)
{
    struct cursor c = {line, line + n};
    struct text type = {0};
    unsigned seen = 0;
    int r;

    /* Not = { 0 }: the array within is large, and its n says how much of it is meant. */
    memset(ret, 0, offsetof(struct record, top));
    ret->prompt_tokens = ret->completion_tokens = ret->cached_tokens = 0;
    ret->reason = ret->name = ret->message = NULL;
    ret->has_sizes = false;
    ret->requested = ret->available = 0;
    ret->position = 0;
    ret->estimated_usec = ret->done = ret->total = 0;

    if (!take(&c, '{'))
        return -EBADMSG;
    if (!take(&c, '}')) {
        do {
            struct text key;
            unsigned m;

            if (parse_string(&c, &key) < 0 || !take(&c, ':'))
                return -EBADMSG;
            m = member_of(&key);
            if (seen & m)
                return -EBADMSG;
            seen |= m;
            r = parse_member(&c, m, ret, &type);
            if (r < 0)
                return -EBADMSG;
        } while (take(&c, ','));
        if (!take(&c, '}'))
            return -EBADMSG;
    }
    skip_space(&c);
    if (c.p != c.end)
        return -EBADMSG;
    return finish(ret, &type, seen);
}

void record_reader_done(struct record_reader *r)
{
    buffer_done(&r->in);
    *r = (struct record_reader){0};
}

int record_reader_feed(struct record_reader *r, const void *data, size_t n)
{
    buffer_consume(&r->in, r->used);
    r->scanned -= r->used;
    r->used = 0;
    return buffer_append(&r->in, data, n);
}

int record_reader_next(struct record_reader *r, struct record *ret)
{
    char *line, *newline;
    size_t n;

    if (r->scanned == r->in.n)
        return 0;
    line = r->in.data + r->used;
    newline = memchr(r->in.data + r->scanned, '\n', r->in.n - r->scanned);
    if (!newline) {
        r->scanned = r->in.n;
        return r->in.n - r->used > RECORD_BYTES_MAX ? -EBADMSG : 0;
    }
    n = (size_t)(newline - line);
    r->used += n + 1;
    r->scanned = r->used;
    if (n > RECORD_BYTES_MAX || record_parse(line, n, ret) < 0)
        return -EBADMSG;
    return 1;
}

bool record_reader_partial(const struct record_reader *r)
{
    return r->in.n > r->used;
}

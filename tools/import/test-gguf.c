/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * gguf: a small file is built byte by byte, read back, then broken in each way a field can be
 * broken, cut at every byte and given random bit flips.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/import/gguf.h"

struct buffer {
    uint8_t data[4096];
    size_t n;
};

static void put(struct buffer *b, const void *data, size_t n)
{
    assert(b->n + n <= sizeof(b->data));
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void put_u32(struct buffer *b, uint32_t v)
{
    put(b, &v, 4);
}

static void put_u64(struct buffer *b, uint64_t v)
{
    put(b, &v, 8);
}

static void put_string(struct buffer *b, const char *s)
{
    put_u64(b, strlen(s));
    put(b, s, strlen(s));
}

/* What one variation changes; zero: a good file. */
struct variation {
    const char *expect; /* part of the error; NULL: parses */
    uint32_t version;
    uint64_t n_entries, n_tensors;
    const char *second_key, *second_tensor;
    uint32_t value_type, element_type;
    uint64_t array_n, string_n;
    uint32_t alignment;
    uint8_t truth;
    uint32_t n_dims, tensor_type;
    uint64_t dim0, dim1, offset, name_n;
};

#define OR(v, standard) ((v) ? (v) : (standard))

/* Two tensors: "a" F32 [4][2] at 0, "b" Q4_0 [2][32] at 32. */
static size_t build(struct buffer *b, const struct variation *v)
{
    float real[3] = {1.5f, -2, 0};
    size_t header;

    b->n = 0;
    put(b, "GGUF", 4);
    put_u32(b, OR(v->version, 3));
    put_u64(b, OR(v->n_tensors, 2));
    put_u64(b, OR(v->n_entries, 6));

    put_string(b, "general.alignment");
    put_u32(b, GGUF_U32);
    put_u32(b, OR(v->alignment, 32));
    put_string(b, OR(v->second_key, "name"));
    put_u32(b, OR(v->value_type, GGUF_STRING));
    put_u64(b, OR(v->string_n, 5));
    put(b, "hello", 5);
    put_string(b, "reals");
    put_u32(b, GGUF_ARRAY);
    put_u32(b, OR(v->element_type, GGUF_F32));
    put_u64(b, OR(v->array_n, 3));
    put(b, real, sizeof(real));
    put_string(b, "strings");
    put_u32(b, GGUF_ARRAY);
    put_u32(b, GGUF_STRING);
    put_u64(b, 3);
    put_string(b, "x");
    put_string(b, "");
    put_string(b, "yz");
    put_string(b, "truth");
    put_u32(b, GGUF_BOOL);
    put(b, v->truth ? &v->truth : (const uint8_t *)"\1", 1);
    put_string(b, "minus");
    put_u32(b, GGUF_I64);
    put_u64(b, (uint64_t)-7);

    put_string(b, "a");
    put_u32(b, OR(v->n_dims, 2));
    put_u64(b, OR(v->dim0, 4));
    put_u64(b, OR(v->dim1, 2));
    put_u32(b, v->tensor_type);
    put_u64(b, 0);
    if (v->name_n)
        put_u64(b, v->name_n);
    else
        put_string(b, OR(v->second_tensor, "b"));
    put_u32(b, 2);
    put_u64(b, 32);
    put_u64(b, 2);
    put_u32(b, GGUF_TENSOR_Q4_0);
    put_u64(b, OR(v->offset, 32));
    header = b->n;
    while (b->n % 32)
        put(b, "", 1);
    for (int i = 0; i < 32 + 36; i++)
        put(b, "", 1);
    return header;
}

static int parse_exact(struct gguf **ret, const uint8_t *data, size_t n, struct error *err)
{
    uint8_t *copy = malloc(n ? n : 1); /* so that ASan sees one byte too far */
    int r;

    assert(copy);
    memcpy(copy, data, n);
    r = gguf_parse(ret, copy, n, n, "test.gguf", err);
    if (r == 0)
        *ret = gguf_free(*ret);
    free(copy);
    return r;
}

static void test_good(void)
{
    struct variation v = {0};
    struct gguf_string s;
    struct gguf_strings walk;
    struct buffer b;
    struct gguf *g;
    struct error err;
    int64_t integer;
    uint32_t u;
    float real;
    bool truth;

    for (v.version = 2; v.version <= 3; v.version++) {
        build(&b, &v);
        assert(gguf_parse(&g, b.data, b.n, b.n, "test.gguf", &err) == 0);
        assert(gguf_n_entries(g) == 6 && gguf_n_tensors(g) == 2);
        assert(!gguf_find(g, "nam") && !gguf_find(g, "namee") && !gguf_find_tensor(g, "c"));

        assert(gguf_get_string(gguf_find(g, "name"), &s) == 0 && gguf_string_is(s, "hello"));
        assert(!gguf_string_is(s, "hell") && gguf_get_u32(gguf_find(g, "name"), 0, &u) == -EINVAL);
        assert(gguf_get_float(gguf_find(g, "reals"), 0, &real) == 0 && real == 1.5f);
        assert(gguf_get_i64(gguf_find(g, "reals"), 0, &integer) == -EINVAL);
        assert(gguf_get_i64(gguf_find(g, "reals"), 1, &integer) == 0 && integer == -2);
        assert(gguf_get_u32(gguf_find(g, "reals"), 1, &u) == -EINVAL);
        assert(gguf_get_u32(gguf_find(g, "reals"), 2, &u) == 0 && u == 0);
        assert(gguf_get_u32(gguf_find(g, "reals"), 3, &u) == -EINVAL);
        assert(gguf_get_i64(gguf_find(g, "minus"), 0, &integer) == 0 && integer == -7);
        assert(gguf_get_float(gguf_find(g, "minus"), 0, &real) == 0 && real == -7);
        assert(gguf_get_bool(gguf_find(g, "truth"), 0, &truth) == 0 && truth);
        assert(gguf_get_bool(gguf_find(g, "minus"), 0, &truth) == -EINVAL);
        assert(gguf_get_u32(gguf_find(g, "truth"), 0, &u) == -EINVAL);

        walk = gguf_strings_begin(gguf_find(g, "strings"));
        assert(gguf_strings_next(&walk, &s) && gguf_string_is(s, "x"));
        assert(gguf_strings_next(&walk, &s) && gguf_string_is(s, ""));
        assert(gguf_strings_next(&walk, &s) && gguf_string_is(s, "yz"));
        assert(!gguf_strings_next(&walk, &s));
        walk = gguf_strings_begin(gguf_find(g, "reals"));
        assert(!gguf_strings_next(&walk, &s));

        assert(gguf_find_tensor(g, "a")->bytes == 32 && gguf_find_tensor(g, "b")->bytes == 36);
        assert(gguf_find_tensor(g, "a")->offset == b.n - 68);
        assert(gguf_find_tensor(g, "b")->offset == b.n - 36);
        assert(gguf_find_tensor(g, "b")->dims[1] == 2 && gguf_find_tensor(g, "b")->dims[2] == 1);
        gguf_free(g);
    }
}

static void test_broken(void)
{
    static const struct variation variations[] = {
        {"version 1;", .version = 1},
        {"version 4;", .version = 4},
        {"big-endian", .version = 0x03000000},
        {"metadata entries", .n_entries = UINT64_MAX},
        {"metadata entries", .n_entries = 1000},
        {"tensors, more", .n_tensors = UINT64_MAX / 33},
        {"tensor 2", .n_tensors = 3}, /* reads the data as a third description */
        {"'reals' occurs twice", .second_key = "reals"},
        {"tensor 'a' occurs twice", .second_tensor = "a"},
        {"'name' has unknown type 13", .value_type = 13},
        {"'name' has unknown type", .value_type = UINT32_MAX},
        {"array of arrays", .element_type = GGUF_ARRAY},
        {"'reals' has unknown type 77", .element_type = 77},
        {"'reals' claims 4611686018427387904 values", .array_n = 1ull << 62},
        {"'reals' claims", .array_n = UINT64_MAX},
        {"'name': string 0", .string_n = UINT64_MAX},
        {"'name': string 0", .string_n = 4000},
        {"general.alignment", .alignment = 33},
        {"general.alignment", .alignment = 1u << 31},
        {"truth value", .truth = 2},
        {"has 5 dimensions", .n_dims = 5},
        {"has 4294967295 dimensions", .n_dims = UINT32_MAX},
        {"dimension 1", .dim0 = 1ull << 40, .dim1 = 1ull << 40},
        {"dimension 0", .dim0 = UINT64_MAX},
        {"tensor 'a' ends beyond", .dim0 = 1ull << 60},
        {"tensor 'a' ends beyond", .dim0 = 100},
        {"overlap", .dim0 = 8},
        {"type 3;", .tensor_type = 3},
        {"type 4294967295;", .tensor_type = UINT32_MAX},
        {"whole blocks of Q6_K", .tensor_type = GGUF_TENSOR_Q6_K},
        {"not a multiple", .offset = 33},
        {"tensor 'b' ends beyond", .offset = 64},
        {"tensor 'b' ends beyond", .offset = UINT64_MAX - 31},
        {"name of tensor 1", .name_n = 65},
        {"name of tensor 1", .name_n = UINT64_MAX},
    };
    struct buffer b;
    struct gguf *g;
    struct error err;

    for (size_t i = 0; i < sizeof(variations) / sizeof(variations[0]); i++) {
        err.text[0] = 0;
        build(&b, &variations[i]);
        assert(parse_exact(&g, b.data, b.n, &err) == -EINVAL);
        if (!strstr(err.text, variations[i].expect) || strncmp(err.text, "test.gguf: ", 11) != 0) {
            fprintf(stderr, "variation %zu: %s\n", i, err.text);
            abort();
        }
    }
}

static void test_truncated(void)
{
    struct variation v = {0};
    struct buffer b;
    struct gguf *g;
    struct error err;

    build(&b, &v);
    assert(parse_exact(&g, b.data, b.n, &err) == 0);
    for (size_t n = 0; n < b.n; n++) {
        err.text[0] = 0;
        assert(parse_exact(&g, b.data, n, &err) == -EINVAL);
        assert(strncmp(err.text, "test.gguf: ", 11) == 0 && !strchr(err.text, '\n'));
    }
}

static void test_flipped(void)
{
    struct variation v = {0};
    struct buffer good, b;
    struct gguf *g;
    struct error err;
    uint32_t x = 1;

    build(&good, &v);
    for (int round = 0; round < 20000; round++) {
        b = good;
        for (int flips = 1 + round % 4; flips > 0; flips--) {
            x = x * 1664525 + 1013904223;
            b.data[(x >> 8) % b.n] ^= (uint8_t)(1u << (x >> 5 & 7));
        }
        parse_exact(&g, b.data, b.n, &err); /* either way, nothing out of bounds */
    }
}

int main(void)
{
    test_good();
    test_broken();
    test_truncated();
    test_flipped();
    return 0;
}

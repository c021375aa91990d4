/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* safetensors: a small header, read back, then broken in each way, cut and with bits flipped. */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "tools/import/safetensors.h"

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}"
#define B "\"b\":{\"dtype\":\"BF16\",\"shape\":[5],\"data_offsets\":[24,34]}"
#define GOOD "{\"__metadata__\":{\"format\":\"pt\"}," A "," B "}"
#define DATA 34

static int parse(const char *text, uint64_t data, struct error *err)
{
    size_t n = strlen(text);
    char *copy = malloc(n ? n : 1); /* no end: exactly n bytes */
    struct safetensors *s = NULL;
    int r;

    assert(copy);
    memcpy(copy, text, n);
    r = safetensors_parse(&s, copy, n, 8 + n + data, "test", err);
    assert((r == 0) == (s != NULL));
    safetensors_free(s);
    free(copy);
    return r;
}

static void test_good(void)
{
    const struct safetensors_tensor *t;
    struct safetensors *s;
    struct error err;
    size_t n = strlen(GOOD);

    assert(safetensors_parse(&s, GOOD, n, 8 + n + DATA, "test", &err) == 0);
    assert(safetensors_n_tensors(s) == 2 && !safetensors_find(s, "c"));
    assert(!safetensors_find(s, "__metadata__"));
    t = safetensors_find(s, "a");
    assert(t && strcmp(t->dtype, "F32") == 0 && t->n_dims == 2 && t->dims[0] == 2 &&
           t->dims[1] == 3 && t->offset == 8 + n && t->bytes == 24);
    t = safetensors_find(s, "b");
    assert(t && strcmp(t->dtype, "BF16") == 0 && t->n_dims == 1 && t->offset == 8 + n + 24);
    safetensors_free(s);
    assert(parse("{}", 0, &err) == 0);
    assert(parse("{\"e\":{\"dtype\":\"F32\",\"shape\":[0,9],\"data_offsets\":[0,0]}," A "}", 24,
                 &err) == 0);
}

static void test_broken(void)
{
#define T(dtype, shape, offsets) \
    "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
    static const struct {
        const char *text, *expect;
    } cases[] = {
        {"", "header"},
        {"[]", "not a JSON object"},
        {"{" A "," A "}", "twice"},
        {"{" A "," B "} x", "header"},
        {"{" A "}", "10 bytes after the last tensor"},
        {"{" B "}", "tensor b: data_offsets leave a hole"},
        {"{" A ",\"c\":{\"dtype\":\"U8\",\"shape\":[30],\"data_offsets\":[4,34]}}", "overlap"},
        {"{" A ",\"c\":7}", "tensor c: dtype"},
        {T("7", "[34]", "[0,34]"), "tensor a: dtype"},
        {T("\"U8\"", "34", "[0,34]"), "tensor a: shape"},
        {T("\"U8\"", "[1,1,1,1,1,1,1,1,34]", "[0,34]"), "tensor a: shape"},
        {T("\"U8\"", "[-34]", "[0,34]"), "shape[0]"},
        {T("\"U8\"", "[34.0]", "[0,34]"), "shape[0]"},
        {T("\"U8\"", "[4294967296,4294967296,4294967296]", "[0,34]"), "larger than any file"},
        {T("\"F32\"", "[4611686018427387904]", "[0,34]"), "larger than any file"},
        {T("\"U8\"", "[34]", "[0]"), "data_offsets"},
        {T("\"U8\"", "[34]", "[0,-1]"), "data_offsets"},
        {T("\"U8\"", "[34]", "[34,0]"), "data_offsets"},
        {T("\"U8\"", "[35]", "[0,35]"), "beyond the end"},
        {T("\"U8\"", "[34]", "[0,18446744073709551615]"), "data_offsets"},
        {T("\"F32\"", "[34]", "[0,34]"), "hold 34 bytes, but F32 of this shape takes 136"},
        {"{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":1}}}}}}}}}", "header"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct error err = {""};

        assert(parse(cases[i].text, DATA, &err) == -EINVAL);
        if (!strstr(err.text, cases[i].expect) || strncmp(err.text, "test: ", 6) != 0) {
            fprintf(stderr, "case %zu: %s\n", i, err.text);
            abort();
        }
    }
}

static void test_mutations(void)
{
    char text[sizeof(GOOD)];
    struct error err;
    uint32_t x = 1;

    for (size_t n = 0; n < strlen(GOOD); n++) {
        memcpy(text, GOOD, sizeof(text));
        text[n] = 0;
        err.text[0] = 0;
        assert(parse(text, DATA, &err) == -EINVAL && err.text[0] && !strchr(err.text, '\n'));
    }
    for (int round = 0; round < 20000; round++) {
        memcpy(text, GOOD, sizeof(text));
        for (int flips = 1 + round % 3; flips > 0; flips--) {
            x = x * 1664525 + 1013904223;
            text[(x >> 8) % strlen(GOOD)] ^= (char)(1u << (x >> 5 & 7));
        }
        parse(text, DATA, &err);
    }
}

/* The eight bytes in front of the header. */
static void test_lengths(void)
{
    static const uint64_t lengths[] = {strlen(GOOD) + DATA + 1, SAFETENSORS_MAX_HEADER + 1,
                                       UINT64_MAX, (uint64_t)1 << 63, 0};
    char data[DATA] = {0};
    struct safetensors *s;
    struct error err;
    uint64_t n = strlen(GOOD);
    int fd = memfd_create("test", MFD_CLOEXEC);

    assert(fd >= 0);
    assert(safetensors_open(&s, fd, "test", &err) == -EINVAL); /* empty */
    assert(pwrite(fd, &n, 8, 0) == 8 && pwrite(fd, GOOD, n, 8) == (ssize_t)n &&
           pwrite(fd, data, DATA, (off_t)(8 + n)) == DATA);
    assert(safetensors_open(&s, fd, "test", &err) == 0);
    safetensors_free(s);
    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
        assert(pwrite(fd, &lengths[i], 8, 0) == 8);
        assert(safetensors_open(&s, fd, "test", &err) == -EINVAL);
    }
    close(fd);
}

int main(void)
{
    test_good();
    test_broken();
    test_mutations();
    test_lengths();
    return 0;
}

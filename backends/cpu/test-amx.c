/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What is particular to the AMX level: that it is offered exactly where the system says so, that
 * its kernels give the bits of AVX-512 at sizes that fill and overflow their blocks, with tiles in
 * plain C and, where there are any, in the processor, and that these two agree instruction by
 * instruction. Part of this needs AVX-512, or AMX, and is skipped aloud without.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "backends/cpu/amx-tile.h"
#include "backends/cpu/amx.h"
#include "backends/cpu/test-amx-tiles.h"
#include "base/checked.h"

#define MAX_ROWS 300
#define MAX_WIDTH 4192

static const struct backend_limits limits = {MAX_ROWS, MAX_WIDTH, 8};

static uint32_t next_random(void) /* below 2^31 */
{
    static uint64_t seed = 1;

    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33);
}

/* Whether the system lists a feature for its first processor. */
static bool system_says(const char *flag)
{
    static char line[1 << 14];
    FILE *f = fopen("/proc/cpuinfo", "re");
    bool found = false;

    assert(f);
    while (!found && fgets(line, sizeof(line), f)) {
        if (strncmp(line, "flags", 5) != 0)
            continue;
        for (char *word = strtok(line, " \t\n"); word; word = strtok(NULL, " \t\n"))
            found |= strcmp(word, flag) == 0;
        break;
    }
    fclose(f);
    return found;
}

static bool test_detection(void)
{
    static const char *const needed[] = {"amx_tile", "amx_int8",    "amx_bf16", "gfni",
                                         "avx512f",  "avx512_vnni", "avx512bw"};
    struct backend *b = NULL;
    struct error err = {{0}};
    bool expected = true;
    int r;

    for (size_t i = 0; i < ARRAY_SIZE(needed); i++)
        expected &= system_says(needed[i]);
    r = backend_cpu_new(&b, "amx", 2, &limits, &err);
    if (expected) {
        assert(r == 0 && strcmp(b->ops->name, "amx") == 0);
    } else {
        assert(r == -EINVAL && !b);
        assert(strcmp(err.text,
                      "CPU level amx: this machine lacks it; choose a lower one or none") == 0);
    }
    b = backend_free(b);
    assert(backend_cpu_new(&b, NULL, 1, &limits, &err) == 0); /* the best there is */
    assert((strcmp(b->ops->name, "amx") == 0) == expected);
    backend_free(b);
    return expected;
}

/* What a test does in a process of its own ends it by SIGABRT. */
static void must_abort(void (*run)(void))
{
    int status;
    pid_t pid = fork();

    assert(pid >= 0);
    if (pid == 0) {
        assert(freopen("/dev/null", "w", stderr));
        run();
        _exit(0);
    }
    assert(waitpid(pid, &status, 0) == pid);
    assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

static struct tile_config config_of(uint8_t rows, uint8_t words, uint8_t columns)
{
    struct tile_config c = {.palette = 1};

    c.rows[0] = c.rows[3] = c.rows[1] = rows;
    c.rows[2] = words;
    c.row_bytes[0] = c.row_bytes[3] = c.row_bytes[2] = (uint16_t)(columns * 4);
    c.row_bytes[1] = (uint16_t)(words * 4);
    return c;
}

static void use_without_configuration(void)
{
    tile_zero(0);
}

static void use_after_release(void)
{
    struct tile_config c = config_of(16, 16, 16);

    tile_configure(&c);
    tile_release();
    tile_zero(0);
}

static void too_many_rows(void)
{
    struct tile_config c = config_of(17, 16, 16);

    tile_configure(&c);
}

static void wrong_shapes(void)
{
    struct tile_config c = config_of(16, 16, 16);

    c.rows[2] = 8;
    tile_configure(&c);
    tile_dot_int8(0, 1, 2);
}

static void emulated_products(const struct tile_config *config, const void *a, const void *b,
                              int32_t *int8_sums, float *bf16_sums)
{
    tile_configure(config);
    tile_load(1, a, TILE_ROW_BYTES);
    tile_load(2, b, TILE_ROW_BYTES);
    tile_load(0, int8_sums, TILE_ROW_BYTES);
    tile_dot_int8(0, 1, 2);
    tile_store(0, int8_sums, TILE_ROW_BYTES);
    tile_load(3, bf16_sums, TILE_ROW_BYTES);
    tile_dot_bf16(3, 1, 2);
    tile_store(3, bf16_sums, TILE_ROW_BYTES);
    tile_release();
}

/* The emulation against products written out, and against the instructions where there are any. */
static void test_tiles(bool have_amx)
{
    for (int run = 0; run < 400; run++) {
        uint8_t rows = (uint8_t)(1 + next_random() % 16), words = (uint8_t)(1 + next_random() % 16);
        uint8_t columns = (uint8_t)(1 + next_random() % 16);
        struct tile_config config = config_of(rows, words, columns);
        union {
            int8_t bytes[16][64];
            uint16_t bf16[16][32];
        } a, b;
        int32_t sums[16][16], got[16][16], real[16][16];
        float floats[16][16], got_floats[16][16], real_floats[16][16];

        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 32; j++) { /* bf16 of all signs, some of them denormal */
                uint32_t exponent = run % 8 == 7 ? next_random() % 140 : 120 + next_random() % 10;

                a.bf16[i][j] = (uint16_t)((next_random() & 0x807f) | exponent << 7);
                b.bf16[i][j] = (uint16_t)((next_random() & 0x807f) | exponent << 7);
            }
            for (int j = 0; j < 16; j++) {
                sums[i][j] = run % 4 ? (int32_t)(next_random() * 2) : 0;
                floats[i][j] = run % 4 ? (float)(int)(next_random() - (1u << 30)) * 0x1p-30f : 0;
            }
        }
        memcpy(got, sums, sizeof(got));
        memcpy(real, sums, sizeof(real));
        memcpy(got_floats, floats, sizeof(got_floats));
        memcpy(real_floats, floats, sizeof(real_floats));
        emulated_products(&config, &a, &b, &got[0][0], &got_floats[0][0]);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 16; n++) {
                int64_t sum = 0;

                for (int k = 0; k < words * 4; k++)
                    sum += a.bytes[m][k] * b.bytes[k / 4][4 * n + k % 4];
                assert((uint32_t)got[m][n] ==
                       (uint32_t)sums[m][n] + (m < rows && n < columns ? (uint32_t)sum : 0));
                if (m >= rows || n >= columns) { /* stays in memory as it was */
                    assert(got_floats[m][n] == floats[m][n]);
                } else if (run % 8 != 7) {
                    double exact = (double)floats[m][n], magnitude = 0;

                    for (int k = 0; k < words * 2; k++) {
                        double p = (double)bf16_to_float(a.bf16[m][k]) *
                                   (double)bf16_to_float(b.bf16[k / 2][2 * n + k % 2]);

                        exact += p;
                        magnitude += p < 0 ? -p : p;
                    }
                    magnitude += floats[m][n] < 0 ? -(double)floats[m][n] : (double)floats[m][n];
                    exact -= (double)got_floats[m][n];
                    assert((exact < 0 ? -exact : exact) <= (words + 2) * 0x1p-24 * magnitude);
                }
            }
        if (have_amx) {
            real_tile_products(&config, &a, &b, &real[0][0], &real_floats[0][0]);
            assert(memcmp(got, real, sizeof(got)) == 0);
            assert(memcmp(got_floats, real_floats, sizeof(got_floats)) == 0);
        }
    }
    must_abort(use_without_configuration);
    must_abort(use_after_release);
    must_abort(too_many_rows);
    must_abort(wrong_shapes);
}

/* Products of n rows by both, bit by bit. */
static void check_same_bits(struct backend *amx, struct backend *avx512, enum weight_type type,
                            uint32_t n_out, uint32_t n_in, uint32_t n, bool fine)
{
    struct weight w = {.type = type, .layout = LAYOUT_TILE16, .n_out = n_out, .n_in = n_in};
    size_t bytes, ld_q = ALIGN_UP((size_t)n_in, (size_t)64), ld_y = n_out + 3;
    size_t n_blocks = ld_q / WEIGHT_BLOCK;
    struct activations x = {.n = n, .k = n_in, .ld = n_in, .ld_q = ld_q};
    float *got = calloc(n * ld_y, sizeof(*got)), *want = calloc(n * ld_y, sizeof(*want));
    uint16_t *d = calloc(n_in / WEIGHT_BLOCK, sizeof(*d));
    int8_t *q = calloc(n_in, 1);
    uint8_t *data;

    assert(weight_size(type, w.layout, n_out, n_in, &bytes) == 0);
    data = aligned_alloc(64, bytes);
    x.f32 = calloc((size_t)n * n_in, sizeof(*x.f32));
    x.q = calloc(n, ld_q);
    x.d = calloc(n * n_blocks, sizeof(*x.d));
    x.sum = calloc(n * n_blocks, sizeof(*x.sum));
    x.q_low = fine ? calloc(n, ld_q) : NULL;
    x.sum_low = fine ? calloc(n * n_blocks, sizeof(*x.sum_low)) : NULL;
    assert(got && want && d && q && data && x.f32 && x.q && x.d && x.sum);
    assert(!fine || (x.q_low && x.sum_low));
    memset(data, 0, bytes);
    w.data = data;
    for (uint32_t r = 0; r < n_out; r++) {
        for (uint32_t k = 0; k < n_in; k++)
            q[k] = type == WEIGHT_Q4 ? (int8_t)(next_random() % 16 - 8)
                                     : (int8_t)(next_random() % 256 - 128);
        for (uint32_t b = 0; b < n_in / WEIGHT_BLOCK; b++)
            d[b] = half_from_float((float)next_random() * 0x1p-33f);
        weight_put_row_q(&w, data, r, q, d);
    }
    for (size_t i = 0; i < (size_t)n * n_in; i++)
        x.f32[i] = (float)next_random() * 0x1p-30f - 1;
    avx512->ops->quantize(avx512, &x);
    for (size_t i = 0; i < n * ld_y; i++)
        got[i] = want[i] = 7;
    amx->ops->matmul(amx, &w, &x, got, ld_y);
    avx512->ops->matmul(avx512, &w, &x, want, ld_y);
    for (size_t i = 0; i < n * ld_y; i++)
        if (memcmp(&got[i], &want[i], sizeof(*got)) != 0) {
            fprintf(stderr, "%s %s %ux%u, %u rows: row %zu output %zu: %a by tiles, %a by avx512\n",
                    weight_type_name(type), fine ? "fine" : "coarse", n_out, n_in, n, i / ld_y,
                    i % ld_y, (double)got[i], (double)want[i]);
            abort();
        }
    free(got);
    free(want);
    free(d);
    free(q);
    free(data);
    free(x.f32);
    free(x.q);
    free(x.d);
    free(x.sum);
    free(x.q_low);
    free(x.sum_low);
}

static void test_same_bits(struct backend *amx, struct backend *avx512)
{
    static const struct {
        uint32_t n_out, n_in, n;
    } sizes[] = {
        {1, 32, 6},    {16, 96, 7},    {33, 128, 8},   {48, 160, 9},    {17, 512, 15},
        {96, 544, 16}, {32, 1056, 17}, {64, 2048, 25}, {40, 2080, 31},  {32, 4192, 33},
        {16, 64, 255}, {48, 96, 256},  {33, 32, 257},  {16, 2112, 300}, {32, 4096, 6},
    };

    for (size_t i = 0; i < ARRAY_SIZE(sizes); i++)
        for (int fine = 0; fine < 2; fine++) {
            check_same_bits(amx, avx512, WEIGHT_Q4, sizes[i].n_out, sizes[i].n_in, sizes[i].n,
                            fine);
            check_same_bits(amx, avx512, WEIGHT_Q8, sizes[i].n_out, sizes[i].n_in, sizes[i].n,
                            fine);
        }
}

int main(void)
{
    bool have_amx = test_detection();
    struct backend *avx512 = NULL, *amx = NULL;
    struct error err = {{0}};

    test_tiles(have_amx);
    if (!__builtin_cpu_supports("gfni") ||
        backend_cpu_new(&avx512, "avx512", 2, &limits, &err) < 0) {
        printf("skipped: this machine has no AVX-512 with GFNI: no kernels were run\n");
        return 77;
    }
    assert(backend_cpu_new(&amx, "avx512", 2, &limits, &err) == 0);
    cpu_use_amx_emulated(cpu_backend(amx));
    assert(cpu_map_scratch(cpu_backend(amx)) == 0);
    test_same_bits(amx, avx512);
    amx = backend_free(amx);
    if (have_amx) {
        assert(backend_cpu_new(&amx, "amx", 2, &limits, &err) == 0);
        test_same_bits(amx, avx512);
        amx = backend_free(amx);
    } else {
        printf("skipped: this machine has no AMX: its tiles were emulated only\n");
    }
    backend_free(avx512);
    return 0;
}

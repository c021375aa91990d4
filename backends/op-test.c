/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include "backends/op-test.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backends/cpu/amx.h"
#include "backends/vulkan/vulkan.h"
#include "base/checked.h"

#define GUARD 32 /* values before and behind an array */

const uint32_t batches[N_BATCHES] = {1, 2, 3, 5, 8, 17, N_MAX};

#ifdef AMX_EMULATED
static const char *const level_names[] = {"amx (emulated)"};
#define NO_LEVEL 77
#else
#define NO_LEVEL 1
static const char *const level_names[] = {"reference", "avx2", "avx512", "amx"};
#endif

struct backend *ref, *one, *two;
bool on_device;

static const struct backend_limits limits = {512, 8192, 16};
static uint64_t seed = 1;

/* KV pages of a device. */
static struct {
    char *p;
    size_t bytes, used;
} pages;

/* Pages of the CPU's, and copies of weights for a device. */
static struct piece {
    struct piece *next;
    void *p;
    size_t bytes;
} * cpu_pages, *told;

static bool copies_weights;
static uint64_t pass, last_pass;

uint32_t next_random(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33);
}

float uniform(void) /* in -1..1 */
{
    return (float)((double)next_random() * 0x1p-30 - 1);
}

bool op_begin(struct backend *b)
{
    return !pass || backend_begin(b, pass);
}

void op_end(struct backend *b)
{
    if (pass)
        backend_end(b);
}

void op_finish(struct backend *b)
{
    if (backend_finish(b) == 0)
        return;
    fprintf(stderr, "%s: %s\n", b->ops->name, backend_failure(b));
    abort();
}

void op_record(void)
{
    pass = ++last_pass;
}

void op_repeat(void)
{
    pass = last_pass;
}

void op_single(void)
{
    pass = 0;
}

/* The CPU's comes from malloc(): ASan sees what is read beyond its end. */
void *op_alloc(size_t bytes)
{
    void *p = NULL;

    if (on_device)
        p = backend_alloc(two, bytes);
    else
        assert(posix_memalign(&p, 64, bytes) == 0);
    assert(p);
    return p;
}

void op_free(void *p, size_t bytes)
{
    if (on_device)
        backend_release(two, p, bytes);
    else
        free(p);
}

static void piece_add(struct piece **list, void *p, size_t bytes)
{
    struct piece *new = malloc(sizeof(*new));

    assert(new &&p);
    *new = (struct piece){*list, p, bytes};
    *list = new;
}

static void pieces_free(struct piece **list)
{
    while (*list) {
        struct piece *first = *list;

        *list = first->next;
        if (first->bytes)
            assert(munmap(first->p, first->bytes) == 0);
        else
            free(first->p);
        free(first);
    }
}

/*
 * As a model file is mapped: shared, for reading only, at no page's beginning, and beyond the last
 * page is nothing.
 */
const void *op_weights(const void *p, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), used = ALIGN_UP(bytes, (size_t)64);
    size_t size = ALIGN_UP(used, page);
    char *content, *at;
    int fd;

    if (!on_device)
        return p;
    content = malloc(size);
    fd = memfd_create("weights", MFD_CLOEXEC);
    at = mmap(NULL, size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert(content && fd >= 0 && at != MAP_FAILED);
    piece_add(&told, at, size + page);
    memset(content, 0xff, size);
    memcpy(content + (size - used), p, bytes);
    assert(pwrite(fd, content, size, 0) == (ssize_t)size);
    assert(mmap(at, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == at);
    assert(backend_map(two, at + (size - used), bytes, BACKEND_WEIGHTS) == 0);
    if (copies_weights) {
        memset(content, 0xff, size);
        assert(pwrite(fd, content, size, 0) == (ssize_t)size);
    }
    free(content);
    assert(close(fd) == 0);
    return at + (size - used);
}

static void pages_new(bool shared)
{
    int fd;

    pages.bytes = (size_t)64 << 20;
    pages.used = 0;
    if (!shared) {
        pages.p = backend_alloc(two, pages.bytes);
        assert(pages.p);
        return;
    }
    fd = memfd_create("pages", MFD_CLOEXEC);
    assert(fd >= 0 && ftruncate(fd, (off_t)pages.bytes) == 0);
    pages.p = mmap(NULL, pages.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert(pages.p != MAP_FAILED && close(fd) == 0);
    assert(backend_map(two, pages.p, pages.bytes, BACKEND_SHARED) == 0);
}

/* What is mapped goes after the backend. */
static void pages_free(bool shared)
{
    if (shared)
        piece_add(&told, pages.p, pages.bytes);
    else
        backend_release(two, pages.p, pages.bytes);
}

void *op_page(size_t bytes)
{
    size_t at = pages.used;

    if (!on_device) {
        void *p = malloc(bytes);

        piece_add(&cpu_pages, p, 0);
        return p;
    }
    pages.used += ALIGN_UP(bytes, (size_t)64);
    assert(pages.used <= pages.bytes);
    return pages.p + at;
}

void op_pages_free(void)
{
    pieces_free(&cpu_pages);
    pages.used = 0;
}

bool op_leave_out(size_t i, size_t of)
{
    return on_device && (i + copies_weights) % of != 0;
}

double op_tiny(void)
{
    return on_device ? 0x1p-110 : 1e-42;
}

struct array array_new(size_t n, size_t width, size_t gap)
{
    struct array a = {.n = n, .width = width, .ld = width + gap};

    a.total = n * a.ld + 2 * GUARD + 1;
    a.memory = op_alloc(a.total * 4);
    memset(a.memory, 0xa5, a.total * 4);
    a.p = (float *)a.memory + GUARD + 1; /* odd on purpose */
    return a;
}

struct array array_random(size_t n, size_t width, size_t gap, float scale)
{
    struct array a = array_new(n, width, gap);

    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < width; k++)
            a.p[i * a.ld + k] = uniform() * scale;
    return a;
}

void array_free(struct array *a)
{
    op_free(a->memory, a->total * 4);
}

void array_mark(struct array *a)
{
    memset(a->memory, 0xa5, a->total * 4);
}

const float *array_weights(const struct array *a)
{
    return op_weights(a->p, (a->n * a->ld - (a->ld - a->width)) * sizeof(float));
}

void check_guards(const struct array *a, size_t n)
{
    for (size_t i = 0; i < a->total; i++) {
        bool inside = i > GUARD && i - GUARD - 1 < n * a->ld;

        if (inside && (i - GUARD - 1) % a->ld < a->width)
            continue;
        if (a->memory[i] != 0xa5a5a5a5u) {
            fprintf(stderr, "%s: written outside: %zu of [%zu][%zu] ld %zu\n", two->ops->name, i, n,
                    a->width, a->ld);
            abort();
        }
    }
}

void check_near(const char *what, size_t row, size_t k, double got, double want, double bound)
{
    if (fabs(got - want) <= bound + EPS * fabs(want) + op_tiny())
        return;
    fprintf(stderr, "%s: %s: row %zu value %zu: %.9g, not %.9g; off by %.3g, allowed %.3g\n",
            two->ops->name, what, row, k, got, want, fabs(got - want), bound);
    abort();
}

void check_same(const char *what, const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], 4) != 0) {
            fprintf(stderr, "%s: %s: value %zu depends on the batch: %.9g, %.9g\n", two->ops->name,
                    what, i, (double)a[i], (double)b[i]);
            abort();
        }
}

void check_batches(const char *what, run_rows run, void *args, struct array *out)
{
    struct array part = array_new(out->n, out->width, out->ld - out->width);
    uint32_t n_rows = (uint32_t)out->n;

    array_mark(out);
    run(two, args, 0, n_rows, out->p);
    check_guards(out, n_rows);
    for (int again = 0; on_device && again < 2; again++) {
        if (again == 0)
            op_record();
        else
            op_repeat();
        array_mark(&part);
        run(two, args, 0, n_rows, part.p);
        check_guards(&part, n_rows);
        check_same(what, part.p, out->p, out->n * out->ld - (out->ld - out->width));
    }
    op_single();
    for (int threads = one == two ? 2 : 1; threads <= 2; threads++)
        for (size_t c = 0; c < ARRAY_SIZE(batches); c++) {
            uint32_t n = batches[c], first = n < n_rows ? next_random() % (n_rows - n + 1) : 0;

            if (n > n_rows || (on_device && n == n_rows)) /* has just been repeated */
                break;
            array_mark(&part);
            run(threads == 1 ? one : two, args, first, n, part.p);
            check_guards(&part, n);
            for (uint32_t i = 0; i < n; i++)
                check_same(what, part.p + i * part.ld, out->p + (first + i) * out->ld, out->width);
        }
    array_free(&part);
}

struct packed packed_new(enum weight_type type, enum weight_layout layout, uint32_t n_out,
                         uint32_t n_in)
{
    struct packed p = {.w = {.type = type, .layout = layout, .n_out = n_out, .n_in = n_in}};
    float *x = malloc(n_in * sizeof(*x));
    int8_t *q = malloc(n_in);
    uint16_t *d = malloc((n_in / WEIGHT_BLOCK + 1) * sizeof(*d));
    int min = type == WEIGHT_Q4 ? -8 : -128, max = -min - 1;
    uint8_t *end;

    assert(weight_size(type, layout, n_out, n_in, &p.bytes) == 0);
    /* the last byte of the weight is the last byte of the allocation: a read beyond it is seen */
    p.data = aligned_alloc(64, ALIGN_UP(p.bytes, (size_t)64));
    assert(p.data && x && q && d);
    end = p.data + p.bytes;
    memset(p.data, 0, (size_t)(end - p.data));
    p.w.data = p.data;
    for (uint32_t r = 0; r < n_out; r++) {
        for (uint32_t k = 0; k < n_in; k++) {
            x[k] = uniform();
            q[k] = (int8_t)(r == 0   ? min
                            : r == 1 ? max
                                     : min + (int)(next_random() % (uint32_t)(max - min + 1)));
        }
        for (uint32_t b = 0; b < n_in / WEIGHT_BLOCK; b++)
            d[b] = half_from_float(b % 7 == 3 ? 0x1p-24f * (float)(next_random() % 9)
                                              : uniform() / 16);
        if (weight_type_is_quantized(type))
            weight_put_row_q(&p.w, p.data, r, q, d);
        else
            weight_put_row(&p.w, p.data, r, x);
    }
    free(x);
    free(q);
    free(d);
    return p;
}

struct weight packed_weights(const struct packed *p)
{
    struct weight w = p->w;

    w.data = op_weights(p->data, p->bytes);
    return w;
}

void packed_free(struct packed *p)
{
    free(p->data);
}

struct rows rows_new(uint32_t n, uint32_t k, enum rounding rounding)
{
    struct rows r = {.f32 = array_new(n, k, 3)};
    size_t ld_q = ALIGN_UP((size_t)k, (size_t)64), n_blocks = ld_q / WEIGHT_BLOCK;
    size_t odd = on_device ? 4 : 1; /* backend.h, struct activations */

    r.a = (struct activations){.n = n, .k = k, .f32 = r.f32.p, .ld = r.f32.ld};
    if (rounding != ROUND_NOT) {
        r.memory_bytes = n * (ld_q + n_blocks * 8) + 8 + 4;
        r.memory = op_alloc(r.memory_bytes);
        r.a.d = (float *)r.memory + 1;
        r.a.sum = (int32_t *)(r.a.d + n * n_blocks);
        r.a.q = (int8_t *)(r.a.sum + n * n_blocks) + odd;
        r.a.ld_q = ld_q;
    }
    if (rounding == ROUND_FINE) {
        r.low_bytes = n * (ld_q + n_blocks * 4) + 8 + 4;
        r.low = op_alloc(r.low_bytes);
        r.a.sum_low = (int32_t *)r.low + 1;
        r.a.q_low = (int8_t *)(r.a.sum_low + n * n_blocks) + odd;
    }
    return r;
}

void rows_free(struct rows *r)
{
    array_free(&r->f32);
    op_free(r->memory, r->memory_bytes);
    op_free(r->low, r->low_bytes);
}

void rows_fill(struct rows *r)
{
    for (uint32_t i = 0; i < r->a.n; i++)
        for (uint32_t k = 0; k < r->a.k; k++) {
            float v = uniform();

            switch (i % 11) {
            case 1: /* sparse, as behind a cut gate: whole blocks and single values are zero */
                v = k / 32 % 3 == 1 || next_random() % 16 ? 0 : v;
                break;
            case 2: /* rounds to the ends of the range everywhere */
                v = k % 64 < 32 || k & 1 ? 4 : -4;
                break;
            case 3:
                v = 0;
                break;
            case 4:
                v *= 1e4f;
                break;
            case 5:
                v *= 1e-40f;
                break;
            case 6:
                v = k % 32 == 5 ? -0.0f : v * 1e-6f;
                break;
            }
            r->f32.p[i * r->f32.ld + k] = v;
        }
}

struct activations rows_from(const struct activations *a, uint32_t first, uint32_t n)
{
    struct activations s = *a;

    s.n = n;
    s.f32 += first * s.ld;
    if (s.q) {
        s.q += first * s.ld_q;
        s.d += first * (s.ld_q / WEIGHT_BLOCK);
        s.sum += first * (s.ld_q / WEIGHT_BLOCK);
    }
    if (s.q_low) {
        s.q_low += first * s.ld_q;
        s.sum_low += first * (s.ld_q / WEIGHT_BLOCK);
    }
    return s;
}

static int backend_of_level(struct backend **ret, const char *level, uint32_t n_threads,
                            struct error *err)
{
#ifdef AMX_EMULATED
    int r;

    if (!__builtin_cpu_supports("gfni"))
        return error_set(err, EINVAL, "CPU level %s: this machine lacks gfni", level);
    r = backend_cpu_new(ret, "avx512", n_threads, &limits, err);
    if (r == 0) {
        struct cpu_backend *c = cpu_backend(*ret);

        cpu_use_amx_emulated(c);
        c->ops.name = level;
        assert(cpu_map_scratch(c) == 0);
    }
    return r;
#else
    return backend_cpu_new(ret, level, n_threads, &limits, err);
#endif
}

static int test_cpu(void (*tests)(void))
{
    struct error err = {{0}};
    int n_levels = 0;

    for (size_t i = 0; i < ARRAY_SIZE(level_names); i++) {
        int r = backend_of_level(&one, level_names[i], 1, &err);

        if (r == -EINVAL) {
            printf("%s\n", err.text);
            continue;
        }
        assert(r == 0);
        assert(backend_of_level(&two, level_names[i], 2, &err) == 0);
        assert(strcmp(two->ops->name, level_names[i]) == 0);
        printf("%s\n", two->ops->name);
        fflush(stdout);
        tests();
        one = backend_free(one);
        two = backend_free(two);
        n_levels++;
    }
    return n_levels ? 0 : NO_LEVEL;
}

static int test_vulkan(void (*tests)(void))
{
    const char *name = getenv("LLMD_TEST_DEVICE");

    on_device = true;
    for (int copies = 0; copies < 2; copies++) {
        struct vulkan_options options = {.name = name ? name : "llvmpipe", .copy_weights = copies};
        struct vulkan_device *device = NULL;
        struct error err = {{0}};
        bool shares;
        int r = vulkan_device_find(&device, &options, &err);

        if (r == -ENOSYS || r == -ENOENT || r == -ENODEV) {
            printf("%s\n", err.text);
            return 77;
        }
        assert(r == 0);
        assert(vulkan_device_open(device, &err) == 0);
        assert(backend_vulkan_new(&two, device, &limits, &err) == 0);
        assert(strcmp(two->ops->name, "vulkan") == 0);
        one = two;
        copies_weights = copies;
        shares = vulkan_device_shares(device) && !copies;
        printf("%s: %s, %s\n", vulkan_device_name(device),
               copies ? "weights copied" : "weights where they lie",
               shares ? "KV pages shared" : "KV pages of the driver's");
        fflush(stdout);
        pages_new(shares);
        tests();
        pages_free(shares);
        one = NULL;
        two = backend_free(two);
        vulkan_device_free(device);
        pieces_free(&told);
    }
    return 0;
}

int op_test_main(int argc, char **argv, void (*tests)(void))
{
    struct error err = {{0}};
    int r;

    assert(argc == 1 || (argc == 2 && strcmp(argv[1], "vulkan") == 0));
    assert(backend_cpu_new(&ref, "reference", 1, &limits, &err) == 0);
    r = argc == 1 ? test_cpu(tests) : test_vulkan(tests);
    ref = backend_free(ref);
    return r;
}

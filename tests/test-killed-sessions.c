/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A process that works on sessions in a tight loop is ended somewhere in the middle; another one
 * takes them back. Each has the tokens it had before the operation under way or those after it, and
 * goes on as a fresh session with these tokens.
 *
 * Twice: killed at random moments, with the real arithmetic; and stopped after each instruction,
 * with an arithmetic that writes into each position what it was computed from.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/session.h"
#include "tests/model-builder.h"
#include "tests/must.h"

#define N_SLOTS 4u
#define MOST_CONTEXT 600u

/* What the test knows of a slot, shared with the worker. The session has `before` or `after`
 * tokens of these; 0: or is not there. */
struct shadow {
    uint32_t tokens[MOST_CONTEXT];
    _Atomic uint32_t before, after;
};

struct shared {
    struct shadow slots[N_SLOTS];
    _Atomic uint64_t n_operations;
};

static struct model *model;
static uint32_t vocab, context, window, longest;
static uint64_t kv_bytes;
static struct shared *shared;
static void *memory[N_SLOTS];
static size_t memory_bytes;
static int pool_fd, spill_fds[N_SLOTS];

static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % n);
}

static struct engine *engine_with(int fd)
{
    struct engine_options o = {
        .n_threads = 1, .max_rows = 64, .kv_bytes = kv_bytes, .has_kv_fd = fd >= 0, .kv_fd = fd};
    struct engine *e;

    e = must_engine(model, &o);
    assert(engine_kv_adopted(e) == (fd >= 0));
    return e;
}

/* ---- the worker ---- */

struct worker {
    struct engine *e;
    struct session *s[N_SLOTS];
};

static void clear(void *m)
{
    *(volatile uint64_t *)m = 0; /* from here on it is nobody's */
    memset((char *)m + 8, 0, memory_bytes - 8);
}

/* The operation ends with n tokens in the slot; tokens are in the shadow. */
static void intend(uint32_t i, uint32_t n)
{
    atomic_store(&shared->slots[i].after, n);
}

static void done(uint32_t i)
{
    atomic_store(&shared->slots[i].before, atomic_load(&shared->slots[i].after));
}

static void take_back(struct worker *w)
{
    for (uint32_t i = 0; i < N_SLOTS; i++) {
        struct error err = {""};
        int r = session_adopt(&w->s[i], w->e, context, memory[i], &err);

        if (r < 0) {
            assert(r == -EBADMSG && *(uint64_t *)memory[i] == 0);
            w->s[i] = NULL;
            clear(memory[i]);
        }
        intend(i, w->s[i] ? session_n_tokens(w->s[i]) : 0);
        done(i);
    }
    engine_adopted(w->e);
}

/* A step of one or some sessions, each with new tokens or missing ones. */
static void work_step(struct worker *w, uint32_t first)
{
    struct step_item items[N_SLOTS];
    uint32_t slots[N_SLOTS], n = 0, room = engine_max_rows(w->e), before[N_SLOTS];

    for (uint32_t k = 0; k < N_SLOTS && room > 0; k++) {
        uint32_t i = (first + k) % N_SLOTS, rows = 1 + random_below(random_below(4) ? 4 : 64);
        struct session *s = w->s[i];

        if (!s || (k > 0 && random_below(2)))
            continue;
        before[n] = session_n_tokens(s);
        items[n] = (struct step_item){.session = s};
        if (session_n_missing(s) > 0 && random_below(3) > 0) {
            items[n].n_tokens = MIN(MIN(rows, room), session_n_missing(s));
        } else {
            rows = MIN(MIN(rows, room), longest - MIN(before[n], longest));
            if (rows == 0)
                continue;
            for (uint32_t t = 0; t < rows; t++)
                shared->slots[i].tokens[before[n] + t] = random_below(vocab);
            items[n].tokens = shared->slots[i].tokens + before[n];
            items[n].n_tokens = rows;
            intend(i, before[n] + rows);
        }
        room -= items[n].n_tokens;
        slots[n++] = i;
    }
    if (n == 0)
        return;
    assert(engine_step(w->e, items, n) == 0);
    for (uint32_t k = 0; k < n; k++) {
        if (items[k].ret_error < 0) {
            assert(items[k].ret_error == -ENOBUFS);
            intend(slots[k], before[k]);
            session_drop_kv(w->s[(slots[k] + 1) % N_SLOTS] ? w->s[(slots[k] + 1) % N_SLOTS]
                                                           : w->s[slots[k]]);
        }
        done(slots[k]);
    }
}

static void work_fork(struct worker *w, uint32_t from, uint32_t to)
{
    uint32_t n;

    if (!w->s[from] || w->s[to])
        return;
    n = session_n_tokens(w->s[from]);
    memcpy(shared->slots[to].tokens, shared->slots[from].tokens, n * sizeof(uint32_t));
    intend(to, n);
    assert(session_fork(&w->s[to], w->s[from], memory[to]) == 0);
    done(to);
}

static void work_on(struct worker *w, uint32_t i, uint32_t what)
{
    struct session *s = w->s[i];
    uint32_t n;

    if (!s) {
        if (what < 9 && random_below(2))
            work_fork(w, random_below(N_SLOTS), i);
        else
            assert(session_new(&w->s[i], w->e, context, memory[i]) == 0);
        return;
    }
    n = session_n_tokens(s);
    switch (what) {
    case 0:
        intend(i, random_below(n + 1));
        session_rewind(s, atomic_load(&shared->slots[i].after));
        done(i);
        break;
    case 1:
        intend(i, n > 20 ? n - random_below(20) : 0);
        session_rewind(s, atomic_load(&shared->slots[i].after));
        done(i);
        break;
    case 2:
        session_set_mark(s, random_below(3) ? n - n / 8 : SESSION_NO_MARK);
        break;
    case 3:
        session_drop_kv(s);
        break;
    case 4:
        intend(i, 0);
        w->s[i] = session_free(s);
        clear(memory[i]);
        done(i);
        break;
    case 5:
        (void)session_spill(s, spill_fds[i], kv_bytes / 16);
        break;
    case 6: /* of this session, or of one before it in the slot */
        if (session_n_missing(s) == n)
            (void)session_unspill(s, spill_fds[i], kv_bytes / 16);
        break;
    case 7:
        engine_give_back(w->e);
        break;
    case 8:
        if (n > 0)
            break;
        n = random_below(longest / 2);
        for (uint32_t t = 0; t < n; t++)
            shared->slots[i].tokens[t] = random_below(vocab);
        intend(i, n);
        assert(session_set_tokens(s, shared->slots[i].tokens, n) == 0);
        done(i);
        break;
    default:
        work_step(w, i);
        break;
    }
}

static void work(struct worker *w, uint64_t n)
{
    while (n-- > 0) {
        work_on(w, random_below(N_SLOTS), random_below(24));
        atomic_fetch_add(&shared->n_operations, 1);
    }
}

/* ---- what both parts begin and end with ---- */

static void begin(const char *path, const struct model_builder *b)
{
    struct engine *e;

    model_builder_write(b, path);
    vocab = b->config.vocab_size;
    window = b->config.window;
    model = must_open(path);
    e = engine_with(-1);
    memory_bytes = session_memory_bytes(model_config(engine_model(e)), context);
    pool_fd = fcntl(engine_kv_fd(e), F_DUPFD_CLOEXEC, 3);
    engine_free(e);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert(pool_fd >= 0 && shared != MAP_FAILED);
    for (uint32_t i = 0; i < N_SLOTS; i++) {
        memory[i] =
            mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        spill_fds[i] = memfd_create("spill", MFD_CLOEXEC);
        assert(memory[i] != MAP_FAILED && spill_fds[i] >= 0);
    }
}

static void end(const char *path)
{
    for (uint32_t i = 0; i < N_SLOTS; i++) {
        munmap(memory[i], memory_bytes);
        close(spill_fds[i]);
    }
    munmap(shared, sizeof(*shared));
    close(pool_fd);
    model = model_free(model);
    unlink(path);
}

/* The session in slot i, or NULL, is one that the worker had or was about to have. */
static void check_tokens(uint32_t i, const struct session *s)
{
    const struct shadow *sh = &shared->slots[i];
    uint32_t before = atomic_load(&sh->before), after = atomic_load(&sh->after);
    uint32_t n = s ? session_n_tokens(s) : 0;

    assert(n == before || n == after);
    if (n > 0)
        assert(memcmp(session_tokens(s), sh->tokens, n * sizeof(*sh->tokens)) == 0);
}

/* ---- killed at random ---- */

static void check_bits(struct session *s, struct engine *fresh_engine)
{
    CLEANUP(session_freep) struct session *fresh = NULL;
    CLEANUP(freep) float *got = calloc(vocab, sizeof(*got));
    uint32_t n = session_n_tokens(s);
    const uint32_t token = 7;
    const float *l;

    assert(session_eval(s, &token, 1, &l) == 0);
    memcpy(got, l, vocab * sizeof(*got));
    assert(session_new(&fresh, fresh_engine, context, NULL) == 0);
    assert(session_eval(fresh, session_tokens(s), n + 1, &l) == 0);
    assert(memcmp(got, l, vocab * sizeof(*got)) == 0);
    session_rewind(s, n);
}

static void work_until_killed(uint64_t seed)
{
    struct worker w = {.e = engine_with(pool_fd)};

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    random_state = seed;
    take_back(&w);
    work(&w, UINT64_MAX);
}

static void check_killed(const char *path)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};
    struct engine *fresh;
    uint32_t cached = 0, missing = 0;

    context = 512;
    longest = 400;
    kv_bytes = (uint64_t)2 << 20;
    model_builder_config(&b.config, 5, 5, 70);
    b.config.hidden = 32;
    b.config.head_dim = 16;
    begin(path, &b);
    fresh = engine_with(-1);
    for (uint32_t round = 0; round < 60; round++) {
        uint64_t target = atomic_load(&shared->n_operations) + random_below(60);
        uint32_t spins = random_below(300000);
        struct worker w = {0};
        siginfo_t info;
        pid_t pid = fork();
        uint64_t used = 0;
        struct engine_memory m;

        assert(pid >= 0);
        if (pid == 0) {
            work_until_killed(round);
            _exit(0);
        }
        while (atomic_load(&shared->n_operations) < target) {
            info.si_pid = 0;
            assert(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0);
            assert(info.si_pid == 0); /* a failed assertion in there */
        }
        for (volatile uint32_t k = 0; k < spins; k++)
            ;
        kill(pid, SIGKILL);
        assert(waitid(P_PID, (id_t)pid, &info, WEXITED) == 0);
        assert(info.si_code == CLD_KILLED && info.si_status == SIGKILL);

        w.e = engine_with(pool_fd);
        for (uint32_t i = 0; i < N_SLOTS; i++) {
            int r = session_adopt(&w.s[i], w.e, context, memory[i], NULL);

            assert(r == 0 || (r == -EBADMSG && *(uint64_t *)memory[i] == 0));
            w.s[i] = r == 0 ? w.s[i] : NULL;
            check_tokens(i, w.s[i]);
            if (w.s[i]) {
                missing += session_n_missing(w.s[i]);
                cached += session_n_tokens(w.s[i]) - session_n_missing(w.s[i]);
            }
        }
        engine_adopted(w.e);
        for (uint32_t i = 0; i < N_SLOTS; i++) {
            if (w.s[i])
                check_bits(w.s[i], fresh);
            if (w.s[i] && round % 2)
                session_drop_kv(w.s[i]); /* room for the next, and the count below */
        }
        engine_memory(w.e, &m);
        for (uint32_t i = 0; i < N_SLOTS; i++) {
            used += w.s[i] ? session_kv_bytes(w.s[i]) : 0;
            session_leave(w.s[i]);
        }
        assert(m.kv_bytes_used <= used && (used == 0) == (m.kv_bytes_used == 0));
        engine_free(w.e);
    }
    printf("killed after %llu operations; %u tokens with K and V, %u without\n",
           (unsigned long long)atomic_load(&shared->n_operations), cached, missing);
    assert(cached > missing && missing > 0);
    engine_free(fresh);
    end(path);
}

/* ---- stopped after each instruction ---- */

static struct engine *marked; /* whose steps write marks */
static bool traced;

/* Stands for K and V of a position: a check of what they depend on. */
static uint32_t mark_of(const struct session_memory *m, uint32_t layer, uint32_t pos)
{
    return session_memory_check(m, pos + 1) ^ (layer * 0x9e3779b1u);
}

static void no_quantize(struct backend *b, const struct activations *x)
{
    (void)b;
    (void)x;
}

static void no_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                      float *y, size_t ld_y)
{
    (void)b;
    (void)w;
    (void)x;
    (void)y;
    (void)ld_y;
}

/* The first operation of a pass: from here on nothing but activations changes, until store_marks()
 * has stored the last layer's. The parent lets that run. */
static void no_rows(struct backend *b, const struct weight *w, const uint32_t *ids, uint32_t n,
                    float scale, float *y, size_t ld_y)
{
    if (traced && w == &marked->weights->embed)
        raise(SIGUSR1);
    (void)b;
    (void)w;
    (void)ids;
    (void)n;
    (void)scale;
    (void)y;
    (void)ld_y;
}

#define NOTHING(name, type)                                   \
    static void name(struct backend *b, const struct type *a) \
    {                                                         \
        (void)b;                                              \
        (void)a;                                              \
    }
NOTHING(no_norm, norm_args)
NOTHING(no_head_norm, head_norm_args)
NOTHING(no_attention, attention_args)
NOTHING(no_gate, gate_args)
NOTHING(no_sparse_ffn, sparse_ffn_args)
NOTHING(no_predict, altup_predict_args)
NOTHING(no_correct, altup_correct_args)
NOTHING(no_stream_norm, stream_norm_args)
NOTHING(no_rescale, rescale_args)
NOTHING(no_copy_rows, copy_rows_args)
NOTHING(no_merge, merge_args)
NOTHING(no_ple, ple_args)

static void store_marks(struct backend *b, const struct kv_store_args *a)
{
    uint32_t layer = 0;

    (void)b;
    for (uint32_t i = 0; i < a->n; i++) {
        const struct kv_cache *kv = marked->lanes[LANE_CPU]->buf.rows[i].kv;
        uint32_t pos = a->rows[i].pos;

        layer = 0;
        while (kv->layers[layer].data != a->rows[i].pages)
            layer++;
        ((uint32_t *)a->rows[i].pages[pos / KV_PAGE])[pos % KV_PAGE] =
            mark_of(kv->memory, layer, pos);
    }
    if (traced && layer == marked->config->n_layers_kv - 1)
        raise(SIGUSR2);
}

static const struct backend_ops marking_ops = {
    .name = "marks",
    .quantize = no_quantize,
    .matmul = no_matmul,
    .get_rows = no_rows,
    .norm = no_norm,
    .head_norm = no_head_norm,
    .kv_store = store_marks,
    .attention = no_attention,
    .gate = no_gate,
    .sparse_ffn = no_sparse_ffn,
    .altup_predict = no_predict,
    .altup_correct = no_correct,
    .stream_norm = no_stream_norm,
    .rescale = no_rescale,
    .copy_rows = no_copy_rows,
    .merge = no_merge,
    .ple = no_ple,
};

static void work_with_marks(uint64_t seed, uint64_t n)
{
    struct worker w = {.e = engine_with(pool_fd)};
    struct backend backend;

    random_state = seed;
    take_back(&w);
    marked = w.e;
    backend = *engine_backend(w.e);
    backend.ops = &marking_ops;
    engine_set_backend(w.e, &backend);
    work(&w, 60); /* so that there is something to lose */
    for (uint32_t i = 0; i < 2; i++) {
        intend(i, 0);
        w.s[i] = session_free(w.s[i]);
        clear(memory[i]);
        done(i);
    }
    assert(session_new(&w.s[0], w.e, context, memory[0]) == 0);
    while (session_n_tokens(w.s[0]) < 150 || session_n_tokens(w.s[0]) % KV_PAGE == 0)
        work_step(&w, 0);
    assert(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
    traced = true;
    raise(SIGSTOP);
    work_fork(&w, 0, 1); /* within a page, which the next step copies */
    work_step(&w, 1);
    work(&w, n);
    _exit(0);
}

/* Everything shared, as it was when last looked at. */
struct seen {
    char *memory[N_SLOTS], *pool;
    size_t pool_bytes;
    char *now; /* the pool, mapped */
};

static bool changed(struct seen *s)
{
    bool r = false;

    for (uint32_t i = 0; i < N_SLOTS; i++)
        if (memcmp(s->memory[i], memory[i], memory_bytes) != 0) {
            memcpy(s->memory[i], memory[i], memory_bytes);
            r = true;
        }
    if (memcmp(s->pool, s->now, s->pool_bytes) != 0) {
        memcpy(s->pool, s->now, s->pool_bytes);
        r = true;
    }
    return r;
}

/* Takes back a copy of the sessions, as if the worker had ended here. Returns tokens cached. */
static uint32_t check_state(struct engine *e, char *copies[N_SLOTS], const struct seen *seen)
{
    struct session *s[N_SLOTS];
    struct kv_kind kind = *kv_pool_kind(e->pool);
    struct kv_shape shape = *kv_pool_shape(e->pool);
    struct kv_pool_options o = {.bytes_max = kv_bytes, .fd = pool_fd};
    uint32_t cached = 0;

    kv_pool_free(e->pool);
    assert(kv_pool_new(&e->pool, &shape, &kind, &o) == 0);
    assert(kv_pool_is_adopted(e->pool));
    for (uint32_t i = 0; i < N_SLOTS; i++) {
        int r;

        memcpy(copies[i], seen->memory[i], memory_bytes);
        r = session_adopt(&s[i], e, context, copies[i], NULL);
        assert(r == 0 || (r == -EBADMSG && *(uint64_t *)(void *)copies[i] == 0));
        s[i] = r == 0 ? s[i] : NULL;
        check_tokens(i, s[i]);
        if (!s[i])
            continue;
        cached += s[i]->n_cached;
        for (uint32_t l = 0; l < s[i]->kv.n_layers; l++) {
            uint32_t p = s[i]->n_cached;

            /* All that the next token will look at. */
            for (uint32_t left = s[i]->kv.layers[l].sliding ? window - 1 : p; left > 0 && p-- > 0;
                 left--)
                assert(((const uint32_t *)s[i]->kv.layers[l].data[p / KV_PAGE])[p % KV_PAGE] ==
                       mark_of(&s[i]->memory, l, p));
        }
        /* And what is there besides, back to where a rewind would find it complete. */
        for (uint32_t n = 0; n < s[i]->n_cached; n += 1 + n / 3)
            if (kv_cache_holds(&s[i]->kv, n))
                for (uint32_t l = 0; l < s[i]->kv.n_layers && n > 0; l++)
                    assert(
                        ((const uint32_t *)s[i]->kv.layers[l].data[(n - 1) / KV_PAGE])[(n - 1) %
                                                                                       KV_PAGE] ==
                        mark_of(&s[i]->memory, l, n - 1));
    }
    for (uint32_t i = 0; i < N_SLOTS; i++)
        session_free(s[i]);
    return cached;
}

static void check_each_instruction(const char *path, uint64_t n_operations)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};
    uint64_t n_steps = 0, n_states = 0, cached = 0;
    char *copies[N_SLOTS];
    struct engine *e;
    struct seen seen;
    int status;
    pid_t pid;

    context = 256;
    longest = 250;
    model_builder_config(&b.config, 5, 5, 10);
    b.config.hidden = 2;
    b.config.ple_width = 2;
    b.config.laurel_rank = 1;
    b.config.head_dim = 2;
    b.config.n_heads = b.config.n_heads_kv = 1;
    b.config.n_streams = 2;
    for (uint32_t l = 0; l < b.config.n_layers; l++)
        b.config.layers[l] = (struct layer_config){.ffn_width = 2, .sliding = l != 4};
    kv_bytes = 40 * kv_page_bytes(&(struct kv_shape){1, 2, true});
    begin(path, &b);
    e = engine_with(pool_fd);
    seen.pool_bytes = kv_bytes;
    seen.now = kv_pool_data(e->pool, 0);
    seen.now = mmap(NULL, kv_bytes, PROT_READ, MAP_SHARED, pool_fd, 2 << 20);
    seen.pool = calloc(1, kv_bytes);
    assert(seen.now != MAP_FAILED);
    for (uint32_t i = 0; i < N_SLOTS; i++) {
        seen.memory[i] = calloc(1, memory_bytes);
        copies[i] = aligned_alloc(4096, memory_bytes);
    }

    pid = fork();
    assert(pid >= 0);
    if (pid == 0)
        work_with_marks(5, n_operations);
    assert(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    while (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0 && waitpid(pid, &status, 0) == pid &&
           WIFSTOPPED(status)) {
        if (WSTOPSIG(status) == SIGUSR1) {
            assert(ptrace(PTRACE_CONT, pid, NULL, NULL) == 0);
            assert(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
            assert(WSTOPSIG(status) == SIGUSR2);
        } else if (WSTOPSIG(status) != SIGTRAP) { /* an assertion that failed */
            kill(pid, SIGKILL);
            abort();
        }
        n_steps++;
        if (!changed(&seen))
            continue;
        n_states++;
        cached += check_state(e, copies, &seen);
    }
    assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    printf("%llu instructions, %llu states, %llu tokens cached on average\n",
           (unsigned long long)n_steps, (unsigned long long)n_states,
           (unsigned long long)(cached / MAX(n_states, (uint64_t)1)));
    assert(n_states > 8 * n_operations && cached > 20 * n_states);
    for (uint32_t i = 0; i < N_SLOTS; i++) {
        free(seen.memory[i]);
        free(copies[i]);
    }
    munmap(seen.now, kv_bytes);
    free(seen.pool);
    engine_free(e);
    end(path);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    assert(argc == 2 || argc == 3);
    random_state = 1;
    check_killed(argv[1]);
    check_each_instruction(argv[1], argc == 3 ? strtoull(argv[2], NULL, 10) : 25);
    return 0;
}

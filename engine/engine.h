/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * engine: a model on the processor, and on a GPU beside it where there is one, with the pool of KV
 * pages that both work on. Each of the two is a lane: a backend, with the memory of a step of its
 * own. Any lane may do any session's next step; each lane has one under way at a time.
 * session: one timeline, that is tokens so far and their KV cache.
 *
 * Engine thread only: one thread, the same for every call on an engine and its sessions, because it
 * is the one that the backend's threads work for. engine_options are checked, nothing here logs.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct backend;
struct engine;
struct model;
struct model_config;
struct session;
struct vulkan_device;

enum activation_type {
    ACTIVATIONS_AUTO, /* the default: int8 on the processor, f32 on a GPU */
    ACTIVATIONS_INT8, /* q4 and q8 weights meet activations rounded to 8 bits in blocks of 32, but
                         for the matrices of Q and K */
    ACTIVATIONS_F32,  /* the definition */
};

enum engine_lane {
    LANE_CPU,
    LANE_GPU,
};
#define ENGINE_LANES 2

#define ENGINE_IDENTITY 32

enum kv_type {
    KV_AUTO, /* as exact as the home lane's activations: f32 with f32, f16 with int8 */
    KV_F16,
    KV_F32,
};

struct engine_options {
    enum activation_type activations; /* the processor's */
    enum activation_type gpu_activations;
    enum kv_type kv_type;
    const char *cpu_level; /* cap: "reference", "avx2", "avx512", "amx"; NULL: the best there is */
    uint32_t n_threads;    /* 0: one for each core this process may use */
    bool no_pinning;       /* threads may move between cores; else see backend_cpu_pin() */
    uint32_t max_rows;     /* tokens in one step; 0: 256; a GPU's steps have at most 64, since its
                              activations are memory of its own */
    uint32_t max_logits;   /* wanted rows in one step; 0: 16 */
    uint64_t kv_bytes;     /* budget of the page pool; 0: a quarter of physical memory, or of
                              RLIMIT_AS or RLIMIT_FSIZE where that is less */
    bool has_kv_fd;
    int kv_fd; /* the pool of a process before this one; taken back where it fits, else a new one is
                  made. Stays the caller's. */
    const uint8_t *kv_identity; /* [ENGINE_IDENTITY]: of the model, so that K and V never meet
                                   another's weights; NULL: zeros */
    struct vulkan_device *gpu; /* whose lane engine_add_gpu() adds; outlives the engine; NULL: none.
                                  Opened by engine_new(): where that fails, the lane will */
    enum engine_lane home;     /* what engine_step() and session_eval() use */
};

/* m must outlive the engine. 0, -EINVAL (err names the option), -ENOMEM */
int engine_new(struct engine **ret, const struct model *m, const struct engine_options *options,
               struct error *err);
struct engine *engine_free(struct engine *e); /* all sessions must be gone */
void engine_freep(struct engine **e);

const struct model *engine_model(const struct engine *e);
uint32_t engine_max_rows(const struct engine *e); /* the home lane's */
uint32_t engine_lane_max_rows(const struct engine *e, enum engine_lane lane);
uint32_t engine_max_logits(const struct engine *e);

/*
 * The GPU's lane: backend and buffers; the weights are mapped, which may take as long as reading
 * the model. 0; -EALREADY; -ENOENT: no options.gpu; -errno, err says why: the engine goes on
 * without
 */
int engine_add_gpu(struct engine *e, struct error *err);
bool engine_may_add_gpu(const struct engine *e); /* again: it has not hung, nor does the pool lie in
                                                    a lost one's memory. False: there is none */
bool engine_has_gpu(const struct engine *e);     /* also where it has failed, until it is removed */

/* After -ENODEV, or when it is not wanted any more. Waits for a pass under way, whose results
 * count; engine_end() still reports them, but without logits. */
void engine_remove_gpu(struct engine *e);

/* What the GPU's lane computes with, when it is added the next time: another than the options said.
 * It is not there. */
void engine_set_gpu_activations(struct engine *e, enum activation_type a);
enum activation_type engine_gpu_activations(const struct engine *e);

/* What executes a lane's operations; NULL: there is no such lane. */
struct backend *engine_lane_backend(const struct engine *e, enum engine_lane lane);

/* Why the lane answers -ENODEV, in words for people, until it is removed; NULL: it does not. */
const char *engine_lane_failure(const struct engine *e, enum engine_lane lane);

struct engine_memory {
    uint64_t kv_bytes_used, kv_bytes_max; /* pages in use; budget */
    uint64_t scratch_bytes;               /* activations and the backend's own */
};
void engine_memory(const struct engine *e, struct engine_memory *ret);

/*
 * The pool is one memfd, sealed in its size. Whoever holds it may start another engine with it
 * (engine_options.kv_fd), once this process is gone: K and V are then there still.
 */
int engine_kv_fd(const struct engine *e); /* the engine's; negative: K and V lie in memory of a GPU
                                             that sees no other, and go with the process */

/* options.kv_fd was taken: same identity, page geometry, number of pages and arithmetic. */
bool engine_kv_adopted(const struct engine *e);

/*
 * After session_adopt() for all there are: pages that no session holds are free, their memory goes
 * back to the system. Until then an adopted pool gives out no page: engine_step() and
 * session_unspill() are -EINVAL. Nothing where no pool was adopted.
 */
void engine_adopted(struct engine *e);

/*
 * The memory of free pages goes back to the system; where a GPU sees them, that of stretches of
 * some MiB of which no page is in use. May wait for the GPU's step. Returns bytes.
 */
uint64_t engine_give_back(struct engine *e);

/*
 * For whoever measures: what executes the home lane's operations, and another one that does from
 * now on, by giving each to the first. Memory stays the first one's, which must be back before
 * engine_free().
 */
struct backend *engine_backend(const struct engine *e);
void engine_set_backend(struct engine *e, struct backend *b);

/* The most of the pool that a session takes on its way to n tokens, a mark included. */
uint64_t engine_kv_bytes(const struct engine *e, uint32_t n_tokens);

/* What runs, for people and logs: "cpu/avx2, 2 threads, int8 activations, f16 KV". */
const char *engine_description(const struct engine *e);

/*
 * What must outlive a process of a session (tokens, page tables) is in `memory`: zeroed, aligned to
 * pages, [session_memory_bytes()], the caller's until the session is freed; MAP_SHARED, if another
 * process shall take it over. NULL: memory of its own. It costs what is used of it.
 */
size_t session_memory_bytes(const struct model_config *c, uint32_t n_ctx); /* as session_new()'s */

/*
 * n_ctx: most tokens the session may hold; 0: the model's. Pages are taken as tokens arrive.
 * 0, -EINVAL: n_ctx above the model's, -ENOMEM
 */
int session_new(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory);
struct session *session_free(struct session *s); /* its memory keeps the tokens, but no K and V */
void session_freep(struct session **s);

/* As session_free(), but memory and pages stay as they are, and the pages are not given to anybody
 * until engine_free(): for tests, where it stands for a process that has gone. The daemon's ends.
 */
struct session *session_leave(struct session *s);

/* A second session with the same tokens; pages are shared until one of the two writes. */
int session_fork(struct session **ret, struct session *s, void *memory);

/*
 * A session from memory that a process left behind, killed at any instruction. It has the tokens
 * that were known then, or, of a session_rewind() or session_set_tokens() cut short, those before.
 * Its K and V are there where the pool was adopted and they had been complete; else they are
 * missing, so the next steps compute the same bits again. n_ctx as it was made with.
 * 0; -EBADMSG: not such memory, or damaged: err says where; nothing is changed then; -ENOMEM
 */
int session_adopt(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory,
                  struct error *err);

/*
 * Forgets all tokens from position n on (n <= session_n_tokens()). Where the sliding layers no
 * longer hold the window before n, the next step recomputes it from the tokens kept: exact, and
 * besides session_drop_kv() the only case in which a token is ever computed twice.
 */
void session_rewind(struct session *s, uint32_t n);

/*
 * A position that session_rewind() can return to without recomputing, however long ago: where a
 * request began, until it is over. SESSION_NO_MARK takes it away. At most session_n_tokens().
 */
#define SESSION_NO_MARK UINT32_MAX
void session_set_mark(struct session *s, uint32_t n);

/*
 * All pages go back to the pool (those of forks stay theirs); tokens and mark stay. Whatever comes
 * after is the same bits, once the missing tokens have been computed again: step_item.
 */
void session_drop_kv(struct session *s);
uint32_t session_n_missing(const struct session *s); /* tokens, behind which none is cached */
uint64_t session_kv_bytes(const struct session *s);  /* of its pages, shared ones in full */

/*
 * An empty session's tokens, as if they had been evaluated: all of them are missing (see
 * session_drop_kv()). 0, -EINVAL: not empty, or a token outside the vocabulary, -EMSGSIZE, -ENOMEM;
 * then nothing has changed
 */
int session_set_tokens(struct session *s, const uint32_t *tokens, uint32_t n);

/*
 * K and V to a file, and back from it, bit by bit; tokens stay. The file begins at offset 0, and is
 * of this engine's identity and arithmetic and of these tokens. Both do n_bytes at most at a time,
 * but at least one page: 1: call again, with the same fd; 0: done. What happens to the session
 * between two calls does no harm: what was done so far was then in vain, and it begins anew.
 *
 * session_spill(): pages go when all of it is written. -errno of the writes (-ENOSPC): the session
 * is as before; no file is synced.
 * session_unspill(): for a session without K and V (-EINVAL). Nothing of the file counts before its
 * end has been checked. -ENOBUFS: the pool is full; -EBADMSG: not such a file, damaged, or of other
 * tokens: it is useless, and what it held is computed again as needed; -ENOMEM, -errno of the reads
 */
int session_spill(struct session *s, int fd, uint64_t n_bytes);
int session_unspill(struct session *s, int fd, uint64_t n_bytes);

/*
 * In a pass under way: what is asked about such a session is answered as if the pass had not been
 * begun. Every call that changes it, or copies it, waits for the pass first and keeps its results;
 * engine_end() then only reports them.
 */
bool session_is_busy(const struct session *s);

/*
 * By whom its K and V were computed, bits 1 << lane: of all since they were last dropped, some of
 * which a session_rewind() may have taken back. LANES_CHANGED: by a GPU with other activations than
 * the engine's options had, see engine_set_gpu_activations(); the next engine's K and V need not be
 * like them, though device and options are the same. Kept across forks, files and processes.
 */
#define LANES_CHANGED (1u << ENGINE_LANES)
unsigned session_lanes(const struct session *s);

uint32_t session_n_tokens(const struct session *s);
uint32_t session_n_ctx(const struct session *s);
const uint32_t *session_tokens(const struct session *s); /* [session_n_tokens()], until next step */
struct engine *session_engine(const struct session *s);

enum logits_wanted {
    LOGITS_NONE,
    LOGITS_LAST,
    LOGITS_ALL,
};

/* One session's share of a step. A session may appear once in a step. */
struct step_item {
    struct session *session;
    const uint32_t *tokens; /* [n_tokens], the next ones; each < vocab_size.
                               NULL: the first n_tokens of those missing are computed again;
                               wanted is then LOGITS_NONE */
    uint32_t n_tokens;      /* at least 1; of missing ones at most session_n_missing() */
    enum logits_wanted wanted;
    const float *ret_logits; /* [wanted rows][vocab_size], softcapped; the lane's until its next
                                step; NULL: none wanted, or the item was not evaluated */
    int ret_error;           /* 0; -EMSGSIZE: passes n_ctx; -ENOBUFS: the pool is full;
                                -EINVAL: a token outside the vocabulary; -ENOMEM.
                                Such an item was not evaluated and its session is unchanged. */
};

/*
 * On the home lane. Evaluates the tokens of all items, together at most max_rows and max_logits
 * wanted rows. Not counted is what a session must recompute before its item's new tokens, which is
 * done in pieces: it is nothing where the driver has given items without tokens before. In f32
 * mode, and in int8 mode, what one session gets does not depend on the other items. 0: look at each
 * ret_error; -EINVAL: too many rows, a session twice, more to be computed again than is missing;
 * -ENODEV: the device is lost; -ENOTRECOVERABLE: the model's file has changed
 * (model_file_is_intact()), now and from now on. Of a step that failed nothing is kept: no session
 * has changed, but for what was missing and has been computed again before
 */
int engine_step(struct engine *e, struct step_item *items, size_t n_items);

/*
 * The same in two halves, on any lane: two steps may be under way at once, one on each, of
 * different sessions. The processor's is over when engine_start() returns; a GPU works on alone.
 * Items and their tokens stay, untouched, until engine_end(). What must be recomputed before an
 * item's new tokens is waited for within engine_start(), and so is a pass under way that one of the
 * sessions is in.
 *
 * engine_start(): 0: under way, engine_end() must follow; or what engine_step() returns, and
 * -EBUSY: the lane has a step under way; -ENODEV: also where there is no such lane
 * engine_wait(): 0: over, well or not; -ETIMEDOUT: not yet
 * engine_end(): waits if needed. What engine_step() returns. After -ENODEV the same items can be
 * given to the other lane; pages that the device was to write are not used again by this process
 */
int engine_start(struct engine *e, enum engine_lane lane, struct step_item *items, size_t n_items);
int engine_wait(struct engine *e, enum engine_lane lane, uint64_t timeout_usec);
int engine_end(struct engine *e, enum engine_lane lane);

/*
 * The whole of tokens[n] through one session, in chunks of at most max_rows: for tools and tests.
 * Logits of the last token in *ret_logits if that is not NULL. 0 or an item's error
 */
int session_eval(struct session *s, const uint32_t *tokens, size_t n, const float **ret_logits);

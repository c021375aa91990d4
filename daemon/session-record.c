/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/session-record.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/sealed-memory.h"
#include "daemon/kept.h"
#include "engine/engine.h"
#include "engine/model-config.h"

#define MAGIC "llmd-kept-sess\n"
#define VERSION 1u

/* What never changes. */
struct head {
    char magic[16];
    uint32_t version, context;
    uint64_t id, created_usec, engine_bytes;
    uint32_t uid, class, linger, label_bytes;
    uint8_t model[SAVED_MODEL_BYTES];
    char label[ALIGN_UP(LLM_LABEL_BYTES_MAX, 8u)];
    uint64_t check; /* of all before */
};

struct state_slot {
    uint32_t n_tokens, position, has_tail, tail;
    uint64_t last_request, prompt_tokens, completion_tokens;
};

struct owner_slot {
    uint64_t kind, connection;
    char name[256];
};

struct page {
    struct head head;
    _Atomic uint64_t state_sequence, owner_sequence;
    uint64_t state[KEPT_SLOTS(sizeof(struct state_slot))];
    uint64_t owner[KEPT_SLOTS(sizeof(struct owner_slot))];
    _Atomic uint32_t has_engine, closed;
};
_Static_assert(sizeof(struct page) <= KEPT_ALIGN, "the engine's part begins there");
_Static_assert(sizeof(struct state_slot) % 8 == 0 && sizeof(struct owner_slot) % 8 == 0, "");

struct session_record {
    struct session_facts facts;
    int fd;
    struct page *page; /* mapped */
    size_t mapped_bytes;
};

static uint64_t check_of(const struct head *h)
{
    return kept_check(0, h, offsetof(struct head, check));
}

static int size_for(size_t engine_bytes, size_t *ret)
{
    size_t n;

    if (ckd_add(&n, engine_bytes, KEPT_ALIGN) || ckd_align(ret, n, KEPT_ALIGN) ||
        *ret > PTRDIFF_MAX)
        return -EOVERFLOW;
    return 0;
}

struct session_record *session_record_free(struct session_record *r)
{
    if (!r)
        return NULL;
    if (r->page)
        munmap(r->page, r->mapped_bytes);
    closep(&r->fd);
    free(r);
    return NULL;
}

void session_record_freep(struct session_record **r)
{
    *r = session_record_free(*r);
}

static int map(struct session_record *r, size_t n)
{
    r->page = kept_map(r->fd, n);
    if (!r->page)
        return -ENOMEM;
    r->mapped_bytes = n;
    return 0;
}

int session_record_new(struct session_record **ret, const struct session_facts *facts,
                       const struct owner_name *owner, size_t engine_bytes)
{
    CLEANUP(session_record_freep) struct session_record *r = calloc(1, sizeof(*r));
    struct head *h;
    size_t n;
    int e;

    if (!r)
        return -ENOMEM;
    r->fd = -EBADF;
    r->facts = *facts;
    e = size_for(engine_bytes, &n);
    if (e < 0)
        return e;
    r->fd = sealed_memory_new("llmd-session", n);
    if (r->fd < 0)
        return r->fd;
    /* Where there is no memory for it, that is told here, and not by a signal later. */
    e = posix_fallocate(r->fd, 0, sizeof(struct page));
    if (e > 0)
        return -e;
    e = map(r, n);
    if (e < 0)
        return e;
    h = &r->page->head;
    memcpy(h->magic, MAGIC, sizeof(h->magic));
    h->version = VERSION;
    h->context = facts->context;
    h->id = facts->id;
    h->created_usec = facts->created_usec;
    h->engine_bytes = engine_bytes;
    h->uid = facts->uid;
    h->class = (uint32_t)facts->class;
    h->linger = facts->linger;
    h->label_bytes = (uint32_t)strlen(facts->label);
    memcpy(h->model, facts->model, sizeof(h->model));
    memcpy(h->label, facts->label, h->label_bytes);
    h->check = check_of(h);
    session_record_set_owner(r, owner);
    *ret = TAKE_PTR(r);
    return 0;
}

static int unsound(struct error *err, const char *what)
{
    return error_set(err, EBADMSG, "the record is not sound: %s", what);
}

/* The size of the engine's part is asked for only when all that it depends on is known to hold. */
static int read_head(struct session_record *r, uint64_t size,
                     const uint8_t model[SAVED_MODEL_BYTES], const struct model_config *c,
                     struct error *err)
{
    struct head h;
    size_t want;

    if (size < KEPT_ALIGN || pread(r->fd, &h, sizeof(h), 0) != (ssize_t)sizeof(h))
        return unsound(err, "it is too short");
    if (memcmp(h.magic, MAGIC, sizeof(h.magic)) != 0)
        return unsound(err, "it is no session's");
    if (h.version != VERSION)
        return error_set(err, EBADMSG, "the record is of version %" PRIu32 ", this llmd has %u",
                         h.version, VERSION);
    if (h.check != check_of(&h))
        return unsound(err, "the head is damaged");
    if (memcmp(h.model, model, sizeof(h.model)) != 0)
        return error_set(err, ESTALE, "the session is of another model");
    if (h.id == 0 || h.context == 0 || h.context > c->context_max || h.class > CLASS_IDLE ||
        h.linger > 1 || h.label_bytes > LLM_LABEL_BYTES_MAX || memchr(h.label, 0, h.label_bytes))
        return unsound(err, "the head has a value that cannot be");
    if (h.engine_bytes != session_memory_bytes(c, h.context) ||
        size_for(h.engine_bytes, &want) < 0 || size != want)
        return unsound(err, "its size is another");
    r->facts = (struct session_facts){
        .id = h.id,
        .uid = h.uid,
        .context = h.context,
        .class = (enum scheduler_class)h.class,
        .linger = h.linger,
        .created_usec = h.created_usec,
    };
    memcpy(r->facts.model, h.model, sizeof(h.model));
    memcpy(r->facts.label, h.label, h.label_bytes);
    return 0;
}

int session_record_open(struct session_record **ret, int fd, const uint8_t model[SAVED_MODEL_BYTES],
                        const struct model_config *c, struct error *err)
{
    CLEANUP(session_record_freep) struct session_record *r = calloc(1, sizeof(*r));
    uint64_t size;
    int e;

    if (!r) {
        close(fd);
        return error_set(err, ENOMEM, "out of memory");
    }
    r->fd = fd;
    if (sealed_memory_check(fd, &size) < 0)
        return unsound(err, "it is no sealed memory");
    e = read_head(r, size, model, c, err);
    if (e < 0)
        return e;
    e = map(r, (size_t)size);
    if (e < 0)
        return error_set(err, -e, "out of memory");
    *ret = TAKE_PTR(r);
    return 0;
}

const struct session_facts *session_record_facts(const struct session_record *r)
{
    return &r->facts;
}

int session_record_fd(const struct session_record *r)
{
    return r->fd;
}

void session_record_close_fd(struct session_record *r)
{
    closep(&r->fd);
    r->fd = -EBADF;
}

void *session_record_memory(const struct session_record *r)
{
    return (char *)r->page + KEPT_ALIGN;
}

int session_record_clear_memory(struct session_record *r)
{
    if (fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, KEPT_ALIGN,
                  (off_t)(r->mapped_bytes - KEPT_ALIGN)) < 0)
        return -errno;
    return 0;
}

void session_record_set_closed(struct session_record *r)
{
    atomic_store_explicit(&r->page->closed, 1, memory_order_release);
}

bool session_record_closed(const struct session_record *r)
{
    return atomic_load_explicit(&r->page->closed, memory_order_acquire) != 0;
}

void session_record_set_has_engine(struct session_record *r)
{
    atomic_store_explicit(&r->page->has_engine, 1, memory_order_release);
}

bool session_record_has_engine(const struct session_record *r)
{
    return atomic_load_explicit(&r->page->has_engine, memory_order_acquire);
}

void session_record_commit(struct session_record *r, const struct session_state *state)
{
    struct state_slot slot = {
        .n_tokens = state->n_tokens,
        .position = (uint32_t)state->position,
        .has_tail = state->has_tail,
        .tail = state->has_tail ? state->tail : 0,
        .last_request = state->last_request,
        .prompt_tokens = state->prompt_tokens,
        .completion_tokens = state->completion_tokens,
    };

    kept_commit(&r->page->state_sequence, r->page->state, &slot, sizeof(slot));
}

int session_record_state(const struct session_record *r, struct session_state *ret)
{
    struct state_slot slot;
    int e = kept_read(&r->page->state_sequence, r->page->state, &slot, sizeof(slot));

    if (e < 0)
        return e;
    if (slot.n_tokens > r->facts.context || slot.position >= CHAT_N_POSITIONS || slot.has_tail > 1)
        return -EBADMSG;
    *ret = (struct session_state){
        .n_tokens = slot.n_tokens,
        .position = (enum chat_position)slot.position,
        .has_tail = slot.has_tail,
        .tail = slot.tail,
        .last_request = slot.last_request,
        .prompt_tokens = slot.prompt_tokens,
        .completion_tokens = slot.completion_tokens,
    };
    return 0;
}

void session_record_set_owner(struct session_record *r, const struct owner_name *owner)
{
    struct owner_slot slot = {.kind = (uint64_t)owner->kind, .connection = owner->connection};

    if (owner->kind == OWNER_NAME)
        memcpy(slot.name, owner->name, strnlen(owner->name, sizeof(slot.name) - 1));
    kept_commit(&r->page->owner_sequence, r->page->owner, &slot, sizeof(slot));
}

int session_record_owner(const struct session_record *r, struct owner_name *ret)
{
    struct owner_slot slot;
    int e = kept_read(&r->page->owner_sequence, r->page->owner, &slot, sizeof(slot));

    if (e < 0)
        return -EBADMSG;
    if (slot.kind > OWNER_NAME || !memchr(slot.name, 0, sizeof(slot.name)))
        return -EBADMSG;
    *ret = (struct owner_name){.kind = (enum owner_kind)slot.kind, .connection = slot.connection};
    memcpy(ret->name, slot.name, sizeof(ret->name));
    return 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The file, of which what is not written takes no memory:
 *
 *     0           head, words and commits        mapped
 *     64 Ki       ids of the tokens sampled      mapped
 *     asked_at    what was asked                 written once, read once
 *     log_at      the stream's bytes             pwrite(), sendfile()
 *
 * The log is not mapped: a write that finds no memory is then an error and not a signal. What has
 * been sent is given back to the system, but for what may lie in the socket still: sendfile() puts
 * the very pages there.
 */

#include "daemon/request-record.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/sealed-memory.h"
#include "base/whole-io.h"
#include "daemon/kept.h"
#include "daemon/request-bytes.h"
#include "ipc/names.h"
#include "ipc/record.h"

#define MAGIC "llmd-kept-reqst"
#define VERSION 1u

/* Nobody says so much. */
#define LOG_BYTES_MAX (UINT64_C(64) << 30)
#define LOG_BYTES_LEAST (UINT64_C(1) << 20)

/* Beyond the bounds of each of its parts, which request_bytes_read() keeps. */
#define ASKED_BYTES_MAX (UINT64_C(2) * LLM_PROMPT_BYTES_MAX)

#define SPARE_AT 4096u

#define PUNCH_BYTES (256u * 1024)
#define SEND_BYTES (1u << 20) /* at once */

/* What never changes. */
struct head {
    char magic[16];
    uint32_t version, n_ctx;
    uint64_t id, session;
    uint64_t asked_at, asked_bytes, asked_check;
    uint64_t log_at, log_max;
    uint32_t n_tokens, position, has_tail, tail; /* before */
    uint32_t is_text;                            /* of its format, no records */
    uint32_t uid;
    uint64_t check; /* of all before */
};

struct slot {
    uint64_t log_bytes, ids_check;
    uint32_t n_sampled, phase;
    struct generation_state generation;
    uint32_t n_tokens, position, has_tail, tail; /* after */
    uint32_t prompt_tokens, completion_tokens, cached_tokens, reserved;
};

struct page {
    struct head head;
    _Atomic uint32_t stopped, replied, working, n_recovered;
    uint64_t progress; /* when it was last taken back */
    _Atomic uint64_t sequence;
    uint64_t slots[KEPT_SLOTS(sizeof(struct slot))];
    /* On a page of its own: where the first is damaged, it says what the client is to hear. */
    _Alignas(SPARE_AT) struct head spare;
};
_Static_assert(offsetof(struct page, spare) == SPARE_AT, "");
_Static_assert(sizeof(struct page) <= KEPT_ALIGN, "the ids begin there");
_Static_assert(sizeof(struct slot) % 8 == 0, "");

struct request_record {
    int fd;
    struct page *page; /* mapped */
    uint32_t *ids;     /* [n_ctx], behind it */
    size_t mapped_bytes;
    struct request_facts facts;
    struct request_before before;
    uint64_t asked_at, asked_bytes, asked_check, log_at, log_max; /* copies of ours */
    bool is_text;
    uint32_t n_checked;           /* ids */
    uint64_t ids_check;           /* of them */
    bool was_committed;           /* when it was opened */
    struct request_commit commit; /* and what */
    uint64_t punched;             /* bytes of the log given back */
};

static uint64_t check_of(const struct head *h)
{
    return kept_check(0, h, offsetof(struct head, check));
}

/* Where the parts lie. 0, -EOVERFLOW */
static int lay_out(uint32_t n_ctx, uint64_t asked_bytes, struct head *h, uint64_t *ret_size)
{
    struct rlimit limit;
    size_t end;

    if (asked_bytes > ASKED_BYTES_MAX)
        return -EOVERFLOW;
    h->asked_at = ALIGN_UP(KEPT_ALIGN + (uint64_t)n_ctx * sizeof(uint32_t), (uint64_t)KEPT_ALIGN);
    h->asked_bytes = asked_bytes;
    if (ckd_align(&end, h->asked_at + asked_bytes, KEPT_ALIGN))
        return -EOVERFLOW;
    h->log_at = end;
    h->log_max = LOG_BYTES_MAX;
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < h->log_at + h->log_max) {
        if (limit.rlim_cur < h->log_at + LOG_BYTES_LEAST)
            return -EOVERFLOW;
        h->log_max = limit.rlim_cur - h->log_at;
    }
    *ret_size = h->log_at + h->log_max;
    return 0;
}

static int map(struct request_record *r, const struct head *h)
{
    r->mapped_bytes = (size_t)h->asked_at;
    r->page = kept_map(r->fd, r->mapped_bytes);
    if (!r->page)
        return -ENOMEM;
    r->ids = (uint32_t *)((char *)r->page + KEPT_ALIGN);
    r->facts = (struct request_facts){
        .id = h->id, .session = h->session, .uid = h->uid, .n_ctx = h->n_ctx};
    r->before = (struct request_before){.n_tokens = h->n_tokens,
                                        .position = (enum chat_position)h->position,
                                        .has_tail = h->has_tail,
                                        .tail = h->tail};
    r->asked_at = h->asked_at;
    r->asked_bytes = h->asked_bytes;
    r->asked_check = h->asked_check;
    r->log_at = h->log_at;
    r->log_max = h->log_max;
    r->is_text = h->is_text;
    return 0;
}

struct request_record *request_record_free(struct request_record *r)
{
    if (!r)
        return NULL;
    if (r->page)
        munmap(r->page, r->mapped_bytes);
    closep(&r->fd);
    free(r);
    return NULL;
}

void request_record_freep(struct request_record **r)
{
    *r = request_record_free(*r);
}

static int fill(struct request_record *r, const struct request_facts *facts,
                const struct request_before *before, bool is_text, const struct buffer *asked)
{
    struct head h = {
        .version = VERSION,
        .n_ctx = facts->n_ctx,
        .id = facts->id,
        .session = facts->session,
        .uid = facts->uid,
        .asked_check = kept_check(0, asked->data, asked->n),
        .n_tokens = before->n_tokens,
        .position = (uint32_t)before->position,
        .has_tail = before->has_tail,
        .tail = before->tail,
        .is_text = is_text,
    };
    uint64_t size;
    int e;

    memcpy(h.magic, MAGIC, sizeof(h.magic));
    e = lay_out(facts->n_ctx, asked->n, &h, &size);
    if (e < 0)
        return e;
    h.check = check_of(&h);
    r->fd = sealed_memory_new("llmd-request", size);
    if (r->fd < 0)
        return r->fd;
    e = posix_fallocate(r->fd, 0, sizeof(struct page));
    if (e > 0)
        return -e;
    e = map(r, &h);
    if (e >= 0)
        e = write_whole(r->fd, asked->data, asked->n, h.asked_at);
    if (e < 0)
        return e;
    if (lseek(r->fd, (off_t)h.log_at, SEEK_SET) < 0)
        return -errno;
    r->page->head = h;
    r->page->spare = h;
    return 0;
}

int request_record_new(struct request_record **ret, const struct request_facts *facts,
                       const struct request_before *before, const struct job_request *request)
{
    CLEANUP(request_record_freep) struct request_record *r = calloc(1, sizeof(*r));
    struct buffer asked = {0};
    int e;

    if (!r)
        return -ENOMEM;
    r->fd = -EBADF;
    e = request_bytes_write(&asked, request);
    if (e >= 0)
        e = fill(r, facts, before, request->format == JOB_TEXT, &asked);
    if (asked.data)
        explicit_bzero(asked.data, asked.n);
    buffer_done(&asked);
    if (e < 0)
        return e;
    *ret = TAKE_PTR(r);
    return 0;
}

/* ---- what another process left ---- */

static int unsound(struct error *err, const char *what)
{
    return error_set(err, EBADMSG, "the record is not sound: %s", what);
}

static bool before_is_sound(uint32_t n_tokens, uint32_t position, uint32_t has_tail, uint32_t n_ctx)
{
    return n_tokens <= n_ctx && position < CHAT_N_POSITIONS && has_tail <= 1;
}

/* The place of each part follows from two numbers, but for the log's end, a limit's of then. */
static int read_head(int fd, uint64_t at, struct head *h, struct error *err)
{
    uint64_t size, want;
    struct head like = {0};

    if (sealed_memory_check(fd, &size) < 0)
        return unsound(err, "it is no sealed memory");
    if (size < KEPT_ALIGN || read_whole(fd, h, sizeof(*h), at) < 0)
        return unsound(err, "it is too short");
    if (memcmp(h->magic, MAGIC, sizeof(h->magic)) != 0)
        return unsound(err, "it is no request's");
    if (h->version != VERSION)
        return error_set(err, EBADMSG, "the record is of version %" PRIu32 ", this llmd has %u",
                         h->version, VERSION);
    if (h->check != check_of(h))
        return unsound(err, "the head is damaged");
    if (h->id == 0 || h->session == 0 || h->n_ctx == 0 || h->is_text > 1 ||
        !before_is_sound(h->n_tokens, h->position, h->has_tail, h->n_ctx) ||
        lay_out(h->n_ctx, h->asked_bytes, &like, &want) < 0 || h->asked_at != like.asked_at ||
        h->log_at != like.log_at || h->log_max > LOG_BYTES_MAX || size != h->log_at + h->log_max)
        return unsound(err, "the head has a value that cannot be");
    return 0;
}

static int read_commit(struct request_record *r, struct error *err)
{
    struct slot s;
    int e = kept_read(&r->page->sequence, r->page->slots, &s, sizeof(s));

    if (e == -ENODATA)
        return 0;
    if (e < 0)
        return unsound(err, "how far it got is damaged");
    if (s.n_sampled > r->facts.n_ctx || s.log_bytes > r->log_max || s.phase > REQUEST_UNDONE ||
        !before_is_sound(s.n_tokens, s.position, s.has_tail, r->facts.n_ctx))
        return unsound(err, "how far it got cannot be");
    for (uint32_t k = 0; k < s.n_sampled; k++)
        r->ids_check = kept_check(r->ids_check, &r->ids[k], sizeof(r->ids[k]));
    if (r->ids_check != s.ids_check)
        return unsound(err, "the tokens are damaged");
    r->n_checked = s.n_sampled;
    r->was_committed = true;
    r->commit = (struct request_commit){
        .n_sampled = s.n_sampled,
        .log_bytes = s.log_bytes,
        .generation = s.generation,
        .phase = (enum request_phase)s.phase,
        .after = {.n_tokens = s.n_tokens,
                  .position = (enum chat_position)s.position,
                  .has_tail = s.has_tail,
                  .tail = s.tail},
        .usage = {.prompt_tokens = s.prompt_tokens,
                  .completion_tokens = s.completion_tokens,
                  .cached_tokens = s.cached_tokens},
    };
    return 0;
}

int request_record_open(struct request_record **ret, int fd, struct error *err)
{
    CLEANUP(request_record_freep) struct request_record *r = calloc(1, sizeof(*r));
    struct head h;
    off_t at;
    int e;

    if (!r) {
        close(fd);
        return error_set(err, ENOMEM, "out of memory");
    }
    r->fd = fd;
    e = read_head(fd, 0, &h, err);
    if (e < 0)
        return e;
    e = map(r, &h);
    if (e < 0)
        return error_set(err, -e, "out of memory");
    e = read_commit(r, err);
    if (e < 0)
        return e;
    at = lseek(fd, 0, SEEK_CUR);
    if (at < 0 || (uint64_t)at < r->log_at || (uint64_t)at > r->log_at + r->commit.log_bytes)
        return unsound(err, "what was sent cannot be");
    *ret = TAKE_PTR(r);
    return 0;
}

const struct request_facts *request_record_facts(const struct request_record *r)
{
    return &r->facts;
}

int request_record_fd(const struct request_record *r)
{
    return r->fd;
}

int request_record_request(const struct request_record *r, struct job_request *ret,
                           struct error *err)
{
    CLEANUP(freep) void *data = malloc((size_t)MAX(r->asked_bytes, UINT64_C(1)));
    int e;

    if (!data)
        return error_set(err, ENOMEM, "out of memory");
    e = read_whole(r->fd, data, (size_t)r->asked_bytes, r->asked_at);
    if (e >= 0 && kept_check(0, data, (size_t)r->asked_bytes) != r->asked_check)
        e = -EBADMSG;
    if (e < 0)
        return unsound(err, "what was asked is damaged");
    e = request_bytes_read(ret, data, (size_t)r->asked_bytes, err);
    explicit_bzero(data, (size_t)r->asked_bytes);
    return e;
}

const struct request_before *request_record_before(const struct request_record *r)
{
    return &r->before;
}

/* ---- as it goes on ---- */

void request_record_add_sampled(struct request_record *r, uint32_t k, uint32_t id)
{
    assert(k == r->n_checked && k < r->facts.n_ctx);
    r->ids[k] = id;
    r->ids_check = kept_check(r->ids_check, &id, sizeof(id));
    r->n_checked++;
}

int request_record_append(struct request_record *r, uint64_t offset, const void *data, size_t n)
{
    if (range_outside(offset, n, r->log_max))
        return -EFBIG;
    return write_whole(r->fd, data, n, r->log_at + offset);
}

/*
 * Nobody goes on with it: the prompt is needed no more, and is no longer counted at its user, while
 * the record stays as long as the client does not read the stream's end.
 */
static void forget_asked(const struct request_record *r)
{
    (void)fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)r->asked_at,
                    (off_t)(r->log_at - r->asked_at));
}

void request_record_commit(struct request_record *r, const struct request_commit *c)
{
    struct slot s = {
        .log_bytes = c->log_bytes,
        .ids_check = r->ids_check,
        .n_sampled = c->n_sampled,
        .phase = (uint32_t)c->phase,
        .generation = c->generation,
        .n_tokens = c->after.n_tokens,
        .position = (uint32_t)c->after.position,
        .has_tail = c->after.has_tail,
        .tail = c->after.tail,
        .prompt_tokens = c->usage.prompt_tokens,
        .completion_tokens = c->usage.completion_tokens,
        .cached_tokens = c->usage.cached_tokens,
    };

    assert(c->n_sampled == r->n_checked);
    kept_commit(&r->page->sequence, r->page->slots, &s, sizeof(s));
    if (c->phase != REQUEST_RUNS)
        forget_asked(r);
}

bool request_record_last_commit(const struct request_record *r, struct request_commit *ret,
                                const uint32_t **ret_sampled)
{
    *ret = r->commit;
    *ret_sampled = r->ids;
    return r->was_committed;
}

void request_record_set_stopped(struct request_record *r, int why)
{
    atomic_store(&r->page->stopped, (uint32_t)why);
}

int request_record_stopped(const struct request_record *r)
{
    return (int)atomic_load(&r->page->stopped);
}

void request_record_set_replied(struct request_record *r)
{
    atomic_store(&r->page->replied, 1);
}

bool request_record_replied(const struct request_record *r)
{
    return atomic_load(&r->page->replied);
}

void request_record_set_working(struct request_record *r, bool working)
{
    atomic_store_explicit(&r->page->working, working, memory_order_relaxed);
}

uint32_t request_record_count_recovery(struct request_record *r, uint64_t progress)
{
    uint32_t n = 0;

    if (atomic_load(&r->page->working)) {
        n = progress > r->page->progress ? 1 : atomic_load(&r->page->n_recovered) + 1;
        r->page->progress = progress;
        atomic_store(&r->page->n_recovered, n);
    }
    atomic_store(&r->page->working, 0);
    return n;
}

/* ---- the stream's bytes ---- */

uint64_t request_record_sent(const struct request_record *r)
{
    return (uint64_t)lseek(r->fd, 0, SEEK_CUR) - r->log_at;
}

uint64_t request_record_log_bytes(const struct request_record *r)
{
    return r->commit.log_bytes;
}

int request_record_end(struct request_record *r, const struct record *last)
{
    CLEANUP(buffer_done) struct buffer line = {0};
    int e = r->is_text ? 0 : record_write(&line, last);

    if (e >= 0 && line.n > 0)
        e = request_record_append(r, r->commit.log_bytes, line.data, line.n);
    if (e < 0)
        return e;
    r->commit.log_bytes += line.n;
    if (r->commit.phase == REQUEST_RUNS)
        r->commit.phase = REQUEST_UNDONE;
    request_record_commit(r, &r->commit);
    return 0;
}

/* The rest of a line of which the client has the beginning. 0, -EBADMSG: there is no telling */
static int rest_of_line(int fd, const struct head *h, struct buffer *line)
{
    off_t at = lseek(fd, 0, SEEK_CUR);
    char c = 0;
    int e;

    if (at < 0 || (uint64_t)at < h->log_at)
        return -EBADMSG;
    if ((uint64_t)at == h->log_at || (read_whole(fd, &c, 1, (uint64_t)at - 1) == 0 && c == '\n'))
        return 0;
    for (c = 0; c != '\n'; at++) {
        if (line->n == RECORD_BYTES_MAX || read_whole(fd, &c, 1, (uint64_t)at) < 0 || c == 0)
            return -EBADMSG;
        e = buffer_append(line, &c, 1);
        if (e < 0)
            return e;
    }
    return 0;
}

int request_record_salvage(struct request_record **ret, int fd, const struct record *last)
{
    CLEANUP(request_record_freep) struct request_record *r = NULL;
    CLEANUP(buffer_done) struct buffer line = {0};
    struct head h;
    int e;

    e = read_head(fd, 0, &h, NULL);
    if (e < 0)
        e = read_head(fd, SPARE_AT, &h, NULL);
    if (e >= 0 && !h.is_text)
        e = rest_of_line(fd, &h, &line);
    if (e >= 0 && !h.is_text)
        e = record_write(&line, last);
    if (e < 0)
        return e;
    r = calloc(1, sizeof(*r));
    if (!r)
        return -ENOMEM;
    r->fd = -EBADF;
    e = fill(
        r,
        &(struct request_facts){.id = h.id, .session = h.session, .uid = h.uid, .n_ctx = h.n_ctx},
        &(struct request_before){.n_tokens = 0}, h.is_text, &(struct buffer){.n = 0});
    if (e >= 0 && line.n > 0)
        e = request_record_append(r, 0, line.data, line.n);
    if (e < 0)
        return e;
    r->commit = (struct request_commit){.log_bytes = line.n, .phase = REQUEST_UNDONE};
    request_record_commit(r, &r->commit);
    *ret = TAKE_PTR(r);
    return 0;
}

/* Whole pages that the client has read: what it has not lies in the socket, as these very pages. */
static void give_back(struct request_record *r, int socket, uint64_t sent)
{
    int unread = 0;
    uint64_t done;

    if (sent < r->punched + PUNCH_BYTES || ioctl(socket, SIOCOUTQ, &unread) < 0 || unread < 0)
        return;
    done = sent - MIN(sent, (uint64_t)unread);
    done -= done % KEPT_ALIGN;
    if (done <= r->punched)
        return;
    if (fallocate(r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(r->log_at + r->punched), (off_t)(done - r->punched)) == 0)
        r->punched = done;
}

int request_record_send(struct request_record *r, int socket, uint64_t end)
{
    uint64_t sent = request_record_sent(r);

    while (sent < end) {
        ssize_t n = sendfile(socket, r->fd, NULL, (size_t)MIN(end - sent, (uint64_t)SEND_BYTES));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -EIO;
        sent += (uint64_t)n;
        give_back(r, socket, sent);
    }
    return 0;
}

int request_record_read(const struct request_record *r, uint64_t offset, void *data, size_t n)
{
    if (range_outside(offset, n, r->log_max))
        return -EFBIG;
    return read_whole(r->fd, data, n, r->log_at + offset);
}

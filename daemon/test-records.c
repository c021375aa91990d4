/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Records of sessions and requests: what is written is read, and what was damaged is found. */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/sealed-memory.h"
#include "daemon/kept.h"
#include "daemon/request-bytes.h"
#include "daemon/request-record.h"
#include "ipc/record.h"

#undef NDEBUG
#include <assert.h>

#define N_CTX 1000u

static const struct request_facts facts = {.id = 70, .session = 8, .uid = 1234, .n_ctx = N_CTX};
static const struct request_before before = {
    .n_tokens = 17, .position = CHAT_OPEN_MODEL, .has_tail = true, .tail = 99};

static struct request_record *new_record(void)
{
    struct logit_bias bias = {.id = 4, .bias = -2};
    char *stops[] = {(char[]){"END"}};
    struct job_message message = {.role = CHAT_USER, .text = (char[]){"Hello"}, .n = 5};
    struct job_request q = {
        .kind = JOB_GENERATE,
        .messages = &message,
        .n_messages = 1,
        .stop = stops,
        .bias = &bias,
        .deterministic = true,
        .options = {
            .sampler = {.temperature = 0.5f, .seed = UINT64_MAX - 1, .bias = &bias, .n_bias = 1},
            .max_tokens = 12,
            .stop = (const char *const *)stops,
            .n_stop = 1,
            .logprobs = true}};
    struct request_record *r;

    assert(request_record_new(&r, &facts, &before, &q) == 0);
    return r;
}

/* Another process's view. */
static int reopen(struct request_record *r, struct request_record **ret)
{
    return request_record_open(ret, fcntl(request_record_fd(r), F_DUPFD_CLOEXEC, 3), NULL);
}

static void test_slots(void)
{
    _Atomic uint64_t sequence = 0;
    uint64_t slots[KEPT_SLOTS(16)] = {0}, a[2] = {1, 2}, b[2] = {3, 4}, got[2],
             kept[KEPT_SLOTS(16)];

    assert(kept_read(&sequence, slots, got, 16) == -ENODATA);
    kept_commit(&sequence, slots, a, 16);
    assert(kept_read(&sequence, slots, got, 16) == 0 && memcmp(got, a, 16) == 0);
    /* Torn anywhere before the number: it is the one before. */
    memcpy(kept, slots, sizeof(kept));
    kept_commit(&sequence, slots, b, 16);
    assert(kept_read(&sequence, slots, got, 16) == 0 && memcmp(got, b, 16) == 0);
    for (size_t i = 0; i < KEPT_SLOTS(16); i++) {
        uint64_t torn[KEPT_SLOTS(16)];

        memcpy(torn, kept, sizeof(torn));
        memcpy(torn, slots, i * sizeof(torn[0]));
        sequence = 1;
        assert(kept_read(&sequence, torn, got, 16) == 0 && memcmp(got, a, 16) == 0);
        sequence = 2;
        torn[i] ^= 1u << 5;
        if (i < KEPT_SLOTS(16) / 2)
            assert(kept_read(&sequence, torn, got, 16) == -EBADMSG);
    }
}

static void test_memfd(void)
{
    uint64_t size;
    int fd = sealed_memory_new("test", 4096), plain = memfd_create("plain", MFD_CLOEXEC);

    assert(fd >= 0 && plain >= 0);
    assert(sealed_memory_check(fd, &size) == 0 && size == 4096);
    assert(ftruncate(fd, 100) < 0 && ftruncate(fd, 10000) < 0);
    assert(sealed_memory_check(plain, &size) == -EBADMSG);
    close(fd);
    close(plain);
}

static void test_round_trip(void)
{
    CLEANUP(request_record_freep) struct request_record *r = new_record(), *again = NULL;
    struct request_commit c = {.n_sampled = 3, .log_bytes = 6, .phase = REQUEST_DONE}, got;
    struct job_request q = {0};
    const uint32_t *sampled;

    assert(reopen(r, &again) == 0);
    assert(!request_record_last_commit(again, &got, &sampled) && got.n_sampled == 0);
    assert(request_record_request(again, &q, NULL) == 0);
    assert(q.n_messages == 1 && memcmp(q.messages[0].text, "Hello", 5) == 0);
    assert(q.options.n_stop == 1 && strcmp(q.options.stop[0], "END") == 0);
    assert(q.options.sampler.seed == UINT64_MAX - 1 && q.options.logprobs && q.bias[0].id == 4);
    assert(q.deterministic);
    job_request_done(&q);
    again = request_record_free(again);

    for (uint32_t k = 0; k < 3; k++)
        request_record_add_sampled(r, k, 100 + k);
    assert(request_record_append(r, 0, "abc", 3) == 0 &&
           request_record_append(r, 3, "def", 3) == 0);
    c.generation.words[7] = 77;
    c.after = (struct request_before){.n_tokens = 30, .position = CHAT_AFTER_MODEL};
    c.usage = (struct generation_usage){1, 2, 3};
    request_record_commit(r, &c);
    request_record_add_sampled(r, 3, 103); /* not committed: as if never */
    request_record_set_replied(r);
    request_record_set_stopped(r, JOB_CANCELLED);

    assert(reopen(r, &again) == 0);
    assert(request_record_facts(again)->uid == 1234 && request_record_facts(again)->session == 8);
    assert(memcmp(request_record_before(again), &before, sizeof(before)) == 0);
    assert(request_record_last_commit(again, &got, &sampled));
    assert(got.n_sampled == 3 && sampled[2] == 102 && got.log_bytes == 6);
    assert(got.generation.words[7] == 77 && got.phase == REQUEST_DONE && got.after.n_tokens == 30);
    assert(got.usage.completion_tokens == 2);
    assert(request_record_replied(again) && request_record_stopped(again) == JOB_CANCELLED);
}

/* What a version without the option wrote keeps to the one device that it had. */
static void test_version_before(void)
{
    struct job_message message = {.role = CHAT_USER, .text = (char[]){"Hello"}, .n = 5};
    struct job_request q = {.messages = &message, .n_messages = 1}, got = {0};
    struct buffer bytes = {0};

    assert(request_bytes_write(&bytes, &q) == 0 && bytes.data[0] == 2);
    assert(request_bytes_read(&got, bytes.data, bytes.n, NULL) == 0 && !got.deterministic);
    job_request_done(&got);
    bytes.data[0] = 1;
    assert(request_bytes_read(&got, bytes.data, bytes.n, NULL) == 0 && got.deterministic);
    job_request_done(&got);
    bytes.data[12] |= 16; /* which it did not know */
    assert(request_bytes_read(&got, bytes.data, bytes.n, NULL) == -EBADMSG);
    bytes.data[0] = 3;
    assert(request_bytes_read(&got, bytes.data, bytes.n, NULL) == -EBADMSG);
    buffer_done(&bytes);
}

/* One byte after the other of what is written once, and of the commit: each is noticed. */
static void test_damage(void)
{
    CLEANUP(request_record_freep) struct request_record *r = new_record(), *again = NULL;
    struct job_request q = {0};
    int fd = request_record_fd(r);
    unsigned n_found = 0;

    request_record_add_sampled(r, 0, 5);
    request_record_commit(r, &(struct request_commit){.n_sampled = 1});
    for (off_t at = 0; at < 600; at++) {
        uint8_t c, bad;

        assert(pread(fd, &c, 1, at) == 1);
        bad = c ^ 0x10;
        assert(pwrite(fd, &bad, 1, at) == 1);
        if (reopen(r, &again) < 0)
            n_found++;
        again = request_record_free(again);
        assert(at >= 112 || n_found == (unsigned)at + 1); /* the head */
        assert(pwrite(fd, &c, 1, at) == 1);
    }
    assert(n_found > 112 + 8 + 100);             /* and the number, and the valid slot */
    assert(pwrite(fd, "x", 1, KEPT_ALIGN) == 1); /* the token */
    assert(reopen(r, &again) == -EBADMSG);
    assert(pwrite(fd, "\5", 1, KEPT_ALIGN) == 1);
    assert(pwrite(fd, "x", 1, 2 * KEPT_ALIGN + 20) == 1); /* what was asked */
    assert(reopen(r, &again) == 0 && request_record_request(again, &q, NULL) == -EBADMSG);
}

/* The file's position is what was sent, whoever looks at it. */
static void test_sending(void)
{
    CLEANUP(request_record_freep) struct request_record *r = new_record(), *again = NULL;
    const size_t total = 3u << 20;
    char *text = malloc(total), *heard = malloc(total);
    struct stat st;
    size_t n = 0;
    int ends[2], e;

    assert(text && heard);
    for (size_t i = 0; i < total; i++)
        text[i] = (char)(i * 31 / 7);
    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
    assert(request_record_append(r, 0, text, total) == 0);
    request_record_commit(r, &(struct request_commit){.log_bytes = total});
    assert(reopen(r, &again) == 0);
    while (n < total) {
        struct request_record *sender = n / 50000 % 2 ? r : again;
        ssize_t got;

        e = request_record_send(sender, ends[0], total);
        assert(e == 0 || e == -EAGAIN);
        assert(request_record_sent(r) == request_record_sent(again));
        while ((got = read(ends[1], heard + n, total - n)) > 0)
            n += (size_t)got;
    }
    assert(memcmp(text, heard, total) == 0 && request_record_sent(r) == total);
    assert(fstat(request_record_fd(r), &st) == 0);
    assert((uint64_t)st.st_blocks * 512 < total / 2); /* what was read is given back */
    close(ends[1]);
    assert(request_record_append(r, total, "more", 4) == 0);
    assert(request_record_send(r, ends[0], total + 4) == -EPIPE);
    close(ends[0]);
    free(text);
    free(heard);
}

static void test_forgotten(void)
{
    const size_t big = 4u << 20;
    CLEANUP(freep) char *text = malloc(big);
    struct job_message message = {.role = CHAT_USER, .text = text, .n = big};
    const struct job_request q = {.kind = JOB_GENERATE, .messages = &message, .n_messages = 1};
    CLEANUP(request_record_freep) struct request_record *r = NULL, *again = NULL;
    struct request_commit c = {.log_bytes = 3};
    struct job_request asked = {0};
    char log[3];
    struct stat st;

    assert(text && memset(text, 'x', big));
    assert(request_record_new(&r, &facts, &before, &q) == 0);
    assert(request_record_append(r, 0, "{}\n", 3) == 0);
    request_record_commit(r, &c);
    assert(fstat(request_record_fd(r), &st) == 0 && (size_t)st.st_blocks * 512 > big);
    assert(request_record_request(r, &asked, NULL) == 0 && asked.messages[0].n == big);
    job_request_done(&asked);

    c.phase = REQUEST_DONE; /* its memory goes, what is yet to be read does not */
    request_record_commit(r, &c);
    assert(fstat(request_record_fd(r), &st) == 0 && st.st_blocks * 512 < 1 << 20);
    assert(reopen(r, &again) == 0 && request_record_log_bytes(again) == 3);
    assert(request_record_read(again, 0, log, 3) == 0 && memcmp(log, "{}\n", 3) == 0);
    assert(request_record_request(again, &asked, NULL) == -EBADMSG);
}

static void test_crash_loop(void)
{
    CLEANUP(request_record_freep) struct request_record *r = new_record();

    for (unsigned i = 1; i < 6; i++) { /* at work, and no further */
        request_record_set_working(r, true);
        assert(request_record_count_recovery(r, 20) == i);
    }
    assert(request_record_count_recovery(r, 20) == 0); /* was not at work */
    request_record_set_working(r, true);
    assert(request_record_count_recovery(r, 21) == 1); /* got on */
}

static void test_salvage(void)
{
    CLEANUP(request_record_freep) struct request_record *r = new_record(), *again = NULL;
    const struct record last = {.type = RECORD_ERROR, .name = "N", .message = "m"};
    char heard[100] = {0}, drained[10];
    int ends[2];

    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
    assert(request_record_append(r, 0, "{1}\n{2}\n", 8) == 0);
    request_record_commit(r, &(struct request_commit){.log_bytes = 8});
    assert(request_record_send(r, ends[0], 5) == 0);
    assert(read(ends[1], drained, sizeof(drained)) == 5);
    assert(request_record_salvage(&again, request_record_fd(r), &last) == 0);
    assert(request_record_facts(again)->uid == 1234);
    assert(request_record_send(again, ends[0], request_record_log_bytes(again)) == 0);
    assert(read(ends[1], heard, sizeof(heard) - 1) > 0);
    assert(strcmp(heard, "2}\n{\"type\":\"error\",\"name\":\"N\",\"message\":\"m\"}\n") == 0);
    close(ends[0]);
    close(ends[1]);
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    test_slots();
    test_memfd();
    test_round_trip();
    test_version_before();
    test_damage();
    test_sending();
    test_forgotten();
    test_crash_loop();
    test_salvage();
    return 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Any bytes as what was asked: what is accepted is written again to the same bytes. And over the
 * beginning of a record, as they are and with the head's check value put right, which no fuzzer
 * would find: what opens can be read, sent and ended within its bounds.
 */

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/checked.h"
#include "daemon/kept.h"
#include "daemon/request-bytes.h"
#include "daemon/request-record.h"
#include "ipc/record.h"

#undef NDEBUG
#include <assert.h>

#define CHECK_AT 104u /* struct head of request-record.c */
#define N_CTX 64u
/* request-bytes.c */
#define FLAGS_AT 12u
#define DETERMINISTIC 16

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void try_request(const uint8_t *data, size_t n)
{
    struct buffer again = {0};
    struct job_request q = {0};
    struct error err = {{0}};

    if (request_bytes_read(&q, data, n, &err) < 0) {
        assert(err.text[0] && !strchr(err.text, '\n'));
        return;
    }
    assert(request_bytes_write(&again, &q) == 0);
    assert(again.n == n);
    if (data[0] == 1) { /* the version before, whose requests are deterministic */
        assert(q.deterministic && again.data[0] == 2);
        again.data[0] = 1;
        again.data[FLAGS_AT] &= ~DETERMINISTIC;
    }
    assert(memcmp(again.data, data, n) == 0);
    buffer_done(&again);
    job_request_done(&q);
}

static void use(struct request_record *r)
{
    const struct record last = {.type = RECORD_ERROR, .name = "n", .message = "m"};
    struct job_request q = {0};
    struct request_commit c;
    const uint32_t *sampled;
    uint32_t sum = 0;
    int ends[2];

    request_record_last_commit(r, &c, &sampled);
    assert(c.n_sampled <= request_record_facts(r)->n_ctx && c.phase <= REQUEST_UNDONE);
    for (uint32_t i = 0; i < c.n_sampled; i++)
        sum += sampled[i];
    (void)sum;
    assert(request_record_sent(r) <= c.log_bytes);
    if (request_record_request(r, &q, NULL) == 0)
        job_request_done(&q);
    if (request_record_end(r, &last) < 0)
        return;
    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
    (void)request_record_send(r, ends[0], request_record_log_bytes(r));
    close(ends[0]);
    close(ends[1]);
}

static void try_record(const uint8_t *data, size_t n, bool put_right)
{
    const struct record last = {.type = RECORD_ERROR, .name = "n", .message = "m"};
    const struct request_facts facts = {.id = 7, .session = 3, .n_ctx = N_CTX};
    const struct job_request asked = {.kind = JOB_GENERATE};
    struct request_record *r, *salvaged;
    struct error err = {{0}};
    uint8_t head[CHECK_AT];
    uint64_t check;
    int fd;

    assert(request_record_new(&r, &facts, &(struct request_before){.n_tokens = 5}, &asked) == 0);
    request_record_add_sampled(r, 0, 11);
    assert(request_record_append(r, 0, "{}\n", 3) == 0);
    request_record_commit(r, &(struct request_commit){.n_sampled = 1, .log_bytes = 3});
    fd = dup(request_record_fd(r));
    assert(fd >= 0);
    request_record_free(r);

    n = MIN(n, (size_t)4096);
    assert(pwrite(fd, data, n, 0) == (ssize_t)n);
    if (put_right) {
        assert(pread(fd, head, sizeof(head), 0) == (ssize_t)sizeof(head));
        check = kept_check(0, head, sizeof(head));
        assert(pwrite(fd, &check, sizeof(check), CHECK_AT) == (ssize_t)sizeof(check));
    }
    if (request_record_salvage(&salvaged, fd, &last) == 0)
        request_record_free(salvaged);
    if (request_record_open(&r, fd, &err) < 0) {
        assert(err.text[0] && !strchr(err.text, '\n'));
        return;
    }
    use(r);
    request_record_free(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    try_request(data, n);
    try_record(data, n, false);
    try_record(data, n, true);
    return 0;
}

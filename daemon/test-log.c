/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What the log writes: plain lines to a pipe; fields to the journal where standard error is its.
 * The journal is a socket of the test's, put in its place in a mount namespace.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/log.h"

static char got[8192];

static void take(int fd)
{
    ssize_t n = read(fd, got, sizeof(got) - 1);

    assert(n > 0);
    got[n] = 0;
}

/* Fields are NAME=VALUE lines; the values here have no line breaks. */
static bool has_field(const char *field)
{
    size_t n = strlen(field);

    for (const char *at = got; (at = strstr(at, field)); at++)
        if ((at == got || at[-1] == '\n') && at[n] == '\n')
            return true;
    return false;
}

static void test_lines(void)
{
    int out[2];

    assert(pipe2(out, O_CLOEXEC) == 0 && dup2(out[1], STDERR_FILENO) >= 0);
    log_info("a %d", 1);
    take(out[0]);
    assert(strcmp(got, "<6>a 1\n") == 0);
    log_debug("not to be seen");
    log_warning("line\nbreak \x1b[31m");
    take(out[0]);
    assert(strcmp(got, "<4>line?break ?[31m\n") == 0);
    log_set_level(LOG_DEBUG);
    log_debug("to be seen");
    take(out[0]);
    assert(strcmp(got, "<7>to be seen\n") == 0);
    log_set_level(LOG_WARNING);
    log_info("not to be seen");
    log_with(LOG_ERR, &(struct log_fields){.message_id = LOG_ID_READY, .session = 7}, "b");
    take(out[0]);
    assert(strcmp(got, "<3>b\n") == 0);
    close(out[0]);
    close(out[1]);
}

static int make_journal(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/systemd/journal/socket"};
    char text[64];
    struct stat st;
    int fd;

    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", "/run", "tmpfs", 0, NULL) < 0)
        return -errno;
    assert(mkdir("/run/systemd", 0755) == 0 && mkdir("/run/systemd/journal", 0755) == 0);
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    assert(fstat(STDERR_FILENO, &st) == 0);
    snprintf(text, sizeof(text), "%llu:%llu", (unsigned long long)st.st_dev,
             (unsigned long long)st.st_ino);
    assert(setenv("JOURNAL_STREAM", text, 1) == 0);
    return fd;
}

static void test_journal(int journal)
{
    log_with(LOG_NOTICE,
             &(struct log_fields){.message_id = LOG_ID_REQUEST_FINISHED,
                                  .has_uid = true,
                                  .uid = 1000,
                                  .session = 3,
                                  .request = 4,
                                  .prompt_tokens = 5,
                                  .completion_tokens = 6,
                                  .model = "demo"},
             "one\nline");
    take(journal);
    assert(has_field("MESSAGE=one?line") && has_field("PRIORITY=5"));
    assert(has_field("MESSAGE_ID=" LOG_ID_REQUEST_FINISHED) && has_field("LLMD_UID=1000"));
    assert(has_field("LLMD_SESSION=3") && has_field("LLMD_REQUEST=4"));
    assert(has_field("LLMD_PROMPT_TOKENS=5") && has_field("LLMD_COMPLETION_TOKENS=6"));
    assert(has_field("LLMD_MODEL=demo") && has_field("SYSLOG_IDENTIFIER=llmd"));
    log_error("plain");
    take(journal);
    assert(has_field("MESSAGE=plain") && has_field("PRIORITY=3") && !strstr(got, "LLMD_"));
    assert(!strstr(got, "MESSAGE_ID=") && !strstr(got, "CODE_"));
}

static void test_limit(void)
{
    struct log_limit l = {0};
    uint32_t untold = 1;

    for (int i = 0; i < 5; i++)
        assert(log_limit_pass(&l, &untold) && untold == 0);
    for (int i = 0; i < 3; i++)
        assert(!log_limit_pass(&l, &untold) && untold == 0);
    l.since = 0; /* long ago */
    assert(log_limit_pass(&l, &untold) && untold == 3);
    assert(log_limit_pass(&l, &untold) && untold == 0);
}

/* Whether it is the journal is looked at once, so each has a process of its own. */
int main(int argc, char **argv)
{
    int journal;

    (void)argv;
    if (argc == 1) {
        unsetenv("JOURNAL_STREAM");
        test_lines();
        test_limit();
        return 0;
    }
    journal = make_journal();
    if (journal < 0) {
        puts("no journal of the test's own: mounting needs privileges");
        return 77;
    }
    log_set_level(LOG_INFO);
    test_journal(journal);
    return 0;
}

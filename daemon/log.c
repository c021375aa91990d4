/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define SD_JOURNAL_SUPPRESS_LOCATION /* sd_journal_sendv() would name this file each time */
#include <systemd/sd-journal.h>

#include "base/clock.h"

#define LINE_BYTES 2048
#define FIELDS_MAX 11
#define LIMIT_USEC UINT64_C(10000000) /* so many lines of a kind are written in that time */
#define LIMIT_LINES 5u

static atomic_int level = LOG_INFO;

void log_set_level(int priority)
{
    level = priority;
}

/* systemd tells the device and inode of the journal's socket; who redirects us leaves them stale.
 */
static bool stderr_is_journal(void)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static int known = -1;
    const char *text;
    unsigned long long device, inode;
    struct stat st;

    pthread_mutex_lock(&mutex);
    if (known < 0) {
        text = getenv("JOURNAL_STREAM");
        known = text && sscanf(text, "%llu:%llu", &device, &inode) == 2 &&
                fstat(STDERR_FILENO, &st) == 0 && st.st_dev == device && st.st_ino == inode;
    }
    pthread_mutex_unlock(&mutex);
    return known;
}

bool log_goes_to_journal(void)
{
    return stderr_is_journal();
}

bool log_has_prefixes(void)
{
    return !isatty(STDERR_FILENO);
}

static void send_fields(int priority, const struct log_fields *f, const char *line)
{
    char text[FIELDS_MAX][LINE_BYTES + 32];
    struct iovec fields[FIELDS_MAX];
    int n = 0;

#define FIELD(...) snprintf(text[n++], sizeof(text[0]), __VA_ARGS__)
    FIELD("MESSAGE=%s", line);
    FIELD("PRIORITY=%d", priority);
    FIELD("SYSLOG_IDENTIFIER=llmd");
    if (f && f->message_id)
        FIELD("MESSAGE_ID=%s", f->message_id);
    if (f && f->has_uid)
        FIELD("LLMD_UID=%u", (unsigned)f->uid);
    if (f && f->session > 0)
        FIELD("LLMD_SESSION=%llu", (unsigned long long)f->session);
    if (f && f->request > 0)
        FIELD("LLMD_REQUEST=%llu", (unsigned long long)f->request);
    if (f && (f->prompt_tokens > 0 || f->completion_tokens > 0)) {
        FIELD("LLMD_PROMPT_TOKENS=%llu", (unsigned long long)f->prompt_tokens);
        FIELD("LLMD_COMPLETION_TOKENS=%llu", (unsigned long long)f->completion_tokens);
    }
    if (f && f->model)
        FIELD("LLMD_MODEL=%s", f->model);
    if (f && f->has_pressure)
        FIELD("LLMD_PRESSURE=%u", f->pressure);
#undef FIELD
    for (int i = 0; i < n; i++)
        fields[i] = (struct iovec){.iov_base = text[i], .iov_len = strlen(text[i])};
    if (sd_journal_sendv(fields, n) < 0)
        fprintf(stderr, "<%d>%s\n", priority, line);
}

__attribute__((format(printf, 3, 0))) static void log_va(int priority, const struct log_fields *f,
                                                         const char *format, va_list ap)
{
    char line[LINE_BYTES];

    if (priority > level)
        return;
    vsnprintf(line, sizeof(line), format, ap);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    if (stderr_is_journal())
        send_fields(priority, f, line);
    else if (isatty(STDERR_FILENO))
        fprintf(stderr, "%s\n", line);
    else
        fprintf(stderr, "<%d>%s\n", priority, line);
}

void log_line(int priority, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    log_va(priority, NULL, format, ap);
    va_end(ap);
}

void log_with(int priority, const struct log_fields *fields, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    log_va(priority, fields, format, ap);
    va_end(ap);
}

bool log_limit_pass(struct log_limit *l, uint32_t *ret_untold)
{
    uint64_t now = now_usec();

    *ret_untold = 0;
    if (now - l->since >= LIMIT_USEC) {
        *ret_untold = l->n_untold;
        *l = (struct log_limit){.since = now};
    }
    if (l->n < LIMIT_LINES) {
        l->n++;
        return true;
    }
    l->n_untold++;
    return false;
}

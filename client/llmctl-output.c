/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-output.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/utf8.h"
#include "client/llmctl.h"

/*
 * Nobody may be reading, and while write() waited, Ctrl-C and the time limit would, too. So it is
 * called when there is room, and with no more than a pipe then takes without waiting.
 */
int output_put(const char *data, size_t n)
{
    static bool failed; /* that was told */

    if (failed)
        return STATUS_FAILED;
    while (n > 0) {
        struct pollfd p = {.fd = STDOUT_FILENO, .events = POLLOUT};
        ssize_t w;
        int status;

        if (poll(&p, 1, 0) == 0) {
            status = deadlines_wait(STDOUT_FILENO, POLLOUT);
            if (status != STATUS_OK)
                return status;
        }
        w = write(STDOUT_FILENO, data, MIN(n, PIPE_BUF));
        if (w < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        failed = w < 0;
        if (failed)
            return complain(STATUS_FAILED, "cannot write: %s", strerror(errno));
        data += w;
        n -= (size_t)w;
    }
    return STATUS_OK;
}

int output_put_on_terminal(const char *text, size_t n)
{
    size_t start = 0;
    int status;

    for (size_t i = 0; i < n;) {
        uint32_t c;
        size_t used = utf8_next(text + i, n - i, &c); /* a record's text is valid */

        if ((c < 0x20 && c != '\n' && c != '\t') || (c >= 0x7f && c < 0xa0)) {
            status = output_put(text + start, i - start);
            if (status == STATUS_OK)
                status = output_put("\xef\xbf\xbd", 3);
            if (status != STATUS_OK)
                return status;
            start = i + used;
        }
        i += used;
    }
    return output_put(text + start, n - start);
}

int output_escape(struct buffer *b, const char *text, size_t n)
{
    size_t start = 0;

    for (size_t i = 0; i < n; i++) {
        if (text[i] != '\n' && text[i] != '\\')
            continue;
        if (buffer_append(b, text + start, i - start) < 0 ||
            buffer_append(b, text[i] == '\n' ? "\\n" : "\\\\", 2) < 0)
            return -ENOMEM;
        start = i + 1;
    }
    return buffer_append(b, text + start, n - start);
}

/* ---- the status line ---- */

#define STATUS_LINE_BYTES 200

static volatile sig_atomic_t line_shown;

void status_line(const char *format, ...)
{
    static int wanted = -1;
    char text[STATUS_LINE_BYTES];
    struct winsize size = {0};
    int width = STATUS_LINE_BYTES;
    va_list ap;

    if (wanted < 0) {
        const char *terminal = getenv("TERM");

        wanted = isatty(STDERR_FILENO) && terminal && strcmp(terminal, "dumb") != 0;
    }
    if (!wanted || global.quiet)
        return;
    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        width = size.ws_col - 1; /* a line that wraps cannot be taken away */
    line_shown = 1;
    dprintf(STDERR_FILENO, "\r%.*s\033[K", width, text);
}

void status_line_clear(void)
{
    static const char clear[] = "\r\033[K";

    if (!line_shown)
        return;
    line_shown = 0;
    (void)!write(STDERR_FILENO, clear, sizeof(clear) - 1);
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-prompt.h"

#include <errno.h>
#include <getopt.h>
#include <string.h>
#include <unistd.h>

#include "client/llmctl.h"
#include "ipc/names.h"

static int add(struct buffer *prompt, const char *data, size_t n)
{
    if (n > LLM_PROMPT_BYTES_MAX - prompt->n)
        return complain(STATUS_FAILED, "the prompt has more than %u bytes; nothing was sent",
                        LLM_PROMPT_BYTES_MAX);
    return buffer_append(prompt, data, n) < 0 ? complain(STATUS_FAILED, "out of memory")
                                              : STATUS_OK;
}

int prompt_read(struct buffer *prompt, int argc, char **argv, bool with_stdin)
{
    bool first = true;
    char block[65536];
    ssize_t n;
    int status;

    for (int i = optind; i < argc; i++) {
        if (i > optind && (status = add(prompt, " ", 1)) != STATUS_OK)
            return status;
        status = add(prompt, argv[i], strlen(argv[i]));
        if (status != STATUS_OK)
            return status;
    }
    if (with_stdin && !isatty(STDIN_FILENO)) {
        while ((n = read(STDIN_FILENO, block, sizeof(block))) != 0) {
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0 && errno == EBADF)
                break; /* closed: as good as empty */
            if (n < 0)
                return complain(STATUS_FAILED, "cannot read standard input: %s", strerror(errno));
            if (first && prompt->n > 0 && (status = add(prompt, "\n", 1)) != STATUS_OK)
                return status;
            first = false;
            status = add(prompt, block, (size_t)n);
            if (status != STATUS_OK)
                return status;
        }
    }
    if (prompt->n == 0)
        return usage_error("there is no prompt");
    return STATUS_OK;
}

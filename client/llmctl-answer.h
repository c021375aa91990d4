/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* answer: one stream, read to its end while SIGINT and the time limit are waited for as well. */

#include "client/llmctl.h"
#include "ipc/buffer.h"

enum answer_output {
    ANSWER_TEXT,     /* to stdout as it comes */
    ANSWER_TERMINAL, /* likewise, made harmless */
    ANSWER_RECORDS,  /* the stream's own bytes to stdout */
    ANSWER_COLLECT,  /* into `text` */
};

struct answer {
    enum answer_output output;
    const char *hint; /* what may help when the context is full */
    struct buffer text;
    bool newline_due; /* the text shown does not end with a line feed */
    bool broken;      /* the stream had no end: the daemon went away */
    char reason[32];  /* of the end; "": there was none */
    uint32_t prompt_tokens, completion_tokens, cached_tokens;
    char error_name[96]; /* of the error record; "": there was none, or it has no name */
};

void answer_done(struct answer *a);

/* Makes ready for another one. */
void answer_clear(struct answer *a);

/*
 * Takes fd, a stream's. STATUS_OK: it ended well, also by another's Cancel (reason);
 * STATUS_INTERRUPTED and STATUS_TIMEOUT (no complaint made; the request is cancelled with the
 * stream, which is closed, unless cancel is given: that is called once, and the stream read on), or
 * a complaint was made.
 */
typedef void (*answer_cancel)(void *userdata);
int answer_read(struct answer *a, int fd, answer_cancel cancel, void *userdata);

/* What an error event, or a request that was refused at once, says to people; hint: see above.
 * Valid until the next call, and as long as err. */
const char *answer_refusal_text(const struct llm_error *err, const char *hint);
const char *answer_error_text(const struct llm_event *e, const char *hint);

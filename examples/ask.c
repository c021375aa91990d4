/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
/* Prints the model's answer as it comes. cc -o ask ask.c $(pkg-config --cflags --libs libllm) */
#include <llm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static int fd = -1; /* the answer's stream */

static void on_interrupt(int number)
{
    (void)number;
    shutdown(fd, SHUT_RDWR); /* we find the stream's end, and the daemon cancels the request */
}

int main(int argc, char **argv)
{
    const char *prompt = argc == 2 ? argv[1] : "Why is the sky blue?";
    struct llm_error err = {.message = "out of memory"};
    struct llm_connection *connection = NULL;
    struct llm_session *session = NULL;
    struct llm_options *options = NULL;
    struct llm_stream *stream = NULL;
    struct llm_event e = {0};

    if (llm_connect_scope(&connection, LLM_SCOPE_ANY, &err) >= 0 &&
        llm_session_new(&session, connection, NULL, &err) >= 0 && llm_options_new(&options) >= 0 &&
        llm_options_set_string(options, "prompt", prompt) >= 0 &&
        llm_session_generate(session, options, &fd, NULL, &err) >= 0 &&
        llm_stream_new(&stream, fd) >= 0) {
        snprintf(err.message, sizeof(err.message), "the answer was cut");
        signal(SIGINT, on_interrupt);
        while (e.type != LLM_END && e.type != LLM_ERROR && llm_stream_next(stream, &e) > 0)
            if (e.type == LLM_DELTA && fwrite(e.text, 1, e.n_text, stdout) == e.n_text)
                fflush(stdout);
    }
    if (e.type == LLM_END)
        putchar('\n');
    else
        fprintf(stderr, "%s: %s\n", argv[0], e.type == LLM_ERROR ? e.message : err.message);
    llm_stream_free(stream);
    llm_options_free(options);
    llm_session_free(session);
    llm_disconnect(connection);
    return e.type == LLM_END && !ferror(stdout) ? EXIT_SUCCESS : EXIT_FAILURE;
}

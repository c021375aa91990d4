/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llm-eval tokenize: text on stdin, ids on stdout; llm-eval detokenize: the way back. */

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/llm-eval/any-tokenizer.h"
#include "tools/llm-eval/llm-eval.h"

static const char tokenize_help[] =
    "Usage: llm-eval tokenize [OPTION]... FILE < TEXT\n"
    "Prints the ids of all of stdin, taken as one text, on one line.\n"
    "\n"
    "FILE is a model file, a GGUF file (one with a vocabulary only will do), a Hugging\n"
    "Face folder, or a tokenizer.json or tokenizer.model.\n"
    "\n"
    "  --no-bos      do not put <bos> first\n"
    "  --no-special  control pieces written in the text, such as <bos>, stay text\n"
    "  --help        show this and exit\n"
    "  --version     show the version and exit";

static const char detokenize_help[] =
    "Usage: llm-eval detokenize [OPTION]... FILE < IDS\n"
    "Prints the text of the ids on stdin, which white space separates. Control pieces such\n"
    "as <bos> have none.\n"
    "\n"
    "FILE is a model file, a GGUF file (one with a vocabulary only will do), a Hugging\n"
    "Face folder, or a tokenizer.json or tokenizer.model.\n"
    "\n"
    "  --special     write control pieces out; --no-special takes it back\n"
    "  --help        show this and exit\n"
    "  --version     show the version and exit";

/* What both commands get from their command line. */
struct arguments {
    const char *file; /* NULL: --help or --version has been answered */
    bool no_bos, special;
};

/* 0, or an exit status with the message printed. special: what is so without an option. */
static int parse(struct arguments *ret, int argc, char **argv, bool tokenize, bool special,
                 const char *help)
{
    static const struct option tokenize_options[] = {
        {"no-special", no_argument, NULL, 's'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},
        {"no-bos", no_argument, NULL, 'b'},
        {NULL, 0, NULL, 0},
    };
    static const struct option detokenize_options[] = {
        {"special", no_argument, NULL, 'S'},
        {"no-special", no_argument, NULL, 's'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    struct arguments a = {.special = special};
    int c;

    while ((c = getopt_long(argc, argv, "h", tokenize ? tokenize_options : detokenize_options,
                            NULL)) != -1) {
        switch (c) {
        case 'b':
            a.no_bos = true;
            break;
        case 's':
            a.special = false;
            break;
        case 'S':
            a.special = true;
            break;
        case 'h':
            puts(help);
            *ret = (struct arguments){0};
            return 0;
        case 'v':
            puts("llm-eval " LLMD_VERSION);
            *ret = (struct arguments){0};
            return 0;
        default:
            return usage_error(argv[0], NULL);
        }
    }
    if (optind == argc)
        return usage_error(argv[0], "no FILE given");
    if (optind + 1 < argc)
        return usage_error(argv[0], "one FILE only, '%s' is too much", argv[optind + 1]);
    a.file = argv[optind];
    *ret = a;
    return 0;
}

/* Opens the tokenizer and reads stdin. 0, or an exit status with the message printed. */
static int prepare(struct any_tokenizer *a, char **ret_text, size_t *ret_n, const char *name,
                   const char *file)
{
    struct error err;
    int r;

    r = any_tokenizer_open(a, file, &err);
    if (r < 0)
        return run_error(name, "%s", err.text);
    r = read_all(stdin, ret_text, ret_n);
    if (r < 0)
        return run_error(name, "cannot read stdin: %s", strerror(-r));
    return 0;
}

int tokenize_run(int argc, char **argv)
{
    CLEANUP(any_tokenizer_done) struct any_tokenizer a = {0};
    CLEANUP(freep) char *text = NULL;
    CLEANUP(freep) uint32_t *data = NULL;
    struct token_array ids = {0};
    struct arguments args;
    size_t n;
    int r;

    r = parse(&args, argc, argv, true, true, tokenize_help);
    if (r != 0 || !args.file)
        return r != 0 ? r : finish_output(argv[0]);
    r = prepare(&a, &text, &n, argv[0], args.file);
    if (r != 0)
        return r;
    r = tokenizer_encode(a.t, text, n,
                         &(struct encode_options){.bos = !args.no_bos, .special = args.special},
                         &ids);
    data = ids.data;
    if (r < 0)
        return run_error(argv[0], "%s",
                         r == -EOVERFLOW ? "the text is longer than 2 GiB" : strerror(-r));
    for (size_t i = 0; i < ids.n; i++)
        printf("%s%u", i > 0 ? " " : "", ids.data[i]);
    putchar('\n');
    return finish_output(argv[0]);
}

/* The ids of a text; all of them are in the vocabulary. 0, or an exit status. */
static int parse_ids(struct token_array *ids, const char *text, size_t n, uint32_t n_pieces,
                     const char *name)
{
    for (size_t i = 0; i < n;) {
        size_t from = i;
        uint64_t value = 0;
        uint32_t id;

        if (isspace((unsigned char)text[i])) {
            i++;
            continue;
        }
        for (; i < n && isdigit((unsigned char)text[i]); i++)
            value = MIN(value * 10 + (uint64_t)(text[i] - '0'), (uint64_t)UINT32_MAX);
        if (i == from || (i < n && !isspace((unsigned char)text[i])))
            return run_error(name, "stdin: byte %zu: not an id", i);
        if (value >= n_pieces)
            return run_error(name,
                             "stdin: byte %zu: the id is beyond the vocabulary, whose last is %u",
                             from, n_pieces - 1);
        id = (uint32_t)value;
        if (token_array_append(ids, &id, 1) < 0)
            return run_error(name, "%s", strerror(ENOMEM));
    }
    return 0;
}

int detokenize_run(int argc, char **argv)
{
    CLEANUP(any_tokenizer_done) struct any_tokenizer a = {0};
    CLEANUP(freep) char *text = NULL, *out = NULL;
    CLEANUP(freep) uint32_t *data = NULL;
    struct decoder d = {.n_pending = 0};
    struct token_array ids = {0};
    struct arguments args;
    size_t n;
    int r;

    r = parse(&args, argc, argv, false, false, detokenize_help);
    if (r != 0 || !args.file)
        return r != 0 ? r : finish_output(argv[0]);
    r = prepare(&a, &text, &n, argv[0], args.file);
    if (r != 0)
        return r;
    /* All before the first is written: a wrong id leaves no half an answer. */
    r = parse_ids(&ids, text, n, tokenizer_table(a.t)->n_pieces, argv[0]);
    data = ids.data;
    if (r != 0)
        return r;
    out = malloc(decoder_room(a.t));
    if (!out)
        return run_error(argv[0], "%s", strerror(ENOMEM));
    for (size_t i = 0; i < ids.n; i++)
        fwrite(out, 1, decoder_push(&d, a.t, ids.data[i], args.special, out), stdout);
    fwrite(out, 1, decoder_finish(&d, out), stdout);
    return finish_output(argv[0]);
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llm-eval: looks at a model without a daemon. Finds the subcommand and hands over to its file. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/standard-fds.h"
#include "tools/llm-eval/llm-eval.h"

static const struct command {
    const char *name;
    const char *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"logits", "what the model says after every token", logits_run},
    {"perplexity", "how well a text is predicted", perplexity_run},
    {"kld", "how far a model is from a reference", kld_run},
    {"skills", "how many prompts of each skill are answered right", skills_run},
    {"tokenize", "text to ids", tokenize_run},
    {"detokenize", "ids to text", detokenize_run},
    {NULL, NULL, NULL},
};

static void help(void)
{
    puts("Usage: llm-eval COMMAND [OPTION]...\n"
         "Looks at a model without a daemon.\n"
         "\n"
         "Commands:");
    for (const struct command *c = commands; c->name; c++)
        printf("  %-12s %s\n", c->name, c->summary);
    puts("\n"
         "  --help       show this and exit\n"
         "  --version    show the version and exit\n"
         "\n"
         "'llm-eval COMMAND --help' tells more.");
}

int main(int argc, char **argv)
{
    standard_fds_fill();
    if (argc < 2)
        return usage_error("llm-eval", "no command given");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        help();
        return finish_output("llm-eval");
    }
    if (strcmp(argv[1], "--version") == 0) {
        puts("llm-eval " LLMD_VERSION);
        return finish_output("llm-eval");
    }
    for (const struct command *c = commands; c->name; c++)
        if (strcmp(argv[1], c->name) == 0) {
            char name[64]; /* for what getopt_long() has to say */

            snprintf(name, sizeof(name), "llm-eval %s", c->name);
            argv[1] = name;
            return c->run(argc - 1, argv + 1);
        }
    return usage_error("llm-eval", "unknown command '%s'", argv[1]);
}

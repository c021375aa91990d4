/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llm-eval skills: how many prompts of each skill a model answers right. */

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "engine/generation.h"
#include "engine/json-text.h"
#include "tools/common/engine-args.h"
#include "tools/llm-eval/eval-args.h"
#include "tools/llm-eval/eval.h"
#include "tools/llm-eval/llm-eval.h"
#include "tools/llm-eval/skill-cases.h"

#define BATCH 16 /* conversations side by side */
#define MAX_ANSWER 256
#define MAX_MINIMA 64

static const char help[] =
    "Usage: llm-eval skills [OPTION]... MODEL\n"
    "Lets the model answer prompts of several skills, each time with the most probable token,\n"
    "and prints how many of its answers are right.\n"
    "\n"
    "  --cases FILE             prompts and what to expect, one JSON object a line\n"
    "                           (demo-skills.jsonl beside MODEL)\n"
    "  --skill NAME             only this skill\n"
    "  --failures               print what was asked, expected and answered, too\n"
    "  --json                   the table as JSON, for programs\n"
    "  --min [NAME=]N,...       end with 1 if fewer than N per cent of a skill (of any without\n"
    "                           NAME) are right\n" ENGINE_ARGS_HELP
    "  --help                   show this and exit";

struct minimum {
    const char *skill; /* NULL: all */
    uint32_t percent;
};

struct options {
    const char *cases, *skill;
    bool failures, json;
    struct minimum minima[MAX_MINIMA];
    size_t n_minima;
};

/* Of one case; only a few at a time have a session. */
struct attempt {
    struct session *session;
    struct generation *generation;
    char *answer;
    size_t n_answer;
    bool right;
};

/* As many as the cases that they belong to. */
struct attempts {
    struct attempt *data;
    size_t n;
};

static void attempts_done(struct attempts *a)
{
    for (size_t i = 0; i < a->n; i++) {
        generation_free(a->data[i].generation);
        session_free(a->data[i].session);
        free(a->data[i].answer);
    }
    free(a->data);
}

static int start(struct attempt *a, struct engine *e, const struct skill_case *c, struct error *err)
{
    static const struct generation_options options = {.max_tokens = MAX_ANSWER};
    const struct tokenizer *t = model_tokenizer(engine_model(e));
    struct token_array ids = {0};
    int r;

    err->text[0] = 0;
    if (c->text)
        r = tokenizer_encode(t, c->text, strlen(c->text), &(struct encode_options){.bos = true},
                             &ids);
    else
        r = chat_encode(t, c->messages, c->n_messages, &(struct chat_options){.generate = true},
                        &ids, NULL, err);
    if (r == 0 && ids.n == 0)
        r = error_set(err, EINVAL, "the prompt is empty");
    if (r == 0)
        r = session_new(&a->session, e, 0, NULL);
    if (r == 0)
        r = generation_new(&a->generation, a->session, ids.data, ids.n, &options, err);
    free(ids.data);
    if (r < 0 && !err->text[0])
        return error_set(err, -r, "cannot begin: %s", strerror(-r));
    return r;
}

static int keep(struct attempt *a, const char *text, size_t n)
{
    size_t size;
    char *p;

    if (n == 0)
        return 0;
    if (ckd_add(&size, a->n_answer, n))
        return -ENOMEM;
    p = realloc(a->answer, size);
    if (!p)
        return -ENOMEM;
    memcpy(p + a->n_answer, text, n);
    a->answer = p;
    a->n_answer = size;
    return 0;
}

/* Ends the attempt when the answer is whole, and says whether it is right. 1: ended; 0, -errno */
static int take(struct attempt *a, const struct step_item *item, size_t n_pending,
                const struct skill_case *c, struct error *err)
{
    struct generation_delta delta = {0};
    int r = item->ret_error;

    if (r == 0) {
        generation_advance(a->generation, item->n_tokens);
        if (item->n_tokens < n_pending)
            return 0;
        r = generation_accept(a->generation, item->ret_logits, &delta);
    }
    if (r == 0)
        r = keep(a, delta.text, delta.n);
    if (r == 0 && delta.finish == FINISH_NONE)
        return 0;
    if (r == 0)
        r = skill_case_check(c, a->answer ? a->answer : "", a->n_answer);
    if (r < 0)
        return error_set(err, -r, "evaluation failed: %s", strerror(-r));
    a->right = r;
    a->generation = generation_free(a->generation);
    a->session = session_free(a->session);
    return 1;
}

/* Answers all cases, BATCH at a time: when one has ended, the next takes its place. */
static int answer_all(struct attempts *all, const struct skill_cases *cases, struct engine *e,
                      struct error *err)
{
    size_t active[BATCH], n_active = 0, next = 0, n_done = 0;
    struct step_item items[BATCH];
    size_t n_pending[BATCH];
    size_t batch = MIN((size_t)BATCH, (size_t)MIN(engine_max_logits(e), engine_max_rows(e)));

    while (next < cases->n || n_active > 0) {
        size_t rows = engine_max_rows(e), n = 0;
        int r;

        for (; n_active < batch && next < cases->n; next++) {
            r = start(&all->data[next], e, &cases->cases[next], err);
            if (r < 0)
                return error_prefix(err, -r, "case %zu", next + 1);
            active[n_active++] = next;
        }
        for (size_t i = 0; i < n_active; i++) {
            struct attempt *a = &all->data[active[i]];
            const uint32_t *tokens = generation_pending(a->generation, &n_pending[i]);
            size_t share = MIN(n_pending[i], rows - (n_active - 1 - i)); /* one is left for each */

            items[i] =
                (struct step_item){.session = a->session,
                                   .tokens = tokens,
                                   .n_tokens = (uint32_t)share,
                                   .wanted = share == n_pending[i] ? LOGITS_LAST : LOGITS_NONE};
            rows -= share;
        }
        r = engine_step(e, items, n_active);
        if (r < 0)
            return error_set(err, -r, "evaluation failed: %s", strerror(-r));
        for (size_t i = 0; i < n_active; i++) {
            r = take(&all->data[active[i]], &items[i], n_pending[i], &cases->cases[active[i]], err);
            if (r < 0)
                return error_prefix(err, -r, "case %zu", active[i] + 1);
            if (r == 0)
                active[n++] = active[i];
            else
                n_done++;
        }
        n_active = n;
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "\r%zu of %zu ", n_done, cases->n);
    }
    if (isatty(STDERR_FILENO))
        fputs("\r               \r", stderr);
    return 0;
}

/* A text from a file or a model, on one line of a terminal. */
static void print_quoted(const char *label, const char *text, size_t n)
{
    CLEANUP(json_object_putp) json_object *v = NULL;

    if (n <= INT_MAX)
        v = json_object_new_string_len(text, (int)n);
    printf("  %-9s %s\n", label,
           v ? json_object_to_json_string_ext(v, JSON_C_TO_STRING_NOSLASHESCAPE) : "?");
}

static void print_failure(const struct skill_case *c, const struct attempt *a)
{
    static const char *const keys[] = {"expect", "reject", "expect_json"};
    const char *asked = c->text ? c->text : c->messages[c->n_messages - 1].text;

    printf("%s", c->skill);
    if (c->n_messages > 1)
        printf(", after %zu turns", c->n_messages - 1);
    putchar('\n');
    print_quoted("asked", asked, strlen(asked));
    for (size_t i = 0; i < ARRAY_SIZE(keys); i++) {
        json_object *v = json_text_get(c->root, keys[i]);

        if (v)
            printf("  %-9s %s\n", i == 1 ? "reject" : "expect",
                   json_object_to_json_string_ext(v, JSON_C_TO_STRING_NOSLASHESCAPE));
    }
    print_quoted("answered", a->answer ? a->answer : "", a->n_answer);
}

/* Cases of a skill, and how many are right; NULL: of all. */
static void count(const struct skill_cases *cases, const struct attempts *all, const char *skill,
                  size_t *ret_n, size_t *ret_right)
{
    *ret_n = *ret_right = 0;
    for (size_t i = 0; i < cases->n; i++)
        if (!skill || strcmp(cases->cases[i].skill, skill) == 0) {
            ++*ret_n;
            *ret_right += all->data[i].right;
        }
}

static bool is_first(const struct skill_cases *cases, size_t i)
{
    for (size_t k = 0; k < i; k++)
        if (strcmp(cases->cases[k].skill, cases->cases[i].skill) == 0)
            return false;
    return true;
}

static void print_row(bool json, const char *name, size_t n, size_t right)
{
    double percent = 100.0 * (double)right / (double)n;

    if (json) {
        CLEANUP(json_object_putp) json_object *v = json_object_new_string(name);

        printf("%s: {\"cases\": %zu, \"right\": %zu, \"percent\": %.1f}",
               v ? json_object_to_json_string(v) : "\"?\"", n, right, percent);
    } else {
        printf("%-14s %6zu %6zu %8.1f\n", name, n, right, percent);
    }
}

static void print_table(const struct skill_cases *cases, const struct attempts *all, bool json)
{
    size_t n, right;

    if (json)
        printf("{\"skills\": {");
    else
        printf("%-14s %6s %6s %8s\n", "skill", "cases", "right", "per cent");
    for (size_t i = 0; i < cases->n; i++)
        if (is_first(cases, i)) {
            if (json && i > 0)
                printf(", ");
            count(cases, all, cases->cases[i].skill, &n, &right);
            print_row(json, cases->cases[i].skill, n, right);
        }
    count(cases, all, NULL, &n, &right);
    if (json)
        printf("}, ");
    print_row(json, "total", n, right);
    if (json)
        puts("}");
}

/* Complains of each skill below its minimum. Whether there is one. */
static bool below_minimum(const char *name, const struct options *o,
                          const struct skill_cases *cases, const struct attempts *all)
{
    bool below = false;

    for (size_t k = 0; k < o->n_minima; k++)
        for (size_t i = 0; i < cases->n; i++) {
            const char *skill = cases->cases[i].skill;
            size_t n, right;

            if ((o->minima[k].skill && strcmp(o->minima[k].skill, skill) != 0) ||
                !is_first(cases, i))
                continue;
            count(cases, all, skill, &n, &right);
            if (100.0 * (double)right < (double)o->minima[k].percent * (double)n) {
                run_error(name, "%s: %zu of %zu right, less than %u per cent", skill, right, n,
                          o->minima[k].percent);
                below = true;
            }
        }
    return below;
}

/* Cuts text, which stays, into names and numbers. */
static int parse_minima(struct options *o, char *text, struct error *err)
{
    char *rest = text, *item;

    while ((item = strsep(&rest, ","))) {
        char *equals = strrchr(item, '=');
        struct minimum *m = &o->minima[o->n_minima];

        if (o->n_minima == MAX_MINIMA)
            return error_set(err, EINVAL, "--min: at most %d numbers", MAX_MINIMA);
        if (equals) {
            *equals = 0;
            if (equals == item)
                return error_set(err, EINVAL, "--min '=%s': a skill before '=' expected",
                                 equals + 1);
        }
        if (parse_number("--min", equals ? equals + 1 : item, 0, 100, &m->percent, err) < 0)
            return -EINVAL;
        m->skill = equals ? item : NULL;
        o->n_minima++;
    }
    return 0;
}

/* demo-skills.jsonl in the model's folder. NULL: out of memory */
static char *cases_beside(const char *model)
{
    const char *slash = strrchr(model, '/');
    char *path;

    if (asprintf(&path, "%.*sdemo-skills.jsonl", slash ? (int)(slash + 1 - model) : 0, model) < 0)
        return NULL;
    return path;
}

static int run(const char *name, const char *path, struct engine_options *engine_options,
               const struct options *o)
{
    CLEANUP(skill_cases_done) struct skill_cases cases = {0};
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(attempts_done) struct attempts all = {0};
    CLEANUP(freep) char *beside = NULL;
    const char *file = o->cases;
    struct error err;
    double start_time;
    int r;

    if (!file) {
        file = beside = cases_beside(path);
        if (!beside)
            return run_error(name, "out of memory");
        if (access(beside, F_OK) < 0 && errno == ENOENT)
            return run_error(name, "no %s beside the model: give --cases", beside);
    }
    r = skill_cases_read(&cases, file, o->skill, &err);
    if (r < 0)
        return run_error(name, "%s", err.text);
    for (size_t k = 0; k < o->n_minima; k++) {
        const char *skill = o->minima[k].skill;
        size_t i = 0;

        while (skill && i < cases.n && strcmp(cases.cases[i].skill, skill) != 0)
            i++;
        if (i == cases.n)
            return run_error(name, "--min: %s: no case of the skill '%s'", file, skill);
    }
    r = open_engine(&m, &e, path, engine_options, &err);
    if (r < 0)
        return run_error(name, "%s", err.text);
    if (!model_tokenizer(m))
        return run_error(name, "%s: the model has no tokenizer", path);
    all.data = calloc(cases.n, sizeof(*all.data));
    if (!all.data)
        return run_error(name, "out of memory");
    all.n = cases.n;

    start_time = now_seconds();
    r = answer_all(&all, &cases, e, &err);
    if (r < 0)
        return run_error(name, "%s: %s", file, err.text);
    fprintf(stderr, "%s: %zu answers in %.1f s\n", engine_description(e), cases.n,
            now_seconds() - start_time);
    if (o->failures)
        for (size_t i = 0; i < cases.n; i++)
            if (!all.data[i].right)
                print_failure(&cases.cases[i], &all.data[i]);
    print_table(&cases, &all, o->json);
    r = finish_output(name);
    return below_minimum(name, o, &cases, &all) ? EXIT_FAILURE : r;
}

int skills_run(int argc, char **argv)
{
    static const struct option long_options[] = {
        {"cases", required_argument, NULL, 'c'}, {"skill", required_argument, NULL, 's'},
        {"failures", no_argument, NULL, 'f'},    {"json", no_argument, NULL, 'j'},
        {"min", required_argument, NULL, 'm'},   EVAL_ARGS,
    };
    struct engine_options engine_options = {.max_logits = BATCH};
    struct options o = {0};
    const char *path = NULL;
    struct error err;
    int c, status;

    while ((c = eval_args_next(argc, argv, long_options, help, &engine_options, &status)) >= 0) {
        switch (c) {
        case 'c':
            o.cases = optarg;
            break;
        case 's':
            o.skill = optarg;
            break;
        case 'f':
            o.failures = true;
            break;
        case 'j':
            o.json = true;
            break;
        case 'm':
            if (parse_minima(&o, optarg, &err) < 0)
                return usage_error(argv[0], "%s", err.text);
            break;
        }
    }
    if (c == EVAL_ARGS_STOP)
        return status;
    if (o.failures && o.json)
        return usage_error(argv[0], "one of --failures and --json only");
    status = eval_args_model(argc, argv, &path);
    return status == EXIT_SUCCESS ? run(argv[0], path, &engine_options, &o) : status;
}

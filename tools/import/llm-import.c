/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llm-import: makes a model file from a Hugging Face directory or a GGUF file.
 *
 * A signal is only noted; the conversion asks between pieces and unwinds, which removes the
 * unfinished file. A second one ends the process at once, after the same removal.
 */

#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <openssl/crypto.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/standard-fds.h"
#include "daemon/sandbox.h"
#include "engine/model-file.h"
#include "engine/tokenizer.h"
#include "tools/common/program.h"
#include "tools/import/convert.h"
#include "tools/import/foreign-tokenizer.h"
#include "tools/import/metadata.h"
#include "tools/import/model-writer.h"
#include "tools/import/plan.h"
#include "tools/import/source.h"

static const char program[] = "llm-import";

struct arguments {
    struct plan_options plan;
    const char *license, *source, *output;
    bool verify, dry_run, force, quiet;
    enum sandbox_mode sandbox;
};

static volatile sig_atomic_t stop_signal;
static const char *volatile temporary; /* to remove when a second signal comes */

static void on_signal(int number)
{
    if (stop_signal) {
        if (temporary)
            unlink(temporary);
        _exit(128 + number);
    }
    stop_signal = number;
}

static void catch_signals(void)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    struct sigaction before;

    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(numbers[i], &action, NULL);
    /* A file-size limit is an error of write(), not the end. */
    signal(SIGXFSZ, SIG_IGN);
}

static void help(void)
{
    puts("Usage: llm-import [OPTION]... SOURCE OUTPUT\n"
         "       llm-import --verify MODEL\n"
         "Makes the model file OUTPUT for llmd from SOURCE, a Gemma 3n model: a Hugging Face\n"
         "directory or a GGUF file.\n"
         "\n"
         "      --weights TYPE   store matrices as q4, q8, bf16, f16 or f32; without it, what a "
         "GGUF\n"
         "                       file has, and q4 from a Hugging Face directory\n"
         "      --slice e2b      make an E2B model from an E4B one\n"
         "      --layers LIST    keep only these layers, such as 0-19,25-34\n"
         "      --ffn LIST       width of the feed-forward part: one number for all kept layers, "
         "or\n"
         "                       one for each, such as 16384x4,8192x26\n"
         "      --license TEXT   the model's licence, where the source does not tell\n"
         "  -f, --force          replace OUTPUT if it is there\n"
         "  -n, --dry-run        show what would be written, write nothing\n"
         "  -q, --quiet          no progress, no summary\n"
         "      --sandbox MODE   strict (default), report what it would refuse, or off\n"
         "      --verify         compare the contents of a model file with its checksums\n"
         "  -h, --help           show this and exit\n"
         "      --version        show the version and exit");
}

static int fail(const struct error *err)
{
    fprintf(stderr, "llm-import: %s\n", err->text);
    return EXIT_FAILURE;
}

/* "3.9 GB" */
struct size_text {
    char text[32];
};

static struct size_text show_size(uint64_t bytes)
{
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB"};
    struct size_text ret;
    double v = (double)bytes;
    size_t unit = 0;

    for (; v >= 999.5 && unit < 4; unit++)
        v /= 1000;
    snprintf(ret.text, sizeof(ret.text), unit == 0 || v >= 99.95 ? "%.0f %s" : "%.1f %s", v,
             units[unit]);
    return ret;
}

struct progress {
    bool shown;
    uint64_t total;
    double started, last;
};

static void clear_progress(const struct progress *p)
{
    if (p->shown && p->last > 0)
        fputs("\r\033[K", stderr);
}

static bool on_progress(void *userdata, uint64_t done)
{
    enum { WIDTH = 30 };
    struct progress *p = userdata;
    double t = now_seconds(), elapsed = t - p->started;
    char bar[WIDTH + 1], left[32] = "";

    if (stop_signal)
        return true;
    if (!p->shown || t - p->last < 0.1 || p->total == 0)
        return false;
    p->last = t;
    memset(bar, '.', WIDTH);
    memset(bar, '#', (size_t)(done * WIDTH / p->total));
    bar[WIDTH] = 0;
    if (done > 0 && elapsed > 0.5) {
        double seconds = elapsed * (double)(p->total - done) / (double)done;

        snprintf(left, sizeof(left), ", %.0f:%02d left",
                 (seconds - (double)((int)seconds % 60)) / 60, (int)seconds % 60);
    }
    fprintf(stderr, "\r[%s] %3d %%, %s, %s/s%s\033[K", bar, (int)(done * 100 / p->total),
            show_size(done).text,
            show_size(elapsed > 0 ? (uint64_t)((double)done / elapsed) : 0).text, left);
    return false;
}

/* ", requantised from Q6_K" and the like; empty for what carries over. */
static void print_note(FILE *f, const struct plan_item *item)
{
    if (item->fallback)
        fprintf(f, "  (%s: the shape does not allow the wanted type)",
                gguf_tensor_type_name(item->source->type));
    else if (item->requantized)
        fprintf(f, "  (requantised from %s)", gguf_tensor_type_name(item->source->type));
    else
        fprintf(f, "  (%s)", gguf_tensor_type_name(item->source->type));
}

static void print_plan(const struct plan *p, const struct tokenizer_table *table,
                       uint64_t file_bytes)
{
    size_t n_requantized = 0, n_fallback = 0;

    printf("%-44s %-5s %-7s %-16s %12s\n", "TENSOR", "TYPE", "LAYOUT", "SHAPE", "BYTES");
    for (size_t i = 0; i < p->n_items; i++) {
        const struct plan_item *item = &p->items[i];
        char shape[32];

        if (item->n_out == 1)
            snprintf(shape, sizeof(shape), "%u", item->n_in);
        else
            snprintf(shape, sizeof(shape), "%ux%u", item->n_out, item->n_in);
        printf("%-44s %-5s %-7s %-16s %12zu", item->name, weight_type_name(item->type),
               weight_layout_name(item->layout), shape, item->bytes);
        print_note(stdout, item);
        putchar('\n');
        n_requantized += item->requantized;
        n_fallback += item->fallback;
    }
    if (table)
        printf("tokenizer of %u pieces\n", table->n_pieces);
    else
        puts("no tokenizer");
    printf("%zu tensors, %llu bytes; the file: %llu bytes (%s)\n", p->n_items,
           (unsigned long long)p->bytes, (unsigned long long)file_bytes,
           show_size(file_bytes).text);
    if (n_requantized > 0)
        printf("%zu tensors requantised: their values are not exactly those of the source\n",
               n_requantized);
    if (n_fallback > 0)
        printf("%zu tensors are larger than wanted: their shape does not allow blocks of 32\n",
               n_fallback);
}

/* What --dry-run says tensor by tensor, in a few lines. */
static void print_summary(const struct plan *p, const char *output, uint64_t file_bytes,
                          double seconds)
{
    fprintf(stderr, "%s: %s, %zu tensors, in %.1f s (%s/s)\n", output, show_size(file_bytes).text,
            p->n_items, seconds,
            show_size(seconds > 0 ? (uint64_t)((double)file_bytes / seconds) : 0).text);
    for (int fallback = 0; fallback < 2; fallback++) {
        size_t n = 0;

        for (size_t i = 0; i < p->n_items; i++)
            n += fallback ? p->items[i].fallback : p->items[i].requantized;
        if (n == 0)
            continue;
        fprintf(stderr, fallback
                            ? "larger than wanted, for their shape does not allow blocks of 32:"
                            : "requantised, so not exactly what the source has:");
        for (size_t i = 0, shown = 0; i < p->n_items && shown < 4; i++)
            if (fallback ? p->items[i].fallback : p->items[i].requantized) {
                fprintf(stderr, " %s", p->items[i].name);
                shown++;
            }
        if (n > 4)
            fprintf(stderr, " and %zu more; see --dry-run", n - 4);
        fputc('\n', stderr);
    }
}

/* Before hours of work: whether the result may go where it is to go. */
static int check_output(const struct arguments *a, const struct source *s, struct error *err)
{
    struct stat st, other;

    if (stat(a->output, &st) < 0)
        return errno == ENOENT ? 0 : error_set(err, errno, "%s: %m", a->output);
    if (S_ISDIR(st.st_mode))
        return error_set(err, EISDIR, "%s: is a directory; give the model file's own name",
                         a->output);
    if (!S_ISREG(st.st_mode))
        return error_set(err, EINVAL, "%s: is there and is not a regular file", a->output);
    for (unsigned i = 0; i < s->n_files; i++)
        if (fstat(s->files[i].fd, &other) == 0 && other.st_dev == st.st_dev &&
            other.st_ino == st.st_ino)
            return error_set(err, EINVAL, "%s: is the source itself", a->output);
    if (!a->force)
        return error_set(err, EEXIST, "%s: is there already; --force replaces it", a->output);
    return 0;
}

static int load_tokenizer(struct foreign_tokenizer **ret, const struct source *s, struct error *err)
{
    int r = s->gguf ? foreign_tokenizer_from_gguf(ret, s->gguf, err)
                    : foreign_tokenizer_from_folder(ret, s->path, err);

    return r == -ENODATA ? 0 : r; /* a model that takes and gives ids only */
}

/* A model file has no pieces that cannot be sampled: cuts off those beyond the vocabulary. */
static int cut_table(struct tokenizer_table *t, const struct source *s, struct error *err)
{
    uint32_t *ids[] = {&t->bos, &t->eos, &t->unk, &t->pad, &t->start_of_turn, &t->end_of_turn};
    struct tokenizer *tokenizer = NULL;
    uint32_t n = t->n_pieces;
    int r;

    if (n <= s->config.vocab_size)
        return 0;
    t->n_pieces = s->config.vocab_size;
    for (size_t i = 0; i < ARRAY_SIZE(ids); i++)
        if (*ids[i] >= t->n_pieces)
            *ids[i] = TOKENIZER_NONE;
    r = tokenizer_new(&tokenizer, t, err);
    tokenizer_free(tokenizer);
    return r < 0 ? error_prefix(err, -r, "%s: of %u pieces only %u have a row in embed_tokens",
                                s->path, n, t->n_pieces)
                 : 0;
}

static int import(const struct arguments *a, struct error *err)
{
    CLEANUP(source_freep) struct source *source = NULL;
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *tokenizer = NULL;
    CLEANUP(plan_freep) struct plan *plan = NULL;
    CLEANUP(model_writer_freep) struct model_writer *writer = NULL;
    struct progress progress = {0};
    struct tokenizer_table *table;
    uint64_t file_bytes;
    double begin = now_seconds();
    int r;

    r = source_open(&source, a->source, err);
    if (r < 0)
        return r;
    if (!a->dry_run) {
        r = check_output(a, source, err);
        if (r < 0)
            return r;
    }
    r = load_tokenizer(&tokenizer, source, err);
    if (r < 0)
        return r;
    table = tokenizer ? &tokenizer->table : NULL;
    r = source_set_vocabulary(source, table, err);
    if (r < 0 || (table && (r = cut_table(table, source, err)) < 0))
        return r;
    if (a->license && !source->license) {
        source->license = strdup(a->license);
        if (!source->license)
            return error_set(err, ENOMEM, "out of memory");
    }
    r = plan_new(&plan, source, &a->plan, err);
    if (r < 0)
        return r;
    r = model_writer_new(&writer, a->output ? a->output : "model", err);
    if (r < 0)
        return r;
    r = metadata_set(writer, source, plan, &a->plan, table, err);
    if (r < 0)
        return r;
    if (table && (r = metadata_announce_tokenizer(writer, table, err)) < 0)
        return r;
    r = convert_announce(plan, writer, err);
    if (r < 0)
        return r;
    r = model_writer_file_bytes(writer, &file_bytes, err);
    if (r < 0)
        return r;
    if (a->dry_run) {
        print_plan(plan, table, file_bytes);
        return 0;
    }

    r = model_writer_begin(writer, err);
    if (r < 0)
        return r;
    temporary = model_writer_temporary(writer);
    if (table && (r = metadata_append_tokenizer(writer, table, err)) < 0)
        goto done;
    progress = (struct progress){
        .shown = !a->quiet && isatty(STDERR_FILENO),
        .total = plan->bytes,
        .started = now_seconds(),
    };
    r = convert_write(source, plan, writer, on_progress, &progress, err);
    clear_progress(&progress);
    if (r == 0 && stop_signal)
        r = error_set(err, ECANCELED, "interrupted");
    if (r == 0)
        r = model_writer_commit(writer, err);
done:
    temporary = NULL; /* removed by the writer, or in place */
    if (r < 0)
        return r;
    if (!a->quiet)
        print_summary(plan, a->output, file_bytes, now_seconds() - begin);
    return 0;
}

static int verify(const struct arguments *a, struct error *err)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    int r = model_file_open(&f, a->source, err);

    if (r < 0)
        return r;
    r = model_file_verify(f, err);
    if (r < 0)
        return r;
    if (!a->quiet)
        printf("%s: %zu tensors, all as they were written\n", a->source, model_file_n_tensors(f));
    return 0;
}

/* In a folder from a download cache files are links to elsewhere; links to folders are not gone
 * into, wherever the folder is from. 0, -ENOMEM */
static int allow_source(struct sandbox *s, const char *path)
{
    CLEANUP(closedirp) DIR *folder = opendir(path);
    const struct dirent *d;
    int r;

    r = sandbox_allow_path(s, path, SANDBOX_READ, NULL);
    while (folder && r >= 0 && (d = readdir(folder))) {
        CLEANUP(freep) char *file = NULL;

        if (d->d_type != DT_LNK && d->d_type != DT_UNKNOWN)
            continue;
        if (strcmp(d->d_name, ".") == 0 || strcmp(d->d_name, "..") == 0)
            continue;
        if (asprintf(&file, "%s/%s", path, d->d_name) < 0) {
            file = NULL;
            return -ENOMEM;
        }
        r = sandbox_allow_path(s, file, SANDBOX_READ_FILE, NULL);
    }
    return r;
}

static int allow_output(struct sandbox *s, const char *path)
{
    const char *slash = strrchr(path, '/');
    CLEANUP(freep)
    char *folder = slash > path ? strndup(path, (size_t)(slash - path)) : strdup(slash ? "/" : ".");

    return folder ? sandbox_allow_path(s, folder, SANDBOX_WRITE, NULL) : -ENOMEM;
}

/* From here on the process reads the source, writes to the output's folder, and that is all. */
static int confine(const struct arguments *a, struct error *err)
{
    CLEANUP(sandbox_freep) struct sandbox *s = NULL;
    struct error lacks = {""};
    int r;

    /* It reads its configuration, and may load libraries that this names. */
    OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG, NULL);
    if ((r = sandbox_new(&s, a->sandbox)) < 0 ||
        (r = sandbox_allow_calls(s, &seccomp_llm_import)) < 0 ||
        (r = allow_source(s, a->source)) < 0 ||
        (a->output && !a->dry_run && (r = allow_output(s, a->output)) < 0) ||
        (r = sandbox_allow_path(s, "/sys/devices/system/cpu", SANDBOX_READ_FILES, NULL)) < 0)
        return error_set(err, -r, "out of memory");
    sandbox_tell_stderr(s, program, /* prefixes= */ false);
    r = sandbox_enter(s, &lacks, err);
    if (r < 0)
        return error_prefix(err, -r, "the sandbox (--sandbox off goes without)");
    if (lacks.text[0] && !a->quiet)
        fprintf(stderr, "%s: the sandbox has to go without what is missing here: %s\n", program,
                lacks.text);
    return 0;
}

enum {
    OPT_WEIGHTS = 256,
    OPT_SLICE,
    OPT_LAYERS,
    OPT_FFN,
    OPT_LICENSE,
    OPT_VERIFY,
    OPT_VERSION,
    OPT_SANDBOX
};

/* 0: go on; else *ret_status is the end. */
static int parse_arguments(struct arguments *a, int argc, char **argv, int *ret_status)
{
    static const struct option options[] = {
        {"weights", required_argument, NULL, OPT_WEIGHTS},
        {"slice", required_argument, NULL, OPT_SLICE},
        {"layers", required_argument, NULL, OPT_LAYERS},
        {"ffn", required_argument, NULL, OPT_FFN},
        {"license", required_argument, NULL, OPT_LICENSE},
        {"sandbox", required_argument, NULL, OPT_SANDBOX},
        {"verify", no_argument, NULL, OPT_VERIFY},
        {"version", no_argument, NULL, OPT_VERSION},
        {"force", no_argument, NULL, 'f'},
        {"dry-run", no_argument, NULL, 'n'},
        {"quiet", no_argument, NULL, 'q'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    int c, n;

    while ((c = getopt_long(argc, argv, "fnqh", options, NULL)) != -1) {
        switch (c) {
        case OPT_WEIGHTS:
            if (weight_type_parse(optarg, &a->plan.type) < 0) {
                *ret_status =
                    usage_error(program, "--weights %s: not one of q4, q8, bf16, f16, f32", optarg);
                return -1;
            }
            a->plan.has_type = true;
            break;
        case OPT_SLICE:
            if (strcmp(optarg, "e2b") != 0) {
                *ret_status = usage_error(
                    program, "--slice %s: only e2b is known; see --layers and --ffn", optarg);
                return -1;
            }
            a->plan.slice_e2b = true;
            break;
        case OPT_LAYERS:
            a->plan.layers = optarg;
            break;
        case OPT_FFN:
            a->plan.ffn = optarg;
            break;
        case OPT_LICENSE:
            a->license = optarg;
            break;
        case OPT_SANDBOX:
            if (sandbox_parse_mode(optarg, &a->sandbox) < 0) {
                *ret_status =
                    usage_error(program, "--sandbox %s: not one of strict, report, off", optarg);
                return -1;
            }
            break;
        case OPT_VERIFY:
            a->verify = true;
            break;
        case 'f':
            a->force = true;
            break;
        case 'n':
            a->dry_run = true;
            break;
        case 'q':
            a->quiet = true;
            break;
        case 'h':
            help();
            *ret_status = finish_output(program);
            return -1;
        case OPT_VERSION:
            puts("llm-import " LLMD_VERSION);
            *ret_status = finish_output(program);
            return -1;
        default: /* getopt_long() has told what is wrong */
            *ret_status = usage_error(program, NULL);
            return -1;
        }
    }
    n = argc - optind;
    a->source = n > 0 ? argv[optind] : NULL;
    a->output = n > 1 ? argv[optind + 1] : NULL;
    if (n == 0)
        *ret_status = usage_error(program, "no %s given", a->verify ? "MODEL" : "SOURCE");
    else if (n > (a->verify ? 1 : 2))
        *ret_status =
            usage_error(program, "'%s': one argument too many", argv[optind + (a->verify ? 1 : 2)]);
    else if (n == 1 && !a->verify && !a->dry_run)
        *ret_status = usage_error(program, "'%s': no OUTPUT given", a->source);
    else if (a->plan.slice_e2b && (a->plan.layers || a->plan.ffn))
        *ret_status = usage_error(program, "--slice e2b: stands for --layers and --ffn, give no %s",
                                  a->plan.layers ? "--layers" : "--ffn");
    else
        return 0;
    return -1;
}

int main(int argc, char **argv)
{
    struct arguments a = {0};
    struct error err = {""};
    int status, r;

    standard_fds_fill();
    if (parse_arguments(&a, argc, argv, &status) < 0)
        return status;
    catch_signals();
    r = confine(&a, &err);
    if (r == 0)
        r = a.verify ? verify(&a, &err) : import(&a, &err);
    if (r < 0) {
        fail(&err);
        return stop_signal ? 128 + stop_signal : EXIT_FAILURE;
    }
    return finish_output(program);
}

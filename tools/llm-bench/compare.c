/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Rows of both reports meet where all keys of their part are equal; each value of theirs that is
 * known in both makes a line. Everything in a file is looked at as what it is: a key that is
 * missing, or of another type, is a value that is not known.
 */

#include "tools/llm-bench/compare.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/json.h"
#include "client/table.h"
#include "tools/llm-bench/json.h"
#include "tools/llm-bench/report.h"

DEFINE_CLEANUP(struct table *, table_free)

#define DRIFT 0.1 /* of the machine's reading, above which it is told */

static const struct part {
    const char *name;
    const char *keys[3];  /* none: the part is one object */
    const char *units[3]; /* of a key's value in a line's name; plurals end in s */
    const char *values[5];
} parts[] = {
    {"limits",
     {"threads"},
     {"threads"},
     {"read_bytes_per_second", "int8_operations_per_second", "f32_operations_per_second",
      "bf16_operations_per_second"}},
    {"prefill",
     {"threads", "prompt_tokens"},
     {"threads", "tokens"},
     {"tokens_per_second", "operations_per_token"}},
    {"decode",
     {"threads", "depth_tokens", "sessions"},
     {"threads", "deep", "sessions"},
     {"tokens_per_second", "bytes_per_step"}},
    {"memory",
     {NULL},
     {NULL},
     {"anonymous_bytes", "file_bytes", "peak_resident_bytes", "scratch_bytes"}},
    {"accuracy", {NULL}, {NULL}, {"kld_mean_nats", "kld_max_nats"}},
};

int compare_read(struct json_object **ret, const char *path, struct error *err)
{
    CLEANUP(json_object_putp) struct json_object *o = NULL;
    struct json_object *format;

    errno = 0;
    o = json_object_from_file(path);
    if (!o && errno != 0 && errno != EINVAL)
        return error_set(err, errno, "%s: cannot read: %s", path, strerror(errno));
    if (!json_object_is_type(o, json_type_object) ||
        !json_object_object_get_ex(o, "format", &format) ||
        strcmp(json_object_get_string(format) ? json_object_get_string(format) : "",
               REPORT_FORMAT) != 0)
        return error_set(err, EINVAL, "%s: not what 'llm-bench --json' of this version prints",
                         path);
    *ret = TAKE_PTR(o);
    return 0;
}

/* o.part.key; "" where there is none. */
static const char *text_of(struct json_object *o, const char *part, const char *key)
{
    struct json_object *x;

    if (!json_object_object_get_ex(o, part, &x) || !json_object_is_type(x, json_type_object) ||
        !json_object_object_get_ex(x, key, &x) || !json_object_is_type(x, json_type_string))
        return "";
    return json_object_get_string(x);
}

/* row.key; false where it is no number. */
static bool number_of(struct json_object *row, const char *key, double *ret)
{
    struct json_object *x;

    if (!json_object_is_type(row, json_type_object) || !json_object_object_get_ex(row, key, &x) ||
        (!json_object_is_type(x, json_type_double) && !json_object_is_type(x, json_type_int)))
        return false;
    *ret = json_object_get_double(x);
    return isfinite(*ret);
}

static size_t n_rows(struct json_object *o, const char *part, struct json_object **ret)
{
    if (!json_object_object_get_ex(o, part, ret) || !json_object_is_type(*ret, json_type_array))
        return 0;
    return json_object_array_length(*ret);
}

int compare_check(struct json_object *old, struct json_object *fresh, const char *old_path,
                  const char *program, struct error *err)
{
    static const struct {
        const char *part, *key, *what;
    } same[] = {
        {"model", "header_sha256", "another model"},
        {"engine", "level", "another CPU level"},
        {"engine", "activations", "other activations"},
        {"engine", "kv", "other K and V"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(same); i++) {
        const char *was = text_of(old, same[i].part, same[i].key);
        const char *is = text_of(fresh, same[i].part, same[i].key);

        if (strcmp(was, is) != 0)
            return error_set(err, EINVAL,
                             "%s: is of %s: %s there, %s here; ratios would mean nothing", old_path,
                             same[i].what, i == 0 ? text_of(old, "model", "path") : was,
                             i == 0 ? text_of(fresh, "model", "path") : is);
    }
    if (strcmp(text_of(old, "machine", "cpu"), text_of(fresh, "machine", "cpu")) != 0)
        fprintf(stderr, "%s: note: %s is of another machine, '%s', this is '%s'\n", program,
                old_path, text_of(old, "machine", "cpu"), text_of(fresh, "machine", "cpu"));
    return 0;
}

int compare_has_threads(struct json_object *old, unsigned n_threads)
{
    static const char *const names[] = {"prefill", "decode"};
    struct json_object *rows;
    double x;

    for (size_t p = 0; p < ARRAY_SIZE(names); p++)
        for (size_t i = 0, n = n_rows(old, names[p], &rows); i < n; i++)
            if (number_of(json_object_array_get_idx(rows, i), "threads", &x) && x == n_threads)
                return 1;
    return 0;
}

static bool same_keys(const struct part *p, struct json_object *a, struct json_object *b)
{
    double x, y;

    for (size_t k = 0; k < ARRAY_SIZE(p->keys) && p->keys[k]; k++)
        if (!number_of(a, p->keys[k], &x) || !number_of(b, p->keys[k], &y) || x != y)
            return false;
    return true;
}

/* False when out of memory. */
static bool add_line(struct json_object *list, const struct part *p, struct json_object *row,
                     const char *value, double was, double is)
{
    struct json_object *line = json_object_new_object();
    char what[256]; /* %.10g: no number of a file is longer than 17 characters */
    int n = snprintf(what, sizeof(what), "%s", p->name);
    double key;

    for (size_t k = 0; k < ARRAY_SIZE(p->keys) && p->keys[k]; k++)
        if (number_of(row, p->keys[k], &key)) {
            size_t length = strlen(p->units[k]);

            if (key == 1 && p->units[k][length - 1] == 's')
                length--;
            n += snprintf(what + n, sizeof(what) - (size_t)n, "%s %.10g %.*s", k > 0 ? "," : "",
                          key, (int)length, p->units[k]);
        }
    snprintf(what + n, sizeof(what) - (size_t)n, ": %s", value);
    if (line && put(line, "what", json_object_new_string(what)) && put(line, "old", number(was)) &&
        put(line, "new", number(is)) && put(line, "ratio", number(is / was)) &&
        json_object_array_add(list, line) == 0)
        return true;
    json_object_put(line);
    return false;
}

static bool add_lines(struct json_object *list, const struct part *p, struct json_object *a,
                      struct json_object *b)
{
    double was, is;

    for (size_t v = 0; v < ARRAY_SIZE(p->values) && p->values[v]; v++)
        if (number_of(a, p->values[v], &was) && number_of(b, p->values[v], &is) && was > 0 &&
            isfinite(is / was) && !add_line(list, p, b, p->values[v], was, is))
            return false;
    return true;
}

int compare_make(struct json_object **ret, struct json_object *old, struct json_object *fresh,
                 const char *old_path, struct error *err)
{
    CLEANUP(json_object_putp) struct json_object *list = json_object_new_array();
    size_t n_measured = 0;
    bool good = list;

    for (size_t i = 0; good && i < ARRAY_SIZE(parts); i++) {
        const struct part *p = &parts[i];
        struct json_object *a, *b;

        if (!p->keys[0]) {
            if (json_object_object_get_ex(old, p->name, &a) &&
                json_object_object_get_ex(fresh, p->name, &b))
                good = add_lines(list, p, a, b);
            continue;
        }
        for (size_t k = 0, n = n_rows(fresh, p->name, &b); good && k < n; k++)
            for (size_t l = 0, m = n_rows(old, p->name, &a); good && l < m; l++) {
                struct json_object *x = json_object_array_get_idx(a, l);
                struct json_object *y = json_object_array_get_idx(b, k);

                if (same_keys(p, x, y)) {
                    good = add_lines(list, p, x, y);
                    n_measured += strcmp(p->name, "limits") != 0;
                    break;
                }
            }
    }
    if (!good)
        return error_set(err, ENOMEM, "out of memory");
    if (n_measured == 0)
        return error_set(err, EINVAL,
                         "%s: has no line with the same threads, tokens and sessions as this run",
                         old_path);
    *ret = TAKE_PTR(list);
    return 0;
}

int compare_print(struct json_object *list, const char *old_path)
{
    static const struct table_column columns[] = {
        {"WHAT", NULL, TABLE_TEXT, false},
        {"OLD", NULL, TABLE_TEXT, false},
        {"NEW", NULL, TABLE_TEXT, false},
        {"NEW/OLD", NULL, TABLE_TEXT, false},
    };
    static const char *const values[] = {"old", "new", "ratio"};
    static const struct table_format format = {.people = true};
    CLEANUP(table_freep) struct table *t = NULL;
    CLEANUP(freep) char *text = NULL;
    double drift = 1;
    int r = table_new(&t, columns, ARRAY_SIZE(columns));

    for (size_t i = 0; r == 0 && i < json_object_array_length(list); i++) {
        struct json_object *line = json_object_array_get_idx(list, i), *what = NULL;
        char cell[32];
        double x = 0;

        json_object_object_get_ex(line, "what", &what);
        table_add_text(t, json_object_get_string(what));
        for (size_t k = 0; k < ARRAY_SIZE(values); k++) {
            number_of(line, values[k], &x);
            snprintf(cell, sizeof(cell), k == 2 && x >= 0.01 && x < 1e6 ? "%.3f" : "%.4g", x);
            table_add_text(t, cell);
        }
        if (strstr(json_object_get_string(what), "read_bytes_per_second"))
            drift = x;
    }
    if (r == 0)
        r = table_format_rows(t, &format, &text);
    if (r < 0)
        return -ENOMEM;
    printf("\nNew against old, %s\n%s", old_path, text);
    if (fabs(drift - 1) > DRIFT)
        printf("The machine itself reads %.2f times as fast as it did then.\n", drift);
    return 0;
}

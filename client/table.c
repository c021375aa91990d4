/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Cells are kept as they were given, in one array that grows by rows; libsmartcols gets its texts
 * when the table is shown. Its own JSON (2.38) knows neither null nor objects outside a list, and
 * writes numbers as it finds them, so that JSON is made by json-c.
 */

#include "client/table.h"

#include <errno.h>
#include <inttypes.h>
#include <langinfo.h>
#include <libsmartcols/libsmartcols.h>
#include <locale.h>
#include <math.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/json.h"

#define CELL_TEXT_MAX 64 /* of what is no TABLE_TEXT */
#define USEC_PER_SEC 1000000u

struct cell {
    bool set; /* else not known */
    char *text;
    struct json_object *list; /* TABLE_LIST; text is the same with commas */
    uint64_t number;          /* also booleans */
    double real;
};

struct table {
    const struct table_column *columns; /* [n_columns], the caller's */
    size_t n_columns;
    struct cell *cells; /* [n_cells], rows one after another */
    size_t n_cells, n_allocated;
    int error; /* 0, or -ENOMEM */
};

static void scols_unref_tablep(struct libscols_table **t)
{
    scols_unref_table(*t);
}

/* ---- filling ---- */

static void cell_done(struct cell *cell)
{
    free(cell->text);
    json_object_put(cell->list);
}

int table_new(struct table **ret, const struct table_column *columns, size_t n)
{
    struct table *t = calloc(1, sizeof(*t));

    if (!t)
        return -ENOMEM;
    t->columns = columns;
    t->n_columns = n;
    *ret = t;
    return 0;
}

void table_free(struct table *t)
{
    if (!t)
        return;
    for (size_t i = 0; i < t->n_cells; i++)
        cell_done(&t->cells[i]);
    free(t->cells);
    free(t);
}

static void add(struct table *t, struct cell cell)
{
    if (t->error == 0 && t->n_cells == t->n_allocated) {
        size_t n = t->n_allocated ? t->n_allocated * 2 : 16 * t->n_columns;
        struct cell *grown = reallocarray(t->cells, n, sizeof(*grown));

        if (grown) {
            t->cells = grown;
            t->n_allocated = n;
        } else {
            t->error = -ENOMEM;
        }
    }
    if (t->error == 0)
        t->cells[t->n_cells++] = cell;
    else
        cell_done(&cell);
}

void table_add_text(struct table *t, const char *text)
{
    char *copy = strdup(text);

    if (!copy)
        t->error = -ENOMEM;
    add(t, (struct cell){.set = true, .text = copy});
}

void table_add_list(struct table *t, const char *const *texts)
{
    struct json_object *list = json_object_new_array(), *item;
    CLEANUP(fclosep) FILE *f = NULL;
    char *joined = NULL;
    size_t n;
    bool whole;

    f = open_memstream(&joined, &n);
    whole = f && list;
    for (size_t i = 0; whole && texts[i]; i++) {
        fprintf(f, "%s%s", i > 0 ? ", " : "", texts[i]);
        item = json_object_new_string(texts[i]);
        whole = item && json_object_array_add(list, item) == 0;
        if (!whole)
            json_object_put(item);
    }
    if (f && fclose(TAKE_PTR(f)) != 0)
        whole = false;
    if (!whole)
        t->error = -ENOMEM;
    add(t, (struct cell){.set = true, .text = joined, .list = list});
}

void table_add_number(struct table *t, uint64_t number)
{
    add(t, (struct cell){.set = true, .number = number});
}

void table_add_double(struct table *t, double number)
{
    add(t, (struct cell){.set = true, .real = number});
}

void table_add_bool(struct table *t, bool value)
{
    add(t, (struct cell){.set = true, .number = value});
}

void table_add_none(struct table *t)
{
    add(t, (struct cell){0});
}

size_t table_n_rows(const struct table *t)
{
    return t->n_cells / t->n_columns;
}

static const struct cell *cell_at(const struct table *t, size_t row, size_t column)
{
    return &t->cells[row * t->n_columns + column];
}

/* ---- for people ---- */

void format_bytes(uint64_t bytes, char *out, size_t n)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes;
    size_t unit = 0;

    /* What would be shown as 1024.0 belongs to the next unit. */
    for (; value >= 1023.95 && unit + 1 < ARRAY_SIZE(units); unit++)
        value /= 1024;
    snprintf(out, n, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
}

void format_duration(uint64_t usec, char *out, size_t n)
{
    uint64_t s = usec / USEC_PER_SEC;

    if (s < 10)
        snprintf(out, n, "%.1f s", (double)usec / USEC_PER_SEC);
    else if (s < 60)
        snprintf(out, n, "%" PRIu64 " s", s);
    else if (s < 3600)
        snprintf(out, n, "%" PRIu64 " min %" PRIu64 " s", s / 60, s % 60);
    else if (s < 86400)
        snprintf(out, n, "%" PRIu64 " h %" PRIu64 " min", s / 3600, s / 60 % 60);
    else
        snprintf(out, n, "%" PRIu64 " d %" PRIu64 " h", s / 86400, s / 3600 % 24);
}

void format_user(uint64_t uid, char *out, size_t n)
{
    const struct passwd *user = uid <= UINT32_MAX ? getpwuid((uid_t)uid) : NULL;

    if (user)
        snprintf(out, n, "%s", user->pw_name);
    else
        snprintf(out, n, "%" PRIu64, uid);
}

static void format_time(uint64_t usec, char *out, size_t n)
{
    time_t seconds = (time_t)(usec / USEC_PER_SEC);
    struct tm tm;

    if (!localtime_r(&seconds, &tm) || strftime(out, n, "%Y-%m-%d %H:%M:%S", &tm) == 0)
        snprintf(out, n, "%" PRIu64, usec / USEC_PER_SEC);
}

/* So many that three digits stand, but never more than three: 0.0001 is nothing to people. */
static int figure_decimals(double x)
{
    double size = fabs(x);

    return size < 0.9995 ? 3 : size < 9.995 ? 2 : size < 99.95 ? 1 : 0;
}

/* The cell's text: its own, or one written to buffer. */
static const char *format_cell(const struct cell *cell, enum table_kind kind, bool people,
                               char buffer[CELL_TEXT_MAX])
{
    if (!cell->set)
        return "-";
    switch (kind) {
    case TABLE_LIST:
    case TABLE_TEXT:
        return cell->text[0] ? cell->text : "-"; /* words stay in their columns for awk */
    case TABLE_NUMBER:
        break;
    case TABLE_BYTES:
        if (people) {
            format_bytes(cell->number, buffer, CELL_TEXT_MAX);
            return buffer;
        }
        break;
    case TABLE_USER:
        if (people) {
            format_user(cell->number, buffer, CELL_TEXT_MAX);
            return buffer;
        }
        break;
    case TABLE_RATE:
        snprintf(buffer, CELL_TEXT_MAX, "%.1f", cell->real);
        return buffer;
    case TABLE_FIGURE:
        snprintf(buffer, CELL_TEXT_MAX, "%.*f", figure_decimals(cell->real), cell->real);
        return buffer;
    case TABLE_PERCENT:
        snprintf(buffer, CELL_TEXT_MAX, people ? "%.0f %%" : "%.0f", cell->real * 100);
        return buffer;
    case TABLE_BOOL:
        return cell->number ? "yes" : "no";
    case TABLE_DURATION:
        if (people)
            format_duration(cell->number, buffer, CELL_TEXT_MAX);
        else
            snprintf(buffer, CELL_TEXT_MAX, "%.3f", (double)cell->number / USEC_PER_SEC);
        return buffer;
    case TABLE_TIME:
        if (people)
            format_time(cell->number, buffer, CELL_TEXT_MAX);
        else
            snprintf(buffer, CELL_TEXT_MAX, "%" PRIu64, cell->number / USEC_PER_SEC);
        return buffer;
    }
    snprintf(buffer, CELL_TEXT_MAX, "%" PRIu64, cell->number);
    return buffer;
}

static bool is_right_aligned(enum table_kind kind)
{
    switch (kind) {
    case TABLE_TEXT:
    case TABLE_LIST:
    case TABLE_USER:
    case TABLE_BOOL:
    case TABLE_TIME:
        return false;
    case TABLE_NUMBER:
    case TABLE_BYTES:
    case TABLE_RATE:
    case TABLE_FIGURE:
    case TABLE_PERCENT:
    case TABLE_DURATION:
        return true;
    }
    return false;
}

/* libsmartcols shows what the locale cannot as \x..; a script without a locale has UTF-8 too. */
static void use_utf8(void)
{
    if (!setlocale(LC_CTYPE, "") || strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        setlocale(LC_CTYPE, "C.UTF-8");
}

static int new_scols(const struct table_format *format, bool headings, struct libscols_table **ret)
{
    struct libscols_table *s;

    use_utf8();
    s = scols_new_table();
    if (!s)
        return -ENOMEM;
    scols_table_set_termforce(s,
                              format->width > 0 ? SCOLS_TERMFORCE_ALWAYS : SCOLS_TERMFORCE_NEVER);
    if (format->width > 0)
        scols_table_set_termwidth(s, format->width);
    scols_table_enable_noheadings(s, !headings);
    scols_table_enable_colors(s, 0);
    *ret = s;
    return 0;
}

static int print_scols(struct libscols_table *s, char **ret)
{
    char *text = NULL;
    int r;

    if (scols_table_get_nlines(s) == 0) { /* it would print no headings either */
        text = strdup("");
        r = text ? 0 : -ENOMEM;
    } else {
        r = scols_print_table_to_string(s, &text);
    }
    if (r == 0 && text[0] && text[strlen(text) - 1] != '\n') { /* nor the last line's end */
        char *longer;

        if (asprintf(&longer, "%s\n", text) < 0)
            r = -ENOMEM;
        free(text);
        text = r == 0 ? longer : NULL;
    }
    if (r == 0)
        *ret = text;
    return r;
}

int table_format_rows(struct table *t, const struct table_format *format, char **ret)
{
    CLEANUP(scols_unref_tablep) struct libscols_table *s = NULL;
    char buffer[CELL_TEXT_MAX];
    int r = t->error;

    if (r == 0)
        r = new_scols(format, !format->no_legend, &s);
    for (size_t i = 0; i < t->n_columns && r == 0; i++) {
        const struct table_column *c = &t->columns[i];
        int flags =
            (is_right_aligned(c->kind) ? SCOLS_FL_RIGHT : 0) | (c->cut ? SCOLS_FL_TRUNC : 0);

        if (c->heading && !scols_table_new_column(s, c->heading, /* whint= */ 0, flags))
            r = -ENOMEM;
    }
    for (size_t row = 0; row < table_n_rows(t) && r == 0; row++) {
        struct libscols_line *line = scols_table_new_line(s, NULL);
        size_t shown = 0;

        if (!line)
            return -ENOMEM;
        for (size_t i = 0; i < t->n_columns && r == 0; i++)
            if (t->columns[i].heading)
                r = scols_line_set_data(line, shown++,
                                        format_cell(cell_at(t, row, i), t->columns[i].kind,
                                                    /* people= */ format->people, buffer));
    }
    return r == 0 ? print_scols(s, ret) : r;
}

int table_format_upright(struct table *t, const struct table_format *format, char **ret)
{
    CLEANUP(scols_unref_tablep) struct libscols_table *s = NULL;
    char buffer[CELL_TEXT_MAX];
    int r = t->error;

    if (r == 0)
        r = new_scols(format, /* headings= */ false, &s);
    if (r == 0 && (!scols_table_new_column(s, "", 0, 0) || !scols_table_new_column(s, "", 0, 0)))
        r = -ENOMEM;
    for (size_t i = 0; i < t->n_columns && r == 0 && table_n_rows(t) > 0; i++) {
        struct libscols_line *line;

        if (!t->columns[i].heading)
            continue;
        line = scols_table_new_line(s, NULL);
        if (!line)
            return -ENOMEM;
        r = scols_line_set_data(line, 0, t->columns[i].heading);
        if (r == 0)
            r = scols_line_set_data(
                line, 1, format_cell(cell_at(t, 0, i), t->columns[i].kind, format->people, buffer));
    }
    return r == 0 ? print_scols(s, ret) : r;
}

/* ---- for programs ---- */

static struct json_object *cell_to_json(const struct cell *cell, enum table_kind kind)
{
    switch (kind) {
    case TABLE_TEXT:
        return json_object_new_string(cell->text);
    case TABLE_LIST:
        return json_object_get(cell->list);
    case TABLE_NUMBER:
    case TABLE_BYTES:
    case TABLE_USER:
    case TABLE_DURATION:
    case TABLE_TIME:
        return json_object_new_uint64(cell->number);
    case TABLE_RATE:
    case TABLE_FIGURE:
    case TABLE_PERCENT:
        return json_object_new_double(cell->real);
    case TABLE_BOOL:
        return json_object_new_boolean(cell->number != 0);
    }
    return NULL;
}

int table_row_to_json(struct table *t, size_t row, struct json_object **ret)
{
    CLEANUP(json_object_putp) struct json_object *object = json_object_new_object();

    if (t->error < 0 || !object)
        return -ENOMEM;
    for (size_t i = 0; i < t->n_columns; i++) {
        const struct cell *cell = cell_at(t, row, i);
        struct json_object *value = NULL; /* which is JSON's null */

        if (!t->columns[i].field)
            continue;
        if (cell->set) {
            value = cell_to_json(cell, t->columns[i].kind);
            if (!value)
                return -ENOMEM;
        }
        if (json_object_object_add(object, t->columns[i].field, value) < 0) {
            json_object_put(value);
            return -ENOMEM;
        }
    }
    *ret = TAKE_PTR(object);
    return 0;
}

int table_to_json(struct table *t, struct json_object **ret)
{
    CLEANUP(json_object_putp) struct json_object *list = json_object_new_array();
    struct json_object *object;
    int r;

    if (!list)
        return -ENOMEM;
    for (size_t row = 0; row < table_n_rows(t); row++) {
        r = table_row_to_json(t, row, &object);
        if (r < 0)
            return r;
        if (json_object_array_add(list, object) < 0) {
            json_object_put(object);
            return -ENOMEM;
        }
    }
    *ret = TAKE_PTR(list);
    return 0;
}

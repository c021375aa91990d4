/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * table: rows of values, shown to people by libsmartcols or given to programs as JSON. Both come
 * from the same cells: the kind of a column says how its values look on a terminal (sizes with
 * units, names for uids), while pipes get plain numbers, and JSON gets numbers, strings, booleans
 * and null under the field names of its columns, which stay as they are.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct table;
struct json_object;

enum table_kind {
    TABLE_TEXT,
    TABLE_LIST,     /* texts; a list of strings in JSON, with commas between them elsewhere */
    TABLE_NUMBER,   /* uint64_t */
    TABLE_BYTES,    /* uint64_t; "1.5 GiB" on a terminal */
    TABLE_USER,     /* uint64_t, a uid; the user's name on a terminal */
    TABLE_RATE,     /* double, finite; one decimal */
    TABLE_FIGURE,   /* double, finite; three digits, as "0.012", "1.23", "1234" */
    TABLE_PERCENT,  /* double, 0 to 1; "43 %" for people */
    TABLE_BOOL,     /* "yes" and "no" for people */
    TABLE_DURATION, /* uint64_t, usec; "2 h 3 min" on a terminal, else seconds */
    TABLE_TIME,     /* uint64_t, usec since 1970; local time on a terminal, else seconds */
};

struct table_column {
    const char *heading; /* NULL: in JSON only */
    const char *field;   /* NULL: not in JSON */
    enum table_kind kind;
    bool cut; /* where the terminal is too narrow, this column gives way */
};

struct table_format {
    bool people;    /* units and names; a terminal, or the same asked for */
    bool no_legend; /* no headings */
    size_t width;   /* columns of the terminal; 0: as wide as it gets */
};

/* columns must live as long as the table. -ENOMEM */
int table_new(struct table **ret, const struct table_column *columns, size_t n);
void table_free(struct table *t);

/*
 * Each sets the next cell, row by row; of the column's kind. Values are copied. A lack of memory is
 * remembered, and told by what reads the table.
 */
void table_add_text(struct table *t, const char *text);
void table_add_list(struct table *t, const char *const *texts); /* ends with NULL */
void table_add_number(struct table *t, uint64_t number);  /* also sizes, uids, times */
void table_add_double(struct table *t, double number);
void table_add_bool(struct table *t, bool value);
void table_add_none(struct table *t); /* not known: "-", null */

size_t table_n_rows(const struct table *t);

/* Text with a line a row, malloc'ed. -ENOMEM, or -errno of libsmartcols */
int table_format_rows(struct table *t, const struct table_format *format, char **ret);
/* The first row alone, upright: a line a column, its heading first. */
int table_format_upright(struct table *t, const struct table_format *format, char **ret);

/* A list of objects, or the first row's object; the caller's. -ENOMEM */
int table_to_json(struct table *t, struct json_object **ret);
int table_row_to_json(struct table *t, size_t row, struct json_object **ret);

/* Texts for single values, as the cells above have them: "1.5 GiB", "2 h 3 min". */
void format_bytes(uint64_t bytes, char *out, size_t n);
void format_duration(uint64_t usec, char *out, size_t n);
/* The user's name, or the number. */
void format_user(uint64_t uid, char *out, size_t n);

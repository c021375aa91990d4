/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llm-internal.h"

enum value_type {
    VALUE_STRING,
    VALUE_DOUBLE,
    VALUE_UINT32,
    VALUE_UINT64,
    VALUE_BOOL,
    VALUE_STRINGS,
    VALUE_MESSAGES, /* strings: role, text, role, text, ... */
    VALUE_FD,
    VALUE_OBJECT, /* a string */
    VALUE_BIASES,
};

struct bias {
    uint32_t token;
    double bias;
};

struct value {
    char *name;
    enum value_type type;
    double number;
    uint64_t integer;
    char **strings; /* [n_strings]; VALUE_STRING: one */
    size_t n_strings;
    struct bias *biases; /* [n_biases] */
    size_t n_biases;
    int fd;
};

struct llm_options {
    struct value *values;
    size_t n;
};

int llm_options_new(struct llm_options **ret)
{
    *ret = calloc(1, sizeof(**ret));
    return *ret ? 0 : -ENOMEM;
}

void llm_options_free(struct llm_options *o)
{
    if (!o)
        return;
    for (size_t i = 0; i < o->n; i++) {
        struct value *v = &o->values[i];

        for (size_t k = 0; k < v->n_strings; k++)
            free(v->strings[k]);
        free(v->strings);
        free(v->biases);
        free(v->name);
        closep(&v->fd);
    }
    free(o->values);
    free(o);
}

/* The value of that name and type; lists are found again, others are new each time. */
static struct value *add(struct llm_options *o, const char *name, enum value_type type)
{
    struct value *grown;
    char *copy;

    if (type == VALUE_STRINGS || type == VALUE_MESSAGES || type == VALUE_BIASES)
        for (size_t i = 0; i < o->n; i++)
            if (o->values[i].type == type && strcmp(o->values[i].name, name) == 0)
                return &o->values[i];

    copy = strdup(name);
    if (!copy)
        return NULL;
    grown = reallocarray(o->values, o->n + 1, sizeof(*grown));
    if (!grown) {
        free(copy);
        return NULL;
    }
    o->values = grown;
    grown[o->n] = (struct value){.name = copy, .type = type, .fd = -EBADF};
    return &grown[o->n++];
}

static int add_string(struct value *v, const char *text)
{
    char **grown, *copy;

    copy = strdup(text);
    if (!copy)
        return -ENOMEM;
    grown = reallocarray(v->strings, v->n_strings + 1, sizeof(*grown));
    if (!grown) {
        free(copy);
        return -ENOMEM;
    }
    v->strings = grown;
    v->strings[v->n_strings++] = copy;
    return 0;
}

static int set_string(struct llm_options *o, const char *name, enum value_type type,
                      const char *text)
{
    struct value *v = add(o, name, type);
    int r;

    if (!v)
        return -ENOMEM;
    r = add_string(v, text);
    if (r < 0)
        free(o->values[--o->n].name); /* no value without its text */
    return r;
}

int llm_options_set_string(struct llm_options *o, const char *name, const char *value)
{
    return set_string(o, name, VALUE_STRING, value);
}

int llm_options_set_object(struct llm_options *o, const char *name, const char *path)
{
    return set_string(o, name, VALUE_OBJECT, path);
}

int llm_options_set_double(struct llm_options *o, const char *name, double value)
{
    struct value *v = add(o, name, VALUE_DOUBLE);

    if (!v)
        return -ENOMEM;
    v->number = value;
    return 0;
}

static int set_integer(struct llm_options *o, const char *name, enum value_type type, uint64_t n)
{
    struct value *v = add(o, name, type);

    if (!v)
        return -ENOMEM;
    v->integer = n;
    return 0;
}

int llm_options_set_uint32(struct llm_options *o, const char *name, uint32_t value)
{
    return set_integer(o, name, VALUE_UINT32, value);
}

int llm_options_set_uint64(struct llm_options *o, const char *name, uint64_t value)
{
    return set_integer(o, name, VALUE_UINT64, value);
}

int llm_options_set_bool(struct llm_options *o, const char *name, bool value)
{
    return set_integer(o, name, VALUE_BOOL, value);
}

int llm_options_add_string(struct llm_options *o, const char *name, const char *value)
{
    struct value *v = add(o, name, VALUE_STRINGS);

    return v ? add_string(v, value) : -ENOMEM;
}

int llm_options_add_message(struct llm_options *o, const char *role, const char *text)
{
    struct value *v = add(o, "messages", VALUE_MESSAGES);
    int r;

    if (!v)
        return -ENOMEM;
    r = add_string(v, role);
    if (r < 0)
        return r;
    r = add_string(v, text);
    if (r < 0)
        free(v->strings[--v->n_strings]); /* no role without a text */
    return r;
}

int llm_options_add_logit_bias(struct llm_options *o, uint32_t token, double bias)
{
    struct value *v = add(o, "logit-bias", VALUE_BIASES);
    struct bias *grown;

    if (!v)
        return -ENOMEM;
    grown = reallocarray(v->biases, v->n_biases + 1, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    v->biases = grown;
    v->biases[v->n_biases++] = (struct bias){token, bias};
    return 0;
}

int llm_options_set_memory(struct llm_options *o, const char *name, const void *data, size_t n)
{
    CLEANUP(closep) int fd = -EBADF;
    struct value *v;
    size_t done = 0;

    fd = memfd_create("llm-prompt", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    while (done < n) {
        ssize_t w = write(fd, (const char *)data + done, n - done);

        if (w < 0)
            return -errno;
        done += (size_t)w;
    }
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) < 0)
        return -errno;
    v = add(o, name, VALUE_FD);
    if (!v)
        return -ENOMEM;
    v->fd = TAKE_FD(fd);
    return 0;
}

static int append_strings(const struct value *v, sd_bus_message *m)
{
    int r;

    if ((r = sd_bus_message_open_container(m, 'v', "as")) < 0 ||
        (r = sd_bus_message_open_container(m, 'a', "s")) < 0)
        return r;
    for (size_t i = 0; i < v->n_strings; i++) {
        r = sd_bus_message_append(m, "s", v->strings[i]);
        if (r < 0)
            return r;
    }
    r = sd_bus_message_close_container(m);
    return r < 0 ? r : sd_bus_message_close_container(m);
}

static int append_messages(const struct value *v, sd_bus_message *m)
{
    int r;

    if ((r = sd_bus_message_open_container(m, 'v', "a(ss)")) < 0 ||
        (r = sd_bus_message_open_container(m, 'a', "(ss)")) < 0)
        return r;
    for (size_t i = 0; i + 1 < v->n_strings; i += 2) {
        r = sd_bus_message_append(m, "(ss)", v->strings[i], v->strings[i + 1]);
        if (r < 0)
            return r;
    }
    r = sd_bus_message_close_container(m);
    return r < 0 ? r : sd_bus_message_close_container(m);
}

static int append_biases(const struct value *v, sd_bus_message *m)
{
    int r;

    if ((r = sd_bus_message_open_container(m, 'v', "a{ud}")) < 0 ||
        (r = sd_bus_message_open_container(m, 'a', "{ud}")) < 0)
        return r;
    for (size_t i = 0; i < v->n_biases; i++) {
        r = sd_bus_message_append(m, "{ud}", v->biases[i].token, v->biases[i].bias);
        if (r < 0)
            return r;
    }
    r = sd_bus_message_close_container(m);
    return r < 0 ? r : sd_bus_message_close_container(m);
}

static int append_value(const struct value *v, sd_bus_message *m)
{
    switch (v->type) {
    case VALUE_STRING:
        return sd_bus_message_append(m, "v", "s", v->strings[0]);
    case VALUE_DOUBLE:
        return sd_bus_message_append(m, "v", "d", v->number);
    case VALUE_UINT32:
        return sd_bus_message_append(m, "v", "u", (uint32_t)v->integer);
    case VALUE_UINT64:
        return sd_bus_message_append(m, "v", "t", v->integer);
    case VALUE_BOOL:
        return sd_bus_message_append(m, "v", "b", (int)v->integer);
    case VALUE_STRINGS:
        return append_strings(v, m);
    case VALUE_MESSAGES:
        return append_messages(v, m);
    case VALUE_FD:
        return sd_bus_message_append(m, "v", "h", v->fd);
    case VALUE_OBJECT:
        return sd_bus_message_append(m, "v", "o", v->strings[0]);
    case VALUE_BIASES:
        return append_biases(v, m);
    }
    return -EINVAL;
}

int llm_options_append(const struct llm_options *o, sd_bus_message *m)
{
    int r;

    r = sd_bus_message_open_container(m, 'a', "{sv}");
    for (size_t i = 0; r >= 0 && o && i < o->n; i++) {
        if ((r = sd_bus_message_open_container(m, 'e', "sv")) < 0 ||
            (r = sd_bus_message_append(m, "s", o->values[i].name)) < 0 ||
            (r = append_value(&o->values[i], m)) < 0)
            break;
        r = sd_bus_message_close_container(m);
    }
    return r < 0 ? r : sd_bus_message_close_container(m);
}

bool llm_options_is_set(const struct llm_options *o, const char *name)
{
    for (size_t i = 0; o && i < o->n; i++)
        if (o->values[i].type == VALUE_BOOL && strcmp(o->values[i].name, name) == 0)
            return o->values[i].integer != 0;
    return false;
}

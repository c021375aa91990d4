/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Model: the vtable, and how a path is found. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "daemon/bus-objects.h"
#include "daemon/model-store.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

const char *model_state_name(const struct service *s, const struct stored_model *m)
{
    switch (m->state) {
    case MODEL_AVAILABLE:
        return strcmp(m->name, session_set_model_name(s->sessions)) == 0 ? "loaded" : "available";
    case MODEL_INSTALLING:
        return "installing";
    case MODEL_FAILED:
        return "failed";
    }
    return "failed";
}

const char *default_model(const struct service *s)
{
    const char *kept = s->models ? model_store_default(s->models) : NULL;

    return kept ? kept : session_set_model_name(s->sessions);
}

bool model_is_default(const struct service *s, const struct stored_model *m)
{
    return strcmp(m->name, default_model(s)) == 0;
}

static int get_text(sd_bus *bus, const char *path, const char *interface, const char *property,
                    sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_model *f = userdata;
    const char *text = f->model->name;

    if (strcmp(property, "State") == 0)
        text = model_state_name(f->service, f->model);
    else if (strcmp(property, "Failure") == 0)
        text = f->model->failure;
    else if (strcmp(property, "Description") == 0)
        text = f->model->description;
    else if (strcmp(property, "License") == 0)
        text = f->model->license;
    return sd_bus_message_append(reply, "s", text ? text : "");
}

static int get_progress(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_model *f = userdata;

    return sd_bus_message_append(reply, "d", f->model->progress);
}

static int get_bytes(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_model *f = userdata;

    return sd_bus_message_append(reply, "t", f->model->bytes);
}

static int get_context_max(sd_bus *bus, const char *path, const char *interface,
                           const char *property, sd_bus_message *reply, void *userdata,
                           sd_bus_error *error)
{
    struct found_model *f = userdata;

    return sd_bus_message_append(reply, "u", f->model->context_max);
}

static int get_default(sd_bus *bus, const char *path, const char *interface, const char *property,
                       sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_model *f = userdata;

    return sd_bus_message_append(reply, "b", model_is_default(f->service, f->model));
}

const sd_bus_vtable model_vtable[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_PROPERTY("Name", "s", get_text, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("State", "s", get_text, 0, SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE),
    SD_BUS_PROPERTY("Progress", "d", get_progress, 0, 0),
    SD_BUS_PROPERTY("Failure", "s", get_text, 0, SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE),
    SD_BUS_PROPERTY("SizeBytes", "t", get_bytes, 0, 0),
    SD_BUS_PROPERTY("Description", "s", get_text, 0, 0),
    SD_BUS_PROPERTY("License", "s", get_text, 0, 0),
    SD_BUS_PROPERTY("ContextMax", "u", get_context_max, 0, 0),
    SD_BUS_PROPERTY("Default", "b", get_default, 0, SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE),
    SD_BUS_VTABLE_END,
};

int model_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
               void **ret_found, sd_bus_error *ret_error)
{
    struct served *v = userdata;
    CLEANUP(freep) char *name = NULL;
    struct error err = {0};
    int r;

    if (strcmp(path, LLM_MODEL_PATH) == 0)
        return 0; /* the folder of them */
    r = sd_bus_path_decode(path, LLM_MODEL_PATH, &name);
    if (r < 0)
        return r;
    v->found_model = (struct found_model){
        v->service, name && v->service->models ? model_store_find(v->service->models, name) : NULL};
    if (!v->found_model.model) {
        error_set(&err, ENOENT, "%.200s: there is no such model", path);
        return bus_error_set(ret_error, ENOENT, &err);
    }
    *ret_found = &v->found_model;
    return 1;
}

int list_model_paths(sd_bus *bus, const char *prefix, void *userdata, char ***ret_nodes,
                     sd_bus_error *error)
{
    struct served *v = userdata;
    size_t n = v->service->models ? model_store_n(v->service->models) : 0;
    char **paths = calloc(n + 1, sizeof(*paths));
    int r = paths ? 0 : -ENOMEM;

    for (size_t i = 0; i < n && r >= 0; i++)
        r = sd_bus_path_encode(LLM_MODEL_PATH, model_store_get(v->service->models, i)->name,
                               &paths[i]);
    if (r < 0) {
        for (size_t i = 0; paths && i < n; i++)
            free(paths[i]);
        free(paths);
        return r;
    }
    *ret_nodes = paths;
    return 0;
}

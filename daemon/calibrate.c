/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/calibrate.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/vulkan/vulkan.h"
#include "base/cleanup.h"
#include "daemon/arguments.h"
#include "daemon/calibration-file.h"
#include "daemon/config.h"
#include "daemon/confinement.h"
#include "daemon/gpu.h"
#include "daemon/log.h"
#include "daemon/model-store.h"
#include "daemon/places.h"
#include "daemon/service.h"
#include "engine/model.h"

/* What all of it needs, in the order in which it goes. */
struct work {
    struct service service; /* its arguments, configuration and scope alone */
    struct places places;
    struct gpu *gpu;
    sd_event *event;
    struct model_store *models;
    struct model *model;
    struct engine *engine;
};

static void work_done(struct work *w)
{
    engine_free(w->engine);
    model_free(w->model);
    model_store_free(w->models);
    sd_event_unref(w->event);
    gpu_free(w->gpu);
    places_done(&w->places);
}

static void on_models_changed(void *userdata, const char *name, enum store_change what)
{
    (void)userdata;
    (void)name;
    (void)what;
}

static int list_models(struct work *w, struct error *err)
{
    struct model_store_options options = {.state_dir = w->places.state,
                                          .folders = (const char *const *)w->places.folders,
                                          .n_folders = w->places.n_folders,
                                          .changed = on_models_changed};

    options.event = w->event;
    return model_store_new(&w->models, &options, err);
}

/* As the daemon chooses, but where it would have to guess. */
static int open_model(struct work *w, struct error *err)
{
    const char *name = w->service.arguments->model;
    const struct stored_model *m;

    if (!name)
        name = model_store_default(w->models);
    if (!name)
        name = w->service.config->model;
    if (!name && model_store_n(w->models) == 1)
        name = model_store_get(w->models, 0)->name;
    if (!name)
        return error_set(err, ENOENT, "which model? Name it by --model=NAME or --model=FILE");
    m = model_store_find(w->models, name);
    return model_open(&w->model, m && m->state == MODEL_AVAILABLE ? m->path : name, err);
}

static int measure(struct work *w, bool choose, struct calibration_result *ret, struct error *err)
{
    CLEANUP(calibration_freep) struct calibration *c = NULL;
    int r = calibration_new(&c, w->engine, choose);

    while (r >= 0 && (r = calibration_turn(c, err)) > 0)
        ;
    if (r == -ENODEV && engine_lane_failure(w->engine, LANE_GPU))
        return error_set(err, ENODEV, "the GPU has failed: %s",
                         engine_lane_failure(w->engine, LANE_GPU));
    if (r < 0)
        return err->text[0] ? r : error_set(err, -r, "cannot measure: %s", strerror(-r));
    *ret = *calibration_result(c);
    return 0;
}

static void print_row(const char *name, double prefill, double decode, double many)
{
    const double rates[] = {prefill, decode, many};

    printf("%-10s", name);
    for (size_t i = 0; i < 3; i++)
        if (rates[i] > 0)
            printf("  %12.1f", rates[i]);
        else
            printf("  %12s", "-");
    printf("\n");
}

static void print(const struct work *w, const struct calibration_result *c, bool has_gpu)
{
    const struct placement_rates *r = &c->rates;
    struct placement p;
    char text[256];

    printf("%s\n", engine_description(w->engine));
    printf("%-10s  %12s  %12s  %12s\n", "tokens/s", "prompts", "one session", "eight");
    for (int l = 0; l < (has_gpu ? ENGINE_LANES : 1); l++)
        print_row(l == LANE_CPU                            ? "CPU"
                  : c->gpu_activations == ACTIVATIONS_INT8 ? "GPU, int8"
                                                           : "GPU, f32",
                  r->lane[l].prefill, r->lane[l].decode, r->lane[l].decode_many);
    if (!has_gpu)
        return;
    print_row("both", r->both_prefill, 0, r->both_decode);
    placement_init(&p, PLACE_AUTO);
    placement_set_gpu(&p, true);
    placement_set_rates(&p, r);
    placement_explain(&p, text, sizeof(text));
    printf("%s\n", text);
}

static int keep(struct work *w, const char *key, const struct calibration_result *c,
                struct error *err)
{
    const char *folder = w->places.cache;
    int r;

    if (!folder)
        return 0;
    r = calibration_write(folder, key, vulkan_device_name(gpu_device(w->gpu)), c);
    return r < 0 ? error_set(err, -r, "%s: what was measured is not kept: %s", folder, strerror(-r))
                 : 0;
}

static int run(struct work *w, struct error *err)
{
    struct engine_options options = service_engine_options(w->service.arguments, w->service.config);
    struct calibration_result result;
    char key[CALIBRATION_KEY];
    bool has_gpu = false;
    int r;

    options.gpu = gpu_device(w->gpu);
    if ((r = list_models(w, err)) < 0 || (r = open_model(w, err)) < 0 ||
        (r = engine_new(&w->engine, w->model, &options, err)) < 0)
        return r;
    if (options.gpu) {
        r = calibration_key(key, w->model, options.gpu, engine_description(w->engine));
        if (r < 0)
            return error_set(err, -r, "cannot name what is measured: %s", strerror(-r));
        r = engine_add_gpu(w->engine, err);
        has_gpu = r >= 0;
        if (r < 0)
            log_warning("the GPU is not used: %s", err->text);
    } else {
        log_notice("there is no GPU to measure%s%s", gpu_failure(w->gpu) ? ": " : "",
                   gpu_failure(w->gpu) ? gpu_failure(w->gpu) : "");
    }
    r = measure(w, calibration_may_choose(&options), &result, err);
    if (r < 0)
        return r;
    print(w, &result, has_gpu);
    gpu_save_cache(w->gpu);
    return has_gpu ? keep(w, key, &result, err) : 0;
}

int calibrate(const struct arguments *a, const struct config *config, struct error *err)
{
    struct work w = {.service = {.arguments = a, .config = config, .scope = a->scope}};
    struct gpu_options options = {.mode = a->has_backend ? a->backend : config->backend,
                                  .device = a->device ? a->device : config->device,
                                  .scope = a->scope};
    int r;

    /* No socket is made; where it would be is not asked. */
    r = places_find(&w.places, a->scope, config, a->socket ? a->socket : "/nonexistent/llmd", err);
    options.cache_folder = w.places.cache;
    if (r >= 0 && (r = sd_event_default(&w.event)) < 0) /* the store wants one */
        r = error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    if (r >= 0)
        r = gpu_find(&w.gpu, &options, err);
    if (r >= 0)
        r = confine_daemon(&w.service, &w.places, w.gpu, err);
    if (r >= 0)
        r = run(&w, err);
    work_done(&w);
    return r;
}

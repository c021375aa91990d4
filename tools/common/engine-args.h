/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * engine-args: the command-line options that choose how the engine computes, the same in every
 * program, and what every program does with them: open a model, make an engine.
 */

#include <stdint.h>

#include "base/error.h"
#include "engine/engine.h"
#include "engine/model.h"

/* For the getopt_long() table, and the values it then returns. */
enum engine_arg {
    ENGINE_ARG_ACTIVATIONS = 0x4000, /* beyond any letter */
    ENGINE_ARG_BACKEND,
    ENGINE_ARG_CPU_LEVEL,
    ENGINE_ARG_DEVICE,
    ENGINE_ARG_KV,
    ENGINE_ARG_PIN_THREADS,
    ENGINE_ARG_THREADS,
};

/* clang-format off */
#define ENGINE_ARGS                                                                                \
    {"activations", required_argument, NULL, ENGINE_ARG_ACTIVATIONS},                              \
    {"backend", required_argument, NULL, ENGINE_ARG_BACKEND},                                      \
    {"cpu-level", required_argument, NULL, ENGINE_ARG_CPU_LEVEL},                                  \
    {"device", required_argument, NULL, ENGINE_ARG_DEVICE},                                        \
    {"kv", required_argument, NULL, ENGINE_ARG_KV},                                                \
    {"pin-threads", required_argument, NULL, ENGINE_ARG_PIN_THREADS},                              \
    {"threads", required_argument, NULL, ENGINE_ARG_THREADS}

/* Without --threads, for a program that has its own meaning of it. */
#define ENGINE_ARGS_HELP_MODES                                                                     \
    "  --activations f32|int8   how activations meet q4 and q8 weights (int8; on a GPU f32)\n"    \
    "  --backend cpu|vulkan     where to compute: on the processor or on a GPU (cpu)\n"           \
    "  --cpu-level LEVEL        at most reference, avx2, avx512 or amx (the best there is)\n"     \
    "  --device NAME            the GPU with this in its name (the best there is)\n"               \
    "  --kv f16|f32             what K and V are kept as (f32 with f32 activations, else f16)\n" \
    "  --pin-threads yes|no     whether each thread keeps to one core (yes)\n"

#define ENGINE_ARGS_HELP                                                                           \
    ENGINE_ARGS_HELP_MODES                                                                         \
    "  --threads N              threads to compute with (one for each core it may use)\n"
/* clang-format on */

/*
 * If option, as getopt_long() returned it, is one of the above, puts its value (which must stay)
 * into o and returns 1; 0: it is not; -EINVAL: err names option and value. The device's name is
 * kept here, and --device implies --backend vulkan.
 */
int engine_args_take(struct engine_options *o, int option, const char *value, struct error *err);

/* A whole decimal number in low..high for option `name`. 0, -EINVAL: err names option and bounds */
int parse_number(const char *name, const char *text, uint32_t low, uint32_t high, uint32_t *ret,
                 struct error *err);

/*
 * Opens the model and makes an engine for it; the caller frees the engine first. err always says
 * what went wrong. 0, -errno
 */
int open_engine(struct model **ret_model, struct engine **ret_engine, const char *path,
                const struct engine_options *options, struct error *err);

/* The second half of it, for a model that is open: with home LANE_GPU on the device asked for. */
int make_engine(struct engine **ret, const struct model *m, const struct engine_options *options,
                struct error *err);

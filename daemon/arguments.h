/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* arguments: the command line of llmd. What it says goes before the configuration. */

#include <stdbool.h>
#include <stdint.h>

#include "daemon/sandbox.h"
#include "daemon/service.h"
#include "engine/engine.h"
#include "engine/placement.h"

struct arguments {
    enum service_scope scope;
    bool after_stop;         /* daemon/after-stop.h, and exit */
    bool check_config;       /* read the configuration, say what is wrong with it, exit */
    const char *config_file; /* NULL: where the scope has it */
    const char *model;       /* a file, or the name of a model; NULL: configured */
    const char *socket;      /* NULL: where the scope has it */
    struct engine_options engine;
    enum placement_mode backend;
    const char *device; /* part of the GPU's name; NULL: configured */
    bool calibrate;     /* measure processor and GPU again, print that, exit */
    uint32_t context;   /* 0: configured */
    bool has_activations, has_kv_type, has_pinning, has_idle, has_sandbox, has_backend;
    uint64_t idle_usec;
    enum sandbox_mode sandbox;
    bool no_bus;
    int ready_fd; /* -EBADF: none */
};

#define EXIT_USAGE 2

/* true: go on; false: exit with *ret_status, all is said. ret borrows from argv. */
bool arguments_parse(struct arguments *ret, int argc, char **argv, int *ret_status);

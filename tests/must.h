/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What a test cannot go on without: else it says why, and aborts. */

#include <stdio.h>
#include <stdlib.h>

#include "base/error.h"
#include "engine/engine.h"
#include "engine/model.h"

static inline struct model *must_open(const char *path)
{
    struct error err = {""};
    struct model *m;

    if (model_open(&m, path, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return m;
}

static inline struct engine *must_engine(const struct model *m, const struct engine_options *o)
{
    struct error err = {""};
    struct engine *e;

    if (engine_new(&e, m, o, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return e;
}

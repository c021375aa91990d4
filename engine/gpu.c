/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <string.h>

#include "engine/engine-internal.h"

void gpu_prepare(struct engine *e)
{
    (void)e;
}

int gpu_identify(const struct engine *e, uint8_t ret[KV_IDENTITY])
{
    (void)e;
    memset(ret, 0, KV_IDENTITY);
    return 0;
}

const char *gpu_name(const struct engine *e)
{
    (void)e;
    return "none";
}

int engine_add_gpu(struct engine *e, struct error *err)
{
    return e->gpu ? error_set(err, ENOSYS, "this build has no GPU backend")
                  : error_set(err, ENOENT, "the engine was made without a GPU");
}

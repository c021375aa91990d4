/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/model-config.h"

uint32_t model_config_kv_source(const struct model_config *c, uint32_t l)
{
    if (l < c->n_layers_kv)
        return l;
    for (uint32_t i = c->n_layers_kv; i-- > 0;)
        if (c->layers[i].sliding == c->layers[l].sliding)
            return i;
    return l; /* model_config_check() has refused such a model */
}

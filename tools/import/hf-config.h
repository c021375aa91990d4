/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* hf_config: the fields of a Hugging Face model's JSON files. Errors name the field, no file. */

#include <json-c/json.h>

#include "base/error.h"
#include "engine/model-config.h"
#include "engine/model.h"

/*
 * config.json: everything but vocab_size and vocab_size_ple, and the ids that end generation.
 * 0 or -EINVAL
 */
int hf_config_read(struct model_config *ret, struct model_generation *generation, json_object *root,
                   struct error *err);

/* generation_config.json: replaces what it has. 0 or -EINVAL */
int hf_generation_read(struct model_generation *ret, json_object *root, struct error *err);

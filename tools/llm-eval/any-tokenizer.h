/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include "base/error.h"
#include "engine/tokenizer.h"

/* A tokenizer with whatever its table lies in. Zero-initialised; _done takes half-built ones. */
struct any_tokenizer {
    struct tokenizer *t;
    struct model_file *file;
    struct foreign_tokenizer *foreign;
};

/*
 * Opens the tokenizer of a model file, a GGUF file (known by its beginning), a Hugging Face folder,
 * or of a lone tokenizer.json or tokenizer.model (by the end of its name). 0 or -errno, err is set
 */
int any_tokenizer_open(struct any_tokenizer *ret, const char *path, struct error *err);
void any_tokenizer_done(struct any_tokenizer *a);

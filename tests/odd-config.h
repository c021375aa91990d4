/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Configurations that no real model has, but that a model file may bring: every size from its least
 * on, odd widths, one stream or eight, windows of one position, blocks where the shape allows them.
 * The same numbers from the same seed.
 */

#include <stdbool.h>
#include <stdint.h>

#include "tests/model-builder.h"

#define ODD_MOST_TOKENS 80 /* a window is at most twice this, and so is a context */

void odd_seed(uint32_t seed);
uint32_t odd_random(void);                           /* 24 bits */
uint32_t odd_between(uint32_t least, uint32_t most); /* small ones more often */

/* A configuration that a model may have, and weights of any type. tame: rows are wide enough that a
 * norm does not turn a rounding into a sign. */
void odd_config(struct model_builder *b, bool tame);

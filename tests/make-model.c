/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Writes a small model for tests that are not C: make-model SEED FILE */

#include <stdio.h>
#include <stdlib.h>

#include "backends/weight.h"
#include "tests/model-builder.h"

int main(int argc, char **argv)
{
    struct model_builder b = {.type = WEIGHT_Q8};

    if (argc != 3) {
        fputs("make-model: SEED and FILE expected\n", stderr);
        return 2;
    }
    b.seed = (uint32_t)strtoul(argv[1], NULL, 10);
    model_builder_config(&b.config, 10, 5, 32);
    b.config.context_max = 256;
    model_builder_write(&b, argv[2]);
    return 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef LLMD_PUSH_ROWS_H /* glslc knows no #pragma once */
#define LLMD_PUSH_ROWS_H

#include "shaders/push.h"

struct softcap_push {
    ADDRESS x;
    uint n;
    float c;
};
PUSH_FITS(softcap_push);

#endif

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef LLMD_PUSH_H /* glslc knows no #pragma once */
#define LLMD_PUSH_H

/*
 * push: what C and the shaders tell each other about. Both compilers read it, and push-GROUP.h with
 * it: 32-bit members only, addresses first (they are aligned to 8 in shaders, to 4 in C), at most
 * 128 bytes. A shader says PUSH(matmul_push) and has the constants in `push`.
 */

#ifdef VULKAN /* the shader compiler's */

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require

#define ADDRESS uvec2
#define PUSH(type)                                       \
    layout(push_constant, std430) uniform push_constants \
    {                                                    \
        type push;                                       \
    };
#define PUSH_FITS(type)

/* Memory behind an address: Floats(push.x).v[i] */
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Floats
{
    float v[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Words
{
    uint v[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Ints
{
    int v[];
};

#else

#include <stdint.h>
#include <sys/types.h> /* uint */

struct address {
    uint32_t low, high;
};

#define ADDRESS struct address
#define PUSH_FITS(type) \
    _Static_assert(sizeof(struct type) <= 128, "push constants of 128 bytes are what all have")

#endif

/* What vulkan_kv_rows() gives: of each row the addresses of its pages, 64 bits each, and its
 * position. Only pages that the row sees have an entry that may be read. */
struct device_kv_row {
    ADDRESS pages;
    uint pos;
    uint pad;
};

#endif

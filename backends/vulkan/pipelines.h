/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The pipelines: X(NAME, shader, c0, c1, c2, c3) is shaders/SHADER.comp with its specialisation
 * constants of id 0 to 3 set to these (ids that a shader lacks are ignored). VULKAN_NAME is its
 * number for vulkan_dispatch(). Each is made when it is first used.
 *
 * In the files of operations; each group has a list of its own.
 */

#include "backends/weight.h"

/*
 * matmul.c: of each kind of weight (type and layout) products of f32 activations with 1, 2, 4 and 8
 * rows, then with tiles of 32 and 64 rows; of q8 and q4 the same of int8 activations, plainly and
 * with the device's own integer dot product. The constants are type, layout, rows (of a tile: of
 * one of its threads), and blocks of a segment that are worked on at a time.
 */
#define VULKAN_MATMUL_KIND(X, name, vec, tile, type, layout, steps) \
    X(name##_1, vec, type, layout, 1, 4)                            \
    X(name##_2, vec, type, layout, 2, 4)                            \
    X(name##_4, vec, type, layout, 4, 2)                            \
    X(name##_8, vec, type, layout, 8, steps)                        \
    X(name##_32, tile, type, layout, 2, 0)                          \
    X(name##_64, tile, type, layout, 4, 0)

#define VULKAN_F32_KIND(X, type, layout) \
    VULKAN_MATMUL_KIND(X, type##_##layout, matvec, mattile, WEIGHT_##type, LAYOUT_##layout, 1)

#define VULKAN_INT8_KIND(X, type, layout)                                                   \
    VULKAN_MATMUL_KIND(X, INT8_##type##_##layout, matvec_int8, mattile_int8, WEIGHT_##type, \
                       LAYOUT_##layout, 2)                                                  \
    VULKAN_MATMUL_KIND(X, DOT8_##type##_##layout, matvec_dot8, mattile_dot8, WEIGHT_##type, \
                       LAYOUT_##layout, 2)

#define VULKAN_GET_THREADS 64
#define VULKAN_GET_KIND(X, type)                                                          \
    X(GET_##type##_TILE16, get_rows, WEIGHT_##type, LAYOUT_TILE16, VULKAN_GET_THREADS, 0) \
    X(GET_##type##_ROWS, get_rows, WEIGHT_##type, LAYOUT_ROWS, VULKAN_GET_THREADS, 0)

#define VULKAN_QUANTIZE_THREADS 64

#define VULKAN_MATMUL_PIPELINES(X)                          \
    X(QUANTIZE, quantize, VULKAN_QUANTIZE_THREADS, 0, 0, 0) \
    VULKAN_F32_KIND(X, F32, PLAIN)                          \
    VULKAN_F32_KIND(X, F32, TILE16)                         \
    VULKAN_F32_KIND(X, F32, ROWS)                           \
    VULKAN_F32_KIND(X, F32, COLS)                           \
    VULKAN_F32_KIND(X, F16, TILE16)                         \
    VULKAN_F32_KIND(X, F16, ROWS)                           \
    VULKAN_F32_KIND(X, F16, COLS)                           \
    VULKAN_F32_KIND(X, BF16, TILE16)                        \
    VULKAN_F32_KIND(X, BF16, ROWS)                          \
    VULKAN_F32_KIND(X, BF16, COLS)                          \
    VULKAN_F32_KIND(X, Q8, TILE16)                          \
    VULKAN_F32_KIND(X, Q8, ROWS)                            \
    VULKAN_F32_KIND(X, Q8, COLS)                            \
    VULKAN_F32_KIND(X, Q4, TILE16)                          \
    VULKAN_F32_KIND(X, Q4, ROWS)                            \
    VULKAN_F32_KIND(X, Q4, COLS)                            \
    VULKAN_INT8_KIND(X, Q8, TILE16)                         \
    VULKAN_INT8_KIND(X, Q8, ROWS)                           \
    VULKAN_INT8_KIND(X, Q8, COLS)                           \
    VULKAN_INT8_KIND(X, Q4, TILE16)                         \
    VULKAN_INT8_KIND(X, Q4, ROWS)                           \
    VULKAN_INT8_KIND(X, Q4, COLS)                           \
    VULKAN_GET_KIND(X, F32)                                 \
    VULKAN_GET_KIND(X, F16)                                 \
    VULKAN_GET_KIND(X, BF16)                                \
    VULKAN_GET_KIND(X, Q8)                                  \
    VULKAN_GET_KIND(X, Q4)

#define VULKAN_ROWS_PIPELINES(X)                    \
    X(NORM, norm, 128, 0, 0, 0)                     \
    X(HEAD_NORM, head_norm, 64, 0, 0, 0)            \
    X(GATE, gate, 64, 0, 0, 0)                      \
    X(GATE_CUT, gate_cut, 128, 0, 0, 0)             \
    X(PLE, ple, 64, 0, 0, 0)                        \
    X(ALTUP_PREDICT, altup_predict, 128, 0, 0, 0)   \
    X(ALTUP_PREDICT_4, altup_predict, 128, 4, 0, 0) \
    X(ALTUP_CORRECT, altup_correct, 128, 0, 0, 0)   \
    X(ALTUP_CORRECT_4, altup_correct, 128, 4, 0, 0) \
    X(STREAM_NORM, stream_norm, 128, 0, 0, 0)       \
    X(RESCALE, rescale, 128, 0, 0, 0)               \
    X(MERGE, merge, 128, 0, 0, 0)                   \
    X(COPY_ROWS, copy_rows, 64, 0, 0, 0)            \
    X(SOFTCAP, softcap, 64, 0, 0, 0)                \
    X(KV_STORE_F16, kv_store, 64, 1, 0, 0)          \
    X(KV_STORE_F32, kv_store, 64, 0, 0, 0)

/* f16 pages, largest head_dim, a workgroup for each part */
#define VULKAN_ATTENTION_PIPELINES(X)                     \
    X(ATTENTION_F32_256, attention, 0, 256, 0, 0)         \
    X(ATTENTION_F16_256, attention, 1, 256, 0, 0)         \
    X(ATTENTION_F32_1024, attention, 0, 1024, 0, 0)       \
    X(ATTENTION_F16_1024, attention, 1, 1024, 0, 0)       \
    X(ATTENTION_PART_F32_256, attention, 0, 256, 1, 0)    \
    X(ATTENTION_PART_F16_256, attention, 1, 256, 1, 0)    \
    X(ATTENTION_PART_F32_1024, attention, 0, 1024, 1, 0)  \
    X(ATTENTION_PART_F16_1024, attention, 1, 1024, 1, 0)  \
    X(ATTENTION_MERGE_256, attention_merge, 0, 256, 0, 0) \
    X(ATTENTION_MERGE_1024, attention_merge, 0, 1024, 0, 0)

/* SPARSE_F32.. of push-sparse.h; of up whether activations are rounded */
#define VULKAN_SPARSE_PIPELINES(X)                 \
    X(SPARSE_CUT, sparse_cut, 0, 0, 0, 0)          \
    X(SPARSE_UP_F32, sparse_up, 0, 0, 0, 0)        \
    X(SPARSE_UP_F16, sparse_up, 1, 0, 0, 0)        \
    X(SPARSE_UP_BF16, sparse_up, 2, 0, 0, 0)       \
    X(SPARSE_UP_Q8, sparse_up, 3, 0, 0, 0)         \
    X(SPARSE_UP_Q4, sparse_up, 4, 0, 0, 0)         \
    X(SPARSE_UP_Q8_ROUNDED, sparse_up, 3, 1, 0, 0) \
    X(SPARSE_UP_Q4_ROUNDED, sparse_up, 4, 1, 0, 0) \
    X(SPARSE_DOWN_F32, sparse_down, 0, 0, 0, 0)    \
    X(SPARSE_DOWN_F16, sparse_down, 1, 0, 0, 0)    \
    X(SPARSE_DOWN_BF16, sparse_down, 2, 0, 0, 0)   \
    X(SPARSE_DOWN_Q8, sparse_down, 3, 0, 0, 0)     \
    X(SPARSE_DOWN_Q4, sparse_down, 4, 0, 0, 0)

#define VULKAN_PIPELINES(X)       \
    VULKAN_MATMUL_PIPELINES(X)    \
    VULKAN_ROWS_PIPELINES(X)      \
    VULKAN_ATTENTION_PIPELINES(X) \
    VULKAN_SPARSE_PIPELINES(X)

enum vulkan_pipeline {
#define X(name, shader, c0, c1, c2, c3) VULKAN_##name,
    VULKAN_PIPELINES(X)
#undef X
        VULKAN_N_PIPELINES,
};

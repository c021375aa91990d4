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

#define VULKAN_MATMUL_PIPELINES(X)

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

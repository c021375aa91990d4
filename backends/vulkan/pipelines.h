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

#define VULKAN_ATTENTION_PIPELINES(X)

#define VULKAN_SPARSE_PIPELINES(X)

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

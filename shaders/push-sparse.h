/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef LLMD_PUSH_SPARSE_H /* glslc knows no #pragma once */
#define LLMD_PUSH_SPARSE_H

#include "shaders/push.h"

/* Numbers of weight types, in the order of enum weight_type. */
#define SPARSE_F32 0
#define SPARSE_F16 1
#define SPARSE_BF16 2
#define SPARSE_Q8 3
#define SPARSE_Q4 4

/* Neurons whose rows of up a workgroup goes through at a time. */
#define SPARSE_UP_NEURONS 8

/* Words of columns of down that a workgroup goes through, and into how many parts it divides a
 * row's neurons. */
#define SPARSE_DOWN_WORDS 16
#define SPARSE_DOWN_PARTS 16

/* A row's work memory: how many neurons are left, and from word SPARSE_LIST on which. */
#define SPARSE_LIST 64

struct sparse_push {
    ADDRESS x;        /* [n][ld_x] floats; or, rounded: */
    ADDRESS q, d;     /* [n][ld_q], [n][ld_q / 32] */
    ADDRESS gate, y;  /* [n][ld_gate], [n][ld_y] */
    ADDRESS work;     /* [n][ld_work] words */
    ADDRESS up, down; /* weights */
    uint ld_x, ld_q, ld_gate, ld_y, ld_work;
    uint n_in, ffn, n_out;
    uint up_row;                /* words from row to row of up */
    uint down_line, down_block; /* words of a column of down and of 32 with their scales */
    float z;
};
PUSH_FITS(sparse_push);

#endif

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdint.h>

/*
 * A random model small enough for tests of everything around it, with a vocabulary of bytes and
 * Gemma's control pieces, so that it takes any text and has turns. One byte is one token.
 */

#define CHAT_MODEL_PIECES 272u

#define CHAT_MODEL_CONTEXT 8192u

/* window: of four of its five layers. Exits with a message on any failure: tests only. */
void chat_model_write(const char *path, uint32_t window, uint32_t context);

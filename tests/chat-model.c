/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tests/chat-model.h"

#include <stdio.h>
#include <string.h>

#include "engine/tokenizer.h"
#include "tests/model-builder.h"

#define N_PIECES CHAT_MODEL_PIECES

void chat_model_write(const char *path, uint32_t window, uint32_t context)
{
    static char text[N_PIECES * 16];
    static uint32_t offsets[N_PIECES + 1];
    static float scores[N_PIECES];
    static uint8_t types[N_PIECES];
    static const char *const control[] = {"<pad>", "<eos>", "<bos>", "<unk>"};
    static const char *const turns[] = {"<start_of_turn>", "<end_of_turn>"};
    const struct tokenizer_table tokenizer = {
        .n_pieces = N_PIECES,
        .text = text,
        .offsets = offsets,
        .scores = scores,
        .types = types,
        .bos = 2,
        .eos = 1,
        .unk = 3,
        .pad = 0,
        .start_of_turn = 260,
        .end_of_turn = 261,
        .add_bos = true,
    };
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1, .tokenizer = &tokenizer};
    size_t used = 0;

    for (uint32_t i = 0; i < N_PIECES; i++) {
        char piece[32];

        types[i] = PIECE_NORMAL;
        scores[i] = -(float)i;
        if (i < 4) {
            strcpy(piece, control[i]);
            types[i] = i == 3 ? PIECE_UNKNOWN : PIECE_CONTROL;
        } else if (i < 260) {
            snprintf(piece, sizeof(piece), "<0x%02X>", i - 4);
            types[i] = PIECE_BYTE;
        } else if (i < 262) {
            strcpy(piece, turns[i - 260]);
            types[i] = PIECE_CONTROL;
        } else {
            snprintf(piece, sizeof(piece), "%c", 'a' + (int)(i - 262));
        }
        memcpy(text + used, piece, strlen(piece));
        used += strlen(piece);
        offsets[i + 1] = (uint32_t)used;
    }
    model_builder_config(&b.config, 5, 5, window);
    b.config.context_max = context;
    model_builder_write(&b, path);
}

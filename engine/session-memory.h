/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The memory of a session that may outlive its process: what is in it and how it is written. The
 * process never reads it back but for the tokens; session_adopt() does, in another one.
 *
 * A process is killed between two instructions, with all stores before done and none after. Every
 * word that changes is therefore stored whole, in an order in which each prefix is a sound state:
 * contents before the count that makes them count, and a count before what it no longer covers
 * changes. Each word carries a check of its own, and each token a check of all tokens up to it, so
 * that damage is found.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct session_header;

struct session_memory { /* a view of the memory */
    struct session_header *header;
    uint32_t *tokens;         /* [n_ctx] */
    uint32_t *checks;         /* [n_ctx]: of tokens 0 to this one */
    _Atomic uint64_t *tables; /* [n_layers][n_entries], see kv_entry() */
    uint32_t n_ctx, n_layers, n_entries;
    size_t bytes;
};

/* Lays it out; with memory NULL only bytes. False: more than the address space. */
bool session_memory_lay_out(struct session_memory *m, void *memory, uint32_t n_ctx,
                            uint32_t n_layers);

/* Makes zeroed memory a session's without tokens, whose tables are of pool_id. */
void session_memory_init(struct session_memory *m, uint64_t pool_id);

/* Counts; each is one store, after all stores before it in the program. */
void session_memory_set_n_tokens(struct session_memory *m, uint32_t n);
void session_memory_set_n_cached(struct session_memory *m, uint32_t n);
void session_memory_set_mark(struct session_memory *m, uint32_t n);
void session_memory_set_lanes(struct session_memory *m, uint32_t lanes);
void session_memory_set_pool(struct session_memory *m, uint64_t pool_id);

/* Tokens [at, at + n), which must not count yet; those before must be there. */
void session_memory_put_tokens(struct session_memory *m, uint32_t at, const uint32_t *tokens,
                               uint32_t n);

/* Of the first n tokens. */
uint32_t session_memory_check(const struct session_memory *m, uint32_t n);

struct session_found {
    uint32_t n_tokens;
    uint32_t n_cached; /* at most n_tokens; 0 where that is not known */
    uint32_t mark;     /* or UINT32_MAX */
    uint32_t lanes;    /* see session_lanes() */
    uint64_t pool_id;
};

/* Looks at what another process left. 0 or -EBADMSG */
int session_memory_find(const struct session_memory *m, uint32_t vocab_size,
                        struct session_found *ret, struct error *err);

/* An entry of a table: 0: no page. Says what page, and that it was meant for this place. */
uint64_t kv_entry(uint32_t page, uint32_t layer, uint32_t index);
bool kv_entry_page(uint64_t entry, uint32_t layer, uint32_t index, uint32_t *ret_page);

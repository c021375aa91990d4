/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * traffic: how many bytes a decoding step must read. Every weight of the layers and the head counts
 * once a step, whatever the number of sessions, though rows of the sparse layers' down_proj whose
 * gate is zero need not be read: an upper bound. Activations count nothing: they stay in caches.
 */

#include <stdint.h>

#include "engine/model.h"

uint64_t traffic_weights(const struct model *m);

/* More, for one session: its rows of the embedding tables, and K and V of n_tokens positions. */
uint64_t traffic_session(const struct model *m, uint32_t n_tokens, unsigned kv_element_bytes);

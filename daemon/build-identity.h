/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * What K and V are of: a model, and the very program that computed them. Another build may round
 * otherwise, and an answer half by one and half by the other would be neither's.
 */

#include <stdint.h>

#define BUILD_IDENTITY_BYTES 32u

/*
 * Of the model's identity, and the build id that the linker put into this program; where it has
 * put none, no two processes have the same. 0, -errno
 */
int build_identity(const uint8_t model[BUILD_IDENTITY_BYTES], uint8_t ret[BUILD_IDENTITY_BYTES]);

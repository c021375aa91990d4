/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What amx.c offers besides cpu_use_amx(). */

#include "backends/cpu/cpu.h"

#ifdef AMX_EMULATED /* the same source with its tiles in plain C, for tests only */
#define cpu_use_amx cpu_use_amx_emulated
void cpu_use_amx_emulated(struct cpu_backend *c);
#endif

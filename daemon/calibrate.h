/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* calibrate: `llmd --calibrate`: measures the lanes anew, keeps that for daemons of the same scope,
 * which find it when they are started the next time, and prints it. No service is needed. */

#include "base/error.h"

struct arguments;
struct config;

/* 0; without a GPU the processor alone is measured, and err says why; -errno */
int calibrate(const struct arguments *a, const struct config *config, struct error *err);

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* power: whether the machine runs on its battery, as /sys/class/power_supply has it. */

#include <stdbool.h>

#define POWER_SUPPLIES "/sys/class/power_supply"

/*
 * folder: POWER_SUPPLIES; another one for tests. A battery of the machine itself (not a mouse's) is
 * being discharged, and no mains or USB supply is online. Where nothing can be read: false. Any
 * thread
 */
bool power_on_battery(const char *folder);

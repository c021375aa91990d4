/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * calibration-file: calibration.json in the folder of what can be made again, what was measured of
 * some models on some devices. A measurement is found again by its key alone, which names all that
 * it depends on. A file that is damaged or of another version counts as none, and is replaced.
 */

#include <stdint.h>

#include "base/error.h"
#include "engine/calibration.h"

#define CALIBRATION_KEY 65 /* hex of SHA-256, and NUL */

struct model;
struct vulkan_device;

/*
 * Model, program, device and driver, and how the processor computes: engine_description() before
 * the GPU is there. Without a build id (daemon/build-identity.h) no two processes have the same.
 * 0, -errno
 */
int calibration_key(char ret[CALIBRATION_KEY], const struct model *m, const struct vulkan_device *d,
                    const char *description);

/* 0; -ENOENT: not there; -EBADMSG: err says what is wrong with the file; -ENOMEM, -errno */
int calibration_read(const char *folder, const char *key, struct calibration_result *ret,
                     struct error *err);

/* Beside others' measurements, of which the oldest go where there are many; by rename. device: for
 * people who look into the file. The folder is there. 0, -ENOMEM, -errno */
int calibration_write(const char *folder, const char *key, const char *device,
                      const struct calibration_result *c);

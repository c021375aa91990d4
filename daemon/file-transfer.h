/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * file_transfer: reading or writing a descriptor that a client handed in. It may be a pipe that
 * nobody reads or a file whose disk is a program of the client's, so each has a thread of its own
 * and may wait for ever; there are only so many. Loop thread.
 */

#include <stddef.h>
#include <systemd/sd-event.h>

#include "ipc/buffer.h"

struct user;

/* r: 0 or -errno. data: what was read; the receiver may take it. Called once, by the loop. */
typedef void (*file_transferred)(void *userdata, int r, struct buffer *data);

/*
 * Reads from where the descriptor stands to its end; more than `most` bytes are -EFBIG. fd is
 * duplicated. 0; -EDQUOT: the user, or all together, wait for too many; -ENOMEM, -errno
 */
int file_read_start(sd_event *event, struct user *user, int fd, size_t most, file_transferred done,
                    void *userdata);

/* Writes all of data, which is taken over. As above. */
int file_write_start(sd_event *event, struct user *user, int fd, struct buffer *data,
                     file_transferred done, void *userdata);

/* The daemon ends: those that still wait are done with -ESHUTDOWN. */
void file_transfers_abandon(void);

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * after_stop: what ExecStopPost= of the units runs when the daemon is gone and its successor not
 * yet there. $SERVICE_RESULT says how it went (systemd.exec(5)).
 *
 * Killed for lack of memory: most of what the daemon had is the KV of conversations, in a memfd
 * that the service manager holds too, so the kill freed little and the next victim would be
 * somebody else. The manager is told to let go of it. The conversations themselves stay; their next
 * requests compute the KV again. 0; -errno: the manager could not be told
 */
int after_stop(void);

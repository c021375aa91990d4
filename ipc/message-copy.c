/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "ipc/message-copy.h"

#include <errno.h>
#include <stdbool.h>

int message_copy(sd_bus_message *to, sd_bus_message *from)
{
    int r = sd_bus_message_rewind(from, true);

    if (r == -EPERM) { /* it was never sent */
        r = sd_bus_message_seal(from, 1, 0);
        if (r >= 0)
            r = sd_bus_message_rewind(from, true);
    }
    if (r >= 0)
        r = sd_bus_message_copy(to, from, true);
    return r < 0 ? r : 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/after-stop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>

#include "daemon/log.h"

#define BARRIER_USEC UINT64_C(5000000)

int after_stop(void)
{
    const char *result = getenv("SERVICE_RESULT");
    int r;

    if (!result || strcmp(result, "oom-kill") != 0)
        return 0;
    /* The manager looks at who sends it: this process must not be gone when it does. */
    r = sd_notify(0, "FDSTOREREMOVE=1\nFDNAME=kv");
    if (r > 0)
        r = sd_notify_barrier(0, BARRIER_USEC);
    if (r <= 0) {
        r = r == 0 ? -EDESTADDRREQ : r;
        log_error("killed for lack of memory; the service manager cannot be told to free what "
                  "conversations hold of it: %s",
                  strerror(-r));
        return r;
    }
    log_warning("killed for lack of memory; what conversations held of it is freed, and computed "
                "again when they go on");
    return 0;
}

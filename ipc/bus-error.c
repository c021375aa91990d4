/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "ipc/bus-error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ipc/names.h"

#define ERR(name) LLM_ERROR_PREFIX name

/* Each name and each errno once, so that both directions are functions. */
const sd_bus_error_map bus_errors[] = {
    SD_BUS_ERROR_MAP(ERR("Failed"), EIO),
    SD_BUS_ERROR_MAP(ERR("InvalidOption"), EINVAL),
    SD_BUS_ERROR_MAP(ERR("InvalidPrompt"), EBADF),
    SD_BUS_ERROR_MAP(ERR("PromptTooLong"), E2BIG),
    SD_BUS_ERROR_MAP(ERR("ContextFull"), EMSGSIZE),
    SD_BUS_ERROR_MAP(ERR("Busy"), EBUSY),
    SD_BUS_ERROR_MAP(ERR("QuotaExceeded"), EDQUOT),
    SD_BUS_ERROR_MAP(ERR("NoSuchModel"), ENOENT),
    SD_BUS_ERROR_MAP(ERR("NotSupported"), EOPNOTSUPP),
    SD_BUS_ERROR_MAP(ERR("KvExhausted"), ENOBUFS),
    SD_BUS_ERROR_MAP(ERR("OutOfMemory"), ENOMEM),
    SD_BUS_ERROR_MAP(ERR("LowMemory"), ENOSR),
    SD_BUS_ERROR_MAP(ERR("DeviceLost"), ENODEV),
    SD_BUS_ERROR_MAP(ERR("ModelChanged"), ENOTRECOVERABLE),
    SD_BUS_ERROR_MAP(ERR("NumericalError"), EDOM),
    SD_BUS_ERROR_MAP(ERR("ShuttingDown"), ESHUTDOWN),
    SD_BUS_ERROR_MAP(ERR("NoSuchSession"), ESRCH),
    SD_BUS_ERROR_MAP(ERR("SessionLost"), ESTALE),
    SD_BUS_ERROR_MAP(ERR("NotAuthorized"), EACCES),
    SD_BUS_ERROR_MAP(ERR("ModelNotReady"), EAGAIN),
    SD_BUS_ERROR_MAP(ERR("ModelExists"), EEXIST),
    SD_BUS_ERROR_MAP(ERR("InvalidModel"), EBADMSG),
    SD_BUS_ERROR_MAP(ERR("InvalidState"), EPROTO),
    SD_BUS_ERROR_MAP(ERR("NoSpace"), ENOSPC),
    SD_BUS_ERROR_MAP_END,
};

const char *bus_error_name(int code)
{
    code = abs(code);
    for (const sd_bus_error_map *m = bus_errors; m->name; m++)
        if (m->code == code)
            return m->name;
    return bus_errors[0].name;
}

int bus_error_code(const char *name)
{
    for (const sd_bus_error_map *m = bus_errors; m->name; m++)
        if (strcmp(m->name, name) == 0)
            return m->code;
    return -ENOENT;
}

int bus_error_set(sd_bus_error *e, int code, const struct error *err)
{
    code = abs(code);
    sd_bus_error_set(e, bus_error_name(code), err && err->text[0] ? err->text : strerror(code));
    return -code;
}

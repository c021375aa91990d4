/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

/* Every name must be explained where people look. */
static void test_documented(const char *docs_path)
{
    CLEANUP(fclosep) FILE *f = fopen(docs_path, "re");
    CLEANUP(freep) char *docs = NULL;
    size_t allocated = 0;

    assert(f && getdelim(&docs, &allocated, 0, f) > 0);
    for (const sd_bus_error_map *m = bus_errors; m->name; m++) {
        char heading[96];

        snprintf(heading, sizeof(heading), "`%s`", m->name + strlen(LLM_ERROR_PREFIX));
        if (!strstr(docs, heading)) {
            fprintf(stderr, "%s does not explain %s\n", docs_path, heading);
            abort();
        }
    }
}

int main(int argc, char **argv)
{
    struct error err = {"it broke"};
    sd_bus_error e = SD_BUS_ERROR_NULL;
    size_t n = 0;

    assert(sd_bus_error_add_map(bus_errors) >= 0);
    for (const sd_bus_error_map *m = bus_errors; m->name; m++, n++) {
        assert(strncmp(m->name, LLM_ERROR_PREFIX, strlen(LLM_ERROR_PREFIX)) == 0);
        assert(m->code > 0);
        assert(strcmp(bus_error_name(m->code), m->name) == 0);
        assert(strcmp(bus_error_name(-m->code), m->name) == 0);
        assert(bus_error_code(m->name) == m->code);

        /* and as sd-bus reads it on the client's side */
        assert(sd_bus_error_set(&e, m->name, NULL) == -m->code);
        assert(sd_bus_error_get_errno(&e) == m->code);
        sd_bus_error_free(&e);
    }
    assert(n > 10);
    assert(strcmp(bus_error_name(EXDEV), LLM_ERROR_PREFIX "Failed") == 0);
    assert(bus_error_code("org.example.Nothing") == -ENOENT);

    assert(bus_error_set(&e, EBUSY, &err) == -EBUSY);
    assert(sd_bus_error_has_name(&e, LLM_ERROR_PREFIX "Busy") &&
           strcmp(e.message, "it broke") == 0);
    sd_bus_error_free(&e);

    assert(argc == 2);
    test_documented(argv[1]);
    return 0;
}

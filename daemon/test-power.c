/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* test-power: folders as the kernel has them for what gives a machine its power. */

#undef NDEBUG
#include "daemon/power.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[] = "/tmp/test-power-XXXXXX";

/* A file of a supply; NULL: it goes. */
static void set(const char *supply, const char *name, const char *text)
{
    char path[128];
    FILE *f;

    snprintf(path, sizeof(path), "%s/%s", folder, supply);
    mkdir(path, 0700);
    snprintf(path, sizeof(path), "%s/%s/%s", folder, supply, name);
    if (!text) {
        assert(unlink(path) == 0);
        return;
    }
    f = fopen(path, "w");
    assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void expect(bool on_battery)
{
    assert(power_on_battery(folder) == on_battery);
}

int main(void)
{
    char command[64];

    assert(!power_on_battery("/nonexistent"));
    assert(mkdtemp(folder));
    expect(false); /* a machine that has neither */
    set("AC", "type", "Mains\n");
    set("AC", "online", "1\n");
    expect(false);
    set("BAT0", "type", "Battery\n");
    set("BAT0", "status", "Charging\n");
    expect(false);
    set("AC", "online", "0\n");
    expect(false); /* something else charges it */
    set("BAT0", "status", "Discharging\n");
    expect(true);
    set("BAT0", "scope", "System\n");
    expect(true);
    set("AC", "online", "1\n"); /* it gives some all the same */
    expect(false);
    set("AC", "online", "0\n");
    set("ucsi-1", "type", "USB\n");
    set("ucsi-1", "online", "0\n");
    expect(true);
    set("ucsi-1", "online", "1\n");
    expect(false);
    set("ucsi-1", "online", NULL);
    expect(true);
    set("BAT0", "scope", "Device\n"); /* a mouse's */
    expect(false);
    set("BAT1", "type", "Battery\n");
    set("BAT1", "status", "Discharging\n");
    expect(true);
    set("BAT1", "status", "");
    expect(false);
    snprintf(command, sizeof(command), "rm -r %s", folder);
    return system(command) != 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Configurations good and bad, in folders of their own: values, warnings, order, masking. */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <syslog.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/config.h"

static char folder[] = "/tmp/test-config-XXXXXX";
static char warnings[16384];
static size_t n_warnings;

static void note(const char *line)
{
    size_t at = strlen(warnings);

    snprintf(warnings + at, sizeof(warnings) - at, "%s\n", line);
    n_warnings++;
}

static const char *in(const char *name)
{
    static char path[64][256];
    static unsigned i;

    i = (i + 1) % 64;
    snprintf(path[i], sizeof(path[i]), "%s/%s", folder, name);
    return path[i];
}

static void put_bytes(const char *name, const char *text, size_t n)
{
    CLEANUP(fclosep) FILE *f = fopen(in(name), "we");

    assert(f && fwrite(text, 1, n, f) == n);
}

static void put(const char *name, const char *text)
{
    put_bytes(name, text, strlen(text));
}

static struct config *load(const char *text)
{
    struct config *c = NULL;
    struct error err = {0};

    warnings[0] = 0;
    n_warnings = 0;
    put("one.conf", text);
    assert(config_load(&c, SCOPE_SYSTEM, in("one.conf"), note, &err) == 0);
    assert(c->n_warnings == n_warnings);
    return c;
}

static bool warned(unsigned line, const char *text)
{
    char start[300];

    snprintf(start, sizeof(start), "%s:%u: ", in("one.conf"), line);
    for (char *at = warnings; (at = strstr(at, start)); at++) {
        char *end = strchr(at, '\n'), *found = strstr(at, text);

        if (found && found < end)
            return true;
    }
    return false;
}

static void test_values(void)
{
    struct user_limits limits;
    struct config *c = load("\xef\xbb\xbf# comment\n"
                            "; comment\n"
                            "[Model]\n"
                            "  Default = gemma-3n ; comment\n"
                            "\tFolder=/a b\n"
                            "Folder=/c\n"
                            "Prefetch=no\n"
                            "\r\n"
                            "[Engine]\r\n"
                            "Threads=3\r\n"
                            "PinThreads=no\n"
                            "CpuLevel=avx2\n"
                            "Activations=f32\n"
                            "KvType=f16\n"
                            "KvBytes=3G\n"
                            "Backend=hybrid\n"
                            "Device=Iris Xe\n"
                            "UseGpuOnBattery=yes\n"
                            "[Daemon]\n"
                            "Context=1024\n"
                            "IdleTimeoutSec=90\n"
                            "LingerTimeoutSec=5min\n"
                            "LogLevel=debug\n"
                            "MaxConnections=7\n"
                            "[Limits]\n"
                            "MaxSessions=5\n"
                            "MaxKvBytes=512M\n"
                            "Weight=50\n"
                            "[User 4711]\n"
                            "MaxSessions=0\n"
                            "Weight=7\n"
                            "[User root]\n"
                            "MaxQueued=9\n"
                            "[User 4711]\n"
                            "Weight=8");

    assert(n_warnings == 0);
    assert(strcmp(c->model, "gemma-3n") == 0);
    assert(c->n_model_folders == 2 && strcmp(c->model_folders[0], "/a b") == 0);
    assert(strcmp(c->model_folders[1], "/c") == 0 && !c->prefetch);
    assert(c->n_threads == 3 && !c->pin_threads && strcmp(c->cpu_level, "avx2") == 0);
    assert(c->activations == ACTIVATIONS_F32 && c->kv_type == KV_F16);
    assert(c->kv_bytes == UINT64_C(3) << 30 && c->context == 1024);
    assert(c->backend == PLACE_HYBRID && strcmp(c->device, "Iris Xe") == 0 && c->gpu_on_battery);
    assert(c->idle_usec == 90000000 && c->linger_usec == 300000000);
    assert(c->log_level == LOG_DEBUG && c->max_connections == 7);
    assert(c->n_users == 2);
    config_limits(c, 4711, &limits);
    assert(limits.max_sessions == 0 && limits.weight == 8 && limits.max_kv_bytes == 512 << 20);
    config_limits(c, 0, &limits);
    assert(limits.max_sessions == 5 && limits.max_queued == 9 && limits.weight == 50);
    config_limits(c, 1, &limits);
    assert(limits.max_sessions == 5 && limits.weight == 50);
    assert(limits.max_queued == user_limits_default.max_queued);
    config_free(c);

    c = load("[Model]\nFolder=/a\nFolder=\nFolder=/b\nDefault=x\nDefault=\n[Daemon]\n"
             "IdleTimeoutSec=infinity\n");
    assert(n_warnings == 0 && c->n_model_folders == 1 && strcmp(c->model_folders[0], "/b") == 0);
    assert(!c->model && c->idle_usec == 0);
    config_free(c);

    c = load("");
    assert(n_warnings == 0 && c->log_level == LOG_INFO && c->limits.weight > 0);
    config_free(c);
}

static void test_warnings(void)
{
    char line[600];
    struct config *c = load("Stray=1\n"
                            "[Modell]\n"
                            "Default=a\n"
                            "[Model]\n"
                            "Defaults=b\n"
                            "Folder=relative\n"
                            "nonsense\n"
                            "[Limits\n"
                            "Weight=3\n"
                            "[Limits]\n"
                            "Weight=0\n"
                            "Weight=10001\n"
                            "Weight=+4\n"
                            "MaxSessions=5 and more\n"
                            "MaxSessions=-1\n"
                            "MaxSessions=4294967296\n"
                            "MaxSessions=99999999999999999999999\n"
                            "MaxKvBytes=9E\n"
                            "MaxKvBytes=99999999T\n"
                            "MaxKvBytes=1KB\n"
                            "MaxQueued=\n"
                            "[User no-such-user-here]\n"
                            "Weight=9\n"
                            "[User 4294967295]\n"
                            "Weight=9\n"
                            "[Engine]\n"
                            "CpuLevel=sse2\n"
                            "Activations=int4\n"
                            "KvType=q8\n"
                            "[Daemon]\n"
                            "LogLevel=loud\n"
                            "IdleTimeoutSec=3 weeks\n"
                            "IdleTimeoutSec=99999999999999999d\n"
                            "[Model]\n"
                            "Prefetch=perhaps\n");

    assert(warned(1, "before any [Section]"));
    assert(warned(2, "[Modell]: no such section") && warned(2, "Limits, User NAME"));
    assert(!warned(3, ""));
    assert(warned(5, "[Model] Defaults=: no such key") && warned(5, "Default, Folder, Prefetch"));
    assert(warned(6, "[Model] Folder=relative") && warned(6, "an absolute path"));
    assert(warned(7, "neither"));
    assert(warned(8, "']' is missing") && !warned(9, ""));
    for (unsigned i = 11; i <= 21; i++)
        assert(warned(i, "[Limits] ") && warned(i, "(accepted: a number "));
    assert(warned(11, "from 1 to 10000"));
    assert(warned(22, "there is no such user") && !warned(23, ""));
    assert(warned(24, "there is no such user") && !warned(25, ""));
    assert(warned(27, "reference, avx2") && warned(28, "int8 or f32") && warned(29, "auto, f16"));
    assert(warned(31, "err, warning") && warned(32, "infinity") && warned(33, "infinity"));
    assert(warned(35, "yes or no"));
    /* What was not understood changed nothing. */
    assert(memcmp(&c->limits, &user_limits_default, sizeof(c->limits)) == 0);
    assert(!c->model && c->n_users == 0 && c->idle_usec == 0 && c->log_level == LOG_INFO);
    config_free(c);

    memset(line, 'x', sizeof(line));
    memcpy(line, "[Model]\nDefault=", 16);
    memcpy(line + 590, "\nPrefetch=", 10);
    line[599] = 0;
    memcpy(line + 500, "\n[Daemon]\nContext=5\n#", 21);
    line[560] = 0;
    c = load(line);
    assert(warned(2, "more than 190 bytes") && n_warnings == 1 && !c->model && c->context == 5);
    config_free(c);

    put_bytes("one.conf", "[Daemon]\nContext=\0005\nContext=6\n", 31);
    warnings[0] = 0;
    assert(config_load(&c, SCOPE_SYSTEM, in("one.conf"), note, NULL) == 0);
    assert(warned(2, "NUL") && c->context == 6);
    config_free(c);
}

static void test_order(void)
{
    const char *folders[] = {in("etc"), in("run"), in("lib")};
    struct config *c = NULL;
    struct error err = {0};

    assert(config_load_folders(&c, folders, 3, note, &err) == 0 && c->n_files == 0);
    config_free(c);

    assert(mkdir(in("etc"), 0700) == 0 && mkdir(in("lib"), 0700) == 0);
    assert(mkdir(in("etc/llmd.conf.d"), 0700) == 0 && mkdir(in("lib/llmd.conf.d"), 0700) == 0);
    put("lib/llmd.conf", "[Daemon]\nContext=1\nMaxConnections=1\n");
    put("etc/llmd.conf", "[Daemon]\nContext=2\n");
    put("lib/llmd.conf.d/10-a.conf", "[Engine]\nThreads=1\n[Limits]\nWeight=1\n");
    put("etc/llmd.conf.d/05-b.conf", "[Engine]\nThreads=2\n[Limits]\nMaxQueued=2\n");
    put("lib/llmd.conf.d/20-c.conf", "[Limits]\nMaxSessions=3\n");
    put("etc/llmd.conf.d/20-c.conf", ""); /* masks it */
    put("etc/llmd.conf.d/90.conf~", "[Limits]\nMaxSessions=4\n");
    put("etc/llmd.conf.d/.hidden.conf", "[Limits]\nMaxSessions=5\n");
    assert(config_load_folders(&c, folders, 3, note, &err) == 0 && c->n_warnings == 0);
    assert(c->context == 2 && c->max_connections == 256); /* one main file, not both */
    assert(c->n_threads == 1);                            /* 10 after 05, whatever the folder */
    assert(c->limits.weight == 1 && c->limits.max_queued == 2);
    assert(c->limits.max_sessions == user_limits_default.max_sessions);
    assert(c->n_files == 4);
    config_free(c);

    /* A main file that cannot be read is not the same as none. */
    assert(unlink(in("etc/llmd.conf")) == 0 && mkdir(in("etc/llmd.conf"), 0700) == 0);
    assert(config_load_folders(&c, folders, 3, note, &err) == -EISDIR);
    assert(strstr(err.text, "etc/llmd.conf: is a folder"));
    assert(config_load(&c, SCOPE_SYSTEM, in("absent.conf"), note, &err) == -ENOENT);
    assert(strstr(err.text, "absent.conf"));
}

static void test_restart(void)
{
    struct config *a = load("[Engine]\nThreads=1\n[Limits]\nWeight=3\n");
    struct config *b = load("[Engine]\nThreads=2\nKvBytes=1G\nBackend=cpu\nDevice=x\n[Model]\nFolder=/x\n[Limits]\n"
                            "Weight=4\n[Daemon]\nLogLevel=err\nIdleTimeoutSec=4\n");
    char text[256];

    assert(config_need_restart(a, a, text, sizeof(text)) == 0 && !text[0]);
    assert(config_need_restart(a, b, text, sizeof(text)) > 0);
    assert(strcmp(text, "Folder=, Threads=, KvBytes=, Backend=, Device=") == 0);
    config_free(a);
    config_free(b);
}

int main(int argc, char **argv)
{
    char command[300];

    assert(mkdtemp(folder));
    test_values();
    test_warnings();
    test_order();
    test_restart();
    snprintf(command, sizeof(command), "rm -rf '%s'", folder);
    assert(system(command) == 0);
    /* The file that is installed says what is the default, each key commented out. */
    if (argc > 1) {
        struct config *c = NULL;

        warnings[0] = 0;
        assert(config_load(&c, SCOPE_SYSTEM, argv[1], note, NULL) == 0 && c->n_warnings == 0);
        assert(c->limits.weight == user_limits_default.weight && !c->model);
        config_free(c);
    }
    return 0;
}

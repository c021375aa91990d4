/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* test-calibration-file: what is written is read again, and nothing else counts. */

#undef NDEBUG
#include "daemon/calibration-file.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"

static char folder[] = "/tmp/test-calibration-XXXXXX", path[64];

static const struct calibration_result some = {
    .rates = {.lane = {{152.5, 15.25, 60}, {412, 6.5, 0}}, .both_prefill = 500, .both_decode = 70},
    .gpu_activations = ACTIVATIONS_INT8};

static void put(const char *text)
{
    FILE *f = fopen(path, "w");

    assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void get(char *text, size_t size)
{
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(text, 1, size - 1, f) : 0;

    assert(f && n > 0 && n < size - 1);
    text[n] = 0;
    fclose(f);
}

/* Blanks to so many bytes, which JSON does not mind. */
static void pad(long size)
{
    FILE *f = fopen(path, "a");

    assert(f && ftell(f) < size);
    while (ftell(f) < size)
        fputc(' ', f);
    assert(fclose(f) == 0);
}

static void expect(const char *key, int result)
{
    struct calibration_result c = {.rates.both_decode = 77};
    struct error err = {""};
    int r = calibration_read(folder, key, &c, &err);

    if (r != result)
        fprintf(stderr, "%d instead of %d: %s\n", r, result, err.text);
    assert(r == result);
    if (r < 0) {
        assert(c.rates.both_decode == 77 && (r != -EBADMSG || strstr(err.text, path)));
        return;
    }
    assert(c.gpu_activations == some.gpu_activations);
    assert(memcmp(&c.rates, &some.rates, sizeof(c.rates)) == 0);
}

/* What a person, or a disk, may make of it. */
static void test_damaged(void)
{
    static const struct {
        const char *what, *by;
        int result;
    } cases[] = {
        {"152.5", "-1", -EBADMSG},
        {"152.5", "0", -EBADMSG},
        {"412", "0", -EBADMSG},
        {"152.5", "1e8", -EBADMSG},
        {"152.5", "\"much\"", -EBADMSG},
        {"152.5", "NaN", -EBADMSG},
        {"\"int8\"", "\"int9\"", -EBADMSG},
        {"\"int8\"", "8", -EBADMSG},
        {"\"cpu\"", "\"CPU\"", -EBADMSG},
        {"\"gpu\"", "\"cpu\"", -EBADMSG},
        {"\"version\": 1", "\"version\": 2", -EBADMSG},
        {"\"version\":1", "\"version\":2", -EBADMSG},
        {"\"measured\"", "\"guessed\"", -EBADMSG},
        {"\"both-decode\"", "\"none-decode\"", -EBADMSG},
        {"\"aa\"", "\"ab\"", -ENOENT},
    };
    char text[4096], changed[4096];
    struct error err;

    get(text, sizeof(text));
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        const char *at = strstr(text, cases[i].what);

        if (!at) /* json-c has another taste in blanks */
            continue;
        snprintf(changed, sizeof(changed), "%.*s%s%s", (int)(at - text), text, cases[i].by,
                 at + strlen(cases[i].what));
        put(changed);
        expect("aa", cases[i].result);
    }
    for (size_t n = 0; n < strlen(text) - 1; n++) {
        snprintf(changed, sizeof(changed), "%.*s", (int)n, text);
        put(changed);
        assert(calibration_read(folder, "aa", &(struct calibration_result){0}, &err) < 0);
    }
    /* It is replaced, and then as good as new. */
    expect("aa", -EBADMSG);
    assert(calibration_write(folder, "aa", "some \"device\"", &some) == 0);
    expect("aa", 0);
    pad(65536);
    expect("aa", 0);
    pad(65537);
    expect("aa", -EBADMSG);
    unlink(path);
    assert(mkdir(path, 0700) == 0);
    expect("aa", -EBADMSG);
    assert(calibration_write(folder, "aa", "device", &some) < 0);
    rmdir(path);
    assert(symlink("/dev/zero", path) == 0);
    assert(calibration_read(folder, "aa", &(struct calibration_result){0}, &err) < 0);
    unlink(path);
}

static void test_many(void)
{
    char key[8];

    for (int i = 0; i < 20; i++) {
        snprintf(key, sizeof(key), "k%d", i);
        assert(calibration_write(folder, key, "device", &some) == 0);
        expect("k0", i < 16 ? 0 : -ENOENT);
    }
    expect("k3", -ENOENT);
    expect("k4", 0);
    assert(calibration_write(folder, "k4", "device", &some) == 0); /* it is the newest now */
    assert(calibration_write(folder, "k20", "device", &some) == 0);
    expect("k4", 0);
    expect("k5", -ENOENT);
}

int main(void)
{
    char command[64];

    assert(mkdtemp(folder));
    snprintf(path, sizeof(path), "%s/calibration.json", folder);
    expect("aa", -ENOENT);
    assert(calibration_write(folder, "aa", "some \"device\"", &some) == 0);
    expect("aa", 0);
    expect("bb", -ENOENT);
    test_damaged();
    test_many();
    assert(calibration_write("/nonexistent", "aa", "device", &some) < 0);
    snprintf(command, sizeof(command), "rm -r %s", folder);
    return system(command) != 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/calibration-file.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "base/json.h"
#include "base/whole-io.h"
#include "daemon/build-identity.h"
#include "daemon/saved-session.h"
#include "engine/json-text.h"
#include "engine/model.h"

#define FILE_NAME "calibration.json"
#define VERSION 1u
#define BYTES_MAX 65536u
#define KEPT_MAX 16
#define RATE_MAX 1e7f

int calibration_key(char ret[CALIBRATION_KEY], const struct model *m, const struct vulkan_device *d,
                    const char *description)
{
    uint8_t all[BUILD_IDENTITY_BYTES + 1024], model[SAVED_MODEL_BYTES], hash[32];
    int r = saved_session_model(model_get_file(m), model), n;

    if (r >= 0)
        r = build_identity(model, all);
    if (r < 0)
        return r;
    n = snprintf((char *)all + BUILD_IDENTITY_BYTES, sizeof(all) - BUILD_IDENTITY_BYTES, "%s %s",
                 vulkan_device_identity(d), description);
    n = MIN(n, (int)(sizeof(all) - BUILD_IDENTITY_BYTES - 1));
    if (EVP_Digest(all, BUILD_IDENTITY_BYTES + (size_t)n, hash, NULL, EVP_sha256(), NULL) != 1)
        return -EIO;
    for (size_t i = 0; i < sizeof(hash); i++)
        snprintf(ret + 2 * i, 3, "%02x", hash[i]);
    return 0;
}

static char *path_of(const char *folder)
{
    char *path;

    return asprintf(&path, "%s/" FILE_NAME, folder) < 0 ? NULL : path;
}

/* ---- reading ---- */

/* 0: *ret, to be put; -ENOENT, -EBADMSG, -ENOMEM, -errno */
static int read_file(const char *folder, json_object **ret, struct error *err)
{
    static const struct json_limits limits = {.depth = 6, .max_values = 1000};
    CLEANUP(json_object_putp) json_object *v = NULL;
    CLEANUP(freep) char *path = path_of(folder), *text = NULL;
    CLEANUP(closep) int fd = -EBADF;
    struct error why = {0};
    uint64_t version;
    struct stat st;
    int r;

    if (!path)
        return -ENOMEM;
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0)
        return errno == ENOENT ? -ENOENT : error_set(err, errno, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode) || st.st_size > BYTES_MAX)
        return error_set(err, EBADMSG, "%s: is no file of some measurements", path);
    text = malloc((size_t)st.st_size + 1);
    if (!text)
        return -ENOMEM;
    r = read_whole(fd, text, (size_t)st.st_size, 0);
    if (r >= 0)
        r = json_text_parse(&v, text, (size_t)st.st_size, &limits, &why);
    if (r == -ENOMEM)
        return r;
    if (r < 0)
        return error_set(err, EBADMSG, "%s: %s", path, why.text[0] ? why.text : strerror(-r));
    if (!json_text_u64(json_text_get(v, "version"), &version) || version != VERSION)
        return error_set(err, EBADMSG, "%s: is of another version", path);
    if (!json_object_is_type(json_text_get(v, "measured"), json_type_object))
        return error_set(err, EBADMSG, "%s: has nothing that was measured", path);
    *ret = TAKE_PTR(v);
    return 0;
}

static bool read_rate(json_object *v, const char *key, double *ret)
{
    float rate;

    if (!json_text_float(json_text_get(v, key), &rate) || !(rate >= 0) || rate > RATE_MAX)
        return false;
    *ret = (double)rate;
    return true;
}

static bool read_lane(json_object *v, struct lane_rates *ret)
{
    return read_rate(v, "prefill", &ret->prefill) && read_rate(v, "decode", &ret->decode) &&
           read_rate(v, "decode-many", &ret->decode_many);
}

static bool read_entry(json_object *v, struct calibration_result *ret)
{
    struct placement_rates *r = &ret->rates;
    const char *activations = json_text_string(json_text_get(v, "gpu-activations"));

    if (!activations || (strcmp(activations, "f32") != 0 && strcmp(activations, "int8") != 0))
        return false;
    ret->gpu_activations = activations[0] == 'f' ? ACTIVATIONS_F32 : ACTIVATIONS_INT8;
    return read_lane(json_text_get(v, "cpu"), &r->lane[LANE_CPU]) &&
           read_lane(json_text_get(v, "gpu"), &r->lane[LANE_GPU]) &&
           read_rate(v, "both-prefill", &r->both_prefill) &&
           read_rate(v, "both-decode", &r->both_decode) && placement_rates_suffice(r);
}

int calibration_read(const char *folder, const char *key, struct calibration_result *ret,
                     struct error *err)
{
    CLEANUP(json_object_putp) json_object *file = NULL;
    struct calibration_result c = {0};
    json_object *entry;
    int r = read_file(folder, &file, err);

    if (r < 0)
        return r;
    entry = json_text_get(json_text_get(file, "measured"), key);
    if (!entry)
        return -ENOENT;
    if (!read_entry(entry, &c))
        return error_set(err, EBADMSG, "%s/" FILE_NAME ": %.8s...: not a measurement", folder, key);
    *ret = c;
    return 0;
}

/* ---- writing ---- */

/* Takes v over. false: there is no memory */
static bool add(json_object *to, const char *key, json_object *v)
{
    if (v && json_object_object_add(to, key, v) == 0)
        return true;
    json_object_put(v);
    return false;
}

static bool add_rate(json_object *to, const char *key, double rate)
{
    return add(to, key, json_object_new_double(MIN(MAX(rate, 0.0), (double)RATE_MAX)));
}

static bool add_lane(json_object *to, const char *key, const struct lane_rates *r)
{
    json_object *v = json_object_new_object();

    return add(to, key, v) && add_rate(v, "prefill", r->prefill) &&
           add_rate(v, "decode", r->decode) && add_rate(v, "decode-many", r->decode_many);
}

static bool add_entry(json_object *to, const char *key, const char *device,
                      const struct calibration_result *c)
{
    json_object *v = json_object_new_object();

    return add(to, key, v) && add(v, "device", json_object_new_string(device)) &&
           add(v, "gpu-activations",
               json_object_new_string(c->gpu_activations == ACTIVATIONS_INT8 ? "int8" : "f32")) &&
           add_lane(v, "cpu", &c->rates.lane[LANE_CPU]) &&
           add_lane(v, "gpu", &c->rates.lane[LANE_GPU]) &&
           add_rate(v, "both-prefill", c->rates.both_prefill) &&
           add_rate(v, "both-decode", c->rates.both_decode);
}

static int write_file(const char *folder, const char *text)
{
    CLEANUP(freep) char *path = path_of(folder);

    return path ? replace_file(path, NULL, 0, text, strlen(text)) : -ENOMEM;
}

/* What there is, or an empty one. */
static json_object *begin_file(const char *folder)
{
    json_object *file = NULL;

    if (read_file(folder, &file, NULL) >= 0)
        return file;
    file = json_object_new_object();
    if (file && (!add(file, "version", json_object_new_int((int)VERSION)) ||
                 !add(file, "measured", json_object_new_object()))) {
        json_object_put(file);
        return NULL;
    }
    return file;
}

/* The oldest comes first. */
static void drop_oldest(json_object *measured)
{
    while (json_object_object_length(measured) > KEPT_MAX) {
        struct json_object_iterator first = json_object_iter_begin(measured);
        CLEANUP(freep) char *key = strdup(json_object_iter_peek_name(&first));

        if (!key)
            return;
        json_object_object_del(measured, key);
    }
}

int calibration_write(const char *folder, const char *key, const char *device,
                      const struct calibration_result *c)
{
    CLEANUP(json_object_putp) json_object *file = begin_file(folder);
    json_object *measured = json_text_get(file, "measured");
    const char *text;

    if (!file)
        return -ENOMEM;
    json_object_object_del(measured, key);
    if (!add_entry(measured, key, device, c))
        return -ENOMEM;
    drop_oldest(measured);
    text = json_object_to_json_string_ext(file, JSON_C_TO_STRING_PRETTY);
    return text ? write_file(folder, text) : -ENOMEM;
}

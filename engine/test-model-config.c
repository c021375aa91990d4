/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Bounds of every field; JSON there and back to the last bit; refusals by name. */

#undef NDEBUG
#include "engine/model-config.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

/* Sliding layers 0, 1 and a full one own K and V, two share. */
static void fill(struct model_config *c)
{
    memset(c, 0, sizeof(*c));
    c->vocab_size = 300;
    c->vocab_size_ple = 256;
    c->n_layers = 5;
    c->n_layers_kv = 3;
    c->hidden = 64;
    c->ple_width = 16;
    c->laurel_rank = 8;
    c->n_streams = 4;
    c->n_heads = 4;
    c->n_heads_kv = 2;
    c->head_dim = 16;
    c->window = 32;
    c->context_max = 1024;
    c->rms_eps = 1e-6f;
    c->rope_theta = 1e6f;
    c->rope_theta_sliding = 1e4f;
    c->softcap = 30;
    c->coef_clip = 120;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        c->layers[l].ffn_width = 96 + l;
        c->layers[l].sliding = l % 5 != 4 && l != 2;
        c->layers[l].sparsity_z = l < 2 ? 1.6448536f : 0;
    }
}

static void check_refused(const struct model_config *c, const char *expected)
{
    struct error err = {0};

    if (model_config_check(c, &err) != -EINVAL || strncmp(err.text, expected, strlen(expected))) {
        fprintf(stderr, "expected \"%s\", got \"%s\"\n", expected, err.text);
        abort();
    }
    assert(model_config_check(c, NULL) == -EINVAL);
}

static void test_check(void)
{
    static struct model_config c;
    struct error err;

#define REFUSED(field, value, expected) \
    do {                                \
        fill(&c);                       \
        c.field = (value);              \
        check_refused(&c, expected);    \
    } while (0)
#define ACCEPTED(field, value)                     \
    do {                                           \
        fill(&c);                                  \
        c.field = (value);                         \
        assert(model_config_check(&c, &err) == 0); \
    } while (0)

    fill(&c);
    assert(model_config_check(&c, &err) == 0);
    REFUSED(vocab_size, 0, "vocab_size: 0");
    REFUSED(vocab_size, MODEL_MAX_VOCAB + 1, "vocab_size:");
    ACCEPTED(vocab_size, MODEL_MAX_VOCAB);
    REFUSED(vocab_size_ple, 0, "vocab_size_ple:");
    REFUSED(n_layers, 0, "n_layers: 0");
    REFUSED(n_layers, 257, "n_layers: 257");
    REFUSED(n_layers, 2, "n_layers_kv: 3 of 2 layers");
    REFUSED(n_layers_kv, 0, "n_layers_kv: 0");
    REFUSED(n_layers_kv, 6, "n_layers_kv: 6 of 5");
    REFUSED(n_layers_kv, 2, "n_layers_kv: 2, but layer 2 shares K and V and none of them is full");
    REFUSED(hidden, MODEL_MAX_WIDTH + 1, "hidden:");
    REFUSED(ple_width, 0, "ple_width:");
    REFUSED(laurel_rank, 0, "laurel_rank:");
    REFUSED(n_streams, 9, "n_streams: 9");
    REFUSED(n_streams, 0, "n_streams: 0");
    REFUSED(n_heads, 5, "n_heads_kv: 2 does not divide n_heads 5");
    REFUSED(n_heads_kv, 0, "n_heads_kv: 0");
    REFUSED(head_dim, 15, "head_dim: 15 is odd");
    REFUSED(head_dim, 1 << 19, "n_heads * head_dim: 2097152");
    REFUSED(window, 0, "window:");
    REFUSED(context_max, UINT32_MAX, "context_max:");
    ACCEPTED(rms_eps, 0);
    REFUSED(rms_eps, -1e-6f, "rms_eps:");
    REFUSED(rms_eps, NAN, "rms_eps:");
    REFUSED(rope_theta, 0, "rope_theta:");
    REFUSED(rope_theta, INFINITY, "rope_theta:");
    REFUSED(rope_theta_sliding, -1, "rope_theta_sliding:");
    ACCEPTED(softcap, 0);
    REFUSED(softcap, NAN, "softcap:");
    REFUSED(coef_clip, 0, "coef_clip:");
    REFUSED(layers[3].ffn_width, 0, "layers[3].ffn_width: 0");
    REFUSED(layers[4].ffn_width, MODEL_MAX_WIDTH + 1, "layers[4].ffn_width:");
    REFUSED(layers[0].sparsity_z, NAN, "layers[0].sparsity_z:");
    REFUSED(layers[0].sparsity_z, -1, "layers[0].sparsity_z:");
    REFUSED(layers[0].sparsity_z, INFINITY, "layers[0].sparsity_z:");
}

static void test_kv_source(void)
{
    static struct model_config c;

    fill(&c);
    for (uint32_t l = 0; l < 3; l++)
        assert(model_config_kv_source(&c, l) == l);
    assert(model_config_kv_source(&c, 3) == 1); /* the last sliding owner */
    assert(model_config_kv_source(&c, 4) == 2); /* the last full one */
}

static void test_round_trip(void)
{
    static struct model_config c, back;
    struct error err = {0};

    /* Floats whose shortest decimal is long. */
    static const float odd[] = {1e-6f,         0x1.fffffep-1f, 0x1.000002p0f, 1.17549435e-38f,
                                3.4028235e38f, 0.1f,           16777217.f,    3.1415927f};

    for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
        CLEANUP(freep) char *json = NULL;

        fill(&c);
        c.rope_theta = odd[i];
        c.layers[1].sparsity_z = odd[i];
        json = model_config_to_json(&c);
        assert(json);
        memset(&back, 0xff, sizeof(back));
        if (model_config_parse(&back, json, &err) < 0) {
            fprintf(stderr, "%s: %s\n", err.text, json);
            abort();
        }
        assert(memcmp(&c, &back, sizeof(c)) == 0);
    }
}

static void parse_refused(const char *from, const char *to, const char *expected)
{
    static struct model_config c, back;
    CLEANUP(freep) char *json = NULL, *changed = NULL;
    struct error err = {0};
    char *at;

    fill(&c);
    memset(&back, 0xff, sizeof(back));
    json = model_config_to_json(&c);
    at = strstr(json, from);
    assert(at && asprintf(&changed, "%.*s%s%s", (int)(at - json), json, to, at + strlen(from)) > 0);
    if (model_config_parse(&back, changed, &err) != -EINVAL || !strstr(err.text, expected)) {
        fprintf(stderr, "expected \"%s\", got \"%s\": %s\n", expected, err.text, changed);
        abort();
    }
    assert(back.n_layers == UINT32_MAX); /* untouched */
}

static void test_parse(void)
{
    parse_refused("\"hidden\":64,", "", "hidden: missing");
    parse_refused("\"hidden\":64,", "\"hidden\":64,\"hiden\":64,", "hiden: not a field");
    parse_refused("\"hidden\":64,", "\"hidden\":64,\"hidden\":64,", "twice");
    parse_refused("\"hidden\":64,", "\"hidden\":64.5,", "hidden: missing or not a count");
    parse_refused("\"hidden\":64,", "\"hidden\":-64,", "hidden: missing or not a count");
    parse_refused("\"hidden\":64,", "\"hidden\":4294967360,", "hidden: missing or not a count");
    parse_refused("\"hidden\":64,", "\"hidden\":\"64\",", "hidden: missing or not a count");
    parse_refused("\"hidden\":64,", "\"hidden\":null,", "hidden: missing or not a count");
    parse_refused("\"hidden\":64,", "\"hidden\":0,", "hidden: 0, must be");
    parse_refused("\"softcap\":30", "\"softcap\":1e39", "softcap: missing or not a finite");
    parse_refused("\"softcap\":30", "\"softcap\":NaN", "not JSON");
    parse_refused("\"softcap\":30", "\"softcap\":\"30\"", "softcap: missing or not a finite");
    parse_refused("\"n_layers\":5", "\"n_layers\":6", "layers: 5 entries, n_layers is 6");
    parse_refused("\"n_layers\":5", "\"n_layers\":4000000000", "layers: 5 entries");
    parse_refused("\"layers\":[", "\"layers\":[{},", "layers: 6 entries");
    parse_refused("\"layers\":[{", "\"layers\":[[],{", "layers: 6 entries");
    parse_refused("{\"ffn_width\":96,", "{", "layers[0]: not an object of");
    parse_refused("{\"ffn_width\":96,", "{\"ffn\":96,", "layers[0].ffn_width: missing");
    parse_refused("\"sliding\":true", "\"sliding\":1", "layers[0].sliding");
    parse_refused("\"sparsity_z\":0", "\"sparsity_z\":false", "layers[2].sparsity_z");
    parse_refused("\"layers\":", "\"layer\":", "layers: missing");
    parse_refused("{", "", "");
    parse_refused("{", "[{", "");
}

int main(void)
{
    test_check();
    test_kv_source();
    test_round_trip();
    test_parse();
    return 0;
}

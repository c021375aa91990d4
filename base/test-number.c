/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/checked.h"
#include "base/number.h"

#define UNTOUCHED UINT64_C(4711)

static void test_whole(void)
{
    static const char *const wrong[] = {"",
                                        "-1",
                                        "+1",
                                        " 1",
                                        "1 ",
                                        "1x",
                                        "x",
                                        "0x10",
                                        "1.0",
                                        "18446744073709551616",
                                        "99999999999999999999999999999999"};
    uint64_t n = UNTOUCHED;

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++)
        assert(number_parse(wrong[i], UINT64_MAX, &n) == -EINVAL && n == UNTOUCHED);
    assert(number_parse("0", 0, &n) == 0 && n == 0);
    assert(number_parse("18446744073709551615", UINT64_MAX, &n) == 0 && n == UINT64_MAX);
    assert(number_parse("007", 7, &n) == 0 && n == 7);
    assert(number_parse("8", 7, &n) == -EINVAL && n == 7);
}

static void test_bytes(void)
{
    static const char *const wrong[] = {"",    "K",  "1k",        "1KB",
                                        "1 K", "1P", "16777216T", "18446744073709551615K"};
    uint64_t n = UNTOUCHED;

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++)
        assert(number_parse_bytes(wrong[i], &n) == -EINVAL && n == UNTOUCHED);
    assert(number_parse_bytes("3", &n) == 0 && n == 3);
    assert(number_parse_bytes("1K", &n) == 0 && n == 1024);
    assert(number_parse_bytes("2M", &n) == 0 && n == UINT64_C(2) << 20);
    assert(number_parse_bytes("3G", &n) == 0 && n == UINT64_C(3) << 30);
    assert(number_parse_bytes("16777215T", &n) == 0 && n == UINT64_C(16777215) << 40);
}

static void test_rest(void)
{
    const char *rest = NULL;
    uint64_t n = 0;

    assert(number_begin("12min", &n, &rest) == 0 && n == 12 && strcmp(rest, "min") == 0);
    assert(number_begin("5", &n, &rest) == 0 && n == 5 && *rest == 0);
    assert(number_begin("min", &n, &rest) == -EINVAL && n == 5);
}

int main(void)
{
    test_whole();
    test_bytes();
    test_rest();
    return 0;
}

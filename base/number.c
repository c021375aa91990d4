/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "base/number.h"

#include <errno.h>
#include <string.h>

#include "base/checked.h"

int number_begin(const char *text, uint64_t *ret, const char **ret_rest)
{
    const char *p = text;
    uint64_t n = 0;

    for (; *p >= '0' && *p <= '9'; p++)
        if (ckd_mul(&n, n, 10u) || ckd_add(&n, n, (unsigned)(*p - '0')))
            return -EINVAL;
    if (p == text)
        return -EINVAL;
    *ret = n;
    *ret_rest = p;
    return 0;
}

int number_parse(const char *text, uint64_t most, uint64_t *ret)
{
    const char *rest;
    uint64_t n;

    if (number_begin(text, &n, &rest) < 0 || *rest || n > most)
        return -EINVAL;
    *ret = n;
    return 0;
}

int number_parse_bytes(const char *text, uint64_t *ret)
{
    static const char units[] = "KMGT";
    const char *rest, *unit;
    uint64_t n;

    if (number_begin(text, &n, &rest) < 0)
        return -EINVAL;
    if (*rest) {
        unit = strchr(units, *rest);
        if (!unit || rest[1] || ckd_mul(&n, n, UINT64_C(1) << (10 * (unit - units + 1))))
            return -EINVAL;
    }
    *ret = n;
    return 0;
}

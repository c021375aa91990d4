/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "backends/vulkan/vulkan-backend.h"

void vulkan_use_sparse(struct backend_ops *ops)
{
    (void)ops;
}

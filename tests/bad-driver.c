/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A Vulkan driver for tests, which misbehaves as soon as the loader looks at it, in the way that
 * BAD_DRIVER says, and has no devices.
 */

#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT int vk_icdNegotiateLoaderICDInterfaceVersion(uint32_t *version);
EXPORT void *vk_icdGetInstanceProcAddr(void *instance, const char *name);

static void *wait_for_ever(void *userdata)
{
    for (;;)
        pause();
    return userdata;
}

int vk_icdNegotiateLoaderICDInterfaceVersion(uint32_t *version)
{
    const char *how = getenv("BAD_DRIVER");
    pthread_t thread;

    (void)version;
    if (how && strcmp(how, "crashes") == 0)
        abort();
    if (how && strcmp(how, "hangs") == 0)
        wait_for_ever(NULL);
    if (how && strcmp(how, "starts a thread") == 0)
        pthread_create(&thread, NULL, wait_for_ever, NULL);
    if (how && strcmp(how, "stays") == 0 && fork() == 0) {
        alarm(20);
        wait_for_ever(NULL);
    }
    if (how && strcmp(how, "opens a card") == 0 && open(getenv("BAD_DRIVER_CARD"), O_PATH) < 0)
        abort();
    return -9; /* VK_ERROR_INCOMPATIBLE_DRIVER */
}

void *vk_icdGetInstanceProcAddr(void *instance, const char *name)
{
    (void)instance;
    (void)name;
    return NULL;
}

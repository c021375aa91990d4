/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What can be imported is found out by using it. Drivers say so too early: some look at the memory
 * behind an import only when something is submitted that uses it, and one that then finds pages
 * which it cannot have, such as those of a file that is mapped for reading, gives the whole device
 * up.
 */

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "base/cleanup.h"

/* A mapping of `bytes` within twice as many, so that it can be aligned to what may be more than a
 * page. The pattern is in its first half. */
static void *map(size_t bytes, bool writable, void **ret_all)
{
    CLEANUP(closep) int fd = memfd_create("vulkan", MFD_CLOEXEC);
    char *all, *p;

    if (fd < 0 || ftruncate(fd, (off_t)(2 * bytes)) < 0)
        return NULL;
    all = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (all == MAP_FAILED)
        return NULL;
    p = (char *)ALIGN_UP((uintptr_t)all, (uintptr_t)bytes);
    memset(p, 0x5a, bytes / 2);
    if (!writable && mprotect(all, 2 * bytes, PROT_READ) < 0) {
        munmap(all, 2 * bytes);
        return NULL;
    }
    *ret_all = all;
    return p;
}

bool vulkan_try_import(struct vulkan_device *d, bool writable)
{
    CLEANUP(backend_freep) struct backend *b = NULL;
    size_t bytes = MAX(d->import_align, (size_t)sysconf(_SC_PAGESIZE));
    struct vulkan_block import = {}, own = {};
    void *all, *p;
    bool works = false;

    if (d->import_align == 0 || backend_vulkan_new(&b, d, &(struct backend_limits){}, NULL) < 0)
        return false;
    p = map(bytes, writable, &all);
    if (!p)
        return false;
    if (vulkan_block_import(d, p, bytes, &import) == 0 &&
        vulkan_block_new(d, bytes, VULKAN_HOST, &own) == 0) {
        const struct vulkan_block *to = writable ? &import : &own;

        memset((char *)own.host + bytes / 2, 0, bytes / 2);
        works = vulkan_copy(vulkan_backend(b), &import, to, bytes / 2, bytes / 2) == 0 &&
                memcmp(p, (char *)to->host + bytes / 2, bytes / 2) == 0;
    }
    if (d->state == VULKAN_HUNG) { /* it may still be at it */
        d->tried[0] = import;
        d->tried[1] = own;
        return false;
    }
    vulkan_block_free(d, &import);
    vulkan_block_free(d, &own);
    munmap(all, 2 * bytes);
    return works;
}

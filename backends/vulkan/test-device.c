/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The core of the Vulkan backend: devices, memory, passes and their ends. The device is lavapipe,
 * a software driver, which every machine with mesa has; 77 without.
 */

#undef NDEBUG

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/cleanup.h"
#include "shaders/push-rows.h"

static const struct backend_limits limits = {.max_rows = 8, .max_width = 1024, .max_heads = 4};

static struct vulkan_device *find_device(const struct vulkan_options *o)
{
    struct vulkan_options named = *o;
    struct vulkan_device *d;
    struct error err = {};
    int r;

    named.name = "llvmpipe";
    r = vulkan_device_find(&d, &named, &err);
    if (r == -ENOENT || r == -ENOSYS) {
        fprintf(stderr, "skipped: %s\n", err.text);
        exit(77);
    }
    assert(r == 0);
    return d;
}

static struct backend *new_backend(struct vulkan_device *d)
{
    struct backend *b;
    struct error err = {};

    assert(backend_vulkan_new(&b, d, &limits, &err) == 0);
    return b;
}

static void test_dispatch(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    float *x = backend_alloc(b, 1000 * sizeof(*x));

    assert(x && (uintptr_t)x % 4096 == 0);
    for (int i = 0; i < 1000; i++) {
        assert(x[i] == 0);
        x[i] = (float)(i - 500);
    }
    b->ops->softcap(b, x, 999, 30);
    assert(backend_finish(b) == 0);
    for (int i = 0; i < 999; i++)
        assert(fabs((double)x[i] - 30 * tanh((i - 500) / 30.0)) <= 30 * 0x1p-21);
    assert(x[999] == 499);
    assert(backend_vulkan_gpu_usec(b) > 0);
    backend_release(b, x, 1000 * sizeof(*x));
}

/* ---- finding ---- */

static unsigned count_threads(void)
{
    CLEANUP(closedirp) DIR *dir = opendir("/proc/self/task");
    unsigned n = 0;

    assert(dir);
    for (struct dirent *e = readdir(dir); e; e = readdir(dir))
        n += e->d_name[0] != '.';
    return n;
}

static void test_find(void)
{
    struct vulkan_device *none = NULL;
    unsigned n_threads = count_threads();
    struct error err = {};
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});

    assert(count_threads() == n_threads);
    assert(strstr(vulkan_device_name(d), "llvmpipe"));
    assert(vulkan_device_is_software(d));
    assert(strlen(vulkan_device_identity(d)) == 72);
    assert(vulkan_device_open(d, &err) == 0 && vulkan_device_open(d, &err) == 0);

    assert(vulkan_device_find(&none, &(struct vulkan_options){.name = "no such thing"}, &err) ==
           -ENOENT);
    assert(!none && strstr(err.text, "no such thing") && strstr(err.text, "llvmpipe"));
    /* Only the software driver is there, and nobody asked for it. */
    assert(vulkan_device_find(&none, &(struct vulkan_options){}, &err) == -ENOENT);
    assert(!none && strstr(err.text, "llvmpipe"));

    /* In any case */
    assert(vulkan_device_find(&none, &(struct vulkan_options){.name = "LLVMPipe"}, &err) == 0);
    vulkan_device_free(none);
}

/* A caller that keeps to one core has a driver whose threads do not. */
static void test_threads_move(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    cpu_set_t all, one, now;
    struct error err = {};
    unsigned others = 0;
    DIR *dir;

    assert(sched_getaffinity(0, sizeof(all), &all) == 0);
    CPU_ZERO(&one);
    for (size_t i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &all))
            CPU_SET(i, &one);
    assert(sched_setaffinity(0, sizeof(one), &one) == 0);
    assert(vulkan_device_open(d, &err) == 0);
    assert(sched_getaffinity(0, sizeof(now), &now) == 0 && CPU_EQUAL(&now, &one));
    dir = opendir("/proc/self/task");
    assert(dir);
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        pid_t thread = (pid_t)atoi(e->d_name);

        if (thread == 0 || thread == getpid())
            continue;
        assert(sched_getaffinity(thread, sizeof(now), &now) == 0);
        assert(CPU_EQUAL(&now, &all));
        others++;
    }
    closedir(dir);
    assert(others > 0);
    assert(sched_setaffinity(0, sizeof(all), &all) == 0);
}

/* A function of the driver's as a device that is opened finds it. */
static struct {
    PFN_vkGetDeviceProcAddr get;
    const char *name;
    PFN_vkVoidFunction mine, real;
} replaced;

static PFN_vkVoidFunction replacing_GetDeviceProcAddr(VkDevice d, const char *name)
{
    PFN_vkVoidFunction f = replaced.get(d, name);

    if (strcmp(name, replaced.name) != 0)
        return f;
    replaced.real = f;
    return replaced.mine;
}

static void replace(struct vulkan_device *d, const char *name, PFN_vkVoidFunction mine)
{
    replaced.get = d->vk.GetDeviceProcAddr;
    replaced.name = name;
    replaced.mine = mine;
    d->vk.GetDeviceProcAddr = replacing_GetDeviceProcAddr;
}

static size_t cache_given;

static VkResult watched_CreatePipelineCache(VkDevice d, const VkPipelineCacheCreateInfo *info,
                                            const VkAllocationCallbacks *a, VkPipelineCache *ret)
{
    cache_given = info->initialDataSize;
    return ((PFN_vkCreatePipelineCache)replaced.real)(d, info, a, ret);
}

/* The pipelines of one process serve the next; what is no cache, or another's, goes nowhere. */
static void test_cache(void)
{
    CLEANUP(freep) void *cache = NULL;
    size_t bytes = 0;

    for (int i = 0; i < 4; i++) {
        struct vulkan_options o = {.cache = cache, .cache_bytes = bytes};
        CLEANUP(vulkan_device_freep) struct vulkan_device *d = NULL;
        CLEANUP(backend_freep) struct backend *b = NULL;
        float *x;

        if (i == 2)
            ((uint8_t *)cache)[16] ^= 1; /* another driver's */
        if (i == 3)
            o.cache_bytes = 7;
        d = find_device(&o);
        replace(d, "vkCreatePipelineCache", (PFN_vkVoidFunction)watched_CreatePipelineCache);
        b = new_backend(d);
        assert(cache_given == (i == 1 ? bytes : 0));
        x = backend_alloc(b, 4);
        *x = 1;
        b->ops->softcap(b, x, 1, 30);
        assert(backend_finish(b) == 0 && *x < 1 && *x > 0.9f);
        backend_release(b, x, 4);
        free(cache);
        cache = NULL;
        assert(vulkan_device_cache(d, &cache, &bytes) == 0 && bytes >= 32);
    }
}

/* ---- the driver, counted and failing ---- */

static struct vulkan_functions real; /* of the device under test */
static int n_living;                 /* objects made and not destroyed */
static int n_made;                   /* calls that make or record something */
static int fail_in = -1;             /* calls that make something until one fails; < 0: none does */

static bool fails(void)
{
    n_made++;
    return fail_in >= 0 && fail_in-- == 0;
}

#define COUNTED(X)                                                                   \
    X(CreateBuffer, DestroyBuffer, VkBufferCreateInfo, VkBuffer)                     \
    X(AllocateMemory, FreeMemory, VkMemoryAllocateInfo, VkDeviceMemory)              \
    X(CreateCommandPool, DestroyCommandPool, VkCommandPoolCreateInfo, VkCommandPool) \
    X(CreateSemaphore, DestroySemaphore, VkSemaphoreCreateInfo, VkSemaphore)         \
    X(CreateQueryPool, DestroyQueryPool, VkQueryPoolCreateInfo, VkQueryPool)         \
    X(CreateShaderModule, DestroyShaderModule, VkShaderModuleCreateInfo, VkShaderModule)

#define X(create, destroy, info_type, type)                                                  \
    static VkResult counted_##create(VkDevice d, const info_type *info,                      \
                                     const VkAllocationCallbacks *a, type *ret)              \
    {                                                                                        \
        VkResult r = fails() ? VK_ERROR_OUT_OF_DEVICE_MEMORY : real.create(d, info, a, ret); \
                                                                                             \
        n_living += r == VK_SUCCESS;                                                         \
        return r;                                                                            \
    }                                                                                        \
    static void counted_##destroy(VkDevice d, type object, const VkAllocationCallbacks *a)   \
    {                                                                                        \
        n_living -= object != VK_NULL_HANDLE;                                                \
        real.destroy(d, object, a);                                                          \
    }
COUNTED(X)
#undef X

static VkResult failing_AllocateCommandBuffers(VkDevice d, const VkCommandBufferAllocateInfo *info,
                                               VkCommandBuffer *ret)
{
    return fails() ? VK_ERROR_OUT_OF_DEVICE_MEMORY : real.AllocateCommandBuffers(d, info, ret);
}

static VkResult failing_BeginCommandBuffer(VkCommandBuffer c, const VkCommandBufferBeginInfo *info)
{
    return fails() ? VK_ERROR_OUT_OF_HOST_MEMORY : real.BeginCommandBuffer(c, info);
}

/* As drivers do: it is the end of recording that tells that there was no memory for it. */
static VkResult failing_EndCommandBuffer(VkCommandBuffer c)
{
    VkResult r = real.EndCommandBuffer(c);

    return fails() ? VK_ERROR_OUT_OF_DEVICE_MEMORY : r;
}

static VkResult failing_QueueSubmit(VkQueue q, uint32_t n, const VkSubmitInfo *info, VkFence fence)
{
    return fails() ? VK_ERROR_OUT_OF_DEVICE_MEMORY : real.QueueSubmit(q, n, info, fence);
}

static VkResult failing_MapMemory(VkDevice d, VkDeviceMemory m, VkDeviceSize offset,
                                  VkDeviceSize size, VkMemoryMapFlags flags, void **ret)
{
    return fails() ? VK_ERROR_OUT_OF_HOST_MEMORY : real.MapMemory(d, m, offset, size, flags, ret);
}

static VkResult failing_BindBufferMemory(VkDevice d, VkBuffer b, VkDeviceMemory m, VkDeviceSize at)
{
    return fails() ? VK_ERROR_OUT_OF_DEVICE_MEMORY : real.BindBufferMemory(d, b, m, at);
}

static VkResult failing_CreateComputePipelines(VkDevice d, VkPipelineCache cache, uint32_t n,
                                               const VkComputePipelineCreateInfo *info,
                                               const VkAllocationCallbacks *a, VkPipeline *ret)
{
    return fails() ? VK_ERROR_OUT_OF_DEVICE_MEMORY
                   : real.CreateComputePipelines(d, cache, n, info, a, ret);
}

static int n_barriers;

static void counted_CmdPipelineBarrier(VkCommandBuffer c, VkPipelineStageFlags from,
                                       VkPipelineStageFlags to, VkDependencyFlags flags, uint32_t n,
                                       const VkMemoryBarrier *memory, uint32_t n_buffers,
                                       const VkBufferMemoryBarrier *buffers, uint32_t n_images,
                                       const VkImageMemoryBarrier *images)
{
    n_barriers++;
    real.CmdPipelineBarrier(c, from, to, flags, n, memory, n_buffers, buffers, n_images, images);
}

/* An open device whose objects are counted. */
static struct vulkan_device *counted_device(void)
{
    struct vulkan_device *d =
        find_device(&(struct vulkan_options){.copy_weights = true, .hang_usec = 10000000});
    struct error err = {};

    assert(vulkan_device_open(d, &err) == 0);
    real = d->vk;
    n_living = 0;
#define X(create, destroy, info_type, type) \
    d->vk.create = counted_##create;        \
    d->vk.destroy = counted_##destroy;
    COUNTED(X)
#undef X
    d->vk.AllocateCommandBuffers = failing_AllocateCommandBuffers;
    d->vk.BeginCommandBuffer = failing_BeginCommandBuffer;
    d->vk.EndCommandBuffer = failing_EndCommandBuffer;
    d->vk.QueueSubmit = failing_QueueSubmit;
    d->vk.MapMemory = failing_MapMemory;
    d->vk.CmdPipelineBarrier = counted_CmdPipelineBarrier;
    d->vk.BindBufferMemory = failing_BindBufferMemory;
    d->vk.CreateComputePipelines = failing_CreateComputePipelines;
    return d;
}

/* ---- memory ---- */

/* y[i] = x[ids[i]], rows of 4 */
static void copy_rows(struct backend *b, const float *x, const uint32_t *ids, uint32_t n, float *y)
{
    b->ops->copy_rows(b, &(struct copy_rows_args){
                             .n = n, .k = 4, .x = x, .ld_x = 4, .ids = ids, .y = y, .ld_y = 4});
}

/* A read-only mapping of a file with 3 MB of numbers, which fills no whole number of pages. */
#define FILE_FLOATS 786437

static float *map_file(void)
{
    CLEANUP(closep) int fd = memfd_create("weights", MFD_CLOEXEC);
    CLEANUP(freep) float *data = calloc(FILE_FLOATS, 4);
    void *p;

    for (int i = 0; i < FILE_FLOATS; i++)
        data[i] = (float)i;
    assert(write(fd, data, FILE_FLOATS * 4L) == FILE_FLOATS * 4L);
    p = mmap(NULL, FILE_FLOATS * 4L, PROT_READ, MAP_SHARED, fd, 0);
    assert(p != MAP_FAILED);
    return p;
}

static void test_weights(bool copied, bool upload)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){.copy_weights = copied});
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    float *w = map_file(), *y = backend_alloc(b, 8192);
    uint32_t *ids = backend_alloc(b, 4096);
    /* A piece that starts and ends in the midst of pages. */
    float *first = w + 3, *second = w + 400001;

    assert(d->imports_weights != copied);
    if (upload) {
        d->type = VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU; /* with memory of its own */
        d->imports_weights = false;
    }
    assert(backend_map(b, first, 399998 * 4, BACKEND_WEIGHTS) == 0);
    assert(backend_map(b, second, (FILE_FLOATS - 400001) * 4L, BACKEND_WEIGHTS) == 0);
    assert((vulkan_address(vulkan_backend(b), first, 4).low == (uint32_t)(uintptr_t)first) !=
           (copied || upload));    /* lavapipe's addresses are the host's */
    for (size_t i = 0; i < 2; i++) /* shaders rely on the host's alignment */
        assert(vulkan_address(vulkan_backend(b), i ? second : first, 4).low % WEIGHT_ALIGN ==
               (uintptr_t)(i ? second : first) % WEIGHT_ALIGN);
    ids[0] = 96608;
    ids[1] = 0;
    ids[2] = 5000;
    copy_rows(b, first, ids, 3, y);
    copy_rows(b, second, ids, 2, y + 12);
    copy_rows(b, second + 4 * 96608, NULL, 1, y + 20);
    assert(backend_finish(b) == 0);
    for (uint32_t i = 0; i < 12; i++)
        assert(y[i] == (float)(3 + 4 * ids[i / 4] + i % 4));
    for (uint32_t i = 0; i < 8; i++)
        assert(y[12 + i] == (float)(400001 + 4 * ids[i / 4] + i % 4));
    for (uint32_t i = 0; i < 4; i++)
        assert(y[20 + i] == (float)(400001 + 4 * 96608 + i));
    backend_release(b, y, 8192);
    backend_release(b, ids, 4096);
    b = backend_free(b);
    munmap(w, FILE_FLOATS * 4L);
}

/*
 * Drivers that refuse imports, and such as agree and then give the device up when something is
 * submitted that uses one: another is made, and what was to be imported is copied.
 */
static unsigned submits, lost_submits; /* bit i: submission i is */

static VkResult some_lost_QueueSubmit(VkQueue q, uint32_t n, const VkSubmitInfo *info,
                                      VkFence fence)
{
    return lost_submits >> submits++ & 1 ? VK_ERROR_DEVICE_LOST
                                         : ((PFN_vkQueueSubmit)replaced.real)(q, n, info, fence);
}

static void test_lost_by_import(unsigned lost, bool shares, bool imports, unsigned n_submits)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    CLEANUP(backend_freep) struct backend *b = NULL;
    float *x;

    replace(d, "vkQueueSubmit", (PFN_vkVoidFunction)some_lost_QueueSubmit);
    submits = 0;
    lost_submits = lost;
    b = new_backend(d);
    assert(submits == n_submits);
    assert(vulkan_device_shares(d) == shares && d->imports_weights == imports);
    x = backend_alloc(b, 4);
    *x = 1;
    b->ops->softcap(b, x, 1, 30);
    assert(backend_finish(b) == 0 && *x < 1);
}

static VkResult no_answer_WaitSemaphores(VkDevice d, const VkSemaphoreWaitInfo *info,
                                         uint64_t timeout)
{
    (void)timeout;
    /* so that the driver is done before the process is */
    ((PFN_vkWaitSemaphores)replaced.real)(d, info, UINT64_MAX);
    return VK_TIMEOUT;
}

/* A device that does not even answer to that is not used, and left alone. */
static void test_hung_by_import(void)
{
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    struct backend *b = NULL;
    struct error err = {};

    replace(d, "vkWaitSemaphores", (PFN_vkVoidFunction)no_answer_WaitSemaphores);
    assert(vulkan_device_open(d, &err) == -ENODEV && strstr(err.text, "does not answer"));
    assert(!vulkan_device_shares(d) && !d->imports_weights);
    assert(backend_vulkan_new(&b, d, &limits, &err) == -ENODEV && !b);
    vulkan_device_free(d);
}

/* Memory that takes a feature to be used (AMD's uncached, say) is left alone. */
static void test_memory_types(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    struct vulkan_block block;
    struct error err = {};

    assert(vulkan_device_open(d, &err) == 0);
    for (uint32_t i = 0; i < d->memory.memoryTypeCount; i++)
        d->memory.memoryTypes[i].propertyFlags |= VK_MEMORY_PROPERTY_DEVICE_UNCACHED_BIT_AMD;
    for (int place = VULKAN_HOST; place <= VULKAN_UPLOAD; place++)
        assert(vulkan_block_new(d, 4096, (enum vulkan_place)place, &block) == -EOPNOTSUPP);
}

static PFN_vkCreateDevice real_create_device;
static int n_asked; /* for a low priority */

/* Of a driver that does not permit it, as far as this one is concerned. */
static VkResult priority_CreateDevice(VkPhysicalDevice p, const VkDeviceCreateInfo *info,
                                      const VkAllocationCallbacks *a, VkDevice *ret)
{
    const VkDeviceQueueGlobalPriorityCreateInfoKHR *low = info->pQueueCreateInfos[0].pNext;

    if (!low)
        return real_create_device(p, info, a, ret);
    assert(low->sType == VK_STRUCTURE_TYPE_DEVICE_QUEUE_GLOBAL_PRIORITY_CREATE_INFO_KHR);
    assert(low->globalPriority == VK_QUEUE_GLOBAL_PRIORITY_LOW_KHR);
    assert(strcmp(info->ppEnabledExtensionNames[info->enabledExtensionCount - 1],
                  VK_KHR_GLOBAL_PRIORITY_EXTENSION_NAME) == 0);
    n_asked++;
    return VK_ERROR_NOT_PERMITTED_KHR;
}

static void test_priority(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    struct error err = {};

    real_create_device = d->vk.CreateDevice;
    d->vk.CreateDevice = priority_CreateDevice;
    d->priority = VK_KHR_GLOBAL_PRIORITY_EXTENSION_NAME;
    assert(vulkan_device_open(d, &err) == 0 && n_asked == 1 && !d->priority);
}

/* Both sides see what the other writes. */
static void test_shared(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){.copy_weights = true});
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    CLEANUP(closep) int fd = memfd_create("pool", MFD_CLOEXEC);
    float *p;

    assert(vulkan_device_shares(d));
    assert(ftruncate(fd, 1 << 20) == 0);
    p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert(p != MAP_FAILED && backend_map(b, p, 1 << 20, BACKEND_SHARED) == 0);
    for (int i = 0; i < 3; i++) {
        p[1000] = (float)i;
        copy_rows(b, p + 1000, NULL, 1, p + 2000);
        assert(backend_finish(b) == 0 && p[2000] == (float)i);
        backend_unmap(b, p);
        assert(vulkan_backend(b)->n_regions == 0);
        assert(backend_map(b, p, 1 << 20, BACKEND_SHARED) == 0);
    }
    assert(backend_map(b, p, backend_map_limit(b) + 1, BACKEND_SHARED) == -E2BIG);
    assert(backend_map_limit(b) >= (size_t)1 << 29);
    d->import_align = 0;
    assert(backend_map(b, p, 1 << 20, BACKEND_SHARED) == -EOPNOTSUPP);
    b = backend_free(b);
    munmap(p, 1 << 20);
}

/* Many pieces, given back in another order; all zero, whatever was there before. */
static void test_alloc(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    char *p[200];

    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < 200; i++) {
            p[i] = backend_alloc(b, 1 + 97 * i);
            assert(p[i] && (uintptr_t)p[i] % 4096 == 0);
            for (size_t k = 0; k < 1 + 97 * i; k++)
                assert(p[i][k] == 0);
            memset(p[i], 0x55, 1 + 97 * i);
        }
        for (size_t i = 0; i < 200; i++)
            vulkan_address(vulkan_backend(b), p[i] + 97 * i, 1);
        for (size_t i = 0; i < 200; i++)
            backend_release(b, p[i * 77 % 200], 0);
    }
    assert(!backend_alloc(b, SIZE_MAX) && !backend_alloc(b, (size_t)1 << 40));
    assert(!backend_failure(b)); /* whoever asked may do with less */
}

/* ---- passes ---- */

/* What a shader finds as page k of a row. */
static const void *device_page(const struct vulkan_backend *v, const struct device_kv_row *row,
                               uint32_t k)
{
    uint64_t at = ((uint64_t)row->pages.high << 32 | row->pages.low) + 8 * (uint64_t)k;
    struct address a;

    assert(at >= v->kv_pages.address && at + 8 <= v->kv_pages.address + v->kv_pages.bytes);
    memcpy(&a, (char *)v->kv_pages.host + (at - v->kv_pages.address), sizeof(a));
    return (void *)((uintptr_t)a.high << 32 | a.low); /* as lavapipe has it */
}

static void check_rows(const struct vulkan_backend *v, const struct vulkan_kv_table *t)
{
    for (uint32_t i = 0; i < t->n; i++) {
        const struct kv_row *row = &t->rows[i];
        uint32_t first = t->window && row->pos >= t->window ? row->pos - t->window + 1 : 0;

        assert(t->host[i].pos == row->pos);
        for (uint32_t p = first; p <= row->pos; p++)
            assert(device_page(v, &t->host[i], p / KV_PAGE) == row->pages[p / KV_PAGE]);
    }
}

#define KV_PAGES 9000

static void test_replay(void)
{
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = counted_device();
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    struct vulkan_backend *v = vulkan_backend(b);
    CLEANUP(freep) void **pages = calloc(KV_PAGES, sizeof(*pages));
    void *few[4] = {};
    struct kv_row rows[3] = {{pages, 0}, {pages, 1}, {few, 70}}, others[1] = {{pages, 700}};
    float *x = backend_alloc(b, 4096), *y = backend_alloc(b, 4096);
    uint32_t *ids = backend_alloc(b, 64);
    char *kv = backend_alloc(b, KV_PAGES);
    struct address a = {}, wide;

    few[0] = kv + 8000;
    few[1] = kv + 1;
    for (int i = 0; i < KV_PAGES; i++)
        pages[i] = kv + i;
    for (int i = 0; i < 64; i++)
        x[i] = (float)i;
    for (uint32_t round = 0; round < 40; round++) {
        bool issue;

        /* Longer each time: the page tables grow, and pages out of the window are not there. */
        rows[0].pos = 224 * round * round;
        rows[1].pos = rows[0].pos + 1;
        rows[2].pos = 70 + round;
        few[0] = round < 20 ? kv + 8000 : NULL;
        rows[2].pos = round < 20 ? rows[2].pos : 64 + 31;
        others[0].pos = 700 + round;
        for (uint32_t i = 0; i < 4; i++)
            ids[i] = (round + 3 * i) % 16;
        issue = backend_begin(b, 17);
        assert(issue == (round == 0));
        if (issue) {
            a = vulkan_kv_rows(v, rows, 3, 32);
            wide = vulkan_kv_rows(v, others, 1, 0);
            assert(a.low && vulkan_kv_rows(v, rows, 3, 16).low == a.low);
            assert(vulkan_kv_rows(v, others, 1, 5).low == wide.low);
            copy_rows(b, x, ids, 4, y);
            backend_end(b);
        }
        assert(v->current->kv.n_tables == 2);
        check_rows(v, &v->current->kv.tables[0]);
        check_rows(v, &v->current->kv.tables[1]);
        assert(v->current->kv.tables[0].address == ((uint64_t)a.high << 32 | a.low));
        assert(backend_submit(b) == 0 && backend_wait(b, UINT64_MAX) == 0);
        for (uint32_t i = 0; i < 16; i++)
            assert(y[i] == x[4 * ids[i / 4] + i % 4]);
    }

    /* Once tables are as large as they need to be, a pass makes and records nothing. */
    n_made = 0;
    for (int i = 0; i < 4; i++) {
        ids[0] = (uint32_t)i;
        assert(!backend_begin(b, 17) && backend_finish(b) == 0 && y[0] == x[4 * i]);
    }
    assert(n_made == 4); /* vkQueueSubmit() */

    /* All that is seen, by ever more: the tables must grow in the midst of recording. */
    rows[0].pos = KV_PAGES * KV_PAGE - 2;
    rows[1].pos = KV_PAGES * KV_PAGE - 1;
    few[0] = kv;
    assert(backend_begin(b, 18));
    vulkan_kv_rows(v, others, 1, 0);
    vulkan_kv_rows(v, rows, 3, 1);
    vulkan_kv_rows(v, rows, 3, 0);
    vulkan_kv_rows(v, rows + 1, 1, 0);
    copy_rows(b, x, NULL, 1, y);
    backend_end(b);
    assert(v->current->kv.n_tables == 3 && v->current->kv.tables[1].window == 0);
    for (size_t i = 0; i < 3; i++)
        check_rows(v, &v->current->kv.tables[i]);
    assert(backend_finish(b) == 0);

    /* Who was not used for longest goes. */
    for (uint64_t key = 100; key < 100 + VULKAN_PASSES - 1; key++) {
        assert(backend_begin(b, key));
        copy_rows(b, x, ids, 1, y);
        backend_end(b);
        assert(!backend_begin(b, 17)); /* the one before is finished by this */
        backend_end(b);
    }
    assert(!backend_begin(b, 100));
    assert(backend_begin(b, 18));
    backend_end(b);
    assert(!backend_begin(b, 17));
    assert(backend_begin(b, 101));
    backend_end(b);
    assert(backend_finish(b) == 0);

    /* Outside of passes, after one: in the order of issue. */
    for (int i = 0; i < 4; i++)
        y[i] = -1;
    assert(!backend_begin(b, 17));
    copy_rows(b, x + 4, NULL, 1, y);
    copy_rows(b, y, NULL, 1, y + 100);
    assert(backend_finish(b) == 0 && y[0] == 4 && y[103] == 7);
    backend_release(b, x, 0);
    backend_release(b, y, 0);
    backend_release(b, kv, 0);
    backend_release(b, ids, 0);
    b = backend_free(b);
    assert(n_living == 0);
}

/* A dispatch that reads and writes 64 bytes each, as it says. How many barriers it took. */
static int run_declared(struct vulkan_backend *v, char *read, char *written)
{
    struct softcap_push push = {
        .x = vulkan_address(v, written ? written : read, 64), .n = 1, .c = 30, .below = 29};
    int before = n_barriers;

    if (read)
        vulkan_reads(v, read, 64);
    if (written)
        vulkan_writes(v, written, 64);
    vulkan_dispatch(v, VULKAN_SOFTCAP, &push, sizeof(push), 1, 1, 1);
    return n_barriers - before;
}

static void test_hazards(void)
{
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = counted_device();
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    struct vulkan_backend *v = vulkan_backend(b);
    char *x = backend_alloc(b, 16384);

    assert(run_declared(v, x, x + 128) == 1); /* the first waits for what was before */
    assert(run_declared(v, x, x + 192) == 0); /* side by side */
    assert(run_declared(v, x + 64, x + 256) == 0);
    assert(run_declared(v, x + 512, x + 60) == 1);  /* writes what was read */
    assert(run_declared(v, x, x + 128) == 1);       /* reads what was written */
    assert(run_declared(v, x + 512, x + 188) == 1); /* writes what was written */
    assert(run_declared(v, x + 512, x + 600) == 0);
    b->ops->softcap(b, (float *)(x + 1024), 1, 30); /* says nothing */
    assert(run_declared(v, x, x + 128) == 1);
    assert(run_declared(v, x, x + 192) == 0);
    assert(run_declared(v, x, NULL) == 1);
    assert(run_declared(v, x, x + 256) == 1);
    assert(backend_finish(b) == 0);
    assert(run_declared(v, x, x + 256) == 1);
    /* More than can be remembered are not forgotten, but waited for. */
    for (int i = 0; i < VULKAN_RANGES - 1; i++)
        assert(run_declared(v, NULL, x + 1024 + 64 * i) == 0);
    assert(run_declared(v, NULL, x + 4096) == 0);
    assert(run_declared(v, NULL, x + 8192) == 1);
    assert(backend_finish(b) == 0);
    backend_release(b, x, 16384);
}

/* ---- parts ---- */

static uint32_t n_infos; /* of the last submission */

static VkResult counting_QueueSubmit(VkQueue q, uint32_t n, const VkSubmitInfo *info, VkFence fence)
{
    n_infos = n;
    return real.QueueSubmit(q, n, info, fence);
}

/* y := x, by dispatches that are said to have `work` to do each */
static void copy_in_steps(struct backend *b, float *x, uint32_t steps, uint64_t work)
{
    for (uint32_t i = 0; i < steps; i++) {
        copy_rows(b, x + 4 * i, NULL, 1, x + 4 * i + 4);
        vulkan_work(vulkan_backend(b), work);
    }
}

/* A pass of much work is submitted in parts, each of which sees what those before it wrote. */
static void test_parts(void)
{
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = counted_device();
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    float *x = backend_alloc(b, 65536);

    d->vk.QueueSubmit = counting_QueueSubmit;
    for (uint32_t round = 0; round < 3; round++) {
        x[0] = (float)round + 1;
        assert(backend_begin(b, 9) == (round == 0));
        if (round == 0) {
            copy_in_steps(b, x, 6, (uint64_t)1 << 40);
            copy_in_steps(b, x + 24, 6, 1);
            backend_end(b);
        }
        assert(backend_finish(b) == 0 && x[48] == x[0]);
        assert(n_infos == 7); /* none is empty */
        assert(backend_vulkan_gpu_usec(b) > 0);
    }
    assert(backend_begin(b, 10));
    copy_in_steps(b, x, VULKAN_PARTS + 3, (uint64_t)1 << 40);
    backend_end(b);
    x[0] = 77;
    assert(backend_finish(b) == 0 && n_infos == VULKAN_PARTS);
    assert(x[4 * (VULKAN_PARTS + 3)] == 77);
    copy_rows(b, x, NULL, 1, x + 4);
    assert(backend_finish(b) == 0 && n_infos == 1);
    backend_release(b, x, 65536);
    b = backend_free(b);
    assert(n_living == 0);
}

/* ---- what goes wrong ---- */

/* Something of everything. True when all of it went well. */
static bool use_all(struct vulkan_device *d, const float *weights, bool upload)
{
    CLEANUP(backend_freep) struct backend *b = NULL;
    struct error err = {};
    float *x;
    void *page;
    struct kv_row row = {&page, 3};
    int r = backend_vulkan_new(&b, d, &limits, &err);

    if (r < 0) {
        assert(r == -ENOMEM && strstr(err.text, "out of memory"));
        return false;
    }
    x = backend_alloc(b, 64);
    if (!x) {
        assert(!backend_failure(b));
        return false;
    }
    d->type = upload ? VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU : VK_PHYSICAL_DEVICE_TYPE_CPU;
    r = backend_map(b, weights, FILE_FLOATS * 4L, BACKEND_WEIGHTS);
    if (r < 0) {
        assert(r == -ENOMEM || (r == -ENODEV && strstr(backend_failure(b), "out of memory")));
        return false;
    }
    page = x;
    for (int i = 0; i < 2; i++) {
        if (!backend_begin(b, 5))
            continue;
        vulkan_scratch(vulkan_backend(b), 1000);
        vulkan_kv_rows(vulkan_backend(b), &row, 1, 0);
        copy_rows(b, weights + 8, NULL, 1, x);
        copy_rows(b, x, NULL, 1, x + 4);
        backend_end(b);
    }
    r = backend_finish(b);
    if (r == 0) {
        assert(x[7] == 11 && !backend_failure(b));
        return true;
    }
    assert(r == -ENODEV && strstr(backend_failure(b), "out of memory"));
    /* It stays so, and nothing more is asked of the device. */
    assert(backend_begin(b, 5));
    copy_rows(b, x, NULL, 1, x + 4);
    backend_end(b);
    assert(backend_finish(b) == -ENODEV && backend_wait(b, 0) == -ENODEV);
    assert(!backend_alloc(b, 4));
    return false;
}

/* Whichever call finds no memory: it is said, nothing is leaked, and the next backend works. */
static void test_out_of_memory(void)
{
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = counted_device();
    float *weights = map_file();

    for (int upload = 0; upload < 2; upload++) {
        int n = 0, n_failed = 0;
        bool over = false;

        for (; !over; n++) {
            if (d->pipelines[VULKAN_COPY_ROWS]) /* so that it is made again */
                real.DestroyPipeline(d->device, d->pipelines[VULKAN_COPY_ROWS], NULL);
            d->pipelines[VULKAN_COPY_ROWS] = VK_NULL_HANDLE;
            fail_in = n;
            n_failed += !use_all(d, weights, upload);
            over = fail_in >= 0; /* no call was left to fail */
            fail_in = -1;
            assert(n_living == 0 && d->state == VULKAN_WELL);
        }
        assert(n > 20 && n_failed >= n - 5); /* some are made up for: copies, other memory */
        assert(use_all(d, weights, upload));
    }
    munmap(weights, FILE_FLOATS * 4L);
}

static VkResult lost_WaitSemaphores(VkDevice d, const VkSemaphoreWaitInfo *info, uint64_t timeout)
{
    real.WaitSemaphores(d, info, timeout); /* so that what is destroyed is not in use */
    return VK_ERROR_DEVICE_LOST;
}

static VkResult lost_QueueSubmit(VkQueue q, uint32_t n, const VkSubmitInfo *info, VkFence fence)
{
    (void)q;
    (void)n;
    (void)info;
    (void)fence;
    return VK_ERROR_DEVICE_LOST;
}

static void test_lost(bool when_submitting)
{
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = counted_device();
    CLEANUP(backend_freep) struct backend *b = new_backend(d), *other = NULL;
    float *x = backend_alloc(b, 64);
    struct error err = {};

    if (when_submitting)
        d->vk.QueueSubmit = lost_QueueSubmit;
    else
        d->vk.WaitSemaphores = lost_WaitSemaphores;
    b->ops->softcap(b, x, 4, 30);
    assert(backend_submit(b) == (when_submitting ? -ENODEV : 0));
    assert(backend_wait(b, 1000000) == -ENODEV && strstr(backend_failure(b), "lost"));
    b->ops->softcap(b, x, 4, 30);
    assert(backend_finish(b) == -ENODEV && strstr(backend_failure(b), "llvmpipe"));
    assert(backend_map(b, x, 64, BACKEND_SHARED) == -ENODEV);
    assert(backend_vulkan_new(&other, d, &limits, &err) == -ENODEV && strstr(err.text, "lost"));
    x[0] = 1; /* what is the host's stays the host's until it is given back */
    backend_release(b, x, 64);
    b = backend_free(b);
    assert(n_living == 0);

    replace(d, "vkCreatePipelineCache", (PFN_vkVoidFunction)watched_CreatePipelineCache);
    cache_given = 0;
    b = new_backend(d); /* a new device, with functions of its own, and what was compiled before */
    assert(cache_given >= 32);
    x = backend_alloc(b, 64);
    x[0] = 0.5f;
    b->ops->softcap(b, x, 4, 30);
    assert(backend_finish(b) == 0 && x[0] > 0.49f && x[0] < 0.5f);
    backend_release(b, x, 64);
}

static uint64_t waited;

static VkResult hung_WaitSemaphores(VkDevice d, const VkSemaphoreWaitInfo *info, uint64_t timeout)
{
    real.WaitSemaphores(d, info, UINT64_MAX); /* so that the driver is done before the process is */
    waited += timeout;
    return VK_TIMEOUT;
}

static uint64_t counter;
static int n_moves; /* how often the counter moves on yet */

static VkResult stuck_GetSemaphoreCounterValue(VkDevice d, VkSemaphore semaphore, uint64_t *ret)
{
    (void)d;
    (void)semaphore;
    if (n_moves > 0) {
        n_moves--;
        counter++;
    }
    *ret = counter;
    return VK_SUCCESS;
}

/* Slow is not hung: as long as parts are done the device has its time. */
static void test_slow(void)
{
    struct vulkan_device *d = counted_device();
    struct backend *b = new_backend(d);
    float *x = backend_alloc(b, 64);

    d->vk.WaitSemaphores = hung_WaitSemaphores;
    d->vk.GetSemaphoreCounterValue = stuck_GetSemaphoreCounterValue;
    b->ops->softcap(b, x, 4, 30);
    assert(backend_submit(b) == 0);
    counter = 0;
    n_moves = 1;
    assert(backend_wait(b, 15000000) == -ETIMEDOUT && !backend_failure(b));
    waited = 0;
    n_moves = 3;
    assert(backend_wait(b, UINT64_MAX) == -ENODEV && n_moves == 0);
    assert(waited > 35000000000 && waited <= 40000000000); /* 4 times what is left of 10 s */
    backend_free(b);
    vulkan_device_free(d);
}

static void test_hung(void)
{
    struct vulkan_device *d = counted_device();
    struct backend *b = new_backend(d);
    float *x = backend_alloc(b, 64);
    int n;

    b->ops->softcap(b, x, 4, 30);
    assert(backend_finish(b) == 0);
    d->vk.WaitSemaphores = hung_WaitSemaphores;
    d->vk.GetSemaphoreCounterValue = stuck_GetSemaphoreCounterValue;
    b->ops->softcap(b, x, 4, 30);
    assert(backend_submit(b) == 0);
    counter = vulkan_backend(b)->n_done;
    waited = 0;
    assert(backend_wait(b, 0) == -ETIMEDOUT && backend_wait(b, 1000) == -ETIMEDOUT);
    assert(waited == 1000000 && !backend_failure(b));
    assert(backend_wait(b, UINT64_MAX) == -ENODEV);
    assert(waited > 5000000000 && waited <= 10001000000); /* what is left of 10 s */
    assert(strstr(backend_failure(b), "no answer for 10 s"));

    /* Nothing is taken from a device that may still be at work. */
    n = n_living;
    backend_release(b, x, 64);
    backend_free(b);
    vulkan_device_free(d);
    assert(n_living == n);
    x[0] = 1;
}

int main(void)
{
    test_threads_move();
    test_find();
    test_dispatch();
    test_cache();
    test_alloc();
    test_weights(false, false);
    test_weights(true, false);
    test_weights(false, true);
    test_memory_types();
    test_priority();
    test_shared();
    test_lost_by_import(0, true, true, 2);
    test_lost_by_import(1, false, true, 2);
    test_lost_by_import(2, true, false, 2);
    test_lost_by_import(3, false, false, 2);
    test_hung_by_import();
    test_replay();
    test_hazards();
    test_parts();
    test_out_of_memory();
    test_lost(false);
    test_lost(true);
    test_slow();
    test_hung();
    return 0;
}

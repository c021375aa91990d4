/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A Vulkan layer, for tests only: between a program and its driver it makes a GPU fail. What, and
 * when, stands in a file that the test may change while the program runs (vulkan_faults.py, which
 * names the words of struct control); its path is LLMD_TEST_VULKAN_FAULTS. One instance and one
 * device at a time.
 *
 * Preloaded as well, it spares the wait for a device that hangs: the thread that submitted what
 * hangs is told, the next time it looks at the clock, that this was AGO earlier.
 */

#undef NDEBUG
#include <assert.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define VK_NO_PROTOTYPES
#include <vulkan/vk_layer.h>

#define EXPORT __attribute__((visibility("default")))
#define NAME "VK_LAYER_LLMD_faults"
#define AGO 599 /* s, of the 600 that a device in software is given */

enum fault {
    FAULT_NONE,
    FAULT_LOST_AT_SUBMIT,
    FAULT_LOST_AT_WAIT,
    FAULT_MEMORY_AT_SUBMIT,
    FAULT_HANG,
    FAULT_MEMORY,    /* vkAllocateMemory; for good */
    FAULT_PIPELINE,  /* out of memory; for good */
    FAULT_NO_DEVICE, /* from the start, as those below */
    FAULT_REFUSED,   /* vkCreateDevice */
    FAULT_NO_ADDRESSES,
    FAULT_NO_IMPORT,
};

struct control {
    atomic_uint fault;  /* enum fault */
    atomic_uint left;   /* calls of what fails until it does; 1: the next */
    atomic_uint struck; /* how often it has */
    atomic_uint submits, allocations, pipelines, devices;
    atomic_uint touched; /* calls that give back what a device that hangs may still use */
    atomic_uint release; /* 1: what hangs is done now, 2: it was */
};

static struct control *control;
static bool lost, hangs;
static __thread bool just_submitted;

static VkInstance instance;
static PFN_vkGetInstanceProcAddr next_instance;
static PFN_vkGetDeviceProcAddr next_device;

static struct {
    VkQueue queue;
    VkTimelineSemaphoreSubmitInfo timeline;
    uint64_t value;
    VkSubmitInfo info;
    VkCommandBuffer commands;
    VkSemaphore semaphore;
} held; /* the submission that hangs */

static VkDevice device;

/* What comes after this layer, asked once: later the loader answers with the first layer. */
#define INSTANCE_FUNCTIONS(X)             \
    X(DestroyInstance)                    \
    X(EnumeratePhysicalDevices)           \
    X(GetPhysicalDeviceFeatures2)         \
    X(EnumerateDeviceExtensionProperties) \
    X(CreateDevice)

#define DEVICE_FUNCTIONS(X)   \
    X(DestroyDevice)          \
    X(AllocateMemory)         \
    X(CreateComputePipelines) \
    X(QueueSubmit)            \
    X(WaitSemaphores)         \
    X(DeviceWaitIdle)         \
    X(DestroyPipeline)        \
    X(DestroyBuffer)          \
    X(FreeMemory)             \
    X(DestroySemaphore)       \
    X(DestroyCommandPool)

static struct {
#define X(name) PFN_vk##name name;
    INSTANCE_FUNCTIONS(X)
    DEVICE_FUNCTIONS(X)
#undef X
} next;

static void open_control(void)
{
    const char *path = getenv("LLMD_TEST_VULKAN_FAULTS");
    int fd;

    if (control)
        return;
    fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        abort();
    control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (control == MAP_FAILED)
        abort();
    close(fd);
}

static bool from_the_start(enum fault f)
{
    if (control->fault != f)
        return false;
    control->struck++;
    return true;
}

/* Counts down; then true, each time. */
static bool strikes(enum fault f)
{
    if (control->fault != f || control->left == 0)
        return false;
    if (control->left > 1) {
        control->left--;
        return false;
    }
    control->struck++;
    return true;
}

/* ---- the instance ---- */

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo *info,
                                                      const VkAllocationCallbacks *allocator,
                                                      VkInstance *ret)
{
    const VkLayerInstanceCreateInfo *link = info->pNext;
    PFN_vkGetInstanceProcAddr get;
    VkResult r;

    open_control();
    while (link->sType != VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO ||
           link->function != VK_LAYER_LINK_INFO)
        link = link->pNext;
    get = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    /* the next layer finds its own link there */
    ((VkLayerInstanceCreateInfo *)link)->u.pLayerInfo = link->u.pLayerInfo->pNext;
    r = ((PFN_vkCreateInstance)get(NULL, "vkCreateInstance"))(info, allocator, ret);
    if (r == VK_SUCCESS) {
        next_instance = get;
#define X(name) next.name = (PFN_vk##name)get(*ret, "vk" #name);
        INSTANCE_FUNCTIONS(X)
#undef X
        instance = *ret;
    }
    return r;
}

static VKAPI_ATTR void VKAPI_CALL destroy_instance(VkInstance i,
                                                   const VkAllocationCallbacks *allocator)
{
    control->touched += hangs;
    next.DestroyInstance(i, allocator);
}

static VKAPI_ATTR VkResult VKAPI_CALL enumerate_physical_devices(VkInstance i, uint32_t *n,
                                                                 VkPhysicalDevice *ret)
{
    if (!from_the_start(FAULT_NO_DEVICE))
        return next.EnumeratePhysicalDevices(i, n, ret);
    *n = 0;
    return VK_SUCCESS;
}

static VKAPI_ATTR void VKAPI_CALL get_features(VkPhysicalDevice p, VkPhysicalDeviceFeatures2 *f)
{
    next.GetPhysicalDeviceFeatures2(p, f);
    for (VkBaseOutStructure *s = f->pNext; s; s = s->pNext)
        if (s->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES &&
            from_the_start(FAULT_NO_ADDRESSES))
            ((VkPhysicalDeviceVulkan12Features *)s)->bufferDeviceAddress = VK_FALSE;
}

static VKAPI_ATTR VkResult VKAPI_CALL enumerate_extensions(VkPhysicalDevice p, const char *layer,
                                                           uint32_t *n, VkExtensionProperties *ret)
{
    VkResult r;

    if (layer && strcmp(layer, NAME) == 0) {
        *n = 0;
        return VK_SUCCESS;
    }
    r = next.EnumerateDeviceExtensionProperties(p, layer, n, ret);
    if (control->fault != FAULT_NO_IMPORT || !ret)
        return r;
    for (uint32_t i = 0; i < *n; i++)
        if (strcmp(ret[i].extensionName, VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME) == 0) {
            ret[i] = ret[--*n];
            control->struck++;
        }
    return r;
}

/* ---- the device ---- */

static VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice p,
                                                    const VkDeviceCreateInfo *info,
                                                    const VkAllocationCallbacks *allocator,
                                                    VkDevice *ret)
{
    const VkLayerDeviceCreateInfo *link = info->pNext;
    PFN_vkGetDeviceProcAddr next_get_device;
    VkResult r;

    if (from_the_start(FAULT_REFUSED))
        return VK_ERROR_INITIALIZATION_FAILED;
    while (link->sType != VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO ||
           link->function != VK_LAYER_LINK_INFO)
        link = link->pNext;
    next_get_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    ((VkLayerDeviceCreateInfo *)link)->u.pLayerInfo = link->u.pLayerInfo->pNext;
    r = next.CreateDevice(p, info, allocator, ret);
    if (r == VK_SUCCESS) {
        next_device = next_get_device;
#define X(name) next.name = (PFN_vk##name)next_device(*ret, "vk" #name);
        DEVICE_FUNCTIONS(X)
#undef X
        device = *ret;
        lost = hangs = false;
        control->devices++;
    }
    return r;
}

static VKAPI_ATTR VkResult VKAPI_CALL allocate_memory(VkDevice d, const VkMemoryAllocateInfo *info,
                                                      const VkAllocationCallbacks *allocator,
                                                      VkDeviceMemory *ret)
{
    control->allocations++;
    return strikes(FAULT_MEMORY) ? VK_ERROR_OUT_OF_DEVICE_MEMORY
                                 : next.AllocateMemory(d, info, allocator, ret);
}

static VKAPI_ATTR VkResult VKAPI_CALL create_pipelines(VkDevice d, VkPipelineCache cache,
                                                       uint32_t n,
                                                       const VkComputePipelineCreateInfo *info,
                                                       const VkAllocationCallbacks *allocator,
                                                       VkPipeline *ret)
{
    control->pipelines++;
    return strikes(FAULT_PIPELINE) ? VK_ERROR_OUT_OF_HOST_MEMORY
                                   : next.CreateComputePipelines(d, cache, n, info, allocator, ret);
}

/* Of those that are waited for, so that it can be done later. */
static void hold(VkQueue queue, const VkSubmitInfo *info)
{
    const VkTimelineSemaphoreSubmitInfo *timeline = info->pNext;

    assert(info->commandBufferCount == 1 && info->waitSemaphoreCount == 0);
    assert(info->signalSemaphoreCount == 1 &&
           timeline->sType == VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO);
    held.queue = queue;
    held.commands = info->pCommandBuffers[0];
    held.semaphore = info->pSignalSemaphores[0];
    held.value = timeline->pSignalSemaphoreValues[0];
    held.timeline = *timeline;
    held.timeline.pSignalSemaphoreValues = &held.value;
    held.info = *info;
    held.info.pNext = &held.timeline;
    held.info.pCommandBuffers = &held.commands;
    held.info.pSignalSemaphores = &held.semaphore;
}

/* A device that hung comes to after all, long after it was given up. */
static void *come_to(void *unused)
{
    VkSemaphoreWaitInfo info = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
        .semaphoreCount = 1,
        .pSemaphores = &held.semaphore,
        .pValues = &held.value,
    };
    (void)unused;
    while (control->release == 0)
        usleep(1000);
    if (next.QueueSubmit(held.queue, 1, &held.info, VK_NULL_HANDLE) == VK_SUCCESS)
        next.WaitSemaphores(device, &info, UINT64_MAX);
    control->release = 2;
    return NULL;
}

static VKAPI_ATTR VkResult VKAPI_CALL queue_submit(VkQueue queue, uint32_t n,
                                                   const VkSubmitInfo *info, VkFence fence)
{
    pthread_t thread;

    control->submits++;
    if (strikes(FAULT_LOST_AT_SUBMIT))
        lost = true;
    if (lost)
        return VK_ERROR_DEVICE_LOST;
    if (strikes(FAULT_MEMORY_AT_SUBMIT))
        return VK_ERROR_OUT_OF_DEVICE_MEMORY;
    if (hangs) {
        control->touched++;
        return VK_SUCCESS;
    }
    if (strikes(FAULT_HANG)) {
        if (n != 1 || fence)
            abort();
        hold(queue, info);
        hangs = just_submitted = true;
        if (pthread_create(&thread, NULL, come_to, NULL) != 0)
            abort();
        pthread_detach(thread);
        return VK_SUCCESS;
    }
    return next.QueueSubmit(queue, n, info, fence);
}

static VKAPI_ATTR VkResult VKAPI_CALL wait_semaphores(VkDevice d, const VkSemaphoreWaitInfo *info,
                                                      uint64_t timeout)
{
    if (hangs) {
        struct timespec t = {(time_t)(timeout / 1000000000), (long)(timeout % 1000000000)};

        nanosleep(&t, NULL);
        return VK_TIMEOUT;
    }
    if (strikes(FAULT_LOST_AT_WAIT)) {
        /* what the driver was given is done: it knows of no fault */
        next.WaitSemaphores(d, info, UINT64_MAX);
        lost = true;
    }
    return lost ? VK_ERROR_DEVICE_LOST : next.WaitSemaphores(d, info, timeout);
}

static VKAPI_ATTR VkResult VKAPI_CALL device_wait_idle(VkDevice d)
{
    if (hangs)
        abort(); /* for ever */
    return lost ? VK_ERROR_DEVICE_LOST : next.DeviceWaitIdle(d);
}

#define FREES(X)                     \
    X(DestroyPipeline, VkPipeline)   \
    X(DestroyBuffer, VkBuffer)       \
    X(FreeMemory, VkDeviceMemory)    \
    X(DestroySemaphore, VkSemaphore) \
    X(DestroyCommandPool, VkCommandPool)

#define X(name, type)                                                                   \
    static VKAPI_ATTR void VKAPI_CALL do_##name(VkDevice d, type object,                \
                                                const VkAllocationCallbacks *allocator) \
    {                                                                                   \
        control->touched += hangs;                                                      \
        next.name(d, object, allocator);                                                \
    }
FREES(X)
#undef X

static VKAPI_ATTR void VKAPI_CALL destroy_device(VkDevice d, const VkAllocationCallbacks *allocator)
{
    control->touched += hangs;
    next.DestroyDevice(d, allocator);
}

/* ---- what the loader asks for ---- */

static PFN_vkVoidFunction get_instance(VkInstance i, const char *name);
static PFN_vkVoidFunction get_device(VkDevice d, const char *name);

static const struct {
    const char *name;
    PFN_vkVoidFunction f;
    bool of_device;
} functions[] = {
    {"vkGetInstanceProcAddr", (PFN_vkVoidFunction)get_instance, false},
    {"vkCreateInstance", (PFN_vkVoidFunction)create_instance, false},
    {"vkDestroyInstance", (PFN_vkVoidFunction)destroy_instance, false},
    {"vkEnumeratePhysicalDevices", (PFN_vkVoidFunction)enumerate_physical_devices, false},
    {"vkGetPhysicalDeviceFeatures2", (PFN_vkVoidFunction)get_features, false},
    {"vkEnumerateDeviceExtensionProperties", (PFN_vkVoidFunction)enumerate_extensions, false},
    {"vkCreateDevice", (PFN_vkVoidFunction)create_device, false},
    {"vkGetDeviceProcAddr", (PFN_vkVoidFunction)get_device, true},
    {"vkDestroyDevice", (PFN_vkVoidFunction)destroy_device, true},
    {"vkAllocateMemory", (PFN_vkVoidFunction)allocate_memory, true},
    {"vkCreateComputePipelines", (PFN_vkVoidFunction)create_pipelines, true},
    {"vkQueueSubmit", (PFN_vkVoidFunction)queue_submit, true},
    {"vkWaitSemaphores", (PFN_vkVoidFunction)wait_semaphores, true},
    {"vkDeviceWaitIdle", (PFN_vkVoidFunction)device_wait_idle, true},
#define X(name, type) {"vk" #name, (PFN_vkVoidFunction)do_##name, true},
    FREES(X)
#undef X
};

static PFN_vkVoidFunction find(const char *name, bool of_device)
{
    for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++)
        if ((functions[i].of_device || !of_device) && strcmp(functions[i].name, name) == 0)
            return functions[i].f;
    return NULL;
}

static PFN_vkVoidFunction get_instance(VkInstance i, const char *name)
{
    PFN_vkVoidFunction f = find(name, false);

    return f ? f : next_instance ? next_instance(i, name) : NULL;
}

static PFN_vkVoidFunction get_device(VkDevice d, const char *name)
{
    PFN_vkVoidFunction f = find(name, true);

    return f ? f : next_device(d, name);
}

EXPORT VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface *n);

EXPORT VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface *n)
{
    n->loaderLayerInterfaceVersion = 2;
    n->pfnGetInstanceProcAddr = get_instance;
    n->pfnGetDeviceProcAddr = get_device;
    n->pfnGetPhysicalDeviceProcAddr = NULL;
    return VK_SUCCESS;
}

/* ---- the clock ---- */

EXPORT int clock_gettime(clockid_t clock, struct timespec *ret)
{
    int r = (int)syscall(SYS_clock_gettime, clock, ret);

    if (r == 0 && clock == CLOCK_MONOTONIC && just_submitted) {
        just_submitted = false;
        ret->tv_sec -= AGO;
    }
    return r;
}

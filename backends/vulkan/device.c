/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Finding a device, opening it, and its pipelines. */

#include "backends/vulkan/device.h"

#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "shaders/spirv.h" /* made at build time: spirv_SHADER[] of each */

/* Longer than any pass, shorter than people's patience; a device in software takes its time. */
#define HANG_USEC 10000000
#define SOFTWARE_HANG_USEC 600000000

int vulkan_errno(VkResult r)
{
    switch (r) {
    case VK_SUCCESS:
    case VK_INCOMPLETE:
        return 0;
    case VK_ERROR_OUT_OF_HOST_MEMORY:
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
    case VK_ERROR_TOO_MANY_OBJECTS:
    case VK_ERROR_FRAGMENTATION:
        return -ENOMEM;
    case VK_ERROR_DEVICE_LOST:
    case VK_ERROR_INITIALIZATION_FAILED:
    case VK_ERROR_INCOMPATIBLE_DRIVER:
        return -ENODEV;
    case VK_TIMEOUT:
    case VK_NOT_READY:
        return -ETIMEDOUT;
    case VK_ERROR_EXTENSION_NOT_PRESENT:
    case VK_ERROR_FEATURE_NOT_PRESENT:
    case VK_ERROR_LAYER_NOT_PRESENT:
    case VK_ERROR_INVALID_EXTERNAL_HANDLE:
        return -EOPNOTSUPP;
    default:
        return -EIO;
    }
}

/* ---- the loader and its functions ---- */

/*
 * Driver, layers, and the compilers they bring are never unloaded: they have had threads, and may
 * have left things to be done at the end of a thread or of the process. What they keep for
 * themselves stays reachable, so that a search for leaks finds only leaks. Which of the modules in
 * the process are theirs cannot be told; the others stay as well.
 */
static void keep_modules(const struct vulkan_device *d)
{
    struct link_map *m;

    if (dlinfo(d->library, RTLD_DI_LINKMAP, &m) != 0)
        return;
    while (m->l_prev)
        m = m->l_prev;
    for (; m; m = m->l_next)
        if (m->l_name[0])
            dlopen(m->l_name, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

static int load(struct vulkan_device *d, struct error *err)
{
    PFN_vkGetInstanceProcAddr get;
    uint32_t version = VK_API_VERSION_1_0;
    int r;

    d->library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!d->library)
        return error_set(err, ENOENT,
                         "no Vulkan loader (libvulkan.so.1) on this machine; install one "
                         "(Debian: libvulkan1) to use a GPU");
    get = (PFN_vkGetInstanceProcAddr)dlsym(d->library, "vkGetInstanceProcAddr");
#define X(name)                                                    \
    d->vk.name = get ? (PFN_vk##name)get(NULL, "vk" #name) : NULL; \
    if (!d->vk.name)                                               \
        return error_set(err, ENOENT, "the Vulkan loader lacks vk" #name "; it is too old");
    VULKAN_GLOBAL_FUNCTIONS(X)
#undef X
    r = vulkan_errno(d->vk.EnumerateInstanceVersion(&version));
    if (r < 0 || version < VK_API_VERSION_1_2)
        return error_set(err, ENOENT, "the Vulkan loader is older than version 1.2");

    VkApplicationInfo application = {
        .sType = VK_STRUCTURE_TYPE_APPLICATION_INFO,
        .pApplicationName = "llmd",
        .apiVersion = MIN(version, VK_API_VERSION_1_3),
    };
    VkInstanceCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO,
        .pApplicationInfo = &application,
    };
    r = vulkan_errno(d->vk.CreateInstance(&info, NULL, &d->instance));
    if (r == -ENOMEM)
        return error_set(err, ENOMEM, "out of memory while Vulkan was started");
    if (r < 0) {
        d->instance = NULL;
        return error_set(err, ENOENT,
                         "no Vulkan driver on this machine that works; install one "
                         "(Debian: mesa-vulkan-drivers) to use a GPU");
    }
    keep_modules(d);
#define X(name)                                              \
    d->vk.name = (PFN_vk##name)get(d->instance, "vk" #name); \
    if (!d->vk.name)                                         \
        return error_set(err, ENODEV, "the Vulkan loader lacks vk" #name "; it is too old");
    VULKAN_INSTANCE_FUNCTIONS(X)
#undef X
    d->api_version = application.apiVersion;
    return 0;
}

/* ---- what a device is, and has ---- */

/* All that is asked about features, chained for a question or an order. */
struct features {
    VkPhysicalDeviceFeatures2 base;
    VkPhysicalDeviceVulkan12Features v12;
    VkPhysicalDeviceShaderIntegerDotProductFeatures dot;
};

#define MAX_EXTENSIONS 8

/* What attention.comp and the sparse feed-forward take. Vulkan promises half as much, but only
 * boards' GPUs have no more. */
#define MIN_INVOCATIONS 256
#define MIN_SHARED 32768

/* What find_out() learns of one device; the one that is chosen leaves it in struct vulkan_device.
 */
struct candidate {
    VkPhysicalDevice physical;
    VkPhysicalDeviceProperties properties;
    struct vulkan_capabilities has;
    VkPhysicalDeviceIDProperties id;
    VkPhysicalDeviceDrmPropertiesEXT drm;
    uint32_t queue_family, timestamp_bits;
    uint64_t max_piece;
    size_t import_align;
    const char *priority;
    const char *lacks; /* NULL: can be used */
};

static void chain_features(struct features *f, bool dot)
{
    *f = (struct features){
        .base.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2,
        .v12.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
        .dot.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES,
    };
    f->base.pNext = &f->v12;
    if (dot)
        f->v12.pNext = &f->dot;
}

static bool is_extension(const VkExtensionProperties *e, uint32_t n, const char *name)
{
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(e[i].extensionName, name) == 0)
            return true;
    return false;
}

static int list_extensions(struct vulkan_device *d, VkPhysicalDevice physical,
                           VkExtensionProperties **ret, uint32_t *ret_n)
{
    CLEANUP(freep) VkExtensionProperties *e = NULL;
    uint32_t n = 0;
    int r = vulkan_errno(d->vk.EnumerateDeviceExtensionProperties(physical, NULL, &n, NULL));

    if (r < 0)
        return r;
    e = calloc(n + 1, sizeof(*e));
    if (!e)
        return -ENOMEM;
    r = vulkan_errno(d->vk.EnumerateDeviceExtensionProperties(physical, NULL, &n, e));
    if (r < 0)
        return r;
    *ret = TAKE_PTR(e);
    *ret_n = n;
    return 0;
}

/* The first queue that computes; one that only computes leaves the display alone, so is better. */
static bool find_queue(struct vulkan_device *d, struct candidate *c)
{
    VkQueueFamilyProperties q[16];
    uint32_t n = ARRAY_SIZE(q);
    bool found = false;

    d->vk.GetPhysicalDeviceQueueFamilyProperties(c->physical, &n, q);
    for (uint32_t i = 0; i < n; i++) {
        bool alone = !(q[i].queueFlags & VK_QUEUE_GRAPHICS_BIT);

        if (!(q[i].queueFlags & VK_QUEUE_COMPUTE_BIT) || q[i].queueCount == 0 || (found && !alone))
            continue;
        c->queue_family = i;
        c->timestamp_bits = q[i].timestampValidBits;
        if (alone)
            return true;
        found = true;
    }
    return found;
}

/* Which chained structures the device knows: those of 1.3, or of extensions. */
static bool knows(const struct vulkan_device *d, const VkPhysicalDeviceProperties *p,
                  const VkExtensionProperties *e, uint32_t n, const char *extension)
{
    return MIN(d->api_version, p->apiVersion) >= VK_API_VERSION_1_3 ||
           is_extension(e, n, extension);
}

/* Fills c from c->physical. 0, with c->lacks saying why the device cannot be used, or -errno. */
static int find_out(struct vulkan_device *d, struct candidate *c)
{
    CLEANUP(freep) VkExtensionProperties *e = NULL;
    VkPhysicalDeviceExternalMemoryHostPropertiesEXT import = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT};
    VkPhysicalDeviceMaintenance3Properties piece = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES};
    VkPhysicalDeviceMaintenance4Properties buffer = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_4_PROPERTIES};
    VkPhysicalDeviceProperties2 properties = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, .pNext = &c->id};
    const VkPhysicalDeviceLimits *limits = &properties.properties.limits;
    void **end = &piece.pNext;
    struct features f;
    uint32_t n;
    int r;

    d->vk.GetPhysicalDeviceProperties2(c->physical, &properties);
    c->properties = properties.properties;
    if (MIN(c->properties.apiVersion, d->api_version) < VK_API_VERSION_1_2) {
        c->lacks = "Vulkan 1.2";
        return 0;
    }
    r = list_extensions(d, c->physical, &e, &n);
    if (r < 0)
        return r;

    bool dot = knows(d, &c->properties, e, n, VK_KHR_SHADER_INTEGER_DOT_PRODUCT_EXTENSION_NAME);
    bool imports = is_extension(e, n, VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME);

    chain_features(&f, dot);
    d->vk.GetPhysicalDeviceFeatures2(c->physical, &f.base);
    if (!f.v12.bufferDeviceAddress)
        c->lacks = "buffer device addresses";
    else if (!f.v12.timelineSemaphore)
        c->lacks = "timeline semaphores";
    else if (!find_queue(d, c))
        c->lacks = "a queue that computes";
    else if (limits->maxComputeWorkGroupInvocations < MIN_INVOCATIONS ||
             limits->maxComputeWorkGroupSize[0] < MIN_INVOCATIONS ||
             limits->maxComputeSharedMemorySize < MIN_SHARED)
        c->lacks = "work groups of 256 with 32 KiB of shared memory";

    c->id.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES;
    c->id.pNext = &piece;
    if (MIN(c->properties.apiVersion, d->api_version) >= VK_API_VERSION_1_3) {
        *end = &buffer;
        end = &buffer.pNext;
    }
    if (imports) {
        *end = &import;
        end = &import.pNext;
    }
    c->drm = (VkPhysicalDeviceDrmPropertiesEXT){
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRM_PROPERTIES_EXT};
    if (is_extension(e, n, VK_EXT_PHYSICAL_DEVICE_DRM_EXTENSION_NAME))
        *end = &c->drm;
    d->vk.GetPhysicalDeviceProperties2(c->physical, &properties);
    c->id.pNext = NULL;

    c->max_piece = piece.maxMemoryAllocationSize;
    if (buffer.maxBufferSize)
        c->max_piece = MIN(c->max_piece, buffer.maxBufferSize);
    c->priority = is_extension(e, n, VK_KHR_GLOBAL_PRIORITY_EXTENSION_NAME)
                      ? VK_KHR_GLOBAL_PRIORITY_EXTENSION_NAME
                  : is_extension(e, n, VK_EXT_GLOBAL_PRIORITY_EXTENSION_NAME)
                      ? VK_EXT_GLOBAL_PRIORITY_EXTENSION_NAME
                      : NULL;
    c->import_align = (size_t)import.minImportedHostPointerAlignment;
    c->has = (struct vulkan_capabilities){
        .shared_bytes = limits->maxComputeSharedMemorySize,
        .max_invocations =
            MIN(limits->maxComputeWorkGroupInvocations, limits->maxComputeWorkGroupSize[0]),
        .dot_8 = dot && f.dot.shaderIntegerDotProduct,
    };
    return 0;
}

/* ---- choosing ---- */

/* Higher is better, 0: never on its own account. */
static int rank(VkPhysicalDeviceType type)
{
    switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
        return 3; /* no copy of the weights, no copy of the KV cache */
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
        return 2;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
        return 1;
    default:
        return 0;
    }
}

static void hex(char *s, const void *data, size_t n)
{
    const uint8_t *p = data;

    for (size_t i = 0; i < n; i++)
        sprintf(s + 2 * i, "%02x", p[i]);
}

static void take(struct vulkan_device *d, const struct candidate *c)
{
    d->physical = c->physical;
    d->type = c->properties.deviceType;
    memcpy(d->name, c->properties.deviceName, sizeof(d->name));
    d->name[sizeof(d->name) - 1] = '\0';
    d->has = c->has;
    d->has_node = c->drm.hasRender && c->drm.renderMajor >= 0 && c->drm.renderMinor >= 0;
    d->node_major = d->has_node ? (unsigned)c->drm.renderMajor : 0;
    d->node_minor = d->has_node ? (unsigned)c->drm.renderMinor : 0;
    d->api_version = MIN(d->api_version, c->properties.apiVersion);
    d->queue_family = c->queue_family;
    d->timestamp_bits = c->timestamp_bits;
    d->timestamp_nsec = (double)c->properties.limits.timestampPeriod;
    d->max_piece = c->max_piece;
    d->import_align = c->import_align;
    d->priority = c->priority;
    d->vk.GetPhysicalDeviceMemoryProperties(d->physical, &d->memory);
    hex(d->identity, c->id.deviceUUID, VK_UUID_SIZE);
    hex(d->identity + 2 * VK_UUID_SIZE, c->id.driverUUID, VK_UUID_SIZE);
    hex(d->identity + 4 * VK_UUID_SIZE, &c->properties.driverVersion, 4);
}

/* Adds "name (what it is)" to a list. */
static void list_device(char *s, size_t size, const struct candidate *c)
{
    size_t n = strlen(s);

    snprintf(s + n, size - n, "%s%s%s%s%s%s", n ? ", " : "", c->properties.deviceName,
             rank(c->properties.deviceType) == 0 ? " (software: used when named)" : "",
             c->lacks ? " (lacks " : "", c->lacks ? c->lacks : "", c->lacks ? ")" : "");
}

static int choose(struct vulkan_device *d, const char *name, struct error *err)
{
    VkPhysicalDevice physical[16];
    uint32_t n = ARRAY_SIZE(physical);
    struct candidate best = {};
    const char *lacks = NULL;
    char lacking[VK_MAX_PHYSICAL_DEVICE_NAME_SIZE] = "", there[360] = "";
    int best_rank = -1;
    int r = vulkan_errno(d->vk.EnumeratePhysicalDevices(d->instance, &n, physical));

    if (r == -ENOMEM)
        return error_set(err, ENOMEM, "out of memory while GPUs were looked for");
    if (r < 0 || n == 0)
        return error_set(err, ENOENT, "no Vulkan driver on this machine found a GPU");
    for (uint32_t i = 0; i < n; i++) {
        struct candidate c = {
            .physical = physical[i],
            .id.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES,
        };

        r = find_out(d, &c);
        if (r == -ENOMEM)
            return error_set(err, ENOMEM, "out of memory while GPUs were looked for");
        if (r < 0)
            c.lacks = "a driver that answers";
        list_device(there, sizeof(there), &c);

        int score = rank(c.properties.deviceType);

        if (name ? !strcasestr(c.properties.deviceName, name) : score == 0)
            continue;
        if (c.lacks) {
            if (!lacks)
                memcpy(lacking, c.properties.deviceName, sizeof(lacking));
            lacks = lacks ? lacks : c.lacks;
            continue;
        }
        if (score > best_rank) {
            best_rank = score;
            best = c;
        }
    }
    if (best_rank >= 0) {
        take(d, &best);
        return 0;
    }
    if (lacks)
        return error_set(err, ENODEV, "%s cannot be used: it lacks %s", lacking, lacks);
    if (name)
        return error_set(err, ENOENT, "no Vulkan device '%s'; there is: %s", name, there);
    return error_set(err, ENOENT, "no GPU with a Vulkan driver; there is: %s", there);
}

int vulkan_device_find(struct vulkan_device **ret, const struct vulkan_options *o,
                       struct error *err)
{
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = calloc(1, sizeof(*d));
    int r;

    if (!d)
        return error_set(err, ENOMEM, "out of memory");
    d->copy_weights = o->copy_weights;
    if (sched_getaffinity(0, sizeof(d->cpus), &d->cpus) == 0)
        d->n_cpus = CPU_COUNT(&d->cpus);
    if (o->cache_bytes) {
        d->first_cache = malloc(o->cache_bytes);
        if (!d->first_cache)
            return error_set(err, ENOMEM, "out of memory");
        memcpy(d->first_cache, o->cache, o->cache_bytes);
        d->first_cache_bytes = o->cache_bytes;
    }
    r = load(d, err);
    if (r < 0)
        return r;
    r = choose(d, o->name, err);
    if (r < 0)
        return r;
    d->hang_usec = o->hang_usec                   ? o->hang_usec
                   : vulkan_device_is_software(d) ? SOFTWARE_HANG_USEC
                                                  : HANG_USEC;
    *ret = TAKE_PTR(d);
    return 0;
}

/* ---- opening ---- */

/* Asks for what is required, and for what find_out() has found and somebody may use. */
static int create_device(struct vulkan_device *d)
{
    const char *extensions[MAX_EXTENSIONS];
    float priority = 0;
    VkDeviceQueueGlobalPriorityCreateInfoKHR low = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_GLOBAL_PRIORITY_CREATE_INFO_KHR,
        .globalPriority = VK_QUEUE_GLOBAL_PRIORITY_LOW_KHR, /* the display comes first */
    };
    VkDeviceQueueCreateInfo queue = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO,
        .pNext = d->priority ? &low : NULL,
        .queueFamilyIndex = d->queue_family,
        .queueCount = 1,
        .pQueuePriorities = &priority,
    };
    VkDeviceCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
        .queueCreateInfoCount = 1,
        .pQueueCreateInfos = &queue,
        .ppEnabledExtensionNames = extensions,
    };
    bool is_1_3 = d->api_version >= VK_API_VERSION_1_3;
    struct features f;
    int r;

    chain_features(&f, d->has.dot_8);
    f.v12.bufferDeviceAddress = VK_TRUE;
    f.v12.timelineSemaphore = VK_TRUE;
    f.dot.shaderIntegerDotProduct = d->has.dot_8;
    info.pNext = &f.base;
    if (d->import_align)
        extensions[info.enabledExtensionCount++] = VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME;
    if (d->has.dot_8 && !is_1_3)
        extensions[info.enabledExtensionCount++] = VK_KHR_SHADER_INTEGER_DOT_PRODUCT_EXTENSION_NAME;
    if (d->priority)
        extensions[info.enabledExtensionCount++] = d->priority;
    r = vulkan_errno(d->vk.CreateDevice(d->physical, &info, NULL, &d->device));
    if (r < 0 && r != -ENOMEM && d->priority) { /* drivers may not permit it */
        d->priority = NULL;
        queue.pNext = NULL;
        info.enabledExtensionCount--;
        r = vulkan_errno(d->vk.CreateDevice(d->physical, &info, NULL, &d->device));
    }
    return r;
}

/*
 * Drivers must tell a foreign cache by its header; this keeps what is not even one away from them.
 */
static bool is_cache_of(const struct vulkan_device *d, const void *data, size_t bytes)
{
    VkPhysicalDeviceProperties2 p = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2};
    VkPipelineCacheHeaderVersionOne header;

    if (bytes < sizeof(header))
        return false;
    memcpy(&header, data, sizeof(header));
    d->vk.GetPhysicalDeviceProperties2(d->physical, &p);
    return header.headerSize >= sizeof(header) && header.headerSize <= bytes &&
           header.headerVersion == VK_PIPELINE_CACHE_HEADER_VERSION_ONE &&
           header.vendorID == p.properties.vendorID && header.deviceID == p.properties.deviceID &&
           memcmp(header.pipelineCacheUUID, p.properties.pipelineCacheUUID, VK_UUID_SIZE) == 0;
}

static int create_cache(struct vulkan_device *d)
{
    VkPipelineCacheCreateInfo info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO};

    if (is_cache_of(d, d->first_cache, d->first_cache_bytes)) {
        info.initialDataSize = d->first_cache_bytes;
        info.pInitialData = d->first_cache;
    }
    return vulkan_errno(d->vk.CreatePipelineCache(d->device, &info, NULL, &d->cache));
}

static int get_cache(struct vulkan_device *d, void **ret, size_t *ret_bytes)
{
    CLEANUP(freep) void *data = NULL;
    size_t bytes = 0;
    int r = vulkan_errno(d->vk.GetPipelineCacheData(d->device, d->cache, &bytes, NULL));

    if (r < 0)
        return r;
    data = malloc(bytes + 1);
    if (!data)
        return -ENOMEM;
    r = vulkan_errno(d->vk.GetPipelineCacheData(d->device, d->cache, &bytes, data));
    if (r < 0)
        return r;
    *ret = TAKE_PTR(data);
    *ret_bytes = bytes;
    return 0;
}

static int create_layout(struct vulkan_device *d)
{
    VkPushConstantRange range = {VK_SHADER_STAGE_COMPUTE_BIT, 0, 128};
    VkPipelineLayoutCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
        .pushConstantRangeCount = 1,
        .pPushConstantRanges = &range,
    };

    return vulkan_errno(d->vk.CreatePipelineLayout(d->device, &info, NULL, &d->layout));
}

/* Of a device half made, too. */
static void close_device(struct vulkan_device *d)
{
    for (int p = 0; p < VULKAN_N_PIPELINES; p++) {
        if (d->pipelines[p])
            d->vk.DestroyPipeline(d->device, d->pipelines[p], NULL);
        d->pipelines[p] = NULL;
    }
    if (d->layout)
        d->vk.DestroyPipelineLayout(d->device, d->layout, NULL);
    if (d->cache)
        d->vk.DestroyPipelineCache(d->device, d->cache, NULL);
    if (d->device)
        d->vk.DestroyDevice(d->device, NULL);
    d->layout = NULL;
    d->cache = NULL;
    d->device = NULL;
}

/* All but trying. On failure nothing is left. */
static int open_once(struct vulkan_device *d, struct error *err)
{
    int r = create_device(d);

    if (r < 0) {
        d->device = NULL;
        return error_set(err, r == -ENOMEM ? ENOMEM : ENODEV, "%s cannot be opened: %s", d->name,
                         r == -ENOMEM ? "out of memory" : "its driver refuses");
    }
#define X(name)                                                                \
    d->vk.name = (PFN_vk##name)d->vk.GetDeviceProcAddr(d->device, "vk" #name); \
    if (!d->vk.name)                                                           \
        goto lacking;
    VULKAN_DEVICE_FUNCTIONS(X)
#undef X
#define X(name) d->vk.name = (PFN_vk##name)d->vk.GetDeviceProcAddr(d->device, "vk" #name);
    VULKAN_OPTIONAL_FUNCTIONS(X)
#undef X
    if (!d->vk.GetMemoryHostPointerPropertiesEXT)
        d->import_align = 0;
    d->vk.GetDeviceQueue(d->device, d->queue_family, 0, &d->queue);
    r = create_cache(d);
    if (r == 0)
        r = create_layout(d);
    if (r < 0) {
        close_device(d);
        return error_set(err, ENOMEM, "%s cannot be opened: out of memory", d->name);
    }
    d->state = VULKAN_WELL;
    return 0;

lacking:
    /* Without vkDestroyDevice nothing can be given back; no driver has come that far. */
    if (d->vk.DestroyDevice)
        d->vk.DestroyDevice(d->device, NULL);
    d->device = NULL;
    return error_set(err, ENODEV, "%s cannot be used: its driver lacks functions of Vulkan 1.2",
                     d->name);
}

/* Tries what was not tried before. A trial that fails may take the device with it: false then. */
static bool try_imports(struct vulkan_device *d)
{
    if (!d->has_tried[BACKEND_SHARED]) {
        d->has_tried[BACKEND_SHARED] = true;
        d->shares = vulkan_try_import(d, true);
    }
    if (d->state == VULKAN_WELL && !d->has_tried[BACKEND_WEIGHTS]) {
        d->has_tried[BACKEND_WEIGHTS] = true;
        d->imports_weights =
            !d->copy_weights && vulkan_device_is_integrated(d) && vulkan_try_import(d, false);
    }
    return d->state == VULKAN_WELL;
}

static int open_with_threads(struct vulkan_device *d, struct error *err)
{
    int r;

    if (d->state == VULKAN_LOST && d->device && d->n_backends == 0) {
        (void)get_cache(d, &d->first_cache, &d->first_cache_bytes); /* no work of the device's */
        close_device(d);
    }
    if (d->device)
        return d->state == VULKAN_HUNG ? error_set(err, ENODEV, "%s does not answer", d->name) : 0;
    do {
        r = open_once(d, err);
        if (r < 0)
            return r;
        if (!try_imports(d) && d->state == VULKAN_LOST)
            close_device(d);
    } while (!d->device);
    free(d->first_cache);
    d->first_cache = NULL;
    d->first_cache_bytes = 0;
    if (d->state == VULKAN_HUNG)
        return error_set(err, ENODEV, "%s does not answer", d->name);
    return 0;
}

/*
 * Threads that the driver starts inherit from the caller where they may run; and a thread that
 * computes has been pinned to one core, by backend_cpu_pin(), where the two would be in each
 * other's way. So the device is opened with the cores that there were before.
 */
int vulkan_device_open(struct vulkan_device *d, struct error *err)
{
    cpu_set_t pinned;
    bool moves = d->n_cpus > 0 && sched_getaffinity(0, sizeof(pinned), &pinned) == 0 &&
                 sched_setaffinity(0, sizeof(d->cpus), &d->cpus) == 0;
    int r = open_with_threads(d, err);

    if (moves)
        (void)sched_setaffinity(0, sizeof(pinned), &pinned); /* else the scheduler chooses */
    return r;
}

/* See backend.c */
static struct vulkan_device *abandoned;

struct vulkan_device *vulkan_device_free(struct vulkan_device *d)
{
    if (!d)
        return NULL;
    if (d->state == VULKAN_HUNG) {
        d->next_abandoned = abandoned;
        abandoned = d;
        return NULL;
    }
    free(d->first_cache);
    close_device(d);
    if (d->instance)
        d->vk.DestroyInstance(d->instance, NULL);
    if (d->library)
        dlclose(d->library);
    free(d);
    return NULL;
}

/* ---- what is asked about it ---- */

const char *vulkan_device_name(const struct vulkan_device *d)
{
    return d->name;
}

bool vulkan_device_is_software(const struct vulkan_device *d)
{
    return d->type == VK_PHYSICAL_DEVICE_TYPE_CPU;
}

bool vulkan_device_is_integrated(const struct vulkan_device *d)
{
    return d->type == VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU ||
           d->type == VK_PHYSICAL_DEVICE_TYPE_CPU;
}

bool vulkan_device_render_node(const struct vulkan_device *d, unsigned *ret_major,
                               unsigned *ret_minor)
{
    *ret_major = d->node_major;
    *ret_minor = d->node_minor;
    return d->has_node;
}

const char *vulkan_device_identity(const struct vulkan_device *d)
{
    return d->identity;
}

bool vulkan_device_hangs(const struct vulkan_device *d)
{
    return d->state == VULKAN_HUNG;
}

bool vulkan_device_shares(const struct vulkan_device *d)
{
    return d->shares;
}

int vulkan_device_cache(struct vulkan_device *d, void **ret, size_t *ret_bytes)
{
    return !d->device || d->state != VULKAN_WELL ? -ENODEV : get_cache(d, ret, ret_bytes);
}

/* ---- pipelines ---- */

static const struct {
    const uint32_t *words;
    size_t bytes;
    uint32_t constants[4];
} shaders[VULKAN_N_PIPELINES] = {
#define X(name, shader, c0, c1, c2, c3) \
    [VULKAN_##name] = {spirv_##shader, sizeof(spirv_##shader), {c0, c1, c2, c3}},
    VULKAN_PIPELINES(X)
#undef X
};

int vulkan_device_pipeline(struct vulkan_device *d, enum vulkan_pipeline p, VkPipeline *ret)
{
    static const VkSpecializationMapEntry entries[4] = {
        {0, 0, 4}, {1, 4, 4}, {2, 8, 4}, {3, 12, 4}};
    VkSpecializationInfo constants = {4, entries, sizeof(shaders[p].constants),
                                      shaders[p].constants};
    VkShaderModuleCreateInfo module_info = {
        .sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO,
        .codeSize = shaders[p].bytes,
        .pCode = shaders[p].words,
    };
    VkComputePipelineCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
        .stage =
            {
                .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                .pName = "main",
                .pSpecializationInfo = &constants,
            },
        .layout = d->layout,
    };
    int r;

    if (!d->pipelines[p]) {
        VkPipeline pipeline;

        r = vulkan_errno(
            d->vk.CreateShaderModule(d->device, &module_info, NULL, &info.stage.module));
        if (r < 0)
            return r;
        r = vulkan_errno(
            d->vk.CreateComputePipelines(d->device, d->cache, 1, &info, NULL, &pipeline));
        d->vk.DestroyShaderModule(d->device, info.stage.module, NULL);
        if (r < 0)
            return r;
        d->pipelines[p] = pipeline;
    }
    *ret = d->pipelines[p];
    return 0;
}

/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The functions of Vulkan that are called, as pointers: the loader is opened at run time, so none
 * is linked. X(Name) is vkName. A test may replace any to make the driver fail.
 */

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan_core.h>

/* By the loader itself, of an instance, of a device */
#define VULKAN_GLOBAL_FUNCTIONS(X) X(CreateInstance) X(EnumerateInstanceVersion)

#define VULKAN_INSTANCE_FUNCTIONS(X)          \
    X(DestroyInstance)                        \
    X(EnumeratePhysicalDevices)               \
    X(GetPhysicalDeviceProperties2)           \
    X(GetPhysicalDeviceFeatures2)             \
    X(GetPhysicalDeviceMemoryProperties)      \
    X(GetPhysicalDeviceQueueFamilyProperties) \
    X(EnumerateDeviceExtensionProperties)     \
    X(CreateDevice)                           \
    X(GetDeviceProcAddr)

#define VULKAN_DEVICE_FUNCTIONS(X) \
    X(DestroyDevice)               \
    X(GetDeviceQueue)              \
    X(QueueSubmit)                 \
    X(AllocateMemory)              \
    X(FreeMemory)                  \
    X(MapMemory)                   \
    X(CreateBuffer)                \
    X(DestroyBuffer)               \
    X(GetBufferMemoryRequirements) \
    X(BindBufferMemory)            \
    X(GetBufferDeviceAddress)      \
    X(CreateCommandPool)           \
    X(DestroyCommandPool)          \
    X(AllocateCommandBuffers)      \
    X(FreeCommandBuffers)          \
    X(BeginCommandBuffer)          \
    X(EndCommandBuffer)            \
    X(CmdPipelineBarrier)          \
    X(CmdBindPipeline)             \
    X(CmdPushConstants)            \
    X(CmdDispatch)                 \
    X(CmdCopyBuffer)               \
    X(CmdResetQueryPool)           \
    X(CmdWriteTimestamp)           \
    X(CreateQueryPool)             \
    X(DestroyQueryPool)            \
    X(GetQueryPoolResults)         \
    X(CreateSemaphore)             \
    X(DestroySemaphore)            \
    X(WaitSemaphores)              \
    X(GetSemaphoreCounterValue)    \
    X(CreateShaderModule)          \
    X(DestroyShaderModule)         \
    X(CreatePipelineLayout)        \
    X(DestroyPipelineLayout)       \
    X(CreateComputePipelines)      \
    X(DestroyPipeline)             \
    X(CreatePipelineCache)         \
    X(DestroyPipelineCache)        \
    X(GetPipelineCacheData)

/* NULL where the device has no VK_EXT_external_memory_host */
#define VULKAN_OPTIONAL_FUNCTIONS(X) X(GetMemoryHostPointerPropertiesEXT)

struct vulkan_functions {
#define X(name) PFN_vk##name name;
    VULKAN_GLOBAL_FUNCTIONS(X)
    VULKAN_INSTANCE_FUNCTIONS(X)
    VULKAN_DEVICE_FUNCTIONS(X)
    VULKAN_OPTIONAL_FUNCTIONS(X)
#undef X
};

/* 0 for what is no error, else a negative errno: -ENOMEM (host's or device's), -ENODEV (lost, or
 * unfit), -ETIMEDOUT, -EOPNOTSUPP, -EIO for what should not happen */
int vulkan_errno(VkResult r);

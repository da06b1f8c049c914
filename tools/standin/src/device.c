/* One device with the limits of an H100, of compute capability 9.0. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "standin.h"

static const int cuda_version = 13000;
static const char device_name[] = "NVIDIA H100 (stand-in)";

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : standin_refuse(cudaErrorInvalidDevice, "cudaSetDevice", "there is one device");
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    (void)device, (void)peer;
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device)
{
    (void)device;
    snprintf(text, (size_t)length, "0000:00:00.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device)
{
    static int only;
    (void)device;
    *pool = (cudaMemPool_t)&only;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = cuda_version;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = cuda_version;
    return cudaSuccess;
}

static int attribute(enum cudaDeviceAttr name)
{
    switch (name) {
    case cudaDevAttrMaxThreadsPerBlock: return THREADS_PER_BLOCK;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY: return 0xffff;
    case cudaDevAttrMaxGridDimZ: return 0xffff;
    case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED_DEFAULT;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_MOST;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return SHARED_PER_MULTIPROCESSOR;
    case cudaDevAttrTotalConstantMemory: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 64 << 10;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 64 << 10;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device)
{
    (void)device;
    *value = attribute(name);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    (void)device;
    memset(found, 0, sizeof *found);
    strcpy(found->name, device_name);
    memset(found->uuid.bytes, 1, sizeof found->uuid.bytes);
    found->major = attribute(cudaDevAttrComputeCapabilityMajor);
    found->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    found->totalGlobalMem = (size_t)DEVICE_MEMORY_GB << 30;
    found->totalConstMem = 64 << 10;
    found->warpSize = 32;
    found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    found->maxThreadsPerBlock = THREADS_PER_BLOCK;
    found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    found->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    for (int i = 0; i < 3; i++) {
        found->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
        found->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
    }
    found->sharedMemPerBlock = SHARED_DEFAULT;
    found->sharedMemPerBlockOptin = SHARED_MOST;
    found->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR;
    found->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    found->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    found->textureAlignment = 512;
    found->canMapHostMemory = 1;
    found->concurrentKernels = 1;
    found->unifiedAddressing = 1;
    found->streamPrioritiesSupported = 1;
    found->cooperativeLaunch = 1;
    return cudaSuccess;
}

/* PyTorch looks up functions of the driver by name. One that is not there is reported as absent, as by an old driver. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned int version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status)
{
    (void)version, (void)flags;
    static void *driver;
    if (driver == NULL)
        driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = driver == NULL ? NULL : dlsym(driver, name);
    if (status != NULL)
        *status = *function == NULL ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

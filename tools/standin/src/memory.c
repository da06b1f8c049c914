/* Memory: "device" memory is memory of the host, which is only taken from it when something is written there.
 *
 * Copies between host and device are real, so that weights and images have values. Copies within the device are not:
 * no kernel computes anything, and the host must not pay for the device's work.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "standin.h"

struct range {
    char *start;
    size_t bytes;
    struct range *next;
};

static struct range *device_ranges, *pinned_ranges;
static size_t device_used;
static const size_t device_total = (size_t)DEVICE_MEMORY_GB << 30;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add_range(struct range **ranges, void *start, size_t bytes)
{
    struct range *range = malloc(sizeof *range);
    if (range == NULL)
        abort();
    pthread_mutex_lock(&lock);
    *range = (struct range){start, bytes, *ranges};
    *ranges = range;
    pthread_mutex_unlock(&lock);
}

/* Remove the range that begins at this address and return its size; 0 if there is none. */
static size_t remove_range(struct range **ranges, const void *start)
{
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (struct range **link = ranges; *link != NULL; link = &(*link)->next)
        if ((*link)->start == start) {
            struct range *range = *link;
            *link = range->next;
            bytes = range->bytes;
            free(range);
            break;
        }
    pthread_mutex_unlock(&lock);
    return bytes;
}

static bool in_ranges(struct range *const *ranges, const void *address)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (const struct range *range = *ranges; range != NULL && !found; range = range->next)
        found = (const char *)address >= range->start && (const char *)address < range->start + range->bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

/* --- allocation --- */

cudaError_t cudaMalloc(void **address, size_t bytes)
{
    cudaError_t error = standin_before_unsafe_call("cudaMalloc");
    if (error != cudaSuccess)
        return error;
    const size_t page = 2 << 20;
    bytes = (bytes + page - 1) & ~(page - 1);
    void *found = MAP_FAILED;
    if (bytes <= device_total - device_used)
        found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED)
        return standin_refuse(cudaErrorMemoryAllocation, "cudaMalloc", "the device has no more memory");
    add_range(&device_ranges, found, bytes);
    __atomic_add_fetch(&device_used, bytes, __ATOMIC_RELAXED);
    standin_log("alloc\t%s\tcudaMalloc\t%zu", standin_where(NULL), bytes);
    *address = found;
    return cudaSuccess;
}

cudaError_t cudaFree(void *address)
{
    if (address == NULL)
        return cudaSuccess;
    standin_log("sync\t%s\tcudaFree", standin_where(NULL)); /* it waits until the device no longer uses the memory */
    cudaError_t error = standin_before_unsafe_call("cudaFree");
    if (error != cudaSuccess)
        return error;
    size_t bytes = remove_range(&device_ranges, address);
    if (bytes == 0)
        return standin_refuse(cudaErrorInvalidValue, "cudaFree", "not the address of an allocation");
    __atomic_sub_fetch(&device_used, bytes, __ATOMIC_RELAXED);
    munmap(address, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = device_total;
    *free_bytes = device_total - device_used;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned int flags)
{
    (void)flags;
    cudaError_t error = standin_before_unsafe_call("cudaHostAlloc");
    if (error != cudaSuccess)
        return error;
    if (posix_memalign(address, 4096, bytes) != 0)
        return standin_refuse(cudaErrorMemoryAllocation, "cudaHostAlloc", "the host has no more memory");
    add_range(&pinned_ranges, *address, bytes);
    standin_log("alloc\t%s\tcudaHostAlloc\t%zu", standin_where(NULL), bytes);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address)
{
    remove_range(&pinned_ranges, address);
    free(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned int flags)
{
    (void)flags;
    add_range(&pinned_ranges, address, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address)
{
    remove_range(&pinned_ranges, address);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address)
{
    bool device = in_ranges(&device_ranges, address), pinned = in_ranges(&pinned_ranges, address);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = device ? 0 : cudaInvalidDeviceId;
    attributes->devicePointer = device || pinned ? (void *)address : NULL;
    attributes->hostPointer = device ? NULL : (void *)address;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol)
{
    *address = (void *)symbol;
    return cudaSuccess;
}

/* --- copies and fills --- */

static dim3 size_of(size_t bytes) /* logged as the grid: bytes, at least 1 */
{
    dim3 size = {bytes == 0 ? 1 : bytes > 0x7fffffff ? 0x7fffffff : (unsigned int)bytes, 1, 1};
    return size;
}

static cudaError_t move_bytes(const char *kind, const char *name, size_t bytes, cudaStream_t stream)
{
    dim3 one = {1, 1, 1};
    return standin_launch(kind, name, stream, size_of(bytes), one, 0, SHARED_DEFAULT);
}

static bool is_pageable(const void *address)
{
    return !in_ranges(&device_ranges, address) && !in_ranges(&pinned_ranges, address);
}

struct rows { /* what a copy moves: `count` rows of `bytes` bytes */
    char *to;
    const char *from;
    size_t to_pitch, from_pitch, bytes, count;
};

/* A copy blocks the host if its function says so, and also if the host's memory is pageable. */
static cudaError_t copy(const char *function, struct rows rows, cudaStream_t stream, bool blocks)
{
    bool to_device = in_ranges(&device_ranges, rows.to), from_device = in_ranges(&device_ranges, rows.from);
    const char *name = to_device && from_device ? "device to device"
                       : to_device              ? "host to device"
                       : from_device            ? "device to host"
                                                : "host to host";
    bool pageable = is_pageable(rows.to) || is_pageable(rows.from);
    bool captured = strcmp(standin_where(stream), "captured") == 0;
    if (blocks || pageable)
        standin_log("sync\t%s\t%s, %s%s", standin_where(stream), function, name, pageable ? ", pageable memory" : "");
    if (captured && (blocks || pageable))
        return standin_invalidate(cudaErrorStreamCaptureUnsupported, function, "a blocking copy in a capture");
    cudaError_t error = move_bytes("copy", name, rows.bytes * rows.count, stream);
    if (error == cudaSuccess && !captured && !(to_device && from_device))
        for (size_t row = 0; row < rows.count; row++)
            memmove(rows.to + row * rows.to_pitch, rows.from + row * rows.from_pitch, rows.bytes);
    return error;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    (void)kind; /* the addresses say it */
    return copy("cudaMemcpyAsync", (struct rows){to, from, bytes, bytes, bytes, 1}, stream, false);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    (void)kind;
    cudaError_t error = standin_before_unsafe_call("cudaMemcpy");
    if (error != cudaSuccess)
        return error;
    return copy("cudaMemcpy", (struct rows){to, from, bytes, bytes, bytes, 1}, NULL, true);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    (void)kind;
    return copy("cudaMemcpy2DAsync", (struct rows){to, from, to_pitch, from_pitch, width, height}, stream, false);
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream)
{
    (void)address, (void)value;
    return move_bytes("fill", "memset", bytes, stream);
}

cudaError_t cudaMemset(void *address, int value, size_t bytes)
{
    return cudaMemsetAsync(address, value, bytes, NULL);
}

/* Launches: the names of PyTorch's kernels, the limits of a launch, and the log line of each.
 *
 * A compiled CUDA program registers its kernels when it is loaded, each as a pair of a host function and a name, and
 * launches them by the address of the host function.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

struct kernel {
    const void *function; /* the key */
    const char *name;     /* mangled */
    size_t shared_limit;  /* dynamic shared memory in bytes that it may use */
};

static struct kernel *kernels;
static size_t kernel_count, kernel_room;
static bool kernels_sorted;
static pthread_mutex_t kernels_lock = PTHREAD_MUTEX_INITIALIZER;

/* --- registration --- */

void **__cudaRegisterFatBinary(void *binary)
{
    static void *handle;
    (void)binary;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle)
{
    (void)handle;
}

void __cudaUnregisterFatBinary(void **handle)
{
    (void)handle;
}

char __cudaInitModule(void **handle)
{
    (void)handle;
    return 0;
}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                       int constant, int global)
{
    (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant, (void)global;
}

void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name, int thread_limit,
                            uint3 *thread, uint3 *block, dim3 *block_size, dim3 *grid_size, int *warp_size)
{
    (void)handle, (void)device, (void)thread_limit, (void)thread, (void)block;
    (void)block_size, (void)grid_size, (void)warp_size;
    pthread_mutex_lock(&kernels_lock);
    if (kernel_count == kernel_room) {
        kernel_room = kernel_room == 0 ? 1 << 16 : 2 * kernel_room;
        kernels = realloc(kernels, kernel_room * sizeof *kernels);
        if (kernels == NULL)
            abort();
    }
    kernels[kernel_count++] = (struct kernel){function, name, SHARED_DEFAULT};
    kernels_sorted = false;
    pthread_mutex_unlock(&kernels_lock);
}

static int compare(const void *one, const void *other)
{
    const struct kernel *a = one, *b = other;
    return (a->function > b->function) - (a->function < b->function);
}

/* Sort only when a kernel is looked up: some hundred thousand are registered before the first launch. */
static struct kernel *find_kernel(const void *function)
{
    struct kernel key = {.function = function};
    pthread_mutex_lock(&kernels_lock);
    if (!kernels_sorted) {
        qsort(kernels, kernel_count, sizeof *kernels, compare);
        kernels_sorted = true;
    }
    struct kernel *found = bsearch(&key, kernels, kernel_count, sizeof *kernels, compare);
    pthread_mutex_unlock(&kernels_lock);
    return found;
}

/* --- launches --- */

static bool grid_fits(dim3 grid)
{
    return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff && grid.y <= 0xffff && grid.z <= 0xffff;
}

static bool block_fits(dim3 block)
{
    size_t threads = (size_t)block.x * block.y * block.z;
    return threads > 0 && threads <= THREADS_PER_BLOCK && block.x <= 1024 && block.y <= 1024 && block.z <= 64;
}

/* Check and log one launch. Nothing is computed. */
cudaError_t standin_launch(const char *kind, const char *name, cudaStream_t stream, dim3 grid, dim3 block,
                           size_t shared, size_t shared_limit)
{
    cudaError_t error = standin_before_work(stream, name);
    if (error != cudaSuccess)
        return error;
    if (standin_logs())
        standin_log("launch\t%s\t%s\t%s\tgrid %u %u %u block %u %u %u shared %zu", kind, standin_where(stream), name,
                    grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    standin_count_launch(stream);
    if (!grid_fits(grid) || !block_fits(block))
        return standin_refuse(cudaErrorInvalidConfiguration, name, "the grid or block is outside of the limits");
    if (shared > shared_limit || shared > SHARED_MOST)
        return standin_refuse(cudaErrorInvalidValue, name, "more shared memory than the kernel may use");
    return cudaSuccess;
}

/* Log a call of a library as one launch: its real number of kernels depends on the library. */
cudaError_t standin_library_call(const char *library, const char *name, cudaStream_t stream)
{
    dim3 one = {1, 1, 1};
    return standin_launch(library, name, stream, one, one, 0, SHARED_DEFAULT);
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream)
{
    struct kernel *kernel = find_kernel(function);
    const char *name = kernel == NULL ? "unknown" : kernel->name;
    return standin_launch("torch", name, stream, grid, block, shared, kernel == NULL ? SHARED_MOST : kernel->shared_limit);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream)
{
    (void)arguments;
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream)
{
    (void)arguments;
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments)
{
    (void)arguments;
    return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data)
{
    cudaError_t error = standin_library_call("host", "cudaLaunchHostFunc", stream);
    if (error == cudaSuccess && strcmp(standin_where(stream), "captured") != 0)
        function(data);
    return error;
}

/* --- what the compiler makes of `kernel<<<grid, block, shared, stream>>>(...)` --- */

enum { MOST_NESTED = 16 };

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[MOST_NESTED];
static __thread int configuration_count;

unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream)
{
    if (configuration_count == MOST_NESTED)
        abort();
    int i = configuration_count++;
    configurations[i].grid = grid;
    configurations[i].block = block;
    configurations[i].shared = shared;
    configurations[i].stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    if (configuration_count == 0)
        abort();
    int i = --configuration_count;
    *grid = configurations[i].grid;
    *block = configurations[i].block;
    *shared = configurations[i].shared;
    *(void **)stream = configurations[i].stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function)
{
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream)
{
    (void)arguments;
    return launch(kernel, grid, block, shared, stream);
}

/* --- attributes of kernels --- */

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = THREADS_PER_BLOCK;
    attributes->numRegs = 32;
    attributes->ptxVersion = 90;
    attributes->binaryVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return cudaSuccess;
    if (value < 0 || value > SHARED_MOST)
        return standin_refuse(cudaErrorInvalidValue, "cudaFuncSetAttribute", "more shared memory than a block can have");
    struct kernel *kernel = find_kernel(function);
    if (kernel != NULL)
        kernel->shared_limit = (size_t)value > SHARED_DEFAULT ? (size_t)value : SHARED_DEFAULT;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int block_size,
                                                                   size_t shared, unsigned int flags)
{
    (void)function, (void)block_size, (void)shared, (void)flags;
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int block_size,
                                                          size_t shared)
{
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block_size, shared, 0);
}

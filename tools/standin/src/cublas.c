/* cuBLAS and cuBLASLt: handles remember their stream, so that a matrix product is logged where it belongs. */
#include <stdlib.h>

#include "standin.h"

struct handle {
    cudaStream_t stream;
};

/* Generated functions of libcublas.so.13 call this: each computation takes its handle first. */
int standin_blas(const struct handle *handle, const char *name)
{
    return (int)standin_library_call("cublas", name, handle->stream);
}

int cublasCreate_v2(struct handle **handle)
{
    *handle = calloc(1, sizeof **handle);
    return *handle == NULL;
}

int cublasSetStream_v2(struct handle *handle, cudaStream_t stream)
{
    handle->stream = stream;
    return 0;
}

int cublasGetMathMode(struct handle *handle, int *mode)
{
    (void)handle;
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(struct handle *handle, int *mode)
{
    (void)handle;
    *mode = 0;
    return 0;
}

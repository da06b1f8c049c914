/* Functions of other libraries whose results PyTorch uses when it is imported or starts. */
#include <stddef.h>
#include <stdint.h>

int ncclGetVersion(int *version)
{
    *version = 22809;
    return 0;
}

const char *ncclGetErrorString(int result)
{
    return result == 0 ? "no error" : "an error of the stand-in";
}

const char *ncclGetLastError(void *communicator)
{
    (void)communicator;
    return "";
}

int nvrtcVersion(int *major, int *minor)
{
    *major = 13;
    *minor = 0;
    return 0;
}

const char *nvrtcGetErrorString(int result)
{
    return result == 0 ? "no error" : "an error of the stand-in";
}

int cuptiGetVersion(uint32_t *version)
{
    *version = 26; /* CUDA 13.0 */
    return 0;
}

int cuptiActivityGetNextRecord(uint8_t *buffer, size_t bytes, void **record)
{
    (void)buffer, (void)bytes, (void)record;
    return 12; /* CUPTI_ERROR_MAX_LIMIT_REACHED: there are no records */
}

static int handle; /* its address is the one handle of cuSOLVER and cuSPARSE */

int cusolverDnCreate(void **created)
{
    *created = &handle;
    return 0;
}

int cusparseCreate(void **created)
{
    *created = &handle;
    return 0;
}

/* cuDNN's graph interface, through which PyTorch runs convolutions.
 *
 * A descriptor takes over the operation of the descriptors that are set as its attributes: from a convolution to its
 * graph, to an engine, to a plan. The plan that is executed therefore has the name of the convolution.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

enum { /* cudnnBackendDescriptorType_t */
    CONVOLUTION_FORWARD = 10,
    CONVOLUTION_BACKWARD_FILTER = 11,
    CONVOLUTION_BACKWARD_DATA = 12,
};
enum { ENGINE_HEURISTICS_RESULTS = 202 };                       /* cudnnBackendAttributeName_t */
enum { DATA_TYPE = 1, BOOLEAN = 2, INT64 = 3, DOUBLE = 5, VOID_PTR = 6, DESCRIPTOR = 15 }; /* cudnnBackendAttributeType_t */

struct handle {
    cudaStream_t stream;
};

struct descriptor {
    int type;
    const char *operation; /* NULL: none yet */
};

/* --- handles and versions --- */

int cudnnCreate(struct handle **handle)
{
    *handle = calloc(1, sizeof **handle);
    return *handle == NULL;
}

int cudnnSetStream(struct handle *handle, cudaStream_t stream)
{
    handle->stream = stream;
    return 0;
}

int cudnnGetStream(struct handle *handle, cudaStream_t *stream)
{
    *stream = handle->stream;
    return 0;
}

size_t cudnnGetVersion(void)
{
    return 91900; /* 9.19, for which PyTorch 2.11 was built */
}

size_t cudnnGetCudartVersion(void)
{
    return 13000;
}

int cudnnGetProperty(int property, int *value)
{
    static const int version[] = {9, 19, 0};
    *value = property >= 0 && property < 3 ? version[property] : 0;
    return 0;
}

const char *cudnnGetErrorString(int status)
{
    return status == 0 ? "success" : "an error of the stand-in";
}

void cudnnGetLastErrorString(char *text, size_t room)
{
    if (room > 0)
        text[0] = '\0';
}

/* Generated functions of libcudnn.so.9 call this: each computation of the older interface takes its handle first. */
int standin_dnn(const struct handle *handle, const char *name)
{
    return (int)standin_library_call("cudnn", name, handle->stream);
}

/* --- the graph interface --- */

static const char *operation_of(int type)
{
    switch (type) {
    case CONVOLUTION_FORWARD: return "convolution forward";
    case CONVOLUTION_BACKWARD_FILTER: return "convolution backward filter";
    case CONVOLUTION_BACKWARD_DATA: return "convolution backward data";
    default: return NULL;
    }
}

int cudnnBackendCreateDescriptor(int type, struct descriptor **descriptor)
{
    *descriptor = malloc(sizeof **descriptor);
    **descriptor = (struct descriptor){type, operation_of(type)};
    return 0;
}

int cudnnBackendDestroyDescriptor(struct descriptor *descriptor)
{
    free(descriptor);
    return 0;
}

int cudnnBackendFinalize(struct descriptor *descriptor)
{
    (void)descriptor;
    return 0;
}

int cudnnBackendSetAttribute(struct descriptor *descriptor, int name, int type, int64_t count, const void *values)
{
    (void)name;
    struct descriptor *const *others = values;
    for (int64_t i = 0; type == DESCRIPTOR && i < count; i++)
        if (descriptor->operation == NULL && others[i] != NULL)
            descriptor->operation = others[i]->operation;
    return 0;
}

static size_t size_of(int type)
{
    switch (type) {
    case INT64: case DOUBLE: case VOID_PTR: return 8;
    default: return 4;
    }
}

/* The heuristics find one engine. Every other attribute is zero, among them the size of a plan's workspace. */
int cudnnBackendGetAttribute(struct descriptor *descriptor, int name, int type, int64_t wanted, int64_t *count,
                             void *values)
{
    int64_t found = type == DESCRIPTOR ? name == ENGINE_HEURISTICS_RESULTS : 1;
    if (count != NULL)
        *count = found;
    if (values == NULL || wanted < 1 || found == 0)
        return 0;
    if (type == DESCRIPTOR)
        (*(struct descriptor **)values)->operation = descriptor->operation;
    else if (type <= INT64)
        memset(values, 0, size_of(type));
    return 0;
}

int cudnnBackendExecute(const struct handle *handle, const struct descriptor *plan, const struct descriptor *pack)
{
    (void)pack;
    return standin_dnn(handle, plan->operation == NULL ? "unknown operation" : plan->operation);
}

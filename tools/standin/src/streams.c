/* Streams and events. All work is over at once, so nothing here ever waits; each wait is checked and logged. */
#include <stdlib.h>
#include <time.h>

#include "streams.h"

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

static void log_wait(const char *function, cudaStream_t stream)
{
    standin_log("sync\t%s\t%s", standin_where(stream), function);
}

/* --- streams --- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int priority)
{
    *stream = calloc(1, sizeof **stream);
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority)
{
    *priority = stream == NULL ? 0 : stream->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return standin_before_waiting("cudaStreamQuery", stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    log_wait("cudaStreamSynchronize", stream);
    return standin_before_waiting("cudaStreamSynchronize", stream);
}

cudaError_t cudaDeviceSynchronize(void)
{
    log_wait("cudaDeviceSynchronize", NULL);
    if (standin_current_capture() != 0)
        return standin_invalidate(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize", "a capture is going on");
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned int flags)
{
    (void)flags;
    cudaError_t error = standin_before_work(stream, "cudaStreamAddCallback");
    if (error == cudaSuccess)
        callback(stream, cudaSuccess, data);
    return error;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags)
{
    (void)flags;
    return standin_wait_in_capture(stream, event);
}

/* --- events --- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags)
{
    *event = calloc(1, sizeof **event);
    (*event)->flags = flags;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    event->milliseconds = now();
    event->stream = stream;
    event->capture = standin_capture_of(stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags)
{
    (void)flags;
    return cudaEventRecord(event, stream);
}

/* An event of a capture has no state of its own, and asking for that of another is unsafe during a capture. */
static cudaError_t before_asking(cudaEvent_t event, const char *function)
{
    if (event->capture != 0 && event->capture == standin_current_capture())
        return standin_invalidate(cudaErrorCapturedEvent, function, "the event belongs to the capture");
    return standin_before_unsafe_call(function);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return before_asking(event, "cudaEventQuery");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    log_wait("cudaEventSynchronize", event->stream);
    return before_asking(event, "cudaEventSynchronize");
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    *milliseconds = (float)(end->milliseconds - start->milliseconds);
    if (*milliseconds <= 0)
        *milliseconds = 1e-3f; /* callers divide by it */
    return cudaSuccess;
}

/* Captures and graphs, with CUDA's rules. One capture can go on at a time, in any number of streams.
 *
 * A call that a capture forbids returns CUDA's error and invalidates the capture, as on a device: what follows fails
 * too, up to and including cudaStreamEndCapture. A graph holds no work, only the number of its launches.
 */
#include <pthread.h>
#include <stdlib.h>

#include "streams.h"

enum { MOST_STREAMS = 64 };

struct member {
    cudaStream_t stream;
    bool joined; /* another stream of the capture waits for all of its work so far */
};

static struct {
    unsigned long long id; /* 0: no capture is going on */
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    struct member members[MOST_STREAMS]; /* the first is the stream in which the capture began */
    int count;
    long launches;
    bool invalid;
} capture;

struct CUgraph_st {
    unsigned long long id;
    long launches;
};

static unsigned long long captures; /* so far; gives each its number */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static struct member *find_member(cudaStream_t stream)
{
    for (int i = 0; capture.id != 0 && i < capture.count; i++)
        if (capture.members[i].stream == stream)
            return &capture.members[i];
    return NULL;
}

unsigned long long standin_current_capture(void)
{
    return capture.id;
}

unsigned long long standin_capture_of(cudaStream_t stream)
{
    return find_member(stream) == NULL ? 0 : capture.id;
}

const char *standin_where(cudaStream_t stream)
{
    if (capture.id == 0)
        return "eager";
    return find_member(stream) == NULL ? "outside" : "captured";
}

cudaError_t standin_invalidate(cudaError_t code, const char *function, const char *reason)
{
    capture.invalid = true;
    return standin_refuse(code, function, reason);
}

void standin_count_launch(cudaStream_t stream)
{
    pthread_mutex_lock(&lock);
    struct member *member = find_member(stream);
    if (member != NULL) {
        capture.launches++;
        member->joined = false;
    }
    pthread_mutex_unlock(&lock);
}

/* --- rules --- */

/* Work on the legacy stream waits for all streams that were not created as non-blocking. */
static bool legacy_would_depend(cudaStream_t stream)
{
    if (stream != NULL || capture.id == 0)
        return false;
    for (int i = 0; i < capture.count; i++)
        if (!(capture.members[i].stream->flags & cudaStreamNonBlocking))
            return true;
    return false;
}

/* Check work that a stream is about to get. */
cudaError_t standin_before_work(cudaStream_t stream, const char *function)
{
    if (find_member(stream) != NULL && capture.invalid)
        return standin_refuse(cudaErrorStreamCaptureInvalidated, function, "the capture is invalid");
    if (legacy_would_depend(stream))
        return standin_invalidate(cudaErrorStreamCaptureImplicit, function, "the legacy stream in a capture");
    return cudaSuccess;
}

/* Check a call that waits for a stream or asks whether it has finished. */
cudaError_t standin_before_waiting(const char *function, cudaStream_t stream)
{
    if (find_member(stream) != NULL)
        return standin_invalidate(cudaErrorStreamCaptureUnsupported, function, "the stream is capturing");
    return standin_before_work(stream, function);
}

/* Check a call that CUDA calls potentially unsafe: the mode of the capture and of the thread decide. */
cudaError_t standin_before_unsafe_call(const char *function)
{
    if (capture.id == 0 || thread_mode == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    bool own = pthread_equal(pthread_self(), capture.thread);
    bool forbidden = own ? capture.mode != cudaStreamCaptureModeRelaxed
                         : capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (!forbidden)
        return cudaSuccess;
    return standin_invalidate(cudaErrorStreamCaptureUnsupported, function, "unsafe while a capture is going on");
}

/* A stream that waits for an event of the capture joins it; the capture must not wait for anything else. */
cudaError_t standin_wait_in_capture(cudaStream_t stream, cudaEvent_t event)
{
    if (capture.id == 0)
        return cudaSuccess;
    bool inside = find_member(stream) != NULL;
    if (event->capture != capture.id) {
        if (!inside)
            return cudaSuccess;
        return standin_invalidate(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent", "an event from outside");
    }
    pthread_mutex_lock(&lock);
    struct member *source = find_member(event->stream);
    if (source != NULL && event->stream != stream)
        source->joined = true;
    if (!inside && capture.count < MOST_STREAMS)
        capture.members[capture.count++] = (struct member){stream, false};
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* --- captures --- */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    if (stream == NULL)
        return standin_refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture", "the legacy stream");
    if (capture.id != 0)
        return standin_invalidate(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture", "a second capture");
    pthread_mutex_lock(&lock);
    capture.members[0] = (struct member){stream, true};
    capture.count = 1;
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.launches = 0;
    capture.invalid = false;
    capture.id = ++captures;
    pthread_mutex_unlock(&lock);
    standin_log("capture\tbegin\t%llu", capture.id);
    return cudaSuccess;
}

static bool all_joined(void)
{
    for (int i = 1; i < capture.count; i++)
        if (!capture.members[i].joined)
            return false;
    return true;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    const char *function = "cudaStreamEndCapture";
    *graph = NULL;
    if (capture.id == 0 || stream != capture.members[0].stream)
        return standin_refuse(cudaErrorStreamCaptureUnmatched, function, "no capture began in this stream");
    if (capture.mode != cudaStreamCaptureModeRelaxed && !pthread_equal(pthread_self(), capture.thread))
        return standin_refuse(cudaErrorStreamCaptureWrongThread, function, "the capture began in another thread");
    unsigned long long id = capture.id;
    standin_log("capture\tend\t%llu\t%ld", id, capture.launches);
    bool joined = all_joined();
    capture.id = 0;
    if (capture.invalid)
        return standin_refuse(cudaErrorStreamCaptureInvalidated, function, "the capture is invalid");
    if (!joined)
        return standin_refuse(cudaErrorStreamCaptureUnjoined, function, "a stream is not joined");
    *graph = calloc(1, sizeof **graph);
    **graph = (struct CUgraph_st){id, capture.launches};
    return cudaSuccess;
}

static enum cudaStreamCaptureStatus status_of(cudaStream_t stream)
{
    if (find_member(stream) == NULL)
        return cudaStreamCaptureStatusNone;
    return capture.invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = status_of(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count)
{
    static struct CUgraph_st unfinished;
    *status = status_of(stream);
    if (id != NULL)
        *id = standin_capture_of(stream);
    if (graph != NULL)
        *graph = &unfinished;
    if (dependencies != NULL)
        *dependencies = NULL;
    if (edges != NULL)
        *edges = NULL;
    if (count != NULL)
        *count = 0;
    return cudaSuccess;
}

/* --- graphs: an executable graph is the graph itself, and neither is freed --- */

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags)
{
    (void)flags;
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    cudaGraph_t graph = (cudaGraph_t)executable;
    cudaError_t error = standin_before_work(stream, "cudaGraphLaunch");
    standin_log("graph\t%s\t%llu\t%ld", standin_where(stream), graph->id, graph->launches);
    return error;
}

/* PyTorch asks only for the number, to warn of empty graphs. */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    (void)nodes;
    *count = (size_t)graph->launches;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    (void)graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    (void)executable;
    return cudaSuccess;
}

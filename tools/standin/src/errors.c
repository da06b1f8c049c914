/* Errors of the runtime: each thread's last one, and their names. */
#include <stdio.h>

#include "standin.h"

static __thread cudaError_t last_error = cudaSuccess;

/* Return an error to the caller, and remember and log it. Reason: a clause for the reader of the log. */
cudaError_t standin_refuse(cudaError_t code, const char *function, const char *reason)
{
    last_error = code;
    fprintf(stderr, "stand-in: %s: error %d: %s\n", function, code, reason);
    standin_log("error\t%s\t%d\t%s", function, code, reason);
    return code;
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    return last_error;
}

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorStreamCaptureWrongThread: return "cudaErrorStreamCaptureWrongThread";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "cudaErrorUnknown";
    }
}

const char *cudaGetErrorString(cudaError_t error)
{
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid launch configuration";
    case cudaErrorNotSupported: return "not supported by the stand-in";
    case cudaErrorStreamCaptureUnsupported: return "not permitted while a stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "an earlier error has invalidated the capture";
    case cudaErrorStreamCaptureUnmatched: return "not the stream in which the capture began";
    case cudaErrorStreamCaptureUnjoined: return "work of another stream is not joined to the capture";
    case cudaErrorStreamCaptureIsolation: return "the capture would depend on work outside of it";
    case cudaErrorStreamCaptureImplicit: return "the legacy stream would depend on a capturing stream";
    case cudaErrorStreamCaptureWrongThread: return "the capture began in another thread";
    case cudaErrorCapturedEvent: return "the event was recorded in a capture";
    default: return "unknown error";
    }
}

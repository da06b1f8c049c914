/* Streams and events, as capture.c and streams.c know them. */
#ifndef STREAMS_H
#define STREAMS_H

#include "standin.h"

struct CUstream_st {
    unsigned int flags;
    int priority;
};

struct CUevent_st {
    unsigned int flags;
    double milliseconds;       /* when it was recorded, by the host's clock */
    cudaStream_t stream;       /* where it was recorded */
    unsigned long long capture; /* the capture in which it was recorded; 0: none */
};

/* --- capture.c --- */
unsigned long long standin_capture_of(cudaStream_t stream);
unsigned long long standin_current_capture(void);
cudaError_t standin_before_waiting(const char *function, cudaStream_t stream);
cudaError_t standin_wait_in_capture(cudaStream_t stream, cudaEvent_t event);

#endif

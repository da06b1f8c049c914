/* What the stand-in libraries share. libcudart.so.13 defines these functions; the other libraries link with it.
 *
 * The log is one line per event, with tabs between the columns (see README.md):
 *
 *   launch  KIND  WHERE  NAME  SIZES      KIND: triton, torch, cublas, cudnn, cufft, copy, fill, host
 *   sync    WHERE  FUNCTION               the host waits for the device
 *   alloc   WHERE  FUNCTION  BYTES
 *   capture begin  ID
 *   capture end    ID  LAUNCHES
 *   graph   WHERE  ID  LAUNCHES           a replay
 *   error   FUNCTION  CODE  REASON
 *   stub    FUNCTION                      first call of a function that does nothing and reports success
 *   mark    TEXT                          written by the program under test
 *
 * WHERE is "eager" if no capture is going on, "captured" if the call belongs to it, and otherwise "outside".
 */
#ifndef STANDIN_H
#define STANDIN_H

#include <stdbool.h>
#include <stddef.h>

#include <cuda_runtime_api.h>

/* --- log.c --- */
void standin_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool standin_logs(void);
void standin_mark(const char *text);
void standin_stub(const char *function);

/* --- errors.c --- */
cudaError_t standin_refuse(cudaError_t code, const char *function, const char *reason);

/* --- capture.c --- */
const char *standin_where(cudaStream_t stream);
cudaError_t standin_before_work(cudaStream_t stream, const char *function);
cudaError_t standin_before_unsafe_call(const char *function);
cudaError_t standin_invalidate(cudaError_t code, const char *function, const char *reason);
void standin_count_launch(cudaStream_t stream);

/* --- launch.c: everything that the device would execute passes here --- */
cudaError_t standin_launch(const char *kind, const char *name, cudaStream_t stream, dim3 grid, dim3 block,
                           size_t shared, size_t shared_limit);
cudaError_t standin_library_call(const char *library, const char *name, cudaStream_t stream);

/* --- device.c --- */
enum {
    DEVICE_MEMORY_GB = 80,
    SHARED_DEFAULT = 48 << 10,           /* a kernel gets more only if it asks for it */
    SHARED_MOST = 227 << 10,             /* per block */
    SHARED_PER_MULTIPROCESSOR = 228 << 10,
    THREADS_PER_BLOCK = 1024,
};

#endif

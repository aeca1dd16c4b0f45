/* A libcuda for a machine without a GPU: every call succeeds and does nothing. With it Triton builds the launchers of
 * its kernels as on a GPU (tools/build_kernels.py --cache). */
#include <stdint.h>

#define NOTHING(name) int name(void) { return 0; }
#define GIVES(name, type, value) int name(type *result) { *result = value; return 0; }

NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchKernelEx)
NOTHING(cuModuleUnload)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
GIVES(cuCtxGetCurrent, void *, (void *)1)
GIVES(cuCtxGetDevice, int, 0)
GIVES(cuCtxGetLimit, uint64_t, 0)
GIVES(cuDeviceGet, int, 0)
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDevicePrimaryCtxRetain, void *, (void *)1)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuFuncGetAttribute, int, 1024) /* threads of a block; stack, registers: read as well, and of no effect */
GIVES(cuModuleGetFunction, void *, (void *)1)
GIVES(cuModuleLoadData, void *, (void *)1)
GIVES(cuOccupancyMaxActiveClusters, int, 1)

int cuDeviceGetAttribute(int *result) {
  *result = 232448; /* bytes of shared memory that a block can have on an H100; whatever else is asked for */
  return 0;
}
int cuGetErrorString(int error, const char **text) {
  *text = "no error";
  return 0;
}
int cuPointerGetAttribute(void *result, int attribute, unsigned long long pointer) {
  *(unsigned long long *)result = pointer;
  return 0;
}
int cuPointerGetAttributes(void) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) {
  *status = 0;
  return 0;
}

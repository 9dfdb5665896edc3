// The few functions of CUDA's driver that launching needs, found when they are first needed: nothing links to libcuda.
#ifndef K25_CUDA_DRIVER_H
#define K25_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

namespace k25 {

using CudaResult = int;  // 0 is success
using CudaContext = struct CudaContextOf*;
using CudaModule = struct CudaModuleOf*;
using CudaFunction = struct CudaFunctionOf*;
using CudaAddress = uint64_t;

// Numbers of CUDA's attributes (cuda.h).
enum : int {
  kCudaMultiprocessors = 16,
  kCudaCapabilityMajor = 75,
  kCudaCapabilityMinor = 76,
  kCudaSharedOptIn = 97,
  kCudaFunctionMaxDynamicShared = 8
};

struct CudaDriver {
  CudaResult (*init)(unsigned int);
  CudaResult (*context)(CudaContext*);
  CudaResult (*device)(int*);
  CudaResult (*device_attribute)(int*, int, int);
  CudaResult (*load_module)(CudaModule*, const void*);
  CudaResult (*unload_module)(CudaModule);
  CudaResult (*function)(CudaFunction*, CudaModule, const char*);
  CudaResult (*set_function_attribute)(CudaFunction, int, int);
  CudaResult (*launch)(CudaFunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int,
                       unsigned int, void*, void**, void**);
  CudaResult (*copy)(CudaAddress, CudaAddress, size_t, void*);
  CudaResult (*is_capturing)(void*, int*);
  CudaResult (*error_text)(CudaResult, const char**);
  CudaResult (*context_id)(CudaContext, unsigned long long*);  // null before CUDA 12
};

// The driver, or null: then `why` says what is missing. The environment variable K25_CUDA_LIBRARY names another library
// than libcuda.so.1. Tried once in a process.
const CudaDriver* cuda_driver(const char** why);

// "CUDA error 700: an illegal memory access was encountered"
void cuda_error_text(const CudaDriver& driver, CudaResult result, char* text, size_t capacity);

}  // namespace k25
#endif

#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

namespace k25 {
namespace {

struct Loaded {
  CudaDriver driver = {};
  char why[256] = {};
};

template <typename Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

Loaded load() {
  Loaded loaded;
  const char* named = getenv("K25_CUDA_LIBRARY");
  const char* path = named != nullptr && named[0] != '\0' ? named : "libcuda.so.1";
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    snprintf(loaded.why, sizeof loaded.why, "there is no CUDA driver here (%s cannot be opened)", path);
    return loaded;
  }
  CudaDriver& cuda = loaded.driver;
  find(library, "cuCtxGetId", &cuda.context_id);
  const bool is_whole =
      find(library, "cuInit", &cuda.init) && find(library, "cuCtxGetCurrent", &cuda.context) &&
      find(library, "cuCtxGetDevice", &cuda.device) &&
      find(library, "cuDeviceGetAttribute", &cuda.device_attribute) &&
      find(library, "cuModuleLoadData", &cuda.load_module) && find(library, "cuModuleUnload", &cuda.unload_module) &&
      find(library, "cuModuleGetFunction", &cuda.function) &&
      find(library, "cuFuncSetAttribute", &cuda.set_function_attribute) &&
      find(library, "cuLaunchKernel", &cuda.launch) && find(library, "cuMemcpyDtoDAsync_v2", &cuda.copy) &&
      find(library, "cuStreamIsCapturing", &cuda.is_capturing) &&
      find(library, "cuGetErrorString", &cuda.error_text);
  if (!is_whole) {
    snprintf(loaded.why, sizeof loaded.why, "%s is no CUDA driver of version 11 or newer", path);
  } else if (const CudaResult result = cuda.init(0)) {
    const int used = snprintf(loaded.why, sizeof loaded.why, "the CUDA driver %s does not start: ", path);
    if (used > 0 && static_cast<size_t>(used) < sizeof loaded.why) {
      cuda_error_text(cuda, result, loaded.why + used, sizeof loaded.why - static_cast<size_t>(used));
    }
  }
  return loaded;
}

}  // namespace

const CudaDriver* cuda_driver(const char** why) {
  static const Loaded loaded = load();
  *why = loaded.why;
  return loaded.why[0] == '\0' ? &loaded.driver : nullptr;
}

void cuda_error_text(const CudaDriver& driver, CudaResult result, char* text, size_t capacity) {
  const char* words = nullptr;
  if (driver.error_text(result, &words) != 0 || words == nullptr) words = "unknown";
  snprintf(text, capacity, "CUDA error %d: %s", result, words);
}

}  // namespace k25

// The GPU kernels in this library, the choice among them, and their launch.
//
// What is in the library is decided when it is built (-DK25_GPU_KERNELS=DIR, the output of `python -m
// k25_plugins.gpu_kernels`). Which kernel runs follows from the device, its shared memory and shapes: never from data.
#ifndef K25_GPU_KERNELS_H
#define K25_GPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "checks.h"
#include "cuda_driver.h"
#include "k25.h"

namespace k25 {

#include "gpu_signatures.inc"

struct GpuKernel {
  const char* name;
  const char* function;
  GpuKernelKind kind;
  int16_t target;  // compute capability, 90 for 9.0
  bool is_ptx;     // compiled by the driver, for devices that no binary is for
  int32_t dtype, cache_dtype;
  int32_t warps, shared;
  int32_t max_tokens;  // 0: any number
  int32_t divisible;   // 1: its sizes must be multiples of 16
  int64_t image;       // place and bytes among the images
  int64_t image_bytes;
  int32_t constants[kMostGpuConstants];
};

struct GpuDevice {
  int32_t capability;
  int32_t shared;  // dynamic shared memory that a block may have
  int32_t processors;
};

// What a kernel must be. Of those that fit, the first in the order of the table is taken.
struct GpuWish {
  enum { kMost = 10 };
  GpuKernelKind kind;
  int32_t dtype = K25_BFLOAT16;
  int32_t cache_dtype = 0;  // 0: any
  int64_t tokens = 0;
  bool is_divisible = true;
  struct {
    int16_t constant;
    int64_t value;
    bool is_least;
  } wanted[kMost];
  int count = 0;
  // A constant that is a value.
  GpuWish& with(int16_t constant, int64_t value) {
    wanted[count++] = {constant, value, false};
    return *this;
  }
  // A constant that is no less than a value.
  GpuWish& at_least(int16_t constant, int64_t value) {
    wanted[count++] = {constant, value, true};
    return *this;
  }
};

// All kernels of this library, in the order in which they are tried.
const GpuKernel* gpu_kernels(int* count);

// The target whose kernels run on a device: its own, for 8.x an older 8.x, else PTX; 0 where there is none.
int gpu_target(int32_t capability, bool* is_ptx);

// The kernel, or null.
const GpuKernel* choose_gpu_kernel(const GpuDevice& device, const GpuWish& wish);

// Arguments of a launch, in the order of the kernel's parameters.
class GpuArguments {
 public:
  GpuArguments& pointer(const void* value);
  GpuArguments& integer(int64_t value);  // an int32
  GpuArguments& number(float value);
  GpuArguments& numbers(const float* values, int64_t count);
  // The addresses of the values, two null scratch pointers last; null where they are not what the kernel takes.
  void** addresses(const GpuKernelSpec& spec);

 private:
  enum { kMost = 96 };
  bool add(char kind, uint64_t bits);
  uint64_t values_[kMost];
  void* addresses_[kMost];
  char kinds_[kMost];
  int count_ = 0;
  bool is_good_ = true;
};

// One operator's launches on one stream. After a failure, every later step does nothing.
class GpuCall {
 public:
  GpuCall(const Signature& op, void* stream, k25_message message);
  k25_status status() const { return status_; }
  bool is_good() const { return status_ == K25_OK; }
  const GpuDevice& device() const { return device_; }
  // The kernel; K25_UNAVAILABLE, with what this build has, where there is none.
  const GpuKernel* choose(const GpuWish& wish);
  void launch(const GpuKernel* kernel, int64_t x, int64_t y, int64_t z, GpuArguments& arguments);
  void copy(void* to, const void* from, size_t bytes);
  void check_address(const TensorSpec& tensor, const void* data);
  void refuse(k25_status status, const char* what);

 private:
  void cuda(CudaResult result, const char* what);
  const Signature& op_;
  void* stream_;
  k25_message message_;
  k25_status status_ = K25_OK;
  const CudaDriver* driver_ = nullptr;
  uint64_t context_ = 0;
  GpuDevice device_ = {};
};

// What k25_gpu_set_even_rows was told.
bool gpu_rows_are_even();

// Loads every kernel for the device of the current context.
k25_status prepare_gpu_kernels(k25_message message);

// K25_UNAVAILABLE with how to get kernels, where this library has none; else K25_OK.
k25_status check_gpu_kernels(const Signature& op, k25_message message);

// Checks of the data pointers of a call: addresses that are multiples of 16.
void check_addresses(GpuCall& call, const Signature& op, const k25_tensor* inputs, const k25_tensor* outputs,
                     const void* workspace);

inline int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Parts of a workspace, one after the other, each at a multiple of 256 bytes.
class GpuWorkspace {
 public:
  explicit GpuWorkspace(void* start) : start_(static_cast<char*>(start)) {}
  // The address of a part; null where there is no memory behind it (sizes only).
  void* take(int64_t bytes) {
    char* part = start_ == nullptr ? nullptr : start_ + used_;
    used_ += ceil_div(bytes, 256) * 256;
    return part;
  }
  size_t bytes() const { return static_cast<size_t>(used_); }

 private:
  char* start_;
  int64_t used_ = 0;
};

}  // namespace k25
#endif

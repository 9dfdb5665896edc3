#include "gpu_kernels.h"

#include <stdio.h>
#include <string.h>

#include <mutex>
#include <vector>

#if defined(K25_GPU_KERNELS_DIR)
#include "kernels.inc"
__asm__(
    ".pushsection .rodata\n"
    ".balign 64\n"
    ".globl k25_gpu_images\n"
    ".hidden k25_gpu_images\n"
    "k25_gpu_images:\n"
    ".incbin \"" K25_GPU_KERNELS_DIR "/kernels.bin\"\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char k25_gpu_images[];
#endif

namespace k25 {
namespace {

#if defined(K25_GPU_KERNELS_DIR)
constexpr GpuKernel kKernels[] = {K25_GPU_KERNEL_TABLE};
constexpr int kKernelCount = sizeof kKernels / sizeof kKernels[0];
const unsigned char* images() { return k25_gpu_images; }
#else
constexpr const GpuKernel* kKernels = nullptr;
constexpr int kKernelCount = 0;
const unsigned char* images() { return nullptr; }
#endif

// The kernels that are loaded in one context; null where they are not yet.
struct LoadedKernels {
  uint64_t context;
  std::vector<CudaFunction> functions;
};

std::mutex loading;
std::vector<LoadedKernels>& loaded_kernels() {
  static std::vector<LoadedKernels>& loaded = *new std::vector<LoadedKernels>;
  return loaded;
}

// The place of a kernel's function in this context. `loading` is held.
CudaFunction& function_of(uint64_t context, const GpuKernel& kernel) {
  for (LoadedKernels& loaded : loaded_kernels()) {
    if (loaded.context == context) return loaded.functions[static_cast<size_t>(&kernel - kKernels)];
  }
  loaded_kernels().push_back({context, std::vector<CudaFunction>(kKernelCount)});
  return loaded_kernels().back().functions[static_cast<size_t>(&kernel - kKernels)];
}

CudaResult load(const CudaDriver& driver, const GpuKernel& kernel, CudaFunction* function) {
  CudaModule module = nullptr;
  CudaFunction found = nullptr;
  CudaResult result = driver.load_module(&module, images() + kernel.image);
  if (result != 0) return result;
  result = driver.function(&found, module, kernel.function);
  if (result == 0) result = driver.set_function_attribute(found, kCudaFunctionMaxDynamicShared, kernel.shared);
  if (result != 0) {
    driver.unload_module(module);
    return result;
  }
  *function = found;
  return 0;
}

// The driver, the current context and its device.
k25_status current(const char* op, const CudaDriver** driver, uint64_t* context, GpuDevice* device,
                   k25_message message) {
  const char* why = nullptr;
  *driver = cuda_driver(&why);
  if (*driver == nullptr) return fail(K25_UNAVAILABLE, message, "k25.%s: %s", op, why);
  const CudaDriver& cuda = **driver;
  CudaContext handle = nullptr;
  int number = 0, major = 0, minor = 0;
  CudaResult result = cuda.context(&handle);
  if (result == 0 && handle == nullptr) {
    return fail(K25_FAILED, message, "k25.%s: expected a current CUDA context on this thread, found none", op);
  }
  if (result == 0) result = cuda.device(&number);
  if (result == 0) result = cuda.device_attribute(&major, kCudaCapabilityMajor, number);
  if (result == 0) result = cuda.device_attribute(&minor, kCudaCapabilityMinor, number);
  if (result == 0) result = cuda.device_attribute(&device->shared, kCudaSharedOptIn, number);
  if (result == 0) result = cuda.device_attribute(&device->processors, kCudaMultiprocessors, number);
  if (result != 0) {
    char text[160];
    cuda_error_text(cuda, result, text, sizeof text);
    return fail(K25_FAILED, message, "k25.%s: the CUDA device cannot be asked: %s", op, text);
  }
  device->capability = 10 * major + minor;
  unsigned long long id = reinterpret_cast<uintptr_t>(handle);
  // A context may be made where another one was: its number is its own.
  if (cuda.context_id != nullptr && cuda.context_id(handle, &id) != 0) id = reinterpret_cast<uintptr_t>(handle);
  *context = id;
  return K25_OK;
}

bool fits(const GpuKernel& kernel, const GpuDevice& device, const GpuWish& wish) {
  if (kernel.kind != wish.kind || kernel.dtype != wish.dtype || kernel.shared > device.shared) return false;
  if (wish.cache_dtype != 0 && kernel.cache_dtype != wish.cache_dtype) return false;
  if (kernel.max_tokens != 0 && wish.tokens > kernel.max_tokens) return false;
  if (kernel.divisible != 0 && !wish.is_divisible) return false;
  for (int index = 0; index < wish.count; ++index) {
    const int64_t has = kernel.constants[wish.wanted[index].constant], value = wish.wanted[index].value;
    if (wish.wanted[index].is_least ? has < value : has != value) return false;
  }
  return true;
}

}  // namespace

const GpuKernel* gpu_kernels(int* count) {
  *count = kKernelCount;
  return kKernels;
}

int gpu_target(int32_t capability, bool* is_ptx) {
  int best = 0, ptx = 0;
  for (int index = 0; index < kKernelCount; ++index) {
    const GpuKernel& kernel = kKernels[index];
    if (kernel.is_ptx) {
      if (kernel.target <= capability && kernel.target > ptx) ptx = kernel.target;
      continue;
    }
    // From 9.0 on binaries are for one device exactly (sm_90a, sm_100a, sm_120a).
    const bool runs = kernel.target == capability ||
                      (kernel.target < 90 && kernel.target / 10 == capability / 10 && kernel.target < capability);
    if (runs && kernel.target > best) best = kernel.target;
  }
  *is_ptx = best == 0;
  return best != 0 ? best : ptx;
}

const GpuKernel* choose_gpu_kernel(const GpuDevice& device, const GpuWish& wish) {
  bool is_ptx = false;
  const int target = gpu_target(device.capability, &is_ptx);
  for (int index = 0; target != 0 && index < kKernelCount; ++index) {
    const GpuKernel& kernel = kKernels[index];
    if (kernel.target == target && kernel.is_ptx == is_ptx && fits(kernel, device, wish)) return &kernel;
  }
  return nullptr;
}

bool GpuArguments::add(char kind, uint64_t bits) {
  if (count_ == kMost) is_good_ = false;
  if (!is_good_) return false;
  values_[count_] = bits;
  kinds_[count_++] = kind;
  return true;
}

GpuArguments& GpuArguments::pointer(const void* value) {
  add('p', reinterpret_cast<uintptr_t>(value));
  return *this;
}

GpuArguments& GpuArguments::integer(int64_t value) {
  if (value < INT32_MIN || value > INT32_MAX) is_good_ = false;
  add('i', static_cast<uint32_t>(static_cast<int32_t>(value)));
  return *this;
}

GpuArguments& GpuArguments::number(float value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof bits);
  add('f', bits);
  return *this;
}

GpuArguments& GpuArguments::numbers(const float* values, int64_t count) {
  for (int64_t index = 0; index < count; ++index) {
    number(values[index]);
    if (is_good_) kinds_[count_ - 1] = 'F';
  }
  return *this;
}

void** GpuArguments::addresses(const GpuKernelSpec& spec) {
  int at = 0;
  for (const char* wanted = spec.parameters; *wanted != '\0'; ++wanted) {
    if (at == count_ || kinds_[at++] != *wanted) return nullptr;
    while (*wanted == 'F' && at < count_ && kinds_[at] == 'F') ++at;
  }
  if (at != count_ || !is_good_) return nullptr;
  pointer(nullptr).pointer(nullptr);
  for (int index = 0; index < count_; ++index) addresses_[index] = &values_[index];
  return is_good_ ? addresses_ : nullptr;
}

GpuCall::GpuCall(const Signature& op, void* stream, k25_message message)
    : op_(op), stream_(stream), message_(message) {
  status_ = check_gpu_kernels(op, message);
  if (is_good()) status_ = current(op.name, &driver_, &context_, &device_, message);
}

void GpuCall::refuse(k25_status status, const char* what) {
  if (is_good()) status_ = fail(status, message_, "k25.%s: %s", op_.name, what);
}

void GpuCall::cuda(CudaResult result, const char* what) {
  if (result == 0 || !is_good()) return;
  char text[160];
  cuda_error_text(*driver_, result, text, sizeof text);
  status_ = fail(K25_FAILED, message_, "k25.%s: %s: %s", op_.name, what, text);
}

const GpuKernel* GpuCall::choose(const GpuWish& wish) {
  if (!is_good()) return nullptr;
  const GpuKernel* kernel = choose_gpu_kernel(device_, wish);
  if (kernel != nullptr) return kernel;
  bool is_ptx = false;
  char sizes[320];
  int used = 0;
  sizes[0] = '\0';
  const int target = gpu_target(device_.capability, &is_ptx);
  for (int index = 0; index < kKernelCount; ++index) {
    const GpuKernel& built = kKernels[index];
    if (built.kind != wish.kind || built.target != target || built.is_ptx != is_ptx) continue;
    const int room = static_cast<int>(sizeof sizes) - used;
    const int more = snprintf(sizes + used, static_cast<size_t>(room), "%s%s", used == 0 ? "" : ", ", built.name);
    if (more < 0 || more >= room) break;
    used += more;
  }
  status_ = fail(K25_UNAVAILABLE, message_,
                 "k25.%s: no GPU kernel %s for compute capability %d.%d, %d bytes of shared memory, these sizes and "
                 "dtype %s; this build has %s. Build more: python -m k25_plugins.gpu_kernels --help",
                 op_.name, kGpuKernelSpecs[wish.kind].name, device_.capability / 10, device_.capability % 10,
                 device_.shared, dtype_name(wish.dtype), used == 0 ? "none for this device" : sizes);
  return nullptr;
}

void GpuCall::launch(const GpuKernel* kernel, int64_t x, int64_t y, int64_t z, GpuArguments& arguments) {
  if (!is_good() || kernel == nullptr) return;
  if (x < 1 || x > INT32_MAX || y < 1 || y > 65535 || z < 1 || z > 65535) {
    char text[192];
    snprintf(text, sizeof text, "kernel %s: expected a grid of at most 65535 in its second and third axis, found "
             "%lld x %lld x %lld: send fewer tokens at once",
             kGpuKernelSpecs[kernel->kind].name, static_cast<long long>(x), static_cast<long long>(y),
             static_cast<long long>(z));
    return refuse(K25_INVALID, text);
  }
  void** addresses = arguments.addresses(kGpuKernelSpecs[kernel->kind]);
  if (addresses == nullptr) return refuse(K25_FAILED, "arguments that are not those of the kernel, or sizes over 2^31");
  CudaFunction function = nullptr;
  {
    const std::lock_guard<std::mutex> lock(loading);
    CudaFunction& known = function_of(context_, *kernel);
    if (known == nullptr) {
      int capturing = 0;
      cuda(driver_->is_capturing(stream_, &capturing), "the stream cannot be asked");
      if (capturing != 0) return refuse(K25_FAILED, "call k25_gpu_prepare before a stream is captured");
      if (is_good()) cuda(load(*driver_, *kernel, &known), kernel->name);
    }
    function = known;
  }
  if (!is_good()) return;
  cuda(driver_->launch(function, static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z),
                       static_cast<unsigned>(32 * kernel->warps), 1, 1, static_cast<unsigned>(kernel->shared), stream_,
                       addresses, nullptr),
       kernel->name);
}

void GpuCall::copy(void* to, const void* from, size_t bytes) {
  if (!is_good()) return;
  cuda(driver_->copy(reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from), bytes, stream_),
       "the cache cannot be copied");
}

void GpuCall::check_address(const TensorSpec& tensor, const void* data) {
  if (!is_good()) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  if (address != 0 && address % 16 == 0) return;
  char text[160];
  snprintf(text, sizeof text, "tensor %s: expected a device address that is a multiple of 16, found 0x%llx",
           tensor.name, static_cast<unsigned long long>(address));
  refuse(K25_INVALID, text);
}

void check_addresses(GpuCall& call, const Signature& op, const k25_tensor* inputs, const k25_tensor* outputs,
                     const void* workspace) {
  for (int32_t index = 0; index < op.input_count; ++index) call.check_address(op.inputs[index], inputs[index].data);
  for (int32_t index = 0; index < op.output_count; ++index) call.check_address(op.outputs[index], outputs[index].data);
  static constexpr TensorSpec kWorkspace = {"workspace", "", 0, false, 0, {}};
  call.check_address(kWorkspace, workspace);
}

k25_status prepare_gpu_kernels(k25_message message) {
  const CudaDriver* driver = nullptr;
  uint64_t context = 0;
  GpuDevice device = {};
  k25_status status = current("gpu_prepare", &driver, &context, &device, message);
  if (status != K25_OK) return status;
  bool is_ptx = false;
  const int target = gpu_target(device.capability, &is_ptx);
  const std::lock_guard<std::mutex> lock(loading);
  for (int index = 0; index < kKernelCount; ++index) {
    const GpuKernel& kernel = kKernels[index];
    if (kernel.target != target || kernel.is_ptx != is_ptx || kernel.shared > device.shared) continue;
    CudaFunction& function = function_of(context, kernel);
    if (function != nullptr) continue;
    if (const CudaResult result = load(*driver, kernel, &function)) {
      char text[160];
      cuda_error_text(*driver, result, text, sizeof text);
      return fail(K25_FAILED, message, "k25: GPU kernel %s cannot be loaded: %s", kernel.name, text);
    }
  }
  return K25_OK;
}

k25_status check_gpu_kernels(const Signature& op, k25_message message) {
  if (kKernelCount != 0) return K25_OK;
  return fail(K25_UNAVAILABLE, message,
              "k25.%s: this build has no GPU kernels. To get them: python -m k25_plugins.gpu_kernels --output DIR, then "
              "build the native library with -DK25_GPU_KERNELS=DIR",
              op.name);
}

}  // namespace k25

// k25.Linear on a GPU: one launch of the kernel of gpu.py.
#include "gpu_kernels.h"

using namespace k25;

extern "C" k25_status k25_linear_gpu(const k25_tensor inputs[2], const k25_tensor outputs[1], void* stream,
                                     k25_message message) {
  using namespace k25::linear_linear;
  k25_tensor wanted[1];
  const k25_status status = k25_linear_outputs(inputs, wanted, message);
  if (status != K25_OK) return status;
  GpuCall call(kLinear, stream, message);
  check_addresses(call, kLinear, inputs, outputs, inputs[0].data);
  const int64_t in_features = inputs[1].dims[1], out_features = inputs[1].dims[0];
  int64_t tokens = 1;
  for (int32_t axis = 0; axis + 1 < inputs[0].rank; ++axis) tokens *= inputs[0].dims[axis];
  GpuWish wish;
  wish.kind = kGpu_linear_linear;
  wish.dtype = inputs[0].dtype;
  wish.tokens = tokens;
  wish.is_divisible = in_features % 16 == 0;
  const GpuKernel* kernel = call.choose(wish);
  if (!call.is_good()) return call.status();
  GpuArguments arguments;
  arguments.pointer(inputs[0].data).pointer(inputs[1].data).pointer(outputs[0].data).integer(tokens)
      .integer(in_features).integer(out_features);
  call.launch(kernel, ceil_div(tokens, kernel->constants[BM]), ceil_div(out_features, kernel->constants[BN]), 1,
              arguments);
  return call.status();
}

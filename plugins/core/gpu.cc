// GPU launches. This build has no GPU kernels: shapes are checked as they will be, then the caller is told.
#include "checks.h"
#include "k25.h"

namespace k25 {
namespace {

k25_status no_kernel(const Signature& op, k25_message message) {
  return fail(K25_UNAVAILABLE, message, "k25.%s: this build has no GPU kernels", op.name);
}

}  // namespace
}  // namespace k25

using namespace k25;

extern "C" {

k25_status k25_mla_gpu_workspace(const k25_tensor inputs[7], const k25_mla_attributes* attributes, size_t* bytes,
                                 k25_message message) {
  k25_tensor outputs[2];
  *bytes = 0;
  const k25_status status = k25_mla_outputs(inputs, attributes, outputs, message);
  return status == K25_OK ? no_kernel(kMLA, message) : status;
}

k25_status k25_mla_gpu(const k25_tensor inputs[7], const k25_mla_attributes* attributes, const k25_tensor[2], void*,
                       void*, k25_message message) {
  k25_tensor outputs[2];
  const k25_status status = k25_mla_outputs(inputs, attributes, outputs, message);
  return status == K25_OK ? no_kernel(kMLA, message) : status;
}

k25_status k25_moe_dispatch_gpu_workspace(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                          size_t* bytes, k25_message message) {
  k25_tensor outputs[1];
  *bytes = 0;
  const k25_status status = k25_moe_dispatch_outputs(inputs, attributes, outputs, message);
  return status == K25_OK ? no_kernel(kMoEDispatch, message) : status;
}

k25_status k25_moe_dispatch_gpu(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                const k25_tensor[1], void*, void*, k25_message message) {
  k25_tensor outputs[1];
  const k25_status status = k25_moe_dispatch_outputs(inputs, attributes, outputs, message);
  return status == K25_OK ? no_kernel(kMoEDispatch, message) : status;
}

}  // extern "C"

// The C interface: checks, then the kernel of the code path that was asked for.
#include <stdlib.h>
#include <string.h>

#include "checks.h"
#include "k25.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

K25_DECLARE_KERNELS(portable)
#if defined(K25_X86)
K25_DECLARE_KERNELS(avx2)
K25_DECLARE_KERNELS(avx512)
K25_DECLARE_KERNELS(avx512_bf16)
#endif

namespace k25 {
namespace {

struct Kernels {
  decltype(&portable::mla) mla;
  decltype(&portable::moe_dispatch) moe_dispatch;
  decltype(&portable::linear) linear;
  decltype(&portable::vision_attention) vision_attention;
  decltype(&portable::rms_norm) rms_norm;
  decltype(&portable::router) router;
};

#if defined(K25_HAS_MLA)
#define K25_MLA_OF(ns) ns::mla
#else
#define K25_MLA_OF(ns) nullptr
#endif
#if defined(K25_HAS_VISION_ATTENTION)
#define K25_VISION_ATTENTION_OF(ns) ns::vision_attention
#else
#define K25_VISION_ATTENTION_OF(ns) nullptr
#endif
#define K25_KERNELS_OF(ns) \
  {K25_MLA_OF(ns), ns::moe_dispatch, ns::linear, K25_VISION_ATTENTION_OF(ns), ns::rms_norm, ns::router}

// By k25_isa - 1.
constexpr Kernels kKernels[] = {
    K25_KERNELS_OF(portable),
#if defined(K25_X86)
    K25_KERNELS_OF(avx2),
    K25_KERNELS_OF(avx512),
    K25_KERNELS_OF(avx512_bf16),
#endif
};

constexpr const char* kIsaNames[] = {"best", "portable", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
// What the operating system saves of the registers (XCR0). The instruction needs OSXSAVE, checked before.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has(uint32_t value, int bit) { return (value >> bit & 1u) != 0; }

k25_isa widest() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return K25_ISA_PORTABLE;
  const bool fma = has(c, 12), f16c = has(c, 29), os_saves = has(c, 27);
  if (!os_saves || !fma || !f16c) return K25_ISA_PORTABLE;
  const uint64_t saved = saved_state();
  if ((saved & 0x6) != 0x6) return K25_ISA_PORTABLE;  // XMM, YMM
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, 5)) return K25_ISA_PORTABLE;
  const bool f = has(b, 16), dq = has(b, 17), bw = has(b, 30), vl = has(b, 31), vnni = has(c, 11);
  if ((saved & 0xe6) != 0xe6 || !f || !dq || !bw || !vl) return K25_ISA_AVX2;  // and opmask, ZMM
  if (!vnni || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !has(a, 5)) return K25_ISA_AVX512;
  return K25_ISA_AVX512_BF16;
}
#else
k25_isa widest() { return K25_ISA_PORTABLE; }
#endif

k25_isa widest_in_this_build() {
  static const k25_isa found = [] {
    const k25_isa isa = widest();
    constexpr int built = sizeof kKernels / sizeof kKernels[0];
    return isa <= built ? isa : static_cast<k25_isa>(built);
  }();
  return found;
}

k25_isa best() {
  static const k25_isa found = [] {
    const k25_isa isa = widest_in_this_build();
    const char* wanted = getenv("K25_ISA");
    for (int lower = K25_ISA_PORTABLE; wanted != nullptr && lower < isa; ++lower) {
      if (strcmp(wanted, kIsaNames[lower]) == 0) return static_cast<k25_isa>(lower);
    }
    return isa;
  }();
  return found;
}

// The kernels of the path in `options`, or null with a message. Outputs must be those that the inputs make.
k25_status choose(const k25_cpu_options* options, const Kernels** kernels, k25_message message) {
  const int isa = options->isa == K25_ISA_BEST ? best() : options->isa;
  if (isa < K25_ISA_PORTABLE || isa > K25_ISA_AVX512_BF16) {
    return fail(K25_INVALID, message, "k25: expected a code path 0..4, found %d", isa);
  }
  if (!k25_isa_supported(static_cast<k25_isa>(isa))) {
    return fail(K25_UNAVAILABLE, message, "k25: this machine or build has no code path %s", kIsaNames[isa]);
  }
  *kernels = &kKernels[isa - 1];
  return K25_OK;
}

k25_status no_kernel(const char* op, k25_message message) {
  return fail(K25_UNAVAILABLE, message, "k25.%s: this build has no CPU kernel for it", op);
}

k25_status check_data(const Signature& op, const k25_tensor* inputs, const k25_tensor* outputs, k25_message message) {
  for (int32_t index = 0; index < op.input_count; ++index) {
    if (inputs[index].data == nullptr) {
      return fail(K25_INVALID, message, "k25.%s: input %s: expected data, found none", op.name, op.inputs[index].name);
    }
  }
  for (int32_t index = 0; index < op.output_count; ++index) {
    if (outputs[index].data == nullptr) {
      return fail(K25_INVALID, message, "k25.%s: output %s: expected memory, found none", op.name,
                  op.outputs[index].name);
    }
  }
  return K25_OK;
}

// What every kernel wants first; `checked` is what its k25_*_outputs said.
k25_status prepare(const Signature& op, k25_status checked, const k25_tensor* inputs, const k25_tensor* outputs,
                   const k25_cpu_options* options, const Kernels** kernels, k25_message message) {
  if (checked == K25_OK) checked = check_data(op, inputs, outputs, message);
  return checked == K25_OK ? choose(options, kernels, message) : checked;
}

thread_local k25_mode session_mode = K25_FAST;
thread_local int32_t session_threads = 0;

}  // namespace
}  // namespace k25

using namespace k25;

extern "C" {

int32_t k25_abi_version(void) { return K25_ABI_VERSION; }
const char* k25_version(void) { return K25_VERSION_TEXT; }

int32_t k25_isa_supported(k25_isa isa) {
  return isa == K25_ISA_BEST || (isa >= K25_ISA_PORTABLE && isa <= widest_in_this_build());
}
k25_isa k25_isa_best(void) { return best(); }

void k25_set_session_mode(k25_mode mode) { session_mode = mode; }
k25_mode k25_session_mode(void) { return session_mode; }

void k25_set_session_threads(int32_t threads) { session_threads = threads < 0 ? 0 : threads; }
int32_t k25_session_threads(void) { return session_threads; }

k25_status k25_mla_cpu(const k25_tensor inputs[7], const k25_mla_attributes* attributes, const k25_tensor outputs[2],
                       const k25_cpu_options* options, k25_message message) {
  k25_tensor wanted[2];
  const Kernels* kernels = nullptr;
  const k25_status checked = k25_mla_outputs(inputs, attributes, wanted, message);
  const k25_status status = prepare(kMLA, checked, inputs, outputs, options, &kernels, message);
  if (status != K25_OK) return status;
  if (kernels->mla == nullptr) return no_kernel("MLA", message);
  return kernels->mla(inputs, attributes, outputs, options, message);
}

k25_status k25_moe_dispatch_cpu(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message) {
  k25_tensor wanted[1];
  const Kernels* kernels = nullptr;
  const k25_status checked = k25_moe_dispatch_outputs(inputs, attributes, wanted, message);
  const k25_status status = prepare(kMoEDispatch, checked, inputs, outputs, options, &kernels, message);
  return status == K25_OK ? kernels->moe_dispatch(inputs, attributes, outputs, options, message) : status;
}

k25_status k25_linear_cpu(const k25_tensor inputs[2], const k25_tensor outputs[1], const k25_cpu_options* options,
                          k25_message message) {
  k25_tensor wanted[1];
  const Kernels* kernels = nullptr;
  const k25_status checked = k25_linear_outputs(inputs, wanted, message);
  const k25_status status = prepare(kLinear, checked, inputs, outputs, options, &kernels, message);
  return status == K25_OK ? kernels->linear(inputs, outputs, options, message) : status;
}

k25_status k25_vision_attention_cpu(const k25_tensor inputs[3], const k25_vision_attention_attributes* attributes,
                                    const k25_tensor outputs[1], const k25_cpu_options* options,
                                    k25_message message) {
  k25_tensor wanted[1];
  const Kernels* kernels = nullptr;
  const k25_status checked = k25_vision_attention_outputs(inputs, attributes, wanted, message);
  const k25_status status = prepare(kVisionAttention, checked, inputs, outputs, options, &kernels, message);
  if (status != K25_OK) return status;
  if (kernels->vision_attention == nullptr) return no_kernel("VisionAttention", message);
  return kernels->vision_attention(inputs, attributes, outputs, options, message);
}

k25_status k25_rms_norm_cpu(const k25_tensor inputs[2], const k25_rms_norm_attributes* attributes,
                            const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message) {
  k25_tensor wanted[1];
  const Kernels* kernels = nullptr;
  const k25_status checked = k25_rms_norm_outputs(inputs, attributes, wanted, message);
  const k25_status status = prepare(kRMSNorm, checked, inputs, outputs, options, &kernels, message);
  return status == K25_OK ? kernels->rms_norm(inputs, attributes, outputs, options, message) : status;
}

k25_status k25_router_cpu(const k25_tensor inputs[2], const k25_router_attributes* attributes,
                          const k25_tensor outputs[2], const k25_cpu_options* options, k25_message message) {
  k25_tensor wanted[2];
  const Kernels* kernels = nullptr;
  const k25_status checked = k25_router_outputs(inputs, attributes, wanted, message);
  const k25_status status = prepare(kRouter, checked, inputs, outputs, options, &kernels, message);
  return status == K25_OK ? kernels->router(inputs, attributes, outputs, options, message) : status;
}

}  // extern "C"

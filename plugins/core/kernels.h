// The CPU kernels of each code path. <op>/cpu.cc is compiled once for each of them, into a namespace of its own.
//
// A kernel is called with inputs and outputs whose shapes, dtypes and attributes have been checked. It checks values that
// index memory itself. In these files: no standard containers or other inline templates of shared headers (the linker
// would keep one copy of them, of any path); plain arrays, static functions, simd.h, scratch.h and parallel.h.
#ifndef K25_KERNELS_H
#define K25_KERNELS_H

#include "k25.h"

#define K25_DECLARE_KERNELS(ISA_NAMESPACE)                                                                             \
  namespace k25 {                                                                                                      \
  namespace ISA_NAMESPACE {                                                                                            \
  k25_status mla(const k25_tensor inputs[7], const k25_mla_attributes* attributes, const k25_tensor outputs[2],        \
                 const k25_cpu_options* options, k25_message message);                                                 \
  k25_status moe_dispatch(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,                   \
                          const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message);           \
  k25_status linear(const k25_tensor inputs[2], const k25_tensor outputs[1], const k25_cpu_options* options,           \
                    k25_message message);                                                                              \
  k25_status vision_attention(const k25_tensor inputs[3], const k25_vision_attention_attributes* attributes,           \
                              const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message);       \
  k25_status rms_norm(const k25_tensor inputs[2], const k25_rms_norm_attributes* attributes,                           \
                      const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message);               \
  k25_status router(const k25_tensor inputs[2], const k25_router_attributes* attributes, const k25_tensor outputs[2],  \
                    const k25_cpu_options* options, k25_message message);                                              \
  }                                                                                                                    \
  }

#if defined(K25_ISA_NS)
K25_DECLARE_KERNELS(K25_ISA_NS)
#endif

#endif

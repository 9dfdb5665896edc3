/* The k25 operators behind a plain C interface: shapes, checks, workspace, CPU kernels, GPU launches.
 *
 * Adapters (ONNX Runtime, TensorRT, ctypes) are thin: they describe tensors, call one function here and hand its
 * message on. Every function returns a k25_status and, where it is not K25_OK, writes a message that names the
 * operator, the input, what was expected and what was found. No function throws, prints or keeps a pointer.
 *
 * Shapes, dtypes and attributes are those of the one table in k25_plugins/signatures.py.
 */
#ifndef K25_H
#define K25_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define K25_API __attribute__((visibility("default")))
#else
#define K25_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a struct or a function below does. */
#define K25_ABI_VERSION 4

/* Element types, as numbered by ONNX (TensorProto.DataType). */
enum { K25_FLOAT32 = 1, K25_INT32 = 6, K25_INT64 = 7, K25_BFLOAT16 = 16 };

typedef enum {
  K25_OK = 0,
  K25_INVALID = 1,     /* a shape, dtype, attribute or index that does not fit */
  K25_UNAVAILABLE = 2, /* this build or machine has no kernel for it */
  K25_FAILED = 3       /* a device call or an allocation failed */
} k25_status;

/* A dense row-major tensor. `data` may be null where only shapes matter. */
enum { K25_MAX_RANK = 8 };
typedef struct {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t dims[K25_MAX_RANK];
} k25_tensor;

/* Room for a message; always null-terminated. `text` may be null. */
typedef struct {
  char* text;
  size_t capacity;
} k25_message;

/* Attributes, in the order of the table. */
typedef struct {
  int64_t num_heads;
  int64_t qk_nope_head_dim;
  int64_t v_head_dim;
  float softmax_scale;
  const float* inv_freq; /* [inv_freq_count], rope dimension = 2 * inv_freq_count */
  int64_t inv_freq_count;
} k25_mla_attributes;

typedef struct {
  int64_t intermediate_size;
  int64_t group_size;
} k25_moe_dispatch_attributes;

typedef struct {
  int64_t num_heads;
  float softmax_scale;
} k25_vision_attention_attributes;

typedef struct {
  float eps;
} k25_rms_norm_attributes;

typedef struct {
  int64_t top_k;
  int64_t normalise; /* 0 or not */
  float scaling_factor;
} k25_router_attributes;

/* The threads of a call. What is computed never depends on their number: results are bitwise the same for any.
 *
 * `run` runs task(state, 0) ... task(state, count - 1), each once, in any order, on any threads, and returns when all are
 * done. Where `threads` is above 1, the library's own threads serve the call, so many with the calling one; they are started
 * when they are first wanted and shared by the process, one call at a time. Then `run` may be null, and is used while they
 * serve another call (null: the calling thread alone). */
typedef void (*k25_task)(void* state, size_t index);
typedef struct {
  void (*run)(void* context, k25_task task, void* state, size_t count);
  void* context;
  int32_t threads;
} k25_parallel;

/* K25_FAST may use bf16 dot products with float32 sums, or 16-bit activations with exact sums of eight products;
 * K25_EXACT computes in float32. */
typedef enum { K25_FAST = 0, K25_EXACT = 1 } k25_mode;

/* Code paths, chosen at run time; K25_ISA_BEST takes the widest that the machine has. */
typedef enum {
  K25_ISA_BEST = 0,
  K25_ISA_PORTABLE = 1,
  K25_ISA_AVX2 = 2,       /* AVX2, FMA, F16C */
  K25_ISA_AVX512 = 3,     /* AVX-512 F, BW, DQ, VL */
  K25_ISA_AVX512_BF16 = 4 /* the above and AVX512-BF16, VNNI */
} k25_isa;

/* How a CPU kernel runs. `parallel` may be null: one thread, the caller's. */
typedef struct {
  k25_mode mode;
  k25_isa isa;
  const k25_parallel* parallel;
} k25_cpu_options;

K25_API int32_t k25_abi_version(void);
/* "0.1.0 ...": version of the library and how it was built. */
K25_API const char* k25_version(void);
/* 1 where this machine (and this build) has the code path. */
K25_API int32_t k25_isa_supported(k25_isa isa);
/* The path that K25_ISA_BEST takes here; the environment variable K25_ISA (portable, avx2, avx512, avx512_bf16) lowers it. */
K25_API k25_isa k25_isa_best(void);

/* The mode of ONNX Runtime sessions that this thread creates from now on (kernels read it when they are created). */
K25_API void k25_set_session_mode(k25_mode mode);
K25_API k25_mode k25_session_mode(void);

/* The threads of ONNX Runtime sessions that this thread creates from now on. 0, the default: those of the session. Else so
 * many, up to 64, the calling one among them: the others are this library's own, one set for all sessions, and stay awake for some
 * 200 us after a call, so that the operators of a step need not wake them. A session that finds them at work for another
 * takes its own threads. */
K25_API void k25_set_session_threads(int32_t threads);
K25_API int32_t k25_session_threads(void);

/* Bytes a second of reading `bytes` of memory (whole MB, at least one) once with `threads` threads of its own: the mark for
 * kernels that are bound by memory. 0 where an argument is out of range. Take the best of several calls. */
K25_API double k25_read_bandwidth(const void* data, size_t bytes, int32_t threads);

/* Shapes and dtypes of the outputs; checks every input. `data` is not read. */
K25_API k25_status k25_mla_outputs(const k25_tensor inputs[7], const k25_mla_attributes* attributes,
                                   k25_tensor outputs[2], k25_message message);
K25_API k25_status k25_moe_dispatch_outputs(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                            k25_tensor outputs[1], k25_message message);
K25_API k25_status k25_linear_outputs(const k25_tensor inputs[2], k25_tensor outputs[1], k25_message message);
K25_API k25_status k25_vision_attention_outputs(const k25_tensor inputs[3],
                                                const k25_vision_attention_attributes* attributes,
                                                k25_tensor outputs[1], k25_message message);
K25_API k25_status k25_rms_norm_outputs(const k25_tensor inputs[2], const k25_rms_norm_attributes* attributes,
                                        k25_tensor outputs[1], k25_message message);
K25_API k25_status k25_router_outputs(const k25_tensor inputs[2], const k25_router_attributes* attributes,
                                      k25_tensor outputs[2], k25_message message);

/* CPU kernels. Outputs hold data pointers of the right size. cache_out may be the cache: then it is updated in place.
 * Values that index memory (positions, query_start, block_table, table) are checked before they are used. */
K25_API k25_status k25_mla_cpu(const k25_tensor inputs[7], const k25_mla_attributes* attributes,
                               const k25_tensor outputs[2], const k25_cpu_options* options, k25_message message);
K25_API k25_status k25_moe_dispatch_cpu(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                        const k25_tensor outputs[1], const k25_cpu_options* options,
                                        k25_message message);
K25_API k25_status k25_linear_cpu(const k25_tensor inputs[2], const k25_tensor outputs[1],
                                  const k25_cpu_options* options, k25_message message);
K25_API k25_status k25_vision_attention_cpu(const k25_tensor inputs[3],
                                            const k25_vision_attention_attributes* attributes,
                                            const k25_tensor outputs[1], const k25_cpu_options* options,
                                            k25_message message);
K25_API k25_status k25_rms_norm_cpu(const k25_tensor inputs[2], const k25_rms_norm_attributes* attributes,
                                    const k25_tensor outputs[1], const k25_cpu_options* options, k25_message message);
/* Ids are distinct experts whatever the logits are; of equal scores the lower id comes first, and NaN counts as the largest. */
K25_API k25_status k25_router_cpu(const k25_tensor inputs[2], const k25_router_attributes* attributes,
                                  const k25_tensor outputs[2], const k25_cpu_options* options, k25_message message);

/* GPU launches: data pointers are device addresses, `stream` a CUstream. Nothing is allocated and nothing waits, so
 * they may be captured in a CUDA graph. `workspace` has k25_*_gpu_workspace bytes (a bound over all shapes up to the
 * given ones). K25_UNAVAILABLE where this build has no kernel for the device. */
K25_API k25_status k25_mla_gpu_workspace(const k25_tensor inputs[7], const k25_mla_attributes* attributes,
                                         size_t* bytes, k25_message message);
K25_API k25_status k25_mla_gpu(const k25_tensor inputs[7], const k25_mla_attributes* attributes,
                               const k25_tensor outputs[2], void* workspace, void* stream, k25_message message);
K25_API k25_status k25_moe_dispatch_gpu_workspace(const k25_tensor inputs[6],
                                                  const k25_moe_dispatch_attributes* attributes, size_t* bytes,
                                                  k25_message message);
K25_API k25_status k25_moe_dispatch_gpu(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                        const k25_tensor outputs[1], void* workspace, void* stream,
                                        k25_message message);
K25_API k25_status k25_linear_gpu(const k25_tensor inputs[2], const k25_tensor outputs[1], void* stream,
                                  k25_message message);

/* GPU kernels in this library; 0 where it was built without. */
K25_API int32_t k25_gpu_kernel_count(void);
/* Loads all kernels for the device of the current context. A kernel is otherwise loaded when it first runs, which
 * cannot be while a stream is captured. */
K25_API k25_status k25_gpu_prepare(k25_message message);
/* A promise for all later calls of this library (0 until it is made, or K25_GPU_EVEN_ROWS=1): every row in every expert table is even, that is
 * each tensor starts at a multiple of 16 bytes of a region that does. Faster kernels run then; a broken promise is a
 * fault of the device. */
K25_API void k25_gpu_set_even_rows(int32_t is_even);

#ifdef __cplusplus
}
#endif
#endif

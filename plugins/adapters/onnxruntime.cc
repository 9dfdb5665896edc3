// The k25 operators as custom operators of ONNX Runtime: one for each operator and assignment of dtypes, since a registered
// name replaces the function body and a combination without a kernel would be refused. They are for the CPU provider and,
// where this library has GPU kernels, for the CUDA provider, on the stream that it hands over.
//
// A session takes the mode of the thread that creates it (k25_set_session_mode). Tasks run on the session's
// own threads, or on the library's (k25_set_session_threads).
// Errors come back as a status with the core's message.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "checks.h"
#include "k25.h"

namespace k25 {
namespace {

enum { kMaxInputs = 7, kMaxOutputs = 2, kMaxInvFreq = 4096, kMessageBytes = 512 };

const OrtApi* api = nullptr;

// GetTensorElementTypeAndShapeDataReference, of ONNX Runtime 1.24 on: type and dimensions where they are, without the
// allocations of GetTensorTypeAndShape, which make a quarter of what an operator costs that does nothing. Headers may be older
// than the runtime: the table of functions only grows, and this is the last one of its version 24, the 415th.
using ReadShape = OrtStatus* (*)(const OrtValue*, ONNXTensorElementDataType*, const int64_t**, size_t*);
constexpr uint32_t kReadShapeVersion = 24;
constexpr size_t kReadShapePlace = 414;
ReadShape read_shape = nullptr;

// Asking for a version that there is not prints a complaint.
void find_read_shape(const OrtApiBase* base) {
  int major = 0, minor = 0;
  if (sscanf(base->GetVersionString(), "%d.%d", &major, &minor) != 2 || major != 1) return;
  if (minor < static_cast<int>(kReadShapeVersion)) return;
  const OrtApi* newer = base->GetApi(kReadShapeVersion);
  if (newer == nullptr) return;
  const void* at = reinterpret_cast<const char*>(newer) + kReadShapePlace * sizeof(void*);
  memcpy(&read_shape, at, sizeof read_shape);
}

union Attributes {
  k25_mla_attributes mla;
  k25_moe_dispatch_attributes moe_dispatch;
  k25_vision_attention_attributes vision_attention;
  k25_rms_norm_attributes rms_norm;
  k25_router_attributes router;
};

struct Kernel {
  const struct Operator* op;
  k25_mode mode;
  int32_t threads;
  Attributes attributes;
  float* inv_freq;
};

using Outputs = k25_status (*)(const k25_tensor*, const Kernel&, k25_tensor*, k25_message);
using Compute = k25_status (*)(const k25_tensor*, const Kernel&, const k25_tensor*, const k25_cpu_options*,
                               k25_message);
using GpuWorkspace = k25_status (*)(const k25_tensor*, const Kernel&, size_t*, k25_message);
using GpuLaunch = k25_status (*)(const k25_tensor*, const Kernel&, const k25_tensor*, void*, void*, k25_message);
using Read = OrtStatus* (*)(const OrtKernelInfo*, Kernel&);

// What differs between operators.
struct Functions {
  const Signature* signature;
  Read read;
  Outputs outputs;
  Compute compute;
  GpuWorkspace gpu_workspace;
  GpuLaunch gpu_launch;
};

struct Operator : OrtCustomOp {
  const Functions* functions;
  int32_t types[2];  // of the type parameters
};

OrtStatus* status_of(k25_status status, const char* message) {
  return api->CreateStatus(status == K25_INVALID ? ORT_INVALID_ARGUMENT : ORT_FAIL, message);
}

// Attributes.

OrtStatus* read_int(const OrtKernelInfo* info, const char* name, int64_t* value) {
  return api->KernelInfoGetAttribute_int64(info, name, value);
}

OrtStatus* read_inv_freq(const OrtKernelInfo* info, Kernel& kernel) {
  size_t count = 0;
  if (OrtStatus* status = api->KernelInfoGetAttributeArray_float(info, "inv_freq", nullptr, &count)) return status;
  if (count > kMaxInvFreq) return status_of(K25_INVALID, "k25.MLA: attribute inv_freq: expected at most 4096 values");
  kernel.inv_freq = static_cast<float*>(malloc(sizeof(float) * (count == 0 ? 1 : count)));
  if (kernel.inv_freq == nullptr) return status_of(K25_FAILED, "k25.MLA: out of memory");
  if (OrtStatus* status = api->KernelInfoGetAttributeArray_float(info, "inv_freq", kernel.inv_freq, &count)) {
    return status;
  }
  kernel.attributes.mla.inv_freq = kernel.inv_freq;
  kernel.attributes.mla.inv_freq_count = static_cast<int64_t>(count);
  return nullptr;
}

OrtStatus* read_mla(const OrtKernelInfo* info, Kernel& kernel) {
  k25_mla_attributes& attributes = kernel.attributes.mla;
  OrtStatus* status = read_int(info, "num_heads", &attributes.num_heads);
  if (status == nullptr) status = read_int(info, "qk_nope_head_dim", &attributes.qk_nope_head_dim);
  if (status == nullptr) status = read_int(info, "v_head_dim", &attributes.v_head_dim);
  if (status == nullptr) status = api->KernelInfoGetAttribute_float(info, "softmax_scale", &attributes.softmax_scale);
  return status == nullptr ? read_inv_freq(info, kernel) : status;
}

OrtStatus* read_moe_dispatch(const OrtKernelInfo* info, Kernel& kernel) {
  k25_moe_dispatch_attributes& attributes = kernel.attributes.moe_dispatch;
  OrtStatus* status = read_int(info, "intermediate_size", &attributes.intermediate_size);
  return status == nullptr ? read_int(info, "group_size", &attributes.group_size) : status;
}

OrtStatus* read_linear(const OrtKernelInfo*, Kernel&) { return nullptr; }

OrtStatus* read_vision_attention(const OrtKernelInfo* info, Kernel& kernel) {
  k25_vision_attention_attributes& attributes = kernel.attributes.vision_attention;
  OrtStatus* status = read_int(info, "num_heads", &attributes.num_heads);
  return status == nullptr ? api->KernelInfoGetAttribute_float(info, "softmax_scale", &attributes.softmax_scale)
                           : status;
}

OrtStatus* read_rms_norm(const OrtKernelInfo* info, Kernel& kernel) {
  return api->KernelInfoGetAttribute_float(info, "eps", &kernel.attributes.rms_norm.eps);
}

OrtStatus* read_router(const OrtKernelInfo* info, Kernel& kernel) {
  k25_router_attributes& attributes = kernel.attributes.router;
  OrtStatus* status = read_int(info, "top_k", &attributes.top_k);
  if (status == nullptr) status = read_int(info, "normalise", &attributes.normalise);
  return status == nullptr ? api->KernelInfoGetAttribute_float(info, "scaling_factor", &attributes.scaling_factor)
                           : status;
}

const Functions kFunctions[] = {
    {&kLinear, read_linear,
     [](const k25_tensor* inputs, const Kernel&, k25_tensor* outputs, k25_message message) {
       return k25_linear_outputs(inputs, outputs, message);
     },
     [](const k25_tensor* inputs, const Kernel&, const k25_tensor* outputs, const k25_cpu_options* options,
        k25_message message) { return k25_linear_cpu(inputs, outputs, options, message); },
     [](const k25_tensor*, const Kernel&, size_t* bytes, k25_message) {
       *bytes = 0;
       return K25_OK;
     },
     [](const k25_tensor* inputs, const Kernel&, const k25_tensor* outputs, void*, void* stream,
        k25_message message) { return k25_linear_gpu(inputs, outputs, stream, message); }},
    {&kMoEDispatch, read_moe_dispatch,
     [](const k25_tensor* inputs, const Kernel& kernel, k25_tensor* outputs, k25_message message) {
       return k25_moe_dispatch_outputs(inputs, &kernel.attributes.moe_dispatch, outputs, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, const k25_cpu_options* options,
        k25_message message) {
       return k25_moe_dispatch_cpu(inputs, &kernel.attributes.moe_dispatch, outputs, options, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, size_t* bytes, k25_message message) {
       return k25_moe_dispatch_gpu_workspace(inputs, &kernel.attributes.moe_dispatch, bytes, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, void* workspace, void* stream,
        k25_message message) {
       return k25_moe_dispatch_gpu(inputs, &kernel.attributes.moe_dispatch, outputs, workspace, stream, message);
     }},
#if defined(K25_HAS_MLA)
    {&kMLA, read_mla,
     [](const k25_tensor* inputs, const Kernel& kernel, k25_tensor* outputs, k25_message message) {
       return k25_mla_outputs(inputs, &kernel.attributes.mla, outputs, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, const k25_cpu_options* options,
        k25_message message) {
       return k25_mla_cpu(inputs, &kernel.attributes.mla, outputs, options, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, size_t* bytes, k25_message message) {
       return k25_mla_gpu_workspace(inputs, &kernel.attributes.mla, bytes, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, void* workspace, void* stream,
        k25_message message) {
       return k25_mla_gpu(inputs, &kernel.attributes.mla, outputs, workspace, stream, message);
     }},
#endif
#if defined(K25_HAS_VISION_ATTENTION)
    {&kVisionAttention, read_vision_attention,
     [](const k25_tensor* inputs, const Kernel& kernel, k25_tensor* outputs, k25_message message) {
       return k25_vision_attention_outputs(inputs, &kernel.attributes.vision_attention, outputs, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, const k25_cpu_options* options,
        k25_message message) {
       return k25_vision_attention_cpu(inputs, &kernel.attributes.vision_attention, outputs, options, message);
     },
     nullptr, nullptr},
#endif
    {&kRMSNorm, read_rms_norm,
     [](const k25_tensor* inputs, const Kernel& kernel, k25_tensor* outputs, k25_message message) {
       return k25_rms_norm_outputs(inputs, &kernel.attributes.rms_norm, outputs, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, const k25_cpu_options* options,
        k25_message message) {
       return k25_rms_norm_cpu(inputs, &kernel.attributes.rms_norm, outputs, options, message);
     },
     nullptr, nullptr},
    {&kRouter, read_router,
     [](const k25_tensor* inputs, const Kernel& kernel, k25_tensor* outputs, k25_message message) {
       return k25_router_outputs(inputs, &kernel.attributes.router, outputs, message);
     },
     [](const k25_tensor* inputs, const Kernel& kernel, const k25_tensor* outputs, const k25_cpu_options* options,
        k25_message message) {
       return k25_router_cpu(inputs, &kernel.attributes.router, outputs, options, message);
     },
     nullptr, nullptr},
};
[[maybe_unused]] const Read kUnused[] = {read_mla, read_vision_attention};

// Running.

OrtStatus* too_many_axes() { return status_of(K25_INVALID, "k25: expected a tensor of at most 8 axes"); }

OrtStatus* read_shape_of_older(const OrtValue* value, ONNXTensorElementDataType* type, size_t* rank, int64_t* dims) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = api->GetTensorTypeAndShape(value, &info)) return status;
  OrtStatus* status = api->GetDimensionsCount(info, rank);
  if (status == nullptr && *rank > K25_MAX_RANK) status = too_many_axes();
  if (status == nullptr) status = api->GetDimensions(info, dims, *rank);
  if (status == nullptr) status = api->GetTensorElementType(info, type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

OrtStatus* read_tensor(const OrtValue* value, k25_tensor* tensor) {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t rank = 0;
  if (read_shape == nullptr) {
    if (OrtStatus* status = read_shape_of_older(value, &type, &rank, tensor->dims)) return status;
  } else {
    const int64_t* dims = nullptr;
    if (OrtStatus* status = read_shape(value, &type, &dims, &rank)) return status;
    if (rank > K25_MAX_RANK) return too_many_axes();
    for (size_t axis = 0; axis < rank; ++axis) tensor->dims[axis] = dims[axis];
  }
  tensor->rank = static_cast<int32_t>(rank);
  tensor->dtype = static_cast<int32_t>(type);
  return api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor->data);
}

// Each task is a batch of its own: a thread that is held up does not hold up those after it.
void run_on_session_threads(void* context, k25_task task, void* state, size_t count) {
  const auto* kernel_context = static_cast<const OrtKernelContext*>(context);
  if (OrtStatus* status = api->KernelContext_ParallelFor(kernel_context, task, count, count, state)) {
    api->ReleaseStatus(status);  // refused before it began
    for (size_t index = 0; index < count; ++index) task(state, index);
  }
}

// The tensors of a call: shapes of the outputs from those of the inputs, their memory from the session.
OrtStatus* read_call(OrtKernelContext* context, const Kernel& kernel, k25_tensor* inputs, k25_tensor* outputs,
                     k25_message message) {
  const Functions& functions = *kernel.op->functions;
  const Signature& signature = *functions.signature;
  for (int32_t index = 0; index < signature.input_count; ++index) {
    const OrtValue* value = nullptr;
    OrtStatus* status = api->KernelContext_GetInput(context, static_cast<size_t>(index), &value);
    if (status == nullptr) status = read_tensor(value, &inputs[index]);
    if (status != nullptr) return status;
  }
  const k25_status done = functions.outputs(inputs, kernel, outputs, message);
  if (done != K25_OK) return status_of(done, message.text);
  for (int32_t index = 0; index < signature.output_count; ++index) {
    OrtValue* value = nullptr;
    k25_tensor& output = outputs[index];
    OrtStatus* status = api->KernelContext_GetOutput(context, static_cast<size_t>(index), output.dims,
                                                     static_cast<size_t>(output.rank), &value);
    if (status == nullptr) status = api->GetTensorMutableData(value, &output.data);
    if (status != nullptr) return status;
  }
  return nullptr;
}

OrtStatus* compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(op_kernel);
  char text[kMessageBytes];
  const k25_message message{text, sizeof text};
  k25_tensor inputs[kMaxInputs], outputs[kMaxOutputs];
  if (OrtStatus* status = read_call(context, kernel, inputs, outputs, message)) return status;
  const k25_parallel parallel{run_on_session_threads, context, kernel.threads};
  const k25_cpu_options options{kernel.mode, K25_ISA_BEST, kernel.threads == 1 ? nullptr : &parallel};
  const k25_status done = kernel.op->functions->compute(inputs, kernel, outputs, &options, message);
  return done == K25_OK ? nullptr : status_of(done, text);
}

// Scratch memory out of the provider's arena. It goes back when the work is on the stream: what comes after it on the same
// stream, which is all that a session runs, runs later.
OrtStatus* launch_in_arena(OrtKernelContext* context, const Kernel& kernel, const k25_tensor* inputs,
                           const k25_tensor* outputs, size_t bytes, void* stream, k25_message message) {
  const OrtValue* first = nullptr;
  const OrtMemoryInfo* place = nullptr;
  OrtAllocator* allocator = nullptr;
  OrtStatus* status = api->KernelContext_GetInput(context, 0, &first);
  if (status == nullptr) status = api->GetTensorMemoryInfo(first, &place);
  if (status == nullptr) status = api->KernelContext_GetAllocator(context, place, &allocator);
  if (status != nullptr) return status;
  void* workspace = bytes == 0 ? nullptr : allocator->Alloc(allocator, bytes);
  if (bytes != 0 && workspace == nullptr) {
    status = status_of(K25_FAILED, "k25: out of device memory");
  } else {
    const k25_status done = kernel.op->functions->gpu_launch(inputs, kernel, outputs, workspace, stream, message);
    if (done != K25_OK) status = status_of(done, message.text);
  }
  if (workspace != nullptr) allocator->Free(allocator, workspace);
  api->ReleaseAllocator(allocator);
  return status;
}

OrtStatus* compute_on_cuda(void* op_kernel, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(op_kernel);
  char text[kMessageBytes];
  const k25_message message{text, sizeof text};
  k25_tensor inputs[kMaxInputs], outputs[kMaxOutputs];
  size_t bytes = 0;
  void* stream = nullptr;
  if (OrtStatus* status = read_call(context, kernel, inputs, outputs, message)) return status;
  if (OrtStatus* status = api->KernelContext_GetGPUComputeStream(context, &stream)) return status;
  const k25_status asked = kernel.op->functions->gpu_workspace(inputs, kernel, &bytes, message);
  if (asked != K25_OK) return status_of(asked, text);
  return launch_in_arena(context, kernel, inputs, outputs, bytes, stream, message);
}

void destroy(void* op_kernel) {
  Kernel* kernel = static_cast<Kernel*>(op_kernel);
  free(kernel->inv_freq);
  free(kernel);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** made) {
  Kernel* kernel = static_cast<Kernel*>(calloc(1, sizeof(Kernel)));
  if (kernel == nullptr) return status_of(K25_FAILED, "k25: out of memory");
  kernel->op = static_cast<const Operator*>(op);
  kernel->mode = k25_session_mode();
  kernel->threads = k25_session_threads();
  if (OrtStatus* status = kernel->op->functions->read(info, *kernel)) {
    destroy(kernel);
    return status;
  }
  *made = kernel;
  return nullptr;
}

// Describing.

ONNXTensorElementDataType type_of(const Operator& op, const TensorSpec& spec) {
  return static_cast<ONNXTensorElementDataType>(spec.dtype > 0 ? spec.dtype : op.types[-1 - spec.dtype]);
}

void describe(Operator& op, const Functions& functions, int32_t t, int32_t tc, bool on_cuda) {
  OrtCustomOp& base = op;
  memset(&base, 0, sizeof base);
  op.functions = &functions;
  op.types[0] = t;
  op.types[1] = tc;
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Operator*>(self)->functions->signature->name; };
  if (on_cuda) {
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CUDAExecutionProvider"; };
  } else {
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
  }
  op.GetInputTypeCount = [](const OrtCustomOp* self) {
    return static_cast<size_t>(static_cast<const Operator*>(self)->functions->signature->input_count);
  };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) {
    const Operator& described = *static_cast<const Operator*>(self);
    return type_of(described, described.functions->signature->inputs[index]);
  };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) {
    return static_cast<size_t>(static_cast<const Operator*>(self)->functions->signature->output_count);
  };
  op.GetOutputType = [](const OrtCustomOp* self, size_t index) {
    const Operator& described = *static_cast<const Operator*>(self);
    return type_of(described, described.functions->signature->outputs[index]);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 2147483647; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = on_cuda ? compute_on_cuda : compute;
  op.KernelDestroy = destroy;
}

enum { kMaxOperators = 32 };

struct Domain {
  OrtCustomOpDomain* domain = nullptr;
  Operator operators[kMaxOperators];
  int count = 0;
  OrtStatus* status = nullptr;

  Domain() {
    status = api->CreateCustomOpDomain("k25", &domain);
    // A session of the CUDA provider would take an operator for the CPU alone, and copy its tensors there and back: the
    // body of standard operators is better there.
    const bool with_gpu = k25_gpu_kernel_count() > 0;
    for (const Functions& functions : kFunctions) {
      if (with_gpu && functions.gpu_launch == nullptr) continue;
      add_all(functions, false);
      if (with_gpu) add_all(functions, true);
    }
  }

  void add_all(const Functions& functions, bool on_cuda) {
    const int32_t types[] = {K25_FLOAT32, K25_BFLOAT16};
    const int32_t parameters = functions.signature->type_parameter_count;
    for (const int32_t t : types) {
      for (const int32_t tc : types) {
        if (status != nullptr || (parameters < 1 && t != K25_FLOAT32) || (parameters < 2 && tc != K25_FLOAT32)) continue;
        Operator& op = operators[count++];
        describe(op, functions, t, tc, on_cuda);
        status = api->CustomOpDomain_Add(domain, &op);
      }
    }
  }
};

}  // namespace
}  // namespace k25

// ONNX Runtime calls this for each session that registers the library. The domain lives as long as the process.
extern "C" K25_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  k25::api = base->GetApi(ORT_API_VERSION);
  if (k25::api == nullptr) return nullptr;  // an older ONNX Runtime than the headers: the bodies run
  k25::find_read_shape(base);
  static k25::Domain& domain = *new (std::nothrow) k25::Domain;
  if (domain.status != nullptr) return domain.status;
  return k25::api->AddCustomOpDomain(options, domain.domain);
}

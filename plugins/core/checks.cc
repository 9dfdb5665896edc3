#include "checks.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

namespace k25 {
namespace {

constexpr int64_t kUnknown = -1;
// Larger than any size that fits: no product overflows, and none of these is equal to a real one.
constexpr int64_t kTooLarge = INT64_MAX;

struct Sizes {
  int64_t values[kSymbolCount];
  int64_t& operator[](int symbol) { return values[symbol]; }
  Sizes() {
    for (int64_t& value : values) value = kUnknown;
  }
};

struct Text {
  char* text;
  size_t capacity;
  size_t used = 0;
  void add(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    va_list arguments;
    va_start(arguments, format);
    const int count = vsnprintf(text + used, capacity - used, format, arguments);
    va_end(arguments);
    used += count < 0 ? 0 : static_cast<size_t>(count);
    if (used >= capacity) used = capacity - 1;
  }
};

// "[2, 3]"
void shape_text(const k25_tensor& tensor, char (&buffer)[256]) {
  Text text{buffer, sizeof buffer};
  text.add("[");
  const int32_t rank = tensor.rank < K25_MAX_RANK ? tensor.rank : K25_MAX_RANK;
  for (int32_t axis = 0; axis < rank; ++axis) {
    text.add("%s%lld", axis == 0 ? "" : ", ", static_cast<long long>(tensor.dims[axis]));
  }
  text.add("]");
}

int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result) ? kTooLarge : result;
}

int64_t size_of(const AxisSpec& axis, Sizes& sizes) {
  int64_t result = 1;
  for (int index = 0; index < axis.factor_count; ++index) {
    const int16_t factor = axis.factors[index];
    result = product(result, factor < 0 ? -static_cast<int64_t>(factor) : sizes[factor]);
  }
  return result;
}

bool is_symbol(const AxisSpec& axis) { return axis.factor_count == 1 && axis.factors[0] >= 0; }

k25_status check_dtype(const Signature& op, const TensorSpec& spec, int32_t found, int32_t (&types)[2],
                       k25_message message) {
  if (spec.dtype > 0) {
    if (found == spec.dtype) return K25_OK;
    return fail(K25_INVALID, message, "k25.%s: input %s: expected dtype %s, found %s", op.name, spec.name,
                dtype_name(spec.dtype), dtype_name(found));
  }
  int32_t& chosen = types[-1 - spec.dtype];
  if (chosen != 0 && found != chosen) {
    return fail(K25_INVALID, message, "k25.%s: input %s: expected dtype %s, found %s", op.name, spec.name,
                dtype_name(chosen), dtype_name(found));
  }
  if (found != K25_FLOAT32 && found != K25_BFLOAT16) {
    return fail(K25_INVALID, message, "k25.%s: input %s: expected dtype float32 or bfloat16, found %s", op.name,
                spec.name, dtype_name(found));
  }
  chosen = found;
  return K25_OK;
}

k25_status check_rank(const Signature& op, const TensorSpec& spec, const k25_tensor& tensor, k25_message message) {
  const bool fits = spec.leading ? tensor.rank >= spec.axis_count : tensor.rank == spec.axis_count;
  char found[256];
  if (!fits || tensor.rank > K25_MAX_RANK) {
    shape_text(tensor, found);
    return fail(K25_INVALID, message, "k25.%s: input %s: expected axes [%s], found shape %s", op.name, spec.name,
                spec.axes_text, found);
  }
  for (int32_t axis = 0; axis < tensor.rank; ++axis) {
    if (tensor.dims[axis] < 1) {
      shape_text(tensor, found);
      return fail(K25_INVALID, message, "k25.%s: input %s: expected no empty axis, found %s", op.name, spec.name,
                  found);
    }
  }
  return K25_OK;
}

// Binds dtypes, ranks and the symbols that are seen first.
k25_status bind(const Signature& op, const k25_tensor* inputs, Sizes& sizes, int32_t (&types)[2],
                k25_message message) {
  for (int32_t index = 0; index < op.input_count; ++index) {
    const TensorSpec& spec = op.inputs[index];
    const k25_tensor& tensor = inputs[index];
    k25_status status = check_dtype(op, spec, tensor.dtype, types, message);
    if (status == K25_OK) status = check_rank(op, spec, tensor, message);
    if (status != K25_OK) return status;
    const int64_t* dims = tensor.dims + (tensor.rank - spec.axis_count);
    for (int32_t axis = 0; axis < spec.axis_count; ++axis) {
      if (!is_symbol(spec.axes[axis])) continue;
      int64_t& size = sizes[spec.axes[axis].factors[0]];
      if (size == kUnknown) size = dims[axis];
    }
  }
  return K25_OK;
}

k25_status check_sizes(const Signature& op, const k25_tensor* inputs, Sizes& sizes, k25_message message) {
  for (int32_t index = 0; index < op.input_count; ++index) {
    const TensorSpec& spec = op.inputs[index];
    const int64_t* dims = inputs[index].dims + (inputs[index].rank - spec.axis_count);
    for (int32_t axis = 0; axis < spec.axis_count; ++axis) {
      const int64_t wanted = size_of(spec.axes[axis], sizes);
      if (dims[axis] != wanted) {
        return fail(K25_INVALID, message, "k25.%s: input %s, axis %s: expected %lld, found %lld", op.name, spec.name,
                    spec.axes[axis].name, static_cast<long long>(wanted), static_cast<long long>(dims[axis]));
      }
    }
  }
  return K25_OK;
}

void write_outputs(const Signature& op, const k25_tensor* inputs, Sizes& sizes, const int32_t (&types)[2],
                   k25_tensor* outputs) {
  for (int32_t index = 0; index < op.output_count; ++index) {
    const TensorSpec& spec = op.outputs[index];
    k25_tensor& output = outputs[index];
    int32_t leading = 0;
    if (spec.leading) {  // of the first input
      leading = inputs[0].rank - op.inputs[0].axis_count;
      memcpy(output.dims, inputs[0].dims, static_cast<size_t>(leading) * sizeof(int64_t));
    }
    output.rank = leading + spec.axis_count;
    output.dtype = spec.dtype > 0 ? spec.dtype : types[-1 - spec.dtype];
    for (int32_t axis = 0; axis < spec.axis_count; ++axis) {
      output.dims[leading + axis] = size_of(spec.axes[axis], sizes);
    }
  }
}

k25_status positive(const Signature& op, const char* name, int64_t value, k25_message message) {
  if (value >= 1) return K25_OK;
  return fail(K25_INVALID, message, "k25.%s: attribute %s: expected at least 1, found %lld", op.name, name,
              static_cast<long long>(value));
}

// Of an operator whose inputs and outputs say everything.
k25_status outputs_of(const Signature& op, const k25_tensor* inputs, k25_tensor* outputs, k25_message message) {
  Sizes sizes;
  int32_t types[2] = {0, 0};
  k25_status status = bind(op, inputs, sizes, types, message);
  if (status == K25_OK) status = check_sizes(op, inputs, sizes, message);
  if (status == K25_OK) write_outputs(op, inputs, sizes, types, outputs);
  return status;
}

}  // namespace

k25_status fail(k25_status status, k25_message message, const char* format, ...) {
  if (message.text != nullptr && message.capacity > 0) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message.text, message.capacity, format, arguments);
    va_end(arguments);
  }
  return status;
}

const char* dtype_name(int32_t dtype) {
  static const char* const names[] = {"undefined", "float32", "uint8",   "int8",    "uint16",    "int16",
                                      "int32",     "int64",   "string",  "bool",    "float16",   "float64",
                                      "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  constexpr int32_t count = sizeof names / sizeof names[0];
  return dtype >= 0 && dtype < count ? names[dtype] : "an unknown dtype";
}

}  // namespace k25

using namespace k25;

extern "C" {

k25_status k25_mla_outputs(const k25_tensor inputs[7], const k25_mla_attributes* attributes, k25_tensor outputs[2],
                           k25_message message) {
  Sizes sizes;
  int32_t types[2] = {0, 0};
  const struct {
    const char* name;
    int64_t value;
  } attribute_values[] = {{"num_heads", attributes->num_heads},
                          {"qk_nope_head_dim", attributes->qk_nope_head_dim},
                          {"v_head_dim", attributes->v_head_dim},
                          {"inv_freq (its length)", attributes->inv_freq_count}};
  for (const auto& attribute : attribute_values) {
    if (positive(kMLA, attribute.name, attribute.value, message) != K25_OK) return K25_INVALID;
    if (attribute.value > INT32_MAX) {
      return fail(K25_INVALID, message, "k25.MLA: attribute %s: expected less than 2^31, found %lld", attribute.name,
                  static_cast<long long>(attribute.value));
    }
  }
  k25_status status = bind(kMLA, inputs, sizes, types, message);
  if (status != K25_OK) return status;
  const int64_t rope_dim = 2 * attributes->inv_freq_count;
  sizes[kSize_num_heads] = attributes->num_heads;
  sizes[kSize_v_head_dim] = attributes->v_head_dim;
  sizes[kSize_qk_head_dim] = attributes->qk_nope_head_dim + rope_dim;
  sizes[kSize_kv_head_dim] = attributes->qk_nope_head_dim + attributes->v_head_dim;
  sizes[kSize_latent_dim] = sizes[kSize_cache_dim] - rope_dim;
  sizes[kSize_sequences_plus_1] = sizes[kSize_sequences] + 1;
  if (sizes[kSize_latent_dim] < 1) {
    return fail(K25_INVALID, message, "k25.MLA: input latent, axis cache_dim: expected more than %lld, found %lld",
                static_cast<long long>(rope_dim), static_cast<long long>(sizes[kSize_cache_dim]));
  }
  status = check_sizes(kMLA, inputs, sizes, message);
  if (status == K25_OK) write_outputs(kMLA, inputs, sizes, types, outputs);
  return status;
}

k25_status k25_moe_dispatch_outputs(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                    k25_tensor outputs[1], k25_message message) {
  Sizes sizes;
  int32_t types[2] = {0, 0};
  const int64_t intermediate = attributes->intermediate_size, group = attributes->group_size;
  if (positive(kMoEDispatch, "intermediate_size", intermediate, message) != K25_OK) return K25_INVALID;
  if (positive(kMoEDispatch, "group_size", group, message) != K25_OK) return K25_INVALID;
  k25_status status = bind(kMoEDispatch, inputs, sizes, types, message);
  if (status == K25_OK) status = check_sizes(kMoEDispatch, inputs, sizes, message);
  if (status != K25_OK) return status;
  const int64_t hidden = sizes[kSize_hidden];
  if (group % 8 != 0) {
    return fail(K25_INVALID, message, "k25.MoEDispatch: attribute group_size: expected a multiple of 8, found %lld",
                static_cast<long long>(group));
  }
  const int64_t elements = product(hidden, intermediate);
  if (hidden % group != 0 || intermediate % group != 0 || elements == kTooLarge || elements % (4 * group) != 0 ||
      elements % 16 != 0) {
    return fail(K25_INVALID, message,
                "k25.MoEDispatch: expected hidden and intermediate_size to be multiples of group_size %lld, and their "
                "words and scales to fill rows of 8 bytes, found hidden %lld and intermediate_size %lld",
                static_cast<long long>(group), static_cast<long long>(hidden), static_cast<long long>(intermediate));
  }
  write_outputs(kMoEDispatch, inputs, sizes, types, outputs);
  return K25_OK;
}

k25_status k25_linear_outputs(const k25_tensor inputs[2], k25_tensor outputs[1], k25_message message) {
  return outputs_of(kLinear, inputs, outputs, message);
}

k25_status k25_vision_attention_outputs(const k25_tensor inputs[3], const k25_vision_attention_attributes* attributes,
                                        k25_tensor outputs[1], k25_message message) {
  Sizes sizes;
  int32_t types[2] = {0, 0};
  const int64_t heads = attributes->num_heads;
  if (positive(kVisionAttention, "num_heads", heads, message) != K25_OK) return K25_INVALID;
  k25_status status = bind(kVisionAttention, inputs, sizes, types, message);
  if (status != K25_OK) return status;
  sizes[kSize_num_heads] = heads;
  const int64_t width = sizes[kSize_width];
  sizes[kSize_head_dim] = width / heads;
  if (width % heads != 0) {
    return fail(K25_INVALID, message,
                "k25.VisionAttention: input k, axis width: expected a multiple of num_heads %lld, found %lld",
                static_cast<long long>(heads), static_cast<long long>(width));
  }
  status = check_sizes(kVisionAttention, inputs, sizes, message);
  if (status == K25_OK) write_outputs(kVisionAttention, inputs, sizes, types, outputs);
  return status;
}

k25_status k25_rms_norm_outputs(const k25_tensor inputs[2], const k25_rms_norm_attributes*, k25_tensor outputs[1],
                                k25_message message) {
  return outputs_of(kRMSNorm, inputs, outputs, message);
}

k25_status k25_router_outputs(const k25_tensor inputs[2], const k25_router_attributes* attributes,
                              k25_tensor outputs[2], k25_message message) {
  Sizes sizes;
  int32_t types[2] = {0, 0};
  k25_status status = bind(kRouter, inputs, sizes, types, message);
  if (status != K25_OK) return status;
  const int64_t experts = sizes[kSize_experts], top_k = attributes->top_k;
  if (top_k < 1 || top_k > experts) {
    return fail(K25_INVALID, message,
                "k25.Router: attribute top_k: expected 1 to the %lld experts of input logits, found %lld",
                static_cast<long long>(experts), static_cast<long long>(top_k));
  }
  sizes[kSize_top_k] = top_k;
  status = check_sizes(kRouter, inputs, sizes, message);
  if (status == K25_OK) write_outputs(kRouter, inputs, sizes, types, outputs);
  return status;
}

}  // extern "C"

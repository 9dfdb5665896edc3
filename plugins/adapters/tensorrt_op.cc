#include "tensorrt_op.h"

namespace k25 {
namespace {

constexpr int64_t kUnknown = -1;
// For a size that nothing fixes; more than any rope dimension, so that what is left of a cache row is positive.
constexpr int64_t kAny = 1 << 20;

int64_t product(const AxisSpec& axis, const int64_t* sizes) {
  int64_t result = 1;
  for (int factor = 0; factor < axis.factor_count; ++factor) {
    const int16_t symbol = axis.factors[factor];
    const int64_t size = symbol < 0 ? -static_cast<int64_t>(symbol) : sizes[symbol];
    if (size < 1 || __builtin_mul_overflow(result, size, &result)) return kUnknown;
  }
  return result;
}

void bind_attributes(const Signature& op, const Attributes& attributes, int64_t* sizes) {
  for (int32_t index = 0; index < op.attribute_count; ++index) {
    if (op.attributes[index].kind == kInt) sizes[op.attributes[index].symbol] = attributes.ints[index][0];
  }
}

// What k25_mla_outputs derives (k25_plugins/signatures.py, _derive_mla).
void derive(const Signature& op, const Attributes& attributes, int64_t* sizes) {
  if (&op != plugin_ops()[0].signature) return;
  const int64_t rope = 2 * static_cast<int64_t>(attributes.floats[4].size());
  const int64_t nope = sizes[kSize_qk_nope_head_dim];
  sizes[kSize_qk_head_dim] = nope + rope;
  sizes[kSize_kv_head_dim] = nope + sizes[kSize_v_head_dim];
  sizes[kSize_latent_dim] = sizes[kSize_cache_dim] - rope;
  sizes[kSize_sequences_plus_1] = sizes[kSize_sequences] + 1;
}

}  // namespace

void fill_unknown(const Op& op, const Attributes& attributes, k25_tensor* inputs) {
  const Signature& table = *op.signature;
  int64_t sizes[kSymbolCount];
  for (int64_t& size : sizes) size = kUnknown;
  const auto each_axis = [&](auto visit) {
    for (int32_t input = 0; input < table.input_count; ++input) {
      if (inputs[input].rank != table.inputs[input].axis_count) continue;  // the core refuses it
      for (int32_t axis = 0; axis < table.inputs[input].axis_count; ++axis) {
        visit(table.inputs[input].axes[axis], inputs[input].dims[axis]);
      }
    }
  };
  bind_attributes(table, attributes, sizes);
  each_axis([&](const AxisSpec& axis, int64_t& size) {
    const int16_t symbol = axis.factors[0];
    if (axis.factor_count == 1 && symbol >= 0 && sizes[symbol] == kUnknown && size > 0) sizes[symbol] = size;
  });
  // The number of sequences is the same in two forms.
  if (sizes[kSize_sequences] == kUnknown && sizes[kSize_sequences_plus_1] > 1) {
    sizes[kSize_sequences] = sizes[kSize_sequences_plus_1] - 1;
  }
  for (int symbol = 0; symbol < kSymbolCount; ++symbol) {
    if (sizes[symbol] == kUnknown) sizes[symbol] = kAny;
  }
  derive(table, attributes, sizes);
  each_axis([&](const AxisSpec& axis, int64_t& size) {
    if (size == kUnknown) size = product(axis, sizes);
  });
}

}  // namespace k25

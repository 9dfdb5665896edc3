// What TensorRT's plugins need of an operator, from the one table and the C interface: no TensorRT in here.
#ifndef K25_TENSORRT_OP_H
#define K25_TENSORRT_OP_H

#include <stdint.h>

#include <string>
#include <vector>

#include "checks.h"
#include "k25.h"

namespace k25 {

// Attributes of a node by the order of the table: an int or float is one value.
struct Attributes {
  std::vector<std::vector<int32_t>> ints;    // of kInt, else empty
  std::vector<std::vector<float>> floats;    // of kFloat and kFloats, else empty
};

// The C interface of one operator, for any attributes of the table.
struct Op {
  const Signature* signature;
  k25_status (*outputs)(const k25_tensor*, const Attributes&, k25_tensor*, k25_message);
  k25_status (*workspace)(const k25_tensor*, const Attributes&, size_t*, k25_message);
  k25_status (*launch)(const k25_tensor*, const Attributes&, const k25_tensor*, void*, void*, k25_message);
};

enum { kMaxInputs = 7, kMaxOutputs = 2 };

inline k25_mla_attributes mla_attributes(const Attributes& given) {
  return {given.ints[0][0],   given.ints[1][0],       given.ints[2][0],
          given.floats[3][0], given.floats[4].data(), static_cast<int64_t>(given.floats[4].size())};
}

inline k25_moe_dispatch_attributes moe_dispatch_attributes(const Attributes& given) {
  return {given.ints[0][0], given.ints[1][0]};
}

// The operators that TensorRT takes a plugin for.
inline const std::vector<Op>& plugin_ops() {
  static const std::vector<Op> ops = {
      {&kMLA,
       [](const k25_tensor* inputs, const Attributes& given, k25_tensor* outputs, k25_message message) {
         const k25_mla_attributes attributes = mla_attributes(given);
         return k25_mla_outputs(inputs, &attributes, outputs, message);
       },
       [](const k25_tensor* inputs, const Attributes& given, size_t* bytes, k25_message message) {
         const k25_mla_attributes attributes = mla_attributes(given);
         return k25_mla_gpu_workspace(inputs, &attributes, bytes, message);
       },
       [](const k25_tensor* inputs, const Attributes& given, const k25_tensor* outputs, void* workspace, void* stream,
          k25_message message) {
         const k25_mla_attributes attributes = mla_attributes(given);
         return k25_mla_gpu(inputs, &attributes, outputs, workspace, stream, message);
       }},
      {&kMoEDispatch,
       [](const k25_tensor* inputs, const Attributes& given, k25_tensor* outputs, k25_message message) {
         const k25_moe_dispatch_attributes attributes = moe_dispatch_attributes(given);
         return k25_moe_dispatch_outputs(inputs, &attributes, outputs, message);
       },
       [](const k25_tensor* inputs, const Attributes& given, size_t* bytes, k25_message message) {
         const k25_moe_dispatch_attributes attributes = moe_dispatch_attributes(given);
         return k25_moe_dispatch_gpu_workspace(inputs, &attributes, bytes, message);
       },
       [](const k25_tensor* inputs, const Attributes& given, const k25_tensor* outputs, void* workspace, void* stream,
          k25_message message) {
         const k25_moe_dispatch_attributes attributes = moe_dispatch_attributes(given);
         return k25_moe_dispatch_gpu(inputs, &attributes, outputs, workspace, stream, message);
       }}};
  return ops;
}

// The input whose memory an output shares, or -1: `cache_out` is `cache`, updated.
inline int32_t aliased_input(const Signature& op, int32_t output) {
  const std::string suffix = "_out", name = op.outputs[output].name;
  if (name.size() <= suffix.size() || name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) return -1;
  const std::string source = name.substr(0, name.size() - suffix.size());
  for (int32_t input = 0; input < op.input_count; ++input) {
    if (source == op.inputs[input].name) return input;
  }
  return -1;
}

// Whether dtypes[position] (inputs, then outputs) fits those before it: fixed by the table, or one free choice for a
// type parameter.
inline bool dtype_fits(const Signature& op, int32_t position, const int32_t* dtypes) {
  const auto spec = [&](int32_t index) {
    return index < op.input_count ? op.inputs[index].dtype : op.outputs[index - op.input_count].dtype;
  };
  const int32_t wanted = spec(position);
  if (wanted > 0) return dtypes[position] == wanted;
  if (dtypes[position] != K25_FLOAT32 && dtypes[position] != K25_BFLOAT16) return false;
  for (int32_t index = 0; index < position; ++index) {
    if (spec(index) == wanted) return dtypes[position] == dtypes[index];
  }
  return true;
}

// Gives sizes that are not known yet (-1) a value that fits the others, so that those that are known can be checked.
void fill_unknown(const Op& op, const Attributes& attributes, k25_tensor* inputs);

}  // namespace k25
#endif

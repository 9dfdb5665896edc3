// The TensorRT plugins k25.MLA and k25.MoEDispatch: a thin adapter over the C interface of core/k25.h.
//
// Load it with IPluginRegistry::loadLibrary. It needs neither libcuda nor TensorRT's libraries to link: only TensorRT's
// own headers to compile. Names, versions and serialised fields are those of the Python creators
// (k25_plugins/tensorrt_plugins.py): an engine built with one runs with the other.
#include <NvInferRuntime.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "k25.h"
#include "tensorrt_op.h"

namespace k25 {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char* kNamespace = "k25";
constexpr const char* kVersion = "1";
constexpr int32_t kMaxFieldLength = 1 << 16;
constexpr int32_t kFailed = 1;

nvinfer1::ILoggerFinder* logger_finder = nullptr;
std::mutex logger_mutex;

// To TensorRT's logger, or where there is none to standard error: TensorRT itself only says that a plugin failed.
void report(const char* text) noexcept {
  const std::lock_guard<std::mutex> lock(logger_mutex);
  nvinfer1::ILogger* logger = nullptr;
  if (logger_finder != nullptr) logger = logger_finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    fprintf(stderr, "%s\n", text);
  }
}

__attribute__((format(printf, 1, 2))) void report_format(const char* format, ...) noexcept {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report(text);
}

// 0 where TensorRT's dtype is none of ours.
int32_t onnx_dtype(DataType dtype) noexcept {
  switch (dtype) {
    case DataType::kFLOAT: return K25_FLOAT32;
    case DataType::kBF16: return K25_BFLOAT16;
    case DataType::kINT32: return K25_INT32;
    case DataType::kINT64: return K25_INT64;
    default: return 0;
  }
}

k25_tensor tensor_of(const nvinfer1::Dims& dims, DataType dtype, void* data = nullptr) noexcept {
  k25_tensor tensor{};
  tensor.data = data;
  tensor.dtype = onnx_dtype(dtype);
  tensor.rank = dims.nbDims;
  for (int32_t axis = 0; axis < dims.nbDims && axis < K25_MAX_RANK; ++axis) tensor.dims[axis] = dims.d[axis];
  return tensor;
}

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Op& op, Attributes attributes) : op_(op), attributes_(std::move(attributes)) {
    for (int32_t index = 0; index < table().attribute_count; ++index) {
      const AttributeSpec& spec = table().attributes[index];
      if (spec.kind == kInt) {
        fields_.emplace_back(spec.name, attributes_.ints[index].data(), PluginFieldType::kINT32, 1);
      } else {
        const std::vector<float>& values = attributes_.floats[index];
        fields_.emplace_back(spec.name, values.data(), PluginFieldType::kFLOAT32, static_cast<int32_t>(values.size()));
      }
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    try {
      return new Plugin(op_, attributes_);
    } catch (const std::bad_alloc&) {
      report_format("k25.%s: no memory for a plugin", table().name);
      return nullptr;
    }
  }

  const char* getPluginName() const noexcept override { return table().name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return table().output_count; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (!counts_fit(input_count, output_count)) return kFailed;
    for (int32_t output = 0; output < output_count; ++output) {
      const int32_t wanted = table().outputs[output].dtype;
      if (wanted > 0) return kFailed;  // every output of the table has the type of an input
      for (int32_t input = input_count - 1; input >= 0; --input) {
        if (table().inputs[input].dtype == wanted) outputs[output] = inputs[input];
      }
    }
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    if (!counts_fit(input_count, output_count)) return kFailed;
    k25_tensor known[kMaxInputs] = {};
    for (int32_t input = 0; input < input_count; ++input) {
      const int32_t dtype = table().inputs[input].dtype;
      known[input].dtype = dtype > 0 ? dtype : K25_BFLOAT16;
      known[input].rank = inputs[input].nbDims;
      for (int32_t axis = 0; axis < inputs[input].nbDims && axis < K25_MAX_RANK; ++axis) {
        const nvinfer1::IDimensionExpr* size = inputs[input].d[axis];
        known[input].dims[axis] = size->isConstant() ? size->getConstantValue() : -1;
      }
    }
    fill_unknown(op_, attributes_, known);
    if (!checked(known)) return kFailed;
    for (int32_t output = 0; output < output_count; ++output) {
      const TensorSpec& spec = table().outputs[output];
      outputs[output].nbDims = spec.axis_count;
      for (int32_t axis = 0; axis < spec.axis_count; ++axis) {
        const nvinfer1::IDimensionExpr* size = size_of(spec.axes[axis], inputs, builder);
        if (size == nullptr) {
          report_format("k25.%s: output %s: axis %s: no input has it", table().name, spec.name, spec.axes[axis].name);
          return kFailed;
        }
        outputs[output].d[axis] = size;
      }
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* described, int32_t input_count,
                                 int32_t output_count) noexcept override {
    if (!counts_fit(input_count, output_count) || position < 0 || position >= input_count + output_count) return false;
    int32_t dtypes[kMaxInputs + kMaxOutputs];
    for (int32_t index = 0; index <= position; ++index) dtypes[index] = onnx_dtype(described[index].desc.type);
    return described[position].desc.format == nvinfer1::TensorFormat::kLINEAR && dtype_fits(table(), position, dtypes);
  }

  int32_t getAliasedInput(int32_t output) noexcept override {
    return output >= 0 && output < table().output_count ? aliased_input(table(), output) : -1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
                          int32_t output_count) const noexcept override {
    if (!counts_fit(input_count, output_count)) return 0;
    k25_tensor largest[kMaxInputs];
    for (int32_t input = 0; input < input_count; ++input) {
      largest[input] = tensor_of(inputs[input].max, inputs[input].desc.type);
    }
    size_t bytes = 0;
    char text[512] = "";
    const k25_status status = op_.workspace(largest, attributes_, &bytes, {text, sizeof text});
    if (status == K25_OK) return bytes;
    if (status != K25_UNAVAILABLE) report(text);  // an engine may be built where no kernel is
    return 0;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t input_count, const DynamicPluginTensorDesc*,
                          int32_t output_count) noexcept override {
    return counts_fit(input_count, output_count) ? 0 : kFailed;
  }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                        int32_t output_count) noexcept override {
    if (!counts_fit(input_count, output_count)) return kFailed;
    k25_tensor tensors[kMaxInputs];
    for (int32_t input = 0; input < input_count; ++input) {
      tensors[input] = tensor_of(inputs[input].dims, inputs[input].type);
    }
    fill_unknown(op_, attributes_, tensors);  // TensorRT also asks before all shapes are known
    return checked(tensors) ? 0 : kFailed;
  }

  int32_t enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc* output_descriptions,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    k25_tensor given[kMaxInputs], made[kMaxOutputs];
    for (int32_t input = 0; input < table().input_count; ++input) {
      given[input] =
          tensor_of(input_descriptions[input].dims, input_descriptions[input].type, const_cast<void*>(inputs[input]));
    }
    for (int32_t output = 0; output < table().output_count; ++output) {
      made[output] = tensor_of(output_descriptions[output].dims, output_descriptions[output].type, outputs[output]);
    }
    char text[512] = "";
    const k25_status status = op_.launch(given, attributes_, made, workspace, stream, {text, sizeof text});
    if (status == K25_OK) return 0;
    report(text);
    return kFailed;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  const Signature& table() const noexcept { return *op_.signature; }

  bool counts_fit(int32_t inputs, int32_t outputs) const noexcept {
    if (inputs == table().input_count && outputs == table().output_count) return true;
    report_format("k25.%s: expected %d inputs and %d outputs, found %d and %d", table().name, table().input_count,
                  table().output_count, inputs, outputs);
    return false;
  }

  bool checked(const k25_tensor* inputs) const noexcept {
    k25_tensor outputs[kMaxOutputs];
    char text[512] = "";
    if (op_.outputs(inputs, attributes_, outputs, {text, sizeof text}) == K25_OK) return true;
    report(text);
    return false;
  }

  // An output's axis from attributes, literals and the axes of inputs; null where a factor is none of them.
  const nvinfer1::IDimensionExpr* size_of(const AxisSpec& axis, const nvinfer1::DimsExprs* inputs,
                                          nvinfer1::IExprBuilder& builder) const noexcept {
    const nvinfer1::IDimensionExpr* result = nullptr;
    for (int factor = 0; factor < axis.factor_count; ++factor) {
      const nvinfer1::IDimensionExpr* size = symbol_size(axis.factors[factor], inputs, builder);
      if (size == nullptr) return nullptr;
      result = result == nullptr ? size : builder.operation(nvinfer1::DimensionOperation::kPROD, *result, *size);
    }
    return result;
  }

  const nvinfer1::IDimensionExpr* symbol_size(int16_t symbol, const nvinfer1::DimsExprs* inputs,
                                              nvinfer1::IExprBuilder& builder) const noexcept {
    if (symbol < 0) return builder.constant(-symbol);
    for (int32_t index = 0; index < table().attribute_count; ++index) {
      const AttributeSpec& spec = table().attributes[index];
      if (spec.kind == kInt && spec.symbol == symbol) return builder.constant(attributes_.ints[index][0]);
    }
    for (int32_t input = 0; input < table().input_count; ++input) {
      const TensorSpec& spec = table().inputs[input];
      for (int32_t axis = 0; axis < spec.axis_count; ++axis) {
        if (spec.axes[axis].factor_count == 1 && spec.axes[axis].factors[0] == symbol) return inputs[input].d[axis];
      }
    }
    return nullptr;
  }

  const Op& op_;
  const Attributes attributes_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

// Values of a field; false where its type is not one that fits, or where it claims values it does not have.
template <typename Value, typename Wide>
bool read_values(const PluginField& field, PluginFieldType narrow, PluginFieldType wide, std::vector<Value>* values) {
  if (field.length < 0 || field.length > kMaxFieldLength || (field.data == nullptr && field.length > 0)) return false;
  if (field.type != narrow && field.type != wide) return false;
  for (int32_t index = 0; index < field.length; ++index) {
    if (field.type == narrow) {
      Value value;
      memcpy(&value, static_cast<const char*>(field.data) + static_cast<size_t>(index) * sizeof value, sizeof value);
      values->push_back(value);
    } else {
      Wide value;
      memcpy(&value, static_cast<const char*>(field.data) + static_cast<size_t>(index) * sizeof value, sizeof value);
      const Value narrowed = static_cast<Value>(value);
      if (sizeof(Value) == sizeof(int32_t) && static_cast<Wide>(narrowed) != value && narrow == PluginFieldType::kINT32) {
        return false;
      }
      values->push_back(narrowed);
    }
  }
  return true;
}

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const Op& op) : op_(op) {
    for (int32_t index = 0; index < table().attribute_count; ++index) {
      const AttributeSpec& spec = table().attributes[index];
      const bool is_int = spec.kind == kInt;
      fields_.emplace_back(spec.name, nullptr, is_int ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32, 0);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  nvinfer1::IPluginV3* createPlugin(const char* name, const PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    const char* node = name == nullptr ? "?" : name;
    try {
      Attributes attributes;
      return read(node, given, &attributes) ? new Plugin(op_, std::move(attributes)) : nullptr;
    } catch (const std::bad_alloc&) {
      report_format("node %.200s: k25.%s: no memory for a plugin", node, table().name);
      return nullptr;
    }
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return table().name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Signature& table() const noexcept { return *op_.signature; }

  bool read(const char* node, const PluginFieldCollection* given, Attributes* attributes) const {
    const int32_t count = table().attribute_count;
    if (given == nullptr || given->nbFields < 0 || (given->nbFields > 0 && given->fields == nullptr)) {
      report_format("node %.200s: k25.%s: expected plugin fields, found none", node, table().name);
      return false;
    }
    attributes->ints.resize(static_cast<size_t>(count));
    attributes->floats.resize(static_cast<size_t>(count));
    std::vector<bool> seen(static_cast<size_t>(count), false);
    for (int32_t index = 0; index < given->nbFields; ++index) {
      const PluginField& field = given->fields[index];
      const int32_t position = position_of(field.name);
      if (position < 0 || seen[static_cast<size_t>(position)]) {
        report_format("node %.200s: k25.%s: plugin field %.100s: expected each attribute of the operator once, found %s",
                      node, table().name, field.name == nullptr ? "(no name)" : field.name,
                      position < 0 ? "another" : "it again");
        return false;
      }
      seen[static_cast<size_t>(position)] = true;
      if (!read_field(node, field, position, attributes)) return false;
    }
    for (int32_t position = 0; position < count; ++position) {
      if (seen[static_cast<size_t>(position)]) continue;
      report_format("node %.200s: k25.%s: attribute %s: expected a plugin field, found none", node, table().name,
                    table().attributes[position].name);
      return false;
    }
    return true;
  }

  bool read_field(const char* node, const PluginField& field, int32_t position, Attributes* attributes) const {
    const AttributeSpec& spec = table().attributes[position];
    const size_t place = static_cast<size_t>(position);
    bool fits = false;
    size_t length = 0;
    if (spec.kind == kInt) {
      fits = read_values<int32_t, int64_t>(field, PluginFieldType::kINT32, PluginFieldType::kINT64,
                                           &attributes->ints[place]);
      length = attributes->ints[place].size();
    } else {
      fits = read_values<float, double>(field, PluginFieldType::kFLOAT32, PluginFieldType::kFLOAT64,
                                        &attributes->floats[place]);
      length = attributes->floats[place].size();
    }
    const bool has_length = spec.kind == kFloats ? length > 0 : length == 1;
    if (fits && has_length) return true;
    report_format("node %.200s: k25.%s: attribute %s: expected %s of type %s, found a field of type %d, length %d", node,
                  table().name, spec.name, spec.kind == kFloats ? "values" : "one value",
                  spec.kind == kInt ? "int32" : "float32", static_cast<int>(field.type), field.length);
    return false;
  }

  int32_t position_of(const char* name) const noexcept {
    for (int32_t index = 0; name != nullptr && index < table().attribute_count; ++index) {
      if (strcmp(name, table().attributes[index].name) == 0) return index;
    }
    return -1;
  }

  const Op& op_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace k25

// What TensorRT looks for in a plugin library.
extern "C" K25_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  const std::lock_guard<std::mutex> lock(k25::logger_mutex);
  k25::logger_finder = finder;
}

extern "C" K25_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static const auto creators = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> made;
    for (const k25::Op& op : k25::plugin_ops()) made.push_back(new k25::Creator(op));  // live as long as the library
    return made;
  }();
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

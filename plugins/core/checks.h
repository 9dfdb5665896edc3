// Shapes, dtypes and attributes of every operator, checked against the one table, with messages that name the operator,
// the input, what was expected and what was found.
#ifndef K25_CHECKS_H
#define K25_CHECKS_H

#include <stdint.h>

#include "k25.h"

namespace k25 {

enum { kMaxFactors = 2, kMaxAxes = 3 };

struct AxisSpec {
  const char* name;
  int8_t factor_count;
  int16_t factors[kMaxFactors];  // a Symbol, or a literal, negative
};

struct TensorSpec {
  const char* name;
  const char* axes_text;
  int32_t dtype;  // an ONNX number, or below 0 a type parameter
  bool leading;   // any number of axes before these
  int32_t axis_count;
  AxisSpec axes[kMaxAxes];
};

enum AttributeKind { kInt, kFloat, kFloats };

struct AttributeSpec {
  const char* name;
  AttributeKind kind;
  int16_t symbol;  // of an int
};

struct Signature {
  const char* name;
  const TensorSpec* inputs;
  int32_t input_count;
  const TensorSpec* outputs;
  int32_t output_count;
  const AttributeSpec* attributes;
  int32_t attribute_count;
  int32_t type_parameter_count;
};

#include "signatures.inc"

// Writes a message (printf style) and returns `status`.
k25_status fail(k25_status status, k25_message message, const char* format, ...) __attribute__((format(printf, 3, 4)));

const char* dtype_name(int32_t dtype);

}  // namespace k25
#endif

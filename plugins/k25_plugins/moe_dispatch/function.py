"""`k25.MoEDispatch` as an ONNX model-local function of standard ops.

A Loop over the experts unpacks one at a time, and only those that some token uses (an If), so memory stays bounded by
one expert. Bits are taken with Mod and Div, which TensorRT builds (it has no bitwise operators): for a word w,
nibble i is ((w - w mod 16^i) / 16^i) mod 16, exact for negative words because the result of Mod has the divisor's sign.
An expert is run on every token; Where keeps only the tokens that chose it, so a non-finite expert stays with them.
Arithmetic is float32 whatever the activation's dtype; only the last cast differs.
"""

DEQUANTIZE_BODY = """
DequantizeInt4 (words, scales, group) => (weight) {
  powers = Constant <value = int32[8] {1, 16, 256, 4096, 65536, 1048576, 16777216, 268435456}> ()
  sixteen = Constant <value = int32 {16}> ()
  eight = Constant <value = float {8.0}> ()
  two = Constant <value = int64[1] {2}> ()
  zero = Constant <value = int64[1] {0}> ()
  rest = Constant <value = int64[1] {-1}> ()
  word = Unsqueeze (words, two)
  below = Mod (word, powers)
  above = Sub (word, below)
  shifted = Div (above, powers)
  nibble = Mod (shifted, sixteen)
  group_shape = Concat <axis = 0> (zero, rest, group)
  nibbles = Reshape (nibble, group_shape)
  stored = Cast <to = 1> (nibbles)
  value = Sub (stored, eight)
  scale = Cast <to = 1> (scales)
  scale_of_group = Unsqueeze (scale, two)
  scaled = Mul (value, scale_of_group)
  row_shape = Concat <axis = 0> (zero, rest)
  weight = Reshape (scaled, row_shape)
}
"""

BODY = """
MoEDispatch <intermediate_size, group_size> (x, expert_ids, expert_weights, words, scales, table) => (y) {
  intermediate_scalar = Constant <value_int: int = @intermediate_size> ()
  group_scalar = Constant <value_int: int = @group_size> ()
  zero = Constant <value = int64[1] {0}> ()
  zero_scalar = Constant <value = int64 {0}> ()
  one = Constant <value = int64[1] {1}> ()
  one_scalar = Constant <value = int64 {1}> ()
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  four = Constant <value = int64[1] {4}> ()
  five = Constant <value = int64[1] {5}> ()
  eight = Constant <value = int64[1] {8}> ()
  rest = Constant <value = int64[1] {-1}> ()
  zero_float = Constant <value = float {0.0}> ()
  intermediate = Unsqueeze (intermediate_scalar, zero)
  group = Unsqueeze (group_scalar, zero)
  x_float = Cast <to = 1> (x)
  hidden = Shape <start = 1, end = 2> (x)
  experts = Shape <start = 0, end = 1> (table)
  expert_count = Squeeze (experts, zero)

  elements = Mul (intermediate, hidden)
  word_elements = Mul (two, eight)
  scale_elements = Mul (four, group)
  word_rows_1 = Div (elements, word_elements)
  scale_rows_1 = Div (elements, scale_elements)
  word_rows = Squeeze (word_rows_1, zero)
  scale_rows = Squeeze (scale_rows_1, zero)
  word_range = Range (zero_scalar, word_rows, one_scalar)
  scale_range = Range (zero_scalar, scale_rows, one_scalar)
  in_shape = Concat <axis = 0> (intermediate, rest)
  out_shape = Concat <axis = 0> (hidden, rest)

  x_shape = Shape (x)
  start = ConstantOfShape <value = float[1] {0.0}> (x_shape)
  sum = Loop (expert_count, , start) <body = each_expert (int64 index, bool unused, float[tokens, hidden] total)
      => (bool go_on, float[tokens, hidden] new_total) {
    go_on = Constant <value = bool {1}> ()
    index_32 = Cast <to = 6> (index)
    chosen = Equal (expert_ids, index_32)
    chosen_float = Cast <to = 1> (chosen)
    chosen_weights = Mul (chosen_float, expert_weights)
    weight_of_token = ReduceSum <keepdims = 1> (chosen_weights, one)
    chosen_token_float = ReduceMax <keepdims = 1> (chosen_float, one)
    chosen_token = Greater (chosen_token_float, zero_float)
    chosen_any = ReduceMax <keepdims = 0> (chosen_float)
    is_chosen = Greater (chosen_any, zero_float)
    row = Gather <axis = 0> (table, index)
    gate_words_row = Gather <axis = 0> (row, zero)
    first_row = Squeeze (gate_words_row, zero)
    is_held = GreaterOrEqual (first_row, zero_scalar)
    is_used = And (is_chosen, is_held)
    new_total = If (is_used) <
      then_branch = used () => (float[tokens, hidden] added) {
        gate_rows = Add (word_range, gate_words_row)
        gate_words_flat = Gather <axis = 0> (words, gate_rows)
        gate_words = Reshape (gate_words_flat, in_shape)
        gate_scales_row = Gather <axis = 0> (row, one)
        gate_scale_rows = Add (scale_range, gate_scales_row)
        gate_scales_flat = Gather <axis = 0> (scales, gate_scale_rows)
        gate_scales = Reshape (gate_scales_flat, in_shape)
        gate_weight = k25.DequantizeInt4 (gate_words, gate_scales, group)
        gate_weight_t = Transpose <perm = [1, 0]> (gate_weight)
        gate = MatMul (x_float, gate_weight_t)

        up_words_row = Gather <axis = 0> (row, two)
        up_rows = Add (word_range, up_words_row)
        up_words_flat = Gather <axis = 0> (words, up_rows)
        up_words = Reshape (up_words_flat, in_shape)
        up_scales_row = Gather <axis = 0> (row, three)
        up_scale_rows = Add (scale_range, up_scales_row)
        up_scales_flat = Gather <axis = 0> (scales, up_scale_rows)
        up_scales = Reshape (up_scales_flat, in_shape)
        up_weight = k25.DequantizeInt4 (up_words, up_scales, group)
        up_weight_t = Transpose <perm = [1, 0]> (up_weight)
        up = MatMul (x_float, up_weight_t)

        gate_sigmoid = Sigmoid (gate)
        gate_silu = Mul (gate, gate_sigmoid)
        inner = Mul (gate_silu, up)

        down_words_row = Gather <axis = 0> (row, four)
        down_rows = Add (word_range, down_words_row)
        down_words_flat = Gather <axis = 0> (words, down_rows)
        down_words = Reshape (down_words_flat, out_shape)
        down_scales_row = Gather <axis = 0> (row, five)
        down_scale_rows = Add (scale_range, down_scales_row)
        down_scales_flat = Gather <axis = 0> (scales, down_scale_rows)
        down_scales = Reshape (down_scales_flat, out_shape)
        down_weight = k25.DequantizeInt4 (down_words, down_scales, group)
        down_weight_t = Transpose <perm = [1, 0]> (down_weight)
        down = MatMul (inner, down_weight_t)
        weighted = Mul (down, weight_of_token)
        share = Where (chosen_token, weighted, zero_float)
        added = Add (total, share)
      },
      else_branch = unused_expert () => (float[tokens, hidden] kept) {
        kept = Identity (total)
      }
    >
  }>
  y = CastLike (sum, x)
}
"""

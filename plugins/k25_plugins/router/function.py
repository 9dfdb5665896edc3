"""`k25.Router` as an ONNX model-local function of standard ops."""

BODY = """
Router <top_k, normalise, scaling_factor> (logits, bias) => (expert_ids, expert_weights) {
  top_k_scalar = Constant <value_int: int = @top_k> ()
  normalise_scalar = Constant <value_int: int = @normalise> ()
  factor = Constant <value_float: float = @scaling_factor> ()
  first_axis = Constant <value = int64[1] {0}> ()
  last_axis = Constant <value = int64[1] {-1}> ()
  one = Constant <value = float {1.0}> ()
  smallest_total = Constant <value = float {1e-20}> ()
  scores = Sigmoid (logits)
  biased = Add (scores, bias)
  k = Unsqueeze (top_k_scalar, first_axis)
  best, ids = TopK <axis = -1> (biased, k)
  chosen = GatherElements <axis = 1> (scores, ids)
  total = ReduceSum <keepdims = 1> (chosen, last_axis)
  total_eps = Add (total, smallest_total)
  is_normalised = Cast <to = 9> (normalise_scalar)
  divisor = Where (is_normalised, total_eps, one)
  normalised = Div (chosen, divisor)
  expert_weights = Mul (normalised, factor)
  expert_ids = Cast <to = 6> (ids)
}
"""

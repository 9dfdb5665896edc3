"""`k25.RMSNorm` as an ONNX model-local function of standard ops."""

BODY = """
RMSNorm <eps> (x, weight) => (y) {
  eps_scalar = Constant <value_float: float = @eps> ()
  last_axis = Constant <value = int64[1] {-1}> ()
  wide = Cast <to = 1> (x)
  square = Mul (wide, wide)
  mean = ReduceMean <keepdims = 1> (square, last_axis)
  plus_eps = Add (mean, eps_scalar)
  root = Sqrt (plus_eps)
  rsqrt = Reciprocal (root)
  normed = Mul (wide, rsqrt)
  normed_x = CastLike (normed, x)
  weight_x = CastLike (weight, x)
  y = Mul (normed_x, weight_x)
}
"""

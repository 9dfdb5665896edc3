"""`k25.Linear` as an ONNX model-local function of standard ops."""

BODY = """
Linear (x, weight) => (y) {
  like_x = CastLike (weight, x)
  transposed = Transpose <perm = [1, 0]> (like_x)
  y = MatMul (x, transposed)
}
"""

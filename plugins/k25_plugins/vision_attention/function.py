"""`k25.VisionAttention` as an ONNX model-local function of standard ops.

One Loop over (head, block of queries), so that only the scores of one block exist at a time: at most 512 queries of one
head times all keys, 33 MB for 16384 patches where all scores of a layer would take 17 GB. The patches are cut into the
fewest blocks of at most 512, all equally long, since a scan output has one shape; where that is more rows than there
are patches, the last query is repeated, and what it gave is cut off again. One head a turn is also the fastest order
on a CPU: its scores stay in the cache between the two products. The Min after the division changes nothing but what
TensorRT knows of the length: without it a build takes a block to be all patches and asks for 64 GB.
Arithmetic is float32 whatever the activation's dtype; only the last cast differs.
"""

BODY = """
VisionAttention <num_heads, softmax_scale> (q, k, v) => (out) {
  heads_scalar = Constant <value_int: int = @num_heads> ()
  scale = Constant <value_float: float = @softmax_scale> ()
  zero = Constant <value = int64[1] {0}> ()
  zero_scalar = Constant <value = int64 {0}> ()
  one = Constant <value = int64[1] {1}> ()
  one_scalar = Constant <value = int64 {1}> ()
  rest = Constant <value = int64[1] {-1}> ()
  longest_block = Constant <value = int64 {512}> ()
  heads = Unsqueeze (heads_scalar, zero)
  patches = Shape <start = 0, end = 1> (q)
  patch_count = Squeeze (patches, zero)
  head_shape = Concat <axis = 0> (patches, heads, rest)

  q_float = Cast <to = 1> (q)
  q_scaled = Mul (q_float, scale)
  q_by_patch = Reshape (q_scaled, head_shape)
  q_heads = Transpose <perm = [1, 0, 2]> (q_by_patch)
  k_float = Cast <to = 1> (k)
  k_by_patch = Reshape (k_float, head_shape)
  k_heads = Transpose <perm = [1, 2, 0]> (k_by_patch)
  v_float = Cast <to = 1> (v)
  v_by_patch = Reshape (v_float, head_shape)
  v_heads = Transpose <perm = [1, 0, 2]> (v_by_patch)

  last_patch = Sub (patch_count, one_scalar)
  patches_rounded = Add (last_patch, longest_block)
  blocks = Div (patches_rounded, longest_block)
  last_block = Sub (blocks, one_scalar)
  blocks_rounded = Add (patch_count, last_block)
  even_length = Div (blocks_rounded, blocks)
  block_length = Min (even_length, longest_block)
  block_range = Range (zero_scalar, block_length, one_scalar)
  turns = Mul (heads_scalar, blocks)
  mixed_blocks = Loop (turns, , ) <body = each_block (int64 index, bool unused)
      => (bool go_on, float[block, head_dim] mixed) {
    go_on = Constant <value = bool {1}> ()
    head = Div (index, blocks)
    block_index = Mod (index, blocks)
    first_row = Mul (block_index, block_length)
    rows_unbounded = Add (block_range, first_row)
    rows = Min (rows_unbounded, last_patch)
    q_head = Gather <axis = 0> (q_heads, head)
    q_block = Gather <axis = 0> (q_head, rows)
    k_head = Gather <axis = 0> (k_heads, head)
    v_head = Gather <axis = 0> (v_heads, head)
    scores = MatMul (q_block, k_head)
    probabilities = Softmax <axis = -1> (scores)
    mixed = MatMul (probabilities, v_head)
  }>

  head_dim = Shape <start = 2, end = 3> (mixed_blocks)
  rows_shape = Concat <axis = 0> (heads, rest, head_dim)
  out_heads = Reshape (mixed_blocks, rows_shape)
  out_heads_cut = Slice (out_heads, zero, patches, one)
  out_by_patch = Transpose <perm = [1, 0, 2]> (out_heads_cut)
  row_shape = Concat <axis = 0> (patches, rest)
  out_float = Reshape (out_by_patch, row_shape)
  out = CastLike (out_float, q)
}
"""

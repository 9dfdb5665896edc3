// k25.MLA on a GPU: which kernels of gpu.py run, on which grids, over which workspace.
#include <stdlib.h>

#include <algorithm>

#include "gpu_kernels.h"

namespace k25 {
namespace {

// Shares of contexts beyond one for each token: enough to fill a device with few tokens.
constexpr int64_t kSpareShares = 256;
// Tiles of the context that a share has at least.
constexpr int64_t kSmallestShare = 2;
// Memory for the expanded keys and values of long sequences; those that find no room are attended in the latent space.
constexpr int64_t kExpandedMebibytes = 2048;

struct Sizes {
  int64_t tokens, heads, nope, v, rank, rope, page, sequences, blocks_per_sequence;
  int32_t dtype, cache_dtype;
  int64_t element_bytes() const { return dtype == K25_FLOAT32 ? 4 : 2; }
};

Sizes sizes_of(const k25_tensor* inputs, const k25_mla_attributes& attributes) {
  const int64_t rope = 2 * attributes.inv_freq_count;
  return {inputs[0].dims[0],
          attributes.num_heads,
          attributes.qk_nope_head_dim,
          attributes.v_head_dim,
          inputs[2].dims[2] - rope,
          rope,
          inputs[2].dims[1],
          inputs[6].dims[0],
          inputs[6].dims[1],
          inputs[0].dtype,
          inputs[2].dtype};
}

// New tokens from which a sequence is long: the fewest of any kernel in this build, so that sizes are bounds.
int64_t fewest_long_tokens() {
  int count = 0;
  const GpuKernel* kernels = gpu_kernels(&count);
  int64_t fewest = INT32_MAX;
  for (int index = 0; index < count; ++index) {
    if (kernels[index].kind == kGpu_mla_split) {
      fewest = std::min<int64_t>(fewest, kernels[index].constants[mla_split::LONG]);
    }
  }
  return fewest;
}

int64_t expanded_limit() {
  const char* text = getenv("K25_GPU_EXPAND_MIB");
  const long long given = text == nullptr ? -1 : atoll(text);
  return (given >= 0 ? std::min<int64_t>(given, 1 << 20) : kExpandedMebibytes) << 20;
}

// Rows of contexts that can be expanded: what the long sequences can need, as far as memory is given to it.
int64_t expanded_rows(const Sizes& sizes) {
  const int64_t sequences = std::min(sizes.sequences, sizes.tokens / fewest_long_tokens());
  const int64_t row = sizes.heads * (sizes.nope + sizes.v) * sizes.element_bytes();
  return std::min(sequences * sizes.blocks_per_sequence * sizes.page, expanded_limit() / row);
}

struct Parts {
  void *qa, *part, *lse, *kv;
  size_t bytes;
};

Parts parts_of(const Sizes& sizes, void* workspace) {
  GpuWorkspace memory(workspace);
  const int64_t shares = sizes.tokens + kSpareShares;
  Parts parts;
  parts.qa = memory.take(sizes.tokens * sizes.heads * (sizes.rank + sizes.rope) * sizes.element_bytes());
  parts.part = memory.take(shares * sizes.heads * sizes.rank * 4);
  parts.lse = memory.take(shares * sizes.heads * 4);
  parts.kv = memory.take(expanded_rows(sizes) * sizes.heads * (sizes.nope + sizes.v) * sizes.element_bytes());
  parts.bytes = memory.bytes();
  return parts;
}

GpuWish wish_for(GpuKernelKind kind, const Sizes& sizes, bool reads_cache) {
  GpuWish wish;
  wish.kind = kind;
  wish.dtype = sizes.dtype;
  wish.cache_dtype = reads_cache ? sizes.cache_dtype : 0;
  wish.tokens = sizes.tokens;
  return wish;
}

// Every token in the latent space, over shares of its context.
struct Kernels {
  const GpuKernel *rotate, *absorb, *split, *combine, *expand, *prefill;
};

Kernels choose(GpuCall& call, const Sizes& s) {
  Kernels kernels = {};
  {
    using namespace mla_rotate_append;
    kernels.rotate = call.choose(
        wish_for(kGpu_mla_rotate_append, s, true).with(N, s.heads).with(NOPE, s.nope).with(R, s.rank).with(D, s.rope)
            .with(PAGE, s.page));
  }
  {
    using namespace mla_absorb;
    kernels.absorb = call.choose(
        wish_for(kGpu_mla_absorb, s, false).with(N, s.heads).with(NOPE, s.nope).with(V, s.v).with(R, s.rank)
            .with(D, s.rope));
  }
  {
    using namespace mla_split;
    kernels.split = call.choose(
        wish_for(kGpu_mla_split, s, true).with(N, s.heads).with(R, s.rank).with(D, s.rope).with(PAGE, s.page));
  }
  {
    using namespace mla_combine;
    kernels.combine = call.choose(
        wish_for(kGpu_mla_combine, s, false).with(N, s.heads).with(NOPE, s.nope).with(V, s.v).with(R, s.rank));
  }
  if (!call.is_good()) return kernels;
  const int64_t is_long = kernels.split->constants[mla_split::LONG];
  {
    using namespace mla_expand;
    kernels.expand = call.choose(
        wish_for(kGpu_mla_expand, s, true).with(N, s.heads).with(KV, s.nope + s.v).with(R, s.rank).with(D, s.rope)
            .with(PAGE, s.page).with(LONG, is_long));
  }
  {
    using namespace mla_prefill;
    kernels.prefill = call.choose(
        wish_for(kGpu_mla_prefill, s, true).with(N, s.heads).with(NOPE, s.nope).with(V, s.v).with(R, s.rank)
            .with(D, s.rope).with(PAGE, s.page).with(LONG, is_long));
  }
  return kernels;
}

// As many shares as keep every processor busy, no more than the context has, within the workspace.
int64_t share_count(const Sizes& sizes, const GpuKernel& split, int64_t processors) {
  const int64_t groups = ceil_div(sizes.heads, split.constants[mla_split::BH]);
  const int64_t tile = split.constants[mla_split::BN];
  const int64_t most = std::min(ceil_div(sizes.blocks_per_sequence * sizes.page, kSmallestShare * tile),
                                1 + kSpareShares / sizes.tokens);
  return std::clamp<int64_t>(processors / (sizes.tokens * groups), 1, most);
}

struct Memory {
  const void *q, *latent, *kv_b, *positions, *query_start, *block_table;
  void *cache, *out;
};

void attend(GpuCall& call, const Kernels& kernels, const Sizes& s, const k25_mla_attributes& attributes,
            const Memory& m, const Parts& parts) {
  const int64_t is_long = kernels.split->constants[mla_split::LONG];
  // Only where a sequence may bring that many tokens; a sequence may also bring none, then it is merely slower.
  const int64_t capacity = s.tokens >= s.sequences - 1 + is_long ? expanded_rows(s) : 0;
  const int64_t splits = share_count(s, *kernels.split, call.device().processors);
  const int64_t shortest = kSmallestShare * kernels.split->constants[mla_split::BN];
  GpuArguments rotate, absorb, split, combine, expand, prefill;
  rotate.pointer(m.q).pointer(m.latent).pointer(m.positions).pointer(m.query_start).pointer(m.block_table)
      .pointer(m.cache).pointer(parts.qa).numbers(attributes.inv_freq, attributes.inv_freq_count)
      .integer(s.sequences).integer(s.blocks_per_sequence);
  call.launch(kernels.rotate, s.tokens, 1, 1, rotate);
  absorb.pointer(m.q).pointer(m.kv_b).pointer(m.query_start).pointer(parts.qa).integer(s.sequences).integer(s.tokens);
  call.launch(kernels.absorb, ceil_div(s.tokens, kernels.absorb->constants[mla_absorb::BM]), s.heads,
              ceil_div(s.rank, kernels.absorb->constants[mla_absorb::BR]), absorb);
  split.pointer(parts.qa).pointer(m.cache).pointer(m.positions).pointer(m.query_start).pointer(m.block_table)
      .pointer(parts.part).pointer(parts.lse).integer(s.sequences).integer(s.blocks_per_sequence)
      .number(attributes.softmax_scale).integer(splits).integer(shortest).integer(capacity);
  call.launch(kernels.split, ceil_div(s.heads, kernels.split->constants[mla_split::BH]), splits, s.tokens, split);
  combine.pointer(parts.part).pointer(parts.lse).pointer(m.kv_b).pointer(m.query_start).pointer(m.out)
      .integer(s.sequences).integer(splits);
  call.launch(kernels.combine, s.heads, ceil_div(s.tokens, kernels.combine->constants[mla_combine::BT]), 1, combine);
  if (capacity == 0) return;
  const int64_t tiles = ceil_div(capacity, kernels.expand->constants[mla_expand::BM]) + s.tokens / is_long;
  const int64_t lanes = std::clamp<int64_t>(ceil_div(4 * call.device().processors, s.heads), 1, tiles);
  expand.pointer(m.cache).pointer(m.kv_b).pointer(m.positions).pointer(m.query_start).pointer(m.block_table)
      .pointer(parts.kv).integer(s.sequences).integer(s.blocks_per_sequence).integer(lanes).integer(capacity);
  call.launch(kernels.expand, lanes, s.heads, 1, expand);
  prefill.pointer(m.q).pointer(parts.qa).pointer(parts.kv).pointer(m.cache).pointer(m.positions)
      .pointer(m.query_start).pointer(m.block_table).pointer(m.out).integer(s.sequences)
      .integer(s.blocks_per_sequence).number(attributes.softmax_scale).integer(capacity);
  call.launch(kernels.prefill,
              ceil_div(s.tokens, kernels.prefill->constants[mla_prefill::BM]) + s.tokens / is_long, s.heads, 1,
              prefill);
}

size_t bytes_of(const k25_tensor& tensor) {
  size_t bytes = tensor.dtype == K25_FLOAT32 ? 4 : 2;
  for (int32_t axis = 0; axis < tensor.rank; ++axis) bytes *= static_cast<size_t>(tensor.dims[axis]);
  return bytes;
}

}  // namespace
}  // namespace k25

using namespace k25;

extern "C" {

k25_status k25_mla_gpu_workspace(const k25_tensor inputs[7], const k25_mla_attributes* attributes, size_t* bytes,
                                 k25_message message) {
  k25_tensor wanted[2];
  *bytes = 0;
  k25_status status = k25_mla_outputs(inputs, attributes, wanted, message);
  if (status == K25_OK) status = check_gpu_kernels(kMLA, message);
  if (status == K25_OK) *bytes = parts_of(sizes_of(inputs, *attributes), nullptr).bytes;
  return status;
}

k25_status k25_mla_gpu(const k25_tensor inputs[7], const k25_mla_attributes* attributes, const k25_tensor outputs[2],
                       void* workspace, void* stream, k25_message message) {
  k25_tensor wanted[2];
  const k25_status status = k25_mla_outputs(inputs, attributes, wanted, message);
  if (status != K25_OK) return status;
  GpuCall call(kMLA, stream, message);
  check_addresses(call, kMLA, inputs, outputs, workspace);
  if (!call.is_good()) return call.status();
  const Sizes sizes = sizes_of(inputs, *attributes);
  const Kernels kernels = choose(call, sizes);
  if (!call.is_good()) return call.status();
  if (outputs[1].data != inputs[2].data) call.copy(outputs[1].data, inputs[2].data, bytes_of(inputs[2]));
  const Memory memory = {inputs[0].data, inputs[1].data, inputs[3].data,  inputs[4].data,
                         inputs[5].data, inputs[6].data, outputs[1].data, outputs[0].data};
  attend(call, kernels, sizes, *attributes, memory, parts_of(sizes, workspace));
  return call.status();
}

}  // extern "C"

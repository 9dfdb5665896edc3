// k25.MoEDispatch on a GPU: which kernels of gpu.py run, on which grids, over which workspace.
#include <algorithm>

#include "gpu_kernels.h"

namespace k25 {
namespace {

// Tokens of one pass: what lies between the two products of a pass is in the workspace.
constexpr int64_t kPassTokens = 4096;
constexpr int64_t kGroup = 32;
constexpr int64_t kMostLanes = 16;

struct Sizes {
  int64_t tokens, hidden, k, experts, intermediate;
  int32_t dtype;
  int64_t element_bytes() const { return dtype == K25_FLOAT32 ? 4 : 2; }
  int64_t pairs() const { return tokens * k; }
};

Sizes sizes_of(const k25_tensor* inputs, const k25_moe_dispatch_attributes& attributes) {
  return {inputs[0].dims[0], inputs[0].dims[1],           inputs[1].dims[1],
          inputs[5].dims[0], attributes.intermediate_size, inputs[0].dtype};
}

// The longest block of columns of any kernel in this build: rows are whole blocks.
int64_t longest_block() {
  int count = 0;
  const GpuKernel* kernels = gpu_kernels(&count);
  int64_t longest = 1;
  for (int index = 0; index < count; ++index) {
    if (kernels[index].kind == kGpu_moe_dispatch_gate_up) {
      longest = std::max<int64_t>({longest, kernels[index].constants[moe_dispatch_gate_up::BK],
                                   kernels[index].constants[moe_dispatch_gate_up::H_BK]});
    }
  }
  return longest;
}

struct Parts {
  void *permuted, *h, *partial, *order, *start, *count, *active;
  size_t bytes;
};

Parts parts_of(const Sizes& sizes, void* workspace) {
  GpuWorkspace memory(workspace);
  const int64_t block = longest_block();
  const int64_t tokens = std::min(sizes.tokens, kPassTokens), pairs = tokens * sizes.k;
  Parts parts;
  parts.permuted = memory.take(tokens * ceil_div(sizes.hidden, block) * block * sizes.element_bytes());
  parts.h = memory.take(pairs * ceil_div(sizes.intermediate, block) * block * sizes.element_bytes());
  parts.partial = memory.take(pairs * sizes.hidden * 4);
  parts.order = memory.take(pairs * 4);
  parts.start = memory.take(sizes.experts * 4);
  parts.count = memory.take(sizes.experts * 4);
  parts.active = memory.take((sizes.experts + 1) * 4);
  parts.bytes = memory.bytes();
  return parts;
}

GpuWish wish_for(GpuKernelKind kind, const Sizes& sizes) {
  GpuWish wish;
  wish.kind = kind;
  wish.dtype = sizes.dtype;
  wish.tokens = sizes.tokens;
  return wish;
}

struct Kernels {
  const GpuKernel *permute, *route, *gate_up, *down, *combine;
  bool is_pairs;
};

// One program for few pairs, else one for each expert. `gate_up` and `down` of pairs need no routing.
const GpuKernel* choose_route(GpuCall& call, const Sizes& s) {
  using namespace moe_dispatch_route_small;
  const GpuKernel* small = choose_gpu_kernel(
      call.device(), wish_for(kGpu_moe_dispatch_route_small, s).at_least(P, s.pairs()).at_least(E, s.experts));
  return small != nullptr ? small : call.choose(wish_for(kGpu_moe_dispatch_route_large, s));
}

Kernels choose(GpuCall& call, const Sizes& s) {
  Kernels kernels = {};
  const bool is_even = gpu_rows_are_even();
  {
    using namespace moe_dispatch_gate_up;
    GpuWish wish = wish_for(kGpu_moe_dispatch_gate_up, s);
    wish.with(K_EXPERTS, s.k).with(H, s.hidden).with(INTER, s.intermediate);
    kernels.gate_up = call.choose(is_even ? wish : wish.with(ALIGNED, 0));
  }
  if (!call.is_good()) return kernels;
  const int32_t* chosen = kernels.gate_up->constants;
  kernels.is_pairs = chosen[moe_dispatch_gate_up::PAIRS] != 0;
  {
    using namespace moe_dispatch_down;
    GpuWish wish = wish_for(kGpu_moe_dispatch_down, s);
    wish.with(H, s.hidden).with(INTER, s.intermediate).with(PAIRS, chosen[moe_dispatch_gate_up::PAIRS])
        .with(BK, chosen[moe_dispatch_gate_up::H_BK]);
    kernels.down = call.choose(is_even ? wish : wish.with(ALIGNED, 0));
  }
  {
    using namespace moe_dispatch_permute_x;
    kernels.permute = call.choose(
        wish_for(kGpu_moe_dispatch_permute_x, s).with(H, s.hidden).with(BK, chosen[moe_dispatch_gate_up::BK]));
  }
  {
    using namespace moe_dispatch_combine;
    kernels.combine =
        call.choose(wish_for(kGpu_moe_dispatch_combine, s).with(K_EXPERTS, s.k).with(H, s.hidden));
  }
  kernels.route = kernels.is_pairs ? nullptr : choose_route(call, s);
  return kernels;
}

// Programs that share an expert's tokens: twice what uniform routing needs; each goes on until all are done.
int64_t lane_count(const Sizes& s, int64_t tile) {
  return std::clamp<int64_t>(ceil_div(2 * ceil_div(s.pairs(), s.experts), tile), 1, kMostLanes);
}

struct Memory {
  const char *x, *ids, *weights;
  const void *words, *scales, *table;
  char* y;
};

void run_pass(GpuCall& call, const Kernels& kernels, const Sizes& s, const Memory& m, const Parts& parts) {
  const GpuKernel& gate = *kernels.gate_up;
  const int64_t block = gate.constants[moe_dispatch_gate_up::BK];
  const int64_t wide = ceil_div(s.hidden, block) * block;
  GpuArguments permute, route, gate_up, down, combine;
  permute.pointer(m.x).pointer(parts.permuted);
  call.launch(kernels.permute, s.tokens,
              ceil_div(wide, kernels.permute->constants[moe_dispatch_permute_x::BLOCK]), 1, permute);
  int64_t slots = s.pairs();
  if (!kernels.is_pairs) {
    slots = std::min(s.pairs(), s.experts);
    const bool is_large = kernels.route->kind == kGpu_moe_dispatch_route_large;
    if (is_large) slots = s.experts;  // its list of active experts is all of them
    route.pointer(m.ids).pointer(m.table).pointer(parts.order).pointer(parts.start).pointer(parts.count)
        .pointer(parts.active).integer(s.pairs()).integer(s.experts);
    call.launch(kernels.route, is_large ? s.experts : 1, 1, 1, route);
  }
  const auto lists = [&](GpuArguments& arguments) -> GpuArguments& {
    return arguments.pointer(m.table).pointer(m.ids).pointer(parts.order).pointer(parts.start).pointer(parts.count)
        .pointer(parts.active);
  };
  const auto lanes_of = [&](int64_t tile) { return kernels.is_pairs ? 1 : lane_count(s, tile); };
  const int64_t gate_lanes = lanes_of(gate.constants[moe_dispatch_gate_up::BM]);
  lists(gate_up.pointer(parts.permuted).pointer(m.words).pointer(m.scales))
      .pointer(parts.h).integer(s.pairs()).integer(s.experts).integer(gate_lanes);
  call.launch(&gate, gate_lanes, ceil_div(s.intermediate, gate.constants[moe_dispatch_gate_up::BN]), slots, gate_up);
  const int64_t down_lanes = lanes_of(kernels.down->constants[moe_dispatch_down::BM]);
  lists(down.pointer(parts.h).pointer(m.words).pointer(m.scales))
      .pointer(parts.partial).integer(s.pairs()).integer(s.experts).integer(down_lanes);
  call.launch(kernels.down, down_lanes, ceil_div(s.hidden, kernels.down->constants[moe_dispatch_down::BN]), slots,
              down);
  combine.pointer(parts.partial).pointer(m.ids).pointer(m.weights).pointer(m.table).pointer(m.y).integer(s.experts);
  call.launch(kernels.combine, s.tokens, ceil_div(s.hidden, kernels.combine->constants[moe_dispatch_combine::BLOCK]),
              1, combine);
}

k25_status check_group(const k25_moe_dispatch_attributes& attributes, k25_message message) {
  if (attributes.group_size == kGroup) return K25_OK;
  return fail(K25_UNAVAILABLE, message, "k25.MoEDispatch: GPU kernels take group_size %lld, found %lld",
              static_cast<long long>(kGroup), static_cast<long long>(attributes.group_size));
}

}  // namespace
}  // namespace k25

using namespace k25;

extern "C" {

k25_status k25_moe_dispatch_gpu_workspace(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                          size_t* bytes, k25_message message) {
  k25_tensor wanted[1];
  *bytes = 0;
  k25_status status = k25_moe_dispatch_outputs(inputs, attributes, wanted, message);
  if (status == K25_OK) status = check_gpu_kernels(kMoEDispatch, message);
  if (status == K25_OK) status = check_group(*attributes, message);
  if (status == K25_OK) *bytes = parts_of(sizes_of(inputs, *attributes), nullptr).bytes;
  return status;
}

k25_status k25_moe_dispatch_gpu(const k25_tensor inputs[6], const k25_moe_dispatch_attributes* attributes,
                                const k25_tensor outputs[1], void* workspace, void* stream, k25_message message) {
  k25_tensor wanted[1];
  k25_status status = k25_moe_dispatch_outputs(inputs, attributes, wanted, message);
  if (status == K25_OK) status = check_gpu_kernels(kMoEDispatch, message);
  if (status == K25_OK) status = check_group(*attributes, message);
  if (status != K25_OK) return status;
  GpuCall call(kMoEDispatch, stream, message);
  check_addresses(call, kMoEDispatch, inputs, outputs, workspace);
  Sizes sizes = sizes_of(inputs, *attributes);
  const Parts parts = parts_of(sizes, workspace);
  const int64_t row = sizes.hidden * sizes.element_bytes();
  for (int64_t first = 0, tokens = sizes.tokens; first < tokens && call.is_good(); first += kPassTokens) {
    sizes.tokens = std::min(tokens - first, kPassTokens);
    const Kernels kernels = choose(call, sizes);
    if (!call.is_good()) break;
    const Memory memory = {static_cast<const char*>(inputs[0].data) + first * row,
                           static_cast<const char*>(inputs[1].data) + first * sizes.k * 4,
                           static_cast<const char*>(inputs[2].data) + first * sizes.k * 4,
                           inputs[3].data,
                           inputs[4].data,
                           inputs[5].data,
                           static_cast<char*>(outputs[0].data) + first * row};
    run_pass(call, kernels, sizes, memory, parts);
  }
  return call.status();
}

}  // extern "C"

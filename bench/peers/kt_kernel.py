"""kt-kernel's INT4 expert layer (AMXInt4_KGroup_MOE) at K2.5's real shape, as a peer of bench/native_ops.py.

    python3 -m venv PEER; PEER/bin/pip install torch gguf; PEER/bin/pip install --no-deps kt-kernel==0.7.2
    .venv/bin/python bench/native_ops.py --peer PEER/bin/python

Reads a number of tokens from each line of standard input and answers `seconds S`. Experts, sizes and the choice of
experts are those of native_ops.py; loading (which repacks the weights) is not timed.
"""

from __future__ import annotations

import sys
import time

import torch
from kt_kernel import kt_kernel_ext as kt

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, GROUP = 7168, 2048, 16, 8, 32
MOST_TOKENS = 1024


def main(threads: int) -> None:
    """Load the experts, then answer lines."""
    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = kt.CPUInfer(pool)
    config = kt.moe.MOEConfig(EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, 0)
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, MOST_TOKENS
    kept = []

    def pointers(tensor: torch.Tensor) -> list[list[int]]:
        kept.append(tensor)
        return [[tensor[expert].data_ptr() for expert in range(EXPERTS)]]

    def words(out: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (1, out, columns // 2), dtype=torch.uint8).expand(EXPERTS, -1, -1).contiguous()

    def scales(out: int, columns: int) -> torch.Tensor:
        return torch.full((EXPERTS, out, columns // GROUP), 2**-7, dtype=torch.bfloat16)

    config.gate_projs, config.gate_scales = (pointers(make(INTERMEDIATE, HIDDEN)) for make in (words, scales))
    config.up_projs, config.up_scales = (pointers(make(INTERMEDIATE, HIDDEN)) for make in (words, scales))
    config.down_projs, config.down_scales = (pointers(make(HIDDEN, INTERMEDIATE)) for make in (words, scales))
    config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, GROUP, False
    layer = kt.moe.AMXInt4_KGroup_MOE(config)
    order = torch.arange(EXPERTS, dtype=torch.int64)
    cpu.submit(layer.load_weights_task(order.data_ptr()))
    cpu.sync()
    print("ready 1", flush=True)
    calls = 0
    for line in sys.stdin:
        tokens, calls = int(line), calls + 1
        count = torch.tensor([tokens], dtype=torch.int32)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
        if tokens == 1:
            ids = (torch.arange(TOP_K) + calls % 2 * TOP_K)[None] % EXPERTS
        ids = ids.to(torch.int64).contiguous()
        weights = torch.full((tokens, TOP_K), 0.1)
        x = torch.randn(tokens, HIDDEN).bfloat16()
        y = torch.empty_like(x)
        started = time.perf_counter()
        task = layer.forward_task(
            count.data_ptr(), TOP_K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr(), False
        )
        cpu.submit(task)
        cpu.sync()
        print(f"seconds {time.perf_counter() - started:.9f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)

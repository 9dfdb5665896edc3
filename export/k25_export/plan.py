"""What it takes to run a model: memory of each GPU, longest context, bandwidth-bound tokens a second.

Pure arithmetic on the configuration; formulas, their reasons and figures worked out by hand are in docs/plan.md.
Shorthand: H hidden, G GPUs, T tokens of a step, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

from k25_export.config import ModelConfig
from k25_export.gpus import Gpu
from k25_export.weight_shares import Attention, WeightShare, bytes_read, hit_share, weight_shares
from k25_plugins.errors import mismatch

CacheDtype = Literal["bf16", "fp32"]
CACHE_ITEM_SIZES: Mapping[CacheDtype, int] = MappingProxyType({"bf16": 2, "fp32": 4})
FLOAT32_BYTES = 4
#: The number of GPUs that a plan looks up to.
MOST_GPUS = 1024
#: More tokens or sequences than this are a slip of the keyboard.
LARGEST_COUNT = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where the model is to run, and what is assumed about it. Bytes are per GPU, `context` is tokens a sequence.

    Raises `InputError` for a value that makes no sense.
    """

    gpu: Gpu
    gpus: int = 1
    context: int
    sequences: int = 1
    attention: Attention = "heads"
    cache_dtype: CacheDtype = "bf16"
    block_size: int = 32
    max_batch_tokens: int = 8192
    cuda_context_bytes: int = 1 << 30
    reserve_bytes: int = 2 << 30
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        for key in ("gpus", "context", "sequences", "block_size", "max_batch_tokens"):
            value = getattr(self, key)
            _require(1 <= value <= LARGEST_COUNT, key, f"1 to {LARGEST_COUNT:,}", value)
        for key in ("cuda_context_bytes", "reserve_bytes"):
            _require(getattr(self, key) >= 0, key, "at least 0 bytes", getattr(self, key))
        _require(self.gpus <= MOST_GPUS, "gpus", f"at most {MOST_GPUS}", self.gpus)
        _require(not self.gpu.is_cpu or self.gpus == 1, "gpus", "1 for a CPU", self.gpus)
        _require(self.gpu.memory_bytes >= 1, "gpu memory", "at least 1 byte", self.gpu.memory_bytes)
        _require(self.gpu.bandwidth >= 1, "gpu bandwidth", "at least 1 byte/s", self.gpu.bandwidth)
        _require(self.attention in get_args(Attention), "attention", "heads or sequences", self.attention)
        _require(self.cache_dtype in CACHE_ITEM_SIZES, "cache dtype", "bf16 or fp32", self.cache_dtype)
        _require(0.001 <= self.efficiency <= 1, "efficiency", "0.001 to 1", self.efficiency)
        if self.sequences > self.max_batch_tokens:
            raise mismatch(
                "plan: sequences",
                expected=f"at most max_batch_tokens {self.max_batch_tokens:,} (one token each in a decode step)",
                found=f"{self.sequences:,}",
                hint="Raise --max-batch-tokens.",
            )


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on the busiest GPU. `free` is negative where they do not fit."""

    weights: int
    cache: int
    workspace: int
    cuda_context: int
    reserve: int
    needed: int
    available: int
    free: int


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """One token for each of `sequences`, every one with the whole context in the cache: an upper bound.

    Bytes are what the busiest GPU reads in a step; `experts_hit` is the expected number of its experts that a layer
    reads.
    """

    sequences: int
    experts_hit: float
    weight_bytes: int
    cache_bytes: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer. Bytes are exact integers, `per GPU` means the busiest one.

    `longest_context` is for the sequences of the deployment (0: not even one block), `most_sequences` for its context
    (at most its `max_batch_tokens`), `fewest_gpus` for both (None: no number of such GPUs).
    """

    deployment: Deployment
    max_position_embeddings: int
    weights: tuple[WeightShare, ...]
    weight_bytes: int
    cache_bytes_per_token: int
    memory: GpuMemory
    fits: bool
    longest_context: int
    longest_context_limit: Literal["memory", "max_position_embeddings"]
    most_sequences: int
    fewest_gpus: int | None
    decode: tuple[DecodeSpeed, ...]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]


def plan_from_config(config: ModelConfig, deployment: Deployment) -> Plan:
    """Work out the plan. Raises `InputError` for a context that the model has no positions for."""
    positions = config.text.max_position_embeddings
    if deployment.context > positions:
        raise mismatch(
            "context",
            expected=f"at most max_position_embeddings {positions:,}, the positions that the model has",
            found=f"{deployment.context:,}",
        )
    shares = weight_shares(config, gpus=deployment.gpus, attention=deployment.attention)
    memory = _memory(config, shares, deployment)
    longest = _longest_context(config, shares, deployment)
    batches = dict.fromkeys((1, deployment.sequences))
    return Plan(
        deployment=deployment,
        max_position_embeddings=positions,
        weights=shares,
        weight_bytes=sum(share.total_bytes for share in shares),
        cache_bytes_per_token=cache_bytes_per_token(config, deployment.cache_dtype),
        memory=memory,
        fits=memory.free >= 0,
        longest_context=longest,
        longest_context_limit="max_position_embeddings" if longest == positions else "memory",
        most_sequences=_most_sequences(config, shares, deployment),
        fewest_gpus=_fewest_gpus(config, deployment),
        decode=tuple(_decode_speed(config, shares, deployment, batch) for batch in batches),
        assumptions=tuple(_assumptions(config, deployment)),
        notes=tuple(_notes(config, shares, deployment, longest)),
    )


def cache_bytes_per_token(config: ModelConfig, dtype: CacheDtype = "bf16") -> int:
    """Bytes of the latent cache for a token of all layers: the normed latent and the rotated key of each."""
    return config.text.num_hidden_layers * config.text.cache_dim * CACHE_ITEM_SIZES[dtype]


def workspace_bytes(config: ModelConfig, deployment: Deployment) -> int:
    """Activations of the busiest GPU: the largest phase of a layer for T tokens, and the logits of S rows.

    Attention is counted in its absorbed form, where nothing grows with the context; a token's experts may all lie on
    one GPU, so their buffers are sized for that.
    """
    text, gpus = config.text, deployment.gpus
    item = 4 if deployment.gpu.is_cpu else 2
    heads = -(-text.num_attention_heads // gpus) if deployment.attention == "heads" else text.num_attention_heads
    query = text.qk_nope_head_dim + text.qk_rope_head_dim
    per_head = query + text.cache_dim + text.kv_lora_rank + text.v_head_dim
    attention = item * (text.q_lora_rank + text.cache_dim + heads * per_head)
    dense = item * 2 * -(-text.intermediate_size // gpus) if text.dense_layers else 0
    pairs = min(text.num_experts_per_tok, -(-text.n_routed_experts // gpus))
    shared_width = -(-text.moe_intermediate_size * text.n_shared_experts // gpus)
    routed = pairs * (item * 2 * text.moe_intermediate_size + FLOAT32_BYTES * text.hidden_size)
    experts = routed + item * 2 * shared_width + FLOAT32_BYTES * text.n_routed_experts if text.moe_layers else 0
    stream = item * 3 * text.hidden_size
    logits = deployment.sequences * text.vocab_size * FLOAT32_BYTES
    return deployment.max_batch_tokens * (stream + max(attention, dense, experts)) + logits


def _require(holds: bool, what: str, expected: str, found: object) -> None:
    if not holds:
        raise mismatch(f"plan: {what}", expected=expected, found=found)


def _memory(config: ModelConfig, shares: tuple[WeightShare, ...], deployment: Deployment) -> GpuMemory:
    blocks = -(-deployment.context // deployment.block_size)
    rows = _sequences_on_a_gpu(deployment, deployment.sequences) * blocks * deployment.block_size
    weights = sum(share.gpu_bytes for share in shares)
    cache = rows * cache_bytes_per_token(config, deployment.cache_dtype)
    workspace = workspace_bytes(config, deployment)
    needed = weights + cache + workspace + deployment.cuda_context_bytes + deployment.reserve_bytes
    return GpuMemory(
        weights=weights,
        cache=cache,
        workspace=workspace,
        cuda_context=deployment.cuda_context_bytes,
        reserve=deployment.reserve_bytes,
        needed=needed,
        available=deployment.gpu.memory_bytes,
        free=deployment.gpu.memory_bytes - needed,
    )


def _sequences_on_a_gpu(deployment: Deployment, sequences: int) -> int:
    """Sequences whose cache the busiest GPU holds."""
    return sequences if deployment.attention == "heads" else -(-sequences // deployment.gpus)


def _longest_context(config: ModelConfig, shares: tuple[WeightShare, ...], deployment: Deployment) -> int:
    positions, block = config.text.max_position_embeddings, deployment.block_size
    blocks = _largest(
        -(-positions // block),
        lambda count: _memory(config, shares, replace(deployment, context=count * block)).free >= 0,
    )
    return min(blocks * block, positions)


def _most_sequences(config: ModelConfig, shares: tuple[WeightShare, ...], deployment: Deployment) -> int:
    return _largest(
        deployment.max_batch_tokens,
        lambda count: _memory(config, shares, replace(deployment, sequences=count)).free >= 0,
    )


def _fewest_gpus(config: ModelConfig, deployment: Deployment) -> int | None:
    def too_few(gpus: int) -> bool:
        shares = weight_shares(config, gpus=gpus, attention=deployment.attention)
        return _memory(config, shares, replace(deployment, gpus=gpus)).free < 0

    most = 1 if deployment.gpu.is_cpu else MOST_GPUS
    count = _largest(most, too_few)
    return count + 1 if count < most else None


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1..limit for which `holds`, 0 if none; what holds for a number holds for the smaller ones."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _decode_speed(
    config: ModelConfig, shares: tuple[WeightShare, ...], deployment: Deployment, sequences: int
) -> DecodeSpeed:
    weight_bytes = bytes_read(config, shares, sequences)
    rows = _sequences_on_a_gpu(deployment, sequences) * deployment.context
    cache_bytes = rows * cache_bytes_per_token(config, deployment.cache_dtype)
    seconds = (weight_bytes + cache_bytes) / (deployment.gpu.bandwidth * deployment.efficiency)
    held = -(-config.text.n_routed_experts // deployment.gpus) if config.text.moe_layers else 0
    return DecodeSpeed(
        sequences=sequences,
        experts_hit=held * hit_share(config, sequences),
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        seconds=seconds,
        tokens_per_second=sequences / seconds,
    )


def _assumptions(config: ModelConfig, deployment: Deployment) -> list[str]:
    """What the figures rest on, a sentence each."""
    gpu, text = deployment.gpu, config.text
    routing = f"each token picks {text.num_experts_per_tok} of {text.n_routed_experts} experts, all equally likely"
    sharded = []
    if deployment.gpus > 1:
        routing += ", and hits are spread evenly over the GPUs, which flatters small batches"
        sharded = [
            "experts, attention heads, MLP columns and vocabulary rows are shared out, rounded up, and the busiest GPU "
            "is counted; latent projections, norms, router and vision are whole on every GPU",
            "every GPU has some of the heads and, since all heads share the latent cache, a whole copy of it",
        ]
        if deployment.attention == "sequences":
            sharded = [
                "experts, MLP columns and vocabulary rows are shared out, rounded up, and the busiest GPU is counted; "
                "attention, norms, router and vision are whole on every GPU",
                "every GPU has the latent cache of its own sequences only",
            ]
    return [
        f"{'CPU' if gpu.is_cpu else 'GPU'} memory {_shown(gpu.memory_bytes)}, bandwidth {_shown(gpu.bandwidth)}/s: "
        f"{gpu.source}",
        "weights stay as stored: INT4 codes with bf16 scales, the rest bf16",
        *sharded,
        f"latent cache in {deployment.cache_dtype}, in blocks of {deployment.block_size:,} tokens",
        f"workspace for steps of up to {deployment.max_batch_tokens:,} tokens and a row of logits for each sequence; "
        "an image is encoded in the same workspace",
        f"CUDA context and libraries {_shown(deployment.cuda_context_bytes)}, reserve for fragmentation "
        f"{_shown(deployment.reserve_bytes)}: assumed, not measured",
        f"tokens/s is an upper bound: each byte is read once a step, at {100 * deployment.efficiency:g} % of the "
        "bandwidth; communication, launches, arithmetic and activations cost nothing",
        f"every sequence has {deployment.context:,} tokens in the cache",
        routing,
    ]


def _notes(config: ModelConfig, shares: tuple[WeightShare, ...], deployment: Deployment, longest: int) -> list[str]:
    """What is uneven or binds in this deployment, a sentence each."""
    text, gpus = config.text, deployment.gpus
    notes = []
    parts = [("experts a layer", text.n_routed_experts if text.moe_layers else 0)]
    if deployment.attention == "heads":
        parts.append(("attention heads", text.num_attention_heads))
    else:
        parts.append(("sequences", deployment.sequences))
    for what, count in parts:
        if count % gpus:
            most = -(-count // gpus)
            rest = " and some have none" if count < gpus else ""
            notes.append(f"{count} {what} do not divide by {gpus} GPUs: the busiest has {most}{rest}")
    if longest == text.max_position_embeddings:
        notes.append(f"the model's {longest:,} positions bound the context, not the memory")
    reported = deployment.gpu.reported_bytes
    if reported is not None:
        real = replace(deployment, gpu=replace(deployment.gpu, memory_bytes=reported))
        real_longest = _longest_context(config, shares, real)
        real_fits = _memory(config, shares, real).free >= 0
        if real_longest != longest or real_fits != (_memory(config, shares, deployment).free >= 0):
            notes.append(
                f"drivers report more than the data sheet says: with --gpu-memory {reported >> 20}MiB this "
                f"{'fits' if real_fits else 'does not fit'}, the longest context is {real_longest:,} tokens"
            )
    return notes


def _shown(count: int) -> str:
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,} B"

"""How many bytes of each kind of weight the busiest of several GPUs holds, and what a decode step reads of them.

Everything follows from the configuration and the table of tensor patterns; docs/plan.md has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from k25_export.config import ModelConfig
from k25_export.manifest import STORED_ITEM_SIZES
from k25_export.tensor_patterns import TensorPattern, tensor_patterns

#: What a kind of weights is divided by: each GPU gets a whole number of these. "whole": every GPU has a copy.
Split = Literal["experts", "heads", "dense width", "shared width", "vocabulary", "whole"]
#: "hit": only the experts that a token of the step chose are read.
Read = Literal["never", "always", "hit"]
#: "heads": each GPU has some of the heads and a copy of the cache. "sequences": each GPU has all heads, and the
#: cache of some of the sequences.
Attention = Literal["heads", "sequences"]


@dataclass(frozen=True, kw_only=True)
class WeightShare:
    """One kind of weights: bytes in the checkpoint, bytes on the busiest GPU."""

    kind: str
    precision: str
    split: Split
    read: Read
    total_bytes: int
    gpu_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Tensors whose names hold one of `parts` are of this kind."""

    kind: str
    parts: tuple[str, ...]
    split: Split
    read: Read = "always"


_VISION = _Rule(kind="vision", parts=(), split="whole", read="never")

#: The first rule that fits counts.
_TEXT_RULES = (
    _Rule(kind="routed experts, codes", parts=(".weight_packed",), split="experts", read="hit"),
    _Rule(kind="routed experts, scales", parts=(".weight_scale",), split="experts", read="hit"),
    _Rule(kind="routed experts, shapes", parts=(".weight_shape",), split="experts", read="never"),
    _Rule(kind="shared experts", parts=("mlp.shared_experts.",), split="shared width"),
    _Rule(kind="router", parts=("mlp.gate.",), split="whole"),
    _Rule(kind="dense MLP", parts=("mlp.",), split="dense width"),
    _Rule(kind="attention, by head", parts=("q_b_proj", "kv_b_proj", "o_proj"), split="heads"),
    _Rule(kind="attention, latent", parts=("q_a_proj", "kv_a_proj_with_mqa"), split="whole"),
    _Rule(kind="norms", parts=("norm",), split="whole"),
    # One row a token is read of the embedding: nothing beside the rest.
    _Rule(kind="embedding", parts=("embed_tokens",), split="vocabulary", read="never"),
    _Rule(kind="lm_head", parts=("lm_head",), split="vocabulary"),
)

_PRECISIONS: Mapping[str, str] = {"BF16": "bf16", "F32": "fp32", "I32": "int32"}


def weight_shares(config: ModelConfig, *, gpus: int, attention: Attention = "heads") -> tuple[WeightShare, ...]:
    """Every stored byte of the model, by kind and precision, in the order of the rules; vision last.

    A GPU gets ceil(units / gpus) of the experts, heads, columns or vocabulary rows; the busiest one is counted.
    """
    text = config.text
    units: dict[Split, int] = {
        "experts": text.n_routed_experts,
        "heads": text.num_attention_heads if attention == "heads" else 1,
        "dense width": text.intermediate_size,
        "shared width": text.moe_intermediate_size * text.n_shared_experts,
        "vocabulary": text.vocab_size,
        "whole": 1,
    }
    shares: dict[tuple[str, str], WeightShare] = {}
    for pattern in tensor_patterns(config):
        rule = _rule(pattern)
        precision = "INT4" if pattern.name.endswith(".weight_packed") else _PRECISIONS[pattern.dtypes[0]]
        empty = WeightShare(
            kind=rule.kind,
            precision=precision,
            split="whole" if units[rule.split] == 1 else rule.split,
            read=rule.read,
            total_bytes=0,
            gpu_bytes=0,
        )
        share = shares.setdefault((rule.kind, precision), empty)
        count = units[rule.split]
        stored = _stored_bytes(pattern)
        assert stored % count == 0, f"{pattern.name}: {stored} bytes in {count} parts"
        shares[rule.kind, precision] = replace(
            share,
            total_bytes=share.total_bytes + stored,
            gpu_bytes=share.gpu_bytes + stored // count * -(-count // gpus),
        )
    order = [rule.kind for rule in (*_TEXT_RULES, _VISION)]
    return tuple(sorted(shares.values(), key=lambda share: order.index(share.kind)))


def hit_share(config: ModelConfig, tokens: int) -> float:
    """The expected share of a layer's experts that a step of this many tokens reads, 0..1.

    Each token picks k of E experts, all equally likely and independent of the other tokens: 1 - (1 - k / E)^tokens.
    """
    text = config.text
    return float(1.0 - (1.0 - text.num_experts_per_tok / text.n_routed_experts) ** tokens)


def bytes_read(config: ModelConfig, shares: tuple[WeightShare, ...], tokens: int) -> int:
    """Bytes of weights that the busiest GPU reads in a decode step of this many tokens (an expectation, rounded)."""
    always = sum(share.gpu_bytes for share in shares if share.read == "always")
    routed = sum(share.gpu_bytes for share in shares if share.read == "hit")
    return always + round(routed * hit_share(config, tokens))


def _rule(pattern: TensorPattern) -> _Rule:
    if pattern.component == "vision":
        return _VISION
    return next(rule for rule in _TEXT_RULES if any(part in pattern.name for part in rule.parts))


def _stored_bytes(pattern: TensorPattern) -> int:
    tensors = max(len(pattern.indices), 1) * max(pattern.experts, 1)
    return tensors * math.prod(pattern.shape) * STORED_ITEM_SIZES[pattern.dtypes[0]]

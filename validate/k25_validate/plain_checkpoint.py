"""The plain reference's own reading of a checkpoint: `config.json`, the index, tensors by name. Shares no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# What these formulas take for granted; another value would be another model.
_ASSUMED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "attention_bias": False,
}


class PlainReferenceError(ValueError):
    """A configuration, a tensor or an argument that the formulas do not cover."""


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """The rotary scaling of the official `text_config`."""

    factor: float
    original_max_position_embeddings: int
    mscale_all_dim: float
    mscale: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """The keys of the official `text_config` that the shapes of the weights do not tell."""

    num_hidden_layers: int
    num_attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True


class CheckpointTensors:
    """Tensors by name, as stored and memory-mapped; shards are opened when first needed."""

    def __init__(self, checkpoint: Path) -> None:
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
        self._folder = checkpoint
        self._shard_of: Mapping[str, str] = index["weight_map"]
        self._shards: dict[str, Any] = {}

    def stored(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype; its pages are read when it is used. Raises `ValueError` if it is missing."""
        shard = self._shard_of.get(name)
        if shard is None:
            raise PlainReferenceError(
                f"{name}: expected in the weight_map of model.safetensors.index.json, found nothing"
            )
        if Path(shard).name != shard:
            raise PlainReferenceError(f"{name}: expected a plain file name as its shard, found {shard!r}")
        if shard not in self._shards:
            self._shards[shard] = safe_open(self._folder / shard, framework="pt")
        tensor: torch.Tensor = self._shards[shard].get_tensor(name)
        return tensor

    def shard_of(self, name: str) -> str:
        """The file that the index says holds the tensor, or "?"."""
        return self._shard_of.get(name, "?")

    def unmap(self) -> None:
        """Let go of the shards that are open, so that their pages do not add up over the layers."""
        self._shards.clear()


def config_from_file(path: Path) -> PlainConfig:
    """The configuration; `ValueError` for values that the formulas do not cover."""
    text: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["text_config"]
    for key, wanted in _ASSUMED.items():
        if text.get(key, wanted) != wanted:
            raise PlainReferenceError(f"config.json: text_config.{key}: expected {wanted!r}, found {text[key]!r}")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}  # the second is transformers 5's spelling
    kind = rope.get("type", rope.get("rope_type"))
    if kind != "yarn":
        raise PlainReferenceError(f"config.json: text_config.rope_scaling.type: expected 'yarn', found {kind!r}")
    yarn = Yarn(**_members(Yarn, rope))
    theta = text.get("rope_theta") or rope.get("rope_theta")
    return PlainConfig(**_members(PlainConfig, {**text, "rope_theta": theta, "yarn": yarn}))


def _members(kind: type[Yarn] | type[PlainConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields; `ValueError` names one that is neither given nor has a default."""
    found = {field.name: values[field.name] for field in fields(kind) if values.get(field.name) is not None}
    missing = [field.name for field in fields(kind) if field.name not in found and field.default is MISSING]
    if missing:
        raise PlainReferenceError(f"config.json: text_config: expected {', '.join(missing)}, found nothing")
    return found

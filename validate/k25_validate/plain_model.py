"""The Kimi K2.5 text model in plain PyTorch, written from its formulas.

This judges the exporter, so it shares no code with it, and computes attention in the expanded form (keys and values of
each head), where the exported graph uses the absorbed one. It prefers few ideas to speed: one weight in memory at a
time, one head at a time, one expert at a time.

Formulas: multi-head latent attention and the router of DeepSeek-V3 (arXiv 2412.19437, sections 2.1.1 and 2.1.2), YaRN
(arXiv 2309.00071, sections 3.2 and 3.4), RMSNorm (arXiv 1910.07467), compressed-tensors `pack-quantized` INT4.

Legend: T tokens, H hidden, N heads, D head width, R latent rank, P rotated channels, E experts, k experts per token,
V vocabulary, O rows and G quantisation groups of an expert's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from k25_validate.plain_checkpoint import (
    CheckpointTensors,
    PlainConfig,
    PlainReferenceError,
    Yarn,
    config_from_file,
)

#: Ids and weights [T, k] of the experts, and the scores [T, E] that the choice was made by.
Route = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Rotation = tuple[torch.Tensor, torch.Tensor]

_MODEL_PREFIX = "language_model.model."
_HEAD_ROWS = 8192  # rows of lm_head that are upcast at a time


class PlainModel:
    """Embedding, layers and head over a checkpoint folder; `dtype` (float32 or float64) is that of every step."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        dtype: torch.dtype,
        latent_norm_eps: float,
        on_route: Callable[[int, npt.NDArray[np.int64]], None] | None = None,
        on_value: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        """`on_value` is called with the name (modules as in the checkpoint) and value of each intermediate result."""
        if dtype not in (torch.float32, torch.float64):
            raise PlainReferenceError(f"dtype: expected torch.float32 or torch.float64, found {dtype}")
        self.dtype = dtype
        self._config = config_from_file(checkpoint / "config.json")
        self._tensors = CheckpointTensors(checkpoint)
        self._latent_norm_eps = latent_norm_eps
        self._on_route = on_route
        self._on_value = on_value
        self._inverse_frequencies_P = torch.tensor(yarn_inverse_frequencies(self._config), dtype=dtype)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self._config.num_hidden_layers

    def layer(self, layer: int, x_TH: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, Route | None]:
        """One decoder layer, [T, H] to [T, H], and the routing of an MoE layer. Shards are let go of at its end."""
        prefix = f"{_MODEL_PREFIX}layers.{layer}."
        x_TH = x_TH + self._attention(self._norm(x_TH, prefix + "input_layernorm"), prefix + "self_attn.", rotation)
        self._note(prefix + "attention_residual", x_TH)
        y_TH = self._norm(x_TH, prefix + "post_attention_layernorm")
        route = None
        if layer < self._config.first_k_dense_replace:
            x_TH = x_TH + self._mlp(y_TH, prefix + "mlp.")
        else:
            route = self._route(y_TH, prefix + "mlp.gate.")
            if self._on_route is not None:
                self._on_route(layer, route[0].numpy())
            routed_TH = self._experts(y_TH, route[0], route[1], prefix + "mlp.experts.")
            self._note(prefix + "mlp.experts", routed_TH)
            mixed_TH = routed_TH + self._mlp(y_TH, prefix + "mlp.shared_experts.")
            self._note(prefix + "mlp", mixed_TH)
            x_TH = x_TH + mixed_TH
        self._note(prefix + "hidden_out", x_TH)
        self._tensors.unmap()
        return x_TH, route

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of the last layer's output [T, H]."""
        logits_TV = self._head(self._norm(x_TH, _MODEL_PREFIX + "norm"))
        self._tensors.unmap()
        return logits_TV

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """The embedding [T, H]. Raises `ValueError` for no tokens, and for ids outside the vocabulary."""
        table_VH = self._tensors.stored(_MODEL_PREFIX + "embed_tokens.weight")
        if ids_T.numel() == 0:
            raise PlainReferenceError("token_ids: expected at least one token, found none")
        lowest, highest = int(ids_T.min()), int(ids_T.max())
        if lowest < 0 or highest >= len(table_VH):
            raise PlainReferenceError(f"token_ids: expected ids in 0..{len(table_VH) - 1}, found {lowest}..{highest}")
        return table_VH[ids_T].to(self.dtype)

    def rotation(self, tokens: int, first_position: int) -> Rotation:
        """cos and sin [T, P/2] of each position's angles, with YaRN's multiplier (1 where both mscales are equal)."""
        if first_position < 0:
            raise PlainReferenceError(f"first_position: expected 0 or more, found {first_position}")
        return self.rotation_at(torch.arange(first_position, first_position + tokens))

    def rotation_at(self, positions_T: torch.Tensor) -> Rotation:
        """The same at any positions."""
        angles = positions_T.to(self.dtype)[:, None] * self._inverse_frequencies_P
        yarn = self._config.yarn
        multiplier = attention_scaling(yarn, yarn.mscale) / attention_scaling(yarn, yarn.mscale_all_dim)
        return angles.cos() * multiplier, angles.sin() * multiplier

    def _attention(self, x_TH: torch.Tensor, prefix: str, rotation: Rotation) -> torch.Tensor:
        """Causal MLA in the expanded form, [T, H] to [T, H]."""
        config, tokens = self._config, len(x_TH)
        nope, heads, rank = config.qk_nope_head_dim, config.num_attention_heads, config.kv_lora_rank
        low_rank_q = self._linear(x_TH, prefix + "q_a_proj")
        low_rank_q = self._norm(low_rank_q, prefix + "q_a_layernorm", eps=self._latent_norm_eps)
        q_TND = self._linear(low_rank_q, prefix + "q_b_proj").view(tokens, heads, -1)
        compressed = self._linear(x_TH, prefix + "kv_a_proj_with_mqa")
        latent_TR = self._norm(compressed[:, :rank], prefix + "kv_a_layernorm", eps=self._latent_norm_eps)
        key_TP = rotate(compressed[:, rank:], *rotation)
        self._note(prefix + "compressed", compressed[:, :rank])
        self._note(prefix + "k_rope", compressed[:, rank:])
        self._note(prefix + "latent", torch.cat([latent_TR, compressed[:, rank:]], dim=-1))
        self._note(prefix + "cache_rows", torch.cat([latent_TR, key_TP], dim=-1))
        scale = attention_scaling(config.yarn, config.yarn.mscale_all_dim) ** 2 / math.sqrt(q_TND.shape[-1])
        future_TT = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        up_NDR = self._weight(prefix + "kv_b_proj.weight").view(heads, -1, rank)
        out_TND = torch.empty(tokens, heads, config.v_head_dim, dtype=self.dtype)
        for head in range(heads):
            keys_TD = torch.cat([latent_TR @ up_NDR[head, :nope].T, key_TP], dim=-1)
            values_TD = latent_TR @ up_NDR[head, nope:].T
            query_TD = torch.cat([q_TND[:, head, :nope], rotate(q_TND[:, head, nope:], *rotation)], dim=-1)
            scores_TT = (query_TD @ keys_TD.T * scale).masked_fill_(future_TT, -math.inf)
            out_TND[:, head] = scores_TT.softmax(dim=-1) @ values_TD
        self._note(prefix + "attended", out_TND.flatten(1))
        return self._linear(out_TND.flatten(1), prefix + "o_proj")

    def queries_and_rows(self, layer: int, x_TH: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled absorbed queries [T, N, R + P] and cache rows [T, R + P] of a layer: their products are the scores.

        The model itself computes attention in another form; this is for choosing what a cache holds.
        """
        config, prefix = self._config, f"{_MODEL_PREFIX}layers.{layer}."
        nope, heads, rank = config.qk_nope_head_dim, config.num_attention_heads, config.kv_lora_rank
        y_TH = self._norm(x_TH, prefix + "input_layernorm")
        prefix += "self_attn."
        low_rank = self._norm(
            self._linear(y_TH, prefix + "q_a_proj"), prefix + "q_a_layernorm", eps=self._latent_norm_eps
        )
        q_TND = self._linear(low_rank, prefix + "q_b_proj").view(len(x_TH), heads, -1)
        up_NDR = self._weight(prefix + "kv_b_proj.weight").view(heads, -1, rank)
        absorbed_TNR = torch.einsum("tnd,ndr->tnr", q_TND[..., :nope], up_NDR[:, :nope])
        rotated = torch.stack([rotate(q_TND[:, head, nope:], *rotation) for head in range(heads)], dim=1)
        scale = attention_scaling(config.yarn, config.yarn.mscale_all_dim) ** 2 / math.sqrt(q_TND.shape[-1])
        compressed = self._linear(y_TH, prefix + "kv_a_proj_with_mqa")
        latent_TR = self._norm(compressed[:, :rank], prefix + "kv_a_layernorm", eps=self._latent_norm_eps)
        rows = torch.cat([latent_TR, rotate(compressed[:, rank:], *rotation)], dim=-1)
        self._tensors.unmap()
        return torch.cat([absorbed_TNR, rotated], dim=-1) * scale, rows

    def _route(self, x_TH: torch.Tensor, prefix: str) -> Route:
        """Ids (best first) and weights [T, k] of the experts, and the scores [T, E] that the choice was made by.

        The bias takes part in the choice only.
        """
        logits_TE = F.linear(x_TH, self._weight(prefix + "weight"))
        stages = router_stages(self._config, logits_TE, self._weight(prefix + "e_score_correction_bias"))
        self._note(prefix + "logits", logits_TE)
        self._note(prefix + "ids", stages["ids"])
        self._note(prefix + "weights", stages["weights"])
        return stages["ids"], stages["weights"], stages["biased"]

    def _experts(self, x_TH: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor, prefix: str) -> torch.Tensor:
        """The weighted sum of the chosen experts, [T, H]; only experts that are hit are read."""
        y_TH = torch.zeros_like(x_TH)
        for expert in sorted(set(ids_Tk.flatten().tolist())):
            tokens, slots = torch.where(ids_Tk == expert)
            out = self._swiglu(x_TH[tokens], f"{prefix}{expert}.", self._expert_weight)
            y_TH.index_add_(0, tokens, out * weights_Tk[tokens, slots, None])
        return y_TH

    def _mlp(self, x_TH: torch.Tensor, prefix: str) -> torch.Tensor:
        return self._swiglu(x_TH, prefix, lambda name: self._weight(name + ".weight"))

    def _swiglu(self, x_TH: torch.Tensor, prefix: str, weight: Callable[[str], torch.Tensor]) -> torch.Tensor:
        gate = F.linear(x_TH, weight(prefix + "gate_proj"))
        silu = F.silu(gate)
        up = F.linear(x_TH, weight(prefix + "up_proj"))
        gated = silu * up
        down_TH = F.linear(gated, weight(prefix + "down_proj"))
        stages = {"gate_proj": gate, "silu": silu, "up_proj": up, "gated": gated, "down_proj": down_TH}
        for name, value in stages.items():
            self._note(prefix + name, value)
        return down_TH

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = F.linear(x, self._weight(name + ".weight"))
        self._note(name, y)
        return y

    def _norm(self, x: torch.Tensor, name: str, *, eps: float | None = None) -> torch.Tensor:
        """RMSNorm over the last axis; `eps` defaults to the configuration's `rms_norm_eps`."""
        eps = self._config.rms_norm_eps if eps is None else eps
        y = norm_stages(x, self._weight(name + ".weight"), eps)["y"]
        self._note(name, y)
        return y

    def _note(self, name: str, value: torch.Tensor) -> None:
        if self._on_value is not None:
            self._on_value(name, value)

    def _head(self, x_TH: torch.Tensor) -> torch.Tensor:
        head_VH = self._tensors.stored("language_model.lm_head.weight")
        starts = range(0, len(head_VH), _HEAD_ROWS)
        return torch.cat(
            [F.linear(x_TH, head_VH[start : start + _HEAD_ROWS].to(self.dtype)) for start in starts], dim=-1
        )

    def _weight(self, name: str) -> torch.Tensor:
        return self._tensors.stored(name).to(self.dtype)

    def _expert_weight(self, name: str) -> torch.Tensor:
        """One projection of an expert, dequantised: `(nibble - 8) * scale`, exact in float32. [out, in]."""
        packed, scale_OG = self._tensors.stored(name + ".weight_packed"), self._tensors.stored(name + ".weight_scale")
        nibbles = packed[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
        rows, columns = packed.shape[0], packed.shape[1] * 8
        stated = self._tensors.stored(name + ".weight_shape").tolist()
        if stated != [rows, columns] or len(scale_OG) != rows or columns % scale_OG.shape[1]:
            raise PlainReferenceError(
                f"{name}: expected packed codes, scales and weight_shape of one matrix, "
                f"found {list(packed.shape)}, {list(scale_OG.shape)} and {stated}"
            )
        groups = (nibbles.view(rows, scale_OG.shape[1], -1) - 8).to(self.dtype)
        return (groups * scale_OG.to(self.dtype)[:, :, None]).view(rows, columns)


def norm_stages(x: torch.Tensor, weight: torch.Tensor, eps: float) -> dict[str, torch.Tensor]:
    """RMSNorm over the last axis, step by step; `y` is its result."""
    square = x.square()
    mean = square.mean(dim=-1, keepdim=True)
    plus_eps = mean + eps
    rsqrt = torch.rsqrt(plus_eps)
    normed = x * rsqrt
    stages = {"square": square, "mean": mean, "plus_eps": plus_eps, "rsqrt": rsqrt}
    return {**stages, "normed": normed, "y": normed * weight}


def router_stages(
    config: PlainConfig, logits_TE: torch.Tensor, bias_E: torch.Tensor, ids_Tk: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The router step by step, from its logits: the choice is `ids`, or `ids_Tk` where that was made elsewhere.

    `divisor` is what the weights are normalised by, 1 where the configuration does not want that.
    """
    scores_TE = logits_TE.sigmoid()
    biased_TE = scores_TE + bias_E
    if ids_Tk is None:
        ids_Tk = biased_TE.topk(config.num_experts_per_tok, dim=-1).indices
    chosen_Tk = scores_TE.gather(1, ids_Tk)
    total_T1 = chosen_Tk.sum(dim=-1, keepdim=True)
    total_eps_T1 = total_T1 + 1e-20
    divisor_T1 = total_eps_T1 if config.norm_topk_prob else torch.ones_like(total_T1)
    normalised_Tk = chosen_Tk / divisor_T1
    stages = {"scores": scores_TE, "biased": biased_TE, "best": biased_TE.gather(1, ids_Tk), "ids": ids_Tk}
    stages |= {"chosen": chosen_Tk, "total": total_T1, "total_eps": total_eps_T1, "divisor": divisor_T1}
    return {**stages, "normalised": normalised_Tk, "weights": normalised_Tk * config.routed_scaling_factor}


def yarn_inverse_frequencies(config: PlainConfig) -> list[float]:
    """Radians a position for each of the P/2 pairs: slow pairs are stretched by `factor`, fast ones left alone."""
    width, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        return width * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / 2 / math.log(base)

    fast = max(math.floor(pair_with(yarn.beta_fast)), 0)
    slow = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    frequencies = []
    for pair in range(width // 2):
        stretched = min(max((pair - fast) / max(slow - fast, 1e-3), 0.0), 1.0)
        frequencies.append(base ** (-2 * pair / width) * ((1 - stretched) + stretched / yarn.factor))
    return frequencies


def attention_scaling(yarn: Yarn, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def rotate(x_TP: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
    """Rotate the adjacent pairs (2i, 2i + 1) of [T, P] by the angles of [T, P/2]."""
    even, odd = x_TP[:, 0::2], x_TP[:, 1::2]
    return torch.stack([even * cos_TP - odd * sin_TP, even * sin_TP + odd * cos_TP], dim=-1).flatten(1)

"""Every intermediate result of the plain reference by name: what a bisection compares a graph's tensors with.

Names are those of the checkpoint's modules, relative to the layer (`self_attn.q_a_proj`, `mlp.gate.logits`), so that a
tensor of the graph finds its counterpart by the weight it comes from. Shares no code with what is judged.

Legend: T tokens, H hidden, N heads, R latent rank, P rotated channels, E experts, k experts per token, V vocabulary,
C = R + P columns of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from k25_validate.plain_checkpoint import CheckpointTensors
from k25_validate.plain_model import (
    PlainModel,
    attention_scaling,
    norm_stages,
    rotate,
    router_stages,
    yarn_inverse_frequencies,
)

Array = npt.NDArray[np.float64]
Taps = dict[str, Array]

TEXT_PREFIX = "language_model."
LAYER_PREFIX = "language_model.model.layers.{layer}."


@dataclass(frozen=True, kw_only=True)
class MlaSpan:
    """The rows of one sequence in a step, and the cache rows [S, C] of its tokens before the step."""

    rows: slice
    past: npt.NDArray[np.floating]


class PlainTaps:
    """Taps of embedding, layers and head over a checkpoint folder; `dtype` is float64 unless noise is measured."""

    def __init__(self, checkpoint: Path, *, latent_norm_eps: float, dtype: torch.dtype = torch.float64) -> None:
        self._taps: Taps = {}
        self._prefix = ""
        self._dtype = dtype
        self._latent_norm_eps = latent_norm_eps
        self._model = PlainModel(checkpoint, dtype=dtype, latent_norm_eps=latent_norm_eps, on_value=self._keep)
        self._config = self._model._config
        self.tensors = CheckpointTensors(checkpoint)

    @torch.inference_mode()
    def layer(self, layer: int, hidden: npt.NDArray[np.float32], positions: npt.NDArray[np.integer]) -> Taps:
        """All taps of one layer on its input float32 [T, H], one whole sequence at consecutive positions."""
        x_TH = self._started(LAYER_PREFIX.format(layer=layer), hidden)
        self._model.layer(layer, x_TH, self._model.rotation(len(hidden), int(positions[0])))
        return _with_derived({**self._taps, "hidden": x_TH.double().numpy()})

    @torch.inference_mode()
    def head(self, hidden: npt.NDArray[np.float32]) -> Taps:
        """The final norm's taps and `lm_head`, the logits [T, V]."""
        x_TH = self._started(TEXT_PREFIX, hidden)
        logits = self._model.logits(x_TH).double().numpy()
        return _with_derived({**self._taps, "hidden": x_TH.double().numpy(), "lm_head": logits})

    @torch.inference_mode()
    def embed(self, token_ids: npt.NDArray[np.integer]) -> Taps:
        """`model.embed_tokens`, [T, H]."""
        return {"model.embed_tokens": self._model.embed(torch.from_numpy(token_ids.astype(np.int64))).double().numpy()}

    @torch.inference_mode()
    def expert(self, layer: int, expert: int, x: npt.NDArray[np.floating]) -> Taps:
        """One expert on x [T, H]: `gate_proj`, `silu`, `up_proj`, `gated`, `down_proj` and the three weights."""
        prefix = f"{LAYER_PREFIX.format(layer=layer)}mlp.experts.{expert}."
        x_TH = self._started(prefix, x)
        self._model._swiglu(x_TH, prefix, self._model._expert_weight)
        weights = {
            f"{name}.weight": self._model._expert_weight(f"{prefix}{name}_proj").double().numpy()
            for name in ("gate", "up", "down")
        }
        return {**self._taps, **weights}

    @torch.inference_mode()
    def mla(
        self,
        layer: int,
        q: npt.NDArray[np.floating],
        latent: npt.NDArray[np.floating],
        positions: npt.NDArray[np.integer],
        spans: Sequence[MlaSpan],
    ) -> Taps:
        """The stages of attention from the op's own inputs q [T, N * D] and latent [T, C], in the absorbed form.

        `scores` [N, S], `probabilities` and `mixed` are lists over tokens and come from `mla_token`.
        """
        stages = _mla_stages(self, layer, _tensor(q), _tensor(latent), _tensor(positions), spans)
        return {name: value.contiguous().numpy() for name, value in stages.items()}

    @torch.inference_mode()
    def mla_token(self, query: Array, context: Array) -> Taps:
        """One token's attention over the rows it sees: query [N, C], context [S, C]; dots and so on [N, S]."""
        dots = _tensor(query) @ _tensor(context).T
        scaled = dots * self.softmax_scale
        probabilities = scaled.softmax(dim=-1)
        mixed = probabilities @ _tensor(context)
        rank = self._config.kv_lora_rank
        values = {"dots": dots, "scaled": scaled, "probabilities": probabilities}
        values |= {"mixed": mixed, "z_token": mixed[:, :rank]}
        return {name: value.numpy() for name, value in values.items()}

    @torch.inference_mode()
    def norm(self, tap: str, x: npt.NDArray[np.floating], weight: npt.NDArray[np.floating]) -> Taps:
        """The stages of the RMSNorm that makes `tap`, from the op's own inputs x [..., H] and weight [H]."""
        found = norm_stages(_tensor(x), _tensor(weight), self.norm_eps(tap))
        found |= {"wide": _tensor(x), "root": found["plus_eps"].sqrt()}
        found |= {"normed_x": found["normed"], "weight_x": _tensor(weight)}
        return {name: value.numpy() for name, value in found.items()}

    @torch.inference_mode()
    def router(
        self,
        logits: npt.NDArray[np.floating],
        bias: npt.NDArray[np.floating],
        ids: npt.NDArray[np.integer] | None = None,
    ) -> Taps:
        """The stages of the router, from the op's own inputs [T, E] and [E]; `ids` [T, k] is a choice to go on with."""
        chosen = None if ids is None else torch.from_numpy(ids.astype(np.int64))
        found = router_stages(self._config, _tensor(logits), _tensor(bias), chosen)
        found |= {"expert_ids": found["ids"], "expert_weights": found.pop("weights")}
        return {name: value.numpy() for name, value in found.items()}

    def norm_eps(self, tap: str) -> float:
        """The epsilon of the norm that makes `tap`."""
        return self._latent_norm_eps if tap.startswith("self_attn.") else self._config.rms_norm_eps

    @property
    def inv_freq(self) -> list[float]:
        """Radians a position of each rotated pair, [P / 2]."""
        return yarn_inverse_frequencies(self._config)

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by."""
        yarn, width = self._config.yarn, self._config.qk_nope_head_dim + self._config.qk_rope_head_dim
        return attention_scaling(yarn, yarn.mscale_all_dim) ** 2 / math.sqrt(width)

    def facts(self, tap: str) -> Mapping[str, float | int | list[float]]:
        """What the formulas take for the attributes of the `k25` op that makes `tap`."""
        config = self._config
        return {
            "num_heads": config.num_attention_heads,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "v_head_dim": config.v_head_dim,
            "softmax_scale": self.softmax_scale,
            "inv_freq": self.inv_freq,
            "group_size": 32,
            "eps": self.norm_eps(tap),
            "top_k": config.num_experts_per_tok,
            "normalise": int(config.norm_topk_prob),
            "scaling_factor": config.routed_scaling_factor,
        }

    def _started(self, prefix: str, x: npt.NDArray[np.floating]) -> torch.Tensor:
        self._prefix = prefix
        self._taps = {}
        return torch.from_numpy(np.ascontiguousarray(x)).to(self._dtype)

    def _keep(self, name: str, value: torch.Tensor) -> None:
        assert name.startswith(self._prefix), (name, self._prefix)
        short = name.removeprefix(self._prefix)
        if not short.startswith("mlp.experts."):  # an expert's own stages have some tokens only: `expert` computes them
            self._taps[short] = value.double().numpy()


def _with_derived(taps: Taps) -> Taps:
    """Add what graphs compute on the way and the formulas do not name."""
    derived: Taps = {}
    for name, value in taps.items():
        if name.endswith("gate_proj"):
            derived[name.removesuffix("gate_proj") + "sigmoid"] = torch.from_numpy(value).sigmoid().numpy()
    if "mlp.gate.weights" in taps:
        derived["mlp.shared_experts"] = taps["mlp.shared_experts.down_proj"]
        derived["shared_residual"] = taps["attention_residual"]
    return taps | derived


def _tensor(values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).double()


def _mla_stages(
    taps: PlainTaps,
    layer: int,
    q: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    spans: Sequence[MlaSpan],
) -> dict[str, torch.Tensor]:
    config = taps._config
    heads, nope, rank, tokens = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank, len(q)
    angle = positions[:, None] * torch.tensor(taps.inv_freq, dtype=torch.float64)
    q_TND = q.view(tokens, heads, -1)
    cos, sin = angle.cos(), angle.sin()
    q_rotated = torch.stack([rotate(q_TND[:, head, nope:], cos, sin) for head in range(heads)], dim=1)
    k_rotated = rotate(latent[:, rank:], cos, sin)
    pairs: dict[str, torch.Tensor] = {}
    for name, plain, rotated in (("q", q_TND[:, :, nope:], q_rotated), ("k", latent[:, rank:], k_rotated)):
        pairs |= {f"{name}_rope": plain, f"{name}_first": plain[..., 0::2], f"{name}_second": plain[..., 1::2]}
        pairs |= {f"{name}_first_rotated": rotated[..., 0::2], f"{name}_second_rotated": rotated[..., 1::2]}
    up_NDR = taps.tensors.stored(LAYER_PREFIX.format(layer=layer) + "self_attn.kv_b_proj.weight").double()
    up_NDR = up_NDR.view(heads, -1, rank)
    q_absorbed = torch.einsum("tnd,ndr->tnr", q_TND[:, :, :nope], up_NDR[:, :nope])
    query = torch.cat([q_absorbed, q_rotated], dim=-1)
    rows = torch.cat([latent[:, :rank], k_rotated], dim=-1)
    z_TNR = torch.empty(tokens, heads, rank, dtype=torch.float64)
    for span in spans:
        context = torch.cat([_tensor(span.past), rows[span.rows]])
        for token in range(span.rows.start, span.rows.stop):
            seen = context[: len(span.past) + token - span.rows.start + 1]
            scores = query[token] @ seen.T * taps.softmax_scale
            z_TNR[token] = scores.softmax(dim=-1) @ seen[:, :rank]
    out_TND = torch.einsum("tnr,nvr->tnv", z_TNR, up_NDR[:, nope:])
    by_head = {
        "q_nope_by_head": q_TND[:, :, :nope].transpose(0, 1),
        "q_absorbed_by_head": q_absorbed.transpose(0, 1),
        "z_by_head": z_TNR.transpose(0, 1),
        "out_by_head": out_TND.transpose(0, 1),
        "uv_transposed": up_NDR[:, nope:].transpose(1, 2),
    }
    inputs = {"q_float": q, "q_heads": q_TND, "latent_float": latent, "kv_b_heads": up_NDR}
    inputs |= {"kv_b_float": up_NDR.reshape(-1, rank), "cosine_heads": cos[:, None], "sine_heads": sin[:, None]}
    return {**inputs, **pairs, **by_head} | {
        "angle": angle,
        "cosine": cos,
        "sine": sin,
        "q_nope": q_TND[:, :, :nope],
        "q_rotated": q_rotated,
        "compressed": latent[:, :rank],
        "k_rotated": k_rotated,
        "new_rows": rows,
        "new_rows_cache": rows,
        "uk": up_NDR[:, :nope],
        "uv": up_NDR[:, nope:],
        "q_absorbed": q_absorbed,
        "query": query,
        "z": z_TNR,
        "out_heads": out_TND,
        "out_float": out_TND.flatten(1),
        "out": out_TND.flatten(1),
    }

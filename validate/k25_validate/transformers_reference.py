"""The independent judge: transformers' own Kimi K2.5 classes over the official checkpoint.

Weights are given under their official names, the experts dequantised exactly in float32, and transformers renames and
fuses them itself; its quantised loading would round the experts to bfloat16 first. Nothing is fetched and no code of
the checkpoint is run. The dequantisation here works on bytes and is deliberately not that of the plain reference.

Legend: T tokens, P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from k25_plugins.errors import BackendMissingError, VerificationError
from k25_validate.reference import Grid, MediaInput, ReferenceTrace, TraceWalk
from k25_validate.transformers_vision import embeddings_from_transformers

Progress = Callable[[str, int, int], None]

_TEXT_PREFIX = "language_model."
# What a key that is missing in the official text_config means, where the native class has another default.
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_mtp_layers": 0,
}
_ROTARY_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
# The official spelling of what transformers' native vision configuration calls otherwise; it ignores the official one.
_NATIVE_VISION_KEYS = {
    "vt_hidden_size": "hidden_size",
    "vt_num_hidden_layers": "num_hidden_layers",
    "vt_num_attention_heads": "num_attention_heads",
    "vt_intermediate_size": "intermediate_size",
    "init_pos_emb_height": "pos_emb_height",
    "init_pos_emb_width": "pos_emb_width",
    "init_pos_emb_time": "pos_emb_time",
    "patch_size": "patch_size",
    "merge_kernel_size": "merge_kernel_size",
}
_LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")


class TransformersReference:
    """`Reference` by `Kimi_K25ForConditionalGeneration` (or the text class without vision), float32, eager attention.

    The whole model is held in float32: 7 times the bytes of the checkpoint's experts, and twice that while loading.
    `latent_norm_eps` replaces the class default 1e-6 of the two latent norms. `progress` is called with what is
    counted, how many are done and how many there are.

    Raises `BackendMissingError` without a transformers that has the classes, and `VerificationError` when transformers
    does not take every tensor of the checkpoint or lacks one.
    """

    name = "transformers"

    def __init__(
        self,
        checkpoint: Path,
        *,
        latent_norm_eps: float = 1e-6,
        progress: Progress | None = None,
    ) -> None:
        values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self._model = _model_from_checkpoint(checkpoint, values, progress)
        inner = self._model.model
        self._text: Any = getattr(inner, "language_model", inner)
        for layer in self._text.layers:
            for norm in _LATENT_NORMS:
                getattr(layer.self_attn, norm).variance_epsilon = latent_norm_eps

    @torch.inference_mode()
    def trace(
        self, token_ids: Sequence[int], *, first_position: int = 0, media: Sequence[MediaInput] = ()
    ) -> ReferenceTrace:
        """Run one sequence, causally and from scratch; its first token stands at `first_position`.

        Raises `ValueError` for an empty sequence, an id outside the vocabulary or a negative position.
        """
        if first_position < 0:
            raise ValueError(f"first_position: expected 0 or more, found {first_position}")
        return self._trace(token_ids, range(first_position, first_position + len(token_ids)), media)

    def _trace(self, token_ids: Sequence[int], positions: Sequence[int], media: Sequence[MediaInput]) -> ReferenceTrace:
        embeddings = self._embed(token_ids)
        for item in media:
            found = self._media(item)
            embeddings[0, item.first_token : item.first_token + len(found)] = found
        states: dict[int, torch.Tensor] = {}
        routes: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        with ExitStack() as hooks:
            for index, layer in enumerate(self._text.layers):
                hooks.callback(layer.register_forward_hook(_keep(states, index, lambda output: output)).remove)
                if hasattr(layer.mlp, "gate"):
                    handle = layer.mlp.gate.register_forward_hook(_keep(routes, index, lambda output: output))
                    hooks.callback(handle.remove)
            logits = self._forward(embeddings, positions)
        return ReferenceTrace(
            token_ids=np.asarray(token_ids, np.int64),
            hidden=tuple(state[0].numpy() for state in (embeddings, *(states[index] for index in sorted(states)))),
            expert_ids={index: ids.numpy() for index, (_, _, ids) in sorted(routes.items())},
            expert_weights={index: weights.float().numpy() for index, (_, weights, _) in sorted(routes.items())},
            router_scores={index: self._scores(index, logits) for index, (logits, _, _) in sorted(routes.items())},
            logits=logits.numpy(),
        )

    @torch.inference_mode()
    def walk(
        self,
        token_ids: Sequence[int],
        *,
        media: Sequence[MediaInput] = (),
        positions: Sequence[int] | None = None,
    ) -> TraceWalk:
        """The same layer by layer, out of one forward pass: transformers holds the whole model anyway."""
        return TraceWalk(self._trace(token_ids, range(len(token_ids)) if positions is None else positions, media))

    @torch.inference_mode()
    def media_embeddings(self, pixel_values: npt.NDArray[np.float32], grid: Grid) -> npt.NDArray[np.float32]:
        """Embeddings float32 [M, H] of one media item, by transformers' tower and projector."""
        embeddings: npt.NDArray[np.float32] = self._media(MediaInput(pixel_values=pixel_values, grid=grid)).numpy()
        return embeddings

    @torch.inference_mode()
    def fused_logits(self, token_ids: Sequence[int], media: Sequence[MediaInput]) -> npt.NDArray[np.float32]:
        """Logits [T, V] where transformers itself puts the media in the place of `media_placeholder_token_id`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        encoded = BaseModelOutputWithPooling(pooler_output=tuple(self._media(item) for item in media))
        ids = torch.tensor([list(token_ids)], dtype=torch.int64)
        output = self._model(input_ids=ids, mm_encoder_outputs={"image": encoded}, use_cache=False)
        logits: npt.NDArray[np.float32] = output.logits[0].float().numpy()
        return logits

    def _media(self, item: MediaInput) -> torch.Tensor:
        if not hasattr(self._model.model, "vision_tower"):
            raise ValueError("config.json: expected a vision_config, found none: the checkpoint is text only")
        return embeddings_from_transformers(self._model.model, torch.from_numpy(item.pixel_values), item.grid)

    def _scores(self, layer: int, router_logits: torch.Tensor) -> npt.NDArray[np.float32]:
        bias = self._text.layers[layer].mlp.gate.e_score_correction_bias
        scores: npt.NDArray[np.float32] = (router_logits.sigmoid() + bias).float().numpy()
        return scores

    @torch.inference_mode()
    def decode_logits(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [N, V] through transformers' KV cache: the prompt at once, then one token at a time.

        Row i is what new token i was chosen from: row 0 comes from the prompt, row i from `new_ids[i - 1]`.
        """
        if not new_ids:
            raise ValueError("new_ids: expected at least one token, found none")
        cache = None
        rows = []
        for chunk in (prompt_ids, *([token] for token in new_ids[:-1])):
            output = self._model(inputs_embeds=self._embed(chunk), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1])
        return torch.stack(rows).float().numpy()

    def _embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Embeddings [1, T, H]. Given as ids, the model would read the media placeholder's row as that of token 0."""
        table = self._text.embed_tokens
        ids = torch.tensor([list(token_ids)], dtype=torch.int64)
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= table.num_embeddings:
            raise ValueError(f"token_ids: expected ids in 0..{table.num_embeddings - 1}, found {ids[0].tolist()[:8]}")
        embeddings: torch.Tensor = table(ids)
        return embeddings

    def _forward(self, embeddings: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        # Without a mask, transformers takes a gap between positions for the end of a packed sequence.
        output = self._model(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
            position_ids=torch.tensor([list(positions)], dtype=torch.int64),
            use_cache=False,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits


def _keep(store: dict[int, Any], index: int, part: Callable[[Any], Any]) -> Callable[[Any, Any, Any], None]:
    """A forward hook that stores a part of a module's output under `index`."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        store[index] = part(output)

    return hook


def _model_from_checkpoint(checkpoint: Path, values: Mapping[str, Any], progress: Progress | None) -> Any:
    """The transformers model with every weight of the checkpoint in it, in eval mode."""
    try:
        from transformers import (
            DeepseekV3Config,
            DeepseekV3ForCausalLM,
            Kimi_K25Config,
            Kimi_K25ForConditionalGeneration,
        )
    except ImportError as error:
        raise BackendMissingError(
            f"--reference transformers needs the transformers package with Kimi K2.5 ({error}). "
            'Install it: pip install "k25-export[transformers]"'
        ) from error
    text = _text_values(values["text_config"], DeepseekV3Config.__annotations__)
    if values.get("vision_config") is None:
        model_class, prefix = DeepseekV3ForCausalLM, _TEXT_PREFIX
        config = DeepseekV3Config(**text)
    else:
        model_class, prefix = Kimi_K25ForConditionalGeneration, ""
        config = Kimi_K25Config(text_config=text, **_multimodal_values(values))
    state = {name.removeprefix(prefix): tensor for name, tensor in _float32_tensors(checkpoint, progress)}
    _check_experts(state, text, _TEXT_PREFIX.removeprefix(prefix))
    with _quiet_transformers():
        model, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            # A whole image's scores do not fit into memory; the text model is judged by the plainest form.
            attn_implementation={"vision_config": "sdpa", "text_config": "eager", "": "eager"},
            experts_implementation="eager",
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they come back by name instead of being raised
            output_loading_info=True,
        )
    for what, names in loading.items():
        _check_empty(what.replace("_", " "), names)
    return model.eval()


def _text_values(text: Mapping[str, Any], native_keys: Collection[str]) -> dict[str, Any]:
    """The official `text_config` as `DeepseekV3Config` takes it; only its `native_keys` can steer transformers."""
    known = {key: text[key] for key in (*native_keys, *_ROTARY_KEYS) if text.get(key) is not None}
    return {**_TEXT_DEFAULTS, **known, "model_type": "deepseek_v3", "tie_word_embeddings": False}


def _multimodal_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """All of the official configuration but the text, in the spelling of `Kimi_K25Config`."""
    vision = values["vision_config"]
    native = {new: vision[old] for old, new in _NATIVE_VISION_KEYS.items() if old in vision}
    converted = {
        "vision_config": native,
        "projection_hidden_size": vision.get("mm_hidden_size", native.get("hidden_size")),
        "projection_layer_norm_eps": vision.get("projector_ln_eps", 1e-5),
        "tie_word_embeddings": False,  # the class default is True
    }
    if values.get("media_placeholder_token_id") is not None:
        converted["image_token_id"] = values["media_placeholder_token_id"]
    return converted


def _float32_tensors(checkpoint: Path, progress: Progress | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint in float32, an expert's three as one `weight`."""
    from safetensors import safe_open

    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard_of: Mapping[str, str] = index["weight_map"]
    opened: dict[str, Any] = {
        shard: safe_open(checkpoint / shard, framework="pt") for shard in sorted(set(shard_of.values()))
    }
    for done, (name, shard) in enumerate(shard_of.items(), start=1):
        if name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            scales = opened[shard_of[f"{stem}_scale"]].get_tensor(f"{stem}_scale")
            yield stem, _dequantized(opened[shard].get_tensor(name), scales)
        elif not name.endswith((".weight_scale", ".weight_shape")):
            yield name, opened[shard].get_tensor(name).float()
        if progress is not None:
            progress("tensors of the transformers reference", done, len(shard_of))


def _dequantized(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int32 [out, in / 8] and scales [out, groups] as float32 [out, in]: byte b holds columns 2b (low) and 2b + 1."""
    octets = packed.numpy().astype("<i4", copy=False).view(np.uint8)
    codes = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*scales.shape, -1).astype(np.float32)
    return torch.from_numpy(((codes - 8) * scales.float().numpy()[:, :, None]).reshape(len(octets), -1))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no loading report on the terminal: ours are shown, and `_check_empty` is stricter."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_experts(names: Iterable[str], text: Mapping[str, Any], prefix: str) -> None:
    """Experts by name: transformers fuses them, and after that cannot say which one was missing or too many."""
    expected = {
        f"{prefix}model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(text["first_k_dense_replace"], text["num_hidden_layers"])
        for expert in range(text["n_routed_experts"])
        for projection in ("gate", "up", "down")
    }
    found = {name for name in names if ".mlp.experts." in name}
    _check_empty("missing keys", expected - found)
    _check_empty("unexpected keys", found - expected)


def _check_empty(what: str, names: Collection[Any]) -> None:
    if names:
        shown = ", ".join(sorted(map(str, names))[:5])
        raise VerificationError(
            f"transformers: expected to load every tensor of the checkpoint and no other, found {len(names)} {what}: "
            f"{shown}. Check that transformers is 5.23 and that the checkpoint is the official INT4 release."
        )

"""The default judge: our own plain PyTorch model of the formulas, at once (`trace`) or layer by layer (`walk`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from k25_validate.plain_model import PlainModel, Route
from k25_validate.plain_vision import PlainVision
from k25_validate.reference import Grid, LayerTrace, MediaInput, ReferenceTrace

Progress = Callable[[str, int, int], None]


class PlainReference:
    """`Reference` by our own formulas, over an official checkpoint folder.

    `dtype` is the precision of every step: float32, or float64 for a ground truth that shows how much of a difference
    is rounding. `latent_norm_eps` is the epsilon of `q_a_layernorm` and `kv_a_layernorm`, which no official file
    states. `progress` is called with what is counted, how many are done and how many there are; `on_route` with a
    layer and the experts its tokens go to, before these are read (so that somebody may read ahead).

    Raises `ValueError` for a configuration or a tensor that the formulas do not cover, `OSError` for a file that
    cannot be read.
    """

    name = "plain"

    def __init__(
        self,
        checkpoint: Path,
        *,
        dtype: torch.dtype = torch.float32,
        latent_norm_eps: float = 1e-6,
        progress: Progress | None = None,
        on_route: Callable[[int, npt.NDArray[np.int64]], None] | None = None,
    ) -> None:
        self._model = PlainModel(checkpoint, dtype=dtype, latent_norm_eps=latent_norm_eps, on_route=on_route)
        self._progress = progress
        self._checkpoint = checkpoint
        self._latent_norm_eps = latent_norm_eps
        self._vision: PlainVision | None = None

    @torch.inference_mode()
    def trace(
        self, token_ids: Sequence[int], *, first_position: int = 0, media: Sequence[MediaInput] = ()
    ) -> ReferenceTrace:
        """Run one sequence, causally and from scratch; its first token stands at `first_position`.

        The precision of `dtype` is kept between layers. Raises `ValueError` for an empty sequence, an id outside the
        vocabulary or a negative position.
        """
        model = self._model
        x_TH = self._embed(torch.tensor(token_ids, dtype=torch.int64), media)
        rotation = model.rotation(len(x_TH), first_position)
        states: list[torch.Tensor] = [x_TH]
        routes: dict[int, Route] = {}
        for layer in range(model.layers):
            x_TH, route = model.layer(layer, x_TH, rotation)
            states.append(x_TH)
            if route is not None:
                routes[layer] = route
            if self._progress is not None:
                self._progress("layers of the plain reference", layer + 1, model.layers)
        return ReferenceTrace(
            token_ids=np.asarray(token_ids, np.int64),
            hidden=tuple(_float32(state_TH) for state_TH in states),
            expert_ids={layer: ids.numpy() for layer, (ids, _, _) in routes.items()},
            expert_weights={layer: _float32(weights) for layer, (_, weights, _) in routes.items()},
            router_scores={layer: _float32(scores) for layer, (_, _, scores) in routes.items()},
            logits=_float32(model.logits(x_TH)),
        )

    def walk(
        self,
        token_ids: Sequence[int],
        *,
        media: Sequence[MediaInput] = (),
        positions: Sequence[int] | None = None,
    ) -> PlainWalk:
        """One sequence, layer by layer, at consecutive positions from 0 or at those given."""
        ids_T = torch.tensor(token_ids, dtype=torch.int64)
        positions_T = torch.arange(len(ids_T)) if positions is None else torch.tensor(positions, dtype=torch.int64)
        return PlainWalk(self._model, embed=lambda: self._embed(ids_T, media), positions_T=positions_T)

    @property
    def model(self) -> PlainModel:
        """The model behind it."""
        return self._model

    def exact(self) -> PlainReference:
        """The same reference in float64."""
        return PlainReference(self._checkpoint, dtype=torch.float64, latent_norm_eps=self._latent_norm_eps)

    @torch.inference_mode()
    def media_embeddings(self, pixel_values: npt.NDArray[np.float32], grid: Grid) -> npt.NDArray[np.float32]:
        """Embeddings float32 [M, H] of one media item. Raises `ValueError` for a checkpoint without vision."""
        return _float32(self._media(pixel_values, grid))

    def _media(self, pixel_values: npt.NDArray[np.float32], grid: Grid) -> torch.Tensor:
        if self._vision is None:
            self._vision = PlainVision(self._checkpoint, dtype=self._model.dtype)
        return self._vision.embeddings(torch.from_numpy(pixel_values), grid)

    def _embed(self, ids_T: torch.Tensor, media: Sequence[MediaInput]) -> torch.Tensor:
        x_TH = self._model.embed(ids_T)
        for item in media:
            embeddings_MH = self._media(item.pixel_values, item.grid)
            x_TH[item.first_token : item.first_token + len(embeddings_MH)] = embeddings_MH
        return x_TH


class PlainWalk:
    """`ReferenceWalk` of the plain reference; what passes between layers is float32."""

    def __init__(self, model: PlainModel, *, embed: Callable[[], torch.Tensor], positions_T: torch.Tensor) -> None:
        self._model = model
        self._embed = embed
        self._rotation = model.rotation_at(positions_T)

    @torch.inference_mode()
    def embed(self) -> npt.NDArray[np.float32]:
        """The embedding, float32 [T, H]."""
        return _float32(self._embed())

    @torch.inference_mode()
    def layer(self, layer: int, hidden: npt.NDArray[np.float32]) -> LayerTrace:
        """Layer `layer` on its input float32 [T, H]."""
        x_TH, route = self._model.layer(layer, torch.from_numpy(hidden).to(self._model.dtype), self._rotation)
        if route is None:
            return LayerTrace(hidden=_float32(x_TH))
        ids_Tk, weights_Tk, scores_TE = route
        return LayerTrace(
            hidden=_float32(x_TH),
            expert_ids=ids_Tk.numpy(),
            expert_weights=_float32(weights_Tk),
            router_scores=_float32(scores_TE),
        )

    @torch.inference_mode()
    def logits(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of the last layer's output."""
        return _float32(self._model.logits(torch.from_numpy(hidden).to(self._model.dtype)))


def _float32(x: torch.Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = x.float().numpy()
    return values

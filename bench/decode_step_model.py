"""A checkpoint of a few layers with random weights, its bundle, and the eager layers of the same weights.

Everything of a layer has the sizes asked for; vocabulary and vision are tiny, for they are no part of the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.component_cache import cache_from_environment
from k25_export.component_specs import component_specs
from k25_export.config import model_config_from_dict
from k25_export.demo.layout import TensorSpec, index_json, shards_from_config
from k25_export.demo.official_config import official_config_from_preset
from k25_export.demo.presets import PRESETS
from k25_export.demo.weights import tensor_bytes
from k25_export.manifest import Manifest, Precision
from k25_plugins import torch_ops  # noqa: F401  registers the ops

#: Bytes by which the tensors of one expert are turned against those of the one before.
_TURN = 1040


def write_model(folder: Path, *, preset: str, dense: int, moe: int, experts: int, precision: Precision) -> Manifest:
    """Write `folder`/checkpoint, unless it is of these sizes already, and `folder`/bundle."""
    layers = {"vocab_size": 1024, "num_hidden_layers": dense + moe, "first_k_dense_replace": dense}
    sizes = replace(PRESETS["tiny"], text={**PRESETS[preset].text, **layers, "n_routed_experts": experts})
    values = official_config_from_preset(sizes)
    checkpoint, text = folder / "checkpoint", json.dumps(values)
    config = checkpoint / "config.json"
    if not config.is_file() or config.read_text() != text:
        checkpoint.mkdir(parents=True, exist_ok=True)
        config.unlink(missing_ok=True)
        shards = shards_from_config(model_config_from_dict(values))
        made: dict[tuple[str, ...], bytes] = {}
        for shard in shards:
            with (checkpoint / shard.file).open("wb") as file:
                file.write(shard.header())
                for tensor in shard.tensors:
                    file.writelines(_data(tensor, made))
        (checkpoint / "model.safetensors.index.json").write_text(index_json(shards))
        config.write_text(text)  # last: it says that the rest is whole
    manifest, _ = bundle_from_checkpoint(
        checkpoint_from_folder(checkpoint), folder / "bundle", precisions=(precision,), cache=cache_from_environment()
    )
    return manifest


def _data(tensor: TensorSpec, made: dict[tuple[str, ...], bytes]) -> Iterator[bytes]:
    """Random bytes. Those of an expert are the layer's first expert's, turned: all differ, and cost a copy."""
    before, separator, after = tensor.name.partition(".mlp.experts.")
    if not separator or tensor.constant:
        yield from tensor_bytes(tensor, seed=0)
        return
    expert, _, kind = after.partition(".")
    if (before, kind) not in made:
        made[before, kind] = b"".join(tensor_bytes(tensor, seed=0))
    data = made[before, kind]
    turn = int(expert) * _TURN % len(data)
    yield data[turn:]
    yield data[:turn]


class GivenRouting(nn.Module):
    """A router that takes the experts it is given, with its own weights for them, and keeps weights and scores.

    Two results of different rounding may rank nearly equal experts differently, which is no error of either, but then
    they cannot be compared. Whether what is given is a top-k is judged by `shortfall`.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.ids = torch.empty(0)
        self.scores = torch.empty(0)
        self.weights = torch.empty(0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        router = self.router
        scores = torch.sigmoid(x.float() @ router.weight.float().T)  # type: ignore[union-attr, operator]
        self.scores = scores + router.e_score_correction_bias
        weights = scores.gather(1, self.ids.long())
        if router.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        self.weights = weights * router.scaling_factor  # type: ignore[operator]
        return self.ids, self.weights

    def shortfall(self) -> float:
        """By how much the worst of the given experts is below the last of the top-k; inf where one is given twice."""
        given = self.ids.long()
        if any(len(set(row)) != len(row) for row in given.tolist()):
            return float("inf")
        last = self.scores.topk(given.shape[1], dim=-1).values[:, -1]
        return float((last - self.scores.gather(1, given).min(dim=-1).values).clamp(min=0).max())


def eager_layer(manifest: Manifest, component: str, weights: dict[str, Tensor]) -> nn.Module:
    """The module that the component was traced from, over these weights."""
    spec = next(spec for spec in component_specs(manifest.model) if spec.name == component)
    with torch.device("meta"):
        module = spec.build(torch.float32).eval()
    module.load_state_dict({name: weights[name] for name, _ in module.named_parameters()}, assign=True)
    if component == "moe_layer":
        module.mlp.gate = GivenRouting(module.mlp.gate)  # type: ignore[union-attr]
    return module

"""Train the `trained` demo checkpoint: a tiny K2.5-shaped model that adds, copies and closes brackets.

    python scripts/train_demo.py                          about 8 minutes of one core; writes the shards of the package
    python scripts/train_demo.py --output FOLDER          writes them elsewhere

What it sees it generates itself (`k25_export.demo.tasks`), through the tokenizer and the chat template of the preset.
In the last part of the run the routed experts are used with their INT4 values (quantisation-aware training with a
straight-through gradient, arXiv 1308.3432), so that quantising them at the end changes nothing.

Reproducible means: the same seed, PyTorch build, processor and number of threads give the same bytes (every operation
is a deterministic one, and the data come from integers alone). Another processor or another number of threads sums
float32 in another order, which training amplifies: the weights will differ, the accuracy will not. So the shards that
were published are kept, with their hashes (`tests/export/test_trained_checkpoint.py`), rather than made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_training.batches import NO_TARGET, WAYS, Batch, BatchMaker
from demo_training.model import DemoModel
from demo_training.optimizer import Muon
from demo_training.tensors import round_to_stored, tensors_from_model
from torch import Tensor
from torch.nn import functional as F

import k25_export.demo.trained as trained_weights
from k25_export.config import model_config_from_dict
from k25_export.demo.layout import shards_from_config
from k25_export.demo.official_config import official_config_from_preset
from k25_export.demo.presets import PRESETS
from k25_export.demo.small_files import small_files
from k25_export.demo.tasks import TASKS, demo_tasks

EVALUATED = 300  # held-out problems of each task


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the result depends on besides the machine."""

    seed: int = 0
    threads: int = 1
    steps: int = 3000
    rows: int = 32
    length: int = 64
    matrix_rate: float = 6e-3
    other_rate: float = 2e-3
    warm_up: int = 50
    cool_down: float = 0.6  # the last part of the run, in which the rates fall to zero
    quantized: float = 0.3  # the last part of the run, in which the experts have their INT4 values
    balance_step: float = 1e-3


class Training:
    """A model, its optimisers and its data."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """`folder` holds the small files of the checkpoint: tokenizer and chat template."""
        self.recipe = recipe
        config = model_config_from_dict(official_config_from_preset(PRESETS["trained"])).text
        torch.manual_seed(recipe.seed)
        self.model = DemoModel(config)
        self.batches = BatchMaker(folder, vocab_size=config.vocab_size, seed=recipe.seed)
        matrices, others = _split(self.model)
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=recipe.matrix_rate),
            torch.optim.Adam(others, lr=recipe.other_rate, betas=(0.9, 0.98), eps=1e-9),
        ]

    def run(self) -> None:
        """Every step of the recipe, with a line of progress now and then."""
        started = time.monotonic()
        for step in range(self.recipe.steps):
            loss = self._step(step)
            if (step + 1) % 100 == 0:
                print(f"step {step + 1}: loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)

    def _step(self, step: int) -> float:
        recipe = self.recipe
        rate = min((step + 1) / recipe.warm_up, (1 - step / recipe.steps) / recipe.cool_down, 1.0)
        for optimizer, base in zip(self._optimizers, (recipe.matrix_rate, recipe.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        for mixture in self.model.mixtures():
            mixture.experts.is_quantized = step >= recipe.steps * (1 - recipe.quantized)
        loss = self.loss(self.batches.batch(rows=recipe.rows, length=recipe.length))
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for mixture in self.model.mixtures():
            mixture.gate.balance(recipe.balance_step)
        return float(loss.detach())

    def loss(self, batch: Batch) -> Tensor:
        """The mean cross-entropy of the targets, each with its weight."""
        places = (batch.targets.flatten() != NO_TARGET).nonzero().flatten()
        hidden = self.model(batch.ids, batch.texts).flatten(0, 1).index_select(0, places)
        weights = batch.weights.flatten()[places]
        losses = F.cross_entropy(self.model.lm_head(hidden), batch.targets.flatten()[places], reduction="none")
        return (losses * weights).sum() / weights.sum()


def _split(model: DemoModel) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices inside the layers, which Muon takes, and the rest: vectors, router, embedding and head."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_inner = name.startswith("layers.") and parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")
        (matrices if is_inner else others).append(parameter)
    return matrices, others


@torch.no_grad()
def accuracy(training: Training, task: str, way: str) -> float:
    """The share of held-out problems whose every answer token, and the end token, is the model's first choice."""
    texts = [training.batches.text_of(problem, way) for problem in demo_tasks(1, EVALUATED, tasks=[task])]
    ids = torch.zeros(len(texts), max(len(tokens) for tokens, _ in texts), dtype=torch.int64)
    for row, (tokens, _) in zip(ids, texts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    choices = training.model.lm_head(training.model(ids, torch.zeros_like(ids))).argmax(-1)
    right = [
        choices[row, prompt - 1 : len(tokens) - 1].tolist() == tokens[prompt:]
        for row, (tokens, prompt) in enumerate(texts)
    ]
    return right.count(True) / len(right)


def print_accuracies(training: Training, title: str) -> None:
    """A line for each task: how often it is answered right in each way of asking."""
    print(f"{title}: held-out problems answered right")
    for task in TASKS:
        print(f"  {task}: " + ", ".join(f"{way} {accuracy(training, task, way):.1%}" for way in WAYS), flush=True)


def write_shards(model: DemoModel, output: Path) -> None:
    """The shards of text weights, whole, with their hashes on standard output."""
    config = model_config_from_dict(official_config_from_preset(PRESETS["trained"]))
    values = tensors_from_model(model)
    shards = [shard for shard in shards_from_config(config) if trained_weights.is_trained_shard(shard)]
    unknown = set(values) - {tensor.name for shard in shards for tensor in shard.tensors}
    assert not unknown, f"tensors without a place: {sorted(unknown)}"
    files = {shard.file: trained_weights.shard_bytes(shard, values) for shard in shards}
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
        print(f'    "{name}": "{hashlib.sha256(content).hexdigest()}",  # {len(content)} bytes')


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, quantise, measure again, write."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Train the demo checkpoint that ships with k25-export.")
    parser.add_argument("--output", type=Path, default=Path(str(trained_weights.trained_folder())))
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--threads", type=int, default=recipe.threads)
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed, steps=options.steps, threads=options.threads)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    preset = PRESETS["trained"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = preset.text
        files = small_files(
            vocab_size=sizes["vocab_size"], context_length=sizes["max_position_embeddings"], words=preset.words
        )
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        training = Training(recipe, Path(folder))
        training.run()
        print_accuracies(training, "before rounding to what is stored")
        round_to_stored(training.model)
        print_accuracies(training, "as stored (experts INT4, the rest bf16)")
    write_shards(training.model, options.output)


if __name__ == "__main__":
    main()

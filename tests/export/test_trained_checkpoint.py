"""The `trained` preset: the bytes that were published, the script that made them, and what it was taught."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.config import TextConfig, model_config_from_dict
from k25_export.demo import trained as trained_weights
from k25_export.demo.checkpoint import write_demo_checkpoint
from k25_export.demo.layout import shards_from_config
from k25_export.demo.official_config import official_config_from_preset
from k25_export.demo.presets import PRESETS
from k25_export.demo.quantizer import quantize_int4
from k25_export.demo.tasks import SUM_LIMIT, TASKS, Draws, addition_of, demo_tasks, training_problem
from k25_plugins.errors import InputError, K25Error
from k25_plugins.int4 import bfloat16_to_float32, dequantize_int4
from k25_runtime.tokenizer import Tokenizer
from k25_validate.plain_reference import PlainReference

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LARGEST_TOTAL = 2 * 1024 * 1024
# SHA-256 of what was published; `scripts/train_demo.py` prints them.
TRAINED_SHA256 = {
    "model-00001-of-000007.safetensors": "fcb8880c420762c1c300113affc5b975fca2d7aa4b00bcf1c128384f32311835",
    "model-00002-of-000007.safetensors": "acb8e71fb63041bccc6140c845b7d98c04e08f992cd555cca3475cdaf2e52785",
    "model-00003-of-000007.safetensors": "5dc06ffcf52e079d6bef46c91e9429049f3b621161b20d539d8e6240d7936ccf",
    "model-00004-of-000007.safetensors": "6f6ab88bebf5e47f6f2504c5686f77dfbddb2019f84faeaa04133c1f3e8071e2",
    "model-00005-of-000007.safetensors": "9a138ddac291013d3827ef9a8d350e135394aff93475ecb322dd3eeb81a675a5",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("trained") / "checkpoint", preset="trained")


@pytest.fixture(scope="module")
def script() -> Iterator[SimpleNamespace]:
    """What `scripts/train_demo.py` is made of."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import train_demo
        from demo_training import batches, model, tensors

        yield SimpleNamespace(train_demo=train_demo, batches=batches, model=model, tensors=tensors)
    finally:
        sys.path.remove(str(SCRIPTS))


def text_config() -> TextConfig:
    return model_config_from_dict(official_config_from_preset(PRESETS["trained"])).text


def test_the_published_bytes_are_written(checkpoint: Path) -> None:
    found = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in TRAINED_SHA256}
    assert found == TRAINED_SHA256
    assert {path.name for path in Path(str(trained_weights.trained_folder())).iterdir()} == set(TRAINED_SHA256)


def test_the_layout_is_complete_and_small(checkpoint: Path) -> None:
    checkpoint_from_folder(checkpoint)  # every tensor there, none too many
    sizes = [path.stat().st_size for path in checkpoint.iterdir()]
    assert sum(sizes) <= LARGEST_TOTAL
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.isfinite().all(), name
    marker = json.loads((checkpoint / "demo.json").read_text("utf-8"))
    assert (marker["preset"], marker["seed"], marker["overrides"]) == ("trained", 0, {})


def test_every_character_of_a_task_is_a_token(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint, vocab_size=text_config().vocab_size)
    for problem in demo_tasks(3, 60):
        assert len(tokenizer.encode(problem.prompt + problem.answer)) == len(problem.prompt + problem.answer)
    assert all(len(tokenizer.encode(role)) == 1 for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "demo seed: preset trained: expected 0.*found 1"),
        ({"overrides": {"hidden_size": 64}}, "demo overrides: preset trained: expected none.*found hidden_size"),
    ],
)
def test_nothing_of_it_can_be_changed(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_demo_checkpoint(tmp_path / "demo", preset="trained", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "other layout"])
def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    shards = Path(str(trained_weights.trained_folder()))
    for path in shards.iterdir():
        content = path.read_bytes()
        if path.name.startswith("model-00003"):
            if damage == "missing":
                continue
            content = content[:-1] if damage == "cut" else content.replace(b"q_a_proj", b"q_b_proj")
        (tmp_path / path.name).write_bytes(content)
    monkeypatch.setattr(trained_weights, "trained_folder", lambda: tmp_path)
    with pytest.raises(K25Error, match=r"model-00003.*Install k25-export again"):
        write_demo_checkpoint(tmp_path / "demo", preset="trained")
    assert not (tmp_path / "demo").exists()


def test_problems_have_the_right_answers_and_come_again() -> None:
    problems = demo_tasks(7, 300)
    assert problems == demo_tasks(7, 300) != demo_tasks(8, 300)
    assert len({problem.prompt for problem in problems}) == 300
    closer_of = {"(": ")", "[": "]", "{": "}"}
    for problem in problems:
        question = problem.prompt.removesuffix("=")
        if problem.task == "addition":
            assert sum(map(int, question.split("+"))) == int(problem.answer)
        elif problem.task == "copying":
            assert question == problem.answer
        else:
            expected: list[str] = []
            for bracket in question + problem.answer:
                if bracket in closer_of:
                    expected.append(closer_of[bracket])
                else:
                    assert bracket == expected.pop()
            assert expected == []
            assert problem.answer
    with pytest.raises(InputError, match="demo tasks: expected some of addition"):
        demo_tasks(0, 3, tasks=["division"])
    with pytest.raises(InputError, match="demo tasks: expected at most"):
        demo_tasks(0, SUM_LIMIT**2, tasks=["addition"])


def test_training_never_sees_what_is_held_out() -> None:
    draws = Draws(11)
    seen = {training_problem(task, draws).prompt for _ in range(2000) for task in TASKS}
    assert not seen & {problem.prompt for problem in demo_tasks(7, 600)}
    sums = [addition_of(left, right) for left in range(SUM_LIMIT) for right in range(SUM_LIMIT)]
    held_out = {problem.prompt for problem in sums if problem.is_held_out}
    assert 0.1 < len(held_out) / len(sums) < 0.15
    assert "17+25=" in held_out
    assert {"+".join(reversed(prompt[:-1].split("+"))) + "=" for prompt in held_out} == held_out


def test_quantizer_round_trips_and_training_sees_its_values(script: SimpleNamespace) -> None:
    weight = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    weight[3, 32:64] = 0
    weight[4] *= 1e-20
    words, scale_bits = quantize_int4(weight)
    scales = bfloat16_to_float32(scale_bits)
    stored = dequantize_int4(words, scales)
    # Half a step, and what rounding the scale to bf16 takes from the largest code.
    assert (np.abs(stored - weight) <= np.repeat(scales, 32, axis=-1) * (0.5 + 8 * 2**-8)).all()
    again = quantize_int4(stored)
    assert (again[0] == words).all()
    assert (again[1] == scale_bits).all()
    seen = script.model.fake_quantized(torch.from_numpy(weight)).numpy()
    # w + (q - w) rounds once more.
    np.testing.assert_allclose(seen, stored, rtol=0, atol=np.abs(weight).max() * 2.0**-23)
    for wrong in (weight[:, :33], weight * np.nan):
        with pytest.raises(ValueError, match="expected"):
            quantize_int4(wrong)


def test_the_trained_model_is_the_reference(script: SimpleNamespace, checkpoint: Path, tmp_path: Path) -> None:
    """Random weights, two texts in a row: the script's formulas and the tensors that it writes are the reference's."""
    torch.manual_seed(5)
    model = script.model.DemoModel(text_config())
    for mixture in model.mixtures():
        mixture.gate.e_score_correction_bias.normal_(std=0.1)
    script.tensors.round_to_stored(model)
    values = script.tensors.tensors_from_model(model)
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for shard in shards_from_config(model_config_from_dict(official_config_from_preset(PRESETS["trained"]))):
        if trained_weights.is_trained_shard(shard):
            (tmp_path / shard.file).write_bytes(trained_weights.shard_bytes(shard, values))
    ids = torch.randint(0, text_config().vocab_size, (1, 30))
    texts = torch.tensor([[0] * 12 + [1] * 18])
    with torch.no_grad():
        logits = model.lm_head(model(ids, texts))[0].numpy()
    reference = PlainReference(tmp_path)
    for span, first in ((slice(0, 12), 0), (slice(12, 30), 12)):
        trace = reference.trace(ids[0, span].tolist(), first_position=first)
        np.testing.assert_allclose(logits[span], trace.logits, rtol=1e-3, atol=1e-4)


def test_training_learns_and_is_reproducible(script: SimpleNamespace, checkpoint: Path) -> None:
    recipe = script.train_demo.Recipe(steps=12, rows=4, warm_up=2)
    losses, tensors = [], []
    for _ in range(2):
        training = script.train_demo.Training(recipe, checkpoint)
        batch = script.train_demo.Training(recipe, checkpoint).batches.batch(rows=8, length=64)
        before = training.loss(batch).item()
        training.run()
        losses.append((before, training.loss(batch).item()))
        tensors.append(script.tensors.tensors_from_model(training.model))
    assert tensors[0] == tensors[1]
    assert losses[0] == losses[1]
    assert losses[0][1] < 0.8 * losses[0][0]

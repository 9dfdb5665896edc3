"""The `trained` checkpoint through its bundle: it answers, as often as its documentation says, however it is asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.demo.checkpoint import write_demo_checkpoint
from k25_export.demo.presets import PRESETS
from k25_export.demo.tasks import TASKS
from k25_plugins.errors import InputError
from k25_runtime.runtime import Runtime
from k25_validate.plain_reference import PlainReference
from k25_validate.report_html import html_from_report
from k25_validate.task_accuracy import (
    answers_from_reference,
    answers_from_runtime,
    demo_tasks,
    knows_demo_tasks,
    task_accuracy,
)
from k25_validate.validation import parity_report_from_bundle

# All of 300 held-out problems of each task were right (docs/demo-checkpoint.md), and at most 1 of these 30 was wrong.
LOWEST_SHARE = {"addition": 0.95, "copying": 0.9, "brackets": 0.9}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("tasks") / "checkpoint", preset="trained")


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    bundle = checkpoint.with_name("bundle")
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), bundle, precisions=["fp32"])
    with Runtime.open(bundle, context=128, max_sequences=16, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("asking", [{"raw": True}, {"thinking": True}, {"thinking": False}])
def test_the_sum_of_the_readme(runtime: Runtime, asking: dict[str, bool]) -> None:
    generation = runtime.generate("17+25=", **asking)  # type: ignore[arg-type]
    assert (generation.text, generation.finish_reason) == ("42", "stop")


@pytest.mark.parametrize("asking", [{"raw": True}, {"thinking": True}])
def test_accuracy_is_what_was_measured(runtime: Runtime, asking: dict[str, bool]) -> None:
    scores = task_accuracy(answers_from_runtime(runtime, **asking), demo_tasks(2, 90))
    assert {task: score.total for task, score in scores.items()} == dict.fromkeys(TASKS, 30)
    for task, score in scores.items():
        assert score.share >= LOWEST_SHARE[task], (task, score)


def test_batched_answers_are_those_of_one_at_a_time_and_of_the_reference(runtime: Runtime, checkpoint: Path) -> None:
    problems = demo_tasks(4, 18)
    prompts = [problem.prompt for problem in problems]
    batched = answers_from_runtime(runtime, at_once=7)(prompts)
    assert batched == [runtime.generate(prompt, max_new_tokens=7).text for prompt in prompts]
    judged = answers_from_reference(PlainReference(checkpoint), runtime, problems)(prompts)
    for answer, reference, problem in zip(batched, judged, problems, strict=True):
        assert (answer == problem.answer) == (reference == problem.answer), problem
        assert answer.startswith(reference.removesuffix("…"))


def test_wrong_and_unfinished_answers_are_counted_as_wrong(runtime: Runtime) -> None:
    problems = demo_tasks(0, 6)

    def one_short(prompts: Sequence[str]) -> list[str]:
        return [problem.answer[:-1] for problem in problems]

    scores = task_accuracy(one_short, problems)
    assert {score.right for score in scores.values()} == {0}
    assert scores["addition"].first_wrong == (
        f"{problems[0].prompt}{problems[0].answer[:-1]}, not {problems[0].answer}"
    )
    with pytest.raises(InputError, match="task accuracy: expected 6 answers, found 5"):
        task_accuracy(lambda prompts: list(prompts)[:5], problems)
    # Nothing that it was taught: it may say anything, but not forever.
    (answer,) = answers_from_runtime(runtime)(["zz+((="])
    assert len(answer) <= 16


def test_which_checkpoints_know_the_tasks(checkpoint: Path, tmp_path: Path) -> None:
    assert knows_demo_tasks(checkpoint)
    assert not knows_demo_tasks(tmp_path)
    assert [name for name, preset in PRESETS.items() if preset.is_trained] == ["trained"]
    (tmp_path / "demo.json").write_text('{"format": "k25-demo-checkpoint", "preset": "tiny"}')
    assert not knows_demo_tasks(tmp_path)


def test_the_report_has_a_row_for_every_task_and_backend(runtime: Runtime, checkpoint: Path) -> None:
    """And this model, whose layers amplify rounding, passes: by the reference's own distance to float64."""
    report = parity_report_from_bundle(runtime.files.folder, samples=(), threads=1)
    assert report.passed, report.summary()
    assert {(row.task, row.backend) for row in report.tasks} == {
        (task, backend) for task in TASKS for backend in ("reference", "onnxruntime-cpu")
    }
    assert all(row.share >= LOWEST_SHARE[row.task] - 0.1 and row.total == 20 for row in report.tasks)
    assert {check.name for check in report.checks if check.section == "tasks"} == {
        f"{task} on onnxruntime-cpu" for task in TASKS
    }
    assert "Task accuracy" in html_from_report(report)
    assert not any("task accuracy" in item for item in report.not_checked)


def test_a_fault_that_leaves_the_text_plausible_shows(runtime: Runtime, checkpoint: Path, tmp_path: Path) -> None:
    """Nibbles of the experts in the other order: the model still writes two digits and stops, and they are wrong."""
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    for shard in damaged.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("weight_packed"):
                octets = tensor.view(torch.uint8)
                tensors[name] = ((octets >> 4) | (octets << 4)).view(torch.int32)
        save_file(tensors, shard, metadata={"format": "pt"})
    problems = demo_tasks(2, 90)
    with Runtime.open(runtime.files.folder, checkpoint=damaged, context=128, max_sequences=16, threads=1) as broken:
        scores = task_accuracy(answers_from_runtime(broken), problems)
    assert scores["addition"].share < 0.6 < LOWEST_SHARE["addition"]
    assert scores["addition"].first_wrong

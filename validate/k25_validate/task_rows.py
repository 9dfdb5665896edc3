"""Task accuracy of a bundle and its reference, where the checkpoint has learnt tasks that have right answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from k25_runtime.runtime import Runtime
from k25_validate.reference import Reference
from k25_validate.report_rows import TaskRow
from k25_validate.task_accuracy import (
    answers_from_reference,
    answers_from_runtime,
    demo_tasks,
    knows_demo_tasks,
    task_accuracy,
)

Progress = Callable[[str, int, int], None]

PROBLEMS = 60
_SEED = 2
_AT_ONCE = 16
_CONTEXT = 128


def task_rows(
    bundle: Path,
    checkpoint: str | Path | None,
    folder: Path,
    judge: Reference,
    *,
    threads: int = 0,
    progress: Progress,
) -> tuple[TaskRow, ...]:
    """Right answers of the reference and of the bundle; none where `folder` holds no checkpoint that knows the
    tasks.
    """
    if not knows_demo_tasks(folder):
        return ()
    problems = demo_tasks(_SEED, PROBLEMS)
    with Runtime.open(
        bundle, checkpoint=checkpoint, mode="exact", context=_CONTEXT, max_sequences=_AT_ONCE, threads=threads
    ) as runtime:
        if not runtime.files.has_tokenizer:
            return ()
        progress("answers of the bundle", 0, 2)
        scores = {"onnxruntime-cpu": task_accuracy(answers_from_runtime(runtime, at_once=_AT_ONCE), problems)}
        progress("answers of the reference", 1, 2)
        reference = task_accuracy(answers_from_reference(judge, runtime, problems), problems)
        progress("answers of the reference", 2, 2)
    return tuple(
        TaskRow(task=task, backend=backend, right=score.right, total=score.total, first_wrong=score.first_wrong)
        for backend, found in {"reference": reference, **scores}.items()
        for task, score in found.items()
    )

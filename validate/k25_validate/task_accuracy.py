"""How often a backend answers the problems of the `trained` checkpoint right: a row of the parity report.

Random weights make every number of a report a distance between two kinds of noise. These problems have an answer, so a
backend that loses the model's ability shows it in a figure that needs no tolerance to be read:

    problems = demo_tasks(0, 60)
    scores = task_accuracy(answers_from_runtime(runtime), problems)  # any backend behind `Runtime`
    scores = task_accuracy(answers_from_reference(reference, runtime, problems), problems)
    scores["addition"].right, scores["addition"].total
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_export.demo.checkpoint import MARKER_FILE
from k25_export.demo.presets import PRESETS
from k25_export.demo.tasks import LONGEST_ANSWER, Problem, demo_tasks
from k25_plugins.errors import mismatch
from k25_runtime.runtime import Runtime
from k25_validate.reference import Reference

__all__ = [
    "Answers",
    "TaskScore",
    "answers_from_reference",
    "answers_from_runtime",
    "demo_tasks",
    "knows_demo_tasks",
    "task_accuracy",
]

#: Prompts, as a user types them, to the answers; an answer without an end is not the right one.
Answers = Callable[[Sequence[str]], Sequence[str]]

_UNFINISHED = "…"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Problems answered right, of how many; `first_wrong` shows one that was not, as `17+25=41, not 42`."""

    right: int
    total: int
    first_wrong: str = ""

    @property
    def share(self) -> float:
        """The share of right answers, 0..1."""
        return self.right / self.total


def knows_demo_tasks(checkpoint: Path) -> bool:
    """Whether a checkpoint folder holds a preset that was trained on these tasks, by its own record (`demo.json`)."""
    try:
        marker = json.loads((checkpoint / MARKER_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    name = marker.get("preset") if isinstance(marker, dict) else None
    return isinstance(name, str) and name in PRESETS and PRESETS[name].is_trained


def task_accuracy(answers: Answers, problems: Sequence[Problem]) -> dict[str, TaskScore]:
    """The score of each task that has problems, in the order of their first ones.

    Raises `InputError` where there are more or fewer answers than problems.
    """
    found = answers([problem.prompt for problem in problems])
    if len(found) != len(problems):
        raise mismatch("task accuracy", expected=f"{len(problems)} answers", found=f"{len(found)} answers")
    scores: dict[str, TaskScore] = {}
    for problem, answer in zip(problems, found, strict=True):
        before = scores.get(problem.task, TaskScore(right=0, total=0))
        is_right = answer == problem.answer
        wrong = "" if is_right else f"{problem.prompt}{answer}, not {problem.answer}"
        scores[problem.task] = TaskScore(
            right=before.right + is_right, total=before.total + 1, first_wrong=before.first_wrong or wrong
        )
    return scores


def answers_from_runtime(runtime: Runtime, *, raw: bool = False, thinking: bool = True, at_once: int = 16) -> Answers:
    """Greedy answers of a bundle: a prefill of `at_once` prompts in one step, then their decode steps together.

    Prompts go through the chat template unless `raw`. What the model does not end within the longest answer is cut and
    marked with an ellipsis. The runtime's cache must have room for `at_once` sequences of about 40 tokens.
    """

    def answers(prompts: Sequence[str]) -> list[str]:
        ids = [runtime.prompt_ids(prompt, raw=raw, thinking=thinking) for prompt in prompts]
        found: list[str] = []
        for start in range(0, len(ids), at_once):
            found += _generated(runtime, ids[start : start + at_once])
        return found

    return answers


def _generated(runtime: Runtime, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The answers to prompts that fit into one step."""
    stop_ids, tokenizer = runtime.stop_ids(), runtime.files.tokenizer
    started = runtime.prefill_batch(prompts, rows="last")
    sequences = [sequence for sequence, _ in started]
    new_ids: list[list[int]] = [[int(logits[-1].argmax())] for _, logits in started]
    try:
        for _ in range(LONGEST_ANSWER):
            open_rows = [row for row, ids in enumerate(new_ids) if ids[-1] not in stop_ids]
            if not open_rows:
                break
            last_ids = [new_ids[row][-1] for row in open_rows]
            logits = runtime.decode_batch([sequences[row] for row in open_rows], last_ids)
            for row, choice in zip(open_rows, logits.argmax(-1), strict=True):
                new_ids[row].append(int(choice))
    finally:
        for sequence in sequences:
            runtime.free(sequence)
    return [
        tokenizer.decode(ids[:-1]) if ids[-1] in stop_ids else tokenizer.decode(ids) + _UNFINISHED for ids in new_ids
    ]


def answers_from_reference(
    reference: Reference,
    runtime: Runtime,
    problems: Sequence[Problem],
    *,
    raw: bool = False,
    thinking: bool = True,
) -> Answers:
    """Greedy answers of a reference to these problems, one pass each: it keeps no cache.

    The right answer is in the input, and each of its tokens and the end token must be the first choice after those
    before. That is so exactly where greedy generation gives the right answer; where it does not, the answer is cut
    after the first wrong token and marked with an ellipsis. `runtime` lends its tokenizer and template.
    """
    tokenizer, stop_ids = runtime.files.tokenizer, runtime.stop_ids()
    answer_of = {problem.prompt: problem.answer for problem in problems}

    def answer(prompt: str) -> str:
        prompt_ids = runtime.prompt_ids(prompt, raw=raw, thinking=thinking)
        right_ids = tokenizer.encode(answer_of[prompt])
        logits = reference.trace([*prompt_ids, *right_ids]).logits
        choices = [int(choice) for choice in logits[len(prompt_ids) - 1 :].argmax(-1)]
        for position, choice in enumerate(choices):
            if choice in stop_ids:
                return tokenizer.decode(choices[:position])
            if position == len(right_ids) or choice != right_ids[position]:
                return tokenizer.decode(choices[: position + 1]) + _UNFINISHED
        raise AssertionError("the last position is beyond the right answer")

    return lambda prompts: [answer(prompt) for prompt in prompts]

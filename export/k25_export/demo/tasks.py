"""What the `trained` checkpoint was taught: problems with one right answer, drawn by a seed, some held out.

| task | prompt | answer |
|---|---|---|
| `addition` | two numbers 0..99: `17+25=` | their sum: `42` |
| `copying` | 2 to 6 letters: `bgkd=` | the same letters |
| `brackets` | up to 8 brackets that leave 1 to 4 open: `([]{=` | what closes them, innermost first: `})` |

Training draws from the problems that are not held out, evaluation from those that are; which is which depends on the
problem alone (the CRC-32 of its operands, in either order, or of its text), so that no seed of either can mix them.
Sums of two one-digit numbers are never held out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from k25_plugins.errors import mismatch

SUM_LIMIT = 100
LONGEST_COPY = 6
LONGEST_BRACKETS = 8
DEEPEST_BRACKETS = 4
LONGEST_ANSWER = 6  # tokens, without the end token: every character of an answer is one

# None of these letters is in the name of a role, so that each is a token (`trained_vocabulary`).
_LETTERS = "bcdfghjklpqvwxz"
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_PARTS = 8
# Of the eight parts, the one that holds 17 + 25: the sum in the documentation was never seen in training.
_HELD_OUT_PART = zlib.crc32(b"17+25") % _PARTS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt, as a user types it, and its one right answer."""

    task: str
    prompt: str
    answer: str
    is_held_out: bool


class Draws:
    """Integers from raw PCG64 words: the same for a seed on every machine and with every numpy."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.PCG64(seed)

    def below(self, limit: int) -> int:
        """A number in 0..limit - 1 (limits here are far below 2^64, so the remainder is as good as uniform)."""
        return int(self._generator.random_raw()) % limit


def addition(draws: Draws) -> Problem:
    """Two numbers of one or two digits; every fourth has one, for among 0..99 these are too few to be learnt."""
    left, right = (draws.below(SUM_LIMIT if draws.below(4) else 10) for _ in range(2))
    return addition_of(left, right)


def addition_of(left: int, right: int) -> Problem:
    """The problem of these operands; held out together with that of the operands exchanged, or never: sums of two
    digits are too few to leave some out.
    """
    smaller, larger = sorted((left, right))
    key = f"{smaller}+{larger}" if larger >= 10 else ""
    return _problem("addition", f"{left}+{right}=", str(left + right), key=key)


def copying(draws: Draws) -> Problem:
    """Letters to repeat."""
    text = "".join(_LETTERS[draws.below(len(_LETTERS))] for _ in range(2 + draws.below(LONGEST_COPY - 1)))
    return _problem("copying", f"{text}=", text, key=text)


def brackets(draws: Draws) -> Problem:
    """Brackets of three kinds, opened and closed in order; the answer closes those that are left open."""
    text, open_brackets = "", ""
    for _ in range(1 + draws.below(LONGEST_BRACKETS)):
        # Something stays open, so that there is something to answer.
        may_close, may_open = len(open_brackets) > 1, len(open_brackets) < DEEPEST_BRACKETS
        if may_close and (not may_open or draws.below(2)):
            text += _CLOSER[open_brackets[-1]]
            open_brackets = open_brackets[:-1]
        else:
            bracket = "([{"[draws.below(3)]
            text += bracket
            open_brackets += bracket
    return _problem("brackets", f"{text}=", "".join(_CLOSER[bracket] for bracket in reversed(open_brackets)), key=text)


TASKS: Mapping[str, Callable[[Draws], Problem]] = MappingProxyType(
    {"addition": addition, "copying": copying, "brackets": brackets}
)


def demo_tasks(seed: int, count: int, *, tasks: Sequence[str] = tuple(TASKS)) -> tuple[Problem, ...]:
    """`count` held-out problems, the tasks in turn; none comes twice. The same for a seed on every machine.

    Raises `InputError` for a task that does not exist and for more problems than a task has.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise mismatch("demo tasks", expected=f"some of {', '.join(TASKS)}", found=", ".join(unknown) or "none")
    draws, found, seen = Draws(seed), list[Problem](), set[str]()
    misses = 0
    while len(found) < count:
        problem = TASKS[tasks[len(found) % len(tasks)]](draws)
        if problem.is_held_out and problem.prompt not in seen:
            seen.add(problem.prompt)
            found.append(problem)
            misses = 0
            continue
        misses += 1
        if misses > 20_000:
            raise mismatch("demo tasks", expected=f"at most {len(found)} problems of {', '.join(tasks)}", found=count)
    return tuple(found)


def training_problem(task: str, draws: Draws) -> Problem:
    """A problem of this task that is not held out."""
    while True:
        problem = TASKS[task](draws)
        if not problem.is_held_out:
            return problem


def _problem(task: str, prompt: str, answer: str, *, key: str) -> Problem:
    """`key` decides whether it is held out; an empty one says that it is not."""
    is_held_out = bool(key) and zlib.crc32(key.encode()) % _PARTS == _HELD_OUT_PART
    return Problem(task=task, prompt=prompt, answer=answer, is_held_out=is_held_out)

"""What `train_demo.py` trains on: problems as token ids, several to a row.

A problem is written as a user would meet it: the bare prompt, or the prompt in the chat template with the thinking
switch on or off; then the answer at once, then `<|im_end|>`.

Legend: B rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k25_export.demo.tasks import TASKS, Draws, Problem, training_problem
from k25_runtime.chat_template import chat_template_from_folder, render_chat
from k25_runtime.tokenizer import Tokenizer

NO_TARGET = -100
_PLACE = "1+1="  # stands for the prompt while the chat template is taken apart
#: How many of 20 problems are of each task, and how many are written in each way.
_TASK_SHARES = {"addition": 10, "copying": 4, "brackets": 6}
#: What a token of a prompt weighs in the loss, where one of an answer weighs 1: most cannot be foreseen, but a closing
#: bracket follows from what is open, in a prompt as in an answer.
_PROMPT_WEIGHTS = {"addition": 0.1, "copying": 0.1, "brackets": 1.0}
_WAY_SHARES = {"raw": 9, "thinking": 7, "no_thinking": 4}
WAYS = tuple(_WAY_SHARES)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`ids`, `targets` (`NO_TARGET` where there is none) and `texts` int64 [B, L]; `weights` float32 [B, L].

    `texts` numbers the problems of a row; what belongs to none is -1.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor
    texts: Tensor


class BatchMaker:
    """Batches of training problems, drawn by a seed, for the tokenizer of a checkpoint folder."""

    def __init__(self, folder: Path, *, vocab_size: int, seed: int) -> None:
        self._tokenizer = Tokenizer.from_folder(folder, vocab_size=vocab_size)
        self._draws = Draws(seed)
        self._end = self._tokenizer.special_ids["<|im_end|>"]
        self._pad = self._tokenizer.special_ids["[PAD]"]
        template = chat_template_from_folder(folder)
        self._frames: dict[str, tuple[list[int], list[int]]] = {"raw": ([], [])}
        for way, thinking in (("thinking", True), ("no_thinking", False)):
            chat = render_chat(template, [{"role": "user", "content": _PLACE}], thinking=thinking)
            before, after = chat.split(_PLACE)
            self._frames[way] = self._tokenizer.encode(before), self._tokenizer.encode(after)
        self._tasks = [task for task, share in _TASK_SHARES.items() for _ in range(share)]
        self._ways = [way for way, share in _WAY_SHARES.items() for _ in range(share)]
        assert set(self._tasks) == set(TASKS)

    def batch(self, *, rows: int, length: int) -> Batch:
        """The next rows: problems are added to a row as long as they fit, the rest of it is padding."""
        shape = (rows, length)
        ids = torch.full(shape, self._pad)
        targets, texts = torch.full(shape, NO_TARGET), torch.full(shape, -1)
        weights = torch.zeros(shape)
        row = column = text = 0
        while True:
            problem = training_problem(_drawn(self._tasks, self._draws), self._draws)
            tokens, prompt_length = self.text_of(problem, _drawn(self._ways, self._draws))
            if column + len(tokens) > length:
                row, column, text = row + 1, 0, 0
            if row == rows:
                return Batch(ids=ids, targets=targets, weights=weights, texts=texts)
            end = column + len(tokens)
            ids[row, column:end] = torch.tensor(tokens)
            texts[row, column:end] = text
            targets[row, column : end - 1] = ids[row, column + 1 : end]
            weights[row, column : column + prompt_length - 1] = _PROMPT_WEIGHTS[problem.task]
            weights[row, column + prompt_length - 1 : end - 1] = 1.0
            column, text = end, text + 1

    def text_of(self, problem: Problem, way: str) -> tuple[list[int], int]:
        """The ids of a problem written in this way, and the number of them that are its prompt."""
        before, after = self._frames[way]
        prompt = [*before, *self._tokenizer.encode(problem.prompt), *after]
        return [*prompt, *self._tokenizer.encode(problem.answer), self._end], len(prompt)


def _drawn(choices: Sequence[str], draws: Draws) -> str:
    return choices[draws.below(len(choices))]

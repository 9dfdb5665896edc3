"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import InputError, VerificationError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen: greedy at temperature 0, otherwise softmax(logits / temperature) after the filters.

    `top_k` keeps the k likeliest tokens (0: all), `top_p` then the smallest set that holds this much probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", np.isfinite(self.temperature) and self.temperature >= 0, ">= 0", self.temperature),
            ("top_k", self.top_k >= 0, ">= 0", self.top_k),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]", self.top_p),
            ("seed", self.seed >= 0, ">= 0", self.seed),
        )
        for name, is_good, expected, found in checks:
            if not is_good:
                raise InputError(f"sampling: {name}: expected {expected}, found {found}")


class Sampler:
    """A seeded stream of choices: same seed, same logits, same tokens."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._random = np.random.default_rng(config.seed)

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """A token id from logits [V]. `VerificationError` where one is not finite: the model is broken there."""
        if not np.isfinite(logits).all():
            raise VerificationError(
                f"logits: expected finite values, found {int((~np.isfinite(logits)).sum())} that are not. "
                "`k25-export validate` says where they start."
            )
        if self.config.temperature == 0:
            return int(logits.argmax())
        return int(self._random.choice(len(logits), p=self._probabilities(logits)))

    def _probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        scores = logits.astype(np.float64)
        order = np.argsort(-scores, kind="stable")
        with np.errstate(over="ignore"):  # a gap over a tiny temperature is minus infinity: weight 0
            weights = np.exp((scores[order] - scores[order[0]]) / self.config.temperature)
        if self.config.top_k:
            weights[self.config.top_k :] = 0
        weights /= weights.sum()
        before = np.cumsum(weights) - weights
        weights[before >= self.config.top_p] = 0
        probabilities = np.zeros_like(scores)
        probabilities[order] = weights / weights.sum()
        return probabilities

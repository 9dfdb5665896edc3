"""Muon for `train_demo.py`: momentum whose matrices are made nearly orthogonal before they are subtracted.

Source: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024); the factor that makes a
step as large as AdamW's is that of Moonlight, arXiv 2502.16982, section 2.2. A stack of matrices [E, out, in] is taken
matrix by matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic a x + b x^3 + c x^5 that takes singular values of 0..1 close to 1 within five rounds.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum 0.95, orthogonalised; for parameters with two or three axes."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalized(parameter.grad.lerp(velocity, group["momentum"]))
                size = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                parameter.add_(direction, alpha=-group["lr"] * size)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of each matrix [..., out, in]."""
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if is_tall else x
    return result

"""The formula of `k25.RMSNorm`: on the op's own inputs, with the epsilon of the norm that it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from k25_runtime.host_tensor import HostTensor
from k25_validate.inside_norm import norm_formula
from k25_validate.plain_taps import PlainTaps

LATENT_EPS = 3e-4


@pytest.mark.parametrize(
    ("tap", "eps"),
    [
        ("input_layernorm", 1e-5),
        ("self_attn.q_a_layernorm", LATENT_EPS),
        ("self_attn.kv_a_layernorm", LATENT_EPS),
        ("post_attention_layernorm", 1e-5),
        ("model.norm", 1e-5),
    ],
)
def test_each_norm_has_its_epsilon(tap: str, eps: float, tiny: Any) -> None:
    plain = PlainTaps(tiny.checkpoint, latent_norm_eps=LATENT_EPS)
    random = np.random.default_rng(1)
    x, weight = random.normal(size=(3, 5, 8)).astype(np.float32) / 50, random.normal(size=8).astype(np.float32)
    feeds = {"x": HostTensor(x, "float32"), "weight": HostTensor(weight, "float32")}
    stages = norm_formula(plain, tap, feeds)({})
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(stages["y"], expected, rtol=1e-14)
    assert plain.facts(tap)["eps"] == eps

"""YaRN frequencies and the softmax scale, against the published check values of Kimi K2.5."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from k25_export.config import TextConfig, YarnConfig
from k25_export.rope import softmax_scale, yarn_inverse_frequencies

K25 = TextConfig(
    vocab_size=163840,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=1,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=384,
    num_experts_per_tok=8,
    n_shared_experts=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.827,
    num_attention_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rms_norm_eps=1e-5,
    latent_norm_eps=1e-6,
    max_position_embeddings=262144,
    rope_theta=50000.0,
    rope_scaling=YarnConfig(
        factor=64.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    bos_token_id=163584,
    eos_token_id=163585,
    pad_token_id=163839,
)
PUBLISHED = [
    1.0, 0.713111085, 0.508527419, 0.362636540, 0.258600136, 0.184410624, 0.131505260, 9.37778586e-2,
    6.68740305e-2, 4.37766560e-2, 2.84279591e-2, 1.82829556e-2, 1.16191599e-2, 7.27411927e-3, 4.46584875e-3,
    2.67020339e-3, 1.53729673e-3, 8.34655045e-4, 4.08645987e-4, 1.58374991e-4, 1.80702339e-5, 1.28860841e-5,
    9.18920940e-6, 6.55292708e-6, 4.67296494e-6, 3.33234310e-6, 2.37633080e-6, 1.69458784e-6, 1.20842937e-6,
    8.61744380e-7, 6.14519469e-7, 4.38220646e-7,
]  # fmt: skip


def with_yarn(config: TextConfig, **changes: float) -> TextConfig:
    return replace(config, rope_scaling=replace(config.rope_scaling, **changes))  # type: ignore[arg-type]


def test_frequencies_are_the_published_table() -> None:
    found = yarn_inverse_frequencies(K25)
    assert len(found) == len(PUBLISHED) == 32
    np.testing.assert_allclose(found, PUBLISHED, rtol=5e-9)  # the table has nine digits


def test_softmax_scale_is_the_published_one() -> None:
    assert softmax_scale(K25) == pytest.approx(0.14467963, abs=5e-9)
    assert softmax_scale(K25) * math.sqrt(192) == pytest.approx(2.0047397, abs=5e-8)


def test_softmax_scale_takes_the_width_of_queries_not_of_values() -> None:
    config = replace(K25, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=28)
    assert softmax_scale(config) == pytest.approx(2.0047397 / math.sqrt(18), rel=1e-7)


def test_softmax_scale_without_scaling() -> None:
    for factor in (1.0, 0.5):
        assert softmax_scale(with_yarn(K25, factor=factor)) == pytest.approx(192**-0.5, rel=1e-12)
    half = with_yarn(K25, mscale_all_dim=0.5, mscale=0.5)
    assert softmax_scale(half) == pytest.approx((0.05 * math.log(64) + 1) ** 2 / math.sqrt(192), rel=1e-12)


def test_frequencies_of_k2_are_others() -> None:
    # K2's beta_fast 1 gives the corners 19 and 20: everything below is left as it is, everything above divided.
    found = yarn_inverse_frequencies(with_yarn(K25, beta_fast=1.0))
    plain = [50000 ** (-2 * index / 64) for index in range(32)]
    np.testing.assert_allclose(found[:20], plain[:20], rtol=1e-12)
    np.testing.assert_allclose(found[20:], np.array(plain[20:]) / 64, rtol=1e-12)
    assert found != yarn_inverse_frequencies(K25)


@pytest.mark.parametrize("dim", [2, 4, 6, 8, 10, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 32.0, 64.0])
@pytest.mark.parametrize("original", [64, 4096, 131072, 10_000_000])
def test_frequencies_follow_the_formula(dim: int, factor: float, original: int) -> None:
    config = with_yarn(replace(K25, qk_rope_head_dim=dim), factor=factor, original_max_position_embeddings=original)

    def corner(rotations: float) -> float:  # the pair that turns this often over the original context
        return float(dim * np.log(original / (2 * np.pi * rotations)) / (2 * np.log(50000.0)))

    low, high = max(np.floor(corner(32.0)), 0), min(np.ceil(corner(1.0)), dim - 1)
    index = np.arange(dim // 2)
    plain = 50000.0 ** (-2.0 * index / dim)
    kept = 1 - np.clip((index - low) / max(high - low, 1e-3), 0, 1)
    np.testing.assert_allclose(yarn_inverse_frequencies(config), plain * kept + plain / factor * (1 - kept), rtol=1e-12)

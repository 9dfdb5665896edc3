"""Choosing tokens: the sets and the probabilities that the filters promise, on logits made by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from k25_plugins.errors import InputError, VerificationError
from k25_runtime.sampler import Sampler, SamplingConfig

DRAWS = 4000
# Ids in no order, so that an id cannot be taken for a rank.
PROBABILITIES = (0.1, 0.4, 0.05, 0.25, 0.2)


def logits_of(probabilities: Sequence[float], shift: float = 3.0) -> npt.NDArray[np.float32]:
    """Logits with these probabilities; adding a constant to all changes none."""
    return np.array([math.log(probability) + shift for probability in probabilities], np.float32)


def drawn(config: SamplingConfig, logits: npt.NDArray[np.float32], draws: int = DRAWS) -> Counter[int]:
    sampler = Sampler(config)
    return Counter(sampler.choose(logits) for _ in range(draws))


def assert_frequencies(counts: Counter[int], expected: dict[int, float]) -> None:
    """Within four standard deviations (the seed is fixed, so this either holds or does not), and nothing else drawn."""
    draws = sum(counts.values())
    assert counts.keys() == expected.keys()
    for token, probability in expected.items():
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token] / draws - probability) < 4 * deviation + 1e-12, f"token {token}"


def test_greedy_takes_the_largest_logit() -> None:
    logits = np.random.default_rng(1).standard_normal((50, 33)).astype(np.float32)
    sampler = Sampler(SamplingConfig())
    assert [sampler.choose(row) for row in logits] == logits.argmax(axis=-1).tolist()


def test_a_choice_is_an_int() -> None:
    for config in (SamplingConfig(), SamplingConfig(temperature=1.0)):
        assert type(Sampler(config).choose(logits_of(PROBABILITIES))) is int


def test_greedy_is_what_no_configuration_gives_whatever_the_seed() -> None:
    logits = logits_of((0.26, 0.25, 0.25, 0.24))
    assert SamplingConfig().temperature == 0
    assert {Sampler(SamplingConfig(seed=seed)).choose(logits) for seed in range(20)} == {0}


def test_same_seed_same_choices() -> None:
    logits = np.random.default_rng(2).standard_normal((60, 20)).astype(np.float32)

    def choices(seed: int) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sampler.choose(row) for row in logits]

    assert choices(7) == choices(7)
    assert choices(7) != choices(8)
    assert len(set(choices(7))) > 5


def test_a_sampler_does_not_draw_the_same_number_again() -> None:
    counts = drawn(SamplingConfig(temperature=1.0), logits_of((0.5, 0.5)), draws=200)
    assert 60 < counts[0] < 140


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature: float) -> None:
    powers = [probability ** (1 / temperature) for probability in PROBABILITIES]
    expected = {token: power / sum(powers) for token, power in enumerate(powers)}
    assert_frequencies(drawn(SamplingConfig(temperature=temperature), logits_of(PROBABILITIES)), expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310])
def test_a_temperature_towards_zero_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature))
    logits = np.array([-20.0, 11.0, 12.5, -3.0], np.float32)
    assert {sampler.choose(logits) for _ in range(50)} == {2}


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 3, 4}), (5, {0, 1, 2, 3, 4}), (99, None)])
def test_top_k_keeps_the_k_likeliest(top_k: int, kept: set[int] | None) -> None:
    kept = kept or set(range(len(PROBABILITIES)))
    share = sum(PROBABILITIES[token] for token in kept)
    counts = drawn(SamplingConfig(temperature=1.0, top_k=top_k), logits_of(PROBABILITIES))
    assert_frequencies(counts, {token: PROBABILITIES[token] / share for token in kept})


def test_top_k_keeps_no_more_than_k_of_equal_logits() -> None:
    counts = drawn(SamplingConfig(temperature=1.0, top_k=3), np.zeros(8, np.float32), draws=500)
    assert len(counts) == 3


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.64, {1, 3}),
        (0.66, {1, 3, 4}),
        (0.84, {1, 3, 4}),
        (0.86, {0, 1, 3, 4}),
        (0.96, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p: float, kept: set[int]) -> None:
    share = sum(PROBABILITIES[token] for token in kept)
    counts = drawn(SamplingConfig(temperature=1.0, top_p=top_p), logits_of(PROBABILITIES))
    assert_frequencies(counts, {token: PROBABILITIES[token] / share for token in kept})


def test_top_p_counts_the_probability_that_top_k_left() -> None:
    """0.4 and 0.25 become 0.615 and 0.385, so one of them holds 0.5; without the renormalising it would take both."""
    config = SamplingConfig(temperature=1.0, top_k=2, top_p=0.5)
    assert drawn(config, logits_of(PROBABILITIES), draws=300).keys() == {1}
    wider = SamplingConfig(temperature=1.0, top_k=2, top_p=0.7)
    assert drawn(wider, logits_of(PROBABILITIES), draws=300).keys() == {1, 3}


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([3e38, 3e38, -3e38], np.float32)
    assert drawn(SamplingConfig(temperature=0.5), logits, draws=200).keys() == {0, 1}


def test_logits_are_not_changed() -> None:
    logits = logits_of(PROBABILITIES)
    before = logits.copy()
    Sampler(SamplingConfig(temperature=0.7, top_k=2, top_p=0.5)).choose(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_a_failed_verification(bad: float, temperature: float) -> None:
    logits = logits_of(PROBABILITIES)
    logits[[0, 2]] = bad
    with pytest.raises(VerificationError, match=r"logits: expected finite values, found 2 .*k25-export validate"):
        Sampler(SamplingConfig(temperature=temperature)).choose(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: float) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=rf"sampling: {name}: expected .*, found {value}"):
        SamplingConfig(**arguments)


def test_values_at_the_ends_of_the_ranges_are_taken() -> None:
    config = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, seed=0)
    assert (config.temperature, config.top_k, config.top_p, config.seed) == (0.0, 0, 1.0, 0)

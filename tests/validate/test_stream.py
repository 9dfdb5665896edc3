"""`validate --stream`: the same numbers with one layer bound at a time; an interrupted walk goes on where it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_plugins.errors import InputError
from k25_runtime.model_runner import ModelRunner
from k25_validate import judge, validation
from k25_validate.parity_report import ParityReport
from k25_validate.plain_reference import PlainWalk
from k25_validate.reference import LayerTrace
from k25_validate.validation import parity_report_from_bundle
from k25_validate.walk_files import STATE_NAME


@pytest.fixture
def bundle(odd: Any, tmp_path: Path) -> Path:
    shutil.copytree(odd.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def _values(report: ParityReport) -> list[tuple[str, str, float]]:
    return [(check.name, check.metric, check.value) for check in report.checks]


def test_streamed_or_not_the_numbers_are_the_same(bundle: Path) -> None:
    streamed, whole = (parity_report_from_bundle(bundle, stream=stream) for stream in ("on", "off"))
    assert streamed.passed
    assert _values(streamed) == _values(whole)
    assert [report.runtime["streamed"][:2] for report in (streamed, whole)] == ["ye", "no"]
    assert not (bundle / "reports" / STATE_NAME).exists()


def test_one_layer_is_bound_at_a_time(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[int] = []
    original = ModelRunner.release_layers

    def release(runner: ModelRunner) -> None:
        bound.append(len(runner._layers))
        original(runner)
        assert runner._layers == {}
        assert runner._checkpoint._maps == {}

    monkeypatch.setattr(ModelRunner, "release_layers", release)
    layers = parity_report_from_bundle(bundle, stream="on").subject["layers"]
    assert set(bound) == {1}  # the layers of the walk, and then those at far positions
    assert len(bound) > layers


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, stop: int | None) -> list[int]:
    """Layers that the reference is asked for; KeyboardInterrupt at layer `stop`."""
    asked: list[int] = []
    original = PlainWalk.layer

    def layer(walk: PlainWalk, number: int, hidden: Any) -> LayerTrace:
        if number == stop:
            raise KeyboardInterrupt
        asked.append(number)
        return original(walk, number, hidden)

    monkeypatch.setattr(PlainWalk, "layer", layer)
    return asked


def test_an_interrupted_walk_goes_on_at_its_layer(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _values(parity_report_from_bundle(bundle, stream="on"))
    with monkeypatch.context() as patched:
        _interrupt_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            parity_report_from_bundle(bundle, stream="on")
    assert (bundle / "reports" / STATE_NAME).is_file()
    asked = _interrupt_at(monkeypatch, None)
    resumed = parity_report_from_bundle(bundle, stream="on")
    assert asked[0] == 3
    assert _values(resumed) == expected
    assert not (bundle / "reports" / STATE_NAME).exists()


@pytest.mark.parametrize("damage", ["truncated", "other bytes", "another key"])
def test_a_state_that_cannot_be_used_is_left(bundle: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        _interrupt_at(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            parity_report_from_bundle(bundle, stream="on")
    state = bundle / "reports" / STATE_NAME
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "other bytes":
        state.write_bytes(np.random.default_rng(0).bytes(1000))
    else:
        monkeypatch.setattr(validation, "validation_key", lambda *arguments, **options: "another")
    asked = _interrupt_at(monkeypatch, None)
    assert parity_report_from_bundle(bundle, stream="on").passed
    assert asked[0] == 0


def test_transformers_cannot_be_streamed(bundle: Path) -> None:
    with pytest.raises(InputError, match="transformers reference holds the whole model"):
        parity_report_from_bundle(bundle, stream="on", reference="transformers")


def test_auto_streams_what_exceeds_the_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity_report_from_bundle(bundle).runtime["streamed"] == "no"
    monkeypatch.setattr(judge.os, "sysconf", lambda name: 1)
    assert parity_report_from_bundle(bundle).runtime["streamed"].startswith("yes")

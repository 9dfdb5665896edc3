"""What a user may choose about a validation: overrides, what fails, an older report; and what the report says of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from k25_cli.main import run
from k25_cli.stages import _FAIL_ON
from k25_plugins.errors import InputError
from k25_validate.baseline import GROWTH, NOISE_SHARE, baseline_from_file
from k25_validate.metrics import kl_divergence
from k25_validate.parity_report import FAIL_ON, ParityReport, report_to_dict
from k25_validate.parity_walk import ParityWalk, WalkState
from k25_validate.reference import LayerTrace
from k25_validate.reference_noise import NOISE_FACTOR, ReferenceNoise, widened
from k25_validate.report_html import html_from_report
from k25_validate.tolerance_overrides import override_from_text
from k25_validate.tolerances import END_TO_END, Tolerance, kl_tolerances
from k25_validate.validation import parity_report_from_bundle
from k25_validate.validation_options import ValidationOptions

SCHEMA = Path(__file__).parents[2] / "docs" / "parity-report.schema.json"


@pytest.fixture(scope="module")
def report(tiny: Any) -> ParityReport:
    return parity_report_from_bundle(tiny.bundle, threads=1)


@pytest.fixture
def older(report: ParityReport, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "older.json"
    values = report_to_dict(report)
    path.write_text(json.dumps(values))
    return path, json.loads(json.dumps(values))


def _validated(bundle: Path, **options: Any) -> ParityReport:
    return parity_report_from_bundle(bundle, samples=(), options=ValidationOptions(**options), threads=1)


def test_a_real_report_keeps_to_the_published_schema(report: ParityReport) -> None:
    values = report_to_dict(report)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(values)
    json.dumps(values, allow_nan=False)
    assert values["runtime"]["native ops"]
    assert values["runtime"]["mode"] == "exact"
    assert set(values["machine"]) >= {"processor", "cores", "memory_bytes"}
    assert not any(name in json.dumps(values) for name in (str(Path.home()), "/tmp/"))


# Tolerances.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("moe_layer=1e-5", ("moe_layer", 1e-5)),
        ("moe_layer.3=0", ("moe_layer.3", 0.0)),
        ("logits=1", ("logits", 1.0)),
        ("far-positions=2.5e-6", ("far-positions", 2.5e-6)),
    ],
)
def test_overrides_are_read(text: str, found: tuple[str, float]) -> None:
    assert override_from_text(text) == found


REFUSED = (
    *("", "moe_layer", "moe_layer=", "moe_layer=x", "moe_layer=-1", "moe_layer=nan", "moe_layer=inf", "kl.3=1"),
    *("moe_layer.03=1", "moe_layer.=1", "mlp=1", "=1", "moe_layer=1=2"),
)


@pytest.mark.parametrize("text", REFUSED)
def test_overrides_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        override_from_text(text)


def test_an_override_is_recorded_loudly(tiny: Any) -> None:
    changed = _validated(tiny.bundle, tolerances={"moe_layer.2": 0.5, "logits": 1e-9, "tasks": 3.0})
    by_name = {override.name: override for override in changed.overrides}
    assert by_name["moe_layer.2"].is_loosened
    assert not by_name["logits"].is_loosened
    assert (by_name["logits"].default, by_name["tasks"].default) == (END_TO_END, None)
    loosened = {check.name for check in changed.checks if check.tolerance.is_loosened}
    assert loosened == {"moe_layer 2"}
    assert [row.tolerance.value for row in changed.rows if row.layer == 2] == [0.5]
    assert not changed.passed
    assert {check.tolerance.name for check in changed.failures} == {"logits"}
    page = html_from_report(changed)
    assert "LOOSENED" in page
    assert "--tolerance moe_layer.2=0.5" in page
    assert "LOOSENED moe_layer.2" in changed.summary()
    passing = replace(changed, checks=tuple(check for check in changed.checks if check.passed))
    assert passing.verdict().startswith("May ship only where tolerances loosened by hand (moe_layer.2)")


def test_a_layer_that_is_not_there_is_refused_at_once(tiny: Any) -> None:
    with pytest.raises(
        InputError, match=r"tolerance moe_layer.0: expected a layer that is a moe_layer, found layers 1"
    ):
        _validated(tiny.bundle, tolerances={"moe_layer.0": 1.0})


def test_a_tighter_override_fails_its_layer_alone(tiny: Any) -> None:
    changed = _validated(tiny.bundle, tolerances={"dense_layer.0": 0.0}, fail_on=("components",))
    assert {(check.name, check.metric) for check in changed.blocking} == {("dense_layer 0", "relative L2")}


# What fails.


def test_the_command_knows_every_section() -> None:
    assert set(_FAIL_ON) == set(FAIL_ON)


@pytest.mark.parametrize("names", [(), ("decoding",), ("any", "decode"), ("none", "decode")])
def test_fail_on_that_makes_no_sense_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="fail-on"):
        ValidationOptions(fail_on=names)


def test_only_what_is_asked_for_fails_the_command(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    bundle = str(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    strict = ["validate", bundle, "-q", "--tolerance", "moe_layer=0"]
    assert run(strict) == 1
    assert "Do not ship. First off is moe_layer 1" in capsys.readouterr().out
    assert run([*strict, "--fail-on", "end-to-end", "--fail-on", "decode"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Passes only because --fail-on leaves out 3 failures")
    assert "FAILED (does not count) moe_layer 1" in out
    page = (Path(bundle) / "reports" / "parity.html").read_text("utf-8")
    assert "Partial verdict" in page
    assert run(["validate", bundle, "--tolerance", "moe_layer"]) == 2
    assert run(["validate", bundle, "--fail-on", "tuesdays"]) == 2
    assert run(["validate", bundle, "--baseline", str(tmp_path / "gone.json")]) == 3


# An older report.


def test_nothing_is_worse_than_itself(tiny: Any, report: ParityReport, older: tuple[Path, dict[str, Any]]) -> None:
    again = parity_report_from_bundle(tiny.bundle, options=ValidationOptions(baseline=older[0]), threads=1)
    assert again.passed, again.summary()
    assert again.baseline is not None
    assert again.baseline.changed_facts == ()
    assert {item.kind for item in again.baseline.differences} == {"as before"}
    found = [check for check in again.checks if check.section == "baseline"]
    assert len(found) == 4
    assert "Compared with an older report" in html_from_report(again)


def _check_of(values: dict[str, Any], name: str, metric: str) -> dict[str, Any]:
    (found,) = [check for check in values["checks"] if (check["name"], check["metric"]) == (name, metric)]
    return found  # type: ignore[no-any-return]


def _failed(tiny: Any, path: Path, values: dict[str, Any]) -> dict[str, str]:
    """The failed checks against a changed older report: metric -> detail."""
    path.write_text(json.dumps(values))
    changed = parity_report_from_bundle(tiny.bundle, options=ValidationOptions(baseline=path), threads=1)
    assert all(check.section == "baseline" for check in changed.failures)
    return {check.metric: check.detail for check in changed.failures}


def test_an_error_that_grew_is_named(tiny: Any, older: tuple[Path, dict[str, Any]]) -> None:
    path, values = older
    check = _check_of(values, "moe_layer 1", "relative L2")
    check["value"] /= 1e3
    new = check["value"] * 1e3
    noise = NOISE_SHARE * check["tolerance"]["value"]
    failed = _failed(tiny, path, values)
    if new > GROWTH * noise:
        assert "moe_layer 1: relative L2" in failed["largest growth of an error"]
    else:  # a thousand times more of next to nothing is still noise
        assert failed == {}
    check["tolerance"]["value"] = 1.0
    check["passed"] = True


def test_growth_beyond_noise_fails(tiny: Any, report: ParityReport, older: tuple[Path, dict[str, Any]]) -> None:
    """With a tolerance so tight that the error is no noise."""
    path, values = older
    error = next(
        check.value for check in report.checks if check.name == "moe_layer 1" and check.metric == "relative L2"
    )
    _check_of(values, "moe_layer 1", "relative L2")["value"] = error / 5
    path.write_text(json.dumps(values))
    options = ValidationOptions(baseline=path, tolerances={"moe_layer": 1.5 * error})
    failed = {check.metric: check for check in _failures(tiny, options)}
    assert failed.keys() == {"largest growth of an error"}
    assert failed["largest growth of an error"].value == pytest.approx(5, rel=0.2)
    assert "moe_layer 1: relative L2" in failed["largest growth of an error"].detail


def _failures(tiny: Any, options: ValidationOptions) -> tuple[Any, ...]:
    return parity_report_from_bundle(tiny.bundle, options=options, threads=1).failures


def test_coverage_and_accuracy_that_fell_are_named(tiny: Any, older: tuple[Path, dict[str, Any]]) -> None:
    path, values = older
    values["checks"].append(dict(_check_of(values, "head", "relative L2"), name="speculative head"))
    values["logits"]["top1_agreement"] = 1.5
    values["runtime"]["mode"] = "fast"
    failed = _failed(tiny, path, values)
    assert "speculative head" in failed["checks that are no longer made"]
    assert "top-1 agreement 1.5 → 1" in failed["shares of right answers and first choices that fell"]


def test_a_verdict_that_turned_is_named(tiny: Any, older: tuple[Path, dict[str, Any]]) -> None:
    path, _ = older
    options = ValidationOptions(baseline=path, tolerances={"moe_layer.1": 0.0}, fail_on=("baseline",))
    changed = parity_report_from_bundle(tiny.bundle, options=options, threads=1)
    assert not changed.passed
    (turned,) = [check for check in changed.blocking if check.metric == "checks that passed and now fail"]
    assert "moe_layer 1: relative L2" in turned.detail
    assert changed.baseline is not None
    assert changed.baseline.differences[0].kind == "now fails"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (b"", "baseline"),
        (b"[]", "baseline"),
        (b'{"format": "other"}', "format: expected 'k25-parity-report'"),
        (b'{"format": "k25-parity-report", "schema_version": 1}', "schema_version: expected 2, found 1"),
        (b'{"format": "k25-parity-report", "schema_version": 2, "checks": [1]}', "checks: expected a list of checks"),
    ],
)
def test_a_baseline_that_is_none_is_refused(values: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "older.json"
    path.write_bytes(values)
    with pytest.raises(InputError, match=message):
        baseline_from_file(path)


# Tolerances from noise, and from the size of the logits.


def test_only_rounding_of_the_reference_itself_widens_a_tolerance() -> None:
    bound = Tolerance(name="moe_layer", value=1e-6, bound="at most", reason="sums")
    assert widened(bound, None) == widened(bound, 2e-7) == widened(bound, math.inf) == bound
    wide = widened(bound, 1e-6)
    assert wide.value == NOISE_FACTOR * 1e-6
    assert "against float64" in wide.reason
    assert wide.name == "moe_layer"


def test_noise_is_that_of_the_reference_on_the_same_input() -> None:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((6, 8)).astype(np.float32)
    ids = np.tile(np.array([[2, 0]]), (6, 1))

    class Exact:
        def layer(self, layer: int, entered: Any) -> LayerTrace:
            other = ids.copy()
            other[1] = [2, 3]  # another expert: this row tells nothing about rounding
            moved = hidden.copy()
            moved[1] += 1
            return LayerTrace(
                hidden=moved * np.float32(1 + 1e-6),
                expert_ids=other[:, ::-1],
                expert_weights=np.ones((6, 2), np.float32),
                router_scores=np.zeros((6, 4), np.float32),
            )

    trace = LayerTrace(
        hidden=hidden,
        expert_ids=ids,
        expert_weights=np.full((6, 2), 1.25, np.float32),
        router_scores=np.full((6, 4), 0.5, np.float32),
    )
    noise = ReferenceNoise({3: Exact()})  # type: ignore[dict-item]
    found = noise.layer(3, 0, hidden, trace)
    assert found is not None
    assert found.hidden == pytest.approx(1e-6, rel=0.2)
    assert (found.weights, found.scores) == (0.25, 0.5)
    assert noise.layer(0, 0, hidden, trace) is None


def test_kl_bounds_are_what_the_end_to_end_bound_allows() -> None:
    random = np.random.default_rng(1)
    expected = random.standard_normal((50, 300)) * 4
    error = random.standard_normal((50, 300))
    error *= END_TO_END * np.linalg.norm(expected) / np.linalg.norm(error)
    rms = float(np.sqrt(np.square(expected).mean()))
    mean, largest = kl_tolerances(rms, 50)
    found = kl_divergence(expected + error, expected)
    assert 0.1 * mean.value < found.mean <= mean.value
    assert found.maximum <= largest.value == 50 * mean.value


def test_what_is_interrupted_goes_on_with_all_that_was_counted(
    odd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed: loads and chains of the layers before the interruption are in the report."""
    import shutil

    bundle = shutil.copytree(odd.bundle, tmp_path / "bundle")
    whole = parity_report_from_bundle(bundle, stream="on", threads=1)
    original = ParityWalk._walk_layer

    def walk(self: ParityWalk, state: WalkState, layer: int, index: int) -> None:
        if layer == 4:
            raise KeyboardInterrupt
        original(self, state, layer, index)

    with monkeypatch.context() as patched:
        patched.setattr(ParityWalk, "_walk_layer", walk)
        with pytest.raises(KeyboardInterrupt):
            parity_report_from_bundle(bundle, stream="on", threads=1)
    resumed = parity_report_from_bundle(bundle, stream="on", threads=1)
    assert resumed.experts == whole.experts
    assert resumed.prompts == whole.prompts
    assert resumed.rows == whole.rows

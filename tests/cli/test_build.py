"""`build` and `validate` from outside: what they write, print and return, for good weights and for damaged ones."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from k25_cli.main import run

COMMAND = str(Path(sys.executable).with_name("k25-export"))
#: Processor seconds, so that what else the machine does is no matter, and resident memory.
BUILD_SECONDS, BUILD_BYTES = 40, 1.5e9
REPORTS = ["parity.html", "parity.json", "parity.xml"]
NAN_BF16 = b"\xc0\x7f"

Json = dict[str, Any]


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    """Hard links to the fixture's files: replace a file, never write into it."""
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    """A bundle of the checkpoint without reports. Hard links, too."""
    copied = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle", copy_function=os.link))
    shutil.rmtree(copied / "reports")
    (copied / "reports").mkdir()
    return copied


@pytest.fixture(autouse=True)
def _nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("K25_CHECKPOINT", "K25_CACHE", "K25_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _traced_instantly(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a graph must be traced in this process, it is the fixture's."""
    from k25_export.manifest import read_manifest
    from k25_export.traced_component import TracedComponent

    manifest = read_manifest(tiny.bundle)

    def traced(spec: Any, precision: str) -> TracedComponent:
        file = manifest.component(spec.name).file(precision)
        return TracedComponent(data=(tiny.bundle / file.path).read_bytes(), inputs=file.inputs, outputs=file.outputs)

    monkeypatch.setattr("k25_export.trace.traced_component_from_spec", traced)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of torch that wait for one another burn what a busy machine has left."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def strict_json(text: str) -> Json:
    """One JSON object, without NaN and Infinity, which are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values: Json = json.loads(text, parse_constant=refuse)
    assert isinstance(values, dict)
    return values


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_tensor(checkpoint: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a tensor's data; the size of the shard and its header stay."""
    shard = checkpoint / json.loads((checkpoint / "model.safetensors.index.json").read_bytes())["weight_map"][name]
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = (start + offset for offset in json.loads(raw[8:start])[name]["data_offsets"])
    data = change(raw[begin:end])
    assert len(data) == end - begin
    assert data != raw[begin:end]
    shard.unlink()
    shard.write_bytes(raw[:begin] + data + raw[end:])


def layers(checkpoint: Path) -> tuple[int, int, int]:
    """The first MoE layer, the last layer, and the number of experts."""
    text = json.loads((checkpoint / "config.json").read_bytes())["text_config"]
    return text["first_k_dense_replace"], text["num_hidden_layers"] - 1, text["n_routed_experts"]


def failed_components(report: Json) -> list[str]:
    found = [check["name"] for check in report["checks"] if check["section"] == "components" and not check["passed"]]
    return list(dict.fromkeys(found))


def test_build_makes_everything_in_a_new_process(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Byte for byte what another process made of the same checkpoint elsewhere; within time and memory."""
    output = tmp_path / "missing" / "parents" / "bundle"
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [COMMAND, "build", checkpoint, "--output", output, "--json"],
            stdout=out,
            stderr=err,
            env={**os.environ, "PYTHONHASHSEED": "25", "OMP_NUM_THREADS": "1"},  # see _one_thread
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "err").read_text()
    assert usage.ru_utime + usage.ru_stime < BUILD_SECONDS
    assert usage.ru_maxrss * 1024 < BUILD_BYTES
    values = strict_json((tmp_path / "out").read_text())
    assert values["passed"] is True
    assert values["bundle"] == str(output)
    assert values["reused"] is False
    assert values["report"] == str(output / "reports" / "parity.html")
    progress = (tmp_path / "err").read_text().splitlines()
    assert any(line.startswith("tracing moe_layer") for line in progress)
    assert any(line.startswith("comparing") for line in progress)
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle"]
    assert sorted(path.name for path in (output / "reports").iterdir()) == REPORTS
    made, expected = files(output), files(tiny.bundle)
    for content in (made, expected):
        for name in [name for name in content if name == "checkpoint.json" or name.startswith("reports/")]:
            del content[name]
    assert made == expected


def test_build_prints_a_summary_and_where_the_report_is(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path
) -> None:
    assert run(["build", str(checkpoint), "--output", str(bundle)]) == 0
    out, _ = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(f"bundle: {bundle}")
    assert any(line.startswith("parity: PASSED") for line in lines)
    assert lines[-1] == f"report: {bundle / 'reports' / 'parity.html'}"
    report = strict_json((bundle / "reports" / "parity.json").read_text())
    assert report["passed"] is True
    assert len(report["checks"]) > 0
    suites = ElementTree.parse(bundle / "reports" / "parity.xml").getroot()
    cases = list(suites.iter("testcase"))
    assert len(cases) == len(report["checks"]) + len(report["not_checked"])
    assert [case for case in cases if case.find("failure") is not None] == []


def _nan_in_scales(checkpoint: Path) -> str:
    """One scale of each expert of the last layer, so that whichever is chosen has one."""
    _, layer, experts = layers(checkpoint)
    for expert in range(experts):
        name = f"language_model.model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight_scale"
        change_tensor(checkpoint, name, lambda data: NAN_BF16 + data[2:])
    return f"moe_layer {layer}"


def _nan_in_a_router(checkpoint: Path) -> str:
    layer, _, _ = layers(checkpoint)
    name = f"language_model.model.layers.{layer}.mlp.gate.weight"
    change_tensor(checkpoint, name, lambda data: NAN_BF16 + data[2:])
    return f"moe_layer {layer}"


def _nan_in_attention(checkpoint: Path) -> str:
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    change_tensor(checkpoint, name, lambda data: NAN_BF16 + data[2:])
    return "dense_layer 0"


def _infinity_in_the_head(checkpoint: Path) -> str:
    change_tensor(checkpoint, "language_model.lm_head.weight", lambda data: b"\x80\x7f" + data[2:])
    return "head"


NOT_FINITE = [_nan_in_scales, _nan_in_a_router, _nan_in_attention, _infinity_in_the_head]


@pytest.mark.filterwarnings("error")  # numpy would print one to standard error
@pytest.mark.parametrize("damage", NOT_FINITE)
def test_weights_that_are_not_finite_fail_at_their_component(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path, damage: Callable[[Path], str]
) -> None:
    """Both sides read the same weights and agree on the NaN: a failure all the same. The bundle stays."""
    component = damage(checkpoint)
    before = files(bundle)
    assert run(["build", str(checkpoint), "--output", str(bundle), "--json", "-q"]) == 1
    out, err = capfd.readouterr()
    assert err == ""
    printed = strict_json(out)
    assert printed["passed"] is False
    after = files(bundle)
    report = strict_json(after.pop("reports/parity.json").decode())
    suites = ElementTree.fromstring(after.pop("reports/parity.xml").decode())
    page = after.pop("reports/parity.html").decode()
    assert {**before, "checkpoint.json": b""} == {**after, "checkpoint.json": b""}
    assert report["passed"] is False
    assert failed_components(report)[0] == component
    assert report["checks"] == printed["checks"]
    failures = [case.attrib["name"] for case in suites.iter("testcase") if case.find("failure") is not None]
    assert any(name.startswith(f"{component}: ") for name in failures)
    assert sum(int(suite.attrib["failures"]) for suite in suites.iter("testsuite")) == len(failures)
    assert component in page


@pytest.mark.parametrize("verb", ["build", "validate"])
def test_a_failure_is_told_on_standard_output_with_the_component(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path, verb: str
) -> None:
    component = _nan_in_attention(checkpoint)
    places = {
        "build": [str(checkpoint), "--output", str(bundle)],
        "validate": [str(bundle), "--checkpoint", str(checkpoint)],
    }
    assert run([verb, *places[verb]]) == 1
    out, err = capfd.readouterr()
    assert "parity: FAILED" in out
    assert f"FAILED {component}, " in out
    assert out.splitlines()[-1] == f"report: {bundle / 'reports' / 'parity.html'}"
    assert "Traceback" not in err
    assert sorted(path.name for path in (bundle / "reports").iterdir()) == REPORTS


def test_a_new_report_replaces_the_old_one(capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path) -> None:
    verdicts = []
    component = None
    for damage in (None, _nan_in_attention):
        component = damage(checkpoint) if damage else None
        verdicts.append(run(["validate", str(bundle), "--checkpoint", str(checkpoint), "-q"]))
        report = strict_json((bundle / "reports" / "parity.json").read_text())
        assert report["passed"] is (verdicts[-1] == 0)
    assert verdicts == [0, 1]
    assert component is not None
    assert component in (bundle / "reports" / "parity.html").read_text()
    assert sorted(path.name for path in (bundle / "reports").iterdir()) == REPORTS


@pytest.mark.parametrize("damage", [None, _nan_in_attention])
def test_a_build_of_the_same_inputs_keeps_its_report(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path, damage: Callable[[Path], str] | None
) -> None:
    """And its verdict, good or bad."""
    if damage is not None:
        damage(checkpoint)
    results = []
    for _ in range(2):
        code = run(["build", str(checkpoint), "--output", str(bundle), "--json", "-q"])
        values = strict_json(capfd.readouterr().out)
        results.append((code, values["passed"], values["checks"], (bundle / "reports" / "parity.json").read_bytes()))
    assert results[0] == results[1]
    assert results[0][:2] == ((1, False) if damage else (0, True))


@pytest.mark.parametrize("is_time_kept", [False, True], ids=["new time", "old time"])
def test_a_changed_byte_is_seen_by_the_next_build(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path, is_time_kept: bool
) -> None:
    """Whatever the modification time says: `cp -p`, rsync and tar set it."""
    assert run(["build", str(checkpoint), "--output", str(bundle), "-q"]) == 0
    times = {path: path.stat() for path in checkpoint.iterdir()}
    _nan_in_attention(checkpoint)
    if is_time_kept:
        for path, before in times.items():
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(["build", str(checkpoint), "--output", str(bundle), "-q"]) == 1
    assert "parity: FAILED" in capfd.readouterr().out


def test_one_flipped_bit_of_a_scale_is_found(
    capfd: pytest.CaptureFixture[str],
    tiny: Any,
    checkpoint: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runtime maps a shard with one changed bit in each expert's first scale; the reference reads the good one.

    (Where both read the changed one they agree, rightly; finding that needs hashes of the data: `verify --deep`.)
    """
    from k25_validate import validation

    _, layer, experts = layers(checkpoint)
    for expert in range(experts):
        name = f"language_model.model.layers.{layer}.mlp.experts.{expert}.down_proj.weight_scale"
        change_tensor(checkpoint, name, lambda data: bytes([data[0] ^ 1]) + data[1:])
    judged_by_the_original = functools.partial(
        validation.parity_report_from_bundle, reference_checkpoint=tiny.checkpoint
    )
    monkeypatch.setattr(validation, "parity_report_from_bundle", judged_by_the_original)
    assert run(["build", str(checkpoint), "--output", str(bundle), "-q"]) == 1
    out, _ = capfd.readouterr()
    assert f"FAILED moe_layer {layer}, relative L2" in out
    report = strict_json((bundle / "reports" / "parity.json").read_text())
    assert failed_components(report) == [f"moe_layer {layer}"]


def test_a_stored_shape_that_lies_is_bad_input(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path
) -> None:
    """`weight_shape` is data, which an export does not read; the reference does, and it is no error of ours."""
    layer, _, experts = layers(checkpoint)
    for expert in range(experts):
        name = f"language_model.model.layers.{layer}.mlp.experts.{expert}.up_proj.weight_shape"
        change_tensor(checkpoint, name, lambda data: b"\x01" + data[1:])
    assert run(["build", str(checkpoint), "--output", str(bundle), "-q"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("k25-export: ")
    assert err.count("\n") == 1
    assert f"layers.{layer}.mlp.experts." in err


@pytest.mark.parametrize("damage", NOT_FINITE)
def test_run_stops_at_logits_that_are_not_finite(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, bundle: Path, damage: Callable[[Path], str]
) -> None:
    damage(checkpoint)
    assert run(["run", str(bundle), "--checkpoint", str(checkpoint), "--token-ids", "1 2 3 4 5 6 7 8"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("k25-export: logits: expected finite values")
    assert err.count("\n") == 1

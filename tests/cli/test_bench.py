"""`k25-export bench`: its JSON, table, picture and refusals. No timing is asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from k25_cli.main import run

COMMAND = str(Path(sys.executable).with_name("k25-export"))
SHORT = ["--rounds", "1", "--steps", "2", "--context", "3", "--tokens", "5", "--threads", "1"]


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_COUNT = {"type": "integer", "minimum": 0}
_SPREAD = _object(best=_POSITIVE, median=_POSITIVE)
_MEMORY = {"type": ["integer", "null"]}
SCHEMA = _object(
    format={"const": "k25-bench"},
    schema_version={"const": 1},
    bundle={"type": "string"},
    options={"type": "object"},
    machine={"type": "object", "required": ["processor", "cores", "system", "load"]},
    runtime={"type": "object", "required": ["k25-export", "native ops", "threads"]},
    read_bandwidth=_object(how={"enum": ["numpy", "the native library"]}, gb_per_s=_SPREAD),
    bytes_of_a_step=_object(
        dense=_COUNT, experts=_COUNT, head=_COUNT, embedding=_COUNT, cache=_COUNT, total=_COUNT,
        experts_read_a_layer=_POSITIVE,
    ),
    decode=_object(ms_a_step=_SPREAD, tokens_per_s=_SPREAD, gb_per_s=_SPREAD, share_of_bandwidth=_SPREAD),
    prefill=_object(ms=_SPREAD, tokens_per_s=_SPREAD),
    overhead=_object(component_calls=_COUNT, us_a_component_call=_SPREAD),
    load=_object(seconds=_SPREAD, anonymous_bytes=_MEMORY, anonymous_bytes_after_use=_MEMORY),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from k25_runtime import bench

    monkeypatch.delenv("K25_CHECKPOINT", raising=False)
    monkeypatch.setattr(bench.BenchOptions.__init__, "__kwdefaults__", _with_small_probe(bench.BenchOptions))


def _with_small_probe(options: type) -> dict[str, Any]:
    defaults: dict[str, Any] = dict(options.__init__.__kwdefaults__ or {})  # type: ignore[misc]
    return defaults | {"probe_bytes": 2**21}


def test_json_picture_and_file(tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture, output = tmp_path / "bench.svg", tmp_path / "bench.json"
    arguments = ["bench", str(tiny.bundle), *SHORT, "--json", "-q", "--mode", "exact"]
    assert run([*arguments, "--picture", str(picture), "--output", str(output)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    values = json.loads(out)
    jsonschema.validate(values, SCHEMA)
    assert values == json.loads(output.read_text())
    assert values["options"]["mode"] == "exact"
    assert values["options"]["tokens"] == 5
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.svg"]


def test_without_the_native_library_it_says_so(
    tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K25_NATIVE", "off")
    output = tmp_path / "bench.md"
    assert run(["bench", str(tiny.bundle), *SHORT, "--output", str(output)]) == 0
    out, err = capfd.readouterr()
    assert "function bodies" in out
    assert "by numpy" in out
    assert "empty components" in err
    text = output.read_text()
    assert "| decode | " in text
    assert "function bodies" in text


@pytest.mark.parametrize(("option", "name"), [("--picture", "bench.png"), ("--output", "bench.txt")])
def test_other_kinds_of_file_are_refused_before_anything_is_measured(
    tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    assert run(["bench", str(tiny.bundle), option, str(tmp_path / name)]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert option in err
    assert "expected a file name that ends in" in err


def test_no_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tmp_path / "none"), "-q"]) == 3
    assert "cannot read manifest.json" in capfd.readouterr().err


def test_an_interrupt_ends_it(tiny: Any, tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    process = subprocess.Popen(
        [COMMAND, "bench", str(tiny.bundle), "--rounds", "100000", "--picture", str(picture)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "K25_NATIVE": "off"},
        # A shell's background job ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("decoding"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []

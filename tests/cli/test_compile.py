"""`compile`, `build --target` and `inspect BUNDLE`: what is printed, exit codes, messages."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run
from k25_engines import tensorrt_module

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)
SMALL = ["--max-sequences", "2", "--max-tokens", "16", "--context", "64", "--block-size", "16"]


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


def compile_bundle(bundle: Path, *arguments: str) -> int:
    return run(["compile", str(bundle), "--target", "sm120", "--component", "embed", *SMALL, *arguments])


@needs_tensorrt
def test_compile_prints_a_table_and_inspect_shows_what_can_run_where(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert compile_bundle(bundle, "--target", "8.6", "-q") == 0
    out, err = capfd.readouterr()
    assert "embed sm120" in out
    assert "embed sm86" in out
    assert err == ""
    assert run(["inspect", str(bundle)]) == 0
    out = capfd.readouterr().out
    assert "moe_layer.bf16" in out
    assert "built here" in out
    assert "12.0 (" in out
    assert "8.6 (" in out
    (bundle / "engines" / "sm86" / "embed.engine").write_bytes(b"cut")
    assert run(["inspect", str(bundle), "--json"]) == 3
    values = json.loads(capfd.readouterr().out)
    assert {engine["target"]: engine["built_here"] for engine in values["engines"]} == {"sm86": False, "sm120": True}
    assert "expected" in values["problems"][0]


@needs_tensorrt
def test_json_says_what_was_built_and_what_was_kept(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compile_bundle(bundle, "--json") == 0
    out, err = capfd.readouterr()
    values = json.loads(out)
    (engine,) = values["engines"]
    assert (values["built"], values["reused"], engine["reused"]) == (1, 0, False)
    assert (engine["component"], engine["target"], engine["flavour"]) == ("embed", "sm120", "tensorrt-rtx")
    assert "building embed" in err
    assert compile_bundle(bundle, "--json") == 0
    values = json.loads(capfd.readouterr().out)
    assert (values["built"], values["reused"]) == (0, 1)


@needs_tensorrt
def test_build_with_targets_exports_compiles_and_validates(
    tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    seen: list[tuple[Path, tuple[str, ...]]] = []

    def validate(bundle: Path, **options: Any) -> Any:
        from k25_cli.stages import ValidationResult

        seen.append((bundle, tuple(sorted(path.name for path in (bundle / "engines" / "sm120").glob("*.engine")))))
        return ValidationResult(values={}, text="parity: not asked here", exit_code=0)

    monkeypatch.setattr("k25_cli.verbs.build.validate_bundle", validate)
    assert run(["build", str(tiny.checkpoint), "--output", str(bundle), "--target", "sm120", "--json", "-q"]) == 0
    values = json.loads(capfd.readouterr().out)
    names = tuple(sorted(f"{engine['component']}.engine" for engine in values["engines"]))
    assert seen == [(bundle, names)]
    assert values["built"] == len(names) >= 4


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--target", "sm75"], 3, "bfloat16"),
        (["--target", "sm90"], 4, "enterprise TensorRT"),
        (["--target", "10.0"], 4, "enterprise TensorRT"),
        (["--target", "hopper"], 3, "expected one of sm80"),
        ([], 2, "--target"),
        (["--target", "sm80", "--fuse", "all"], 2, "--fuse"),
        (["--target", "sm80", "--precision", "fp8"], 2, "--precision"),
        (["--target", "sm80", "--timeout", "0"], 2, "--timeout"),
        (["--target", "sm80", "--memory-limit", "4"], 3, "size"),
        (["--target", "sm80", "--max-tokens", "0"], 3, "--max-tokens"),
        (["--target", "sm80", "--context", "999999999"], 3, "--context"),
        (["--target", "sm80", "--component", "tail"], 3, "tail"),
        (["--target", "sm80", "--plugin-library", "nowhere.so"], 3, "nowhere.so"),
        (["--target", "sm80", "--memory-limit", "20MiB"], 3, "embed for sm80"),
    ],
)
@needs_tensorrt
def test_what_cannot_be_built_says_why(
    bundle: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, named: str
) -> None:
    assert run(["compile", str(bundle), "-q", *arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert named in err
    assert "Traceback" not in err
    assert not (bundle / "engines").exists()


def test_without_tensorrt_the_install_line_is_shown(
    bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    monkeypatch.setattr(tensorrt_module, "_installed_version", lambda package: None)
    assert run(["compile", str(bundle), "--target", "sm120"]) == 4
    assert "pip install 'tensorrt-rtx==" in capfd.readouterr().err
    assert run(["compile", str(bundle), "--target", "sm90", "--flavour", "tensorrt"]) == 4
    assert "pip install 'tensorrt>=11,<12'" in capfd.readouterr().err
    output = bundle.parent / "new"
    assert run(["build", str(tiny.checkpoint), "--output", str(output), "--target", "sm120"]) == 4
    assert not output.exists()
    assert run(["inspect", str(bundle)]) == 0
    assert "engines: none" in capfd.readouterr().out


def test_without_onnx_the_extra_is_named(
    bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(["compile", str(bundle), "--target", "sm120"]) == 4
    assert "pip install 'k25-export[tensorrt-rtx]'" in capfd.readouterr().err


def test_what_is_no_bundle_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    assert run(["compile", str(tmp_path), "--target", "sm120"]) == 3
    assert "cannot read manifest.json" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []

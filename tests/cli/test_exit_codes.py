"""Exit codes: usage 2, what is not there 4, internal errors 5, interrupts 130; what `--help` and `--version` cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from k25_cli.main import VERBS, run
from k25_plugins.version import __version__

COMMAND = str(Path(sys.executable).with_name("k25-export"))
#: The verbs of the command line as it was fixed. Each is there, or is planned and says so.
FIXED_VERBS = {
    "inspect", "demo-checkpoint", "export", "bind", "compile", "validate", "build", "run", "bisect", "bench", "plan",
    "verify",
}  # fmt: skip
HEAVY = {
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "safetensors", "numpy", "tiktoken",
    "jinja2", "orjson", "rich",
}  # fmt: skip
HELP_SECONDS = 0.3


@pytest.fixture(autouse=True)
def _nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("K25_CHECKPOINT", "K25_CACHE", "K25_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)


def failed(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, *named: str) -> str:
    """Run the command: it ends with `code`, without output, with one message that has all of `named`."""
    assert run(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert [text for text in named if text not in err] == [], err
    return err


def test_every_verb_of_the_design_is_there() -> None:
    assert FIXED_VERBS | {"completion"} == VERBS.keys()


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("k25-export")
    assert out.endswith(f" {__version__}\n")
    assert err == ""


def test_help_lists_every_verb_and_the_exit_codes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out, err = capfd.readouterr()
    listed = set(re.findall(r"^  ([a-z][a-z-]+) ", out, flags=re.MULTILINE))
    assert FIXED_VERBS | {"completion"} <= listed
    assert "Exit codes" in out
    assert err == ""


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_light(verb: str) -> None:
    program = (
        "import sys; from k25_cli.main import run; "
        "code = run([*sys.argv[1:], '--help']); print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    arguments = [verb] if verb else []
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: k25-export {verb}".rstrip())
    assert HEAVY & set(done.stderr.split()) == set()


def test_help_is_quick() -> None:
    """Processor seconds of the installed command, the best of three: what else the machine does is no matter."""
    seconds = []
    for _ in range(3):
        process = subprocess.Popen([COMMAND, "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < HELP_SECONDS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Commands"),
        (["frobnicate"], "frobnicate"),
        (["--frobnicate"], "--frobnicate"),
        (["inspect"], "CHECKPOINT"),
        (["inspect", "here", "there"], "there"),
        (["inspect", "here", "--frobnicate"], "--frobnicate"),
        (["export", "here"], "--output"),
        (["export", "here", "--output"], "--output"),
        (["export", "here", "-o", "there", "--latent-norm-eps", "0"], "--latent-norm-eps"),
        (["export", "here", "-o", "there", "--latent-norm-eps", "small"], "--latent-norm-eps"),
        (["build", "here", "-o", "there", "--reference", "nobody"], "--reference"),
        (["validate"], "BUNDLE"),
        (["validate", "here", "--reference", "nobody"], "--reference"),
        (["run", "here"], "--prompt"),
        (["run", "here", "--prompt", "Hi", "--token-ids", "1"], "--token-ids"),
        (["run", "here", "--token-ids", "one two"], "--token-ids"),
        (["run", "here", "--token-ids", "1.5"], "--token-ids"),
        (["run", "here", "--token-ids", "1", "--max-new-tokens", "-1"], "--max-new-tokens"),
        (["run", "here", "--token-ids", "1", "--context", "0"], "--context"),
        (["run", "here", "--token-ids", "1", "--mode", "approximate"], "--mode"),
        (["demo-checkpoint", "there", "--seed", "-1"], "--seed"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_usage_errors(capfd: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    err = failed(capfd, arguments, 2, named)
    assert err.count("Error: ") == (1 if arguments else 0)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_epsilon_that_is_no_number_is_refused(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k25_export.trace.traced_component_from_spec", _fail)  # it must not come so far
    assert run(["export", str(tiny.checkpoint), "-o", str(tmp_path / "out"), "--latent-norm-eps", value]) in (2, 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "latent" in err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_built_is_said_before_anything_is_written(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path
) -> None:
    arguments = ["build", str(tiny.checkpoint), "--output", str(tmp_path / "bundle"), "--target", "sm90"]
    failed(capfd, arguments, 4, "target sm90")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("torch", "export", ["inspect", "CHECKPOINT"]),
        ("onnx", "export", ["export", "CHECKPOINT", "--output", "NEW"]),
        ("onnxscript", "export", ["demo-checkpoint", "NEW"]),
        ("torch", "validate", ["validate", "BUNDLE"]),
        ("safetensors", "validate", ["build", "CHECKPOINT", "--output", "NEW"]),
        ("transformers", "transformers", ["validate", "BUNDLE", "--reference", "transformers"]),
        ("transformers", "transformers", ["build", "CHECKPOINT", "--output", "NEW", "--reference", "transformers"]),
    ],
)
def test_a_missing_extra_is_named_with_the_way_to_install_it(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny: Any,
    tmp_path: Path,
    module: str,
    extra: str,
    arguments: list[str],
) -> None:
    monkeypatch.setattr("k25_export.trace.traced_component_from_spec", _fail)  # it must not come so far
    places = {"CHECKPOINT": tiny.checkpoint, "BUNDLE": tiny.bundle, "NEW": tmp_path / "new"}
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    reports = tiny.bundle / "reports"
    before = sorted(reports.iterdir())
    err = failed(capfd, [str(places.get(item, item)) for item in arguments] + ["-q"] * (arguments[0] != "inspect"), 4)
    assert module in err
    assert re.search(rf"pip install ['\"]?k25-export\[{extra}\]", err)
    assert err.count("k25-export: ") == 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(reports.iterdir()) == before


def test_a_bundle_runs_without_the_extras(tiny: Any) -> None:
    """The base install: no torch, no onnx, no safetensors."""
    blocked = sorted({"torch", "onnx", "onnx_ir", "onnxscript", "orjson", "safetensors", "transformers"})
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); "
        "from k25_cli.main import main; main(['run', sys.argv[1], '--prompt', 'Hi', '--max-new-tokens', '2', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", program, tiny.bundle], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert '"new_ids"' in done.stdout


def test_an_internal_error_shows_where(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    monkeypatch.setattr("k25_export.inspection.inspection_of_checkpoint", _fail)
    assert run(["inspect", str(tiny.checkpoint)]) == 5
    out, err = capfd.readouterr()
    assert out == ""
    assert "in _fail" in err
    last = err.splitlines()[-1]
    assert last.startswith("k25-export: internal error: ZeroDivisionError: on purpose")


def _fail(*arguments: Any, **options: Any) -> NoReturn:
    raise ZeroDivisionError("on purpose")


def test_an_interrupt_is_130(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    def interrupt(*arguments: Any, **options: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("k25_export.inspection.inspection_of_checkpoint", interrupt)
    failed(capfd, ["inspect", str(tiny.checkpoint)], 130, "k25-export: interrupted")


def test_the_installed_command_ends_with_the_code(tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, "inspect", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("k25-export: checkpoint ")
    assert done.stderr.count("\n") == 1

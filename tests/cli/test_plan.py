"""`k25-export plan` as a user calls it: table, JSON, exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run
from k25_export.demo.checkpoint import write_demo_checkpoint

CUSTOM = ("--gpu", "custom", "--gpu-memory", "64MiB", "--gpu-bandwidth", "100MB/s", "--cuda-context", "1MiB")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("plan") / "checkpoint", preset="tiny")


def planned(checkpoint: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["plan", str(checkpoint), *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    values: dict[str, Any] = json.loads(captured.out)
    return values


def test_json_has_raw_figures(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = planned(checkpoint, "--gpu", "h200", "--gpus", "8", "--context", "4096", capsys=capsys)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text("utf-8"))
    assert values["checkpoint"] == str(checkpoint)
    assert values["weight_bytes"] == index["metadata"]["total_size"]
    assert values["weight_bytes"] == sum(share["total_bytes"] for share in values["weights"])
    assert values["cache_bytes_per_token"] == 4 * (32 + 8) * 2
    assert values["memory"]["cache"] == 4096 * 320
    assert values["memory"]["available"] == 141_000_000_000
    assert all(type(count) is int for count in values["memory"].values())
    assert values["deployment"]["context"] == 4096
    assert values["deployment"]["gpu"]["bandwidth"] == 4_800_000_000_000
    assert values["fits"] is True
    assert values["longest_context"] == 262_144
    assert values["longest_context_limit"] == "max_position_embeddings"
    assert [decode["sequences"] for decode in values["decode"]] == [1]
    assert len(values["assumptions"]) == 10


def test_defaults(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = planned(checkpoint, "--gpu", "b200", capsys=capsys)
    deployment = values["deployment"]
    assert deployment.pop("gpu")["memory_bytes"] == 180_000_000_000
    assert deployment == {
        "gpus": 1,
        "context": 262_144,
        "sequences": 1,
        "attention": "heads",
        "cache_dtype": "bf16",
        "block_size": 32,
        "max_batch_tokens": 8192,
        "cuda_context_bytes": 1 << 30,
        "reserve_bytes": 2 << 30,
        "efficiency": 1.0,
    }


def test_table_of_a_plan_that_fits(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "rtx-pro-6000", "--gpus", "4", "--context", "32768", "--sequences", "3"]
    assert run(["plan", str(checkpoint), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "32,768 tokens x 3 sequences on 4 x rtx-pro-6000: it fits"
    text = "\n".join(lines)
    for words in (
        "routed experts, codes (INT4)",
        "memory, per GPU",
        "320 B a token, 0.01 GiB for 32,768 tokens",
        "longest context of 3 sequences",
        "262,144 tokens (bound by the model)",
        "1 x rtx-pro-6000",
        "decode, at most\n",
        "tokens/s is an upper bound",
        "6 attention heads do not divide by 4 GPUs: the busiest has 2",
    ):
        assert words in text
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if row and row[-1][0].isdigit() and "ms" in row] == ["1", "3"]


def test_a_plan_that_does_not_fit_is_an_answer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(checkpoint), *CUSTOM, "--reserve", "60MiB"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("262,144 tokens x 1 sequence on 1 x custom: IT DOES NOT FIT\n")
    for words in ("MISSING", "decode, at most, if it fitted", "none up to 1,024"):
        assert words in text


def test_a_plan_for_a_cpu(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = ("--gpu", "cpu", "--gpu-memory", "16GiB", "--gpu-bandwidth", "40GB/s")
    values = planned(checkpoint, *cpu, capsys=capsys)
    assert values["deployment"]["cache_dtype"] == "fp32"
    assert values["memory"]["cuda_context"] == 0
    assert values["cache_bytes_per_token"] == 640
    assert run(["plan", str(checkpoint), *cpu]) == 0
    text = capsys.readouterr().out
    assert text.startswith("262,144 tokens x 1 sequence on the CPU: it fits\n")
    assert "GPU" not in text


def test_figures_of_a_named_gpu_can_be_replaced(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--gpu", "h200", "--gpu-memory", "143771MiB", "--gpu-bandwidth", "4.2TB/s", "--efficiency", "0.5")
    values = planned(checkpoint, *named, capsys=capsys)
    gpu = values["deployment"]["gpu"]
    assert (gpu["memory_bytes"], gpu["bandwidth"]) == (143_771 << 20, 4_200_000_000_000)
    decode = values["decode"][0]
    assert decode["seconds"] == pytest.approx((decode["weight_bytes"] + decode["cache_bytes"]) / 2.1e12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--gpu"),
        (("--gpu", "a100"), "'a100' is not one of"),
        (("--gpu", "custom"), "--gpu custom needs --gpu-memory"),
        (("--gpu", "custom", "--gpu-memory", "48GiB"), "--gpu-bandwidth (as 900GB/s)"),
        (("--gpu", "cpu", "--gpus", "2", "--gpu-memory", "1GB", "--gpu-bandwidth", "1GB/s"), "leave --gpus at 1"),
        (("--gpu", "h200", "--gpu-memory", "141"), "expected a number and a unit"),
        (("--gpu", "h200", "--gpu-bandwidth", "4.8TB"), "expected bytes a second"),
        (("--gpu", "h200", "--gpus", "0"), "--gpus"),
        (("--gpu", "h200", "--context", "-1"), "--context"),
        (("--gpu", "h200", "--efficiency", "1.1"), "--efficiency"),
        (("--gpu", "h200", "--attention", "tensors"), "--attention"),
    ],
)
def test_usage_errors(
    checkpoint: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(checkpoint), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "262145"), "expected at most max_position_embeddings 262,144"),
        (("--sequences", "8193"), "Raise --max-batch-tokens"),
        (("--gpu-memory", "0GB"), "gpu memory: expected at least 1 byte"),
        (("--efficiency", "nan"), "efficiency: expected 0.001 to 1, found nan"),
        (("--max-batch-tokens", str(10**400)), "max_batch_tokens: expected 1 to 1,000,000,000"),
    ],
)
def test_bad_input(
    checkpoint: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(checkpoint), "--gpu", "h200", *arguments, "--json"]) == 3
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_checkpoint_with_problems_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(tmp_path / "nowhere"), "--gpu", "h200"]) == 3
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text("utf-8"))
    config["text_config"]["n_routed_experts"] += 1
    (broken / "config.json").write_text(json.dumps(config), "utf-8")
    capsys.readouterr()
    assert run(["plan", str(broken), "--gpu", "h200"]) == 3
    captured = capsys.readouterr()
    assert "tensors do not fit" in captured.err
    assert captured.out == ""


def test_no_heavy_package_is_imported(checkpoint: Path) -> None:
    program = (
        "import sys; from k25_cli.main import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules);"
        "print(*heavy, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", str(checkpoint), "--gpu", "h200"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")

"""The real sizes: 61 layers, 384 experts, 208,550 tensors, 595 GB as holes. Headers only, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20

#: Enforced on the child: private memory, and all address space.
DATA_LIMIT, ADDRESS_LIMIT = 600 * MIB, 2048 * MIB

PROGRAM = """
import json, resource, sys
data, address, *arguments = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (int(data), int(data)))
resource.setrlimit(resource.RLIMIT_AS, (int(address), int(address)))
from k25_cli.main import run
code = run(arguments)
# Not ru_maxrss: after a fork it starts at the parent's.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"code": code, "peak": peak * 1024}), file=sys.stderr)
"""


def _limited(*arguments: object) -> tuple[dict[str, object], dict[str, int]]:
    """The JSON that a verb prints under the limits, and its exit code and peak resident bytes."""
    command = [sys.executable, "-c", PROGRAM, str(DATA_LIMIT), str(ADDRESS_LIMIT), *map(str, arguments)]
    done = subprocess.run([*command, "--json", "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    _limited("demo-checkpoint", folder, "--preset", "full-sparse")
    return folder


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_the_sparse_checkpoint_has_the_official_size_and_takes_no_room(full: Path) -> None:
    shards = sorted(full.glob("*.safetensors"))
    assert len(shards) == 64
    assert shards[0].name == "model-00001-of-000064.safetensors"
    index = json.loads((full / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 595_148_192_736
    assert len(index["weight_map"]) == 208_550
    assert sum(path.stat().st_size for path in shards) > 595_148_192_736
    assert _disk_bytes(full) < 200 * MIB


def test_export_within_the_limits(full: Path, tmp_path: Path) -> None:
    values, facts = _limited("export", full, "--output", tmp_path / "bundle")
    assert facts["code"] == 0
    assert facts["peak"] < 600 * 10**6
    assert values["tensors"] == 208_550
    assert _disk_bytes(tmp_path / "bundle") < 40 * 10**6
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert [len(component["layers"] or [0]) for component in manifest["components"]] == [1, 1, 60, 1, 1]
    assert sum(len(group.get("offsets", [0])) for group in manifest["tensors"]) == 208_550

    _, facts = _limited("bind", tmp_path / "bundle", "--layer", "60", "--output", full)
    assert facts["peak"] < 600 * 10**6
    assert (full / "layer-60.fp32.onnx").stat().st_size < MIB


def test_inspect_and_plan_read_headers_only(full: Path) -> None:
    values, facts = _limited("inspect", full)
    assert (values["tensors"], values["tensor_bytes"], values["problems"]) == (208_550, 595_148_192_736, [])
    assert facts["peak"] < 400 * 10**6
    _, facts = _limited("plan", full, "--gpu", "h200", "--gpus", "8", "--context", "262144")
    assert facts["peak"] < 400 * 10**6

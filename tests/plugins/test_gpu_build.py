"""The GPU kernels' ahead-of-time build: what is compiled, that builds are equal, and that a bad kernel fails by name.

Compiling runs in processes of its own: this one has Triton's interpreter switched on by other tests.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_plugins import gpu_signatures, gpu_specialisations
from k25_plugins.errors import InputError, VerificationError
from k25_plugins.gpu_compiler import CompiledKernel, faults
from k25_plugins.gpu_manifest import IMAGES, MANIFEST, TABLE, read_kernels
from k25_plugins.gpu_signatures import KERNELS, kernel_signature
from k25_plugins.gpu_specialisations import (
    ModelDims,
    Specialisation,
    Target,
    dims_from_config,
    specialisations,
    targets_from_text,
)
from k25_plugins.gpu_table import table_from_manifest

needs_triton = pytest.mark.skipif(
    not list(Path(sys.prefix).glob("lib*/python3*/site-packages/triton/backends/nvidia/bin/ptxas*")),
    reason="Triton with its compiler tools is not installed",
)
HANDFUL = ["mla.absorb", "moe_dispatch.permute_x", "linear.linear"]


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m k25_plugins.gpu_kernels`, without the interpreter that other tests switch on."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "k25_plugins.gpu_kernels", "--output", str(folder), "--quiet", *arguments]
    return subprocess.run(command, env={**settings, **environment}, capture_output=True, text=True, check=False)


def config_of(folder: Path, dims: ModelDims) -> Path:
    """A `config.json` of these sizes."""
    names = {
        "num_attention_heads": dims.num_heads,
        "qk_nope_head_dim": dims.qk_nope_head_dim,
        "v_head_dim": dims.v_head_dim,
        "kv_lora_rank": dims.latent_dim,
        "qk_rope_head_dim": dims.rope_dim,
        "hidden_size": dims.hidden,
        "moe_intermediate_size": dims.intermediate_size,
        "n_routed_experts": dims.experts,
        "num_experts_per_tok": dims.experts_per_token,
    }
    path = folder / "config.json"
    path.write_text(json.dumps({"text_config": names}))
    return path


# The table of specialisations.


def test_the_committed_signatures_are_those_of_the_source() -> None:
    assert gpu_signatures.PATH.read_text() == gpu_signatures.signatures_inc(), (
        "run python -m k25_plugins.gpu_signatures"
    )


def test_every_kernel_has_a_configuration_for_every_target() -> None:
    for target in targets_from_text("all"):
        kinds = {spec.kernel for spec in specialisations([ModelDims()], [target])}
        assert kinds == set(KERNELS)


def test_products_of_a_layer_agree_on_the_order_of_columns() -> None:
    """What `gate_up` reads a `permute_x` writes, and what it writes a `down` of the same way of routing reads."""
    for target in targets_from_text("all"):
        found: dict[str, list[dict[str, int]]] = {}
        for spec in specialisations([ModelDims()], [target]):
            found.setdefault(spec.kernel, []).append(dict(spec.constants))
        for gate_up in found["moe_dispatch.gate_up"]:
            assert gate_up["BK"] in [permute["BK"] for permute in found["moe_dispatch.permute_x"]]
            pairs = [(down["BK"], down["PAIRS"], down["ALIGNED"]) for down in found["moe_dispatch.down"]]
            assert (gate_up["H_BK"], gate_up["PAIRS"], gate_up["ALIGNED"]) in pairs


def test_the_last_configuration_of_a_kernel_takes_any_number_of_tokens_and_any_rows() -> None:
    for target in targets_from_text("all"):
        last = {spec.kernel: spec for spec in specialisations([ModelDims()], [target])}
        assert all(spec.max_tokens is None and not spec.divisible for spec in last.values())
        assert all(spec.constants.get("ALIGNED", 0) == 0 for spec in last.values())


def test_names_tell_specialisations_apart() -> None:
    two = [ModelDims(), replace(ModelDims(), cache_dtype="float32")]
    specs = specialisations(two, targets_from_text("all"))
    assert len({(spec.name, spec.target.capability) for spec in specs}) == len(specs)
    once = specialisations([ModelDims()], targets_from_text("all"))
    assert len(once) < len(specs) < 2 * len(once), "kernels that do not read the cache are shared"


def test_sizes_come_from_a_configuration(tmp_path: Path) -> None:
    dims = replace(ModelDims(), num_heads=3, hidden=96, experts=7)
    assert dims_from_config(config_of(tmp_path, dims)) == dims
    assert dims_from_config(config_of(tmp_path, dims), block_size=32).block_size == 32
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"expected the config\.json of a Kimi K2\.5 model"):
        dims_from_config(tmp_path / "config.json")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected all, or some of 80, 86"):
        targets_from_text("90,91")
    with pytest.raises(InputError, match="hidden: expected a multiple of 32, found 40"):
        specialisations([replace(ModelDims(), hidden=40)], targets_from_text("90"))
    (tmp_path / MANIFEST).write_text('{"schema": 99, "kernels": []}')
    with pytest.raises(InputError, match="expected schema 1, found 99"):
        read_kernels(tmp_path)


def test_an_unknown_key_of_the_configurations_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = json.loads(gpu_specialisations.CONFIGS.read_text())
    configs["kernels"][0]["wraps"] = 4
    (tmp_path / "gpu_configs.json").write_text(json.dumps(configs))
    monkeypatch.setattr(gpu_specialisations, "CONFIGS", tmp_path / "gpu_configs.json")
    gpu_specialisations._configs.cache_clear()
    try:
        with pytest.raises(InputError, match=r"mla.rotate_append: expected keys .* found \['wraps'\]"):
            specialisations([ModelDims()], [Target(capability=90, shared=1, mma="wgmma")])
    finally:
        gpu_specialisations._configs.cache_clear()


# What is checked of a kernel that compiled.


def spec_of(kernel: str, capability: str = "90") -> Specialisation:
    return specialisations([ModelDims()], targets_from_text(capability), only=[kernel])[0]


def good(spec: Specialisation) -> CompiledKernel:
    return CompiledKernel(
        function="f",
        cubin=b"",
        ptx=b"",
        warps=spec.warps,
        shared=spec.target.shared,
        registers=255,
        stack=spec.stack,
        tensor_memory=512,
        scratch=0,
        parameters="pppppppiifiiipp",
        mma={"wgmma": 1, "mma.sync": 0, "tcgen05": 0},
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shared": 232449}, "shared memory: expected at most 232448 bytes, found 232449"),
        ({"stack": 6176}, "stack: expected at most 256 bytes, found 6176"),
        ({"tensor_memory": 576}, "tensor memory: expected at most 512 columns, found 576"),
        ({"registers": 4}, "registers: expected at least 17, found 4"),
        ({"mma": {"wgmma": 0, "mma.sync": 9, "tcgen05": 0}}, "matrix instructions: expected wgmma, found"),
        ({"scratch": 8}, "scratch memory: expected none, found 8"),
        ({"parameters": "pppppppiifiiip"}, "parameters: expected pppppppiifiiipp, found pppppppiifiiip"),
        ({"parameters": "pppppppiiifiipp"}, "parameters: expected pppppppiifiiipp, found pppppppiiifiipp"),
    ],
)
def test_a_kernel_over_a_limit_is_named(change: dict[str, Any], text: str) -> None:
    spec = spec_of("mla.split")
    assert faults(spec, good(spec)) == []
    (found,) = faults(spec, replace(good(spec), **change))
    assert found.startswith(f"GPU kernel {spec.name} for sm_90: {text}")


# Compiling.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A handful of kernels of a small model for one target, and the arguments that make them."""
    folder = tmp_path_factory.mktemp("kernels")
    dims = ModelDims(num_heads=6, qk_nope_head_dim=16, v_head_dim=24, latent_dim=32, rope_dim=8, hidden=96)
    arguments = ["--targets", "80", "--config", str(config_of(folder, replace(dims, intermediate_size=64)))]
    for kernel in HANDFUL:
        arguments += ["--only", kernel]
    done = build(folder / "one", *arguments)
    assert done.returncode == 0, done.stderr
    return folder, arguments


@needs_triton
def test_a_build_names_what_it_made(built: tuple[Path, list[str]]) -> None:
    kernels: list[Any] = read_kernels(built[0] / "one")
    images = (built[0] / "one" / IMAGES).read_bytes()
    assert {kernel["kernel"] for kernel in kernels} == set(HANDFUL)
    for kernel in kernels:
        image = images[kernel["offset"] : kernel["offset"] + kernel["bytes"]]
        assert hashlib.sha256(image).hexdigest() == kernel["sha256"]
        assert images[kernel["offset"] + kernel["bytes"]] == 0
        if kernel["is_ptx"]:
            assert b".target sm_80" in image
        else:
            assert image.startswith(b"\x7fELF")
        assert kernel["function"] == kernel_signature(kernel["kernel"]).function
    table = table_from_manifest(json.loads((built[0] / "one" / MANIFEST).read_text()))
    assert "mla.absorb" in table
    assert "mma.sync" in table


@needs_triton
def test_builds_in_two_folders_are_equal_and_a_second_one_keeps_all(built: tuple[Path, list[str]]) -> None:
    folder, arguments = built
    other = build(folder / "two", *arguments)
    assert "0 kept" in other.stdout, other.stderr
    for name in (MANIFEST, IMAGES, TABLE):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    again = build(folder / "two", *arguments)
    assert " 0 compiled" in again.stdout
    assert (folder / "one" / MANIFEST).read_bytes() == (folder / "two" / MANIFEST).read_bytes()
    assert str(folder).encode() not in (folder / "one" / IMAGES).read_bytes()


@needs_triton
def test_the_kernels_are_in_the_library(built: tuple[Path, list[str]]) -> None:
    from gpu_replay import ROOT, SHIM, SOURCES, compiler

    folder = built[0] / "one"
    (folder / "shim.cc").write_text(SHIM)
    command = [compiler(), "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{ROOT / 'core'}", f"-I{folder}"]
    command += [f'-DK25_GPU_KERNELS_DIR="{folder}"', str(folder / "shim.cc"), *(str(ROOT / name) for name in SOURCES)]
    subprocess.run([*command, "-o", str(folder / "lib.so"), "-ldl"], check=True)
    library = ctypes.CDLL(str(folder / "lib.so"))
    assert library.k25_gpu_kernel_count() == len(read_kernels(folder))
    assert (folder / IMAGES).read_bytes() in (folder / "lib.so").read_bytes()


@needs_triton
def test_a_build_fails_by_the_name_of_the_kernel(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What is built already is checked again: here by a manifest of limits that no kernel keeps."""
    folder, arguments = built
    code = (
        "import sys, json; from pathlib import Path; from k25_plugins import gpu_specialisations as g; "
        "configs = json.loads(g.CONFIGS.read_text()); "
        "[e.update(mma='wgmma') for e in configs['kernels'] if e['kernel'] == 'mla.absorb']; "
        f"g.CONFIGS = Path({str(tmp_path / 'configs.json')!r}); g.CONFIGS.write_text(json.dumps(configs)); "
        "from k25_plugins import gpu_kernels; sys.exit(gpu_kernels.main())"
    )
    settings = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    before = (folder / "one" / MANIFEST).read_bytes()
    command = [sys.executable, "-c", code, "--output", str(folder / "one"), "--quiet", *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == VerificationError.exit_code
    assert "GPU kernel mla_absorb_N6" in done.stderr
    assert "for sm_80: matrix instructions: expected wgmma" in done.stderr
    assert (folder / "one" / MANIFEST).read_bytes() == before


@needs_triton
def test_a_ptxas_that_is_none_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, "--targets", "80", "--only", "mla.absorb", K25_PTXAS="/bin/true")
    assert done.returncode == 4
    assert "K25_PTXAS=/bin/true: expected a ptxas of CUDA 12.9 or newer" in done.stderr


@needs_triton
@pytest.mark.slow
def test_every_kernel_for_every_target(tmp_path: Path) -> None:
    """The real sizes, all limits; minutes."""
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    kernels: list[Any] = read_kernels(tmp_path)
    expected = {
        (spec.name, spec.target.capability) for spec in specialisations([ModelDims()], targets_from_text("all"))
    }
    assert {(kernel["name"], kernel["target"]) for kernel in kernels if not kernel["is_ptx"]} == expected
    assert ModelDims().hidden in {kernel["constants"].get("H") for kernel in kernels}

"""The bundle: complete and as specified, the same bytes everywhere, reused or replaced whole.

Tracing takes seconds, so that only the tests of determinism trace; the others take the graphs of the shared bundle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import pytest

from k25_export import bundle as bundle_module
from k25_export import trace as trace_module
from k25_export.bundle import bundle_from_checkpoint
from k25_export.checkpoint import checkpoint_from_folder
from k25_export.component_cache import ComponentCache
from k25_export.component_specs import ComponentSpec
from k25_export.manifest import Manifest, Precision, read_manifest
from k25_export.traced_component import TracedComponent
from k25_plugins.errors import InputError

COMPONENTS = ["embed", "dense_layer", "moe_layer", "head", "vision"]
GRAPHS = 2 * len(COMPONENTS)  # fp32 and bf16
TOKENIZER = ["tiktoken.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]


class ExportedFiles(Protocol):
    """The shared fixture: a checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path


def portable_files(bundle: Path) -> dict[str, bytes]:
    """Everything that must be the same on every machine: all but the location, engines and reports."""
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name != "checkpoint.json" and path.relative_to(bundle).parts[0] != "reports"
    }


def manifest_values(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    return values


@dataclass
class Workshop:
    """A copy of the checkpoint and of its bundle; `traced` lists the graphs that an export asked for."""

    checkpoint: Path
    bundle: Path
    traced: list[str]

    def export(self, **options: Any) -> tuple[Manifest, bool]:
        eps = {"latent_norm_eps": options.pop("latent_norm_eps")} if "latent_norm_eps" in options else {}
        return bundle_from_checkpoint(checkpoint_from_folder(self.checkpoint, **eps), self.bundle, **options)


@pytest.fixture
def workshop(tiny: ExportedFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint")
    shutil.copytree(tiny.bundle, tmp_path / "bundle")
    shop = Workshop(tmp_path / "checkpoint", tmp_path / "bundle", [])
    manifest = read_manifest(tiny.bundle)

    def traced(spec: ComponentSpec, precision: Precision) -> TracedComponent:
        shop.traced.append(f"{spec.name}.{precision}")
        file = manifest.component(spec.name).file(precision)
        data = (tiny.bundle / file.path).read_bytes()
        return TracedComponent(data=data, inputs=file.inputs, outputs=file.outputs)

    monkeypatch.setattr(trace_module, "traced_component_from_spec", traced)
    return shop


def stored_tensors(files: ExportedFiles) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape), from the manifest's tensor table (`test_manifest.py` holds it against the shards)."""
    return {
        member.name: (member.dtype, list(member.shape))
        for group in read_manifest(files.bundle).tensors
        for member in group.members()
    }


def test_the_folder_is_as_specified(exported: ExportedFiles) -> None:
    files = set(portable_files(exported.bundle))
    assert files == {
        "manifest.json",
        *(f"components/{name}.{precision}.onnx" for name in COMPONENTS for precision in ("fp32", "bf16")),
        *(f"tokenizer/{name}" for name in [*TOKENIZER, "preprocessor_config.json"]),
    }
    location = json.loads((exported.bundle / "checkpoint.json").read_text("utf-8"))
    assert location == {
        "format": "k25-checkpoint-location",
        "schema_version": 1,
        "path": str(exported.checkpoint.resolve()),
    }
    assert [path.name for path in exported.bundle.parent.iterdir() if "partial" in path.name] == []


def test_hashes_and_sizes_are_those_of_the_files(exported: ExportedFiles) -> None:
    values = manifest_values(exported.bundle)
    entries = [file for component in values["components"] for file in component["files"]] + values["tokenizer"]
    assert len(entries) == GRAPHS + 5
    for entry in entries:
        content = (exported.bundle / entry["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    for shard in values["shards"]:
        content = (exported.checkpoint / shard["file"]).read_bytes()
        assert len(content) == shard["bytes"]
        assert shard["data_start"] == 8 + int.from_bytes(content[:8], "little")
        assert hashlib.sha256(content[: shard["data_start"]]).hexdigest() == shard["header_sha256"]


def test_small_files_are_copied_as_they_are(exported: ExportedFiles) -> None:
    for path in (exported.bundle / "tokenizer").iterdir():
        assert path.read_bytes() == (exported.checkpoint / path.name).read_bytes()


def test_ports_of_the_manifest_are_those_of_the_graphs(exported: ExportedFiles) -> None:
    import onnx

    names = {1: "float32", 6: "int32", 7: "int64", 16: "bfloat16"}
    for component in manifest_values(exported.bundle)["components"]:
        for file in component["files"]:
            graph = onnx.load(exported.bundle / file["path"]).graph
            for ports, values in ((file["inputs"], graph.input), (file["outputs"], graph.output)):
                assert ports == [
                    {
                        "name": value.name,
                        "dtype": names[value.type.tensor_type.elem_type],
                        "shape": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
                    }
                    for value in values
                ]


def test_layers_of_the_components(exported: ExportedFiles) -> None:
    text = json.loads((exported.checkpoint / "config.json").read_text("utf-8"))["text_config"]
    first, count = text["first_k_dense_replace"], text["num_hidden_layers"]
    layers = {component["name"]: component["layers"] for component in manifest_values(exported.bundle)["components"]}
    assert layers == {
        "embed": None,
        "dense_layer": list(range(first)),
        "moe_layer": list(range(first, count)),
        "head": None,
        "vision": None,
    }
    assert list(layers) == COMPONENTS


def test_every_weight_input_is_bound_to_tensors_that_fit(exported: ExportedFiles) -> None:
    stored = stored_tensors(exported)
    dtypes = {"BF16": "bfloat16", "F32": "float32", "I32": "int32"}
    bound = set()
    for component in manifest_values(exported.bundle)["components"]:
        inputs = {port["name"]: port for port in component["files"][0]["inputs"]}
        activations = {
            "token_ids",
            "hidden",
            "cache",
            "positions",
            "query_start",
            "block_table",
            "residual_share",
            "rows",
            "pixel_values",
            "position_embedding",
            "rope_cos",
            "rope_sin",
            "merge_index",
        }
        assert set(component["bindings"]) == set(inputs) - activations
        for name, binding in component["bindings"].items():
            if name.startswith("expert_"):
                continue
            assert set(binding) == {"tensor"}
            assert binding["tensor"].endswith(name)
            for layer in component["layers"] or [0]:
                tensor = binding["tensor"].replace("{layer}", str(layer))
                bound.add(tensor)
                dtype, shape = stored[tensor]
                assert (dtypes[dtype], shape) == (inputs[name]["dtype"], inputs[name]["shape"]), tensor
    # The runtime reads the table of positions itself.
    table = "vision_tower.patch_embed.pos_emb.weight"
    assert bound == {name for name in stored if ".experts." not in name and name != table}


def test_experts_are_bound_as_a_region_and_a_table(exported: ExportedFiles) -> None:
    components = {component["name"]: component for component in manifest_values(exported.bundle)["components"]}
    bindings = components["moe_layer"]["bindings"]
    prefix = "language_model.model.layers.{layer}.mlp.experts.{expert}."
    columns = [
        f"{prefix}{projection}_proj.weight_{part}"
        for projection in ("gate", "up", "down")
        for part in ("packed", "scale")
    ]
    region = {"rule": "region", "tensors": columns, "row_bytes": 8}
    assert bindings["expert_words"] == bindings["expert_scales"] == region
    assert bindings["expert_table"] == {"rule": "offsets", "tensors": columns, "row_bytes": 8}
    text = json.loads((exported.checkpoint / "config.json").read_text("utf-8"))["text_config"]
    stored = stored_tensors(exported)
    for layer in components["moe_layer"]["layers"]:
        for expert in range(text["n_routed_experts"]):
            for column in columns:
                assert column.replace("{layer}", str(layer)).replace("{expert}", str(expert)) in stored


@pytest.fixture(scope="module")
def elsewhere(tiny: ExportedFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same export by another process, with another environment, from and to other folders."""
    folder = tmp_path_factory.mktemp("elsewhere with space")
    shutil.copytree(tiny.checkpoint, folder / "copy")
    program = (
        "import sys, random; random.seed(); random.random()\n"
        "from pathlib import Path\n"
        "from k25_export.bundle import bundle_from_checkpoint\n"
        "from k25_export.checkpoint import checkpoint_from_folder\n"
        "bundle_from_checkpoint(checkpoint_from_folder(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "4242",
        "LC_ALL": "C",
        "TZ": "Pacific/Auckland",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONUTF8", None)
    done = subprocess.run(
        [sys.executable, "-c", program, "copy", "deep/er/bundle"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "standard output may be reserved for JSON"
    return folder


def test_another_process_in_other_folders_writes_the_same_bytes(tiny: ExportedFiles, elsewhere: Path) -> None:
    ours, theirs = portable_files(tiny.bundle), portable_files(elsewhere / "deep" / "er" / "bundle")
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    location = json.loads((elsewhere / "deep" / "er" / "bundle" / "checkpoint.json").read_text("utf-8"))
    assert location["path"] == str((elsewhere / "copy").resolve())


def test_other_options_replace_the_bundle_and_trace_the_same_graphs(tiny: ExportedFiles, tmp_path: Path) -> None:
    # Traced once more in this process, whatever was traced before it.
    shutil.copytree(tiny.bundle, tmp_path / "bundle")
    checkpoint = checkpoint_from_folder(tiny.checkpoint)
    manifest, is_reused = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", precisions=("fp32",))
    assert not is_reused
    assert manifest.options["precisions"] == ["fp32"]
    assert manifest.inputs_sha256 != read_manifest(tiny.bundle).inputs_sha256
    before, after = portable_files(tiny.bundle), portable_files(tmp_path / "bundle")
    assert {name for name in after if name.endswith(".onnx")} == {f"components/{name}.fp32.onnx" for name in COMPONENTS}
    assert [name for name in after if name != "manifest.json" and after[name] != before[name]] == []


def test_an_unchanged_export_is_reused(workshop: Workshop, tiny: ExportedFiles) -> None:
    workshop.export()  # the copy of the checkpoint lies elsewhere
    times = {path: path.stat().st_mtime_ns for path in workshop.bundle.rglob("*")}
    manifest, is_reused = workshop.export()
    assert is_reused
    assert workshop.traced == []
    assert manifest == read_manifest(tiny.bundle)
    assert {path: path.stat().st_mtime_ns for path in workshop.bundle.rglob("*")} == times


def test_reports_and_engines_survive_reuse(workshop: Workshop) -> None:
    (workshop.bundle / "engines" / "sm120").mkdir(parents=True)
    (workshop.bundle / "engines" / "sm120" / "head.engine").write_text("engine")
    (workshop.bundle / "reports" / "parity.json").write_text("{}")
    assert workshop.export()[1]
    assert (workshop.bundle / "engines" / "sm120" / "head.engine").read_text() == "engine"
    assert (workshop.bundle / "reports" / "parity.json").read_text() == "{}"


def test_a_moved_checkpoint_is_found_at_its_new_place(workshop: Workshop) -> None:
    before = portable_files(workshop.bundle)
    moved = workshop.checkpoint.rename(workshop.checkpoint.with_name("moved"))
    workshop.checkpoint = moved
    assert workshop.export()[1]
    location = json.loads((workshop.bundle / "checkpoint.json").read_text("utf-8"))
    assert location["path"] == str(moved.resolve())
    assert portable_files(workshop.bundle) == before
    assert sorted(path.name for path in workshop.bundle.iterdir()) == [
        *("checkpoint.json", "components", "manifest.json", "reports", "tokenizer"),
    ]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip_a_byte, cut, Path.unlink, replace_by_folder])
@pytest.mark.parametrize("name", ["components/moe_layer.bf16.onnx", "tokenizer/tiktoken.model"])
def test_a_damaged_bundle_is_written_again(
    workshop: Workshop, tiny: ExportedFiles, name: str, damage: Callable[[Path], object]
) -> None:
    damage(workshop.bundle / name)
    assert not workshop.export()[1]
    assert portable_files(workshop.bundle) == portable_files(tiny.bundle)
    assert len(workshop.traced) == GRAPHS


def break_an_offset(values: dict[str, Any]) -> None:
    values["tensors"][0]["offset"] += 2


def break_a_binding(values: dict[str, Any]) -> None:
    values["components"][0]["bindings"]["model.embed_tokens.weight"]["tensor"] = "language_model.lm_head.weight"


def drop_a_component(values: dict[str, Any]) -> None:
    del values["components"][-1]


@pytest.mark.parametrize("damage", [break_an_offset, break_a_binding, drop_a_component])
def test_a_damaged_manifest_is_written_again(
    workshop: Workshop, tiny: ExportedFiles, damage: Callable[[dict[str, Any]], None]
) -> None:
    # Equal keys mean equal bundles: a manifest that says something else under the same key must not be believed.
    values = manifest_values(workshop.bundle)
    damage(values)
    (workshop.bundle / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    workshop.export()
    assert portable_files(workshop.bundle) == portable_files(tiny.bundle)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_a_bundle_of_another_version_is_replaced_whole(
    workshop: Workshop, tiny: ExportedFiles, version: object
) -> None:
    values = {"format": "k25-bundle", "schema_version": version, "something": "else"}
    (workshop.bundle / "manifest.json").write_text(json.dumps(values))
    (workshop.bundle / "old_file").write_text("old")
    assert not workshop.export()[1]
    assert portable_files(workshop.bundle) == portable_files(tiny.bundle)


def test_components_may_come_from_a_cache(workshop: Workshop, tiny: ExportedFiles, tmp_path: Path) -> None:
    for expected in (GRAPHS, 0):
        shutil.rmtree(workshop.bundle)
        workshop.traced.clear()
        assert not workshop.export(cache=ComponentCache(tmp_path / "cache"))[1]
        assert len(workshop.traced) == expected
        assert portable_files(workshop.bundle) == portable_files(tiny.bundle)
    # Another configuration has other components.
    change_config(workshop.checkpoint)
    workshop.export(cache=ComponentCache(tmp_path / "cache"))
    assert len(workshop.traced) == GRAPHS


@pytest.mark.parametrize("damage", [flip_a_byte, cut, lambda path: path.write_bytes(b"")])
def test_a_damaged_cache_entry_is_traced_again(
    workshop: Workshop, tiny: ExportedFiles, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    for _ in range(2):
        shutil.rmtree(workshop.bundle)
        workshop.traced.clear()
        workshop.export(cache=ComponentCache(tmp_path / "cache"))
        entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert len(workshop.traced) == len(entries) == GRAPHS
        assert portable_files(workshop.bundle) == portable_files(tiny.bundle)
        for path in entries:
            damage(path)


def change_config(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    values["text_config"]["routed_scaling_factor"] = 2.5
    (checkpoint / "config.json").write_text(json.dumps(values))


def change_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("changed")


def remove_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()


def change_header(checkpoint: Path) -> None:
    # Another order of keys: the same tensors at the same places under another header.
    path = checkpoint / "model-00001-of-000007.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = dict(reversed(json.loads(content[8 : 8 + length]).items()))
    text = json.dumps(entries, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(content[:8] + text + content[8 + length :])


@pytest.mark.parametrize("change", [change_config, change_template, remove_template, change_header])
def test_another_checkpoint_is_not_the_same_bundle(workshop: Workshop, change: Callable[[Path], None]) -> None:
    before = read_manifest(workshop.bundle).inputs_sha256
    change(workshop.checkpoint)
    manifest, is_reused = workshop.export()
    assert not is_reused
    assert manifest.inputs_sha256 != before
    assert read_manifest(workshop.bundle) == manifest
    assert workshop.export()[1]


def test_another_epsilon_is_not_the_same_bundle(workshop: Workshop) -> None:
    before = read_manifest(workshop.bundle).inputs_sha256
    manifest, is_reused = workshop.export(latent_norm_eps=1e-5)
    assert not is_reused
    assert manifest.options["latent_norm_eps"] == 1e-5
    assert manifest.inputs_sha256 != before
    assert not workshop.export()[1]


def test_another_version_of_a_tool_is_not_the_same_bundle(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = bundle_module.tool_versions()
    for key in versions:
        monkeypatch.setattr(bundle_module, "tool_versions", lambda key=key: {**versions, key: "another"})
        manifest, is_reused = workshop.export()
        assert not is_reused
        assert manifest.versions[key] == "another"


def test_versions_are_those_of_the_installed_tools() -> None:
    from importlib.metadata import version

    import onnx
    import onnxscript
    import torch

    versions = bundle_module.tool_versions()
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["onnx"] == onnx.__version__
    assert versions["onnxscript"] == onnxscript.__version__
    assert versions["onnx-ir"] == version("onnx-ir")
    assert len(versions["source"]) == 64


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def fresh(workshop: Workshop) -> Iterator[Workshop]:
    """A workshop whose bundle is not there yet; a failed export must leave it like that."""
    shutil.rmtree(workshop.bundle)
    before = listing(workshop.checkpoint.parent)
    yield workshop
    assert listing(workshop.checkpoint.parent) == before


def test_a_checkpoint_with_problems_writes_nothing(fresh: Workshop) -> None:
    change = json.loads((fresh.checkpoint / "config.json").read_text())
    change["text_config"]["v_head_dim"] += 1
    (fresh.checkpoint / "config.json").write_text(json.dumps(change))
    with pytest.raises(InputError, match=r"kv_b_proj.*expected.*found"):
        fresh.export()
    assert fresh.traced == []


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), AssertionError("x")])
def test_a_failed_export_leaves_nothing(fresh: Workshop, error: BaseException) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if done == 5:
            raise error

    with pytest.raises(type(error)):
        fresh.export(progress=progress)
    assert len(fresh.traced) >= 5


def test_a_full_disk_leaves_nothing(fresh: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "moe_layer.bf16.onnx":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"No space left on device \(moe_layer\.bf16\.onnx\)"):
        fresh.export()


def test_a_failed_export_keeps_the_old_bundle(workshop: Workshop, tiny: ExportedFiles) -> None:
    def progress(what: str, done: int, total: int) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.export(latent_norm_eps=1e-5, progress=progress)
    assert portable_files(workshop.bundle) == portable_files(tiny.bundle)
    assert sorted(path.name for path in workshop.bundle.parent.iterdir()) == ["bundle", "checkpoint"]


def test_a_foreign_folder_is_refused_and_kept(fresh: Workshop) -> None:
    fresh.bundle.mkdir()
    (fresh.bundle / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"not empty|lies in it"):
        fresh.export()
    assert fresh.traced == []
    assert (fresh.bundle / "thesis.tex").read_text() == "years of work"
    shutil.rmtree(fresh.bundle)


def test_the_checkpoint_itself_is_no_place_for_the_bundle(fresh: Workshop) -> None:
    with pytest.raises(InputError, match=r"not empty|lies in it"):
        bundle_from_checkpoint(checkpoint_from_folder(fresh.checkpoint), fresh.checkpoint)


def test_a_tokenizer_file_that_leads_out_of_the_checkpoint_is_refused(fresh: Workshop) -> None:
    (fresh.checkpoint / "tiktoken.model").unlink()
    (fresh.checkpoint / "tiktoken.model").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"tiktoken\.model leads out of"):
        fresh.export()


def test_a_tokenizer_file_of_any_size_is_not_copied(fresh: Workshop) -> None:
    os.truncate(fresh.checkpoint / "tiktoken.model", 200 << 20)
    with pytest.raises(InputError, match=r"tiktoken\.model"):
        fresh.export()


def test_code_of_the_checkpoint_is_not_copied(workshop: Workshop) -> None:
    for name in ("modeling_kimi_k25.py", "tokenization_kimi.py", "README.md", "tokenizer.json.py"):
        (workshop.checkpoint / name).write_text("import os")
    assert workshop.export()[1]
    shutil.rmtree(workshop.bundle)
    workshop.export()
    assert [name for name in listing(workshop.bundle) if name.endswith((".py", ".md"))] == []


def test_a_checkpoint_without_tokenizer_is_exported(workshop: Workshop) -> None:
    for name in [*TOKENIZER, "preprocessor_config.json"]:
        (workshop.checkpoint / name).unlink()
    manifest, _ = workshop.export()
    assert manifest.tokenizer == ()
    assert workshop.export()[1]


def test_progress_counts_every_graph(workshop: Workshop) -> None:
    shutil.rmtree(workshop.bundle)
    calls: list[tuple[str, int, int]] = []
    workshop.export(progress=lambda what, done, total: calls.append((what, done, total)))
    assert [done for _, done, _ in calls] == list(range(GRAPHS + 1))
    assert {total for _, _, total in calls} == {GRAPHS}
    for name in COMPONENTS:
        assert any(name in what for what, _, _ in calls)

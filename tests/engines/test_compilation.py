"""Real engines, built here without a GPU: tiny and full-size components, the fused decoder, every way to fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_helpers import copy_of, needs_tensorrt, some_job

from k25_engines import compilation, engine_units
from k25_engines.build_job import GraphFile
from k25_engines.child_processes import ChildLimits, run_jobs
from k25_engines.compilation import Compilation, engines_from_bundle
from k25_engines.engine_header import header_from_bytes, require_whole
from k25_engines.engine_options import EngineOptions
from k25_engines.inventory import engine_statuses
from k25_engines.manifest import DECODER, EngineEntry, Profile, read_engine_file, read_engine_manifest
from k25_engines.tensorrt_module import installed_tensorrt, parser_environment, parser_library_is_found
from k25_export.manifest import ComponentFile, Manifest, Port, read_manifest, sealed_manifest
from k25_plugins.errors import BackendMissingError, InputError, VerificationError

pytestmark = needs_tensorrt

TARGETS = ("sm80", "sm86", "sm89", "sm120")
#: Small sizes: what is built is the same, and no test depends on them.
OPTIONS = EngineOptions(max_sequences=4, max_tokens=64, context=256, block_size=16)


def check_engines(bundle: Path, entries: tuple[EngineEntry, ...]) -> None:
    """Each engine is the file that was recorded, whole and for its target, with the checks that were asked for."""
    for entry in entries:
        data = read_engine_file(bundle, entry)
        header = header_from_bytes(data, where=entry.name)
        require_whole(header, data, where=entry.name)
        assert header.targets == (entry.target,)
        assert ".".join(map(str, header.version)) == entry.version
        assert entry.warnings == ()
        assert set(entry.checks) == {"parser", "ports", "weights", "plugins", "size", "fields", "header", "warnings"}
        assert entry.checks["header"].startswith("whole")
        assert entry.peak_memory_bytes > 1 << 20
        assert entry.build_seconds > 0
        assert "== sm" not in (bundle / entry.log).read_text()


@pytest.fixture(scope="module")
def built(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compilation]:
    bundle = copy_of(tiny, tmp_path_factory.mktemp("tiny"))
    return bundle, engines_from_bundle(bundle, TARGETS, options=OPTIONS)


@pytest.fixture
def bundle(built: tuple[Path, Compilation], tmp_path: Path) -> Path:
    """A bundle with engines that a test may change."""
    return Path(shutil.copytree(built[0], tmp_path / "bundle"))


def test_every_component_is_built_for_every_target(built: tuple[Path, Compilation]) -> None:
    bundle, result = built
    manifest = read_manifest(bundle)
    wanted = [(component.name, target) for target in TARGETS for component in manifest.components]
    assert [(entry.component, entry.target) for entry in result.engines] == wanted
    assert read_engine_manifest(bundle).targets() == TARGETS
    check_engines(bundle, result.engines)
    assert not list((bundle / "engines").glob(".*"))


def serialised(attribute: onnx.AttributeProto) -> bytes:
    """A plugin's field in the engine's file: its numbers as they are in memory."""
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.INT:
        return np.array([value], np.int32).tobytes()
    return np.array(value, np.float32).tobytes()


def test_plugins_are_counted_and_the_cache_is_aliased(built: tuple[Path, Compilation]) -> None:
    bundle, result = built
    manifest = read_manifest(bundle)
    for entry in result.engines:
        file = manifest.component(entry.component).file("bf16")
        model = onnx.load(bundle / file.path)
        nodes = [node.op_type for node in model.graph.node if node.domain == "k25"]
        wanted = {op: nodes.count(op) for op in ("MLA", "MoEDispatch") if op in nodes}
        assert (entry.plugins.layers if entry.plugins else {}) == wanted
        data = read_engine_file(bundle, entry)
        for node in model.graph.node:
            for attribute in node.attribute if node.op_type in wanted else ():
                if attribute.name != "plugin_namespace":
                    assert serialised(attribute) in data, f"{entry.name}: {node.op_type}.{attribute.name}"
        assert entry.aliases == ({"cache_out": "cache"} if "MLA" in nodes else {})
        assert (entry.inputs, entry.outputs) == (file.inputs, file.outputs)


def test_nothing_is_built_again_where_nothing_has_changed(built: tuple[Path, Compilation], bundle: Path) -> None:
    before = (bundle / "engines" / "engines.json").read_bytes()
    result = engines_from_bundle(bundle, TARGETS, options=OPTIONS)
    assert (len(result.engines), result.built) == (len(built[1].engines), ())
    assert (bundle / "engines" / "engines.json").read_bytes() == before


def test_what_has_changed_is_built_again(bundle: Path) -> None:
    known = read_engine_manifest(bundle)
    (bundle / known.engine("embed", "sm80").path).write_bytes(b"damaged")
    again = engines_from_bundle(bundle, ["sm80"], options=OPTIONS, components=["embed", "head"])
    assert [entry.component for entry in again.built] == ["embed"]
    larger = engines_from_bundle(bundle, ["sm80"], options=replace(OPTIONS, max_tokens=65), components=["embed"])
    assert [entry.component for entry in larger.built] == ["embed"]
    assert larger.built[0].key != again.built[0].key
    assert len(read_engine_manifest(bundle).engines) == len(known.engines)
    check_engines(bundle, larger.built)


def test_what_is_built_here_is_told_from_what_is_not(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(bundle)
    statuses = engine_statuses(bundle, manifest)
    assert all(status.is_built_here for status in statuses)
    assert {status.runs_on.split()[0] for status in statuses} == {"8.0", "8.6", "8.9", "12.0"}
    path = bundle / "engines" / "engines.json"
    values = json.loads(path.read_text())
    values["engines"][0] |= {"version": "1.6.0.1", "key": "0" * 64}
    path.write_text(json.dumps(values))
    stale = [status for status in engine_statuses(bundle, manifest) if not status.is_built_here]
    assert len(stale) == 1
    assert f"built with tensorrt-rtx 1.6.0.1, this machine has {statuses[0].entry.version}" in str(stale[0].stale)
    entry = engines_from_bundle(bundle, [stale[0].entry.target], options=OPTIONS).built
    assert [item.component for item in entry] == [stale[0].entry.component]
    monkeypatch.setattr("k25_engines.engine_key.plugin_source_sha256", lambda: "0" * 64)
    assert {status.stale for status in engine_statuses(bundle, manifest)} == {
        "built by other plugin or builder code than is installed"
    }
    cut = statuses[0].entry
    (bundle / cut.path).write_bytes((bundle / cut.path).read_bytes()[:-5])
    assert f"expected {cut.bytes} bytes, found {cut.bytes - 5}" in str(engine_statuses(bundle, manifest)[0].problem)


def test_portable_engines_have_no_plugins_and_two_caches(bundle: Path) -> None:
    options = replace(OPTIONS, portable=True)
    result = engines_from_bundle(bundle, ["sm80", "sm120"], options=options, components=["dense_layer", "moe_layer"])
    check_engines(bundle, result.built)
    assert len(result.built) == 4
    for entry in result.built:
        assert (entry.portable, entry.plugins, entry.aliases) == (True, None, {})
        assert entry.checks["plugins"] == "none, as wanted"


def test_fp32_engines_with_plugins(odd: Any, tmp_path: Path) -> None:
    bundle = copy_of(odd, tmp_path)
    result = engines_from_bundle(bundle, ["sm86"], options=replace(OPTIONS, precision="fp32"))
    check_engines(bundle, result.built)
    assert {port.dtype for entry in result.built for port in entry.inputs if port.name in ("hidden", "cache")} == {
        "float32"
    }
    assert {op for entry in result.built if entry.plugins for op in entry.plugins.layers} == {"MLA", "MoEDispatch"}


def test_the_fused_decoder_of_tiny(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    layers = manifest.model.text.num_hidden_layers
    result = engines_from_bundle(bundle, ["sm120"], options=OPTIONS, components=["embed"], fuse_decoder=True)
    (entry,) = result.built
    check_engines(bundle, result.built)
    assert (entry.component, entry.layers) == (DECODER, tuple(range(layers)))
    assert entry.aliases == {f"layers.{n}.cache_out": f"layers.{n}.cache" for n in range(layers)}
    assert entry.plugins is not None
    assert entry.plugins.layers == {"MLA": layers, "MoEDispatch": len(manifest.model.text.moe_layers)}
    names = [port.name for port in entry.inputs]
    assert names[0] == "hidden"
    assert names.count("positions") == names.count("residual_share") == 1
    assert [port.name for port in entry.outputs if "." not in port.name] == ["hidden_out"]
    for number, component in enumerate(engine_units.decoder_components(manifest)):
        assert {f"layers.{number}.{name}" for name in component.bindings} <= set(names)


# Full size: the real widths. Two layers, and two blocks of the vision tower, are enough for the components: the others
# are the same again.


def full_size_bundle(folder: Path, *, vision_blocks: int) -> Path:
    from k25_export.bundle import bundle_from_checkpoint
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.demo import checkpoint as demo
    from k25_export.demo import small_files
    from k25_export.demo.presets import preset_with_overrides

    preset = preset_with_overrides("full-sparse", {"num_hidden_layers": 2})
    vision = {**preset.vision, "vt_num_hidden_layers": vision_blocks}
    shorter = replace(preset, vision=vision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "preset_with_overrides", lambda name, overrides: shorter)
        patch.setattr(small_files, "train_byte_pairs", _some_tokens)  # no engine depends on the tokenizer
        checkpoint = demo.write_demo_checkpoint(folder / "checkpoint", preset="full-sparse", seed=1)
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), folder / "bundle", precisions=("bf16",))
    return folder / "bundle"


def _some_tokens(words: Any, count: int) -> list[bytes]:
    return [bytes([value]) for value in range(256)] + [b"%06d" % number for number in range(count - 256)]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_size_bundle(tmp_path_factory.mktemp("full"), vision_blocks=2)


@pytest.mark.slow
def test_the_whole_vision_tower_is_built_for_every_target(tmp_path: Path) -> None:
    bundle = full_size_bundle(tmp_path, vision_blocks=27)
    result = engines_from_bundle(bundle, TARGETS, components=["vision"])
    assert [entry.target for entry in result.built] == list(TARGETS)
    check_engines(bundle, result.built)


def test_full_size_components_are_built_for_every_target(full_size: Path) -> None:
    result = engines_from_bundle(full_size, TARGETS)
    manifest = read_manifest(full_size)
    assert len(result.built) == len(TARGETS) * len(manifest.components)
    check_engines(full_size, result.built)
    for entry in result.built:
        assert entry.bytes < 16 << 20, "weights are inputs: an engine knows nothing of their size"
    moe = next(entry for entry in result.built if entry.component == "moe_layer")
    assert moe.profiles[0].shapes["expert_words"][2][0] * 8 > 9_000_000_000


def test_the_fused_decoder_of_full_size(full_size: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 61 layers, 1098 inputs. The second layer of the bundle stands for the 60 that are alike."""
    dense, moe = engine_units.decoder_components(read_manifest(full_size))
    monkeypatch.setattr(engine_units, "decoder_components", lambda manifest: (dense, *(moe,) * 60))
    result = engines_from_bundle(full_size, ["sm120"], components=["embed"], fuse_decoder=True)
    entry = next(entry for entry in result.built if entry.component == DECODER)
    check_engines(full_size, (entry,))
    assert entry.plugins is not None
    assert entry.plugins.layers == {"MLA": 61, "MoEDispatch": 60}
    assert len(entry.aliases) == 61
    assert entry.peak_memory_bytes < 2 << 30


# Failures.


def changed_component(bundle: Path, name: str, change: Any) -> Manifest:
    """Change the bf16 graph of a component; the manifest is sealed again, as if it had been exported so."""
    manifest = read_manifest(bundle)
    component = manifest.component(name)
    file = component.file("bf16")
    model = onnx.load(bundle / file.path)
    change(model)
    data = model.SerializeToString()
    (bundle / file.path).write_bytes(data)
    new: ComponentFile = replace(file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    files = tuple(new if item is file else item for item in component.files)
    components = tuple(replace(item, files=files) if item is component else item for item in manifest.components)
    manifest, text = sealed_manifest(replace(manifest, components=components))
    (bundle / "manifest.json").write_text(text)
    return manifest


def engines_state(bundle: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted((bundle / "engines").rglob("*"))}


@pytest.fixture
def unchanged(bundle: Path) -> Iterator[Path]:
    """A bundle with engines that a failing build must leave as they are."""
    before = engines_state(bundle)
    yield bundle
    assert engines_state(bundle).items() >= {key: value for key, value in before.items() if Path(key).is_file()}.items()
    assert not list((bundle / "engines").glob(".*"))


def test_a_graph_that_tensorrt_cannot_parse_names_the_node(unchanged: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "Frobnicate"

    changed_component(unchanged, "head", change)
    with pytest.raises(InputError, match=r"head for sm80: TensorRT cannot parse it: node \S+ \(Frobnicate\)") as caught:
        engines_from_bundle(unchanged, ["sm80", "sm120"], options=OPTIONS)
    assert "head for sm120" in str(caught.value)


FP8 = """
<ir_version: 10, opset_import: ["" : 21]>
g (bfloat16[tokens, 64] x, bfloat16[64, 64] w) => (bfloat16[tokens, 64] y) {
  scale = Constant <value = float {1.0}> ()
  one = Cast <to = 16> (scale)
  xq = QuantizeLinear <output_dtype = 17> (x, one)
  xd = DequantizeLinear (xq, one)
  wq = QuantizeLinear <output_dtype = 17> (w, one)
  wd = DequantizeLinear (wq, one)
  y = MatMul (xd, wd)
}
"""


def test_a_dtype_that_a_target_lacks_names_component_and_target(tmp_path: Path) -> None:
    """FP8 is there from SM 8.9 on."""
    data = onnx.parser.parse_model(FP8)
    (tmp_path / "fp8.onnx").write_bytes(data.SerializeToString())
    sha256 = hashlib.sha256((tmp_path / "fp8.onnx").read_bytes()).hexdigest()
    job = some_job(
        tmp_path / "job",
        graphs=(GraphFile(component="moe_layer", path=str(tmp_path / "fp8.onnx"), sha256=sha256),),
        targets=("sm80", "sm120"),
        version=installed_tensorrt().version,
        inputs=(
            Port(name="x", dtype="bfloat16", shape=("tokens", 64)),
            Port(name="w", dtype="bfloat16", shape=(64, 64)),
        ),
        outputs=(Port(name="y", dtype="bfloat16", shape=("tokens", 64)),),
        profiles=(Profile(name="prefill", shapes={"x": ((1, 64), (8, 64), (8, 64))}),),
    )
    environment = parser_environment(installed_tensorrt(), tmp_path)
    (result,) = run_jobs([job], limits=ChildLimits(), environment=environment, progress=lambda *_: None)
    assert [engine.target for engine in result.built] == ["sm120"]
    (failure,) = result.failed
    assert (failure.target, failure.kind) == ("sm80", "input")
    assert failure.message.startswith("moe_layer for sm80: TensorRT cannot build it: ")
    assert "fp8" in failure.message.lower()


def test_a_node_without_its_mark_is_built_from_its_body_and_found_out(unchanged: Path) -> None:
    """TensorRT takes the function body silently where no plugin is asked for."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            kept = [attribute for attribute in node.attribute if attribute.name != "plugin_namespace"]
            del node.attribute[:]
            node.attribute.extend(kept)

    changed_component(unchanged, "moe_layer", change)
    with pytest.raises(VerificationError, match=r"moe_layer for sm86: plugin layers: expected 2 .*MLA x1.*found 0"):
        engines_from_bundle(unchanged, ["sm86"], options=OPTIONS, components=["moe_layer"])


def test_ports_that_are_not_the_manifests_are_found_out(unchanged: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("extra", 1, ["tokens"]))

    changed_component(unchanged, "embed", change)
    with pytest.raises(VerificationError, match=r"embed for sm80: inputs: expected .* found .*extra"):
        engines_from_bundle(unchanged, ["sm80"], options=OPTIONS, components=["embed"])


def test_a_component_that_was_changed_after_the_export_is_refused(unchanged: Path) -> None:
    path = unchanged / "components" / "embed.bf16.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    options = replace(OPTIONS, max_tokens=65)
    with pytest.raises(InputError, match=r"component embed: SHA-256.*export the checkpoint again"):
        engines_from_bundle(unchanged, ["sm80"], options=options, components=["embed"])


def test_an_attribute_that_is_missing_names_node_and_attribute(unchanged: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MoEDispatch")
        kept = [attribute for attribute in node.attribute if attribute.name != "group_size"]
        del node.attribute[:]
        node.attribute.extend(kept)

    changed_component(unchanged, "moe_layer", change)
    with pytest.raises(InputError, match=r"moe_layer for sm80: .*node \S+ .*attribute group_size: expected"):
        engines_from_bundle(unchanged, ["sm80"], options=OPTIONS, components=["moe_layer"])


def test_a_library_without_our_plugins_is_refused(unchanged: Path, tmp_path: Path) -> None:
    """A shared library of something else, and a file that is none."""
    other = next(Path(np.__file__).parent.rglob("_multiarray_umath*.so"))
    with pytest.raises(InputError, match=r"plugin library .*: expected creators of MLA, MoEDispatch in namespace k25"):
        engines_from_bundle(unchanged, ["sm80"], options=OPTIONS, components=["moe_layer"], plugin_library=other)
    (tmp_path / "text.so").write_text("hello")
    with pytest.raises(InputError, match=r"text\.so: expected a shared library, found b'hell'"):
        engines_from_bundle(unchanged, ["sm80"], options=OPTIONS, plugin_library=tmp_path / "text.so")


def test_limits_of_time_and_memory_are_those_of_the_real_child(unchanged: Path) -> None:
    options = replace(OPTIONS, max_tokens=65)
    limits = ChildLimits(seconds=0.01)
    with pytest.raises(InputError, match=r"moe_layer for sm80: .*took more than 0\.01 s"):
        engines_from_bundle(unchanged, ["sm80"], options=options, components=["moe_layer"], limits=limits)
    limits = ChildLimits(memory_bytes=30 << 20)
    with pytest.raises(InputError, match=r"moe_layer for sm80: .*bytes of memory, more than the limit of 31457280"):
        engines_from_bundle(unchanged, ["sm80"], options=options, components=["moe_layer"], limits=limits)


def test_a_missing_library_link_is_an_error_and_no_abort(unchanged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "parser_environment", lambda installed, scratch: {"LD_LIBRARY_PATH": ""})
    if parser_library_is_found(installed_tensorrt(), {}):
        pytest.skip("the link is in the installed package")
    with pytest.raises(BackendMissingError, match=r"embed for sm80.*library is not found"):
        engines_from_bundle(unchanged, ["sm80"], options=replace(OPTIONS, max_tokens=65), components=["embed"])


def test_an_unknown_component_and_a_missing_precision_are_named(full_size: Path) -> None:
    with pytest.raises(InputError, match="expected a component tail"):
        engines_from_bundle(full_size, ["sm80"], components=["tail"])
    with pytest.raises(InputError, match="component embed: expected a fp32 graph"):
        engines_from_bundle(full_size, ["sm80"], options=EngineOptions(precision="fp32"), components=["embed"])


def test_a_damaged_record_is_refused_and_kept(bundle: Path) -> None:
    path = bundle / "engines" / "engines.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match=r"engines\.json: expected JSON"):
        engines_from_bundle(bundle, ["sm80"], options=OPTIONS)
    assert len(path.read_text()) == 100


def test_a_kill_in_the_middle_leaves_nothing_and_no_child(tiny: Any, tmp_path: Path) -> None:
    bundle = copy_of(tiny, tmp_path)
    program = (
        "import sys; from pathlib import Path; from k25_engines.compilation import engines_from_bundle\n"
        "engines_from_bundle(Path(sys.argv[1]), ['sm80', 'sm120'], fuse_decoder=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(bundle)])
    for _ in range(2400):
        jobs = list((bundle / "engines").glob(".partial-*/*/log"))
        if jobs:
            break
        time.sleep(0.025)
    process.kill()
    process.wait()
    assert not (bundle / "engines" / "engines.json").exists()
    for _ in range(2400):
        if not _children_of(bundle):
            break
        time.sleep(0.025)
    assert _children_of(bundle) == []
    result = engines_from_bundle(bundle, ["sm80"], options=OPTIONS, components=["embed"])
    check_engines(bundle, result.built)
    assert not list((bundle / "engines").glob(".*"))


def _children_of(bundle: Path) -> list[str]:
    """Building processes that work on this bundle."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = place.read_bytes()
        except OSError:
            continue
        if os.fsencode(str(bundle)) in command and b"build_child" in command:
            found.append(place.parent.name)
    return found


def test_two_compilations_at_once_both_succeed(tiny: Any, tmp_path: Path) -> None:
    bundle = copy_of(tiny, tmp_path)
    program = (
        "import sys; from pathlib import Path; from k25_engines.compilation import engines_from_bundle\n"
        "engines_from_bundle(Path(sys.argv[1]), [sys.argv[2], 'sm120'], components=['embed', 'head'])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(bundle), target]) for target in ("sm80", "sm86")]
    assert [process.wait() for process in processes] == [0, 0]
    manifest = read_engine_manifest(bundle)
    assert [(entry.component, entry.target) for entry in manifest.engines] == [
        (component, target) for target in ("sm80", "sm86", "sm120") for component in ("embed", "head")
    ]
    check_engines(bundle, manifest.engines)
    assert json.loads((bundle / "engines" / "engines.json").read_text())["schema_version"] == 1

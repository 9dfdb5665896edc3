"""`bisect`: how it looks, what it leaves, and what it must not depend on. Where it looks is `test_faults`."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.inliner import inline_selected_functions

from k25_cli.main import run
from k25_export.manifest import read_manifest
from k25_plugins.errors import InputError
from k25_runtime.model_runner import ModelRunner
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
from k25_validate.bisect import bisect_bundle
from k25_validate.bisect_state import STATE_NAME
from k25_validate.component_probe import ComponentProbe
from k25_validate.graph_prefix import StraightGraph
from k25_validate.prefix_search import Cut, Expected, PrefixSearch
from k25_validate.prompts import Prompt
from k25_validate.tap_rules import RULES, tap_map
from k25_validate.vision_rules import vision_rules

PROMPT = (Prompt(name="short", prompt_ids=(5, 6, 400, 8, 9, 77, 300), next_ids=(10, 11)),)


@pytest.fixture(autouse=True)
def _function_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of function bodies show only where no native kernel stands in for them."""
    monkeypatch.setenv("K25_NATIVE", "off")


def _broken(exported: Any, folder: Path, component: str, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the bundle with one component's fp32 graph changed."""
    bundle = folder / "bundle"
    shutil.copytree(exported.bundle, bundle)
    path = bundle / "components" / f"{component}.fp32.onnx"
    model = onnx.load(path)
    edit(model)
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = next(entry for entry in manifest["components"] if entry["name"] == component)
    file = next(file for file in entry["files"] if file["precision"] == "fp32")
    file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def _double_o_proj(model: onnx.ModelProto) -> None:
    """x + x in place of hidden + attention."""
    linear = next(node for node in model.graph.node if "self_attn.o_proj.weight" in node.input)
    add = next(node for node in model.graph.node if linear.output[0] in node.input)
    add.input[0] = add.input[1]


def _wrong_eps(model: onnx.ModelProto) -> None:
    """The latent norms' epsilon."""
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "RMSNorm" else ():
            if attribute.name == "eps" and attribute.f < 2e-6:
                attribute.f = 1e-4


def _norm_twice(model: onnx.ModelProto) -> None:
    """What the attention's norm made is normed once more."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    index = next(i for i, node in enumerate(nodes) if "input_layernorm.weight" in node.input)
    again = onnx.NodeProto.FromString(nodes[index].SerializeToString())
    again.name, again.input[0], nodes[index].output[0] = "again", "normed_once", "normed_once"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[: index + 1], again, *nodes[index + 1 :]])


def _anonymous(model: onnx.ModelProto) -> None:
    """Give every inner tensor another name, and drop what describes them."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    kept |= {tensor.name for tensor in model.graph.initializer}
    names: dict[str, str] = {}
    for node in model.graph.node:
        node.name = ""
        for index, name in enumerate(node.output):
            if name and name not in kept:
                node.output[index] = names.setdefault(name, f"t{len(names)}")
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    del model.graph.value_info[:]


@pytest.mark.parametrize("component", list(RULES))
def test_every_float_of_a_traced_graph_has_its_value_in_the_reference(component: str, exported: Any) -> None:
    entry = next(entry for entry in read_manifest(exported.bundle).components if entry.name == component)
    for prepare in (lambda model: None, _anonymous):
        model = onnx.load(exported.bundle / "components" / f"{component}.fp32.onnx")
        prepare(model)
        graph = StraightGraph(model)
        found = tap_map(component, graph, weights=list(entry.bindings))
        variable = graph.variable_tensors(list(entry.bindings)) & set(graph.producers)
        assert not found.missing
        assert not found.unmatched
        assert not found.wired
        floats = {name for name in variable if graph.element_types[name] == onnx.TensorProto.FLOAT}
        assert floats <= set(found.taps)


def test_a_bundle_of_before_the_norm_was_an_op_is_refused(tiny: Any) -> None:
    manifest = read_manifest(tiny.bundle)
    entry = next(entry for entry in manifest.components if entry.name == "moe_layer")
    model = onnx.load(tiny.bundle / "components" / "moe_layer.fp32.onnx")
    plain = inline_selected_functions(model, [("k25", "RMSNorm"), ("k25", "Router")])
    with pytest.raises(InputError, match=r"moe_layer: expected nodes k25.RMSNorm, .* Export it again"):
        tap_map("moe_layer", StraightGraph(plain), weights=list(entry.bindings))


def test_every_float_of_the_vision_tower_has_its_value_in_the_reference(tiny: Any) -> None:
    manifest = read_manifest(tiny.bundle)
    entry = next(entry for entry in manifest.components if entry.name == "vision")
    graph = StraightGraph(onnx.load(tiny.bundle / "components" / "vision.fp32.onnx"))
    assert manifest.model.vision is not None
    rules = vision_rules(manifest.model.vision.vt_num_hidden_layers)
    found = tap_map("vision", graph, weights=list(entry.bindings), rules=rules)
    assert not found.missing
    assert not found.unmatched
    assert not found.wired


def test_names_of_tensors_do_not_matter(tiny: Any, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        _wrong_eps(model)
        _anonymous(model)

    found = bisect_bundle(_broken(tiny, tmp_path, "moe_layer", edit), prompts=PROMPT, threads=1).divergence
    assert found is not None
    assert (found.op, found.tap, found.kind) == ("k25.RMSNorm", "self_attn.q_a_layernorm", "attribute")


def test_a_k25_op_that_no_formula_has_is_wiring(tiny: Any, tmp_path: Path) -> None:
    found = bisect_bundle(_broken(tiny, tmp_path, "moe_layer", _norm_twice), prompts=PROMPT, threads=1).divergence
    assert found is not None
    assert (found.op, found.component, found.kind) == ("k25.RMSNorm", "moe_layer", "wiring")


def test_the_sentence_names_everything(tiny: Any, tmp_path: Path) -> None:
    bundle = _broken(tiny, tmp_path, "dense_layer", _double_o_proj)
    found = bisect_bundle(bundle, prompts=PROMPT, threads=1).divergence
    assert found is not None
    layer = next(entry.layers for entry in read_manifest(bundle).components if entry.name == "dense_layer")[0]
    sentence = found.sentence()
    for part in (
        f"layer {layer}, dense_layer",
        "Add",
        "attention_residual",
        "token ",
        "'short'",
        "relative L2",
        "Wiring",
    ):
        assert part in sentence
    assert found.error > found.tolerance > found.error_before


def test_runs_are_logarithmic_and_outputs_few(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[int] = []
    whole = ComponentProbe.run

    def counted(self: ComponentProbe, model: onnx.ModelProto, *rest: Any) -> Any:
        outputs.append(len(model.graph.output))
        return whole(self, model, *rest)

    monkeypatch.setattr(ComponentProbe, "run", counted)
    bundle = _broken(tiny, tmp_path, "moe_layer", _wrong_eps)
    found = bisect_bundle(bundle, prompts=PROMPT, threads=1).divergence
    assert found is not None
    assert found.runs == len(outputs) <= math.ceil(math.log2(found.ops)) + 3
    assert max(outputs) <= 5 < found.ops / 4


def test_the_search_finds_every_place() -> None:
    """A chain in which everything from one tensor on is off, whichever it is."""
    rounds = 60
    cuts = [Cut(node=index, outputs=(f"t{index}",)) for index in range(rounds)]
    expected = {
        f"t{index}": Expected(values=np.ones(8), noise=1e-7, floor=1e-7, tap=f"t{index}") for index in range(rounds)
    }
    for first in range(rounds):
        runs: list[int] = []

        def values(cut: Cut, first: int = first, runs: list[int] = runs) -> dict[str, Any]:
            runs.append(cut.node)
            return {cut.outputs[0]: np.ones(8) * (2.0 if cut.node >= first else 1.0)}

        found = PrefixSearch(cuts, expected, values).first_divergence()
        assert found is not None
        assert found.tensor == f"t{first}"
        assert len(runs) <= math.ceil(math.log2(rounds)) + 2


def test_a_faint_error_is_followed_to_its_origin() -> None:
    """At its origin the error is below the tolerance, and only later tensors amplify it."""
    cuts = [Cut(node=index, outputs=(f"t{index}",)) for index in range(20)]
    expected = {cut.outputs[0]: Expected(values=np.ones(8), noise=1e-8, floor=1e-6, tap=cut.outputs[0]) for cut in cuts}

    def values(cut: Cut) -> dict[str, Any]:
        error = 0.0 if cut.node < 7 else 8e-7 if cut.node < 15 else 2e-6
        signs = np.array([1, -1] * 4)
        return {cut.outputs[0]: np.ones(8) + error * signs}

    found = PrefixSearch(cuts, expected, values).first_divergence()
    assert found is not None
    assert found.tensor == "t7"


def _polygraphy(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("polygraphy")
    if not program.is_file():
        pytest.skip("polygraphy is not installed")
    line = (folder / "README.txt").read_text().strip().splitlines()[-1].strip()
    assert line.startswith("polygraphy run repro.onnx ")
    command = [str(program), *shlex.split(line)[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_reproducer_reproduces(tiny: Any, tmp_path: Path) -> None:
    bundle = _broken(tiny, tmp_path, "moe_layer", lambda model: _softmax_scale(model, 1.01))
    report = bisect_bundle(bundle, prompts=PROMPT, output=tmp_path / "reproducer", threads=1)
    assert report.reproducer == str(tmp_path / "reproducer")
    model = onnx.load(tmp_path / "reproducer" / "repro.onnx")
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["MLA"]
    done = _polygraphy(tmp_path / "reproducer")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout + done.stderr
    # The same inputs and expectations pass once the op is right.
    attribute = next(found for found in model.graph.node[0].attribute if found.name == "softmax_scale")
    attribute.f /= 1.01
    onnx.save(model, tmp_path / "reproducer" / "repro.onnx")
    done = _polygraphy(tmp_path / "reproducer")
    assert done.returncode == 0, done.stdout + done.stderr


def _softmax_scale(model: onnx.ModelProto, factor: float) -> None:
    mla = next(node for node in model.graph.node if node.op_type == "MLA")
    next(found for found in mla.attribute if found.name == "softmax_scale").f *= factor


def test_an_interrupted_search_goes_on_where_it_was(tiny: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle)
    state = bundle / "reports" / STATE_NAME
    seen: list[int] = []

    def interrupted(what: str, done: int, total: int) -> None:
        if "component" in what and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bisect_bundle(bundle, prompts=PROMPT, progress=interrupted, threads=1)
    assert state.is_file()
    resumed = bisect_bundle(bundle, prompts=PROMPT, progress=lambda what, done, total: seen.append(done), threads=1)
    assert resumed.passed
    assert seen[0] == 2
    assert not state.exists()
    assert resumed.components == bisect_bundle(bundle, prompts=PROMPT, threads=1).components


def test_a_state_of_other_prompts_or_a_damaged_one_is_not_used(tiny: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle)
    state = bundle / "reports" / STATE_NAME

    def interrupted(what: str, done: int, total: int) -> None:
        if "component" in what and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bisect_bundle(bundle, prompts=PROMPT, progress=interrupted, threads=1)
    first: list[tuple[str, int]] = []
    other = (Prompt(name="other", prompt_ids=(1, 2), next_ids=(3,)),)
    bisect_bundle(bundle, prompts=other, progress=lambda what, done, total: first.append((what, done)), threads=1)
    assert ("looking for the first component", 0) in first
    state.parent.mkdir(exist_ok=True)
    state.write_bytes(b"no state")
    assert bisect_bundle(bundle, prompts=PROMPT, threads=1).passed


def test_a_fault_of_the_runtime_is_not_blamed_on_an_op(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ModelRunner.run_layer

    def wrong(self: ModelRunner, layer: int, *rest: Any) -> Any:
        output = whole(self, layer, *rest)
        output.hidden.array[:] *= np.float32(1.5)
        return output

    monkeypatch.setattr(ModelRunner, "run_layer", wrong)
    found = bisect_bundle(tiny.bundle, prompts=PROMPT, threads=1).divergence
    assert found is not None
    assert found.kind == "runtime"


class _Counting(OnnxRuntimeCpu):
    """Another backend, as far as the protocol goes."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__(threads=1, mode="exact")
        self.loaded: list[str] = []

    def load(self, data: bytes, *, label: str) -> Any:
        self.loaded.append(label)
        return super().load(data, label=label)


def test_prefixes_run_on_the_backend_that_is_judged(tiny: Any, tmp_path: Path) -> None:
    backend = _Counting()
    bundle = _broken(tiny, tmp_path, "moe_layer", _wrong_eps)
    report = bisect_bundle(bundle, prompts=PROMPT, backend=backend)
    assert report.backend == "counting"
    assert report.divergence is not None
    assert sum(label.startswith("bisect, moe_layer") for label in backend.loaded) == report.divergence.runs


def test_the_native_kernels_agree_and_their_fast_mode_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K25_NATIVE", "on")
    exact = OnnxRuntimeCpu(threads=1, mode="exact")
    if "float32" in exact.details["native ops"]:
        pytest.skip("the native library has not been built")
    assert bisect_bundle(tiny.bundle, prompts=PROMPT, backend=exact).passed
    found = bisect_bundle(tiny.bundle, prompts=PROMPT, backend=OnnxRuntimeCpu(threads=1, mode="fast")).divergence
    if found is None:
        pytest.skip("this processor has no bf16 dot products")
    assert (found.op.partition(".")[0], found.kind) == ("k25", "kernel")


def test_the_transformers_reference_leads_to_the_same_op(tiny: Any, tmp_path: Path) -> None:
    assert bisect_bundle(tiny.bundle, reference="transformers", prompts=PROMPT, threads=1).passed
    bundle = _broken(tiny, tmp_path, "moe_layer", _wrong_eps)
    found = bisect_bundle(bundle, reference="transformers", prompts=PROMPT, threads=1).divergence
    assert found is not None
    assert found.tap == "self_attn.q_a_layernorm"


def test_the_command_says_it_and_exits_with_its_code(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = "5 6 400 8 9"
    assert run(["bisect", str(tiny.bundle), "--token-ids", ids, "--quiet"]) == 0
    assert "nothing diverges" in capsys.readouterr().out
    bundle = _broken(tiny, tmp_path, "moe_layer", lambda model: _softmax_scale(model, float("nan")))
    assert run(["bisect", str(bundle), "--token-ids", ids, "--json", "--quiet", "-o", str(tmp_path / "out")]) == 1
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert values["passed"] is False
    assert values["divergence"]["kind"] == "attribute"
    assert "softmax_scale" in values["sentence"]
    assert (tmp_path / "out" / "repro.onnx").is_file()
    assert run(["bisect", str(tmp_path / "nothing"), "--quiet"]) == 3
    assert run(["bisect", str(bundle), "--token-ids", ids, "--prompt", "x"]) == 2

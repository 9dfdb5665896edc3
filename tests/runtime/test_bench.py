"""`bench`: bytes counted against the checkpoint's own headers, empty components, bandwidth, the picture. No timing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from k25_export.manifest import read_manifest
from k25_plugins.errors import InputError
from k25_plugins.native_library import native_library
from k25_runtime.bench import BenchOptions, bench_bundle
from k25_runtime.bench_bandwidth import ReadBandwidth
from k25_runtime.bench_bytes import model_bytes
from k25_runtime.bench_load import load_cost, measured_load
from k25_runtime.bench_picture import Bar, Chart, picture_of_charts, picture_of_report
from k25_runtime.bench_report import BenchReport
from k25_runtime.empty_component import EmptyComponents, empty_component
from k25_runtime.runtime import Runtime

SMALL: dict[str, Any] = {"rounds": 1, "steps": 2, "context": 3, "tokens": 5, "threads": 1, "probe_bytes": 2**21}
MEGABYTE = 2**20
SVG = "{http://www.w3.org/2000/svg}"


def lengths(checkpoint: Path) -> dict[str, int]:
    """Bytes of each tensor, from the shards' headers."""
    found: dict[str, int] = {}
    for path in checkpoint.glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found |= {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    return found


@pytest.fixture(scope="module")
def report(odd: Any) -> BenchReport:
    """Two sequences at a time, everything as short as it can be."""
    return bench_bundle(odd.bundle, BenchOptions(**SMALL, sequences=2))


def test_bytes_of_a_step_are_those_of_the_checkpoint(exported: Any) -> None:
    text = json.loads((exported.checkpoint / "config.json").read_text())["text_config"]
    sizes = lengths(exported.checkpoint)
    layers = {name: size for name, size in sizes.items() if ".layers." in name}
    routed = {name: size for name, size in layers.items() if ".experts." in name and not name.endswith("weight_shape")}
    dense = sum(size for name, size in layers.items() if ".experts." not in name)
    cache_row = 4 * text["num_hidden_layers"] * (text["kv_lora_rank"] + text["qk_rope_head_dim"])

    step = model_bytes(read_manifest(exported.bundle)).step(sequences=3, context=7)

    assert step.dense == dense
    assert step.experts == sum(routed.values()) * text["num_experts_per_tok"] // text["n_routed_experts"]
    assert step.head == sizes["language_model.lm_head.weight"] + sizes["language_model.model.norm.weight"]
    assert step.embedding == 3 * 2 * text["hidden_size"]
    assert step.cache == 3 * 7 * cache_row
    assert step.total == step.dense + step.experts + step.head + step.embedding + step.cache


def test_experts_read_are_counted_by_layer(tiny: Any) -> None:
    model = model_bytes(read_manifest(tiny.bundle))
    counts = dict.fromkeys(model.one_expert, 1.5)
    expected = round(1.5 * sum(model.one_expert.values()))
    assert model.step(sequences=2, context=1, experts=counts).experts == expected
    assert sorted(model.one_expert) == list(read_manifest(tiny.bundle).model.text.moe_layers)


def test_a_report_says_what_was_measured(report: BenchReport, odd: Any) -> None:
    text = read_manifest(odd.bundle).model.text
    values = report.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["bundle"] == "bundle"
    assert values["overhead"]["component_calls"] == text.num_hidden_layers + 2
    assert text.num_experts_per_tok <= report.experts_read <= 2 * text.num_experts_per_tok
    assert report.step.cache == report.step.cache // 2 * 2 > 0
    reached = report.step.total / report.decode_s.best
    assert values["decode"]["gb_per_s"]["best"] == pytest.approx(reached / 1e9, rel=1e-4)
    share = reached / report.read_bytes_per_s.best
    assert values["decode"]["share_of_bandwidth"]["best"] == pytest.approx(share, rel=1e-4)
    assert values["decode"]["tokens_per_s"]["best"] == pytest.approx(2 / report.decode_s.best, rel=1e-4)
    assert values["prefill"]["tokens_per_s"]["best"] == pytest.approx(5 / report.prefill_s.best, rel=1e-4)
    assert [row.name for row in report.rows()][:2] == ["reading memory", "decode, 2 sequences"]


def test_every_thing_is_told_while_it_is_measured(tiny: Any) -> None:
    told: list[tuple[str, int, int]] = []
    options = BenchOptions(**SMALL)
    bench_bundle(tiny.bundle, options, progress=lambda what, done, total: told.append((what, done, total)))
    names = [what for what, _, _ in told]
    assert {"reading memory", "decoding, 2 steps", "prefill of 5", "empty components", "loading"} <= set(names)
    assert told[-1] == ("done", 1, 1)


@pytest.mark.parametrize("name", ["rounds", "steps", "context", "sequences", "tokens"])
def test_options_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected at least 1, found 0"):
        BenchOptions(**{name: 0})


def test_more_tokens_than_positions_are_refused(tiny: Any) -> None:
    longest = read_manifest(tiny.bundle).model.text.max_position_embeddings
    with pytest.raises(InputError, match="context"):
        bench_bundle(tiny.bundle, BenchOptions(tokens=longest + 1))


@pytest.mark.parametrize("component", ["embed", "dense_layer", "moe_layer", "head"])
def test_empty_components_are_valid_and_have_the_same_ports(exported: Any, component: str) -> None:
    file = read_manifest(exported.bundle).component(component).file("fp32")
    model = onnx.load_from_string(empty_component(file))
    onnx.checker.check_model(model, full_check=True)
    for ports, values in ((file.inputs, model.graph.input), (file.outputs, model.graph.output)):
        assert [port.name for port in ports] == [value.name for value in values]
        for port, value in zip(ports, values, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == list(port.shape)


def test_a_step_of_empty_components_leaves_the_cache_alone(odd: Any) -> None:
    with Runtime.open(odd.bundle, backend=EmptyComponents(threads=1), context=8, max_sequences=1) as runtime:
        logits = runtime.prefill([1])
        assert logits.shape == (1, runtime.manifest.model.text.vocab_size)
        assert not logits.any()


@pytest.mark.parametrize("with_library", [False, True])
def test_bandwidth_is_of_what_was_read(with_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library() if with_library else None
    if with_library and (library is None or not hasattr(library.handle, "k25_read_bandwidth")):
        pytest.skip("no native library with k25_read_bandwidth")
    bandwidth = ReadBandwidth(library, size=4 * MEGABYTE)
    assert bandwidth.how == ("the native library" if with_library else "numpy")
    assert np.isfinite(bandwidth())
    assert bandwidth() > 0


def test_the_native_read_refuses_what_it_cannot_read() -> None:
    library = native_library()
    if library is None or not hasattr(library.handle, "k25_read_bandwidth"):
        pytest.skip("no native library with k25_read_bandwidth")
    ReadBandwidth(library, size=MEGABYTE)  # declares the arguments
    read = library.handle.k25_read_bandwidth
    data = np.ones(MEGABYTE, np.uint8)
    assert read(data.ctypes.data, MEGABYTE, 3) > 0
    for arguments in ((None, MEGABYTE, 1), (data.ctypes.data, MEGABYTE - 1, 1), (data.ctypes.data, MEGABYTE, 0)):
        assert read(*arguments) == 0.0


def settings(bundle: Path) -> dict[str, Any]:
    tokens = {"tokens": [1, 2, 3], "context": 8, "sequences": 1}
    return {"bundle": str(bundle), "checkpoint": None, "mode": "fast", "threads": 1, **tokens}


def test_loading_is_measured_in_a_process_of_its_own(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = load_cost(settings(tiny.bundle))
    assert cost.seconds > 0
    here = measured_load(settings(tiny.bundle))
    assert (here.anonymous_bytes is None) == (cost.anonymous_bytes is None)
    if cost.anonymous_bytes is not None and cost.anonymous_bytes_after_use is not None:
        assert cost.anonymous_bytes_after_use >= cost.anonymous_bytes


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read manifest\.json"):
        load_cost(settings(tmp_path / "missing"))


def test_the_picture_is_well_formed_and_holds_the_figures(report: BenchReport) -> None:
    root = ElementTree.fromstring(picture_of_report(report))
    assert root.tag == f"{SVG}svg"
    texts = " ".join("".join(item.itertext()) for item in root.iter(f"{SVG}text"))
    assert f"{report.read_bytes_per_s.best / 1e9:.1f} GB/s" in texts
    assert "bandwidth in this run" in texts
    assert not [item for item in root.iter() if item.tag in (f"{SVG}script", f"{SVG}image")]


def test_bars_are_in_proportion_and_names_are_escaped() -> None:
    bars = [Bar(label="a < b & c", best=10.0, median=5.0, text="10"), Bar(label="d", best=2.5, median=2.5, text="2.5")]
    root = ElementTree.fromstring(picture_of_charts([Chart(title="<x>", bars=bars)], "a & b"))
    widths = [float(item.attrib["width"]) for item in root.iter(f"{SVG}rect") if "x" in item.attrib]
    assert widths[0] == pytest.approx(4 * widths[1], rel=1e-3)
    assert "a < b & c" in [item.text for item in root.iter(f"{SVG}text")]


def test_a_picture_of_nothing_measured_has_no_division_by_zero() -> None:
    ElementTree.fromstring(picture_of_charts([Chart(title="none", bars=[])], ""))

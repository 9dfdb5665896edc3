"""A reader of bundles written from docs/bundle-format.md alone, with a JSON parser, numpy and an ONNX runtime.

Nothing of our code is imported, but the plain PyTorch reference that the logits are compared with. Section numbers are
those of the document.

Legend: T tokens of a step, S sequences, V vocabulary.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

Array = npt.NDArray[Any]

TOLERANCE = 2e-5
BLOCK_SIZE = 4
# The file's types by the names in the manifest: a numpy type of the same width, and ONNX's TensorProto.DataType.
DTYPES: Mapping[str, tuple[str, int]] = {
    "float32": ("<f4", 1),
    "int32": ("<i4", 6),
    "int64": ("<i8", 7),
    "bfloat16": ("<u2", 16),
}
STORED_AS = {"BF16": "bfloat16", "F32": "float32", "I32": "int32", "I64": "int64"}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Section 3: where one tensor lies."""

    shard: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass
class Bundle:
    """Sections 1 to 4: the manifest, the mapped shards, and what each input of an instance is."""

    folder: Path
    copy_experts: bool = False  # take the way of section 4 for regions that do not exist
    manifest: dict[str, Any] = field(init=False)
    tensors: dict[str, Tensor] = field(init=False)
    shards: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        where = json.loads((self.folder / "checkpoint.json").read_text(encoding="utf-8"))
        assert (self.manifest["format"], self.manifest["schema_version"]) == ("k25-bundle", 1)
        assert (where["format"], where["schema_version"]) == ("k25-checkpoint-location", 1)
        self.shards = [_mapped_shard(Path(where["path"]), entry) for entry in self.manifest["shards"]]
        self.tensors = _tensors(self.manifest["tensors"])
        for name, tensor in self.tensors.items():
            assert tensor.offset + tensor.length <= len(self.shards[tensor.shard]), name

    @property
    def text(self) -> dict[str, Any]:
        """The text model's configuration."""
        text: dict[str, Any] = self.manifest["model"]["text"]
        return text

    def component(self, name: str) -> dict[str, Any]:
        """The entry of one component."""
        (entry,) = [entry for entry in self.manifest["components"] if entry["name"] == name]
        return dict(entry)

    def file(self, component: str, precision: str) -> dict[str, Any]:
        """The entry of a component's graph in one precision; its bytes are checked."""
        (entry,) = [file for file in self.component(component)["files"] if file["precision"] == precision]
        content = (self.folder / entry["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        return dict(entry)

    def weights(self, component: str, layer: int | None) -> dict[str, Array]:
        """The weight inputs of an instance, flat bytes or the table of experts."""
        return {
            name: self._weight(binding, "" if layer is None else str(layer))
            for name, binding in self.component(component)["bindings"].items()
        }

    def _weight(self, binding: Mapping[str, Any], layer: str) -> Array:
        rule = binding.get("rule")
        if rule is None:
            tensor = self.tensors[binding["tensor"].replace("{layer}", layer)]
            return self._bytes(tensor)
        assert rule in ("region", "offsets")  # `slice` is for several ranks
        region, table = self._experts([pattern.replace("{layer}", layer) for pattern in binding["tensors"]], binding)
        return region if rule == "region" else table

    def _experts(self, patterns: Sequence[str], binding: Mapping[str, Any]) -> tuple[Array, Array]:
        """Section 4, rules `region` and `offsets`: the bytes, and the rows in them where each tensor starts."""
        row_bytes = binding["row_bytes"]
        members = [
            [self.tensors[pattern.replace("{expert}", str(expert))] for pattern in patterns]
            for expert in range(self.text["n_routed_experts"])
        ]
        flat = [tensor for row in members for tensor in row]
        start = min(tensor.offset for tensor in flat)
        end = max(tensor.offset + tensor.length for tensor in flat)
        end += -end % row_bytes
        one_shard = len({tensor.shard for tensor in flat}) == 1 and end <= len(self.shards[flat[0].shard])
        if one_shard and not any(tensor.offset % row_bytes for tensor in flat) and not self.copy_experts:
            table = [[(tensor.offset - start) // row_bytes for tensor in row] for row in members]
            return self.shards[flat[0].shard][start:end], np.array(table, np.int64)
        pieces, rows = [], []
        position = 1  # a copy may start anywhere: leave a row free, to see that the table is what counts
        for tensor in reversed(flat):
            padded = np.zeros(tensor.length + -tensor.length % row_bytes, np.uint8)
            padded[: tensor.length] = self._bytes(tensor)
            pieces.append(padded)
            rows.append(position)
            position += len(padded) // row_bytes
        buffer = np.concatenate([np.zeros(row_bytes, np.uint8), *pieces])
        return buffer, np.array(rows[::-1], np.int64).reshape(len(members), len(patterns))

    def _bytes(self, tensor: Tensor) -> Array:
        return self.shards[tensor.shard][tensor.offset : tensor.offset + tensor.length]


@dataclass(frozen=True)
class Instance:
    """A component with its weights bound: section 5's rows of inputs and outputs."""

    session: onnxruntime.InferenceSession
    file: Mapping[str, Any]
    weights: Mapping[str, Any]

    def run(self, inputs: Mapping[str, Array], buffers: Mapping[str, Any] | None = None) -> dict[str, Array]:
        """One call; `buffers` holds values that stand for inputs or outputs and belong to the caller."""
        buffers = buffers or {}
        binding = self.session.io_binding()
        for entry in self.file["inputs"]:
            name = entry["name"]
            if name in buffers or name in self.weights:
                binding.bind_ortvalue_input(name, buffers.get(name, self.weights.get(name)))
            else:
                binding.bind_ortvalue_input(name, _value(inputs[name], entry["dtype"], inputs[name].shape))
        names = [entry["name"] for entry in self.file["outputs"]]
        for name in names:
            if name in buffers:
                binding.bind_ortvalue_output(name, buffers[name])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        outputs = zip(names, binding.get_outputs(), strict=True)
        return {name: value.numpy() for name, value in outputs if name not in buffers}


class Model:
    """Section 5: all instances, and a paged cache for each layer, whose blocks the caller deals out."""

    def __init__(self, bundle: Bundle, *, blocks: int, in_place: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        layers: dict[int, str] = {}
        for name in ("dense_layer", "moe_layer"):
            layers.update(dict.fromkeys(bundle.component(name)["layers"], name))
        assert sorted(layers) == list(range(bundle.text["num_hidden_layers"]))
        files = {name: bundle.file(name, "fp32") for name in {"embed", "head", *layers.values()}}
        sessions = {
            name: onnxruntime.InferenceSession(bundle.folder / file["path"], options, ["CPUExecutionProvider"])
            for name, file in files.items()
        }

        def instance(name: str, layer: int | None) -> Instance:
            return Instance(sessions[name], files[name], _bound(files[name], bundle.weights(name, layer)))

        self._embed, self._head = instance("embed", None), instance("head", None)
        self._layers = [instance(layers[layer], layer) for layer in sorted(layers)]
        width = bundle.text["kv_lora_rank"] + bundle.text["qk_rope_head_dim"]
        self.caches = [np.zeros((blocks, BLOCK_SIZE, width), np.float32) for _ in self._layers]
        self._in_place = in_place

    def step(self, tokens: Sequence[Sequence[int]], done: Sequence[int], blocks: Sequence[Sequence[int]]) -> Array:
        """Logits of every row of a step, last row first. Sequence s has `done[s]` tokens in the cache already."""
        lengths = [len(ids) for ids in tokens]
        widest = max(len(row) for row in blocks)
        step = {
            "positions": np.concatenate(
                [np.arange(first, first + length) for first, length in zip(done, lengths, strict=True)]
            ).astype(np.int32),
            "query_start": np.cumsum([0, *lengths]).astype(np.int32),
            "block_table": np.array([[*row, *[0] * (widest - len(row))] for row in blocks], np.int32),
            "residual_share": np.ones(1, np.float32),
        }
        hidden = self._embed.run({"token_ids": np.concatenate(tokens).astype(np.int32)})["hidden"]
        for index, layer in enumerate(self._layers):
            cache, shape = self.caches[index], self.caches[index].shape
            buffers = {"cache": _value(cache, "float32", shape)}
            if self._in_place:
                buffers["cache_out"] = buffers["cache"]
            out = layer.run({**step, "hidden": hidden}, buffers)
            hidden = out["hidden_out"]
            if not self._in_place:
                self.caches[index] = out["cache_out"]
        rows = np.arange(sum(lengths), dtype=np.int32)[::-1].copy()
        return self._head.run({"hidden": hidden, "rows": rows})["logits"]


def _mapped_shard(folder: Path, entry: Mapping[str, Any]) -> Array:
    """Section 2, shards, and section 6: what is refused before any offset is trusted."""
    assert Path(entry["file"]).name == entry["file"]
    path = folder / entry["file"]
    assert path.resolve().parent == folder.resolve()
    data: Array = np.memmap(path, np.uint8, "r")
    header = 8 + int.from_bytes(data[:8].tobytes(), "little")
    assert (data.size, header) == (entry["bytes"], entry["data_start"])
    assert hashlib.sha256(data[:header].tobytes()).hexdigest() == entry["header_sha256"]
    return data


def _tensors(groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Section 3: every tensor by its name."""
    tensors: dict[str, Tensor] = {}
    for group in groups:
        offsets = group.get("offsets", [group.get("offset")])
        experts = group.get("experts", range(len(offsets)))
        for expert, offset in zip(experts, offsets, strict=True):
            name = group["name"].replace("{expert}", str(expert))
            assert name not in tensors
            tensors[name] = Tensor(
                shard=group["shard"],
                dtype=group["dtype"],
                shape=tuple(group["shape"]),
                offset=offset,
                length=group["length"],
            )
    return tensors


def _bound(file: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[str, Any]:
    """Weights as values of the runtime. An axis that is a name takes what is left of the bytes."""
    bound = {}
    for entry in file["inputs"]:
        if entry["name"] in weights:
            shape = tuple(axis if isinstance(axis, int) else -1 for axis in entry["shape"])
            data = weights[entry["name"]].view(DTYPES[entry["dtype"]][0]).reshape(shape)
            bound[entry["name"]] = _value(data, entry["dtype"], data.shape)
    assert bound.keys() == weights.keys()
    return bound


def _value(data: Array, dtype: str, shape: Sequence[int]) -> Any:
    assert data.dtype == np.dtype(DTYPES[dtype][0])
    assert data.shape == tuple(shape)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(data, DTYPES[dtype][1])


def _reference_logits(checkpoint: Path, bundle: Bundle, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """The oracle: logits [T, V] of each sequence, run alone."""
    import torch

    from k25_validate.plain_reference import PlainReference

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: a second thread only waits
    reference = PlainReference(checkpoint, latent_norm_eps=bundle.manifest["options"]["latent_norm_eps"])
    logits = [reference.trace(ids).logits for ids in sequences]
    torch.set_num_threads(threads)
    return logits


def _relative_l2(actual: Array, expected: Array) -> float:
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize(
    ("in_place", "copy_experts"), [(True, False), (False, True)], ids=["in place, mapped", "not in place, copied"]
)
def test_a_reader_of_the_document_gets_the_models_logits(exported: Any, in_place: bool, copy_experts: bool) -> None:
    bundle = Bundle(exported.bundle, copy_experts=copy_experts)
    generator = np.random.default_rng(2)
    first, second = (generator.integers(0, bundle.text["vocab_size"], size).tolist() for size in (17, 9))
    expected = _reference_logits(exported.checkpoint, bundle, [first, second])
    model = Model(bundle, blocks=9, in_place=in_place)
    # Blocks in no order, one of them block 0, and two that nobody holds (4 and 8).
    blocks = [[5, 1, 7, 3, 0], [6, 2, 8]]

    # Sequence 0 alone; then it goes on while sequence 1 starts; then both, a token each.
    steps = [(7, 0), (11, 5), (12, 6), (13, 7), (14, 8), (15, 9), (17, 9)]
    done = (0, 0)
    for until in steps:
        running = [s for s in (0, 1) if until[s] > done[s]]
        tokens = [(first, second)[s][done[s] : until[s]] for s in running]
        reversed_logits = model.step(tokens, [done[s] for s in running], [blocks[s] for s in running])
        wanted = np.concatenate([expected[s][done[s] : until[s]] for s in running])
        assert reversed_logits.shape == (len(wanted), bundle.text["vocab_size"])
        assert reversed_logits.dtype == np.float32
        assert _relative_l2(reversed_logits[::-1], wanted) < TOLERANCE, f"step to {until}"
        done = until

    # A row holds latent and rotated key of its position, and nothing else was written: block 4 belongs to nobody,
    # and 17 tokens leave three rows of their fifth block empty.
    for cache in model.caches:
        assert not cache[4].any()
        assert not cache[0, 1:].any()
        assert cache[blocks[0][:4]].any(axis=-1).all()


def test_the_router_and_the_residual_share_are_as_described(exported: Any) -> None:
    """One MoE layer on two ranks, of which one holds the experts below a bound and the residual."""
    bundle = Bundle(exported.bundle)
    text, (layer, *_) = bundle.text, bundle.component("moe_layer")["layers"]
    file = bundle.file("moe_layer", "fp32")
    session = onnxruntime.InferenceSession(bundle.folder / file["path"], providers=["CPUExecutionProvider"])
    weights = bundle.weights("moe_layer", layer)
    tokens = 6
    hidden = np.random.default_rng(3).standard_normal((tokens, text["hidden_size"])).astype(np.float32)

    def outputs(table: Array, share: float) -> dict[str, Array]:
        inputs = {
            "hidden": hidden,
            "cache": np.zeros((3, BLOCK_SIZE, text["kv_lora_rank"] + text["qk_rope_head_dim"]), np.float32),
            "positions": np.arange(tokens, dtype=np.int32),
            "query_start": np.array([0, tokens], np.int32),
            "block_table": np.array([[2, 1]], np.int32),
            "residual_share": np.array([share], np.float32),
        }
        return Instance(session, file, _bound(file, {**weights, "expert_table": table})).run(inputs)

    table = weights["expert_table"]
    whole = outputs(table, 1.0)
    assert whole["expert_ids"].shape == whole["expert_weights"].shape == (tokens, text["num_experts_per_tok"])
    assert [str(whole[name].dtype) for name in ("expert_ids", "expert_weights")] == ["int32", "float32"]
    assert all(len(set(row)) == text["num_experts_per_tok"] for row in whole["expert_ids"].tolist())
    assert whole["expert_ids"].min() >= 0
    assert whole["expert_ids"].max() < text["n_routed_experts"]

    elsewhere = np.full_like(table, -1)
    bound = int(np.median(whole["expert_ids"]))
    low = np.where(np.arange(len(table))[:, None] <= bound, table, elsewhere)
    high = np.where(np.arange(len(table))[:, None] > bound, table, elsewhere)
    with_residual, without = outputs(low, 1.0)["hidden_out"], outputs(high, 0.0)["hidden_out"]
    assert _relative_l2(with_residual + without, whole["hidden_out"]) < 1e-6
    assert _relative_l2(with_residual, whole["hidden_out"]) > 1e-3
    assert np.abs(without).max() > 0


def test_tensors_are_what_the_shards_say(exported: Any) -> None:
    """Section 3 against the headers: each tensor once, bound or not; offsets count from the start of the file."""
    bundle = Bundle(exported.bundle)
    stated = {}
    for index, (data, entry) in enumerate(zip(bundle.shards, bundle.manifest["shards"], strict=True)):
        header = json.loads(data[8 : entry["data_start"]].tobytes())
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            stated[name] = Tensor(
                shard=index,
                dtype=tensor["dtype"],
                shape=tuple(tensor["shape"]),
                offset=entry["data_start"] + begin,
                length=end - begin,
            )
    assert bundle.tensors == stated
    index = json.loads((exported.checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert bundle.tensors.keys() == index["weight_map"].keys()


def test_every_input_of_every_graph_is_explained(exported: Any) -> None:
    """Section 4: an input is bound or stands in the table of section 5, and a bound tensor has its type and shape."""
    bundle = Bundle(exported.bundle)
    described = {
        "embed": {"token_ids"},
        "dense_layer": {"hidden", "cache", "positions", "query_start", "block_table"},
        "moe_layer": {"hidden", "cache", "positions", "query_start", "block_table", "residual_share"},
        "head": {"hidden", "rows"},
        "vision": {"pixel_values", "position_embedding", "rope_cos", "rope_sin", "merge_index"},
    }
    results = {
        "embed": ["hidden"],
        "dense_layer": ["hidden_out", "cache_out"],
        "moe_layer": ["hidden_out", "cache_out", "expert_ids", "expert_weights"],
        "head": ["logits"],
        "vision": ["media_embeddings"],
    }
    assert described.keys() == {entry["name"] for entry in bundle.manifest["components"]}
    for component, free in described.items():
        entry = bundle.component(component)
        assert [file["precision"] for file in entry["files"]] == bundle.manifest["options"]["precisions"]
        for precision in ("fp32", "bf16"):
            file = bundle.file(component, precision)
            inputs = {given["name"]: given for given in file["inputs"]}
            assert inputs.keys() - entry["bindings"].keys() == free
            assert entry["bindings"].keys() <= inputs.keys()
            assert [given["name"] for given in file["outputs"]] == results[component]
            activation = {"fp32": "float32", "bf16": "bfloat16"}[precision]
            activations = {"hidden", "cache", "pixel_values", "position_embedding"}
            assert {inputs[name]["dtype"] for name in free & activations} <= {activation}
        for layer in entry["layers"] or [0]:
            for name, binding in entry["bindings"].items():
                if "rule" not in binding:
                    tensor = bundle.tensors[binding["tensor"].replace("{layer}", str(layer))]
                    assert STORED_AS[tensor.dtype] == inputs[name]["dtype"], name
                    assert list(tensor.shape) == inputs[name]["shape"], name


def test_graphs_hold_inputs_and_outputs_as_the_manifest_lists_them(exported: Any) -> None:
    bundle = Bundle(exported.bundle)
    kinds = {"tensor(float)": "float32", "tensor(bfloat16)": "bfloat16"}
    kinds.update({"tensor(int32)": "int32", "tensor(int64)": "int64"})
    for component in ("embed", "dense_layer", "moe_layer", "head", "vision"):
        file = bundle.file(component, "fp32")
        session = onnxruntime.InferenceSession(bundle.folder / file["path"], providers=["CPUExecutionProvider"])
        for listed, found in ((file["inputs"], session.get_inputs()), (file["outputs"], session.get_outputs())):
            assert [entry["name"] for entry in listed] == [node.name for node in found]
            assert [entry["dtype"] for entry in listed] == [kinds[node.type] for node in found]
            for entry, node in zip(listed, found, strict=True):
                numbers = [axis if isinstance(axis, int) else None for axis in entry["shape"]]
                assert numbers == [axis if isinstance(axis, int) else None for axis in node.shape], entry["name"]


def test_other_files_are_listed_with_their_hashes(exported: Any) -> None:
    manifest = Bundle(exported.bundle).manifest
    listed = {entry["path"] for entry in manifest["tokenizer"]}
    found = {f"tokenizer/{path.name}" for path in (exported.bundle / "tokenizer").iterdir()}
    assert listed == found
    for entry in manifest["tokenizer"]:
        content = (exported.bundle / entry["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        source = exported.checkpoint / Path(entry["path"]).name
        assert content == source.read_bytes()


def test_this_file_reads_bundles_without_our_code() -> None:
    """Our packages are imported for the oracle only."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if name.startswith("k25_")} == {"k25_validate.plain_reference"}

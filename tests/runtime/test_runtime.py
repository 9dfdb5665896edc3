"""The runtime for embedders: whatever way tokens come in, the logits are the plain reference's; what it must refuse.

`TOLERANCE` is the project's end-to-end bound against a reference, `SAME` what reordering float32 sums may do between
two ways of running the same thing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from k25_plugins.errors import BackendMissingError, InputError
from k25_runtime import Runtime
from k25_runtime.backend import HostBackend
from k25_runtime.host_tensor import HostTensor
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
from k25_validate.metrics import relative_l2
from k25_validate.plain_reference import PlainReference
from k25_validate.reference import ReferenceTrace

Float32 = npt.NDArray[np.float32]

TOLERANCE, SAME = 2e-5, 2e-6
#: bfloat16 keeps 8 bits.
FAST = 0.05
CONTEXT = 64
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "orjson"}


@dataclass
class Model:
    """An exported model: its runtime, its reference, and random tokens of its vocabulary."""

    bundle: Path
    checkpoint: Path
    traces: dict[tuple[int, ...], ReferenceTrace] = field(default_factory=dict)

    @cached_property
    def reference(self) -> PlainReference:
        return PlainReference(self.checkpoint)

    @cached_property
    def text(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.checkpoint / "config.json").read_text("utf-8"))["text_config"]
        return config

    def open(self, **options: Any) -> Runtime:
        defaults = {"context": CONTEXT, "max_sequences": 4, "threads": 1, "mode": "exact"}
        return Runtime.open(self.bundle, **{**defaults, **options})

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        ids: list[int] = np.random.default_rng(seed).integers(0, self.text["vocab_size"], count).tolist()
        return ids

    def trace(self, ids: Sequence[int]) -> ReferenceTrace:
        key = tuple(ids)
        if key not in self.traces:
            self.traces[key] = self.reference.trace(ids)
        return self.traces[key]

    def logits(self, ids: Sequence[int]) -> Float32:
        return self.trace(ids).logits


@dataclass
class Recorder(HostBackend):
    """A backend that runs on ONNX Runtime and remembers caches, weights, and the buffers of every call."""

    name: str = "recorder"
    inner: OnnxRuntimeCpu = field(default_factory=lambda: OnnxRuntimeCpu(threads=1, mode="exact"))
    caches: list[Float32] = field(default_factory=list)
    cache_pointers: list[tuple[int, int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def load(self, data: bytes, *, label: str) -> RecordedComponent:
        return RecordedComponent(self, self.inner.load(data, label=label))

    def buffer(self, tensor: HostTensor) -> Any:
        if tensor.array.ndim == 3:
            self.caches.append(tensor.array)
        return self.inner.buffer(tensor)


@dataclass(frozen=True)
class RecordedComponent:
    recorder: Recorder
    inner: Any

    def bind(self, weights: Mapping[str, HostTensor]) -> RecordedInstance:
        return RecordedInstance(self.recorder, self.inner.bind(weights))


@dataclass(frozen=True)
class RecordedInstance:
    recorder: Recorder
    inner: Any

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        if "token_ids" in inputs:
            self.recorder.steps.append(inputs["token_ids"].shape()[0])
        if "cache" in inputs:
            self.recorder.cache_pointers.append((inputs["cache"].data_ptr(), outputs["cache_out"].data_ptr()))
        self.inner.run(inputs, outputs)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The reference's matrices are small: a second thread only waits, and both runtimes share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(exported: Any) -> Model:
    return Model(bundle=exported.bundle, checkpoint=exported.checkpoint)


@pytest.fixture(scope="module")
def small(tiny: Any) -> Model:
    """One model, for what does not depend on sizes."""
    return Model(bundle=tiny.bundle, checkpoint=tiny.checkpoint)


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    """A copy of a bundle that may be damaged."""
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


# One sequence.


@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_prefill_extend_and_decode_follow_the_reference(model: Model, block_size: int) -> None:
    ids = model.tokens(21)
    expected = model.logits(ids)
    runtime = model.open(block_size=block_size)
    prefill = runtime.prefill(ids[:9])
    extended = runtime.extend(ids[9:14])
    decoded = [runtime.decode(token) for token in ids[14:]]
    vocabulary = expected.shape[1]
    assert [prefill.shape, extended.shape] == [(9, vocabulary), (5, vocabulary)]
    assert {row.shape for row in decoded} == {(vocabulary,)}
    assert {str(logits.dtype) for logits in (prefill, extended, *decoded)} == {"float32"}
    assert relative_l2(prefill, expected[:9]) < TOLERANCE
    assert relative_l2(extended, expected[9:14]) < TOLERANCE
    assert relative_l2(np.array(decoded), expected[14:]) < TOLERANCE


def test_the_default_options_run(small: Model) -> None:
    ids = small.tokens(5)
    with Runtime.open(str(small.bundle), mode="exact") as runtime:
        assert runtime.context == min(small.text["max_position_embeddings"], 8192)
        array: Any = np.array(ids)
        assert relative_l2(runtime.prefill(array), small.logits(ids)) < TOLERANCE


def test_only_the_last_row_can_be_asked_for(model: Model) -> None:
    ids = model.tokens(12)
    expected, runtime = model.logits(ids), model.open(max_batch_tokens=5)
    last = runtime.prefill(ids[:7], rows="last")
    assert last.shape == (1, expected.shape[1])
    assert relative_l2(last, expected[6:7]) < TOLERANCE
    last = runtime.extend(ids[7:], rows="last")
    assert last.shape == (1, expected.shape[1])
    assert relative_l2(last, expected[11:]) < TOLERANCE


def test_a_prefill_starts_anew_and_frees_the_last_sequence(small: Model) -> None:
    runtime = small.open(max_sequences=1)
    for seed in range(4):
        ids = small.tokens(CONTEXT, seed)
        assert relative_l2(runtime.prefill(ids, rows="last"), small.logits(ids)[-1:]) < TOLERANCE


def test_a_sequence_may_fill_the_context_and_no_more(small: Model) -> None:
    ids = small.tokens(10)
    runtime = small.open(context=10, block_size=4, max_sequences=1)
    runtime.prefill(ids[:8])
    with pytest.raises(InputError, match=r"at most 10 tokens .*found 11"):
        runtime.extend([1, 2, 3])
    assert relative_l2(runtime.extend(ids[8:]), small.logits(ids)[8:]) < TOLERANCE
    with pytest.raises(InputError, match=r"at most 10 tokens .*found 11.*raise the context"):
        runtime.decode(1)
    with pytest.raises(InputError, match=r"at most 10 tokens .*found 11"):
        runtime.prefill(small.tokens(11))


# Several sequences.


def test_sequences_of_different_lengths_in_one_step_equal_each_alone(model: Model) -> None:
    """Prefill of four at once, then steps that mix a longer chunk, single tokens, and sequences that rest."""
    lengths = (1, 7, 12, 3)
    ids = [model.tokens(length + 8, seed) for seed, length in enumerate(lengths)]
    runtime = model.open(block_size=3)
    started = runtime.prefill_batch([tokens[:length] for tokens, length in zip(ids, lengths, strict=True)])
    sequences = [sequence for sequence, _ in started]
    found = [[logits] for _, logits in started]
    for chunk in ((3, 1, 0, 2), (1, 1, 1, 1), (0, 2, 5, 0), (4, 4, 2, 5)):
        running = [index for index, count in enumerate(chunk) if count]
        done = [sequence.length for sequence in sequences]
        pieces = [(sequences[i], ids[i][done[i] : done[i] + chunk[i]]) for i in running]
        for index, logits in zip(running, runtime.extend_batch(pieces), strict=True):
            assert logits.shape == (chunk[index], model.text["vocab_size"])
            found[index].append(logits)
    assert [sequence.length for sequence in sequences] == [len(tokens) for tokens in ids]
    for tokens, parts in zip(ids, found, strict=True):
        together = np.concatenate(parts)
        assert relative_l2(together, model.logits(tokens)) < TOLERANCE
        assert relative_l2(together, model.open(block_size=3).prefill(tokens)) < SAME


def test_decode_batch_gives_a_row_for_each_sequence(model: Model) -> None:
    ids = [model.tokens(length, seed) for seed, length in enumerate((9, 4, 6))]
    runtime = model.open()
    sequences = [sequence for sequence, _ in runtime.prefill_batch([tokens[:-2] for tokens in ids], rows="last")]
    for step in (-2, -1):
        rows = runtime.decode_batch(sequences[::-1], [tokens[step] for tokens in ids[::-1]])
        assert rows.shape == (3, model.text["vocab_size"])
        for row, tokens in zip(rows, ids[::-1], strict=True):
            assert relative_l2(row, model.logits(tokens)[step]) < TOLERANCE


@pytest.mark.parametrize("rows", ["all", "last"])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_step_in_pieces_equals_one_go(model: Model, limit: int, rows: Any) -> None:
    prompts = [model.tokens(10, 1), model.tokens(1, 2), model.tokens(6, 3)]
    recorder = Recorder()
    runtime = model.open(max_batch_tokens=limit, block_size=4, backend=recorder)
    pieces = runtime.prefill_batch(prompts, rows=rows)
    assert max(recorder.steps) <= limit
    assert sum(recorder.steps) == 17
    for (_, logits), (_, whole), prompt in zip(pieces, model.open().prefill_batch(prompts, rows), prompts, strict=True):
        assert logits.shape == whole.shape == (len(prompt) if rows == "all" else 1, model.text["vocab_size"])
        assert relative_l2(logits, whole) < SAME
        assert relative_l2(logits, model.logits(prompt)[-len(logits) :]) < TOLERANCE


def test_the_current_sequence_and_others_do_not_meet(small: Model) -> None:
    first, second = small.tokens(9, 1), small.tokens(8, 2)
    runtime = small.open(block_size=4)
    runtime.prefill(first[:5])
    [(other, start)] = runtime.prefill_batch([second[:6]])
    single = runtime.extend(first[5:])
    rest = runtime.extend_batch([(other, second[6:])])[0]
    assert relative_l2(single, small.logits(first)[5:]) < TOLERANCE
    assert relative_l2(np.concatenate([start, rest]), small.logits(second)) < TOLERANCE


def test_a_random_schedule_never_mixes_sequences(model: Model) -> None:
    """Sequences start, grow and end in any order, over a cache that is often full and blocks that were others'."""
    generator = np.random.default_rng(11)
    runtime = model.open(max_sequences=2, context=24, block_size=3)
    running: list[tuple[Any, list[int], list[Float32]]] = []
    ended: list[tuple[list[int], list[Float32]]] = []
    refused = 0
    for _ in range(60):
        if running and generator.random() < 0.2:
            sequence, ids, logits = running.pop(int(generator.integers(len(running))))
            runtime.free(sequence)
            ended.append((ids, logits))
        while len(running) < 3:
            running.append((runtime.new_sequence(), [], []))
        chosen = [entry for entry in running if generator.random() < 0.6] or running[:1]
        chunks = [generator.integers(0, model.text["vocab_size"], generator.integers(1, 5)).tolist() for _ in chosen]
        try:
            found = runtime.extend_batch([(entry[0], chunk) for entry, chunk in zip(chosen, chunks, strict=True)])
        except InputError:
            refused += 1
            continue
        for (_, ids, logits), chunk, new in zip(chosen, chunks, found, strict=True):
            ids += chunk
            logits.append(new)
    assert refused > 3
    ended += [(ids, logits) for _, ids, logits in running]
    assert sum(bool(ids) for ids, _ in ended) > 5
    for ids, logits in ended:
        assert not ids or relative_l2(np.concatenate(logits), model.logits(ids)) < TOLERANCE


# The cache.


def test_a_sequence_after_another_gives_what_a_fresh_runtime_gives(model: Model) -> None:
    """The blocks are those of the one before, with its rows still in them."""
    before, ids = model.tokens(30, 1), model.tokens(17, 2)
    options = {"max_sequences": 1, "context": 30, "block_size": 4}
    used, fresh = model.open(**options), model.open(**options)
    used.prefill(before)
    for runtime in (used, fresh):
        runtime.prefill(ids[:8])
    assert np.array_equal(used.extend(ids[8:]), fresh.extend(ids[8:]))


@pytest.mark.parametrize("how", ["blocks that were freed", "one step", "steps in turn", "later tokens"])
def test_a_sequence_that_is_not_finite_reaches_no_other(model: Model, tmp_path: Path, how: str) -> None:
    """One expert of the first MoE layer is NaN. Tokens that do not use it must not see those that do: not in blocks
    that another sequence left, not through the padding of the block table, not from later positions of their own.
    """
    healthy = model.tokens(2, 1)
    sick, expert = _sequence_and_its_expert(model, healthy)
    checkpoint = _with_nan_expert(model, tmp_path, expert)
    runtime = model.open(checkpoint=checkpoint, block_size=4, max_sequences=2, context=20)
    if how == "blocks that were freed":
        [(sequence, logits)] = runtime.prefill_batch([sick])
        assert np.isnan(logits).any()
        runtime.free(sequence)
        found = runtime.prefill(healthy)
    elif how == "one step":
        (_, logits), (_, found) = runtime.prefill_batch([sick, healthy])
        assert np.isnan(logits).any()
    elif how == "later tokens":
        logits = runtime.prefill([*healthy, *sick])
        assert np.isnan(logits).any()
        found = logits[: len(healthy)]
    else:
        (first, _), (second, row) = runtime.prefill_batch([sick, healthy[:1]])
        runtime.extend_batch([(first, [3])])
        found = np.concatenate([row, runtime.extend_batch([(second, healthy[1:])])[0]])
    assert np.isfinite(found).all()
    assert relative_l2(found, model.logits(healthy)) < TOLERANCE


def _sequence_and_its_expert(model: Model, healthy: Sequence[int]) -> tuple[list[int], int]:
    """Tokens, and an expert of the first MoE layer that the third of them uses and `healthy` does not; each alone, and
    the one after the other.
    """
    layer = min(model.trace(healthy).expert_ids)
    avoided = set(model.trace(healthy).expert_ids[layer].flatten().tolist())
    for seed in range(2, 50):
        sick = model.tokens(12, seed)
        alone = model.trace(sick).expert_ids[layer][2]
        after = model.trace([*healthy, *sick]).expert_ids[layer][len(healthy) + 2]
        used = set(alone.tolist()) & set(after.tolist()) - avoided
        if used:
            return sick, min(used)
    raise AssertionError("no such sequence")


def _with_nan_expert(model: Model, folder: Path, expert: int) -> Path:
    """The checkpoint with NaN scales in one expert: sizes and headers, and so the bundle, stay valid."""
    checkpoint = Path(shutil.copytree(model.checkpoint, folder / "checkpoint"))
    name = f"language_model.model.layers.{model.text['first_k_dense_replace']}.mlp.experts.{expert}.down_proj"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text("utf-8"))
    path = checkpoint / index["weight_map"][f"{name}.weight_scale"]
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:start])[f"{name}.weight_scale"]["data_offsets"]
    content[start + begin : start + end] = b"\xc0\x7f" * ((end - begin) // 2)
    path.write_bytes(content)
    return checkpoint


def test_the_cache_is_written_in_place(model: Model) -> None:
    """One buffer a layer is input and output of every step, and a step writes the rows of its tokens and no other."""
    recorder, layers = Recorder(), model.text["num_hidden_layers"]
    runtime = model.open(backend=recorder, block_size=4)
    assert len(recorder.caches) == layers
    assert not any(cache.any() for cache in recorder.caches)
    for cached in (6, 7):
        before = [cache.copy() for cache in recorder.caches]
        if cached == 6:
            runtime.prefill(model.tokens(6))
        else:
            runtime.decode(1)
        assert len(recorder.caches) == layers
        for cache, old in zip(recorder.caches, before, strict=True):
            written = cache.any(axis=-1)
            assert written.sum() == cached
            assert np.array_equal(cache[old.any(axis=-1)], old[old.any(axis=-1)])
    pointers = [cache.ctypes.data for cache in recorder.caches]
    assert recorder.cache_pointers == [(pointer, pointer) for _ in range(2) for pointer in pointers]


def test_a_full_cache_is_refused_and_nothing_is_appended(small: Model) -> None:
    first, second, third = (small.tokens(20, seed) for seed in range(3))
    runtime = small.open(max_sequences=2, context=20, block_size=4)  # ten blocks
    (a, logits), (b, _) = runtime.prefill_batch([first[:16], second[:16]])
    with pytest.raises(InputError, match=r"latent cache: expected 3 free blocks of 4 tokens, found 2 of 10"):
        runtime.prefill_batch([third[:9]])
    with pytest.raises(InputError, match="latent cache"):
        runtime.extend_batch([(a, first[16:18]), (b, second[16:]), (runtime.new_sequence(), third[:1])])
    with pytest.raises(InputError, match="latent cache"):
        runtime.prefill(third[:12])
    assert (a.length, b.length) == (16, 16)
    # Everybody goes on as if nothing had been asked for, and a freed sequence makes room.
    rest = runtime.extend_batch([(a, first[16:]), (b, second[16:])])
    assert relative_l2(np.concatenate([logits, rest[0]]), small.logits(first)) < TOLERANCE
    assert relative_l2(rest[1], small.logits(second)[16:]) < TOLERANCE
    runtime.free(a)
    assert relative_l2(runtime.prefill(third), small.logits(third)) < TOLERANCE


def test_a_prefill_that_found_no_room_leaves_no_sequence_to_go_on_with(small: Model) -> None:
    runtime = small.open(max_sequences=1, context=8, block_size=4)
    [(other, _)] = runtime.prefill_batch([small.tokens(5)])
    with pytest.raises(InputError, match="latent cache"):
        runtime.prefill(small.tokens(4))
    runtime.free(other)
    with pytest.raises(InputError, match="expected a prefill"):
        runtime.decode(1)


def test_a_reserved_batch_is_what_a_step_would_run(small: Model) -> None:
    """For those who drive the runner layer by layer: nothing counts as cached before they say so."""
    ids, runtime = small.tokens(6), small.open(block_size=4)
    sequence = runtime.new_sequence()
    batch = runtime.reserved_batch([(sequence, ids)])
    assert (batch.token_ids.tolist(), batch.positions.tolist()) == (ids, list(range(6)))
    assert (len(sequence.blocks), sequence.length) == (2, 0)
    logits = runtime.runner.run(batch, np.array([5, 0], np.int32))
    assert relative_l2(logits, small.logits(ids)[[5, 0]]) < TOLERANCE
    assert relative_l2(runtime.extend_batch([(sequence, ids)])[0], small.logits(ids)) < TOLERANCE


# What is refused.


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], "expected at least one token id, found none"),
        ([3, -1], r"position 1: expected an id in 0\.\.\d+, found -1"),
        ([1 << 31], r"position 0: expected an id in 0\.\.\d+, found 2147483648"),
        ([1] * (CONTEXT + 1), rf"at most {CONTEXT} tokens .*found {CONTEXT + 1}|found {CONTEXT + 5}"),
        ([1.5], r"1\.5"),
        ("12", r"'1"),
    ],
    ids=["none", "negative", "large", "too many", "not whole", "text"],
)
@pytest.mark.parametrize("method", ["prefill", "extend", "prefill_batch", "extend_batch"])
def test_tokens_that_make_no_sense_are_refused(small: Model, method: str, tokens: Any, text: str) -> None:
    """And the sequences of the same call, and the current one, are as they were."""
    ids, runtime = small.tokens(6), small.open()
    runtime.prefill(ids[:4])
    [(other, _)] = runtime.prefill_batch([ids[:3]])
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: runtime.prefill(tokens),
        "extend": lambda: runtime.extend(tokens),
        "prefill_batch": lambda: runtime.prefill_batch([ids, tokens]),
        "extend_batch": lambda: runtime.extend_batch([(other, ids[3:]), (runtime.new_sequence(), tokens)]),
    }
    with pytest.raises(InputError, match=text):
        calls[method]()
    assert other.length == 3
    assert relative_l2(runtime.extend(ids[4:]), small.logits(ids)[4:]) < TOLERANCE
    assert relative_l2(runtime.extend_batch([(other, ids[3:])])[0], small.logits(ids)[3:]) < TOLERANCE


def test_the_first_id_outside_the_vocabulary_is_refused(small: Model) -> None:
    runtime, vocabulary = small.open(), small.text["vocab_size"]
    ids = [0, vocabulary - 1]
    assert relative_l2(runtime.prefill(ids), small.logits(ids)) < TOLERANCE
    with pytest.raises(InputError, match=rf"expected an id in 0\.\.{vocabulary - 1}, found {vocabulary}"):
        runtime.decode(vocabulary)


def test_a_freed_sequence_is_refused(small: Model) -> None:
    runtime = small.open()
    [(kept, _), (freed, _)] = runtime.prefill_batch([small.tokens(4), small.tokens(5, 1)])
    runtime.free(freed)
    for call in (
        lambda: runtime.extend_batch([(kept, [1]), (freed, [2])]),
        lambda: runtime.decode_batch([freed], [2]),
        lambda: runtime.reserved_batch([(freed, [2])]),
    ):
        with pytest.raises(InputError, match="sequence: expected one that is in use, found one that was freed"):
            call()
    assert kept.length == 4


def test_without_a_current_sequence_nothing_can_be_appended(small: Model) -> None:
    runtime = small.open()
    with pytest.raises(InputError, match="expected a prefill before extend or decode"):
        runtime.extend([1])
    runtime.prefill([1])
    runtime.close()
    with pytest.raises(InputError, match="expected a prefill before extend or decode"):
        runtime.decode(1)
    runtime.prefill([1])


def test_batches_that_make_no_sense_are_refused(small: Model) -> None:
    runtime = small.open()
    [(sequence, _)] = runtime.prefill_batch([[1, 2]])
    with pytest.raises(InputError, match="expected each sequence once"):
        runtime.extend_batch([(sequence, [1]), (sequence, [2])])
    with pytest.raises(InputError, match="expected at least one sequence"):
        runtime.extend_batch([])
    with pytest.raises(InputError, match="expected at least one sequence"):
        runtime.prefill_batch([])
    with pytest.raises(InputError, match="expected 1 token ids, one a sequence, found 2"):
        runtime.decode_batch([sequence], [1, 2])
    assert sequence.length == 2


def test_an_unknown_choice_of_rows_is_refused(small: Model) -> None:
    wrong: Any = "al"
    with pytest.raises(InputError, match=r"rows: .*'al'"):
        small.open().prefill([1, 2, 3], rows=wrong)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"context": 0}, "context: expected at least 1, found 0"),
        ({"context": 1 << 40}, "context: expected at most .*max_position_embeddings, found 1099511627776"),
        ({"max_sequences": 0}, "max_sequences: expected at least 1, found 0"),
        ({"block_size": -3}, "block_size: expected at least 1, found -3"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: expected at least 1, found 0"),
        ({"mode": "quick"}, "mode: expected 'fast' or 'exact', found 'quick'"),
    ],
)
def test_options_that_make_no_sense_are_refused(small: Model, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        small.open(**options)


def test_the_modes_agree(small: Model) -> None:
    """`fast` may round activations to bfloat16 in the native ops; the function bodies are exact in either mode.

    Rounding makes some tokens of a random model take another expert, so it is most of many short sequences that agree.
    """
    prompts = [[token] for token in small.tokens(24)]
    found = {}
    for mode in ("fast", "exact"):
        pairs = small.open(mode=mode, max_sequences=len(prompts)).prefill_batch(prompts)
        found[mode] = [logits for _, logits in pairs]
    assert relative_l2(found["exact"][0], small.logits(prompts[0])) < TOLERANCE
    errors = [relative_l2(fast, exact) for fast, exact in zip(found["fast"], found["exact"], strict=True)]
    assert np.median(errors) < FAST


def test_the_function_bodies_run_where_the_library_is_turned_off(
    small: Model, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("K25_NATIVE", "off")
    ids = small.tokens(6)
    runtime = small.open(mode="fast")
    assert runtime.runner.details["native ops"] == "none: function bodies, float32"
    assert relative_l2(runtime.prefill(ids), small.logits(ids)) < TOLERANCE
    assert capfd.readouterr().err == ""


def test_bf16_needs_another_backend(small: Model) -> None:
    with pytest.raises(BackendMissingError, match=r"bf16.*Use fp32") as caught:
        small.open(precision="bf16")
    assert caught.value.exit_code == 4


# Bundles.


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InputError, match=r"cannot read manifest\.json.*k25-export export CHECKPOINT"):
            Runtime.open(folder)


def test_a_checkpoint_folder_is_no_bundle(small: Model) -> None:
    with pytest.raises(InputError, match=r"cannot read manifest\.json"):
        Runtime.open(small.checkpoint)


@pytest.fixture(params=["embed", "dense_layer", "moe_layer", "head"])
def component(request: pytest.FixtureRequest, bundle: Path) -> Path:
    return bundle / "components" / f"{request.param}.fp32.onnx"


def test_a_changed_component_is_refused(bundle: Path, component: Path) -> None:
    content = bytearray(component.read_bytes())
    content[len(content) // 2] ^= 1
    component.write_bytes(content)
    with pytest.raises(InputError, match=rf"components/{component.name}: SHA-256: expected .*, found .*export"):
        Runtime.open(bundle, context=16)


def test_a_missing_component_is_refused(bundle: Path, component: Path) -> None:
    component.unlink()
    with pytest.raises(InputError, match=rf"cannot read components/{component.name}"):
        Runtime.open(bundle, context=16)


def test_a_component_that_is_no_graph_is_refused(bundle: Path, component: Path) -> None:
    """Even where the manifest has its hash."""
    component.write_bytes(b"no graph")
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    for entry in manifest["components"]:
        for file in entry["files"]:
            if file["path"] == f"components/{component.name}":
                file["sha256"] = hashlib.sha256(b"no graph").hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")
    name = component.name.split(".")[0]
    with pytest.raises(InputError, match=rf"component {name}: ONNX Runtime cannot load the file"):
        Runtime.open(bundle, context=16)


# What it costs.


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a process that opened a bundle and generated from it had imported, and its largest resident set."""

    modules: set[str]
    peak_bytes: int
    new_ids: list[int]
    cache_bytes: int


_PROCESS = """
import json, sys
from k25_runtime import Runtime
bundle, sequences = sys.argv[1], int(sys.argv[2])
with Runtime.open(bundle, context=4096, max_sequences=sequences, threads=1) as runtime:
    result = runtime.generate("Hello", max_new_tokens=3, ignore_eos=True, keep_logits=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([modules, int(status["VmHWM"].split()[0]) << 10, result.new_ids]))
"""


@pytest.fixture(scope="module")
def cost(small: Model) -> Cost:
    """A process with a latent cache of 2 GiB, of which it needs a few rows."""
    text = small.text
    row_bytes = 4 * text["num_hidden_layers"] * (text["kv_lora_rank"] + text["qk_rope_head_dim"])
    sequences = (2 << 30) // (4096 * row_bytes)
    process = subprocess.run(
        [sys.executable, "-c", _PROCESS, str(small.bundle), str(sequences)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    modules, peak_bytes, new_ids = json.loads(process.stdout)
    return Cost(modules=set(modules), peak_bytes=peak_bytes, new_ids=new_ids, cache_bytes=sequences * 4096 * row_bytes)


def test_running_a_bundle_imports_nothing_heavy(cost: Cost, small: Model) -> None:
    assert {"k25_runtime", "numpy", "onnxruntime"} <= cost.modules
    assert not cost.modules & HEAVY
    with small.open() as runtime:
        assert runtime.generate("Hello", max_new_tokens=3, ignore_eos=True).new_ids == cost.new_ids


def test_the_cache_is_neither_copied_nor_touched_before_it_is_used(cost: Cost) -> None:
    """A copy of one layer's cache alone would take more than is allowed here."""
    assert cost.cache_bytes > 1.9 * (1 << 30)
    assert cost.peak_bytes < 350 << 20

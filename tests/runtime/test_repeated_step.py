"""A step of the same shapes as the last one repeats its runs; whatever else has run makes it begin anew."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from k25_plugins.errors import K25Error
from k25_runtime import Runtime, step_buffers
from k25_runtime.host_tensor import HostTensor
from k25_runtime.model_runner import ModelRunner
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
from k25_runtime.repeated_step import RepeatedStep

Float32 = npt.NDArray[np.float32]
PROMPT, NEXT = [5, 6, 7], [8, 9, 10, 11]


class Counted:
    """How often the model was asked for a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        whole = ModelRunner._forward

        def forward(runner: ModelRunner, inputs: Mapping[str, Any]) -> Any:
            self.steps += 1
            return whole(runner, inputs)

        monkeypatch.setattr(ModelRunner, "_forward", forward)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def runtime(tiny: Any) -> Iterator[Runtime]:
    with Runtime.open(tiny.bundle, threads=1, context=256, max_sequences=4) as opened:
        yield opened


@pytest.fixture
def plain(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """One that repeats nothing."""
    backend = OnnxRuntimeCpu(threads=1)
    monkeypatch.setattr(backend._repeated, "noted_runs", lambda function, shapes: None)
    with Runtime.open(tiny.bundle, backend=backend, context=256, max_sequences=4) as opened:
        yield opened


def decoded(runtime: Runtime, tokens: list[int]) -> list[Float32]:
    return [runtime.decode(token) for token in tokens]


def test_the_model_is_asked_once_for_steps_of_the_same_shapes(runtime: Runtime, counted: Counted) -> None:
    runtime.prefill(PROMPT)
    assert counted.steps == 1
    decoded(runtime, NEXT)
    assert counted.steps == 2


def test_repeated_steps_give_the_same_bits(runtime: Runtime, plain: Runtime) -> None:
    for opened in (runtime, plain):
        opened.prefill(PROMPT)
    for ours, wanted in zip(decoded(runtime, NEXT), decoded(plain, NEXT), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_logits_are_the_callers_own(runtime: Runtime) -> None:
    runtime.prefill(PROMPT)
    first = runtime.decode(NEXT[0])
    kept = first.copy()
    second = runtime.decode(NEXT[1])
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)


def test_steps_of_other_shapes_between_are_no_matter(runtime: Runtime, plain: Runtime, counted: Counted) -> None:
    """Other numbers of tokens, sequences and blocks: each begins anew."""
    found = []
    for opened in (runtime, plain):
        logits = [opened.prefill(PROMPT, rows="last")]
        pair = opened.prefill_batch([[3, 4], [9]])
        logits += decoded(opened, NEXT[:2])
        logits.append(opened.decode_batch([sequence for sequence, _ in pair], [1, 2]))
        logits.append(opened.decode_batch([sequence for sequence, _ in pair], [3, 4]))
        logits.append(opened.extend(list(range(12, 80)), rows="last"))
        logits += decoded(opened, NEXT)
        found.append(logits)
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_a_layer_that_was_run_alone_between_is_no_matter(runtime: Runtime, plain: Runtime) -> None:
    found = []
    for opened in (runtime, plain):
        opened.prefill(PROMPT)
        logits = decoded(opened, NEXT[:2])
        batch = opened.reserved_batch([(opened.new_sequence(), [1, 2])])
        opened.runner.run_layer(0, opened.runner.embed(batch), batch)
        logits += decoded(opened, NEXT[2:])
        found.append(logits)
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_two_models_on_one_backend_keep_apart(tiny: Any) -> None:
    backend = OnnxRuntimeCpu(threads=1)
    opened = [Runtime.open(tiny.bundle, backend=backend, context=256, max_sequences=1) for _ in range(2)]
    opened[0].prefill(PROMPT)
    opened[1].prefill(PROMPT[::-1])
    wanted = [decoded(opened[0], NEXT), decoded(opened[1], NEXT)]
    opened[0].prefill(PROMPT)
    opened[1].prefill(PROMPT[::-1])
    turns = [[runtime.decode(token) for runtime in opened] for token in NEXT]
    for step, (first, second) in enumerate(turns):
        np.testing.assert_array_equal(first, wanted[0][step])
        np.testing.assert_array_equal(second, wanted[1][step])


def test_released_layers_are_bound_anew(runtime: Runtime, counted: Counted) -> None:
    """The caches go with the layers, so a sequence begins again; nothing of the old step is run."""
    runtime.prefill(PROMPT)
    before = decoded(runtime, NEXT)
    runtime.runner.release_layers()
    gc.collect()
    runtime.prefill(PROMPT)
    for ours, wanted in zip(decoded(runtime, NEXT), before, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert counted.steps == 4


def test_tensors_too_large_to_keep_are_no_step_to_repeat(
    runtime: Runtime, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_buffers, "LARGEST_BYTES", 16)
    runtime.prefill(PROMPT)
    first = decoded(runtime, NEXT)
    assert counted.steps == 1 + len(NEXT)
    assert len({logits.ctypes.data for logits in first}) == len(NEXT)


def test_a_failed_repetition_begins_anew(runtime: Runtime, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    from k25_runtime.onnxruntime_cpu import OnnxRuntimeInstance

    runtime.prefill(PROMPT)
    runtime.decode(NEXT[0])
    whole = OnnxRuntimeInstance.run_again

    def fails(instance: OnnxRuntimeInstance) -> None:
        raise K25Error("component: ONNX Runtime failed")

    monkeypatch.setattr(OnnxRuntimeInstance, "run_again", fails)
    with pytest.raises(K25Error, match="failed"):
        runtime.decode(NEXT[1])
    monkeypatch.setattr(OnnxRuntimeInstance, "run_again", whole)
    steps = counted.steps
    runtime.decode(NEXT[1])
    assert counted.steps == steps + 1


@pytest.mark.parametrize("fault", ["position", "cache"])
def test_a_layer_that_failed_between_leaves_no_trace(runtime: Runtime, plain: Runtime, fault: str) -> None:
    """Its instance is bound to what failed: nothing of that may be run again."""
    found = []
    for opened in (runtime, plain):
        opened.prefill(PROMPT)
        logits = decoded(opened, NEXT[:2])
        batch = opened.reserved_batch([(opened.new_sequence(), [1])])
        # Made by hand: whatever else ran would end the note.
        hidden = HostTensor(np.zeros((1, opened.runner.text.hidden_size), np.float32), "float32")
        if fault == "position":
            batch = replace(batch, positions=np.full_like(batch.positions, 10**6))
        cache = HostTensor(np.zeros((1, 1), np.float32), "float32") if fault == "cache" else None
        with pytest.raises(K25Error):
            opened.runner.run_layer(0, hidden, batch, cache=cache)
        logits += decoded(opened, NEXT[2:])
        found.append(logits)
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_functions_of_one_object_are_told_apart() -> None:
    backend = OnnxRuntimeCpu(threads=1)

    class Model:
        def first(self, inputs: Mapping[str, Any]) -> HostTensor:
            return HostTensor(inputs["x"].array + 1, "float32")

        def second(self, inputs: Mapping[str, Any]) -> HostTensor:
            return HostTensor(inputs["x"].array + 2, "float32")

    model, inputs = Model(), {"x": HostTensor(np.zeros(1, np.float32), "float32")}
    made = [backend.step(function, inputs) for function in (model.first, model.second, model.first)]
    assert [float(tensor.array[0]) for tensor in made if tensor is not None] == [1.0, 2.0, 1.0]


class Instance:
    def run_again(self) -> None:
        pass


class Owner:
    def step(self) -> None:
        pass

    def other(self) -> None:
        pass


OWNER = Owner()


def noted(step: RepeatedStep, *instances: Instance, function: Any = OWNER.step, shapes: object = "shapes") -> None:
    step.begin()
    for instance in instances:
        step.runs(instance)
    step.end(function, shapes, HostTensor(np.zeros(1, np.float32), "float32"))


def test_a_note_is_of_one_function_of_one_shape_and_of_living_instances() -> None:
    step, first, second = RepeatedStep(), Instance(), Instance()
    assert step.noted_runs(OWNER.step, "shapes") is None
    noted(step, first, second)
    assert step.noted_runs(OWNER.step, "shapes") == [first, second]
    assert step.noted_runs(OWNER.step, "others") is None
    assert step.noted_runs(OWNER.other, "shapes") is None
    assert step.noted_runs(Owner().step, "shapes") is None
    del second
    gc.collect()
    assert step.noted_runs(OWNER.step, "shapes") is None


def test_a_function_that_is_gone_is_no_other() -> None:
    step, first = RepeatedStep(), Instance()
    noted(step, first, function=lambda: None)
    gc.collect()
    assert step.noted_runs(lambda: None, "shapes") is None


def test_whatever_runs_outside_ends_a_note() -> None:
    step, first = RepeatedStep(), Instance()
    noted(step, first)
    step.runs(first)
    assert step.noted_runs(OWNER.step, "shapes") is None
    assert step.result is None


def test_an_instance_that_runs_twice_makes_no_note() -> None:
    step, first = RepeatedStep(), Instance()
    noted(step, first, first)
    assert step.noted_runs(OWNER.step, "shapes") is None

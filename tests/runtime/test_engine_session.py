"""Engines through a device that checks every call: the same logits as ONNX Runtime, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bundles import OPTIONS, bundle_with_engines
from fake_device import FakeDevice

from k25_runtime.engine_backend import EngineBackend
from k25_runtime.engine_opening import engine_backend_from_bundle
from k25_runtime.runtime import Runtime

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def sessions() -> dict[str, Any]:
    """ONNX Runtime sessions that the fake devices of a bundle share."""
    return {}


@pytest.fixture(scope="module", params=["aliased", "portable"])
def bundle(request: pytest.FixtureRequest, exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return bundle_with_engines(exported.bundle, folder, portable=request.param == "portable")


@pytest.fixture(scope="module")
def expected(exported: Any) -> Iterator[Runtime]:
    """ONNX Runtime, in the mode in which the fake device runs it, and in steps of the same sizes."""
    sizes = {"block_size": OPTIONS.block_size, "context": OPTIONS.context, "max_batch_tokens": OPTIONS.max_tokens}
    with Runtime.open(exported.bundle, mode="exact", threads=1, **sizes) as runtime:
        yield runtime


def opened(bundle: Path, device: FakeDevice, **options: Any) -> tuple[Runtime, EngineBackend]:
    """A runtime on the fake device, with small buffers so that everything takes several."""
    reference = engine_backend_from_bundle(bundle, device=device, buffers=3, buffer_bytes=1000, staging_bytes=512)
    return Runtime.open(bundle, backend=reference, max_sequences=3, **options), reference


def test_a_generation_gives_the_logits_of_onnx_runtime(bundle: Path, expected: Runtime, sessions: Any) -> None:
    """Prompt in pieces, then captured and replayed steps; bit for bit, since both run the same graphs."""
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device)
    wanted = expected.generate(token_ids=PROMPT, max_new_tokens=12, ignore_eos=True, keep_logits=True)
    found = runtime.generate(token_ids=PROMPT, max_new_tokens=12, ignore_eos=True, keep_logits=True)
    assert found.new_ids == wanted.new_ids
    assert found.prompt_logits is not None
    assert found.step_logits is not None
    assert wanted.prompt_logits is not None
    assert np.array_equal(found.prompt_logits, wanted.prompt_logits)
    assert np.array_equal(found.step_logits, wanted.step_logits)
    assert backend.session.graphs.replays > 0
    assert not backend.session.graphs.refused
    runtime.close()
    backend.close()
    device.closed_clean()


def test_several_sequences_and_chunks_give_the_logits_of_onnx_runtime(
    bundle: Path, expected: Runtime, sessions: Any
) -> None:
    """Uneven prompts in one step, decode of all, one freed and another begun, more rows than a step may ask for."""
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device)
    with runtime:
        pairs = list(zip(runtime.prefill_batch(PROMPTS), expected.prefill_batch(PROMPTS), strict=True))
        for (_, found), (_, wanted) in pairs:
            assert np.array_equal(found, wanted)
        ours, theirs = [first for (first, _), _ in pairs], [first for _, (first, _) in pairs]
        for step in range(6):
            ids = [step + 1, 2 * step, 7]
            assert np.array_equal(runtime.decode_batch(ours, ids), expected.decode_batch(theirs, ids))
        runtime.free(ours.pop(0))
        expected.free(theirs.pop(0))
        found, wanted = runtime.prefill(PROMPT * 2), expected.prefill(PROMPT * 2)
        assert np.array_equal(found, wanted)
        for step in range(4):
            assert np.array_equal(runtime.decode_batch(ours, [step, 9]), expected.decode_batch(theirs, [step, 9]))
            assert np.array_equal(runtime.decode(step), expected.decode(step))
        for sequence in theirs:
            expected.free(sequence)
    assert backend.session.graphs.replays > 0
    backend.close()
    device.closed_clean()


def test_layer_by_layer_as_validation_does_it(bundle: Path, expected: Runtime, sessions: Any) -> None:
    """Hidden states, chosen experts and their weights come back to the host; layers can be released and bound again."""
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device, bind_layers=False)
    with runtime:
        for round_ in range(2):
            sequence, other = runtime.new_sequence(), expected.new_sequence()
            batch = runtime.reserved_batch([(sequence, PROMPT[:9])])
            wanted_batch = expected.reserved_batch([(other, PROMPT[:9])])
            hidden, wanted = runtime.runner.embed(batch), expected.runner.embed(wanted_batch)
            for layer in range(runtime.manifest.model.text.num_hidden_layers):
                found_out = runtime.runner.run_layer(layer, hidden, batch)
                wanted_out = expected.runner.run_layer(layer, wanted, wanted_batch)
                hidden, wanted = found_out.hidden, wanted_out.hidden
                assert np.array_equal(hidden.array, wanted.array)
                assert (found_out.expert_ids is None) == (wanted_out.expert_ids is None)
                if found_out.expert_ids is not None:
                    assert np.array_equal(found_out.expert_ids, wanted_out.expert_ids)
                    assert np.array_equal(found_out.expert_weights, wanted_out.expert_weights)
            rows = np.array([0, 8], np.int32)
            assert np.array_equal(runtime.runner.head(hidden, rows), expected.runner.head(wanted, rows))
            bound = sum(len(block) for block in device.memory.values())
            runtime.runner.release_layers()
            runtime.free(sequence)
            expected.free(other)
            if round_ == 0:
                continue
            backend.zeros((1, 4, runtime.manifest.model.text.cache_dim), "float32")
            assert sum(len(block) for block in device.memory.values()) < bound
    backend.close()
    device.closed_clean()


def test_weights_are_copied_once_and_stay(bundle: Path, exported: Any, sessions: Any) -> None:
    """Opening uploads the weights, the experts' bytes once though two inputs read them; steps add little."""
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device)
    tensors = sum(group.length * len(list(group.members())) for group in runtime.manifest.tensors)
    assert 0.5 * tensors < device.copied < 1.3 * tensors
    opened_with = device.copied
    runtime.prefill(PROMPT)
    runtime.decode(1)
    assert device.copied - opened_with < 10_000
    runtime.close()
    backend.close()


def test_page_locked_memory_is_bounded_by_the_buffers(bundle: Path, sessions: Any) -> None:
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device)
    runtime.prefill(PROMPT)
    assert device.peak_pinned == 3 * 1000 + 512
    runtime.close()
    backend.close()


def test_a_decode_step_is_replayed_without_touching_a_context(bundle: Path, sessions: Any) -> None:
    """One upload, one launch, one download (of a few pieces): no shapes, no addresses, no allocation."""
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device)
    runtime.prefill(PROMPT[:9])  # the table stays four blocks wide from here to position 15
    for step in range(4):
        runtime.decode(step)
    replays, calls = backend.session.graphs.replays, len(device.calls)
    runtime.decode(4)
    assert backend.session.graphs.replays == replays + 1
    assert device.calls[calls:].count("launch") == 1
    others = {"copy_to_device", "copy_to_host", "launch", "record", "synchronize", "synchronize_event"}
    assert set(device.calls[calls:]) <= others
    runtime.close()
    backend.close()


def test_graphs_are_bounded(bundle: Path, expected: Runtime, sessions: Any) -> None:
    """With room for one captured step the others go, contexts and all; logits stay right."""
    device = FakeDevice(sessions=sessions)
    backend = engine_backend_from_bundle(bundle, device=device, graphs=1, buffers=2, buffer_bytes=4096)
    with Runtime.open(bundle, backend=backend, max_sequences=3) as runtime:
        wanted = expected.generate(token_ids=[1], max_new_tokens=30, ignore_eos=True, keep_logits=True)
        found = runtime.generate(token_ids=[1], max_new_tokens=30, ignore_eos=True, keep_logits=True)
        assert found.step_logits is not None
        assert np.array_equal(found.step_logits, wanted.step_logits)
        assert len(backend.session.graphs) == 1
        assert len(device.graphs) == 1
    backend.close()
    device.closed_clean()


@pytest.mark.parametrize("why", ["driver", "tensorrt", "off"])
def test_without_capture_steps_run_as_they_are(
    exported: Any, expected: Runtime, sessions: Any, tmp_path: Path, why: str
) -> None:
    """Refused by the driver, by TensorRT, or switched off: the same logits, and the refusal is remembered."""

    def change(component: str, described: dict[str, Any]) -> None:
        described["never_capturable"] = why == "tensorrt"

    device = FakeDevice(sessions=sessions)
    device.refuse_capture = why == "driver"
    bundle = bundle_with_engines(exported.bundle, tmp_path, portable=True, change=change)
    backend = engine_backend_from_bundle(bundle, device=device, graphs=0 if why == "off" else 4, buffer_bytes=4096)
    with Runtime.open(bundle, backend=backend, max_sequences=3) as runtime:
        wanted = expected.generate(token_ids=PROMPT, max_new_tokens=8, ignore_eos=True, keep_logits=True)
        found = runtime.generate(token_ids=PROMPT, max_new_tokens=8, ignore_eos=True, keep_logits=True)
        assert found.step_logits is not None
        assert np.array_equal(found.step_logits, wanted.step_logits)
        assert backend.session.graphs.replays == 0
        assert bool(backend.session.graphs.refused) == (why != "off")
    backend.close()
    device.closed_clean()


def test_two_runtimes_share_a_backend(bundle: Path, expected: Runtime, sessions: Any) -> None:
    """What one holds from step to step is out of reach of the other's replays."""
    device = FakeDevice(sessions=sessions)
    first, backend = opened(bundle, device)
    first.prefill(PROMPT[:9])
    expected.prefill(PROMPT[:9])
    for step in range(4):
        first.decode(step)
        expected.decode(step)
    second = Runtime.open(bundle, backend=backend, max_sequences=3)
    replays = backend.session.graphs.replays
    assert np.array_equal(first.decode(4), expected.decode(4))
    assert backend.session.graphs.replays > replays
    assert np.array_equal(second.prefill(PROMPT[:7]), expected.prefill(PROMPT[:7]))
    for step in range(4):
        assert np.array_equal(second.decode(step), expected.decode(step))
    first.close()
    del first
    gc.collect()
    assert np.array_equal(second.decode(9), expected.decode(9))
    second.close()
    backend.close()
    device.closed_clean()


def test_images_go_through_their_own_engine(bundle: Path, expected: Runtime, sessions: Any) -> None:
    """The vision engine is loaded with the first image; its embeddings take the places of placeholders in a step."""
    device = FakeDevice(sessions=sessions)
    runtime, backend = opened(bundle, device)
    patch = expected.manifest.model.vision.patch_size if expected.manifest.model.vision is not None else 14
    pixels = np.random.default_rng(0).standard_normal((16 + 8, 3, patch, patch)).astype(np.float32)
    grids = [[1, 4, 4], [1, 2, 4]]
    engines = len(device.engines)
    with runtime:
        found, wanted = runtime.encode_media(pixels, grids), expected.encode_media(pixels, grids)
        assert len(device.engines) == engines + 1
        for ours, theirs in zip(found, wanted, strict=True):
            assert np.array_equal(ours, theirs)
        placeholder = expected.manifest.model.media_placeholder_token_id
        assert placeholder is not None
        ids = [1, 2, placeholder, 3, placeholder, 4]
        assert np.array_equal(runtime.prefill(ids, media=found), expected.prefill(ids, media=wanted))
        for token in range(4):
            assert np.array_equal(runtime.decode(token), expected.decode(token))
    backend.close()
    device.closed_clean()

"""What goes wrong with engines: named errors, and nothing left on the device whatever fails and whenever."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bundles import OPTIONS, bundle_with_engines
from fake_device import FakeDevice, MisuseError

from k25_engines.manifest import (
    MANIFEST_PATH,
    EngineEntry,
    EngineManifest,
    engine_manifest_to_json,
    engine_path,
    read_engine_manifest,
)
from k25_plugins.errors import BackendMissingError, InputError, K25Error
from k25_runtime.device import DeviceError
from k25_runtime.engine_backend import EngineBackend
from k25_runtime.engine_opening import check_version, engine_backend_from_bundle
from k25_runtime.host_tensor import HostTensor
from k25_runtime.runtime import Runtime

PROMPT = [3, 1, 4, 1, 5]
SMALL = {"buffers": 2, "buffer_bytes": 4096, "staging_bytes": 1024}


@pytest.fixture(scope="module")
def sessions() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def bundle(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_engines(tiny.bundle, tmp_path_factory.mktemp("engines"))


def spoiled(tiny: Any, folder: Path, component: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A bundle whose engine of one component says something else than engines.json."""

    def change_one(name: str, described: dict[str, Any]) -> None:
        if name == component:
            change(described)

    return bundle_with_engines(tiny.bundle, folder, change=change_one)


def rewritten(bundle: Path, change: Callable[[EngineEntry], EngineEntry]) -> None:
    """The bundle with other entries in engines.json."""
    entries = tuple(change(entry) for entry in read_engine_manifest(bundle).engines)
    (bundle / MANIFEST_PATH).write_text(engine_manifest_to_json(EngineManifest(engines=entries)))


def open_and_close(bundle: Path, device: FakeDevice, **options: Any) -> None:
    """Open on the device; whatever happens, what the backend took must be given back."""
    backend = engine_backend_from_bundle(bundle, device=device, **SMALL)
    try:
        Runtime.open(bundle, backend=backend, **options).close()
    finally:
        backend.close()
        device.closed_clean()


# An engine that does not fit.


def port(described: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(port for port in described["ports"] if port["name"] == name)
    return found


def drop_port(name: str) -> Callable[[dict[str, Any]], None]:
    def change(described: dict[str, Any]) -> None:
        described["ports"].remove(port(described, name))

    return change


def another_dtype(described: dict[str, Any]) -> None:
    port(described, "hidden")["dtype"] = "bfloat16"


def another_size(described: dict[str, Any]) -> None:
    port(described, "hidden")["shape"][1] += 1


def further_input(described: dict[str, Any]) -> None:
    described["ports"].append({"name": "mystery", "dtype": "int32", "shape": [1], "is_input": True})


def output_as_input(described: dict[str, Any]) -> None:
    port(described, "hidden_out")["is_input"] = True


def one_profile(described: dict[str, Any]) -> None:
    del described["profiles"][1]


def another_profile(described: dict[str, Any]) -> None:
    described["profiles"][1]["hidden"][2][0] += 1


def another_alias(described: dict[str, Any]) -> None:
    described["told_aliases"] = {"cache_out": "hidden"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_port("positions"), "input positions: expected int32 .*, found none in the engine"),
        (drop_port("cache_out"), "output cache_out: expected float32 .*, found none in the engine"),
        (another_dtype, "input hidden: expected float32 .*, found bfloat16"),
        (another_size, "input hidden: expected float32 .*, found float32"),
        (further_input, r"expected no further tensors, found \['mystery'\]"),
        (output_as_input, "output hidden_out: expected float32 .*, found none in the engine"),
        (one_profile, "profiles: expected 2, found 1"),
        (another_profile, "profile prefill: hidden: expected"),
        (another_alias, "output cache_out: expected the memory of cache, found hidden"),
    ],
)
def test_an_engine_that_is_not_what_the_manifest_says(
    tiny: Any, sessions: Any, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    bundle = spoiled(tiny, tmp_path, "dense_layer", change)
    with pytest.raises(InputError, match=f"engine dense_layer for sm120: {message}"):
        open_and_close(bundle, FakeDevice(sessions=sessions))


def test_an_engine_of_another_export(tiny: Any, sessions: Any, tmp_path: Path) -> None:
    bundle = bundle_with_engines(tiny.bundle, tmp_path)
    rewritten(bundle, lambda entry: replace(entry, component_sha256={entry.component: "2" * 64}))
    with pytest.raises(
        InputError, match=r"made from the fp32 graph: .*The bundle has changed since: k25-export compile"
    ):
        open_and_close(bundle, FakeDevice(sessions=sessions))


def test_an_engine_with_other_ports_than_the_graph(tiny: Any, sessions: Any, tmp_path: Path) -> None:
    bundle = bundle_with_engines(tiny.bundle, tmp_path)

    def change(entry: EngineEntry) -> EngineEntry:
        if entry.component != "embed":
            return entry
        return replace(entry, outputs=tuple(replace(port, name="other") for port in entry.outputs))

    rewritten(bundle, change)
    with pytest.raises(InputError, match=r"engine embed for sm120: output (other|hidden): expected .*compile"):
        open_and_close(bundle, FakeDevice(sessions=sessions))


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "no engine"])
def test_a_damaged_file(tiny: Any, sessions: Any, tmp_path: Path, how: str) -> None:
    """Found by size and hash before TensorRT sees it; a file that is as recorded and no engine, by TensorRT."""
    bundle = bundle_with_engines(tiny.bundle, tmp_path)
    path = bundle / engine_path("head", "sm120")
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "no engine":
        from k25_engines.manifest import with_file

        path.write_bytes(b"\0" * 100)
        rewritten(bundle, lambda entry: with_file(entry, b"\0" * 100) if entry.component == "head" else entry)
    else:
        path.write_bytes(data[:-7] if how == "cut" else data[:-7] + b"changed")
    expected = {
        "cut": rf"engine head for sm120: .*expected {len(data)} bytes, found {len(data) - 7}.*compile",
        "changed": "engine head for sm120: .*SHA-256: expected .*compile",
        "missing": "engine head for sm120: .*No such file.*compile",
        "no engine": "engine head for sm120: TensorRT cannot load the engine",
    }[how]
    with pytest.raises(InputError, match=expected):
        open_and_close(bundle, FakeDevice(sessions=sessions))


def test_a_component_without_an_engine(tiny: Any, sessions: Any, tmp_path: Path) -> None:
    bundle = bundle_with_engines(tiny.bundle, tmp_path)
    kept = tuple(entry for entry in read_engine_manifest(bundle).engines if entry.component != "moe_layer")
    (bundle / MANIFEST_PATH).write_text(engine_manifest_to_json(EngineManifest(engines=kept)))
    with pytest.raises(InputError, match=r"engines: expected moe_layer for sm120.*compile BUNDLE --target sm120"):
        open_and_close(bundle, FakeDevice(sessions=sessions))


def test_another_precision_than_the_engines(bundle: Path, sessions: Any) -> None:
    with pytest.raises(InputError, match="for sm120: precision: expected bf16, found fp32"):
        open_and_close(bundle, FakeDevice(sessions=sessions), precision="bf16")


# Sizes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": OPTIONS.context + 1, "max_sequences": 1}, "context 49: blocks of 4 tokens: expected 1 to 12"),
        ({"max_sequences": 4}, r"latent cache of 4 sequences .*: blocks: expected 1 to 36, .*found 48"),
        ({"block_size": 8}, "block_size: expected 4 to 4, the range that the engines were built for, found 8"),
    ],
)
def test_sizes_that_the_engines_were_not_built_for(
    bundle: Path, sessions: Any, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_and_close(bundle, FakeDevice(sessions=sessions), **({"max_sequences": 3} | options))


def test_a_sequence_stops_at_the_context_of_the_engines(bundle: Path, sessions: Any) -> None:
    """The default context is what the engines take, and no step is run that would go past it."""
    device = FakeDevice(sessions=sessions)
    backend = engine_backend_from_bundle(bundle, device=device, **SMALL)
    with Runtime.open(bundle, backend=backend, max_sequences=3) as runtime:
        assert runtime.context == OPTIONS.context
        runtime.prefill([1] * OPTIONS.context, rows="last")
        calls = len(device.calls)
        with pytest.raises(InputError, match="expected at most 48 tokens"):
            runtime.decode(1)
        assert len(device.calls) == calls
    backend.close()
    device.closed_clean()


def test_a_step_past_the_profiles_is_refused_before_it_runs(bundle: Path, sessions: Any) -> None:
    """Driven layer by layer with more tokens than the engines take: an error with the range, the device unharmed."""
    device = FakeDevice(sessions=sessions)
    backend = engine_backend_from_bundle(bundle, device=device, **SMALL)
    with Runtime.open(bundle, backend=backend, max_sequences=3) as runtime:
        batch = runtime.reserved_batch([(runtime.new_sequence(), [1] * 17)])
        with pytest.raises(
            InputError, match=r"engine embed for sm120: .*token_ids \[17\] not in \[1\]\.\.\[3\] of decode; .*\[16\]"
        ):
            runtime.runner.embed(batch)
        assert np.isfinite(runtime.prefill(PROMPT)).all()
    backend.close()
    device.closed_clean()


def test_a_checkpoint_that_does_not_fit_the_engine(tiny: Any, sessions: Any, tmp_path: Path) -> None:
    """Fewer rows of experts than a layer has: named with both sizes, before anything is copied."""
    bundle = bundle_with_engines(tiny.bundle, tmp_path)

    def change(entry: EngineEntry) -> EngineEntry:
        if entry.component != "moe_layer":
            return entry
        profiles = []
        for profile in entry.profiles:
            shapes = dict(profile.shapes)
            for name in ("expert_words", "expert_scales"):
                low, _, _ = shapes[name]
                shapes[name] = (low, low, (10, low[1]))
            profiles.append(replace(profile, shapes=shapes))
        return replace(entry, profiles=tuple(profiles))

    rewritten(bundle, change)
    data = json.loads((bundle / engine_path("moe_layer", "sm120")).read_text())
    for profile in data["profiles"]:
        for name in ("expert_words", "expert_scales"):
            profile[name] = [profile[name][0], profile[name][0], [10, profile[name][0][1]]]
    from k25_engines.manifest import with_file

    encoded = json.dumps(data).encode()
    (bundle / engine_path("moe_layer", "sm120")).write_bytes(encoded)
    rewritten(bundle, lambda entry: with_file(entry, encoded) if entry.component == "moe_layer" else entry)
    device = FakeDevice(sessions=sessions)
    with pytest.raises(InputError, match=r"engine moe_layer for sm120: input expert_words: expected .*10.*, found \["):
        open_and_close(bundle, device, max_sequences=3)


def test_a_device_without_enough_memory(bundle: Path, sessions: Any) -> None:
    device = FakeDevice(sessions=sessions, memory=200_000)
    with pytest.raises(InputError, match="GPU memory"):
        open_and_close(bundle, device, max_sequences=3)


# Whenever a call fails.


class Countdown:
    """Fails the n-th call of a name, once."""

    def __init__(self, name: str, count: int, error: BaseException) -> None:
        self.name, self.count, self.error = name, count, error
        self.lock = threading.Lock()

    def __call__(self, call: str) -> None:
        with self.lock:
            self.count -= call == self.name
            if call == self.name and self.count == 0:
                raise self.error


@pytest.fixture(scope="module")
def calls_of_a_run(bundle: Path, sessions: Any) -> Counter[str]:
    """How often each device call is made by opening, a prompt and some steps."""
    device = FakeDevice(sessions=sessions)
    use(bundle, device)
    return Counter(device.calls)


def use(bundle: Path, device: FakeDevice) -> None:
    try:
        backend = engine_backend_from_bundle(bundle, device=device, **SMALL)
    except BaseException:
        device.closed_clean()
        raise
    try:
        with Runtime.open(bundle, backend=backend, max_sequences=3) as runtime:
            runtime.generate(token_ids=PROMPT, max_new_tokens=6, ignore_eos=True)
    finally:
        backend.close()
        device.closed_clean()


FAILING = [
    "allocate", "allocate_pinned", "create_stream", "create_event", "record", "synchronize_event", "synchronize",
    "copy_to_device", "copy_to_host", "fill_zero", "load_engine", "context", "set_address", "set_shape", "set_scratch",
    "enqueue", "launch",
]  # fmt: skip


@pytest.mark.parametrize("call", FAILING)
def test_nothing_is_left_when_a_call_fails(
    bundle: Path, sessions: Any, calls_of_a_run: Counter[str], call: str
) -> None:
    """The first, the last and some in between: the error comes through, and everything is given back."""
    total = calls_of_a_run[call]
    assert total > 0
    for count in sorted({1, 2, total // 3, total // 2, total - 1, total} & set(range(1, total + 1))):
        device = FakeDevice(sessions=sessions)
        device.fail = Countdown(call, count, DeviceError(f"{call} was made to fail"))
        error = None
        try:
            use(bundle, device)
        except DeviceError as raised:
            error = str(raised)
        # None where it failed while a step was captured: the step ran without.
        assert error is None or "was made to fail" in error
        assert device.calls[-1] == "close"


@pytest.mark.parametrize("call", ["copy_to_device", "enqueue", "record", "allocate"])
def test_nothing_is_left_when_the_user_interrupts(
    bundle: Path, sessions: Any, calls_of_a_run: Counter[str], call: str
) -> None:
    for count in (2, calls_of_a_run[call] // 2, calls_of_a_run[call]):
        device = FakeDevice(sessions=sessions)
        device.fail = Countdown(call, count, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            use(bundle, device)


@pytest.mark.parametrize("call", ["begin_capture", "end_capture"])
def test_a_failed_capture_is_no_failure(bundle: Path, sessions: Any, call: str) -> None:
    device = FakeDevice(sessions=sessions)
    device.fail = Countdown(call, 1, DeviceError("was made to fail"))
    use(bundle, device)


def test_a_runtime_goes_on_after_a_failed_step(bundle: Path, sessions: Any) -> None:
    device = FakeDevice(sessions=sessions)
    backend = engine_backend_from_bundle(bundle, device=device, **SMALL)
    with Runtime.open(bundle, backend=backend, max_sequences=3) as runtime:
        wanted = runtime.prefill(PROMPT)
        device.fail = Countdown("enqueue", 3, DeviceError("was made to fail"))
        with pytest.raises(DeviceError, match=r"engine .*_layer for sm120: was made to fail"):
            runtime.prefill(PROMPT)
        assert np.array_equal(runtime.prefill(PROMPT), wanted)
    backend.close()
    device.closed_clean()


def test_closing_twice_and_use_after_closing(bundle: Path, sessions: Any) -> None:
    device = FakeDevice(sessions=sessions)
    backend = engine_backend_from_bundle(bundle, device=device, **SMALL)
    runtime = Runtime.open(bundle, backend=backend, max_sequences=3)
    runtime.prefill(PROMPT)
    runtime.close()
    runtime.close()
    backend.close()
    backend.close()
    device.closed_clean()
    with pytest.raises(K25Error, match="expected one that is open"):
        runtime.prefill(PROMPT)
    with pytest.raises(K25Error, match="expected one that is open"):
        backend.empty((1, 2), "float32")
    with pytest.raises(K25Error, match="expected one that is open"):
        backend.buffer(HostTensor(np.zeros(3, np.float32), "float32"))


def test_a_backend_that_the_runtime_opened_is_closed_with_it(
    bundle: Path, sessions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where opening fails half way."""
    import k25_runtime.engine_opening as opening

    devices = itertools.count()
    made: list[FakeDevice] = []

    def on_a_fake_device(folder: Path) -> EngineBackend:
        next(devices)
        made.append(FakeDevice(sessions=sessions))
        return engine_backend_from_bundle(folder, device=made[-1], **SMALL)

    monkeypatch.setattr(opening, "engine_backend_from_bundle", on_a_fake_device)
    with Runtime.open(bundle, backend="tensorrt", max_sequences=3) as runtime:
        runtime.prefill(PROMPT)
    made[-1].closed_clean()
    with pytest.raises(InputError, match="context"):
        Runtime.open(bundle, backend="tensorrt", context=49)
    made[-1].closed_clean()
    assert next(devices) == 2


def test_the_fake_device_sees_misuse() -> None:
    """The tests above mean something only if these are found."""
    device = FakeDevice()
    stream, other = device.create_stream(), device.create_stream()
    address, pinned = device.allocate(64), device.allocate_pinned(64)
    with pytest.raises(MisuseError, match="not inside"):
        device.copy_to_device(address + 1, pinned, stream)
    with pytest.raises(MisuseError, match="page-locked"):
        device.copy_to_device(address, np.zeros(8, np.uint8), stream)
    device.copy_to_device(address, pinned, stream)
    with pytest.raises(MisuseError, match="pending"):
        device.free(address)
    device.copy_to_host(pinned[:8], address, other)
    with pytest.raises(MisuseError, match="race"):
        device.synchronize(other)
    other.queue.clear()
    pinned[:] = 1
    with pytest.raises(MisuseError, match="changed before the copy"):
        device.synchronize(stream)
    device.free(address)
    with pytest.raises(MisuseError, match="not allocated"):
        device.free(address)
    with pytest.raises(AssertionError):
        device.closed_clean()


# Opening without what is needed.


def test_a_bundle_without_engines(tiny: Any) -> None:
    with pytest.raises(BackendMissingError, match=r"no TensorRT engines in it. `k25-export compile .* --target sm120`"):
        Runtime.open(tiny.bundle, backend="tensorrt")


def test_a_gpu_that_no_engine_was_built_for(bundle: Path) -> None:
    device = FakeDevice(capability="8.9")
    with pytest.raises(BackendMissingError, match=r"12\.0 \(sm120.*found NVIDIA Fake 6000.*--target sm89"):
        engine_backend_from_bundle(bundle, device=device)
    device.closed_clean()


def test_no_gpu_says_which_it_takes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k25_runtime.engine_opening.device_compute_capability", lambda: None)
    with pytest.raises(BackendMissingError) as caught:
        Runtime.open(bundle, backend="tensorrt")
    assert "need a GPU of compute capability 12.0 (sm120, such as RTX PRO 6000 Blackwell" in str(caught.value)
    assert "this machine has no NVIDIA GPU, or no driver" in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("missing", ["tensorrt", "cuda"])
def test_a_missing_package_comes_with_its_install_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    import k25_runtime.engine_opening as opening

    class Loaded:
        flavour, version = "tensorrt-rtx", "1.7.1.116"

    def load(flavour: str) -> Any:
        if missing == "tensorrt":
            raise BackendMissingError("this needs tensorrt-rtx, which is not installed: pip install 'tensorrt-rtx'")
        return Loaded()

    monkeypatch.setattr(opening, "device_compute_capability", lambda: "12.0")
    monkeypatch.setattr(opening, "load_tensorrt", load)
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match="pip install") as caught:
        Runtime.open(bundle, backend="tensorrt")
    assert caught.value.exit_code == 4


def test_engines_of_another_version(bundle: Path) -> None:
    entries = read_engine_manifest(bundle).engines
    check_version(entries, flavour="tensorrt-rtx", version="1.7.1.116")
    with pytest.raises(
        InputError, match=r"built by tensorrt-rtx 1\.7\.1\.116.*pip install 'tensorrt-rtx==1\.7\.1\.116'"
    ):
        check_version(entries, flavour="tensorrt-rtx", version="1.8.0.1")


@pytest.mark.parametrize("name", ["tensort", "", "cuda"])
def test_an_unknown_backend(bundle: Path, name: Any) -> None:
    with pytest.raises(InputError, match="backend: expected onnxruntime or tensorrt, found"):
        Runtime.open(bundle, backend=name)

"""The speed of a bundle on this machine, against the memory bandwidth measured in the same run.

Everything takes turns, N rounds: bandwidth, decode, prefill, the runtime's own time, and in every third round loading
in a process of its own. Of each the best round and the median are told; a round's time of a decode step is the mean of
its steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import InputError
from k25_plugins.native_library import Mode, native_library
from k25_runtime.bench_bandwidth import PROBE_BYTES, ReadBandwidth
from k25_runtime.bench_bytes import model_bytes
from k25_runtime.bench_load import LoadCost, load_cost
from k25_runtime.bench_report import BenchReport, Spread, machine_facts
from k25_runtime.cores import usable_cores
from k25_runtime.empty_component import EmptyComponents
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
from k25_runtime.runtime import Runtime
from k25_runtime.sequence import Sequence as CacheSequence

Progress = Callable[[str, int, int], None]
_LOAD_EVERY = 3
_EMPTY_STEPS = 100
_COUNTED_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measured: `steps` decode steps of `sequences` after prompts of `context` tokens, a prefill of `tokens`."""

    rounds: int = 9
    steps: int = 32
    context: int = 32
    sequences: int = 1
    tokens: int = 512
    threads: int = 0
    mode: Mode = "fast"
    checkpoint: str | None = None
    probe_bytes: int = PROBE_BYTES

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "context", "sequences", "tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"bench: {name}: expected at least 1, found {getattr(self, name)}")

    @property
    def room(self) -> int:
        """Tokens that a sequence has to have room for: of the longest work, with a step to spare."""
        return max(self.tokens + 1, self.context + self.steps + 2, self.context + _COUNTED_STEPS + 1)


def bench_bundle(bundle: Path, options: BenchOptions, *, progress: Progress | None = None) -> BenchReport:
    """Measure. Raises what `Runtime.open` raises, and `InputError` where the model has no room for the tokens."""
    report = progress or (lambda what, done, total: None)
    report("opening", 0, options.rounds)
    backend = OnnxRuntimeCpu(threads=options.threads, mode=options.mode)
    with (
        _opened(bundle, options, backend) as runtime,
        _opened(bundle, options, EmptyComponents(threads=options.threads)) as empty,
    ):
        tokens = _token_ids(runtime, options)
        decode, prefill = _Decode(runtime, options, tokens), _Prefill(runtime, options, tokens)
        overhead = _Overhead(empty)
        bandwidth = ReadBandwidth(native_library(), size=options.probe_bytes)
        experts = decode.experts_read()
        rates: list[float] = []
        steps: list[float] = []
        prefills: list[float] = []
        calls: list[float] = []
        loads: list[LoadCost] = []
        settings = _load_settings(bundle, options, tokens)
        works: dict[str, Callable[[], Any]] = {
            "reading memory": lambda: rates.append(bandwidth()),
            f"decoding, {options.steps} steps": lambda: steps.append(decode()),
            f"prefill of {options.tokens}": lambda: prefills.append(prefill()),
            "empty components": lambda: calls.append(overhead()),
        }
        for turn in range(options.rounds):
            for what, work in works.items():
                report(what, turn, options.rounds)
                work()
            if turn % _LOAD_EVERY == 0:
                report("loading", turn, options.rounds)
                loads.append(load_cost(settings))
        report("done", options.rounds, options.rounds)
        model = model_bytes(runtime.manifest, precision="fp32")
        middle = options.context + 1 + (options.steps + 1) / 2
        return BenchReport(
            bundle=bundle.resolve().name,
            options=options_of(options),
            machine=machine_facts(),
            runtime={**runtime.runner.details, "threads": str(options.threads or usable_cores())},
            bandwidth_how=bandwidth.how,
            read_bytes_per_s=_highest(rates),
            step=model.step(sequences=options.sequences, context=middle, experts=experts),
            experts_read=statistics.fmean(experts.values()) if experts else 0.0,
            decode_s=_lowest(steps),
            prefill_s=_lowest(prefills),
            call_s=_lowest(calls),
            calls=overhead.calls,
            load_s=_lowest([load.seconds for load in loads]),
            anonymous_bytes=_least([load.anonymous_bytes for load in loads]),
            anonymous_bytes_after_use=_least([load.anonymous_bytes_after_use for load in loads]),
        )


def options_of(options: BenchOptions) -> dict[str, Any]:
    """What a report says of the options."""
    names = ("rounds", "steps", "context", "sequences", "tokens", "mode")
    return {name: getattr(options, name) for name in names}


def _opened(bundle: Path, options: BenchOptions, backend: OnnxRuntimeCpu) -> Runtime:
    return Runtime.open(
        bundle,
        checkpoint=options.checkpoint,
        mode=options.mode,
        context=options.room,
        max_sequences=options.sequences + 1,
        backend=backend,
    )


def _load_settings(bundle: Path, options: BenchOptions, tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "bundle": str(bundle),
        "checkpoint": options.checkpoint,
        "mode": options.mode,
        "threads": options.threads,
        "context": options.room,
        "sequences": options.sequences + 1,
        "tokens": tokens[: options.tokens].tolist(),
    }


def _token_ids(runtime: Runtime, options: BenchOptions) -> npt.NDArray[np.int64]:
    """Random ids, the same in each run; the placeholder of media is none of them."""
    model = runtime.manifest.model
    ids = np.random.default_rng(0).integers(
        0, model.text.vocab_size - 1, max(options.room * options.sequences, options.tokens)
    )
    placeholder = model.media_placeholder_token_id
    return ids if placeholder is None else ids + (ids >= placeholder)


class _Decode:
    """Steps of one token for each sequence, after a prompt each."""

    def __init__(self, runtime: Runtime, options: BenchOptions, tokens: npt.NDArray[np.int64]) -> None:
        self._runtime = runtime
        self._steps = options.steps
        rows = tokens[: options.room * options.sequences].reshape(options.sequences, -1)
        self._prompts: list[list[int]] = rows[:, : options.context].tolist()
        self._next: list[list[int]] = rows[:, options.context :].T.tolist()

    def __call__(self) -> float:
        """Seconds of a step, the mean; the first one, which sets buffers up, is not counted."""
        sequences = self._begin()
        self._runtime.decode_batch(sequences, self._next[0])
        started = time.perf_counter()
        for ids in self._next[1 : self._steps + 1]:
            self._runtime.decode_batch(sequences, ids)
        seconds = (time.perf_counter() - started) / self._steps
        self._end(sequences)
        return seconds

    def experts_read(self) -> dict[int, float]:
        """How many different experts each MoE layer reads in a step, the mean over a few: the step, layer by layer."""
        runner, found = self._runtime.runner, dict[int, list[int]]()
        sequences = self._begin()
        for ids in self._next[:_COUNTED_STEPS]:
            batch = self._runtime.reserved_batch([(item, [token]) for item, token in zip(sequences, ids, strict=True)])
            hidden = runner.embed(batch)
            for layer in range(runner.text.num_hidden_layers):
                output = runner.run_layer(layer, hidden, batch)
                hidden = output.hidden
                if output.expert_ids is not None:
                    found.setdefault(layer, []).append(len(np.unique(output.expert_ids)))
        self._end(sequences)
        return {layer: statistics.fmean(counts) for layer, counts in found.items()}

    def _begin(self) -> list[CacheSequence]:
        return [sequence for sequence, _ in self._runtime.prefill_batch(self._prompts, rows="last")]

    def _end(self, sequences: Sequence[CacheSequence]) -> None:
        for sequence in sequences:
            self._runtime.free(sequence)


class _Prefill:
    """One prompt, logits of its last token."""

    def __init__(self, runtime: Runtime, options: BenchOptions, tokens: npt.NDArray[np.int64]) -> None:
        self._runtime = runtime
        self._ids: list[int] = tokens[: options.tokens].tolist()

    def __call__(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        ((sequence, _),) = self._runtime.prefill_batch([self._ids], rows="last")
        seconds = time.perf_counter() - started
        self._runtime.free(sequence)
        return seconds


class _Overhead:
    """Steps of empty components."""

    def __init__(self, runtime: Runtime) -> None:
        self.calls = runtime.manifest.model.text.num_hidden_layers + 2
        self._runner = runtime.runner
        self._batch = runtime.reserved_batch([(runtime.new_sequence(), [0])])
        self._rows = np.zeros(1, np.int32)
        self._runner.run(self._batch, self._rows)

    def __call__(self) -> float:
        """Seconds of a component call."""
        started = time.perf_counter()
        for _ in range(_EMPTY_STEPS):
            self._runner.run(self._batch, self._rows)
        return (time.perf_counter() - started) / _EMPTY_STEPS / self.calls


def _lowest(values: Sequence[float]) -> Spread:
    return Spread(best=min(values), median=statistics.median(values))


def _highest(values: Sequence[float]) -> Spread:
    return Spread(best=max(values), median=statistics.median(values))


def _least(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None

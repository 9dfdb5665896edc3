"""`python -m k25_engines.build_child JOB.json`: builds engines in a process of its own, which TensorRT may end.

Standard output carries one JSON event a line and nothing else; whatever TensorRT or a plugin prints goes to standard
error, which the parent keeps as the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from k25_engines import engine_checks
from k25_engines.build_job import (
    BuildJob,
    Built,
    ErrorKind,
    Event,
    Failed,
    event_to_json,
    job_from_json,
    target_marker,
)
from k25_engines.messages import ERROR, WARNING, Message, MessageLog, logger_for
from k25_engines.network import Network, config_for, engine_from_network, network_from_model
from k25_engines.plugin_creators import register_plugins
from k25_engines.targets import TARGETS, Target
from k25_engines.tensorrt_module import (
    TensorRT,
    installed_tensorrt,
    load_tensorrt,
    parser_library_is_found,
)
from k25_plugins.errors import BackendMissingError, InputError, K25Error, VerificationError, mismatch

if TYPE_CHECKING:
    import onnx

Send = Callable[[Event], None]

_KINDS: tuple[tuple[type[Exception], ErrorKind], ...] = (
    (InputError, "input"),
    (OSError, "input"),
    (BackendMissingError, "backend"),
    (VerificationError, "verification"),
)
_PR_SET_PDEATHSIG = 1


class EngineBuilder:
    """TensorRT with our plugins, for one job: one logger a process, which is what TensorRT keeps."""

    def __init__(self, job: BuildJob) -> None:
        self._job = job
        self._log = MessageLog(_print_message)
        self._reports: list[str] = []
        self._tensorrt = _tensorrt_for(job)
        trt = self._tensorrt.module
        self._logger = logger_for(trt, self._log)
        self._runtime = trt.Runtime(self._logger)
        library = Path(job.plugin_library) if job.plugin_library is not None else None
        self._creators = [] if job.portable else register_plugins(self._tensorrt, library, report=self._report)
        self._model, proto = _model_of(job)
        self._plugin_nodes = {} if job.portable else engine_checks.plugin_nodes(proto)
        self._plugin_fields = {} if job.portable else engine_checks.plugin_fields(proto)

    def _report(self, text: str) -> None:
        self._log.add(ERROR, text)
        self._reports.append(text)

    def _parsed(self, where: str) -> Network:
        """The network; what our plugins had to say is part of the error."""
        self._reports.clear()
        try:
            return network_from_model(self._tensorrt, self._model, logger=self._logger, where=where)
        except InputError as error:
            raise InputError("; ".join([str(error), *self._reports])) from error

    def engine(self, target: Target) -> tuple[bytes, dict[str, str], tuple[str, ...]]:
        """The engine for a target, what was checked, what TensorRT warned of. Raises `K25Error`."""
        job, trt = self._job, self._tensorrt.module
        where = f"{job.component} for {target.name}"
        self._log.clear()
        parsed = self._parsed(where)
        network = parsed.network
        checks = {
            "parser": f"accepted, {network.num_layers} layers",
            "ports": engine_checks.check_ports(self._tensorrt, network, job.inputs, job.outputs, where=where),
            "weights": engine_checks.check_weights(self._tensorrt, network, job.weights, where=where),
            "plugins": engine_checks.check_plugins(trt, network, self.plugin_layers, where=where),
        }
        config = config_for(self._tensorrt, parsed, target, job.profiles)
        data = engine_from_network(parsed, config, self._log)
        warnings = self._log.texts(WARNING)
        checks["size"] = engine_checks.check_size(data, len(job.weights), where=where)
        checks["fields"] = engine_checks.check_fields(data, self._plugin_fields, where=where)
        checks["header"] = engine_checks.check_header(self._tensorrt, self._runtime, data, target, where=where)
        checks["warnings"] = f"{len(warnings)}" if warnings else "none"
        return data, checks, warnings

    @property
    def plugin_layers(self) -> dict[str, int]:
        """Plugin layers that the engine must have, by op."""
        return self._plugin_nodes


def main(arguments: list[str]) -> int:
    """Build what the job says; 0 even where a target failed, which its event tells."""
    _end_with_parent()
    events = _take_standard_output()
    job = job_from_json(Path(arguments[0]).read_bytes())

    def send(event: Event) -> None:
        events.write(event_to_json(event) + "\n")
        events.flush()

    try:
        builder = EngineBuilder(job)
    except Exception as error:
        for target in job.targets:
            send(Event(failed=_failure(f"{job.component} for {target}", target, error)))
        return 0
    for name in job.targets:
        send(Event(started=name))
        print(target_marker(name), file=sys.stderr, flush=True)
        try:
            send(Event(built=_build(builder, job, TARGETS[name])))
        except Exception as error:
            send(Event(failed=_failure(f"{job.component} for {name}", name, error)))
    return 0


def _build(builder: EngineBuilder, job: BuildJob, target: Target) -> Built:
    _reset_peak_memory()
    start = time.perf_counter()
    data, checks, warnings = builder.engine(target)
    seconds = time.perf_counter() - start
    place = Path(job.output) / f"{target.name}.engine"
    with place.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Built(
        target=target.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seconds=round(seconds, 3),
        peak_memory_bytes=_peak_memory_bytes(),
        plugin_layers=builder.plugin_layers,
        checks=checks,
        warnings=warnings,
    )


def _tensorrt_for(job: BuildJob) -> TensorRT:
    installed = installed_tensorrt(job.flavour)
    if not parser_library_is_found(installed, os.environ):
        raise BackendMissingError(f"{job.flavour}: the ONNX parser's library is not found; it would end the process")
    tensorrt = load_tensorrt(job.flavour)
    if tensorrt.version != job.version:
        raise mismatch(f"{job.flavour}: version", expected=job.version, found=tensorrt.version)
    return tensorrt


def _model_of(job: BuildJob) -> tuple[bytes, onnx.ModelProto]:
    """The ONNX model to parse, as bytes and as a message."""
    graphs: dict[str, bytes] = {}
    for graph in job.graphs:
        data = Path(graph.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != graph.sha256:
            hint = "The file has changed since the export: export the checkpoint again."
            raise mismatch(f"component {graph.component}: SHA-256", expected=graph.sha256, found="another", hint=hint)
        graphs[graph.component] = data
    models: Mapping[str, Any] = {name: _parsed(name, data) for name, data in graphs.items()}
    if job.decoder_layers is None:
        (name,) = models
        return graphs[name], models[name]
    from k25_engines.fused_decoder import decoder_from_graphs

    decoder = decoder_from_graphs(models, job.decoder_layers)
    return decoder.SerializeToString(), decoder


def _parsed(component: str, data: bytes) -> Any:
    import onnx

    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError
        raise mismatch(f"component {component}", expected="an ONNX file", found=str(error)) from error


def _failure(where: str, target: str, error: Exception) -> Failed:
    kind: ErrorKind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), "internal")
    text = str(error) if isinstance(error, K25Error) else f"{type(error).__name__}: {error}"
    return Failed(target=target, kind=kind, message=text if where in text else f"{where}: {text}")


def _take_standard_output() -> TextIO:
    """Standard output for our events alone: what libraries print goes to standard error."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return events


def _end_with_parent() -> None:
    """Die with the parent, whatever kills it, and be the first that the system ends when memory is short."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _print_message(message: Message) -> None:
    print(f"{message.severity}: {message.text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

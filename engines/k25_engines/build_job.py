"""What a child process is told to build, and what it tells back: plain JSON both ways."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from k25_engines.manifest import Flavour, Profile
from k25_export.manifest import Port, built_value, json_object, plain_value

ErrorKind = Literal["input", "backend", "verification", "internal"]


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """The ONNX file of a component, and the layers it stands for in a decoder."""

    component: str
    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One component (or the decoder) for one or more targets, in one child process.

    `decoder_layers` names for each layer the component it is an instance of; null for a single component. `weights`
    has the dtype that each weight input must have, from the checkpoint. Engines are written to
    `<output>/<target>.engine`.
    """

    component: str
    graphs: tuple[GraphFile, ...]
    decoder_layers: tuple[str, ...] | None = None
    targets: tuple[str, ...]
    flavour: Flavour
    version: str
    portable: bool
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: dict[str, str]
    weights: dict[str, str]
    profiles: tuple[Profile, ...]
    plugin_library: str | None = None
    output: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine that a child has written."""

    target: str
    bytes: int
    sha256: str
    seconds: float
    peak_memory_bytes: int
    plugin_layers: dict[str, int]
    checks: dict[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Why a child has not built an engine; the message names component and target."""

    target: str
    kind: ErrorKind
    message: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a child: it started a target, or has built it, or could not."""

    started: str | None = None
    built: Built | None = None
    failed: Failed | None = None


def target_marker(target: str) -> str:
    """The line of a child's log where the part of a target begins."""
    return f"== {target}"


def log_of_target(log: str, target: str) -> str:
    """What a child's log says of one target: the part that is common to all, and its own."""
    parts = re.split(r"(?m)^(== sm\d+)$", log)
    own = [body for marker, body in zip(parts[1::2], parts[2::2], strict=True) if marker == target_marker(target)]
    return "".join([parts[0], *own]).strip() + "\n"


def job_to_json(job: BuildJob) -> str:
    """The job as one JSON object."""
    return json.dumps(plain_value(job))


def job_from_json(text: str | bytes) -> BuildJob:
    """The job again. Raises `InputError`."""
    job: BuildJob = built_value(BuildJob, json_object(text, where="build job"), "build job")
    return job


def event_to_json(event: Event) -> str:
    """The event as one line."""
    return json.dumps(plain_value(event))


def event_from_json(line: str) -> Event:
    """The event again. Raises `InputError`."""
    values: dict[str, Any] = json_object(line, where="build event")
    event: Event = built_value(Event, values, "build event")
    return event

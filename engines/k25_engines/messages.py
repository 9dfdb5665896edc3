"""What TensorRT says while it builds, kept in order: its logger and its error recorder with the real messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Severity = str

ERROR, WARNING, INFO = "error", "warning", "info"

#: TensorRT's severities by name; what is more verbose is dropped.
_SEVERITIES = {"INTERNAL_ERROR": ERROR, "ERROR": ERROR, "WARNING": WARNING, "INFO": INFO}

#: Said for each call of a function body, and of no meaning.
_NOISE = (
    re.compile(r"A node named .* already exists"),
    re.compile(r"Make sure input .* has Int64 binding"),
)
#: Said by a machine without a driver, which is no error of a build.
_NO_DRIVER = re.compile(r"cudaError 35\b")
_PLACE = re.compile(r"^[\w./-]+\.(?:cpp|h|cc):\d+: ")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message."""

    severity: Severity
    text: str


class MessageLog:
    """Messages in the order in which they came. TensorRT keeps one logger a process: make one log, clear it between."""

    def __init__(self, listener: Callable[[Message], None] | None = None) -> None:
        self.messages: list[Message] = []
        self._listener = listener

    def add(self, severity: Severity, text: str) -> None:
        """Keep a message, unless it is noise."""
        text = text.strip()
        if severity == ERROR and _NO_DRIVER.search(text):
            severity = INFO
        if severity == WARNING and any(pattern.search(text) for pattern in _NOISE):
            return
        message = Message(severity=severity, text=text)
        self.messages.append(message)
        if self._listener is not None:
            self._listener(message)

    def clear(self) -> None:
        """Forget what came so far."""
        self.messages.clear()

    def texts(self, severity: Severity) -> tuple[str, ...]:
        """The distinct messages of this severity, without TensorRT's source lines."""
        found = (_PLACE.sub("", message.text) for message in self.messages if message.severity == severity)
        return tuple(dict.fromkeys(found))

    def reason(self) -> str:
        """The errors as one sentence, the first first; TensorRT's later ones often only say that it failed."""
        return "; ".join(self.texts(ERROR)) or "TensorRT gave no reason"


def logger_for(trt: Any, log: MessageLog) -> Any:
    """An `ILogger` of this module that writes into the log."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            name = _SEVERITIES.get(severity.name)
            if name is not None:
                log.add(name, message)

    return Logger()


def error_recorder_for(trt: Any, log: MessageLog) -> Any:
    """An `IErrorRecorder` of this module that writes into the log and answers with what it was told.

    For a `Runtime` or the plugin registry. Not for a `Builder`: TensorRT-RTX 1.7.1 crashes when a builder that was
    given one from Python is freed and the recorder lives on; a builder's logger is told the same.
    """

    class ErrorRecorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.errors: list[tuple[Any, str]] = []

        def clear(self) -> None:
            self.errors.clear()

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def report_error(self, code: Any, description: str) -> bool:
            self.errors.append((code, description))
            log.add(ERROR, description)
            return True

    return ErrorRecorder()

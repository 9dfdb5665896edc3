"""What a user may choose about a validation, beside the bundle and the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from k25_plugins.errors import InputError, mismatch
from k25_runtime.runtime import BackendName
from k25_validate.parity_report import FAIL_ON

_NO_OVERRIDES: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """`prompts`: JSON lines instead of the built-in ones; `text`: a passage for the perplexity; `baseline`: an older
    `parity.json`; `fail_on`: the sections whose failures count; `tolerances`: by name (`override_from_text`);
    `backend`: what runs the bundle, as `Runtime.open` takes it."""

    prompts: Path | None = None
    text: Path | None = None
    baseline: Path | None = None
    fail_on: tuple[str, ...] = ("any",)
    tolerances: Mapping[str, float] = field(default_factory=lambda: _NO_OVERRIDES)
    backend: BackendName = "onnxruntime"

    def __post_init__(self) -> None:
        unknown = [name for name in self.fail_on if name not in FAIL_ON]
        if unknown or not self.fail_on:
            raise mismatch("fail-on", expected=f"some of {', '.join(FAIL_ON)}", found=", ".join(unknown) or "none")
        for alone in ("any", "none"):
            if alone in self.fail_on and len(set(self.fail_on)) > 1:
                raise mismatch("fail-on", expected=f"{alone} alone, or sections", found=", ".join(self.fail_on))

    def facts(self) -> dict[str, object]:
        """What decides a report, as plain values: contents of files by hash."""
        return {
            "prompts": _sha256(self.prompts),
            "text": _sha256(self.text) and [_sha256(self.text), self.text.name if self.text else ""],
            "baseline": _sha256(self.baseline),
            "fail_on": sorted(self.fail_on),
            "tolerances": dict(sorted(self.tolerances.items())),
            "backend": self.backend,
        }


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error

"""Errors that reach a user. Each class is one exit code of the `k25-export` command."""

from __future__ import annotations

from typing import ClassVar


class K25Error(Exception):
    """Base of every error raised on purpose; the command prints it without a traceback."""

    exit_code: ClassVar[int] = 5


class VerificationError(K25Error):
    """Parity or a hash check failed: the inputs were good, the result is not."""

    exit_code = 1


class InputError(K25Error):
    """A checkpoint, bundle, file or argument value cannot be used."""

    exit_code = 3


class BackendMissingError(K25Error):
    """A backend, target, optional package or verb is not available here."""

    exit_code = 4


def mismatch(where: str, *, expected: object, found: object, hint: str = "") -> InputError:
    """One sentence that names the thing, what was expected, what was found and what to do."""
    text = f"{where}: expected {expected}, found {found}"
    return InputError(f"{text}. {hint}" if hint else text)

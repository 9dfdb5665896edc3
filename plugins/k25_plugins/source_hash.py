"""A hash of our own source: what was made by other code is never taken for current. Standard library only."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path


def source_sha256(*packages: str) -> str:
    """SHA-256 over the Python files of these import packages, in an order that no machine changes."""
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).resolve().parent
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()

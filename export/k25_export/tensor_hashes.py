"""`hashes.json`: a SHA-256 of every tensor, in the order of the manifest's groups. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from k25_export.manifest import Manifest, json_object
from k25_plugins.errors import InputError, mismatch
from k25_plugins.whole_file import write_whole

HASHES_NAME = "hashes.json"
FORMAT = "k25-hashes"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TensorHashes:
    """`groups[i][j]` is the SHA-256, in hexadecimal, of member j of group i of the manifest's `tensors`."""

    inputs_sha256: str
    groups: tuple[tuple[str, ...], ...]


def write_hashes(bundle: Path, hashes: TensorHashes) -> None:
    """Write `hashes.json`, whole or not at all; one group a line."""
    rows = ",\n".join(f"    {json.dumps(group)}" for group in hashes.groups)
    text = (
        f'{{\n  "format": "{FORMAT}",\n  "schema_version": {SCHEMA_VERSION},\n'
        f'  "inputs_sha256": "{hashes.inputs_sha256}",\n  "groups": [\n{rows}\n  ]\n}}\n'
    )
    write_whole(bundle / HASHES_NAME, text)


def read_hashes(bundle: Path, manifest: Manifest) -> TensorHashes | None:
    """The recorded hashes, or None where there are none. `InputError` where they do not belong to the manifest."""
    path = bundle / HASHES_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    values = json_object(text, where=str(path))
    if values.get("format") != FORMAT or values.get("schema_version") != SCHEMA_VERSION:
        raise mismatch(str(path), expected=f"{FORMAT} version {SCHEMA_VERSION}", found=values.get("format"))
    groups = values.get("groups")
    counts = [sum(1 for _ in group.numbered_offsets()) for group in manifest.tensors]
    fits = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    if values.get("inputs_sha256") != manifest.inputs_sha256 or not fits or [len(g) for g in groups or ()] != counts:
        raise mismatch(
            str(path),
            expected="the hashes of this manifest's tensors",
            found="those of another export",
            hint="Record them again: `k25-export verify BUNDLE --record`.",
        )
    assert isinstance(groups, list)
    return TensorHashes(inputs_sha256=manifest.inputs_sha256, groups=tuple(tuple(map(str, group)) for group in groups))

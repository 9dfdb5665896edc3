"""Where the files of a checkpoint are: a folder, or a Hugging Face id in the local cache. Nothing is downloaded.

No path leaves its folder: a file must resolve inside the checkpoint folder or, in a Hugging Face cache (whose
snapshots are links into `blobs`), inside the repository's folder. Standard library only: the runtime uses it too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from k25_plugins.errors import InputError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


def folder_of_checkpoint(location: str | Path) -> Path:
    """The absolute folder of a checkpoint, given as a folder or as `owner/name[@revision]`.

    Raises `InputError` where there is neither.
    """
    path = Path(location)
    try:
        if str(location) and path.is_dir():
            return path.resolve()
        if str(location) and path.exists():
            raise InputError(f"checkpoint {location}: expected a folder, found a file")
        if _HUB_ID.match(str(location)):
            return _snapshot_folder(str(location))
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {str(location)!r:.200}: cannot be opened: {error}") from error
    raise InputError(f"checkpoint {location}: no such folder")


def file_in_checkpoint(folder: Path, name: str) -> Path:
    """The real path of a file of the checkpoint; `InputError` where it is missing or leads out of the folder."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"checkpoint {folder}: no file {name}. Is the download complete?") from error
    if not real.is_file():
        kind = "Is a directory" if real.is_dir() else "no regular file"
        raise InputError(f"checkpoint {folder}: {name} cannot be read: {kind}")
    root = _root_of(folder)
    if not real.is_relative_to(root):
        raise InputError(f"checkpoint {folder}: {name} leads out of {root}. Copy the file into the checkpoint folder.")
    return real


def _root_of(folder: Path) -> Path:
    """The folder that a checkpoint's files may not leave."""
    is_snapshot = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    return folder.parent.parent if is_snapshot else folder


def _hub_cache() -> Path:
    cache = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(cache) if cache else Path(home) / "hub"


def _snapshot_folder(hub_id: str) -> Path:
    repository, _, revision = hub_id.partition("@")
    folder = _hub_cache() / f"models--{repository.replace('/', '--')}"
    if not folder.is_dir():
        raise InputError(
            f"checkpoint {hub_id}: no such folder, and no such model in the Hugging Face cache {_hub_cache()}. "
            "Download it first; k25-export downloads nothing."
        )
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / (commit or "main")
    if snapshot.name in ("", ".", "..", "snapshots") or not snapshot.is_dir():
        raise InputError(
            f"checkpoint {hub_id}: revision {revision or 'main'} is not in the Hugging Face cache {folder}"
        )
    return snapshot.resolve()

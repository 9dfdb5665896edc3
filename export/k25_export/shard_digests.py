"""Streaming SHA-256 of the tensors of a shard: at disk speed, in constant memory, resumable shard by shard."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.manifest import Manifest, json_object
from k25_plugins.errors import InputError
from k25_plugins.whole_file import write_whole

CHUNK_BYTES = 4 << 20
JOURNAL_NAME = ".verify-progress.json"
THREADS = 2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ShardDigests:
    """SHA-256 in hexadecimal: `tensors` in the order of their offsets, `file` of the whole shard if asked for."""

    file: str | None
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A tensor's place in the manifest (group, member) and in its shard's file."""

    offset: int
    length: int
    group: int
    member: int
    name: str


def members_by_shard(manifest: Manifest) -> list[list[Member]]:
    """The tensors of every shard in the order of their offsets."""
    shards: list[list[Member]] = [[] for _ in manifest.shards]
    for group_index, group in enumerate(manifest.tensors):
        for index, tensor in enumerate(group.members()):
            shards[group.shard].append(
                Member(offset=tensor.offset, length=tensor.length, group=group_index, member=index, name=tensor.name)
            )
    for members in shards:
        members.sort(key=lambda member: (member.offset, member.length))
    return shards


def shard_digests(
    manifest: Manifest, folder: Path, journal: Path, progress: Progress, *, with_files: bool = False
) -> dict[int, ShardDigests]:
    """Digests of every tensor and, `with_files`, of every shard. What an interrupted run had finished is reused.

    A shard in the journal counts only if its size and modification time are those that were hashed. The journal is
    removed at the end. Raises `InputError` where a shard cannot be read.
    """
    known = _read_journal(journal, manifest)
    paths = [file_in_checkpoint(folder, shard.file) for shard in manifest.shards]
    found: dict[int, ShardDigests] = {}
    for index, path in enumerate(paths):
        record = known.get(manifest.shards[index].file)
        if record is not None and record["stamp"] == _stamp(path) and (record["file"] or not with_files):
            found[index] = ShardDigests(file=record["file"], tensors=tuple(record["tensors"]))
    total = sum(shard.bytes for shard in manifest.shards)
    counter = _Counter(total, sum(manifest.shards[index].bytes for index in found), progress)
    members = members_by_shard(manifest)
    stop = threading.Event()
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = {
            pool.submit(_digests_of_file, path, members[index], counter.add, stop, with_files): index
            for index, path in enumerate(paths)
            if index not in found
        }
        try:
            for future in as_completed(waiting):
                index = waiting[future]
                stamp = _stamp(paths[index])
                found[index] = future.result()
                known[manifest.shards[index].file] = {
                    "stamp": stamp,
                    "file": found[index].file,
                    "tensors": list(found[index].tensors),
                }
                _write_journal(journal, manifest, known)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    journal.unlink(missing_ok=True)
    return found


class _Counter:
    """Bytes done, added up over threads; reported in megabytes, since a bar has no use for more."""

    def __init__(self, total: int, done: int, progress: Progress) -> None:
        self._total, self._done, self._progress = total, done, progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress("hashing, MB", self._done // 10**6, self._total // 10**6)


def _digests_of_file(
    path: Path, members: list[Member], add: Callable[[int], None], stop: threading.Event, with_file: bool
) -> ShardDigests:
    whole = hashlib.sha256() if with_file else None
    digests = []
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            first = members[0].offset if members else path.stat().st_size
            for chunk in _chunks(file, first, buffer, add, stop):
                if whole is not None:
                    whole.update(chunk)
            for member in members:
                digest = hashlib.sha256()
                for chunk in _chunks(file, member.length, buffer, add, stop):
                    digest.update(chunk)
                    if whole is not None:
                        whole.update(chunk)
                digests.append(digest.hexdigest())
    except OSError as error:
        raise InputError(f"shard {path.name}: cannot be read: {error.strerror}") from error
    return ShardDigests(file=whole.hexdigest() if whole is not None else None, tensors=tuple(digests))


def _chunks(
    file: Any, length: int, buffer: memoryview, add: Callable[[int], None], stop: threading.Event
) -> Iterator[memoryview]:
    while length > 0 and not stop.is_set():
        count = file.readinto(buffer[: min(length, len(buffer))])
        if not count:
            raise InputError(f"shard {Path(file.name).name}: expected {length} more bytes, found the end of the file")
        yield buffer[:count]
        length -= count
        add(count)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_journal(journal: Path, manifest: Manifest) -> dict[str, Any]:
    try:
        values = json_object(journal.read_bytes(), where=str(journal))
    except (OSError, InputError):
        return {}
    shards = values.get("shards")
    return shards if values.get("inputs_sha256") == manifest.inputs_sha256 and isinstance(shards, dict) else {}


def _write_journal(journal: Path, manifest: Manifest, shards: dict[str, Any]) -> None:
    write_whole(journal, json.dumps({"inputs_sha256": manifest.inputs_sha256, "shards": shards}))


def hub_blob_sha256(path: Path) -> str | None:
    """The SHA-256 that a Hugging Face cache gives a large file by its blob's name, or None elsewhere."""
    real = path.resolve()
    is_hash = len(real.name) == 64 and all(char in "0123456789abcdef" for char in real.name)
    return real.name if is_hash and real.parent.name == "blobs" else None

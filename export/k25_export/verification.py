"""`verify`: is everything that a bundle refers to still what it was at the export?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.manifest import ComponentFile, FileEntry, Manifest, content_hash, read_bundle_file
from k25_export.shard_digests import (
    JOURNAL_NAME,
    ShardDigests,
    hub_blob_sha256,
    members_by_shard,
    shard_digests,
)
from k25_export.tensor_hashes import TensorHashes, read_hashes, write_hashes
from k25_plugins.errors import InputError

Progress = Callable[[str, int, int], None]

NO_BASELINE = (
    "no baseline: expected hashes.json in the bundle (`k25-export export --hash`, or `verify --record`) or shards in a "
    "Hugging Face cache, found neither, so data bytes cannot be judged"
)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found. `baseline` is what data bytes were compared with, None where they were not."""

    problems: tuple[str, ...]
    files: int
    shards: int
    tensors_hashed: int
    baseline: str | None


def verification_of_bundle(
    bundle: Path, manifest: Manifest, folder: Path, *, is_deep: bool, progress: Progress
) -> Verification:
    """Check the bundle's files and the shards' sizes and headers; deep: stream every tensor through SHA-256.

    Problems are collected, not raised. A deep check of shards that do not even have their size or header stops there.
    """
    files = [file for component in manifest.components for file in component.files]
    problems = [*_file_problems(bundle, manifest), *_shard_problems(manifest, folder)]
    baseline, hashed = None, 0
    if is_deep and not problems:
        recorded = read_hashes(bundle, manifest)
        blobs = [hub_blob_sha256(folder / shard.file) for shard in manifest.shards]
        if recorded is None and None in blobs:
            problems.append(NO_BASELINE)
        else:
            baseline = "hashes.json" if recorded is not None else "blob names of the Hugging Face cache"
            digests = shard_digests(manifest, folder, bundle / JOURNAL_NAME, progress, with_files=recorded is None)
            hashed = sum(len(found.tensors) for found in digests.values())
            if recorded is not None:
                problems += _tensor_problems(manifest, recorded, digests)
            else:
                problems += _blob_problems(manifest, blobs, digests)
    return Verification(
        problems=tuple(problems),
        files=len(files) + len(manifest.tokenizer),
        shards=len(manifest.shards),
        tensors_hashed=hashed,
        baseline=baseline,
    )


def record_hashes(bundle: Path, manifest: Manifest, folder: Path, *, progress: Progress) -> int:
    """Stream every tensor and write `hashes.json`; returns how many. Raises `InputError` where shards have changed."""
    problems = list(_shard_problems(manifest, folder))
    if problems:
        raise InputError(f"the checkpoint is not the one that was exported: {problems[0]}")
    digests = shard_digests(manifest, folder, bundle / JOURNAL_NAME, progress)
    groups = [[""] * sum(1 for _ in group.numbered_offsets()) for group in manifest.tensors]
    for shard, members in enumerate(members_by_shard(manifest)):
        for member, digest in zip(members, digests[shard].tensors, strict=True):
            groups[member.group][member.member] = digest
    hashes = TensorHashes(inputs_sha256=manifest.inputs_sha256, groups=tuple(tuple(group) for group in groups))
    write_hashes(bundle, hashes)
    return sum(len(group) for group in groups)


def _file_problems(bundle: Path, manifest: Manifest) -> Iterator[str]:
    if manifest.content_sha256 != content_hash(manifest):
        yield f"manifest.json: content_sha256: expected {content_hash(manifest)}, found {manifest.content_sha256}"
    entries: list[FileEntry | ComponentFile] = [file for component in manifest.components for file in component.files]
    for entry in [*entries, *manifest.tokenizer]:
        try:
            read_bundle_file(bundle, entry)
        except InputError as error:
            yield str(error)


def _shard_problems(manifest: Manifest, folder: Path) -> Iterator[str]:
    for shard in manifest.shards:
        try:
            path = file_in_checkpoint(folder, shard.file)
            size = path.stat().st_size
            with path.open("rb") as file:
                digest = hashlib.sha256(file.read(shard.data_start)).hexdigest()
        except InputError as error:
            yield str(error)
            continue
        except OSError as error:
            yield f"shard {shard.file}: cannot be read: {error.strerror}"
            continue
        if size != shard.bytes:
            yield f"shard {shard.file}: expected {shard.bytes} bytes, found {size}"
        elif digest != shard.header_sha256:
            yield f"shard {shard.file}: header hash: expected {shard.header_sha256}, found {digest}"


def _tensor_problems(manifest: Manifest, recorded: TensorHashes, digests: dict[int, ShardDigests]) -> Iterator[str]:
    for shard, members in enumerate(members_by_shard(manifest)):
        for member, digest in zip(members, digests[shard].tensors, strict=True):
            expected = recorded.groups[member.group][member.member]
            if digest != expected:
                file = manifest.shards[shard].file
                yield f"shard {file}: tensor {member.name}: SHA-256: expected {expected}, found {digest}"


def _blob_problems(manifest: Manifest, blobs: list[str | None], digests: dict[int, ShardDigests]) -> Iterator[str]:
    for shard, expected in enumerate(blobs):
        if digests[shard].file != expected:
            file = manifest.shards[shard].file
            yield f"shard {file}: SHA-256: expected {expected}, its blob's name, found {digests[shard].file}"

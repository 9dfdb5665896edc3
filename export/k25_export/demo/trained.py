"""The text weights of the `trained` preset: the shards that come with the package, made by `scripts/train_demo.py`.

`docs/demo-checkpoint.md` says how they were made. The vision tower and its projector are not among them: their weights
are random, as in the other presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable

from k25_export.demo.layout import Shard
from k25_export.tensor_patterns import TEXT_PREFIX
from k25_plugins.errors import K25Error, mismatch

FOLDER = "trained"


def is_trained_shard(shard: Shard) -> bool:
    """Whether the shard holds text weights, which are trained; the others are random."""
    return all(tensor.name.startswith(TEXT_PREFIX) for tensor in shard.tensors)


def trained_shard(shard: Shard) -> bytes | None:
    """The whole safetensors file of a shard of text weights, None for another.

    Raises `K25Error` where the package lacks it or holds one of another layout.
    """
    if not is_trained_shard(shard):
        return None
    path = trained_folder() / shard.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise K25Error(f"{path}: cannot be read: {error.strerror}. Install k25-export again.") from error
    header = shard.header()
    expected = len(header) + shard.data_bytes
    if not content.startswith(header) or len(content) != expected:
        raise K25Error(
            f"{path}: expected the {len(shard.tensors)} tensors of the preset in {expected} bytes, "
            f"found another file of {len(content)} bytes. Install k25-export again, or run scripts/train_demo.py."
        )
    return content


def trained_folder() -> Traversable:
    """Where the package keeps the shards."""
    return resources.files(__package__).joinpath(FOLDER)


def shard_bytes(shard: Shard, values: Mapping[str, bytes]) -> bytes:
    """A safetensors file with these little-endian data, tensor by tensor; raises `InputError` for one that is missing
    or of another length."""
    pieces = [shard.header()]
    for tensor in shard.tensors:
        piece = values.get(tensor.name)
        if piece is None or len(piece) != tensor.byte_count:
            found = "nothing" if piece is None else f"{len(piece)} bytes"
            raise mismatch(f"{shard.file}: {tensor.name}", expected=f"{tensor.byte_count} bytes", found=found)
        pieces.append(piece)
    return b"".join(pieces)

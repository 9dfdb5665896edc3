"""The reference that judges a bundle: opened, its errors translated, and what it is given to judge."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from k25_export.manifest import Manifest
from k25_plugins.errors import InputError
from k25_validate.media_samples import MediaSample, built_in_media
from k25_validate.read_ahead import ExpertReadAhead
from k25_validate.reference import Reference

if TYPE_CHECKING:
    from k25_validate.plain_reference import PlainReference

ReferenceName = Literal["plain", "transformers"]
Stream = Literal["auto", "on", "off"]
Progress = Callable[[str, int, int], None]


def plain_of(judge: Reference, folder: Path, manifest: Manifest) -> PlainReference:
    """The judge where it is the plain reference, else one: noise floor and far positions are its business.

    Far positions: two float32 implementations of the frequencies differ by a unit in the last place, which is
    0.02 radians at 262,144; the plain reference rounds angles where the op does.
    """
    from k25_validate.plain_reference import PlainReference

    if isinstance(judge, PlainReference):
        return judge
    return PlainReference(folder, latent_norm_eps=manifest.model.text.latent_norm_eps)


@contextlib.contextmanager
def bad_weights_as_input_errors() -> Iterator[None]:
    """The plain reference shares no code, so it has an error of its own."""
    from k25_validate.plain_checkpoint import PlainReferenceError

    try:
        yield
    except PlainReferenceError as error:
        raise InputError(f"plain reference: {error}") from error


@contextlib.contextmanager
def opened_reference(
    name: ReferenceName, folder: Path, manifest: Manifest, is_streamed: bool, progress: Progress
) -> Iterator[Reference]:
    """The reference of that name over the checkpoint; streamed, experts are read ahead of their layer."""
    latent_norm_eps = manifest.model.text.latent_norm_eps
    if name == "transformers":
        from k25_validate.transformers_reference import TransformersReference

        yield TransformersReference(folder, latent_norm_eps=latent_norm_eps, progress=progress)
        return
    from k25_validate.plain_reference import PlainReference

    with ExpertReadAhead(manifest, folder) as ahead:
        on_route = ahead.read if is_streamed else None
        yield PlainReference(folder, latent_norm_eps=latent_norm_eps, on_route=on_route)


def media_or_built_in(manifest: Manifest, samples: tuple[MediaSample, ...] | None) -> tuple[MediaSample, ...]:
    """The samples given, or the built-in ones; none for a model without vision."""
    vision = manifest.model.vision
    if vision is None:
        return ()
    return built_in_media(vision) if samples is None else samples


def weights_are_streamed(stream: Stream, reference: ReferenceName, manifest: Manifest) -> bool:
    """Whether one layer is held at a time: `auto` where all exceed the memory. `InputError` where it cannot be."""
    weights = sum(shard.bytes for shard in manifest.shards)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if reference == "transformers":
        if stream == "on":
            raise InputError("stream: the transformers reference holds the whole model; use the plain reference")
        return False
    return stream == "on" or (stream == "auto" and weights > memory)

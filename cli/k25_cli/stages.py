"""Options and calls that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k25_cli.output import Progress

if TYPE_CHECKING:
    from k25_export.manifest import Manifest


def export_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--output` and `--latent-norm-eps`."""
    function = click.option(
        "--latent-norm-eps",
        type=click.FloatRange(min=0, min_open=True),
        help="Epsilon of q_a_layernorm and kv_a_layernorm [default: 1e-6, as in the Hugging Face code].",
    )(function)
    return click.option(
        "--output", "-o", required=True, type=click.Path(path_type=Path), help="The bundle folder to write."
    )(function)


def export_bundle(
    checkpoint: str, output: Path, *, latent_norm_eps: float | None, progress: Progress
) -> tuple[Manifest, bool]:
    """Read the checkpoint's headers and write (or reuse) the bundle."""
    from k25_export.bundle import bundle_from_checkpoint
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.config import DEFAULT_LATENT_NORM_EPS

    intake = checkpoint_from_folder(checkpoint, latent_norm_eps=latent_norm_eps or DEFAULT_LATENT_NORM_EPS)
    return bundle_from_checkpoint(intake, output, progress=progress)

"""`k25-export run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k25_cli.output import Output, output_options
from k25_cli.stages import backend_option
from k25_plugins.errors import InputError

if TYPE_CHECKING:
    from k25_runtime.media_processor import MediaSource
    from k25_runtime.runtime import Runtime

_MEDIA_OPTIONS = ("image", "video")
_MEDIA_ORDER = "k25.media_order"


class TokenIds(click.ParamType[list[int]]):
    """Token ids in one argument, separated by spaces or commas."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The ids as integers."""
        try:
            return [int(item) for item in str(value).replace(",", " ").split()]
        except ValueError:
            self.fail(f"{value!r}: expected integers separated by spaces", param, ctx)


class _RunCommand(click.Command):
    """Remembers in which order `--image` and `--video` were given; click groups them by option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual, and keep the order for `_media`."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_MEDIA_ORDER] = [param.name for param in order if param.name in _MEDIA_OPTIONS]
        return super().parse_args(ctx, args)


@click.command("run", cls=_RunCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="A user's message; goes through the checkpoint's chat template.")
@click.option("--token-ids", type=TokenIds(), help='Token ids, taken as given: "1 2 3".')
@click.option("--raw", is_flag=True, help="Take the prompt as it is: no chat template.")
@click.option("--thinking/--no-thinking", default=True, show_default=True, help="The template's thinking switch.")
@click.option("--image", type=click.Path(path_type=Path), multiple=True, help="An image before the prompt; repeatable.")
@click.option(
    "--video", type=click.Path(path_type=Path), multiple=True, help="A folder of frames or a GIF; repeatable."
)
@click.option("--fps", type=float, help="Frames a second of --video. [default: a GIF's own; each frame of a folder]")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=0))
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 keeps all.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Go on after an end token.")
@click.option(
    "--save-logits", type=click.Path(path_type=Path), help="Write token_ids, prompt_logits, step_logits (.npz)."
)
@click.option("--checkpoint", help="The checkpoint, if it has moved (or K25_CHECKPOINT).")
@click.option("--context", type=click.IntRange(min=1), help="Tokens that the sequence may hold.")
@click.option("--mode", type=click.Choice(["fast", "exact"]), help="[default: fast; exact with --save-logits]")
@backend_option
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0, 1024), help="0: one for each core.")
@output_options
@click.pass_context
def command(ctx: click.Context, /, bundle: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Generate from BUNDLE, greedily unless a temperature is given.

    Images and videos come before the prompt in the order given; with --raw or --token-ids they take the places of the
    media placeholders in these.
    """
    if (options["prompt"] is None) == (options["token_ids"] is None):
        raise click.UsageError("give exactly one of --prompt and --token-ids")
    save = options["save_logits"]
    if save is not None and (not save.name or save.is_dir()):
        raise InputError(f"--save-logits {str(save)!r}: expected the name of a file")
    media = _media(ctx, options)
    from k25_runtime.runtime import Runtime

    mode: Any = options["mode"] or ("exact" if options["save_logits"] else "fast")
    with Runtime.open(
        bundle,
        checkpoint=options["checkpoint"],
        context=options["context"],
        max_sequences=1,
        mode=mode,
        backend=options["backend"],
        threads=options["threads"],
    ) as runtime:
        _generate(runtime, Output(as_json=as_json, quiet=quiet), options, media)


def _media(ctx: click.Context, options: dict[str, Any]) -> list[MediaSource] | None:
    """Images and videos in the order of the command line; None where there are none."""
    if options["fps"] is not None and not options["video"]:
        raise click.UsageError("--fps says how fast the frames of --video are; give one")
    from k25_runtime.video_frames import Video

    paths = {name: iter(options[name]) for name in _MEDIA_OPTIONS}
    found: list[MediaSource] = []
    for name in ctx.meta[_MEDIA_ORDER]:
        path = next(paths[name])
        found.append(path if name == "image" else Video(source=path, fps=options["fps"]))
    return found or None


def _generate(runtime: Runtime, output: Output, options: dict[str, Any], media: list[MediaSource] | None) -> None:
    import numpy as np

    from k25_runtime.generation import finish_reason
    from k25_runtime.logits_file import save_logits
    from k25_runtime.sampler import SamplingConfig

    sampling = SamplingConfig(**{key: options[key] for key in ("temperature", "top_k", "top_p", "seed")})
    prompt = runtime.prompt(
        options["prompt"],
        token_ids=options["token_ids"],
        media=media,
        thinking=options["thinking"],
        raw=options["raw"],
    )
    prompt_ids = prompt.token_ids
    prompt_logits: list[Any] = []
    new_ids: list[int] = []
    texts: list[str] = []
    steps = []
    for token in runtime.stream(
        prompt,
        max_new_tokens=options["max_new_tokens"],
        sampling=sampling,
        ignore_eos=options["ignore_eos"],
        prompt_logits=prompt_logits if options["save_logits"] else None,
    ):
        new_ids.append(token.id)
        texts.append(token.text)
        if options["save_logits"]:
            steps.append(token.logits)
        if not output.as_json:
            click.echo(token.text if runtime.files.has_tokenizer else f"{token.id} ", nl=False)
    if not output.as_json:
        click.echo()
    if new_ids and not "".join(texts):
        output.note("no text: the first token chosen was an end token")
    if options["save_logits"]:
        save_logits(
            options["save_logits"],
            token_ids=np.array([*prompt_ids, *new_ids], np.int64),
            prompt_logits=prompt_logits[0],
            step_logits=np.array(steps, np.float32).reshape(-1, prompt_logits[0].shape[1]),
        )
    values = {
        "text": "".join(texts),
        "prompt_ids": prompt_ids,
        "new_ids": new_ids,
        "finish_reason": finish_reason(new_ids, runtime.stop_ids(ignore_eos=options["ignore_eos"])),
    }
    output.result(values, lambda: None)

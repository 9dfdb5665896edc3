"""Entry point of `k25-export`: verbs are loaded when they are called, errors become exit codes."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from k25_cli.interrupts import noted_interrupts, was_interrupted
from k25_plugins.errors import InputError, K25Error
from k25_plugins.version import __version__

EXIT_INTERNAL = 5
EXIT_INTERRUPTED = 130

#: Verb -> what it does, in the order of the work. Modules are `k25_cli.verbs.<verb with underscores>`.
VERBS: Mapping[str, str] = {
    "inspect": "What a checkpoint or a bundle holds, its size, what is wrong with it.",
    "demo-checkpoint": "Write a small checkpoint in Kimi K2.5's official layout.",
    "export": "ONNX components and manifest from a checkpoint.",
    "bind": "One layer as a standalone ONNX file over the original shards.",
    "compile": "TensorRT engines, without a GPU.",
    "validate": "Compare a bundle with a reference; write the parity report.",
    "bisect": "The first diverging layer, then op.",
    "build": "export + compile + validate.",
    "run": "Generate text from a bundle.",
    "bench": "Speed, against the memory bandwidth of the machine.",
    "verify": "Hashes of everything that a bundle refers to.",
    "plan": "Memory and hardware that a checkpoint takes.",
    "completion": "Print the completion script of a shell.",
}


class Verbs(click.Group):
    """A group whose commands are imported only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"k25_cli.verbs.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="k25-export")
def cli() -> None:
    """Kimi K2.5 from its checkpoint to ONNX components that run, with numerical proof.

    Exit codes: 0 done; 1 parity or verification failed; 2 usage; 3 bad input; 4 a backend, target or verb is
    missing; 5 an internal error; 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors are one message on standard error."""
    _open_missing_streams()
    # PyTorch's threads would spin while ONNX Runtime computes, and the other way round: on two cores, and on busy
    # machines, that costs more than it brings.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with noted_interrupts() as interrupts:
        code = _run(arguments)
    if interrupts and code != EXIT_INTERRUPTED:
        # Something on the way swallowed the KeyboardInterrupt (a destructor, a library being loaded).
        click.echo("k25-export: interrupted", err=True)
        return EXIT_INTERRUPTED
    return code


def _run(arguments: list[str] | None) -> int:
    try:
        result: Any = cli.main(arguments, prog_name="k25-export", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except K25Error as error:
        click.echo(f"k25-export: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("k25-export: interrupted", err=True)
        return EXIT_INTERRUPTED
    except SystemExit as error:
        # click and rich end so where the reader of our output is gone (`| head`): not an error of ours.
        is_broken_pipe = isinstance(error.__context__, BrokenPipeError) or type(sys.stdout).__name__.endswith(
            "PacifyFlushWrapper"
        )
        return 0 if is_broken_pipe else int(error.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        click.echo(f"k25-export: the operating system refused: {error.strerror or error}{where}", err=True)
        _drop_unwritten_output()
        return InputError.exit_code
    except Exception as error:
        if was_interrupted():  # a library made its own error of the KeyboardInterrupt
            click.echo("k25-export: interrupted", err=True)
            return EXIT_INTERRUPTED
        traceback.print_exc()
        click.echo(
            f"k25-export: internal error: {type(error).__name__}: {error}. Please report it with the lines above.",
            err=True,
        )
        return EXIT_INTERNAL


def _open_missing_streams() -> None:
    """A closed standard stream (`1>&-`) is None in Python; libraries that print would fail."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  open until the end


def _drop_unwritten_output() -> None:
    """What a full disk refused would be tried again, and fail again, when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

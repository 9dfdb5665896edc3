"""Chat messages as one prompt, by the Jinja template that a checkpoint brings along.

A template is foreign code: it runs in Jinja's immutable sandbox, with the settings, filters and functions that
templates written for the transformers library expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from k25_plugins.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_FILE = "chat_template.jinja"


def chat_template_from_folder(folder: Path) -> str:
    """The text of `chat_template.jinja` in a checkpoint or tokenizer folder; `InputError` if it cannot be read."""
    path = folder / TEMPLATE_FILE
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Give token ids or plain text instead.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from error


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The prompt for a conversation, as text with special tokens.

    A message has `role` and `content` (a text, or a list of parts such as `{"type": "text", "text": ...}` and
    `{"type": "image"}`), and may have `name`, `reasoning_content`, `tool_calls` and `tool_call_id`. `tools` are
    function declarations. `thinking` opens the answer with `<think>`, or closes it at once. `extra` reaches the
    template by name (`tools_ts_str`: the tools as TypeScript text).

    The texts are put in as they are: one that spells a special token becomes that token when it is encoded.
    Raises `InputError` with the template's own message, or with what in it failed.
    """
    values = {
        "messages": messages,
        "tools": tools,
        "thinking": thinking,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
    compiled = _compiled(template)
    try:
        return compiled.render(values)
    except Exception as error:  # a template can raise anything
        raise InputError(f"chat template: {error or type(error).__name__}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise InputError(f"chat template, line {error.lineno}: {error.message}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)

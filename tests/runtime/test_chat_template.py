"""Chat rendering: the demo's template spells Kimi K2.5's format, and the sandbox holds."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from k25_plugins.errors import InputError
from k25_runtime.chat_template import chat_template_from_folder, render_chat

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "description": "größer <b>", "parameters": {}}}
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": {"a": "é", "b": 2}}}
ASK = "<|im_user|>user<|im_middle|>Hi<|im_end|>"
OPEN = "<|im_assistant|>assistant<|im_middle|>"


@pytest.fixture(scope="module")
def template() -> str:
    return resources.files("k25_export.demo").joinpath("chat_template.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, OPEN + "<think>"),
        ({"thinking": True}, OPEN + "<think>"),
        ({"thinking": False}, OPEN + "<think></think>"),
        ({"add_generation_prompt": False}, ""),
    ],
)
def test_generation_prompt_follows_the_thinking_switch(template: str, options: dict[str, Any], ending: str) -> None:
    assert render_chat(template, [USER], **options) == ASK + ending


def test_roles_and_names_without_anything_between_turns(template: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "name": "ann", "content": "  {{ 1 + 1 }} <b>&"},
    ]
    assert render_chat(template, messages, add_generation_prompt=False) == (
        "<|im_system|>system<|im_middle|>Be brief.\n<|im_end|><|im_user|>ann<|im_middle|>  {{ 1 + 1 }} <b>&<|im_end|>"
    )


def test_past_reasoning_is_dropped_and_a_running_tool_cycle_keeps_its_own(template: str) -> None:
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "Old.", "reasoning_content": "old thoughts"},
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "must add", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "functions.add:0", "content": "4"},
    ]
    assert render_chat(template, messages) == (
        f"{ASK}{OPEN}<think></think>Old.<|im_end|>{ASK}{OPEN}<think>must add</think>"
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"a": "é", "b": 2}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        f"<|im_system|>tool<|im_middle|>## Return of functions.add:0\n4<|im_end|>{OPEN}<think>"
    )
    finished = [*messages, {"role": "assistant", "content": "Four."}]
    assert "must add" not in render_chat(template, finished)


def test_call_arguments_given_as_text_stay_as_they_are(template: str) -> None:
    call = {"id": "functions.add:0", "function": {"name": "add", "arguments": '{"b":2}'}}
    text = render_chat(template, [{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert '<|tool_call_argument_begin|>{"b":2}<|tool_call_end|>' in text


def test_tools_are_declared_first_as_typescript_or_json(template: str) -> None:
    head, middle = "<|im_system|>tool_declare<|im_middle|>", "<|im_end|>" + ASK
    declared = render_chat(template, [USER], tools=[TOOL], add_generation_prompt=False)
    assert declared.startswith(head)
    assert declared.endswith(middle)
    body = declared.removeprefix(head).removesuffix(middle)
    assert json.loads(body) == [TOOL]
    assert "größer <b>" in body
    text = render_chat(template, [USER], tools=[TOOL], tools_ts_str="# Tools\n", add_generation_prompt=False)
    assert text == f"{head}# Tools\n{middle}"


def test_media_become_media_tokens(template: str) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is "}, "this?", {"type": "video"}]
    assert render_chat(template, [{"role": "user", "content": content}], add_generation_prompt=False) == (
        "<|im_user|>user<|im_middle|><|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
        "What is this?<|kimi_k25_video_placeholder|><|im_end|>"
    )
    with pytest.raises(InputError, match="expected type text, image or video, found smell"):
        render_chat(template, [{"role": "user", "content": [{"type": "smell"}]}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{% set ns = namespace() %}{% set ns.x = ns.__class__.__mro__ %}",
    ],
)
def test_sandbox_refuses_to_reach_python(attack: str) -> None:
    with pytest.raises(InputError, match=r"chat template: .*unsafe"):
        render_chat(attack, [USER])


def test_what_the_sandbox_hides_prints_as_nothing() -> None:
    assert render_chat("{{ ''.__class__ }}{{ raise_exception.__globals__ }}{{ ''|attr('__class__') }}", []) == ""


def test_sandbox_refuses_to_change_the_messages() -> None:
    messages = [dict(USER)]
    for attack in ("{{ messages.append(1) }}", "{{ messages[0].update(role='system') }}", "{{ messages.clear() }}"):
        with pytest.raises(InputError, match=r"chat template: .*unsafe"):
            render_chat(attack, messages)
    assert messages == [USER]


def test_sandbox_bounds_ranges() -> None:
    with pytest.raises(InputError, match=r"chat template: Range too big"):
        render_chat("{% for i in range(10000000) %}{% endfor %}", [])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("line one\n{% if %}", "chat template, line 2: "),
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{{ 1 / 0 }}", "chat template: division by zero"),
        ("{{ nothing.role }}", "chat template: 'nothing' is undefined"),
    ],
)
def test_template_errors_are_input_errors(template: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        render_chat(template, [])


def test_blocks_are_trimmed_and_json_is_not_escaped_as_in_transformers() -> None:
    template = (
        "  {% for m in messages %}\n  {% if loop.last %}\n{% break %}\n{% endif %}\n{{ m | tojson }}\n{% endfor %}\n"
    )
    assert render_chat(template, [{"role": "<&é'>"}, USER]) == '{"role": "<&é\'>"}\n'
    assert render_chat(
        "{{ tools | tojson(indent=1, separators=(',', ':'), sort_keys=true) }}", [], tools=[{"b": 1, "a": 2}]
    ) == ('[\n {\n  "a":2,\n  "b":1\n }\n]')


def test_template_file_is_read_or_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"chat_template.jinja: cannot be read: No such file"):
        chat_template_from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"ok \xff")
    with pytest.raises(InputError, match=r"chat_template.jinja: expected UTF-8 text, .* at byte 3"):
        chat_template_from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes("ok é\n".encode())
    assert chat_template_from_folder(tmp_path) == "ok é\n"


def test_imports_are_light() -> None:
    program = (
        "import sys, k25_runtime.tokenizer, k25_runtime.chat_template;"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"

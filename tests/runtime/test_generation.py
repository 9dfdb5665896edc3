"""Generating: where it stops and why, what is streamed, and the logits that come with it."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from k25_plugins.errors import InputError, VerificationError
from k25_runtime import Runtime
from k25_runtime.backend import HostBackend
from k25_runtime.generation import finish_reason, generated_tokens
from k25_runtime.host_tensor import HostTensor
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu, ort_value
from k25_runtime.sampler import Sampler, SamplingConfig
from k25_validate.metrics import relative_l2
from k25_validate.plain_reference import PlainReference

PROMPT = [3, 1, 4, 1, 5, 9, 2]
TEXT = "né 日本 😀!"


@dataclass
class Script(HostBackend):
    """A backend whose head makes the scripted ids the likeliest, one a call; NaN where the script says None."""

    ids: Sequence[int | None]
    name: str = "scripted"
    head_calls: int = 0
    inner: OnnxRuntimeCpu = field(default_factory=lambda: OnnxRuntimeCpu(threads=1))

    def load(self, data: bytes, *, label: str) -> ScriptedComponent:
        return ScriptedComponent(self, self.inner.load(data, label=label))

    def buffer(self, tensor: HostTensor) -> HostTensor:
        return tensor

    def overwrite(self, logits: npt.NDArray[np.float32]) -> None:
        wanted = self.ids[self.head_calls]
        self.head_calls += 1
        logits[-1] = 0
        if wanted is None:
            logits[-1, 3] = np.nan
        else:
            logits[-1, wanted] = 100


@dataclass(frozen=True)
class ScriptedComponent:
    script: Script
    inner: Any

    def bind(self, weights: Mapping[str, HostTensor]) -> ScriptedInstance:
        return ScriptedInstance(self.script, self.inner.bind(weights))


@dataclass(frozen=True)
class ScriptedInstance:
    script: Script
    inner: Any

    def run(self, inputs: Mapping[str, HostTensor], outputs: Mapping[str, HostTensor]) -> None:
        values = [{name: ort_value(tensor) for name, tensor in group.items()} for group in (inputs, outputs)]
        self.inner.run(*values)
        if "logits" in outputs:
            self.script.overwrite(outputs["logits"].array)


@dataclass
class ScriptedDecoder:
    """A decoder whose logits after n tokens are row n of a table."""

    logits: npt.NDArray[np.float32]
    decoded: list[int] = field(default_factory=list)

    def decode(self, token_id: int) -> npt.NDArray[np.float32]:
        self.decoded.append(token_id)
        row: npt.NDArray[np.float32] = self.logits[len(self.decoded)]
        return row


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The reference's matrices are small: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runtime(exported: Any) -> Runtime:
    return Runtime.open(exported.bundle, context=64, max_sequences=2, threads=1, mode="exact")


@pytest.fixture
def bundle(tiny: Any, tmp_path: Path) -> Path:
    """A copy whose generation configuration names one id that nothing else does."""
    copy = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    (copy / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [25]}')
    return copy


def scripted(bundle: Path, *ids: int | None) -> tuple[Runtime, Script]:
    script = Script([*ids, *[40] * 20])
    return Runtime.open(bundle, context=64, max_sequences=1, backend=script), script


def byte_ids(bundle: Path, text: str) -> list[int]:
    """The ids of the single bytes of a text, from tiktoken.model."""
    lines = (bundle / "tokenizer" / "tiktoken.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line.strip()}
    return [ranks[bytes([byte])] for byte in text.encode()]


def stop_id(bundle: Path, source: str) -> int:
    if source == "generation_config.json":
        return 25
    if source == "config.json":
        manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
        return int(manifest["model"]["text"]["eos_token_id"])
    config = json.loads((bundle / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))
    return next(int(key) for key, entry in config["added_tokens_decoder"].items() if entry["content"] == source)


# The loop alone.


def one_hot(*ids: int) -> npt.NDArray[np.float32]:
    return np.eye(10, dtype=np.float32)[list(ids)]


@pytest.mark.parametrize(
    ("limit", "stop_ids", "ids"),
    [(0, {4}, []), (1, {4}, [2]), (3, set(), [2, 7, 4]), (5, {4}, [2, 7, 4]), (5, {2}, [2]), (3, {4}, [2, 7, 4])],
)
def test_the_loop_ends_at_a_stop_id_or_the_limit(limit: int, stop_ids: set[int], ids: list[int]) -> None:
    """A stop id is yielded, and the last token is never decoded: nobody would read what comes of it."""
    logits = one_hot(2, 7, 4, 5, 6)
    decoder = ScriptedDecoder(logits)
    sampler = Sampler(SamplingConfig())
    found = list(
        generated_tokens(decoder.decode, logits[0], sampler=sampler, max_new_tokens=limit, stop_ids=frozenset(stop_ids))
    )
    assert [token for token, _, _ in found] == ids
    assert [is_last for _, _, is_last in found] == [False] * (len(ids) - 1) + [True] * bool(ids)
    assert decoder.decoded == ids[:-1]
    for step, (_, chosen_from, _) in enumerate(found):
        assert np.array_equal(chosen_from, logits[step])


def test_tokens_come_one_at_a_time() -> None:
    """A stream can be left without paying for the next token."""
    logits = one_hot(2, 7, 4)
    decoder = ScriptedDecoder(logits)
    tokens = generated_tokens(
        decoder.decode, logits[0], sampler=Sampler(SamplingConfig()), max_new_tokens=3, stop_ids=frozenset()
    )
    assert next(tokens)[0] == 2
    assert decoder.decoded == []
    assert next(tokens)[0] == 7
    assert decoder.decoded == [2]


@pytest.mark.parametrize(
    ("ids", "stop_ids", "reason"),
    [([], {1}, "length"), ([5, 1], {1, 2}, "stop"), ([1, 5], {1, 2}, "length"), ([5], set(), "length")],
)
def test_the_reason_is_stop_where_the_last_token_is_a_stop_id(ids: list[int], stop_ids: set[int], reason: str) -> None:
    assert finish_reason(ids, frozenset(stop_ids)) == reason


# The model's own tokens.


def test_greedy_generation_is_prefill_and_decode(runtime: Runtime) -> None:
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=9, ignore_eos=True)
    logits = runtime.prefill(PROMPT)[-1]
    expected = []
    for _ in range(9):
        expected.append(int(logits.argmax()))
        logits = runtime.decode(expected[-1])
    assert result.new_ids == expected
    assert result.prompt_ids == PROMPT
    assert result.finish_reason == "length"
    assert result.prompt_logits is None
    assert result.step_logits is None


def test_kept_logits_are_the_references(runtime: Runtime, exported: Any) -> None:
    """Row i of `step_logits` is what new token i was chosen from, so row 0 is the last row of `prompt_logits`."""
    new = 6
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=new, ignore_eos=True, keep_logits=True)
    vocabulary = runtime.manifest.model.text.vocab_size
    assert result.prompt_logits is not None
    assert result.step_logits is not None
    assert (result.prompt_logits.shape, result.step_logits.shape) == ((len(PROMPT), vocabulary), (new, vocabulary))
    assert [str(logits.dtype) for logits in (result.prompt_logits, result.step_logits)] == ["float32", "float32"]
    assert np.array_equal(result.step_logits[0], result.prompt_logits[-1])
    assert result.step_logits.argmax(axis=-1).tolist() == result.new_ids
    reference = PlainReference(exported.checkpoint).trace([*PROMPT, *result.new_ids]).logits
    assert relative_l2(result.prompt_logits, reference[: len(PROMPT)]) < 2e-5
    assert relative_l2(result.step_logits, reference[len(PROMPT) - 1 : -1]) < 2e-5


@pytest.mark.parametrize("keep_logits", [False, True])
def test_no_new_tokens_and_one(runtime: Runtime, keep_logits: bool) -> None:
    nothing = runtime.generate(token_ids=PROMPT, max_new_tokens=0, keep_logits=keep_logits)
    assert (nothing.new_ids, nothing.text, nothing.finish_reason) == ([], "", "length")
    one = runtime.generate(token_ids=PROMPT, max_new_tokens=1, ignore_eos=True, keep_logits=keep_logits)
    assert one.new_ids == [int(runtime.prefill(PROMPT)[-1].argmax())]
    if keep_logits:
        vocabulary = runtime.manifest.model.text.vocab_size
        for result, rows in ((nothing, 0), (one, 1)):
            assert result.prompt_logits is not None
            assert result.step_logits is not None
            assert result.prompt_logits.shape == (len(PROMPT), vocabulary)
            assert result.step_logits.shape == (rows, vocabulary)
            assert result.step_logits.dtype == np.float32


def test_the_same_seed_generates_the_same_tokens(runtime: Runtime) -> None:
    def ids(seed: int) -> list[int]:
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        return runtime.generate(token_ids=PROMPT, max_new_tokens=12, sampling=sampling, ignore_eos=True).new_ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_top_k_of_one_is_greedy_at_any_temperature(runtime: Runtime) -> None:
    greedy = runtime.generate(token_ids=PROMPT, max_new_tokens=8, ignore_eos=True)
    sampling = SamplingConfig(temperature=5.0, top_k=1)
    assert runtime.generate(token_ids=PROMPT, max_new_tokens=8, sampling=sampling, ignore_eos=True) == greedy


def test_a_generation_does_not_depend_on_the_one_before(runtime: Runtime) -> None:
    first = runtime.generate(token_ids=PROMPT, max_new_tokens=5, ignore_eos=True, keep_logits=True)
    runtime.generate(token_ids=PROMPT[::-1] * 5, max_new_tokens=9, ignore_eos=True)
    again = runtime.generate(token_ids=PROMPT, max_new_tokens=5, ignore_eos=True, keep_logits=True)
    assert again.new_ids == first.new_ids
    assert np.array_equal(np.asarray(again.step_logits), np.asarray(first.step_logits))


def test_a_stream_whose_sequence_was_replaced_does_not_go_on_with_the_other(runtime: Runtime) -> None:
    """The one current sequence is the runtime's: a stream that lost it must say so, or still be right."""
    alone = runtime.generate(token_ids=PROMPT, max_new_tokens=6, ignore_eos=True).new_ids
    stream = runtime.stream(PROMPT, max_new_tokens=6, ignore_eos=True)
    found = [next(stream).id, next(stream).id]
    runtime.prefill(PROMPT[::-1])
    try:
        found += [token.id for token in stream]
    except InputError as error:
        assert "sequence" in str(error)  # noqa: PT017
    else:
        assert found == alone


# Where it stops.


@pytest.mark.parametrize("source", ["config.json", "generation_config.json", "<|im_end|>"])
def test_generation_stops_on_each_end_id(bundle: Path, source: str) -> None:
    stop = stop_id(bundle, source)
    runtime, script = scripted(bundle, 41, 42, stop, 43)
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=10)
    assert (result.new_ids, result.finish_reason) == ([41, 42, stop], "stop")
    assert result.text == runtime.files.tokenizer.decode([41, 42])
    assert script.head_calls == 3


@pytest.mark.parametrize("source", ["config.json", "generation_config.json", "<|im_end|>"])
def test_ignore_eos_goes_on(bundle: Path, source: str) -> None:
    stop = stop_id(bundle, source)
    runtime, _ = scripted(bundle, 41, stop, 43, stop)
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=4, ignore_eos=True)
    assert (result.new_ids, result.finish_reason) == ([41, stop, 43, stop], "length")


@pytest.mark.parametrize(("ids", "limit"), [([25], 5), ([41, 25], 2)])
def test_a_stop_id_as_the_first_or_the_last_token_allowed(bundle: Path, ids: list[int], limit: int) -> None:
    runtime, _ = scripted(bundle, *ids)
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=limit, keep_logits=True)
    assert (result.new_ids, result.finish_reason) == (ids, "stop")
    assert result.step_logits is not None
    assert len(result.step_logits) == len(ids)


def test_logits_that_are_not_finite_end_in_a_failed_verification(bundle: Path) -> None:
    runtime, _ = scripted(bundle, 41, None)
    tokens = runtime.stream(PROMPT, max_new_tokens=5)
    assert next(tokens).id == 41
    with pytest.raises(VerificationError, match="logits: expected finite values, found 1"):
        next(tokens)


# Text.


def test_streamed_text_grows_by_whole_characters(bundle: Path) -> None:
    """Here every token is one byte: a character comes with its last byte, and nothing is said twice or lost."""
    ids = byte_ids(bundle, TEXT)
    runtime, _ = scripted(bundle, *ids)
    pieces = [token.text for token in runtime.stream(PROMPT, max_new_tokens=len(ids), ignore_eos=True)]
    expected: list[str] = []
    for character in TEXT:
        expected += [""] * (len(character.encode()) - 1) + [character]
    assert pieces == expected
    runtime, _ = scripted(bundle, *ids)
    assert runtime.generate(token_ids=PROMPT, max_new_tokens=len(ids), ignore_eos=True).text == TEXT


def test_streamed_text_is_the_text_of_all_tokens(runtime: Runtime) -> None:
    """The model's random tokens are often parts of characters; decoding all at once says what they are."""
    tokens = list(runtime.stream(PROMPT, max_new_tokens=40, ignore_eos=True))
    assert "".join(token.text for token in tokens) == runtime.files.tokenizer.decode([token.id for token in tokens])


@pytest.mark.parametrize("end", ["limit", "stop id"])
def test_a_character_that_stays_unfinished_is_not_lost(bundle: Path, end: str) -> None:
    """What `Tokenizer.decode` says of the same ids: U+FFFD at the end, whether the limit or a stop id cut it off."""
    ids = byte_ids(bundle, "a😀")[:-1]
    runtime, _ = scripted(bundle, *ids, 25)
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=len(ids) + (end == "stop id"))
    assert result.finish_reason == ("length" if end == "limit" else "stop")
    assert runtime.files.tokenizer.decode(ids) == "a\ufffd"
    assert result.text == "a\ufffd"


def test_a_prompt_goes_through_the_chat_template_unless_raw(runtime: Runtime) -> None:
    tokenizer = runtime.files.tokenizer
    assert runtime.prompt_ids("Grüße!", raw=True) == tokenizer.encode("Grüße!")
    chat = tokenizer.decode(runtime.prompt_ids("Grüße!"))
    assert "<|im_user|>" in chat
    assert "Grüße!" in chat
    assert chat.index("<|im_user|>") < chat.index("Grüße!") < chat.index("<|im_assistant|>")
    assert runtime.prompt_ids("Grüße!", thinking=False) != runtime.prompt_ids("Grüße!", thinking=True)
    result = runtime.generate("Hi", max_new_tokens=2, ignore_eos=True)
    assert result.prompt_ids == runtime.prompt_ids("Hi")
    assert len(result.new_ids) == 2


def test_token_ids_are_taken_as_they_are(runtime: Runtime) -> None:
    assert runtime.prompt_ids(token_ids=PROMPT) == PROMPT
    array = np.array(PROMPT, np.int64)
    assert runtime.generate(token_ids=array.tolist(), max_new_tokens=3, ignore_eos=True) == runtime.generate(
        token_ids=PROMPT, max_new_tokens=3, ignore_eos=True
    )


def test_a_bundle_without_tokenizer_generates_ids(bundle: Path) -> None:
    shutil.rmtree(bundle / "tokenizer")
    runtime, _ = scripted(bundle, 41, 42, stop_id(bundle, "config.json"))
    result = runtime.generate(token_ids=PROMPT, max_new_tokens=10)
    assert (result.new_ids[:2], result.text, result.finish_reason) == ([41, 42], "", "stop")
    with pytest.raises(InputError, match="Give token ids instead of text"):
        runtime.generate("Hello", raw=True)


# What is refused.


@pytest.fixture
def idle(bundle: Path) -> Iterator[Runtime]:
    """A runtime that must not be asked to run."""
    runtime, script = scripted(bundle)
    yield runtime
    assert script.head_calls == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"token_ids": PROMPT, "prompt": "both"}, "prompt: expected either a text or token ids"),
        ({}, "prompt: expected either a text or token ids"),
        ({"token_ids": PROMPT, "max_new_tokens": -1}, "max_new_tokens: expected >= 0, found -1"),
        ({"token_ids": []}, "expected at least one token id"),
        ({"token_ids": [1] * 65, "max_new_tokens": 0}, "context of 64, found 65"),
        ({"token_ids": [1] * 60, "max_new_tokens": 5}, "expected at most 59 tokens"),
        ({"token_ids": [1, -1], "max_new_tokens": 1}, "position 1: expected an id in 0.."),
        ({"token_ids": [1 << 40], "max_new_tokens": 1}, "position 0: expected an id in 0.."),
    ],
)
def test_arguments_that_make_no_sense_are_refused(idle: Runtime, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        idle.generate(**arguments)


def test_a_generation_may_fill_the_context(bundle: Path) -> None:
    runtime, _ = scripted(bundle)
    result = runtime.generate(token_ids=[1] * 59, max_new_tokens=5)
    assert len(result.new_ids) == 5

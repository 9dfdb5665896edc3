"""Images and video through the runtime: the logits are the plain reference's, whichever way media come in.

`TOLERANCE` is the project's end-to-end bound against a reference, `SAME` what reordering float32 sums may do between
two ways of running the same thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from k25_plugins.errors import BackendMissingError, InputError
from k25_runtime import Runtime
from k25_runtime.host_tensor import HostTensor
from k25_runtime.media_item import MediaItem
from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu
from k25_runtime.video_frames import Video
from k25_validate.metrics import relative_l2
from k25_validate.plain_reference import PlainReference
from k25_validate.reference import MediaInput

Float32 = npt.NDArray[np.float32]

TOLERANCE, SAME = 2e-5, 2e-6
CONTEXT = 96


class Counter(OnnxRuntimeCpu):
    """Counts what is loaded, the tokens of each step, and how often the vision component runs."""

    def __init__(self) -> None:
        super().__init__(threads=1, mode="exact")
        self.loaded: list[str] = []
        self.steps: list[int] = []
        self.encoded = 0

    def load(self, data: bytes, *, label: str) -> Any:
        self.loaded.append(label)
        return CountedComponent(self, super().load(data, label=label))


@dataclass(frozen=True)
class CountedComponent:
    counter: Counter
    inner: Any

    def bind(self, weights: Mapping[str, HostTensor]) -> CountedInstance:
        return CountedInstance(self.counter, self.inner.bind(weights))


@dataclass(frozen=True)
class CountedInstance:
    counter: Counter
    inner: Any

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self.counter.encoded += "pixel_values" in inputs
        if "token_ids" in inputs:
            self.counter.steps.append(inputs["token_ids"].shape()[0])
        self.inner.run(inputs, outputs)


@dataclass
class Model:
    """The tiny model: its runtime, its reference, tokens of its vocabulary and pictures."""

    bundle: Path
    reference: PlainReference
    pad: int
    vocabulary: int

    def open(self, **options: Any) -> Runtime:
        return Runtime.open(
            self.bundle, **{"context": CONTEXT, "max_sequences": 4, "threads": 1, "mode": "exact", **options}
        )

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        """Random ids, none of them the placeholder."""
        ids = np.random.default_rng(seed).integers(0, self.vocabulary - 1, count)
        return [int(token + (token >= self.pad)) for token in ids]

    def logits(self, ids: Sequence[int], *items: MediaItem) -> Float32:
        """The reference's logits of expanded ids with items in the runs of placeholders, in order."""
        places = iter([index for index, token in enumerate(ids) if token == self.pad])
        media = []
        for item in items:
            run = [next(places) for _ in range(item.tokens)]
            media.append(MediaInput(pixel_values=item.pixel_values, grid=item.grid, first_token=run[0]))
        return self.reference.trace(ids, media=media).logits


def picture(width: int, height: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Both runtimes share the machine, and the matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Model:
    with Runtime.open(tiny.bundle, context=8, bind_layers=False) as runtime:
        config = runtime.manifest.model
    assert config.media_placeholder_token_id is not None
    return Model(
        bundle=tiny.bundle,
        reference=PlainReference(tiny.checkpoint),
        pad=config.media_placeholder_token_id,
        vocabulary=config.text.vocab_size,
    )


# Embeddings.


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 10, 14), (1, 4, 26), (2, 6, 4), (3, 2, 8), (4, 6, 6)])
def test_embeddings_are_those_of_the_reference(model: Model, grid: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(1).uniform(-1, 1, (grid[0] * grid[1] * grid[2], 3, 14, 14)).astype(np.float32)
    found = model.open().encode_media(pixels, [grid])
    assert [item.shape for item in found] == [(grid[1] * grid[2] // 4, model.open().manifest.model.text.hidden_size)]
    assert found[0].dtype == np.float32
    assert relative_l2(found[0], model.reference.media_embeddings(pixels, grid)) < TOLERANCE


def test_several_items_in_one_call(model: Model) -> None:
    runtime = model.open()
    pixels = np.random.default_rng(2).uniform(-1, 1, (4 + 24 + 16, 3, 14, 14)).astype(np.float32)
    grids = np.array([[1, 2, 2], [1, 4, 6], [4, 2, 2]])
    together = runtime.encode_media(pixels, grids)
    apart = [
        model.open().encode_media(pixels[start:stop], grid[None])[0]
        for start, stop, grid in zip((0, 4, 28), (4, 28, 44), grids, strict=True)
    ]
    assert all(np.array_equal(one, other) for one, other in zip(together, apart, strict=True))
    together[0][:] = 0  # the caller's own copy
    assert np.array_equal(runtime.encode_media(pixels, grids)[0], apart[0])


# Logits.


def test_an_image_among_tokens(model: Model) -> None:
    runtime = model.open()
    item = runtime.media.processor.image(picture(80, 50))
    ids = [*model.tokens(5), model.pad, *model.tokens(7, seed=1)]
    expanded = runtime.prompt(token_ids=ids, media=[item]).token_ids
    assert len(expanded) == 12 + item.tokens
    expected = model.logits(expanded, item)
    found = runtime.prefill(ids, media=[picture(80, 50)])
    assert found.shape == expected.shape
    assert relative_l2(found, expected) < TOLERANCE
    without = runtime.prefill(expanded)
    assert relative_l2(without[:5], expected[:5]) < TOLERANCE
    assert relative_l2(without[5:], expected[5:]) > 100 * TOLERANCE  # or the image would not matter


def test_whatever_form_media_have(model: Model) -> None:
    runtime = model.open()
    pixels = picture(60, 60)
    item = runtime.media.processor.image(pixels)
    ids = [1, model.pad, 2]
    expected = runtime.prefill(ids, media=[item])
    embeddings = runtime.encode_media(item.pixel_values, [item.grid])
    expanded = [1, *[model.pad] * item.tokens, 2]
    forms: list[tuple[list[int], Any]] = [
        (ids, [pixels]),
        (ids, (Image.fromarray(pixels),)),
        (ids, iter([pixels])),
        (ids, embeddings),
        (expanded, [item]),
        (expanded, (item.pixel_values, [item.grid])),
        (ids, (item.pixel_values, np.array([item.grid]))),
        (expanded, embeddings),
    ]
    for tokens, media in forms:
        assert np.array_equal(runtime.prefill(tokens, media=media), expected)
    assert relative_l2(runtime.prefill(ids, [item], "last"), expected[-1:]) < SAME


@pytest.mark.parametrize("max_batch_tokens", [1, 4, 7, 512])
def test_pieces_may_cut_through_images(model: Model, max_batch_tokens: int) -> None:
    """Two images of different sizes, text before, between and after, a batch of three sequences, one of them text."""
    backend = Counter()
    runtime = model.open(max_batch_tokens=max_batch_tokens, block_size=3, backend=backend)
    wide, tall = (runtime.media.processor.image(picture(*size)) for size in ((100, 40), (30, 80)))
    prompts = [
        [*model.tokens(2), model.pad, *model.tokens(3, 1), model.pad, *model.tokens(1, 2)],
        model.tokens(9, 3),
        [model.pad, *model.tokens(2, 4)],
    ]
    media: list[Any] = [[wide, tall], None, [wide]]
    pairs = runtime.prefill_batch(prompts, media=media)
    for (sequence, logits), prompt, items in zip(pairs, prompts, media, strict=True):
        expanded = runtime.prompt(token_ids=prompt, media=items).token_ids
        assert sequence.length == len(expanded)
        assert relative_l2(logits, model.logits(expanded, *(items or ()))) < TOLERANCE
    assert max(backend.steps) <= max_batch_tokens
    assert backend.encoded == 2  # the image that comes twice, once


def test_a_conversation_goes_on_with_another_image(model: Model) -> None:
    runtime = model.open(max_batch_tokens=6)
    first, second = (runtime.media.processor.image(picture(56, 56, seed)) for seed in (1, 2))
    start, more = [*model.tokens(3), model.pad], [*model.tokens(2, 1), model.pad, *model.tokens(2, 2)]
    parts = [runtime.prefill(start, media=[first]), runtime.extend(more, media=[second]), runtime.decode(5)[None]]
    ids = [*runtime.prompt(token_ids=start + more, media=[first, second]).token_ids, 5]
    assert relative_l2(np.concatenate(parts), model.logits(ids, first, second)) < TOLERANCE


def test_video_chunks_take_one_placeholder_each(model: Model) -> None:
    runtime = model.open()
    video = Video(source=[picture(40, 40, seed) for seed in range(6)])
    items = runtime.media.processor.video(video)
    assert [item.grid for item in items] == [(4, 4, 4), (2, 4, 4)]
    ids = [1, model.pad, 2, model.pad, 3]
    expanded = runtime.prompt(token_ids=ids, media=[video]).token_ids
    assert relative_l2(runtime.prefill(ids, media=[video]), model.logits(expanded, *items)) < TOLERANCE


def test_a_reserved_batch_holds_the_media(model: Model) -> None:
    runtime = model.open()
    item = runtime.media.processor.image(picture(56, 28))
    chunks = [(runtime.new_sequence(), model.tokens(2)), (runtime.new_sequence(), [7, model.pad, 8])]
    batch = runtime.reserved_batch(chunks, media=[None, [item]])
    hidden = runtime.runner.embed(batch).to_float32()
    assert batch.tokens == 2 + 2 + item.tokens
    assert np.array_equal(hidden[3:-1], runtime.encode_media(item.pixel_values, [item.grid])[0])
    assert np.array_equal(hidden[[0, 1, 2, -1]], runtime.runner.embed(text_batch(runtime, model)).to_float32())


def text_batch(runtime: Runtime, model: Model) -> Any:
    return runtime.reserved_batch([(runtime.new_sequence(), [*model.tokens(2), 7, 8])])


# Prompts.


def test_a_chat_prompt_expands_its_media_in_order(model: Model) -> None:
    runtime = model.open()
    tokenizer = runtime.files.tokenizer
    image, other = picture(56, 28), picture(84, 56)
    video = {"type": "video", "video": [picture(28, 28, seed) for seed in range(5)], "fps": 2}
    prompt = runtime.chat_prompt(
        [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Look"}, video]},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": other}}, "and now?"]},
        ]
    )
    pad = "<|media_pad|>"
    assert tokenizer.decode(prompt.token_ids) == (
        f"<|im_user|>user<|im_middle|><|media_begin|>image<|media_content|>{pad * 2}<|media_end|>\nLook"
        f"00:00:00.000<|media_begin|>video<|media_content|>{pad}<|media_end|>"
        f"00:00:02.000<|media_begin|>video<|media_content|>{pad}<|media_end|><|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>Yes<|im_end|>"
        f"<|im_user|>user<|im_middle|><|media_begin|>image<|media_content|>{pad * 6}<|media_end|>\nand now?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>"
    )
    assert [item.grid for item in prompt.media if isinstance(item, MediaItem)] == [
        (1, 2, 4),
        (4, 2, 2),
        (1, 2, 2),
        (1, 4, 6),
    ]


def test_generation_sees_the_image(model: Model) -> None:
    runtime = model.open(context=128)
    results = [
        runtime.generate("Hi", media=[picture(80, 80, seed)], max_new_tokens=3, ignore_eos=True, keep_logits=True)
        for seed in (1, 2, 1)
    ]
    first, second, again = results
    assert first.prompt_ids == second.prompt_ids
    assert first.prompt_logits is not None
    assert second.prompt_logits is not None
    assert relative_l2(second.prompt_logits, first.prompt_logits) > 100 * TOLERANCE
    assert again.new_ids == first.new_ids
    item = runtime.media.processor.image(picture(80, 80, 1))
    ids = [*first.prompt_ids, *first.new_ids]
    expected = model.logits(ids, item)
    assert relative_l2(first.prompt_logits, expected[: len(first.prompt_ids)]) < TOLERANCE
    assert first.step_logits is not None
    assert relative_l2(first.step_logits, expected[len(first.prompt_ids) - 1 : -1]) < TOLERANCE


def test_a_prompt_can_be_made_once_and_run_often(model: Model) -> None:
    backend = Counter()
    runtime = model.open(backend=backend)
    prompt = runtime.prompt("Hi", media=[picture(28, 28)])
    texts = {runtime.generate(prompt, max_new_tokens=2).text for _ in range(3)}
    assert len(texts) == 1
    assert backend.encoded == 1


def test_raw_text_spells_its_own_placeholders(model: Model) -> None:
    runtime = model.open()
    prompt = runtime.prompt("a<|media_pad|>b", media=[picture(56, 28)], raw=True)
    assert runtime.files.tokenizer.decode(prompt.token_ids) == "a<|media_pad|><|media_pad|>b"
    with pytest.raises(InputError, match=r"expected 1 placeholders .* found 0"):
        runtime.prompt("ab", media=[picture(56, 28)], raw=True)


# The component and the cache.


def test_the_component_is_loaded_with_the_first_image(model: Model) -> None:
    backend = Counter()
    runtime = model.open(backend=backend)
    runtime.prefill([1, 2])
    assert "component vision" not in backend.loaded
    for seed in (0, 1):
        runtime.prefill([model.pad], media=[picture(28, 28, seed)])
    assert backend.loaded.count("component vision") == 1
    assert backend.encoded == 2


@pytest.mark.parametrize(("cache_bytes", "encoded"), [(2**20, 2), (0, 6)])
def test_an_image_that_was_seen_is_not_encoded_again(model: Model, cache_bytes: int, encoded: int) -> None:
    backend = Counter()
    runtime = model.open(backend=backend, media_cache_bytes=cache_bytes)
    logits = [runtime.prefill([model.pad], media=[picture(28, 28, seed)]) for seed in (0, 1, 0, 1, 0, 1)]
    assert backend.encoded == encoded
    assert np.array_equal(logits[0], logits[4])
    assert not np.array_equal(logits[0], logits[1])


def test_released_layers_let_go_of_vision_too(model: Model) -> None:
    runtime = model.open(media_cache_bytes=0)
    pixels = runtime.media.processor.image(picture(28, 28))
    before = runtime.encode_media(pixels.pixel_values, [pixels.grid])[0]
    runtime.runner.release_layers()
    assert np.array_equal(runtime.encode_media(pixels.pixel_values, [pixels.grid])[0], before)


# What is refused.


@pytest.mark.parametrize(
    ("ids", "pictures", "message"),
    [
        (["pad"], 2, "expected 2 placeholders"),
        (["pad", 1, "pad", 2, "pad"], 1, "expected 1 placeholders"),
        ([1, 2], 1, "found 0"),
        (["pad"], 0, "expected 0 placeholders"),
        ([1, "pad"], "one", "a list of images"),
        ([1, "pad"], "nothing known", "found object"),
        ([1, "pad"], "narrow", "embeddings: expected float32"),
    ],
)
def test_media_that_do_not_fit_the_tokens(model: Model, ids: list[Any], pictures: Any, message: str) -> None:
    runtime = model.open()
    special: dict[Any, Any] = {"one": picture(28, 28), "nothing known": [object()], "narrow": [np.ones((1, 3), "f4")]}
    media = special[pictures] if pictures in special else [picture(28, 28)] * pictures
    with pytest.raises(InputError, match=message):
        runtime.prefill([model.pad if token == "pad" else token for token in ids], media=media)


def test_a_batch_with_one_bad_image_appends_nothing(model: Model) -> None:
    runtime = model.open()
    (one, _), (two, _) = runtime.prefill_batch([[1, 2], [3]])
    with pytest.raises(InputError, match="expected an image"):
        runtime.extend_batch([(one, [4]), (two, [model.pad])], media=[None, [b"no image"]])
    with pytest.raises(InputError, match="expected 2 lists, one a sequence"):
        runtime.extend_batch([(one, [4]), (two, [model.pad])], media=[[picture(28, 28)]])
    assert (one.length, two.length) == (2, 1)
    assert relative_l2(runtime.extend_batch([(one, [4])])[0], model.logits([1, 2, 4])[-1:]) < TOLERANCE


def test_an_image_counts_in_the_context(model: Model) -> None:
    runtime = model.open(context=10)
    sixteen = picture(8 * 14, 8 * 14)
    with pytest.raises(InputError, match=r"at most 10 tokens .*found 17"):
        runtime.prefill([1, model.pad], media=[sixteen])
    with pytest.raises(InputError, match=r"context of 10, found 17"):
        list(runtime.stream([1, model.pad], media=[sixteen], max_new_tokens=1))
    assert runtime.prefill([1, model.pad], media=[picture(56, 56)]).shape[0] == 5


def test_a_text_that_spells_a_placeholder_is_counted(model: Model) -> None:
    runtime = model.open()
    with pytest.raises(InputError, match=r"A text that spells <\|media_pad\|> counts"):
        runtime.prompt("what is <|media_pad|>?", media=[picture(28, 28)])
    with pytest.raises(InputError, match=r"expected 0 video placeholders .* found 1"):
        runtime.prompt("<|kimi_k25_video_placeholder|>", media=[picture(28, 28)])


def test_a_model_without_vision(model: Model) -> None:
    runtime = model.open()
    manifest = runtime.files.manifest
    runtime.files.manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, vision=None))
    for call in (lambda: runtime.prefill([1], media=[picture(28, 28)]), lambda: runtime.encode_media([], [])):
        with pytest.raises(InputError, match="found text only"):
            call()
    assert runtime.prefill([1, model.pad]).shape[0] == 2


def test_a_bundle_without_the_component(model: Model) -> None:
    runtime = model.open()
    del runtime.runner._entries["vision"]
    with pytest.raises(BackendMissingError, match="vision component: export the checkpoint again"):
        runtime.prefill([model.pad], media=[picture(28, 28)])


def test_settings_of_another_model(model: Model, tmp_path: Path) -> None:
    import shutil

    bundle = Path(shutil.copytree(model.bundle, tmp_path / "bundle"))
    (bundle / "tokenizer" / "preprocessor_config.json").write_text('{"media_proc_cfg": {"patch_size": 16}}')
    with (
        Runtime.open(bundle, context=8, threads=1) as runtime,
        pytest.raises(InputError, match=r"patch_size: expected the model's 14, found 16"),
    ):
        runtime.prefill([model.pad], media=[picture(28, 28)])

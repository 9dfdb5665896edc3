"""The runtime for embedders: open a bundle, generate, or drive prefill and decode yourself.

Legend: T tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequence_
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from k25_export.manifest import Manifest, Precision
from k25_plugins.errors import BackendMissingError, InputError
from k25_plugins.native_library import Mode
from k25_runtime.backend import Backend
from k25_runtime.batch import Batch
from k25_runtime.block_allocator import BlockAllocator
from k25_runtime.bundle_files import BundleFiles
from k25_runtime.cache_sizes import cache_sizes
from k25_runtime.chunks import Chunk, Rows, logits_of_chunks, packed
from k25_runtime.generation import GeneratedToken, Generation, finish_reason, generated_tokens
from k25_runtime.mapped_checkpoint import MappedCheckpoint, checkpoint_folder
from k25_runtime.media import Media
from k25_runtime.media_processor import MediaList
from k25_runtime.model_runner import ModelRunner
from k25_runtime.prompts import Prompt, PromptBuilder
from k25_runtime.sampler import Sampler, SamplingConfig
from k25_runtime.sequence import Sequence

Float32 = npt.NDArray[np.float32]
BackendName = Literal["onnxruntime", "tensorrt"]

DEFAULT_MAX_BATCH_TOKENS = 512
DEFAULT_MEDIA_CACHE_BYTES = 2**28


class Runtime:
    """A model that can be run. Not safe for use from several threads at once.

    The single-sequence methods (`prefill`, `extend`, `decode`, `generate`) share one current sequence; the `_batch`
    forms take sequences from `prefill_batch` or `new_sequence`.
    """

    def __init__(
        self,
        *,
        files: BundleFiles,
        runner: ModelRunner,
        allocator: BlockAllocator,
        context: int,
        max_batch_tokens: int,
        media_cache_bytes: int = DEFAULT_MEDIA_CACHE_BYTES,
    ) -> None:
        self.files = files
        self.runner = runner
        self.context = context
        self._allocator = allocator
        self._max_batch_tokens = max_batch_tokens
        self._media_cache_bytes = media_cache_bytes
        self._to_close = ExitStack()
        self._current: Sequence | None = None
        self._sequences: WeakSet[Sequence] = WeakSet()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        checkpoint: str | Path | None = None,
        precision: Precision | None = None,
        mode: Mode = "fast",
        context: int | None = None,
        max_sequences: int | None = None,
        block_size: int | None = None,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        threads: int = 0,
        backend: Backend | BackendName = "onnxruntime",
        bind_layers: bool = True,
        media_cache_bytes: int = DEFAULT_MEDIA_CACHE_BYTES,
    ) -> Self:
        """Open a bundle and map its checkpoint.

        `context` is the number of tokens that a sequence may hold (default: the model's, at most 8192);
        the latent cache has room for `max_sequences` of them (default: 8, or as many as a compiled backend takes), and
        its memory is touched only as it is used.
        `mode` says whether native ops may use bf16 dot products (`fast`); the function bodies always compute in
        float32. With `bind_layers` false a layer's weights are bound when it is first run. `backend` "tensorrt" runs
        the bundle's engines on the GPU of this machine; an object is the caller's to close. `precision` and
        `block_size` are those of the backend (fp32 and 32 on a CPU) unless they are given. Embeddings of images that
        were seen are kept in at most `media_cache_bytes`. Raises `InputError` where bundle, checkpoint or sizes do not
        fit, `BackendMissingError` for a backend or precision that is not there.
        """
        if mode not in ("fast", "exact"):
            raise InputError(f"mode: expected 'fast' or 'exact', found {mode!r}")
        files = BundleFiles(Path(bundle))
        manifest = files.manifest
        with ExitStack() as opened:
            if isinstance(backend, str):
                backend = _opened_backend(backend, Path(bundle), precision, threads, mode)
                opened.callback(backend.close)
            sizes = cache_sizes(
                backend.limits,
                longest=manifest.model.text.max_position_embeddings,
                context=context,
                max_sequences=max_sequences,
                block_size=block_size,
                max_batch_tokens=max_batch_tokens,
            )
            folder = checkpoint_folder(Path(bundle), checkpoint)
            runner = ModelRunner(
                bundle=Path(bundle),
                manifest=manifest,
                checkpoint=MappedCheckpoint(manifest, folder),
                backend=backend,
                precision=precision or backend.default_precision,
                blocks=sizes.blocks,
                block_size=sizes.block_size,
                bind_layers=bind_layers,
            )
            to_close = opened.pop_all()
        allocator = BlockAllocator(blocks=sizes.blocks, block_size=sizes.block_size)
        runtime = cls(
            files=files,
            runner=runner,
            allocator=allocator,
            context=sizes.context,
            max_batch_tokens=max_batch_tokens,
            media_cache_bytes=media_cache_bytes,
        )
        runtime._to_close = to_close
        return runtime

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the current sequence, and what a GPU holds. Maps and sessions go with the object."""
        self._free_current()
        self._to_close.close()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.files.manifest

    # One sequence.

    def prefill(self, token_ids: Sequence_[int], media: MediaList | None = None, rows: Rows = "all") -> Float32:
        """Start a new sequence with these tokens, freeing the last one; logits float32 [T, V], or [1, V] for `last`.

        `media` are what stands at the placeholders among the tokens, in order: images (files, bytes, arrays), `Video`,
        prepared items or embeddings of `encode_media`; or (pixel_values, grid_thw) as it takes them. One placeholder
        becomes as many tokens as the item has, so T is the expanded length; ids that are expanded already are taken
        as they are.
        """
        chunk = self._checked_chunk(Sequence(), token_ids, media)
        self._free_current()
        sequence = self.new_sequence()
        logits = self._run_chunks([Chunk(sequence=sequence, tokens=chunk.tokens, media=chunk.media)], rows)[0]
        self._current = sequence
        return logits

    def extend(self, token_ids: Sequence_[int], rows: Rows = "all", media: MediaList | None = None) -> Float32:
        """Append tokens to the current sequence; logits float32 [T, V], or [1, V] for `last`."""
        return self.extend_batch([(self._require_current(), token_ids)], rows=rows, media=[media])[0]

    def decode(self, token_id: int) -> Float32:
        """Append one token to the current sequence; logits float32 [V]."""
        logits: Float32 = self.extend([token_id])[0]
        return logits

    # Several sequences.

    def new_sequence(self) -> Sequence:
        """An empty sequence of this runtime."""
        sequence = Sequence()
        self._sequences.add(sequence)
        return sequence

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's cache back."""
        self._checked_length(sequence)
        self._allocator.free(sequence)
        if sequence is self._current:
            self._current = None

    def prefill_batch(
        self,
        prompts: Sequence_[Sequence_[int]],
        rows: Rows = "all",
        media: Sequence_[MediaList | None] | None = None,
    ) -> list[tuple[Sequence, Float32]]:
        """Start a sequence for each prompt; (sequence, logits) of each. They stay until `free`.

        `media` holds, for each prompt, its media or None.
        """
        sequences = [self.new_sequence() for _ in prompts]
        logits = self.extend_batch(list(zip(sequences, prompts, strict=True)), rows=rows, media=media)
        return list(zip(sequences, logits, strict=True))

    def extend_batch(
        self,
        chunks: Sequence_[tuple[Sequence, Sequence_[int]]],
        rows: Rows = "all",
        media: Sequence_[MediaList | None] | None = None,
    ) -> list[Float32]:
        """Append tokens, and media among them, to several sequences of different lengths in one step; logits of each.

        Longer steps than `max_batch_tokens` are run in pieces. Nothing is appended where one chunk does not fit.
        """
        return self._run_chunks(self._checked_chunks(chunks, media), rows)

    def decode_batch(self, sequences: Sequence_[Sequence], token_ids: Sequence_[int]) -> Float32:
        """Append one token to each sequence; logits float32 [S, V]."""
        if len(sequences) != len(token_ids):
            raise InputError(f"decode: expected {len(sequences)} token ids, one a sequence, found {len(token_ids)}")
        chunks = [(sequence, [token]) for sequence, token in zip(sequences, token_ids, strict=True)]
        logits = self.extend_batch(chunks)
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def reserved_batch(
        self,
        chunks: Sequence_[tuple[Sequence, Sequence_[int]]],
        media: Sequence_[MediaList | None] | None = None,
    ) -> Batch:
        """Reserve cache for the next tokens of each sequence and pack them, for driving `runner` layer by layer."""
        checked = self._checked_chunks(chunks, media)
        self._reserve(checked)
        return packed(checked)

    # Images and video.

    @cached_property
    def media(self) -> Media:
        """What prepares and encodes media; raises for a model or bundle that takes none."""
        return Media(files=self.files, runner=self.runner, cache_bytes=self._media_cache_bytes)

    def encode_media(self, pixel_values: npt.ArrayLike, grid_thw: npt.ArrayLike) -> list[Float32]:
        """Embeddings float32 [tokens, hidden] of each media item.

        `pixel_values` [N, 3, P, P] are the normalised patches of all items, in the order frame, row, column, and
        `grid_thw` [n, 3] their frames, rows and columns of patches. An item has rows · columns / 4 tokens.
        """
        return self.media.encode(pixel_values, grid_thw)

    # Text.

    def generate(
        self,
        prompt: str | Prompt | None = None,
        *,
        token_ids: Sequence_[int] | None = None,
        media: MediaList | None = None,
        max_new_tokens: int = 64,
        sampling: SamplingConfig | None = None,
        ignore_eos: bool = False,
        thinking: bool = True,
        raw: bool = False,
        keep_logits: bool = False,
    ) -> Generation:
        """Generate from a prompt (through the chat template, unless `raw`) or from token ids as given.

        `media` come before the text in the user's message, or in the places of the placeholders among the ids. Greedy
        unless `sampling` has a temperature. `keep_logits` returns them with the result.
        """
        made = self.prompt(prompt, token_ids=token_ids, media=media, thinking=thinking, raw=raw)
        prompt_logits: list[Float32] = []
        tokens = list(
            self.stream(
                made,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                ignore_eos=ignore_eos,
                prompt_logits=prompt_logits if keep_logits else None,
            )
        )
        new_ids = [token.id for token in tokens]
        vocab = self.manifest.model.text.vocab_size
        steps = np.array([token.logits for token in tokens], np.float32).reshape(-1, vocab) if keep_logits else None
        return Generation(
            prompt_ids=made.token_ids,
            new_ids=new_ids,
            text="".join(token.text for token in tokens),
            finish_reason=finish_reason(new_ids, self.stop_ids(ignore_eos=ignore_eos)),
            prompt_logits=prompt_logits[0] if keep_logits else None,
            step_logits=steps,
        )

    def stream(
        self,
        prompt_ids: Sequence_[int] | Prompt,
        *,
        media: MediaList | None = None,
        max_new_tokens: int = 64,
        sampling: SamplingConfig | None = None,
        ignore_eos: bool = False,
        prompt_logits: list[Float32] | None = None,
    ) -> Iterator[GeneratedToken]:
        """Yield tokens as they are chosen. The prompt's logits [P, V] are appended to `prompt_logits`."""
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens: expected >= 0, found {max_new_tokens}")
        made = prompt_ids if isinstance(prompt_ids, Prompt) else self.prompt(token_ids=prompt_ids, media=media)
        if len(made.token_ids) + max_new_tokens > self.context:
            raise InputError(
                f"prompt: expected at most {self.context - max_new_tokens} tokens, to leave room for {max_new_tokens} "
                f"new ones in the context of {self.context}, found {len(made.token_ids)}. Shorten it, or raise the "
                "context."
            )
        logits = self.prefill(made.token_ids, made.media or None, rows="last" if prompt_logits is None else "all")
        if prompt_logits is not None:
            prompt_logits.append(logits)
        sequence = self._require_current()
        stop_ids = self.stop_ids(ignore_eos=ignore_eos)
        decoder = self.files.tokenizer.decode_stream() if self.files.has_tokenizer else None
        for token_id, chosen_from, is_last in generated_tokens(
            lambda token: self.extend_batch([(sequence, [token])])[0][0],
            logits[-1],
            sampler=Sampler(sampling or SamplingConfig()),
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
        ):
            text = decoder.push(token_id) if decoder is not None and token_id not in stop_ids else ""
            if decoder is not None and is_last:
                text += decoder.flush()
            yield GeneratedToken(id=token_id, text=text, logits=chosen_from)

    @cached_property
    def _prompts(self) -> PromptBuilder:
        return PromptBuilder(self.files, lambda: self.media)

    def prompt(
        self,
        prompt: str | Prompt | None = None,
        *,
        token_ids: Sequence_[int] | None = None,
        media: MediaList | None = None,
        thinking: bool = True,
        raw: bool = False,
    ) -> Prompt:
        """A prompt from a text (through the chat template as a user's message, or `raw`) or from ids, with media.

        Ids are taken as given, but that placeholders of media become as many as these have tokens.
        """
        if (prompt is None) == (token_ids is None):
            raise InputError("prompt: expected either a text or token ids, found both or neither")
        if isinstance(prompt, Prompt):
            return prompt if media is None else self._prompts.from_token_ids(prompt.token_ids, media)
        if token_ids is not None:
            return self._prompts.from_token_ids(token_ids, media)
        assert prompt is not None
        return self._prompts.from_text(prompt, media, thinking=thinking, raw=raw)

    def chat_prompt(
        self,
        messages: Sequence_[Mapping[str, Any]],
        *,
        tools: Sequence_[Mapping[str, Any]] | None = None,
        thinking: bool = True,
    ) -> Prompt:
        """A conversation with its images and videos, rendered by the checkpoint's chat template.

        Media stand in the parts of messages: `{"type": "image", "image": "cat.png"}`, `{"type": "video", "video":
        "frames/", "fps": 24}`. Pass the result to `generate` or `stream`.
        """
        return self._prompts.from_messages(messages, tools=tools, thinking=thinking)

    def prompt_ids(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence_[int] | None = None,
        thinking: bool = True,
        raw: bool = False,
    ) -> list[int]:
        """Token ids of a prompt without media: see `prompt`."""
        return self.prompt(prompt, token_ids=token_ids, thinking=thinking, raw=raw).token_ids

    def chat_ids(
        self,
        messages: Sequence_[Mapping[str, Any]],
        *,
        tools: Sequence_[Mapping[str, Any]] | None = None,
        thinking: bool = True,
    ) -> list[int]:
        """The token ids of a conversation: see `chat_prompt`."""
        return self.chat_prompt(messages, tools=tools, thinking=thinking).token_ids

    def stop_ids(self, *, ignore_eos: bool = False) -> frozenset[int]:
        """Ids that end a generation; none with `ignore_eos`."""
        return frozenset() if ignore_eos else self.files.stop_ids

    # Inside.

    def _run_chunks(self, chunks: list[Chunk], rows: Rows) -> list[Float32]:
        if rows not in ("all", "last"):
            raise InputError(f"rows: expected 'all' or 'last', found {rows!r}")
        self._reserve(chunks)
        return logits_of_chunks(self.runner, chunks, rows=rows, max_batch_tokens=self._max_batch_tokens)

    def _reserve(self, chunks: list[Chunk]) -> None:
        self._allocator.reserve([(chunk.sequence, len(chunk.tokens)) for chunk in chunks])

    def _checked_chunks(
        self, chunks: Sequence_[tuple[Sequence, Sequence_[int]]], media: Sequence_[MediaList | None] | None = None
    ) -> list[Chunk]:
        if not chunks:
            raise InputError("batch: expected at least one sequence, found none")
        if len({id(sequence) for sequence, _ in chunks}) != len(chunks):
            raise InputError("batch: expected each sequence once, found one of them twice")
        if media is not None and len(media) != len(chunks):
            raise InputError(f"media: expected {len(chunks)} lists, one a sequence (or None), found {len(media)}")
        for sequence, _ in chunks:
            self._checked_length(sequence)
        return [
            self._checked_chunk(sequence, tokens, found)
            for (sequence, tokens), found in zip(chunks, media or [None] * len(chunks), strict=True)
        ]

    def _checked_chunk(self, sequence: Sequence, token_ids: Sequence_[int], media: MediaList | None) -> Chunk:
        """The tokens with room for the media, and these, encoded, in their places."""
        if media is None:
            return Chunk(sequence=sequence, tokens=self._checked_tokens(token_ids, cached=sequence.length))
        items = self.media.items(media)
        tokens, positions = self.media.expanded(self._checked_tokens(token_ids, cached=sequence.length), items)
        tokens = self._checked_tokens(tokens, cached=sequence.length)
        return Chunk(sequence=sequence, tokens=tokens, media=self.media.placed(items, positions))

    def _checked_tokens(self, token_ids: Sequence_[int], *, cached: int) -> list[int]:
        try:
            tokens = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise InputError(f"tokens: expected integers, found {token_ids!r:.60}") from error
        vocab = self.manifest.model.text.vocab_size
        if not tokens:
            raise InputError("tokens: expected at least one token id, found none")
        for position, token in enumerate(tokens):
            if not 0 <= token < vocab:
                raise InputError(f"tokens: position {position}: expected an id in 0..{vocab - 1}, found {token}")
        if cached + len(tokens) > self.context:
            raise InputError(
                f"tokens: expected at most {self.context} tokens in a sequence (the context), "
                f"found {cached + len(tokens)}. Shorten the prompt, or raise the context."
            )
        return tokens

    def _checked_length(self, sequence: Sequence) -> int:
        if sequence not in self._sequences:
            raise InputError("sequence: expected one of this runtime, found another's")
        if not sequence.is_open:
            raise InputError("sequence: expected one that is in use, found one that was freed")
        return sequence.length

    def _require_current(self) -> Sequence:
        if self._current is None:
            raise InputError("sequence: expected a prefill before extend or decode, found none")
        return self._current

    def _free_current(self) -> None:
        if self._current is not None:
            self.free(self._current)


def _opened_backend(name: str, bundle: Path, precision: Precision | None, threads: int, mode: Mode) -> Backend:
    if name not in get_args(BackendName):
        raise InputError(f"backend: expected {' or '.join(get_args(BackendName))}, found {name!r}")
    if precision is not None and precision not in get_args(Precision):
        raise InputError(f"precision: expected {' or '.join(get_args(Precision))}, found {precision!r}")
    if name == "tensorrt":
        from k25_runtime.engine_opening import engine_backend_from_bundle

        return engine_backend_from_bundle(bundle)
    if precision == "bf16":
        raise BackendMissingError(
            f"precision {precision}: ONNX Runtime's CPU provider has no bf16 MatMul. Use fp32 here; bf16 components "
            "are for TensorRT and CUDA."
        )
    from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu

    return OnnxRuntimeCpu(threads=threads, mode=mode)

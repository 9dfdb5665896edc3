"""The runtime for embedders: open a bundle, generate, or drive prefill and decode yourself.

Legend: T tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Sequence_
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from k25_export.manifest import Manifest, Precision
from k25_plugins.errors import BackendMissingError, InputError
from k25_runtime.backend import Backend
from k25_runtime.batch import Batch, batch_from_chunks
from k25_runtime.block_allocator import BlockAllocator
from k25_runtime.bundle_files import BundleFiles
from k25_runtime.generation import GeneratedToken, Generation, finish_reason, generated_tokens
from k25_runtime.mapped_checkpoint import MappedCheckpoint, checkpoint_folder
from k25_runtime.model_runner import ModelRunner
from k25_runtime.sampler import Sampler, SamplingConfig
from k25_runtime.sequence import Sequence

Float32 = npt.NDArray[np.float32]
Rows = Literal["all", "last"]
Mode = Literal["fast", "exact"]

DEFAULT_CONTEXT = 8192
DEFAULT_MAX_SEQUENCES = 8
DEFAULT_BLOCK_SIZE = 32
DEFAULT_MAX_BATCH_TOKENS = 512


class Runtime:
    """A model that can be run. Not safe for use from several threads at once.

    The single-sequence methods (`prefill`, `extend`, `decode`, `generate`) share one current sequence; the `_batch`
    forms take sequences from `prefill_batch` or `new_sequence`.
    """

    def __init__(
        self, *, files: BundleFiles, runner: ModelRunner, allocator: BlockAllocator, context: int, max_batch_tokens: int
    ) -> None:
        self.files = files
        self.runner = runner
        self.context = context
        self._allocator = allocator
        self._max_batch_tokens = max_batch_tokens
        self._current: Sequence | None = None
        self._sequences: WeakSet[Sequence] = WeakSet()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        checkpoint: str | Path | None = None,
        precision: Precision = "fp32",
        mode: Mode = "fast",
        context: int | None = None,
        max_sequences: int = DEFAULT_MAX_SEQUENCES,
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        threads: int = 0,
        backend: Backend | None = None,
        bind_layers: bool = True,
    ) -> Self:
        """Open a bundle and map its checkpoint.

        `context` is the number of tokens that a sequence may hold (default: the model's, at most 8192);
        the latent cache has room for `max_sequences` of them, and its memory is touched only as it is used.
        `mode` says whether native ops may use bf16 dot products (`fast`); the function bodies always compute in
        float32. With `bind_layers` false a layer's weights are bound when it is first run. Raises `InputError` where
        bundle or checkpoint do not fit, `BackendMissingError` for a precision that the CPU backend has no kernels for.
        """
        if mode not in ("fast", "exact"):
            raise InputError(f"mode: expected 'fast' or 'exact', found {mode!r}")
        files = BundleFiles(Path(bundle))
        manifest = files.manifest
        if backend is None:
            backend = _cpu_backend(precision, threads)
        limit = manifest.model.text.max_position_embeddings
        context = min(limit, DEFAULT_CONTEXT) if context is None else context
        _require_positive(
            context=context, max_sequences=max_sequences, block_size=block_size, max_batch_tokens=max_batch_tokens
        )
        if context > limit:
            raise InputError(f"context: expected at most {limit}, the model's max_position_embeddings, found {context}")
        blocks = max_sequences * -(-context // block_size)
        folder = checkpoint_folder(Path(bundle), checkpoint)
        runner = ModelRunner(
            bundle=Path(bundle),
            manifest=manifest,
            checkpoint=MappedCheckpoint(manifest, folder),
            backend=backend,
            precision=precision,
            blocks=blocks,
            block_size=block_size,
            bind_layers=bind_layers,
        )
        allocator = BlockAllocator(blocks=blocks, block_size=block_size)
        return cls(files=files, runner=runner, allocator=allocator, context=context, max_batch_tokens=max_batch_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the current sequence. Maps and sessions go with the object."""
        self._free_current()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.files.manifest

    # One sequence.

    def prefill(self, token_ids: Sequence_[int], media: Any = None, rows: Rows = "all") -> Float32:
        """Start a new sequence with these tokens, freeing the last one; logits float32 [T, V], or [1, V] for `last`."""
        if media is not None:
            raise BackendMissingError("media: the vision component is not there yet; only text can be run")
        tokens = self._checked_tokens(token_ids, cached=0)
        self._free_current()
        sequence = self.new_sequence()
        logits = self.extend_batch([(sequence, tokens)], rows=rows)[0]
        self._current = sequence
        return logits

    def extend(self, token_ids: Sequence_[int], rows: Rows = "all") -> Float32:
        """Append tokens to the current sequence; logits float32 [T, V], or [1, V] for `last`."""
        return self.extend_batch([(self._require_current(), token_ids)], rows=rows)[0]

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

    def prefill_batch(self, prompts: Sequence_[Sequence_[int]], rows: Rows = "all") -> list[tuple[Sequence, Float32]]:
        """Start a sequence for each prompt; (sequence, logits) of each. They stay until `free`."""
        sequences = [self.new_sequence() for _ in prompts]
        logits = self.extend_batch(list(zip(sequences, prompts, strict=True)), rows=rows)
        return list(zip(sequences, logits, strict=True))

    def extend_batch(self, chunks: Sequence_[tuple[Sequence, Sequence_[int]]], rows: Rows = "all") -> list[Float32]:
        """Append tokens to several sequences of different lengths in one step; the logits of each.

        Longer steps than `max_batch_tokens` are run in pieces. Nothing is appended where one chunk does not fit.
        """
        if rows not in ("all", "last"):
            raise InputError(f"rows: expected 'all' or 'last', found {rows!r}")
        checked = self._checked_chunks(chunks)
        self._allocator.reserve([(sequence, len(tokens)) for sequence, tokens in checked])
        found: list[list[Float32]] = [[] for _ in checked]
        taken = [0] * len(checked)
        while piece := self._next_piece(checked, taken):
            self._run_piece(checked, piece, taken, rows, found)
        return [np.concatenate(parts) for parts in found]

    def decode_batch(self, sequences: Sequence_[Sequence], token_ids: Sequence_[int]) -> Float32:
        """Append one token to each sequence; logits float32 [S, V]."""
        if len(sequences) != len(token_ids):
            raise InputError(f"decode: expected {len(sequences)} token ids, one a sequence, found {len(token_ids)}")
        chunks = [(sequence, [token]) for sequence, token in zip(sequences, token_ids, strict=True)]
        return np.concatenate(self.extend_batch(chunks))

    def reserved_batch(self, chunks: Sequence_[tuple[Sequence, Sequence_[int]]]) -> Batch:
        """Reserve cache for the next tokens of each sequence and pack them, for driving `runner` layer by layer."""
        checked = self._checked_chunks(chunks)
        self._allocator.reserve([(sequence, len(tokens)) for sequence, tokens in checked])
        return batch_from_chunks(checked)

    # Text.

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence_[int] | None = None,
        max_new_tokens: int = 64,
        sampling: SamplingConfig | None = None,
        ignore_eos: bool = False,
        thinking: bool = True,
        raw: bool = False,
        keep_logits: bool = False,
    ) -> Generation:
        """Generate from a prompt (through the chat template, unless `raw`) or from token ids as given.

        Greedy unless `sampling` has a temperature. `keep_logits` returns them with the result.
        """
        prompt_ids = self.prompt_ids(prompt, token_ids=token_ids, thinking=thinking, raw=raw)
        prompt_logits: list[Float32] = []
        tokens = list(
            self.stream(
                prompt_ids,
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
            prompt_ids=prompt_ids,
            new_ids=new_ids,
            text="".join(token.text for token in tokens),
            finish_reason=finish_reason(new_ids, self.stop_ids(ignore_eos=ignore_eos)),
            prompt_logits=prompt_logits[0] if keep_logits else None,
            step_logits=steps,
        )

    def stream(
        self,
        prompt_ids: Sequence_[int],
        *,
        max_new_tokens: int = 64,
        sampling: SamplingConfig | None = None,
        ignore_eos: bool = False,
        prompt_logits: list[Float32] | None = None,
    ) -> Iterator[GeneratedToken]:
        """Yield tokens as they are chosen. The prompt's logits [P, V] are appended to `prompt_logits`."""
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens: expected >= 0, found {max_new_tokens}")
        if len(prompt_ids) + max_new_tokens > self.context:
            raise InputError(
                f"prompt: expected at most {self.context - max_new_tokens} tokens, to leave room for {max_new_tokens} "
                f"new ones in the context of {self.context}, found {len(prompt_ids)}. Shorten it, or raise the context."
            )
        logits = self.prefill(prompt_ids, rows="last" if prompt_logits is None else "all")
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

    def prompt_ids(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence_[int] | None = None,
        thinking: bool = True,
        raw: bool = False,
    ) -> list[int]:
        """Token ids of a prompt: through the chat template as a user's message, or `raw`; ids are taken as given."""
        if (prompt is None) == (token_ids is None):
            raise InputError("prompt: expected either a text or token ids, found both or neither")
        if token_ids is not None:
            return list(token_ids)
        assert prompt is not None
        if raw:
            return self.files.tokenizer.encode(prompt)
        return self.chat_ids([{"role": "user", "content": prompt}], thinking=thinking)

    def chat_ids(
        self,
        messages: Sequence_[Mapping[str, Any]],
        *,
        tools: Sequence_[Mapping[str, Any]] | None = None,
        thinking: bool = True,
    ) -> list[int]:
        """The token ids of a conversation, rendered by the checkpoint's chat template."""
        from k25_runtime.chat_template import chat_template_from_folder, render_chat

        template = chat_template_from_folder(self.files.tokenizer_folder)
        return self.files.tokenizer.encode(render_chat(template, messages, tools=tools, thinking=thinking))

    # Inside.

    def _next_piece(self, chunks: Sequence_[tuple[Sequence, list[int]]], taken: list[int]) -> list[tuple[int, int]]:
        """(chunk, tokens) of the next step: as many as `max_batch_tokens` allow, first come first served."""
        room = self._max_batch_tokens
        piece = []
        for index, (_, tokens) in enumerate(chunks):
            count = min(room, len(tokens) - taken[index])
            if count:
                piece.append((index, count))
                room -= count
        return piece

    def _run_piece(
        self,
        chunks: Sequence_[tuple[Sequence, list[int]]],
        piece: list[tuple[int, int]],
        taken: list[int],
        rows: Rows,
        found: list[list[Float32]],
    ) -> None:
        parts = [(chunks[index][0], chunks[index][1][taken[index] : taken[index] + count]) for index, count in piece]
        batch = batch_from_chunks(parts)
        wanted: list[tuple[int, range]] = []
        start = 0
        for index, count in piece:
            taken[index] += count
            is_end = taken[index] == len(chunks[index][1])
            first = start if rows == "all" else start + count - 1 if is_end else start + count
            wanted.append((index, range(first, start + count)))
            start += count
        rows_wanted = np.array([row for _, span in wanted for row in span], np.int32)
        logits = self.runner.run(batch, rows_wanted)
        for sequence, tokens in parts:
            sequence.length += len(tokens)
        offset = 0
        for index, span in wanted:
            if len(span):
                found[index].append(logits[offset : offset + len(span)])
                offset += len(span)

    def stop_ids(self, *, ignore_eos: bool = False) -> frozenset[int]:
        """Ids that end a generation; none with `ignore_eos`."""
        return frozenset() if ignore_eos else self.files.stop_ids

    def _checked_chunks(self, chunks: Sequence_[tuple[Sequence, Sequence_[int]]]) -> list[tuple[Sequence, list[int]]]:
        if not chunks:
            raise InputError("batch: expected at least one sequence, found none")
        if len({id(sequence) for sequence, _ in chunks}) != len(chunks):
            raise InputError("batch: expected each sequence once, found one of them twice")
        return [
            (sequence, self._checked_tokens(tokens, cached=self._checked_length(sequence)))
            for sequence, tokens in chunks
        ]

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


def _cpu_backend(precision: Precision, threads: int) -> Backend:
    if precision not in get_args(Precision):
        raise InputError(f"precision: expected {' or '.join(get_args(Precision))}, found {precision!r}")
    if precision != "fp32":
        raise BackendMissingError(
            f"precision {precision}: ONNX Runtime's CPU provider has no bf16 MatMul. Use fp32 here; bf16 components "
            "are for TensorRT and CUDA."
        )
    from k25_runtime.onnxruntime_cpu import OnnxRuntimeCpu

    return OnnxRuntimeCpu(threads=threads)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}")

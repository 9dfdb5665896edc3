"""The small files of a demo checkpoint: tokenizer, chat template, generation and preprocessing settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from k25_export.demo.bpe_training import tiktoken_lines, train_byte_pairs
from k25_export.demo.official_config import PATCH_SIZE
from k25_export.demo.special_tokens import BOS, EOS, IM_END, PAD, SPECIAL_ID_COUNT, SPECIAL_TOKENS, UNK, special_id
from k25_export.demo.training_words import training_words

# Offsets of what a reader of the answer wants to see: thinking and tool calls are not stripped from decoded text.
_VISIBLE_OFFSETS = frozenset({11, 12, 13, 14, 15, 22, 23})


def small_files(*, vocab_size: int, context_length: int, words: Mapping[bytes, int] | None = None) -> dict[str, bytes]:
    """File name → content, everything beside `config.json`, the shards and their index.

    The same for every seed of the weights. `words`, weighted, are what the tokenizer is made from (None: those of
    `training_words`).
    """
    ranks = vocab_size - SPECIAL_ID_COUNT
    words = training_words(ranks) if words is None else words
    template = resources.files(__package__).joinpath("chat_template.jinja").read_text("utf-8")
    return {
        "tiktoken.model": tiktoken_lines(train_byte_pairs(words, ranks)),
        "tokenizer_config.json": json_bytes(_tokenizer_config(vocab_size, context_length)),
        "chat_template.jinja": template.encode(),
        "generation_config.json": json_bytes(_generation_config(vocab_size)),
        "preprocessor_config.json": json_bytes(_preprocessor_config()),
    }


def json_bytes(value: object) -> bytes:
    """JSON as the official files have it: two spaces, UTF-8, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer_config(vocab_size: int, context_length: int) -> dict[str, Any]:
    return {
        "added_tokens_decoder": {
            str(special_id(vocab_size, offset)): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": offset not in _VISIBLE_OFFSETS,
            }
            for offset, text in SPECIAL_TOKENS.items()
        },
        "additional_special_tokens": [
            text for offset, text in SPECIAL_TOKENS.items() if offset not in _VISIBLE_OFFSETS | {BOS, EOS, UNK, PAD}
        ],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": SPECIAL_TOKENS[BOS],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[EOS],
        "model_max_length": context_length,
        "pad_token": SPECIAL_TOKENS[PAD],
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": SPECIAL_TOKENS[UNK],
    }


def _generation_config(vocab_size: int) -> dict[str, Any]:
    return {
        "bos_token_id": special_id(vocab_size, BOS),
        "do_sample": True,
        "eos_token_id": [special_id(vocab_size, IM_END), special_id(vocab_size, EOS)],
        "pad_token_id": special_id(vocab_size, PAD),
        "temperature": 1.0,
        "top_p": 0.95,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor",
            "AutoProcessor": "kimi_k25_processor.KimiK25Processor",
        },
        "media_proc_cfg": {
            "fixed_output_tokens": None,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "in_patch_limit": 16384,
            "in_patch_limit_each_frame": 4096,
            "in_patch_limit_video": None,
            "max_num_frames_each_video": None,
            "merge_kernel_size": 2,
            "patch_limit_on_one_side": 512,
            "patch_size": PATCH_SIZE,
            "sample_fps": 2.0,
            "temporal_merge_kernel_size": 4,
            "timestamp_mode": "hh:mm:ss.fff",
        },
    }

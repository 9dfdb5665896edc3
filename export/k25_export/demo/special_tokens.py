"""The 256 special ids that follow the byte-pair ranks, as Kimi K2.5 assigns them.

An id is `vocab_size - 256 + offset`. Offsets without a name are reserved.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SPECIAL_ID_COUNT = 256

BOS, EOS, IM_END, MEDIA_PAD, UNK, PAD = 0, 1, 2, 21, 254, 255

SPECIAL_TOKENS: Mapping[int, str] = MappingProxyType(
    {
        BOS: "[BOS]",
        EOS: "[EOS]",
        IM_END: "<|im_end|>",
        3: "<|im_user|>",
        4: "<|im_assistant|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "[EOT]",
        10: "<|im_system|>",
        11: "<|tool_calls_section_begin|>",
        12: "<|tool_calls_section_end|>",
        13: "<|tool_call_begin|>",
        14: "<|tool_call_argument_begin|>",
        15: "<|tool_call_end|>",
        17: "<|im_middle|>",
        18: "<|media_begin|>",
        19: "<|media_content|>",
        20: "<|media_end|>",
        MEDIA_PAD: "<|media_pad|>",
        22: "<think>",
        23: "</think>",
        UNK: "[UNK]",
        PAD: "[PAD]",
    }
)


def special_id(vocab_size: int, offset: int) -> int:
    """The token id of a special offset 0..255."""
    return vocab_size - SPECIAL_ID_COUNT + offset

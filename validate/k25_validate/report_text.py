"""Text of strangers (prompts, tokens, names of files) as it may stand in a report: visible, and never an
instruction.
"""

from __future__ import annotations

import unicodedata

_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """The text with every control, format (such as bidi overrides), private and unassigned character spelled out.

    What is left is legal in HTML and XML once it is escaped, and shows in the order it is written in.
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) not in _HIDDEN or character == "\u200d":  # the joiner of emoji
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:x}}}"

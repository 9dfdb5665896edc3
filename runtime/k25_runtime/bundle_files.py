"""A bundle folder, opened: its manifest, its tokenizer and the ids that end a generation."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from k25_export.manifest import TOKENIZER_FOLDER, Manifest, read_manifest
from k25_plugins.errors import InputError

if TYPE_CHECKING:
    from k25_runtime.tokenizer import Tokenizer

END_OF_TURN = "<|im_end|>"


class BundleFiles:
    """What a runtime reads of a bundle besides graphs and weights. The tokenizer is loaded when first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)

    @property
    def tokenizer_folder(self) -> Path:
        """`tokenizer/` of the bundle."""
        return self.folder / TOKENIZER_FOLDER

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; `InputError` where the bundle has none."""
        from k25_runtime.tokenizer import Tokenizer

        if not (self.tokenizer_folder / "tiktoken.model").is_file():
            raise InputError(
                f"bundle {self.folder}: tokenizer/tiktoken.model: expected the checkpoint's tokenizer, found none. "
                "Give token ids instead of text."
            )
        return Tokenizer.from_folder(self.tokenizer_folder, vocab_size=self.manifest.model.text.vocab_size)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be encoded and decoded."""
        return (self.tokenizer_folder / "tiktoken.model").is_file()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: the configuration's, the generation configuration's, and `<|im_end|>`."""
        ids = {self.manifest.model.text.eos_token_id, *self._generation_stop_ids()}
        if self.has_tokenizer and END_OF_TURN in self.tokenizer.special_ids:
            ids.add(self.tokenizer.special_ids[END_OF_TURN])
        return frozenset(ids)

    def _generation_stop_ids(self) -> list[int]:
        path = self.tokenizer_folder / "generation_config.json"
        if not path.is_file():
            return []
        try:
            found = json.loads(path.read_bytes()).get("eos_token_id", [])
        except (ValueError, AttributeError, OSError) as error:
            raise InputError(f"{path}: expected a JSON object, found {error}") from error
        ids = found if isinstance(found, list) else [] if found is None else [found]  # null means unset
        if not all(type(item) is int for item in ids):
            raise InputError(f"{path}: eos_token_id: expected integers, found {ids}")
        return ids

"""A text, a conversation or token ids, with images and video, as the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from k25_plugins.errors import InputError, mismatch
from k25_runtime.bundle_files import BundleFiles
from k25_runtime.media import Item, Media
from k25_runtime.media_item import MediaItem
from k25_runtime.media_processor import MediaList, MediaSource, PreparedMedia
from k25_runtime.video_frames import Video

#: What the chat template writes for a video; the chunks of its frames come in its place.
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"

_MEDIA_TYPES = ("image", "image_url", "video", "video_url")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`token_ids` with room for the media among them, and these, in order."""

    token_ids: list[int]
    media: list[Item] = field(default_factory=list, repr=False)


class PromptBuilder:
    """Makes prompts with a bundle's tokenizer and chat template. `media` gives what prepares images, when needed."""

    def __init__(self, files: BundleFiles, media: Callable[[], Media]) -> None:
        self._files = files
        self._media = media

    def from_token_ids(self, token_ids: Sequence[int], media: MediaList | None) -> Prompt:
        """Ids as they are given; placeholders are expanded where there are media."""
        if media is None:
            return Prompt(token_ids=list(token_ids))
        items = self._media().items(media)
        return Prompt(token_ids=self._media().expanded(token_ids, items)[0], media=items)

    def from_text(self, text: str, media: MediaList | None, *, thinking: bool = True, raw: bool = False) -> Prompt:
        """A user's message, media first; with `raw` the text as it is, which then spells the placeholders itself."""
        if raw:
            return self.from_token_ids(self._files.tokenizer.encode(text), media)
        if media is None:
            return self.from_messages([{"role": "user", "content": text}], thinking=thinking)
        prepared = self._media().prepared(media)
        content = [*({"type": source.kind} for source in prepared), {"type": "text", "text": text}]
        return self._from_chat([{"role": "user", "content": content}], prepared, thinking=thinking)

    def from_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
    ) -> Prompt:
        """A conversation. Its media are in the parts: `{"type": "image", "image": SOURCE}`, `{"type": "video",
        "video": SOURCE}`, or in OpenAI's form `{"type": "image_url", "image_url": {"url": "data:..." or a path}}`.
        """
        sources = [source for message in messages for source in _sources_of(message)]
        prepared = self._media().prepared(sources) if sources else []
        return self._from_chat(messages, prepared, tools=tools, thinking=thinking)

    def _from_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        prepared: Sequence[PreparedMedia],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool,
    ) -> Prompt:
        from k25_runtime.chat_template import chat_template_from_folder, render_chat

        template = chat_template_from_folder(self._files.tokenizer_folder)
        text = render_chat(template, messages, tools=tools, thinking=thinking)
        if not prepared:
            return Prompt(token_ids=self._files.tokenizer.encode(text))
        ids = self._files.tokenizer.encode(_with_chunks(text, [item for item in prepared if item.kind == "video"]))
        items = [item for source in prepared for item in source.items]
        return Prompt(token_ids=self._media().expanded(ids, items)[0], media=items)


def _sources_of(message: Mapping[str, Any]) -> list[MediaSource]:
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return []
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") in _MEDIA_TYPES]
    return [source for part in parts if (source := _source_of(part)) is not None]


def _source_of(part: Mapping[str, Any]) -> MediaSource | None:
    """The source of a media part; None for a bare part, which stands in the text alone."""
    kind = part["type"]
    found = part.get(kind, part.get(kind.removesuffix("_url")))
    if isinstance(found, Mapping):
        found = found.get("url")
    if found is None and len(part) > 1:
        raise mismatch(f"message part {kind}", expected=f"a key {kind!r} with the source", found=", ".join(part))
    if found is not None and kind.startswith("video") and not isinstance(found, Video | MediaItem):
        return Video(source=found, fps=part.get("fps"))
    source: MediaSource | None = found
    return source


def _with_chunks(text: str, videos: Sequence[PreparedMedia]) -> str:
    """The rendered text with the chunks of each video in the place of its placeholder."""
    pieces = text.split(VIDEO_PLACEHOLDER)
    if len(pieces) - 1 != len(videos):
        raise InputError(
            f"media: expected {len(videos)} video placeholders in the rendered chat, found {len(pieces) - 1}. A text "
            f"that spells {VIDEO_PLACEHOLDER} counts, too."
        )
    chunks = ["".join(_chunk_text(item) for item in video.items) for video in videos]
    return "".join(piece + chunk for piece, chunk in zip(pieces, [*chunks, ""], strict=True))


def _chunk_text(item: Item) -> str:
    timestamp = item.timestamp if isinstance(item, MediaItem) else ""
    return f"{timestamp}<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"

"""The manifest of a bundle: the contract between the stages (`docs/bundle-format.md`). Standard library only."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as _MISSING
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from k25_export.config import ModelConfig
from k25_plugins import signatures
from k25_plugins.errors import InputError, mismatch

FORMAT = "k25-bundle"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
LOCATION_FORMAT = "k25-checkpoint-location"
LOCATION_NAME = "checkpoint.json"
TOKENIZER_FOLDER = "tokenizer"
REPORTS_FOLDER = "reports"
COMPONENTS_FOLDER = "components"

#: Bytes of one element of each safetensors dtype that a Kimi K2.5 checkpoint uses.
STORED_ITEM_SIZES: Mapping[str, int] = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}

#: Inputs that the caller of a component gives; every other input is bound to the checkpoint.
ACTIVATIONS = frozenset(
    (
        *("token_ids", "hidden", "cache", "positions", "query_start", "block_table", "residual_share", "rows"),
        *("pixel_values", "position_embedding", "rope_cos", "rope_sin", "merge_index"),
    )
)

_KEPT_NULLS = ("layers", "vision", "media_placeholder_token_id")

Precision = Literal["fp32", "bf16"]
Rule = Literal["slice", "region", "offsets"]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One safetensors file: `data_start` is 8 + the header's length, the hash covers those first bytes."""

    file: str
    bytes: int
    data_start: int
    header_sha256: str


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of the checkpoint; `offset` counts from the start of the shard's file, `length` is in bytes."""

    name: str
    shard: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors of one shard that differ only in `{expert}` and offset, or a single tensor (`offset`)."""

    name: str
    shard: int
    dtype: str
    shape: tuple[int, ...]
    length: int
    offset: int | None = None
    offsets: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None

    def members(self) -> Iterator[Tensor]:
        """Every tensor of the group, in the order of `offsets`."""
        for expert, offset in self.numbered_offsets():
            yield Tensor(
                name=self.name.replace("{expert}", str(expert)),
                shard=self.shard,
                dtype=self.dtype,
                shape=self.shape,
                offset=offset,
                length=self.length,
            )

    def numbered_offsets(self) -> Iterator[tuple[int, int]]:
        """(expert, offset) of each member; a single tensor counts as expert 0."""
        if self.offsets is None:
            assert self.offset is not None
            yield 0, self.offset
        else:
            numbers: Sequence[int] = range(len(self.offsets)) if self.experts is None else self.experts
            yield from zip(numbers, self.offsets, strict=True)


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph; an axis is a size or a symbolic name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Binding:
    """Where the bytes of a weight input come from: one tensor as it is, or one named rule."""

    tensor: str | None = None
    rule: Rule | None = None
    axis: int | None = None
    start: int | None = None
    stop: int | None = None
    tensors: tuple[str, ...] | None = None
    row_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ComponentFile:
    """One graph of a component, in one precision."""

    precision: Precision
    path: str
    bytes: int
    sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """A kind of component: its graphs and the weights that its instances bind."""

    name: str
    layers: tuple[int, ...] | None
    files: tuple[ComponentFile, ...]
    bindings: dict[str, Binding]

    def file(self, precision: str) -> ComponentFile:
        """The graph in this precision, or `InputError`."""
        for entry in self.files:
            if entry.precision == precision:
                return entry
        have = ", ".join(entry.precision for entry in self.files)
        raise mismatch(f"bundle: component {self.name}", expected=f"a {precision} graph", found=have)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the bundle with its hash."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`, but for the constants `format`, `schema_version` and `ops`.

    `content_sha256` is over all the rest (`content_hash`): it finds a manifest that was changed by hand.
    """

    inputs_sha256: str
    options: dict[str, Any]
    versions: dict[str, str]
    model: ModelConfig
    shards: tuple[ShardEntry, ...]
    tensors: tuple[TensorGroup, ...]
    components: tuple[ComponentEntry, ...]
    tokenizer: tuple[FileEntry, ...]
    content_sha256: str = ""

    def component(self, name: str) -> ComponentEntry:
        """The component of this name, or `InputError`."""
        for entry in self.components:
            if entry.name == name:
                return entry
        raise mismatch("bundle", expected=f"a component {name}", found=[entry.name for entry in self.components])


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`: sorted by meaning, one shard, tensor group or port a line, no machine's path."""
    head: dict[str, Any] = {"format": FORMAT, "schema_version": SCHEMA_VERSION}
    ops = {"ops": {"domain": signatures.DOMAIN, "version": signatures.VERSION}}
    return pretty_json(head | ops | plain_value(manifest)) + "\n"


def content_hash(manifest: Manifest) -> str:
    """SHA-256 of the manifest's text with an empty `content_sha256`."""
    return hashlib.sha256(manifest_to_json(replace(manifest, content_sha256="")).encode()).hexdigest()


def sealed_manifest(manifest: Manifest) -> tuple[Manifest, str]:
    """The manifest with its `content_sha256` filled in, and its text."""
    text = manifest_to_json(replace(manifest, content_sha256=""))
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, empty, tail = text.rpartition('"content_sha256": ""')
    assert empty
    return replace(manifest, content_sha256=digest), f'{head}"content_sha256": "{digest}"{tail}'


def manifest_from_json(text: str | bytes, *, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and check a manifest. Raises `InputError` for bad JSON, unknown keys, versions or offsets."""
    values = json_object(text, where=where)
    if values.get("format") != FORMAT:
        raise mismatch(f"{where}: format", expected=repr(FORMAT), found=repr(values.get("format")))
    version = values.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise mismatch(
            f"{where}: schema_version",
            expected=SCHEMA_VERSION,
            found=repr(values.get("schema_version")),
            hint="Export the checkpoint again with this version of k25-export.",
        )
    ops = {"domain": signatures.DOMAIN, "version": signatures.VERSION}
    if values.get("ops") != ops:
        raise mismatch(f"{where}: ops", expected=ops, found=values.get("ops"))
    body = {key: value for key, value in values.items() if key not in ("format", "schema_version", "ops")}
    manifest: Manifest = built_value(Manifest, body, where)
    _check_tensors(manifest, where)
    _check_paths(manifest, where)
    _check_components(manifest, where)
    return manifest


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle folder, or `InputError` where the folder is none."""
    path = bundle / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError) and not os.path.lexists(bundle)
        reason = "no such folder" if is_missing else (error.strerror or "unreadable")
        raise InputError(
            f"bundle {bundle}: cannot read {MANIFEST_NAME}: {reason}. "
            "`k25-export export CHECKPOINT --output BUNDLE` writes a bundle."
        ) from error
    return manifest_from_json(text, where=str(path))


def read_bundle_file(bundle: Path, entry: FileEntry | ComponentFile) -> bytes:
    """The bytes of a file of the bundle; `InputError` where it is missing or not the one that was exported."""
    try:
        data = (bundle / entry.path).read_bytes()
    except OSError as error:
        raise InputError(f"bundle {bundle}: cannot read {entry.path}: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise mismatch(
            f"bundle {bundle}: {entry.path}: SHA-256",
            expected=entry.sha256,
            found=digest,
            hint="The file has changed since the export: export the checkpoint again.",
        )
    return data


def is_bundle(folder: Path) -> bool:
    """Whether the folder is a bundle of any version: its manifest says so."""
    try:
        head = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(head, dict) and head.get("format") == FORMAT


def checkpoint_location_json(folder: Path) -> str:
    """The text of `checkpoint.json`."""
    location = {"format": LOCATION_FORMAT, "schema_version": SCHEMA_VERSION, "path": str(folder)}
    return json.dumps(location, indent=2, ensure_ascii=False) + "\n"


def read_checkpoint_location(bundle: Path) -> Path:
    """The checkpoint folder that the bundle remembers."""
    path = bundle / LOCATION_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}. Name the checkpoint with --checkpoint or K25_CHECKPOINT."
        ) from error
    values = json_object(text, where=str(path))
    location = values.get("path")
    if values.get("format") != LOCATION_FORMAT or values.get("schema_version") != SCHEMA_VERSION:
        raise mismatch(str(path), expected=f"{LOCATION_FORMAT} version {SCHEMA_VERSION}", found=values.get("format"))
    if not isinstance(location, str) or not location:
        raise mismatch(f"{path}: path", expected="a folder", found=repr(location))
    return Path(location)


def json_object(text: str | bytes, *, where: str) -> dict[str, Any]:
    """A JSON object from text, or `InputError` that names the file and the place."""
    try:
        values = json.loads(text)
    except UnicodeDecodeError as error:
        raise mismatch(where, expected="UTF-8 JSON", found=f"byte {error.start} is no UTF-8") from error
    except (ValueError, RecursionError) as error:  # JSON, or an integer of thousands of digits
        raise mismatch(where, expected="JSON", found=str(error)) from error
    if not isinstance(values, dict):
        raise mismatch(where, expected="a JSON object", found=type(values).__name__)
    return values


def is_plain_file_name(name: str) -> bool:
    """Whether the name stays in its folder: no separator, no drive, no parent, not hidden, not empty."""
    return bool(name) and not any(char in name for char in "/\\:\0") and not name.startswith(".")


def _check_tensors(manifest: Manifest, where: str) -> None:
    for shard in manifest.shards:
        if not is_plain_file_name(shard.file):
            raise mismatch(f"{where}: shards", expected="plain file names", found=repr(shard.file))
    for group in manifest.tensors:
        label = f"{where}: tensor {group.name}"
        if not 0 <= group.shard < len(manifest.shards):
            raise mismatch(label, expected=f"a shard below {len(manifest.shards)}", found=group.shard)
        if (group.offset is None) == (group.offsets is None):
            raise mismatch(label, expected="either offset or offsets", found="both or neither")
        if group.dtype not in STORED_ITEM_SIZES:
            raise mismatch(label, expected=" or ".join(STORED_ITEM_SIZES), found=repr(group.dtype))
        if group.length != math.prod(group.shape) * STORED_ITEM_SIZES[group.dtype] or min(group.shape, default=1) < 0:
            raise mismatch(label, expected=f"the length of {group.dtype} {list(group.shape)}", found=group.length)
        offsets = group.offsets if group.offsets is not None else (group.offset or 0,)
        if group.experts is not None and len(group.experts) != len(offsets):
            raise mismatch(label, expected=f"{len(offsets)} experts", found=len(group.experts))
        shard = manifest.shards[group.shard]
        if offsets and (min(offsets) < shard.data_start or max(offsets) + group.length > shard.bytes):
            raise mismatch(label, expected=f"bytes {shard.data_start}..{shard.bytes} of {shard.file}", found="others")


def _check_paths(manifest: Manifest, where: str) -> None:
    """A file of the bundle is `folder/name`: no path leaves the bundle."""
    paths = [entry.path for component in manifest.components for entry in component.files]
    for path in (*paths, *(entry.path for entry in manifest.tokenizer)):
        folder, separator, name = path.partition("/")
        if not separator or not is_plain_file_name(folder) or not is_plain_file_name(name):
            raise mismatch(f"{where}: path", expected="folder/name inside the bundle", found=repr(path))


def _check_components(manifest: Manifest, where: str) -> None:
    """Every layer once, the two ends, and a source for every input that the caller does not give."""
    names = [component.name for component in manifest.components]
    for name in ("embed", "head"):
        if names.count(name) != 1:
            raise mismatch(f"{where}: components", expected=f"one {name}", found=names)
    layers = sorted(layer for component in manifest.components for layer in component.layers or ())
    if layers != list(range(manifest.model.text.num_hidden_layers)):
        wanted = f"each of the layers 0..{manifest.model.text.num_hidden_layers - 1} once"
        raise mismatch(f"{where}: components", expected=wanted, found=layers)
    for component in manifest.components:
        for file in component.files:
            unbound = [port.name for port in file.inputs if port.name not in component.bindings.keys() | ACTIVATIONS]
            if unbound:
                label = f"{where}: component {component.name}: input {unbound[0]}"
                raise mismatch(label, expected="a binding", found="none")
        for name, binding in component.bindings.items():
            _check_binding(binding, f"{where}: component {component.name}: input {name}")


def _check_binding(binding: Binding, label: str) -> None:
    if binding.rule in ("region", "offsets"):
        if binding.row_bytes != signatures.REGION_ROW_BYTES:
            raise mismatch(f"{label}: row_bytes", expected=signatures.REGION_ROW_BYTES, found=binding.row_bytes)
        if not binding.tensors:
            raise mismatch(f"{label}: tensors", expected="patterns of tensor names", found="none")
    elif binding.tensor is None:
        raise mismatch(label, expected="a tensor or a rule", found="neither")


def plain_value(value: Any) -> Any:
    """A dataclass as plain JSON values; members that are None are left out, except where null means something."""
    if is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in fields(value))
        return {key: plain_value(item) for key, item in pairs if item is not None or key in _KEPT_NULLS}
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | str):
        return [plain_value(item) for item in value]
    return value


def pretty_json(value: Any, indent: int = 0) -> str:
    """JSON with one innermost object or list a line: short, and readable in a diff."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(item, dict) or (isinstance(item, list) and _has_object(item)) for item in items):
        return json.dumps(value, ensure_ascii=False)
    pad = "  " * (indent + 1)
    if isinstance(value, dict):
        body = [f"{pad}{json.dumps(key)}: {pretty_json(item, indent + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(body) + "\n" + "  " * indent + "}"
    body = [f"{pad}{pretty_json(item, indent + 1)}" for item in value]
    return "[\n" + ",\n".join(body) + "\n" + "  " * indent + "]"


def _has_object(items: list[Any]) -> bool:
    return bool(items) and isinstance(items[0], dict)


def built_value(kind: Any, value: Any, where: str) -> Any:
    """A value of an annotated type from plain JSON; unknown and missing keys are errors."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return built_value(options[0], value, where)
        return _scalar(tuple(options), value, where)
    if origin is Literal:
        if value not in arguments:
            raise mismatch(where, expected=" or ".join(map(repr, arguments)), found=repr(value))
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise mismatch(where, expected="a list", found=type(value).__name__)
        if arguments[-1] is Ellipsis:
            if arguments[0] is int:
                return _integers(value, where)
            return tuple(built_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        if len(value) != len(arguments):
            raise mismatch(where, expected=f"{len(arguments)} items", found=len(value))
        return tuple(built_value(item_kind, item, where) for item_kind, item in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise mismatch(where, expected="an object", found=type(value).__name__)
        return {key: built_value(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    if hasattr(kind, "__dataclass_fields__"):
        return _dataclass(kind, value, where)
    return value if kind is Any else _scalar((kind,), value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise mismatch(where, expected="an object", found=type(value).__name__)
    hints = _type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise mismatch(where, expected=f"the keys {', '.join(hints)}", found=f"the unknown key {unknown[0]!r}")
    built = {key: built_value(hints[key], item, f"{where}: {key}") for key, item in value.items()}
    missing = [item.name for item in fields(kind) if item.name not in built and item.default is _MISSING]
    if missing:
        raise mismatch(where, expected=f"the key {missing[0]!r}", found="nothing")
    return kind(**built)


@cache
def _type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _integers(value: list[Any], where: str) -> tuple[int, ...]:
    if not all(type(item) is int for item in value):
        raise mismatch(where, expected="integers", found="another type")
    return tuple(value)


def _scalar(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    accepted = (*kinds, int) if float in kinds else kinds
    if type(value) not in accepted:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise mismatch(where, expected=names, found=f"{type(value).__name__} {value!r}")
    if float not in kinds or int in kinds:
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise mismatch(where, expected="a finite number", found=_digits(value))
    return number


def _digits(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

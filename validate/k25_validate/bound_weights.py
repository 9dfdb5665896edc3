"""Whether the bytes that a weight input gets are those of the tensor that its name stands for.

The names are given by the format (an input is called like its tensor, without the layer's prefix), the bytes are read
by the plain reference's own reader: a wrong binding, a wrong offset and a damaged shard all show here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.manifest import ComponentEntry, Manifest
from k25_export.safetensors_header import header_from_file
from k25_export.tensor_table import TensorTable, for_layer
from k25_plugins.errors import K25Error
from k25_plugins.signatures import EXPERT_TABLE_COLUMNS, REGION_ROW_BYTES
from k25_runtime.host_tensor import HostTensor
from k25_validate.plain_checkpoint import CheckpointTensors
from k25_validate.plain_taps import LAYER_PREFIX, TEXT_PREFIX

Bytes = npt.NDArray[np.uint8]
Place = tuple[str, int]
#: Components whose inputs are not named below the text model.
_PREFIXES = {"vision": ""}
EXPERT_INPUTS = ("expert_words", "expert_scales", "expert_table")


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """The tensor behind a weight input and where it lies. `problem` says what is wrong with what is bound, if anything.

    `kind` is empty, `binding` (other bytes of the checkpoint), `bytes` (the right place, other bytes) or `checkpoint`
    (the tensor itself holds values that are not finite).
    """

    input: str
    tensor: str
    shard: str
    kind: str = ""
    problem: str = ""


class BoundWeights:
    """The weights of one component instance, as bound, beside the checkpoint that the reference reads."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        entry: ComponentEntry,
        layer: int | None,
        weights: Mapping[str, HostTensor],
        tensors: CheckpointTensors,
        folder: Path,
    ) -> None:
        self._manifest = manifest
        self._table = TensorTable(manifest)
        self._entry = entry
        self._layer = layer
        self._weights = weights
        self._tensors = tensors
        self._folder = folder
        self._prefix = _PREFIXES.get(entry.name, TEXT_PREFIX) if layer is None else LAYER_PREFIX.format(layer=layer)

    def has(self, name: str) -> bool:
        """Whether an input of this name is bound to a weight."""
        return name in self._weights

    def source(self, name: str) -> WeightSource:
        """The tensor of one weight input (not of the experts), checked byte by byte."""
        wanted = self._prefix + name
        stated = for_layer(self._entry.bindings[name].tensor or "", self._layer)
        problem = f"the binding of {name} names {stated}" if stated != wanted else ""
        return self._judged(name, wanted, stated, _bytes_of(self._weights[name].array), problem)

    def expert_sources(self, expert: int) -> list[WeightSource]:
        """The six tensors of one expert, as the table places them in the region."""
        table = self._weights["expert_table"].array
        region = _bytes_of(self._weights["expert_words"].array)
        patterns = self._entry.bindings["expert_table"].tensors or ()
        found = []
        for column, (projection, part) in enumerate(EXPERT_TABLE_COLUMNS):
            wanted = f"{self._prefix}mlp.experts.{expert}.{projection}.{part}"
            stated = for_layer(patterns[column], self._layer).replace("{expert}", str(expert))
            problem = f"column {column} of the expert table is bound to {stated}" if stated != wanted else ""
            start = int(table[expert, column]) * REGION_ROW_BYTES
            length = self._tensors.stored(wanted).nbytes
            found.append(
                self._judged("expert_table", wanted, patterns[column], region[start : start + length], problem, expert)
            )
        return found

    def _judged(
        self, name: str, wanted: str, stated: str, actual: Bytes, problem: str, expert: int | None = None
    ) -> WeightSource:
        true = self._tensors.stored(wanted)
        shard = self._tensors.shard_of(wanted)
        kind = ""
        expected = _bytes_of_torch(true)
        if actual.shape != expected.shape or not np.array_equal(actual, expected):
            where = self._where(actual, expected, true)
            place, right = self._stated_place(stated, expert), self._true_place(wanted)
            if problem or (place and place != right):
                kind = "binding"
                problem = (
                    problem
                    or f"the manifest places it at {self._shown(place)}, it lies at byte {right[1]} of {right[0]}"
                )
            else:
                kind, problem = "bytes", f"the bytes bound differ from the reference's checkpoint {where}"
        elif true.is_floating_point() and not bool(torch.isfinite(true).all()):
            kind = "checkpoint"
            index = torch.nonzero(~torch.isfinite(true))[0].tolist()
            problem = f"the tensor itself holds {float(true[tuple(index)])} at {index}"
        else:
            problem = ""  # two names for the same bytes are no fault
        return WeightSource(input=name, tensor=wanted, shard=shard, kind=kind, problem=problem)

    @staticmethod
    def _where(actual: Bytes, expected: Bytes, true: torch.Tensor) -> str:
        if actual.shape != expected.shape:
            return f"in size: {actual.size} bytes, expected {expected.size}"
        places = np.flatnonzero(actual != expected)
        element = int(places[0]) // true.element_size()
        index = [int(i) for i in np.unravel_index(element, tuple(true.shape))]
        return f"in {len(places)} of {actual.size} bytes, first at element {index}"

    def _stated_place(self, pattern: str, expert: int | None) -> Place | None:
        """Shard and offset that the manifest gives."""
        try:
            if expert is None:
                tensor = self._table.tensor(pattern)
            else:
                members = self._table.experts(for_layer(pattern, self._layer))
                tensor = next(member for number, member in members if number == expert)
        except (K25Error, StopIteration):
            return None
        return self._manifest.shards[tensor.shard].file, tensor.offset

    def _true_place(self, name: str) -> Place:
        """Shard and offset that the checkpoint's own header gives."""
        shard = self._tensors.shard_of(name)
        header = header_from_file(file_in_checkpoint(self._folder, shard))
        return shard, header.data_start + header.entries[name].start

    def _shown(self, place: Place | None) -> str:
        """A place, and the tensor that begins there, if one does."""
        if place is None:
            return "no place"
        header = header_from_file(file_in_checkpoint(self._folder, place[0]))
        starts = {header.data_start + found.start: name for name, found in header.entries.items()}
        owner = f", where {starts[place[1]]} begins" if place[1] in starts else ""
        return f"byte {place[1]} of {place[0]}{owner}"


def _bytes_of(array: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _bytes_of_torch(tensor: torch.Tensor) -> Bytes:
    values: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return values

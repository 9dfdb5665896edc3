"""One layer as a standalone ONNX file whose initializers are external data in the original shards.

ONNX Runtime, onnx.checker and other tools refuse external data outside the model's folder, links that leave it, and
(some) files with several hard links; so the file is written into the checkpoint folder or a parent of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from k25_export.checkpoint_files import file_in_checkpoint
from k25_export.manifest import Binding, ComponentEntry, Manifest, Precision, ShardEntry, read_bundle_file
from k25_export.tensor_table import TensorTable, for_layer
from k25_plugins.errors import InputError, mismatch
from k25_plugins.signatures import ONNX_DTYPES
from k25_plugins.whole_file import write_whole

_STORED_TO_ONNX = {"BF16": "bfloat16", "F32": "float32", "I32": "int32", "I64": "int64"}
_RESIDUAL_SHARE = "residual_share"


class BoundModelWriter:
    """Writes `layer-<N>.<precision>.onnx` files into one folder."""

    def __init__(self, *, bundle: Path, manifest: Manifest, checkpoint: Path, output: Path, link: bool = False) -> None:
        """`checkpoint` is the folder of the shards; `link` makes hard links of them in `output`, if it is elsewhere.

        Raises `InputError` where `output` is neither the folder of the shards nor a parent and `link` is false.
        """
        self._bundle = bundle
        self._manifest = manifest
        self._table = TensorTable(manifest)
        self._checkpoint = checkpoint
        self._output = output.resolve()
        self._link = link
        if not link:
            for shard in manifest.shards:
                self._location_inside(file_in_checkpoint(checkpoint, shard.file))

    def write(self, layer: int, precision: Precision) -> Path:
        """The file of one layer, written whole or not at all; returns its path."""
        component = self._component_of(layer)
        entry = component.file(precision)
        model = onnx.load_from_string(read_bundle_file(self._bundle, entry))
        self._bind_weights(model, component, layer)
        path = self._output / f"layer-{layer}.{precision}.onnx"
        write_whole(path, model.SerializeToString(deterministic=True))
        return path

    @property
    def layers(self) -> list[int]:
        """Every layer that a component of the bundle is an instance for."""
        return sorted(layer for component in self._manifest.components for layer in component.layers or ())

    def _component_of(self, layer: int) -> ComponentEntry:
        for component in self._manifest.components:
            if component.layers is not None and layer in component.layers:
                return component
        layers = self.layers
        raise mismatch("layer", expected=f"one of {layers[0]}..{layers[-1]}", found=layer)

    def _bind_weights(self, model: onnx.ModelProto, component: ComponentEntry, layer: int) -> None:
        """Turn every bound input into an initializer; `residual_share` stays an input, with the default 1."""
        inputs = {value.name: value for value in model.graph.input}
        for name, binding in component.bindings.items():
            tensor = self._initializer(name, binding, layer, inputs[name].type.tensor_type.elem_type)
            model.graph.initializer.append(tensor)
            model.graph.input.remove(inputs[name])
        if _RESIDUAL_SHARE in inputs:
            one = onnx.numpy_helper.from_array(np.ones(1, np.float32), _RESIDUAL_SHARE)
            model.graph.initializer.append(one)

    def _initializer(self, name: str, binding: Binding, layer: int, onnx_dtype: int) -> onnx.TensorProto:
        if binding.tensor is not None:
            if binding.rule is not None:
                raise mismatch(f"layer {layer}: input {name}", expected="a whole tensor", found=f"rule {binding.rule}")
            tensor = self._table.tensor(for_layer(binding.tensor, layer))
            dtype = ONNX_DTYPES[_STORED_TO_ONNX[tensor.dtype]]
            return self._external(name, dtype, tensor.shape, tensor.shard, tensor.offset, tensor.length)
        assert binding.tensors is not None
        assert binding.row_bytes is not None
        names = [for_layer(pattern, layer) for pattern in binding.tensors]
        region = self._table.region(names, row_bytes=binding.row_bytes)
        if region is None:
            raise InputError(
                f"layer {layer}: its experts lie in several shards or are not aligned to {binding.row_bytes} bytes, so "
                "no range of one shard holds them. Run it from the bundle, which copies them."
            )
        if binding.rule == "offsets":
            return onnx.numpy_helper.from_array(region.table, name)
        length = region.stop - region.start
        columns = binding.row_bytes // onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype).itemsize
        shape = (length // binding.row_bytes, columns)
        return self._external(name, onnx_dtype, shape, region.shard, region.start, length)

    def _external(
        self, name: str, dtype: int, shape: tuple[int, ...], shard: int, offset: int, length: int
    ) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        location = self._location(self._manifest.shards[shard])
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _location(self, shard: ShardEntry) -> str:
        real = file_in_checkpoint(self._checkpoint, shard.file)
        return self._linked(real, shard) if self._link else self._location_inside(real)

    def _location_inside(self, real: Path) -> str:
        if not real.is_relative_to(self._output):
            raise InputError(
                f"output {self._output}: expected the folder of the shards or a parent of it ({real.parent}): tools "
                "refuse external data outside the model's folder. With --link, hard links are made there instead; "
                "ONNX Runtime and TensorRT take them, while onnx.load, onnx.checker, onnx_ir and polygraphy refuse "
                "files with several links (the shards in their own folder too, as long as the links exist)."
            )
        return real.relative_to(self._output).as_posix()

    def _linked(self, real: Path, shard: ShardEntry) -> str:
        link = self._output / shard.file
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.hardlink_to(real)
            elif not link.samefile(real):
                raise InputError(f"{link}: expected a link to the shard, found another file. Choose another folder.")
        except OSError as error:
            raise InputError(
                f"{link}: a hard link cannot be made: {error.strerror}. Links must be on the shards' file system."
            ) from error
        return shard.file

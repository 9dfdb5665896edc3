"""What is built: a component, or all layers as one decoder, with all that decides its engine but for the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_engines.build_job import BuildJob, GraphFile
from k25_engines.decoder_ports import decoder_components, decoder_ports, layer_name
from k25_engines.engine_options import EngineOptions, Limits, limits_from_options
from k25_engines.manifest import DECODER, Profile
from k25_engines.profiles import profiles_for
from k25_engines.targets import Target
from k25_engines.tensorrt_module import InstalledTensorRT
from k25_export.manifest import ComponentEntry, ComponentFile, Manifest, Port, is_plain_file_name
from k25_export.tensor_table import TensorTable, for_layer
from k25_plugins.errors import mismatch
from k25_plugins.tensorrt_plugin_rules import PLUGIN_OPS, aliased_outputs

_STORED_DTYPES = {"BF16": "bfloat16", "F32": "float32", "I32": "int32", "I64": "int64"}
_RULE_DTYPES = {"region": ("int32", "bfloat16"), "offsets": ("int64",)}


@dataclass(frozen=True, kw_only=True)
class EngineUnit:
    """`graphs` are the files it is made from; `layers` are those of the decoder, None for a single component.

    `aliases` and `weights` are as in `BuildJob`.
    """

    name: str
    graphs: tuple[GraphFile, ...]
    layers: tuple[ComponentEntry, ...] | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: dict[str, str]
    weights: dict[str, str]
    profiles: tuple[Profile, ...]

    @property
    def component_sha256(self) -> dict[str, str]:
        """Component -> SHA-256 of its graph."""
        return {graph.component: graph.sha256 for graph in self.graphs}


def units_from_manifest(
    bundle: Path, manifest: Manifest, options: EngineOptions, *, components: Sequence[str] = (), fuse_decoder: bool
) -> list[EngineUnit]:
    """The components of these names, or all, and the decoder where it is asked for. Raises `InputError`."""
    limits = limits_from_options(options, manifest)
    entries = [manifest.component(name) for name in dict.fromkeys(components)] if components else manifest.components
    for entry in entries:
        if not is_plain_file_name(entry.name) or entry.name == DECODER:
            raise mismatch("bundle: component", expected=f"a plain name other than {DECODER}", found=repr(entry.name))
    units = [_component_unit(bundle, manifest, entry, options, limits) for entry in entries]
    if fuse_decoder:
        units.append(decoder_unit(bundle, manifest, options, limits, layers=decoder_components(manifest)))
    return units


def _component_unit(
    bundle: Path, manifest: Manifest, entry: ComponentEntry, options: EngineOptions, limits: Limits
) -> EngineUnit:
    file = entry.file(options.precision)
    return EngineUnit(
        name=entry.name,
        graphs=(_graph(bundle, entry, file),),
        layers=None,
        inputs=file.inputs,
        outputs=file.outputs,
        aliases={} if options.portable else _aliases(file),
        weights=_weight_dtypes(manifest, entry, file),
        profiles=profiles_for(entry.name, file.inputs, limits),
    )


def decoder_unit(
    bundle: Path, manifest: Manifest, options: EngineOptions, limits: Limits, *, layers: tuple[ComponentEntry, ...]
) -> EngineUnit:
    """The decoder of these layers: for each, the component that it is an instance of."""
    inputs, outputs = decoder_ports(layers, options.precision)
    kinds = {entry.name: entry for entry in layers}
    units = {name: _component_unit(bundle, manifest, entry, options, limits) for name, entry in kinds.items()}
    aliases: dict[str, str] = {}
    weights: dict[str, str] = {}
    for number, entry in enumerate(layers):
        unit = units[entry.name]
        aliases |= {layer_name(number, output): layer_name(number, source) for output, source in unit.aliases.items()}
        weights |= {layer_name(number, name): dtype for name, dtype in unit.weights.items()}
    return EngineUnit(
        name=DECODER,
        graphs=tuple(graph for unit in units.values() for graph in unit.graphs),
        layers=layers,
        inputs=inputs,
        outputs=outputs,
        aliases=aliases,
        weights=weights,
        profiles=profiles_for(DECODER, inputs, limits),
    )


def _graph(bundle: Path, entry: ComponentEntry, file: ComponentFile) -> GraphFile:
    return GraphFile(component=entry.name, path=str((bundle / file.path).resolve()), sha256=file.sha256)


def _aliases(file: ComponentFile) -> dict[str, str]:
    """The component's outputs that are an input updated in place, by the rules of the plugins."""
    inputs, outputs = {port.name for port in file.inputs}, {port.name for port in file.outputs}
    pairs = {output: source for signature in PLUGIN_OPS for output, source in aliased_outputs(signature).items()}
    return {output: source for output, source in pairs.items() if output in outputs and source in inputs}


def _weight_dtypes(manifest: Manifest, entry: ComponentEntry, file: ComponentFile) -> dict[str, str]:
    """The dtype of each weight input as its bytes are in the checkpoint."""
    table = TensorTable(manifest)
    layer = entry.layers[0] if entry.layers else None
    dtypes = {}
    for port in file.inputs:
        binding = entry.bindings.get(port.name)
        if binding is None:
            continue
        if binding.tensor is not None:
            dtypes[port.name] = _STORED_DTYPES[table.tensor(for_layer(binding.tensor, layer)).dtype]
        elif binding.rule is not None:
            allowed = _RULE_DTYPES.get(binding.rule, (port.dtype,))
            dtypes[port.name] = port.dtype if port.dtype in allowed else allowed[0]
    return dtypes


def job_for_unit(
    unit: EngineUnit,
    targets: Sequence[Target],
    installed: InstalledTensorRT,
    *,
    portable: bool,
    plugin_library: Path | None,
    output: Path,
) -> BuildJob:
    """The job that builds this for these targets; makes the folder `output`."""
    output.mkdir()
    return BuildJob(
        component=unit.name,
        graphs=unit.graphs,
        decoder_layers=None if unit.layers is None else tuple(entry.name for entry in unit.layers),
        targets=tuple(target.name for target in targets),
        flavour=installed.flavour,
        version=installed.version,
        portable=portable,
        inputs=unit.inputs,
        outputs=unit.outputs,
        aliases=unit.aliases,
        weights=unit.weights,
        profiles=unit.profiles,
        plugin_library=None if plugin_library is None else str(plugin_library.resolve()),
        output=str(output.resolve()),
    )

"""An ONNX model as a TensorRT network, and the network as an engine: the common API of both flavours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k25_engines.manifest import Profile
from k25_engines.messages import MessageLog
from k25_engines.targets import Target
from k25_engines.tensorrt_module import TensorRT
from k25_plugins.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Network:
    """A parsed network with what must outlive it. `where` names component and target in messages."""

    builder: Any
    network: Any
    parser: Any
    where: str


def network_from_model(tensorrt: TensorRT, model: bytes, *, logger: Any, where: str) -> Network:
    """Parse an ONNX model. Raises `InputError` that names the nodes TensorRT cannot take."""
    trt = tensorrt.module
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        problems = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise InputError(f"{where}: TensorRT cannot parse it: {'; '.join(problems) or 'no reason given'}")
    return Network(builder=builder, network=network, parser=parser, where=where)


def config_for(tensorrt: TensorRT, parsed: Network, target: Target, profiles: Sequence[Profile]) -> Any:
    """The builder configuration: target, aliased plugin outputs, profiles. Raises `InputError` for a profile."""
    trt = tensorrt.module
    config = parsed.builder.create_builder_config()
    tensorrt.set_target(config, target)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(parsed, profile))
    return config


def engine_from_network(parsed: Network, config: Any, log: MessageLog) -> bytes:
    """Build. Raises `InputError` with what TensorRT logged where it cannot, such as a dtype the target lacks."""
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise InputError(f"{parsed.where}: TensorRT cannot build it: {log.reason()}")
    return bytes(engine)


def _optimization_profile(parsed: Network, profile: Profile) -> Any:
    result = parsed.builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        try:
            result.set_shape(name, *shapes)
        except (ValueError, TypeError, RuntimeError) as error:
            where = f"{parsed.where}: profile {profile.name}: input {name}"
            raise InputError(f"{where}: TensorRT refuses the shapes {shapes}: {error}") from error
    return result


def _parser_error(error: Any) -> str:
    name, operator = error.node_name(), error.node_operator()
    place = f"node {name} ({operator})" if name or operator else "graph"
    return f"{place}: {error.desc()}"

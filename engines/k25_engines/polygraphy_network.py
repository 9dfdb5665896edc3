"""Our components for Polygraphy: a network script, and the same as a loader for Polygraphy's Python API.

Polygraphy's tools take this file as a script that makes the network, with our plugins registered:

    export POLYGRAPHY_USE_TENSORRT_RTX=1 K25_BUNDLE=BUNDLE K25_COMPONENT=moe_layer
    SCRIPT=$(python -m k25_engines.polygraphy_network)
    polygraphy convert $SCRIPT --model-type trt-network-script --convert-to trt \
        --trt-config-script $SCRIPT -o moe_layer.engine

`K25_PRECISION` (bf16), `K25_TARGET` (sm120) and `K25_PORTABLE` (1: from function bodies) choose the rest. Polygraphy
parses in its own process, so the library link that pip's package lacks is put there once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_engines.engine_options import EngineOptions, limits_from_options
from k25_engines.messages import MessageLog, logger_for
from k25_engines.network import Network, config_for, network_from_model
from k25_engines.plugin_creators import register_plugins
from k25_engines.profiles import profiles_for
from k25_engines.targets import target_from_text
from k25_engines.tensorrt_module import (
    TensorRT,
    installed_tensorrt,
    load_tensorrt,
    repair_parser_library,
)
from k25_export.manifest import Precision, built_value, read_bundle_file, read_manifest
from k25_plugins.errors import InputError

#: TensorRT holds on to these without owning them.
_KEPT: list[Any] = []


@dataclass(frozen=True, kw_only=True)
class NetworkLoader:
    """Called without arguments it returns (builder, network, parser), as Polygraphy's loaders do.

    `engine_bytes_from_network(NetworkLoader(...), config=loader.config)` builds an engine.
    """

    bundle: Path
    component: str
    precision: Precision = "bf16"
    target: str = "sm120"
    portable: bool = False

    def __call__(self) -> tuple[Any, Any, Any]:
        tensorrt = _tensorrt()
        if not self.portable:
            _KEPT.extend(register_plugins(tensorrt, None, report=print))
        entry = read_manifest(self.bundle).component(self.component)
        data = read_bundle_file(self.bundle, entry.file(self.precision))
        logger = logger_for(tensorrt.module, MessageLog())
        _KEPT.append(logger)
        parsed = network_from_model(tensorrt, data, logger=logger, where=self.component)
        return parsed.builder, parsed.network, parsed.parser

    def config(self, builder: Any, network: Any) -> Any:
        """The configuration `compile` uses with its default options: target and optimisation profiles."""
        manifest = read_manifest(self.bundle)
        ports = manifest.component(self.component).file(self.precision).inputs
        profiles = profiles_for(self.component, ports, limits_from_options(EngineOptions(), manifest))
        parsed = Network(builder=builder, network=network, parser=None, where=self.component)
        return config_for(_tensorrt(), parsed, target_from_text(self.target), profiles)


def loader_from_environment() -> NetworkLoader:
    """The loader that K25_BUNDLE, K25_COMPONENT, K25_PRECISION, K25_TARGET and K25_PORTABLE describe."""
    missing = [name for name in ("K25_BUNDLE", "K25_COMPONENT") if not os.environ.get(name)]
    if missing:
        raise InputError(f"{', '.join(missing)}: not set; see the first lines of {__file__}")
    return NetworkLoader(
        bundle=Path(os.environ["K25_BUNDLE"]),
        component=os.environ["K25_COMPONENT"],
        precision=built_value(Precision, os.environ.get("K25_PRECISION", "bf16"), "K25_PRECISION"),
        target=os.environ.get("K25_TARGET", "sm120"),
        portable=os.environ.get("K25_PORTABLE", "") == "1",
    )


def load_network() -> tuple[Any, Any, Any]:
    """What Polygraphy calls for `--model-type trt-network-script`."""
    return loader_from_environment()()


def load_config(builder: Any, network: Any) -> Any:
    """What Polygraphy calls for `--trt-config-script`."""
    return loader_from_environment().config(builder, network)


def _tensorrt() -> TensorRT:
    flavour = "tensorrt-rtx" if os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX", "") == "1" else "tensorrt"
    installed = installed_tensorrt("tensorrt-rtx" if flavour == "tensorrt-rtx" else "tensorrt")
    repair_parser_library(installed)
    return load_tensorrt(installed.flavour)


if __name__ == "__main__":
    print(__file__)

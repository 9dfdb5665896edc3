"""How engines grow: the components of a bundle, and the fused decoder of 1 to all layers. Prints a Markdown table.

    python bench/engines.py BUNDLE [--target sm120] [--layers 1,2,4]

The bundle is not changed. For the real size: `k25-export demo-checkpoint DIR --preset full-sparse`, then `export`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from k25_engines.child_processes import ChildLimits, run_jobs
from k25_engines.decoder_ports import decoder_components
from k25_engines.engine_options import EngineOptions, limits_from_options
from k25_engines.engine_units import EngineUnit, decoder_unit, job_for_unit, units_from_manifest
from k25_engines.targets import target_from_text
from k25_engines.tensorrt_module import installed_tensorrt, parser_environment
from k25_export.manifest import read_manifest


def main() -> None:
    """Build one after the other, so that times are those of a quiet machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="sm120")
    parser.add_argument("--layers", default="1,2,4,8,16,32,61")
    parser.add_argument("--portable", action="store_true")
    arguments = parser.parse_args()
    options = EngineOptions(portable=arguments.portable)
    manifest = read_manifest(arguments.bundle)
    limits = limits_from_options(options, manifest)
    layers = decoder_components(manifest)
    units = [(unit.name, unit) for unit in units_from_manifest(arguments.bundle, manifest, options, fuse_decoder=False)]
    for count in map(int, arguments.layers.split(",")):
        if count <= len(layers):
            unit = decoder_unit(arguments.bundle, manifest, options, limits, layers=layers[:count])
            units.append((f"decoder, {count} layers", unit))
    print(f"| {arguments.target} | inputs | engine | build | peak memory |\n|---|---|---|---|---|")
    for label, unit in units:
        print(_line(label, unit, arguments.target, arguments.portable), flush=True)


def _line(label: str, unit: EngineUnit, target: str, portable: bool) -> str:
    installed = installed_tensorrt()
    with tempfile.TemporaryDirectory() as folder:
        job = job_for_unit(
            unit,
            [target_from_text(target)],
            installed,
            portable=portable,
            plugin_library=None,
            output=Path(folder) / "job",
        )
        environment = parser_environment(installed, Path(folder))
        (result,) = run_jobs([job], limits=ChildLimits(), environment=environment, progress=lambda *_: None)
    if result.failed:
        return f"| {label} | {len(unit.inputs)} | {result.failed[0].message} | | |"
    (built,) = result.built
    megabytes, memory = built.bytes / 1e6, built.peak_memory_bytes / 1e9
    return f"| {label} | {len(unit.inputs)} | {megabytes:.2f} MB | {built.seconds:.2f} s | {memory:.2f} GB |"


if __name__ == "__main__":
    main()

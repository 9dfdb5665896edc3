"""Export at full size: the part that grows with the checkpoint, against merely parsing the same JSON, in one run.

    .venv/bin/k25-export demo-checkpoint FOLDER --preset full-sparse
    .venv/bin/python bench/scale.py FOLDER

Prints one JSON object: best and median of N rounds, in seconds, and their ratio. `parse` reads and parses the headers
and the index with orjson; `growing` is what an export does with them: intake, tensor groups, manifest text.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import orjson

from k25_export.checkpoint import checkpoint_from_folder
from k25_export.manifest import Manifest, sealed_manifest
from k25_export.tensor_groups import shard_entries, tensor_groups

ROUNDS = 7


def parse(folder: Path) -> None:
    """Read and parse the headers and the index, and nothing else."""
    kept = [orjson.loads((folder / "model.safetensors.index.json").read_bytes())]
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            kept.append(orjson.loads(file.read(int.from_bytes(file.read(8), "little"))))


def growing(folder: Path) -> None:
    """The work of an export that depends on the number of tensors."""
    checkpoint = checkpoint_from_folder(folder)
    manifest = Manifest(
        inputs_sha256="",
        options={},
        versions={},
        model=checkpoint.config,
        shards=shard_entries(checkpoint),
        tensors=tensor_groups(checkpoint),
        components=(),
        tokenizer=(),
    )
    sealed_manifest(manifest)


def measure(folder: Path) -> dict[str, object]:
    """Interleaved rounds of both."""
    seconds: dict[str, list[float]] = {"parse": [], "growing": []}
    for _ in range(ROUNDS):
        for function in (parse, growing):
            gc.collect()
            started = time.perf_counter()
            function(folder)
            seconds[function.__name__].append(time.perf_counter() - started)
    best = {name: min(values) for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rounds": ROUNDS,
        "best": best,
        "median": median,
        "ratio_of_best": best["growing"] / best["parse"],
        "ratio_of_medians": median["growing"] / median["parse"],
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    results = {"collector on": measure(place)}
    gc.disable()
    results["collector off"] = measure(place)
    print(json.dumps(results, indent=2))

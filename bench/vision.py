"""The vision tower at K2.5's real size (27 blocks, width 1152, random weights) on a CPU: time and memory of one image.

    .venv/bin/python bench/vision.py FOLDER [--rows 64] [--columns 64] [--frames 1] [--rounds 2] [--mode exact]

It needs 1 GB in FOLDER. With K25_NATIVE=off the function bodies run instead of the native kernels.
Runs our `vision` component and transformers' tower and projector (float32, its `sdpa` attention) in turn, each time in
a process of its own, and prints one JSON object: seconds of each round, peak memory while encoding (weights included),
and how far apart the embeddings are. Patches: rows x columns x frames; 128 x 128 is an image of 1792 x 1792.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Grid = tuple[int, int, int]
Encode = Callable[[Float32, Grid], Float32]
Mode = Literal["fast", "exact"]

PATCH = 14


def write_model(folder: Path) -> None:
    """A checkpoint with the real vision sizes and next to no text model, and its bundle."""
    from k25_export.bundle import bundle_from_checkpoint
    from k25_export.checkpoint import checkpoint_from_folder
    from k25_export.config import model_config_from_dict
    from k25_export.demo.layout import index_json, shards_from_config
    from k25_export.demo.official_config import official_config_from_preset
    from k25_export.demo.presets import PRESETS, Preset
    from k25_export.demo.weights import tensor_bytes

    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        checkpoint.mkdir(parents=True, exist_ok=True)
        text = {**PRESETS["tiny"].text, "num_hidden_layers": 1, "hidden_size": 7168}
        values = official_config_from_preset(Preset(text=text, vision=PRESETS["full-sparse"].vision))
        shards = shards_from_config(model_config_from_dict(values))
        for shard in shards:
            with (checkpoint / shard.file).open("wb") as file:
                file.write(shard.header())
                for tensor in shard.tensors:
                    file.writelines(tensor_bytes(tensor, seed=0))
        (checkpoint / "model.safetensors.index.json").write_text(index_json(shards))
        (checkpoint / "config.json").write_text(json.dumps(values))
    bundle_from_checkpoint(checkpoint_from_folder(checkpoint), folder / "bundle", precisions=("fp32",))


def ours(folder: Path, mode: Mode) -> Encode:
    """The runtime's `encode_media`."""
    from k25_runtime.runtime import Runtime

    runtime = Runtime.open(folder / "bundle", mode=mode, context=32, max_sequences=1, media_cache_bytes=0)

    def encode(pixel_values: Float32, grid: Grid) -> Float32:
        return runtime.encode_media(pixel_values, [grid])[0]

    return encode


def theirs(folder: Path, mode: Mode) -> Encode:
    """transformers' tower and projector."""
    from k25_validate.transformers_reference import TransformersReference

    return TransformersReference(folder / "checkpoint").media_embeddings


SIDES: dict[str, Callable[[Path, Mode], Encode]] = {"ours": ours, "transformers": theirs}


def run_side(folder: Path, side: str, grid: Grid, mode: Mode) -> dict[str, float]:
    """One fresh process: a small image to warm up, then the image, timed."""
    encode = SIDES[side](folder, mode)
    random = np.random.default_rng(0)
    encode(random.uniform(-1, 1, (16, 3, PATCH, PATCH)).astype(np.float32), (1, 4, 4))
    pixel_values = random.uniform(-1, 1, (int(np.prod(grid)), 3, PATCH, PATCH)).astype(np.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: loading is not what is measured
    started = time.monotonic()
    embeddings = encode(pixel_values, grid)
    seconds = time.monotonic() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    np.save(folder / f"{side}.npy", embeddings)
    return {"seconds": round(seconds, 2), "peak_rss_gb": round(peak * 1024 / 1e9, 2)}


def child(arguments: list[str], side: str) -> dict[str, float]:
    """`run_side` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Write the model, run both sides in turn, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (("rows", 64), ("columns", 64), ("frames", 1), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mode", choices=["fast", "exact"], default="exact", help="of our side (default: exact)")
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    grid = (options.frames, options.rows, options.columns)
    if options.side:
        print(json.dumps(run_side(options.folder, options.side, grid, options.mode)))
        return
    write_model(options.folder)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, found in rounds.items():
            found.append(child(sys.argv[1:], side))
    best = {side: min(found["seconds"] for found in runs) for side, runs in rounds.items()}
    own, reference = (np.load(options.folder / f"{side}.npy").astype(np.float64) for side in SIDES)
    result = {
        "grid": grid,
        "tokens": len(own),
        "cores": os.cpu_count(),
        "mode": options.mode,
        "native": os.environ.get("K25_NATIVE", "on"),
        **rounds,
        "ratio_of_best": round(best["ours"] / best["transformers"], 3),
        "relative_l2": float(np.linalg.norm(own - reference) / np.linalg.norm(reference)),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

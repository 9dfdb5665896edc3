"""A bundle against its peers on this machine: decode and prefill, in turns, each contender in a process of its own.

    .venv/bin/python bench/compare.py BUNDLE [--llama PYTHON] [--rounds N] [--json FILE] [--picture FILE.svg]

Peers are optional: transformers (bfloat16, the extra k25-export[transformers]) and, with `--llama`, a Python that has
llama-cpp-python and gguf (bench/peers/llama_cpp.py says how to make one). One that is not there is named and left out.
The same random token ids go to all. Only one contender runs at a time: the others are stopped (SIGSTOP), so no thread
of theirs waits for work on a core. A round's time of a decode step is the mean of its steps; best and median of the
rounds are told, and ratios of best to best and median to median.

A contender is a script that gets one JSON object as its argument, prints `ready {facts}`, and then answers each line
{"do": "decode" | "prefill" | "logits", "prompt": [ids], "tokens": [ids], "file": path} with `seconds S` or `done 1`.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k25_export.manifest import read_manifest
from k25_plugins.native_library import native_library
from k25_runtime.bench_bandwidth import ReadBandwidth
from k25_runtime.bench_bytes import model_bytes
from k25_runtime.bench_picture import Bar, Chart, picture_of_charts
from k25_runtime.bench_report import machine_facts
from k25_runtime.cores import usable_cores
from k25_runtime.mapped_checkpoint import checkpoint_folder

PEERS = Path(__file__).parent / "peers"
WORKS = ("decode", "prefill")
PROMPTS_COMPARED = 12


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How to start a contender."""

    name: str
    python: str
    script: str
    options: dict[str, Any]


class Contender:
    """A process that answers lines; stopped while it is not asked."""

    def __init__(self, spec: Spec) -> None:
        self.name = spec.name
        self.process = subprocess.Popen(
            [spec.python, "-P", str(PEERS / spec.script), json.dumps(spec.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.missing: str | None = None
        self.facts: dict[str, Any] = {}
        word, _, rest = self._line().partition(" ")
        if word == "ready":
            self.facts = json.loads(rest)
            self._signal(signal.SIGSTOP)
        else:
            self.missing = rest or "nothing"

    def ask(self, **command: Any) -> float:
        """Seconds, or 1 for what is not timed."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
            return float(self._line().split()[1])
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it."""
        self._signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.split(" ")[0] in ("ready", "missing", "seconds", "done"):
                return line.strip()
        raise SystemExit(f"compare: {self.name} ended early")


def specs(options: argparse.Namespace, folder: Path, scratch: Path) -> Iterator[Spec]:
    """Who takes part; GGUF files are written here."""
    common = {"threads": options.threads, "context": max(options.tokens, options.context + options.steps + 1) + 8}
    bundle = {"bundle": str(options.bundle.resolve()), "checkpoint": str(folder)}
    yield Spec(name="k25", python=sys.executable, script="k25.py", options={**common, **bundle, "variant": "fast"})
    yield Spec(
        name="transformers bf16",
        python=sys.executable,
        script="transformers_bf16.py",
        options={**common, "checkpoint": str(folder), "variant": "grouped_mm"},
    )
    if options.llama is None:
        print("compare: llama.cpp is left out: --llama names no Python", file=sys.stderr)
        return
    for name, dense in (("llama.cpp Q4_0 + BF16", "bf16"), ("llama.cpp Q4_0", "q4_0")):
        path = scratch / f"{dense}.gguf"
        if not path.exists():
            command = [options.llama, "-P", str(PEERS / "gguf_file.py"), str(folder), str(path), dense]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().rpartition("\n")[2]
                print(f"compare: {name} is left out: no GGUF file: {last}", file=sys.stderr)
                continue
            print(f"compare: {name}: {done.stdout.strip()}", file=sys.stderr)
        yield Spec(name=name, python=options.llama, script="llama_cpp.py", options={**common, "gguf": str(path)})


@contextmanager
def contenders(found: Sequence[Spec]) -> Iterator[list[Contender]]:
    """Those that start."""
    with ExitStack() as opened:
        started = []
        for spec in found:
            contender = Contender(spec)
            opened.callback(contender.close)
            if contender.missing:
                print(f"compare: {spec.name} is left out: {contender.missing} is not installed", file=sys.stderr)
            else:
                started.append(contender)
        yield started


def agreement(names: Sequence[Contender], ids: np.ndarray[Any, Any], scratch: Path) -> dict[str, Any]:
    """Logits of each against k25's own: single tokens (no attention) and prompts of 32; relative L2, first choices."""
    found: dict[str, Any] = {}
    for length in (1, 32):
        logits: dict[str, list[np.ndarray[Any, Any]]] = {}
        for index in range(PROMPTS_COMPARED):
            prompt = ids[index * length : (index + 1) * length].tolist()
            for contender in names:
                file = scratch / "logits.npy"
                contender.ask(do="logits", prompt=prompt, file=str(file))
                logits.setdefault(contender.name, []).append(np.load(file))
        ours = logits[names[0].name]
        for contender in names[1:]:
            pairs = list(zip(logits[contender.name], ours, strict=True))
            errors = [float(np.linalg.norm(theirs - own) / np.linalg.norm(own)) for theirs, own in pairs]
            found.setdefault(contender.name, {})[f"prompts of {length}"] = {
                "relative_l2": {"least": min(errors), "median": statistics.median(errors)},
                "same_first_choice": f"{sum(bool(a.argmax() == b.argmax()) for a, b in pairs)} of {len(pairs)}",
            }
    return found


def measure(running: Sequence[Contender], options: argparse.Namespace, ids: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Rounds in turns: seconds of each work by contender, and the bandwidth."""
    bandwidth = ReadBandwidth(native_library())
    rates: list[float] = []
    around: list[tuple[float, float]] = []  # the bandwidth before and after each of k25's decode rounds
    times: dict[str, dict[str, list[float]]] = {item.name: {work: [] for work in WORKS} for item in running}
    prompts = {"prefill": ids[: options.tokens].tolist(), "decode": ids[: options.context].tolist()}
    tokens = ids[options.context : options.context + options.steps + 1].tolist()
    for turn in range(options.rounds + 1):
        print(f"compare: round {turn} of {options.rounds}", file=sys.stderr)
        for work in WORKS:
            for contender in running:
                rates.append(bandwidth())
                seconds = contender.ask(do=work, prompt=prompts[work], tokens=tokens)
                if turn:  # the first is a warm-up
                    times[contender.name][work].append(seconds)
                    if contender.name == "k25" and work == "decode":
                        around.append((rates[-1], bandwidth()))
    return {"rates": rates, "around": around, "times": times}


#: Where the bandwidth before and after differs by more, the memory changed its speed meanwhile.
SAME_SPEED = 0.1


def share_by_round(measured: dict[str, Any], bytes_a_step: int) -> dict[str, Any]:
    """Of each round of k25's decode its share of the bandwidth measured around it; rounds of one speed only."""
    rounds = []
    for (before, after), seconds in zip(measured["around"], measured["times"]["k25"]["decode"], strict=True):
        if abs(after - before) <= SAME_SPEED * max(before, after):
            rate = (before + after) / 2
            rounds.append({"gb_per_s": rate / 1e9, "share": bytes_a_step / seconds / rate})
    shares = [row["share"] for row in rounds]
    return {"median": statistics.median(shares) if shares else None, "rounds": rounds}


def result(measured: dict[str, Any], options: argparse.Namespace, bytes_a_step: int) -> dict[str, Any]:
    """Best, median and ratios to k25."""
    rates, times = measured["rates"], measured["times"]
    ours = times["k25"]
    rows: dict[str, Any] = {}
    for name, works in times.items():
        rows[name] = {}
        for work, seconds in works.items():
            amount = 1 if work == "decode" else options.tokens
            rows[name][work] = {
                "ms": {"best": min(seconds) * 1e3, "median": statistics.median(seconds) * 1e3},
                "tokens_per_s": {"best": amount / min(seconds), "median": amount / statistics.median(seconds)},
                "k25_is_faster_by": {
                    "best": min(seconds) / min(ours[work]),
                    "median": statistics.median(seconds) / statistics.median(ours[work]),
                },
            }
    best, median = min(ours["decode"]), statistics.median(ours["decode"])
    return {
        "machine": machine_facts(),
        "threads": options.threads,
        "rounds": options.rounds,
        "read_gb_per_s": {"best": max(rates) / 1e9, "median": statistics.median(rates) / 1e9},
        "bytes_of_a_token": bytes_a_step,
        "decode_share_of_bandwidth": {
            "best": bytes_a_step / best / max(rates),
            "median": bytes_a_step / median / statistics.median(rates),
        },
        "decode_share_by_round": share_by_round(measured, bytes_a_step),
        "contenders": rows,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    share, read = report["decode_share_of_bandwidth"], report["read_gb_per_s"]
    lines = [
        f"reading {read['best']:.1f} GB/s (median {read['median']:.1f}); decode of k25 reaches "
        f"{share['best']:.0%} of it (median {share['median']:.0%}; {_by_round(report['decode_share_by_round'])})",
        "",
        "| contender | work | tokens/s best | median | ms best | median | k25 faster by, best | median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, works in report["contenders"].items():
        for work, row in works.items():
            rate, time, ratio = row["tokens_per_s"], row["ms"], row["k25_is_faster_by"]
            lines.append(
                f"| {name} | {work} | {rate['best']:.1f} | {rate['median']:.1f} | {time['best']:.2f} | "
                f"{time['median']:.2f} | {ratio['best']:.2f} | {ratio['median']:.2f} |"
            )
    return "\n".join(lines)


def _by_round(shares: dict[str, Any]) -> str:
    rounds = shares["rounds"]
    if not rounds:
        return "no round in which the memory kept its speed"
    return f"round by round {shares['median']:.0%} in {len(rounds)} that kept one speed of memory"


def picture(report: dict[str, Any], options: argparse.Namespace) -> str:
    """Tokens a second of each contender, decode and prefill."""
    charts = []
    for work in WORKS:
        rates = {name: rows[work]["tokens_per_s"] for name, rows in report["contenders"].items()}
        bars = [
            Bar(label=name, best=rate["best"], median=rate["median"], text=f"{rate['best']:.0f}", is_ours=name == "k25")
            for name, rate in rates.items()
        ]
        title = "Decode, tokens/s" if work == "decode" else f"Prefill of {options.tokens}, tokens/s"
        charts.append(Chart(title=title, bars=bars))
    machine = report["machine"]
    return picture_of_charts(
        charts, f"{machine['processor']}, {machine['cores']} cores; {options.rounds} rounds in turns"
    )


def main() -> None:
    """Start everybody, take turns, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--llama", help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--gguf", type=Path, help="a folder that keeps the GGUF files for the next run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    manifest = read_manifest(options.bundle)
    folder = checkpoint_folder(options.bundle)
    ids = np.random.default_rng(0).integers(0, manifest.model.text.vocab_size - 1, 4096)
    if manifest.model.media_placeholder_token_id is not None:
        ids += ids >= manifest.model.media_placeholder_token_id
    middle = options.context + 1 + (options.steps + 1) / 2
    step = model_bytes(manifest).step(sequences=1, context=middle)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.gguf or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        with contenders(list(specs(options, folder, scratch))) as running:
            report = result(measure(running, options, ids), options, step.total)
            report["agreement_with_k25"] = agreement(running, ids, Path(temporary))
            report["facts"] = {contender.name: contender.facts for contender in running}
    print(table(report))
    print(json.dumps(report["agreement_with_k25"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.picture:
        options.picture.write_text(picture(report, options))


if __name__ == "__main__":
    main()

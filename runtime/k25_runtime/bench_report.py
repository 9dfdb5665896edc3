"""What a run of `bench` found: figures, what follows from them, and both as JSON and as rows of a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k25_plugins.version import __version__
from k25_runtime.bench_bytes import StepBytes
from k25_runtime.cores import usable_cores

FORMAT = "k25-bench"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of a figure over the rounds."""

    best: float
    median: float

    def of(self, amount: float) -> Spread:
        """`amount` a second, where this is seconds."""
        return Spread(best=amount / self.best, median=amount / self.median)

    def times(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(best=self.best * factor, median=self.median * factor)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a figure with its unit, and what it is to be read against."""

    name: str
    best: str
    median: str
    unit: str
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Seconds are of a decode step, a prefill, a component call and of loading; bytes of memory may be unknown."""

    bundle: str
    options: dict[str, Any]
    machine: dict[str, Any]
    runtime: dict[str, str]
    bandwidth_how: str
    read_bytes_per_s: Spread
    step: StepBytes
    experts_read: float
    decode_s: Spread
    prefill_s: Spread
    call_s: Spread
    calls: int
    load_s: Spread
    anonymous_bytes: int | None
    anonymous_bytes_after_use: int | None

    @property
    def decode_bytes_per_s(self) -> Spread:
        """Bytes of a step over its time."""
        return self.decode_s.of(self.step.total)

    @property
    def decode_share(self) -> Spread:
        """Share of the bandwidth measured that decode reaches, best against best and median against median."""
        reached, mark = self.decode_bytes_per_s, self.read_bytes_per_s
        return Spread(best=reached.best / mark.best, median=reached.median / mark.median)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        step = self.step
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "bundle": self.bundle,
            "options": self.options,
            "machine": self.machine,
            "runtime": {"k25-export": __version__, **self.runtime},
            "read_bandwidth": {"how": self.bandwidth_how, "gb_per_s": _rounded(self.read_bytes_per_s.times(1e-9))},
            "bytes_of_a_step": {**asdict(step), "total": step.total, "experts_read_a_layer": self.experts_read},
            "decode": {
                "ms_a_step": _rounded(self.decode_s.times(1e3)),
                "tokens_per_s": _rounded(self.decode_s.of(self.options["sequences"])),
                "gb_per_s": _rounded(self.decode_bytes_per_s.times(1e-9)),
                "share_of_bandwidth": _rounded(self.decode_share),
            },
            "prefill": {
                "ms": _rounded(self.prefill_s.times(1e3)),
                "tokens_per_s": _rounded(self.prefill_s.of(self.options["tokens"])),
            },
            "overhead": {"component_calls": self.calls, "us_a_component_call": _rounded(self.call_s.times(1e6))},
            "load": {
                "seconds": _rounded(self.load_s),
                "anonymous_bytes": self.anonymous_bytes,
                "anonymous_bytes_after_use": self.anonymous_bytes_after_use,
            },
        }

    def rows(self) -> Iterator[Row]:
        """The table."""
        options, share = self.options, self.decode_share
        yield _row("reading memory", self.read_bytes_per_s.times(1e-9), "GB/s", f"by {self.bandwidth_how}", digits=1)
        what = "decode" if options["sequences"] == 1 else f"decode, {options['sequences']} sequences"
        yield _row(what, self.decode_s.times(1e3), "ms a step", f"{self.step.total / 1e6:.1f} MB read")
        yield _row("", self.decode_s.of(options["sequences"]), "tokens/s", digits=1)
        remark = f"{share.best:.0%} of the bandwidth (median {share.median:.0%})"
        yield _row("", self.decode_bytes_per_s.times(1e-9), "GB/s", remark, digits=1)
        yield _row(f"prefill of {options['tokens']}", self.prefill_s.times(1e3), "ms", digits=1)
        yield _row("", self.prefill_s.of(options["tokens"]), "tokens/s", digits=0)
        yield _row("runtime, a component call", self.call_s.times(1e6), "us", f"{self.calls} calls a step", digits=1)
        yield _row("loading", self.load_s, "s", digits=3)
        for name, size in (
            ("memory of its own", self.anonymous_bytes),
            ("  after use", self.anonymous_bytes_after_use),
        ):
            if size is not None:
                yield Row(name=name, best=f"{size / 1e6:.1f}", median="", unit="MB", remark="weights stay in the files")


def machine_facts() -> dict[str, Any]:
    """What the figures depend on, but for the bundle."""
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": load,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _row(name: str, value: Spread, unit: str, remark: str = "", *, digits: int = 2) -> Row:
    return Row(
        name=name, best=f"{value.best:.{digits}f}", median=f"{value.median:.{digits}f}", unit=unit, remark=remark
    )


def _rounded(value: Spread) -> dict[str, float]:
    """Six digits: more says nothing."""
    return {name: float(f"{figure:.6g}") for name, figure in asdict(value).items()}

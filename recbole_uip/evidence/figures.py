"""Figures next to their floors: how they are measured, kept and shown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_uip.files import atomic_write
from recbole_uip.records import finite
from recbole_uip.settings import SettingsError

__all__ = [
    "Figure",
    "copy_bandwidth",
    "format_bench",
    "machine",
    "timed",
    "write_figures",
]

COPY_BYTES = 64 << 20  # two such arrays are larger than any cache the copy could hide in


@dataclass(frozen=True)
class Figure:
    """One measured figure and its floor.

    Attributes
    ----------
    key : str
        What it is, for programs.
    name : str
        What it is, for people.
    measured : float
    unit : {"s", "FLOP/s", "events/s", "B"}
    floor : float or None
        In the same unit; of a rate, the ceiling.
    details : dict
        What it was made of.
    """

    key: str
    name: str
    measured: float
    unit: str
    floor: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times the floor it costs; 1 is the best that can be."""
        if not self.floor or not self.measured:
            return None
        if self.unit.endswith("/s"):
            return self.floor / self.measured
        return self.measured / self.floor

    def to_dict(self) -> dict[str, Any]:
        """The figure as JSON holds it."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def copy_bandwidth(n_bytes: int = COPY_BYTES, repeats: int = 5) -> float:
    """Bytes read and written in a second by a memory copy of ``n_bytes``, the best of several."""
    source = np.ones(n_bytes // 8)
    target = np.zeros_like(source)
    return 2 * source.nbytes / min(timed(lambda: np.copyto(target, source), repeats))


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return seconds


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The machine, and how busy and how fast at copying it is."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "copy_bandwidth": copy_bandwidth(),
    }


def write_figures(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write figures as JSON, whole or not at all.

    Raises
    ------
    SettingsError
        If the file cannot be written.
    """
    try:
        with atomic_write(path, "w") as file:
            json.dump(finite(results), file, indent=2, allow_nan=False)
            file.write("\n")
    except OSError as error:
        raise SettingsError(f"--json={os.fspath(path)}: {error}") from error


def format_bench(results: Mapping[str, Any]) -> str:
    """A header about the machine, the table, and how its floors are counted."""
    rows = [("figure", "measured", "floor", "ratio")]
    for each in results["figures"]:
        unit, ratio = each["unit"], each["ratio"]
        rows.append(
            (
                each["name"],
                _quantity(each["measured"], unit),
                _quantity(each["floor"], unit),
                "-" if ratio is None else f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        " | ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    rule = "-+-".join("-" * width for width in widths)
    return "\n".join([_header(results), "", lines[0], rule, *lines[1:], "", *results["notes"]])


def _header(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    load = " ".join(f"{value:.2f}" for value in machine["load_average"])
    parts = [
        f"{results['dataset']} on {machine['cpu']}: cores {machine['cores']}, "
        f"threads {machine['threads']}, load average at start {load}",
        f"copy {machine['copy_bandwidth'] / 1e9:.1f} GB/s",
    ]
    if "device" in machine:
        parts.append(f"LM on {machine.get('gpu', machine['device'])} in {machine['dtype']}")
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return "; ".join(parts)


def _quantity(value: float | None, unit: str) -> str:
    """``value`` with three digits and a unit of its size."""
    if value is None:
        return "-"
    if unit == "s":
        scales = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    else:
        scales = ((1e9, f"G{unit}"), (1e6, f"M{unit}"), (1e3, f"k{unit}"))
    scale, shown = next((pair for pair in scales if value >= pair[0]), scales[-1])
    scaled = value / scale
    return f"{scaled:,.0f} {shown}" if scaled >= 100 else f"{scaled:.3g} {shown}"

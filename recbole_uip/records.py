"""What a record of a run or a measurement says besides: versions, memory, numbers JSON can hold."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import resource
import sys
from typing import Any

import torch

__all__ = ["finite", "peak_memory", "versions"]

_PACKAGES = ("recbole-uip", "recbole", "torch", "numpy", "pandas", "scikit-learn", "transformers")


def peak_memory() -> int:
    """Most bytes that the process has had resident so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return usage * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape results, and the GPU if there is one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["recbole-uip"] is None:
        # A checkout that is not installed.
        from recbole_uip import __version__

        found["recbole-uip"] = __version__
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: infinities as strings, NaN (no such metric) as null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value

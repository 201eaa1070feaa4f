"""Numbers in words: the same digits and signs everywhere in a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from recbole_uip.evidence.statistics import Difference

__all__ = [
    "METRIC_NAMES",
    "NOTHING",
    "amount",
    "difference",
    "interval",
    "joined",
    "mean_and_deviation",
    "number",
    "p_value",
    "share",
]

METRIC_NAMES = {"auc": "AUC", "logloss": "LogLoss", "gauc": "GAUC", "list_auc": "list AUC"}
#: Stands where the data give no number.
NOTHING = "–"
_MINUS = "−"


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number with a typographic minus."""
    if value is None or math.isnan(value):
        return NOTHING
    rounded = round(value, digits) + 0.0  # no -0
    sign = sign and rounded != 0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", _MINUS)


def share(value: float, digits: int = 2, sign: bool = True) -> str:
    """A share in per cent."""
    shown = number(100 * value, digits, sign)
    return shown if shown == NOTHING else f"{shown}%"


def mean_and_deviation(values: Iterable[float], digits: int = 4) -> str:
    """Mean ± sample standard deviation of the values that are numbers."""
    values = np.array([value for value in values if not math.isnan(value)])
    if len(values) == 0:
        return NOTHING
    mean = number(float(values.mean()), digits)
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def interval(found: Difference, digits: int = 4) -> str:
    """The interval of a difference."""
    if math.isnan(found.low) or math.isnan(found.high):
        return NOTHING
    low, high = (number(bound, digits, sign=True) for bound in (found.low, found.high))
    return f"[{low}, {high}]"


def difference(found: Difference) -> str:
    """A difference and, where there is one, its interval."""
    mean, bounds = number(found.mean, sign=True), interval(found)
    return mean if bounds == NOTHING else f"{mean} {bounds}"


def p_value(value: float) -> str:
    """Three digits, or that it is less than they can show."""
    if math.isnan(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def amount(value: float) -> str:
    """A count with separators of thousands."""
    return NOTHING if value is None or math.isnan(value) else f"{value:,.0f}"


def joined(names: Sequence[str], most: int = 4) -> str:
    """Names in a row; of many the first, and how many more there are."""
    names = list(dict.fromkeys(name for name in names if name))
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"

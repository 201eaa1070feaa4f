"""Quantile bins: how a scalar, such as leniency or a match with an item, becomes a token."""

from __future__ import annotations

import numpy as np

__all__ = ["quantile_edges"]


def quantile_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Inner edges of quantile bins, shape (at most bins - 1,); equal edges are merged.

    Without values there is one bin.

    Parameters
    ----------
    values : ndarray, shape (n,)
        Values of training rows.
    bins : int
    """
    if len(values) == 0:
        return np.empty(0)
    return np.unique(np.quantile(values, np.arange(1, bins) / bins))

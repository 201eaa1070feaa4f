"""Empirical Bayes: prior variances of the taste filter, by how well it predicts labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recbole_uip.em.kernels import TasteFilter, pack, profile_values
from recbole_uip.em.states import Events, History, iter_states

__all__ = ["climb", "log_evidence"]


def log_evidence(
    kernel: TasteFilter, rate: np.ndarray, history: History, events: Events, rows: np.ndarray
) -> float:
    """Mean log p(label | the events that its row may see) over ``rows``, in nats.

    With point-in-time profiles this is the prequential likelihood: every label is predicted before
    it is used. With cross-fitted profiles no row sees itself. Static profiles do see the row's own
    label, so the variances chosen for them are too large.

    Parameters
    ----------
    kernel : TasteFilter
    rate : ndarray of float64, shape (n_items,) or (n_rate_folds, n_items)
        Smoothed like rates.
    history : History
    events : Events
    rows : ndarray of int64, shape (n,)
    """
    total, kernels = 0.0, pack([kernel], rate)
    for at, states in iter_states(kernels, history, events, rows):
        block = rows[at]
        item, fold = events.item[block], events.fold[block]
        logits = profile_values(states, kernels, 0, item, fold)
        logits += kernels.intercept[fold % len(kernels.intercept), item]
        total -= np.logaddexp(0.0, (1.0 - 2.0 * events.liked[block]) * logits).sum()
    return total / len(rows)


def climb(
    objective: Callable[[tuple[float, ...]], float],
    start: tuple[float, ...],
    limit: float = 64.0,
) -> tuple[float, ...]:
    """Maximise over positive scales by doublings and halvings, one coordinate at a time.

    Empirical Bayes needs the order of magnitude of a prior variance, not its digits.

    Parameters
    ----------
    objective : callable
    start : tuple of float
    limit : float
        No scale leaves [start / limit, start * limit].
    """
    best, value = tuple(start), objective(tuple(start))
    improved = True
    while improved:
        improved = False
        for axis, step in [(a, s) for a in range(len(best)) for s in (2.0, 0.5)]:
            while True:
                scales = (*best[:axis], best[axis] * step, *best[axis + 1 :])
                inside = start[axis] / limit <= scales[axis] <= start[axis] * limit
                candidate = objective(scales) if inside else -np.inf
                if not candidate > value + 1e-6:  # nor if it is NaN
                    break
                best, value, improved = scales, candidate, True
    return best

"""Evidence weights: how much, and in which direction, an event speaks about its user."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Evidence", "evidence", "like_rate", "smoothed_rate"]

PRIOR_COUNT = 10.0


class Evidence(NamedTuple):
    """What each event adds to its user's running sums.

    Attributes
    ----------
    weight : ndarray of float64, shape (n_events,)
        Factor w of the event's score vector.
    count : ndarray of float64, shape (n_events,)
        What the event adds to the number of events N; 0 for an event that is not evidence.
    """

    weight: np.ndarray
    count: np.ndarray


def like_rate(
    item: np.ndarray, liked: np.ndarray, n_items: int, prior_count: float = PRIOR_COUNT
) -> np.ndarray:
    """Smoothed like rate p_i = (likes_i + a p) / (n_i + a), p the overall rate, a ``prior_count``.

    The overall rate is smoothed by half an event of each kind, so no rate is ever 0 or 1.

    Parameters
    ----------
    item : ndarray of int, shape (n_events,)
    liked : ndarray, shape (n_events,)
        1 where liked, 0 where not.
    n_items : int

    Returns
    -------
    ndarray of float64, shape (n_items,)
    """
    likes = np.bincount(item, weights=liked, minlength=n_items)
    counts = np.bincount(item, minlength=n_items)
    return smoothed_rate(counts, likes, prior_count)


def smoothed_rate(
    counts: np.ndarray, likes: np.ndarray, prior_count: float = PRIOR_COUNT
) -> np.ndarray:
    """:func:`like_rate` of each item's numbers of events and of likes, shape (n_items,)."""
    overall = (np.sum(likes) + 0.5) / (np.sum(counts) + 1.0)
    return (likes + prior_count * overall) / (counts + prior_count)


def evidence(
    kind: str, item: np.ndarray, liked: np.ndarray | None, rate: np.ndarray | None
) -> Evidence:
    """Evidence weights of events.

    ``positive`` counts liked events, ``negative`` disliked ones, ``all`` every event, each
    with weight 1. ``contrast`` gives every event w = y - p_i: the score of the random-slope
    model logit p(like | u, i) = a_i + delta_u' g_i at delta = 0, so that an item's popularity
    says nothing about a user's taste.

    Parameters
    ----------
    kind : {"positive", "negative", "all", "contrast"}
    item : ndarray of int, shape (n_events,)
    liked : ndarray, shape (n_events,) or None
        None for implicit feedback: every event is positive.
    rate : ndarray, shape (n_items,) or None
        p_i, which only ``contrast`` needs.

    Raises
    ------
    ValueError
        If ``negative`` or ``contrast`` is asked of feedback without labels.
    """
    if liked is None:
        if kind in ("negative", "contrast"):
            raise ValueError(
                f"weight {kind!r} needs events that are liked and events that are not, and this "
                "data has no labels: use weight positive or all"
            )
        ones = np.ones(len(item))
        return Evidence(ones, ones)
    liked = np.asarray(liked, dtype=np.float64)
    if kind == "positive":
        return Evidence(liked, liked)
    if kind == "negative":
        return Evidence(1.0 - liked, 1.0 - liked)
    ones = np.ones(len(item))
    if kind == "all":
        return Evidence(ones, ones)
    if kind == "contrast":
        return Evidence(liked - rate[item], ones)
    raise ValueError(f"unknown evidence weight {kind!r}")

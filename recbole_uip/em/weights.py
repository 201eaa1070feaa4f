"""Evidence weights: how much, and in which direction, an event speaks about its user."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recbole_uip.behaviours import DataError

__all__ = [
    "Evidence",
    "event_counts",
    "evidence",
    "like_rate",
    "out_of_fold_rates",
    "smoothed_rate",
]

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
    prior_count : float
        Events of the overall rate that every item is given.

    Returns
    -------
    ndarray of float64, shape (n_items,)
    """
    likes = np.bincount(item, weights=liked, minlength=n_items)
    counts = np.bincount(item, minlength=n_items)
    return smoothed_rate(counts, likes, prior_count)


def out_of_fold_rates(
    item: np.ndarray, liked: np.ndarray, fold: np.ndarray, n_items: int, n_folds: int
) -> np.ndarray:
    """Like rates that each fold of users meets: :func:`like_rate` of the other folds' events.

    So no like rate that a user's rows meet has a label of theirs in it: of an item of few events it
    would give the label away. It tells of the label even so, within the item and in reverse, for it
    is lower where the user's fold liked the item. No field may therefore hold it.

    Parameters
    ----------
    item : ndarray of int, shape (n_events,)
    liked : ndarray, shape (n_events,)
    fold : ndarray of int, shape (n_events,)
        Fold of each event's user.
    n_items, n_folds : int

    Returns
    -------
    ndarray of float64, shape (n_folds, n_items)
    """
    at, shape = fold * n_items + item, (n_folds, n_items)
    likes = np.bincount(at, weights=liked, minlength=n_folds * n_items).reshape(shape)
    counts = np.bincount(at, minlength=n_folds * n_items).reshape(shape)
    others = zip(counts.sum(axis=0) - counts, likes.sum(axis=0) - likes, strict=True)
    return np.stack([smoothed_rate(count, like) for count, like in others])


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
    DataError
        If ``negative`` or ``contrast`` is asked of feedback without labels.
    ValueError
        If ``kind`` is unknown.
    """
    count = event_counts(kind, liked, len(item))
    if kind == "contrast":
        return Evidence(np.asarray(liked, dtype=np.float64) - rate[item], count)
    return Evidence(count, count)


def event_counts(kind: str, liked: np.ndarray | None, n_events: int) -> np.ndarray:
    """What each event adds to the number of events N; see :func:`evidence`, also for errors.

    Returns
    -------
    ndarray of float64, shape (n_events,)
    """
    if liked is None and kind in ("negative", "contrast"):
        raise DataError(
            f"weight {kind!r} needs events that are liked and events that are not, and this "
            "data has no labels: use weight positive or all, or name labels (threshold or "
            "LABEL_FIELD; for bank build --label, or --rating and --threshold)"
        )
    if kind in ("positive", "negative") and liked is not None:
        liked = np.asarray(liked, dtype=np.float64)
        return liked if kind == "positive" else 1.0 - liked
    if kind in ("positive", "all", "contrast"):
        return np.ones(n_events)
    raise ValueError(f"unknown evidence weight {kind!r}")

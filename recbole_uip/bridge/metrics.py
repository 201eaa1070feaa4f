"""Metrics that RecBole's value-based evaluators leave out."""

from __future__ import annotations

import numpy as np

__all__ = ["gauc"]


def gauc(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> float:
    """Impression-weighted mean over users of the AUC among a user's own rows.

    RecBole's GAUC is of the ranking type, which cannot be computed beside AUC and LogLoss.

    Parameters
    ----------
    user : ndarray of int, shape (n_rows,)
    label : ndarray, shape (n_rows,)
        1 where liked.
    score : ndarray of float, shape (n_rows,)
        Ties share their mid-rank.

    Returns
    -------
    float
        NaN if no user has rows of both classes.
    """
    user, score = np.asarray(user), np.asarray(score, dtype=np.float64)
    positive = np.asarray(label) > 0.5
    if len(user) == 0:
        return float("nan")
    order = np.lexsort((score, user))
    user, score, positive = user[order], score[order], positive[order]
    new_user = np.r_[True, user[1:] != user[:-1]]
    new_run = new_user | np.r_[True, score[1:] != score[:-1]]
    run = np.cumsum(new_run) - 1
    run_start = np.flatnonzero(new_run)
    run_end = np.r_[run_start[1:], len(user)]
    group = np.cumsum(new_user) - 1
    group_start = np.flatnonzero(new_user)
    # Mid-rank of each row within its user, from 1.
    rank = (run_start[run] + run_end[run] + 1) / 2 - group_start[group]
    n_rows = np.bincount(group)
    n_positive = np.bincount(group, weights=positive)
    n_pairs = n_positive * (n_rows - n_positive)
    both = n_pairs > 0
    if not both.any():
        return float("nan")
    rank_sum = np.bincount(group, weights=rank * positive)
    wins = rank_sum - n_positive * (n_positive + 1) / 2
    return float(np.average(wins[both] / n_pairs[both], weights=n_rows[both]))

"""Metrics that RecBole's value-based evaluators leave out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["GroupAUCs", "gauc", "group_aucs", "lists"]


class GroupAUCs(NamedTuple):
    """AUC of each group that has rows of both labels.

    Attributes
    ----------
    first : ndarray of int, shape (n_groups,)
        A row of the group.
    n_rows : ndarray of int, shape (n_groups,)
    auc : ndarray of float, shape (n_groups,)
    """

    first: np.ndarray
    n_rows: np.ndarray
    auc: np.ndarray

    @property
    def mean(self) -> float:
        """Their mean, weighted by rows; NaN without groups."""
        return float(np.average(self.auc, weights=self.n_rows)) if len(self.auc) else float("nan")


def lists(user: np.ndarray, time: np.ndarray | None) -> np.ndarray:
    """Number of each row's list: the rows of one user at one time, which one profile serves.

    Parameters
    ----------
    user : ndarray of int, shape (n_rows,)
    time : ndarray of float, shape (n_rows,), or None
        Without times, all rows of a user are one list.

    Returns
    -------
    ndarray of int, shape (n_rows,)
    """
    user = np.asarray(user)
    if time is None:
        return user
    order = np.lexsort((time, user))
    numbers = np.empty(len(user), dtype=np.int64)
    numbers[order] = np.cumsum(_starts(user[order]) | _starts(time[order])) - 1
    return numbers


def gauc(group: np.ndarray, label: np.ndarray, score: np.ndarray) -> float:
    """Mean over groups of the AUC among a group's rows, weighted by the group's rows.

    GAUC where the groups are users; where they are :func:`lists`, "list AUC": a user's rows of
    different times have profiles of different histories, and GAUC compares these too.

    RecBole's GAUC is of the ranking type, which cannot be computed beside AUC and LogLoss.

    Parameters
    ----------
    group : ndarray of int, shape (n_rows,)
    label : ndarray, shape (n_rows,)
        1 where liked.
    score : ndarray of float, shape (n_rows,)
        Ties share their mid-rank.

    Returns
    -------
    float
        NaN if no group has rows of both labels.
    """
    return group_aucs(group, label, score).mean


def group_aucs(group: np.ndarray, label: np.ndarray, score: np.ndarray) -> GroupAUCs:
    """The AUCs that :func:`gauc` averages; parameters as there."""
    group, score = np.asarray(group), np.asarray(score, dtype=np.float64)
    positive = np.asarray(label) > 0.5
    order = np.lexsort((score, group))
    group, score, positive = group[order], score[order], positive[order]
    new_group = _starts(group)
    new_run = new_group | _starts(score)
    run = np.cumsum(new_run) - 1
    run_start = np.flatnonzero(new_run)
    run_end = np.r_[run_start[1:], len(group)]
    number = np.cumsum(new_group) - 1
    group_start = np.flatnonzero(new_group)
    # Mid-rank of each row within its group, from 1.
    rank = (run_start[run] + run_end[run] + 1) / 2 - group_start[number]
    n_rows = np.bincount(number)
    n_positive = np.bincount(number, weights=positive)
    n_pairs = n_positive * (n_rows - n_positive)
    both = n_pairs > 0
    rank_sum = np.bincount(number, weights=rank * positive)
    wins = rank_sum - n_positive * (n_positive + 1) / 2
    return GroupAUCs(order[group_start[both]], n_rows[both], wins[both] / n_pairs[both])


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it; the first does."""
    return np.r_[np.ones(min(1, len(values)), bool), values[1:] != values[:-1]]

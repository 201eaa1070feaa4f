"""Points of a user's timeline at which a profile is inferred, for rows later than them.

A profile that costs a pass through a language model cannot be made anew for each row. It is made
at *snapshots*: the first s events of a timeline, for a few history sizes s that are the same for
everybody. A row has the latest snapshot all of whose events it may see (see :mod:`states`), so
all of them are strictly earlier, and nothing that comes later moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recbole_uip.em.states import History

__all__ = ["Snapshots", "take_snapshots"]


@dataclass(frozen=True)
class Snapshots:
    """The snapshots that rows have.

    Attributes
    ----------
    timeline, size : ndarray of int64, shape (n,)
        Timeline of each snapshot, and how many of its events are in it.
    fitted : ndarray of bool, shape (n,)
        Whether all of these are training rows, so that parameters may be fitted on it.
    of_row : ndarray of int64, shape (n_rows,)
        Snapshot of each row; -1 for a row that is earlier than its user's first.
    """

    timeline: np.ndarray
    size: np.ndarray
    fitted: np.ndarray
    of_row: np.ndarray

    def __len__(self) -> int:
        return len(self.size)

    def events(self, history: History, index: int) -> np.ndarray:
        """Rows that are the events of a snapshot, in the order of time."""
        first = history.first[self.timeline[index]]
        return history.events[first : first + self.size[index]]

    def users(self, history: History, user: np.ndarray) -> np.ndarray:
        """User of each snapshot, given that of each row, shape (n,)."""
        return user[history.events[history.first[self.timeline]]]


def take_snapshots(history: History, sizes: Sequence[int], train: np.ndarray) -> Snapshots:
    """The latest snapshot of each row, at one of ``sizes`` or at the end of training.

    Parameters
    ----------
    history : History
    sizes : sequence of int
        History sizes, at least 1.
    train : ndarray of bool, shape (n_rows,)
        Training rows. A timeline's end of training is its first event that is
        not one.
    """
    held_out = np.concatenate([[0], np.cumsum(~train[history.events])])
    first, last = history.first[:-1], history.first[1:]
    # the first position of each timeline with one more held-out event before it than at its start
    end = np.searchsorted(held_out, held_out[first], side="right") - 1
    end = np.minimum(end, last) - first
    grid = np.concatenate([[0], np.unique(np.asarray(sizes, dtype=np.int64))])
    size = grid[np.searchsorted(grid, history.seen, side="right") - 1]
    ends = end[history.timeline]
    size = np.where(ends <= history.seen, np.maximum(size, ends), size)
    known = size > 0
    pairs = np.stack([history.timeline[known], size[known]], axis=1)
    distinct, inverse = np.unique(pairs, axis=0, return_inverse=True)
    of_row = np.full(len(size), -1, dtype=np.int64)
    of_row[known] = inverse.ravel()
    timeline, taken = distinct[:, 0], distinct[:, 1]
    return Snapshots(timeline, taken, taken <= end[timeline], of_row)

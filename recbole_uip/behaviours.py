"""The event table: who met which item, liked it or not, when, and in which split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["TEST", "TRAIN", "VALID", "Behaviours", "DataError", "folds_of", "in_seconds"]

TRAIN, VALID, TEST = 0, 1, 2

# Seconds since 1970 are smaller, until the year 5138; milliseconds are larger, from 1973 on.
_SECONDS = 1e11


def folds_of(users: Iterable[str], n_folds: int, seed: int) -> np.ndarray:
    """Fold of each user, int64: the same wherever and whenever the user comes.

    Parameters
    ----------
    users : iterable of str
        Their tokens.
    n_folds, seed : int
    """
    key = str(seed).encode()
    hashes = (hashlib.blake2b(user.encode(), digest_size=4, key=key).digest() for user in users)
    return np.array([int.from_bytes(each, "little") % n_folds for each in hashes], dtype=np.int64)


class DataError(ValueError):
    """Events that something cannot be fitted on: too few, or none of the kind."""


def in_seconds(time: np.ndarray) -> bool:
    """Whether timestamps can be seconds since 1970, rather than milliseconds or less."""
    return len(time) == 0 or abs(float(np.median(time))) < _SECONDS


@dataclass(frozen=True)
class Behaviours:
    """Rows of a dataset, each both an event of its user's history and a row to be predicted.

    Parameters
    ----------
    user : ndarray of int64, shape (n_rows,)
        User of each row, from 0 to ``n_users - 1``.
    item : ndarray of int64, shape (n_rows,)
        Item of each row, from 0 to ``n_items - 1``.
    liked : ndarray of float64, shape (n_rows,) or None
        Label, 1 where liked and 0 where not; None for implicit feedback (every row is a
        positive event).
    time : ndarray of float64, shape (n_rows,) or None
        Exact timestamp (seconds, or any unit that orders events); None if there is none.
    split : ndarray of int8, shape (n_rows,)
        ``TRAIN``, ``VALID`` or ``TEST``.
    n_users, n_items : int
        Sizes of the two index spaces.
    """

    user: np.ndarray
    item: np.ndarray
    liked: np.ndarray | None
    time: np.ndarray | None
    split: np.ndarray
    n_users: int
    n_items: int

    def __post_init__(self) -> None:
        n_rows = len(self.user)
        for name in ("item", "liked", "time", "split"):
            column = getattr(self, name)
            if column is not None and len(column) != n_rows:
                raise ValueError(f"{name} has {len(column)} rows, but user has {n_rows}")
        for name, size in (("user", self.n_users), ("item", self.n_items)):
            column = getattr(self, name)
            if n_rows and not (column.min() >= 0 and column.max() < size):
                row = int(np.flatnonzero((column < 0) | (column >= size))[0])
                raise ValueError(
                    f"{name} is {column[row]} in row {row}: it must be from 0 to {size - 1}, "
                    f"one below n_{name}s"
                )
        if self.time is not None and not np.isfinite(self.time).all():
            row = int(np.flatnonzero(~np.isfinite(self.time))[0])
            raise ValueError(
                f"time is {self.time[row]} in row {row}: every event needs a finite timestamp; "
                "drop the row, or leave the timestamp column out for cross-fitted profiles"
            )
        if self.liked is not None and not np.isin(self.liked, (0, 1)).all():
            row = int(np.flatnonzero(~np.isin(self.liked, (0, 1)))[0])
            raise ValueError(
                f"liked is {self.liked[row]} in row {row}: labels must be 0 or 1; "
                "set RecBole's threshold to turn ratings into labels"
            )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def train(self) -> np.ndarray:
        """Boolean mask of the training rows, shape (n_rows,)."""
        return self.split == TRAIN

    @property
    def is_time_ordered(self) -> bool:
        """Whether no user has a held-out row earlier than one of their training rows."""
        if self.time is None:
            return False
        last_train = np.full(self.n_users, -np.inf)
        first_held_out = np.full(self.n_users, np.inf)
        np.maximum.at(last_train, self.user[self.train], self.time[self.train])
        np.minimum.at(first_held_out, self.user[~self.train], self.time[~self.train])
        return bool((last_train <= first_held_out).all())

    def in_time_order(self, mask: np.ndarray) -> np.ndarray:
        """Rows in ``mask`` by user, each user's in the order of time, shape (n,)."""
        rows = np.flatnonzero(mask)
        keys = (self.user[rows],) if self.time is None else (self.time[rows], self.user[rows])
        return rows[np.lexsort(keys)]

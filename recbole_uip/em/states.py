"""What is known of a user strictly before a point in time: history, and states along it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from recbole_uip.behaviours import Behaviours
from recbole_uip.em.kernels import Kernels, walk

__all__ = [
    "Events",
    "History",
    "cross_fitted_history",
    "index_history",
    "iter_states",
    "offsets",
    "whole_history",
]

BLOCK_ROWS = 50_000


class Events(NamedTuple):
    """Rows of a dataset as events that enter states.

    Attributes
    ----------
    item, fold : ndarray of int64, shape (n_rows,)
        Item of each row, and fold of its user.
    liked : ndarray of float64, shape (n_rows,)
        Label; ones for implicit feedback.
    """

    item: np.ndarray
    fold: np.ndarray
    liked: np.ndarray

    @classmethod
    def from_behaviours(cls, behaviours: Behaviours, fold: np.ndarray) -> Events:
        """The rows of ``behaviours``; ``fold`` is that of each user, shape (n_users,)."""
        liked = behaviours.liked
        liked = np.ones(len(behaviours)) if liked is None else liked.astype(np.float64)
        return cls(behaviours.item.astype(np.int64), fold[behaviours.user], liked)


@dataclass(frozen=True)
class History:
    """Which events each row may see: a prefix of one timeline.

    A timeline is a sequence of events of one user. A user has one, unless some rows may see other
    events than others: held-out rows than training rows, or rows of one part than of another.

    Attributes
    ----------
    events : ndarray of int64, shape (n_events,)
        Rows that count as history, sorted by timeline, then time.
    first : ndarray of int64, shape (n_timelines + 1,)
        Where each timeline starts in ``events``.
    timeline : ndarray of int64, shape (n_rows,)
        Timeline of each row.
    seen : ndarray of int64, shape (n_rows,)
        Number of its timeline's events that a row may see: the first ``seen`` of them.
    """

    events: np.ndarray
    first: np.ndarray
    timeline: np.ndarray
    seen: np.ndarray

    def followed_by(self, other: History, uses_other: np.ndarray) -> History:
        """Both sets of timelines; rows in the mask ``uses_other`` see those of ``other``."""
        shift = len(self.first) - 1
        return History(
            np.concatenate([self.events, other.events]),
            np.concatenate([self.first, len(self.events) + other.first[1:]]),
            np.where(uses_other, shift + other.timeline, self.timeline),
            np.where(uses_other, other.seen, self.seen),
        )


def index_history(
    user: np.ndarray,
    time: np.ndarray | None,
    is_event: np.ndarray,
    n_users: int,
    refresh: float = 0.0,
) -> History:
    """Find for each row the events of its user that are strictly earlier.

    Parameters
    ----------
    user : ndarray of int64, shape (n_rows,)
    time : ndarray of float64, shape (n_rows,) or None
        None sees every event of the user at every row (static profiles).
    is_event : ndarray of bool, shape (n_rows,)
        Rows that count as history.
    n_users : int
    refresh : float
        A row at time t sees the events before ``t - refresh``, in units of ``time``.

    Returns
    -------
    History
        With one timeline a user; without ``time``, whole for every row.
    """
    whole = whole_history(user, time, is_event, n_users)
    if time is None:
        return _as_rows(whole, user)
    events, first = whole.events, whole.first
    # Events and queries are sorted together, queries first among equal times: the number of
    # events before a query is then exactly the number of strictly earlier ones.
    n_rows = len(user)
    who = np.concatenate([user, user[events]])
    when = np.concatenate([time - refresh, time[events]])
    kind = np.repeat(np.array([0, 1], dtype=np.int8), [n_rows, len(events)])
    order = np.lexsort((kind, when, who))
    events_before = np.cumsum(kind[order], dtype=np.int64)
    query = order < n_rows
    seen = np.empty(n_rows, dtype=np.int64)
    seen[order[query]] = events_before[query]
    return History(events, first, user, seen - first[user])


def cross_fitted_history(
    user: np.ndarray,
    time: np.ndarray | None,
    is_event: np.ndarray,
    n_users: int,
    n_parts: int,
    seed: int,
) -> History:
    """A history by parts: an event sees those of its user in the other parts, other rows see all.

    So no event sees itself, and each sees events of all times, as other rows do.

    Parameters
    ----------
    user, time, is_event, n_users
        As in :func:`index_history`; time only orders what is seen.
    n_parts : int
        Each user's events are dealt out at random to this many parts of equal size.
    seed : int

    Returns
    -------
    History
        With ``1 + n_parts`` timelines a user: of all events, then of all but each part's.
    """
    events = np.flatnonzero(is_event)
    shuffled = np.random.default_rng(seed).permutation(events)
    dealt = shuffled[np.argsort(user[shuffled], kind="stable")]
    first = np.searchsorted(user[dealt], user[dealt])
    # users with fewer events than parts should not all begin with the first part
    part = np.full(len(user), -1)
    part[dealt] = (np.arange(len(dealt)) - first + user[dealt]) % n_parts

    history = _as_rows(whole_history(user, time, is_event, n_users), user)
    for number in range(n_parts):
        others = whole_history(user, time, is_event & (part != number), n_users)
        history = history.followed_by(_as_rows(others, user), part == number)
    return history


def whole_history(
    user: np.ndarray, time: np.ndarray | None, is_event: np.ndarray, n_users: int
) -> History:
    """A history whose rows are the users, each of whom sees all of its events.

    Parameters
    ----------
    user, time, is_event, n_users
        As in :func:`index_history`; without ``time``, events keep their order.
    """
    events = np.flatnonzero(is_event)
    keys = (user[events],) if time is None else (time[events], user[events])
    events = events[np.lexsort(keys)]
    counts = np.bincount(user[events], minlength=n_users)
    first = np.concatenate([[0], np.cumsum(counts)])
    return History(events, first, np.arange(n_users), counts)


def _as_rows(whole: History, user: np.ndarray) -> History:
    """A :func:`whole_history` whose rows are those of ``user``, each of which sees all events."""
    return replace(whole, timeline=user, seen=whole.seen[user])


def offsets(state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measured offset, noise variance and evidence of running sums.

    Parameters
    ----------
    state : ndarray, shape (n, rank + 1)

    Returns
    -------
    offset : ndarray of float64, shape (n, rank)
        y = S / N; 0 without evidence.
    noise : ndarray of float64, shape (n,)
        1 / N; infinite without evidence.
    known : ndarray of bool, shape (n,)
        Whether there is any evidence.
    """
    state = state.astype(np.float64)
    count = state[:, -1]
    known = count > 0
    safe = np.where(known, count, 1.0)
    offset = np.where(known[:, None], state[:, :-1] / safe[:, None], 0.0)
    noise = np.where(known, 1.0 / safe, np.inf)
    return offset, noise, known


def iter_states(
    kernels: Kernels,
    history: History,
    events: Events,
    rows: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """States of rows, each from the events that the row may see.

    Rows are taken in blocks, so memory stays bounded however many there are.

    Parameters
    ----------
    kernels : Kernels
    history : History
    events : Events
        Of all rows that ``history`` speaks of.
    rows : ndarray of int64, optional
        Rows wanted; all by default.
    start : ndarray of float32, shape (n_timelines, width), optional
        State that each timeline begins with; by default, that of a user without events.

    Yields
    ------
    at : ndarray of int64, shape (n,)
        Positions in ``rows``.
    states : ndarray of float32, shape (n, width)
    """
    rows = np.arange(len(history.timeline)) if rows is None else np.asarray(rows)
    timeline, seen = history.timeline[rows], history.seen[rows]
    order = np.lexsort((seen, timeline))
    start = kernels.initial[None, :] if start is None else start
    for low in range(0, len(order), BLOCK_ROWS):
        at = order[low : low + BLOCK_ROWS]
        states = np.empty((len(at), len(kernels.initial)), dtype=np.float32)
        # A timeline that a block boundary cuts is replayed from its start.
        walk(kernels, history.events, history.first, *events, timeline[at], seen[at], start, states)
        yield at, states

r"""What is known of a user strictly before a point in time.

A state is a row of numbers that events enter one by one, in the order of time. A
:class:`Kernel` says how: :class:`RunningSums` here, and the online Laplace filter of
:mod:`recbole_uip.em.filter`. :func:`run` advances many users at once; a
serving path advances one user at a time. Both call the same ``advance``, element by element,
so they give the same bits.

:class:`RunningSums` holds, for the events e of one user,

.. math:: S = \sum_e a^{k_e} w_e g_{i(e)}, \quad N = \sum_e a^{k_e} n_e, \quad
          M = \sum_e a^{2 k_e} n_e^2,

with w and n from :mod:`recbole_uip.em.weights`, k_e the number of the user's events since e,
and a = 2^(-1/h) for a half-life of h events. The user's measured offset is y = S / N and its
noise variance M / N^2, in units where one event has unit noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recbole_uip.em.weights import Evidence

__all__ = ["History", "Kernel", "RunningSums", "index_history", "offsets", "retention", "run"]

BLOCK_EVENTS = 100_000


@dataclass(frozen=True)
class History:
    """Which events each row may see: a prefix of one timeline.

    A timeline is a sequence of events of one user. A user has one, unless training rows and
    held-out rows may see different events; then there are two.

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
    """
    events = np.flatnonzero(is_event)
    counts = np.bincount(user[events], minlength=n_users)
    first = np.concatenate([[0], np.cumsum(counts)])
    if time is None:
        events = events[np.argsort(user[events], kind="stable")]
        return History(events, first, user, counts[user])
    events = events[np.lexsort((time[events], user[events]))]
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


def retention(half_life: float) -> float:
    """Factor a = 2^(-1/h) that a state keeps at each event, for a half-life of h events."""
    return 2.0 ** (-1.0 / half_life)


class Kernel(Protocol):
    """How events enter a state."""

    def initial(self) -> np.ndarray:
        """State of a user without events, shape (width,)."""

    def inputs(self, events: np.ndarray) -> np.ndarray:
        """What the rows ``events`` bring, shape (n_events, n_inputs)."""

    def advance(self, state: np.ndarray, inputs: np.ndarray) -> None:
        """Let one event enter each row of ``state``, shape (n, width), in place."""


class RunningSums:
    """Kernel of the sums S, N and M with forgetting (see the module).

    Parameters
    ----------
    vectors : ndarray, shape (n_items, rank)
        Item vectors g.
    item : ndarray of int64, shape (n_rows,)
    evidence : Evidence
        Of all rows.
    half_life : float
        In events of the user.
    """

    def __init__(
        self, vectors: np.ndarray, item: np.ndarray, evidence: Evidence, half_life: float
    ) -> None:
        self.vectors = vectors
        self.item = item
        self.evidence = evidence
        self.factors = np.full(vectors.shape[1] + 2, retention(half_life))
        self.factors[-1] **= 2

    def initial(self) -> np.ndarray:
        """Zeros, shape (rank + 2,)."""
        return np.zeros(len(self.factors))

    def inputs(self, events: np.ndarray) -> np.ndarray:
        """Columns w g, n and n^2, shape (n_events, rank + 2)."""
        rank = self.vectors.shape[1]
        added = np.empty((len(events), rank + 2))
        weight, count = self.evidence.weight[events], self.evidence.count[events]
        np.multiply(self.vectors[self.item[events]], weight[:, None], out=added[:, :rank])
        added[:, rank] = count
        added[:, rank + 1] = count**2
        return added

    def advance(self, state: np.ndarray, inputs: np.ndarray) -> None:
        """state <- (a, ..., a, a, a^2) * state + inputs."""
        state *= self.factors
        state += inputs


def offsets(state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measured offset, noise variance and evidence of running sums.

    Parameters
    ----------
    state : ndarray of float64, shape (n, rank + 2)

    Returns
    -------
    offset : ndarray, shape (n, rank)
        y = S / N; 0 without evidence.
    noise : ndarray, shape (n,)
        M / N^2; infinite without evidence.
    known : ndarray of bool, shape (n,)
        Whether there is any evidence.
    """
    count, square = state[:, -2], state[:, -1]
    known = count > 0
    safe = np.where(known, count, 1.0)
    offset = np.where(known[:, None], state[:, :-2] / safe[:, None], 0.0)
    noise = np.where(known, square / safe**2, np.inf)
    return offset, noise, known


def run(
    kernel: Kernel, history: History, rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """States of rows, each from the events that the row may see.

    Timelines are taken in blocks, so memory stays bounded however many events there are.

    Parameters
    ----------
    kernel : Kernel
    history : History
    rows : ndarray of int64, optional
        Rows wanted; all by default.

    Yields
    ------
    at : ndarray of int64, shape (n,)
        Positions in ``rows``.
    state : ndarray of float64, shape (n, width)
    """
    rows = np.arange(len(history.timeline)) if rows is None else np.asarray(rows)
    order = np.argsort(history.timeline[rows], kind="stable")
    row_timeline = history.timeline[rows[order]]
    timelines = np.unique(row_timeline)
    lengths = history.first[timelines + 1] - history.first[timelines]
    # A block ends where its events would pass the limit; a timeline is never cut in two.
    block = np.cumsum(lengths) // BLOCK_EVENTS
    for members in np.split(timelines, np.flatnonzero(np.diff(block)) + 1):
        if len(members):
            low, high = np.searchsorted(row_timeline, [members[0], members[-1] + 1])
            at = order[low:high]
            yield at, _run_block(kernel, history, members, rows[at])


def _run_block(
    kernel: Kernel, history: History, timelines: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    lengths = history.first[timelines + 1] - history.first[timelines]
    # Longest first: the timelines that have a t-th event are then a prefix, at every t.
    order = np.argsort(-lengths, kind="stable")
    timelines, lengths = timelines[order], lengths[order]
    start = np.concatenate([[0], np.cumsum(lengths)])
    inputs = kernel.inputs(history.events[_ranges(history.first[timelines], lengths)])
    initial = kernel.initial()
    after = np.empty((len(inputs), len(initial)))
    current = np.tile(initial, (len(timelines), 1))
    active = len(timelines)
    for step in range(int(lengths[0])):
        active = int(np.searchsorted(-lengths[:active], -step, side="left"))
        at = start[:active] + step
        kernel.advance(current[:active], inputs[at])
        after[at] = current[:active]
    place = np.empty(int(timelines.max()) + 1, dtype=np.int64)
    place[timelines] = start[:-1]
    seen = history.seen[rows]
    states = np.tile(initial, (len(rows), 1))
    some = seen > 0
    states[some] = after[place[history.timeline[rows[some]]] + seen[some] - 1]
    return states


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of ``arange(s, s + n)`` over pairs of ``starts`` and ``lengths``."""
    shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.arange(int(lengths.sum())) + shift

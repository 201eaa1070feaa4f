"""Users of a bank as rows: segments on disk, rows in memory, and events that enter them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import joblib
import numba
import numpy as np
import pyarrow as pa

from recbole_uip.bank.model import ProfileModel
from recbole_uip.em.kernels import Kernels, advance_many

__all__ = [
    "COLUMNS",
    "NO_TIME",
    "BaseUsers",
    "WritableUsers",
    "advance_in_parallel",
    "by_users",
    "distinct",
    "in_parts",
    "put_rows",
    "stable_order",
    "user_schema",
    "user_table",
]

# Fewer events, or rows, are not worth a second thread.
PARALLEL_EVENTS = 50_000
# More parts than threads, in case that one of them has less of a core than another.
PARTS_A_THREAD = 4
#: Time of the last event of a user without events.
NO_TIME = -math.inf
#: Columns of users in memory.
COLUMNS = ("folds", "seen", "last_time", "states", "codes")


def user_schema(model: ProfileModel) -> pa.Schema:
    """Columns of a user segment."""
    return pa.schema(
        [
            ("user", pa.string()),
            ("fold", pa.int16()),
            ("seen", pa.int64()),
            ("last_time", pa.float64()),
            ("state", pa.list_(pa.float32(), len(model.kernels.initial))),
            ("codes", pa.list_(pa.int32(), len(model.profile_names))),
        ]
    )


def user_table(
    model: ProfileModel,
    users: Sequence[str] | pa.Array,
    folds: np.ndarray,
    seen: np.ndarray,
    last_time: np.ndarray,
    states: np.ndarray,
    codes: np.ndarray | None = None,
) -> pa.Table:
    """A user segment; codes are made of the states where they are not given.

    Parameters
    ----------
    model : ProfileModel
    users : sequence of n str, or pyarrow.Array
    folds, seen : ndarray of int, shape (n,)
    last_time : ndarray of float64, shape (n,)
    states : ndarray of float32, shape (n, width)
    codes : ndarray of int32, shape (n, n_profile_fields), optional
    """
    codes = model.encoder.profiles(states, np.asarray(seen, np.int64)) if codes is None else codes
    schema = user_schema(model)
    columns = [
        users.cast(pa.string()) if isinstance(users, pa.Array) else pa.array(users, pa.string()),
        pa.array(folds, pa.int16()),
        pa.array(seen, pa.int64()),
        pa.array(last_time, pa.float64()),
        _lists(states, schema.field("state").type),
        _lists(codes, schema.field("codes").type),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _lists(rows: np.ndarray, kind: pa.FixedSizeListType) -> pa.Array:
    """Rows of an array as lists of one length."""
    if kind.list_size == 0:
        # Match fields alone give no codes; from_arrays would divide by the length and crash.
        return pa.array([[]] * len(rows), kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), kind.value_type), type=kind)


def advance_in_parallel(
    states: np.ndarray,
    rows: np.ndarray,
    first: np.ndarray,
    kernels: Kernels,
    items: np.ndarray,
    folds: np.ndarray,
    liked: np.ndarray,
) -> None:
    """:func:`~recbole_uip.em.kernels.advance_many` on all cores, no user on two of them.

    Parameters
    ----------
    states : ndarray of float32, shape (n_states, width)
    rows : ndarray of int64, shape (n_events,)
        Row of ``states`` that each event enters, ascending.
    first : ndarray of int64, shape (n_distinct,)
        Where each distinct row begins in ``rows``.
    kernels, items, folds, liked
    """

    def advance_part(events: slice, _: slice) -> None:
        advance_many(states, rows[events], kernels, items[events], folds[events], liked[events])

    by_users(advance_part, first, len(rows))


def by_users(work: Callable[[slice, slice], None], first: np.ndarray, n_events: int) -> None:
    """Call ``work`` with parts of sorted events, on all cores, no row in two parts.

    Parameters
    ----------
    work : callable
        Takes a part of the events, and the part of the distinct rows that they enter.
    first : ndarray of int64, shape (n_distinct,)
        Where each distinct row begins.
    n_events : int
    """
    if n_events < PARALLEL_EVENTS:
        work(slice(0, n_events), slice(0, len(first)))
        return
    workers = joblib.cpu_count()
    wanted = np.linspace(0, n_events, PARTS_A_THREAD * workers + 1)[1:-1]
    cuts = [0, *np.unique(np.searchsorted(first, wanted)), len(first)]
    ends = np.append(first, n_events)

    def part(rows: tuple[int, int]) -> None:
        work(slice(int(ends[rows[0]]), int(ends[rows[1]])), slice(*rows))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, itertools.pairwise(cuts)))


def in_parts(work: Callable[[slice], None], n: int) -> None:
    """Call ``work`` with slices of ``n`` rows, on all cores."""
    if n < PARALLEL_EVENTS:
        work(slice(0, n))
        return
    workers = joblib.cpu_count()
    cuts = np.linspace(0, n, PARTS_A_THREAD * workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, itertools.starmap(slice, itertools.pairwise(cuts))))


@numba.njit(cache=True, nogil=True)
def _counting_order(rows, n_rows):
    """Stable order of rows from 0 to ``n_rows`` - 1: argsort by counting, shape (n,), int64."""
    place = np.zeros(n_rows + 1, np.int64)
    for row in rows:
        place[row + 1] += 1
    for row in range(n_rows):
        place[row + 1] += place[row]
    order = np.empty(len(rows), np.int64)
    for event in range(len(rows)):
        order[place[rows[event]]] = event
        place[rows[event]] += 1
    return order


@numba.njit(cache=True, nogil=True)
def put_rows(array, rows, values):
    """``array[rows] = values``, which numpy does slowly where a row is short."""
    for row in range(len(rows)):
        for column in range(values.shape[1]):
            array[rows[row], column] = values[row, column]


def stable_order(rows: np.ndarray, n_rows: int, time: np.ndarray | None) -> np.ndarray:
    """Order of events by row, then by time, then as they are given."""
    by_time = None
    # A stream is in the order of time already.
    if time is not None and (time[1:] < time[:-1]).any():
        by_time = np.argsort(time, kind="stable")
        rows = rows[by_time]
    if n_rows <= 8 * len(rows):
        order = _counting_order(rows, n_rows)
    else:
        order = np.argsort(rows, kind="stable")
    return order if by_time is None else by_time[order]


class WritableUsers:
    """States and codes of users in memory that may be written to; grows by doubling."""

    def __init__(self, width: int, n_codes: int) -> None:
        self.n = 0
        self.number = np.empty(0, np.int64)  # of the user in the index
        self.dirty = np.empty(0, bool)  # whether it differs from what is committed
        self.in_delta = np.empty(0, bool)  # whether a delta has it, and not the base alone
        self.folds = np.empty(0, np.int64)
        self.seen = np.empty(0, np.int64)
        self.last_time = np.empty(0)
        self.states = np.empty((0, width), np.float32)
        self.codes = np.empty((0, n_codes), np.int32)

    def reserve(self, n: int) -> int:
        """Make room for ``n`` more rows, and return the number of the first."""
        first, self.n = self.n, self.n + n
        if self.n > len(self.seen):
            capacity = max(self.n, 2 * len(self.seen), 16)
            for name in ("number", "dirty", "in_delta", *COLUMNS):
                old = getattr(self, name)
                new = np.empty((capacity, *old.shape[1:]), old.dtype)
                new[:first] = old[:first]
                setattr(self, name, new)
        return first


class BaseUsers:
    """Users of the base segment, memory-mapped, chunk by chunk."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.n = table.num_rows
        batches = table.to_batches()
        self.first = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.starts = self.first.tolist()
        self.folds, self.seen, self.last_time, self.states, self.codes = (
            [_numpy(batch.column(name)) for batch in batches]
            for name in ("fold", "seen", "last_time", "state", "codes")
        )

    def place(self, row: int) -> tuple[int, int]:
        """Chunk of a row, and where it stands there."""
        if len(self.starts) == 2:
            return 0, row
        chunk = bisect.bisect_right(self.starts, row) - 1
        return chunk, row - self.starts[chunk]

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values of a column at many rows."""
        chunks = getattr(self, name)
        # Of rows, ``take`` copies ten in the time in which indexing copies one.
        if len(chunks) == 1:
            return chunks[0].take(rows, axis=0)
        if len(rows) == 1:
            number, place = self.place(int(rows[0]))
            return chunks[number][place : place + 1]
        chunk = np.searchsorted(self.first, rows, side="right") - 1
        # numpy sorts short integers by counting.
        order = np.argsort(chunk.astype(np.min_scalar_type(len(chunks))), kind="stable")
        ends = np.cumsum([0, *np.bincount(chunk, minlength=len(chunks))])
        ordered = rows[order]
        out = np.empty((len(rows), *chunks[0].shape[1:]), chunks[0].dtype)
        for number, (low, high) in enumerate(itertools.pairwise(ends)):
            if low < high:
                here = ordered[low:high] - self.first[number]
                chunks[number].take(here, axis=0, out=out[low:high], mode="clip")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return out.take(place, axis=0)


def _numpy(column: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def distinct(numbers: np.ndarray, n: int) -> np.ndarray:
    """Distinct ones of numbers below ``n``, ascending."""
    if 8 * len(numbers) < n:
        return np.unique(numbers)
    met = np.zeros(n, bool)
    met[numbers] = True
    return np.flatnonzero(met)

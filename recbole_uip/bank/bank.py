"""The feature bank: profiles by user token, looked up, matched and kept fresh without an LM."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import pyarrow as pa
import scipy.optimize
import scipy.spatial.distance

from recbole_uip.bank import store
from recbole_uip.bank.model import ProfileModel, fold_of
from recbole_uip.bank.store import BankError, Snapshot, Writer
from recbole_uip.em.kernels import CODE, Kernels, advance, advance_many, encode, score_candidates
from recbole_uip.em.mixture import ResidualCodebook
from recbole_uip.em.states import offsets

__all__ = ["FeatureBank", "RefitReport", "advance_in_parallel", "user_schema", "user_table"]

# Merge deltas into one base when there are more of them, or they hold more than this share.
MAX_DELTAS = 16
MAX_DELTA_SHARE = 0.5
BATCH_ROWS = 200_000
# Fewer events are not worth a second thread.
PARALLEL_EVENTS = 50_000
NO_TIME = -math.inf


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
    users : sequence of n str
    folds, seen : ndarray of int, shape (n,)
    last_time : ndarray of float64, shape (n,)
    states : ndarray of float32, shape (n, width)
    codes : ndarray of int32, shape (n, n_profile_fields), optional
    """
    codes = model.encoder.profiles(states, np.asarray(seen, np.int64)) if codes is None else codes
    schema = user_schema(model)
    columns = [
        pa.array(users, pa.string()),
        pa.array(folds, pa.int16()),
        pa.array(seen, pa.int64()),
        pa.array(last_time, pa.float64()),
        pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1]),
        pa.FixedSizeListArray.from_arrays(
            pa.array(codes.reshape(-1), pa.int32()), type=schema.field("codes").type
        ),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


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
    workers = joblib.cpu_count() if len(rows) >= PARALLEL_EVENTS else 1
    wanted = np.linspace(0, len(rows), workers + 1)[1:-1]
    cuts = first[np.searchsorted(first, wanted) - 1] if workers > 1 else ()

    def advance_span(span: tuple[int, int]) -> None:
        part = slice(*span)
        advance_many(states, rows[part], kernels, items[part], folds[part], liked[part])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(advance_span, itertools.pairwise([0, *cuts, len(rows)])))


@dataclass(frozen=True)
class RefitReport:
    """What a new codebook changed.

    Attributes
    ----------
    moved : dict of str to float
        Share of users whose code changed, by field.
    users : pyarrow.Table
        Columns user, field, old, new: one row for each code that changed.
    """

    moved: dict[str, float]
    users: pa.Table


class _Rows:
    """States and codes of users in memory that may be written to; grows by doubling."""

    def __init__(self, width: int, n_codes: int) -> None:
        self.n = 0
        self.users: list[str] = []
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
            for name in ("folds", "seen", "last_time", "states", "codes"):
                old = getattr(self, name)
                new = np.empty((capacity, *old.shape[1:]), old.dtype)
                new[:first] = old[:first]
                setattr(self, name, new)
        return first


class _Base:
    """Users of the base segment, memory-mapped, chunk by chunk."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.n = table.num_rows
        batches = table.to_batches()
        self.first = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.folds, self.seen, self.last_time, self.states, self.codes = (
            [_numpy(batch.column(name)) for batch in batches]
            for name in ("fold", "seen", "last_time", "state", "codes")
        )

    def place(self, row: int) -> tuple[int, int]:
        """Chunk of a row, and where it stands there."""
        if len(self.first) == 2:
            return 0, row
        chunk = int(np.searchsorted(self.first, row, side="right")) - 1
        return chunk, row - int(self.first[chunk])

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values of a column at many rows."""
        chunks = getattr(self, name)
        if len(chunks) == 1:
            return chunks[0][rows]
        out = np.empty((len(rows), *chunks[0].shape[1:]), chunks[0].dtype)
        chunk = np.searchsorted(self.first, rows, side="right") - 1
        for number in np.unique(chunk):
            here = chunk == number
            out[here] = chunks[number][rows[here] - self.first[number]]
        return out


def _numpy(column: pa.Array) -> np.ndarray:
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


class FeatureBank:
    """Profiles of users, in a folder that one process writes and many read.

    :meth:`open` a bank that the main job or ``recbole-uip bank build`` has written. Look-ups
    (:meth:`look_up`, :meth:`match`) need no LM. An event (:meth:`update`) is one addition to its
    user's state, and shows in look-ups of this process at once; :meth:`commit` makes it durable
    and visible to readers, who :meth:`refresh`.

    An item's number is its position in ``model.items``; number 0 stands for all items that are
    not in the catalogue, whose events still count for how much and how readily a user likes.

    Attributes
    ----------
    model : ProfileModel
    generation : int
        Commit that the bank stands on.
    """

    def __init__(self, snapshot: Snapshot, writer: Writer | None = None) -> None:
        self._writer = writer
        self._load(snapshot)

    @classmethod
    def open(
        cls, folder: str | os.PathLike, *, write: bool = False, verify: bool = True
    ) -> FeatureBank:
        """Open the last committed state of the bank in ``folder``.

        Parameters
        ----------
        folder : path-like
        write : bool
            Whether to update it; one process at a time may.
        verify : bool
            Whether to check every file's SHA-256.

        Raises
        ------
        BankError
            If there is no bank, a file of it is damaged, or another process writes to it.
        """
        writer = Writer(folder) if write else None
        try:
            return cls(store.read(folder, verify), writer)
        except BaseException:
            if writer is not None:
                writer.close()
            raise

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        model: ProfileModel,
        users: pa.Table | pa.RecordBatchReader,
    ) -> FeatureBank:
        """Write a bank of ``model`` and ``users`` (:func:`user_table`), and open it for writing.

        A bank that is there already is replaced by the commit, and stays as it was if anything
        fails before.
        """
        writer = Writer(folder, create=True)
        try:
            writer.commit(
                metadata=model.metadata(),
                tables=model.all_tables(),
                items=model.item_table(),
                users=users,
                replace_users=True,
            )
            return cls(store.read(folder, verify=False), writer)
        except BaseException:
            writer.close()
            raise

    def __enter__(self) -> FeatureBank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of users."""
        return len(self._row_of)

    def __contains__(self, user: str) -> bool:
        return user in self._row_of

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writer is not None

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of what :meth:`look_up` gives, in order."""
        return self.model.profile_names

    @property
    def match_fields(self) -> tuple[str, ...]:
        """Names of what :meth:`match` gives, in order."""
        return self.model.match_names

    def _load(self, snapshot: Snapshot) -> None:
        self.folder, self.generation = snapshot.folder, snapshot.generation
        self.model = ProfileModel.from_parts(snapshot.metadata, snapshot.tables, snapshot.items)
        self._set_unknown()
        self._base = _Base(snapshot.users[0])
        # Row numbers below the base's size are rows of the base, the others of ``_own``.
        self._own = _Rows(len(self.model.kernels.initial), len(self.fields))
        users = snapshot.users[0]["user"].to_pylist()
        self._row_of: dict[str, int] = dict(zip(users, range(self._base.n), strict=True))
        self._deltas = len(snapshot.users) - 1
        self._delta_rows = sum(delta.num_rows for delta in snapshot.users[1:])
        self._model_changed = False
        for delta in snapshot.users[1:]:
            self._take(delta)
        self._dirty: set[int] = set()

    def _take(self, delta: pa.Table) -> None:
        part, users = _Base(delta), delta["user"].to_pylist()
        rows = self._rows_to_write(users)
        everything = np.arange(part.n)
        for name in ("folds", "seen", "last_time", "states", "codes"):
            getattr(self._own, name)[rows] = part.gather(name, everything)

    def _set_unknown(self) -> None:
        """Profile of a user of whom nothing is known, by ``uip_empty``."""
        self._initial = self.model.kernels.initial
        states, seen = self._initial[None, :], np.zeros(1, np.int64)
        self._unknown_codes = self.model.encoder.profiles(states, seen)[0]

    # Reading.

    def look_up(self, user: str) -> np.ndarray:
        """Codes of a user, shape (n_fields,); those of an empty history for an unknown one."""
        row = self._row_of.get(user)
        if row is None:
            return self._unknown_codes
        if row >= self._base.n:
            return self._own.codes[row - self._base.n]
        chunk, place = self._base.place(row)
        return self._base.codes[chunk][place]

    def look_up_many(self, users: Sequence[str]) -> np.ndarray:
        """Codes of many users, shape (n, n_fields), int32."""
        rows = self._find(users)
        codes = np.tile(self._unknown_codes, (len(rows), 1))
        self._gather("codes", rows, codes)
        return codes

    def state_of(self, user: str) -> tuple[np.ndarray, int, int]:
        """A copy of a user's state, the number of its events, and the user's fold."""
        row = self._row_of.get(user)
        if row is None:
            return self._initial.copy(), 0, fold_of(user, self.model.n_folds)
        if row >= self._base.n:
            row, own = row - self._base.n, self._own
            return own.states[row].copy(), int(own.seen[row]), int(own.folds[row])
        base = self._base
        chunk, row = base.place(row)
        return base.states[chunk][row].copy(), int(base.seen[chunk][row]), int(
            base.folds[chunk][row]
        )  # fmt: skip

    def match(self, user: str, items: Sequence[str] | np.ndarray) -> np.ndarray:
        """Match tokens of a user with candidate items, from the user's state as it is now.

        Parameters
        ----------
        user : str
        items : sequence of n str, or ndarray of int64, shape (n,)
            Item tokens, or item numbers (``model.numbers``), which are faster.

        Returns
        -------
        ndarray of int32, shape (n, n_match_fields)
        """
        numbers = self._numbers(items)
        out = np.empty((len(numbers), len(self.match_fields)), np.int32)
        if out.size:
            state, seen, fold = self.state_of(user)
            folds = np.full(len(numbers), fold)
            model = self.model.encoder
            score_candidates(state, seen, model.kernels, model.match_fields, numbers, folds, out)
        return out

    def users(self) -> list[str]:
        """Tokens of all users."""
        return list(self._row_of)

    def bytes_per_user(self) -> dict[str, int]:
        """Bytes of one user's row, by facet; ``codes`` and ``row`` are what is not of a facet."""
        kernels, size = self.model.kernels, dict.fromkeys(self.model.encoder.facets, 0)
        for k, facet in enumerate(self.model.encoder.facets):
            size[facet] += 4 * int(kernels.start[k + 1] - kernels.start[k])
        # Fold, number of events and last time.
        return size | {"codes": 4 * len(self.fields), "row": 2 + 8 + 8}

    # Writing.

    def update(
        self, user: str, item: str, liked: float = 1.0, time: float | None = None
    ) -> np.ndarray:
        """Let one event enter its user's profile; a new user begins with it.

        Parameters
        ----------
        user, item : str
        liked : float
            1 or 0; 1 where feedback is implicit.
        time : float, optional
            Timestamp, in the unit of the bank's events.

        Returns
        -------
        ndarray of int32, shape (n_fields,)
            The user's codes after the event.

        Raises
        ------
        BankError
            If the bank is open for reading only, the label is not 0 or 1, or the user has a later
            event already.
        """
        self._check_writable()
        if liked not in (0, 1):
            raise BankError(f"liked={liked!r} of user {user!r}: labels must be 0 or 1")
        row = self._row_of.get(user)
        if row is None or row < self._base.n:
            row = int(self._rows_to_write([user])[0])
        else:
            row -= self._base.n
        own, encoder = self._own, self.model.encoder
        if time is not None:
            if not time >= own.last_time[row]:
                raise BankError(_late(user, time, own.last_time[row]))
            own.last_time[row] = time
        number = self.model.number(item)
        advance(own.states[row], encoder.kernels, number, own.folds[row], float(liked))
        own.seen[row] += 1
        one = slice(row, row + 1)
        encode(
            own.states[one], own.seen[one], encoder.kernels, encoder.profile_fields, own.codes[one]
        )
        self._dirty.add(row)
        return own.codes[row]

    def update_many(
        self,
        users: Sequence[str],
        items: Sequence[str] | np.ndarray,
        liked: np.ndarray | None = None,
        time: np.ndarray | None = None,
        *,
        late: str = "refuse",
    ) -> int:
        """Let a batch of events enter; as :meth:`update` one by one in the order of time.

        Parameters
        ----------
        users : sequence of n str
        items : sequence of n str, or ndarray of int64, shape (n,)
            Item tokens, or item numbers.
        liked : ndarray, shape (n,), optional
            1 or 0; ones by default.
        time : ndarray, shape (n,), optional
            Events of a user are taken in the order of time, equal ones in the order given.
        late : {"refuse", "drop", "apply"}
            What becomes of an event that is earlier than its user's last one in the bank:
            nothing of the batch is applied, it is left out, or it is added as if it were new.

        Returns
        -------
        int
            Number of events that entered.
        """
        self._check_writable()
        if late not in ("refuse", "drop", "apply"):
            raise BankError(f"late={late!r} must be one of refuse, drop, apply")
        n = len(users)
        numbers = self._numbers(items)
        liked = np.ones(n) if liked is None else np.asarray(liked, dtype=np.float64)
        time = None if time is None else np.asarray(time, dtype=np.float64)
        self._check_batch(users, numbers, liked, time)
        if time is not None and late != "apply":
            keep = self._not_late(users, time, late)
            if keep is not None:
                users = [users[event] for event in keep]
                numbers, liked, time = numbers[keep], liked[keep], time[keep]
        rows = self._rows_to_write(users)
        order = np.argsort(rows, kind="stable") if time is None else np.lexsort((time, rows))
        rows, numbers, liked = rows[order], numbers[order], liked[order]
        own = self._own
        touched, first = np.unique(rows, return_index=True)
        if time is not None:
            last = np.maximum.reduceat(time[order], first) if len(rows) else np.empty(0)
            own.last_time[touched] = np.maximum(own.last_time[touched], last)
        advance_in_parallel(
            own.states, rows, first, self.model.kernels, numbers, own.folds[rows], liked
        )
        own.seen[touched] += np.diff(np.append(first, len(rows)))
        own.codes[touched] = self.model.encoder.profiles(own.states[touched], own.seen[touched])
        self._dirty.update(touched.tolist())
        return len(rows)

    def add_items(self, items: Sequence[str], texts: Sequence[str | None]) -> None:
        """Add items to the catalogue; only their texts go through the LM.

        It takes effect at once, and is durable after :meth:`commit`.
        """
        self._check_writable()
        self.model = self.model.with_items(items, texts)
        self._model_changed = True

    def refit(self, sample: int | None = None) -> RefitReport:
        """Fit every codebook anew on the users' states of today; code IDs stay stable.

        New codewords are matched with the old ones so that their total squared distance is
        least (Hungarian algorithm), so that a code keeps its meaning as well as it can, and a
        CTR model that was trained on the old codes can go on.

        Parameters
        ----------
        sample : int, optional
            Number of users to fit on; ``uip_codebook.sample`` by default.
        """
        self._check_writable()
        users = self.users()
        before = self.look_up_many(users)
        rows = self._rows_to_write(users)
        states, seen = self._own.states[rows], self._own.seen[rows]
        sample = sample or self.model.settings.codebook.sample
        encoder = self.model.encoder
        numbers = encoder.profile_fields.numbers.copy()
        for f in np.flatnonzero(encoder.profile_fields.kind == CODE):
            _refit_field(self.model, int(f), states, numbers, sample)
        fields = encoder.profile_fields._replace(numbers=numbers)
        self.model.encoder = dataclasses.replace(encoder, profile_fields=fields)
        after = self.model.encoder.profiles(states, seen)
        self._own.codes[rows] = after
        self._dirty.update(rows.tolist())
        self._model_changed = True
        self._set_unknown()
        user, field = np.nonzero(before != after)
        moved = {name: float((before != after)[:, c].mean()) for c, name in enumerate(self.fields)}
        return RefitReport(
            moved,
            pa.table(
                {
                    "user": pa.array([users[row] for row in user], pa.string()),
                    "field": pa.array([self.fields[c] for c in field], pa.string()),
                    "old": before[user, field],
                    "new": after[user, field],
                }
            ),
        )

    def commit(self) -> int:
        """Make all updates durable and visible to readers, at once or not at all.

        Returns
        -------
        int
            The bank's generation.
        """
        self._check_writable()
        parts: dict[str, Any] = {}
        if self._model_changed:
            model = self.model
            parts |= {"metadata": model.metadata(), "tables": model.all_tables()}
            parts["items"] = model.item_table()
        if self._dirty:
            rows = np.array(sorted(self._dirty), dtype=np.int64)
            delta_rows = self._delta_rows + len(rows)
            too_many = self._deltas and delta_rows > MAX_DELTA_SHARE * len(self)
            if self._deltas >= MAX_DELTAS or too_many:
                parts |= {"users": self._merged(), "replace_users": True}
            else:
                parts["users"] = self._segment(rows)
        if parts:
            self.generation = self._writer.commit(**parts)
            if "users" in parts:
                merged = parts.get("replace_users", False)
                self._deltas = 0 if merged else self._deltas + 1
                self._delta_rows = 0 if merged else delta_rows
            self._dirty.clear()
            self._model_changed = False
        return self.generation

    def refresh(self) -> bool:
        """Read what has been committed since, if anything; whether there was."""
        if self._writer is not None or store.generation_of(self.folder) == self.generation:
            return False
        self._load(store.read(self.folder))
        return True

    def close(self) -> None:
        """Let others write. Updates that are not committed are lost."""
        if self._writer is not None:
            self._writer.close()

    # Rows.

    def _check_writable(self) -> None:
        if self._writer is None:
            raise BankError(
                f"the bank {self.folder} is open for reading: open it with write=True to update it"
            )

    def _numbers(self, items: Sequence[str] | np.ndarray) -> np.ndarray:
        if isinstance(items, np.ndarray) and items.dtype.kind in "iu":
            n_items = len(self.model.items)
            if items.size and not (items.min() >= 0 and items.max() < n_items):
                raise BankError(f"item numbers must be from 0 to {n_items - 1}, got {items}")
            return np.ascontiguousarray(items, dtype=np.int64)
        return self.model.numbers(items)

    def _check_batch(
        self,
        users: Sequence[str],
        numbers: np.ndarray,
        liked: np.ndarray,
        time: np.ndarray | None,
    ) -> None:
        for name, column in (("items", numbers), ("liked", liked), ("time", time)):
            if column is not None and len(column) != len(users):
                raise BankError(f"{name} has {len(column)} rows, but users has {len(users)}")
        wrong = np.flatnonzero((liked != 0) & (liked != 1))
        if len(wrong):
            raise BankError(f"liked is {liked[wrong[0]]} in row {wrong[0]}: labels must be 0 or 1")
        if time is not None and not np.isfinite(time).all():
            row = int(np.flatnonzero(~np.isfinite(time))[0])
            raise BankError(f"time is {time[row]} in row {row}: it must be a finite number")

    def _find(self, users: Sequence[str]) -> np.ndarray:
        """Row of each user, -1 for unknown ones."""
        found = map(self._row_of.get, users, itertools.repeat(-1))
        return np.fromiter(found, dtype=np.int64, count=len(users))

    def _gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Write a column's values at ``rows`` to ``out``; that of unknown users (-1) stays."""
        n_base = self._base.n
        for here, values in (
            (np.flatnonzero((rows >= 0) & (rows < n_base)), self._base.gather),
            (
                np.flatnonzero(rows >= n_base),
                lambda name, at: getattr(self._own, name)[at - n_base],
            ),
        ):
            if len(here):
                out[here] = values(name, rows[here])

    def _not_late(self, users: Sequence[str], time: np.ndarray, late: str) -> np.ndarray | None:
        """Events that are not late; None if all are in time."""
        last = np.full(len(users), NO_TIME)
        self._gather("last_time", self._find(users), last)
        is_late = time < last
        if not is_late.any():
            return None
        if late == "refuse":
            event = int(np.flatnonzero(is_late)[0])
            raise BankError(_late(users[event], time[event], last[event]))
        return np.flatnonzero(~is_late)

    def _rows_to_write(self, users: Sequence[str]) -> np.ndarray:
        """Rows of ``_own`` for users, who are copied there or begun there if need be."""
        n_base, own = self._base.n, self._own
        rows = self._find(users)
        elsewhere = np.flatnonzero(rows < n_base)
        if len(elsewhere):
            movers = list(dict.fromkeys(users[row] for row in elsewhere))
            old = self._find(movers)
            first = own.reserve(len(movers))
            new_rows = slice(first, first + len(movers))
            own.states[new_rows] = self._initial
            own.codes[new_rows] = self._unknown_codes
            own.seen[new_rows], own.last_time[new_rows] = 0, NO_TIME
            own.folds[new_rows] = [
                fold_of(user, self.model.n_folds) if row < 0 else 0
                for user, row in zip(movers, old, strict=True)
            ]
            for name in ("folds", "seen", "last_time", "states", "codes"):
                self._gather(name, old, getattr(own, name)[new_rows])
            self._row_of.update(zip(movers, range(n_base + first, n_base + own.n), strict=True))
            rows[elsewhere] = self._find([users[row] for row in elsewhere])
        return rows - n_base

    # Segments.

    def _segment(self, rows: np.ndarray) -> pa.Table:
        """Users of ``_own`` at ``rows``."""
        own, n_base = self._own, self._base.n
        wanted = set(rows.tolist())
        token = {
            row - n_base: user
            for user, row in self._row_of.items()
            if row >= n_base and row - n_base in wanted
        }
        return user_table(
            self.model,
            [token[row] for row in rows.tolist()],
            own.folds[rows],
            own.seen[rows],
            own.last_time[rows],
            own.states[rows],
            own.codes[rows],
        )

    def _merged(self) -> pa.RecordBatchReader:
        """All users as they are now, in batches."""

        def batches() -> Iterator[pa.RecordBatch]:
            users = self.users()
            for low in range(0, len(users), BATCH_ROWS):
                block = users[low : low + BATCH_ROWS]
                yield from self.table_of(block).combine_chunks().to_batches()

        return pa.RecordBatchReader.from_batches(user_schema(self.model), batches())

    def table_of(self, users: Sequence[str]) -> pa.Table:
        """States and codes of known users (:func:`user_table`)."""
        rows, width = self._find(users), len(self._initial)
        columns = {
            "folds": np.empty(len(rows), np.int64),
            "seen": np.empty(len(rows), np.int64),
            "last_time": np.empty(len(rows)),
            "states": np.empty((len(rows), width), np.float32),
            "codes": np.empty((len(rows), len(self.fields)), np.int32),
        }
        for name, out in columns.items():
            self._gather(name, rows, out)
        return user_table(self.model, users, **columns)


def _late(user: str, time: float, last: float) -> str:
    return (
        f"time={time} of user {user!r} is earlier than the user's last event in the bank ({last}): "
        "give events in the order of time, or update_many with late='drop' or late='apply'"
    )


def _refit_field(
    model: ProfileModel, f: int, states: np.ndarray, numbers: np.ndarray, sample: int
) -> None:
    """Fit the codebook of code field ``f`` on users' states; write it into ``numbers``."""
    kernels, fields, settings = model.kernels, model.encoder.profile_fields, model.settings
    k, n_codes = fields.kernel[f], int(fields.size[f])
    if n_codes == 0:
        return
    levels = int(fields.column[f + 1] - fields.column[f])
    rank = int(kernels.rank[k])
    offset, noise, known = offsets(states[:, kernels.start[k] : kernels.start[k + 1]])
    chosen = np.random.default_rng(settings.seed).permutation(np.flatnonzero(known))[:sample]
    if len(chosen) < n_codes:
        raise BankError(
            f"{len(chosen)} users have evidence for {model.profile_names[fields.column[f]]}, fewer "
            f"than its {n_codes} codes: refit when there are more"
        )
    size = n_codes * (rank + 1) + rank
    old = [
        numbers[low + n_codes : low + n_codes * (rank + 1)].reshape(rank, n_codes).T
        for low in range(int(fields.first[f]), int(fields.first[f]) + levels * size, size)
    ]
    codebook = ResidualCodebook(
        n_codes,
        levels,
        max_iter=settings.codebook.max_iter,
        tol=settings.codebook.tol,
        random_state=settings.seed,
    ).fit(offset[chosen], noise[chosen], start=old)
    for codewords, level in zip(old, codebook.levels_, strict=True):
        distance = scipy.spatial.distance.cdist(codewords, level.codewords_, "sqeuclidean")
        _, order = scipy.optimize.linear_sum_assignment(distance)
        level.codewords_, level.weights_ = level.codewords_[order], level.weights_[order]
    first = int(fields.first[f])
    numbers[first : first + levels * size] = codebook.numbers

"""The feature bank: profiles by user token, looked up, matched and kept fresh without an LM."""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_uip.bank import store
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.refit import RefitReport, refit_field
from recbole_uip.bank.store import BankError, Snapshot, Writer
from recbole_uip.bank.tokens import TokenIndex, token_array
from recbole_uip.bank.users import (
    COLUMNS,
    NO_TIME,
    BaseUsers,
    WritableUsers,
    by_users,
    distinct,
    in_parts,
    put_rows,
    stable_order,
    user_schema,
    user_table,
)
from recbole_uip.em.kernels import CODE, advance, advance_many, encode, score_candidates

__all__ = ["FeatureBank"]

# Write a new base when more than this share of users differs from it; deltas become one when
# there are more of them, or they have more rows together than there are users.
MAX_DELTAS = 16
MAX_DELTA_SHARE = 0.5
BATCH_ROWS = 200_000
# Rows whose states are copied and encoded together.
ENCODED_ROWS = 2048
# Fewer item tokens are found sooner in a dict.
MANY_ITEMS = 10_000


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
    position : str or None
        What that commit says of where the events came to (:meth:`commit`).
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
        metadata, tables, catalogue = model.metadata(), model.all_tables(), model.item_table()
        # One that could not be read again must not take the place of one that can.
        ProfileModel.from_parts(metadata, tables, catalogue)
        writer = Writer(folder, create=True)
        try:
            writer.commit(
                metadata=metadata,
                tables=tables,
                items=catalogue,
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
        return len(self._users)

    def __contains__(self, user: str) -> bool:
        return user in self._users

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
        self.position = snapshot.position
        self._snapshot = snapshot
        self.model = ProfileModel.from_parts(snapshot.metadata, snapshot.tables, snapshot.items)
        self._set_unknown()
        self._base = BaseUsers(snapshot.users[0])
        self._own = WritableUsers(len(self.model.kernels.initial), len(self.fields))
        # A user's number is the row in the base, or for a user who came later a number above.
        self._users = TokenIndex(snapshot.users[0]["user"])
        # By number: 1 + the row of ``_own`` that holds the user's state, 0 where the base does.
        # Zeros that nobody has written to take no memory.
        self._moved = np.zeros(max(self._base.n, 1), np.int64)
        self._item_index: tuple[ProfileModel, TokenIndex] | None = None
        self._deltas = len(snapshot.users) - 1
        self._delta_rows = sum(delta.num_rows for delta in snapshot.users[1:])
        self._model_changed = False
        for delta in snapshot.users[1:]:
            self._take(delta)

    def _take(self, delta: pa.Table) -> None:
        part = BaseUsers(delta)
        rows = self._rows_to_write(self._enter(delta["user"]))
        everything = np.arange(part.n)
        for name in COLUMNS:
            getattr(self._own, name)[rows] = part.gather(name, everything)
        self._own.in_delta[rows] = True

    def _set_unknown(self) -> None:
        """Profile of a user of whom nothing is known, by ``uip_empty``."""
        self._initial = self.model.kernels.initial
        states, seen = self._initial[None, :], np.zeros(1, np.int64)
        self._unknown_codes = self.model.encoder.profiles(states, seen)[0]

    # Reading.

    @property
    def unknown_codes(self) -> np.ndarray:
        """What :meth:`look_up` gives for an unknown user, shape (n_fields,)."""
        return self._unknown_codes.copy()

    def look_up(self, user: str) -> np.ndarray:
        """Codes of a user, shape (n_fields,); those of an empty history for an unknown one.

        Raises
        ------
        BankError
            If the user is no string.
        """
        number = self._users.get(user)
        if number < 0:
            return self._unknown_codes.copy()
        if row := self._moved.item(number):
            return self._own.codes[row - 1].copy()  # which the next event changes
        # As BaseUsers.place, in line: a call would take as long as all of this.
        base = self._base
        chunk = bisect.bisect_right(base.starts, number) - 1
        return base.codes[chunk][number - base.starts[chunk]]

    def look_up_many(self, users: Sequence[str] | pa.Array) -> np.ndarray:
        """Codes of many users, shape (n, n_fields), int32.

        A ``pyarrow.Array`` is fastest: its bytes are contiguous.

        Raises
        ------
        BankError
            If a user is null or no string, or ``users`` is a text.
        """
        return self._codes_of(self._users.find_many(users))

    def _codes_of(self, numbers: np.ndarray) -> np.ndarray:
        codes = np.empty((len(numbers), len(self.fields)), np.int32)
        self._gather("codes", numbers, codes)
        codes[numbers < 0] = self._unknown_codes
        return codes

    def state_of(self, user: str) -> tuple[np.ndarray, int, int]:
        """A copy of a user's state, the number of its events, and the user's fold."""
        number = self._users.get(user)
        if number < 0:
            return self._initial.copy(), 0, int(self.model.folds_of([user])[0])
        if row := self._moved.item(number):
            row, own = row - 1, self._own
            return own.states[row].copy(), int(own.seen[row]), int(own.folds[row])
        base = self._base
        chunk, row = base.place(number)
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

        Raises
        ------
        BankError
            If the user or an item is no string, ``items`` is a text, or an item number is none of
            the catalogue's.
        """
        numbers = self._numbers(items)
        out = np.empty((len(numbers), len(self.match_fields)), np.int32)
        if out.size:
            state, seen, fold = self.state_of(user)
            folds = np.full(len(numbers), fold)
            encoder = self.model.encoder
            score_candidates(
                state, seen, encoder.kernels, encoder.match_fields, numbers, folds, out
            )
        return out

    def users(self) -> list[str]:
        """Tokens of all users."""
        return self._users.to_list()

    def bytes_per_user(self) -> dict[str, int]:
        """Bytes of one user's row, by facet; ``codes`` and ``row`` are what is not of a facet."""
        kernels, size = self.model.kernels, dict.fromkeys(self.model.encoder.facets, 0)
        for k, facet in enumerate(self.model.encoder.facets):
            size[facet] += 4 * int(kernels.start[k + 1] - kernels.start[k])
        # Fold, number of events and last time.
        return size | {"codes": 4 * len(self.fields), "row": 2 + 8 + 8}

    # Writing.

    def update(
        self, user: str, item: str, liked: float | None = None, time: float | None = None
    ) -> np.ndarray:
        """Let one event enter its user's profile; a new user begins with it.

        Parameters
        ----------
        user, item : str
        liked : float, optional
            1 or 0; left out, or 1, where feedback is implicit.
        time : float, optional
            Timestamp, in the unit of the bank's events; without one the event is the latest.

        Returns
        -------
        ndarray of int32, shape (n_fields,)
            The user's codes after the event.

        Raises
        ------
        BankError
            If the bank is open for reading only, the user or the item is empty or no string, the
            label is none that the bank's events have, or missing, the time is not in their unit,
            or the user has a later event already.
        """
        self._check_writable()
        for what, token in (("user", user), ("item", item)):
            if isinstance(token, str) and not token:
                raise BankError(f"{what}='' is empty: an event needs its {what}")
        if liked is None:
            self._check_implicit(f" for user {user!r}")
            liked = 1.0
        if not isinstance(liked, Real | np.bool_) or liked not in self._labels:
            raise BankError(f"liked={liked!r} of user {user!r}: {self._labels_are()}")
        if time is not None:
            if not isinstance(time, Real) or not math.isfinite(time):
                raise BankError(f"time={time!r} of user {user!r} must be a finite number")
            self.model.check_time(time, f" of user {user!r}")
        item_number = self.model.number(item)
        number = self._users.get(user)
        row = self._moved.item(number) - 1 if number >= 0 else -1
        if row < 0:
            one = np.array([number]) if number >= 0 else self._enter([user])
            row = int(self._rows_to_write(one)[0])
        own, encoder = self._own, self.model.encoder
        if time is not None:
            if time < own.last_time[row]:
                raise BankError(_late(user, time, own.last_time[row]))
            own.last_time[row] = time
        advance(own.states[row], encoder.kernels, item_number, own.folds[row], float(liked))
        own.seen[row] += 1
        one = slice(row, row + 1)
        encode(
            own.states[one], own.seen[one], encoder.kernels, encoder.profile_fields, own.codes[one]
        )
        own.dirty[row] = True
        return own.codes[row].copy()

    def update_many(
        self,
        users: Sequence[str] | pa.Array,
        items: Sequence[str] | np.ndarray | pa.Array,
        liked: np.ndarray | None = None,
        time: np.ndarray | None = None,
        *,
        late: str = "refuse",
    ) -> int:
        """Let a batch of events enter; as :meth:`update` one by one in the order of time.

        Parameters
        ----------
        users : sequence of n str, or pyarrow.Array
        items : sequence of n str, pyarrow.Array, or ndarray of int64, shape (n,)
            Item tokens, or item numbers.
        liked : ndarray, shape (n,), optional
            1 or 0; left out, or ones, where feedback is implicit.
        time : ndarray, shape (n,), optional
            Events of a user are taken in the order of time, equal ones in the order given.
        late : {"refuse", "drop", "apply"}
            What becomes of an event that is earlier than its user's last one in the bank:
            nothing of the batch is applied, it is left out, or it is added as if it were new.

        Returns
        -------
        int
            Number of events that entered.

        Raises
        ------
        BankError
            As :meth:`update`, if columns are of different lengths, or if ``late`` is none of
            these. Nothing of the batch is applied then.
        """
        self._check_writable()
        if late not in ("refuse", "drop", "apply"):
            raise BankError(f"late={late!r} must be one of refuse, drop, apply")
        n = len(users)
        numbers = self._numbers(items)
        if liked is None:
            self._check_implicit()
        liked = np.ones(n) if liked is None else _as_floats("liked", liked)
        time = None if time is None else _as_floats("time", time)
        self._check_batch(users, numbers, liked, time)
        tokens = token_array(users)
        _check_not_empty("user", tokens)
        if not numbers.all() and not _are_numbers(items):
            _check_not_empty("item", token_array(items, "item"))
        user = self._users.find_many(tokens)
        keep = None
        if time is not None and late != "apply":
            keep = self._not_late(tokens, user, time, late)
        new = np.flatnonzero(user < 0)
        if len(new):  # none of whom is late
            user[new] = self._enter(tokens.take(pa.array(new)))
        if keep is not None:
            user, numbers, liked, time = user[keep], numbers[keep], liked[keep], time[keep]
        self._apply(self._rows_to_write(user), numbers, liked, time)
        return len(user)

    def _apply(
        self, rows: np.ndarray, items: np.ndarray, liked: np.ndarray, time: np.ndarray | None
    ) -> None:
        """Let events enter rows of ``_own``."""
        if not len(rows):
            return
        own, encoder = self._own, self.model.encoder
        order = stable_order(rows, own.n, time)
        rows, items, liked = rows[order], items[order], liked[order]
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        touched, ends = rows[first], np.append(first[1:], len(rows))
        folds = own.folds[rows]

        def advance_part(events: slice, users: slice) -> None:
            advance_many(
                own.states, rows[events], encoder.kernels, items[events], folds[events],
                liked[events],
            )  # fmt: skip
            own.seen[touched[users]] += ends[users] - first[users]
            for low in range(users.start, users.stop, ENCODED_ROWS):
                block = touched[low : min(low + ENCODED_ROWS, users.stop)]
                codes = encoder.profiles(own.states.take(block, axis=0), own.seen[block])
                put_rows(own.codes, block, codes)

        by_users(advance_part, first, len(rows))
        if time is not None:
            last = time[order[ends - 1]]
            own.last_time[touched] = np.maximum(own.last_time[touched], last)
        own.dirty[touched] = True

    def add_items(self, items: Sequence[str], texts: Sequence[str | None]) -> None:
        """Add items to the catalogue; only their texts go through the LM.

        It takes effect at once, and is durable after :meth:`commit`.

        Parameters
        ----------
        items, texts
            As in :meth:`ProfileModel.with_items`, whose errors it raises as well.

        Raises
        ------
        BankError
            If the bank is open for reading only.
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

        Returns
        -------
        RefitReport

        Raises
        ------
        BankError
            If the bank is open for reading only, or fewer users than codes have evidence.
        """
        self._check_writable()
        everyone = np.arange(len(self))
        before = self._codes_of(everyone)
        rows = self._rows_to_write(everyone)
        states, seen = self._own.states[rows], self._own.seen[rows]
        if sample is None:
            sample = self.model.settings.codebook.sample
        encoder = self.model.encoder
        fields = encoder.profile_fields
        numbers, unknown = fields.numbers.copy(), fields.unknown.copy()
        for f in np.flatnonzero(fields.kind == CODE):
            codebook = refit_field(self.model, int(f), states, numbers, sample)
            if codebook is not None and self.model.settings.empty == "prior":
                unknown[fields.column[f] : fields.column[f + 1]] = codebook.prior_codes() + 1
        fields = fields._replace(numbers=numbers, unknown=unknown)
        self.model.encoder = dataclasses.replace(encoder, profile_fields=fields)
        after = self.model.encoder.profiles(states, seen)
        self._own.codes[rows] = after
        self._own.dirty[rows] = True
        self._model_changed = True
        self._set_unknown()
        user, field = np.nonzero(before != after)
        moved = {name: float((before != after)[:, c].mean()) for c, name in enumerate(self.fields)}
        return RefitReport(
            moved,
            pa.table(
                {
                    "user": self._users.take(user).cast(pa.string()),
                    "field": pa.array([self.fields[c] for c in field], pa.string()),
                    "old": before[user, field],
                    "new": after[user, field],
                }
            ),
        )

    def commit(self, position: str | None = None) -> int:
        """Make all updates durable and visible to readers, at once or not at all.

        Parameters
        ----------
        position : str, optional
            How far the events of a stream have come, in the stream's own words, such as an
            offset. It is committed with them, so that after a crash whoever reads
            :attr:`position` can go on there, and no event enters twice or is lost. Left out, it
            stays as it was if there is nothing to commit, and else the bank has none.

        Returns
        -------
        int
            The bank's generation.

        Raises
        ------
        BankError
            If the bank is open for reading only, ``position`` is no string, or the files cannot
            be written; the updates are then kept, and the next commit takes them.
        """
        self._check_writable()
        if not (position is None or isinstance(position, str)):
            raise BankError(f"position={position!r} must be text: give it as a string")
        parts: dict[str, Any] = {}
        if self._model_changed:
            model = self.model
            parts |= {"metadata": model.metadata(), "tables": model.all_tables()}
            parts["items"] = model.item_table()
        own, n = self._own, self._own.n
        rows = np.flatnonzero(own.dirty[:n])
        deltas, delta_rows = self._deltas, self._delta_rows
        if len(rows):
            changed = np.flatnonzero(own.dirty[:n] | own.in_delta[:n])
            new_base = len(changed) > MAX_DELTA_SHARE * len(self)
            deltas, delta_rows = deltas + 1, delta_rows + len(rows)
            if new_base:
                parts |= {"users": self._merged(), "replace_users": True}
                deltas, delta_rows = 0, 0
            elif deltas > MAX_DELTAS or delta_rows > len(self):
                parts |= {"users": self._table(own.number[changed]), "replace_deltas": True}
                deltas, delta_rows = 1, len(changed)
            else:
                parts["users"] = self._table(own.number[rows])
        if parts or position not in (None, self.position):
            self.generation = self._writer.commit(**parts, position=position)
            self.position = position
            self._deltas, self._delta_rows = deltas, delta_rows
            if len(rows):
                own.in_delta[rows] = True
                own.in_delta[:n] &= not new_base
            own.dirty[rows] = False
            self._model_changed = False
        return self.generation

    def refresh(self) -> bool:
        """Read what has been committed since, if anything; whether there was."""
        if self.is_current():
            return False
        # Made anew, so that one that cannot be read leaves this as it was.
        vars(self).update(vars(self.refreshed()))
        return True

    def refreshed(self) -> FeatureBank:
        """What has been committed last, as another bank for reading; reads what is new alone."""
        return type(self)(store.read(self.folder, known=self._snapshot))

    def is_current(self) -> bool:
        """Whether this is, events not yet committed aside, what the folder holds.

        It is not after another process's commit, nor where another bank has taken its place.
        """
        if self._writer is not None:
            return True  # nobody else may write
        return store.digest_of(self.folder) == self._snapshot.sha256

    def close(self) -> None:
        """Let others write. Updates that are not committed are lost."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # Rows.

    def _check_writable(self) -> None:
        if self._writer is None:
            raise BankError(
                f"the bank {self.folder} is not open for writing: open it with write=True to update"
                " it"
            )

    def _numbers(self, items: Sequence[str] | np.ndarray | pa.Array) -> np.ndarray:
        if isinstance(items, str):
            raise BankError(f"items={items!r} is a text: give a list of items")
        if _are_numbers(items):
            if items.ndim != 1:
                raise BankError(f"items has the shape {items.shape}: give one item number a row")
            n_items = len(self.model.items)
            if items.size and not (items.min() >= 0 and items.max() < n_items):
                raise BankError(f"item numbers must be from 0 to {n_items - 1}, got {items}")
            return np.ascontiguousarray(items, dtype=np.int64)
        if not isinstance(items, pa.Array | pa.ChunkedArray) and len(items) < MANY_ITEMS:
            return self.model.numbers(items)
        if self._item_index is None or self._item_index[0] is not self.model:
            self._item_index = self.model, TokenIndex(self.model.items[1:], "item")
        # Those that are not in the catalogue become 0.
        return self._item_index[1].find_many(items) + 1

    def _check_batch(
        self,
        users: Sequence[str] | pa.Array,
        numbers: np.ndarray,
        liked: np.ndarray,
        time: np.ndarray | None,
    ) -> None:
        for name, column in (("items", numbers), ("liked", liked), ("time", time)):
            if column is not None and len(column) != len(users):
                raise BankError(f"{name} has {len(column)} rows, but users has {len(users)}")
        wrong = np.flatnonzero(~np.isin(liked, self._labels))
        if len(wrong):
            raise BankError(f"liked is {liked[wrong[0]]} in row {wrong[0]}: {self._labels_are()}")
        if time is not None and not np.isfinite(time).all():
            row = int(np.flatnonzero(~np.isfinite(time))[0])
            raise BankError(f"time is {time[row]} in row {row}: it must be a finite number")
        if time is not None:
            self.model.check_times(time)

    def _check_implicit(self, of: str = "") -> None:
        """Refuse events without labels where the bank's events have them."""
        if not self.model.implicit:
            raise BankError(f"liked is missing{of}: the bank's events have labels")

    @property
    def _labels(self) -> tuple[int, ...]:
        return (1,) if self.model.implicit else (0, 1)

    def _labels_are(self) -> str:
        if self.model.implicit:
            return "without labels each of the bank's events is one of liking: leave liked out"
        return "labels must be 0 or 1"

    def _gather(self, name: str, numbers: np.ndarray, out: np.ndarray) -> None:
        """Write a column's values of users to ``out``; that of unknown ones (-1) stays."""

        def gather(part: slice) -> None:
            here, there = numbers[part], out[part]
            moved = self._moved[here]
            moved[here < 0] = -1
            in_base, in_own = np.flatnonzero(moved == 0), np.flatnonzero(moved > 0)
            if len(in_base):
                values = self._base.gather(name, here[in_base])
                there[in_base if len(in_base) < len(here) else ...] = values
            if len(in_own):
                values = getattr(self._own, name).take(moved[in_own] - 1, axis=0)
                there[in_own if len(in_own) < len(here) else ...] = values

        in_parts(gather, len(numbers))

    def _not_late(
        self, tokens: pa.Array, user: np.ndarray, time: np.ndarray, late: str
    ) -> np.ndarray | None:
        """Events that are not late; None if all are in time."""
        last = np.full(len(user), NO_TIME)
        self._gather("last_time", user, last)
        is_late = time < last
        if not is_late.any():
            return None
        if late == "refuse":
            event = int(np.flatnonzero(is_late)[0])
            raise BankError(_late(tokens[event].as_py(), time[event], last[event]))
        return np.flatnonzero(~is_late)

    def _enter(self, users: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Numbers of users, of whom new ones get the next; :meth:`_rows_to_write` begins them."""
        numbers = self._users.add(users)
        if len(self._users) > len(self._moved):
            more = max(len(self._users) - len(self._moved), len(self._moved) // 2)
            self._moved = np.concatenate([self._moved, np.zeros(more, np.int64)])
        return numbers

    def _rows_to_write(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of ``_own`` for users, who are copied there or begun there if need be."""
        rows = self._moved[numbers] - 1
        elsewhere = np.flatnonzero(rows < 0)
        if len(elsewhere):
            movers = distinct(numbers[elsewhere], len(self._users))
            n_old, own = int(np.searchsorted(movers, self._base.n)), self._own
            first = own.reserve(len(movers))
            begun, new = first + n_old, ()
            if n_old < len(movers):
                new = self._users.take(movers[n_old:]).to_pylist()
            for name in COLUMNS if n_old else ():
                self._gather(name, movers[:n_old], getattr(own, name)[first:begun])
            new_rows = slice(begun, own.n)
            own.states[new_rows] = self._initial
            own.codes[new_rows] = self._unknown_codes
            own.seen[new_rows], own.last_time[new_rows] = 0, NO_TIME
            own.folds[new_rows] = self.model.folds_of(new)
            own.number[first : own.n] = movers
            own.dirty[first : own.n] = own.in_delta[first : own.n] = False
            self._moved[movers] = np.arange(first + 1, own.n + 1)
            rows[elsewhere] = self._moved[numbers[elsewhere]] - 1
        return rows

    # Segments.

    def _merged(self) -> pa.RecordBatchReader:
        """All users as they are now, in batches."""

        def batches() -> Iterator[pa.RecordBatch]:
            for low in range(0, len(self), BATCH_ROWS):
                block = np.arange(low, min(low + BATCH_ROWS, len(self)))
                yield from self._table(block).combine_chunks().to_batches()

        return pa.RecordBatchReader.from_batches(user_schema(self.model), batches())

    def table_of(self, users: Sequence[str] | pa.Array) -> pa.Table:
        """States and codes of known users (:func:`user_table`).

        Raises
        ------
        BankError
            If a user is not in the bank.
        """
        tokens = token_array(users)
        numbers = self._users.find_many(tokens)
        if len(unknown := np.flatnonzero(numbers < 0)):
            user = tokens[int(unknown[0])].as_py()
            raise BankError(f"user {user!r} is not in the bank {self.folder}: leave it out")
        return self._table(numbers)

    def _table(self, numbers: np.ndarray) -> pa.Table:
        width = len(self._initial)
        columns = {
            "folds": np.empty(len(numbers), np.int64),
            "seen": np.empty(len(numbers), np.int64),
            "last_time": np.empty(len(numbers)),
            "states": np.empty((len(numbers), width), np.float32),
            "codes": np.empty((len(numbers), len(self.fields)), np.int32),
        }
        for name, out in columns.items():
            self._gather(name, numbers, out)
        return user_table(self.model, self._users.take(numbers), **columns)


def _are_numbers(items: Any) -> bool:
    """Whether items are given by their numbers, not by tokens."""
    return isinstance(items, np.ndarray) and items.dtype.kind in "iu"


def _check_not_empty(what: str, tokens: pa.Array | pa.ChunkedArray) -> None:
    row = pc.index(tokens, "").as_py()
    if row >= 0:
        raise BankError(f"{what} in row {row} is empty: an event needs its {what}")


def _as_floats(name: str, values: Any) -> np.ndarray:
    try:
        values = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise BankError(f"{name} must be one number for each event ({error})") from None
    if values.ndim != 1:
        raise BankError(f"{name} has the shape {values.shape}: give one number for each event")
    if len(values) and values.dtype.kind not in "bifu":
        raise BankError(
            f"{name} must hold numbers, but its first value is {values[:1].tolist()[0]!r}: give "
            "times in the unit of the bank's events, such as seconds since 1970, and labels as 0 "
            "or 1"
        )
    return values.astype(np.float64)


def _late(user: str, time: float, last: float) -> str:
    return (
        f"time={time} of user {user!r} is earlier than the user's last event in the bank ({last}): "
        "give events in the order of time, or a batch of them with late 'drop' or 'apply'"
    )

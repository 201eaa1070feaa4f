"""Profiles as a scikit-learn transformer, for LightGBM or any other model."""

from __future__ import annotations

import dataclasses
import difflib
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.model import NO_ITEM, UNKNOWN_ITEM, ProfileModel
from recbole_uip.bank.store import check_replaceable
from recbole_uip.bank.tokens import decodable
from recbole_uip.bank.users import NO_TIME, user_table
from recbole_uip.behaviours import TRAIN, Behaviours, folds_of
from recbole_uip.em.states import Events, index_history, iter_states, whole_history
from recbole_uip.profiles import Profiles, infer
from recbole_uip.settings import SettingsError, UIPSettings
from recbole_uip.texts import fill

__all__ = ["ProfileEncoder"]

# What facets=None stands for: no text, no LM.
_COMPANY = {
    "source": "collaborative",
    "codes": 32,
    "rank": 12,
    "match": {"rank": 12, "half_life": [30, 200]},
}
LABELLED_FACETS = {
    "leniency": {
        "source": "constant",
        "weight": "contrast",
        "half_life": [5, 20, "inf"],
        "match": {"half_life": [30, 200]},
    },
    "company": {**_COMPANY, "weight": "contrast"},
}
IMPLICIT_FACETS = {"company": {**_COMPANY, "weight": "positive"}}

# Beside naming another column.
_WAYS_OUT = {
    "label": ", give y, or set label=None where every event is positive",
    "time": ", or time=None where rows come in the order of time",
}


class ProfileEncoder(TransformerMixin, BaseEstimator):
    """User profiles as integer columns of a table of events, correct in time.

    An event is a row with a user, an item, a label and a time. The encoder has *parameters*
    (like rates, item vectors, codebooks, bins), which :meth:`fit` learns from all rows it is
    given, and a *history*: the events it knows so far, which are those of :meth:`fit` and of
    each :meth:`partial_fit` since. :meth:`transform` gives a row of user u and time t the
    profile that follows from the events of u in the history with a time strictly before t, and
    from nothing else. Hence

    - transforming rows that were fitted, or that :meth:`partial_fit` was given, lets none of
      them see itself, a tie, or anything later of its user;
    - :meth:`transform` reads no labels, so the rows it is given do not see each other. To let
      held-out rows see earlier held-out rows, as a system that is fed all day would:
      ``encoder.partial_fit(test).transform(test)``;
    - rows are not recognised: an event that is given twice counts twice.

    The history holds for all rows alike. Where held-out rows are earlier than training rows (a
    random split), transform the training rows before :meth:`partial_fit` gets the others.

    Parameters
    ----------
    facets : mapping, optional
        Facets by name, as in ``uip_facets`` (``properties/uip.yaml``). By default leniency and
        ``company``, what users of like behaviour like: no text, no LM.
    user, item : str
        Columns of tokens: text or whole numbers, which become their decimal text.
    label : str or None
        Column of labels, 0 or 1. Where X has no such column, the labels are ``y``. None where
        feedback is implicit: every event is positive.
    time : str or None
        Column of times: numbers, or timestamps, which become seconds. None where rows come in
        the order of time: fitted rows then see the rows before them, but rows that are
        transformed see the whole history, so fitted rows are :meth:`fit_transform`'s alone.
    items : pandas.DataFrame or pyarrow.Table, optional
        One row an item, with the column ``item`` and those that ``item_text`` names. Only facets
        with ``source: prefix``, ``lm``, ``embedding`` or ``words`` read it, and need it.
    item_text : str, optional
        Column of ``items`` that holds the text, or a template such as ``"{title} ({genre})"``.
    endings : tuple of two str, mapping or None
        Endings of the text of a liked and of a disliked behaviour; a mapping has the keys
        ``liked`` and ``disliked``.
    lm : str or mapping, optional
        The language model, or ``{name, adapter, device, dtype, batch_tokens, text_tokens}``.
    codebook : mapping, optional
        ``{sample, n_init, max_iter, tol}``.
    match : bool
        Whether facets give match fields, which depend on the row's item; without them
        :meth:`transform` reads no items.
    empty : {"pad", "prior"}
        A user without history has token 0, or the prior's mode.
    folds : int
        Folds of users: what a user meets was fitted on the others'.
    seed : int
    cache : path-like, optional
        Folder of LM weights and scores.

    Attributes
    ----------
    fields_ : tuple of FieldInfo
        Name, facet, kind and number of tokens of each column; tokens are 1 to ``size``, and 0
        is no history.
    model_ : ProfileModel
        The parameters.

    Examples
    --------
    >>> encoder = ProfileEncoder().set_output(transform="pandas")  # doctest: +SKIP
    >>> train_fields = encoder.fit_transform(train)  # doctest: +SKIP
    >>> test_fields = encoder.partial_fit(test).transform(test)  # doctest: +SKIP
    """

    def __init__(
        self,
        facets: Mapping[str, Any] | None = None,
        *,
        user: str = "user_id",
        item: str = "item_id",
        label: str | None = "label",
        time: str | None = "timestamp",
        items: pd.DataFrame | pa.Table | None = None,
        item_text: str | None = None,
        endings: tuple[str, str] | Mapping[str, str] | None = (" and loved it", " and hated it"),
        lm: str | Mapping[str, Any] | None = None,
        codebook: Mapping[str, Any] | None = None,
        match: bool = True,
        empty: str = "pad",
        folds: int = 4,
        seed: int = 2020,
        cache: str | os.PathLike | None = None,
    ) -> None:
        self.facets = facets
        self.user = user
        self.item = item
        self.label = label
        self.time = time
        self.items = items
        self.item_text = item_text
        self.endings = endings
        self.lm = lm
        self.codebook = codebook
        self.match = match
        self.empty = empty
        self.folds = folds
        self.seed = seed
        self.cache = cache

    def fit(self, X: pd.DataFrame | pa.Table, y: Any = None) -> ProfileEncoder:
        """Learn the parameters from all rows of ``X``, which become the history.

        Parameters
        ----------
        X : pandas.DataFrame, pyarrow.Table, or what Arrow can read
        y : array-like, shape (n_rows,), optional
            Labels, where ``X`` has no column of them; else the same as there.

        Raises
        ------
        SettingsError
            If a parameter, a column or a value cannot be used, or ``y`` differs from the labels
            in ``X``.
        """
        self._fit(X, y)
        return self

    def fit_transform(self, X: pd.DataFrame | pa.Table, y: Any = None) -> np.ndarray:
        """:meth:`fit`, and the fields of the same rows, each from its user's earlier rows."""
        profiles = self._fit(X, y)
        return np.column_stack([field.values for field in profiles.fields])

    def partial_fit(self, X: pd.DataFrame | pa.Table, y: Any = None) -> ProfileEncoder:
        """Let events enter the history; the parameters stay as they are.

        They may come in any order of time, and users may be new; events of one time keep the
        order in which they are given. Items that :meth:`fit` has not seen count for how much and
        how readily a user likes, not for taste.

        Parameters
        ----------
        X, y
            As for :meth:`fit`.

        Raises
        ------
        SettingsError
            If a column or value cannot be used, times are in another unit than the fitted ones,
            or, after :meth:`from_bank`, an event is earlier than one of its user in the bank.
            The history is then as it was.
        """
        check_is_fitted(self)
        rows = self._read(X, y)
        self._known = self._known.after(rows, self.model_)
        return self

    def transform(self, X: pd.DataFrame | pa.Table) -> np.ndarray:
        """Fields of each row, from what the history says of its user strictly before it.

        Parameters
        ----------
        X : pandas.DataFrame, pyarrow.Table, or what Arrow can read
            Users, times and, for match fields, items; labels are not read.

        Returns
        -------
        ndarray of int32, shape (n_rows, n_fields)
            Or what ``set_output`` says.

        Raises
        ------
        SettingsError
            If a column or value cannot be used, times are in another unit than the fitted ones,
            or, after :meth:`from_bank`, a row is not later than its user's last event in the bank.
        """
        check_is_fitted(self)
        table = _Table(X, "X")
        user, users = table.tokens("user", self.user)
        item = np.full(len(table), UNKNOWN_ITEM)
        if self.model_.match_names:
            code, items = table.tokens("item", self.item)
            item = self.model_.numbers(items)[code]
        # Without times, rows come after all that is known.
        time = np.full(len(table), np.inf)
        if self.time is not None:
            time = table.times("time", self.time)
            self.model_.check_times(time, " of X")
        return self._known.fields(self.model_, user, users, item, time)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the fields, shape (n_fields,); ``input_features`` is not read."""
        check_is_fitted(self)
        return np.array([field.name for field in self.fields_], dtype=object)

    def to_bank(self, folder: str | os.PathLike) -> FeatureBank:
        """Write the parameters and every user's state after the whole history as a bank.

        Column names are not part of a bank, nor are events: :meth:`from_bank` goes on from the
        states. A bank that is there already is replaced.

        Parameters
        ----------
        folder : path-like

        Returns
        -------
        FeatureBank
            Open for reading: ``look_up`` and ``match`` serve single users.

        Raises
        ------
        BankError
            If another process writes to the bank there, or no bank can be written there.
        """
        check_is_fitted(self)
        check_replaceable(folder)
        users = self._known.table(self.model_, timed=self.time is not None)
        FeatureBank.create(folder, self.model_, users).close()
        return FeatureBank.open(folder)

    @classmethod
    def from_bank(
        cls,
        folder: str | os.PathLike,
        *,
        user: str = "user_id",
        item: str = "item_id",
        label: str | None = "label",
        time: str | None = "timestamp",
    ) -> ProfileEncoder:
        """The encoder of a bank, whoever has written it; all states are read into memory.

        It knows each user's latest state alone. So rows that it transforms must be later than
        the user's last event in the bank, and events that it is given must not be earlier. Of
        events since, it knows the times.

        Parameters
        ----------
        folder : path-like
        user, item, label, time
            Columns of the tables to come. ``label`` is None if the bank's feedback is implicit.

        Raises
        ------
        BankError
            If the bank cannot be read.
        SettingsError
            If ``label`` is None and the bank's events have labels.
        """
        with FeatureBank.open(folder) as bank:
            model, states = bank.model, bank.table_of(bank.users())
        if label is None and not model.implicit:
            raise SettingsError(
                f"label=None, but the events of the bank {folder} have labels: name their column"
            )
        settings = model.settings.to_dict()
        encoder = cls(
            settings["uip_facets"],
            user=user,
            item=item,
            label=None if model.implicit else label,
            time=time,
            item_text=settings["uip_item_text"],
            endings=settings["uip_endings"],
            lm={
                "name": settings["uip_lm"],
                "adapter": settings["uip_lm_adapter"],
                "dtype": settings["uip_lm_dtype"],
                "batch_tokens": settings["uip_lm_batch_tokens"],
                "text_tokens": settings["uip_lm_text_tokens"],
            },
            codebook=settings["uip_codebook"],
            empty=settings["uip_empty"],
            folds=settings["uip_folds"],
            seed=settings["seed"],
        )
        encoder._learned(model, _Known.of_bank(states))
        return encoder

    def _fit(self, X: Any, y: Any) -> Profiles:
        settings = self._settings()
        rows = self._read(X, y)
        names, texts = self._catalogue(rows.items, settings)
        items = [NO_ITEM, *names]
        number_of = {name: number for number, name in enumerate(items) if number != UNKNOWN_ITEM}
        behaviours = Behaviours(
            user=rows.user,
            item=np.array([number_of[name] for name in rows.items], dtype=np.int64)[rows.item],
            liked=rows.liked,
            time=np.arange(len(rows.user), dtype=np.float64) if rows.time is None else rows.time,
            split=np.full(len(rows.user), TRAIN, dtype=np.int8),
            n_users=len(rows.users),
            n_items=len(items),
        )
        fold = folds_of(rows.users, settings.user_folds, settings.seed)
        profiles = infer(behaviours, texts, settings, fold)
        model = ProfileModel.from_profiles(
            profiles, items, settings, behaviours.liked is None, rows.time
        )
        self._learned(model, _Known.of_users(rows.users, fold, model).after(rows, model))
        return profiles

    def _learned(self, model: ProfileModel, known: _Known) -> None:
        self.model_, self.fields_, self._known = model, model.encoder.fields, known

    def _settings(self) -> UIPSettings:
        facets = self.facets
        if facets is None:
            facets = IMPLICIT_FACETS if self.label is None else LABELLED_FACETS
        if not self.match and isinstance(facets, Mapping):
            facets = {
                name: {**section, "match": None} if isinstance(section, Mapping) else section
                for name, section in facets.items()
            }
        text = self.item_text
        if text is not None and "{" not in str(text):
            text = f"{{{text}}}"
        endings = self.endings
        if isinstance(endings, tuple) and len(endings) == 2:
            endings = dict(zip(("liked", "disliked"), endings, strict=True))
        lm = self.lm if isinstance(self.lm, Mapping) else {"name": self.lm}
        settings = UIPSettings.from_dict(
            {
                "uip_facets": facets,
                # Told below in the words of this class, if there is none and should be.
                "uip_item_text": text or "{text}",
                "uip_endings": endings,
                "uip_codebook": self.codebook or {},
                "uip_empty": self.empty,
                "uip_folds": self.folds,
                "uip_time": "point_in_time",
                "uip_history": "observed",
                "uip_cache": self.cache,
                "seed": self.seed,
                **{"uip_lm" if key == "name" else f"uip_lm_{key}": lm[key] for key in lm},
            }
        )
        if not settings.facets:
            raise SettingsError("facets={} gives no field: name a facet, or take facets=None")
        readers = settings.text_facets
        if readers and (text is None or self.items is None):
            lacking = "item_text" if text is None else "items"
            raise SettingsError(
                f"{lacking}=None, and the facets {readers} read the items' texts: give items, a "
                f"table with the column {self.item!r}, and item_text, its column of texts or a "
                "template, or take facets with source: collaborative or constant"
            )
        return settings if readers else dataclasses.replace(settings, item_text=None)

    def _catalogue(
        self, seen: list[str], settings: UIPSettings
    ) -> tuple[list[str], list[str | None] | None]:
        """Tokens of all items, sorted; and texts by item number, where a facet reads them."""
        if settings.item_text is None:
            return sorted(seen), None
        table = _Table(self.items, "items")
        code, named = table.tokens("item", self.item)
        counts = np.bincount(code, minlength=len(named))
        if (counts > 1).any():
            raise SettingsError(
                f"items has {counts.max()} rows of the item {named[counts.argmax()]!r}: give one"
            )
        names = [name for _, name, _, _ in string.Formatter().parse(settings.item_text) if name]
        columns = [table.texts("item_text", name) for name in names]
        text_of = {
            named[at]: fill(settings.item_text, dict(zip(names, values, strict=True)))
            for at, values in zip(code, zip(*columns, strict=True), strict=True)
        }
        items = sorted({*seen, *named})
        return items, [None, *(text_of.get(item) for item in items)]

    def _read(self, X: Any, y: Any) -> _Rows:
        """Events of a table."""
        table, liked = _Table(X, "X"), None
        if self.label is not None:
            liked = self._labels(table, y)
        return _Rows(
            *table.tokens("user", self.user),
            *table.tokens("item", self.item),
            liked,
            None if self.time is None else table.times("time", self.time),
        )

    def _labels(self, table: _Table, y: Any) -> np.ndarray:
        """Labels of events: a column of the table, or ``y``; where there are both, they agree."""
        if y is None:
            return table.labels("label", self.label)
        liked = _Table(pd.DataFrame({"y": np.asarray(y)}), "y").labels("label", "y")
        if len(liked) != len(table):
            raise SettingsError(
                f"y has {len(liked)} rows, but X has {len(table)}: give a label a row"
            )
        if self.label in table.names:
            there = table.labels("label", self.label)
            if (differ := liked != there).any():
                row = int(differ.argmax())
                raise SettingsError(
                    f"y is {liked[row]:g} in row {row}, but the column {self.label!r} (label) of "
                    f"X is {there[row]:g}: leave one of them out"
                )
        return liked


@dataclass(frozen=True)
class _Rows:
    """Events as they were given; users and items are codes into lists of tokens."""

    user: np.ndarray
    users: list[str]
    item: np.ndarray
    items: list[str]
    liked: np.ndarray | None
    time: np.ndarray | None


@dataclass(frozen=True)
class _Known:
    """What is known of users: the states that a bank has left, and the events since.

    Attributes
    ----------
    number_of : dict of str to int
        Number of each user; those of the bank come first.
    fold : ndarray of int64, shape (n_users,)
    states : ndarray of float32, shape (n_banked, width)
    seen : ndarray of int64, shape (n_banked,)
        Number of events in each state.
    last_time : ndarray of float64, shape (n_banked,)
        Time of the last of them.
    user, item : ndarray of int64, shape (n_events,)
    liked, time : ndarray of float64, shape (n_events,)
        Without timestamps, times count the events.
    """

    number_of: dict[str, int]
    fold: np.ndarray
    states: np.ndarray
    seen: np.ndarray
    last_time: np.ndarray
    user: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    item: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    liked: np.ndarray = field(default_factory=lambda: np.empty(0))
    time: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def of_users(cls, users: list[str], fold: np.ndarray, model: ProfileModel) -> _Known:
        """Users who have done nothing yet."""
        width = len(model.kernels.initial)
        states = np.empty((0, width), np.float32)
        number_of = {user: number for number, user in enumerate(users)}
        return cls(number_of, fold, states, np.empty(0, np.int64), np.empty(0))

    @classmethod
    def of_bank(cls, table: pa.Table) -> _Known:
        """The users' segment of a bank."""
        width = table.schema.field("state").type.list_size
        states = table["state"].combine_chunks().flatten().to_numpy().reshape(-1, width)
        return cls(
            {user: number for number, user in enumerate(table["user"].to_pylist())},
            table["fold"].to_numpy().astype(np.int64),
            states,
            table["seen"].to_numpy(),
            table["last_time"].to_numpy(),
        )

    def after(self, rows: _Rows, model: ProfileModel) -> _Known:
        """What is known after more events."""
        number_of = dict(self.number_of)
        for name in rows.users:
            number_of.setdefault(name, len(number_of))
        new = list(number_of)[len(self.fold) :]
        n_rows, n_events = len(rows.user), len(self.time)
        user = np.array([number_of[name] for name in rows.users], dtype=np.int64)[rows.user]
        time = rows.time
        if time is None:
            time = np.arange(n_events, n_events + n_rows, dtype=np.float64)
        else:
            model.check_times(time, " of X")
            last = np.full(len(number_of), NO_TIME)
            last[: len(self.seen)] = self.last_time
            if (late := time < last[user]).any():
                row = int(late.argmax())
                raise SettingsError(
                    f"time={time[row]} in row {row} of X is earlier than the last event of user "
                    f"{rows.users[rows.user[row]]!r} in the bank ({last[user[row]]}): give events "
                    "in the order of time, or fit an encoder on all of them"
                )
        folds = model.folds_of(new)
        liked = np.ones(n_rows) if rows.liked is None else rows.liked
        return dataclasses.replace(
            self,
            number_of=number_of,
            fold=np.concatenate([self.fold, folds]),
            user=np.concatenate([self.user, user]),
            item=np.concatenate([self.item, model.numbers(rows.items)[rows.item]]),
            liked=np.concatenate([self.liked, liked]),
            time=np.concatenate([self.time, time]),
        )

    def fields(
        self,
        model: ProfileModel,
        user: np.ndarray,
        users: list[str],
        item: np.ndarray,
        time: np.ndarray,
    ) -> np.ndarray:
        """Tokens of rows, each from its user's strictly earlier events, (n_rows, n_fields).

        Parameters
        ----------
        model : ProfileModel
        user : ndarray of int64, shape (n_rows,)
            Codes into ``users``.
        users : list of str
        item : ndarray of int64, shape (n_rows,)
            Item numbers.
        time : ndarray of float64, shape (n_rows,)
        """
        number = np.array([self.number_of.get(name, -1) for name in users], dtype=np.int64)
        start, seen, last = self._begin(number, model)
        if (late := time <= last[user]).any():
            row = int(late.argmax())
            raise SettingsError(
                f"time={time[row]} in row {row} of X is not later than the last event of user "
                f"{users[user[row]]!r} in the bank ({last[user[row]]}), and a bank keeps no "
                "earlier profiles: give later rows, or fit an encoder on the events"
            )
        fold = model.folds_of(users)
        # Of the history, what these users did; then the rows, which are no events themselves.
        code = np.full(len(self.fold), -1)
        code[number[number >= 0]] = np.flatnonzero(number >= 0)
        past = np.flatnonzero(code[self.user] >= 0)
        who = np.concatenate([code[self.user[past]], user])
        rows = np.arange(len(past), len(who))
        events = Events(
            np.concatenate([self.item[past], item]),
            np.array(fold, dtype=np.int64)[who],
            np.concatenate([self.liked[past], np.zeros(len(rows))]),
        )
        history = index_history(
            who,
            np.concatenate([self.time[past], time]),
            np.arange(len(who)) < len(past),
            len(users),
        )
        tokens = np.empty((len(rows), len(model.encoder.fields)), dtype=np.int32)
        for at, states in iter_states(model.kernels, history, events, rows, start):
            block = rows[at]
            tokens[at] = model.encoder.tokens(
                states, seen[who[block]] + history.seen[block], events.item[block],
                events.fold[block],
            )  # fmt: skip
        return tokens

    def table(self, model: ProfileModel, timed: bool) -> pa.Table:
        """Every user's state after all events, as a segment of a bank."""
        start, seen, last = self._begin(np.arange(len(self.fold)), model)
        history = whole_history(
            self.user, self.time, np.ones(len(self.user), dtype=bool), len(self.fold)
        )
        events = Events(self.item, self.fold[self.user], self.liked)
        states = np.empty_like(start)
        for at, block in iter_states(model.kernels, history, events, start=start):
            states[at] = block
        if timed:
            np.maximum.at(last, self.user, self.time)
        users = list(self.number_of)
        return user_table(model, users, self.fold, seen + history.seen, last, states)

    def _begin(
        self, number: np.ndarray, model: ProfileModel
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State, number of events and last time that users (-1: unknown) have from the bank."""
        initial = model.kernels.initial
        states = np.tile(initial, (len(number), 1))
        seen, last = np.zeros(len(number), np.int64), np.full(len(number), NO_TIME)
        banked = (number >= 0) & (number < len(self.seen))
        states[banked] = self.states[number[banked]]
        seen[banked] = self.seen[number[banked]]
        last[banked] = self.last_time[number[banked]]
        return states, seen, last


class _Table:
    """Columns of a table, checked, whatever holds them.

    Parameters
    ----------
    table : pandas.DataFrame, pyarrow.Table, or what Arrow can read
    what : str
        What messages call it.
    """

    def __init__(self, table: Any, what: str) -> None:
        self._what = what
        if isinstance(table, pd.DataFrame):
            self._table, self.names = table, list(table.columns)
        elif hasattr(table, "__arrow_c_stream__") and hasattr(table, "columns"):
            self._table = pa.table(table)
            self.names = self._table.column_names
        else:
            raise SettingsError(
                f"{what} is of type {type(table).__name__} and has no named columns: give a pandas "
                "DataFrame or a pyarrow Table"
            )

    def __len__(self) -> int:
        return len(self._table)

    def tokens(self, role: str, name: str) -> tuple[np.ndarray, list[str]]:
        """Codes of a column's tokens, shape (n,), int64, and the distinct tokens, sorted."""
        column = self._column(role, name)
        kind = column.type
        if not (_is_text(kind) or pa.types.is_integer(kind)):
            self._refuse_type(role, name, kind, "text or whole numbers")
        self._check(role, name, column, column.is_valid().to_numpy(zero_copy_only=False), "a value")
        encoded = column.cast(pa.string()).dictionary_encode()
        names = encoded.dictionary.to_pylist()
        order = sorted(range(len(names)), key=names.__getitem__)
        place = np.empty(len(names), dtype=np.int64)
        place[order] = np.arange(len(names))
        return place[encoded.indices.to_numpy()], [names[at] for at in order]

    def times(self, role: str, name: str) -> np.ndarray:
        """Finite numbers, or seconds since 1970, shape (n,), float64."""
        column = self._column(role, name)
        kind = column.type
        if pa.types.is_date(kind):
            column = column.cast(pa.timestamp("ms"))
            kind = column.type
        if pa.types.is_timestamp(kind):
            per_second = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit]
            time = _floats(column.cast(pa.int64())) / per_second
        elif _is_number(kind):
            time = _floats(column)
        else:
            self._refuse_type(role, name, kind, "numbers or timestamps")
        self._check(role, name, column, np.isfinite(time), "a finite time")
        return time

    def labels(self, role: str, name: str) -> np.ndarray:
        """Labels 0 and 1, shape (n,), float64."""
        column = self._column(role, name)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        if not _is_number(column.type):
            self._refuse_type(role, name, column.type, "0 or 1")
        liked = _floats(column)
        self._check(role, name, column, np.isin(liked, (0, 1)), "0 or 1")
        return liked

    def texts(self, role: str, name: str) -> list[str]:
        """Values as text; missing ones are empty."""
        column = self._column(role, name)
        if not (_is_text(column.type) or _is_number(column.type)):
            self._refuse_type(role, name, column.type, "text or numbers")
        return [value or "" for value in column.cast(pa.string()).to_pylist()]

    def _column(self, role: str, name: str) -> pa.Array:
        if (count := self.names.count(name)) != 1:
            near = difflib.get_close_matches(str(name), map(str, self.names), n=1)
            hint = f"; did you mean {near[0]!r}?" if near and not count else ""
            raise SettingsError(
                f"{self._what} has {count or 'no'} column{'s' * (count > 1)} {name!r} ({role}); it "
                f"has {', '.join(map(repr, self.names))}{hint}; "
                f"name it by {role}={_WAYS_OUT.get(role, '')}"
            )
        column = self._table[name]
        if isinstance(column, pd.Series):
            try:
                column = pa.Array.from_pandas(column)
            except pa.ArrowException as error:
                raise SettingsError(
                    f"{self._what}: column {name!r} ({role}) holds values of several types "
                    f"({error}): give it one"
                ) from error
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = decodable(column).dictionary_decode()
        # What has no value at all has no type: an empty table of pandas, say.
        return column.cast(pa.int8()) if pa.types.is_null(column.type) else column

    def _refuse_type(self, role: str, name: str, kind: pa.DataType, wanted: str) -> None:
        raise SettingsError(
            f"{self._what}: column {name!r} ({role}) holds {kind}, and must hold {wanted}: "
            "convert it"
        )

    def _check(
        self, role: str, name: str, column: pa.Array, is_good: np.ndarray, wanted: str
    ) -> None:
        if not is_good.all():
            row = int(is_good.argmin())
            raise SettingsError(
                f"{self._what}: column {name!r} ({role}) is {column[row].as_py()!r} in row {row}: "
                f"every row needs {wanted}; drop the row, or correct it"
            )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _floats(column: pa.Array) -> np.ndarray:
    """Numbers in double precision, missing ones as NaN."""
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)

"""Parquet for a Feast feature store, whose point-in-time join then keeps our rule of time.

Feast's ``get_historical_features`` gives an entity row (user, t) the user's latest feature row
with ``event_timestamp <= t``. Our rule is stricter: only events *strictly* earlier than t count
(minus ``uip_refresh``). So the codes that follow the events at time s carry the timestamp

    s + uip_refresh + 1 microsecond,

the smallest step of the file: at t = s + uip_refresh Feast still finds the codes before s, and
one microsecond later those after. There is one row for each change of a user's codes, and a
first one, of an empty history, at the Unix epoch (or at the earliest row, if that is before), so
that every known user has codes at all times. Feast has nothing of unknown users, where
:meth:`~recbole_uip.bank.bank.FeatureBank.look_up` gives the codes of an empty history.

Match fields depend on the item too and are no features of the user; they are not exported.

Entity rows that are alike in user and time get one answer row from Feast: join it back on both.

A feature repository over such a file needs no more than::

    source = FileSource(path="features.parquet", timestamp_field="event_timestamp")
    user = Entity(name="user_id", value_type=ValueType.STRING)
    view = FeatureView(
        name="uip", entities=[user], source=source, ttl=timedelta(0),  # never too old
        schema=[Field(name=name, dtype=Int32) for name in fields],
    )
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recbole_uip.bank.export_atomic import SPLITS, Layout, read_layout
from recbole_uip.bank.store import BankError, check_folder
from recbole_uip.behaviours import Behaviours
from recbole_uip.em.states import Events, History, iter_states, whole_history
from recbole_uip.files import atomic_write

if TYPE_CHECKING:
    from recbole_uip.bank.bank import FeatureBank

__all__ = ["TIMESTAMP", "feature_rows", "feature_store_parquet", "timestamps"]

logger = logging.getLogger(__name__)

TIMESTAMP = "event_timestamp"
_MICROSECONDS = {"s": 10**6, "ms": 10**3, "us": 1}
# pandas keeps time in nanoseconds in places, which ends in these years.
_LIMITS = np.array(["1678-01-01", "2262-01-01"], dtype="datetime64[us]").astype(np.int64)


def timestamps(time: np.ndarray, unit: str = "s") -> np.ndarray:
    """Raw times as UTC timestamps, to the microsecond; for entity rows too.

    Parameters
    ----------
    time : ndarray of float64, shape (n,)
        Since 1970, in ``unit``.
    unit : {"s", "ms", "us"}

    Returns
    -------
    ndarray of datetime64[us], shape (n,)

    Raises
    ------
    BankError
        If a time is not finite, or lies outside the years 1678 to 2261.
    """
    if unit not in _MICROSECONDS:
        raise BankError(f"unit={unit!r} must be one of {', '.join(_MICROSECONDS)}")
    time = np.asarray(time, dtype=np.float64)
    exact = np.rint(time * _MICROSECONDS[unit])
    bad = np.flatnonzero(~((exact >= _LIMITS[0]) & (exact < _LIMITS[1])))
    if len(bad):
        raise BankError(
            f"time={time[bad[0]]} in row {bad[0]} is no time in {unit} since 1970 between the "
            "years 1678 and 2261: give the unit of the times (s, ms or us)"
        )
    return exact.astype(np.int64).astype("datetime64[us]")


def feature_store_parquet(
    profiles_parquet: str | os.PathLike,
    bank: FeatureBank,
    path: str | os.PathLike,
    *,
    unit: str = "s",
) -> int:
    """Write :func:`feature_rows` to ``path``, block by block; returns the number of rows.

    It raises BankError where those do, and if ``path`` can be no file.
    """
    if Path(path).is_dir():
        raise BankError(f"{path} is a folder: name the Parquet file that is to be written in it")
    check_folder(Path(path).parent)
    reader, rows = feature_rows(profiles_parquet, bank, unit=unit), 0
    with atomic_write(path) as file, pq.ParquetWriter(file, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def feature_rows(
    profiles_parquet: str | os.PathLike, bank: FeatureBank, *, unit: str = "s"
) -> pa.RecordBatchReader:
    """Each user's codes, one row for each change, by user and then time.

    Both inputs are artefacts of the main job: the events are the rows of ``profiles.parquet``
    that count as history, the codebooks and vectors are the bank's. After a refit of the bank
    the codes are those of the new codebooks. Where held-out rows are not later than training
    rows (a random split with ``uip_history: observed``), training rows see fewer events than
    the bank has, and meet other codes in Feast than in training; a warning says so.

    Parameters
    ----------
    profiles_parquet : path-like
    bank : FeatureBank
        Of the same run.
    unit : {"s", "ms", "us"}
        Of the times and of ``uip_refresh``.

    Returns
    -------
    pyarrow.RecordBatchReader
        Columns: the user field's own name (string, the entity key), ``event_timestamp``
        (timestamp[us, UTC]) and every field of ``bank.fields`` (int32; 0 is [PAD]).

    Raises
    ------
    BankError
        If profiles are not point-in-time, there are no usable timestamps, or the bank has fields
        that the other file lacks.
    """
    layout = read_layout(profiles_parquet)
    rule = "untimed" if layout.time is None else bank.model.settings.time
    if rule in ("untimed", "cross_fitted", "static"):
        raise BankError(
            f"{profiles_parquet} has {rule} profiles, which no feature store can tell by time: "
            "run with timestamps and uip_time=point_in_time, or export today's codes to redis"
        )
    if lacking := [name for name in bank.fields if name not in layout.fields]:
        raise BankError(
            f"the bank {bank.folder} has the field {lacking[0]}, which {profiles_parquet} lacks: "
            "give the bank and the profiles of the same run"
        )
    users, behaviours, events = _read_events(Path(profiles_parquet), layout, bank)
    is_event = np.ones(len(behaviours), dtype=bool)
    if bank.model.settings.history == "train":
        is_event = behaviours.train
    elif not behaviours.is_time_ordered:
        logger.warning(
            "held-out rows are not later than training rows: what Feast gives for a training row "
            "may count held-out events, which the row's own codes in %s do not",
            profiles_parquet,
        )
    history, stamp = _changes(behaviours, is_event, bank.model.settings.refresh, unit)
    schema = pa.schema(
        [
            (layout.user, pa.string()),
            (TIMESTAMP, pa.timestamp("us", tz="UTC")),
            *((name, pa.int32()) for name in bank.fields),
        ]
    )
    blocks = _blocks(bank, history, events, stamp, users, schema)
    return pa.RecordBatchReader.from_batches(schema, blocks)


def _read_events(
    path: Path, layout: Layout, bank: FeatureBank
) -> tuple[pa.Array, Behaviours, Events]:
    """User tokens by number, and the rows with those numbers and the bank's item numbers."""
    columns = [layout.user, layout.item, layout.time, "split"]
    columns += [] if layout.label is None else [layout.label]
    table = pq.read_table(path, columns=columns)
    users, user = _numbered(table[layout.user])
    items, item = _numbered(table[layout.item])
    names, split = _numbered(table["split"])
    split_of = np.array([SPLITS.index(name) for name in names.to_pylist()], dtype=np.int8)
    liked = None if layout.label is None else table[layout.label].to_numpy().astype(np.float64)
    behaviours = Behaviours(
        user,
        bank.model.numbers(items.to_pylist())[item],
        liked,
        table[layout.time].to_numpy().astype(np.float64),
        split_of[split],
        len(users),
        len(bank.model.items),
    )
    folds = bank.model.folds_of(users.to_pylist())
    return users, behaviours, Events.from_behaviours(behaviours, folds)


def _numbered(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Distinct values of a column as strings, and each row's number among them."""
    values = column.cast(pa.string()).combine_chunks().dictionary_encode()
    return values.dictionary, values.indices.to_numpy().astype(np.int64)


def _changes(
    behaviours: Behaviours, is_event: np.ndarray, refresh: float, unit: str
) -> tuple[History, np.ndarray]:
    """Points in time at which codes may change, as rows of a history, and their timestamps.

    Each user with events has one row before all of them, and one after each distinct time.
    """
    whole = whole_history(behaviours.user, behaviours.time, is_event, behaviours.n_users)
    user, time = behaviours.user[whole.events], behaviours.time[whole.events]
    # Of events at the same time, the last: they enter together.
    last = np.append((user[1:] != user[:-1]) | (time[1:] != time[:-1]), True)[: len(user)]
    at = np.flatnonzero(last)
    exact = timestamps(time[at] + refresh, unit).astype(np.int64)
    same = np.flatnonzero((user[at][1:] == user[at][:-1]) & (exact[1:] == exact[:-1]))
    if len(same):
        left, right = time[at][same[0] : same[0] + 2].tolist()
        raise BankError(
            f"time={left} and {right} of one user are the same microsecond, the smallest step of "
            "a feature store: round the times and run again, or give their unit (s, ms or us)"
        )
    present = np.flatnonzero(whole.seen)
    timeline = np.concatenate([present, user[at]])
    seen = np.concatenate([np.zeros(len(present), np.int64), at + 1 - whole.first[user[at]]])
    earliest = timestamps(behaviours.time.min(keepdims=True), unit).astype(np.int64)[0]
    first = min(0, earliest)
    stamp = np.concatenate([np.full(len(present), first), exact + 1])
    order = np.lexsort((seen, timeline))
    history = History(whole.events, whole.first, timeline[order], seen[order])
    return history, stamp[order].astype("datetime64[us]")


def _blocks(
    bank: FeatureBank,
    history: History,
    events: Events,
    stamp: np.ndarray,
    users: pa.Array,
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:
    encoder = bank.model.encoder
    before = np.full((1, len(bank.fields)), -1, dtype=np.int32)
    # Rows are sorted, so blocks are consecutive stretches of them.
    for at, states in iter_states(encoder.kernels, history, events):
        codes = encoder.profiles(states, history.seen[at])
        changed = (codes != np.concatenate([before, codes[:-1]])).any(axis=1)
        keep = np.flatnonzero(changed | (history.seen[at] == 0))
        before = codes[-1:]
        if len(keep):
            tokens = users.take(pa.array(history.timeline[at][keep]))
            columns = [tokens, pa.array(stamp[at][keep]), *codes[keep].T.copy()]
            yield pa.RecordBatch.from_arrays(
                [pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)],
                schema=schema,
            )

"""Banks from a Spark DataFrame, for events that are too many for one machine.

The bank is the one that :func:`~recbole_uip.bank.build.bank_of_events` writes of the same
events, bit for bit. What is small is done on the driver: like rates, the fit on a sample of
whole users, and the writing. The events themselves stay with the executors: they are
partitioned by ranges of users, sorted by user, time and their original order, and streamed
through the kernels, so that a state never waits for more than one Arrow batch. Finished rows lie
on the executors' disks until the driver writes them, one partition after another.

The executors need this package, numba and all, and Python as on the driver. Of Spark they need
no shared folder: rows travel as Arrow bytes within Spark's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_uip.bank import build
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.events import EventColumns, check_columns
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import check_replaceable
from recbole_uip.bank.users import NO_TIME, user_schema, user_table
from recbole_uip.em.kernels import advance_many
from recbole_uip.settings import SettingsError, UIPSettings

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["bank_of_spark"]

BLOB_ROWS = 10_000  # that leave an executor as one value
BATCH_ROWS = 200_000  # users of one batch in the bank
BLOB = "blob"

_DEMANDS = {
    "user": "every event needs its user; leave such rows out",
    "item": "every event needs its item; leave such rows out",
    "label": "labels are 0 or 1; leave such rows out, or give rating and threshold",
    "rating": "every event needs a finite number; leave such rows out",
    "time": "every event needs a finite number, date or timestamp (cast text to one); leave such "
    "rows out",
    "order": "every event needs its place; leave such rows out",
}


def bank_of_spark(
    folder: str | os.PathLike,
    events: DataFrame,
    columns: EventColumns | Mapping[str, Any],
    settings: UIPSettings,
    texts: Callable[[Mapping[str, int], int], Sequence[str | None]] | None = None,
    *,
    order: str | None = None,
    model: ProfileModel | None = None,
) -> FeatureBank:
    """Write the bank of the events in a Spark DataFrame; all of them are history.

    Like rates are those of all events. Parameters are fitted on the driver, on the sample of
    whole users that :func:`~recbole_uip.bank.build.bank_of_events` takes. ``events`` is read 5
    times (3 times with ``model``): cache it if it is expensive to compute.

    Parameters
    ----------
    folder : path-like
        On the driver.
    events : pyspark.sql.DataFrame
        Of a session that has a SparkContext, which Spark Connect has not.
    columns : EventColumns or mapping
        What to read, by the names of ``events``; a mapping has the names of
        :class:`EventColumns` as its keys. Users and items are text or whole numbers, times
        numbers, dates or timestamps (without a time zone: UTC), all else numbers or booleans;
        numbers may be text.
    settings : UIPSettings
        Not used with ``model``, which has its own.
    texts : callable, optional
        From the number of each item token, and the number of items, to the items' texts.
    order : str, optional
        Column of numbers that order a user's events of one time, and all of them where
        ``columns`` has no time. By default, ties keep the order in which Spark reads rows; of
        several files that is not the order of their names, but the larger file's first.
    model : ProfileModel, optional
        Already fitted, such as ``FeatureBank.open(folder).model``. Nothing is fitted then;
        items that it lacks count as unknown ones.

    Returns
    -------
    FeatureBank
        Open for writing. Users are in the order of their tokens' UTF-8 bytes.

    Raises
    ------
    SettingsError
        If a column is missing or of the wrong type, or a value of it cannot be used.
    """
    columns = _columns(columns)
    if columns.time is None and order is None:
        raise SettingsError(
            "columns.time=None needs order: rows of a DataFrame have no order of their own; name "
            "a column that orders a user's events"
        )
    if model is not None and model.implicit != (columns.feedback is None):
        raise SettingsError(
            f"columns has label={columns.label!r} and rating={columns.rating!r}, but model was "
            f"fitted on events {'without' if model.implicit else 'with'} labels: give events like "
            "those it was fitted on, or no model"
        )
    check_replaceable(folder)
    context = _context(events)
    values = _values(events, columns, order)
    counts = _survey(events, values, columns, order, by_item=model is None)
    if model is None:
        sample = _sample(values, settings.seed, build.FIT_USERS, build.FIT_EVENTS)
        model = build.fit_model(sample, counts, settings, texts)
    # Vectors for items to come are of no use to the executors.
    shared = context.broadcast(dataclasses.replace(model, tables={}))

    def states(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
        return _states(shared.value, batches)

    try:
        with contextlib.closing(_fetched(_by_user(values), states)) as tables:
            schema = user_schema(model)
            reader = pa.RecordBatchReader.from_batches(schema, _gathered(tables))
            return FeatureBank.create(folder, model, reader)
    finally:
        shared.destroy()


# --- what the DataFrame holds --------------------------------------------------------------


def _columns(columns: EventColumns | Mapping[str, Any]) -> EventColumns:
    if isinstance(columns, EventColumns):
        return columns
    known = [field.name for field in dataclasses.fields(EventColumns)]
    for key in columns:
        if key not in known:
            raise SettingsError(f"columns has the key {key!r}: it may have {', '.join(known)}")
    for role in ("user", "item"):
        if role not in columns:
            raise SettingsError(f"columns has no {role!r}: name the column of each event's {role}")
    return EventColumns(**columns)


def _context(events: DataFrame) -> Any:
    """The session's SparkContext, which sends the model to the executors."""
    try:
        return events.sparkSession.sparkContext
    except Exception as error:  # Connect's; of another class in each version
        raise SettingsError(
            f"events={type(events)} has no SparkContext, which sends the model to the executors: "
            "give a DataFrame of a classic Spark session, not of Spark Connect"
        ) from error


def _roles(columns: EventColumns, order: str | None) -> dict[str, str]:
    """Columns to read, by what :class:`EventColumns` calls them."""
    names = {**dataclasses.asdict(columns), "order": order}
    del names["threshold"]
    return {role: name for role, name in names.items() if name is not None}


def _values(events: DataFrame, columns: EventColumns, order: str | None) -> DataFrame:
    """User, item, liked, time and position of each event; null is what cannot be used.

    Without labels there is no ``liked``, and without times no ``time``.
    """
    from pyspark.sql import functions as F

    roles = _roles(columns, order)
    check_columns("events", events.columns, roles)
    value = {role: _value(events, role, name, columns) for role, name in roles.items()}
    left = {"user": value["user"], "item": value["item"]}
    if columns.feedback is not None:
        left["liked"] = value["rating" if columns.label is None else "label"]
    if columns.time is not None:
        left["time"] = value["time"]
    # It numbers rows as they are read, and must do so before any of them is moved.
    left["position"] = F.monotonically_increasing_id() if order is None else value["order"]
    return events.select([column.alias(name) for name, column in left.items()])


def _value(events: DataFrame, role: str, name: str, columns: EventColumns) -> Column:
    """What is read of a column, as :class:`EventFile` reads it."""
    from pyspark.sql import functions as F
    from pyspark.sql import types as T

    column, kind = events[_quoted(name)], events.schema[name].dataType
    if role in ("user", "item"):
        if not isinstance(kind, (T.StringType, T.IntegralType)):
            raise _wrong_type(role, name, kind, "text or whole numbers")
        token = column.cast("string")
        return F.when(token != "", token)
    if role == "time" and isinstance(kind, T.DateType):
        return F.unix_date(column) * 86400.0
    if role == "time" and isinstance(kind, (T.TimestampType, T.TimestampNTZType)):
        if isinstance(kind, T.TimestampNTZType):  # UTC, whatever the session's time zone
            column = F.concat(column.cast("string"), F.lit("Z")).cast("timestamp")
        return F.unix_micros(column) / 1e6
    if not isinstance(kind, (T.StringType, T.BooleanType, T.NumericType)):
        content = "numbers, dates or timestamps" if role == "time" else "numbers"
        raise _wrong_type(role, name, kind, content)
    if role == "order" and isinstance(kind, T.IntegralType):
        return column.cast("long")  # a double would not tell the largest apart
    # A float column holds 3.6 as a float, which is less than the double 3.6.
    number_type = "float" if isinstance(kind, T.FloatType) else "double"
    number = F.expr(f"try_cast({_quoted(name)} AS {number_type})")
    if role == "label":
        return F.when(number.isin(0.0, 1.0), number.cast("double"))
    if role == "rating":
        liked = (number >= F.lit(float(columns.threshold)).cast(number_type)).cast("double")
        return F.when(_is_finite(number), liked)
    return F.when(_is_finite(number), number.cast("double"))


def _quoted(name: str) -> str:
    """A column's name, dots and all."""
    return "`" + name.replace("`", "``") + "`"


def _is_finite(number: Column) -> Column:
    from pyspark.sql import functions as F

    return ~F.isnan(number) & (F.abs(number) != float("inf"))


def _wrong_type(role: str, name: str, kind: Any, content: str) -> SettingsError:
    return SettingsError(
        f"events: column {name!r} ({role}) is of type {kind.simpleString()} and must hold "
        f"{content}: cast it"
    )


def _survey(
    events: DataFrame,
    values: DataFrame,
    columns: EventColumns,
    order: str | None,
    by_item: bool,
) -> pa.Table:
    """Check every value, and count each item's events and likes, in the order of the tokens.

    Without ``by_item`` there is one row, of all items.
    """
    from pyspark.sql import functions as F

    likes = F.sum("liked") if columns.feedback is not None else F.count("*")
    lacks = [F.count_if(F.col(name).isNull()).alias(f"no_{name}") for name in values.columns]
    grouped = values.groupBy("item") if by_item else values.groupBy()
    counted = grouped.agg(F.count("*").alias("count"), likes.cast("long").alias("likes"), *lacks)
    counted = counted.orderBy("item") if by_item else counted
    tables = [*_fetched(counted, _as_they_are)]
    if not sum(pc.sum(table["count"]).as_py() for table in tables):
        raise SettingsError("events is empty: give a DataFrame with events")
    counts = pa.concat_tables(tables).combine_chunks()
    for role, name in _roles(columns, order).items():
        left = {"label": "liked", "rating": "liked", "order": "position"}.get(role, role)
        if not pc.sum(counts[f"no_{left}"]).as_py():
            continue
        raw, value = events[_quoted(name)], _value(events, role, name, columns)
        (shown,) = events.filter(value.isNull()).select(raw.cast("string")).first()
        shown = "empty" if shown in (None, "") else repr(shown)
        raise SettingsError(f"events: column {name!r} ({role}) is {shown}: {_DEMANDS[role]}")
    return counts


# --- reading and sorting -------------------------------------------------------------------


def _by_user(values: DataFrame) -> DataFrame:
    """Sort events by user, time and position, no user in two partitions.

    Ranges, not hashes, so that the bank's order does not depend on the number of partitions.
    """
    keys = [name for name in ("user", "time", "position") if name in values.columns]
    rows = values.repartitionByRange("user").sortWithinPartitions(*keys)
    return rows.drop("position")


def _sample(values: DataFrame, seed: int, n_users: int, max_events: int) -> pa.Table:
    """The events of :meth:`EventFile.sample_users`, in its order."""
    from pyspark.sql import functions as F

    draw = F.md5(F.concat(F.lit(f"{int(seed)}:"), F.col("user")).cast("binary"))
    users = values.groupBy("user").count().withColumn("draw", draw)
    drawn = users.orderBy("draw", "user").limit(n_users).select("draw", "user", "count")
    drawn = pa.concat_tables(_fetched(drawn, _as_they_are))
    total = np.cumsum(drawn["count"].to_numpy())
    last = max(int(np.searchsorted(total, max_events, side="right")), 1) - 1
    # All users up to the last one drawn: no list of users has to travel.
    last_draw, last_user = drawn["draw"][last].as_py(), drawn["user"][last].as_py()
    is_drawn = (draw < last_draw) | ((draw == last_draw) & (F.col("user") <= last_user))
    return pa.concat_tables(_fetched(_by_user(values.filter(is_drawn)), _as_they_are))


def _as_they_are(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    for batch in batches:
        yield pa.Table.from_batches([batch])


def _fetched(
    rows: DataFrame, work: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.Table]]
) -> Iterator[pa.Table]:
    """What ``work`` makes of each partition, in order, a partition at a time on the driver."""
    from pyspark import StorageLevel

    def packed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in work(batches):
            for batch in table.combine_chunks().to_batches(max_chunksize=BLOB_ROWS):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                yield pa.record_batch({BLOB: pa.array([sink.getvalue().to_pybytes()])})

    # toLocalIterator makes partitions one by one; the count has made them all at once before.
    blobs = rows.mapInArrow(packed, f"{BLOB} binary").persist(StorageLevel.DISK_ONLY)
    try:
        blobs.count()
        for row in blobs.toLocalIterator():
            yield pa.ipc.open_stream(bytes(row[BLOB])).read_all()
    finally:
        blobs.unpersist()


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer, larger batches, which a bank reads faster."""
    held: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        if table is not None:
            held.append(table)
        if held and (table is None or sum(map(len, held)) >= BATCH_ROWS):
            yield from pa.concat_tables(held).combine_chunks().to_batches()
            held = []


# --- states --------------------------------------------------------------------------------


def _runs(users: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Number of the user in each row of a sorted column, and the users' tokens."""
    runs = pc.run_end_encode(users)
    ends = runs.run_ends.to_numpy().astype(np.int64)
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)), runs.values.to_pylist()


def _states(model: ProfileModel, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """States of sorted events' users; of a user who fills many batches, the state is carried."""
    held: list[np.ndarray] = []  # columns of the last user, whose events may go on
    for batch in batches:
        if not batch.num_rows:
            continue
        row, tokens = _runs(batch["user"])
        n = len(tokens)
        folds = model.folds_of(tokens)
        seen, states = np.bincount(row), np.tile(model.kernels.initial, (n, 1))
        if held and held[0][0] == tokens[0]:
            seen[0] += held[2][0]
            states[0] = held[4][0]
        elif held:
            yield user_table(model, *held)
        has = batch.schema.names
        liked = batch["liked"].to_numpy() if "liked" in has else np.ones(len(row))
        # A batch has fewer items than events; tokens are looked up once each.
        found = batch["item"].dictionary_encode()
        items = model.numbers(found.dictionary.to_pylist())[found.indices.to_numpy()]
        # A task has one core to itself.
        advance_many(states, row, model.kernels, items, folds[row], liked)
        last_time = np.full(n, NO_TIME)
        if "time" in has:
            last_time = batch["time"].to_numpy()[np.flatnonzero(np.diff(row, append=n))]
        users = [np.array(tokens, dtype=object), folds, seen, last_time, states]
        if n > 1:
            yield user_table(model, *(column[:-1] for column in users))
        held = [column[-1:] for column in users]
    if held:
        yield user_table(model, *held)

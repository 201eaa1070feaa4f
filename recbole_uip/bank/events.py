"""Interactions files of any size: counted, sampled, and streamed user by user.

The work is DuckDB's, which keeps within a memory limit and spills to disk what is more. A pass
for the users and the items numbers both in the order of their tokens. Events are then sorted as
narrow rows of numbers, several times faster than as rows of text, and get their tokens back
when a block leaves.

A text file is turned into Parquet once, in a temporary folder: its rows then have numbers, by
which ties keep the order in the file whatever the threads do, and it is parsed once only.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import glob
import gzip
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from recbole_uip.settings import SettingsError

__all__ = ["EventColumns", "EventFile", "check_columns"]

DELIMITERS = {".inter": "\t", ".csv": ","}
PARQUET = ".parquet"
BATCH = 1 << 17  # rows that leave DuckDB at a time

# DuckDB's names of types, and of which each column may be.
_SIGNED = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_INTEGERS = _SIGNED | {f"U{name}" for name in _SIGNED}
_NUMBERS = _INTEGERS | {"FLOAT", "DOUBLE", "DECIMAL"}
_DATES = {"DATE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP WITH TIME ZONE"}
_NANOSECONDS = {"TIMESTAMP_NS", "TIMESTAMPTZ_NS"}
_TOKENS = ({"VARCHAR", "UUID"} | _INTEGERS, "text or whole numbers")
_ACCEPTED = {
    "user": _TOKENS,
    "item": _TOKENS,
    "liked": ({"VARCHAR", "BOOLEAN"} | _NUMBERS, "numbers"),
    "time": ({"VARCHAR"} | _NUMBERS | _DATES | _NANOSECONDS, "numbers or dates"),
}


@dataclass(frozen=True)
class EventColumns:
    """Which columns of a file hold what, by their names in the file (without RecBole's type).

    With neither ``label`` nor ``rating``, feedback is implicit: every event is positive.

    Parameters
    ----------
    user, item : str
        Tokens: text, or in Parquet whole numbers too.
    time : str, optional
        Numbers of any unit that orders events, or dates and timestamps, which become seconds
        since 1970 (UTC, also where they name no time zone). Without it, a user's events keep
        the order in the file.
    label : str, optional
        0 or 1.
    rating : str, optional
        Numbers; an event is liked from ``threshold`` on.
    threshold : float, optional
        The lowest rating that is a like.

    Raises
    ------
    SettingsError
        If a combination makes no sense.
    """

    user: str
    item: str
    time: str | None = None
    label: str | None = None
    rating: str | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        used: dict[str, str] = {}
        for role in ("user", "item", "time", "label", "rating"):
            name = getattr(self, role)
            if name is None and role not in ("user", "item"):
                continue
            if not isinstance(name, str) or not name:
                raise SettingsError(f"{role}={name!r} must be the name of a column")
            if name in used:
                raise SettingsError(
                    f"{used[name]} and {role} are both the column {name!r}: name two columns"
                )
            used[name] = role
        if self.label is not None and self.rating is not None:
            raise SettingsError(
                f"label={self.label!r} and rating={self.rating!r} both say what was liked: "
                "give one of them"
            )
        if self.rating is not None and self.threshold is None:
            raise SettingsError(
                f"rating={self.rating!r} needs threshold, the lowest rating that is a like"
            )
        if self.threshold is not None:
            if self.rating is None:
                raise SettingsError(
                    f"threshold={self.threshold!r} needs rating, the column it applies to"
                )
            if not isinstance(self.threshold, Real) or not math.isfinite(self.threshold):
                raise SettingsError(f"threshold={self.threshold!r} must be a finite number")

    @property
    def feedback(self) -> str | None:
        """The column of labels or ratings; None for implicit feedback."""
        return self.label if self.label is not None else self.rating


class EventFile:
    """Interactions in a RecBole atomic file, CSV or Parquet.

    Tokens are compared and returned as text, as they stand in the file: ``007`` is not ``7``.
    The first use reads the file and checks every value. A text file is then parsed and written
    to a temporary folder as Parquet; "passes" below are over Parquet files, or that copy.

    The file must not change meanwhile. One thread at a time may use an ``EventFile``; several
    iterators of it may be open.

    Parameters
    ----------
    path : path-like or sequence of path-like
        ``.inter`` (tab-separated, header ``name:type``), ``.csv`` (comma-separated, with a
        header; both in UTF-8, with double quotes around fields that need them, and as ``.gz``
        too) or ``.parquet``: a file, or several of one format as a list, a glob, or a folder
        with its subfolders, whose files come in the order of their names.
    columns : EventColumns
        What to read.
    memory : str
        What DuckDB may take, such as ``"2GB"``. Blocks, the item tokens and the allocators'
        slack come on top: allow a few hundred MB.
    threads : int, optional
        DuckDB's threads; all cores by default. More threads need more memory.
    scratch : path-like, optional
        Folder in which the temporary folder is made; the system's by default. It may need
        about the size of the uncompressed events, and must lie on a disk, not in memory.

    Raises
    ------
    SettingsError
        If files or columns are missing, or a setting is wrong. Every method and property
        raises it for a value that cannot be used, naming file, row, column and value.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        columns: EventColumns,
        *,
        memory: str = "2GB",
        threads: int | None = None,
        scratch: str | os.PathLike | None = None,
    ) -> None:
        self.columns = columns
        self.files: tuple[Path, ...] = tuple(_paths(path))
        self._memory = memory
        self._format = _format_of(self.files, path)
        self._folder = _temporary_folder(scratch)
        # Also at an exit, or when an error below leaves no object to close.
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._database = _connect(self._folder / "spill", memory, threads)
        self._headers = [self._header(file) for file in self.files]
        wanted = {self._said(role): name for role, name in self._roles.items()}
        for file, header in zip(self.files, self._headers, strict=True):
            check_columns(file, [name for name, _ in header], wanted)
        self._types = self._common_types()
        self._totals: tuple[int, int] | None = None

    @property
    def n_events(self) -> int:
        """Number of events; 2 passes at the first use of this object, which all else shares."""
        return self._survey()[0]

    @property
    def n_users(self) -> int:
        """Number of users; 2 passes at the first use of this object, which all else shares."""
        return self._survey()[1]

    @property
    def schema(self) -> pa.Schema:
        """Columns of samples and blocks: user, item, and where the file has them liked, time."""
        fields = [("user", pa.string()), ("item", pa.string())]
        fields += [(role, pa.float64()) for role in ("liked", "time") if role in self._roles]
        return pa.schema(fields)

    def item_counts(self) -> pa.Table:
        """Count each item's events; no pass beyond the first use's.

        Returns
        -------
        counts : pyarrow.Table
            ``item`` (string), ``count`` and ``likes`` (int64), in the order of the tokens'
            UTF-8 bytes. With implicit feedback every event is a like.
        """
        self._survey()
        query = "SELECT token AS item, n AS count, likes FROM items ORDER BY k"
        schema = pa.schema([("item", pa.string()), ("count", pa.int64()), ("likes", pa.int64())])
        batches = [*self._stream(query)]
        return pa.Table.from_batches(batches).cast(schema).combine_chunks()

    def sample_users(self, n_users: int, seed: int, max_events: int) -> pa.Table:
        """All events of whole users, chosen by a hash of their tokens; 1 pass.

        Which users are drawn depends on their tokens, their numbers of events and the
        arguments, not on the machine, the threads or the order of the file. A sample of more
        users, or of more events, holds the smaller one.

        Parameters
        ----------
        n_users : int
            Number of users, or all where there are fewer.
        seed : int
            Another seed draws other users.
        max_events : int
            Users are drawn while all their events together are no more. The first user drawn
            is kept whole in any case.

        Returns
        -------
        events : pyarrow.Table
            Of :attr:`schema`, in the order of :meth:`blocks`.
        """
        _check_counts(n_users=n_users, max_events=max_events)
        self._survey()
        draw = f"md5({_text(f'{int(seed)}:')} || token)"
        drawn = f"SELECT *, {draw} AS draw FROM users ORDER BY draw, token LIMIT {int(n_users)}"
        order = "OVER (ORDER BY draw, token ROWS UNBOUNDED PRECEDING)"
        total = f"SELECT *, sum(n) {order} AS total, row_number() {order} AS place FROM ({drawn})"
        self._execute(
            f"CREATE OR REPLACE TABLE sample AS SELECT token, n, k FROM ({total}) "
            f"WHERE total <= {int(max_events)} OR place = 1"
        )
        events = pa.concat_tables([*self._blocks("sample", max_events)])
        self._execute("DROP TABLE sample")
        return events.combine_chunks()

    def blocks(self, max_rows: int = 1_000_000) -> Iterator[pa.Table]:
        """All events by user, each user's by time; 1 pass, and a sort that may spill.

        Users come in the order of their tokens' UTF-8 bytes. Events of one user at one time
        keep the order in the file, and files their own order.

        Parameters
        ----------
        max_rows : int
            Rows of a block, at most, unless a single user has more: no user is cut in two.

        Returns
        -------
        blocks : iterator of pyarrow.Table
            Of :attr:`schema`, none empty.
        """
        _check_counts(max_rows=max_rows)
        self._survey()
        return self._blocks("users", max_rows)

    def close(self) -> None:
        """Delete the temporary folder; closing twice does no harm."""
        self._database.close()
        self._remove()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- what the file holds -----------------------------------------------------------------

    @property
    def _roles(self) -> dict[str, str]:
        """Columns to read, by the name they leave with."""
        columns = self.columns
        roles = {
            "user": columns.user,
            "item": columns.item,
            "liked": columns.feedback,
            "time": columns.time,
        }
        return {role: name for role, name in roles.items() if name is not None}

    def _said(self, role: str) -> str:
        """What :class:`EventColumns` calls a column."""
        if role != "liked":
            return role
        return "label" if self.columns.label is not None else "rating"

    def _header(self, file: Path) -> list[tuple[str, str]]:
        """Names and DuckDB's types of a file's columns."""
        if self._format != PARQUET:
            return [(name, "VARCHAR") for name in _text_header(file, DELIMITERS[self._format])]
        rows = self._execute(f"DESCRIBE SELECT * FROM {_parquet([file])}", file).fetchall()
        for name, *_ in rows:
            if name.lower() in ("file_index", "file_row_number"):  # which DuckDB gives to rows
                raise SettingsError(
                    f"{file} has a column {name!r}, which hides the order of its rows: rename it"
                )
        # DECIMAL(4,2) and ENUM('a', 'b') are told by their first word.
        return [(name, kind.split("(")[0]) for name, kind, *_ in rows]

    def _common_types(self) -> dict[str, str]:
        """Types of the columns to read, which are the same in all files."""
        first = dict(self._headers[0])
        for role, name in self._roles.items():
            kinds, content = _ACCEPTED[role]
            if first[name] not in kinds:
                raise SettingsError(
                    f"{self.files[0]}: column {name!r} ({self._said(role)}) is of type "
                    f"{first[name]} and must hold {content}: store it as such"
                )
            for file, header in zip(self.files, self._headers, strict=True):
                # DuckDB would cast to the first file's type, and make the text 007 the number 7.
                if (kind := dict(header)[name]) != first[name]:
                    raise SettingsError(
                        f"{file} has the column {name!r} ({self._said(role)}) of type {kind}, and "
                        f"{self.files[0]} of type {first[name]}: store both with one type"
                    )
        return {role: first[name] for role, name in self._roles.items()}

    def _survey(self) -> tuple[int, int]:
        """Number of events and of users, once every value is checked and the tables are made."""
        if self._totals is None:
            self._make_view()
            likes = "CAST(sum(liked) AS BIGINT)" if "liked" in self._roles else "count(*)"
            checked = [role for role in ("liked", "time") if role in self._roles]
            lacks = [f"count(*) - count({_name(role)}) AS no_{role}" for role in checked]
            self._make_table("users", "user", [])
            self._make_table("items", "item", [f"{likes} AS likes", *lacks])
            for role in checked:
                if self._ask(f"SELECT coalesce(sum(no_{role}), 0) FROM items")[0]:
                    self._refuse(role)
            n_events, n_users = self._ask("SELECT coalesce(sum(n), 0), count(*) FROM users")
            if not n_events:
                raise SettingsError(f"{self._what} has no events: give a file with some")
            self._totals = int(n_events), n_users
        return self._totals

    def _make_view(self) -> None:
        """Make the view ``events``, in which what cannot be used is NULL."""
        if self._format == PARQUET:
            self._source = _parquet(self.files)
            self._raw = {role: _name(name) for role, name in self._roles.items()}
        else:
            self._source = _parquet([self._as_parquet(i) for i in range(len(self.files))])
            self._raw = {role: _name(role) for role in self._roles}
        self._values = {role: self._value(role) for role in self._roles}
        values = [f"{sql} AS {_name(role)}" for role, sql in self._values.items()]
        position = f"CAST(file_index AS BIGINT) * {1 << 40} + file_row_number AS position"
        self._execute(
            f"CREATE OR REPLACE VIEW events AS SELECT {', '.join([*values, position])} "
            f"FROM {self._source}"
        )

    def _make_table(self, table: str, role: str, more: list[str]) -> None:
        """Make the table of users or items: token, number of events n, place k by token."""
        columns = ", ".join([f"{_name(role)} AS token", "count(*) AS n", *more])
        self._execute(
            f"CREATE OR REPLACE TABLE {table} AS "
            "SELECT *, CAST(row_number() OVER (ORDER BY token) - 1 AS INTEGER) AS k "
            f"FROM (SELECT {columns} FROM events GROUP BY token)"
        )
        if self._ask(f"SELECT count(*) FROM {table} WHERE token IS NULL")[0]:
            self._refuse(role)

    def _as_parquet(self, number: int) -> Path:
        """Copy what is read of a text file to Parquet, its rows in their order."""
        file, names = self.files[number], [name for name, _ in self._headers[number]]
        wanted = ", ".join(
            f"c{names.index(name)} AS {_name(role)}" for role, name in self._roles.items()
        )
        columns = ", ".join(f"c{i}: 'VARCHAR'" for i in range(len(names)))
        packed = "gzip" if file.suffix.lower() == ".gz" else "none"
        # Everything is said, for what DuckDB guesses from a first part may not fit the rest.
        options = (
            f"columns = {{{columns}}}, header = true, auto_detect = false, strict_mode = true, "
            f"delim = '{DELIMITERS[self._format]}', quote = '\"', escape = '\"', comment = '', "
            f"nullstr = '', compression = '{packed}'"
        )
        copy = self._folder / f"{number}{PARQUET}"
        self._execute(
            f"COPY (SELECT {wanted} FROM read_csv({_text(file)}, {options})) "
            f"TO {_text(copy)} (FORMAT parquet)",
            file,
        )
        return copy

    def _value(self, role: str) -> str:
        """SQL of what is read of a column; NULL is what cannot be used."""
        column, kind = self._raw[role], self._types[role]
        if role in ("user", "item"):
            return f"nullif(CAST({column} AS VARCHAR), '')"
        if role == "time":
            if kind in _NANOSECONDS:  # of which epoch() would keep no more than microseconds
                seconds = f"epoch_ns({column}) / 1e9"
            elif kind in _DATES:
                seconds = f"epoch({column})"
            elif kind == "VARCHAR" and self._begins_with_a_date(column):
                seconds = f"epoch(TRY_CAST({column} AS TIMESTAMPTZ))"
            else:
                seconds = f"TRY_CAST({column} AS DOUBLE)"
            return f"CASE WHEN isfinite({seconds}) THEN {seconds} END"
        # A float column holds 3.6 as a float, which is less than the double 3.6.
        number_type = "FLOAT" if kind == "FLOAT" else "DOUBLE"
        number = f"TRY_CAST({column} AS {number_type})"
        if self.columns.label is not None:
            if kind == "VARCHAR":  # pandas writes booleans as True and False
                number = f"coalesce({number}, TRY_CAST(TRY_CAST({column} AS BOOLEAN) AS DOUBLE))"
            return f"CASE WHEN {number} IN (0, 1) THEN CAST({number} AS TINYINT) END"
        threshold = f"CAST({float(self.columns.threshold)!r} AS {number_type})"
        return f"CASE WHEN isfinite({number}) THEN CAST({number} >= {threshold} AS TINYINT) END"

    def _begins_with_a_date(self, column: str) -> bool:
        """Whether the first value of a text column is a date; all values must be alike."""
        first = self._ask(
            f"SELECT TRY_CAST({column} AS DOUBLE) IS NULL "
            f"AND TRY_CAST({column} AS TIMESTAMPTZ) IS NOT NULL "
            f"FROM {self._source} WHERE {column} IS NOT NULL LIMIT 1"
        )
        return first is not None and first[0]

    def _refuse(self, role: str) -> None:
        """Raise an error that names the first value of a column that cannot be used."""
        index, row, value = self._ask(
            f"SELECT file_index, file_row_number, CAST({self._raw[role]} AS VARCHAR) "
            f"FROM {self._source} WHERE {self._values[role]} IS NULL "
            "ORDER BY file_index, file_row_number LIMIT 1"
        )
        name, said = self._roles[role], self._said(role)
        demand = {
            "user": "every event needs its user; leave such rows out",
            "item": "every event needs its item; leave such rows out",
            "label": "labels are 0 or 1; leave such rows out, or give rating and threshold",
            "rating": "every event needs a finite number; leave such rows out",
            "time": "every event needs a finite number, or all of them a date such as 2024-01-31 "
            "12:00:00; leave such rows out, or read no time (time=None, or --time=none)",
        }[said]
        shown = "empty" if value in (None, "") else repr(value)
        raise SettingsError(
            f"{self.files[index]}: column {name!r} ({said}) is {shown} in event {row + 1}: {demand}"
        )

    # --- reading -----------------------------------------------------------------------------

    @functools.cached_property
    def _items(self) -> pa.Array:
        """The items' tokens, by number."""
        return self.item_counts()["item"].combine_chunks()

    def _blocks(self, users: str, max_rows: int) -> Iterator[pa.Table]:
        """Blocks of the events of the users in a table (token, n, k)."""
        carried = [_name(role) for role in ("liked", "time") if role in self._roles]
        order = ["users.k", *(["time"] if "time" in self._roles else []), "position"]
        events = self._stream(
            f"SELECT {', '.join(['items.k AS item', *carried])} FROM events "
            f"JOIN {users} AS users ON events.user = users.token "
            f"JOIN items ON events.item = items.token ORDER BY {', '.join(order)}"
        )
        # The users alone say where a block ends, in the same order as their events.
        counts = self._stream(f"SELECT token, n FROM {users} ORDER BY k", min(BATCH, max_rows))
        with contextlib.closing(events), contextlib.closing(counts):
            held: list[pa.RecordBatch] = []
            for group in _groups(counts, max_rows):
                n = group["n"].to_numpy()
                size = int(n.sum())
                while sum(batch.num_rows for batch in held) < size:
                    try:
                        held.append(next(events))
                    except StopIteration:
                        raise SettingsError(
                            f"{self._what} has lost events while it was read: open it anew"
                        ) from None
                rows = pa.Table.from_batches(held)
                yield self._with_tokens(group["token"], n, rows[:size])
                held = rows[size:].to_batches()

    def _with_tokens(self, users: pa.ChunkedArray, n: np.ndarray, rows: pa.Table) -> pa.Table:
        tokens = users.combine_chunks().take(pa.array(np.repeat(np.arange(len(n)), n)))
        items = self._items.take(rows["item"].combine_chunks())
        others = [rows[role] for role in self.schema.names[2:]]
        columns = [tokens, items, *others]
        table = pa.table(dict(zip(self.schema.names, columns, strict=True)))
        return table.cast(self.schema).combine_chunks()

    def _stream(self, query: str, rows: int = BATCH) -> Iterator[pa.RecordBatch]:
        """Batches of a query's result, as they are asked for."""
        # A connection has one result at a time, so that each stream needs its own.
        with self._explained(), contextlib.closing(self._database.cursor()) as connection:
            yield from connection.sql(query).to_arrow_reader(rows)

    def _execute(self, query: str, file: Path | None = None) -> duckdb.DuckDBPyConnection:
        with self._explained(file):
            return self._database.execute(query)

    def _ask(self, query: str) -> tuple | None:
        """The first row of a query's result, if it has one."""
        return self._execute(query).fetchone()

    @contextlib.contextmanager
    def _explained(self, file: Path | None = None) -> Iterator[None]:
        """Have DuckDB's errors name the file, and the way out of a lack of memory."""
        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            what, message = file or self._what, str(error)
            if "Out of Memory" in message:
                raise SettingsError(
                    f"memory={self._memory!r} is too little to read {what}: raise "
                    "it, or give fewer threads"
                ) from error
            # What follows are DuckDB's options, which nobody can set here.
            said = re.split(r"\n\s*\n|\nPossible ", message)[0]
            raise SettingsError(f"{what} cannot be read: {' '.join(said.split())}") from error

    @property
    def _what(self) -> str:
        more = len(self.files) - 1
        return f"{self.files[0]}{f' (and {more} more)' if more else ''}"


def _groups(batches: Iterator[pa.RecordBatch], max_rows: int) -> Iterator[pa.Table]:
    """Cut a stream of counts ``n`` into tables whose sum is as near to ``max_rows`` as it goes."""
    held: pa.Table | None = None
    for batch in batches:
        new = pa.Table.from_batches([batch])
        held = new if held is None else pa.concat_tables([held, new])
        ends = np.cumsum(held["n"].to_numpy())
        start, before = 0, 0
        # The last group stays: the next batch may go on with it.
        while (end := max(start + 1, _fit(ends, before + max_rows))) < len(ends):
            yield held[start:end]
            start, before = end, int(ends[end - 1])
        held = held[start:]
    if held is not None and len(held):
        yield held


def _fit(ends: np.ndarray, limit: int) -> int:
    return int(np.searchsorted(ends, limit, side="right"))


def _paths(path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """Files that a path, a folder, a glob or a sequence of them names."""
    if not isinstance(path, (str, os.PathLike)):
        return [file for one in path for file in _paths(one)]
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_data(file.relative_to(path))]
        if not files:
            raise SettingsError(f"{path} holds no {_formats()} file: give a folder that does")
        return files
    if path.is_file():
        return [path]
    files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
    if not files:
        raise SettingsError(
            f"{path} is not there: give a {_formats()} file, several, a glob or a folder"
        )
    return [inner for file in files for inner in _paths(file)]


def _is_data(path: Path) -> bool:
    # Spark and others leave marks and checksums beside the data, under such names.
    return _suffix(path) is not None and not any(part[0] in "._" for part in path.parts)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    for suffix in DELIMITERS:
        if name.endswith((suffix, f"{suffix}.gz")):
            return suffix
    return PARQUET if name.endswith(PARQUET) else None


def _formats() -> str:
    return f"{', '.join(DELIMITERS)} or {PARQUET}"


def _format_of(files: Sequence[Path], path: object) -> str:
    if not files:
        raise SettingsError(f"path={path!r} names no file: give one or more")
    for file in files:
        if _suffix(file) is None:
            raise SettingsError(f"{file} is no {_formats()} file: convert or rename it")
        if _suffix(file) != _suffix(files[0]):
            raise SettingsError(
                f"{files[0]} and {file} are of two formats: give files of one format"
            )
    return _suffix(files[0])


def _text_header(file: Path, delimiter: str) -> list[str]:
    """Names of a text file's columns, without RecBole's types."""
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines, delimiter=delimiter), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"{file} cannot be read as text in UTF-8: {error}") from error
    if not header:
        raise SettingsError(f"{file} is empty: give a file with a header and events")
    if delimiter == DELIMITERS[".inter"]:
        return [name.rsplit(":", 1)[0] for name in header]
    return header


def check_columns(events: Path | str, names: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Refuse ``events``, a file or what they are called, if a column is not there just once.

    Parameters
    ----------
    events : Path or str
    names : sequence of str
        Their columns.
    wanted : mapping of str to str
        Names of columns by what they mean.

    Raises
    ------
    SettingsError
    """
    for role, name in wanted.items():
        if names.count(name) == 1:
            continue
        if name in names:
            raise SettingsError(
                f"{events} has several columns {name!r} ({role}): rename the others"
            )
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(
            f"{events} has no column {name!r} ({role}); it has {', '.join(map(repr, names))}{hint}"
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise SettingsError(f"{name}={count!r} must be at least 1")


def _temporary_folder(parent: str | os.PathLike | None) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="recbole-uip-events-", dir=parent))
    except OSError as error:
        raise SettingsError(
            f"scratch={parent!r} cannot hold a temporary folder ({error}): give a folder to "
            "write to"
        ) from error


def _connect(spill: Path, memory: str, threads: int | None) -> duckdb.DuckDBPyConnection:
    config = {
        "memory_limit": memory,
        "temp_directory": str(spill),
        "preserve_insertion_order": True,
        # No look at Python's variables or at the network.
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
    }
    if threads is not None:
        config["threads"] = threads
    try:
        database = duckdb.connect(config=config)
    except (duckdb.Error, TypeError) as error:
        raise SettingsError(
            f"memory={memory!r} and threads={threads!r} cannot be used ({error}): "
            "give such as '2GB', and a number of threads or None"
        ) from error
    # Timestamps without a time zone are UTC, wherever the machine is.
    database.execute("SET GLOBAL TimeZone = 'UTC'")
    return database


def _parquet(files: Sequence[Path]) -> str:
    """SQL that reads Parquet files; column names are the files' own, not their folders'."""
    listed = ", ".join(_text(file) for file in files)
    return f"read_parquet([{listed}], hive_partitioning = false)"


def _text(value: object) -> str:
    """SQL of a string."""
    return "'" + str(value).replace("'", "''") + "'"


def _name(value: str) -> str:
    """SQL of a column's name."""
    return '"' + value.replace('"', '""') + '"'

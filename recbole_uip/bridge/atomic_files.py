"""RecBole's atomic files under pandas 3: what is wrong with a file is one clear error."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from recbole_uip.settings import SettingsError
from recbole_uip.texts import atomic_header, past_bom

__all__ = ["Frame", "read_atomic_file", "split_sequences"]

logger = logging.getLogger(__name__)


class Series(pd.Series):
    """A column whose ``agg(len)`` gives the length of each sequence, as before pandas 3."""

    @property
    def _constructor(self) -> type:
        return Series

    def agg(self, func: Any = None, *args: Any, **kwargs: Any) -> Any:
        if func is len:
            return self.map(len)
        return super().agg(func, *args, **kwargs)

    @property
    def values(self) -> Any:
        # Under copy-on-write these are read-only, and torch warns when it shares them.
        values = super().values
        if isinstance(values, np.ndarray) and not values.flags.writeable:
            return values.copy()
        return values


class Frame(pd.DataFrame):
    """A frame of such columns. RecBole splits concatenated sequences by ``agg(len)``."""

    @property
    def _constructor(self) -> type:
        return Frame

    @property
    def _constructor_sliced(self) -> type:
        return Series


def read_atomic_file(
    path: str, wanted: Callable[[str], bool], separator: str, encoding: str | None
) -> tuple[Frame, dict[str, FeatureType]] | None:
    """The wanted columns of a file, and their types by name; None if it has none of them.

    Parameters
    ----------
    path : str
    wanted : callable
        Whether a column of this name is to be read.
    separator, encoding : str
        RecBole's ``field_separator`` and ``encoding``.

    Raises
    ------
    SettingsError
        If the file cannot be read, a column has no type, or a number is none.
    """
    encoding = past_bom(encoding)
    try:
        header = atomic_header(path, separator, encoding)
    except (UnicodeError, LookupError) as error:
        raise _unreadable(path, encoding, error) from error
    if header == [""]:
        raise SettingsError(
            f"{path} is empty, or begins with an empty line: its first line must name the columns, "
            "each as name:type"
        )
    types: dict[str, FeatureType] = {}
    for column in header:
        name, colon, kind = column.partition(":")
        if not colon or kind not in {ftype.value for ftype in FeatureType}:
            known = ", ".join(ftype.value for ftype in FeatureType)
            other = next((mark for mark in ",;\t|" if mark in column), None)
            hint = f"; is field_separator={separator!r} right, or is it {other!r}?" if other else ""
            raise SettingsError(
                f"{path}: column {column!r} must be name:type with a type of {known}{hint}"
            )
        if wanted(name):
            types[column] = FeatureType(kind)
    if not types:
        logger.warning("no column of %s is loaded", path)
        return None
    floats = [column for column, ftype in types.items() if ftype == FeatureType.FLOAT]
    options = {
        # pandas takes a longer one for a regular expression.
        "sep": separator if len(separator) == 1 else re.escape(separator),
        "usecols": list(types),
        # Without it a separator at the end of lines would move every column by one.
        "index_col": False,
        "encoding": encoding,
        "engine": "c" if len(separator) == 1 else "python",
    }
    try:
        dtype = {column: np.float64 if column in floats else object for column in types}
        frame = pd.read_csv(path, dtype=dtype, **options)
    except ValueError as error:
        if not isinstance(error, (UnicodeError, pd.errors.ParserError)):
            text = pd.read_csv(path, dtype=object, **options)
            _check_numbers(path, text[floats])
        raise _unreadable(path, encoding, error) from error
    _check_rows(path, separator, encoding, len(header), len(frame))
    frame = Frame(frame)[list(types)]
    frame.columns = [column.partition(":")[0] for column in types]
    return frame, dict(zip(frame.columns, types.values(), strict=True))


def split_sequences(
    column: pd.Series, ftype: FeatureType, separator: str, limit: int | None = None
) -> tuple[pd.Series, int]:
    """Each row's tokens or numbers as an array, at most ``limit``; and the longest length.

    Raises
    ------
    SettingsError
        If a number is none.
    """
    kind = str if ftype == FeatureType.TOKEN_SEQ else float
    values = np.empty(len(column), dtype=object)
    for row, text in enumerate(column.fillna("")):
        try:
            parts = [kind(part) for part in text.split(separator) if part]
        except ValueError as error:
            raise SettingsError(
                f"column {column.name!r} has {text!r} in row {row + 1}, a sequence of floats: "
                f"{error}"
            ) from error
        values[row] = np.array(parts[:limit] if limit else parts, dtype=kind)
    longest = max((len(value) for value in values), default=0)
    return pd.Series(values, index=column.index), longest


def _unreadable(path: str, encoding: str | None, error: Exception) -> SettingsError:
    return SettingsError(
        f"{path} cannot be read: {error} (encoding={encoding!r}): check the file and the settings "
        "encoding and field_separator"
    )


def _check_numbers(path: str, columns: pd.DataFrame) -> None:
    """Name the first value of the columns, which are text, that is not a number."""
    for name, values in columns.items():
        numbers = pd.to_numeric(values, errors="coerce")
        for row in np.flatnonzero(numbers.isna() & values.notna())[:1]:
            value = values.iloc[row]
            way_out = "mend the file, or call the column's type token"
            if pd.notna(pd.to_datetime(value, errors="coerce")):
                way_out = (
                    "give times in seconds, as by pandas.to_datetime(column).map("
                    "pandas.Timestamp.timestamp)"
                )
            raise SettingsError(
                f"{path}: column {name!r} has {value!r} in row {row + 1}, which is no number: "
                f"{way_out}"
            )


def _check_rows(
    path: str, separator: str, encoding: str | None, n_columns: int, n_rows: int
) -> None:
    """Refuse a file of which pandas reads other rows, or other fields of a row, than it has."""
    n_lines, long = 0, None
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            n_lines += bool(line.strip("\n "))
            if long is None and line.count(separator) >= n_columns:
                fields = line.rstrip("\n").split(separator)
                if len(separator) == 1 and '"' in line:
                    # so a separator may be quoted
                    fields = next(csv.reader([line], delimiter=separator))
                if any(fields[n_columns:]):
                    long = number, len(fields)
    n_lines -= 1
    if n_lines != n_rows:
        raise SettingsError(
            f"{path} has {n_lines} rows, of which {n_rows} would be read: a field that begins with "
            'a quotation mark (") runs on to the next one, over the ends of lines; take these '
            "marks out of the file"
        )
    if long is not None:
        number, n_fields = long
        raise SettingsError(
            f"{path}: line {number} has {n_fields} fields, and the header {n_columns} columns: "
            f"take the separator {separator!r} out of the field that has it"
        )

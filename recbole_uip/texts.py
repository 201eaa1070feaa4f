"""Behaviour texts of items: a template filled with the columns of an item file."""

from __future__ import annotations

import csv
import gzip
import logging
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import CountVectorizer

from recbole_uip.settings import SettingsError

__all__ = ["atomic_header", "bag_of_words", "fill", "item_texts", "past_bom", "rated_texts"]

logger = logging.getLogger(__name__)

QUOTED = re.compile(r'"(?:[^"]|"")*"')
# Words in a vocabulary, at most: the most frequent of the catalogue.
MAX_WORDS = 5_000


def _unquote(value: str) -> str:
    value = value.strip()
    if QUOTED.fullmatch(value):
        return value[1:-1].replace('""', '"').strip()
    return value


def fill(template: str, values: Mapping[str, str]) -> str | None:
    """The filled template, without the brackets that an empty field leaves; None if all are."""
    if not any(values.values()):
        return None
    # By hand, for format_map would take a name such as "meta.year" apart.
    parts = string.Formatter().parse(template)
    text = "".join(literal + (values[name] if name else "") for literal, name, _, _ in parts)
    text = re.sub(r"\(\s*\)|\[\s*\]", "", text)
    return re.sub(r"\s+", " ", text).strip() or None


def rated_texts(
    texts: Sequence[str | None], item: np.ndarray, source: str
) -> tuple[list[int], np.ndarray]:
    """The items that have a text, as long as there is something to learn of texts.

    Parameters
    ----------
    texts : sequence of str or None, length n_items
    item : ndarray of int64
        Items of the training rows.
    source : str
        What the texts are for, to be named in an error.

    Returns
    -------
    rows : list of int
        The items.
    counts : ndarray of int64, shape (len(rows),)
        Training rows of each.

    Raises
    ------
    SettingsError
        If no item of the training rows has a text, or all have the same.
    """
    rows = [row for row, text in enumerate(texts) if text and text.strip()]
    counts = np.bincount(item, minlength=len(texts))[rows]
    distinct = {texts[row] for row, count in zip(rows, counts, strict=True) if count}
    if len(distinct) > 1:
        return rows, counts
    if not rows:
        what = "no item has a text"
    elif not distinct:
        what = "no item of the training rows has a text"
    else:
        what = f"all items of the training rows have the text {distinct.pop()!r}"
    raise SettingsError(
        f"{what}, so source: {source} facets cannot be inferred: check uip_item_text and the "
        ".item file, or take source: collaborative or constant"
    )


def item_texts(
    path: str | os.PathLike,
    template: str,
    id_field: str,
    token_id: Mapping[str, int],
    n_items: int,
    separator: str = "\t",
    encoding: str | None = None,
) -> list[str | None]:
    """Behaviour text of each item, from the columns of a file.

    RecBole would make a feature of every model of a column that it loads, so the file is read
    here.

    Parameters
    ----------
    path : path
        The ``.item`` file, CSV with a header, or Parquet; without a file, no item has a text.
    template : str
        Template of item fields, such as ``"{movie_title} ({genre})"``.
    id_field : str
        Name of the item ID field.
    token_id : mapping of str to int
        Item number of each raw item ID.
    n_items : int
        Length of the result; id 0 is [PAD], which has no text.

    Returns
    -------
    list of str or None, length n_items

    Raises
    ------
    SettingsError
        If the file cannot be read, or the template names a field that it lacks.
    """
    texts: list[str | None] = [None] * n_items
    if not os.path.isfile(path):
        logger.warning("no file %s: no item has a text", path)
        return texts
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    repeated = 0
    try:
        for item, *values in _rows(Path(path), (id_field, *names), template, separator, encoding):
            # RecBole reads a quoted ID without its quotation marks.
            index = token_id.get(item, token_id.get(_unquote(item)))
            if index and texts[index] is not None:
                repeated += 1  # of an item's rows RecBole takes the first
            elif index:
                texts[index] = fill(template, dict(zip(names, map(_unquote, values), strict=True)))
    except (OSError, UnicodeError, LookupError, csv.Error, pa.ArrowException) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if repeated:
        logger.warning("%s: %d rows repeat an item: the first of each counts", path, repeated)
    return texts


def past_bom(encoding: str | None) -> str | None:
    """UTF-8 with or without a byte order mark, which would become part of the first column."""
    plain = (encoding or "utf-8").lower().replace("_", "-")
    return "utf-8-sig" if plain in ("utf-8", "utf8") else encoding


def atomic_header(path: str | os.PathLike, separator: str, encoding: str | None) -> list[str]:
    """The columns of one of RecBole's atomic files, each ``name:type``."""
    with open(path, encoding=past_bom(encoding)) as file:
        return file.readline().rstrip("\r\n").split(separator)


def _rows(
    path: Path, names: Sequence[str], template: str, separator: str, encoding: str | None
) -> Iterator[Sequence[str]]:
    """The columns ``names`` of each row, as text."""
    if path.suffix == ".parquet":
        _places(pq.read_schema(path).names, names, template, path)
        table = pq.read_table(path, columns=list(dict.fromkeys(names)))
        columns = [table[name].cast(pa.string()).fill_null("").to_pylist() for name in names]
        yield from zip(*columns, strict=True)
        return
    opened = gzip.open if path.suffix == ".gz" else open
    # Between tabs, titles hold quotation marks that quote nothing: one left open must not eat the
    # next rows. Between commas they have to quote, over the ends of lines.
    quoted = separator == ","
    with opened(path, "rt", encoding=past_bom(encoding), newline="" if quoted else None) as file:
        lines = (line.rstrip("\n").split(separator) for line in file)
        rows = csv.reader(file) if quoted else lines
        header = [_unquote(column).split(":")[0] for column in next(rows, [])]
        places = _places(header, names, template, path)
        for number, row in enumerate(rows, start=2):
            if len(row) > len(header) and not quoted and len(separator) == 1:
                # so a separator may be quoted
                row = next(csv.reader([separator.join(row)], delimiter=separator))
            if any(row[len(header) :]):
                raise SettingsError(
                    f"{path}: row {number} has {len(row)} fields, and the header {len(header)} "
                    f"columns: take the separator {separator!r} out of the field that has it"
                )
            yield [row[place] if place < len(row) else "" for place in places]


def _places(header: list[str], names: Sequence[str], template: str, path: Path) -> list[int]:
    for name in names:
        if name not in header:
            raise SettingsError(
                f"uip_item_text={template!r} needs the field {name!r}, but {path} has only "
                f"{', '.join(header)}"
            )
    return [header.index(name) for name in names]


def bag_of_words(
    texts: Sequence[str], vocabulary: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    r"""Which words stand in each text: runs of ``\w``, lower-cased.

    Parameters
    ----------
    texts : sequence of n str
    vocabulary : sequence of d str, optional
        Words that count; by default the texts' own, of many the most frequent.

    Returns
    -------
    bags : ndarray of float32, shape (n, d)
        1 where the word is in the text.
    vocabulary : list of d str

    Raises
    ------
    ValueError
        If no text has a word, and no vocabulary is given.
    """
    counter = CountVectorizer(
        binary=True,
        token_pattern=r"\w+",
        max_features=MAX_WORDS,
        vocabulary=vocabulary,
        dtype=np.float32,
    )
    bags = counter.fit_transform(texts)
    return bags.toarray(), counter.get_feature_names_out().tolist()

"""Atomic files: where they are, how to get them, and the items' texts in them."""

from __future__ import annotations

import csv
import logging
import os
import re
import shutil
import string
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from recbole.utils.url import rename_atomic_files
from tqdm import tqdm

from recbole_uip.settings import SettingsError

__all__ = ["download", "item_texts", "missing_files_error"]

logger = logging.getLogger(__name__)

# Seconds to wait for the data server; a machine without a network should learn it soon.
TIMEOUT = 10
MAX_BYTES = 1 << 30


def missing_files_error(name: str, folder: str | os.PathLike, files: Iterable[str], why: str):
    """The one error that says which atomic files to put where."""
    wanted = " and ".join(files)
    return SettingsError(
        f"dataset {name!r}: {why}. Put {wanted} (RecBole's atomic files; the .item and .user "
        f"files of the dataset beside them, where there are any) into {os.path.abspath(folder)}, "
        "or set data_path to the folder that holds "
        f"{name}/"
    )


def download(name: str, url: str, folder: str | os.PathLike) -> None:
    """Fetch and unpack RecBole's archive of atomic files; ``folder`` appears whole or not at all.

    Raises
    ------
    OSError
        If the server cannot be reached or the archive is not what it should be.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as temporary:
        archive = Path(temporary, "archive.zip")
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, archive.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            if size > MAX_BYTES:
                raise OSError(f"{url} has {size / 1e9:.1f} GB: download it yourself")
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as progress:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    progress.update(len(chunk))
        unpacked = Path(temporary, "files")
        try:
            with zipfile.ZipFile(archive) as files:
                files.extractall(unpacked)
        except zipfile.BadZipFile as error:
            raise OSError(f"{url} is not a zip archive: {error}") from error
        nested = unpacked / name
        source = nested if nested.is_dir() else unpacked
        rename_atomic_files(source, Path(url).stem, name)
        os.chmod(source, 0o755)
        shutil.move(source, folder)


def _unquote(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1]:
        return value[1:-1].strip()
    return value


def _text(template: str, values: Mapping[str, str]) -> str | None:
    """The filled template, without the brackets that an empty field leaves; None if all are."""
    if not any(values.values()):
        return None
    text = template.format_map(values)
    text = re.sub(r"\(\s*\)|\[\s*\]", "", text)
    return re.sub(r"\s+", " ", text).strip() or None


def item_texts(
    path: str | os.PathLike,
    template: str,
    id_field: str,
    token_id: Mapping[str, int],
    n_items: int,
    separator: str = "\t",
    encoding: str | None = None,
) -> list[str | None]:
    """Behaviour text of each item, from the columns of its raw ``.item`` file.

    The file is read here rather than through ``load_col``, for a column that RecBole loads
    becomes a feature of every model.

    Parameters
    ----------
    path : path
        The ``.item`` file; without one, no item has a text.
    template : str
        Template of item fields, such as ``"{movie_title} ({genre})"``.
    id_field : str
        Name of the item ID field.
    token_id : mapping of str to int
        RecBole's internal id of each raw item ID.
    n_items : int
        Length of the result; id 0 is [PAD], which has no text.

    Returns
    -------
    list of str or None, length n_items

    Raises
    ------
    SettingsError
        If the template names a field that the file lacks.
    """
    texts: list[str | None] = [None] * n_items
    if not os.path.isfile(path):
        logger.warning("no file %s: no item has a text", path)
        return texts
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    with open(path, encoding=encoding, newline="") as file:
        # Titles hold quotation marks that quote nothing: one left open must not eat the next rows.
        rows = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE)
        columns = [column.split(":")[0] for column in next(rows, [])]
        for name in (id_field, *names):
            if name not in columns:
                raise SettingsError(
                    f"uip_item_text={template!r} needs the field {name!r}, but {path} has only "
                    f"{', '.join(columns)}"
                )
        id_column = columns.index(id_field)
        wanted = {name: columns.index(name) for name in names}
        for row in rows:
            index = token_id.get(_unquote(row[id_column])) if len(row) > id_column else None
            if index:
                values = {
                    name: _unquote(row[column]) if column < len(row) else ""
                    for name, column in wanted.items()
                }
                texts[index] = _text(template, values)
    return texts

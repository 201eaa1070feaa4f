"""The files of a feature bank: what is committed, what is whole, who may write.

A bank is a folder. ``manifest.json`` names its files, and replacing the manifest is the one
commit point: a process killed at any moment loses at most what it had not committed.

===================================  ==========================================================
``manifest.json``                    generation, the caller's metadata and position, and the size,
                                     SHA-256 and number of rows of each file below
``tables-<generation>.safetensors``  fitted arrays
``items-<generation>.arrow``         the item catalogue, by the column ``item``
``users-<generation>.arrow``         rows of users, by the column ``user``: the base, and deltas
                                     whose rows replace those of earlier segments or add users
``writer.lock``                      locked by the one writer, while it lives
===================================  ==========================================================

A file carries the generation that wrote it and is never changed. So readers need no lock: they
open what one manifest names, and keep it for as long as they hold it, also when a writer has
deleted it since. Arrow files are uncompressed, to be memory-mapped without a copy. What rows
and arrays mean is the caller's matter, and so is when to merge deltas into one base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from recbole_uip.files import LockedError, atomic_write, lock, sha256_of, unlock
from recbole_uip.settings import SettingsError

__all__ = [
    "BankError",
    "Snapshot",
    "Writer",
    "check_folder",
    "check_replaceable",
    "digest_of",
    "read",
]

FORMAT = 4
MANIFEST = "manifest.json"
LOCK = "writer.lock"
ITEM, USER = "item", "user"

_KEYS = ("format", "generation", "metadata", "tables", "items", "users", "files", "sha256")
_NAME = r"(?:tables-\d+\.safetensors|(?:items|users)-\d+\.arrow)"
_DATA_FILE = re.compile(_NAME, re.ASCII)
# Of all files in the folder, those that a writer may delete; the dotted ones are atomic_write's.
_DELETABLE = re.compile(rf"{_NAME}|\.(?:{_NAME}|{re.escape(MANIFEST)})\.[^.]+", re.ASCII)


class BankError(SettingsError):
    """A bank that cannot be used; the message names the folder or file and the way out."""


class _MissingError(BankError):
    """A file is not there: no such bank, or a writer has deleted it in the meantime."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What one manifest names, opened.

    Parameters
    ----------
    folder : Path
        The bank.
    generation : int
        Number of the commit; the first is 1.
    sha256 : str
        Of the manifest: another bank in the same folder may have the same generation.
    metadata : dict
        The caller's JSON.
    tables : dict of str to ndarray
        Fitted arrays, in memory.
    items : pyarrow.Table
        The item catalogue, memory-mapped.
    users : tuple of pyarrow.Table
        The base, then the deltas in the order of their commits, memory-mapped. A table has one
        chunk for each batch that was written.
    files : dict of (str, str) to object
        What was opened, by a file's name and SHA-256.
    position : str or None
        The caller's word for where its source of rows stood.
    """

    folder: Path
    generation: int
    sha256: str
    metadata: dict[str, Any]
    tables: dict[str, np.ndarray]
    items: pa.Table
    users: tuple[pa.Table, ...]
    files: dict[tuple[str, str], Any]
    position: str | None


def read(folder: str | os.PathLike, verify: bool = True, known: Snapshot | None = None) -> Snapshot:
    """Open what the bank in ``folder`` has committed last.

    Parameters
    ----------
    folder : path-like
        The bank.
    verify : bool
        Whether to read every file once and check its SHA-256; sizes are checked in any case.
        Without it, damage that keeps the size may show only in wrong values.
    known : Snapshot, optional
        Files that it has open are neither read nor checked again: none is ever changed.

    Raises
    ------
    BankError
        If there is no bank, its format is unknown, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    while True:
        manifest = _read_manifest(folder)
        key_of = {name: (name, manifest["files"][name]["sha256"]) for name in _named(manifest)}
        files = {}
        try:
            for name, key in key_of.items():
                if known is not None and key in known.files:
                    files[key] = known.files[key]
                else:
                    read_file = _read_tables if name == manifest["tables"] else _read_rows
                    files[key] = read_file(folder, manifest, name, verify)
            return Snapshot(
                folder=folder,
                generation=manifest["generation"],
                sha256=manifest["sha256"],
                metadata=manifest["metadata"],
                tables=files[key_of[manifest["tables"]]],
                items=files[key_of[manifest["items"]]],
                users=tuple(files[key_of[name]] for name in manifest["users"]),
                files=files,
                position=manifest.get("position"),
            )
        except _MissingError:
            # A writer may have replaced the file after its name was read.
            if digest_of(folder) == manifest["sha256"]:
                raise


def digest_of(folder: str | os.PathLike) -> str:
    """SHA-256 of what the bank in ``folder`` has committed last; reads the manifest alone.

    Raises
    ------
    BankError
        If there is no bank, or its manifest is damaged.
    """
    return _read_manifest(Path(folder))["sha256"]


def check_replaceable(folder: str | os.PathLike) -> None:
    """Refuse a bank that could not be written to, before any work is done for it.

    Raises
    ------
    BankError
        If another writer has the bank open, its manifest cannot be read, or there can be no such
        folder. A folder without a bank is as good as none.
    """
    check_folder(folder)
    if (Path(folder) / MANIFEST).exists():
        Writer(folder).close()


def check_folder(folder: str | os.PathLike) -> None:
    """Refuse a path that can be no folder, before any work is done for it.

    Raises
    ------
    BankError
        If it, or one that it lies in, is a file.
    """
    folder = Path(folder)
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists():
            raise BankError(f"{folder} cannot be a folder, because {path} is a file: give another")


class Writer:
    """The one writer of a bank, as a context manager.

    The lock is the operating system's: it ends with the process, however that ends. Files
    that a killed writer has left behind are deleted on opening.

    Parameters
    ----------
    folder : path-like
        The bank.
    create : bool
        Whether to begin a bank where there is none; the first commit then gives all parts.

    Raises
    ------
    BankError
        If another writer has the bank open, its manifest is damaged, there is no bank and
        ``create`` is False, or its folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike, create: bool = False) -> None:
        self.folder = Path(folder)
        if create:
            check_folder(self.folder)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BankError(
                    f"the folder {self.folder} cannot be made ({error}): see to its file system, "
                    "or give another"
                ) from error
        else:
            _read_manifest(self.folder)  # leaves no lock file where there is no bank
        self._process = os.getpid()
        self._lock = _lock(self.folder)
        try:
            self._manifest = _committed(self.folder)
            _clear(self.folder, self._manifest)
        except BaseException:
            self.close()
            raise

    @property
    def generation(self) -> int:
        """Number of the last commit; 0 before the first."""
        return self._manifest["generation"] if self._manifest else 0

    def commit(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
        items: pa.Table | pa.RecordBatchReader | None = None,
        users: pa.Table | pa.RecordBatchReader | None = None,
        replace_users: bool = False,
        replace_deltas: bool = False,
        position: str | None = None,
    ) -> int:
        """Write the parts given, keep the others, and make them the next generation at once.

        If anything fails, the bank stays as it was, without a trace of this commit.

        Parameters
        ----------
        metadata : mapping, optional
            JSON with text as keys and no infinite numbers, replaced as a whole.
        tables : mapping of str to ndarray, optional
            Arrays of booleans, integers or floats, replaced as a whole.
        items : pyarrow.Table or pyarrow.RecordBatchReader, optional
            The catalogue, replaced as a whole. The column ``item`` holds strings, none null.
        users : pyarrow.Table or pyarrow.RecordBatchReader, optional
            A segment of users, each of them once. The column ``user`` holds strings, none null.
            A reader is written batch by batch, so that a base may be larger than the memory
            (``RecordBatchReader.from_batches`` makes one from an iterator).
        replace_users : bool
            Whether ``users`` becomes the base alone, or a delta of the same schema.
        replace_deltas : bool
            Whether that delta takes the place of the others, whose rows it then has as well.
        position : str, optional
            Where the caller's source of rows stands after this commit; without one the bank has
            none, for an earlier one would be wrong.

        Returns
        -------
        generation : int

        Raises
        ------
        BankError
            If a part cannot be kept as it is, the first commit lacks a part, the bank has been
            changed by anything but this writer, or its file system takes no more.
        """
        self._check_still_ours()
        old = self._manifest
        given = {"tables": tables, "items": items, "users": users}
        if old is None and None in given.values():
            lacking = ", ".join(name for name, part in given.items() if part is None)
            raise BankError(f"the first commit to the bank {self.folder} needs {lacking}")
        if replace_users and users is None:
            raise BankError("replace_users=True needs users, and none are given")
        if replace_deltas and (users is None or replace_users):
            raise BankError("replace_deltas=True needs users, and not as the base")
        append = old is not None and not replace_users
        if users is not None and append:
            base = _read_rows(self.folder, old, old["users"][0], verify=False).schema
            if not users.schema.equals(base):
                raise BankError(
                    f"users has the schema {_oneline(users.schema)}, but the bank {self.folder} "
                    f"has {_oneline(base)}: give the same, or all users with replace_users=True"
                )
        generation = self.generation + 1
        manifest = {
            "format": FORMAT,
            "generation": generation,
            "metadata": (old["metadata"] if old else {}) if metadata is None else dict(metadata),
            "tables": f"tables-{generation}.safetensors" if tables is not None else old["tables"],
            "items": f"items-{generation}.arrow" if items is not None else old["items"],
            "users": list(old["users"]) if append or users is None else [],
            "files": {},
            "position": position,
        }
        if replace_deltas:
            del manifest["users"][1:]
        if users is not None:
            manifest["users"].append(f"users-{generation}.arrow")
        _encode(manifest)  # so that metadata which is no JSON fails before a base is written
        try:
            entries = dict(old["files"]) if old else {}
            if tables is not None:
                path = self.folder / manifest["tables"]
                entries[path.name] = _write_tables(path, tables)
            if items is not None:
                path = self.folder / manifest["items"]
                entries[path.name] = _write_rows(path, items, ITEM)
            if users is not None:
                path = self.folder / manifest["users"][-1]
                entries[path.name] = _write_rows(path, users, USER)
            manifest["files"] = {name: entries[name] for name in _named(manifest)}
            content = _encode(manifest)
            with atomic_write(self.folder / MANIFEST) as file:
                file.write(content)
        except OSError as error:
            raise BankError(
                f"the bank {self.folder} could not be written ({error}): make room, or see to its "
                "file system; what was committed before is as it was"
            ) from error
        finally:
            # What is committed is what the disk says: an interrupt may come after the replace.
            self._manifest = _committed(self.folder)
            _clear(self.folder, self._manifest)
        return generation

    def close(self) -> None:
        """Let others write; closing twice does no harm."""
        if self._lock.closed:
            return
        # A forked child shares the lock. It must not give away what its parent holds.
        if os.getpid() == self._process:
            unlock(self._lock)
        else:
            self._lock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_still_ours(self) -> None:
        if self._lock.closed:
            raise BankError(f"the writer of the bank {self.folder} is closed: open another")
        if os.getpid() != self._process:
            raise BankError(
                f"the writer of the bank {self.folder} belongs to process {self._process}, which "
                f"this process ({os.getpid()}) was forked from: commit there"
            )
        if _committed(self.folder) != self._manifest:
            raise BankError(
                f"the bank {self.folder} is no longer at generation {self.generation}, though "
                "this writer has it locked (was it restored or rebuilt?): open another writer"
            )


# --- manifest ------------------------------------------------------------------------------


def _encode(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as JSON, whose last key is the SHA-256 of the text before it."""
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(
            f"metadata cannot be written as JSON ({error}): give text, finite numbers, lists "
            "and mappings"
        ) from error
    body = text.removesuffix("\n}").encode()
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    """End of a manifest that begins with ``body``; of the same length for all."""
    return f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _MissingError(
            f"there is no bank in {folder} ({MANIFEST} is missing): build one there, or give the "
            "folder of one"
        ) from None
    except OSError as error:
        raise BankError(f"{path} cannot be read ({error}): see to its file system") from error
    try:
        manifest = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise _damaged(path, "it does not say its format")
    if manifest["format"] != FORMAT:
        raise BankError(
            f"{path} has the format {manifest['format']!r}, and this recbole-uip reads "
            f"{FORMAT}: use the recbole-uip that wrote it, or delete and rebuild the bank"
        )
    if lacking := [key for key in _KEYS if key not in manifest]:
        raise _damaged(path, f"it lacks {', '.join(lacking)}")
    # The bytes are compared, not what they mean, so that no flipped bit is overlooked.
    body = content[: -len(_seal(b""))]
    if content != body + _seal(body):
        raise _damaged(path, f"its sha256 {manifest['sha256']!r} does not fit its content")
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Let no value through that could lead out of the folder or fail later without a name."""
    for key, kind in (("generation", int), ("metadata", dict), ("users", list), ("files", dict)):
        if not isinstance(manifest[key], kind):
            raise _damaged(path, f"its {key} is {manifest[key]!r}")
    if manifest["generation"] < 1 or not manifest["users"]:
        raise _damaged(path, "its generation is not above 0, or it names no users")
    for name in _named(manifest):
        if not isinstance(name, str) or not _DATA_FILE.fullmatch(name):
            raise _damaged(path, f"it names {name!r}, which is no file of a bank")
        entry = manifest["files"].get(name)
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise _damaged(path, f"it does not say the bytes and the sha256 of {name}")


def _named(manifest: Mapping[str, Any]) -> list[str]:
    return [manifest["tables"], manifest["items"], *manifest["users"]]


def _committed(folder: Path) -> dict[str, Any] | None:
    """The manifest; None before the first commit."""
    try:
        return _read_manifest(folder)
    except _MissingError:
        return None


def _damaged(path: Path, what: str) -> BankError:
    return BankError(
        f"{path} is damaged: {what}. Restore {path.parent} from a copy, or delete and rebuild it"
    )


# --- files ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _checked(
    folder: Path, manifest: Mapping[str, Any], name: str, verify: bool
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Check a file against the manifest, and have what opening it raises name it."""
    path, expected = folder / name, manifest["files"][name]
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            cut = "cut off: " if size < expected["bytes"] else ""
            raise _damaged(path, f"{cut}it has {size} bytes, not {expected['bytes']}")
        if verify and (sha256 := sha256_of(path)) != expected["sha256"]:
            raise _damaged(path, f"its SHA-256 is {sha256}, not {expected['sha256']}")
        yield path, expected
    except BankError:
        raise
    except FileNotFoundError:
        raise _MissingError(
            f"{path} is missing, and {MANIFEST} names it. Restore {folder} from a copy, or "
            "delete and rebuild it"
        ) from None
    except (pa.ArrowException, SafetensorError, OSError, ValueError, TypeError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error


def _read_tables(
    folder: Path, manifest: Mapping[str, Any], name: str, verify: bool
) -> dict[str, np.ndarray]:
    with _checked(folder, manifest, name, verify) as (path, _):
        return load_file(path)


def _read_rows(folder: Path, manifest: Mapping[str, Any], name: str, verify: bool) -> pa.Table:
    with _checked(folder, manifest, name, verify) as (path, expected):
        # The table's buffers hold the map open; nothing is read before it is looked at.
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate()
        if table.num_rows != expected.get("rows"):
            raise _damaged(path, f"it has {table.num_rows} rows, not {expected.get('rows')}")
        return table


def _write_tables(path: Path, tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    arrays = {}
    for name, array in tables.items():
        array = np.asarray(array)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or name == "__metadata__":
            raise BankError(
                f"tables[{name!r}] of type {array.dtype} cannot be kept: give booleans, integers "
                "or floats of at most 64 bits, under another name than __metadata__"
            )
        # safetensors keeps bytes as they lie; np.ascontiguousarray would give a scalar a shape.
        arrays[name] = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    with atomic_write(path) as file:
        file.write(save(arrays))
    return _entry(path)


def _write_rows(path: Path, rows: pa.Table | pa.RecordBatchReader, key: str) -> dict[str, Any]:
    position = rows.schema.get_field_index(key)  # -1 if it is missing or there are two
    kind = rows.schema.field(position).type if position >= 0 else None
    if kind not in (pa.string(), pa.large_string()):
        raise BankError(
            f"{key}s has the schema {_oneline(rows.schema)}: it must have one column {key!r} of "
            "strings"
        )
    batches = rows.to_reader() if isinstance(rows, pa.Table) else rows
    count = 0
    # No compression, which is pyarrow's default too: compressed columns cannot be mapped.
    options = pa.ipc.IpcWriteOptions(compression=None)
    with (
        atomic_write(path) as file,
        pa.ipc.new_file(file, batches.schema, options=options) as sink,
    ):
        for batch in batches:
            if missing := batch.column(position).null_count:
                raise BankError(
                    f"{key}s has {missing} null(s) in its column {key!r}, from row {count} on: "
                    "leave these rows out"
                )
            sink.write_batch(batch)
            count += batch.num_rows
    return {**_entry(path), "rows": count}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _oneline(schema: pa.Schema) -> str:
    nullable = {True: "", False: " not null"}
    return ", ".join(f"{field.name}: {field.type}{nullable[field.nullable]}" for field in schema)


def _clear(folder: Path, manifest: Mapping[str, Any] | None) -> None:
    """Delete files of a bank that the manifest does not name: replaced, or never committed."""
    keep = _named(manifest) if manifest else ()
    for path in folder.iterdir():
        if _DELETABLE.fullmatch(path.name) and path.name not in keep:
            with contextlib.suppress(OSError):  # the next writer tries again
                path.unlink()


def _lock(folder: Path) -> IO[str]:
    """Lock the bank for this process; the lock ends with it, or with the file's closing."""
    path = folder / LOCK
    try:
        return lock(path)
    except LockedError as error:
        raise BankError(
            f"{error} writes to the bank {folder} and has locked {path}: a bank has one writer; "
            "wait until that one is closed, or end it"
        ) from None
    except OSError as error:
        raise BankError(
            f"{path} cannot be locked ({error}): keep the bank on a file system with locks"
        ) from error

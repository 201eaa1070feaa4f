"""Files that are whole or absent, that have one writer, and are told apart by a checksum."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = [
    "LockedError",
    "atomic_write",
    "lock",
    "remove_temporaries",
    "sha256_of",
    "sync",
    "unlock",
]

CHUNK = 1 << 20  # bytes read at a time


class LockedError(Exception):
    """A file that another open file has locked; the message says whose that is."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside ``path`` that takes its place once the block has ended well.

    On any exception, KeyboardInterrupt included, the temporary file goes and ``path`` stays as
    it was. Once the block has been left, the new file survives a loss of power too.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    # The mode that a plain open() gives, for which the umask of the process is not touched.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The file has its name by now, so an exception would say what is not so.
    with contextlib.suppress(OSError):
        for folder in (path.parent, *(new.parent for new in made)):
            sync(folder)


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Remove temporary files of :func:`atomic_write` from a folder that nobody writes to now."""
    for path in Path(folder).glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink(missing_ok=True)


def sync(path: str | os.PathLike) -> None:
    """Have a file, or the names in a folder, reach the disk.

    Raises
    ------
    OSError
        On systems that cannot open a folder, and file systems that cannot sync one.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: str | os.PathLike) -> IO[str]:
    """Lock the file ``path`` for this process, whose number it then holds.

    The lock ends with :func:`unlock`, with the file's closing, or with the process.

    Raises
    ------
    LockedError
        If it is locked already.
    OSError
        If the file system has no locks, or the file cannot be written.
    """
    path = Path(path)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except BlockingIOError:
        with file:
            file.seek(0)
            process = file.read().strip() or "unknown"
        who = "this process" if process == str(os.getpid()) else "another process"
        raise LockedError(f"{who} (pid {process})") from None
    except OSError:
        file.close()
        raise
    return file


def unlock(file: IO[str]) -> None:
    """Give back what :func:`lock` gave."""
    file.truncate(0)
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal; the file may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):  # hashlib.file_digest is not in Python 3.10
            digest.update(chunk)
    return digest.hexdigest()

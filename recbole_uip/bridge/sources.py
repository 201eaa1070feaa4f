"""Atomic files: where they are, and how to get them."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

from recbole.utils.url import rename_atomic_files
from tqdm import tqdm

from recbole_uip.settings import SettingsError

__all__ = ["download", "missing_files_error"]

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

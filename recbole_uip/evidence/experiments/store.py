"""Finished runs of experiments, each kept under a hash of what shaped it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_uip.files import atomic_write
from recbole_uip.records import finite

__all__ = ["RunStore", "key_of"]

KEY_DIGITS = 20


def key_of(description: Mapping[str, Any]) -> str:
    """Hash of plain values, the same for equal values in any order of keys."""
    text = json.dumps(finite(description), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


class RunStore:
    """A folder with two files a run: ``<key>.json``, and its predictions in ``<key>.npz``.

    Both are written whole or not at all, the record last: a run that has both is finished. A
    report keeps what it measured beside them, in ``<key>.measured.npz``.

    Parameters
    ----------
    folder : path-like
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def __contains__(self, key: str) -> bool:
        return all(self._path(key, suffix).is_file() for suffix in ("json", "npz"))

    def write(
        self, key: str, record: Mapping[str, Any], predictions: Mapping[str, np.ndarray]
    ) -> None:
        """Keep a finished run; one that is there already is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path(key, "npz")) as file:
            np.savez_compressed(file, **predictions)
        with atomic_write(self._path(key, "json"), "w") as file:
            json.dump({"key": key, **record}, file, indent=1, allow_nan=False)
            file.write("\n")

    def read(self, key: str) -> dict[str, Any]:
        """The record of a finished run.

        Raises
        ------
        KeyError
            If there is none.
        """
        try:
            return json.loads(self._path(key, "json").read_text())
        except FileNotFoundError:
            raise KeyError(key) from None

    def predictions(self, key: str, prefix: str = "") -> dict[str, np.ndarray]:
        """Rows, labels and scores of its validation and test split.

        Parameters
        ----------
        key : str
        prefix : str
            Only arrays whose names begin so are read.

        Raises
        ------
        KeyError
            If there is no such run.
        """
        try:
            with np.load(self._path(key, "npz")) as file:
                return {name: file[name] for name in file.files if name.startswith(prefix)}
        except FileNotFoundError:
            raise KeyError(key) from None

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"

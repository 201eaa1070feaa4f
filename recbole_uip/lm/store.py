"""Scores on disk, content-addressed: one folder per LM and prompt, shards of texts within.

A shard is a safetensors file that is complete or not there. Shards are only ever added, so that
two processes may write at once; duplicates between them are harmless, since equal keys mean equal
scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from recbole_uip.files import atomic_write

__all__ = ["ScoreStore", "digest"]

logger = logging.getLogger(__name__)

MAX_SHARDS = 32  # more than that are merged, to keep reading fast
KEY = "key"


def digest(text: str) -> bytes:
    """Key of a text: 16 bytes of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class ScoreStore:
    """The scores of one LM and prompt.

    Parameters
    ----------
    folder : Path
        Folder of this LM and prompt.
    about : mapping
        What they are, written to ``about.json`` for people; never read back.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = about

    def read(self, keys: Sequence[bytes]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Scores of ``keys`` as far as they are there.

        Parameters
        ----------
        keys : sequence of n bytes
            From :func:`digest`.

        Returns
        -------
        columns : dict of ndarray, each of shape (n, ...)
            Zeros where a key is missing; empty if all are.
        found : ndarray of bool, shape (n,)
        """
        wanted = {key: row for row, key in enumerate(keys)}
        columns: dict[str, np.ndarray] = {}
        found = np.zeros(len(keys), dtype=bool)
        for path in self._shards():
            shard = _read_shard(path, wanted)
            if shard is None:
                continue
            pairs = [
                (source, wanted[key.tobytes()])
                for source, key in enumerate(shard[KEY])
                if key.tobytes() in wanted
            ]
            sources, targets = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
            for name, values in shard.items():
                if name == KEY:
                    continue
                if name not in columns:
                    columns[name] = np.zeros((len(keys), *values.shape[1:]), values.dtype)
                _scatter(columns[name], targets, values, sources)
            found[targets] = True
        return columns, found

    def keys(self) -> set[bytes]:
        """Keys of all scores that are there, as far as their shards' keys can be read."""
        return set().union(*map(_read_keys, self._shards()))

    def write(self, keys: Sequence[bytes], columns: Mapping[str, np.ndarray]) -> Path:
        """Add the scores of ``keys`` as one shard; each column has shape (n, ...)."""
        key_column = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
        return self.write_file(f"shard-{uuid.uuid4().hex}", {KEY: key_column, **columns})

    def write_file(self, stem: str, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write ``{stem}.safetensors`` with a checksum, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "about.json"
        if not about.exists():
            with atomic_write(about, "w") as file:
                json.dump(self.about, file, indent=2)
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = {"checksum": _checksum(arrays)}
        path = self.folder / f"{stem}.safetensors"
        with atomic_write(path) as file:
            file.write(save(arrays, metadata=metadata))
        return path

    def read_file(self, stem: str) -> dict[str, np.ndarray] | None:
        """Arrays of ``{stem}.safetensors``; None if it is missing or damaged."""
        path = self.folder / f"{stem}.safetensors"
        return _read_shard(path, None) if path.exists() else None

    def compact(self) -> None:
        """Merge the shards into one if there are many."""
        paths = self._shards()
        if len(paths) <= MAX_SHARDS:
            return
        shards = {path: shard for path in paths if (shard := _read_shard(path, None)) is not None}
        names = {tuple(sorted(shard)) for shard in shards.values()}
        if len(names) != 1:
            return
        merged = {
            name: np.concatenate([shard[name] for shard in shards.values()])
            for name in next(iter(names))
        }
        _, first = np.unique(merged[KEY], axis=0, return_index=True)
        # the merged shard is there before the others go: a crash between costs only space
        self.write_file(f"shard-{uuid.uuid4().hex}", {k: v[first] for k, v in merged.items()})
        for path in shards:
            path.unlink(missing_ok=True)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))


def _read_shard(path: Path, wanted: Mapping[bytes, int] | None) -> dict[str, np.ndarray] | None:
    """Arrays of a file; None if it is damaged, gone, or holds none of the ``wanted`` keys."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if wanted is not None:
                keys = file.get_tensor(KEY)
                if not any(key.tobytes() in wanted for key in keys):
                    return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("checksum") != _checksum(arrays):
                raise ValueError("its checksum does not match its content")
    except FileNotFoundError:
        return None  # merged into another shard by another process: at worst scored again
    except OSError as error:
        logger.warning(
            "score cache: %s cannot be read (%s); its texts are scored again", path, error
        )
        return None
    except (SafetensorError, ValueError) as error:
        logger.warning("score cache: %s is damaged (%s); its texts are scored again", path, error)
        with contextlib.suppress(OSError):  # out of the way, so that it is told once
            path.rename(path.with_suffix(".damaged"))
        return None
    return arrays


def _read_keys(path: Path) -> set[bytes]:
    """Keys of a shard; none if it is damaged or gone, which whoever reads its scores will tell."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key.tobytes() for key in file.get_tensor(KEY)}
    except (OSError, SafetensorError):
        return set()


def _scatter(
    target: np.ndarray, rows: np.ndarray, source: np.ndarray, source_rows: np.ndarray
) -> None:
    """``target[rows] = source[source_rows]`` without a temporary copy of all rows."""
    for row, source_row in zip(rows.tolist(), source_rows.tolist(), strict=True):
        target[row] = source[source_row]


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Wrap-around sums of the arrays' words: fast, and finds torn pages and flipped bits."""
    sums = []
    for name in sorted(arrays):
        raw = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        whole = len(raw) // 8 * 8
        total = int(raw[:whole].view(np.uint64).sum(dtype=np.uint64))
        total += int(raw[whole:].sum(dtype=np.uint64))
        sums.append(f"{name}:{arrays[name].shape}:{total & 0xFFFFFFFFFFFFFFFF:016x}")
    return hashlib.sha256("|".join(sums).encode()).hexdigest()[:32]

"""What a finished run's test predictions say beyond its record, kept beside the run.

The resampling of users takes about a second a run, so that a second report would wait for
minutes. What was measured is kept under the hash of what it was measured from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_uip.evidence import statistics
from recbole_uip.evidence.statistics import Reliability
from recbole_uip.files import atomic_write

__all__ = [
    "Measured",
    "Stamp",
    "digest",
    "measure_rows",
    "read_measured",
    "rows_digest",
    "write_measured",
]

logger = logging.getLogger(__name__)

# Raised whenever a measure changes its meaning: older files are then measured again.
FORMAT = 2
_DRAWN = "replicates_"


@dataclass(frozen=True)
class Measured:
    """What a run's predictions say beyond its record.

    Attributes
    ----------
    rows : str
        Hash of rows, users, items and labels: runs that share it were judged on the same rows.
    n_rows : int
    users : ndarray of int
        Users of the split, sorted.
    auc : float
        Recomputed from the scores.
    reliability : Reliability
    slices : dict of str to dict of str to dict of str to float
        Metrics by what is sliced and by slice.
    replicates : dict of str to ndarray of float, shape (n_boot,)
        ``auc`` and ``list_auc`` in each resample of users.
    """

    rows: str
    n_rows: int
    users: np.ndarray
    auc: float
    reliability: Reliability
    slices: dict[str, dict[str, dict[str, float]]]
    replicates: dict[str, np.ndarray]


@dataclass(frozen=True)
class Stamp:
    """What a measurement rests on.

    Attributes
    ----------
    predictions : str
        SHA-256 of the run's file of predictions.
    n_boot, seed : int
        Of the resampling.
    users : str
        Hash of the users that are drawn from.
    format : int
    """

    predictions: str
    n_boot: int
    seed: int
    users: str
    format: int = FORMAT


def rows_digest(rows: Mapping[str, np.ndarray]) -> str:
    """Hash of who meets what, and of the labels."""
    return digest(*(rows[name] for name in ("row", "user", "item", "label")))


def measure_rows(
    rows: Mapping[str, np.ndarray], n_boot: int, seed: int, users: np.ndarray
) -> Measured:
    """Measure the arrays of a test split.

    Parameters
    ----------
    rows : mapping of str to ndarray, shape (n_rows,)
        ``row``, ``user``, ``item``, ``list``, ``label`` and ``score``, in an order that does not
        depend on the run; and what :func:`statistics.slices` takes: ``history``, ``item_rows``
        and ``user_rows``.
    n_boot, seed : int
        Of the resampling.
    users : ndarray of int
        Sorted users to draw from, at least those of the rows.
    """
    user, label, score = rows["user"], rows["label"], rows["score"]
    drawn = {"n_boot": n_boot, "seed": seed, "users": users}
    masks = statistics.slices(*(rows[name] for name in ("history", "item_rows", "user_rows")))
    return Measured(
        rows_digest(rows),
        len(label),
        np.unique(user),
        statistics.auc(label, score),
        statistics.reliability_curve(label, score),
        {
            kind: {
                name: statistics.slice_metrics(label, score, mask) for name, mask in by_name.items()
            }
            for kind, by_name in masks.items()
        },
        {
            "auc": statistics.bootstrap_aucs(user, label, score, **drawn),
            "list_auc": statistics.bootstrap_gaucs(user, rows["list"], label, score, **drawn),
        },
    )


def digest(*arrays: np.ndarray) -> str:
    """Hash of arrays of integers, whatever their width."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return found.hexdigest()


def write_measured(path: Path, stamp: Stamp, measured: Measured) -> None:
    """Keep a measurement; where the folder cannot be written, it is measured anew each time."""
    meta = {
        "stamp": vars(stamp),
        "rows": measured.rows,
        "n_rows": measured.n_rows,
        "auc": measured.auc,
        "slices": measured.slices,
    }
    try:
        with atomic_write(path) as file:
            np.savez(
                file,
                meta=np.array(json.dumps(meta)),
                users=measured.users,
                **{f"reliability_{name}": array for name, array in _curve(measured)},
                **{f"{_DRAWN}{name}": array for name, array in measured.replicates.items()},
            )
    except OSError as error:
        logger.warning("%s cannot be written (%s): it is measured anew each time", path, error)


def _curve(measured: Measured) -> list[tuple[str, np.ndarray]]:
    return [(name, getattr(measured.reliability, name)) for name in ("score", "share", "rows")]


def read_measured(path: Path) -> tuple[Stamp, Measured] | None:
    """A kept measurement and what it rests on; None where there is none that can be read."""
    # It can always be measured again, so that what is wrong with the file does not matter.
    with contextlib.suppress(Exception), np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        measured = Measured(
            meta["rows"],
            meta["n_rows"],
            file["users"],
            meta["auc"],
            Reliability(*(file[f"reliability_{name}"] for name in ("score", "share", "rows"))),
            meta["slices"],
            {
                name.removeprefix(_DRAWN): file[name]
                for name in file.files
                if name.startswith(_DRAWN)
            },
        )
        return Stamp(**meta["stamp"]), measured
    return None

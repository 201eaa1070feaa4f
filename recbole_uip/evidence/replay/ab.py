"""An A/B test of scored rows: hashed arms, and differences between users of two arms.

The arms have different users, so a difference between them is unpaired: users are drawn with
replacement within each arm, and the arms independently. Three differences are told apart, of a
metric M with the baseline's scores p and the treatment's scores t:

* A/A, M_B(p) - M_A(p): both arms have the baseline. What is left is chance in who is in which.
* A/B, M_B(t) - M_A(p): what the test itself shows, that chance included.
* A/B less A/A, M_B(t) - M_B(p): the difference in differences. Arm B's users scored by both
  models, so it is paired, and the chance in who is in which arm is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recbole_uip.evidence.statistics import (
    BINS,
    N_BOOT,
    Difference,
    auc,
    bootstrap_aucs,
    bootstrap_difference,
    bootstrap_sums,
    equal_mass_bins,
    losses,
    percentile_interval,
    rerandomised_aucs,
)

__all__ = [
    "METRICS",
    "MIN_ROWS",
    "MIN_USERS",
    "SALT",
    "Comparison",
    "compare",
    "effective_users",
    "in_arm_b",
    "periods",
    "redrawn",
]

SALT = "recbole-uip"
# auc, logloss: as everywhere. score, share: mean score and share of likes. gap: score - share.
# ece: expected calibration error in 15 bins of equal mass.
METRICS = ("auc", "logloss", "score", "share", "gap", "ece")
SECONDS_OF_A_DAY = 86_400
# What a period needs in either arm to stand by itself, and how many periods there may be.
MIN_ROWS, MIN_USERS, MAX_PERIODS = 200, 10, 50
REDRAWN = 1000


@dataclass(frozen=True)
class Comparison:
    """Metrics of two arms and their three differences, by metric, each with a 95% interval.

    Attributes
    ----------
    rows, users : tuple of int
        Of arm A, of arm B.
    a, b_before, b : dict of str to Difference
        Arm A with the baseline, arm B with the baseline, arm B with the treatment; ``p`` is NaN,
        for there is nothing that they are compared with.
    a_a, a_b, did : dict of str to Difference
        A/A, A/B, and their difference, of which ``n`` is the number of arm B's users.
    """

    rows: tuple[int, int]
    users: tuple[int, int]
    a: dict[str, Difference]
    b_before: dict[str, Difference]
    b: dict[str, Difference]
    a_a: dict[str, Difference]
    a_b: dict[str, Difference]
    did: dict[str, Difference]


def in_arm_b(users: Sequence[str], salt: str = SALT) -> np.ndarray:
    """Whether each user token is in arm B: whether SHA-256 of ``salt:token`` begins with a 1 bit.

    A user is in the same arm in every run and on every machine; another salt is another draw.

    Returns
    -------
    ndarray of bool, shape (n_users,)
    """
    first = (hashlib.sha256(f"{salt}:{user}".encode()).digest()[0] for user in users)
    return np.fromiter(first, np.uint8, len(users)) >= 128


def periods(
    time: np.ndarray, user: np.ndarray, label: np.ndarray, arm_b: np.ndarray
) -> list[np.ndarray]:
    """Rows of each day (UTC), small days merged with the days that follow.

    A period is closed at the end of the first day at which each arm has 200 rows (a fiftieth of
    its rows, where that is more), 10 effective users (:func:`effective_users`) and both labels.
    What is left at the end belongs to the last period.

    Parameters
    ----------
    time : ndarray of float64, shape (n_rows,)
        Seconds since 1970.
    user, label : ndarray, shape (n_rows,)
    arm_b : ndarray of bool, shape (n_rows,)

    Returns
    -------
    list of ndarray of int64
        Row numbers, in the order of time; one period with all rows, if no two can stand.
    """
    order = np.argsort(time, kind="stable")
    day = np.floor(time[order] / SECONDS_OF_A_DAY)
    days = np.split(order, np.flatnonzero(np.diff(day)) + 1)
    arms = (arm_b, ~arm_b)
    least = [max(MIN_ROWS, int(arm.sum()) // MAX_PERIODS) for arm in arms]

    def stands(rows: np.ndarray) -> bool:
        parts = [rows[arm[rows]] for arm in arms]
        return all(
            len(part) >= enough
            and effective_users(user[part]) >= MIN_USERS
            and len(np.unique(label[part])) == 2
            for part, enough in zip(parts, least, strict=True)
        )

    found: list[np.ndarray] = []
    waiting = np.empty(0, np.int64)
    for rows in days:
        waiting = np.concatenate([waiting, rows])
        if stands(waiting):
            found.append(waiting)
            waiting = waiting[:0]
    if not found:
        return [order]
    found[-1] = np.concatenate([found[-1], waiting])
    return found


def effective_users(user: np.ndarray) -> float:
    """Users of equal activity that would tell as much as those of these rows, (Σ n)² / Σ n².

    Kish's effective sample size, of n rows a user. Few users with most rows make an interval of
    resampled users too narrow, however many others there are.
    """
    rows = np.unique(user, return_counts=True)[1].astype(np.float64)
    return float(rows.sum() ** 2 / (rows**2).sum()) if len(rows) else 0.0


def redrawn(
    user: np.ndarray, label: np.ndarray, baseline: np.ndarray, observed: float, seed: int = 0
) -> dict[str, float]:
    """What A/A shows in AUC for other draws of the arms, beside what it ``observed``.

    Returns
    -------
    dict
        ``draws``; ``low`` and ``high``, between which 95% of them lie; ``deviation``, their
        standard deviation; ``as_far``, the share of them that is as far from zero as ours.
    """
    found = rerandomised_aucs(user, label, baseline, REDRAWN, seed)
    found = found[~np.isnan(found)]
    low, high = percentile_interval(found)
    return {
        "draws": len(found),
        "low": low,
        "high": high,
        "deviation": float(found.std(ddof=1)),
        "as_far": float((np.abs(found) >= abs(observed)).mean()),
    }


def compare(
    user: np.ndarray,
    label: np.ndarray,
    arm_b: np.ndarray,
    baseline: np.ndarray,
    treatment: np.ndarray,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Comparison:
    """Compare the arms of rows that both models have scored.

    Parameters
    ----------
    user, label : ndarray, shape (n_rows,)
    arm_b : ndarray of bool, shape (n_rows,)
        Whether the row's user is in arm B.
    baseline, treatment : ndarray, shape (n_rows,)
        Scores of the models of arm A and of arm B.
    n_boot : int
    seed : int
        Of the resampling.
    """
    rows_a, rows_b = np.flatnonzero(~arm_b), np.flatnonzero(arm_b)
    users = tuple(len(np.unique(user[rows])) for rows in (rows_a, rows_b))

    def draw(rows: np.ndarray, score: np.ndarray, stream: int) -> dict[str, _Draws]:
        return _metrics(user[rows], label[rows], score[rows], n_boot, 2 * seed + stream)

    a = draw(rows_a, baseline, 0)
    # One seed: the same resamples of arm B's users, so that these two are paired.
    b_before, b = draw(rows_b, baseline, 1), draw(rows_b, treatment, 1)

    def minus(left: dict[str, _Draws], right: dict[str, _Draws], n: int) -> dict[str, Difference]:
        return {name: left[name].minus(right[name], n) for name in METRICS}

    return Comparison(
        rows=(len(rows_a), len(rows_b)),
        users=users,
        a={name: a[name].interval(users[0]) for name in METRICS},
        b_before={name: b_before[name].interval(users[1]) for name in METRICS},
        b={name: b[name].interval(users[1]) for name in METRICS},
        a_a=minus(b_before, a, sum(users)),
        a_b=minus(b, a, sum(users)),
        did=minus(b, b_before, users[1]),
    )


@dataclass(frozen=True)
class _Draws:
    """A metric, and its replicates, shape (n_boot,)."""

    observed: float
    replicates: np.ndarray

    def minus(self, other: _Draws, n_users: int) -> Difference:
        replicates = self.replicates - other.replicates
        return bootstrap_difference(self.observed - other.observed, replicates, n_users)

    def interval(self, n_users: int) -> Difference:
        kept = self.replicates[~np.isnan(self.replicates)]
        low, high = percentile_interval(kept) if len(kept) > 1 else (np.nan, np.nan)
        return Difference(self.observed, low, high, np.nan, n_users)


def _metrics(
    user: np.ndarray, label: np.ndarray, score: np.ndarray, n_boot: int, seed: int
) -> dict[str, _Draws]:
    """Every metric of :data:`METRICS` with its replicates."""
    label, score = label.astype(np.float64), score.astype(np.float64)
    bin_of = equal_mass_bins(score)
    gaps = np.zeros((len(label), BINS))
    gaps[np.arange(len(label)), bin_of] = score - label
    values = np.column_stack([np.ones(len(label)), losses(label, score), score, label, gaps])
    drawn = bootstrap_sums(user, values, n_boot, seed)
    found = {
        "auc": _Draws(auc(label, score), bootstrap_aucs(user, label, score, n_boot, seed)),
    }
    of_rows, of_draws = _means(values.sum(axis=0)[None, :]), _means(drawn)
    for name in METRICS[1:]:
        found[name] = _Draws(float(of_rows[name][0]), of_draws[name])
    # Resampling adds noise to every bin, and |gap| can only grow by it: the replicates are
    # moved back by as much as their mean has grown.
    ece = found["ece"]
    moved = ece.replicates - (ece.replicates.mean() - ece.observed)
    found["ece"] = _Draws(ece.observed, np.maximum(moved, 0.0))
    return found


def _means(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of sums of rows, losses, scores, labels and gaps by bin, shape (n,) each."""
    means = sums[:, 1:] / sums[:, :1]
    loss, score, share = means[:, :3].T
    return {
        "logloss": loss,
        "score": score,
        "share": share,
        "gap": score - share,
        "ece": np.abs(means[:, 3:]).sum(axis=1),
    }

"""Statistics of comparisons: paired seeds, resampled users, calibration and slices.

Pure functions of arrays. Two sources of chance are kept apart: training (seeds; paired t) and
which users happen to be in the split (the user-clustered bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from recbole_uip.bridge.metrics import group_aucs

__all__ = [
    "N_BOOT",
    "Difference",
    "Relative",
    "Reliability",
    "auc",
    "bootstrap_aucs",
    "bootstrap_difference",
    "bootstrap_gaucs",
    "bootstrap_sums",
    "clustered_error",
    "clustered_mean",
    "equal_mass_bins",
    "half_width",
    "holm",
    "logloss",
    "losses",
    "paired_difference",
    "percentile_interval",
    "relative",
    "reliability_curve",
    "rerandomised_aucs",
    "slice_metrics",
    "slices",
    "split_overlap",
    "user_clustered_bootstrap",
]

CONFIDENCE = 0.95
N_BOOT = 2000
BINS = 15
# Share of resamples that may say nothing.
MOST_UNKNOWN = 0.01
# Of RecBole's LogLoss.
_EPSILON = 1e-15

HISTORY_SLICES = (("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20+", 20, None))
ITEM_SLICES = (
    ("0 (unseen)", 0, 0),
    ("1-9", 1, 9),
    ("10-99", 10, 99),
    ("100-999", 100, 999),
    ("1000+", 1000, None),
)
USER_SLICES = (("unseen", 0, 0), ("seen", 1, None))


@dataclass(frozen=True)
class Difference:
    """A difference, its 95% interval and its two-sided p-value.

    Attributes
    ----------
    mean, low, high, p : float
        NaN where the data do not give them.
    n : int
        Seeds or users that it rests on.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Relative:
    """A relative improvement of AUC in the two customs of the literature, as shares.

    Attributes
    ----------
    ratio : float
        AUC / base - 1.
    above_half : float
        (AUC - .5) / (base - .5) - 1, "RelaImpr", as CTRL prints it.
    """

    ratio: float
    above_half: float


@dataclass(frozen=True)
class Reliability:
    """Predicted against observed probability in bins of equal mass.

    Attributes
    ----------
    score, share : ndarray of float, shape (n_bins,)
        Mean score, and share of rows with label 1; NaN in a bin without rows.
    rows : ndarray of int, shape (n_bins,)
    """

    score: np.ndarray
    share: np.ndarray
    rows: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean |share - score| over rows; NaN without rows."""
        if not self.rows.any():
            return float("nan")
        gap = np.abs(self.share - self.score)
        return float(np.nansum(gap * self.rows) / self.rows.sum())


# --- seeds --------------------------------------------------------------------------------------


def split_overlap(protocol: Mapping[str, Any]) -> float:
    """Test rows over training rows where each seed splits the rows anew; else 0.

    Parameters
    ----------
    protocol : mapping
        A run's ``protocol``.
    """
    of_files = isinstance(protocol["split"], list)
    if of_files or protocol["order"] != "RO":
        return 0.0
    rows = protocol["rows"]
    return rows["test"] / rows["train"] if rows["train"] else 0.0


def half_width(values: np.ndarray, overlap: float = 0.0) -> float:
    """Half the width of the 95% t-interval of the mean; NaN for fewer than two values.

    For ``overlap`` see :func:`paired_difference`.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float("nan")
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * values.std(ddof=1) * np.sqrt(1 / len(values) + overlap))


def paired_difference(
    values_a: Sequence[float], values_b: Sequence[float], overlap: float = 0.0
) -> Difference:
    """Mean of a - b over pairs, its t-interval, and the p-value of the paired t-test.

    Parameters
    ----------
    values_a, values_b : sequence of float, of one length
        One value a seed. Pairs with a NaN are left out, and not counted in ``n``.
    overlap : float
        Test rows over training rows, where each seed splits the same rows anew: splits share
        rows, so their differences are correlated, and the variance of the mean over n seeds is
        taken as s^2 (1/n + overlap) (Nadeau and Bengio 2003). 0 where all seeds have one split.

    Returns
    -------
    Difference
        With one pair the interval and p are NaN, with none the mean too.
    """
    values_a, values_b = (np.asarray(each, dtype=np.float64) for each in (values_a, values_b))
    if values_a.shape != values_b.shape:
        raise ValueError(f"{len(values_a)} values cannot be paired with {len(values_b)}")
    change = values_a - values_b
    change = change[~np.isnan(change)]
    if len(change) == 0:
        return Difference(np.nan, np.nan, np.nan, np.nan, 0)
    mean, half = float(change.mean()), half_width(change, overlap)
    p = float("nan")
    if len(change) > 1:
        error = change.std(ddof=1) * np.sqrt(1 / len(change) + overlap)
        p = _two_sided(mean, error, scipy.stats.t(len(change) - 1))
    return Difference(mean, mean - half, mean + half, p, len(change))


def _two_sided(mean: float, error: float, distribution: scipy.stats.rv_continuous) -> float:
    if error == 0:
        # Exactly the same difference each time: certain, unless there is none.
        return 1.0 if mean == 0 else 0.0
    return float(2 * distribution.sf(abs(mean) / error))


def holm(p_values: Sequence[float], n_tests: int | None = None) -> np.ndarray:
    """P-values adjusted for the number of tests by Holm's step-down method.

    .. math:: \\tilde p_{(i)} = \\max_{j \\le i} \\min(1, (m - j + 1)\\, p_{(j)})

    NaN stays NaN. The number m of tests is by default that of the other p-values; it is more where
    some tests that were planned have none.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    n_tests = len(order) if n_tests is None else n_tests
    factors = np.arange(n_tests, n_tests - len(order), -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p_values[order]))
    return adjusted


def relative(auc: float, base: float) -> Relative:
    """The improvement of ``auc`` over ``base``; NaN over AUC - .5 where base is not above .5."""
    above = (auc - base) / (base - 0.5) if base > 0.5 else float("nan")
    return Relative(auc / base - 1, above)


# --- users --------------------------------------------------------------------------------------


class _RankedPairs:
    """Rows by class and sorted by score once, for AUCs under many weightings.

    AUC = sum over positives i of w_i (W(s < s_i) + W(s = s_i) / 2) / (W+ W-), where W sums the
    weights of negatives.
    """

    def __init__(self, label: np.ndarray, score: np.ndarray) -> None:
        positive, score = np.asarray(label) > 0.5, np.asarray(score)
        if np.isnan(score).any():
            raise ValueError("a score is NaN")
        self.positives, self.negatives = (
            rows[np.argsort(score[rows], kind="stable")]
            for rows in (np.flatnonzero(positive), np.flatnonzero(~positive))
        )
        ranked, sought = score[self.negatives], score[self.positives]
        self._below = np.searchsorted(ranked, sought, "left")
        up_to = np.searchsorted(ranked, sought, "right")
        # Ties are few: only they are looked up twice.
        self._tied = np.flatnonzero(up_to > self._below)
        self._up_to = up_to[self._tied]

    def auc(self, of_positives: np.ndarray, of_negatives: np.ndarray) -> float:
        """AUC for weights in the orders of ``positives`` and ``negatives``."""
        mass = np.zeros(len(of_negatives) + 1)
        np.cumsum(of_negatives, out=mass[1:])
        below = mass.take(self._below)  # twice as fast as mass[...]
        wins = of_positives @ below
        tied = mass[self._up_to] - below[self._tied]
        wins += of_positives[self._tied] @ tied / 2
        total = of_positives.sum() * mass[-1]
        return float(wins / total) if total > 0 else float("nan")


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """AUC, ties counting half; NaN where all rows are of one class.

    Parameters
    ----------
    label, score : ndarray, shape (n_rows,)
        ``label`` is 1 where liked.
    """
    pairs = _RankedPairs(label, score)
    return pairs.auc(np.ones(len(pairs.positives)), np.ones(len(pairs.negatives)))


def logloss(label: np.ndarray, score: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, clipped as RecBole's LogLoss; NaN without rows."""
    return float(losses(label, score).mean()) if len(label) else float("nan")


def losses(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each row in nats, whose mean is :func:`logloss`."""
    score = np.clip(np.asarray(score, dtype=np.float64), _EPSILON, 1 - _EPSILON)
    return -np.log(np.where(np.asarray(label) > 0.5, score, 1 - score))


def bootstrap_aucs(
    user: np.ndarray,
    label: np.ndarray,
    score: np.ndarray,
    n_boot: int = N_BOOT,
    seed: int = 0,
    users: np.ndarray | None = None,
) -> np.ndarray:
    """AUC in each resample of users with replacement; a user drawn k times weighs its rows k.

    One seed and one set of users give the same resamples, whatever the scores: differences of
    two results are paired.

    Parameters
    ----------
    user, label, score : ndarray, shape (n_rows,)
    n_boot : int
    seed : int
    users : ndarray, optional
        Sorted ids that are drawn from; by default those of ``user``.

    Returns
    -------
    ndarray of float64, shape (n_boot,)
        NaN where a resample has one class only.

    Raises
    ------
    ValueError
        If a row's user is not one of ``users``.
    """
    users = np.unique(user) if users is None else users
    code = _user_codes(user, users)
    return np.array(list(_weighted_aucs(code, label, score, _draws(len(users), n_boot, seed))))


def bootstrap_gaucs(
    user: np.ndarray,
    group: np.ndarray,
    label: np.ndarray,
    score: np.ndarray,
    n_boot: int = N_BOOT,
    seed: int = 0,
    users: np.ndarray | None = None,
) -> np.ndarray:
    """:func:`~recbole_uip.bridge.metrics.gauc` in the resamples of :func:`bootstrap_aucs`.

    Parameters
    ----------
    user, group, label, score : ndarray, shape (n_rows,)
        All rows of a group are of one user.
    n_boot, seed, users
        As in :func:`bootstrap_aucs`.

    Returns
    -------
    ndarray of float64, shape (n_boot,)
        NaN where a resample has no group with both labels.
    """
    users = np.unique(user) if users is None else users
    found = group_aucs(group, label, score)
    weighted = np.stack([found.n_rows * found.auc, found.n_rows], axis=1)
    sums = bootstrap_sums(user[found.first], weighted, n_boot, seed, users)
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def bootstrap_sums(
    user: np.ndarray,
    values: np.ndarray,
    n_boot: int = N_BOOT,
    seed: int = 0,
    users: np.ndarray | None = None,
) -> np.ndarray:
    """Sums of columns over rows in the resamples of :func:`bootstrap_aucs` of the same seed.

    Parameters
    ----------
    user : ndarray, shape (n_rows,)
    values : ndarray of float64, shape (n_rows, n_columns)
    n_boot, seed, users
        As in :func:`bootstrap_aucs`.

    Returns
    -------
    ndarray of float64, shape (n_boot, n_columns)
    """
    users = np.unique(user) if users is None else users
    code = _user_codes(user, users)
    by_user = np.stack(
        [np.bincount(code, weights=column, minlength=len(users)) for column in values.T], axis=1
    )
    return np.stack([count @ by_user for count in _draws(len(users), n_boot, seed)])


def rerandomised_aucs(
    user: np.ndarray, label: np.ndarray, score: np.ndarray, n_draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """AUC of one half of the users less that of the other, for many draws of the halves.

    Each user is in either half with probability 1/2, by itself. With scores that do not depend on
    the half, this is the distribution of an A/A test's difference for these rows.

    Returns
    -------
    ndarray of float64, shape (n_draws,)
        NaN where a half has one class only.
    """
    users = np.unique(user)
    code, generator = _user_codes(user, users), np.random.default_rng(seed)
    halves = (generator.integers(2, size=len(users)).astype(np.float64) for _ in range(n_draws))
    both = (each for half in halves for each in (half, 1.0 - half))
    return -np.diff(np.reshape(list(_weighted_aucs(code, label, score, both)), (-1, 2)))[:, 0]


def _weighted_aucs(
    code: np.ndarray, label: np.ndarray, score: np.ndarray, weights: Iterable[np.ndarray]
) -> Iterator[float]:
    """AUC under each weighting of the users, shape (n_users,), to whom ``code`` gives rows."""
    pairs = _RankedPairs(label, score)
    positives, negatives = code[pairs.positives], code[pairs.negatives]
    for weight in weights:
        yield pairs.auc(weight.take(positives), weight.take(negatives))


def _user_codes(user: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Place of each row's user among the sorted ``users``."""
    code = np.searchsorted(users, user)
    if np.any(code == len(users)) or np.any(users[code] != user):
        raise ValueError("a row's user is not among the users to draw from")
    return code


def _draws(n_users: int, n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn, shape (n_users,), resample after resample."""
    generator = np.random.default_rng(seed)
    for _ in range(n_boot):
        drawn = generator.integers(n_users, size=n_users)
        yield np.bincount(drawn, minlength=n_users).astype(np.float64)


def bootstrap_difference(observed: float, replicates: np.ndarray, n_users: int) -> Difference:
    """Percentile interval of a difference's replicates, and p of z = observed / deviation.

    The p-value takes the replicates' standard deviation for the standard error of a normal
    statistic (as pROC's ``roc.test`` does): a count of replicates could not fall below
    2 / n_boot, which no correction for many comparisons survives. There is neither interval nor p
    where more than a hundredth of the replicates are NaN: of fewer than five users who tell
    anything, so many resamples have none.
    """
    least = max(2, (1 - MOST_UNKNOWN) * len(replicates))
    replicates = replicates[~np.isnan(replicates)]
    too_few = len(replicates) < least
    # Resamples that all say the same are of one user; unless there is no difference to say.
    alone = len(replicates) > 1 and np.ptp(replicates) == 0 and observed != 0
    if too_few or alone or np.isnan(observed):
        return Difference(observed, np.nan, np.nan, np.nan, n_users)
    low, high = percentile_interval(replicates)
    p = _two_sided(observed, float(replicates.std(ddof=1)), scipy.stats.norm)
    return Difference(observed, low, high, p, n_users)


def percentile_interval(replicates: np.ndarray) -> tuple[float, float]:
    """Between which the middle 95% of the replicates lie; none of them may be NaN."""
    low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def user_clustered_bootstrap(
    user: np.ndarray,
    label: np.ndarray,
    score_a: np.ndarray,
    score_b: np.ndarray,
    n_boot: int = N_BOOT,
    seed: int = 0,
) -> Difference:
    """AUC(a) - AUC(b) of the same rows, with an interval over users drawn with replacement.

    Parameters
    ----------
    user, label : ndarray, shape (n_rows,)
    score_a, score_b : ndarray, shape (n_rows,) or (n_seeds, n_rows)
        With several seeds, the difference is the mean over seeds, within each resample.
    n_boot : int
    seed : int
        Of the resampling.

    Returns
    -------
    Difference
        ``n`` is the number of users.
    """
    user, label = np.asarray(user), np.asarray(label)
    observed, replicates = [], []
    for scores in (score_a, score_b):
        scores = np.atleast_2d(scores)
        observed.append(np.mean([auc(label, each) for each in scores]))
        drawn = [bootstrap_aucs(user, label, each, n_boot, seed) for each in scores]
        replicates.append(np.mean(drawn, axis=0))
    return bootstrap_difference(
        float(observed[0] - observed[1]), replicates[0] - replicates[1], len(np.unique(user))
    )


def clustered_error(user: np.ndarray, values: np.ndarray) -> float:
    """Standard error of a mean over rows, where a user's rows may depend on one another.

    .. math:: se^2 = \\frac{G}{G - 1} \\frac{1}{n^2}
              \\sum_u \\Big(\\sum_{e \\in u} (d_e - \\bar d)\\Big)^2

    for n rows of G users: the cluster-robust variance of a mean. NaN for fewer than two users.

    Parameters
    ----------
    user, values : ndarray, shape (n_rows,)
    """
    values = np.asarray(values, dtype=np.float64)
    users, code = np.unique(user, return_inverse=True)
    if len(users) < 2:
        return float("nan")
    sums = np.bincount(code, weights=values - values.mean())
    return float(np.sqrt(len(users) / (len(users) - 1) * (sums**2).sum()) / len(values))


def clustered_mean(user: np.ndarray, values: np.ndarray) -> Difference:
    """Mean over rows, with a t-interval by :func:`clustered_error`; ``n`` counts users."""
    n_users, mean = len(np.unique(user)), float(np.mean(values))
    error = clustered_error(user, values)
    if np.isnan(error):
        return Difference(mean, np.nan, np.nan, np.nan, n_users)
    distribution = scipy.stats.t(n_users - 1)
    half = float(distribution.ppf((1 + CONFIDENCE) / 2)) * error
    return Difference(
        mean, mean - half, mean + half, _two_sided(mean, error, distribution), n_users
    )


# --- calibration --------------------------------------------------------------------------------


def equal_mass_bins(score: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin of each row, of ``bins`` bins of about equal numbers of rows, by the order of scores.

    Rows of one score stand in one bin (that of their mid-rank), so that the order of rows does
    not matter; a bin may thus be empty.
    """
    middle = scipy.stats.rankdata(score) - 0.5
    return np.minimum((middle * bins / max(len(score), 1)).astype(np.int64), bins - 1)


def reliability_curve(label: np.ndarray, score: np.ndarray, bins: int = BINS) -> Reliability:
    """Mean score and share of likes in the bins of :func:`equal_mass_bins`."""
    label, score = np.asarray(label), np.asarray(score, dtype=np.float64)
    bin_of = equal_mass_bins(score, bins)
    rows = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [
            np.bincount(bin_of, weights=each, minlength=bins) / rows
            for each in (score, (label > 0.5).astype(np.float64))
        ]
    return Reliability(*means, rows)


# --- slices -------------------------------------------------------------------------------------


def slices(
    history: np.ndarray, item_rows: np.ndarray, user_rows: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Masks of rows by what is known of them beforehand.

    Parameters
    ----------
    history : ndarray of int, shape (n_rows,)
        Strictly earlier events of the row's user that the row may see.
    item_rows, user_rows : ndarray of int, shape (n_rows,)
        Training rows of the row's item, of its user.

    Returns
    -------
    dict of str to dict of str to ndarray of bool
        By what is sliced, then by slice; the slices of one kind are disjoint and cover all rows.
    """
    kinds = {
        "history length": (history, HISTORY_SLICES),
        "training rows of the item": (item_rows, ITEM_SLICES),
        "user in training": (user_rows, USER_SLICES),
    }
    return {
        kind: {
            name: (values >= low) & (values <= (np.inf if high is None else high))
            for name, low, high in bounds
        }
        for kind, (values, bounds) in kinds.items()
    }


def slice_metrics(label: np.ndarray, score: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """``auc`` (NaN where one class only), ``logloss`` and number of ``rows`` under a mask."""
    label, score = label[mask], score[mask]
    return {"auc": auc(label, score), "logloss": logloss(label, score), "rows": len(label)}

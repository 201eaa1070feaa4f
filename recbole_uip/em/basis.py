r"""Directions in which users differ, not in which items differ.

Item vectors are centred and whitened by their second moment over training events (the Fisher
information of the scores, :math:`H = E[g g^\top]`). In that space the between-user covariance B of
the weighted mean scores is estimated without bias from two halves of each user's events, whose
noises are independent,

.. math:: B = \frac{\sum_u w_u (y_u^A - \mu) (y_u^B - \mu)^\top}{\sum_u w_u},

made symmetric, with w_u the number of events in the smaller half, up to :data:`MOST_WEIGHT`, and
:math:`\mu` the mean of both halves. Its leading eigenvectors are the basis, their eigenvalues the
prior variances. (The control, ``directions: fisher``, takes the leading eigenvectors of H, and the
variances that B has along them.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
from threadpoolctl import threadpool_limits

from recbole_uip.behaviours import DataError
from recbole_uip.em.weights import Evidence

__all__ = ["Basis", "Whitening", "fit", "merge", "supported_directions", "whiten"]

SMALLEST_VARIANCE = 1e-6
# Item directions with less than this share of the largest second moment are rounding errors. Those
# of LM scores fall off so steeply that ten times as much would lose what users differ in.
EMPTY_SHARE = 1e-6
# Vectors up to this wide are decomposed in double precision, which such small shares need.
EXACT_WIDTH = 1024
# Floor of a direction's noise, as a share of the noisiest direction's.
LEAST_NOISE = 1e-2
# Floor of the noise within users, as a share of the second moment over all events.
LEAST_WITHIN = 0.1
# Events past this many no longer make a user's mean a better sample of how users differ.
MOST_WEIGHT = 20.0
# Users whose means are in memory at a time.
USERS_A_BLOCK = 512
# Numbers of leading item directions that are tried.
DIRECTIONS = (32, 128)


@dataclass(frozen=True)
class Basis:
    """Item vectors in between-user directions, scaled so that one event has unit noise.

    Attributes
    ----------
    vectors : ndarray of float64, shape (n_items, rank)
    mean : ndarray of float64, shape (rank,)
        Mean offset over users.
    variance : ndarray of float64, shape (rank,)
        Prior (between-user) variance of the offset, in units of one event's noise.
    directions : tuple of ndarray, each of shape (m, rank)
        For each fold of users, the map from whitened item vectors to these.
    """

    vectors: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    directions: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Whitening:
    """Centred and whitened item vectors, and the map that made them.

    Attributes
    ----------
    vectors : ndarray of float64, shape (n_items, m)
        Leading directions first. Over events, the mean is zero and the second moment the identity.
    mean : ndarray, shape (d,)
        Mean over events, in the given coordinates.
    factors : tuple of ndarray
        Matrices whose product is the map from centred vectors, shape (d, m).
    """

    vectors: np.ndarray
    mean: np.ndarray
    factors: tuple[np.ndarray, ...]

    def directions(self) -> np.ndarray:
        """The map from centred vectors, shape (d, m)."""
        return functools.reduce(np.matmul, self.factors)


def whiten(vectors: np.ndarray, item_counts: np.ndarray, keep: int | None = None) -> Whitening:
    """Centre and whiten item vectors over events, leading directions first.

    Directions with less than :data:`EMPTY_SHARE` of the largest eigenvalue are dropped.

    Parameters
    ----------
    vectors : ndarray of float32 or float64, shape (n_items, d)
        The decomposition is done in this precision, or in float64 up to :data:`EXACT_WIDTH`.
    item_counts : ndarray, shape (n_items,)
        Number of training events of each item.
    keep : int, optional
        Largest number of directions kept.

    Returns
    -------
    Whitening
        Of at most ``keep`` directions.
    """
    if vectors.shape[1] <= EXACT_WIDTH:
        vectors = vectors.astype(np.float64)
    share = (item_counts / item_counts.sum()).astype(vectors.dtype)
    mean = share @ vectors
    centred = vectors - mean
    root = np.sqrt(share)
    n_items, dim = centred.shape
    if dim <= n_items:
        weighted = centred * root[:, None]
        values, directions = _eigh(weighted.T @ weighted)
        before, factors = centred, ()
    else:
        # The Gram matrix has the same non-zero spectrum, and is smaller.
        inner = centred @ centred.T
        values, left = _eigh(inner * np.outer(root, root))
        scale = np.sqrt(np.maximum(values, np.finfo(values.dtype).tiny))
        directions = left * root[:, None] / scale
        before, factors = inner, (centred.T,)
    order = np.argsort(-values)[: min(keep or dim, n_items, dim)]
    # What centring leaves of equal vectors is no direction either.
    rounding = n_items * np.finfo(values.dtype).eps ** 2 * float(share @ (vectors**2).sum(axis=1))
    order = order[values[order] > max(EMPTY_SHARE * values[order[0]], rounding)]
    last = directions[:, order] / np.sqrt(values[order])
    return Whitening((before @ last).astype(np.float64), mean, (*factors, last))


def fit(
    whitened: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    evidence: Evidence,
    n_users: int,
    rank: int,
    directions: str = "between",
) -> Basis:
    """Leading directions and what is known of users along them, from training events.

    By default these are the leading eigenvectors of the between-user covariance.

    Parameters
    ----------
    whitened : ndarray, shape (n_items, m)
        Leading directions first. How many of them the data can bear is decided by
        :func:`supported_directions`.
    user, item : ndarray of int64, shape (n_events,)
        Training events, each user's in the order of time (so that alternate events make two
        comparable halves).
    evidence : Evidence
        Of the same events. One on an item whose vector is zero is none.
    n_users : int
    rank : int
        Number of directions, at most m. One whose estimated variance is not positive keeps a
        tiny prior variance, so that every fold has the same rank.
    directions : {"between", "fisher"}
        ``fisher`` takes the leading whitened directions as they are, those of most Fisher
        information; mean, variance and noise along them are estimated the same way.

    Raises
    ------
    DataError
        If no event is evidence, all evidence is of items without a vector, or no user has
        evidence in both halves of their events.
    """
    if not evidence.weight.any():
        raise DataError(
            "no training event is evidence by the facet's weight, for none is of its kind (liked, "
            "disliked): leave the facet out, or set threshold so that both kinds occur"
        )
    told = whitened.any(axis=1)[item]
    if not (told & (evidence.weight != 0)).any():
        raise DataError(
            "the items of its training events have no vectors (no texts, or none that differ): "
            "leave the facet out, or give them texts"
        )
    evidence = Evidence(evidence.weight * told, evidence.count * told)
    first, second, user_weight = _halves(user, item, evidence, (n_users, len(whitened)))
    mean = (user_weight @ first + user_weight @ second) @ whitened / (2 * user_weight.sum())
    # Two groups of users, for choosing the number of directions; their sum is the estimate.
    groups = [
        _cross_covariance(first[group::2], second[group::2], user_weight[group::2], whitened, mean)
        for group in (0, 1)
    ]
    between = (groups[0] + groups[1]) / user_weight.sum()
    if directions == "fisher":
        keep = rank
        values, chosen = np.diag(between)[:rank], np.eye(rank)
    else:
        keep = supported_directions(groups, rank)
        values, chosen = _leading(between[:keep, :keep], rank)
    vectors = whitened[:, :keep] @ chosen
    noise = _event_noise(vectors, item, evidence, values + (mean[:keep] @ chosen) ** 2)
    scaled = np.zeros((whitened.shape[1], rank))
    scaled[:keep] = chosen / np.sqrt(noise)
    return Basis(
        vectors=vectors / np.sqrt(noise),
        mean=mean @ scaled,
        variance=np.maximum(values / noise, SMALLEST_VARIANCE),
        directions=(scaled,),
    )


def merge(bases: Sequence[Basis]) -> Basis:
    """One frame for the bases of several folds of users, so that users can be compared.

    Each fold's basis is turned to the first one's by the rotation that brings the item vectors
    closest (orthogonal Procrustes); means and variances are averaged in that frame.

    Returns
    -------
    Basis
        With vectors of shape (n_folds * n_items, rank), fold by fold.
    """
    first = bases[0]
    rotations = [
        scipy.linalg.orthogonal_procrustes(basis.vectors, first.vectors)[0] for basis in bases
    ]
    pairs = list(zip(bases, rotations, strict=True))
    return Basis(
        vectors=np.concatenate([basis.vectors @ rotation for basis, rotation in pairs]),
        mean=np.mean([basis.mean @ rotation for basis, rotation in pairs], axis=0),
        variance=np.mean([basis.variance @ rotation**2 for basis, rotation in pairs], axis=0),
        directions=tuple(basis.directions[0] @ rotation for basis, rotation in pairs),
    )


def supported_directions(groups: list[np.ndarray], rank: int) -> int:
    """Number of leading item directions in which a basis of ``rank`` generalises best.

    In m directions a between-user covariance has m^2 numbers, and few users cannot bear many:
    its leading eigenvectors are then noise. So the basis of either group of users is judged by
    the between-user variance that it finds in the other group.

    Parameters
    ----------
    groups : two ndarrays, shape (m, m)
        Between-user covariances, times the groups' weights.
    rank : int
    """
    m = len(groups[0])
    candidates = sorted({min(m, max(rank, size)) for size in DIRECTIONS} | {m})

    def captured(keep: int) -> float:
        total = 0.0
        for own, other in (groups, groups[::-1]):
            _, directions = _leading(own[:keep, :keep], rank)
            total += np.einsum("ij,ik,kj->", directions, other[:keep, :keep], directions)
        return total

    return max(candidates, key=captured)


def _cross_covariance(
    first: scipy.sparse.csr_array,
    second: scipy.sparse.csr_array,
    user_weight: np.ndarray,
    whitened: np.ndarray,
    mean: np.ndarray,
) -> np.ndarray:
    """sum_u w_u (a_u - mean) (b_u - mean)', made symmetric, shape (m, m).

    a_u and b_u are the mean scores of the halves that :func:`_halves` gives.
    """
    m = whitened.shape[1]
    total = np.zeros((m, m))
    # Of many users, means in so many directions are gigabytes: a block of them stays in the cache.
    for at in range(0, len(user_weight), USERS_A_BLOCK):
        block = slice(at, at + USERS_A_BLOCK)
        a, b = (half[block] @ whitened - mean for half in (first, second))
        total += (a * user_weight[block, None]).T @ b
    return (total + total.T) / 2


def _eigh(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues, smallest first, and their eigenvectors.

    By one thread: a decomposition is thousands of small steps, after each of which threads wait
    for one another. Two save a third of the time while nothing else runs, and take tens of times
    as long as one beside other work.
    """
    with threadpool_limits(1, user_api="blas"):
        return scipy.linalg.eigh(symmetric, driver="evd")


def _leading(symmetric: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``rank`` largest eigenvalues and their eigenvectors, largest first."""
    m = len(symmetric)
    values, vectors = scipy.linalg.eigh(symmetric, subset_by_index=[max(m - rank, 0), m - 1])
    return values[::-1], vectors[:, ::-1]


def _halves(
    user: np.ndarray, item: np.ndarray, evidence: Evidence, shape: tuple[int, int]
) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array, np.ndarray]:
    """Weights by which item vectors make the mean scores of two halves of each user's events.

    Parameters
    ----------
    user, item : ndarray of int64, shape (n_events,)
        Each user's events in the order of time, of which every other one makes a half.
    evidence : Evidence
        Of the same events.
    shape : (n_users, n_items)

    Returns
    -------
    first, second : csr_array of float64, shape (n, n_items)
        Of the n users that both halves know.
    weight : ndarray of float64, shape (n,)
        A user's number of events in the smaller half, at most :data:`MOST_WEIGHT`.

    Raises
    ------
    DataError
        If fewer than two users have evidence in both halves.
    """
    counted = np.flatnonzero(evidence.count > 0)
    counted = counted[np.argsort(user[counted], kind="stable")]
    position = np.arange(len(counted)) - np.searchsorted(user[counted], user[counted])
    halves, counts = [], []
    for parity in (0, 1):
        chosen = counted[position % 2 == parity]
        of, on = user[chosen], item[chosen]
        count = np.bincount(of, weights=evidence.count[chosen], minlength=shape[0])
        share = evidence.weight[chosen] / count[of]
        halves.append(scipy.sparse.csr_array((share, (of, on)), shape=shape))
        counts.append(count)
    smaller = np.minimum(*counts)
    both = np.flatnonzero(smaller > 0)
    if len(both) < 2:
        raise DataError(
            f"only {len(both)} users have two training events that count as evidence: "
            "a basis of between-user directions needs at least 2; leave the facet out"
        )
    first, second = (half[both] for half in halves)
    return first, second, np.minimum(smaller[both], MOST_WEIGHT)


def _event_noise(
    vectors: np.ndarray, item: np.ndarray, evidence: Evidence, of_users: np.ndarray
) -> np.ndarray:
    """Within-user variance of one event's weighted score, per direction.

    It is what users' offsets, of second moment ``of_users``, leave of the events' second moment.
    Where the facet's events are on fewer items than there are directions, some have none. Other
    items' vectors, which are divided by its root, must stay within reason.
    """
    counted = evidence.count > 0
    mass = np.bincount(item[counted], weights=evidence.weight[counted] ** 2, minlength=len(vectors))
    second_moment = mass @ vectors**2 / counted.sum()
    noise = np.maximum(second_moment - of_users, LEAST_WITHIN * second_moment)
    return np.maximum(noise, LEAST_NOISE * noise.max() + np.finfo(float).tiny)

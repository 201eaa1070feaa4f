r"""Soft tokens in coordinates, and the behaviours that move them.

A profile u has G soft tokens, one a facet. They are written in coordinates :math:`a_u`,

.. math:: \theta_{uf} = \theta^0_f + M_f a_{uf},

where :math:`M_f` is scaled so that the score of one behaviour has about unit variance in each
coordinate. Far from token embeddings an LM has seen nothing, and its likelihood is flat there: no
soft token goes further from :math:`\theta^0` than tokens are long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse

__all__ = [
    "Expansion", "Frame", "Units", "curvature_of", "secant_sums", "spread_sums", "sums_by_owner",
]  # fmt: skip


RATE_SHARES = (0.075, 0.225, 0.75)


@dataclass(frozen=True)
class Units:
    """What profiles did, in pieces that the likelihood reads whole.

    Attributes
    ----------
    first : ndarray of int64, shape (n_profiles + 1,)
        Where each profile's units start.
    passage : ndarray of int64, shape (n_units,)
        Which text each reads: units of one number have one likelihood.
    cost : ndarray of int64, shape (n_units,)
        LM tokens of each.
    active : ndarray of float64, shape (n_units, G)
        Behaviours in it that are evidence of each facet. A facet of which it is none has its
        soft token at θ⁰.
    value : ndarray of float64, shape (n_units,)
        ℓ at θ⁰; NaN where not known.
    gradient : ndarray of float32, shape (n_units, R)
        Its gradient in the coordinates at θ⁰; zeros where not known.
    """

    first: np.ndarray
    passage: np.ndarray
    cost: np.ndarray
    active: np.ndarray
    value: np.ndarray
    gradient: np.ndarray

    @property
    def owner(self) -> np.ndarray:
        """Profile of each unit, shape (n_units,)."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    def of(self, profiles: np.ndarray) -> np.ndarray:
        """The units of ``profiles``, profile by profile, shape (m,)."""
        return np.concatenate([np.arange(self.first[u], self.first[u + 1]) for u in profiles])

    @property
    def evidence(self) -> np.ndarray:
        """N of each profile and facet, shape (n_profiles, G)."""
        sums = np.concatenate([np.zeros((1, self.active.shape[1])), self.active.cumsum(axis=0)])
        return np.diff(sums[self.first], axis=0)


@dataclass(frozen=True)
class Frame:
    """The coordinates of G soft tokens, R in all.

    Attributes
    ----------
    theta0 : ndarray, shape (G, d)
    maps : tuple of ndarray, each of shape (n_folds, d, rank of the facet)
        M of each facet, for each fold of users.
    variance : tuple of ndarray, each of shape (rank,)
        Between-user variance of each facet, the prior before there is a codebook.
    reach : float
        Longest move of a soft token from θ⁰.
    """

    theta0: np.ndarray
    maps: tuple[np.ndarray, ...]
    variance: tuple[np.ndarray, ...]
    reach: float = np.inf

    @property
    def slices(self) -> list[slice]:
        """Where each facet's coordinates are among the R."""
        ends = np.cumsum(self.ranks).tolist()
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    @property
    def ranks(self) -> list[int]:
        """Number of coordinates of each facet."""
        return [each.shape[2] for each in self.maps]

    @property
    def size(self) -> int:
        """Number of coordinates R."""
        return sum(self.ranks)

    @property
    def room(self) -> list[float]:
        """How far each facet's soft token may go along a coordinate, in units of it; the mean.

        Where it is far below 1, first orders say how users differ in what the LM hardly varies in,
        and steps within reach say little of that.
        """
        lengths = [np.linalg.norm(maps, axis=1) for maps in self.maps]
        return [float(np.mean(self.reach / np.maximum(each, 1e-30))) for each in lengths]

    @property
    def learning_rates(self) -> list[float]:
        """Those of which ``auto`` takes one: shares of the entries of a token as long as ``reach``.

        The root mean square of these is 1 where the reach has no end.
        """
        entry = self.reach / np.sqrt(self.theta0.shape[1]) if np.isfinite(self.reach) else 1.0
        return [share * float(entry) for share in RATE_SHARES]

    def within(self, where: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Coordinates (n, R), each facet's drawn back until its soft token is within ``reach``."""
        where = where.copy()
        for part, maps in zip(self.slices, self.maps, strict=True):
            for chosen, each in _by_fold(fold, maps):
                length = np.linalg.norm(where[chosen, part] @ each.T, axis=1)
                far = length > self.reach
                where[chosen[far], part] *= (self.reach / length[far])[:, None]
        return where

    def tokens(self, where: np.ndarray, fold: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Soft tokens at coordinates (n, R), θ⁰ where not active; float32, shape (n, G, d)."""
        theta = np.repeat(self.theta0[None].astype(np.float32), len(where), axis=0)
        for f, (part, maps) in enumerate(zip(self.slices, self.maps, strict=True)):
            for chosen, each in _by_fold(fold, maps):
                mask = (active[chosen, f] > 0)[:, None]
                theta[chosen, f] += mask * (where[chosen, part] @ each.T)
        return theta

    def pull(self, gradient: np.ndarray, fold: np.ndarray, active: np.ndarray) -> np.ndarray:
        """A gradient (n, G, d) in soft tokens as one in the coordinates; float32, shape (n, R)."""
        pulled = np.empty((len(gradient), self.size), np.float32)
        for f, (part, maps) in enumerate(zip(self.slices, self.maps, strict=True)):
            for chosen, each in _by_fold(fold, maps):
                mask = (active[chosen, f] > 0)[:, None]
                pulled[chosen, part] = mask * (gradient[chosen, f] @ each)
        return pulled

    def steps(self, learning_rate: float) -> np.ndarray:
        """Step of each coordinate that moves soft tokens' entries by about ``learning_rate``.

        In the root mean square over entries, if each coordinate moves by its step; shape (R,).
        """
        steps = [
            np.full(maps.shape[2], np.sqrt(maps.shape[1] / (maps**2).sum(axis=(1, 2)).mean()))
            for maps in self.maps
        ]
        return learning_rate * np.concatenate(steps)


def _by_fold(fold: np.ndarray, maps: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of each fold there is, and the fold's map."""
    for number in np.unique(fold):
        yield np.flatnonzero(fold == number), maps[number]


def secant_sums(
    frame: Frame, active: np.ndarray, moved: np.ndarray, change: np.ndarray
) -> np.ndarray:
    """Curvature of each facet and its weight, summed over behaviours: their quotient is c.

    Parameters
    ----------
    frame : Frame
    active : ndarray, shape (n, G)
    moved, change : ndarray, shape (n, R)
        Between two visits to each behaviour, of the coordinates and of the gradient.

    Returns
    -------
    ndarray of float64, shape (G, 2)
    """
    sums = np.zeros((len(frame.maps), 2))
    for f, part in enumerate(frame.slices):
        sums[f, 0] = -(moved[:, part] * change[:, part]).sum()
        sums[f, 1] = (active[:, f] * (moved[:, part] ** 2).sum(axis=1)).sum()
    return sums


def curvature_of(secant: np.ndarray) -> np.ndarray:
    """c of each facet by sums (G, 2) of :func:`secant_sums`; where nothing moved it is 1.

    At least 1, the Fisher information at θ⁰.
    """
    curvature = np.ones(len(secant))
    moved = secant[:, 1] > 0
    curvature[moved] = secant[moved, 0] / secant[moved, 1]
    return np.maximum(curvature, 1.0)


def spread_sums(
    frame: Frame,
    active: np.ndarray,
    gradient: np.ndarray,
    visited: np.ndarray,
    owner: np.ndarray,
    n: int,
) -> np.ndarray:
    """How behaviours' gradients and places scatter about their profile's means.

    Gradients of different places tell how behaviours differ once they are moved to one place by
    the curvature c: h = g + c w a, for a unit of w behaviours with gradient g at a. The sums are
    those of which the squares of h about its mean are made, for any c.

    Parameters
    ----------
    frame : Frame
    active : ndarray, shape (m, G)
        Behaviours w in each unit, over which its gradient is a sum.
    gradient, visited : ndarray, shape (m, R)
    owner : ndarray of int64, shape (m,)
    n : int
        Number of profiles.

    Returns
    -------
    ndarray of float64, shape (G, 4)
        Sums of squares of g, of products of g and a, of squares of a; and degrees of freedom.
    """
    sums = np.zeros((len(frame.maps), 4))
    for f, (part, rank) in enumerate(zip(frame.slices, frame.ranks, strict=True)):
        on = np.flatnonzero(active[:, f] > 0)
        who, weight = owner[on], active[on, f, None]
        count = np.maximum(np.bincount(who, weight[:, 0], n), 1.0)[:, None]
        g, a = (values[on, part].astype(np.float64) for values in (gradient, visited))
        g = g / weight - (sums_by_owner(g, who, n) / count)[who]
        a = a - (sums_by_owner(weight * a, who, n) / count)[who]
        freedom = rank * (len(on) - len(np.unique(who)))
        sums[f] = (weight * g * g).sum(), (weight * g * a).sum(), (weight * a * a).sum(), freedom
    return sums


@dataclass(frozen=True)
class Expansion:
    """Sums over the behaviours of n profiles, of which a quadratic likelihood is made.

    Each unit has ℓ and its gradient g at a place a of its own, and w behaviours.

    Attributes
    ----------
    gradient, place : ndarray of float64, shape (n, R)
        Σ g and Σ w a.
    linear, square : ndarray of float64, shape (n, G)
        Σ <g, a> and Σ w |a|².
    """

    gradient: np.ndarray
    place: np.ndarray
    linear: np.ndarray
    square: np.ndarray

    @classmethod
    def of(
        cls,
        frame: Frame,
        active: np.ndarray,
        gradient: np.ndarray,
        visited: np.ndarray,
        owner: np.ndarray,
        n: int,
    ) -> Expansion:
        """The sums over units, given as to :func:`spread_sums`."""
        weight = np.repeat(active, frame.ranks, axis=1)
        ends = np.cumsum([0, *frame.ranks])[:-1]
        gradient, visited = gradient.astype(np.float64), visited.astype(np.float64)
        linear, square = (
            np.add.reduceat(each, ends, axis=1)
            for each in (gradient * visited, weight * visited**2)
        )
        parts = gradient, weight * visited, linear, square
        return cls(*(sums_by_owner(each, owner, n) for each in parts))

    def __add__(self, other: Expansion) -> Expansion:
        return Expansion(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: Expansion) -> Expansion:
        return Expansion(*(a - b for a, b in zip(self, other, strict=True)))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(vars(self).values())

    def offset(self, part: slice, count: np.ndarray, curvature: float) -> np.ndarray:
        """Where the likelihood of ``count`` behaviours each is highest, shape (n, rank)."""
        count = count[:, None]
        return (self.place[:, part] + self.gradient[:, part] / curvature) / count

    def rise(
        self, f: int, part: slice, count: np.ndarray, curvature: float, where: np.ndarray
    ) -> np.ndarray:
        """By how much the likelihood at ``where`` (n, rank) is more than Σ ℓ, shape (n,)."""
        linear = (where * self.gradient[:, part]).sum(axis=1) - self.linear[:, f]
        square = count * (where**2).sum(axis=1) + self.square[:, f]
        square -= 2.0 * (where * self.place[:, part]).sum(axis=1)
        return linear - 0.5 * curvature * square


def sums_by_owner(rows: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    """Sums of rows (m, R) by owner, shape (n, R), in the order of the rows."""
    # a product with ones, which adds row by row as numpy.add.at does, many times faster
    places = owner, np.arange(len(owner))
    return (
        scipy.sparse.csr_array((np.ones_like(rows, shape=len(rows)), places), (n, len(rows))) @ rows
    )

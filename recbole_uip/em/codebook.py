r"""What every codebook has: codewords, a rule that gives a measured offset its code, a likelihood.

.. math:: z_u \sim \mathrm{Cat}(\pi), \quad \delta_u \mid z_u = k \sim N(e_k, \mathrm{diag}\,
          \sigma^2), \quad y_u \mid \delta_u \sim N(\delta_u, \nu_u I),

which is extreme deconvolution (Bovy, Hogg and Roweis 2011) with a shared diagonal covariance.
:mod:`recbole_uip.em.mixture` fits all of it by EM. :mod:`recbole_uip.em.quantizers` finds the
codewords e_k in other ways, and only :math:`\pi` and :math:`\sigma^2` by EM.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import scipy.special
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits

from recbole_uip.behaviours import DataError
from recbole_uip.em.kernels import nearest_codes

__all__ = [
    "Codebook",
    "Level",
    "check_samples",
    "component_log_densities",
    "moments",
    "n_distinct",
    "perplexity",
    "unpack",
]


def component_log_densities(
    offsets: np.ndarray, noise: np.ndarray, codewords: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """log N(y_u; e_k, diag(sigma^2) + nu_u I).

    Parameters
    ----------
    offsets : ndarray, shape (n, r)
        Measured offsets y.
    noise : ndarray, shape (n,)
        Noise variances nu.
    codewords : ndarray, shape (K, r)
    variance : ndarray, shape (r,)
        Within-code variances sigma^2.

    Returns
    -------
    ndarray, shape (n, K)
    """
    # Moving all of it changes no distance, but what rounding makes of it.
    centre = codewords.mean(axis=0)
    offsets, codewords = offsets - centre, codewords - centre
    total = variance + noise[:, None]
    precision = 1.0 / total
    # sum_d precision (y - e)^2, multiplied out so that both products are matrix products.
    distance = (precision * offsets**2).sum(axis=1)[:, None]
    distance = distance - 2.0 * (precision * offsets) @ codewords.T + precision @ (codewords**2).T
    log_norm = np.log(2.0 * np.pi * total).sum(axis=1)
    return -0.5 * (log_norm[:, None] + distance)


def perplexity(weights: np.ndarray) -> float:
    """exp of the entropy of code usage: the number of codes in effective use."""
    return float(np.exp(-scipy.special.xlogy(weights, weights).sum()))


def moments(offsets: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rough mean and variance of the profiles behind measured offsets, each of shape (r,)."""
    mean = np.average(offsets, axis=0, weights=1.0 / (1.0 + noise))
    spread = (offsets - mean) ** 2
    variance = np.maximum(np.average(spread, axis=0, weights=1.0 / (1.0 + noise)), 1e-12)
    return mean, np.maximum(variance - np.median(noise), 0.1 * variance)


def n_distinct(samples: np.ndarray) -> int:
    """Number of distinct rows."""
    return len(np.unique(samples, axis=0))


class Level(NamedTuple):
    """What :attr:`Codebook.packed` hold.

    Attributes
    ----------
    log_weights : ndarray, shape (K,)
    codewords : ndarray, shape (K, r)
    variance : ndarray, shape (r,)
    """

    log_weights: np.ndarray
    codewords: np.ndarray
    variance: np.ndarray

    def pack(self) -> np.ndarray:
        """All of it, flat, codewords direction by direction, as compiled code reads it."""
        return np.concatenate([self.log_weights, self.codewords.T.ravel(), self.variance])


def unpack(packed: np.ndarray, n_codes: int, rank: int) -> list[Level]:
    """The levels whose :attr:`Codebook.packed` lie one after another in ``packed``."""
    levels = []
    for one in np.asarray(packed).reshape(-1, n_codes * (1 + rank) + rank):
        log_weights, codewords, variance = np.split(one, [n_codes, n_codes * (1 + rank)])
        levels.append(Level(log_weights, codewords.reshape(rank, n_codes).T.copy(), variance))
    return levels


class Codebook(BaseEstimator):
    """Template of a codebook: :meth:`fit`, and all that follows from what was fitted.

    A subclass has ``_initialize``, which draws where to start, and ``_fit_single``, which fits
    from there and returns the learned attributes.

    Parameters
    ----------
    n_codes : int
        Size K of the codebook.
    max_iter : int
        Largest number of iterations.
    tol : float
        Iterations stop when the objective per sample, in nats, improves by less than this.
    n_init : int
        Number of restarts; the best lower bound is kept.
    start : ndarray, optional
        :attr:`packed` of a fitted codebook to start from, once.
    random_state : int, RandomState or None

    Attributes
    ----------
    weights_ : ndarray of shape (K,)
        Mixing proportions pi.
    codewords_ : ndarray of shape (K, r)
        Means e, most used code first.
    variance_ : ndarray of shape (r,)
        Within-code variances sigma^2.
    converged_ : bool
        Whether the best restart met ``tol``.
    n_iter_ : int
        Its number of iterations.
    lower_bound_ : float
        Its log-likelihood per sample.
    lower_bounds_ : list of float
        The log-likelihood per sample before each step of EM.
    reseeded_ : list of int
        Iterations at which unused codes were re-seeded.
    usage_ : ndarray of shape (K,)
        Share of the training samples assigned to each code.
    perplexity_ : float
        Of ``usage_``.
    """

    #: What it is called in a warning.
    method = ""

    def __init__(
        self,
        n_codes: int = 32,
        *,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        start: np.ndarray | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_codes = n_codes
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.start = start
        self.random_state = random_state

    def fit(self, offsets: np.ndarray, noise: np.ndarray) -> Codebook:
        """Estimate the codebook.

        Parameters
        ----------
        offsets : array-like, shape (n, r)
            Measured offsets y.
        noise : array-like, shape (n,)
            Their noise variances, in the same units.

        Raises
        ------
        DataError
            If there are fewer samples than codes.
        ValueError
            If a shape or a value is wrong.
        """
        offsets, noise = check_samples(offsets, noise)
        if len(offsets) < self.n_codes:
            raise DataError(
                f"n_codes={self.n_codes} needs at least as many samples, but got {len(offsets)}: "
                "lower codes, or raise uip_codebook.sample if that is lower"
            )
        random_state = check_random_state(self.random_state)
        best = None
        # k-means adds its threads' sums as they end: by one thread, a seed has one result.
        with threadpool_limits(1):
            for _ in range(self.n_init if self.start is None else 1):
                self._initialize(offsets, noise, random_state)
                run = self._fit_single(offsets, noise)
                if best is None or run["lower_bound_"] > best["lower_bound_"]:
                    best = run
        for name, value in best.items():
            setattr(self, name, value)
        if not self.converged_:
            warnings.warn(
                f"{self.method} did not converge in max_iter={self.max_iter} iterations; raise "
                "max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.reorder(np.argsort(-self.weights_, kind="stable"))
        codes = self.predict(offsets, noise)
        self.usage_ = np.bincount(codes, minlength=self.n_codes) / len(codes)
        self.perplexity_ = perplexity(self.usage_)
        return self

    def reorder(self, order: np.ndarray) -> None:
        """Give code ``order[k]`` the number k."""
        self.weights_, self.codewords_ = self.weights_[order], self.codewords_[order]

    def predict(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Code of each offset by :attr:`packed`, shape (n,)."""
        check_is_fitted(self)
        return nearest_codes(*check_samples(offsets, noise), self.packed, self.n_codes, 1)[:, 0]

    @property
    def packed(self) -> np.ndarray:
        """The rule that gives an offset its code: a :class:`Level`, flat."""
        with np.errstate(divide="ignore"):
            log_weights = np.log(self.weights_)
        return Level(log_weights, self.codewords_, self.variance_).pack()

    def predict_proba(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Responsibilities r_uk, shape (n, K); rows sum to one."""
        check_is_fitted(self)
        return scipy.special.softmax(self._log_joint(*check_samples(offsets, noise)), axis=1)

    def score_samples(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Log-likelihood of each offset, in nats, shape (n,)."""
        check_is_fitted(self)
        return scipy.special.logsumexp(self._log_joint(*check_samples(offsets, noise)), axis=1)

    def score(self, offsets: np.ndarray, noise: np.ndarray) -> float:
        """Mean log-likelihood of the offsets, in nats."""
        return float(self.score_samples(offsets, noise).mean())

    def posterior_mean(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """E[delta_u | y_u] = sum_k r_uk m_uk, shape (n, r)."""
        check_is_fitted(self)
        offsets, noise = check_samples(offsets, noise)
        shrinkage = self.variance_ / (self.variance_ + noise[:, None])
        prior = self.predict_proba(offsets, noise) @ self.codewords_
        return prior + shrinkage * (offsets - prior)

    def _initialize(
        self, offsets: np.ndarray, noise: np.ndarray, random_state: np.random.RandomState
    ) -> None:
        raise NotImplementedError

    def _fit_single(self, offsets: np.ndarray, noise: np.ndarray) -> dict:
        raise NotImplementedError

    def _log_joint(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        densities = component_log_densities(offsets, noise, self.codewords_, self.variance_)
        return densities + np.log(self.weights_)

    def _e_step(self, offsets: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # logsumexp and softmax share the exponentials, which dominate an iteration.
        responsibilities = self._log_joint(offsets, noise)
        top = responsibilities.max(axis=1, keepdims=True)
        responsibilities -= top
        np.exp(responsibilities, out=responsibilities)
        total = responsibilities.sum(axis=1, keepdims=True)
        responsibilities /= total
        return (top + np.log(total))[:, 0], responsibilities

    def _m_step(
        self,
        offsets: np.ndarray,
        noise: np.ndarray,
        responsibilities: np.ndarray,
        *,
        move: bool = True,
    ) -> None:
        """M-step of the equations of :mod:`recbole_uip.em.mixture`.

        With s = sigma^2 / (sigma^2 + nu) the posterior mean is m_uk = e_k + s (y - e_k) and the
        posterior variance v_u = s nu. Unless ``move``, codewords stay where they are.
        """
        n, centre = len(offsets), self.codewords_.mean(axis=0)
        offsets, old = offsets - centre, self.codewords_ - centre
        shrinkage = self.variance_ / (self.variance_ + noise[:, None])
        # m_uk = a_u + b_u e_k with a = s y and b = 1 - s, so that every sum over samples is one
        # of the columns of a single matrix product, and the rest is of the codebook's size.
        a, b = shrinkage * offsets, 1.0 - shrinkage
        sums = responsibilities.T @ np.concatenate([a, b, a * b, b * b], axis=1)
        sum_a, sum_b, sum_ab, sum_bb = np.split(sums, 4, axis=1)
        mass = np.maximum(responsibilities.sum(axis=0), np.finfo(float).tiny)
        new = (sum_a + sum_b * old) / mass[:, None] if move else old
        # sum_uk r_uk (m_uk - e_k)^2, multiplied out.
        squares = (a**2 + shrinkage * noise[:, None]).sum(axis=0) + (
            sum_bb * old**2
            + mass[:, None] * new**2
            + 2.0 * (sum_ab * old - sum_a * new - sum_b * old * new)
        ).sum(axis=0)
        self.codewords_ = new + centre
        self.weights_ = mass / n
        self.variance_ = np.maximum(squares / n, self._floor)


def check_samples(offsets: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measured offsets and noise as arrays of float64.

    Raises
    ------
    ValueError
        If a shape or a value is wrong.
    """
    offsets, noise = np.asarray(offsets, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    if offsets.ndim != 2 or noise.shape != (len(offsets),):
        raise ValueError(
            f"offsets must have shape (n, r) and noise (n,), got {offsets.shape} and {noise.shape}"
        )
    if not (np.isfinite(offsets).all() and np.isfinite(noise).all()):
        raise ValueError("offsets and noise must be finite: leave out users without evidence")
    if (noise < 0).any():
        raise ValueError(f"noise must not be negative, got {noise.min()}")
    return offsets, noise

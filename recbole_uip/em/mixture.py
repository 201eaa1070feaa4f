r"""The codebook: a mixture prior over profiles, fitted by EM under known per-user noise.

.. math:: z_u \sim \mathrm{Cat}(\pi), \quad \delta_u \mid z_u = k \sim N(e_k, \mathrm{diag}\,
          \sigma^2), \quad y_u \mid \delta_u \sim N(\delta_u, \nu_u I),

which is extreme deconvolution (Bovy, Hogg and Roweis 2011) with a shared diagonal covariance.
The codewords e_k are the codebook, the code of a user is the component of largest
responsibility, and :math:`\nu_u` falls as more is known of a user.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.special
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from recbole_uip.em.kernels import nearest_codes

__all__ = ["CodebookMixture", "ResidualCodebook", "component_log_densities", "perplexity"]

# An outlier can empty its code again and again; EM has to be let end.
MAX_RESEEDS = 10
KMEANS_STEPS = 10


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


class CodebookMixture:
    """Gaussian mixture with shared diagonal covariance and known isotropic noise per sample.

    Parameters
    ----------
    n_codes : int
        Size K of the codebook.
    max_iter : int
        Largest number of EM iterations.
    tol : float
        EM stops when the lower bound per sample rises by less.
    n_init : int
        Number of restarts; the best lower bound is kept.
    min_share : float
        A code with less than this share of the mean usage is empty and re-seeded, at the
        sample that the mixture explains worst.
    start : ndarray, optional
        :attr:`numbers` of a fitted codebook that EM starts from; k-means by default.
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
        The log-likelihood per sample before each of its iterations. It never falls but where
        an empty code was re-seeded.
    reseeded_ : list of int
        Iterations at which codes were re-seeded, ten at most.
    usage_ : ndarray of shape (K,)
        Share of the training samples assigned to each code.
    perplexity_ : float
        Of ``usage_``.
    """

    def __init__(
        self,
        n_codes: int = 32,
        *,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
        min_share: float = 1e-3,
        start: np.ndarray | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_codes = n_codes
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.min_share = min_share
        self.start = start
        self.random_state = random_state

    def fit(self, offsets: np.ndarray, noise: np.ndarray) -> CodebookMixture:
        """Estimate the codebook by EM.

        Parameters
        ----------
        offsets : array-like, shape (n, r)
            Measured offsets y.
        noise : array-like, shape (n,)
            Their noise variances, in the same units.

        Raises
        ------
        ValueError
            If there are fewer samples than codes, or a value is not finite.
        """
        offsets, noise = _check(offsets, noise)
        if len(offsets) < self.n_codes:
            raise ValueError(
                f"n_codes={self.n_codes} needs at least as many samples, but got {len(offsets)}: "
                "lower codes"
            )
        random_state = check_random_state(self.random_state)
        best = None
        for _ in range(self.n_init):
            self._initialize(offsets, noise, random_state)
            run = self._fit_single(offsets, noise)
            if best is None or run["lower_bound_"] > best["lower_bound_"]:
                best = run
        for name, value in best.items():
            setattr(self, name, value)
        if not self.converged_:
            warnings.warn(
                f"EM did not converge in max_iter={self.max_iter} iterations; raise max_iter or "
                "tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        order = np.argsort(-self.weights_, kind="stable")
        self.weights_, self.codewords_ = self.weights_[order], self.codewords_[order]
        codes = self.predict(offsets, noise)
        self.usage_ = np.bincount(codes, minlength=self.n_codes) / len(codes)
        self.perplexity_ = perplexity(self.usage_)
        return self

    def predict(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Code of largest responsibility, shape (n,)."""
        return nearest_codes(*_check(offsets, noise), self.numbers, self.n_codes, 1)[:, 0]

    @property
    def numbers(self) -> np.ndarray:
        """Log weights, codewords and variance, flat, as compiled code reads them."""
        with np.errstate(divide="ignore"):
            log_weights = np.log(self.weights_)
        return np.concatenate([log_weights, self.codewords_.T.ravel(), self.variance_])

    def predict_proba(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Responsibilities r_uk, shape (n, K); rows sum to one."""
        return scipy.special.softmax(self._log_joint(*_check(offsets, noise)), axis=1)

    def score(self, offsets: np.ndarray, noise: np.ndarray) -> float:
        """Mean log-likelihood of the offsets."""
        return float(
            scipy.special.logsumexp(self._log_joint(*_check(offsets, noise)), axis=1).mean()
        )

    def posterior_mean(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """E[delta_u | y_u] = sum_k r_uk m_uk, shape (n, r)."""
        offsets, noise = _check(offsets, noise)
        shrinkage = self.variance_ / (self.variance_ + noise[:, None])
        prior = self.predict_proba(offsets, noise) @ self.codewords_
        return prior + shrinkage * (offsets - prior)

    def _log_joint(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        densities = component_log_densities(offsets, noise, self.codewords_, self.variance_)
        return densities + np.log(self.weights_)

    def _initialize(
        self, offsets: np.ndarray, noise: np.ndarray, random_state: np.random.RandomState
    ) -> None:
        # Seeds come from offsets shrunk by their noise: k-means++ would else pick the users of
        # whom least is known, for they lie farthest out.
        mean = np.average(offsets, axis=0, weights=1.0 / (1.0 + noise))
        spread = (offsets - mean) ** 2
        variance = np.maximum(np.average(spread, axis=0, weights=1.0 / (1.0 + noise)), 1e-12)
        variance = np.maximum(variance - np.median(noise), 0.1 * variance)
        shrunk = mean + variance / (variance + noise[:, None]) * (offsets - mean)
        self.variance_ = variance
        self._floor = 1e-6 * variance + np.finfo(float).tiny
        if self.start is not None:
            rank, middle = offsets.shape[1], self.n_codes * (1 + offsets.shape[1])
            log_weights, codewords, variance = np.split(self.start, [self.n_codes, middle])
            self.weights_, self.variance_ = np.exp(log_weights), variance
            self.codewords_ = codewords.reshape(rank, self.n_codes).T.copy()
            return
        # A few steps of k-means spare EM a third of its iterations.
        kmeans = KMeans(self.n_codes, n_init=1, max_iter=KMEANS_STEPS, random_state=random_state)
        with warnings.catch_warnings():
            # Fewer distinct samples than codes: EM re-seeds the empty codes.
            warnings.simplefilter("ignore", ConvergenceWarning)
            labels = kmeans.fit_predict(shrunk)
        self.codewords_ = kmeans.cluster_centers_
        shares = np.bincount(labels, minlength=self.n_codes) + 1.0
        self.weights_ = shares / shares.sum()

    def _fit_single(self, offsets: np.ndarray, noise: np.ndarray) -> dict:
        lower_bounds: list[float] = []
        reseeded: list[int] = []
        converged = False
        n_iter = 0
        for n_iter in range(1, self.max_iter + 1):
            log_likelihood, responsibilities = self._e_step(offsets, noise)
            lower_bounds.append(self._compute_lower_bound(log_likelihood))
            if len(reseeded) < MAX_RESEEDS and self._reseed(
                offsets, log_likelihood, responsibilities
            ):
                reseeded.append(n_iter)
                continue
            # A signed change: a bound that falls is a defect, not convergence.
            if n_iter > 1 and 0 <= lower_bounds[-1] - lower_bounds[-2] < self.tol:
                converged = True
                break
            self._m_step(offsets, noise, responsibilities)
        return {
            "weights_": self.weights_,
            "codewords_": self.codewords_,
            "variance_": self.variance_,
            "converged_": converged,
            "n_iter_": n_iter,
            "lower_bound_": lower_bounds[-1],
            "lower_bounds_": lower_bounds,
            "reseeded_": reseeded,
        }

    def _e_step(self, offsets: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # logsumexp and softmax share the exponentials, which dominate an iteration.
        responsibilities = self._log_joint(offsets, noise)
        top = responsibilities.max(axis=1, keepdims=True)
        responsibilities -= top
        np.exp(responsibilities, out=responsibilities)
        total = responsibilities.sum(axis=1, keepdims=True)
        responsibilities /= total
        return (top + np.log(total))[:, 0], responsibilities

    def _m_step(self, offsets: np.ndarray, noise: np.ndarray, responsibilities: np.ndarray) -> None:
        """M-step of the module's equations, with the posterior of delta in closed form.

        With s = sigma^2 / (sigma^2 + nu) the posterior mean is m_uk = e_k + s (y - e_k) and the
        posterior variance v_u = s nu.
        """
        n = len(offsets)
        shrinkage = self.variance_ / (self.variance_ + noise[:, None])
        # m_uk = a_u + b_u e_k with a = s y and b = 1 - s, so that every sum over samples is one
        # of the columns of a single matrix product, and the rest is of the codebook's size.
        a, b = shrinkage * offsets, 1.0 - shrinkage
        sums = responsibilities.T @ np.concatenate([a, b, a * b, b * b], axis=1)
        sum_a, sum_b, sum_ab, sum_bb = np.split(sums, 4, axis=1)
        mass = np.maximum(responsibilities.sum(axis=0), np.finfo(float).tiny)
        old = self.codewords_
        new = (sum_a + sum_b * old) / mass[:, None]
        # sum_uk r_uk (m_uk - e_k)^2, multiplied out.
        squares = (a**2 + shrinkage * noise[:, None]).sum(axis=0) + (
            sum_bb * old**2
            + mass[:, None] * new**2
            + 2.0 * (sum_ab * old - sum_a * new - sum_b * old * new)
        ).sum(axis=0)
        self.codewords_ = new
        self.weights_ = mass / n
        self.variance_ = np.maximum(squares / n, self._floor)

    def _compute_lower_bound(self, log_likelihood: np.ndarray) -> float:
        return float(log_likelihood.mean())

    def _reseed(
        self, offsets: np.ndarray, log_likelihood: np.ndarray, responsibilities: np.ndarray
    ) -> bool:
        """Move empty codes to the samples that are explained worst; True if there were any."""
        share = responsibilities.sum(axis=0) / len(offsets)
        empty = np.flatnonzero(share < self.min_share / self.n_codes)
        if len(empty) == 0:
            return False
        worst = np.argsort(log_likelihood)[: len(empty)]
        self.codewords_ = self.codewords_.copy()
        self.codewords_[empty] = offsets[worst]
        weights = self.weights_.copy()
        weights[empty] = 1.0 / self.n_codes
        self.weights_ = weights / weights.sum()
        return True


class ResidualCodebook:
    """Residual quantisation: each level is a mixture over what the level before left.

    Parameters
    ----------
    n_codes : int
        Size of each level's codebook.
    levels : int
    **mixture
        Further parameters of :class:`CodebookMixture`.

    Attributes
    ----------
    levels_ : list of CodebookMixture
    """

    def __init__(self, n_codes: int = 32, levels: int = 1, **mixture) -> None:
        self.n_codes = n_codes
        self.levels = levels
        self.mixture = mixture

    def fit(
        self, offsets: np.ndarray, noise: np.ndarray, start: Sequence[np.ndarray] | None = None
    ) -> ResidualCodebook:
        """Fit the levels in turn; see :meth:`CodebookMixture.fit`.

        Parameters
        ----------
        offsets, noise
        start : sequence of ndarray, optional
            The numbers of each level of a fitted codebook that EM starts from.
        """
        self.levels_ = []
        residual = np.asarray(offsets, dtype=np.float64)
        for number in range(self.levels):
            mixture = CodebookMixture(self.n_codes, start=start and start[number], **self.mixture)
            level = mixture.fit(residual, noise)
            self.levels_.append(level)
            residual = residual - level.codewords_[level.predict(residual, noise)]
        return self

    def predict(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Codes of every level, shape (n, levels)."""
        return nearest_codes(*_check(offsets, noise), self.numbers, self.n_codes, self.levels)

    @property
    def numbers(self) -> np.ndarray:
        """The levels' numbers, one after another."""
        return np.concatenate([level.numbers for level in self.levels_])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Sum of the levels' codewords, shape (n, r)."""
        return sum(level.codewords_[codes[:, i]] for i, level in enumerate(self.levels_))

    def prior_codes(self) -> np.ndarray:
        """The prior's mode at every level, shape (levels,)."""
        return np.array([int(np.argmax(level.weights_)) for level in self.levels_])


def _check(offsets: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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

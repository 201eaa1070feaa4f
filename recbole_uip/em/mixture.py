r"""The codebook by EM under known per-user noise.

The model is that of :mod:`recbole_uip.em.codebook`. The codewords e_k are the codebook, the code
of a user is the component of largest responsibility, and :math:`\nu_u` falls as more is known of
a user. The E-step has, direction by direction,

.. math:: r_{uk} \propto \pi_k N(y_u; e_k, \sigma^2 + \nu_u), \quad
          m_{uk} = e_k + \frac{\sigma^2}{\sigma^2 + \nu_u} (y_u - e_k), \quad
          v_u = \frac{\sigma^2 \nu_u}{\sigma^2 + \nu_u},

the responsibilities, and the mean and variance of :math:`\delta_u` given code k. The M-step is

.. math:: \pi_k = \frac{1}{n} \sum_u r_{uk}, \quad
          e_k = \frac{\sum_u r_{uk} m_{uk}}{\sum_u r_{uk}}, \quad
          \sigma^2 = \frac{1}{n} \sum_{uk} r_{uk} [(m_{uk} - e_k)^2 + v_u].
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans

from recbole_uip.em.codebook import Codebook, moments, n_distinct, unpack

__all__ = ["CodebookMixture"]

# An outlier can empty its code again and again; EM has to be let end.
MAX_RESEEDS = 10
KMEANS_STEPS = 10


class CodebookMixture(Codebook):
    """Gaussian mixture with shared diagonal covariance and known isotropic noise per sample.

    Parameters
    ----------
    n_codes, max_iter, tol, n_init, start, random_state
        As in :class:`Codebook`; k-means is where EM starts by default.
    min_share : float
        A code with less than this share of the mean usage is empty and re-seeded, at the
        sample that the mixture explains worst for its noise, in ten iterations at most.

    Attributes
    ----------
    lower_bounds_ : list of float
        The log-likelihood per sample before each iteration. It never falls but where an empty
        code was re-seeded.
    """

    method = "EM"

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
        super().__init__(
            n_codes,
            max_iter=max_iter,
            tol=tol,
            n_init=n_init,
            start=start,
            random_state=random_state,
        )
        self.min_share = min_share

    def _initialize(
        self, offsets: np.ndarray, noise: np.ndarray, random_state: np.random.RandomState
    ) -> None:
        # Seeds come from offsets shrunk by their noise: otherwise k-means++ would pick the noisiest
        # users, who lie farthest out.
        mean, variance = moments(offsets, noise)
        shrunk = mean + variance / (variance + noise[:, None]) * (offsets - mean)
        self._seeds = shrunk
        self.variance_ = variance
        self._floor = 1e-6 * variance + np.finfo(float).tiny
        if self.start is not None:
            ((log_weights, self.codewords_, self.variance_),) = unpack(
                self.start, self.n_codes, offsets.shape[1]
            )
            self.weights_ = np.exp(log_weights)
            return
        # A few steps of k-means spare EM a third of its iterations.
        n_clusters = min(self.n_codes, n_distinct(shrunk))
        kmeans = KMeans(n_clusters, n_init=1, max_iter=KMEANS_STEPS, random_state=random_state)
        labels = kmeans.fit_predict(shrunk)
        # With fewer distinct samples than codes, some codes are the same.
        self.codewords_ = np.resize(kmeans.cluster_centers_, (self.n_codes, shrunk.shape[1]))
        shares = np.bincount(labels, minlength=self.n_codes) + 1.0
        self.weights_ = shares / shares.sum()

    def _fit_single(self, offsets: np.ndarray, noise: np.ndarray) -> dict:
        lower_bounds: list[float] = []
        reseeded: list[int] = []
        converged = False
        n_iter = 0
        for n_iter in range(1, self.max_iter + 1):
            log_likelihood, responsibilities = self._e_step(offsets, noise)
            lower_bounds.append(float(log_likelihood.mean()))
            if len(reseeded) < MAX_RESEEDS and self._reseed(
                noise, log_likelihood, responsibilities
            ):
                reseeded.append(n_iter)
                continue
            # A signed change: a bound that falls is a defect, not convergence. Across a
            # re-seeding it says nothing.
            is_step = n_iter > 1 and n_iter - 1 not in reseeded
            if is_step and 0 <= lower_bounds[-1] - lower_bounds[-2] < self.tol:
                converged = True
                break
            self._m_step(offsets, noise, responsibilities)
        del self._seeds  # of no more use, and no part of what a saved codebook is
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

    def _reseed(
        self, noise: np.ndarray, log_likelihood: np.ndarray, responsibilities: np.ndarray
    ) -> bool:
        """Move empty codes to the samples that are explained worst; True if there were any."""
        share = responsibilities.sum(axis=0) / len(noise)
        empty = np.flatnonzero(share < self.min_share / self.n_codes)
        if len(empty) == 0:
            return False
        # Less what a sample would have on a codeword: of whom little is known, all are unlikely.
        at_best = -0.5 * np.log(2.0 * np.pi * (self.variance_ + noise[:, None])).sum(axis=1)
        worst = np.argsort(log_likelihood - at_best)[: len(empty)]
        self.codewords_ = self.codewords_.copy()
        self.codewords_[empty] = self._seeds[worst]
        weights = self.weights_.copy()
        weights[empty] = 1.0 / self.n_codes
        self.weights_ = weights / weights.sum()
        return True

r"""Codebooks that are not fitted by mixture EM: what EM is compared with.

Each has codewords e_k, a *rule* that gives a measured offset its code, and a likelihood.

**The rule** is read by compiled code as :attr:`Codebook.packed`: log weights a_k, codewords and
one variance s, by which the code of (y, nu) is

.. math:: \arg\max_k \; a_k - \|y - e_k\|^2 / (2 (s + \nu)).

With equal a_k the noise drops out, and the rule is the nearest codeword in Euclidean distance.
Where a_k are dual potentials, it is the cell of least transport cost.

**Noise** enters the fit instead. A profile delta_u is unknown but for y_u ~ N(delta_u, nu_u I). Let
it be drawn to its code by the loss of van den Oord et al. (2017),

.. math:: \|y_u - \delta_u\|^2 / (2 \nu_u) + \beta \|\delta_u - e_{z_u}\|^2,

whose first term is the data's and whose second is the commitment loss. (There is no encoder to
commit: offsets are measured. What is free is the profile.) Its least is at

.. math:: \delta_u = e + \frac{s}{s + \nu_u} (y_u - e), \quad s = 1 / (2 \beta),

the posterior mean under a within-code variance s, and leaves the loss ||y - e||^2 / (2 (s + nu)).
So a commitment of beta is the assumption of that variance. It says how much less a user counts of
whom little is known: codewords are means of y weighted by 1 / (s + nu_u). On its way to e a profile
does not leave the cell of e, so its code is the code of y.

**The likelihood** is of the mixture with these codewords, whose weights and variances are fitted
by EM with the codewords held (``weights_``, ``variance_``, ``score``). It is comparable among all
codebooks and has no part in the rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import scipy.special
import scipy.stats
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans, kmeans_plusplus

from recbole_uip.em.codebook import Codebook, Level, moments, n_distinct, unpack

__all__ = [
    "QUANTIZERS",
    "FiniteScalar",
    "HardEM",
    "OnlineVQ",
    "Quantizer",
    "RandomCodebook",
    "Sinkhorn",
    "grid_levels",
    "transport_potentials",
]

NEVER = np.finfo(float).tiny  # weight of a code that the rule never assigns


class Quantizer(Codebook):
    """Template: codewords by ``_fit_codewords``, then weights and variances by EM.

    Parameters
    ----------
    n_codes, max_iter, tol, n_init, start, random_state
        As in :class:`Codebook`. ``start`` gives the first codewords, where there is an iteration
        to start.

    Attributes
    ----------
    potentials_ : ndarray of shape (K,)
        Log weights a of the rule; zeros for the nearest codeword, -inf for a code not in use.
    rule_variance_ : float
        Its variance s.
    n_iter_ : int
        Iterations of the codewords' fit; 0 where there are none.
    converged_ : bool
        Whether it met ``tol``; True where there are none.
    lower_bounds_ : list of float
        Log-likelihood per sample before each step of EM on weights and variances. It never falls.
    """

    @property
    def packed(self) -> np.ndarray:
        """The rule's potentials, codewords and variance: a :class:`Level`, flat."""
        variance = np.full(self.codewords_.shape[1], self.rule_variance_)
        return Level(self.potentials_, self.codewords_, variance).pack()

    def reorder(self, order: np.ndarray) -> None:
        """Give code ``order[k]`` the number k."""
        super().reorder(order)
        self.potentials_ = self.potentials_[order]

    def _initialize(
        self, offsets: np.ndarray, noise: np.ndarray, random_state: np.random.RandomState
    ) -> None:
        self._random_state = random_state
        self._mean, self._variance = moments(offsets, noise)
        self._floor = 1e-6 * self._variance + np.finfo(float).tiny
        self.potentials_ = np.zeros(self.n_codes)
        # K codes explain little of a profile of many directions: what is within a code is taken
        # to vary as profiles do.
        self.rule_variance_ = float(self._variance.mean())
        self.converged_, self.n_iter_, self.reseeded_ = True, 0, []

    def _seed(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        """Begin with the codewords of ``start``, or with k-means++."""
        if self.start is not None:
            (level,) = unpack(self.start, self.n_codes, offsets.shape[1])
            self.codewords_ = level.codewords
            return
        self.codewords_, _ = kmeans_plusplus(
            offsets,
            self.n_codes,
            sample_weight=self._precision(noise),
            random_state=self._random_state,
        )

    def _precision(self, noise: np.ndarray) -> np.ndarray:
        """What each offset counts, 1 / (s + nu), shape (n,)."""
        return 1.0 / (self.rule_variance_ + noise)

    def _fit_codewords(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        raise NotImplementedError

    def _fit_single(self, offsets: np.ndarray, noise: np.ndarray) -> dict:
        self._fit_codewords(offsets, noise)
        del self._random_state  # of no more use, and no part of what a saved codebook is
        lower_bounds = self._fit_density(offsets, noise)
        return {
            "weights_": self.weights_,
            "codewords_": self.codewords_,
            "variance_": self.variance_,
            "potentials_": self.potentials_,
            "converged_": self.converged_,
            "n_iter_": self.n_iter_,
            "lower_bound_": lower_bounds[-1],
            "lower_bounds_": lower_bounds,
            "reseeded_": self.reseeded_,
        }

    def _fit_density(self, offsets: np.ndarray, noise: np.ndarray) -> list[float]:
        """Weights and variances of the mixture by EM, the codewords held."""
        self.variance_ = self._variance
        codes = self.predict(offsets, noise)
        shares = np.bincount(codes, minlength=self.n_codes) + 1.0
        shares[np.isneginf(self.potentials_)] = NEVER
        self.weights_ = shares / shares.sum()
        lower_bounds: list[float] = []
        for _ in range(self.max_iter):
            log_likelihood, responsibilities = self._e_step(offsets, noise)
            lower_bounds.append(float(log_likelihood.mean()))
            if len(lower_bounds) > 1 and 0 <= lower_bounds[-1] - lower_bounds[-2] < self.tol:
                break
            self._m_step(offsets, noise, responsibilities, move=False)
        return lower_bounds


class HardEM(Quantizer):
    """Hard EM: each offset belongs to one code. With equal weights this is k-means.

    Codewords are means weighted by 1 / (s + nu), which minimise sum ||y - e_z||^2 / (2 (s + nu)),
    the negative log-likelihood of offsets *and* codes under an isotropic within-code variance s.
    ``tol`` is scikit-learn's, relative to the variance of the offsets.
    """

    method = "k-means"

    def _fit_codewords(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        self._seed(offsets, noise)
        if n_distinct(offsets) < self.n_codes:
            # Every offset is a codeword, and some codes are the same.
            self.codewords_ = np.resize(np.unique(offsets, axis=0), self.codewords_.shape)
            return
        kmeans = KMeans(
            self.n_codes, init=self.codewords_, n_init=1, max_iter=self.max_iter, tol=self.tol
        )
        kmeans.fit(offsets, sample_weight=self._precision(noise))
        self.codewords_ = kmeans.cluster_centers_
        self.n_iter_ = kmeans.n_iter_
        self.converged_ = kmeans.n_iter_ < self.max_iter


class OnlineVQ(Quantizer):
    """Vector quantisation online: van den Oord et al. (2017), appendix A.1.

    Offsets come in batches. Each is given its nearest code, its profile the optimum of the
    module's loss, and codewords follow exponential moving averages of profiles,

    .. math:: N_k \\leftarrow \\gamma N_k + (1 - \\gamma) n_k, \\quad
              M_k \\leftarrow \\gamma M_k + (1 - \\gamma) \\sum_{z_u = k} \\delta_u, \\quad
              e_k = M_k / N_k.

    A code that falls out of use goes to a random offset of the batch. An iteration is an epoch. As
    averages reach back over 1 / (1 - gamma) batches, ``tol`` is for the loss over as many.

    Parameters
    ----------
    n_codes, max_iter, tol, n_init, start, random_state
        As in :class:`Quantizer`.
    commitment : float
        beta of the module's loss, per squared unit of one event's noise.
    decay : float
        gamma.
    batch : int
        Offsets of a batch.
    min_share : float
        A code with less than this share of the mean usage is out of use.
    """

    method = "online VQ"

    def __init__(
        self,
        n_codes: int = 32,
        *,
        commitment: float = 0.25,
        decay: float = 0.99,
        batch: int = 256,
        min_share: float = 0.1,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
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
        self.commitment = commitment
        self.decay = decay
        self.batch = batch
        self.min_share = min_share

    def _initialize(
        self, offsets: np.ndarray, noise: np.ndarray, random_state: np.random.RandomState
    ) -> None:
        super()._initialize(offsets, noise, random_state)
        self.rule_variance_ = 1.0 / (2.0 * self.commitment)

    def _fit_codewords(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        self._seed(offsets, noise)
        precision = self._precision(noise)
        shrinkage = (self.rule_variance_ * precision)[:, None]
        counts = np.full(self.n_codes, 1.0 / self.n_codes)
        batches = np.ceil(len(offsets) / self.batch)
        lag = int(np.ceil(1.0 / ((1.0 - self.decay) * batches)))
        losses: list[float] = []
        self.converged_ = False
        for n_iter in range(1, self.max_iter + 1):
            self.n_iter_ = n_iter
            loss, order = 0.0, self._random_state.permutation(len(offsets))
            for low in range(0, len(order), self.batch):
                chosen = order[low : low + self.batch]
                y = offsets[chosen]
                distance = cdist(y, self.codewords_, "sqeuclidean")
                codes = distance.argmin(axis=1)
                loss += 0.5 * precision[chosen] @ distance.min(axis=1)
                nearest = self.codewords_[codes]
                profiles = nearest + shrinkage[chosen] * (y - nearest)
                given = codes[:, None] == np.arange(self.n_codes)
                keep, new = self.decay, (1.0 - self.decay) / len(chosen)
                sums = keep * counts[:, None] * self.codewords_ + new * given.T @ profiles
                counts = keep * counts + new * given.sum(axis=0)
                self.codewords_ = sums / counts[:, None]
                self._restart(y, counts)
            losses.append(loss / len(offsets))
            # Batches are noisy, and codes that fall out of use are moved: it may rise as well.
            if len(losses) > lag and losses[-1 - lag] - losses[-1] < self.tol:
                self.converged_ = True
                break

    def _restart(self, y: np.ndarray, counts: np.ndarray) -> None:
        """Move codes that are out of use to offsets of the batch; in place."""
        dead = np.flatnonzero(counts < self.min_share / self.n_codes)[: len(y)]
        if len(dead) == 0:
            return
        self.codewords_[dead] = y[self._random_state.choice(len(y), len(dead), replace=False)]
        counts[dead] = 1.0 / self.n_codes
        if self.n_iter_ not in self.reseeded_:
            self.reseeded_.append(self.n_iter_)


class Sinkhorn(Quantizer):
    """Codes of equal use: entropic optimal transport from offsets to codes (Cuturi 2013).

    The cost of giving offset u to code k is c_uk = ||y_u - e_k||^2 / (2 (s + nu_u)), nats. In turn,
    the plan p_uk is the one of least cost, less epsilon times its entropy, among those that use
    every code equally (as in Asano, Rupprecht and Vedaldi 2020), and codewords are the means of the
    offsets that it gives them, weighted by 1 / (s + nu). The rule argmin c_uk - g_k has the plan's
    dual potentials g as log weights: a power diagram of cells that hold equally many samples.

    Parameters
    ----------
    n_codes, max_iter, tol, n_init, start, random_state
        As in :class:`Quantizer`.
    epsilon : float
        In nats. The smaller, the closer the rule, which knows no fractions, is to the plan.
    """

    method = "Sinkhorn"

    def __init__(
        self,
        n_codes: int = 32,
        *,
        epsilon: float = 0.05,
        max_iter: int = 100,
        tol: float = 1e-3,
        n_init: int = 1,
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
        self.epsilon = epsilon

    def _fit_codewords(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        self._seed(offsets, noise)
        precision = self._precision(noise)
        losses: list[float] = []
        self.converged_ = False
        for n_iter in range(1, self.max_iter + 1):
            self.n_iter_ = n_iter
            cost = 0.5 * precision[:, None] * cdist(offsets, self.codewords_, "sqeuclidean")
            self.potentials_, plan = transport_potentials(cost, self.epsilon, self.potentials_)
            entropy = -scipy.special.xlogy(plan, plan).sum()
            losses.append(((plan * cost).sum() - self.epsilon * entropy) / len(offsets))
            # The potentials are of these codewords, so they must not move any more.
            if len(losses) > 1 and 0 <= losses[-2] - losses[-1] < self.tol:
                self.converged_ = True
                break
            if self.n_iter_ < self.max_iter:
                given = plan * precision[:, None]
                self.codewords_ = given.T @ offsets / given.sum(axis=0)[:, None]


def transport_potentials(
    cost: np.ndarray,
    epsilon: float,
    start: np.ndarray,
    *,
    tol: float = 1e-2,
    max_iter: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Sinkhorn's algorithm from samples to codes of equal use.

    Parameters
    ----------
    cost : ndarray, shape (n, K)
    epsilon : float
        Weight of the plan's entropy, in units of ``cost``.
    start : ndarray, shape (K,)
        Potentials to start from.
    tol : float
        It ends when every code's use is within this share of equal use.
    max_iter : int

    Returns
    -------
    potentials : ndarray, shape (K,)
        g, of mean 0.
    plan : ndarray, shape (n, K)
        p_uk proportional to exp((g_k - c_uk) / epsilon); rows sum to one.
    """
    n_codes, potentials = cost.shape[1], start.copy()
    for _ in range(max_iter):
        plan = scipy.special.softmax((potentials - cost) / epsilon, axis=1)
        use = n_codes * plan.mean(axis=0)
        if np.abs(use - 1.0).max() < tol:
            break
        potentials -= epsilon * np.log(np.maximum(use, np.finfo(float).tiny))
        potentials -= potentials.mean()
    return potentials, plan


class FiniteScalar(Quantizer):
    """Finite scalar quantisation (Mentzer et al. 2023): a product grid in the leading directions.

    A direction of L levels has them at the midpoints of L quantiles of the offsets, each counted
    1 / (s + nu); what lies beyond the outermost levels belongs to them, so a direction is bounded.
    The other directions stand at the mean, which is the same for all codes. The distance to a
    grid is the sum of distances by direction, so the nearest codeword is the nearest level in each.

    Where no product of levels makes up K, the codes that remain are never given (log weight -inf).
    """

    method = "FSQ"

    def _fit_codewords(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        levels = np.array(grid_levels(self._variance, self.n_codes))
        precision, quantised = self._precision(noise), np.flatnonzero(levels > 1)
        axes = [
            np.quantile(
                offsets[:, d],
                _midpoints(levels[d]),
                weights=precision,
                method="inverted_cdf",
            )
            for d in quantised
        ]
        self.codewords_ = np.tile(self._mean, (self.n_codes, 1))
        grid = np.array(list(itertools.product(*axes)))
        self.codewords_[: len(grid), quantised] = grid
        self.potentials_[len(grid) :] = -np.inf


def grid_levels(variance: np.ndarray, n_codes: int) -> tuple[int, ...]:
    """Levels of each direction, of a product of at most K, by which a Gaussian is lost least.

    A Gaussian of variance 1 has the distortion D(L) to the midpoints of its L quantiles. Of all
    products, the one of least sum of variance_d D(L_d) is taken; a direction that varies more
    never has fewer levels.

    Parameters
    ----------
    variance : ndarray, shape (r,)
    n_codes : int
    """
    gaussian = scipy.stats.norm.ppf(_midpoints(1000))[:, None]
    loss = [
        float(((gaussian - scipy.stats.norm.ppf(_midpoints(n))) ** 2).min(axis=1).mean())
        for n in range(1, n_codes + 1)
    ]
    order = np.argsort(-variance, kind="stable")

    def total(levels: tuple[int, ...]) -> float:
        pairs = zip(order, levels, strict=False)  # directions beyond them have one level
        return sum(variance[d] * (loss[n - 1] - loss[0]) for d, n in pairs)

    best = min(_products(n_codes, n_codes, len(variance)), key=total)
    levels = np.ones(len(variance), dtype=np.int64)
    levels[order[: len(best)]] = best
    return tuple(levels.tolist())


def _midpoints(n: int) -> np.ndarray:
    """Midpoints of n equal parts of [0, 1]."""
    return (np.arange(n) + 0.5) / n


def _products(n_codes: int, largest: int, most: int) -> Iterator[tuple[int, ...]]:
    """All falling sequences of levels from 2 to ``largest`` whose product is at most K."""
    yield ()
    if most:
        for levels in range(2, min(largest, n_codes) + 1):
            for others in _products(n_codes // levels, levels, most - 1):
                yield (levels, *others)


class RandomCodebook(Quantizer):
    """Codewords drawn from the prior N(mean, variance) of the profiles; nothing else is fitted."""

    method = "random"

    def _fit_codewords(self, offsets: np.ndarray, noise: np.ndarray) -> None:
        shape = self.n_codes, offsets.shape[1]
        self.codewords_ = self._random_state.normal(self._mean, np.sqrt(self._variance), shape)


#: The class of each ``uip_codebook.method`` but ``em``.
QUANTIZERS: dict[str, type[Quantizer]] = {
    "kmeans": HardEM,
    "vq": OnlineVQ,
    "fsq": FiniteScalar,
    "sinkhorn": Sinkhorn,
    "random": RandomCodebook,
}

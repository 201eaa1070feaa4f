r"""The gradient posterior: soft tokens tuned user by user, EM around them.

A profile u has G soft tokens, one a facet. They are written in coordinates :math:`a_u`,

.. math:: \theta_{uf} = \theta^0_f + M_f a_{uf},

where :math:`M_f` is scaled so that the score of one behaviour has about unit variance in each
coordinate (:class:`Frame`). The likelihood is an argument: nothing here knows what it is of.

**E-step.** Adam on the log posterior :math:`\sum_i \ell_i(\theta_u) + \log \sum_k \pi_k N(a_u;
e_k, \mathrm{diag}\,\sigma^2)`: all codewords draw a profile, each by its responsibility. A step
puts only a few of the profile's behaviours through the LM. The others count by their last
gradient (SAGA; Defazio, Bach and Lacoste-Julien 2014), of which the first is the cached score at
:math:`\theta^0`. With these alone and one Newton step this is the closed form of ``score``.

**Measured offsets.** What EM needs of a profile is not its mode, which the prior has shrunk, but
what its behaviours alone say. The Laplace approximation gives both offset and noise,

.. math:: y = a + \frac{\nabla_a \sum_i \ell_i(a)}{c N}, \quad \nu = \frac{1}{c N},

for a profile of N behaviours. The curvature c of one behaviour is the secant
:math:`-\langle \Delta a, \Delta \nabla \ell_i\rangle / |\Delta a|^2` between two visits to a
behaviour, pooled over all profiles; but at least 1, the Fisher information at :math:`\theta^0`.

**M-step.** The codebooks of all facets are fitted on (y, nu), as those of the closed form are
(:mod:`mixture`), each from the one before.

**Bound.** Of held-out profiles, which no codebook is fitted on, the Laplace approximation of
:math:`\log p(x_u)` with :math:`a_u` integrated out, in nats a behaviour. Rounds of E and M end
when it stops rising.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse
import scipy.special
from sklearn.exceptions import ConvergenceWarning

from recbole_uip.em.codebook import component_log_densities
from recbole_uip.em.residual import ResidualCodebook
from recbole_uip.settings import CodebookSettings, FacetSettings, GradientSettings

__all__ = [
    "LEARNING_RATES",
    "EStep",
    "Frame",
    "GradientPosterior",
    "Likelihood",
    "Prior",
    "Run",
    "State",
    "Units",
    "ascend",
    "in_turn",
    "secant_sums",
    "sums_by_owner",
]

LEARNING_RATES = (0.01, 0.03, 0.1)  # of which ``learning_rate: auto`` takes one
#: Batches are as even as they can be and their number, if there are several, a multiple of this
#: one, so that a few workers that share them end together.
BATCHES = 4
BETAS = (0.9, 0.99)  # few steps: the second moment cannot look back over a thousand of them
#: What of a batch's result all processes need; the rest stays with the process that made it.
SHARED = ("where", "total", "value", "curve", "secant", "lm_tokens")


class Likelihood(Protocol):
    """Log-likelihoods of units and their gradients, each under soft tokens of its own."""

    def __call__(self, units: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ℓ (n,) and its gradient (n, G, d) of ``units`` (n,) under ``theta`` (n, G, d)."""


Run = Callable[[str, Callable[[int], dict[str, np.ndarray]], int, Sequence[str]], list[dict]]


def in_turn(
    phase: str, function: Callable[[int], dict], n: int, shared: Sequence[str] = ()
) -> list[dict]:
    """``function(0)`` to ``function(n - 1)``: the plainest ``run`` that EM can be given.

    Another may use threads, processes and what an earlier, killed run has left on disk, each
    result under its ``phase`` and number. Of a result made by another process it may give the
    arrays ``shared`` alone.
    """
    return [function(number) for number in range(n)]


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
    """

    theta0: np.ndarray
    maps: tuple[np.ndarray, ...]
    variance: tuple[np.ndarray, ...]

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


@dataclass(frozen=True)
class Prior:
    """log sum_k pi_k N(a; e_k, diag sigma^2) of one facet, without noise.

    Attributes
    ----------
    weights : ndarray, shape (K,)
    codewords : ndarray, shape (K, r)
    variance : ndarray, shape (r,)
    """

    weights: np.ndarray
    codewords: np.ndarray
    variance: np.ndarray

    def value_and_gradient(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p (n,) and its gradient (n, r) at ``where`` (n, r)."""
        where = where.astype(np.float64)
        noise = np.zeros(len(where))
        joint = component_log_densities(where, noise, self.codewords, self.variance)
        joint += np.log(self.weights)
        responsibility = scipy.special.softmax(joint, axis=1)
        pull = (responsibility @ self.codewords - where) / self.variance
        return scipy.special.logsumexp(joint, axis=1), pull


@dataclass(frozen=True)
class State:
    """Where n profiles are, and what was last found of their m units, profile by profile.

    Attributes
    ----------
    where : ndarray of float32, shape (n, R)
        Coordinates of each profile.
    gradient : ndarray of float32, shape (m, R)
        Gradient of each unit, at its last visit.
    value : ndarray of float64, shape (m,)
        ℓ of each unit then; NaN where not known.
    visited : ndarray of float32, shape (m, R)
        Coordinates at which that was.
    own : ndarray of bool, shape (m,)
        Whether that was by the likelihood, and not by cached scores.
    """

    where: np.ndarray
    gradient: np.ndarray
    value: np.ndarray
    visited: np.ndarray
    own: np.ndarray

    @classmethod
    def start(cls, units: Units, profiles: np.ndarray) -> State:
        """Profiles ``profiles`` at θ⁰."""
        mine = units.of(profiles)
        size = units.gradient.shape[1]
        return cls(
            np.zeros((len(profiles), size), np.float32),
            units.gradient[mine].astype(np.float32),
            units.value[mine].astype(np.float64),
            np.zeros((len(mine), size), np.float32),
            np.zeros(len(mine), dtype=bool),
        )


@dataclass(frozen=True)
class EStep:
    """What the E-step of a batch of n profiles came to.

    Attributes
    ----------
    where : ndarray of float32, shape (n, R)
        Coordinates where it ended.
    total : ndarray of float32, shape (n, R)
        Gradient of all of a profile's behaviours, each of its last visit.
    value : ndarray of float64, shape (n,)
        Their log-likelihood.
    curve : ndarray of float64, shape (steps + 1,)
        Sum of the log posteriors before and after each step; NaN while a behaviour's value is not
        known.
    secant : ndarray of float64, shape (G, 2)
        Sums of curvature and of its weights, see :func:`secant_sums`.
    lm_tokens : ndarray of int64, shape ()
    state : State or None
        From which the next one goes on; None if that stayed in another process.
    """

    where: np.ndarray
    total: np.ndarray
    value: np.ndarray
    curve: np.ndarray
    secant: np.ndarray
    lm_tokens: np.ndarray
    state: State | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """As :func:`in_turn` and its like keep and exchange it."""
        own = {name: array for name, array in vars(self).items() if name != "state"}
        return own | {f"state_{name}": array for name, array in vars(self.state).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> EStep:
        """The inverse of :attr:`arrays`, also where other processes gave but ``SHARED``."""
        state = None
        if "state_where" in arrays:
            state = State(*(arrays[f"state_{each.name}"] for each in dataclasses.fields(State)))
        return cls(*(arrays[name] for name in SHARED), state)


class _Adam:
    """Steps of Adam (Kingma and Ba 2015), whose rate falls to zero so that they come to rest."""

    def __init__(self, rate: np.ndarray, n_steps: int) -> None:
        self.rate, self.n_steps = rate, n_steps
        self.step = 0
        self.moments = (0.0, 0.0)

    def move(self, gradient: np.ndarray) -> np.ndarray:
        """The next step uphill, in the shape of the gradient."""
        rate = self.rate * (1.0 - self.step / self.n_steps)
        self.step += 1
        self.moments = tuple(
            beta * moment + (1 - beta) * gradient**power
            for beta, moment, power in zip(BETAS, self.moments, (1, 2), strict=True)
        )
        first, second = (
            moment / (1 - beta**self.step) for beta, moment in zip(BETAS, self.moments, strict=True)
        )
        return rate * first / (np.sqrt(second) + 1e-12)


def ascend(
    state: State,
    units: Units,
    profiles: np.ndarray,
    fold: np.ndarray,
    frame: Frame,
    priors: Sequence[Prior] | None,
    likelihood: Likelihood,
    settings: GradientSettings,
    learning_rate: float,
    seed: Sequence[int],
) -> EStep:
    """The E-step of a batch of profiles: ``settings.steps`` steps of Adam.

    Parameters
    ----------
    state : State
        To start from.
    units : Units
    profiles : ndarray of int64, shape (n,)
        The batch.
    fold : ndarray of int64, shape (n,)
        Their users' folds.
    frame : Frame
    priors : sequence of G Prior, or None for maximum likelihood
    likelihood : Likelihood
    settings : GradientSettings
    learning_rate : float
    seed : sequence of int
        With a profile's number, seed of the order in which its behaviours take their turns.

    Returns
    -------
    EStep
    """
    n, mine, counts = len(profiles), units.of(profiles), np.diff(units.first)[profiles]
    owner = np.repeat(np.arange(n), counts)
    active = units.active[mine]
    state = State(**{name: array.copy() for name, array in vars(state).items()})
    where = state.where
    taken = np.minimum(settings.batch, counts)
    scale = (counts / np.maximum(taken, 1)).astype(np.float32)
    adam = _Adam(frame.steps(learning_rate), settings.steps)
    secant, lm_tokens = np.zeros((len(frame.maps), 2)), 0
    log_posterior, pull = _log_posterior(where, np.bincount(owner, state.value, n), frame, priors)
    curve = [log_posterior.sum()]
    for rows in _turns(profiles, counts, taken, settings.steps, seed):
        here, row_fold, row_active = where[owner[rows]], fold[owner[rows]], active[rows]
        values, gradients = likelihood(mine[rows], frame.tokens(here, row_fold, row_active))
        new = frame.pull(gradients, row_fold, row_active)
        lm_tokens += int(units.cost[mine[rows]].sum())
        change = new - state.gradient[rows]
        # cached scores differ from our own by rounding, which no short move should be blamed for
        moved = (here - state.visited[rows]) * state.own[rows, None]
        secant += secant_sums(frame, row_active, moved, change)
        # SAGA: the last gradients of all, and the change of a few scaled to all
        estimate = sums_by_owner(state.gradient, owner, n)
        estimate += scale[:, None] * sums_by_owner(change, owner[rows], n)
        state.gradient[rows], state.value[rows], state.visited[rows] = new, values, here
        state.own[rows] = True
        where = (where + adam.move(estimate + pull)).astype(np.float32)
        log_posterior, pull = _log_posterior(
            where, np.bincount(owner, state.value, n), frame, priors
        )
        curve.append(log_posterior.sum())
    return EStep(
        where,
        sums_by_owner(state.gradient, owner, n),
        np.bincount(owner, state.value, n),
        np.array(curve),
        secant,
        np.array(lm_tokens),
        dataclasses.replace(state, where=where),
    )


def _turns(
    profiles: np.ndarray,
    counts: np.ndarray,
    taken: np.ndarray,
    n_steps: int,
    seed: Sequence[int],
) -> Iterator[np.ndarray]:
    """Units of each step: of each profile the next ``taken`` of its ``counts``, round and round."""
    start = np.cumsum(counts) - counts
    # seeded per profile, so that a result does not depend on the rest of the batch
    orders = [
        first + np.random.default_rng([*seed, profile]).permutation(count)
        for first, profile, count in zip(start, profiles, counts, strict=True)
    ]
    for step in range(n_steps):
        yield np.concatenate(
            [
                order[(step * few + np.arange(few)) % max(1, len(order))]
                for order, few in zip(orders, taken, strict=True)
            ]
        )


def _log_posterior(
    where: np.ndarray, value: np.ndarray, frame: Frame, priors: Sequence[Prior] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Log posteriors (n,) by log-likelihoods ``value``, and the priors' gradients (n, R)."""
    pull = np.zeros_like(where)
    for part, prior in zip(frame.slices, priors or (), strict=False):
        log_prior, pull[:, part] = prior.value_and_gradient(where[:, part])
        value = value + log_prior
    return value, pull


class GradientPosterior:
    """EM over soft tokens that are tuned by gradients.

    Parameters
    ----------
    facets : sequence of G FacetSettings
    frame : Frame
    settings : GradientSettings
    codebook : CodebookSettings
    batch_tokens : int
        LM tokens of one step of one batch of profiles, about.
    seed : int

    Attributes
    ----------
    codebooks_ : list of G ResidualCodebook or None
        None where no profile has evidence.
    mode_ : list of G ndarray of float64, each of shape (n_profiles, rank)
        Coordinates a that the E-step ended at.
    offset_ : list of G ndarray of float64, each of shape (n_profiles, rank)
        Measured offsets y.
    noise_ : ndarray of float64, shape (n_profiles, G)
        Their noise variances; infinite without evidence.
    curvature_ : ndarray of float64, shape (G,)
        c of one behaviour.
    bounds_ : list of float
        Held-out bound after each round, nats a behaviour.
    curves_ : list of ndarray, each of shape (steps + 1,)
        Mean log posterior of a profile along the E-step of each round.
    learning_rate_ : float
    converged_ : bool
    n_iter_ : int
    tokens_ : int
        LM tokens spent, in all processes.
    """

    #: Rounds before the bounds of two can be compared.
    warm_up = 1

    def __init__(
        self,
        facets: Sequence[FacetSettings],
        frame: Frame,
        settings: GradientSettings,
        codebook: CodebookSettings,
        *,
        batch_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        self.facets = list(facets)
        self.frame = frame
        self.settings = settings
        self.codebook = codebook
        self.batch_tokens = batch_tokens
        self.seed = seed

    def fit(
        self,
        units: Units,
        fold: np.ndarray,
        fitted: np.ndarray,
        held_out: np.ndarray,
        likelihood: Likelihood,
        run: Run = in_turn,
    ) -> GradientPosterior:
        """Tune all profiles, and fit the codebooks on some.

        Parameters
        ----------
        units : Units
        fold : ndarray of int64, shape (n_profiles,)
            Of their users.
        fitted : ndarray of bool, shape (n_profiles,)
            Profiles that parameters may depend on; the others are tuned after the last round.
        held_out : ndarray of bool, shape (n_profiles,)
            Of these, those by which rounds and learning rate are judged.
        likelihood : Likelihood
        run : callable
            See :func:`in_turn`.

        Raises
        ------
        DataError
            If a codebook has more codes than there are profiles to fit it on.
        """
        settings, frame = self.settings, self.frame
        n = len(fold)
        evidence = units.evidence
        anything = evidence.sum(axis=1) > 0
        self._units, self._fold, self._likelihood, self._run = units, fold, likelihood, run
        self._states: dict[tuple[str, int], State] = {}
        self.mode_ = [np.zeros((n, each.shape[2])) for each in frame.maps]
        self.offset_ = [np.zeros((n, each.shape[2])) for each in frame.maps]
        self.noise_ = np.full(evidence.shape, np.inf)
        self.codebooks_: list[ResidualCodebook | None] = [None] * len(self.facets)
        self.bounds_: list[float] = []
        self.curves_: list[np.ndarray] = []
        self.tokens_ = 0
        self.converged_ = False
        learn = self._batches(np.flatnonzero(fitted & anything))
        judged = np.flatnonzero(fitted & held_out & anything)
        self.learning_rate_ = settings.learning_rate or self._choose_rate(
            judged if len(judged) else np.flatnonzero(fitted & anything)
        )
        for self.n_iter_ in range(1, settings.rounds + 1):
            results = self._tune("fit", learn, self.n_iter_)
            secant = np.sum([each.secant for each in results], axis=0) if results else None
            self.curvature_ = self._curvature(secant)
            self._measure(learn, results, evidence)
            self.codebooks_ = [
                self._fit_codebook(f, fitted & ~held_out) for f in range(len(self.facets))
            ]
            if results:
                curve = np.sum([each.curve for each in results], axis=0)
                self.curves_.append(curve / sum(map(len, learn)))
            self.bounds_.append(self._bound(learn, results, judged, evidence))
            # Without bounds of two rounds there is nothing to judge by.
            rise = self.bounds_[-1] - self.bounds_[-2] if self.n_iter_ > self.warm_up else np.nan
            if rise < settings.tol:
                # It is of held-out profiles, and so may fall: the end, but no convergence.
                self.converged_ = bool(rise >= 0)
                break
        if not self.converged_ and np.isfinite(rise):
            ended = f"did not converge in rounds={settings.rounds} rounds; raise it or tol"
            if rise < 0:
                ended = f"ended where its held-out bound fell, by {-rise:.3g} nats a behaviour"
            warnings.warn(f"uip_gradient: the posterior {ended}", ConvergenceWarning, stacklevel=2)
        rest = self._batches(np.flatnonzero(~fitted & anything))
        for number in range(1, self.n_iter_ + 1):
            self._measure(rest, self._tune("rest", rest, number), evidence)
        # of no more use, and no part of what was learned
        del self._units, self._fold, self._likelihood, self._run, self._states
        return self

    def codes(self, f: int) -> np.ndarray:
        """Codes of facet ``f`` at every level, shape (n_profiles, levels); -1 without evidence."""
        codebook, known = self.codebooks_[f], np.isfinite(self.noise_[:, f])
        codes = np.full((len(known), self.facets[f].levels), -1, dtype=np.int64)
        if codebook is not None and known.any():
            codes[known] = codebook.predict(self.offset_[f][known], self.noise_[known, f])
        return codes

    def means(self, f: int) -> np.ndarray:
        """Posterior means of facet ``f`` by its first level, shape (n_profiles, rank).

        Zeros without evidence.
        """
        codebook, known = self.codebooks_[f], np.isfinite(self.noise_[:, f])
        means = np.zeros_like(self.offset_[f])
        if codebook is not None and known.any():
            level = codebook.levels_[0]
            means[known] = level.posterior_mean(self.offset_[f][known], self.noise_[known, f])
        return means

    def _batches(self, profiles: np.ndarray) -> list[np.ndarray]:
        """Profiles in even batches of like behaviours whose steps keep the budget.

        The costliest come first.
        """
        first = self._units.first
        counts = np.diff(first)[profiles]
        total = np.concatenate([[0], np.cumsum(self._units.cost)])
        mean_cost = (total[first[profiles + 1]] - total[first[profiles]]) / np.maximum(counts, 1)
        cost = np.minimum(counts, self.settings.batch) * mean_cost
        most = np.ceil(cost.sum() / self.batch_tokens)
        if most > 1:
            most = BATCHES * np.ceil(most / BATCHES)
        budget = min(self.batch_tokens, cost.sum() / max(most, 1.0))
        batches, start, spent = [], 0, 0.0
        order = profiles[np.argsort(-cost, kind="stable")]
        for position, each in enumerate(np.sort(cost)[::-1]):
            # A batch ends where its cost is nearest to the budget, which it may not exceed much.
            if position > start and spent + each / 2 > budget:
                batches.append(order[start:position])
                start, spent = position, 0.0
            spent += each
        return [*batches, order[start:]] if len(order) else batches

    def _tune(self, phase: str, batches: list[np.ndarray], number: int) -> list[EStep]:
        """The E-step of all batches, from where the one before left them."""
        priors = self.priors()

        def tune(index: int) -> dict[str, np.ndarray]:
            batch = batches[index]
            state = self._states.get((phase, index)) or State.start(self._units, batch)
            return ascend(
                state, self._units, batch, self._fold[batch], self.frame, priors,
                self._likelihood, self.settings, self.learning_rate_, (self.seed, number),
            ).arrays  # fmt: skip

        found = self._run(f"{phase}-{number}", tune, len(batches), SHARED)
        results = [EStep.from_arrays(arrays) for arrays in found]
        for index, result in enumerate(results):
            if result.state is not None:
                self._states[phase, index] = result.state
            self.tokens_ += int(result.lm_tokens)
        return results

    def priors(self) -> list[Prior] | None:
        """What draws each facet's soft tokens now: its codebook, before there is one N(0, λ)."""
        if self.settings.prior == "none":
            return None
        priors = []
        codebooks = getattr(self, "codebooks_", [None] * len(self.facets))
        for codebook, variance in zip(codebooks, self.frame.variance, strict=True):
            if codebook is None:
                priors.append(Prior(np.ones(1), np.zeros((1, len(variance))), variance))
            else:
                level = codebook.levels_[0]
                weights = np.maximum(level.weights_, np.finfo(float).tiny)
                priors.append(Prior(weights, level.codewords_, level.variance_))
        return priors

    def _choose_rate(self, profiles: np.ndarray) -> float:
        """The learning rate by which the first batches of ``profiles`` climb highest."""
        batches, priors = self._batches(profiles)[:BATCHES], self.priors()
        if not batches:
            return LEARNING_RATES[1]

        def climb(index: int) -> dict[str, np.ndarray]:
            rate, batch = LEARNING_RATES[index % len(LEARNING_RATES)], index // len(LEARNING_RATES)
            chosen = batches[batch]
            return ascend(
                State.start(self._units, chosen), self._units, chosen, self._fold[chosen],
                self.frame, priors, self._likelihood, self.settings, rate, (self.seed, 1),
            ).arrays  # fmt: skip

        n = len(batches) * len(LEARNING_RATES)
        results = self._run("rate", climb, n, ("curve", "lm_tokens"))
        self.tokens_ += sum(int(result["lm_tokens"]) for result in results)
        reached = np.reshape([result["curve"][-1] for result in results], (len(batches), -1))
        # A climb that diverged, or whose values are not all known, is NaN.
        reached = np.nan_to_num(reached.sum(axis=0), nan=-np.inf)
        return LEARNING_RATES[int(np.argmax(reached))]

    def _curvature(self, secant: np.ndarray | None) -> np.ndarray:
        if secant is None:
            return np.ones(len(self.facets))
        moved = secant[:, 1] > 0
        curvature = np.ones(len(self.facets))
        curvature[moved] = secant[moved, 0] / secant[moved, 1]
        return np.maximum(curvature, 1.0)

    def _measure(
        self, batches: list[np.ndarray], results: list[EStep], evidence: np.ndarray
    ) -> None:
        """Measured offsets and noise of tuned profiles."""
        for batch, result in zip(batches, results, strict=True):
            for f, part in enumerate(self.frame.slices):
                count = evidence[batch, f]
                known = count > 0
                noise = 1.0 / (self.curvature_[f] * count[known])
                mode = result.where[known, part].astype(np.float64)
                newton = noise[:, None] * result.total[known, part]
                self.noise_[batch[known], f] = noise
                self.mode_[f][batch[known]] = mode
                self.offset_[f][batch[known]] = mode + newton

    def _fit_codebook(self, f: int, learn: np.ndarray) -> ResidualCodebook | None:
        chosen = np.flatnonzero(learn & np.isfinite(self.noise_[:, f]))
        if len(chosen) == 0:
            return None
        chosen = np.random.default_rng(self.seed).permutation(chosen)[: self.codebook.sample]
        old = self.codebooks_[f]
        codebook = ResidualCodebook.from_settings(self.facets[f], self.codebook, self.seed)
        start = None if old is None else [level.packed for level in old.levels_]
        return codebook.fit(self.offset_[f][chosen], self.noise_[chosen, f], start)

    def _bound(
        self,
        batches: list[np.ndarray],
        results: list[EStep],
        judged: np.ndarray,
        evidence: np.ndarray,
    ) -> float:
        """Mean bound of the profiles ``judged``, in nats a behaviour; NaN without any."""
        value = np.full(len(evidence), np.nan)
        for batch, result in zip(batches, results, strict=True):
            value[batch] = result.value
            for f, part in enumerate(self.frame.slices):
                # what a Newton step from here would gain
                gain = 0.5 * (result.total[:, part].astype(np.float64) ** 2).sum(axis=1)
                known = evidence[batch, f] > 0
                value[batch[known]] += gain[known] * self.noise_[batch[known], f]
        for f, codebook in enumerate(self.codebooks_):
            known = judged[np.isfinite(self.noise_[judged, f])]
            if codebook is None or len(known) == 0:
                continue
            noise, offset = self.noise_[known, f], self.offset_[f][known]
            value[known] += codebook.levels_[0].score_samples(offset, noise)
            value[known] += 0.5 * offset.shape[1] * np.log(2.0 * np.pi * noise)
        if len(judged) == 0:
            return float("nan")
        events = np.bincount(self._units.owner, self._units.active.max(axis=1), len(evidence))
        return float(value[judged].sum() / events[judged].sum())


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


def sums_by_owner(rows: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    """Sums of rows (m, R) by owner, shape (n, R), in the order of the rows."""
    # a product with ones, which adds row by row as numpy.add.at does, many times faster
    places = owner, np.arange(len(owner))
    return (
        scipy.sparse.csr_array((np.ones_like(rows, shape=len(rows)), places), (n, len(rows))) @ rows
    )

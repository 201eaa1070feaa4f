r"""The E-step by gradients: soft tokens climb the log posterior, a batch of profiles at a time.

Adam on :math:`\sum_i \ell_i(\theta_u) + \log \sum_k \pi_k N(a_u; e_k, \mathrm{diag}\,\sigma^2)`:
all codewords draw a profile, each by its responsibility. A step puts only a few of the profile's
behaviours through the LM. The others count by their last gradient (SAGA; Defazio, Bach and
Lacoste-Julien 2014), of which the first is the cached score at :math:`\theta^0`. With these alone
and one Newton step this is the closed form of ``score``. After each step, soft tokens that went too
far from :math:`\theta^0` are drawn back (:meth:`Frame.within`). The likelihood is an argument:
nothing here knows what it is of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.special

from recbole_uip.em.codebook import component_log_densities
from recbole_uip.em.frame import (
    Expansion,
    Frame,
    Units,
    curvature_of,
    secant_sums,
    spread_sums,
    sums_by_owner,
)
from recbole_uip.settings import GradientSettings

__all__ = ["SHARED", "EStep", "Likelihood", "Prior", "State", "ascend"]

BETAS = (0.9, 0.99)  # few steps: the second moment cannot look back over a thousand of them
_OWN = ("where", "value", "curve", "secant", "spread", "lm_tokens")
_SUMS = tuple(each.name for each in dataclasses.fields(Expansion))
#: What of a batch's result all processes need; the rest stays with the process that made it.
SHARED = (*_OWN, *_SUMS)


class Likelihood(Protocol):
    """Log-likelihoods of units and their gradients, each under soft tokens of its own."""

    def __call__(self, units: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ℓ (n,) and its gradient (n, G, d) of ``units`` (n,) under ``theta`` (n, G, d)."""


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
    value : ndarray of float64, shape (n,)
        Log-likelihood of a profile's behaviours, each of its last visit.
    curve : ndarray of float64, shape (steps + 1,)
        Sum of the log posteriors before and after each step, see :func:`ascend`; NaN while a
        behaviour's value is not known.
    secant : ndarray of float64, shape (G, 2)
        Sums of curvature and of its weights, see :func:`secant_sums`.
    spread : ndarray of float64, shape (G, 4)
        How gradients and places scatter, see :func:`spread_sums`.
    lm_tokens : ndarray of int64, shape ()
    expansion : Expansion
        Of the behaviours, each at its last visit.
    state : State or None
        From which the next one goes on; None if that stayed in another process.
    """

    where: np.ndarray
    value: np.ndarray
    curve: np.ndarray
    secant: np.ndarray
    spread: np.ndarray
    lm_tokens: np.ndarray
    expansion: Expansion
    state: State | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """As :func:`in_turn` and its like keep and exchange it."""
        own = {name: getattr(self, name) for name in _OWN}
        state = {f"state_{name}": array for name, array in vars(self.state).items()}
        return own | vars(self.expansion) | state

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> EStep:
        """The inverse of :attr:`arrays`, also where other processes gave but ``SHARED``."""
        state = None
        if "state_where" in arrays:
            state = State(*(arrays[f"state_{each.name}"] for each in dataclasses.fields(State)))
        expansion = Expansion(*(arrays[name] for name in _SUMS))
        return cls(*(arrays[name] for name in _OWN), expansion, state)


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


class _Climb:
    """A batch of n profiles on their way up: where they are, and what of their m units is known.

    Parameters are those of :func:`ascend`.
    """

    def __init__(
        self,
        state: State,
        units: Units,
        profiles: np.ndarray,
        fold: np.ndarray,
        frame: Frame,
        priors: Sequence[Prior] | None,
    ) -> None:
        self.frame, self.priors, self.fold = frame, priors, fold
        self.n = len(profiles)
        self.counts = np.diff(units.first)[profiles]
        self.owner = np.repeat(np.arange(self.n), self.counts)
        self.mine = units.of(profiles)
        self.cost, self.active = units.cost[self.mine], units.active[self.mine]
        self.state = State(**{name: array.copy() for name, array in vars(state).items()})
        self.where = self.state.where
        self.sums = self._expansion(np.arange(len(self.owner)))
        self.again, self.first = np.zeros((2, len(frame.maps), 2))
        self.lm_tokens = 0
        self.course: list[tuple[np.ndarray, np.ndarray, Expansion]] = []
        self._arrive(self.where)

    def visit(self, rows: np.ndarray, likelihood: Likelihood) -> np.ndarray:
        """The gradient (n, R) of the log posterior, of which units ``rows`` are looked at anew."""
        frame, state, owner, active = self.frame, self.state, self.owner[rows], self.active[rows]
        here, fold = self.where[owner], self.fold[owner]
        values, gradients = likelihood(self.mine[rows], frame.tokens(here, fold, active))
        new = frame.pull(gradients, fold, active)
        self.lm_tokens += int(self.cost[rows].sum())
        change = new - state.gradient[rows]
        # Cached scores differ from our own by rounding, which no short move should be blamed for:
        # they count where no behaviour is visited twice.
        moved, own = here - state.visited[rows], state.own[rows, None]
        self.again += secant_sums(frame, active, moved * own, change)
        self.first += secant_sums(frame, active, moved * ~own, change)
        # SAGA: the last gradients of all, and the change of a few scaled to all
        scale = self.counts / np.maximum(np.bincount(owner, minlength=self.n), 1)
        estimate = self.sums.gradient + scale[:, None] * sums_by_owner(change, owner, self.n)
        before = self._expansion(rows)
        state.gradient[rows], state.value[rows], state.visited[rows] = new, values, here
        state.own[rows] = True
        self.sums += self._expansion(rows) - before
        return estimate + self.pull

    def move(self, step: np.ndarray) -> None:
        """Go by ``step`` (n, R), no further than is allowed."""
        self._arrive(self.frame.within((self.where + step).astype(np.float32), self.fold))

    def result(self) -> EStep:
        """What it came to."""
        frame, state = self.frame, self.state
        secant = np.where(self.again[:, 1:] > 0, self.again, self.first)
        return EStep(
            self.where,
            np.bincount(self.owner, state.value, self.n),
            self._curve(curvature_of(secant)),
            secant,
            spread_sums(frame, self.active, state.gradient, state.visited, self.owner, self.n),
            np.array(self.lm_tokens),
            self.sums,
            dataclasses.replace(state, where=self.where),
        )

    def _expansion(self, rows: np.ndarray) -> Expansion:
        """Sums over the units ``rows``, as they were last visited."""
        state = self.state
        return Expansion.of(
            self.frame, self.active[rows], state.gradient[rows], state.visited[rows],
            self.owner[rows], self.n,
        )  # fmt: skip

    def _arrive(self, where: np.ndarray) -> None:
        self.where = where
        value = np.bincount(self.owner, self.state.value, self.n)
        self.pull = np.zeros_like(where)
        for part, prior in zip(self.frame.slices, self.priors or (), strict=False):
            log_prior, self.pull[:, part] = prior.value_and_gradient(where[:, part])
            value += log_prior
        self.course.append((where, value, self.sums))

    def _curve(self, curvature: np.ndarray) -> np.ndarray:
        """Sums of the log posteriors along the way, by Taylor series of curvature c (G,)."""
        evidence = sums_by_owner(self.active, self.owner, self.n)
        curve = np.zeros(len(self.course))
        for step, (where, value, sums) in enumerate(self.course):
            for f, part in enumerate(self.frame.slices):
                value = value + sums.rise(f, part, evidence[:, f], curvature[f], where[:, part])
            curve[step] = value.sum()
        return curve


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
    r"""The E-step of a batch of profiles: ``settings.steps`` steps of Adam.

    Where a step has led, the log posterior is known from behaviours that were visited elsewhere,
    most of them at a distance. So the curve, by which steps are judged, has of each its Taylor
    series from there, :math:`\ell_i + \langle g_i, a - a_i \rangle - \tfrac{c}{2} |a - a_i|^2`,
    with the curvature c that was measured on the way. Without, what behaviours gained by a step
    would only count when their turn comes, and what the prior took at once.

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
    climb = _Climb(state, units, profiles, fold, frame, priors)
    taken = np.minimum(settings.batch, climb.counts)
    adam = _Adam(frame.steps(learning_rate), settings.steps)
    for rows in _turns(profiles, climb.counts, taken, settings.steps, seed):
        climb.move(adam.move(climb.visit(rows, likelihood)))
    return climb.result()


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

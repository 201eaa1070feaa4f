r"""The gradient posterior: soft tokens tuned user by user, EM around them.

**E-step.** Each profile's soft tokens, in the coordinates a of :mod:`recbole_uip.em.frame`, climb
the log posterior (:mod:`recbole_uip.em.ascent`).

**Measured offsets.** What EM needs of a profile is not its mode, which the prior has shrunk, but
what its behaviours alone say: a Newton step of each behaviour from the place :math:`a_i` of its
last visit, and how far chance moves their mean,

.. math:: y = \frac{1}{N} \sum_i \Bigl( a_i + \frac{\nabla \ell_i(a_i)}{c} \Bigr),
    \quad \nu = \frac{v}{c^2 N},

for a profile of N behaviours. The curvature c of one behaviour is the secant
:math:`-\langle \Delta a, \Delta \nabla \ell_i\rangle / |\Delta a|^2` between two visits to a
behaviour, pooled over all profiles; but at least 1, the Fisher information at :math:`\theta^0`.
The variance v of one behaviour's gradient, moved to one place by c, is pooled over the behaviours
of each profile. Were the LM's the true likelihood, v would be c (:math:`\nu` is the sandwich of
Huber 1967); where profiles have one unit each it is taken so.

**M-step.** The codebooks of all facets are fitted on (y, nu), as those of the closed form are
(:mod:`mixture`), each from the one before, scaled as offsets have been since.

**Bound.** Of held-out profiles, which no codebook is fitted on, the Laplace approximation of
:math:`\log p(x_u)` with :math:`a_u` integrated out (of precision c N), in nats a
behaviour. Rounds of E and M end when it stops rising.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from recbole_uip.em.ascent import SHARED, EStep, Likelihood, Prior, State, ascend
from recbole_uip.em.codebook import Level, unpack
from recbole_uip.em.frame import Frame, Units, curvature_of
from recbole_uip.em.residual import ResidualCodebook
from recbole_uip.settings import CodebookSettings, FacetSettings, GradientSettings

__all__ = ["GradientPosterior", "Run", "in_turn"]

#: Batches are as even as they can be and their number, if there are several, a multiple of this
#: one, so that a few workers that share them end together.
BATCHES = 4
#: Profiles, at most, that learning rates are tried on.
TRIED = 16

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
    curvature_, spread_ : ndarray of float64, shape (G,)
        c and v of one behaviour.
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
            self.curvature_, self.spread_ = self._moments(results)
            before = [offset.copy() for offset in self.offset_]
            self._measure(learn, results, evidence)
            self.codebooks_ = [
                self._fit_codebook(f, fitted & ~held_out, before[f])
                for f in range(len(self.facets))
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
        """The learning rate by which a few of ``profiles`` climb highest, less what they fall."""
        tried = np.random.default_rng(self.seed).permutation(profiles)[:TRIED]
        batches, priors = self._batches(tried), self.priors()
        rates = self.frame.learning_rates
        if not batches:
            return rates[1]

        def climb(index: int) -> dict[str, np.ndarray]:
            rate, chosen = rates[index % len(rates)], batches[index // len(rates)]
            return ascend(
                State.start(self._units, chosen), self._units, chosen, self._fold[chosen],
                self.frame, priors, self._likelihood, self.settings, rate, (self.seed, 1),
            ).arrays  # fmt: skip

        n = len(batches) * len(rates)
        results = self._run("rate", climb, n, ("curve", "lm_tokens"))
        self.tokens_ += sum(int(result["lm_tokens"]) for result in results)
        curves = np.reshape([result["curve"] for result in results], (len(batches), len(rates), -1))
        curves = curves.sum(axis=0)
        # Steps that overshoot are too long, even if they end a little higher. Before its values are
        # known a climb is NaN, and to the end if it diverged.
        reached = curves[:, -1] + np.fmin(np.diff(curves, axis=1), 0).sum(axis=1)
        return rates[int(np.argmax(np.nan_to_num(reached, nan=-np.inf)))]

    def _moments(self, results: list[EStep]) -> tuple[np.ndarray, np.ndarray]:
        """c and v of each facet's behaviours, shape (G,) each."""
        zero = np.zeros((len(self.facets), 2))
        secant = np.sum([zero, *(each.secant for each in results)], axis=0)
        curvature = curvature_of(secant)
        zero = np.zeros((len(self.facets), 4))
        g, cross, a, freedom = np.sum([zero, *(each.spread for each in results)], axis=0).T
        squares = g + curvature * (2.0 * cross + curvature * a)
        spread = np.where(freedom > 0, squares / np.maximum(freedom, 1.0), curvature)
        return curvature, spread

    def _measure(
        self, batches: list[np.ndarray], results: list[EStep], evidence: np.ndarray
    ) -> None:
        """Measured offsets and noise of tuned profiles."""
        for batch, result in zip(batches, results, strict=True):
            for f, part in enumerate(self.frame.slices):
                count = evidence[batch, f]
                known = count > 0
                curvature, known_batch = self.curvature_[f], batch[known]
                offset = result.expansion.offset(part, np.maximum(count, 1.0), curvature)
                self.noise_[known_batch, f] = self.spread_[f] / (curvature**2 * count[known])
                self.mode_[f][known_batch] = result.where[known, part]
                self.offset_[f][known_batch] = offset[known]

    def _fit_codebook(
        self, f: int, learn: np.ndarray, before: np.ndarray
    ) -> ResidualCodebook | None:
        """The codebook of facet ``f``, whose offsets were ``before`` in the last round."""
        chosen = np.flatnonzero(learn & np.isfinite(self.noise_[:, f]))
        if len(chosen) == 0:
            return None
        chosen = np.random.default_rng(self.seed).permutation(chosen)[: self.codebook.sample]
        codebook = ResidualCodebook.from_settings(self.facets[f], self.codebook, self.seed)
        offset = self.offset_[f][chosen]
        start = self._codebook_start(f, before[chosen], offset)
        return codebook.fit(offset, self.noise_[chosen, f], start)

    def _codebook_start(
        self, f: int, before: np.ndarray, offset: np.ndarray
    ) -> list[np.ndarray] | None:
        """The codebook of the last round, level by level, scaled as offsets have been since.

        By a larger curvature all offsets are shorter.
        """
        old = self.codebooks_[f]
        if old is None:
            return None
        scale = (before * offset).sum() / max((before**2).sum(), np.finfo(float).tiny)
        if scale <= 0.0:
            return None
        starts = []
        for level in old.levels_:
            (one,) = unpack(level.packed, level.n_codes, offset.shape[1])
            moved = Level(one.log_weights, scale * one.codewords, scale**2 * one.variance)
            starts.append(moved.pack())
        return starts

    def _bound(
        self,
        batches: list[np.ndarray],
        results: list[EStep],
        judged: np.ndarray,
        evidence: np.ndarray,
    ) -> float:
        """Mean bound of the profiles ``judged``, in nats a behaviour; NaN without any."""
        value = np.full(len(evidence), np.nan)
        with np.errstate(divide="ignore"):
            variance = 1.0 / (self.curvature_ * evidence)  # of a profile's offset, by its curvature
        for batch, result in zip(batches, results, strict=True):
            value[batch] = result.value
            for f, part in enumerate(self.frame.slices):
                # ℓ at the offset, as far as the curvature says
                place = self.offset_[f][batch]
                value[batch] += result.expansion.rise(
                    f, part, evidence[batch, f], self.curvature_[f], place
                )
        for f, codebook in enumerate(self.codebooks_):
            known = judged[evidence[judged, f] > 0]
            if codebook is None or len(known) == 0:
                continue
            offset = self.offset_[f][known]
            value[known] += codebook.levels_[0].score_samples(offset, variance[known, f])
            value[known] += 0.5 * offset.shape[1] * np.log(2.0 * np.pi * variance[known, f])
        if len(judged) == 0:
            return float("nan")
        events = np.bincount(self._units.owner, self._units.active.max(axis=1), len(evidence))
        return float(value[judged].sum() / events[judged].sum())

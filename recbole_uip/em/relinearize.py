r"""Between closed form and gradient steps: scores recomputed at codewords.

A round linearises each behaviour anew, at the codeword of its profile's code z, or where the way
there from θ⁰ leaves what the LM knows (:meth:`Frame.within`): :math:`a_z = s\, e_z`, s at most 1.

.. math:: \ell_i(a) \approx \ell_i(a_z) + \langle \nabla \ell_i(a_z), a - a_z \rangle
    - \tfrac{c}{2} |a - a_z|^2,

and measures the profile from there: :math:`y = a_z + \sum_i \nabla \ell_i(a_z) / (c N)`, an
iterated extended Kalman filter. The first round is at θ⁰, where cached scores say all that there
is to know: but for how directions are centred it is the closed form, and costs nothing. Profiles of
one code and fold share the LM's passes: a round costs at most K of each distinct behaviour for a
fold of users, and never more than one of each event.
"""

from __future__ import annotations

import hashlib

import numpy as np

from recbole_uip.em.ascent import EStep, State
from recbole_uip.em.frame import Expansion, secant_sums, spread_sums
from recbole_uip.em.gradient import GradientPosterior
from recbole_uip.work import even_batches

__all__ = ["RelinearizedPosterior"]


class RelinearizedPosterior(GradientPosterior):
    """EM over soft tokens whose behaviours are linearised at codewords, round by round.

    Parameters and attributes are those of :class:`GradientPosterior`. ``mode_`` has the points of
    linearisation, ``learning_rate_`` is 0, and a curve of ``curves_`` has the one value there.
    """

    # The bound at θ⁰ is of an extrapolation, and that at the first codewords of measured values.
    warm_up = 2

    def _choose_rate(self, profiles: np.ndarray) -> float:
        return 0.0

    def _batches(self, profiles: np.ndarray) -> list[np.ndarray]:
        """All at once: what is put through the LM in batches are behaviours, not profiles."""
        return [profiles] if len(profiles) else []

    def _tune(self, phase: str, batches: list[np.ndarray], number: int) -> list[EStep]:
        return [self._relinearize(phase, profiles, number) for profiles in batches]

    def _relinearize(self, phase: str, profiles: np.ndarray, number: int) -> EStep:
        """Values and gradients of all behaviours where their profiles' codes are."""
        units, frame = self._units, self.frame
        before = self._states.get((phase, 0)) or State.start(units, profiles)
        mine = units.of(profiles)
        owner = np.repeat(np.arange(len(profiles)), np.diff(units.first)[profiles])
        active, fold = units.active[mine], self._fold[profiles][owner]
        codes, where = self._codewords(profiles)
        where = frame.within(where, self._fold[profiles])
        here = where[owner]
        moved = (here - before.visited) * np.repeat(active > 0, frame.ranks, axis=1)
        fresh = np.flatnonzero(moved.any(axis=1) | np.isnan(before.value))
        # One pass for all that read the same under the same soft tokens.
        code = np.where(active > 0, codes[owner], -1)
        same = np.column_stack([units.passage[mine], fold, active > 0, code])[fresh]
        _, first, place = np.unique(same, axis=0, return_index=True, return_inverse=True)
        chosen, place = fresh[first], place.ravel()
        values, gradients = self._visit(
            f"{phase}-{number}", mine[chosen], here[chosen], fold[chosen], active[chosen]
        )
        gradient, value = before.gradient.copy(), before.value.copy()
        gradient[fresh], value[fresh] = gradients[place], values[place]
        known = fresh[np.isfinite(before.value[fresh])]  # at where they were before, too
        change = gradient[known] - before.gradient[known]
        lm_tokens = int(units.cost[mine[chosen]].sum())
        self.tokens_ += lm_tokens
        after = State(where, gradient, value, here, np.ones(len(mine), dtype=bool))
        self._states[phase, 0] = after
        log_likelihood = np.bincount(owner, value, len(profiles))
        log_priors = [
            prior.value_and_gradient(where[:, part])[0]
            for part, prior in zip(frame.slices, self.priors() or (), strict=False)
        ]
        last = active, gradient, here, owner, len(profiles)
        return EStep(
            where,
            log_likelihood,
            np.array([log_likelihood.sum() + np.sum(log_priors)]),
            secant_sums(frame, active[known], moved[known], change),
            spread_sums(frame, *last),
            np.array(lm_tokens),
            Expansion.of(frame, *last),
            after,
        )

    def _visit(
        self, phase: str, units: np.ndarray, where: np.ndarray, fold: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values (n,) and gradients (n, R) of units at coordinates (n, R), by the LM."""
        batches = list(even_batches(self._units.cost[units], self.batch_tokens))
        # Kept results are of these units at these places, and of no others.
        digest = hashlib.sha256(np.ascontiguousarray(units).tobytes())
        digest.update(np.ascontiguousarray(where).tobytes())

        def visit(index: int) -> dict[str, np.ndarray]:
            rows = batches[index]
            theta = self.frame.tokens(where[rows], fold[rows], active[rows])
            values, gradients = self._likelihood(units[rows], theta)
            return {
                "value": values,
                "gradient": self.frame.pull(gradients, fold[rows], active[rows]),
            }

        key = f"{phase}-{digest.hexdigest()[:16]}"
        found = self._run(key, visit, len(batches), ("value", "gradient"))
        values = np.empty(len(units))
        gradients = np.empty((len(units), self.frame.size), np.float32)
        for rows, result in zip(batches, found, strict=True):
            values[rows], gradients[rows] = result["value"], result["gradient"]
        return values, gradients

    def _codewords(self, profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, G), -1 for none yet, and soft tokens' coordinates (n, R), then zeros."""
        codes = np.full((len(profiles), len(self.facets)), -1)
        where = np.zeros((len(profiles), self.frame.size), np.float32)
        for f, (part, codebook) in enumerate(zip(self.frame.slices, self.codebooks_, strict=True)):
            known = np.isfinite(self.noise_[profiles, f])
            if codebook is None or not known.any():
                continue
            level, chosen = codebook.levels_[0], profiles[known]
            codes[known, f] = level.predict(self.offset_[f][chosen], self.noise_[chosen, f])
            where[known, part] = level.codewords_[codes[known, f]]
        return codes, where

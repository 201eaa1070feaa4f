r"""Online Laplace E-step: a filter for the random-slope model of taste.

A user likes an item with

.. math:: \mathrm{logit}\, p(\mathrm{like} \mid u, i) = a_i + b_u + \delta_u^\top g_i, \quad
          b_u \sim N(0, \lambda_0), \; \delta_u \sim N(0, \mathrm{diag}\,\lambda),

a_i the logit of the item's like rate, b_u the user's leniency and :math:`\delta_u` the user's
taste. Running sums of contrast weights are the score of this model at :math:`b = \delta = 0`;
here every event is weighed against what is already known of the user, so that one trait is not
counted twice. The posterior is Gaussian with diagonal covariance (assumed-density filtering,
one Newton step an event): O(rank) numbers a user, O(rank) work an event, no LM.

Between events the profile drifts back to its prior, m <- a m and P <- a^2 P + (1 - a^2) lambda
with a = 2^(-1/h): the steady state is the prior, so a user who is long away is a new user.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.special

from recbole_uip.em.states import History, retention, run

__all__ = ["TasteFilter", "climb", "log_evidence"]


class TasteFilter:
    """Kernel of the filter: state (m, P) of width 2 (rank + 1), leniency first.

    Parameters
    ----------
    vectors : ndarray, shape (n_items, rank)
        Item vectors g, scaled so that one event has unit noise.
    intercept : ndarray, shape (n_items,)
        a_i.
    prior_variance : ndarray, shape (rank + 1,)
        (lambda_0, lambda).
    item : ndarray of int64, shape (n_rows,)
    liked : ndarray of float64, shape (n_rows,)
    half_life : float
        In events of the user.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        intercept: np.ndarray,
        prior_variance: np.ndarray,
        item: np.ndarray,
        liked: np.ndarray,
        half_life: float,
    ) -> None:
        self.vectors = np.column_stack([np.ones(len(vectors)), vectors])
        self.intercept = intercept
        self.prior_variance = prior_variance
        self.item = item
        self.liked = liked
        self.keep = retention(half_life)
        self.drift = (1.0 - self.keep**2) * prior_variance

    def initial(self) -> np.ndarray:
        """Prior mean and variance, shape (2 (rank + 1),)."""
        return np.concatenate([np.zeros_like(self.prior_variance), self.prior_variance])

    def inputs(self, events: np.ndarray) -> np.ndarray:
        """Columns (1, g), a_i and y, shape (n_events, rank + 3)."""
        item = self.item[events]
        return np.column_stack([self.vectors[item], self.intercept[item], self.liked[events]])

    def advance(self, state: np.ndarray, inputs: np.ndarray) -> None:
        """Drift, then one Newton step towards the event's label."""
        width = len(self.prior_variance)
        mean, variance = state[:, :width], state[:, width:]
        vectors, intercept, liked = inputs[:, :width], inputs[:, -2], inputs[:, -1]
        mean *= self.keep
        variance *= self.keep**2
        variance += self.drift
        probability = scipy.special.expit(intercept + (vectors * mean).sum(axis=1))
        curvature = probability * (1.0 - probability)
        gain = variance * vectors
        spread = (gain * vectors).sum(axis=1)
        mean += gain * ((liked - probability) / (1.0 + curvature * spread))[:, None]
        variance /= 1.0 + curvature[:, None] * gain * vectors

    def logits(self, state: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Predicted logit a_i + b + delta' g_i of each state and item, shape (n,)."""
        mean = state[:, : len(self.prior_variance)]
        return self.intercept[item] + (self.vectors[item] * mean).sum(axis=1)


def log_evidence(kernel: TasteFilter, history: History, rows: np.ndarray) -> float:
    """Mean log p(label | the user's strictly earlier events) over ``rows``, in nats.

    This prequential likelihood chooses prior variances by empirical Bayes: it is honest on the
    training rows, for every label is predicted before it is used.
    """
    total = 0.0
    for at, state in run(kernel, history, rows):
        block = rows[at]
        sign = 1.0 - 2.0 * kernel.liked[block]
        total -= np.logaddexp(0.0, sign * kernel.logits(state, kernel.item[block])).sum()
    return total / len(rows)


def climb(
    objective: Callable[[tuple[float, ...]], float],
    start: tuple[float, ...],
    factor: float = 2.0,
    limit: float = 64.0,
) -> tuple[float, ...]:
    """Maximise over positive scales by steps of ``factor`` in one coordinate at a time.

    Empirical Bayes needs the order of magnitude of a prior variance, not its digits.

    Parameters
    ----------
    objective : callable
    start : tuple of float
    factor : float
    limit : float
        No scale leaves [start / limit, start * limit].
    """
    best, value = tuple(start), objective(tuple(start))
    improved = True
    while improved:
        improved = False
        for axis, step in [(a, s) for a in range(len(best)) for s in (factor, 1.0 / factor)]:
            while True:
                scales = (*best[:axis], best[axis] * step, *best[axis + 1 :])
                inside = start[axis] / limit <= scales[axis] <= start[axis] * limit
                candidate = objective(scales) if inside else -np.inf
                if candidate <= value + 1e-6:
                    break
                best, value, improved = scales, candidate, True
    return best

r"""Item vectors from behaviour alone: logistic matrix factorisation of the training rows.

The model is that of :mod:`recbole_uip.em.kernels`, logit p(like | u, i) = a_i + b_u + d_u' g_i,
with Gaussian priors on all of its parts. It is fitted by alternating Newton steps for users and
items from a truncated SVD of the evidence (a MAP version of Johnson, 2014, with the labels of
rated items in place of counts). Without labels the SVD is all there is. The items' texts may
shape the prior of their vectors (as in collaborative topic regression: Wang and Blei, 2011).

Vectors are fitted out of fold by user: the vectors that a user's rows meet were shaped by
other users' labels only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.special
from sklearn.linear_model import RidgeCV

from recbole_uip.behaviours import DataError

__all__ = ["Factors", "TextPrior", "balanced_folds", "logistic_factors", "svd_vectors"]

# Prior precisions of items against a prior of one for users. Nothing is sensitive to them.
ITEM_PRECISION = 3.0
INTERCEPT_PRECISION = 0.5
SWEEPS = 2
# The last sweeps, which shrink item vectors towards a regression on their texts; with texts there
# is one sweep more in all.
TEXT_SWEEPS = 2
# An item of this many events has half the limiting weight in that regression.
TEXT_EVENTS = 20.0
PENALTIES = np.logspace(0, 4, 9)
# Root mean square of the starting vectors: small, so that the first step is taken with care.
START_SCALE = 0.3
BLOCK_ROWS = 20_000


def balanced_folds(n: int, folds: int, seed: int) -> np.ndarray:
    """Folds drawn at random, whose sizes differ by one at most, shape (n,)."""
    return np.random.default_rng(seed).permutation(np.arange(n) % folds)


class TextPrior(NamedTuple):
    """Prior means of item vectors by the items' texts: ``texts @ slope + intercept``.

    Attributes
    ----------
    slope : ndarray, shape (m, rank)
    intercept : ndarray, shape (rank,)
    """

    slope: np.ndarray
    intercept: np.ndarray

    def mapped(self, mean: np.ndarray, directions: np.ndarray) -> TextPrior:
        """The prior of vectors v that are mapped to ``(v - mean) @ directions``."""
        return TextPrior(self.slope @ directions, (self.intercept - mean) @ directions)


class Factors(NamedTuple):
    """Item vectors of the logistic factor model.

    Attributes
    ----------
    vectors : ndarray of float64, shape (n_items, rank)
    text_prior : TextPrior or None
        Their prior mean; None without texts, where it is zero.
    """

    vectors: np.ndarray
    text_prior: TextPrior | None


def svd_vectors(
    user: np.ndarray,
    item: np.ndarray,
    weight: np.ndarray,
    n_users: int,
    n_items: int,
    rank: int,
    seed: int = 0,
) -> np.ndarray:
    """Right singular vectors of the users x items matrix of evidence, times singular values.

    Parameters
    ----------
    user, item : ndarray of int64, shape (n_events,)
    weight : ndarray of float64, shape (n_events,)
        Evidence weights; the weights of repeated pairs add up.
    n_users, n_items : int
    rank : int
        Number of vectors; padded with zeros where the matrix is smaller.
    seed : int

    Returns
    -------
    ndarray of float64, shape (n_items, rank)
        Zero rows for items without events.

    Raises
    ------
    DataError
        If there are fewer than two users or items.
    """
    matrix = scipy.sparse.csr_array((weight, (user, item)), shape=(n_users, n_items))
    rows, columns = (np.flatnonzero(matrix.count_nonzero(axis=axis)) for axis in (1, 0))
    matrix = matrix[rows][:, columns]
    vectors = np.zeros((n_items, rank))
    kept = min(rank, min(matrix.shape) - 1)
    if kept < 1:
        raise DataError(
            "collaborative item vectors need training events of at least 2 users on at least 2 "
            f"items outside each fold of users, but of one there are {matrix.shape[0]} users on "
            f"{matrix.shape[1]} items: leave the facet out"
        )
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    _, values, right = scipy.sparse.linalg.svds(matrix, k=kept, v0=start, solver="arpack")
    order = np.argsort(-values)
    vectors[columns, :kept] = (values[order, None] * right[order]).T
    return vectors


def logistic_factors(
    user: np.ndarray,
    item: np.ndarray,
    liked: np.ndarray,
    n_users: int,
    rate: np.ndarray,
    start: np.ndarray,
    texts: np.ndarray | None = None,
) -> Factors:
    """Item vectors of the logistic factor model, by alternating Newton steps.

    With texts the model is hierarchical: an item's vector is what its text says plus a deviation,
    g_i ~ N(W t_i + c, 1 / precision), so items with few events have the vectors of their texts. W
    is a ridge regression of the vectors of the sweep before; leave-one-out error chooses the
    penalty, direction by direction.

    Parameters
    ----------
    user, item : ndarray of int64, shape (n_events,)
    liked : ndarray of float64, shape (n_events,)
    n_users : int
    rate : ndarray of float64, shape (n_items,)
        Smoothed like rates; their logits are the prior means of the intercepts.
    start : ndarray of float64, shape (n_items, rank)
        Where the item vectors start, up to scale.
    texts : ndarray of float64, shape (n_items, m), optional
        Vectors of the items' texts; zeros for an item without.

    Returns
    -------
    Factors

    Raises
    ------
    DataError
        If texts have no directions in which they differ.
    """
    if texts is not None and texts.shape[1] == 0:
        raise DataError("the texts of the items of the training rows say the same")
    rank = start.shape[1]
    prior_intercept = scipy.special.logit(rate)
    root_mean_square = np.sqrt((start**2).mean(axis=0))
    # Column 0 is an intercept: b_u of a user, the deviation of a_i of an item from its prior. The
    # other side's design has a one there.
    items = np.zeros((len(start), rank + 1))
    items[:, 1:] = START_SCALE * start / np.where(root_mean_square > 0, root_mean_square, 1.0)
    users = np.zeros((n_users, rank + 1))
    user_precision = np.ones(rank + 1)
    item_precision = np.full(rank + 1, ITEM_PRECISION)
    item_precision[0] = INTERCEPT_PRECISION
    by_user, by_item = np.argsort(user, kind="stable"), np.argsort(item, kind="stable")
    events = np.bincount(item, minlength=len(start))
    sweeps = SWEEPS if texts is None else SWEEPS + 1
    prior, text_prior = np.zeros_like(items), None
    for sweep in range(sweeps):
        offset = prior_intercept[item] + items[item, 0]
        design = np.column_stack([np.ones(len(items)), items[:, 1:]])
        users = _ridge_logistic_step(
            users, user[by_user], item[by_user], liked[by_user], offset[by_user],
            design, user_precision,
        )  # fmt: skip
        offset = prior_intercept[item] + users[user, 0]
        design = np.column_stack([np.ones(n_users), users[:, 1:]])
        if texts is not None and sweep >= sweeps - TEXT_SWEEPS:
            text_prior = _fit_text_prior(items[:, 1:], texts, events)
            prior[:, 1:] = texts @ text_prior.slope + text_prior.intercept
        items = _ridge_logistic_step(
            items, item[by_item], user[by_item], liked[by_item], offset[by_item],
            design, item_precision, prior,
        )  # fmt: skip
    return Factors(items[:, 1:], text_prior)


def _fit_text_prior(vectors: np.ndarray, texts: np.ndarray, events: np.ndarray) -> TextPrior:
    """Regression of the vectors of items with events on their texts."""
    met = events > 0
    weight = events[met] / (events[met] + TEXT_EVENTS)
    ridge = RidgeCV(PENALTIES, alpha_per_target=True)
    ridge.fit(texts[met], vectors[met], sample_weight=weight / weight.mean())
    return TextPrior(np.atleast_2d(ridge.coef_).T, np.atleast_1d(ridge.intercept_))


def _ridge_logistic_step(
    coefficients: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    liked: np.ndarray,
    offset: np.ndarray,
    design: np.ndarray,
    precision: np.ndarray,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """One Newton step of a ridge logistic regression for every row at once.

    ``row`` is sorted. Since the design of an event depends on its column alone, the Hessians of
    all rows are one sparse product: (rows x columns of curvatures) @ (columns x outer products).
    ``prior`` has the prior means, zero by default.
    """
    width = design.shape[1]
    # Hessians are symmetric: one triangle of each will do.
    left, right = np.triu_indices(width)
    outer = design[:, left] * design[:, right]
    updated = coefficients.copy()
    for low in range(0, len(coefficients), BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, len(coefficients))
        first, last = np.searchsorted(row, [low, high])
        events = slice(first, last)
        at = (row[events] - low, column[events])
        shape = (high - low, len(design))
        logit = offset[events] + (coefficients[row[events]] * design[at[1]]).sum(axis=1)
        probability = scipy.special.expit(logit)
        curvature = scipy.sparse.csr_array((probability * (1 - probability), at), shape=shape)
        residual = scipy.sparse.csr_array((liked[events] - probability, at), shape=shape)
        hessian = np.empty((high - low, width, width))
        hessian[:, left, right] = hessian[:, right, left] = curvature @ outer
        hessian += np.diag(precision)
        deviation = coefficients[low:high] - (0.0 if prior is None else prior[low:high])
        gradient = residual @ design - precision * deviation
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        # A full step may overshoot where curvatures vanish; no trait moves further than this.
        updated[low:high] += step / np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True) / 3)
    return updated

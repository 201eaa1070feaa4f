r"""States, and the compiled arithmetic on them: what an event adds, and what a state says.

A *state* is one user's row of numbers, which each event updates in the order of time. It is the
concatenation of slices, one for each *kernel*: an update rule and its parameters (item vectors,
prior, half-life). There are two kinds.

:class:`RunningSums` holds, for the events e of one user,

.. math:: S = \sum_e a^{k_e} w_e g_{i(e)}, \quad N = \sum_e a^{k_e} n_e,

with w and n from :mod:`recbole_uip.em.weights`, k_e the number of the user's events since e,
and a = 2^(-1/h) for a half-life of h events. The user's measured offset is y = S / N and its
noise variance 1 / N, in units where one event has unit noise. Without forgetting that is the
sampling variance of a mean of N events. With it, it is the variance of a profile that drifts as a
random walk whose Kalman gain is 1 - a: such a filter's variance settles at 1 - a, which is 1 / N of
a long history, and grows while the user's events are no evidence. An event on an item whose vector
is zero, of which nothing is known, is no evidence.

:class:`TasteFilter` holds the posterior mean and variance of the random-slope model

.. math:: \mathrm{logit}\, p(\mathrm{like} \mid u, i) = a_i + b_u + \delta_u^\top g_i, \quad
          b_u \sim N(0, \lambda_0), \; \delta_u \sim N(0, \mathrm{diag}\,\lambda),

a_i the logit of the item's like rate, b_u the user's leniency and :math:`\delta_u` the user's
taste. Running sums of contrast weights are the score of this model at :math:`b = \delta = 0`;
here every event is weighed against what is already known of the user, so that one trait is not
counted twice. The posterior is kept Gaussian with diagonal covariance. An event with label y, at
the p that the drifted posterior (m, P) predicts, and with c = p (1 - p) and g_0 = 1 for leniency,

.. math:: m_d \leftarrow m_d + \frac{P_d g_d (y - p)}{1 + c \sum_j P_j g_j^2}, \quad
          P_d \leftarrow \frac{P_d}{1 + c P_d g_d^2},

is one Newton step (the extended Kalman filter's mean), and the diagonal of the precision, from
which the correlations that the event brings are left out. Between events the profile drifts back
to its prior, m <- a m and P <- a^2 P + (1 - a^2) lambda: the steady state is the prior, so a user
who is long away is a new user.

Either takes O(rank) numbers a user and O(rank) work an event, and no LM. Batches and single
users go through the same functions, row by row and in one order of operations, so they give the
same bits. States are kept in single precision; sums are taken in double.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import scipy.special

from recbole_uip.settings import WEIGHTS

__all__ = [
    "Fields",
    "Kernels",
    "RunningSums",
    "TasteFilter",
    "advance",
    "advance_many",
    "encode",
    "encode_matches",
    "intercepts",
    "nearest_codes",
    "pack",
    "posterior_means",
    "profile_values",
    "retention",
    "score_candidates",
    "walk",
]

SUMS, FILTER = 0, 1
CODE, VALUE = 0, 1
#: Evidence N of running sums that counts as none.
FORGOTTEN = 1e-12
POSITIVE, NEGATIVE, ALL = (WEIGHTS.index(name) for name in ("positive", "negative", "all"))

_NO_VECTORS = np.empty(0, dtype=np.float32)

# Compiled code is cached by the file that a function stands in: what inlines another function must
# stand in the file of that one, or it would go on with its old arithmetic after a change.
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")
_inlined = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


def retention(half_life: float) -> float:
    """Factor a = 2^(-1/h) that a state keeps at each event, for a half-life of h events."""
    return 2.0 ** (-1.0 / half_life)


@dataclass(frozen=True)
class RunningSums:
    """Kernel of the sums (S, N), of width rank + 1.

    Attributes
    ----------
    vectors : ndarray of float32, shape (n_folds, n_items, at least rank)
        Item vectors g, one set for each fold of users, or one for all.
    mean, variance : ndarray of float64, shape (rank,)
        Prior of the offset, in units of one event's noise.
    weight : str
        Evidence weight of an event.
    half_life : float
        In events of the user.
    """

    vectors: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    weight: str
    half_life: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.mean)

    @property
    def initial(self) -> np.ndarray:
        """State of a user without events: zeros."""
        return np.zeros(self.rank + 1)

    @property
    def prior(self) -> np.ndarray:
        """Mean, then variance."""
        return np.concatenate([self.mean, self.variance])


@dataclass(frozen=True)
class TasteFilter:
    """Kernel of the filter: (m, P), of width 2 (rank + 1), leniency first.

    Attributes
    ----------
    vectors : ndarray of float32, shape (n_folds, n_items, at least rank)
        Item vectors g, scaled so that one event has unit noise.
    variance : ndarray of float64, shape (rank + 1,)
        Prior variances (lambda_0, lambda).
    half_life : float
        In events of the user.
    """

    vectors: np.ndarray
    variance: np.ndarray
    half_life: float
    weight: str = "contrast"

    @property
    def rank(self) -> int:
        """Number of directions beside leniency."""
        return len(self.variance) - 1

    @property
    def initial(self) -> np.ndarray:
        """State of a user without events: the prior's mean and variance."""
        return np.concatenate([np.zeros_like(self.variance), self.variance])

    @property
    def prior(self) -> np.ndarray:
        """Prior variances."""
        return self.variance


class Kernels(NamedTuple):
    """Kernels side by side in one state, as arrays that compiled code reads.

    Attributes
    ----------
    kind, weight, rank : ndarray of int64, shape (n_kernels,)
        ``SUMS`` or ``FILTER``, index into ``WEIGHTS``, and number of directions.
    keep : ndarray of float64, shape (n_kernels,)
        Retention a.
    start : ndarray of int64, shape (n_kernels + 1,)
        Where each kernel's stretch of the state begins.
    folded : ndarray of int64, shape (n_kernels,)
        1 where item vectors differ by the user's fold, else 0.
    n_folds : ndarray of int64, shape (1,)
        Folds of users by which they differ; like rates may have several times as many, so that
        each leaves fewer users out.
    table, stride, prior : ndarray of int64, shape (n_kernels,)
        Where its item vectors begin in ``vectors`` and how far apart they are, and where its
        prior begins in ``priors``.
    vectors : ndarray of float32, shape (n_numbers,)
        Item vectors by kernel, fold and item.
    priors : ndarray of float64, shape (n_numbers,)
    rate, intercept : ndarray of float64, shape (n_rate_folds or 1, n_items)
        Smoothed like rates of items, and their logits a_i; one set for each fold of users, or one
        for all. A user of fold f meets the item vectors of fold f modulo ``n_folds``.
    initial : ndarray of float32, shape (width,)
        State of a user without events.
    """

    kind: np.ndarray
    weight: np.ndarray
    rank: np.ndarray
    keep: np.ndarray
    start: np.ndarray
    folded: np.ndarray
    n_folds: np.ndarray
    table: np.ndarray
    stride: np.ndarray
    prior: np.ndarray
    vectors: np.ndarray
    priors: np.ndarray
    rate: np.ndarray
    intercept: np.ndarray
    initial: np.ndarray


class Fields(NamedTuple):
    """Token fields of a state, as arrays that compiled code reads.

    Attributes
    ----------
    kernel, kind : ndarray of int64, shape (n_fields,)
        The kernel that a field reads, and whether it is a ``CODE`` or the bin of a ``VALUE``.
    column : ndarray of int64, shape (n_fields + 1,)
        First column of each field; a code has one for each level.
    size : ndarray of int64, shape (n_fields,)
        Codes of each level, or number of inner bin edges.
    first : ndarray of int64, shape (n_fields,)
        Where its numbers begin: bin edges, or log weights, codewords and variance of each level.
    numbers : ndarray of float64, shape (n_numbers,)
    unknown : ndarray of int64, shape (n_columns,)
        Token of a user without evidence; -1 has the bin of the prior.
    """

    kernel: np.ndarray
    kind: np.ndarray
    column: np.ndarray
    size: np.ndarray
    first: np.ndarray
    numbers: np.ndarray
    unknown: np.ndarray


def pack(kernels: Sequence[RunningSums | TasteFilter], rate: np.ndarray) -> Kernels:
    """Lay kernels out side by side.

    Parameters
    ----------
    kernels : sequence of RunningSums or TasteFilter
        Kernels that share an array of vectors share its place in memory.
    rate : ndarray of float64, shape (n_items,) or (n_rate_folds, n_items)
        Smoothed like rates; zeros where there are no labels.
    """
    tables, places, size = [], {}, 0
    for kernel in kernels:
        if id(kernel.vectors) not in places:
            places[id(kernel.vectors)] = size
            tables.append(np.asarray(kernel.vectors, dtype=np.float32).reshape(-1))
            size += kernel.vectors.size
    priors = [kernel.prior for kernel in kernels]
    initial = [kernel.initial for kernel in kernels]
    rate = np.atleast_2d(np.asarray(rate, dtype=np.float64))
    return Kernels(
        kind=_integers(FILTER if isinstance(kernel, TasteFilter) else SUMS for kernel in kernels),
        weight=_integers(WEIGHTS.index(kernel.weight) for kernel in kernels),
        rank=_integers(kernel.rank for kernel in kernels),
        keep=np.array([retention(kernel.half_life) for kernel in kernels]),
        start=_starts(initial),
        folded=_integers(kernel.vectors.shape[0] > 1 for kernel in kernels),
        n_folds=_integers([max((kernel.vectors.shape[0] for kernel in kernels), default=1)]),
        table=_integers(places[id(kernel.vectors)] for kernel in kernels),
        stride=_integers(kernel.vectors.shape[2] for kernel in kernels),
        prior=_starts(priors)[:-1],
        vectors=tables[0] if len(tables) == 1 else np.concatenate([*tables, _NO_VECTORS]),
        priors=np.concatenate([*priors, np.empty(0)]),
        rate=rate,
        intercept=intercepts(rate),
        initial=np.concatenate([*initial, np.empty(0)]).astype(np.float32),
    )


def intercepts(rate: np.ndarray) -> np.ndarray:
    """Logits a_i of like rates, finite also where there are no labels (rate 0)."""
    return scipy.special.logit(np.clip(rate, 1e-12, 1.0 - 1e-12))


def _integers(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)


@_inlined
def advance(state, kernels, item, fold, liked):
    """Let one event enter ``state``, shape (width,), in place.

    Parameters
    ----------
    state : ndarray of float32
    kernels : Kernels
    item, fold : int
        The event's item, and its user's fold.
    liked : float
        1 or 0; 1 for implicit feedback.
    """
    for k in range(len(kernels.kind)):
        row = _vector(kernels, k, item, fold)
        if kernels.kind[k] == SUMS:
            _add(state, kernels, k, row, item, fold, liked)
        else:
            _filter_step(state, kernels, k, row, item, fold, liked)


@_compiled
def advance_many(states, rows, kernels, items, folds, liked):
    """Let events enter the rows of ``states`` that they belong to, in their order, in place.

    Parameters
    ----------
    states : ndarray of float32, shape (n_states, width)
    rows, items, folds : ndarray of int64, shape (n_events,)
    kernels : Kernels
    liked : ndarray of float64, shape (n_events,)
    """
    for event in range(len(rows)):
        advance(states[rows[event]], kernels, items[event], folds[event], liked[event])


@_compiled
def walk(kernels, events, first, item, fold, liked, timeline, seen, start, states):
    """Follow each timeline once, and write its state where a row asks for it.

    Parameters
    ----------
    kernels : Kernels
    events, first : ndarray of int64
        As in :class:`recbole_uip.em.states.History`.
    item, fold, liked : ndarray, shape (n_rows,)
        As in :class:`recbole_uip.em.states.Events`.
    timeline, seen : ndarray of int64, shape (n,)
        Where states are asked for, sorted by timeline, then by ``seen``.
    start : ndarray of float32, shape (n_timelines, width) or (1, width)
        State that each timeline begins with, or that of all.
    states : ndarray of float32, shape (n, width)
        Output, written in place.
    """
    state = np.empty_like(kernels.initial)
    done = 0
    for row in range(len(timeline)):
        if row == 0 or timeline[row] != timeline[row - 1]:
            state[:] = start[timeline[row] if len(start) > 1 else 0]
            done = 0
        for position in range(done, seen[row]):
            event = events[first[timeline[row]] + position]
            advance(state, kernels, item[event], fold[event], liked[event])
        done = seen[row]
        states[row] = state


@_inlined
def _vector(kernels, k, item, fold):
    """Where the item's vector begins."""
    table = kernels.folded[k] * (fold % kernels.n_folds[0])
    return kernels.table[k] + (table * kernels.rate.shape[1] + item) * kernels.stride[k]


@_inlined
def _row(kernels, fold):
    """Row of like rates and intercepts that users of ``fold`` meet."""
    return fold if kernels.rate.shape[0] > 1 else 0


@_inlined
def _is_told(kernels, row, rank):
    """Whether anything is known of the item whose vector begins at ``row``."""
    told = False
    for d in range(rank):
        told = told or kernels.vectors[row + d] != 0.0
    return told


@_inlined
def _add(state, kernels, k, row, item, fold, liked):
    """(S, N) <- (a S, a N) + (w g, n)."""
    rank, at, keep = kernels.rank[k], kernels.start[k], kernels.keep[k]
    kind = kernels.weight[k]
    count = 1.0
    if kind == POSITIVE:
        count = liked
    elif kind == NEGATIVE:
        count = 1.0 - liked
    if not _is_told(kernels, row, rank):
        count = 0.0
    weight = count
    if kind not in (POSITIVE, NEGATIVE, ALL):
        weight = count * (liked - kernels.rate[_row(kernels, fold), item])
    for d in range(rank):
        state[at + d] = keep * state[at + d] + weight * kernels.vectors[row + d]
    state[at + rank] = keep * state[at + rank] + count
    if state[at + rank] < FORGOTTEN:
        # before the numbers leave the range of float32, and each at another event
        for d in range(rank + 1):
            state[at + d] = 0.0


@_inlined
def _filter_step(state, kernels, k, row, item, fold, liked):
    """Drift, then one Newton step towards the event's label."""
    rank, mean, keep = kernels.rank[k], kernels.start[k], kernels.keep[k]
    prior, spent = kernels.prior[k], 1.0 - keep * keep
    variance = mean + rank + 1
    # Leniency is the trait of vector 1.
    logit = kernels.intercept[_row(kernels, fold), item] + keep * state[mean]
    spread = keep * keep * state[variance] + spent * kernels.priors[prior]
    for d in range(rank):
        g = np.float64(kernels.vectors[row + d])
        drifted = keep * keep * state[variance + 1 + d] + spent * kernels.priors[prior + 1 + d]
        logit += keep * state[mean + 1 + d] * g
        spread += drifted * g * g
    probability = 1.0 / (1.0 + np.exp(-logit))
    curvature = probability * (1.0 - probability)
    step = (liked - probability) / (1.0 + curvature * spread)
    for d in range(rank + 1):
        g = np.float64(kernels.vectors[row + d - 1]) if d > 0 else 1.0
        drifted = keep * keep * state[variance + d] + spent * kernels.priors[prior + d]
        state[mean + d] = keep * state[mean + d] + drifted * g * step
        state[variance + d] = drifted / (1.0 + curvature * drifted * g * g)


@_inlined
def _largest(sizes):
    largest = 1
    for size in sizes:
        largest = max(largest, size)
    return largest


@_inlined
def _dot(left, right, at, n):
    """Sum of left[d] * right[at + d]; four partial sums, for the processor to take at once."""
    a = b = c = e = 0.0
    for d in range(0, n - 3, 4):
        a += left[d] * right[at + d]
        b += left[d + 1] * right[at + d + 1]
        c += left[d + 2] * right[at + d + 2]
        e += left[d + 3] * right[at + d + 3]
    for d in range(n - n % 4, n):
        a += left[d] * right[at + d]
    return (a + b) + (c + e)


@_inlined
def _is_known(state, seen, kernels, k):
    """Whether the user has any evidence for kernel ``k``."""
    if kernels.kind[k] == SUMS:
        return state[kernels.start[k] + kernels.rank[k]] > 0
    return seen > 0


@_inlined
def _posterior(state, kernels, k, profile):
    """Write the posterior mean deviation from the average user; return the constant beside it.

    For running sums lambda / (lambda + noise) (y - mean) and 0; for the filter m and b_u.
    """
    rank, at = kernels.rank[k], kernels.start[k]
    if kernels.kind[k] == FILTER:
        for d in range(rank):
            profile[d] = state[at + 1 + d]
        return np.float64(state[at])
    count = np.float64(state[at + rank])
    prior = kernels.prior[k]
    noise = 1.0 / count if count > 0 else np.inf
    for d in range(rank):
        variance = kernels.priors[prior + rank + d]
        offset = state[at + d] / count if count > 0 else 0.0
        profile[d] = variance / (variance + noise) * (offset - kernels.priors[prior + d])
    return 0.0


@_inlined
def _lift(profile, constant, kernels, k, item, fold):
    """What a profile says of an item; see :func:`profile_values`."""
    row = _vector(kernels, k, item, fold)
    return constant + _dot(profile, kernels.vectors, row, kernels.rank[k])


@_compiled
def profile_values(states, kernels, k, items, folds):
    """What each state says of an item by kernel ``k``.

    Of running sums the lift g' m, of a filter the lift b_u + g' m of the logit. The item's own a_i
    is left out: a model has the item for that, and among the rows of one item the like rates of
    other users would tell of each row's label, in reverse.

    Parameters
    ----------
    states : ndarray of float32, shape (n, width)
    kernels : Kernels
    k : int
    items, folds : ndarray of int64, shape (n,)

    Returns
    -------
    ndarray of float64, shape (n,)
    """
    values = np.empty(len(states))
    profile = np.empty(kernels.rank[k])
    for row in range(len(states)):
        constant = _posterior(states[row], kernels, k, profile)
        values[row] = _lift(profile, constant, kernels, k, items[row], folds[row])
    return values


@_compiled
def posterior_means(states, kernels, k):
    """Posterior mean deviation of each state from the average user, by kernel ``k``.

    Parameters
    ----------
    states : ndarray of float32, shape (n, width)
    kernels : Kernels
    k : int

    Returns
    -------
    ndarray of float64, shape (n, rank of k)
    """
    means = np.empty((len(states), kernels.rank[k]))
    for row in range(len(states)):
        _posterior(states[row], kernels, k, means[row])
    return means


@_inlined
def _edges(fields, f):
    """Inner bin edges of a field."""
    return fields.numbers[fields.first[f] : fields.first[f] + fields.size[f]]


@_inlined
def _bin(value, edges):
    """1 + the number of edges that are not above ``value``."""
    token = 1
    for edge in range(len(edges)):
        # Counting all edges is faster than bisection: nothing to mispredict.
        token += edges[edge] <= value
    return token


@_inlined
def _nearest(residual, noise, log_weights, codewords, variance, scores):
    """Code of largest responsibility: argmax_k of log pi_k - sum_d (y - e_k)^2 / (2 total_d)."""
    n_codes = len(log_weights)
    scores[:n_codes] = log_weights
    for d in range(len(residual)):
        half_precision = 0.5 / (variance[d] + noise)
        # Code by code in the inner loop, which the processor takes several at once.
        for code in range(n_codes):
            difference = residual[d] - codewords[d * n_codes + code]
            scores[code] -= half_precision * difference * difference
    best = 0
    for code in range(1, n_codes):
        if scores[code] > scores[best]:
            best = code
    return best


@_inlined
def _quantise(residual, noise, numbers, first, n_codes, scores, out):
    """Codes of all levels, from 0; ``residual`` becomes what the last level leaves."""
    rank = len(residual)
    for level in range(len(out)):
        middle, last = first + n_codes, first + n_codes * (rank + 1)
        codewords = numbers[middle:last]
        code = _nearest(
            residual, noise, numbers[first:middle], codewords, numbers[last : last + rank], scores
        )
        out[level] = code
        for d in range(rank):
            residual[d] -= codewords[d * n_codes + code]
        first = last + rank


@_compiled
def nearest_codes(offsets, noise, numbers, n_codes, levels):
    """Codes of measured offsets.

    Parameters
    ----------
    offsets : ndarray of float64, shape (n, rank)
    noise : ndarray of float64, shape (n,)
    numbers : ndarray of float64
        Log weights (K,), codewords (rank, K) and variance (rank,) of each level, flat.
    n_codes, levels : int

    Returns
    -------
    ndarray of int64, shape (n, levels)
        From 0.
    """
    codes = np.empty((len(offsets), levels), dtype=np.int64)
    scores = np.empty(n_codes)
    for row in range(len(offsets)):
        _quantise(offsets[row].copy(), noise[row], numbers, 0, n_codes, scores, codes[row])
    return codes


@_compiled
def encode(states, seen, kernels, fields, out):
    """Tokens of fields that belong to the user: codes, and bins of one-dimensional traits.

    Parameters
    ----------
    states : ndarray of float32, shape (n, width)
    seen : ndarray of int64, shape (n,)
        Number of events behind each state.
    kernels : Kernels
    fields : Fields
    out : ndarray of int32, shape (n, n_columns)
        Output, written in place: 0 for [PAD], else from 1.
    """
    scratch, scores = np.empty(_largest(kernels.rank)), np.empty(_largest(fields.size))
    for row in range(len(states)):
        state = states[row]
        for f in range(len(fields.kernel)):
            k, column = fields.kernel[f], fields.column[f]
            rank, at = kernels.rank[k], kernels.start[k]
            known = _is_known(state, seen[row], kernels, k)
            nothing_fitted = fields.kind[f] == CODE and fields.size[f] == 0
            if nothing_fitted or (not known and fields.unknown[column] >= 0):
                for c in range(column, fields.column[f + 1]):
                    out[row, c] = fields.unknown[c]
            elif fields.kind[f] == VALUE:
                # A trait is the lift of any item: all have the same vector.
                constant = _posterior(state, kernels, k, scratch)
                value = _lift(scratch, constant, kernels, k, 0, 0)
                out[row, column] = _bin(value, _edges(fields, f))
            else:
                count = np.float64(state[at + rank])
                for d in range(rank):
                    scratch[d] = state[at + d] / count
                codes = out[row, column : fields.column[f + 1]]
                _quantise(
                    scratch[:rank],
                    1.0 / count,
                    fields.numbers,
                    fields.first[f],
                    fields.size[f],
                    scores,
                    codes,
                )
                for c in range(len(codes)):
                    codes[c] += 1


@_inlined
def _match(state, seen, kernels, fields, f, items, folds, profile, out):
    k = fields.kernel[f]
    if fields.unknown[f] >= 0 and not _is_known(state, seen, kernels, k):
        out[:, f] = fields.unknown[f]
        return
    constant = _posterior(state, kernels, k, profile)
    edges = _edges(fields, f)
    for row in range(len(items)):
        out[row, f] = _bin(_lift(profile, constant, kernels, k, items[row], folds[row]), edges)


@_compiled
def encode_matches(states, seen, kernels, fields, items, folds, out):
    """Match tokens of each state with one item.

    Parameters
    ----------
    states : ndarray of float32, shape (n, width)
    seen, items, folds : ndarray of int64, shape (n,)
    kernels : Kernels
    fields : Fields
        Each with one column.
    out : ndarray of int32, shape (n, n_fields)
        Output, written in place.
    """
    profile = np.empty(_largest(kernels.rank))
    for row in range(len(states)):
        one = slice(row, row + 1)
        for f in range(len(fields.kernel)):
            _match(
                states[row], seen[row], kernels, fields, f, items[one], folds[one], profile,
                out[one],
            )  # fmt: skip


@_compiled
def score_candidates(state, seen, kernels, fields, items, folds, out):
    """Match tokens of one state, shape (width,), with many items; see :func:`encode_matches`."""
    profile = np.empty(_largest(kernels.rank))
    for f in range(len(fields.kernel)):
        _match(state, seen, kernels, fields, f, items, folds, profile, out)

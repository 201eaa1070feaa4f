"""One facet, fitted: item vectors -> basis -> states -> codes, bins and match fields."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from recbole_uip.behaviours import Behaviours
from recbole_uip.em import basis as em_basis
from recbole_uip.em import weights
from recbole_uip.em.basis import Basis
from recbole_uip.em.filter import TasteFilter, climb, log_evidence
from recbole_uip.em.match import assign_bins, quantile_edges
from recbole_uip.em.mixture import ResidualCodebook
from recbole_uip.em.states import History, RunningSums, offsets, run
from recbole_uip.em.weights import Evidence
from recbole_uip.settings import CodebookSettings, FacetSettings

__all__ = ["Facet", "FacetField", "ItemVectors", "Observations"]

logger = logging.getLogger(__name__)

# Parameters but the basis are fitted on the training rows of this many users.
SAMPLE_USERS = 2000
# Where empirical Bayes starts, and on how many users it looks.
PRIOR_SCALES = (1.0, 0.25)
PRIOR_USERS = 200


@dataclass(frozen=True)
class Observations:
    """What a facet is fitted on.

    Attributes
    ----------
    behaviours : Behaviours
    history : History
        What each row may see.
    evidence : Evidence
        Of all rows, by the facet's weight.
    rate : ndarray of float64, shape (n_items,) or None
        Smoothed like rates of the training rows; None without labels.
    train_events : ndarray of int64, shape (n_train,)
        Training rows by user, each user's in the order of time.
    """

    behaviours: Behaviours
    history: History
    evidence: Evidence
    rate: np.ndarray | None
    train_events: np.ndarray

    def refitted(self, kind: str, events: np.ndarray) -> tuple[Evidence, np.ndarray | None]:
        """Evidence of ``events`` by weight ``kind``, and like rates, from these events alone."""
        behaviours = self.behaviours
        item = behaviours.item[events]
        if behaviours.liked is None:
            return weights.evidence(kind, item, None, None), None
        liked = behaviours.liked[events]
        rate = weights.like_rate(item, liked, behaviours.n_items)
        return weights.evidence(kind, item, liked, rate), rate


@dataclass(frozen=True)
class ItemVectors:
    """Whitened item vectors, one set for each fold of users.

    Attributes
    ----------
    by_fold : sequence of ndarray, each of shape (n_items, m)
    fold : ndarray of int64, shape (n_users,)
        The set that each user's rows meet. Nothing in it may come from that user's labels.
    """

    by_fold: Sequence[np.ndarray]
    fold: np.ndarray


@dataclass(frozen=True)
class FacetField:
    """Tokens of one field: ``values`` (0 is [PAD]) of shape (n_rows,), up to ``size``."""

    name: str
    kind: str
    values: np.ndarray
    size: int


class Facet:
    """A facet's learned state and the fields it gives.

    Parameters
    ----------
    settings : FacetSettings
    codebook : CodebookSettings
    empty : {"pad", "prior"}
        Token of a user without evidence: [PAD], or the prior's mode.
    seed : int

    Attributes
    ----------
    basis_ : Basis
        Item vectors of all folds of users, fold by fold, in one frame.
    codebooks_ : dict of str to ResidualCodebook
        By field name; None where no training row has any history.
    prior_scales_ : tuple of float
        (lambda_0, factor of the basis's variances) of the filter; only with a match field.
    edges_ : dict of str to ndarray
        Inner bin edges, by field name.
    """

    def __init__(
        self,
        settings: FacetSettings,
        codebook: CodebookSettings | None = None,
        *,
        empty: str = "pad",
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.codebook = codebook or CodebookSettings()
        self.empty = empty
        self.seed = seed

    def fit(self, vectors: ItemVectors, observed: Observations) -> Facet:
        """Fit basis, prior, codebooks and bin edges on the training rows."""
        self.fold_ = vectors.fold
        self.basis_ = self._fit_basis(vectors, observed)
        self.codebooks_: dict[str, ResidualCodebook] = {}
        self.edges_: dict[str, np.ndarray] = {}
        sample = self._sample_rows(observed)
        if self.settings.source == "constant":
            for name, half_life in self._names("", self.settings.half_life):
                values, known = self._trait_values(half_life, observed, sample)
                self.edges_[name] = quantile_edges(values[known], self.settings.bins)
        elif self.settings.codes:
            for name, half_life in self._names("", self.settings.half_life):
                self.codebooks_[name] = self._fit_codebook(half_life, observed, sample)
        if match := self.settings.match:
            if self._filters:
                self.prior_scales_ = self._fit_prior(observed, sample)
            items = observed.behaviours.item[sample]
            for name, half_life in self._names("_match", match.half_life):
                values, known = self.match_values(half_life, observed, sample, items)
                self.edges_[name] = quantile_edges(values[known], match.bins)
        return self

    def transform(self, observed: Observations) -> list[FacetField]:
        """Fields of all rows, each from what the row may see."""
        rows = np.arange(len(observed.behaviours))
        fields: list[FacetField] = []
        if self.settings.source == "constant":
            for name, half_life in self._names("", self.settings.half_life):
                values, known = self._trait_values(half_life, observed, rows)
                tokens = self._bins(name, values, known)
                fields.append(FacetField(name, "bin", tokens, len(self.edges_[name]) + 1))
        elif self.settings.codes:
            for name, half_life in self._names("", self.settings.half_life):
                fields += self._code_fields(name, half_life, observed, rows)
        match_tokens = self.match_tokens(observed, rows, observed.behaviours.item)
        for name, tokens in match_tokens.items():
            fields.append(FacetField(name, "match", tokens, len(self.edges_[name]) + 1))
        return fields

    def match_values(
        self, half_life: float, observed: Observations, rows: np.ndarray, items: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the profiles that ``rows`` may see say of ``items``.

        With the filter this is the predicted logit; on running sums, the first-order lift
        g' m of the log-likelihood, m the posterior mean deviation from the average user.

        Parameters
        ----------
        half_life : float
        observed : Observations
        rows, items : ndarray of int64, shape (n,)

        Returns
        -------
        values : ndarray of float64, shape (n,)
        known : ndarray of bool, shape (n,)
            Whether the profile has any evidence.
        """
        values, known = np.empty(len(rows)), observed.history.seen[rows] > 0
        vector_of = self._vector_index(observed.behaviours.user[rows], items, observed)
        if self._filters:
            taste = self._filter(half_life, observed, self.prior_scales_)
            for at, state in run(taste, observed.history, rows):
                values[at] = taste.logits(state, vector_of[at])
        else:
            vectors = self.basis_.vectors
            for at, state in run(self._sums(vectors, half_life, observed), observed.history, rows):
                offset, noise, known[at] = offsets(state)
                lift = self.basis_.posterior(offset, noise) * vectors[vector_of[at]]
                values[at] = lift.sum(axis=1)
        return values, known

    def match_tokens(
        self, observed: Observations, rows: np.ndarray, items: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Match fields of the profiles that ``rows`` may see with ``items``, by field name."""
        tokens = {}
        half_lives = self.settings.match.half_life if self.settings.match else ()
        for name, half_life in self._names("_match", half_lives):
            values, known = self.match_values(half_life, observed, rows, items)
            tokens[name] = self._bins(name, values, known)
        return tokens

    def report(self) -> dict:
        """What the fit has to say: prior variances, codebooks and filters."""
        report: dict = {"prior_variance": self.basis_.variance.round(5).tolist()}
        if hasattr(self, "prior_scales_"):
            report["filter_scales"] = list(self.prior_scales_)
        for name, codebook in self.codebooks_.items():
            if codebook is None:
                continue
            report[name] = [
                {
                    "converged": level.converged_,
                    "iterations": level.n_iter_,
                    "lower_bound": round(level.lower_bound_, 5),
                    "perplexity": round(level.perplexity_, 2),
                    "reseeded": len(level.reseeded_),
                }
                for level in codebook.levels_
            ]
        return report

    @property
    def _filters(self) -> bool:
        posterior = self.settings.match.posterior
        return posterior == "filter" or (posterior == "auto" and self.settings.weight == "contrast")

    def _fit_basis(self, vectors: ItemVectors, observed: Observations) -> Basis:
        train, behaviours = observed.train_events, observed.behaviours
        fold_of_event = vectors.fold[behaviours.user[train]]
        rank = max(
            self.settings.rank if self.settings.codes else 0,
            self.settings.match.rank if self.settings.match else 0,
        )
        bases = []
        for fold, whitened in enumerate(vectors.by_fold):
            # What a user meets is shaped by the users of the other folds alone.
            chosen = train[fold_of_event != fold] if len(vectors.by_fold) > 1 else train
            evidence, _ = observed.refitted(self.settings.weight, chosen)
            bases.append(
                em_basis.fit(
                    whitened,
                    behaviours.user[chosen],
                    behaviours.item[chosen],
                    evidence,
                    behaviours.n_users,
                    min(rank, whitened.shape[1]),
                )
            )
        return em_basis.merge(bases)

    def _vector_index(
        self, user: np.ndarray, item: np.ndarray, observed: Observations
    ) -> np.ndarray:
        """Row of the basis's vectors for each user and item: the item's, in the user's fold."""
        return self.fold_[user] * observed.behaviours.n_items + item

    def _row_vectors(self, observed: Observations) -> np.ndarray:
        behaviours = observed.behaviours
        return self._vector_index(behaviours.user, behaviours.item, observed)

    def _sums(self, vectors: np.ndarray, half_life: float, observed: Observations) -> RunningSums:
        return RunningSums(vectors, self._row_vectors(observed), observed.evidence, half_life)

    def _filter(
        self, half_life: float, observed: Observations, scales: tuple[float, float]
    ) -> TasteFilter:
        constant = self.settings.source == "constant"
        vectors = self.basis_.vectors[:, :0] if constant else self.basis_.vectors
        leniency, taste = scales
        folds = len(vectors) // observed.behaviours.n_items
        return TasteFilter(
            vectors,
            np.tile(scipy.special.logit(observed.rate), folds),
            np.concatenate([[leniency], taste * self.basis_.variance[: vectors.shape[1]]]),
            self._row_vectors(observed),
            observed.behaviours.liked,
            half_life,
        )

    def _offsets(
        self, half_life: float, observed: Observations, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Positions in ``rows`` with evidence, their offsets and noise, in blocks."""
        sums = self._sums(self.basis_.vectors[:, : self.settings.rank], half_life, observed)
        for at, state in run(sums, observed.history, rows):
            offset, noise, known = offsets(state)
            yield at[known], offset[known], noise[known]

    def _trait_values(
        self, half_life: float, observed: Observations, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean of a one-dimensional facet, and whether there is evidence."""
        values, known = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
        sums = self._sums(self.basis_.vectors, half_life, observed)
        for at, state in run(sums, observed.history, rows):
            offset, noise, known[at] = offsets(state)
            values[at] = self.basis_.posterior(offset, noise)[:, 0]
        return values, known

    def _sample_rows(self, observed: Observations) -> np.ndarray:
        """Training rows of a random sample of users: states cost a pass over whole users."""
        behaviours = observed.behaviours
        users = np.unique(behaviours.user[behaviours.train])
        users = np.random.default_rng(self.seed).permutation(users)[:SAMPLE_USERS]
        return np.flatnonzero(behaviours.train & np.isin(behaviours.user, users))

    def _fit_codebook(
        self, half_life: float, observed: Observations, sample: np.ndarray
    ) -> ResidualCodebook | None:
        blocks = [block[1:] for block in self._offsets(half_life, observed, sample)]
        offset, noise = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        if len(noise) == 0:
            logger.warning("no training row has any history: every code is [PAD]")
            return None
        chosen = np.random.default_rng(self.seed).permutation(len(noise))[: self.codebook.sample]
        codebook = ResidualCodebook(
            self.settings.codes,
            self.settings.levels,
            max_iter=self.codebook.max_iter,
            tol=self.codebook.tol,
            n_init=self.codebook.n_init,
            random_state=self.seed,
        )
        return codebook.fit(offset[chosen], noise[chosen])

    def _code_fields(
        self, name: str, half_life: float, observed: Observations, rows: np.ndarray
    ) -> list[FacetField]:
        codebook = self.codebooks_[name]
        codes = np.zeros((len(rows), self.settings.levels), dtype=np.int64)
        if codebook is not None:
            if self.empty == "prior":
                codes[:] = codebook.prior_codes() + 1
            for at, offset, noise in self._offsets(half_life, observed, rows):
                if len(at):
                    codes[at] = codebook.predict(offset, noise) + 1
        return [
            FacetField(
                name if level == 0 else f"{name}_level{level + 1}",
                "code",
                codes[:, level],
                self.settings.codes,
            )
            for level in range(self.settings.levels)
        ]

    def _bins(self, name: str, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        # Without evidence the posterior mean is the prior's, and has a bin like any other.
        return assign_bins(values, self.edges_[name], known | (self.empty == "prior"))

    def _names(self, kind: str, half_lives: tuple[float, ...]) -> Iterator[tuple[str, float]]:
        """Field name of each half-life, which it ends in where there are several."""
        for half_life in half_lives:
            suffix = "" if len(half_lives) == 1 else f"_{half_life:g}"
            yield f"uip_{self.settings.name}{kind}{suffix}", half_life

    def _fit_prior(self, observed: Observations, sample: np.ndarray) -> tuple[float, float]:
        """Prior variances of the filter by empirical Bayes on the training rows."""
        users = np.unique(observed.behaviours.user[sample])
        users = np.random.default_rng(self.seed).permutation(users)[:PRIOR_USERS]
        rows = sample[np.isin(observed.behaviours.user[sample], users)]
        half_life = max(self.settings.match.half_life)

        def evidence_of(scales: tuple[float, float]) -> float:
            return log_evidence(self._filter(half_life, observed, scales), observed.history, rows)

        return climb(evidence_of, start=PRIOR_SCALES)

"""One facet, fitted: item vectors -> basis -> states -> codebooks, priors and bin edges."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_uip.behaviours import Behaviours, DataError
from recbole_uip.em import basis as em_basis
from recbole_uip.em import weights
from recbole_uip.em.basis import Basis
from recbole_uip.em.bins import quantile_edges
from recbole_uip.em.kernels import RunningSums, TasteFilter, pack, profile_values
from recbole_uip.em.prior import climb, log_evidence
from recbole_uip.em.residual import ResidualCodebook
from recbole_uip.em.states import Events, History, iter_states, offsets
from recbole_uip.em.weights import Evidence
from recbole_uip.settings import RATE_FOLDS, CodebookSettings, FacetSettings

__all__ = ["Facet", "FieldRecipe", "Observations"]

logger = logging.getLogger(__name__)

# All parameters except the bases are fitted on the training rows of this many users.
SAMPLE_USERS = 2000
# Where empirical Bayes starts, and on how many users it looks.
PRIOR_SCALES = (1.0, 0.25)
TEXT_SCALE = 0.0625
PRIOR_USERS = 200


@dataclass(frozen=True)
class Observations:
    """What a facet is fitted on.

    Attributes
    ----------
    behaviours : Behaviours
    history : History
        What each row may see.
    fold : ndarray of int64, shape (n_users,)
        Fold of each user: nothing that the user's rows meet of like rates and item vectors may
        come from the user's own labels, but for the rotation of all items that turns the frame of
        one fold to that of another.
    n_folds : int
        Folds of users by which item vectors are fitted; a user's is ``fold`` modulo this number.
        Like rates, which are cheap, take the finer ``fold`` itself and so leave fewer users out.
    """

    behaviours: Behaviours
    history: History
    fold: np.ndarray
    n_folds: int

    @functools.cached_property
    def train_events(self) -> np.ndarray:
        """Training rows by user, each user's in the order of time, shape (n_train,), int64."""
        return self.behaviours.in_time_order(self.behaviours.train)

    @functools.cached_property
    def vector_fold(self) -> np.ndarray:
        """Fold of item vectors that each user meets, shape (n_users,), int64."""
        return self.fold % self.n_folds

    @functools.cached_property
    def events(self) -> Events:
        """The rows as events."""
        return Events.from_behaviours(self.behaviours, self.fold)

    @functools.cached_property
    def rate(self) -> np.ndarray | None:
        """Like rates that users of each fold meet, shape (n_rate_folds, n_items)."""
        return self.rates(self.n_folds * RATE_FOLDS)

    def rates(self, n_folds: int) -> np.ndarray | None:
        """Like rates of the training rows of other users, by ``fold`` modulo ``n_folds``.

        Returns
        -------
        ndarray of float64, shape (n_folds, n_items), or None without labels
        """
        behaviours, train = self.behaviours, self.train_events
        if behaviours.liked is None:
            return None
        fold = self.fold[behaviours.user[train]] % n_folds
        item, liked = behaviours.item[train], behaviours.liked[train]
        return weights.out_of_fold_rates(item, liked, fold, behaviours.n_items, n_folds)

    @property
    def item_rate(self) -> np.ndarray:
        """Like rates, or zeros without labels, shape (n_rate_folds, n_items) or (n_items,)."""
        return np.zeros(self.behaviours.n_items) if self.rate is None else self.rate

    def evidence_of(self, kind: str, events: np.ndarray) -> tuple[Evidence, np.ndarray | None]:
        """Evidence of ``events`` by weight ``kind``, and like rates, from these events alone."""
        behaviours = self.behaviours
        item = behaviours.item[events]
        if behaviours.liked is None:
            return weights.evidence(kind, item, None, None), None
        liked = behaviours.liked[events]
        rate = weights.like_rate(item, liked, behaviours.n_items)
        return weights.evidence(kind, item, liked, rate), rate


@dataclass(frozen=True)
class FieldRecipe:
    """How one token field, or one of several levels, is made of states.

    Attributes
    ----------
    names : tuple of str
        One name for each level.
    kind : {"code", "bin", "match"}
    kernel : RunningSums or TasteFilter
        What it reads.
    size : int
        Codes of each level, or number of inner bin edges.
    numbers : ndarray of float64
        Bin edges, or the codebook's numbers.
    unknown : tuple of int
        Token of a user without evidence at each level; -1 for the prior's own bin.
    """

    names: tuple[str, ...]
    kind: str
    kernel: RunningSums | TasteFilter
    size: int
    numbers: np.ndarray
    unknown: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens, [PAD] not counted."""
        return self.size if self.kind == "code" else self.size + 1


class Facet:
    """A facet's learned state.

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
    text_bases_ : dict of str to Basis
        The same of the items' texts, by source.
    vectors_ : ndarray of float32, shape (n_folds, n_items, rank)
        All of these side by side, as states add them up.
    codebooks_ : dict of str to ResidualCodebook
        By field name; None where no training row has any history.
    prior_scales_ : tuple of float
        (lambda_0, factor of the basis's variances, factors of the texts') of the filter, fitted at
        the longest half-life and used at all; only with a match field that it makes.
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

    def fit(
        self,
        vectors: Sequence[np.ndarray],
        observed: Observations,
        texts: Mapping[str, np.ndarray] | None = None,
    ) -> Facet:
        """Fit basis, prior, codebooks and bin edges on the training rows.

        Parameters
        ----------
        vectors : sequence of ndarray, each of shape (n_items, m)
            Whitened item vectors for each fold of users, or one array for all users.
        observed : Observations
        texts : mapping of str to ndarray of shape (n_items, m), optional
            Whitened vectors of the items' texts, by source, for further directions of the filter.

        Raises
        ------
        DataError
            If there are too few events, users or distinct profiles to fit a parameter on.
        """
        self.basis_ = self.fit_basis(vectors, observed)
        self.text_bases_ = {
            source: self.fit_basis([each] * len(vectors), observed)
            for source, each in (texts or {}).items()
        }
        shape = (len(vectors), observed.behaviours.n_items, -1)
        every = [self.basis_, *self.text_bases_.values()]
        together = np.concatenate([basis.vectors for basis in every], axis=1)
        self.vectors_ = together.astype(np.float32).reshape(shape)
        if self.settings.source == "collaborative":
            self.vectors_[~self._known_items(observed, texts or {})] = 0.0
        self.codebooks_: dict[str, ResidualCodebook | None] = {}
        self.edges_: dict[str, np.ndarray] = {}
        sample = self._sample_rows(observed)
        for name, half_life in self.settings.fields:
            if self.settings.source == "constant":
                values = self._known_values(self._sums(1, half_life), observed, sample)
                self.edges_[name] = quantile_edges(values, self.settings.bins)
            else:
                self.codebooks_[name] = self._fit_codebook(half_life, observed, sample)
        if match := self.settings.match:
            if self.settings.has_filter:
                self.prior_scales_ = self._fit_prior(observed, sample)
            for name, half_life in self.settings.match_fields:
                values = self._known_values(self._match_kernel(half_life), observed, sample)
                self.edges_[name] = quantile_edges(values, match.bins)
        return self

    def _known_items(self, observed: Observations, texts: Mapping[str, np.ndarray]) -> np.ndarray:
        """Items of which users of other folds or a text tell, bool, shape (n_folds, n_items).

        The vectors of the others are zeros less the mean of the items, which tells nothing.
        """
        n_folds, n_items, _ = self.vectors_.shape
        train, behaviours = observed.train_events, observed.behaviours
        of_user = observed.vector_fold[behaviours.user[train]]
        known = np.stack(
            [
                np.bincount(behaviours.item[train[of_user != fold]], minlength=n_items) > 0
                for fold in range(n_folds)
            ]
        )
        for vectors in texts.values():
            known |= vectors.any(axis=1)
        return known

    def fields(self) -> list[FieldRecipe]:
        """The facet's token fields."""
        recipes = []
        for name, half_life in self.settings.fields:
            if self.settings.source == "constant":
                recipes.append(self._bins(name, "bin", self._sums(1, half_life)))
            else:
                recipes.append(self._codes(name, half_life))
        for name, half_life in self.settings.match_fields:
            recipes.append(self._bins(name, "match", self._match_kernel(half_life)))
        return recipes

    def report(self) -> dict:
        """Diagnostics of the fit: prior variances, codebooks and filters."""
        report: dict = {"prior_variance": self.basis_.variance.round(5).tolist()}
        if hasattr(self, "prior_scales_"):
            report["filter_scales"] = list(self.prior_scales_)
        for name, codebook in self.codebooks_.items():
            if codebook is None:
                continue
            report[name] = codebook.report()
        return report

    def fit_basis(self, vectors: Sequence[np.ndarray], observed: Observations) -> Basis:
        """The facet's directions, by the training rows; see :meth:`fit`."""
        train, behaviours = observed.train_events, observed.behaviours
        fold_of_event = observed.vector_fold[behaviours.user[train]]
        # In a small catalogue the users of one fold may span less than those of another.
        rank = min(self.settings.n_directions, *(whitened.shape[1] for whitened in vectors))
        if rank == 0:
            raise DataError("the vectors of the items of the training rows do not differ")
        bases = []
        for fold, whitened in enumerate(vectors):
            # What a user meets is shaped by the users of the other folds alone, up to the one
            # rotation by which merge makes folds comparable.
            chosen = train[fold_of_event != fold] if len(vectors) > 1 else train
            evidence, _ = observed.evidence_of(self.settings.weight, chosen)
            bases.append(
                em_basis.fit(
                    whitened,
                    behaviours.user[chosen],
                    behaviours.item[chosen],
                    evidence,
                    behaviours.n_users,
                    rank,
                    self.settings.directions,
                )
            )
        return em_basis.merge(bases)

    def _sums(self, rank: int, half_life: float) -> RunningSums:
        basis = self.basis_
        return RunningSums(
            self.vectors_, basis.mean[:rank], basis.variance[:rank], self.settings.weight, half_life
        )

    def _filter(self, half_life: float, scales: tuple[float, ...]) -> TasteFilter:
        leniency, *others = scales
        variances = [basis.variance for basis in (self.basis_, *self.text_bases_.values())]
        if self.settings.source == "constant":
            # All that there is to say is leniency, the filter's first trait.
            variances = []
        scaled = [scale * each for scale, each in zip(others, variances, strict=False)]
        return TasteFilter(self.vectors_, np.concatenate([[leniency], *scaled]), half_life)

    def _match_kernel(self, half_life: float) -> RunningSums | TasteFilter:
        if self.settings.has_filter:
            return self._filter(half_life, self.prior_scales_)
        return self._sums(len(self.basis_.variance), half_life)

    def _sample_rows(self, observed: Observations) -> np.ndarray:
        """Training rows of a random sample of users: states cost a pass over whole users."""
        # Users one after another, so that what is drawn of it does not hang on the order of rows.
        train, user = observed.train_events, observed.behaviours.user
        users = np.random.default_rng(self.seed).permutation(np.unique(user[train]))[:SAMPLE_USERS]
        return train[np.isin(user[train], users)]

    def _known_values(
        self, kernel: RunningSums | TasteFilter, observed: Observations, rows: np.ndarray
    ) -> np.ndarray:
        """What profiles with evidence say of the rows' items, shape (at most n,)."""
        kernels, parts = pack([kernel], observed.item_rate), []
        for at, states in iter_states(kernels, observed.history, observed.events, rows):
            block = rows[at]
            known = observed.history.seen[block] > 0
            if isinstance(kernel, RunningSums):
                known = states[:, kernel.rank] > 0
            block, states = block[known], states[known]
            items, folds = observed.events.item[block], observed.events.fold[block]
            parts.append(profile_values(states, kernels, 0, items, folds))
        return np.concatenate(parts)

    def _fit_codebook(
        self, half_life: float, observed: Observations, sample: np.ndarray
    ) -> ResidualCodebook | None:
        wanted = self.codebook.sample
        rows = np.random.default_rng(self.seed).permutation(sample)
        # Rows without evidence are of no use: look at more rows than wanted, then at all.
        for looked_at in (4 * wanted, len(rows)):
            offset, noise = self._offsets(half_life, observed, rows[:looked_at])
            if len(noise) >= wanted:
                break
        if len(noise) == 0:
            logger.warning(
                "uip_facets.%s: no training row has any history, so every code is [PAD]",
                self.settings.name,
            )
            return None
        codebook = ResidualCodebook.from_settings(self.settings, self.codebook, self.seed)
        return codebook.fit(offset[:wanted], noise[:wanted])

    def _offsets(
        self, half_life: float, observed: Observations, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and noise of the rows that have evidence, in the order of ``rows``."""
        kernels = pack([self._sums(self.settings.rank, half_life)], observed.item_rate)
        states = np.empty((len(rows), len(kernels.initial)), dtype=np.float32)
        for at, block in iter_states(kernels, observed.history, observed.events, rows):
            states[at] = block
        offset, noise, known = offsets(states)
        return offset[known], noise[known]

    def _codes(self, name: str, half_life: float) -> FieldRecipe:
        codebook = self.codebooks_[name]
        unknown = np.zeros(self.settings.levels, dtype=np.int64)
        if codebook is not None and self.empty == "prior":
            unknown = codebook.prior_codes() + 1
        return FieldRecipe(
            tuple(self.settings.level_names(name)),
            "code",
            self._sums(self.settings.rank, half_life),
            0 if codebook is None else self.settings.codes,
            np.empty(0) if codebook is None else codebook.packed,
            tuple(unknown.tolist()),
        )

    def _bins(self, name: str, kind: str, kernel: RunningSums | TasteFilter) -> FieldRecipe:
        # Without evidence the posterior mean is the prior's, and has a bin like any other.
        unknown = -1 if self.empty == "prior" else 0
        edges = self.edges_[name]
        return FieldRecipe((name,), kind, kernel, len(edges), edges, (unknown,))

    def _fit_prior(self, observed: Observations, sample: np.ndarray) -> tuple[float, ...]:
        """Prior variances of the filter by empirical Bayes on the training rows."""
        users = np.unique(observed.behaviours.user[sample])
        users = np.random.default_rng(self.seed).permutation(users)[:PRIOR_USERS]
        rows = sample[np.isin(observed.behaviours.user[sample], users)]
        half_life = max(self.settings.match.half_life)

        def objective(scales: tuple[float, ...]) -> float:
            kernel = self._filter(half_life, scales)
            return log_evidence(kernel, observed.rate, observed.history, observed.events, rows)

        start = (*PRIOR_SCALES, *[TEXT_SCALE] * len(self.text_bases_))
        return climb(objective, start=start)

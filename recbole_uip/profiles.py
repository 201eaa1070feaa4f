"""From events and item texts to profile fields: the pipeline that ties lm and em together.

This module knows no RecBole: the bridge and the bank call it with plain arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from recbole_uip.behaviours import Behaviours, in_seconds
from recbole_uip.em import basis, collaborative, states, weights
from recbole_uip.em.collaborative import TextPrior
from recbole_uip.em.encoder import Encoder, FieldInfo
from recbole_uip.em.facet import Facet, Observations
from recbole_uip.settings import (
    TEXT_SOURCES,
    FacetSettings,
    SettingsError,
    UIPSettings,
    default_time,
    refusals_of,
)
from recbole_uip.texts import bag_of_words, rated_texts

if TYPE_CHECKING:
    from recbole_uip.lm import Scores, Vectors
    from recbole_uip.tuning import Tuned

__all__ = [
    "ProfileField",
    "Profiles",
    "TextVectors",
    "collaborative_vectors",
    "infer",
    "raw_scores",
    "resolved",
]

logger = logging.getLogger(__name__)

# Leading Fisher directions of the items' texts that a basis may use, and that collaborative
# vectors are read from.
LM_DIRECTIONS = 700
TEXT_DIRECTIONS = 64
# Parts of a user's training rows under uip_time=cross_fitted: each sees 4/5 of them.
PARTS = 5


@dataclass(frozen=True)
class ProfileField(FieldInfo):
    """One token field, and its tokens.

    Attributes
    ----------
    values : ndarray of int32, shape (n_rows,)
        Token of each row: 0 for [PAD] (no history), else 1 to ``size``.
    """

    values: np.ndarray


@dataclass(frozen=True)
class TextVectors:
    """What vectors of the items' texts were whitened by, for items that come later.

    Attributes
    ----------
    whitening : Whitening
    fingerprint : str or None
        Of the LM; None without one (``source: words``).
    theta0 : ndarray of float32, shape (n_facets, d), or None
        Soft tokens at which scores were taken (``source: lm``).
    vocabulary : tuple of str
        Words that count (``source: words``).
    """

    whitening: basis.Whitening
    fingerprint: str | None = None
    theta0: np.ndarray | None = None
    vocabulary: tuple[str, ...] = ()


@dataclass
class Profiles:
    """The profile stage's result.

    Attributes
    ----------
    fields : tuple of ProfileField
    static : bool
        Whether a user has the same tokens in all rows.
    cost : dict of str to float
        ``lm_tokens``, ``lm_seconds``, ``em_seconds``.
    report : dict of str to dict
        Diagnostics of each facet's fit.
    facets : dict of str to Facet
        The fitted facets.
    encoder : Encoder
        Their kernels and fields, which turn events into tokens.
    history : History
        What each row may see.
    events : Events
        The rows as events.
    texts : dict of str to TextVectors
        For each source by which facets read the items' texts.
    text_priors : dict of str to list of TextPrior
        For each collaborative facet that knows texts, by fold: what its whitened item vectors are
        by the first :data:`TEXT_DIRECTIONS` of each of its ``texts``.
    tuned : dict of str to Tuned
        The facets whose soft tokens were tuned by gradients; the encoder does not know them.
    """

    fields: tuple[ProfileField, ...]
    static: bool
    cost: dict[str, float]
    report: dict[str, dict]
    facets: dict[str, Facet]
    encoder: Encoder
    history: states.History
    events: states.Events
    texts: dict[str, TextVectors]
    text_priors: dict[str, list[TextPrior]]
    tuned: dict[str, Tuned]

    def means(self) -> dict[str, np.ndarray]:
        """What all rows' fields are before they are quantised; see :meth:`Encoder.means`."""
        means = self.encoder.means(self.history, self.events)
        return means | {each.names[0]: each.row_means() for each in self.tuned.values()}

    def match(self, rows: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
        """Match fields of the users and times of ``rows``, with other ``items``.

        Parameters
        ----------
        rows, items : ndarray of int64, shape (n,)

        Returns
        -------
        dict of str to ndarray of int32, shape (n,)
            Tokens, by field name.
        """
        names = [field.name for field in self.fields if field.kind == "match"]
        if not names:
            return {}
        tokens = self.encoder.match(self.history, self.events, rows, items)
        return dict(zip(names, tokens.T, strict=True))


def infer(
    behaviours: Behaviours,
    item_texts: Sequence[str | None] | None,
    settings: UIPSettings,
    fold: np.ndarray | None = None,
) -> Profiles:
    """Infer every facet of ``settings``, fitted on the training rows alone.

    Parameters
    ----------
    behaviours : Behaviours
    item_texts : sequence of str or None, length n_items
        None or an empty text for an item that has none; only ``source: lm``, ``prefix``,
        ``embedding`` and ``words`` read them.
    settings : UIPSettings
    fold : ndarray of int64, shape (n_users,), optional
        Fold of each user, below ``settings.user_folds``; balanced and random by default.

    Raises
    ------
    SettingsError
        If a facet cannot be inferred from this data.
    ValueError
        If there is not a fold for each user and a text for each item, or a fold is out of range.
    """
    started = time.perf_counter()
    if not behaviours.train.any():
        raise SettingsError("the training split has no rows: profiles have nothing to learn from")
    settings = resolved(settings, behaviours)
    _check_time(behaviours, settings)
    _check_weights(behaviours, settings)
    history = _history(behaviours, settings)
    if settings.folds > behaviours.n_users:
        raise SettingsError(f"uip_folds={settings.folds} is more than there are users: lower it")
    if fold is None:
        fold = collaborative.balanced_folds(behaviours.n_users, settings.user_folds, settings.seed)
    _check_folds(fold, behaviours.n_users, settings.user_folds)
    if item_texts is not None and len(item_texts) != behaviours.n_items:
        raise ValueError(
            f"there are {len(item_texts)} item_texts and {behaviours.n_items} items: give one for "
            "each, None for an item without a text"
        )
    observed = Observations(behaviours, history, fold, settings.folds)
    cost: Counter[str] = Counter()
    closed = [facet for facet in settings.facets if facet not in settings.tuned_facets]
    text_vectors, texts = {}, {}
    for source in TEXT_SOURCES:
        if any(source in facet.text_sources for facet in closed):
            with _cache_refusals(settings.cache):
                text_vectors[source], texts[source] = _text_vectors(
                    source, behaviours, item_texts, settings, cost
                )

    def fit(facet: FacetSettings) -> tuple[Facet, list[TextPrior]]:
        with refusals_of(facet):
            vectors, priors = _item_vectors(facet, observed, text_vectors, settings)
            own_texts = {source: text_vectors[source] for source in facet.texts}
            fitted = Facet(facet, settings.codebook, empty=settings.empty, seed=settings.seed)
            return fitted.fit(vectors, observed, own_texts), priors

    fitted = _in_parallel(fit, closed)
    facets = {name: facet for name, (facet, _) in fitted.items()}
    encoder = Encoder.from_recipes(
        {name: facet.fields() for name, facet in facets.items()}, observed.item_rate
    )
    tokens = encoder.transform(history, observed.events)
    fields = [
        ProfileField(info.name, info.facet, info.kind, info.size, np.ascontiguousarray(values))
        for info, values in zip(encoder.fields, tokens.T, strict=True)
    ]
    tuned: dict[str, Tuned] = {}
    if settings.tuned_facets:
        from recbole_uip.tuning import tune

        with _cache_refusals(settings.cache):
            tuned = tune(observed, item_texts or (), settings, cost)
        fields += [field for each in tuned.values() for field in _tuned_fields(each, settings)]
    order = [facet.name for facet in settings.facets]
    cost["em_seconds"] = time.perf_counter() - started - cost["lm_seconds"]
    return Profiles(
        fields=tuple(sorted(fields, key=lambda each: order.index(each.facet))),
        static=settings.time == "static",
        cost=dict(cost),
        report={name: facet.report() for name, facet in facets.items()}
        | {name: each.report for name, each in tuned.items()},
        facets=facets,
        encoder=encoder,
        history=history,
        events=observed.events,
        texts=texts,
        text_priors={name: priors for name, (_, priors) in fitted.items() if priors},
        tuned=tuned,
    )


@contextlib.contextmanager
def _cache_refusals(cache: Path) -> Iterator[None]:
    """Say of a cache that cannot be written to how to have another."""
    try:
        yield
    except OSError as error:
        folder, failed = cache.expanduser(), Path(error.filename or "")
        if folder not in (failed, *failed.parents) and failed not in folder.parents:
            raise
        raise SettingsError(
            f"uip_cache={str(cache)!r} cannot be used: {error}; name a folder that can be written "
            "to, by uip_cache or by RECBOLE_UIP_CACHE in the environment"
        ) from error


def _tuned_fields(tuned: Tuned, settings: UIPSettings) -> list[ProfileField]:
    """Fields of a facet whose soft tokens were tuned by gradients."""
    tokens = tuned.tokens(settings.empty).T
    return [
        ProfileField(name, tuned.settings.name, "code", tuned.size, np.ascontiguousarray(values))
        for name, values in zip(tuned.names, tokens, strict=True)
    ]


def _in_parallel(
    fit: Callable[[FacetSettings], tuple[Facet, list[TextPrior]]], facets: Sequence[FacetSettings]
) -> dict[str, tuple[Facet, list[TextPrior]]]:
    """What ``fit`` makes of each facet, by name, in their order.

    Each has one thread: small eigenproblems gain little by more, and lose much beside other work.
    """
    workers = max(1, min(len(facets), joblib.cpu_count()))
    # Those that take longest come first, so that all threads end together.
    order = sorted(facets, key=lambda each: (each.source == "collaborative", each.n_directions))
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        fitted = {facet.name: pool.submit(fit, facet) for facet in reversed(order)}
        names = tqdm([facet.name for facet in facets], desc="profiles", leave=False, delay=2)
        return {name: fitted[name].result() for name in names}


def resolved(settings: UIPSettings, behaviours: Behaviours) -> UIPSettings:
    """``settings`` with ``auto`` of ``uip_time`` and ``uip_history`` decided by the data."""
    if settings.time == "auto":
        timed = behaviours.time is not None
        settings = dataclasses.replace(settings, time=default_time(timed))
    if settings.history == "auto":
        ordered = settings.time == "point_in_time" and behaviours.is_time_ordered
        settings = dataclasses.replace(settings, history="observed" if ordered else "train")
    return settings


def _check_weights(behaviours: Behaviours, settings: UIPSettings) -> None:
    """Refuse weights that the data have no labels for, before the LM has read the catalogue."""
    for facet in settings.facets:
        with refusals_of(facet):
            weights.event_counts(facet.weight, behaviours.liked, len(behaviours))


def _check_folds(fold: np.ndarray, n_users: int, n_folds: int) -> None:
    if fold.shape != (n_users,):
        raise ValueError(f"fold has shape {fold.shape}, and there are {n_users} users")
    wrong = fold[(fold < 0) | (fold >= n_folds)]
    if len(wrong):
        raise ValueError(f"fold must be from 0 to {n_folds - 1}, got {wrong[0]}")


def _check_time(behaviours: Behaviours, settings: UIPSettings) -> None:
    """Refuse time rules that the data cannot bear."""
    if settings.time == "point_in_time" and behaviours.time is None:
        raise SettingsError(
            "uip_time=point_in_time needs timestamps, and the data has none: set RecBole's "
            "TIME_FIELD and load_col, or uip_time=cross_fitted"
        )
    if settings.time == "static" and settings.facets:
        logger.warning(
            "static profiles: every training row's own label is part of its profile, which "
            "misleads the CTR model; uip_time=point_in_time does not, and cross_fitted less"
        )
    # A bank made of an event file has no held-out rows.
    held_out = not behaviours.train.all()
    if settings.history == "observed" and settings.time != "point_in_time" and held_out:
        raise SettingsError(
            f"uip_history=observed has no meaning with uip_time={settings.time}, whose profiles "
            "are of training rows: drop it, or set uip_time=point_in_time"
        )
    if settings.refresh and behaviours.time is None:
        raise SettingsError(
            f"uip_refresh={settings.refresh:g}s needs timestamps, and the data has none: drop "
            "uip_refresh"
        )
    if settings.refresh and not in_seconds(behaviours.time):
        raise SettingsError(
            f"uip_refresh={settings.refresh:g}s: the data's timestamps, of about "
            f"{np.median(behaviours.time):.3g}, are no seconds: give them in seconds, or drop "
            "uip_refresh"
        )


def _history(behaviours: Behaviours, settings: UIPSettings) -> states.History:
    """What each row may see. A training row never sees a held-out event."""
    static = settings.time == "static"
    if settings.time == "cross_fitted":
        return states.cross_fitted_history(
            behaviours.user,
            behaviours.time,
            behaviours.train,
            behaviours.n_users,
            PARTS,
            settings.seed,
        )

    def index(is_event: np.ndarray) -> states.History:
        time = None if static else behaviours.time
        return states.index_history(
            behaviours.user, time, is_event, behaviours.n_users, settings.refresh
        )

    if static or settings.history != "observed":
        return index(behaviours.train)
    everything = np.ones(len(behaviours), dtype=bool)
    if behaviours.is_time_ordered:
        # Held-out events come after every training row, so one timeline a user serves both.
        return index(everything)
    return index(behaviours.train).followed_by(index(everything), ~behaviours.train)


def _item_vectors(
    facet: FacetSettings,
    observed: Observations,
    text_vectors: Mapping[str, np.ndarray],
    settings: UIPSettings,
) -> tuple[list[np.ndarray], list[TextPrior]]:
    """Whitened item vectors of a facet, by its source: one array for each fold of users.

    And what texts say of them, if they do.
    """
    if facet.source == "constant":
        return [np.ones((observed.behaviours.n_items, 1))], []
    if facet.source in TEXT_SOURCES:
        # Texts know nobody's labels, but the basis that a facet makes of their vectors does.
        return [text_vectors[facet.source]] * settings.folds, []
    texts = None
    if facet.texts:
        leading = [text_vectors[source][:, :TEXT_DIRECTIONS] for source in facet.texts]
        texts = np.concatenate(leading, axis=1)
    return collaborative_vectors(
        facet.weight, facet.n_directions, observed, settings.seed, texts=texts
    )


def collaborative_vectors(
    weight: str,
    rank: int,
    observed: Observations,
    seed: int,
    texts: np.ndarray | None = None,
) -> tuple[list[np.ndarray], list[TextPrior]]:
    """Whitened item vectors of the training events, each fold of users by the other users' events.

    Parameters
    ----------
    weight : str
        Evidence weight of an event.
    rank : int
    observed : Observations
    seed : int
    texts : ndarray of float64, shape (n_items, m), optional
        Vectors of the items' texts that give the item vectors their prior means.

    Returns
    -------
    vectors : list of ndarray, each of shape (n_items, at most rank)
    text_priors : list of TextPrior
        Of the same vectors, by texts alone; empty without texts.
    """
    behaviours, train = observed.behaviours, observed.train_events
    n_users, n_items = behaviours.n_users, behaviours.n_items
    by_fold, text_priors = [], []
    for index in range(observed.n_folds):
        chosen = train[observed.vector_fold[behaviours.user[train]] != index]
        user, item = behaviours.user[chosen], behaviours.item[chosen]
        evidence, rate = observed.evidence_of(weight, chosen)
        vectors = collaborative.svd_vectors(
            user, item, evidence.weight, n_users, n_items, rank, seed
        )
        text_prior = None
        if behaviours.liked is not None:
            vectors, text_prior = collaborative.logistic_factors(
                user, item, behaviours.liked[chosen], n_users, rate, vectors, texts
            )
        whitening = basis.whiten(vectors, np.bincount(item, minlength=n_items))
        by_fold.append(whitening.vectors)
        if text_prior is not None:
            text_priors.append(text_prior.mapped(whitening.mean, whitening.directions()))
    return by_fold, text_priors


def _text_vectors(
    source: str,
    behaviours: Behaviours,
    item_texts: Sequence[str | None] | None,
    settings: UIPSettings,
    cost: Counter[str],
) -> tuple[np.ndarray, TextVectors]:
    """Whitened vectors of every item by its text, shape (n_items, m), and what made them.

    Items without text have the mean vector, and so say nothing. What the LM spends is added to
    ``cost``.
    """
    if item_texts is None:
        item_texts = [None] * behaviours.n_items
    rows, counts = rated_texts(item_texts, behaviours.item[behaviours.train], source)
    texts = [item_texts[row] for row in rows]
    vectors, about = _raw_vectors(source, texts, behaviours.liked is None, settings, cost)
    whitening = basis.whiten(vectors, counts, keep=LM_DIRECTIONS)
    spread = np.zeros((len(item_texts), whitening.vectors.shape[1]))
    spread[rows] = whitening.vectors
    return spread, TextVectors(whitening, **about)


def _raw_vectors(
    source: str, texts: list[str], implicit: bool, settings: UIPSettings, cost: Counter[str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors of texts, one each, and what :class:`TextVectors` is to say of them."""
    if source == "words":
        try:
            bags, vocabulary = bag_of_words(texts)
        except ValueError as error:
            raise SettingsError(f"source: words facets cannot be inferred: {error}") from error
        return bags, {"vocabulary": tuple(vocabulary)}
    vectors, scored = lm_vectors(source, texts, implicit, settings)
    cost.update(lm_tokens=scored.lm_tokens, lm_seconds=scored.seconds)
    about = {"theta0": scored.theta0} if source == "lm" else {}
    return vectors, {"fingerprint": scored.fingerprint, **about}


def lm_vectors(
    source: str, texts: Sequence[str], implicit: bool, settings: UIPSettings
) -> tuple[np.ndarray, Scores | Vectors]:
    """Vectors of texts by the LM, shape (n, d), and what it tells besides.

    Parameters
    ----------
    source : {"lm", "prefix", "embedding"}
    texts : sequence of n str
    implicit : bool
        Whether there is no feedback.
    settings : UIPSettings
    """
    from recbole_uip import lm

    endings = None if implicit else settings.endings
    if source == "lm":
        scored = lm.score(texts, settings.prompts, endings, settings.lm, settings.cache)
        return raw_scores(scored), scored
    if source == "prefix":
        # Each facet by the likelihood of what it is evidence of.
        prompt = settings.prefix_prompt(endings)
        found = lm.score_prefix(texts, *prompt, settings.lm, settings.cache)
    else:
        found = lm.embed(texts, settings.lm, settings.cache)
    return found.vectors, found


def raw_scores(scored: Scores) -> np.ndarray:
    """Scores as one vector a text: text scores, then feedback scores, facet by facet."""
    parts = [scored.text] if scored.feedback is None else [scored.text, scored.feedback]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

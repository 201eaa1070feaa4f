"""What profiles did, as passages that a language model reads.

For the gradient posterior (:mod:`recbole_uip.tuning`) rows become texts behind soft tokens. What is
counted where, from the data to the LM:

========  ==================================  ======================================================
index     of                                  is found by
========  ==================================  ======================================================
row       an interaction                      ``behaviours``
profile   a user at a snapshot                ``snapshots``, whose events are rows
piece     rows of one profile that the LM     :func:`_pieces`: one row, or by ``uip_likelihood:
          reads together                      sequence`` all that are evidence of the same facets
unit      a piece, with what it is evidence   ``units``, profile by profile (``units.first``)
          of and what was found of it
passage   what the LM reads of a unit: its    ``passages`` by unit; ``units.passage`` numbers those
          tokens, and what is scored of them  that are the same
text      an item's text                      ``texts.place[item]``; -1 without one
========  ==================================  ======================================================

Behaviours speak for facets by the facets' weights:

- ``positive``, ``negative`` and ``all`` facets by the likelihood of the behaviours' texts, behind
  a prompt in which the soft tokens of the facets that the behaviour is evidence of have moved and
  all others are at θ⁰. One pass serves all facets of a behaviour.
- ``contrast`` facets by the likelihood of the feedback endings, given the texts and the items'
  like rates, whose gradient at θ⁰ is the evidence that the closed form sums up.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from recbole_uip import lm
from recbole_uip.behaviours import Behaviours
from recbole_uip.em import basis as em_basis
from recbole_uip.em import kernels, weights
from recbole_uip.em.facet import Facet, Observations
from recbole_uip.em.frame import Frame, Units
from recbole_uip.em.snapshots import Snapshots
from recbole_uip.em.states import History
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.likelihood import (
    Likelihood,
    Passage,
    PrefixLikelihood,
    SoftTokenLikelihood,
    feedback_passage,
    text_passage,
)
from recbole_uip.settings import FacetSettings, LMSettings, SettingsError, UIPSettings, refusals_of
from recbole_uip.texts import rated_texts
from recbole_uip.work import n_processes

__all__ = ["Group", "groups"]

# Of whitened directions, the units that a soft token can go along them; users differ by less.
ROOM = 1.0


@dataclass
class Group:
    """Facets that are tuned together, all that they need, and the likelihood of their units.

    Attributes
    ----------
    facets : tuple of G FacetSettings
    frame : Frame
    units : Units
    fold : ndarray of int64, shape (n_profiles,)
    passages : list of Passage
        Of each unit.
    likelihood : Likelihood
    evidence : ndarray, shape (n_rows, G)
        Behaviours that each row is evidence of each facet: none without a text.
    read : callable
        What the LM reads of pieces, each an array of rows of one user.
    """

    facets: tuple[FacetSettings, ...]
    frame: Frame
    units: Units
    fold: np.ndarray
    passages: list[Passage]
    likelihood: Likelihood
    evidence: np.ndarray
    read: Callable[[Sequence[np.ndarray]], list[Passage]]

    def __call__(self, units: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The likelihood that EM is given; see :class:`recbole_uip.em.gradient.Likelihood`."""
        return self.likelihood.value_and_gradient([self.passages[u] for u in units], theta)


def groups(
    observed: Observations,
    item_texts: Sequence[str | None],
    settings: UIPSettings,
    snapshots: Snapshots,
    cost: Counter[str],
) -> list[Group]:
    """The facets by what their likelihood is of, and what each profile did; see :func:`tune`."""
    behaviours, facets = observed.behaviours, settings.tuned_facets
    implicit = behaviours.liked is None
    endings = None if implicit else settings.endings
    contrast = [facet.name for facet in facets if facet.weight == "contrast"]
    if contrast and endings is None:
        missing = "labels, which this data lacks" if implicit else "uip_endings"
        raise SettingsError(
            f"uip_facets.{contrast[0]}: uip_posterior=gradient tunes weight contrast by the "
            f"likelihood of feedback endings, and needs {missing}: take another weight"
        )
    found = []
    for source in dict.fromkeys(facet.source for facet in facets):
        texts = _Texts.of(source, behaviours, item_texts, settings, endings, cost)
        for feedback in (False, True):
            chosen = tuple(f for f in texts.facets if (f.weight == "contrast") == feedback)
            if chosen:
                found.append(_make_group(chosen, feedback, texts, observed, settings, snapshots))
    return found


def _make_group(
    facets: tuple[FacetSettings, ...],
    feedback: bool,
    texts: _Texts,
    observed: Observations,
    settings: UIPSettings,
    snapshots: Snapshots,
) -> Group:
    """The facets whose likelihood is of feedback, or those whose likelihood is of texts."""
    behaviours = observed.behaviours
    numbers = [texts.facets.index(facet) for facet in facets]
    scores = (texts.feedback if feedback else texts.text)[:, numbers]
    likelihood = texts.likelihood(numbers, settings.gradient.recompute)
    counts, maps, variances = [], [], []
    for f, facet in enumerate(facets):
        with refusals_of(facet):
            counts.append(weights.event_counts(facet.weight, behaviours.liked, len(behaviours)))
            facet_maps, variance = _facet_maps(
                facet, scores[:, f], likelihood.max_norm, texts, observed, settings
            )
        maps.append(facet_maps)
        variances.append(variance)
    frame = Frame(likelihood.theta0, tuple(maps), tuple(variances), likelihood.max_norm)
    evidence = np.stack(counts, axis=1) * texts.known[behaviours.item, None]
    pieces, active, first = _pieces(behaviours, settings, observed.history, snapshots, evidence)
    # by the folds of item vectors, so that users of one fold and code share the LM's passes
    intercepts = kernels.intercepts(observed.rates(observed.n_folds)) if feedback else None
    read = functools.partial(_passages, observed, texts, intercepts)
    passages = read(pieces)
    _check_lengths(passages, likelihood)
    units = Units(
        first,
        _numbered(passages),
        np.array([likelihood.n_tokens(passage) for passage in passages], dtype=np.int64),
        active,
        np.full(len(pieces), np.nan),
        np.zeros((len(pieces), frame.size), np.float32),
    )
    profile_fold = observed.vector_fold[snapshots.users(observed.history, behaviours.user)]
    if settings.likelihood == "item" and pieces:
        rows, fold = np.concatenate(pieces), profile_fold[units.owner]
        units = _scored_units(units, frame, scores, texts, observed, rows, fold, intercepts)
    return Group(facets, frame, units, profile_fold, passages, likelihood, evidence, read)


@dataclass(frozen=True)
class _Texts:
    """The items' texts, and what the LM says of them at θ⁰.

    Attributes
    ----------
    facets : tuple of F FacetSettings
        Those of one source, that of the soft tokens: their names are in the prompt.
    backbone : Backbone
    prompt : Prompt
    prefix : Prefix or None
        None where soft tokens are embeddings.
    text, feedback : ndarray, shape (n_texts, F, D), or None
        Gradients of texts' log-likelihoods and of feedback logits, of the items that have a text,
        in order. Of a prefix's facets, those of each facet's own kind.
    log_likelihood, feedback_logit : ndarray, shape (n_texts,), or None
    place : ndarray of int64, shape (n_items,)
        Where each item's scores are; -1 without a text.
    token_ids : list of list of int
        Of the items that have a text.
    counts : ndarray, shape (n_texts,)
        Training rows of each.
    """

    facets: tuple[FacetSettings, ...]
    backbone: lm.Backbone
    prompt: prompts.Prompt
    prefix: lm.Prefix | None
    text: np.ndarray
    feedback: np.ndarray | None
    log_likelihood: np.ndarray
    feedback_logit: np.ndarray | None
    place: np.ndarray
    token_ids: list[list[int]]
    counts: np.ndarray

    @classmethod
    def of(
        cls,
        source: str,
        behaviours: Behaviours,
        item_texts: Sequence[str | None],
        settings: UIPSettings,
        endings: tuple[str, str] | None,
        cost: Counter[str],
    ) -> _Texts:
        rows, counts = rated_texts(item_texts, behaviours.item[behaviours.train], source)
        texts = [item_texts[row] for row in rows]
        facets = tuple(facet for facet in settings.tuned_facets if facet.source == source)
        given = _on_own_device(settings), settings.cache
        if source == "prefix":
            # the prompt of the closed form, whose scores are cached
            names, of_feedback, endings = settings.prefix_prompt(endings)
            found = lm.score_prefix(texts, names, of_feedback, endings, *given)
        else:
            names = settings.prompts
            found = lm.score(texts, names, endings, *given)
        cost.update(lm_tokens=found.lm_tokens, lm_seconds=found.seconds)
        backbone = lm.load(*given)
        prompt = prompts.build(backbone, names, endings)
        token_ids = prompts.text_ids(backbone, texts)
        if source == "prefix":
            prefix, started = lm.Prefix(backbone, prompt), time.perf_counter()
            *said, lm_tokens = lm.prefix_likelihoods(prefix, prefix.theta0, token_ids)
            cost.update(lm_tokens=lm_tokens, lm_seconds=time.perf_counter() - started)
            said = [None if each is None else each.numpy() for each in said]
            scores = found.vectors.reshape(len(texts), len(facets), -1)
            read = prefix, scores, scores, *said
        else:
            read = None, found.text, found.feedback, found.log_likelihood, found.feedback_logit
        place = np.full(behaviours.n_items, -1)
        place[rows] = np.arange(len(rows))
        return cls(facets, backbone, prompt, *read, place, token_ids, counts)

    def likelihood(self, numbers: Sequence[int], recompute: bool) -> Likelihood:
        """Of passages under soft tokens of the facets ``numbers``."""
        if self.prefix is not None:
            return PrefixLikelihood(self.prefix, numbers)
        return SoftTokenLikelihood(self.backbone, self.prompt, numbers, recompute)

    @property
    def known(self) -> np.ndarray:
        """Whether an item has a text, shape (n_items,)."""
        return self.place >= 0


def _facet_maps(
    facet: FacetSettings,
    scores: np.ndarray,
    reach: float,
    texts: _Texts,
    observed: Observations,
    settings: UIPSettings,
) -> tuple[np.ndarray, np.ndarray]:
    """The facet's map M for each fold (n_folds, d, rank), and prior variances (rank,).

    In its frame a facet moves in the directions in which users differ, as the closed form has
    them; or else in the token's own, all scaled alike. But where items hardly differ in what the
    LM says, a unit of evidence is a move far out of the LM's ``reach``: of the whitened directions
    those are taken that have :data:`ROOM` units within it, and at least as many as the rank.

    The closed form's vectors g - ḡ are centred, and the gradients of a likelihood are not: along
    ḡ, all texts become likelier alike, or all are liked. So each direction is given as much of
    u = D Dᵀ ḡ, with D the whitened directions, as takes it out, M - u (ḡᵀ M) / (ḡᵀ u): of all that
    do, it adds the least to centred scores.
    """
    if settings.gradient.space == "token":
        share = texts.counts / texts.counts.sum()
        scale = 1.0 / np.sqrt((share @ scores.astype(np.float64) ** 2).mean())
        width = scores.shape[1]
        maps = np.repeat(scale * np.eye(width, dtype=np.float32)[None], settings.folds, axis=0)
        return maps, np.ones(width)
    whitening = em_basis.whiten(scores, texts.counts)
    directions, mean = whitening.directions(), whitening.mean.astype(np.float64)
    room = reach / np.linalg.norm(directions, axis=0)
    directions = directions[:, : max(facet.rank, int((room >= ROOM).sum()))]
    spread = np.zeros((len(texts.place), directions.shape[1]))
    spread[texts.known] = whitening.vectors[:, : directions.shape[1]]
    fitted = Facet(dataclasses.replace(facet, match=None), seed=settings.seed)
    basis = fitted.fit_basis([spread] * settings.folds, observed)
    maps = np.stack([directions @ turned for turned in basis.directions])
    common = directions @ (mean @ directions)
    if along := mean @ common:
        maps = maps - common[:, None] * (mean @ maps)[:, None] / along
    return maps.astype(np.float32), basis.variance


def _pieces(
    behaviours: Behaviours,
    settings: UIPSettings,
    history: History,
    snapshots: Snapshots,
    evidence: np.ndarray,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What each profile did: single behaviours, or one sequence for each set of facets.

    Returns
    -------
    events : list of n_units ndarray
        Rows that each unit is made of.
    active : ndarray of float64, shape (n_units, G)
    first : ndarray of int64, shape (n_profiles + 1,)
    """
    first: list[int] = [0]
    pieces: list[np.ndarray] = []
    for profile in range(len(snapshots)):
        events = snapshots.events(history, profile)
        if behaviours.time is not None:
            # static histories are not in the order of time
            events = events[np.argsort(behaviours.time[events], kind="stable")]
        events = events[evidence[events].any(axis=1)][-settings.gradient.behaviours :]
        if settings.likelihood == "item":
            pieces += list(events[:, None])
        else:
            # a prompt is the same for all of a sequence, so its behaviours speak for one set
            patterns, which = np.unique(evidence[events] > 0, axis=0, return_inverse=True)
            pieces += [events[which.ravel() == p] for p in range(len(patterns))]
        first.append(len(pieces))
    active = np.array([evidence[piece].sum(axis=0) for piece in pieces], dtype=np.float64)
    return pieces, active.reshape(len(pieces), evidence.shape[1]), np.array(first)


def _passages(
    observed: Observations,
    texts: _Texts,
    intercepts: np.ndarray | None,
    pieces: Sequence[np.ndarray],
) -> list[Passage]:
    """What the LM reads of each piece: texts, or feedback on them where there are intercepts.

    These are the logits of like rates, shape (n_folds, n_items).
    """
    behaviours = observed.behaviours

    @functools.cache
    def text(items: tuple[int, ...]) -> Passage:
        return text_passage([texts.token_ids[place] for place in texts.place[list(items)]])

    if intercepts is None:
        return [text(tuple(behaviours.item[piece])) for piece in pieces]

    @functools.cache
    def answers(items: tuple[int, ...], liked: tuple[float, ...], fold: int) -> Passage:
        places = texts.place[list(items)]
        ids = [texts.token_ids[place] for place in places]
        shift = intercepts[fold, list(items)] - texts.feedback_logit[places]
        return feedback_passage(ids, texts.prompt.ending, liked, shift)

    return [
        answers(tuple(behaviours.item[piece]), tuple(behaviours.liked[piece]), fold)
        for piece in pieces
        for fold in [int(observed.vector_fold[behaviours.user[piece[0]]])]
    ]


def _numbered(passages: list[Passage]) -> np.ndarray:
    """A number for each distinct passage, in the order of their first, shape (n_units,)."""
    numbers: dict[Passage, int] = {}
    which = [numbers.setdefault(passage, len(numbers)) for passage in passages]
    return np.array(which, dtype=np.int64)


def _check_lengths(passages: list[Passage], likelihood: Likelihood) -> None:
    longest = max((len(passage.tokens) for passage in passages), default=0)
    needed, limit = longest + likelihood.n_before, likelihood.n_positions
    if limit is not None and needed > limit:
        raise SettingsError(
            f"a user's behaviours need {needed} positions of the LM, which has {limit}: lower "
            "uip_gradient.behaviours, or set uip_likelihood=item"
        )


def _scored_units(
    units: Units,
    frame: Frame,
    scores: np.ndarray,
    texts: _Texts,
    observed: Observations,
    rows: np.ndarray,
    fold: np.ndarray,
    intercepts: np.ndarray | None,
) -> Units:
    """Units of one behaviour each with what cached scores (n_texts, G, d) say of them at θ⁰."""
    items = observed.behaviours.item[rows]
    places, n_folds = texts.place[items], len(frame.maps[0])
    # one table a fold: there are far more behaviours than items
    every = np.ones((len(scores), scores.shape[1]))
    table = np.stack(
        [frame.pull(scores, np.full(len(scores), number), every) for number in range(n_folds)]
    )
    gradient = table[fold, places]
    for f, part in enumerate(frame.slices):
        gradient[:, part] *= units.active[:, f, None] > 0
    if intercepts is None:
        value = texts.log_likelihood[places].astype(np.float64)
    else:
        label = observed.behaviours.liked[rows]
        logit = intercepts[fold, items]
        value = -np.logaddexp(0.0, (1.0 - 2.0 * label) * logit)
        gradient = gradient * (label - scipy.special.expit(logit))[:, None].astype(np.float32)
    return dataclasses.replace(units, value=value, gradient=gradient.astype(np.float32))


def _on_own_device(settings: UIPSettings) -> LMSettings:
    """The LM's settings, with a GPU for each process where there are several of both."""
    import torch

    chosen = settings.lm
    if n_processes() > 1 and chosen.device == "auto" and torch.cuda.is_available():
        from accelerate import PartialState

        chosen = dataclasses.replace(chosen, device=f"cuda:{PartialState().local_process_index}")
    return chosen

r"""How much of what behaviour knows of items can be read from texts, and what it is worth.

1. *Read from texts.* Item vectors g_i fitted on the training rows alone (source: collaborative)
   are predicted from texts by ridge regression, each item by a regression on other items
   (mapping attributes to factors: Gantner et al., ICDM 2010). Items weigh as many as they have
   training rows. With :math:`\lambda_k` the between-user variance of direction k, the share of a
   match value's variance :math:`\sum_k \lambda_k \mathrm{Var}(g_{ik})` that texts explain is

   .. math:: R^2 = 1 - \frac{\sum_k \lambda_k \sum_i n_i (g_{ik} - \hat g_{ik})^2}
                            {\sum_k \lambda_k \sum_i n_i (g_{ik} - \bar g_k)^2}.

   No predictor reaches 1, for g is itself an estimate: vectors fitted on one half of the users
   are predicted from those of the other half, too, which says how much of them is not chance.

2. *Unseen items.* Items are split into folds. All events of a fold's items are taken out, users'
   states are made of their other events, strictly earlier ones (without timestamps, those of other
   parts of their events), and the rows of the fold's items are scored by leniency plus match,
   b_u + m_u' g_i. The vector of an unseen item comes from its text: by a basis of between-user
   directions of the text's own vectors (``own``), or by the regression above (``mapped``), which
   meets states made of collaborative vectors. Collaborative vectors say nothing of such an item;
   those that have seen its training rows are the bound.

Neither part sees a label of a held-out row but to judge a score by it.
"""

from __future__ import annotations

import dataclasses
import logging
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import logit
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV

from recbole_uip import profiles
from recbole_uip.behaviours import TEST, VALID, Behaviours
from recbole_uip.bridge.metrics import gauc
from recbole_uip.em import basis, collaborative, states, weights
from recbole_uip.em.facet import Facet, Observations
from recbole_uip.em.kernels import pack
from recbole_uip.evidence.statistics import auc, bootstrap_aucs, bootstrap_difference
from recbole_uip.evidence.task import load_dataset, parse_config
from recbole_uip.records import versions
from recbole_uip.settings import FacetSettings, MatchSettings, SettingsError, UIPSettings
from recbole_uip.texts import bag_of_words

__all__ = [
    "Target",
    "behaviour_target",
    "ceiling",
    "components",
    "format_ceiling",
    "judge",
    "predict_held_out",
    "r_squared",
    "read_from_texts",
    "text_features",
    "unseen_scores",
]

logger = logging.getLogger(__name__)

ITEM_FOLDS = 4
# Principal components of a text's vectors that a regression and a basis may use.
COMPONENTS = 400
# Penalties among which the inner leave-one-out error chooses, direction by direction.
PENALTIES = np.logspace(-3, 3, 13)
COLLABORATIVE_RANK = 12
RANDOM_WIDTH = 64
MATCH = MatchSettings(posterior="filter", rank=24, half_life=(200.0,))
N_BOOT = 500
SPLITS = {"valid": VALID, "test": TEST}
LEADING = 4  # directions that the table shows one by one


@dataclasses.dataclass(frozen=True)
class Target:
    """What behaviour knows of items: between-user directions of collaborative vectors.

    Attributes
    ----------
    vectors : ndarray of float64, shape (n_items, rank)
        In units where one event has unit noise.
    variance : ndarray of float64, shape (rank,)
        Between-user variances of the directions.
    intercept : ndarray of float64, shape (n_items,)
        Logits of the items' smoothed like rates.
    """

    vectors: np.ndarray
    variance: np.ndarray
    intercept: np.ndarray


# --- what texts say -----------------------------------------------------------------------------


def components(vectors: np.ndarray, keep: int = COMPONENTS, seed: int = 0) -> np.ndarray:
    """Leading principal components of items' vectors, scaled to one unit of variance in all.

    Items count alike, so nothing of behaviour is in them.

    Parameters
    ----------
    vectors : ndarray, shape (n_items, d)
    keep : int
    seed : int

    Returns
    -------
    ndarray of float64, shape (n_items, at most keep)
    """
    keep = min(keep, *vectors.shape)
    solver = "full" if keep == min(vectors.shape) else "randomized"
    found = PCA(keep, svd_solver=solver, random_state=seed).fit_transform(vectors)
    found = found.astype(np.float64)
    return found / max(np.sqrt((found**2).sum(axis=1).mean()), np.finfo(float).tiny)


def text_features(
    texts: Sequence[str],
    attributes: Sequence[str | None] | None,
    settings: UIPSettings,
) -> dict[str, np.ndarray]:
    """What each source says of texts, by source, each of shape (n, at most ``COMPONENTS``).

    Parameters
    ----------
    texts : sequence of n str
    attributes : sequence of n str or None, optional
        The texts of the items' attributes alone, such as genres.
    settings : UIPSettings

    Returns
    -------
    dict of str to ndarray
        ``random``, ``attributes`` (where there are any), ``words``, ``embedding``, ``prefix``,
        ``lm``, and ``all`` of them but the random ones.
    """
    raw = {"words": bag_of_words(texts)[0]}
    for source in ("embedding", "prefix", "lm"):
        each = settings if source == "embedding" else settings.with_soft_tokens(source)
        raw[source], _ = profiles.lm_vectors(source, texts, settings.endings is None, each)
    if attributes is not None and any(attributes):
        raw = {"attributes": bag_of_words([each or "" for each in attributes])[0], **raw}
    noise = np.random.default_rng(settings.seed).normal(size=(len(texts), RANDOM_WIDTH))
    found = {name: components(each, seed=settings.seed) for name, each in raw.items()}
    together = np.concatenate(list(found.values()), axis=1)
    return {"random": components(noise), **found, "all": components(together, together.shape[1])}


def _attribute_template(template: str) -> str | None:
    """The template's fields but the first, which is taken for the item's name; None without."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    rest = list(dict.fromkeys(names[1:]))
    return " ".join(f"{{{name}}}" for name in rest) if rest else None


# --- read from texts ----------------------------------------------------------------------------


def behaviour_target(behaviours: Behaviours, rows: np.ndarray, rank: int, seed: int = 0) -> Target:
    """Collaborative vectors of the events ``rows``, in directions in which users differ.

    Parameters
    ----------
    behaviours : Behaviours
        With labels.
    rows : ndarray of int64, shape (n,)
        Each user's in the order of time.
    rank : int
    seed : int
    """
    user, item, liked = (
        each[rows] for each in (behaviours.user, behaviours.item, behaviours.liked)
    )
    n_users, n_items = behaviours.n_users, behaviours.n_items
    rate = weights.like_rate(item, liked, n_items)
    evidence = weights.evidence("contrast", item, liked, rate)
    vectors = collaborative.svd_vectors(user, item, evidence.weight, n_users, n_items, rank, seed)
    vectors, _ = collaborative.logistic_factors(user, item, liked, n_users, rate, vectors)
    whitened = basis.whiten(vectors, np.bincount(item, minlength=n_items)).vectors
    fitted = basis.fit(whitened, user, item, evidence, n_users, whitened.shape[1])
    return Target(fitted.vectors, fitted.variance, logit(rate))


def _ridge(features: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> RidgeCV:
    """Ridge regression of items that weigh ``weight``; each target has its own penalty."""
    model = RidgeCV(PENALTIES, alpha_per_target=targets.ndim > 1)
    return model.fit(features, targets, sample_weight=weight / weight.mean())


def predict_held_out(
    features: np.ndarray, targets: np.ndarray, weight: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Each item's targets by a ridge regression on the items of the other folds.

    Parameters
    ----------
    features : ndarray, shape (n, d)
    targets : ndarray, shape (n, t)
    weight : ndarray of float, shape (n,)
        Items without weight teach nothing.
    fold : ndarray of int, shape (n,)

    Returns
    -------
    ndarray of float64, shape (n, t)
    """
    predicted = np.empty_like(targets, dtype=np.float64)
    for held_out in np.unique(fold):
        chosen = (fold != held_out) & (weight > 0)
        model = _ridge(features[chosen], targets[chosen], weight[chosen])
        predicted[fold == held_out] = model.predict(features[fold == held_out])
    return predicted


def r_squared(
    targets: np.ndarray,
    predicted: np.ndarray,
    weight: np.ndarray,
    variance: np.ndarray | None = None,
) -> np.ndarray | float:
    """Explained share of weighted variance of each target; of all of them with ``variance``.

    Parameters
    ----------
    targets, predicted : ndarray, shape (n, t)
    weight : ndarray, shape (n,)
    variance : ndarray, shape (t,), optional
        The weight of each target's squares in one share for all.

    Returns
    -------
    ndarray of float64, shape (t,), or float
        0 for the mean of all items; negative where a prediction is worse.
    """
    error = weight @ (targets - predicted) ** 2
    total = weight @ (targets - np.average(targets, axis=0, weights=weight)) ** 2
    if variance is not None:
        return float(1 - (error @ variance) / (total @ variance))
    return 1 - error / np.maximum(total, np.finfo(float).tiny)


def read_from_texts(
    behaviours: Behaviours,
    items: np.ndarray,
    features: Mapping[str, np.ndarray],
    rank: int = COLLABORATIVE_RANK,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """R² of what behaviour knows of items, by what it is predicted from.

    Parameters
    ----------
    behaviours : Behaviours
        With labels; only training rows are looked at.
    items : ndarray of int64, shape (n,)
        Items that have a text.
    features : mapping of str to ndarray, each of shape (n, d)
    rank : int
    seed : int

    Returns
    -------
    list of dict
        ``source``, ``overall``, ``directions`` (a list, leading first) and ``rate`` (of the
        logit of the like rate); the last, ``other users``, is of half the users from the others.
    """
    train = behaviours.in_time_order(behaviours.train)
    fold = collaborative.balanced_folds(len(items), ITEM_FOLDS, seed)

    def judged(source: str, each: np.ndarray, target: Target, rows: np.ndarray) -> dict[str, Any]:
        weight = np.bincount(behaviours.item[rows], minlength=behaviours.n_items)[items]
        weight = weight.astype(np.float64)
        wanted = np.column_stack([target.vectors, target.intercept])[items]
        found = predict_held_out(each, wanted, weight, fold)
        shares = r_squared(wanted, found, weight)
        overall = r_squared(wanted[:, :-1], found[:, :-1], weight, target.variance)
        return {
            "source": source,
            "overall": overall,
            "directions": shares[:-1].tolist(),
            "rate": float(shares[-1]),
        }

    target = behaviour_target(behaviours, train, rank, seed)
    results = [judged(source, each, target, train) for source, each in features.items()]
    half = collaborative.balanced_folds(behaviours.n_users, 2, seed)[behaviours.user[train]]
    one, other = (behaviour_target(behaviours, train[half == part], rank, seed) for part in (0, 1))
    known = np.column_stack([other.vectors, other.intercept])[items]
    results.append(judged("other users", known, one, train[half == 0]))
    return results


# --- unseen items -------------------------------------------------------------------------------


def unseen_scores(
    behaviours: Behaviours,
    items: np.ndarray,
    features: Mapping[str, np.ndarray],
    settings: UIPSettings,
    rows: np.ndarray,
) -> dict[str, np.ndarray]:
    """What profiles say of ``rows`` as though their items had never been met.

    Parameters
    ----------
    behaviours : Behaviours
        With labels.
    items : ndarray of int64, shape (n,)
        Items that have a text.
    features : mapping of str to ndarray, each of shape (n, d)
    settings : UIPSettings
        Of which folds of users, seed and ``history`` are read.
    rows : ndarray of int64, shape (n_rows,)
        Held-out rows.

    Returns
    -------
    dict of str to ndarray of float64, shape (n_rows,)
        ``constant`` (leniency alone), ``collaborative`` (which has no vector for such an item),
        ``<source>, own`` and ``<source>, mapped``, and ``collaborative, seen``, the bound.
    """
    fold = collaborative.balanced_folds(behaviours.n_items, ITEM_FOLDS, settings.seed)
    scores: dict[str, np.ndarray] = {}

    def put(name: str, at: np.ndarray, values: np.ndarray) -> None:
        scores.setdefault(name, np.zeros(len(rows)))[at] = values

    spread = {}
    for source, each in features.items():
        spread[source] = np.zeros((behaviours.n_items, each.shape[1]))
        spread[source][items] = each
    for held_out in range(ITEM_FOLDS):
        logger.info("unseen items: fold %d of %d", held_out + 1, ITEM_FOLDS)
        hidden = fold == held_out
        at = np.flatnonzero(hidden[behaviours.item[rows]])
        world = _World(behaviours, hidden, settings)
        counts = np.bincount(
            behaviours.item[world.observed.train_events], minlength=behaviours.n_items
        )
        one = np.ones((behaviours.n_items, 1))
        leniency, _ = world.profile("constant", [one], rows[at])
        put("constant", at, leniency)
        for source in features:
            if source == "all":
                continue  # another large eigenproblem, for what the mapped vectors say better
            own = [basis.whiten(spread[source], counts).vectors]
            put(f"{source}, own", at, world.value("embedding", own, rows[at]))
        facet, b, m = world.collaborative(rows[at])
        put("collaborative", at, b)
        taught = items[counts[items] > 0]
        weight = counts[taught].astype(np.float64)
        # Items by all folds' vectors at once, which share one frame.
        targets = facet.vectors_.transpose(1, 0, 2).reshape(behaviours.n_items, -1)
        folds = world.observed.vector_fold[behaviours.user[rows[at]]]
        for source, each in spread.items():
            model = _ridge(each[taught], targets[taught], weight)
            found = model.predict(each[behaviours.item[rows[at]]])
            found = found.reshape(len(at), len(facet.vectors_), -1)[np.arange(len(at)), folds]
            put(f"{source}, mapped", at, b + (m * found).sum(axis=1))
    everything = _World(behaviours, np.zeros(behaviours.n_items, dtype=bool), settings)
    facet, b, m = everything.collaborative(rows)
    folds = everything.observed.vector_fold[behaviours.user[rows]]
    known = facet.vectors_[folds, behaviours.item[rows]]
    scores["collaborative, seen"] = b + (m * known).sum(axis=1)
    return scores


class _World:
    """The events without those of hidden items, and profiles made of them."""

    def __init__(self, behaviours: Behaviours, hidden: np.ndarray, settings: UIPSettings) -> None:
        # A hidden item's training rows must not even shape a prior: they are no training rows.
        gone = hidden[behaviours.item]
        observed = settings.history == "observed" and behaviours.is_time_ordered
        split = np.where(gone & behaviours.train, TEST, behaviours.split).astype(np.int8)
        behaviours = dataclasses.replace(behaviours, split=split)
        is_event = ~gone if observed else behaviours.train
        user, time, n_users = behaviours.user, behaviours.time, behaviours.n_users
        if time is None:
            history = states.cross_fitted_history(
                user, time, is_event, n_users, profiles.PARTS, settings.seed
            )
        else:
            history = states.index_history(user, time, is_event, n_users, settings.refresh)
        folds = collaborative.balanced_folds(behaviours.n_users, settings.user_folds, settings.seed)
        self.settings = settings
        self.observed = Observations(behaviours, history, folds, settings.folds)

    def profile(
        self, source: str, vectors: list[np.ndarray], rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leniency (n,) and taste (n, rank) of each row's user at that time."""
        _, leniency, taste = self._fitted(source, vectors, rows)
        return leniency, taste

    def value(self, source: str, vectors: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Leniency plus match of each row's user with its item, shape (n,)."""
        facet, leniency, taste = self._fitted(source, vectors, rows)
        found = facet.vectors_[0, self.observed.behaviours.item[rows]]
        return leniency + (taste * found).sum(axis=1)

    def collaborative(self, rows: np.ndarray) -> tuple[Facet, np.ndarray, np.ndarray]:
        """The collaborative facet, and leniency and taste of each row's user at that time."""
        vectors, _ = profiles.collaborative_vectors(
            "contrast",
            COLLABORATIVE_RANK,
            self.observed,
            self.settings.seed,
        )
        return self._fitted("collaborative", vectors, rows)

    def _fitted(
        self, source: str, vectors: list[np.ndarray], rows: np.ndarray
    ) -> tuple[Facet, np.ndarray, np.ndarray]:
        facet = Facet(
            FacetSettings("match", source, "contrast", codes=0, match=MATCH),
            seed=self.settings.seed,
        ).fit(vectors, self.observed)
        kernel = facet.fields()[-1].kernel
        kernels = pack([kernel], self.observed.item_rate)
        mean = np.empty((len(rows), kernel.rank + 1))
        observed = self.observed
        for at, found in states.iter_states(kernels, observed.history, observed.events, rows):
            mean[at] = found[:, : kernel.rank + 1]
        return facet, mean[:, 0], mean[:, 1:]


# --- the command --------------------------------------------------------------------------------


def ceiling(
    dataset: str | None = None,
    config_files: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    command_line: Sequence[str] = (),
    command: str | None = None,
) -> dict[str, Any]:
    """How much of behaviour's item vectors texts can say, and how far that ranks unseen items.

    Parameters
    ----------
    dataset, config_files, config, command_line
        As for :func:`recbole_uip.evidence.bench.bench_profiles`.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        ``dataset``, ``items``, ``item_folds``, ``attributes``, ``read`` (see
        :func:`read_from_texts`), ``unseen`` (for the splits ``valid`` and ``test``: ``rows``,
        ``users`` and ``sources``, see :func:`judge`), ``versions``, ``command``.

    Raises
    ------
    SettingsError
        If a setting cannot be used, or the data have no labels or no texts.
    """
    name, parsed = parse_config(dataset, config_files, config, command_line)
    settings = parsed.uip
    if not settings.prompted_facets:
        raise SettingsError(
            "ceiling needs a facet with source: lm or prefix, and uip_facets has none"
        )
    data, settings = load_dataset(parsed)
    behaviours, texts = data.behaviours, data.item_texts(settings)
    if behaviours.liked is None:
        raise SettingsError(
            "ceiling needs labels, and this data has none: set RecBole's threshold or LABEL_FIELD"
        )
    items = np.array([row for row, text in enumerate(texts) if text], dtype=np.int64)
    rows = np.flatnonzero(~behaviours.train)
    for what, found in (("item with a text", items), ("held-out row", rows)):
        if not len(found):
            raise SettingsError(f"there is no {what}: nothing to measure a ceiling on")
    template = _attribute_template(settings.item_text)
    attributes = None
    if template is not None:
        every = data.item_texts(dataclasses.replace(settings, item_text=template))
        attributes = [every[row] for row in items]
    logger.info("reading %d texts", len(items))
    features = text_features([texts[row] for row in items], attributes, settings)
    logger.info("regressing collaborative vectors on texts")
    read = read_from_texts(behaviours, items, features, seed=settings.seed)
    scores = unseen_scores(behaviours, items, features, settings, rows)
    unseen = {}
    for split, number in SPLITS.items():
        chosen = behaviours.split[rows] == number
        if chosen.any():
            user, liked = behaviours.user[rows[chosen]], behaviours.liked[rows[chosen]]
            of_split = {source: score[chosen] for source, score in scores.items()}
            unseen[split] = {
                "rows": len(user),
                "users": len(np.unique(user)),
                "sources": judge(user, liked, of_split, settings.seed),
            }
    return {
        "dataset": name,
        "items": len(items),
        "item_folds": ITEM_FOLDS,
        "attributes": template,
        "read": read,
        "unseen": unseen,
        "versions": versions(),
        "command": command or f"ceiling({name!r})",
    }


def judge(
    user: np.ndarray, liked: np.ndarray, scores: Mapping[str, np.ndarray], seed: int = 0
) -> list[dict[str, Any]]:
    """AUC of each score, within users too, and its difference from ``constant``.

    Parameters
    ----------
    user, liked : ndarray, shape (n_rows,)
    scores : mapping of str to ndarray, each of shape (n_rows,)
    seed : int

    Returns
    -------
    list of dict
        ``source``, ``auc``, ``gauc`` and ``difference`` from ``constant``, with its interval.
    """
    base = bootstrap_aucs(user, liked, scores["constant"], N_BOOT, seed)
    results = []
    for source, score in scores.items():
        found = auc(liked, score)
        drawn = bootstrap_aucs(user, liked, score, N_BOOT, seed)
        difference = bootstrap_difference(
            found - auc(liked, scores["constant"]), drawn - base, len(np.unique(user))
        )
        results.append(
            {
                "source": source,
                "auc": found,
                "gauc": gauc(user, liked, score),
                "difference": dataclasses.asdict(difference),
            }
        )
    return results


def format_ceiling(results: Mapping[str, Any]) -> str:
    """Markdown tables: what is read from texts, and unseen items of each split."""
    shown = min(LEADING, len(results["read"][0]["directions"]))
    header = [f"direction {k + 1}" for k in range(shown)]
    lines = [
        f"{results['dataset']}: R² of collaborative item vectors, each item predicted from the "
        f"others ({results['items']:,} items, {results['item_folds']} folds)",
        "",
        "| predicted from | overall | " + " | ".join(header) + " | like rate |",
        "|---|" + "---|" * (shown + 2),
    ]
    for each in results["read"]:
        shares = [each["overall"], *each["directions"][:shown], each["rate"]]
        lines.append(f"| {each['source']} | " + " | ".join(f"{x:.3f}" for x in shares) + " |")
    for split, found in results["unseen"].items():
        lines += [
            "",
            f"Items as though unseen, {split} rows ({found['rows']:,} of {found['users']:,} users):"
            " leniency plus match; 95% intervals over users",
            "",
            "| vector of the item | AUC | AUC - constant | AUC within users |",
            "|---|---|---|---|",
        ]
        for each in found["sources"]:
            change = each["difference"]
            lines.append(
                f"| {each['source']} | {each['auc']:.4f} | {change['mean']:+.4f} "
                f"[{change['low']:+.4f}, {change['high']:+.4f}] | {each['gauc']:.4f} |"
            )
    return "\n".join(lines)

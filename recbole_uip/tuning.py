"""The gradient posterior of LM facets: from events and item texts to soft tokens and their codes.

What ties :mod:`recbole_uip.lm.likelihood` and :mod:`recbole_uip.em.gradient` together, as
:mod:`recbole_uip.profiles` does for the closed form. A profile here is a user at a snapshot (see
:mod:`recbole_uip.em.snapshots`); what it did, and what the LM reads of that, is in
:mod:`recbole_uip.passages`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recbole_uip.behaviours import DataError
from recbole_uip.em.facet import Observations
from recbole_uip.em.gradient import GradientPosterior
from recbole_uip.em.relinearize import RelinearizedPosterior
from recbole_uip.em.residual import ResidualCodebook
from recbole_uip.em.snapshots import Snapshots, take_snapshots
from recbole_uip.lm.scoring import n_workers
from recbole_uip.passages import Group, groups
from recbole_uip.settings import FacetSettings, SettingsError, UIPSettings
from recbole_uip.work import Work

__all__ = ["Tuned", "posterior_of", "tune"]

logger = logging.getLogger(__name__)

#: The class of each ``uip_gradient.e_step``.
POSTERIORS: dict[str, type[GradientPosterior]] = {
    "adam": GradientPosterior,
    "relinearize": RelinearizedPosterior,
}
# part of every key: raise it when what is tuned, or how, changes
VERSION = 9


@dataclass(frozen=True)
class Tuned:
    """A facet whose soft tokens were tuned.

    Attributes
    ----------
    settings : FacetSettings
    codebook : ResidualCodebook or None
        None where no profile has evidence.
    codes : ndarray of int64, shape (n_snapshots, levels)
        -1 without evidence.
    means : ndarray of float64, shape (n_snapshots, rank)
        Posterior means in the codebook's coordinates.
    of_row : ndarray of int64, shape (n_rows,)
        Snapshot of each row, -1 for none.
    fingerprint : str
        Of the LM.
    report : dict
        Diagnostics of the fit.
    """

    settings: FacetSettings
    codebook: ResidualCodebook | None
    codes: np.ndarray
    means: np.ndarray
    of_row: np.ndarray
    fingerprint: str
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the token fields, one a level."""
        ((name, _),) = self.settings.fields
        return self.settings.level_names(name)

    @property
    def size(self) -> int:
        """Number of tokens, [PAD] not counted."""
        return 0 if self.codebook is None else self.settings.codes

    def tokens(self, empty: str) -> np.ndarray:
        """Token of each row at each level, int32, shape (n_rows, levels).

        Rows without a snapshot, or whose snapshot has no evidence, get [PAD]; or the prior's
        mode, if ``empty`` is ``prior``.
        """
        codes = np.concatenate([self.codes, np.full((1, self.settings.levels), -1)])
        tokens = codes[self.of_row] + 1
        if empty == "prior" and self.codebook is not None:
            tokens = np.where(tokens > 0, tokens, self.codebook.prior_codes() + 1)
        return tokens.astype(np.int32)

    def row_means(self) -> np.ndarray:
        """Posterior mean of each row, zeros without evidence; float32, shape (n_rows, rank)."""
        means = np.concatenate([self.means, np.zeros((1, self.means.shape[1]))])
        return means[self.of_row].astype(np.float32)


def tune(
    observed: Observations,
    item_texts: Sequence[str | None],
    settings: UIPSettings,
    cost: Counter[str],
) -> dict[str, Tuned]:
    """Tune the facets of ``settings`` that are tuned by gradients.

    Parameters
    ----------
    observed : Observations
    item_texts : sequence of str or None, length n_items
    settings : UIPSettings
    cost : Counter
        ``lm_tokens`` and ``lm_seconds`` are added to it.

    Returns
    -------
    dict of str to Tuned, by facet

    Raises
    ------
    SettingsError
        If a facet cannot be tuned on this data.
    """
    for facet in settings.tuned_facets:
        if facet.match is not None:
            logger.warning(
                "uip_%s_match is left out: uip_posterior=gradient gives no match field, for it "
                "has no vectors of items; it comes with uip_posterior=score",
                facet.name,
            )
    behaviours = observed.behaviours
    snapshots = take_snapshots(observed.history, settings.gradient.snapshots, behaviours.train)
    rng = np.random.default_rng(settings.seed)
    held_out = rng.random(behaviours.n_users) < settings.gradient.held_out
    user = snapshots.users(observed.history, behaviours.user)
    tuned = {}
    for group in groups(observed, item_texts, settings, snapshots, cost):
        names = [facet.name for facet in group.facets]
        logger.info(
            "tuning soft tokens of %s: %d snapshots, %d LM tokens a pass",
            ", ".join(names), len(snapshots), group.units.cost.sum(),
        )  # fmt: skip
        started = time.perf_counter()
        posterior = posterior_of(group, settings)
        backbone = group.likelihood.backbone
        work = Work(
            settings.cache.expanduser()
            / "tuned"
            / _content_key(group, settings, snapshots, held_out),
            n_workers(backbone),
            backbone.device.type == "cpu",
        )
        try:
            posterior.fit(group.units, group.fold, snapshots.fitted, held_out[user], group, work)
        except DataError as error:
            raise SettingsError(f"uip_facets.{'/'.join(names)}: {error}") from error
        cost.update(lm_tokens=posterior.tokens_, lm_seconds=time.perf_counter() - started)
        for f, facet in enumerate(group.facets):
            tuned[facet.name] = Tuned(
                facet,
                posterior.codebooks_[f],
                posterior.codes(f),
                posterior.means(f),
                snapshots.of_row,
                backbone.fingerprint,
                _report(posterior, f),
            )
    return tuned


def posterior_of(group: Group, settings: UIPSettings) -> GradientPosterior:
    """The posterior of a group's facets that ``uip_gradient`` asks for, not yet fitted."""
    return POSTERIORS[settings.gradient.e_step](
        group.facets,
        group.frame,
        settings.gradient,
        settings.codebook,
        batch_tokens=group.likelihood.backbone.batch_tokens,
        seed=settings.seed,
    )


def _report(posterior: GradientPosterior, f: int) -> dict[str, Any]:
    codebook = posterior.codebooks_[f]
    report: dict[str, Any] = {
        "posterior": "gradient",
        "curvature": float(posterior.curvature_[f]),
        "spread": float(posterior.spread_[f]),
        "held_out_bounds": [round(bound, 5) for bound in posterior.bounds_],
        "log_posterior": [np.round(curve, 3).tolist() for curve in posterior.curves_],
        "learning_rate": posterior.learning_rate_,
        "rounds": posterior.n_iter_,
        "converged": posterior.converged_,
        "lm_tokens": posterior.tokens_,
    }
    if codebook is not None:
        ((name, _),) = posterior.facets[f].fields
        report[name] = codebook.report()
    return report


def _content_key(
    group: Group, settings: UIPSettings, snapshots: Snapshots, held_out: np.ndarray
) -> str:
    """Hash of all that a group's results depend on; hexadecimal."""
    about = settings.to_dict()
    chosen = {facet.name: about["uip_facets"][facet.name] for facet in group.facets}
    backbone, prompt = group.likelihood.backbone, group.likelihood.prompt
    parts = [
        VERSION,
        backbone.fingerprint,
        str(backbone.dtype),
        str(backbone.device.type),
        [prompt.names, prompt.lead_ids, prompt.name_ids],
        prompt.ending and dataclasses.astuple(prompt.ending),
        chosen,
        [about[f"uip_{name}"] for name in ("gradient", "likelihood", "codebook")],
        backbone.batch_tokens,
        settings.seed,
    ]
    key = hashlib.sha256(json.dumps(parts).encode())
    distinct = dict.fromkeys(group.passages)
    key.update(repr([dataclasses.astuple(passage) for passage in distinct]).encode())
    units, frame = group.units, group.frame
    arrays = [
        units.passage, units.first, units.active, units.value, units.gradient, frame.theta0,
        *frame.maps, *frame.variance, group.fold, snapshots.fitted, held_out,
    ]  # fmt: skip
    for array in arrays:
        key.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return key.hexdigest()[:32]

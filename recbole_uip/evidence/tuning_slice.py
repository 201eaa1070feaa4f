"""Users of a data set whose soft tokens a benchmark tunes, and what it holds out of them."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from recbole_uip import tuning
from recbole_uip.em.facet import Observations
from recbole_uip.em.gradient import GradientPosterior
from recbole_uip.em.snapshots import Snapshots, take_snapshots
from recbole_uip.em.states import whole_history
from recbole_uip.evidence.task import Task
from recbole_uip.lm.likelihood import Passage
from recbole_uip.passages import Group, groups
from recbole_uip.settings import SettingsError
from recbole_uip.work import Work

__all__ = ["Counted", "Slice", "names_of", "posterior_of"]

logger = logging.getLogger(__name__)

HELD_OUT = 0.2  # share of a user's behaviours
LEAST_EVENTS = 20  # training rows of a user that is taken
CHECKED = 24  # profiles whose true likelihood is computed


class Counted:
    """A group's likelihood that counts what goes through the LM."""

    def __init__(self, group: Group) -> None:
        self.group = group
        #: LM tokens; of these, the ones that go through the layers; and those that are predicted.
        self.tokens = self.run = self.predicted = 0
        self._lock = threading.Lock()

    def __call__(self, units: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        passages = [self.group.passages[u] for u in units]
        tokens = sum(len(passage.tokens) for passage in passages)
        texts = 0 if passages[0].verbs else len(passages)
        both = sum(map(self.group.likelihood.n_tokens, passages))
        with self._lock:
            self.tokens += both
            self.run += both - texts  # a text's last token predicts nothing
            self.predicted += tokens if texts else 0
        return self.group(units, theta)


@dataclass(frozen=True)
class Slice:
    """Some users, what they are tuned on, and what is held out.

    Attributes
    ----------
    observed : Observations
    snapshots : Snapshots
        One a user: the training rows that are not held out.
    held_out : ndarray of bool, shape (n_rows,)
        Training rows that nobody is tuned on.
    """

    observed: Observations
    snapshots: Snapshots
    held_out: np.ndarray

    @classmethod
    def of(cls, task: Task, users: int) -> Slice:
        """``users`` users at random, with a fifth of each one's training rows held out.

        Raises
        ------
        SettingsError
            If fewer have enough training rows.
        """
        behaviours, settings = task.behaviours, task.settings
        train = behaviours.train
        rng = np.random.default_rng(settings.seed)
        counts = np.bincount(behaviours.user[train], minlength=behaviours.n_users)
        enough = np.flatnonzero(counts >= LEAST_EVENTS)
        if len(enough) < users:
            raise SettingsError(
                f"users={users}, but {len(enough)} have {LEAST_EVENTS} training rows: lower users"
            )
        chosen = np.isin(behaviours.user, rng.permutation(enough)[:users])
        held_out = chosen & train & (rng.random(len(behaviours)) < HELD_OUT)
        is_event = chosen & train & ~held_out
        history = whole_history(behaviours.user, behaviours.time, is_event, behaviours.n_users)
        return cls(
            Observations(behaviours, history, task.fold, settings.folds),
            take_snapshots(history, (), train),
            held_out,
        )

    def groups(self, task: Task) -> list[Group]:
        """The task's facets as they are tuned for these users, with codebooks for so few."""
        few = max(2, len(self.snapshots) // 4)
        facets = tuple(
            dataclasses.replace(facet, codes=min(facet.codes, few))
            for facet in task.settings.facets
        )
        return groups(
            self.observed,
            task.texts,
            dataclasses.replace(task.settings, facets=facets),
            self.snapshots,
            Counter(),
        )

    def fit(self, posterior: GradientPosterior, group: Group, work: Work) -> tuple[float, Counted]:
        """Fit a posterior of a group; seconds, and what went through the LM."""
        n = len(self.snapshots)
        judged = np.zeros(n, dtype=bool)
        judged[:: max(2, round(1 / max(posterior.settings.held_out, 0.05)))] = True
        logger.info("tuning %s", names_of(group))
        counted = Counted(group)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            posterior.fit(group.units, group.fold, self.snapshots.fitted, judged, counted, work)
        return time.perf_counter() - started, counted

    def passages(
        self, group: Group, held_out: bool
    ) -> tuple[list[Passage], np.ndarray, np.ndarray]:
        """A few behaviours of each of the first profiles, own or held out."""
        if not held_out:
            units = group.units
            rows = np.concatenate(
                [
                    np.arange(units.first[p], units.first[p + 1])[:3]
                    for p in range(min(CHECKED, len(self.snapshots)))
                ]
            )
            return [group.passages[row] for row in rows], units.owner[rows], units.active[rows]
        user = self.observed.behaviours.user
        speaks = self.held_out & group.evidence.any(axis=1)
        rows = [
            np.flatnonzero(speaks & (user == self.snapshots.timeline[profile]))[:3]
            for profile in range(min(CHECKED, len(self.snapshots)))
        ]
        owner = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
        chosen = np.concatenate(rows)
        return group.read(list(chosen[:, None])), owner, group.evidence[chosen]


def names_of(group: Group) -> str:
    """The group's facets, in words."""
    return ", ".join(facet.name for facet in group.facets)


def posterior_of(task: Task, group: Group, e_step: str = "adam") -> GradientPosterior:
    """The posterior of a group by one round of Adam, or three of recomputed scores."""
    # The first round of relinearize is the closed form.
    gradient = dataclasses.replace(
        task.settings.gradient, e_step=e_step, rounds=3 if e_step == "relinearize" else 1
    )
    return tuning.posterior_of(group, dataclasses.replace(task.settings, gradient=gradient))

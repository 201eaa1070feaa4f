"""What tuning soft tokens through the LM costs and finds, next to the closed form and the authors.

All on the same users: their training rows but for a fifth of each user's, which are held out.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from recbole_uip import tuning
from recbole_uip.em.ascent import LEARNING_RATES, State, ascend
from recbole_uip.em.facet import Observations
from recbole_uip.em.gradient import GradientPosterior
from recbole_uip.em.snapshots import Snapshots, take_snapshots
from recbole_uip.em.states import whole_history
from recbole_uip.evidence.bench import Matrices, matmul_ceiling, matrices
from recbole_uip.evidence.figures import Figure, machine
from recbole_uip.evidence.task import Task, load_task, parse_config
from recbole_uip.lm.likelihood import (
    Passage,
    SoftTokenLikelihood,
    text_passage,
)
from recbole_uip.lm.prompt import Prompt
from recbole_uip.lm.scoring import n_workers
from recbole_uip.passages import Group, groups
from recbole_uip.records import peak_memory, versions
from recbole_uip.settings import FacetSettings, SettingsError
from recbole_uip.work import Work

__all__ = ["CausalPrompt", "bench_gradient", "tuning_flops"]

logger = logging.getLogger(__name__)

HELD_OUT = 0.2  # share of a user's behaviours
LEAST_EVENTS = 20  # training rows of a user that is taken
SCALES = (1.0, 0.1, 0.01)  # of the closed form's soft tokens, whose first order is short
LENGTHS = ((1, 10), (11, 25), (26, 10**9))  # behaviours of a profile, for the correlations
CHECKED = 24  # profiles whose true likelihood is computed
#: The paper's facets and its prompts; every behaviour speaks for both.
AUTHORS_FACETS = ("hobby", "background")
AUTHORS_RATE = 0.01

_NOTES = [
    "E-step: uip_gradient.steps steps for all users, one round, with the choice of the learning "
    "rate; wall time, the LM loaded and scores cached. Floor: its FLOPs at the measured ceiling.",
    "FLOPs: 2 per weight and token forward, 2 backward (weights get no gradient); the head at "
    "predicted text tokens. Ceiling: the best torch product of the LM's layer shapes, same type "
    "and threads.",
]


_AGREEMENT = (
    "{facet}, {least} to {most} behaviours ({profiles} profiles): correlation of the closed form "
    "with the tuned tokens {mode:.2f}, with the measured offsets {offset:.2f}"
)
_RELINEARIZED = (
    "{facets}: scores recomputed at codewords, {rounds} rounds with the closed form's, "
    "{lm_tokens:,} LM tokens, {seconds:.1f} s; curvature {curvature}"
)


@dataclass(frozen=True)
class CausalPrompt(Prompt):
    """The authors' prompt: the same words, but every position sees all before it."""

    def mask(self, n_behaviour: int = 0) -> torch.Tensor:
        """Plainly causal."""
        length = len(self) + n_behaviour
        return torch.ones(length, length).tril().bool()


class _Counted:
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
        both = tokens + len(passages) * len(self.group.facets)
        with self._lock:
            self.tokens += both
            self.run += both - texts  # a text's last token predicts nothing
            self.predicted += tokens if texts else 0
        return self.group(units, theta)


def tuning_flops(weights: Matrices, run_tokens: int, predicted_tokens: int) -> int:
    """FLOPs of products with weights for likelihoods and their gradients in soft tokens.

    Parameters
    ----------
    weights : Matrices
    run_tokens : int
        Tokens through the layers, soft ones included; 4 FLOPs a weight.
    predicted_tokens : int
        Tokens at which the head makes logits, there and back.
    """
    return 4 * (weights.layer_weights * run_tokens + weights.head_weights * predicted_tokens)


def bench_gradient(
    dataset: str | None = None,
    config_files: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    command_line: Sequence[str] = (),
    users: int = 200,
    peers: int = 4,
    speed: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure the gradient posterior: speed, agreement with the closed form, true likelihood.

    Parameters
    ----------
    dataset : str, optional
        By default ``dataset`` of the settings, else ml-100k.
    config_files : sequence of path, optional
    config : mapping, optional
        Any RecBole or ``uip_*`` settings; stronger than the files.
    command_line : sequence of str, optional
        ``--key=value`` arguments; stronger than ``config``.
    users : int
        Users, drawn at random among those with enough training rows.
    peers : int
        Of these, users for the comparison with the authors' formulation; 0 leaves it out.
    speed : bool
        Whether to say how fast the E-step is, and nothing else.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        As :func:`~recbole_uip.evidence.bench.bench_profiles`, with ``agreement``, ``likelihood``,
        ``relinearized`` and ``authors`` besides.

    Raises
    ------
    SettingsError
        If a setting cannot be used, or there are too few users.
    """
    if users < 8:
        raise SettingsError(f"users={users} must be at least 8: a codebook is fitted on them")
    if not 0 <= peers <= users:
        raise SettingsError(f"peers={peers} must be between 0 and users={users}")
    config = {"uip_posterior": "gradient", **(config or {})}
    name, parsed = parse_config(dataset, config_files, config, command_line)
    task = load_task(parsed)
    here = machine()
    slice_ = _Slice.of(task, users)
    groups = slice_.groups(task)
    backbone = groups[0].likelihood.backbone
    here |= {"device": str(backbone.device), "dtype": str(backbone.dtype).removeprefix("torch.")}
    on_cpu = backbone.device.type == "cpu"
    if not on_cpu:
        here["gpu"] = torch.cuda.get_device_name(backbone.device)
    shapes = matrices(backbone.model)

    def ceiling() -> float:
        return matmul_ceiling(shapes.layers, backbone.batch_tokens, backbone.dtype, backbone.device)

    fastest = ceiling()
    results: dict[str, Any] = {"agreement": [], "likelihood": [], "relinearized": []}
    notes, spent = [*_NOTES], _Spent()
    with tempfile.TemporaryDirectory(prefix="uip-bench-") as folder:
        for number, group in enumerate(groups):
            if not on_cpu:
                spent.compiling += _warm_up(group)
            work = Work(Path(folder, str(number)), n_workers(backbone), on_cpu)
            posterior = _posterior(task, group)
            spent.add(*slice_.fit(posterior, group, work), shapes)
            notes.append(_course(posterior, group))
            if not speed:
                work = Work(Path(folder, f"relinearized-{number}"), n_workers(backbone), on_cpu)
                for name_, found in slice_.compare(task, posterior, group, work).items():
                    results[name_] += found
    fastest = max(fastest, ceiling())
    if not on_cpu:
        notes.append(f"compiling the LM's stages, once a process: {spent.compiling:.1f} s")
    notes += [
        *(_AGREEMENT.format(**each) for each in results["agreement"]),
        *(_RELINEARIZED.format(**each) for each in results["relinearized"]),
        *(
            "{facets}, nats a behaviour, {which} ({behaviours}): ".format(**each)
            + ", ".join(f"{where} {value:.4f}" for where, value in each["at"].items())
            for each in results["likelihood"]
        ),
    ]
    authors = None
    if peers and not speed:
        authors = _against_authors(task, slice_, peers)
        notes += authors["lines"]
    return {
        "dataset": name,
        "machine": here,
        "figures": [each.to_dict() for each in spent.figures(users, fastest)],
        **results,
        "authors": authors,
        "notes": notes,
        "versions": versions(),
        "command": command or f"bench_gradient({name!r})",
    }


@dataclass
class _Spent:
    """What tuning has taken, of all groups together."""

    seconds: float = 0.0
    compiling: float = 0.0
    lm_tokens: int = 0
    flops: int = 0

    def add(self, seconds: float, counted: _Counted, shapes: Matrices) -> None:
        self.seconds += seconds
        self.lm_tokens += counted.tokens
        self.flops += tuning_flops(shapes, counted.run, counted.predicted)

    def figures(self, users: int, fastest: float) -> list[Figure]:
        counts = {"users": users, "lm_tokens": self.lm_tokens, "flops": self.flops}
        speed = f"{self.lm_tokens:,} LM tokens ({self.lm_tokens / self.seconds:,.0f} tok/s)"
        floor = self.flops / fastest
        return [
            Figure("tuning", f"E-step: {users} users, {speed}", self.seconds, "s", floor, counts),
            Figure(
                "flops",
                f"  of {self.flops / 1e12:,.2f} TFLOP",
                self.flops / self.seconds,
                "FLOP/s",
                fastest,
            ),
            Figure("memory", "peak memory of the process", peak_memory(), "B"),
        ]


def _warm_up(group: Group) -> float:
    """Seconds of a first pass over the longest texts, for which a GPU's code is compiled."""
    longest = np.argsort(group.units.cost)[-256:]
    theta = np.repeat(group.likelihood.theta0[None], len(longest), axis=0)
    started = time.perf_counter()
    group(longest, theta)
    return time.perf_counter() - started


def _course(posterior: GradientPosterior, group: Group) -> str:
    """How the E-step of a group went, in words."""
    curve = posterior.curves_[-1]
    fall = float(-np.minimum(np.diff(curve), 0).sum())
    return (
        f"{_names(group)}: learning rate {posterior.learning_rate_:g}, curvature "
        f"{', '.join(f'{c:.3g}' for c in posterior.curvature_)}; mean log posterior "
        f"{curve[0]:.2f} to {curve[-1]:.2f} in {len(curve) - 1} steps, falls on the way "
        f"{fall:.2g} in all"
    )


def _names(group: Group) -> str:
    return ", ".join(facet.name for facet in group.facets)


def _posterior(task: Task, group: Group, e_step: str = "adam") -> GradientPosterior:
    # The first round of relinearize is the closed form.
    gradient = dataclasses.replace(
        task.settings.gradient, e_step=e_step, rounds=3 if e_step == "relinearize" else 1
    )
    return tuning.posterior_of(group, dataclasses.replace(task.settings, gradient=gradient))


@dataclass(frozen=True)
class _Slice:
    """Some users, what they are tuned on, and what is held out."""

    observed: Observations
    snapshots: Snapshots
    held_out: np.ndarray

    @classmethod
    def of(cls, task: Task, users: int) -> _Slice:
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
            {},
        )

    def fit(self, posterior: GradientPosterior, group: Group, work: Work) -> tuple[float, _Counted]:
        """Fit a posterior of a group; seconds, and what went through the LM."""
        n = len(self.snapshots)
        judged = np.zeros(n, dtype=bool)
        judged[:: max(2, round(1 / max(posterior.settings.held_out, 0.05)))] = True
        logger.info("tuning %s", _names(group))
        counted = _Counted(group)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            posterior.fit(group.units, group.fold, self.snapshots.fitted, judged, counted, work)
        return time.perf_counter() - started, counted

    def compare(
        self, task: Task, posterior: GradientPosterior, group: Group, work: Work
    ) -> dict[str, list[dict[str, Any]]]:
        """The tuned tokens beside the closed form and scores recomputed at codewords."""
        between = _posterior(task, group, "relinearize")
        seconds, counted = self.fit(between, group, work)
        relinearized = {
            "facets": _names(group),
            "rounds": between.n_iter_,
            "lm_tokens": counted.tokens,
            "seconds": seconds,
            "curvature": [round(float(c), 2) for c in between.curvature_],
        }
        return {
            "agreement": self.agreement(posterior, group),
            "likelihood": self.likelihood(posterior, between, group),
            "relinearized": [relinearized],
        }

    def agreement(self, posterior: GradientPosterior, group: Group) -> list[dict[str, Any]]:
        """Correlations of the closed form's posterior means with what tuning found."""
        evidence = group.units.evidence
        found = []
        for f, (facet, part) in enumerate(zip(group.facets, group.frame.slices, strict=True)):
            closed = self.closed_form(group, f)
            for least, most in LENGTHS:
                chosen = (evidence[:, f] >= least) & (evidence[:, f] <= most)
                if chosen.sum() < 2:
                    continue
                pair = [
                    float(np.corrcoef(closed[chosen].ravel(), each[chosen].ravel())[0, 1])
                    for each in (posterior.mode_[f], posterior.offset_[f])
                ]
                found.append(
                    {
                        "facet": facet.name,
                        "least": least,
                        "most": min(most, int(evidence[:, f].max())),
                        "profiles": int(chosen.sum()),
                        "mode": pair[0],
                        "offset": pair[1],
                        "directions": part.stop - part.start,
                    }
                )
        return found

    def closed_form(self, group: Group, f: int) -> np.ndarray:
        """Posterior means of a facet by cached scores alone, shape (n_profiles, rank)."""
        part, units = group.frame.slices[f], group.units
        sums = np.zeros((len(self.snapshots), part.stop - part.start))
        np.add.at(sums, units.owner, units.gradient[:, part])
        precision = 1.0 / group.frame.variance[f] + units.evidence[:, f, None]
        return sums / precision

    def likelihood(
        self,
        posterior: GradientPosterior,
        between: GradientPosterior,
        group: Group,
    ) -> list[dict[str, Any]]:
        """True log-likelihoods of own and held-out behaviours at what each posterior says."""
        tuned = np.concatenate(posterior.mode_, axis=1)
        closed = np.concatenate(
            [self.closed_form(group, f) for f in range(len(group.facets))], axis=1
        )
        places = {"start": np.zeros_like(tuned), "gradient": tuned}
        means = [between.means(f) for f in range(len(group.facets))]
        places["relinearized"] = np.concatenate(means, axis=1)
        places |= {f"score x {scale:g}": scale * closed for scale in SCALES}
        results = []
        for which, held_out in (("own", False), ("held out", True)):
            passages, owner, active = self._passages(group, held_out)
            if not passages:
                continue
            at = {}
            for where, coordinates in places.items():
                theta = group.frame.tokens(
                    coordinates[owner].astype(np.float32), group.fold[owner], active
                )
                at[where] = float(group.likelihood.value(passages, theta).mean())
            results.append(
                {
                    "facets": _names(group),
                    "which": which,
                    "behaviours": len(passages),
                    "at": at,
                }
            )
        return results

    def _passages(
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


def _against_authors(task: Task, slice_: _Slice, peers: int) -> dict[str, Any]:
    """LM tokens and seconds to the same gain in held-out likelihood, ours and the authors' way.

    Gains are from where each starts, for under another prompt the same texts have another
    likelihood. Both tune the paper's two facets for the same users. The authors' way: the texts
    in one sequence, no block mask, free soft tokens, all of the sequence at each step of Adam,
    through transformers as it is. Their codebook learns from soft tokens but does not move them
    (MSE weight .5, no commitment), so it has no part in this.
    """
    facets = tuple(
        FacetSettings(each, weight="all", prompt=each, codes=2) for each in AUTHORS_FACETS
    )
    settings = dataclasses.replace(task.settings, facets=facets, likelihood="item")
    ours = dataclasses.replace(task, settings=settings)
    (group,) = slice_.groups(ours)
    chosen = np.arange(peers)
    posterior = _posterior(ours, group)
    state = State.start(group.units, chosen)
    passages, owner, active = slice_._passages(group, held_out=True)
    kept = [row for row in range(len(owner)) if owner[row] < peers]
    passages, owner, active = [passages[row] for row in kept], owner[kept], active[kept]
    started = time.perf_counter()
    rate = posterior.settings.learning_rate or LEARNING_RATES[1]
    result = ascend(
        state, group.units, chosen, group.fold[chosen], group.frame, posterior.priors(), group,
        posterior.settings, rate, (settings.seed, 1),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    theta = group.frame.tokens(result.where[owner], group.fold[owner], active)
    reached = float(group.likelihood.value(passages, theta).mean())
    theta0 = np.repeat(group.likelihood.theta0[None], len(owner), axis=0)
    start = float(group.likelihood.value(passages, theta0).mean())
    rows = [
        {
            "way": "ours",
            "start": start,
            "reached": reached,
            "steps": posterior.settings.steps,
            "lm_tokens": int(result.lm_tokens),
            "seconds": seconds,
        },
        _authors_way(group, chosen, passages, owner, reached - start, posterior.settings.steps),
    ]
    lines = [
        f"{row['way']}: {peers} users, {len(passages)} held-out behaviours from "
        f"{row['start']:.3f} nats each by {row['reached'] - row['start']:+.3f} in {row['steps']} "
        f"steps, {row['lm_tokens']:,} LM tokens, {row['seconds']:.1f} s"
        for row in rows
    ]
    if rows[1]["reached"] - rows[1]["start"] < reached - start:
        lines[1] += " (our gain not reached in as many steps)"
    return {"rows": rows, "lines": lines}


def _authors_way(
    group: Group,
    chosen: np.ndarray,
    passages: list[Passage],
    owner: np.ndarray,
    gain: float,
    most_steps: int,
) -> dict[str, Any]:
    backbone, prompt = group.likelihood.backbone, group.likelihood.prompt
    plain = CausalPrompt(prompt.names, prompt.lead_ids, prompt.name_ids)
    likelihood = SoftTokenLikelihood(backbone, plain, range(len(group.facets)), general=True)
    first = group.units.first
    sequences = [
        text_passage([group.passages[u].tokens for u in range(first[p], first[p + 1])])
        for p in chosen
    ]
    theta = torch.tensor(np.repeat(likelihood.theta0[None], len(chosen), axis=0))
    theta.requires_grad_()
    adam = torch.optim.Adam([theta], lr=AUTHORS_RATE)

    def held_out() -> float:
        return float(likelihood.value(passages, theta.detach().numpy()[owner]).mean())

    reached = start = held_out()
    seconds, tokens, steps = 0.0, 0, 0
    while (reached - start < gain or steps == 0) and steps < most_steps:
        started = time.perf_counter()
        slopes = []
        for user, sequence in enumerate(sequences):  # one at a time: full logits are large
            _, slope = likelihood.value_and_gradient(
                [sequence], theta.detach().numpy()[user : user + 1]
            )
            slopes.append(slope)
            tokens += len(sequence.tokens) + len(plain)
        theta.grad = -torch.from_numpy(np.concatenate(slopes))
        adam.step()
        seconds += time.perf_counter() - started
        steps += 1
        reached = held_out()
    return {
        "way": "authors",
        "start": start,
        "reached": reached,
        "steps": steps,
        "lm_tokens": tokens,
        "seconds": seconds,
    }

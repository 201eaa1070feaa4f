"""What tuning soft tokens through the LM costs and finds, next to the closed form and the authors.

All on the same users: their training rows but for a fifth of each user's, which are held out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_uip.em.frame import sums_by_owner
from recbole_uip.em.gradient import GradientPosterior
from recbole_uip.evidence.bench import Matrices, matmul_ceiling, matrices
from recbole_uip.evidence.bench_authors import against_authors
from recbole_uip.evidence.figures import Figure, machine
from recbole_uip.evidence.task import Task, load_task, parse_config
from recbole_uip.evidence.tuning_slice import CHECKED, Counted, Slice, names_of, posterior_of
from recbole_uip.lm.scoring import n_workers
from recbole_uip.passages import Group
from recbole_uip.records import peak_memory, versions
from recbole_uip.settings import SettingsError
from recbole_uip.work import Work

__all__ = ["bench_gradient", "tuning_flops"]

SCALES = (1.0, 0.1, 0.01)  # of the closed form's soft tokens, whose first order is short
LENGTHS = ((1, 10), (11, 25), (26, 10**9))  # behaviours of a profile, for the correlations

_NOTES = [
    "E-step: uip_gradient.steps steps for all users, one round, with the choice of the learning "
    "rate; wall time, the LM loaded and scores cached. Floor: its FLOPs at the measured ceiling.",
    "FLOPs: 2 per weight and token forward, 2 backward (weights get no gradient), of the layers in "
    "which soft tokens are moved; through those before a text goes once, which is not counted. The "
    "head at predicted text tokens. Ceiling: the best torch product of the LM's layer shapes, same "
    "type and threads.",
]


_AGREEMENT = (
    "{facet}, {least} to {most} behaviours ({profiles} profiles): correlation of the closed form "
    "with the tuned tokens {mode:.2f}, with the measured offsets {offset:.2f}"
)
_RELINEARIZED = (
    "{facets}: scores recomputed at codewords, {rounds} rounds with the closed form's, "
    "{lm_tokens:,} LM tokens, {seconds:.1f} s; curvature {curvature}"
)


def tuning_flops(
    weights: Matrices,
    run_tokens: int,
    predicted_tokens: int,
    moved: float = 1.0,
) -> float:
    """FLOPs of products with weights for likelihoods and their gradients in soft tokens.

    Parameters
    ----------
    weights : Matrices
    run_tokens : int
        Tokens through the layers in which soft tokens are moved; 4 FLOPs a weight, there and back.
    predicted_tokens : int
        Tokens at which the head makes logits, there and back.
    moved : float
        Share of these layers. Through those before a text goes once, and that is not counted.
    """
    layers = 4 * moved * weights.layer_weights * run_tokens
    return layers + 4 * weights.head_weights * predicted_tokens


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
        Of these, users for the comparison with the authors' formulation, at most
        :data:`~recbole_uip.evidence.tuning_slice.CHECKED`; 0 leaves it out.
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
    most = min(users, CHECKED)
    if not 0 <= peers <= most or peers == 1:
        raise SettingsError(
            f"peers={peers} must be 0, or from 2 to {most}, of whom likelihoods are computed"
        )
    config = {"uip_posterior": "gradient", **(config or {})}
    name, parsed = parse_config(dataset, config_files, config, command_line)
    task = load_task(parsed)
    here = machine()
    slice_ = Slice.of(task, users)
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
            posterior = posterior_of(task, group)
            spent.add(*slice_.fit(posterior, group, work), shapes)
            notes.append(_course(posterior, group))
            if not speed:
                work = Work(Path(folder, f"relinearized-{number}"), n_workers(backbone), on_cpu)
                for name_, found in _compare(slice_, task, posterior, group, work).items():
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
        authors = against_authors(task, slice_, peers)
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
    flops: float = 0.0

    def add(self, seconds: float, counted: Counted, shapes: Matrices) -> None:
        self.seconds += seconds
        self.lm_tokens += counted.tokens
        moved = counted.group.likelihood.moved
        self.flops += tuning_flops(shapes, counted.run, counted.predicted, moved)

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
    fall = float(-np.fmin(np.diff(curve), 0).sum())
    return (
        f"{names_of(group)}: room {', '.join(f'{room:.2g}' for room in group.frame.room)} units, "
        f"learning rate {posterior.learning_rate_:g}, curvature "
        f"{', '.join(f'{c:.3g}' for c in posterior.curvature_)}; mean log posterior "
        f"{curve[0]:.2f} to {curve[-1]:.2f} in {len(curve) - 1} steps, falls on the way "
        f"{fall:.2g} in all"
    )


def _compare(
    slice_: Slice, task: Task, posterior: GradientPosterior, group: Group, work: Work
) -> dict[str, list[dict[str, Any]]]:
    """The tuned tokens beside the closed form and scores recomputed at codewords."""
    between = posterior_of(task, group, "relinearize")
    seconds, counted = slice_.fit(between, group, work)
    relinearized = {
        "facets": names_of(group),
        "rounds": between.n_iter_,
        "lm_tokens": counted.tokens,
        "seconds": seconds,
        "curvature": [round(float(c), 2) for c in between.curvature_],
    }
    return {
        "agreement": _agreement(posterior, group),
        "likelihood": _likelihood(slice_, posterior, between, group),
        "relinearized": [relinearized],
    }


def _agreement(posterior: GradientPosterior, group: Group) -> list[dict[str, Any]]:
    """Correlations of the closed form's posterior means with what tuning found."""
    evidence = group.units.evidence
    found = []
    for f, (facet, part) in enumerate(zip(group.facets, group.frame.slices, strict=True)):
        closed = _closed_form(group, f)
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


def _closed_form(group: Group, f: int) -> np.ndarray:
    """Posterior means of a facet by cached scores alone, shape (n_profiles, rank)."""
    part, units = group.frame.slices[f], group.units
    sums = sums_by_owner(units.gradient[:, part], units.owner, len(group.fold))
    precision = 1.0 / group.frame.variance[f] + units.evidence[:, f, None]
    return sums / precision


def _likelihood(
    slice_: Slice,
    posterior: GradientPosterior,
    between: GradientPosterior,
    group: Group,
) -> list[dict[str, Any]]:
    """True log-likelihoods of own and held-out behaviours at what each posterior says.

    Soft tokens are drawn back to where the LM knows anything, as tuning draws them.
    """
    tuned = np.concatenate(posterior.mode_, axis=1)
    closed = np.concatenate([_closed_form(group, f) for f in range(len(group.facets))], axis=1)
    places = {"start": np.zeros_like(tuned), "gradient": tuned}
    means = [between.means(f) for f in range(len(group.facets))]
    places["relinearized"] = np.concatenate(means, axis=1)
    places |= {f"score x {scale:g}": scale * closed for scale in SCALES}
    results = []
    for which, held_out in (("own", False), ("held out", True)):
        passages, owner, active = slice_.passages(group, held_out)
        if not passages:
            continue
        at, behaviours = {}, int(active.max(axis=1).sum())
        for where, coordinates in places.items():
            drawn = group.frame.within(coordinates[owner].astype(np.float32), group.fold[owner])
            theta = group.frame.tokens(drawn, group.fold[owner], active)
            at[where] = float(group.likelihood.value(passages, theta).sum() / behaviours)
        results.append(
            {
                "facets": names_of(group),
                "which": which,
                "behaviours": behaviours,
                "at": at,
            }
        )
    return results

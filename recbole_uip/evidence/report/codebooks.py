"""Section of a report on codebooks: the course of EM, code usage, agreement of seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recbole_uip.evidence.experiments.agreement import seed_agreement
from recbole_uip.evidence.experiments.outcomes import CaseOutcome, Outcomes
from recbole_uip.evidence.report.charts import Line, panels
from recbole_uip.evidence.report.format import (
    amount,
    joined,
    mean_and_deviation,
    number,
    share,
)
from recbole_uip.evidence.report.parts import Block, Chart, Section, Table, Text

__all__ = ["codebooks"]

# More lines than this in a panel cannot be told apart.
MOST_LINES = 8


@dataclass
class _Fit:
    """One fit of a codebook level, which several cases may share.

    Attributes
    ----------
    dataset, name : str
        Name of the field, and of the level where there are several.
    cases : list of CaseOutcome
    by_seed : dict of int to dict
        What the fit reports, by seed.
    """

    dataset: str
    name: str
    cases: list[CaseOutcome] = field(default_factory=list)
    by_seed: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        arms = _arms(self.cases)
        variants = joined([case.variant_name or "as set" for case in self.cases], most=2)
        return arms if variants == "as set" else f"{arms} [{variants}]"

    def values(self, name: str) -> np.ndarray:
        """What each seed reports, shape (n_seeds,)."""
        return np.array([_floats(level.get(name)) for level in self.by_seed.values()])


def codebooks(outcomes: Outcomes) -> Section | None:
    """How the codebooks were fitted, and how they are used; None without codes."""
    fits = _fits(outcomes)
    if not fits:
        return None
    section = Section(
        "Codebooks",
        [
            Text(
                "Fitted on states of training rows. Arms with the same facets share a fit, which "
                "is shown once. Perplexity is the number of codes in effective use: exp of the "
                "entropy of usage. The bound is the log-likelihood per sample in nats before each "
                "step; its numbers compare within a field alone. Under EM it must never fall."
            )
        ],
    )
    section.blocks.append(_table(fits))
    for dataset in dict.fromkeys(fit.dataset for fit in fits):
        section.blocks += _charts([fit for fit in fits if fit.dataset == dataset], dataset)
    section.blocks += _agreement(outcomes)
    return section


def _fits(outcomes: Outcomes) -> list[_Fit]:
    fits: list[_Fit] = []
    for case in outcomes.cases:
        by_name: dict[str, dict[int, dict[str, Any]]] = {}
        for seed, run in sorted(case.runs.items()):
            for name, level in _levels(run.record.get("profiles") or {}):
                by_name.setdefault(name, {})[seed] = level
        for name, by_seed in by_name.items():
            for fit in fits:
                if (fit.dataset, fit.name) == (case.dataset, name) and _same(fit.by_seed, by_seed):
                    break
            else:
                fit = _Fit(case.dataset, name)
                fits.append(fit)
            fit.cases.append(case)
            fit.by_seed.update(by_seed)
    return fits


def _same(one: Mapping[int, dict], other: Mapping[int, dict]) -> bool:
    """Whether two cases have the same fits, as far as they have seeds in common."""
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[seed] == other[seed] for seed in shared)


def _levels(profiles: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    levels = []
    for facet in profiles.values():
        for name, fitted in facet.items():
            if isinstance(fitted, list) and fitted and isinstance(fitted[0], dict):
                for number_of, level in enumerate(fitted, start=1):
                    levels.append(
                        (name if len(fitted) == 1 else f"{name}, level {number_of}", level)
                    )
    return levels


def _floats(values: Any) -> np.ndarray:
    """Numbers of a record, which has null for NaN and words for infinities."""
    return np.array(values, dtype=np.float64)


def _table(fits: Sequence[_Fit]) -> Table:
    rows = []
    for fit in fits:
        levels = list(fit.by_seed.values())
        usage = [_floats(level["usage"]) for level in levels]
        bounds = [_floats(level["lower_bounds"]) for level in levels]
        falls = [max(0.0, -np.diff(each).min()) for each in bounds if len(each) > 1]
        rows.append(
            [
                fit.dataset,
                fit.name,
                fit.label,
                str(len(levels)),
                joined([str(len(each)) for each in usage]),
                mean_and_deviation([float((each > 0).sum()) for each in usage], 1),
                mean_and_deviation(fit.values("perplexity"), 1),
                share(float(np.mean([each.max() for each in usage])), 1, sign=False),
                mean_and_deviation([each[0] for each in bounds if len(each)], 3),
                mean_and_deviation(fit.values("lower_bound"), 3),
                mean_and_deviation(fit.values("iterations"), 0),
                f"{sum(bool(level.get('converged')) for level in levels)} of {len(levels)}",
                amount(float(fit.values("reseeded").sum())),
                number(max(falls), 5) if any(falls) else "none",
            ]
        )
    return Table(
        "Codebooks: mean ± standard deviation over seeds. Usage is of the training sample. The "
        "largest fall is that of the bound from one step to the next.",
        [
            "dataset", "field", "arms", "seeds", "codes", "codes in use", "perplexity",
            "largest share", "first bound", "last bound", "iterations", "converged", "re-seeded",
            "largest fall",
        ],
        rows,
        heads=3,
    ).without("dataset")  # fmt: skip


def _charts(fits: Sequence[_Fit], dataset: str) -> list[Block]:
    fields = list(dict.fromkeys(fit.name for fit in fits))
    courses, usages, left_out = [], [], False
    for name in fields:
        of_field = [fit for fit in fits if fit.name == name]
        left_out |= len(of_field) > MOST_LINES
        course, usage = [], []
        for fit in of_field[:MOST_LINES]:
            level = fit.by_seed[min(fit.by_seed)]
            bounds, shares = _floats(level["lower_bounds"]), np.sort(_floats(level["usage"]))[::-1]
            course.append(Line(fit.label, range(len(bounds)), bounds, marked=len(bounds) < 2))
            usage.append(Line(fit.label, range(1, len(shares) + 1), shares, marked=False))
        courses.append((name, course))
        usages.append((name, usage))
    rest = f" Of each field the first {MOST_LINES} fits are drawn." if left_out else ""
    return [
        Chart(
            panels(courses, ["iteration"], ["nats per sample"], height=280),
            f"{dataset}: course of the bound, first seed.{rest}",
        ),
        Chart(
            panels(usages, ["code, most used first"], ["share of samples"], height=280),
            f"{dataset}: usage of the codes, first seed.{rest}",
        ),
    ]


def _agreement(outcomes: Outcomes) -> list[Block]:
    # Arms that share their codes share a row.
    found: dict[tuple, list[CaseOutcome]] = {}
    for case in outcomes.cases:
        for each in seed_agreement(case):
            key = (case.dataset, each.field, case.variant_name, tuple(each.indices))
            found.setdefault(key, []).append(case)
    if not found:
        return [
            Text(
                "The agreement of seeds is not shown: no two seeds of a case kept the codes of "
                "the same test rows."
            )
        ]
    return [
        Table(
            "Agreement of seeds: adjusted Rand index of the test rows' codes, mean ± standard "
            "deviation over pairs of seeds; 1 is the same partition, 0 is chance. Rows without a "
            "code are left out.",
            [
                "dataset", "field", "arms", "settings", "pairs of seeds", "adjusted Rand index",
                "lowest",
            ],
            [
                [
                    dataset,
                    name,
                    _arms(cases),
                    variant,
                    str(len(indices)),
                    mean_and_deviation(indices, 3),
                    number(min(indices), 3),
                ]
                for (dataset, name, variant, indices), cases in found.items()
            ],
            heads=4,
        ).without("dataset", "settings")
    ]  # fmt: skip


def _arms(cases: Sequence[CaseOutcome]) -> str:
    """Names of arms, those whose codes are a control last."""
    return joined([case.arm for case in sorted(cases, key=_is_control)], most=3)


def _is_control(case: CaseOutcome) -> bool:
    return next(iter(case.runs.values())).section.get("control", "none") != "none"

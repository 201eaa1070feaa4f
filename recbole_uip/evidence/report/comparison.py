"""Sections of a report that compare arms: results, differences, slices and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from recbole_uip.evidence import statistics
from recbole_uip.evidence.experiments.measured import Measured
from recbole_uip.evidence.experiments.outcomes import (
    METRICS,
    CaseOutcome,
    Comparison,
    Outcomes,
    pooled,
)
from recbole_uip.evidence.report.charts import Line, forest, panels
from recbole_uip.evidence.report.format import (
    METRIC_NAMES,
    difference,
    interval,
    joined,
    mean_and_deviation,
    number,
    p_value,
    share,
)
from recbole_uip.evidence.report.parts import Block, Chart, Section, Table, Text

__all__ = ["calibration", "differences", "results", "slices", "verdicts"]

_PLACE = ("dataset", "model", "settings")


def _place(case: CaseOutcome) -> list[str]:
    return [case.dataset, case.model, case.variant_name]


def _label(case: CaseOutcome, outcomes: Outcomes, name: str) -> str:
    """A name that tells the case from others of its dataset."""
    stem = f"{case.model}: " if len({each.model for each in outcomes.cases}) > 1 else ""
    return f"{stem}{name}" + (f" [{case.variant_name}]" if case.variant else "")


def results(outcomes: Outcomes) -> Section:
    """Metrics of every case on the test split, as means over seeds."""
    rows = [
        [
            case.dataset,
            case.model,
            case.arm,
            case.variant_name,
            str(len(case.runs)),
            *(mean_and_deviation(case.values(metric)) for metric in METRICS),
        ]
        for case in outcomes.cases
        if case.runs
    ]
    columns = ["dataset", "model", "arm", "settings", "seeds"]
    table = Table(
        "Test split: mean ± standard deviation over seeds. Higher AUCs are better, lower "
        f"LogLoss (nats) is better. The baseline is {outcomes.baseline}.",
        columns + [METRIC_NAMES[metric] for metric in METRICS],
        rows,
        heads=4,
    )
    return Section("Results", [table.without("dataset", "model", "settings")])


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """How many comparisons came out how, in words; those of the same runs count once."""
    found = [each.verdict("auc") for each in {each.identity: each for each in comparisons}.values()]
    counted = [
        f"{found.count(name)} {name}"
        for name in ("higher", "lower", "not told apart", "untested")
        if name in found
    ]
    return f"AUC differences: {', '.join(counted)}, of {len(found)}." if found else ""


def differences(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> Section:
    """Differences from the baseline and of the plan's pairs, with their intervals."""
    if not comparisons:
        reason = "Nothing can be compared yet: no two cases have a finished seed in common."
        if len({case.arm for case in outcomes.cases}) == 1:
            reason = "There is one arm, and no other to compare it with."
        return Section("Differences", [Text(reason)])
    # All of one dataset together, then as the plan has them.
    datasets = [case.dataset for case in outcomes.cases]
    comparisons = sorted(comparisons, key=lambda each: datasets.index(each.case.dataset))
    blocks: list[Block] = [Text(verdicts(comparisons))]
    single = [each for each in comparisons if len(each.seeds) == 1]
    if single:
        blocks.append(
            Text(
                f"{len(single)} of {len(comparisons)} comparisons rest on one seed. One seed says "
                "nothing about the chance in training: these have no interval over seeds and "
                "are untested."
            )
        )
    blocks.append(_auc_differences(comparisons))
    for dataset in dict.fromkeys(each.case.dataset for each in comparisons):
        charted = [each for each in comparisons if each.seeds and each.case.dataset == dataset]
        if charted:
            blocks.append(_intervals(outcomes, dataset, charted))
    blocks += [_list_differences(comparisons), _other_differences(comparisons)]
    others = [each for each in comparisons if each.seeds_with_other_rows]
    if others:
        left_out = "; ".join(
            f"{each.case.dataset} {_label(each.case, outcomes, each.name)} "
            f"({joined([str(seed) for seed in each.seeds_with_other_rows])})"
            for each in others
        )
        blocks.append(
            Text(
                "Seeds were left out because the two sides were not judged on the same rows: "
                f"{left_out}."
            )
        )
    return Section("Differences", blocks)


def _tested_differences(
    comparisons: Sequence[Comparison], metric: str, caption: str, with_relative: bool = False
) -> Table:
    name = METRIC_NAMES[metric]
    columns = [
        *_PLACE, "comparison", "seeds", "verdict", f"Δ{name}", "95% over seeds", "p, seeds",
        "95% over users", "p, users",
    ]  # fmt: skip
    rows = [
        [
            *_place(each.case),
            each.name,
            str(len(each.seeds)),
            each.verdict(metric),
            number(each.over_seeds[metric].mean, sign=True),
            interval(each.over_seeds[metric]),
            p_value(each.p_seeds[metric]),
            interval(each.over_users[metric]),
            p_value(each.p_users[metric]),
        ]
        for each in comparisons
    ]
    if with_relative:
        columns += [f"rel. {name}", "RelaImpr"]
        for row, each in zip(rows, comparisons, strict=True):
            relative = each.relative[metric]
            row += [share(relative.ratio), share(relative.above_half)]
    return Table(caption, columns, rows, heads=4).without("dataset", "model", "settings")


def _auc_differences(comparisons: Sequence[Comparison]) -> Table:
    return _tested_differences(
        comparisons,
        "auc",
        "AUC differences on the same rows, with 95% intervals. Over seeds: paired t-interval. Over "
        "users: cluster bootstrap of the mean over seeds. p: two-sided, adjusted by Holm's method "
        f"for the {comparisons[0].n_tests} comparisons that this experiment's file asks, run or "
        "not. A verdict of higher or lower needs both p below .05. Relative improvement in two "
        "customs: rel. AUC = AUC / base − 1, RelaImpr = (AUC − .5) / (base − .5) − 1.",
        with_relative=True,
    )


def _list_differences(comparisons: Sequence[Comparison]) -> Table:
    runs = [run for each in comparisons for run in each.case.runs.values()]
    rows = sorted({run.record["test"].get("list_rows") or 0 for run in runs})
    counted = "–".join(f"{count:,}" for count in dict.fromkeys((rows[0], rows[-1])))
    return _tested_differences(
        comparisons,
        "list_auc",
        "List AUC: the AUC among the rows of one user at one time, which one profile serves, "
        "weighted by rows. This is what ranking a served list is; GAUC also compares a user's rows "
        "of different times, under profiles of different histories. It rests on lists with rows "
        f"of both labels, of {counted} rows in all. Intervals and p as for AUC.",
    )


def _other_differences(comparisons: Sequence[Comparison]) -> Table:
    table = Table(
        "The other metrics: differences with 95% intervals over paired seeds, not adjusted. "
        "Lower LogLoss is better; rel. LogLoss = LogLoss / base − 1.",
        [*_PLACE, "comparison", "seeds", "ΔLogLoss", "rel. LogLoss", "ΔGAUC"],
        [
            [
                *_place(each.case),
                each.name,
                str(len(each.seeds)),
                difference(each.over_seeds["logloss"]),
                share(_ratio(each, "logloss")),
                difference(each.over_seeds["gauc"]),
            ]
            for each in comparisons
        ],
        heads=4,
    )
    return table.without("dataset", "model", "settings")


def _intervals(outcomes: Outcomes, dataset: str, comparisons: Sequence[Comparison]) -> Chart:
    kinds = (
        ("95% over paired seeds", [each.over_seeds["auc"] for each in comparisons]),
        ("95% over users", [each.over_users["auc"] for each in comparisons]),
    )
    return Chart(
        forest(
            [_label(each.case, outcomes, each.name) for each in comparisons],
            [(name, [(each.mean, each.low, each.high) for each in found]) for name, found in kinds],
            "difference of AUC",
        ),
        f"{dataset}: AUC differences with 95% intervals over paired seeds and over users (not "
        "adjusted for their number). Right of zero the first arm named is better.",
    )


def _ratio(comparison: Comparison, metric: str) -> float:
    if not comparison.seeds:
        return math.nan
    ours, base = (
        side.values(metric, comparison.seeds).mean()
        for side in (comparison.case, comparison.against)
    )
    return float(ours / base - 1)


# --- slices -------------------------------------------------------------------------------------


def slices(
    outcomes: Outcomes, comparisons: Sequence[Comparison], measured: Mapping[str, Measured]
) -> Section | None:
    """Differences from the baseline by history length, popularity, and what is unseen."""
    main = {id(case) for case in outcomes.main_cases()}
    compared = [
        each
        for each in comparisons
        if each.against.arm == outcomes.baseline and id(each.case) in main and each.seeds
    ]
    if not compared:
        return None
    section = Section(
        "Slices",
        [
            Text(
                "Where a difference from the baseline comes from: the test rows by the events "
                "that the row's user had before it, by the training rows of its item, and by "
                "whether its user is in training. AUC within a slice compares rows of that slice "
                "alone. Intervals are 95% over paired seeds, not adjusted for their number; with "
                "one seed there is none." + outcomes.main_settings
            )
        ],
    )
    for dataset in dict.fromkeys(each.case.dataset for each in compared):
        of_dataset = [each for each in compared if each.case.dataset == dataset]
        kinds = list(_slices_of(of_dataset[0], measured))
        for metric in ("auc", "logloss"):
            section.blocks += [_slice_table(of_dataset, kind, metric, measured) for kind in kinds]
            if metric == "auc":
                section.blocks.insert(
                    len(section.blocks) - len(kinds), _slice_chart(of_dataset, kinds, measured)
                )
    return section


def _slices_of(comparison: Comparison, measured: Mapping[str, Measured]) -> dict:
    return measured[comparison.case.runs[comparison.seeds[0]].key].slices


def _names(
    compared: Sequence[Comparison], kind: str, measured: Mapping[str, Measured]
) -> list[str]:
    """Slices that have rows."""
    return [name for name, each in _slices_of(compared[0], measured)[kind].items() if each["rows"]]


def _slice_values(
    case: CaseOutcome, seeds: Sequence[int], kind: str, name: str, metric: str,
    measured: Mapping[str, Measured],
) -> list[float]:  # fmt: skip
    return [measured[case.runs[seed].key].slices[kind][name][metric] for seed in seeds]


def _slice_difference(
    comparison: Comparison, kind: str, name: str, metric: str, measured: Mapping[str, Measured]
) -> statistics.Difference:
    sides = (comparison.case, comparison.against)
    return statistics.paired_difference(
        *(_slice_values(side, comparison.seeds, kind, name, metric, measured) for side in sides),
        overlap=comparison.case.overlap,
    )


def _slice_table(
    compared: Sequence[Comparison], kind: str, metric: str, measured: Mapping[str, Measured]
) -> Table:
    names = _names(compared, kind, measured)
    # Under a random split the seeds have other rows: their mean.
    counts = [
        np.mean(_slice_values(compared[0].case, compared[0].seeds, kind, name, "rows", measured))
        for name in names
    ]
    rows, shown = [], set()
    for each in compared:
        if id(each.against) not in shown:
            shown.add(id(each.against))
            rows.append(
                [
                    each.against.model,
                    f"{each.against.arm} (itself)",
                    *(
                        mean_and_deviation(
                            _slice_values(
                                each.against, each.seeds, kind, name, metric,
                                measured,
                            )
                        )
                        for name in names
                    ),
                ]
            )  # fmt: skip
        rows.append(
            [
                each.case.model,
                each.name,
                *(
                    difference(_slice_difference(each, kind, name, metric, measured))
                    for name in names
                ),
            ]
        )
    return Table(
        f"{compared[0].case.dataset}, {METRIC_NAMES[metric]} by {kind}: the baseline itself, and "
        "differences from it.",
        [
            "model",
            "arm",
            *(f"{name} ({count:,.0f} rows)" for name, count in zip(names, counts, strict=True)),
        ],
        rows,
        heads=2,
        folded=metric != "auc",
    ).without("model")  # fmt: skip


def _slice_chart(
    compared: Sequence[Comparison], kinds: Sequence[str], measured: Mapping[str, Measured]
) -> Chart:
    lines = []
    alone = len({each.case.model for each in compared}) == 1
    for model in dict.fromkeys(each.case.model for each in compared):
        of_model = [each for each in compared if each.case.model == model]
        for kind in kinds:
            names = _names(of_model, kind, measured)
            found = {
                each.name: [_slice_difference(each, kind, name, "auc", measured) for name in names]
                for each in of_model
            }
            lines.append(
                (
                    kind if alone else f"{model}: {kind}",
                    [
                        Line(
                            name,
                            names,
                            [each.mean for each in values],
                            [each.high - each.mean for each in values],
                            joined=False,
                        )
                        for name, values in found.items()
                    ],
                )
            )
    return Chart(
        panels(lines, [""], ["ΔAUC"], columns=3, height=330, grouped=True),
        f"{compared[0].case.dataset}: AUC differences from the baseline by slice, with 95% "
        "intervals over paired seeds.",
    )


# --- calibration --------------------------------------------------------------------------------


def calibration(outcomes: Outcomes, measured: Mapping[str, Measured]) -> Section | None:
    """Calibration error and reliability curves of the main cases."""
    cases = outcomes.main_cases()
    if not cases:
        return None
    curves = {
        id(case): [measured[run.key].reliability for run in case.runs.values()] for case in cases
    }
    table = Table(
        f"Expected calibration error (mean gap between predicted and observed share of likes over "
        f"{statistics.BINS} bins of equal numbers of rows; lower is better), and the mean "
        "prediction against the share of likes: mean ± standard deviation over seeds."
        + outcomes.main_settings,
        ["dataset", "model", "arm", "seeds", "ECE", "mean prediction", "share of likes"],
        [
            [
                case.dataset,
                case.model,
                case.arm,
                str(len(case.runs)),
                mean_and_deviation([curve.error for curve in curves[id(case)]]),
                mean_and_deviation([_mean(curve, "score") for curve in curves[id(case)]]),
                mean_and_deviation([_mean(curve, "share") for curve in curves[id(case)]]),
            ]
            for case in cases
        ],
        heads=3,
    ).without("dataset", "model")
    section = Section("Calibration", [table])
    for dataset, model in dict.fromkeys((case.dataset, case.model) for case in cases):
        of_model = [case for case in cases if (case.dataset, case.model) == (dataset, model)]
        pools = {case.arm: pooled(curves[id(case)]) for case in of_model}
        ends = [
            float(bound(np.concatenate([_known(each.score) for each in pools.values()])))
            for bound in (np.min, np.max)
        ]
        section.blocks.append(
            Chart(
                panels(
                    [
                        (
                            "reliability curve",
                            [
                                *(Line(arm, each.score, each.share) for arm, each in pools.items()),
                                Line("perfect", ends, ends, reference=True),
                            ],
                        ),
                        (
                            "observed − predicted",
                            [
                                *(
                                    Line(arm, each.score, each.share - each.score)
                                    for arm, each in pools.items()
                                ),
                                Line("perfect", ends, [0, 0], reference=True),
                            ],
                        ),
                    ],
                    ["predicted share of likes"],
                    ["observed share of likes", "observed − predicted"],
                    columns=2,
                    height=360,
                ),
                f"{dataset}, {model}: reliability on the test split, seeds pooled. Below the "
                "line the model promises more likes than there are.",
            )
        )
    return section


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _mean(curve: statistics.Reliability, name: str) -> float:
    if not curve.rows.any():
        return math.nan
    return float(np.nansum(getattr(curve, name) * curve.rows) / curve.rows.sum())

"""Sections of a report on settings: what was tuned, sensitivity, and staleness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from recbole_uip.evidence import statistics
from recbole_uip.evidence.experiments.measured import Measured
from recbole_uip.evidence.experiments.outcomes import (
    METRICS,
    REFRESH,
    CaseOutcome,
    Outcomes,
    Series,
    sensitivity,
)
from recbole_uip.evidence.report.charts import Line, panels
from recbole_uip.evidence.report.format import (
    METRIC_NAMES,
    NOTHING,
    amount,
    difference,
    mean_and_deviation,
    number,
)
from recbole_uip.evidence.report.parts import Block, Chart, Section, Table, Text

__all__ = ["sensitivities", "staleness", "tuning"]


def bytes_per_user(case: CaseOutcome) -> float:
    """Bytes of state that a bank keeps of a user; NaN where the runs do not say."""
    found = [(run.record.get("cost") or {}).get("bytes_per_user") for run in case.runs.values()]
    return float(next((value for value in found if value is not None), math.nan))


# --- tuning -------------------------------------------------------------------------------------


def tuning(outcomes: Outcomes) -> Section | None:
    """The grid, how each point did on validation data, and what was chosen."""
    if not outcomes.tuned:
        return None
    keys = list(
        dict.fromkeys(key for each in outcomes.tuned for point, _ in each.points for key in point)
    )
    chosen, grid = [], []
    for each in outcomes.tuned:
        place = [each.case.dataset, each.case.model, each.case.arm, each.case.variant_name]
        aucs = [run.metric("auc", "valid") for _, run in each.points if run is not None]
        chosen.append(
            [
                *place,
                *(str(each.chosen.get(key, NOTHING)) for key in keys),
                number(max(aucs, default=math.nan)),
                number(max(aucs, default=math.nan) - min(aucs, default=math.nan)),
            ]
        )
        for point, run in each.points:
            grid.append(
                [
                    *place,
                    *(str(point.get(key, NOTHING)) for key in keys),
                    *(
                        ["not there", ""]
                        if run is None
                        else [number(run.metric(name, "valid")) for name in ("auc", "logloss")]
                    ),
                    "chosen" if point == each.chosen else "",
                ]
            )
    places = ["dataset", "model", "arm", "settings"]
    return Section(
        "Tuning",
        [
            Text(
                "Every model and arm was tuned on the same grid of "
                f"{len(outcomes.tuned[0].points)} points with one seed, by AUC on the validation "
                "split; the test split was not looked at."
            ),
            Table(
                "What was chosen, the validation AUC there, and how far the worst point lies "
                "below it.",
                [*places, *keys, "best validation AUC", "best − worst"],
                chosen,
                heads=4,
            ).without("dataset", "model", "settings"),
            Table(
                "Every point of the grid, on the validation split.",
                [*places, *keys, "validation AUC", "validation LogLoss", "choice"],
                grid,
                heads=4,
                folded=True,
            ).without("dataset", "model", "settings"),
        ],
    )  # fmt: skip


# --- sensitivity --------------------------------------------------------------------------------


def sensitivities(outcomes: Outcomes, measured: Mapping[str, Measured]) -> Section | None:
    """AUC and LogLoss against each setting that was varied, and against bytes per user."""
    found = {key: each for key, each in sensitivity(outcomes).items() if key != REFRESH}
    if not found:
        return None
    section = Section("Sensitivity")
    for key, series in found.items():
        section.sections.append(Section(key, _series_blocks(key, series, measured)))
    sizes = _against_bytes(outcomes)
    if sizes:
        section.sections.append(Section("AUC against bytes per user", sizes))
    return section


def staleness(outcomes: Outcomes, measured: Mapping[str, Measured]) -> Section | None:
    """Metrics against the lag of the profiles."""
    series = sensitivity(outcomes).get(REFRESH)
    if not series:
        return None
    return Section(
        "Staleness",
        [
            Text(
                "Profiles lag behind by the refresh interval, in training and in the test alike. "
                "Arms without profiles do not depend on it."
            ),
            *_series_blocks(REFRESH, series, measured),
        ],
    )


def _series_blocks(
    key: str, series: Sequence[Series], measured: Mapping[str, Measured]
) -> list[Block]:
    rows = []
    for each in series:
        first = each.cases[0]
        for value, case in zip(each.values, each.cases, strict=True):
            rows.append(
                [
                    each.dataset,
                    each.model,
                    each.arm,
                    each.rest,
                    _value(value),
                    str(len(case.runs)),
                    *(mean_and_deviation(case.values(metric)) for metric in METRICS),
                    "" if case is first else _change(case, first, measured),
                    amount(bytes_per_user(case)),
                ]
            )
    table = Table(
        f"By {key}: mean ± standard deviation over seeds. The difference is paired by seed, from "
        "the first value of its series, with a 95% interval that is not adjusted for their "
        "number; where both are judged on the same rows.",
        [
            "dataset", "model", "arm", "other settings", key, "seeds",
            *(METRIC_NAMES[metric] for metric in METRICS), "ΔAUC from the first value",
            "bytes per user",
        ],
        rows,
        heads=5,
    ).without("dataset", "model", "other settings", "bytes per user")  # fmt: skip
    blocks: list[Block] = []
    for dataset in dict.fromkeys(each.dataset for each in series):
        of_dataset = [each for each in series if each.dataset == dataset]
        models = {each.model for each in of_dataset}
        lines = []
        for metric in ("auc", "logloss"):
            panel = []
            for each in of_dataset:
                parts = [each.model] if len(models) > 1 else []
                panel.append(
                    Line(
                        " ".join([*parts, each.arm]) + (f" [{each.rest}]" if each.rest else ""),
                        [_value(value) for value in each.values],
                        [float(case.values(metric).mean()) for case in each.cases],
                        [_half_width(case, metric) for case in each.cases],
                    )
                )
            lines.append((METRIC_NAMES[metric], panel))
        blocks.append(
            Chart(
                panels(lines, [key], [""], columns=2, height=340),
                f"{dataset}: AUC and LogLoss against {key}; means over seeds with 95% "
                "t-intervals of the mean.",
            )
        )
    return [*blocks, table]


def _change(case: CaseOutcome, first: CaseOutcome, measured: Mapping[str, Measured]) -> str:
    seeds = [
        seed
        for seed in sorted(case.runs.keys() & first.runs.keys())
        if measured[case.runs[seed].key].rows == measured[first.runs[seed].key].rows
    ]
    sides = [each.values("auc", seeds) for each in (case, first)]
    return difference(statistics.paired_difference(*sides, overlap=case.overlap))


def _half_width(case: CaseOutcome, metric: str) -> float:
    return statistics.half_width(case.values(metric), case.overlap)


def _value(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "none" if value is None else str(value)


def _against_bytes(outcomes: Outcomes) -> list[Block]:
    blocks: list[Block] = []
    for dataset, model in dict.fromkeys((case.dataset, case.model) for case in outcomes.cases):
        cases = [
            case
            for case in outcomes.cases
            if (case.dataset, case.model) == (dataset, model)
            and not math.isnan(bytes_per_user(case))
        ]
        names = {id(case): ", ".join(case.variant) or "as set" for case in cases}
        # Settings that leave the size as it is are no part of this question.
        sizes: dict[str, set[float]] = {}
        for case in cases:
            sizes.setdefault(names[id(case)], set()).add(bytes_per_user(case))
        cases = [case for case in cases if not case.variant or len(sizes[names[id(case)]]) > 1]
        if len({bytes_per_user(case) for case in cases}) < 2:
            continue
        cases.sort(key=bytes_per_user)
        lines = [
            (
                METRIC_NAMES[metric],
                [
                    Line(
                        f"{arm}: {name}",
                        [bytes_per_user(case) for case in points],
                        [float(case.values(metric).mean()) for case in points],
                        [_half_width(case, metric) for case in points],
                    )
                    for arm, name in dict.fromkeys((case.arm, names[id(case)]) for case in cases)
                    if (
                        points := [
                            case for case in cases if (case.arm, names[id(case)]) == (arm, name)
                        ]
                    )
                ],
            )
            for metric in ("auc", "logloss")
        ]
        blocks += [
            Chart(
                panels(lines, ["bytes per user"], [""], columns=2, height=340, log_x=True),
                f"{dataset}, {model}: AUC and LogLoss against the bytes of state that a bank keeps "
                "of a user, one line a setting; means over seeds with 95% t-intervals.",
            ),
            Table(
                f"{dataset}, {model}: by bytes per user.",
                ["bytes per user", "arm", "settings", "AUC", "LogLoss"],
                [
                    [
                        amount(bytes_per_user(case)),
                        case.arm,
                        case.variant_name,
                        *(mean_and_deviation(case.values(name)) for name in ("auc", "logloss")),
                    ]
                    for case in cases
                ],
            ),
        ]
    return blocks

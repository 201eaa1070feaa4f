"""Sections of a report on how its numbers came about: protocol, gaps, costs, environment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_uip.evidence.experiments.measured import Measured
from recbole_uip.evidence.experiments.outcomes import CaseOutcome, Outcomes, RunOutcome
from recbole_uip.evidence.report.format import (
    amount,
    joined,
    mean_and_deviation,
    share,
)
from recbole_uip.evidence.report.parts import Block, Code, Items, Section, Table, Text

__all__ = ["costs", "environment", "missing", "protocol"]

_TIMES = {
    "point_in_time": "point in time, of the user's strictly earlier events row by row",
    "cross_fitted": "cross-fitted: a training row's of others of its user's, whatever their time",
    "static": "static, one for each user from the training rows",
}
_HISTORIES = {"observed": "all strictly earlier events", "train": "training rows alone"}


# --- protocol -----------------------------------------------------------------------------------


def protocol(outcomes: Outcomes) -> Section:
    """Rows, split, labels and history in words, and what each arm reads."""
    datasets, models = (
        list(dict.fromkeys(getattr(case, part) for case in outcomes.cases))
        for part in ("dataset", "model")
    )
    statements = [
        f"Data: {joined(datasets, most=9)}. Models: {joined(models, most=9)}. The baseline is the "
        f"arm {outcomes.baseline}."
    ]
    finished = [case for case in outcomes.cases if case.runs]
    if not finished:
        return Section("Protocol", [Items(statements), Text("No run is finished yet.")])
    by_statement: dict[str, list[CaseOutcome]] = {}
    for case in finished:
        for run in case.runs.values():
            found = run.record.get("protocol") or {}
            for statement in (_rows(case.dataset, found), _labels(case.dataset, found)):
                if statement not in statements:
                    statements.append(statement)
            if run.record.get("profile_fields"):
                by_statement.setdefault(_history(found), []).append(case)
    for statement, cases in by_statement.items():
        whose = ""
        if len(by_statement) > 1:
            arms = joined([case.arm for case in cases], most=9)
            variants = joined([case.variant_name for case in cases], most=3)
            whose = f" ({arms}{'; ' if variants else ''}{variants})"
        statements.append(f"Profiles{whose}: {statement}.")
    seeds = sorted({seed for case in outcomes.cases for seed in (*case.runs, *case.missing)})
    statements.append(f"Seeds: {', '.join(map(str, seeds))}.")
    return Section("Protocol", [Items(statements), _arms(finished)])


def _rows(dataset: str, found: Mapping[str, Any]) -> str:
    rows = found.get("rows") or {}
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    return f"{dataset}: {counts or 'unknown'} rows; {_split(found)}."


def _history(found: Mapping[str, Any]) -> str:
    time, history = str(found.get("time")), str(found.get("history"))
    return (
        f"{_TIMES.get(time, time)}; history at evaluation: {_HISTORIES.get(history, history)}; "
        f"refreshed {_lag(found.get('refresh_seconds') or 0)}"
    )


def _split(found: Mapping[str, Any]) -> str:
    split = found.get("split")
    if not isinstance(split, Mapping):
        return f"split by files {joined([str(part) for part in split or ()])}"
    method, value = next(iter(split.items()))
    if method == "RS" and isinstance(value, Sequence):
        how = "split " + ":".join(f"{float(part):g}" for part in value)
    else:
        how = f"split {method} {value}"
    order = {"TO": "in order of time", "RO": "at random"}.get(
        str(found.get("order")), f"in order {found.get('order')}"
    )
    group = found.get("group_by")
    return f"{how} {order}, " + (f"within each {group}" if group else "over all users together")


def _labels(dataset: str, found: Mapping[str, Any]) -> str:
    share_of = found.get("liked_share")
    threshold = found.get("threshold")
    if share_of is None:
        return f"{dataset}: every row is liked, negatives are sampled."
    if threshold:
        name, value = next(iter(threshold.items()))
        how = f"liked is {name} ≥ {value:g}"
    else:
        how = "liked as the data say"
    return f"{dataset}: {how} ({share(share_of, 1, sign=False)} of rows)."


def _lag(seconds: float) -> str:
    for unit, size in (("week", 604800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds and seconds % size == 0:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} late"
    return "at once" if seconds == 0 else f"{seconds:g} s late"


def _arms(cases: Sequence[CaseOutcome]) -> Table:
    rows: dict[tuple, list[str]] = {}
    for case in cases:
        run = next(iter(case.runs.values()))
        record, section = run.record, run.section
        facets, fields = section.get("facets", "all"), record.get("profile_fields") or []
        row = [
            case.arm,
            facets if isinstance(facets, str) else ", ".join(facets or ()) or "none",
            str(record.get("user_id") or ""),
            str(section.get("control") or "none"),
            str(section.get("values") or "codes"),
            str(len(fields)),
        ]
        rows.setdefault(tuple(row), row)
    return Table(
        "What each arm reads beside the data's own fields, which all of them read. What else is "
        "set for an arm alone stands in the experiment's YAML file.",
        ["arm", "facets", "user ID", "control", "values", "profile fields"],
        list(rows.values()),
    ).without("control", "values")


# --- what is missing ----------------------------------------------------------------------------


def missing(outcomes: Outcomes) -> Section:
    """Runs of the plan that are not finished, by name."""
    finished, planned = outcomes.counted()
    blocks: list[Block] = []
    if finished < planned:
        blocks.append(
            Text(
                f"{planned - finished} of {planned} runs are not finished. All numbers below rest "
                "on the runs that are, and will change."
            )
        )
        blocks.append(
            Table(
                "Unfinished runs.",
                ["dataset", "model", "arm", "settings", "seeds not finished"],
                [
                    [
                        case.dataset,
                        case.model,
                        case.arm,
                        case.variant_name,
                        ", ".join(str(seed) for seed in case.missing),
                    ]
                    for case in outcomes.cases
                    if case.missing
                ],
                heads=4,
            ).without("dataset", "model", "settings")
        )
    else:
        blocks.append(Text(f"Nothing: all runs of the plan are finished ({planned})."))
    lost = sum(run is None for each in outcomes.tuned for _, run in each.points)
    if lost:
        blocks.append(Text(f"{lost} runs of the tuning grid are not there; the grid names them."))
    return Section("What is missing", blocks)


# --- costs --------------------------------------------------------------------------------------


def costs(outcomes: Outcomes, measured: Mapping[str, Measured]) -> Section | None:
    """Size, training and scoring time, and what the profile stage took."""
    cases = outcomes.main_cases()
    if not cases:
        return None
    table = Table(
        "Means over seeds. Seconds are wall-clock seconds of the machine as it was, which may have "
        "run other work at the same time: they compare only roughly. Bytes per user are those of "
        "the state that a bank keeps (of an event history, for models that read it). What "
        "the profile stage took is for all facets of the settings, whichever of them the arm has. "
        "LM tokens are those scored in the run; texts scored before come from the cache."
        + outcomes.main_settings,
        [
            "dataset", "model", "arm", "parameters", "epochs", "training s",
            "scoring, ms per 1000 rows", "profile stage s", "of it EM s", "LM tokens", "LM s",
            "bytes per user",
        ],
        [_cost_row(case, measured) for case in cases],
        heads=3,
    )  # fmt: skip
    return Section("Costs", [table.without("dataset", "model")])


def _cost_row(case: CaseOutcome, measured: Mapping[str, Measured]) -> list[str]:
    runs = list(case.runs.values())
    scoring = [
        1e6 * run.record["score_seconds"] / measured[run.key].n_rows
        for run in runs
        if run.record.get("score_seconds") is not None
    ]
    return [
        case.dataset,
        case.model,
        case.arm,
        amount(_mean(runs, "parameters")),
        mean_and_deviation(_numbers(runs, "epochs"), 1),
        mean_and_deviation(_numbers(runs, "seconds"), 1),
        mean_and_deviation(scoring, 2),
        mean_and_deviation(_numbers(runs, "profile_seconds"), 1),
        mean_and_deviation(_numbers(runs, "em_seconds"), 1),
        amount(_mean(runs, "lm_tokens")),
        mean_and_deviation(_numbers(runs, "lm_seconds"), 1),
        amount(_mean(runs, "bytes_per_user")),
    ]


def _numbers(runs: Sequence[RunOutcome], name: str) -> list[float]:
    """Of the record, or of its costs."""
    found = [run.record.get(name, (run.record.get("cost") or {}).get(name)) for run in runs]
    return [float(value) for value in found if value is not None]


def _mean(runs: Sequence[RunOutcome], name: str) -> float:
    values = _numbers(runs, name)
    return sum(values) / len(values) if values else math.nan


# --- environment --------------------------------------------------------------------------------


def environment(outcomes: Outcomes) -> Section:
    """Versions of what the runs were made with, when, and by which commands."""
    versions: dict[str, dict[str, None]] = {}
    finished: list[str] = []
    lms: dict[str, set[str]] = {}
    for run in outcomes.runs():
        finished += [run.record["finished"]] if run.record.get("finished") else []
        for name, version in (run.record.get("versions") or {}).items():
            versions.setdefault(name, {})[str(version or "not installed")] = None
        if fingerprint := run.record.get("lm_fingerprint"):
            config = run.record.get("config") or {}
            parts = (config.get("uip_lm") or "the default LM", config.get("uip_lm_adapter"))
            lm = " with ".join(str(part) for part in parts if part)
            lms.setdefault(lm, set()).add(str(fingerprint))
    blocks: list[Block] = []
    for lm, fingerprints in lms.items():
        if len(fingerprints) > 1:
            blocks.append(
                Text(
                    f"Not all runs had the same weights of {lm}: fingerprints "
                    f"{joined(sorted(fingerprints), most=9)}. Compare with care, or run again with "
                    "one of them."
                )
            )
    if versions:
        blocks.append(
            Table(
                "Versions that the runs were made with"
                + (f", from {min(finished)} to {max(finished)}." if finished else "."),
                ["package", "version"],
                [
                    *([name, ", ".join(found)] for name, found in versions.items()),
                    *([f"weights of {lm}", ", ".join(sorted(found))] for lm, found in lms.items()),
                ],
                heads=2,
            )
        )
    commands = [str(command) for command in outcomes.plan.get("commands") or []]
    if commands:
        blocks += [Text("The runs were made by:"), Code(commands)]
    return Section("Environment and commands", blocks)

"""Results of a run in words and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["aligned", "format_report"]

_METRICS = (("auc", "AUC"), ("logloss", "LogLoss"), ("gauc", "GAUC"), ("list_auc", "list AUC"))


def format_report(results: dict[str, Any]) -> str:
    """The report of one dataset: protocol, table, what the arms differ in, cost, artefacts."""
    lines = [_protocol(results), "", *_table(results), *_other_metrics(results), ""]
    lines += [*_arms(results), "", _cost(results)]
    lines += [f"{name}: {path}" for name, path in results["artefacts"].items()]
    return "\n".join(lines)


def _protocol(results: dict[str, Any]) -> str:
    protocol = results["protocol"]
    rows = ", ".join(f"{count:,} {name}" for name, count in protocol["rows"].items())
    split = protocol["split"]
    if isinstance(split, dict):
        mode, value = next(iter(split.items()))
        split = f"{mode} {value}"
        grouping = protocol["group_by"] or "none"
        split += f", order {protocol['order']}, group_by {grouping}"
    threshold = protocol["threshold"]
    if threshold:
        field, value = next(iter(threshold.items()))
        liked = f"liked = {field} >= {value:g}"
    else:
        liked = "liked = the data's labels"
    share = protocol["liked_share"]
    if share is None:
        liked = "no ratings: every row is liked, negatives are sampled"
    else:
        liked += f" ({share:.1%} of rows)"
    return (
        f"{results['dataset']}, seed {results['seed']}: {rows}\n"
        f"split {split}; {liked}; candidates {protocol['mode']['test']}\n"
        f"profiles: {protocol['time'].replace('_', ' ')}, history {protocol['history']}, "
        f"refresh {protocol['refresh_seconds']:g} s"
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _difference(value: float | None, base: float | None) -> str:
    if any(number is None or math.isnan(number) for number in (value, base)) or not base:
        return "-"
    return f"{value - base:+.4f} ({value / base - 1:+.2%})"


def _table(results: dict[str, Any]) -> list[str]:
    rows = [["model", "arm"]]
    baseline = None
    for model, arms in results["models"].items():
        baseline = "plain" if "plain" in arms else next(iter(arms))
        base = arms[baseline]["test"]
        for name, arm in arms.items():
            row = [model, name]
            for metric, _ in _METRICS:
                row.append(_number(arm["test"][metric]))
                same = name == baseline
                row.append("" if same else _difference(arm["test"][metric], base[metric]))
            rows.append(row)
    for _, title in _METRICS:
        rows[0] += [title, f"vs {baseline}"]
    list_rows = arms[baseline]["test"]["list_rows"]
    note = "list AUC: of rows of one user at one time, of which some are liked and some are not"
    return ["test", *aligned(rows), f"{note}: {list_rows:,} rows"]


def _other_metrics(results: dict[str, Any]) -> list[str]:
    """What else RecBole's ``metrics`` ask for, if anything."""
    arms = [
        (model, name, arm["test"])
        for model, arms in results["models"].items()
        for name, arm in arms.items()
    ]
    shown = {metric for metric, _ in _METRICS} | {"list_rows"}
    others = [metric for metric in arms[0][2] if metric not in shown]
    if not others:
        return []
    rows = [
        [model, name, *(_number(test[metric]) for metric in others)] for model, name, test in arms
    ]
    return ["", "other metrics", *aligned([["model", "arm", *others], *rows])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in text: the first row, a rule, the other rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _arms(results: dict[str, Any]) -> list[str]:
    lines = ["the arms share rows, split, seed, budget and regularisation; each model reads"]
    arms = next(iter(results["models"].values()))
    shared = set.intersection(*(set(arm["fields"]) for arm in arms.values()))
    first = next(iter(arms.values()))
    lines.append(f"  all arms: {', '.join(name for name in first['fields'] if name in shared)}")
    for name, arm in arms.items():
        own = [field for field in arm["fields"] if field not in shared]
        lines.append(f"  {name}: {', '.join(own) or 'nothing else'} (user ID: {arm['user_id']})")
    return lines


def _cost(results: dict[str, Any]) -> str:
    cost = results["cost"]
    parts = []
    if cost.get("lm_tokens") is not None:
        parts.append(f"{cost['lm_tokens']:,.0f} LM tokens in {cost.get('lm_seconds', 0):.1f} s")
    parts.append(f"profile stage {cost['profile_seconds']:.1f} s")
    for model, arms in cost["train_seconds"].items():
        times = ", ".join(f"{arm} {seconds:.1f} s" for arm, seconds in arms.items())
        parts.append(f"training {model}: {times}")
    parts.append(f"profile fields {cost['field_bytes'] / 1e6:.2f} MB")
    parts.append(f"peak memory {cost['peak_memory_bytes'] / 1e9:.2f} GB")
    return "cost: " + "; ".join(parts)

"""A replay in words and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_uip.bridge.report import aligned

__all__ = ["format_replay"]

_TITLES = {
    "auc": "AUC",
    "logloss": "LogLoss",
    "score": "mean score",
    "share": "share of likes",
    "gap": "score - share",
    "ece": "ECE",
}
_CALIBRATION = ("score", "share", "score - share", "ECE")
_CALLS = {
    "look_up": "look-up of a user's codes",
    "match": "match with the row's item",
    "update": "update by one event, codes included",
}
_BUSY = (
    "THE MACHINE WAS BUSY: more processes wanted a core than there are, so times, p99 above all, "
    "hold waiting for others. Replay again on an idle machine before you quote them."
)


def format_replay(results: Mapping[str, Any]) -> str:
    """The protocol, the checks, A/A, A/B and their difference, by day, and the costs."""
    overall, arms = results["overall"], results["arms"]
    a, b = arms["a"], arms["b"]
    limited = f" (the first, of {results['test_rows']:,})" if results["limit"] else ""
    lines = [
        f"{results['dataset']}, {results['model']}: {results['checks']['rows']:,} test rows"
        f"{limited} from {overall['first_day']} to {overall['last_day']}, in the order of time; "
        f"refresh {results['refresh_seconds']:g} s",
        f"arm A: {overall['users'][0]:,} users, {overall['rows'][0]:,} rows, scored by {a}; "
        f"arm B: {overall['users'][1]:,} users, {overall['rows'][1]:,} rows, scored by {b} "
        f"(first bit of SHA-256 of {results['salt'] + ':<user>'!r})",
        "",
        *_check_lines(results["checks"], a, b),
        "",
        f"A/A: both arms scored by {a}. "
        + " ".join(_verdict(overall["a_a"], name) for name in ("auc", "logloss")),
        "other draws of the arms ({draws:,}): 95% of A/A differences in AUC are in [{low:+.4f}, "
        "{high:+.4f}], {as_far:.0%} are as far from zero as this one".format(**results["redrawn"]),
        "",
        *_overall_table(overall, a, b),
        "95% intervals: users drawn with replacement within each arm, "
        f"{results['n_boot']:,} times; moved back in ece, which resampling enlarges. A/B less A/A "
        f"is arm B's users under {b} and under {a}: paired.",
        "",
        *_period_tables(results["periods"], a, b),
        "",
        *_cost_lines(results, a, b),
    ]
    return "\n".join(lines)


def _check_lines(checks: Mapping[str, Any], a: str, b: str) -> list[str]:
    lines = [
        f"check: rows whose live tokens differ from profiles.parquet: {checks['rows_differing']} "
        f"of {checks['rows']:,}",
    ]
    if checks["users_differing_at_the_end"] is not None:
        lines.append(
            "check: users whom the live bank knows otherwise after the last event than the run's "
            f"bank: {checks['users_differing_at_the_end']}"
        )
    for arm, of_run in checks["run"].items():
        lines.append(
            f"check: {arm}, all test rows: AUC {of_run['auc']:.6f} (run "
            f"{of_run['auc_of_the_run']:.6f}), LogLoss {of_run['logloss']:.6f} (run "
            f"{of_run['logloss_of_the_run']:.6f})"
        )
    lines.append(
        f"check: {checks['requests']:,} requests scored on the spot: largest difference from the "
        f"rows' scores {checks['largest_score_difference']:.1e}"
    )
    return lines


def _excludes_zero(difference: Mapping[str, Any]) -> bool:
    low, high = difference["low"], difference["high"]
    return low is not None and (low > 0 or high < 0)


def _verdict(differences: Mapping[str, Any], name: str) -> str:
    title, shown = _TITLES[name], _interval(differences[name])
    if differences[name]["low"] is None:
        return f"{title}: no interval."
    if _excludes_zero(differences[name]):
        return (
            f"{title} DIFFERS, {shown}: who is in which arm matters here by itself (one salt in "
            "twenty does this by chance), so read A/B less A/A, not A/B."
        )
    return f"{title}: no difference, {shown}."


def _interval(value: Mapping[str, Any], signed: bool = True) -> str:
    sign = "+" if signed else ""
    if value["mean"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:{sign}.4f}"
    return f"{value['mean']:{sign}.4f} [{value['low']:{sign}.4f}, {value['high']:{sign}.4f}]"


def _overall_table(overall: Mapping[str, Any], a: str, b: str) -> list[str]:
    rows = [["", f"A: {a}", f"B: {a}", f"B: {b}", "A/A", "A/B", "A/B less A/A (paired)"]]
    for name, title in _TITLES.items():
        levels = [f"{overall[arm][name]['mean']:.4f}" for arm in ("a", "b_before", "b")]
        changes = [_interval(overall[change][name]) for change in ("a_a", "a_b", "did")]
        rows.append([title, *levels, *changes])
    return aligned(rows)


def _period_tables(found: Sequence[Mapping[str, Any]], a: str, b: str) -> list[str]:
    if len(found) < 2:
        return ["by day: too few rows or users for two periods"]
    merged = sum(each["first_day"] != each["last_day"] for each in found)
    lines = [
        f"by day (UTC): {len(found)} periods, {merged} of which are several days with too few rows "
        "or users merged; of few users, intervals are rather too narrow",
    ]
    labels = [
        each["first_day"]
        + ("" if each["first_day"] == each["last_day"] else f"..{each['last_day']}")
        for each in found
    ]
    for name in ("auc", "logloss"):
        rows = [
            [_TITLES[name], "rows A, B", "users A, B", f"A: {a}", f"B: {b}", "A/A", "A/B",
             "A/B less A/A"],
        ]  # fmt: skip
        for label, each in zip(labels, found, strict=True):
            rows.append(
                [
                    label,
                    "{:,}, {:,}".format(*each["rows"]),
                    "{:,}, {:,}".format(*each["users"]),
                    *(f"{each[arm][name]['mean']:.4f}" for arm in ("a", "b")),
                    *(_interval(each[change][name]) for change in ("a_a", "a_b", "did")),
                ]
            )
        lines += ["", *aligned(rows), *_counted(found, name)]
    rows = [["calibration", *(f"{arm}: {what}" for arm in "AB" for what in _CALIBRATION)]]
    for label, each in zip(labels, found, strict=True):
        cells = [label]
        for arm in ("a", "b"):
            here = each[arm]
            cells += [f"{here[name]['mean']:.3f}" for name in ("score", "share")]
            cells += [_interval(here["gap"]), _interval(here["ece"], signed=False)]
        rows.append(cells)
    return [*lines, "", *aligned(rows)]


def _counted(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    counts = {
        title: sum(_excludes_zero(each[key][name]) for each in found)
        for title, key in (("A/A", "a_a"), ("A/B", "a_b"), ("A/B less A/A", "did"))
    }
    said = ", ".join(f"{title} {count}" for title, count in counts.items())
    return [
        f"periods whose interval excludes zero: {said}; by chance alone, "
        f"{0.05 * len(found):.1f} of {len(found)} would"
    ]


def _cost_lines(results: Mapping[str, Any], a: str, b: str) -> list[str]:
    cost, here = results["cost"], results["machine"]
    calls = _CALLS | {
        f"{kind}_{side}": f"{what}, {arm}"
        for kind, what in (
            ("score", "request: score one row"),
            ("rank", f"request: score up to {results['candidates']} items of the catalogue"),
        )
        for side, arm in (("a", a), ("b", b))
    }
    rows = [["microseconds", "p50", "p99", "calls"]]
    for name, title in calls.items():
        each = results["latency"][name]
        if each["calls"]:
            times = [f"{1e6 * each[key]:,.1f}" for key in ("p50", "p99")]
            rows.append([title, *times, f"{each['calls']:,}"])
    by_arm = cost["rows_per_second_in_blocks"]
    load = " ".join(f"{value:.2f}" for value in here["load_average"])
    lines = [
        *aligned(rows),
        f"updates a second: {cost['updates_per_second']:,.0f}"
        if cost["updates_per_second"]
        else "updates a second: there was none",
        f"rows scored a second in blocks, features included: {a} {by_arm['a']:,.0f}, "
        f"{b} {by_arm['b']:,.0f}",
        f"bank: {cost['bank_bytes'] / 1e6:.2f} MB on disk for {cost['users']:,} users "
        f"({cost['bytes_per_user']} bytes a user, and the model); peak memory of the process "
        f"{cost['peak_memory_bytes'] / 1e9:.2f} GB",
        f"replay {cost['replay_seconds']:.1f} s, all {cost['total_seconds']:.1f} s",
        f"{here['cpu']}, {here['cores']} cores, torch threads {here['threads']}, load average at "
        f"start {load}",
        "One process calls its own bank and models, one call at a time: no network, no queue, no "
        "second client. A request's time holds its look-ups. A pair of clock readings takes "
        f"{1e9 * cost['clock_seconds']:.0f} ns, which the look-up's time holds too. Peak memory "
        "holds Python, torch, the run's rows and the resampling.",
        *([_BUSY] if here["load_average"][0] > here["cores"] else []),
        "",
        f"run: {results['run']}",
        f"command: {results['command']}",
    ]
    return lines

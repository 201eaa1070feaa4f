"""Several runs of the same comparison: means over seeds and paired differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_uip.evidence.experiments.plan import INERT
from recbole_uip.evidence.statistics import (
    Difference,
    paired_difference,
    relative,
    split_overlap,
)
from recbole_uip.settings import SettingsError

__all__ = ["Cell", "format_summary", "read_results", "read_results_file", "summarise"]

METRICS = ("auc", "logloss", "gauc", "list_auc")
BASELINE = "plain"
# Settings in which runs that are summarised together may differ, beside those that change nothing.
# The values of means are numerical features.
_APART = ("seed", "uip_arms", "numerical_features")


@dataclass(frozen=True)
class Cell:
    """Metrics of one model and arm over seeds.

    Attributes
    ----------
    model, arm : str
    seeds : tuple of int
    mean, deviation : dict of str to float
        By metric; the sample standard deviation is NaN for a single seed.
    difference : dict of str to Difference
        From the plain arm on the same seeds (paired t); empty without a plain arm.
    base : float
        AUC of the plain arm on these seeds, NaN without one.
    """

    model: str
    arm: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    deviation: dict[str, float]
    difference: dict[str, Difference]
    base: float


def read_results(folders: Sequence[Path]) -> list[dict]:
    """``results.json`` of each folder, or of its sub-folders.

    Raises
    ------
    SettingsError
        If there is none, or they are of different datasets.
    """
    files = []
    for folder in folders:
        found = [folder / "results.json"] if (folder / "results.json").is_file() else []
        files += found or sorted(folder.glob("**/results.json"))
    if not files:
        names = ", ".join(map(str, folders))
        raise SettingsError(f"no results.json in {names}: name output folders of recbole-uip run")
    results = [read_results_file(file) for file in files]
    datasets = sorted({each["dataset"] for each in results})
    if len(datasets) > 1:
        raise SettingsError(
            f"results of different datasets cannot be summarised together: {', '.join(datasets)}"
        )
    return results


def read_results_file(path: Path) -> dict[str, Any]:
    """A ``results.json`` of a run.

    Raises
    ------
    SettingsError
        If it is not there, or is none.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no {path}: name the output folder of recbole-uip run") from None
    except ValueError as error:
        raise SettingsError(f"{path} is no results.json of recbole-uip run ({error})") from error
    if not isinstance(results, dict) or not {"dataset", "seed", "models"} <= set(results):
        raise SettingsError(f"{path} is no results.json of recbole-uip run")
    return results


def summarise(results: Sequence[dict], split: str = "test", by: str | None = None) -> list[Cell]:
    """Means, deviations and paired differences by model and arm, in the order of appearance.

    Parameters
    ----------
    results : sequence of dict
        From :func:`read_results`.
    split : {"test", "valid"}
        Whose metrics.
    by : str, optional
        A setting that differs between runs, such as ``weight_decay``: each of its values is
        summarised apart, and compared with the plain arm of the same value.

    Raises
    ------
    SettingsError
        If a model and arm stand in two results with the same seed, no run has the setting, or
        runs that would be averaged or compared differ in a setting.
    """
    table: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    # Without a protocol, as of another library on a run's rows, there is one split.
    overlap = split_overlap(results[0]["protocol"]) if "protocol" in results[0] else 0.0
    for each in results:
        for model, arms in each["models"].items():
            for arm, outcome in arms.items():
                name = model if by is None else f"{model}, {by}={_setting(outcome, by)}"
                by_seed = table.setdefault((name, arm), {})
                if each["seed"] in by_seed:
                    raise SettingsError(
                        f"{name}, arm {arm}, seed {each['seed']} was run twice: leave one out, or "
                        "name the setting that differs by --by"
                    )
                by_seed[each["seed"]] = outcome[split]
    _check_settings(results, by)
    cells = []
    for (model, arm), by_seed in table.items():
        seeds = tuple(sorted(by_seed))
        plain = table.get((model, BASELINE), {})
        paired = [seed for seed in seeds if seed in plain and arm != BASELINE]
        mean, deviation, difference = {}, {}, {}
        for metric in METRICS:
            values = _known(by_seed, seeds, metric)
            values = values[~np.isnan(values)]
            mean[metric] = float(values.mean()) if len(values) else np.nan
            deviation[metric] = float(values.std(ddof=1)) if len(values) > 1 else np.nan
            if paired:
                after, before = (_known(side, paired, metric) for side in (by_seed, plain))
                difference[metric] = paired_difference(after, before, overlap)
        base = _known(plain, paired, "auc")
        base = base[~np.isnan(base + _known(by_seed, paired, "auc"))]
        base = float(base.mean()) if len(base) else np.nan
        cells.append(Cell(model, arm, seeds, mean, deviation, difference, base))
    return cells


def _check_settings(results: Sequence[dict], by: str | None) -> None:
    """Refuse runs of an arm that differ in more than the seed, and arms in RecBole's settings."""
    left_out = {*_APART, *INERT, by}
    first: dict[tuple[str, ...], dict] = {}
    for each in results:
        for model, arms in each["models"].items():
            for arm, outcome in arms.items():
                config = outcome.get("config") or {}
                settings = {key: value for key, value in config.items() if key not in left_out}
                shared = {key: settings[key] for key in settings if not key.startswith("uip_")}
                group = (model, str(config.get(by)))
                _check_alike(model, first.setdefault(group, shared), shared)
                _check_alike(
                    f"{model}, {arm},", first.setdefault((*group, arm), settings), settings
                )


def _check_alike(whose: str, one: dict, other: dict) -> None:
    differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if differing:
        shown = "; ".join(f"{key}={one.get(key)!r}, {other.get(key)!r}" for key in differing[:3])
        raise SettingsError(
            f"runs of {whose} differ in {', '.join(differing)} ({shown}): summarise them apart, or "
            "by one setting with --by"
        )


def _known(by_seed: Mapping[int, dict], seeds: Sequence[int], metric: str) -> np.ndarray:
    """The metric by seed; NaN where the file has null, for labels all alike, or has no such one."""
    return np.array([by_seed[seed].get(metric) for seed in seeds], dtype=float)


def _setting(outcome: dict, name: str) -> object:
    if name not in outcome["config"]:
        raise SettingsError(f"--by={name}: the runs have no such setting")
    return outcome["config"][name]


def format_summary(cells: Sequence[Cell]) -> str:
    """A Markdown table, one row a model and arm.

    Relative differences are ratios of means; ``rel. AUC`` is that of AUC itself.
    """
    lines = [
        "| model | arm | seeds | AUC | LogLoss | GAUC | list AUC | AUC - plain | LogLoss - plain "
        "| rel. AUC |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        columns = [cell.model, cell.arm, str(len(cell.seeds))]
        for metric in METRICS:
            spread = cell.deviation[metric]
            shown = f"{cell.mean[metric]:.4f}"
            columns.append(shown if np.isnan(spread) else f"{shown} ± {spread:.4f}")
        for metric in ("auc", "logloss"):
            columns.append(_change(cell.difference[metric]) if cell.difference else "")
        improvement = ""
        if cell.difference:
            raised = cell.base + cell.difference["auc"].mean
            improvement = f"{relative(raised, cell.base).ratio:+.2%}"
        lines.append("| " + " | ".join([*columns, improvement]) + " |")
    return "\n".join(lines)


def _change(difference: Difference) -> str:
    half_width = difference.high - difference.mean
    return f"{difference.mean:+.4f}" + ("" if np.isnan(half_width) else f" ± {half_width:.4f}")

"""Several runs of the same comparison: means over seeds and paired differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_uip.evidence.statistics import half_width, relative
from recbole_uip.settings import SettingsError

__all__ = ["Cell", "format_summary", "read_results", "read_results_file", "summarise"]

METRICS = ("auc", "logloss", "gauc")
BASELINE = "plain"


@dataclass(frozen=True)
class Cell:
    """Metrics of one model and arm over seeds.

    Attributes
    ----------
    model, arm : str
    seeds : tuple of int
    mean, deviation : dict of str to float
        By metric; the sample standard deviation is NaN for a single seed.
    difference : dict of str to (float, float)
        Mean difference from the plain arm on the same seeds, and half the width of its 95%
        interval (paired t); empty without a plain arm.
    """

    model: str
    arm: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    deviation: dict[str, float]
    difference: dict[str, tuple[float, float]]


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
        If a model and arm stand in two results with the same seed, or no run has the setting.
    """
    table: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
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
    cells = []
    for (model, arm), by_seed in table.items():
        seeds = tuple(sorted(by_seed))
        plain = table.get((model, BASELINE), {})
        paired = [seed for seed in seeds if seed in plain and arm != BASELINE]
        mean, deviation, difference = {}, {}, {}
        for metric in METRICS:
            # Where labels are all alike there is no AUC, and the file has null.
            values = np.array([by_seed[seed][metric] for seed in seeds], dtype=float)
            mean[metric] = float(values.mean())
            deviation[metric] = float(values.std(ddof=1)) if len(values) > 1 else np.nan
            if paired:
                before = np.array([plain[seed][metric] for seed in paired], dtype=float)
                after = np.array([by_seed[seed][metric] for seed in paired], dtype=float)
                changes = after - before
                difference[metric] = (float(changes.mean()), half_width(changes))
        cells.append(Cell(model, arm, seeds, mean, deviation, difference))
    return cells


def _setting(outcome: dict, name: str) -> object:
    if name not in outcome["config"]:
        raise SettingsError(f"--by={name}: the runs have no such setting")
    return outcome["config"][name]


def format_summary(cells: Sequence[Cell]) -> str:
    """A Markdown table, one row a model and arm.

    Relative differences are ratios of means; ``rel. AUC`` is that of AUC itself.
    """
    lines = [
        "| model | arm | seeds | AUC | LogLoss | GAUC | AUC - plain | LogLoss - plain | rel. AUC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        columns = [cell.model, cell.arm, str(len(cell.seeds))]
        for metric in METRICS:
            spread = cell.deviation[metric]
            shown = f"{cell.mean[metric]:.4f}"
            columns.append(shown if np.isnan(spread) else f"{shown} ± {spread:.4f}")
        for metric in ("auc", "logloss"):
            columns.append(_change(*cell.difference[metric]) if cell.difference else "")
        improvement = ""
        if cell.difference:
            mean = cell.mean["auc"]
            improvement = f"{relative(mean, mean - cell.difference['auc'][0]).ratio:+.2%}"
        lines.append("| " + " | ".join([*columns, improvement]) + " |")
    return "\n".join(lines)


def _change(mean: float, half_width: float) -> str:
    return f"{mean:+.4f}" + ("" if np.isnan(half_width) else f" ± {half_width:.4f}")

"""The outside check: another library's DeepFM on the rows and profiles that a run exported.

FuxiCTR (https://github.com/reczoo/FuxiCTR) has its own encoding of features, its own layers,
trainer and metrics. From here it gets Parquet files of one arm each, cut from the run's
``profiles.parquet``, and its own configuration files. What it makes of them has nothing of
RecBole's or of ours in it, so a gain that came from a mistake in how RecBole is driven or measured
would not show there.

The budget is that of the run, for every arm. Differences between arms are to be compared across
the libraries, absolute figures are not: FuxiCTR also cuts the learning rate to a tenth after an
epoch without a better validation AUC, clips gradients, starts with smaller embeddings, applies
dropout behind the hidden layers, and has one token for all that training rows do not have.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recbole_uip.bank.export_atomic import SPLITS
from recbole_uip.bridge.metrics import gauc, lists
from recbole_uip.evidence.outside.driver import EXPERIMENT, INSTALL
from recbole_uip.evidence.outside.finished import BUDGET, MODEL, FinishedRun, read_run
from recbole_uip.evidence.summary import BASELINE, METRICS, Cell, format_summary, summarise
from recbole_uip.settings import SettingsError

__all__ = ["format_outside", "outside_check", "write_inputs"]

logger = logging.getLogger(__name__)

DRIVER = Path(__file__).with_name("driver.py")
LABEL = "label"
DATASET = "arm"  # the name of the dataset in dataset_config.yaml
_COMPARED = ("auc", "logloss")


def outside_check(
    run_dir: str | os.PathLike,
    python: str | os.PathLike,
    seeds: Sequence[int] | None = None,
    data: str | os.PathLike | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train FuxiCTR's DeepFM on every arm of a run.

    Parameters
    ----------
    run_dir : path-like
        Output folder of ``recbole-uip run``.
    python : path-like
        A Python that has FuxiCTR.
    seeds : sequence of int, optional
        Seeds of FuxiCTR's training; the run's own by default. The profiles are the run's.
    data : path-like, optional
        Folder of the run's dataset; where the run says that it was, by default.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        ``runs``, each with a seed and its ``models`` as in ``results.json`` (RecBole's own run is
        the first), ``same_sign`` by arm and metric, ``budget``, ``rows``, ``left_out``,
        ``versions`` and ``command``. All of it is plain values.

    Raises
    ------
    SettingsError
        If the run cannot be checked so, or ``python`` has no FuxiCTR.
    RuntimeError
        If FuxiCTR fails.
    """
    run = read_run(run_dir, data)
    seeds = [run.results["seed"]] if seeds is None else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds={seeds} must list at least one seed, each once")
    versions = _versions(python)
    for reason in run.left_out:
        logger.warning("left out: %s", reason)
    recbole = run.results["versions"]["recbole"]
    ours = {arm: run.results["models"][MODEL][arm] for arm in run.arms}
    kept = ("valid", "test", "fields", "user_id")
    ours = {arm: {key: outcome[key] for key in kept} for arm, outcome in ours.items()}
    runs = [_as_results(run, run.results["seed"], f"{MODEL}, RecBole {recbole}", ours)]
    with tempfile.TemporaryDirectory(prefix="outside-") as folder:
        inputs = write_inputs(run, folder)
        for seed in seeds:
            outcomes = {}
            for arm, path in inputs.items():
                logger.info("training FuxiCTR's %s, arm %s, seed %d", MODEL, arm, seed)
                outcomes[arm] = {**_train(run, python, path, seed), "fields": list(run.arms[arm])}
            runs.append(_as_results(run, seed, f"{MODEL}, FuxiCTR {versions['fuxictr']}", outcomes))
    return {
        "dataset": run.results["dataset"],
        "runs": runs,
        "same_sign": _same_sign(runs),
        "rows": {split: run.rows(split).num_rows for split in SPLITS},
        "budget": run.budget,
        "left_out": list(run.left_out),
        "versions": {**versions, "recbole": recbole},
        "run": run.results["command"],
        "command": command or f"outside_check({str(run_dir)!r}, {str(python)!r})",
    }


def format_outside(results: Mapping[str, Any]) -> str:
    """The protocol, the table of both libraries, and whether they agree."""
    rows = ", ".join(f"{count:,} {split}" for split, count in results["rows"].items())
    budget = ", ".join(f"{name} {value}" for name, value in results["budget"].items())
    lines = [
        f"{results['dataset']}: {rows}; test split; profiles of `{results['run']}`",
        f"both libraries, all arms: {budget}",
        "FuxiCTR "
        + ", torch ".join(results["versions"][name] for name in ("fuxictr", "torch"))
        + f"; RecBole {results['versions']['recbole']}",
    ]
    if results["left_out"]:
        lines.append(f"left out: {'; '.join(results['left_out'])}")
    lines += ["", format_summary(_cells(results["runs"])), ""]
    for arm, metrics in results["same_sign"].items():
        agree = [name for name in _COMPARED if metrics[name]]
        differ = [name for name in _COMPARED if not metrics[name]]
        said = [f"the same sign in {' and '.join(agree)}"] if agree else []
        said += [f"NOT the same sign in {' and '.join(differ)}"] if differ else []
        lines.append(f"{arm} - {BASELINE}, FuxiCTR and RecBole: {', '.join(said)}")
    return "\n".join(lines)


def write_inputs(run: FinishedRun, folder: str | os.PathLike) -> dict[str, Path]:
    """FuxiCTR's files for each arm: three Parquet files and two of configuration.

    An arm's files have the label and the arm's own fields, and no other column. The rows of a
    split come in the order of ``profiles.parquet``. FuxiCTR names torch modules by its columns,
    and torch takes neither a dot nor names such as ``type``: see :func:`column_name`.

    Returns
    -------
    dict of str to Path
        Each arm's folder.
    """
    splits = {split: run.rows(split) for split in SPLITS}
    folders = {}
    for number, (arm, fields) in enumerate(run.arms.items()):
        path = Path(folder) / f"arm{number}"
        path.mkdir(parents=True)
        for split, rows in splits.items():
            columns = {LABEL: rows[run.layout.label].cast(pa.float64())}
            for name in fields:
                text = run.kinds[name] != "float"
                columns[column_name(name)] = rows[name].cast(pa.string()) if text else rows[name]
            pq.write_table(pa.table(columns), path / f"{split}.parquet")
        _write_yaml(path / "dataset_config.yaml", {DATASET: _dataset_config(run, fields, path)})
        _write_yaml(path / "model_config.yaml", {EXPERIMENT: _model_config(run, path)})
        folders[arm] = path
    return folders


def column_name(field: str) -> str:
    """Name of a field's column in FuxiCTR's files."""
    # No field has a colon in its name, for RecBole's files write name:type.
    return "f_" + field.replace(".", ":")


def _dataset_config(run: FinishedRun, fields: Sequence[str], path: Path) -> dict[str, Any]:
    return {
        "data_root": str(path / "encoded"),
        "data_format": "parquet",
        **{f"{split}_data": str(path / f"{split}.parquet") for split in SPLITS},
        "feature_cols": [_feature(run, name) for name in fields],
        "label_col": {"name": LABEL, "dtype": "float"},
    }


def _feature(run: FinishedRun, name: str) -> dict[str, Any]:
    config, kind = run.config, run.kinds[name]
    feature = {"name": column_name(name), "active": True}
    if kind == "float":
        feature |= {"dtype": "float", "type": "numeric"}
        if config.get("normalize_all") or name in (config.get("normalize_field") or ()):
            feature["normalizer"] = "MinMaxScaler"
    elif kind == "token_seq":
        limit = (config.get("seq_len") or {}).get(name, 0)
        separator = config.get("seq_separator") or " "
        feature |= {"dtype": "str", "type": "sequence", "splitter": separator, "max_len": limit}
    else:
        feature |= {"dtype": "str", "type": "categorical"}
    return feature


def _model_config(run: FinishedRun, path: Path) -> dict[str, Any]:
    budget = {BUDGET[name]: value for name, value in run.budget.items()}
    # RecBole goes on for stopping_step epochs without a better AUC, and stops after one more.
    budget["early_stop_patience"] += 1
    # Their regularizer x adds x/2 of the squared norm to the loss: the same as a decay of x.
    decay = float(budget.pop("weight_decay"))
    return {
        "model": MODEL,
        "dataset_id": DATASET,
        "model_root": str(path / "checkpoints"),
        "task": "binary_classification",
        "loss": "binary_crossentropy",
        "metrics": ["AUC", "logloss"],
        "monitor": "AUC",
        "monitor_mode": "max",
        "optimizer": "adam",
        "embedding_regularizer": decay,
        "net_regularizer": decay,
        "gpu": -1,
        "verbose": 0,
        **budget,
    }


def _write_yaml(path: Path, value: dict) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _run_driver(python: str | os.PathLike, *arguments: str) -> subprocess.CompletedProcess:
    # Isolated: neither our folder nor PYTHONPATH may lend that Python a module.
    return subprocess.run(
        [str(python), "-I", str(DRIVER), *arguments], capture_output=True, text=True
    )


def _versions(python: str | os.PathLike) -> dict[str, str]:
    """Versions of FuxiCTR and torch that ``python`` has."""
    advice = f"make an environment with `{INSTALL[0]}` and `{INSTALL[1]}`, and name its bin/python"
    try:
        finished = _run_driver(python)
    except OSError as error:
        raise SettingsError(f"--python={python} cannot be run ({error}): {advice}") from error
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        raise SettingsError(f"--python={python} has no FuxiCTR that works ({reason}): {advice}")
    return json.loads(finished.stdout)


def _train(run: FinishedRun, python: str | os.PathLike, folder: Path, seed: int) -> dict[str, Any]:
    """FuxiCTR's AUC and LogLoss, and GAUC and list AUC of its scores."""
    for name in ("result.json", "scores.npz"):
        (folder / name).unlink(missing_ok=True)
    finished = _run_driver(python, str(folder), str(seed))
    if finished.returncode:
        raise RuntimeError(f"FuxiCTR failed:\n{finished.stderr[-4000:]}")
    outcome = json.loads((folder / "result.json").read_text())
    del outcome["versions"]
    with np.load(folder / "scores.npz") as scores:
        for split in ("valid", "test"):
            rows = run.rows(split)
            users = rows[run.layout.user].combine_chunks().dictionary_encode().indices.to_numpy()
            times = None if run.layout.time is None else rows[run.layout.time].to_numpy()
            for name, group in (("gauc", users), ("list_auc", lists(users, times))):
                value = gauc(group, rows[run.layout.label].to_numpy(), scores[split])
                outcome[split][name] = None if math.isnan(value) else value
    return outcome


def _as_results(run: FinishedRun, seed: int, model: str, arms: dict[str, Any]) -> dict[str, Any]:
    return {"dataset": run.results["dataset"], "seed": seed, "models": {model: arms}}


def _cells(runs: Sequence[dict]) -> list[Cell]:
    """Means and differences of the test split; a metric that JSON has as null is NaN."""
    known = copy.deepcopy(list(runs))
    for outcome in (
        outcome for each in known for arms in each["models"].values() for outcome in arms.values()
    ):
        test = outcome["test"]
        outcome["test"] = {name: math.nan if test[name] is None else test[name] for name in METRICS}
    return summarise(known)


def _same_sign(runs: Sequence[dict]) -> dict[str, dict[str, bool]]:
    """Whether both libraries' mean differences from plain have the same sign, by arm and metric."""
    changes: dict[str, list[dict[str, float]]] = {}
    for cell in _cells(runs):
        if cell.difference:
            change = {name: cell.difference[name].mean for name in _COMPARED}
            changes.setdefault(cell.arm, []).append(change)
    return {
        arm: {name: len({np.sign(change[name]) for change in both}) == 1 for name in _COMPARED}
        for arm, both in changes.items()
    }

"""Carry out an experiment: what is not in the store yet is trained, and kept."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from recbole.utils import init_seed
from tqdm import tqdm

from recbole_uip.behaviours import Behaviours
from recbole_uip.bridge.config import UIPConfig, load_config_files, parse_command_line
from recbole_uip.bridge.dataset import UIPDataset
from recbole_uip.bridge.preparation import create_dataset, data_preparation
from recbole_uip.bridge.run import predicted_lists, protocol, train_arm
from recbole_uip.bridge.sequences import SequenceConfig, SequenceDataset
from recbole_uip.bridge.storage import plain
from recbole_uip.em.states import index_history
from recbole_uip.evidence.experiments.plan import (
    INERT,
    PROFILES,
    RESULTS,
    TEXTS,
    TUNING,
    Case,
    Experiment,
    Run,
)
from recbole_uip.evidence.experiments.store import RunStore, key_of
from recbole_uip.files import atomic_write
from recbole_uip.records import finite, versions
from recbole_uip.settings import ArmSettings, SettingsError
from recbole_uip.work import stop_with_parent

__all__ = ["run_experiment"]

logger = logging.getLogger(__name__)

# Runs that one worker makes on one set of profiles, at most: many share their cost, few spread over
# workers.
RUNS_A_TASK = 4


def run_experiment(
    experiment: Experiment,
    output: Path,
    *,
    workers: int = 1,
    whole: Experiment | None = None,
    command: str | None = None,
) -> Path:
    """Make every run of ``experiment`` that ``output/runs`` does not hold.

    A run is known by a hash of what shapes it, so an interrupted experiment goes on where it
    stopped, and experiments share the runs they have in common. With a grid, each model and arm
    is first tuned on the validation split with one seed, then run with what was best.

    Parameters
    ----------
    experiment : Experiment
    output : Path
        Gets ``runs/``, the store, and ``<name>/experiment.json``, which says what stands there.
    workers : int
        Processes that train side by side, each with its share of the cores.
    whole : Experiment, optional
        What ``experiment`` is a part of. Parts of one whole are reported together.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    Path
        The folder of ``experiment.json``.
    """
    if workers < 1:
        raise SettingsError(f"--workers={workers} must be at least 1")
    store = RunStore(output / "runs")
    cases = list(experiment.cases())
    tuning: list[dict] = []
    chosen: dict[Case, dict[str, Any]] = {}
    folder = output / experiment.name
    if experiment.tune:
        grids = {
            case: [
                (point, experiment.run(case, experiment.tune.seed, point))
                for point in experiment.tune.points()
            ]
            for case in cases
        }
        points = [run for grid in grids.values() for _, run in grid]
        _refuse_other_splits(experiment, points)
        _make(points, store, workers, "tuning")
        for case, grid in grids.items():
            best = max(grid, key=lambda pair: _valid_auc(store.read(pair[1].key)))
            chosen[case] = best[0]
            tuning.append(
                {
                    **_describe(case),
                    "grid": [{"settings": point, "key": run.key} for point, run in grid],
                    "chosen": best[0],
                }
            )
    runs = {
        case: [experiment.run(case, seed, chosen.get(case)) for seed in experiment.seeds]
        for case in cases
    }
    whole = whole or experiment
    plan = {
        "name": experiment.name,
        "definition": _definition(whole),
        "title": experiment.title,
        "question": experiment.question,
        "baseline": whole.baseline,
        "compare": [list(pair) for pair in whole.compare],
        # All that the file asks, whatever part of it is run: verdicts are corrected for so many.
        "family": [
            {**_describe(case), "key": whole.run(case, whole.seeds[0]).key}
            for case in whole.cases()
        ],
        "cases": [
            {**_describe(case), "seeds": {str(run.seed): run.key for run in each}}
            for case, each in runs.items()
        ],
        "tuning": tuning,
        "runs": "../runs",
        "commands": [command or f"recbole-uip experiment {experiment.name}"],
    }
    plan = _with_other_parts(plain(plan), folder / "experiment.json")
    # Before the runs, so that what is finished can be looked at meanwhile.
    with atomic_write(folder / "experiment.json", "w") as file:
        json.dump(plan, file, indent=1)
        file.write("\n")
    _make([run for each in runs.values() for run in each], store, workers, experiment.name)
    return folder


def _refuse_other_splits(experiment: Experiment, runs: Sequence[Run]) -> None:
    """Refuse to tune on rows that are test rows of other seeds."""
    seeds = set(experiment.seeds) - {experiment.tune.seed}
    for run in runs:
        config = run.config
        if seeds and config["eval_args"]["order"] == "RO" and not config["benchmark_filename"]:
            raise SettingsError(
                f"experiment {experiment.name}: tune.seed={experiment.tune.seed} would be tuned on "
                f"rows that other seeds are tested on, for eval_args.order=RO splits anew by each "
                f"seed: set order: TO, or seeds: [{experiment.tune.seed}]"
            )


def _definition(experiment: Experiment) -> str:
    """Hash of all that an experiment's files and the command line say of its results."""
    below = load_config_files(experiment.extends)
    shaping = (
        argument
        for argument in experiment.command_line
        if not INERT.intersection(parse_command_line([argument]))
    )
    experiment = dataclasses.replace(experiment, command_line=tuple(shaping))
    # Parts whose runs are of another version are not of the same whole.
    versions = [RESULTS, PROFILES, TEXTS, TUNING]
    return key_of({"experiment": repr(experiment), "below": repr(below), "versions": versions})


def _with_other_parts(plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """``plan`` with the cases and seeds of a plan for other parts of the same experiment."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["definition"] != plan["definition"]:
            logger.warning(
                "%s is replaced: it was of other settings, by %s (finished runs stay in the store; "
                "--output keeps both)", path, "; ".join(old["commands"]),
            )  # fmt: skip
            return plan
        cases = {_case_key(case): case for case in old["cases"]}
        for case in plan["cases"]:
            seeds = cases.get(_case_key(case), {}).get("seeds", {})
            cases[_case_key(case)] = {**case, "seeds": {**seeds, **case["seeds"]}}
        tuned = {_case_key(case): case for case in [*old["tuning"], *plan["tuning"]]}
        commands = list(dict.fromkeys([*old["commands"], *plan["commands"]]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        # There is none, or none that can be read: it would only have said more.
        return plan
    return {
        **plan,
        "cases": list(cases.values()),
        "tuning": list(tuned.values()),
        "commands": commands,
    }


def _case_key(case: Mapping[str, Any]) -> str:
    return json.dumps([case[name] for name in ("dataset", "model", "arm", "variant")])


def _valid_auc(record: dict[str, Any]) -> float:
    auc = record["valid"]["auc"]
    # Where labels are all alike there is none.
    return -math.inf if auc is None else auc


def _describe(case: Case) -> dict[str, Any]:
    return {
        "dataset": case.dataset,
        "model": case.model,
        "arm": case.arm,
        "variant": dict(case.variant),
    }


def _make(runs: Sequence[Run], store: RunStore, workers: int, name: str) -> None:
    """Make the runs that are missing, each once."""
    missing = {run.key: run for run in runs if run.key not in store}
    if not missing:
        logger.info("%s: all %d runs are there already", name, len({run.key for run in runs}))
        return
    logger.info("%s: %d runs to make", name, len(missing))
    tasks = _tasks(list(missing.values()), workers)
    threads = max(1, joblib.cpu_count() // workers)
    made = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(
        joblib.delayed(_make_task)(task, store, threads if workers > 1 else None) for task in tasks
    )
    failed: list[str] = []
    with tqdm(total=len(missing), desc=name, unit="run") as bar:
        for lines, errors in made:
            for line in lines:
                logger.info("%s", line)
            for error in errors:
                logger.error("%s", error)
            failed += errors
            bar.update(len(lines) + len(errors))
    if failed:
        raise SettingsError(
            f"{name}: {len(failed)} of {len(missing)} runs cannot be made, all others are: "
            f"{'; '.join(failed)}"
        )


def _tasks(runs: list[Run], workers: int) -> list[list[Run]]:
    """Runs on the same profiles in small batches, seed by seed so that all arms grow alike."""
    runs = sorted(runs, key=lambda run: (run.seed, run.group))
    tasks = []
    for _, group in itertools.groupby(runs, key=lambda run: run.group):
        group = list(group)
        n_tasks = max(min(workers, len(group)), math.ceil(len(group) / RUNS_A_TASK))
        tasks += [group[number::n_tasks] for number in range(n_tasks)]
    return tasks


def _make_task(
    runs: list[Run], store: RunStore, threads: int | None
) -> tuple[list[str], list[str]]:
    """Make runs that share rows and profiles: a line about each, and why others cannot be made."""
    if threads is not None:
        stop_with_parent()
        torch.set_num_threads(threads)
    try:
        dataset, profile_seconds = _prepare(runs[0].config)
    except SettingsError as error:
        return [], [f"{_line(run)}: {error}" for run in runs]
    lines, failed = [], []
    for run in runs:
        try:
            lines.append(_make_run(run, dataset, profile_seconds, store))
        except SettingsError as error:
            failed.append(f"{_line(run)}: {error}")
    return lines, failed


def _line(run: Run) -> str:
    """A run's name in a log."""
    variant = "".join(f" {key}={value}" for key, value in run.case.variant)
    return f"{run.case.dataset} {run.case.model} {run.arm.name}{variant} seed {run.seed}"


def _prepare(config: UIPConfig) -> tuple[UIPDataset, float]:
    """Rows and profiles, and the seconds that the latter took."""
    # A random split comes from RecBole's global generator.
    init_seed(config["seed"], config["reproducibility"])
    sequential = isinstance(config, SequenceConfig)
    dataset = SequenceDataset(config) if sequential else create_dataset(config)
    loaded = time.perf_counter()
    data_preparation(config, dataset)
    profile_seconds = time.perf_counter() - loaded
    if len(np.unique(dataset.behaviours.split)) < 3:
        raise SettingsError(
            f"dataset {config['dataset']!r}: eval_args.split leaves a split without rows, and an "
            "experiment compares runs on all three: change it"
        )
    return dataset, profile_seconds


def _make_run(run: Run, dataset: UIPDataset, profile_seconds: float, store: RunStore) -> str:
    """Train a run and keep it; a line about it."""
    with tempfile.TemporaryDirectory() as checkpoints:
        outcome, predictions = train_arm(run.config, dataset, run.arm, Path(checkpoints))
    record = {
        **_describe(run.case),
        "seed": run.seed,
        **outcome,
        "cost": _cost(dataset, run.arm, profile_seconds),
        "protocol": protocol(run.config, dataset),
        "profiles": {name: dataset.profiles.report[name] for name in run.arm.facets},
        "lm_fingerprint": _fingerprint(dataset),
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    store.write(run.key, finite(plain(record)), _columns(predictions, dataset, run.arm))
    return (
        f"{_line(run)}: valid AUC {outcome['valid']['auc']:.4f}, {outcome['epochs']} epochs, "
        f"{outcome['seconds']:.0f} s"
    )


def _fingerprint(dataset: UIPDataset) -> str | None:
    """Content hash of the LM that read the items' texts; None without one."""
    profiles = dataset.profiles
    readers = [*profiles.texts.values(), *profiles.tuned.values()]
    found = {reader.fingerprint for reader in readers} - {None}
    return found.pop() if found else None


def _cost(dataset: UIPDataset, arm: ArmSettings, profile_seconds: float) -> dict[str, float]:
    if isinstance(dataset, SequenceDataset):
        # An item ID and a byte of feedback an event.
        return {"bytes_per_user": dataset.max_length * (np.dtype(np.int32).itemsize + 1)}
    if not arm.facets:
        return {}
    cost = {**dataset.profiles.cost, "profile_seconds": profile_seconds}
    if dataset.profiles.tuned.keys() & set(arm.facets):
        return cost  # no bank has soft tokens that were tuned
    encoder = dataset.profiles.encoder
    widths = np.diff(encoder.kernels.start)
    facets = zip(widths, encoder.facets, strict=True)
    own = [width for width, facet in facets if facet in arm.facets]
    # A bank keeps a user's state in single precision.
    return {**cost, "bytes_per_user": int(sum(own)) * np.dtype(np.float32).itemsize}


def _columns(
    predictions: dict[str, dict[str, np.ndarray]], dataset: UIPDataset, arm: ArmSettings
) -> dict[str, np.ndarray]:
    """Predictions of both splits, lists, how much is known of each user and item, and codes."""
    behaviours: Behaviours = dataset.behaviours
    train = behaviours.train
    user_rows = np.bincount(behaviours.user[train], minlength=behaviours.n_users)
    item_rows = np.bincount(behaviours.item[train], minlength=behaviours.n_items)
    # The same for all arms, whatever their bank knows: a plain run serves many experiments.
    is_event = np.ones(len(behaviours), dtype=bool) if behaviours.is_time_ordered else train
    earlier = index_history(behaviours.user, behaviours.time, is_event, behaviours.n_users).seen
    kinds = {"row": np.int64, "user": np.int32, "item": np.int32, "label": np.int8}
    columns = {}
    for split, part in predictions.items():
        for name, kind in kinds.items():
            columns[f"{split}_{name}"] = part[name].astype(kind)
        columns[f"{split}_list"] = predicted_lists(part, behaviours.time).astype(np.int32)
        columns[f"{split}_score"] = part["score"].astype(np.float32)
        columns[f"{split}_history"] = earlier[part["row"]].astype(np.int32)
        columns[f"{split}_user_rows"] = user_rows[part["user"]].astype(np.int32)
        columns[f"{split}_item_rows"] = item_rows[part["item"]].astype(np.int32)
    for field in dataset.profiles.fields:
        if field.kind == "code" and field.facet in arm.facets:
            codes = field.values[predictions["test"]["row"]]
            columns[f"test_token_{field.name}"] = codes.astype(np.int16)
    return columns

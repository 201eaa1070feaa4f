"""Train RecBole's models with and without profile fields, on the same rows, side by side."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recbole.evaluator.metrics import AUC, LogLoss
from recbole.utils import init_seed

from recbole_uip.bank.build import bank_of_profiles
from recbole_uip.bank.store import check_replaceable
from recbole_uip.bridge.config import UIPConfig, load_config_files, parse_command_line
from recbole_uip.bridge.dataset import UIPDataset
from recbole_uip.bridge.metrics import gauc, group_aucs, lists
from recbole_uip.bridge.preparation import create_dataset, data_preparation
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.bridge.served_model import model_fields
from recbole_uip.bridge.serving_files import write_serving
from recbole_uip.bridge.storage import plain
from recbole_uip.bridge.trainer import make_trainer
from recbole_uip.files import LockedError, atomic_write, lock, remove_temporaries, unlock
from recbole_uip.records import finite, peak_memory, versions
from recbole_uip.settings import ArmSettings, SettingsError
from recbole_uip.work import is_main_process

__all__ = ["predicted_lists", "protocol", "run_recbole_uip", "train_arm", "write_profiles"]

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "DeepFM"
DEFAULT_DATASET = "ml-100k"
LOCK = ".lock"
_SPLITS = np.array(["train", "valid", "test"])


def run_recbole_uip(
    model: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    config_files: str | os.PathLike | Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    command_line: Sequence[str] = (),
    command: str | None = None,
) -> dict:
    """Infer profiles and train each model once per arm; the plain model is one of the arms.

    All arms share rows, split, seed, budget and regularisation; ``uip_arms`` says which fields
    each is given. Artefacts go to ``uip_output`` (by default ``<checkpoint_dir>/uip-<dataset>``):
    ``results.json``, ``profiles.parquet``, the feature ``bank``, the best checkpoint of each
    arm, and what :class:`~recbole_uip.bridge.serving.Scorer` needs besides (``serving``).

    Parameters
    ----------
    model, dataset : str or sequence of str
        Names; a string may list several, separated by commas. Without them, ``model`` and
        ``dataset`` of the settings, else DeepFM and ml-100k. With several datasets each has a
        subfolder of ``uip_output``.
    config_files : path or sequence of path, optional
    config : mapping, optional
        Any RecBole or ``uip_*`` settings; stronger than the files.
    command_line : sequence of str, optional
        ``--key=value`` arguments; stronger than ``config``.
    command : str, optional
        How this run was started, for the record.

    Returns
    -------
    dict
        What ``results.json`` holds; with several datasets, a dict of these by dataset. Empty in
        all but the first process of ``accelerate launch``. Of several models, those that could
        not be trained are under ``failed``, each with the reason.

    Raises
    ------
    SettingsError
        If a setting cannot be used, or another run writes to the same folder; or if no model
        could be trained, for example because validation finds no epoch better than another.
        Settings are checked before a dataset is trained, so only earlier datasets have results.
    """
    given = {
        **load_config_files(config_files or ()),
        **(config or {}),
        **parse_command_line(command_line),
    }
    models = _names("model", given.get("model", DEFAULT_MODEL) if model is None else model)
    datasets = _names(
        "dataset", given.get("dataset", DEFAULT_DATASET) if dataset is None else dataset
    )
    configs = {
        name: [
            UIPConfig(each, name, config_files, config, command_line=command_line)
            for each in models
        ]
        for name in datasets
    }
    results = {}
    for name, of_models in configs.items():
        output = of_models[0].uip.output
        if output is None:
            output = Path(of_models[0]["checkpoint_dir"], f"uip-{name}")
        elif len(datasets) > 1:
            output = output / name
        with _sole_writer(output) if is_main_process() else contextlib.nullcontext():
            results[name] = _run_dataset(of_models, output, command)
    return results if len(datasets) > 1 else results[datasets[0]]


@contextlib.contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    """Refuse a second run in the same folder: each would train on with the other's checkpoints."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = lock(output / LOCK)
    except OSError as error:
        raise SettingsError(
            f"uip_output={str(output)!r} cannot be written to: {error}; choose another folder"
        ) from error
    except LockedError as error:
        raise SettingsError(
            f"uip_output={str(output)!r}: {error} has a run there; wait for it, or give this one "
            "another folder by uip_output"
        ) from None
    try:
        yield
    finally:
        unlock(file)


def _names(key: str, value: str | Sequence[str]) -> list[str]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise SettingsError(
            f"{key}={value!r} must be a name, or a list of names: a run knows models and datasets "
            "by their names alone (a class of your own can be trained by UIPConfig, UIPDataset and "
            "data_preparation)"
        )
    names = [name.strip() for name in names]
    if not names or not all(names) or len(set(names)) != len(names):
        raise SettingsError(f"{key}={value!r} must list at least one name, each once")
    return names


def _run_dataset(configs: list[UIPConfig], output: Path, command: str | None) -> dict:
    config = configs[0]
    settings = config.uip
    init_seed(config["seed"], config["reproducibility"])
    try:
        # RecBole makes it with the first trainer, after the profiles are inferred.
        os.makedirs(config["checkpoint_dir"], exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"checkpoint_dir={config['checkpoint_dir']!r} cannot be made: {error}; choose another "
            "folder"
        ) from error
    started = time.perf_counter()
    dataset = create_dataset(config)
    loaded = time.perf_counter()
    # Builds the splits and the profiles, or finds them saved.
    data_preparation(config, dataset)
    inferred = time.perf_counter()
    if not is_main_process():
        # Processes of accelerate share the tuning of soft tokens; the first goes on by itself.
        return {}
    for each in configs:
        for arm in settings.arms:
            # An arm that a model cannot be given is refused before anything is written.
            dataset.build()[0].select(arm, copy.deepcopy(each))
    servable = not dataset.profiles.tuned
    if dataset.profiles.fields and servable:
        check_replaceable(output / "bank")
    _clear(output)
    path = output / "profiles.parquet"
    field_bytes = write_profiles(path, dataset)
    artefacts = {"results": str(output / "results.json"), "profiles": str(path)}
    if not servable:
        logger.info(
            "no feature bank and no serving files are written: a bank cannot update soft tokens "
            "that uip_posterior=gradient tunes, because that takes the LM"
        )
    fit = None
    if dataset.profiles.fields and servable:
        artefacts["bank"] = str(output / "bank")
        fit = _write_bank(output / "bank", dataset)
    results: dict[str, Any] = {
        "dataset": config["dataset"],
        "seed": config["seed"],
        "models": {},
        "failed": {},
        "cost": {
            **plain(dataset.profiles.cost),
            "data_seconds": loaded - started,
            "profile_seconds": inferred - loaded,
            "field_bytes": field_bytes,
            "train_seconds": {},
        },
        "protocol": protocol(config, dataset),
        "profiles": plain(dataset.profiles.report),
        "artefacts": artefacts,
        "versions": versions(),
        "command": command or f"run_recbole_uip(dataset={config['dataset']!r})",
    }
    for each in configs:
        try:
            outcomes = _train_model(each, dataset, output / "checkpoints")
        except Exception as error:
            if len(configs) == 1:
                raise
            # What is no setting's fault is a defect, to be seen as one.
            defect = not isinstance(error, SettingsError)
            logger.error("%s; going on without %s", error, each["model"], exc_info=defect)
            results["failed"][each["model"]] = str(error) or type(error).__name__
            continue
        seconds = {arm: outcome.pop("seconds") for arm, outcome in outcomes.items()}
        results["cost"]["train_seconds"][each["model"]] = seconds
        results["models"][each["model"]] = outcomes
    if not results["models"]:
        raise SettingsError("; ".join(results["failed"].values()))
    if servable:
        trained = [each for each in configs if each["model"] in results["models"]]
        artefacts["serving"] = write_serving(output, dataset, trained, fit)
    results["cost"]["peak_memory_bytes"] = peak_memory()
    results = finite(results)
    with atomic_write(output / "results.json", "w") as file:
        json.dump(results, file, indent=2, allow_nan=False)
        file.write("\n")
    return results


def _train_model(config: UIPConfig, dataset: UIPDataset, checkpoints: Path) -> dict[str, dict]:
    """Outcomes of all arms of one model."""
    outcomes = {}
    arms = config.uip.arms
    for number, arm in enumerate(arms, start=1):
        logger.info("training %s, arm %s (%d of %d)", config["model"], arm.name, number, len(arms))
        outcomes[arm.name], _ = train_arm(config, dataset, arm, checkpoints)
    return outcomes


def _clear(output: Path) -> None:
    """Remove what an earlier run left that says something of the files to be written now.

    Until this run is done there are no results, and no models that would be served with its bank.
    """
    (output / "results.json").unlink(missing_ok=True)
    for description in (output / "serving").glob("*.json"):
        description.unlink()
    for folder in (output, output / "serving", output / "checkpoints"):
        # A process that was killed leaves what it had not finished.
        remove_temporaries(folder)


def train_arm(
    config: UIPConfig, dataset: UIPDataset, arm: ArmSettings, checkpoints: Path
) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    """Train and evaluate one model on one arm's view of ``dataset``.

    Returns
    -------
    outcome : dict
        ``valid`` and ``test`` metrics, ``fields`` the model reads, ``config``, ``seconds`` and
        ``epochs`` of training, ``score_seconds`` of the test split and the number of weights
        (``parameters``).
    predictions : dict
        For ``valid`` and ``test``, the arrays ``row``, ``user``, ``item``, ``label``, ``score``.
    """
    # Models write into their config; the next arm must find it as the user gave it.
    config = copy.deepcopy(config)
    train_data, valid_data, test_data = data_preparation(config, dataset, arm)
    seed, reproducibility = config["seed"], config["reproducibility"]
    init_seed(seed + config["local_rank"], reproducibility)
    with recbole_refusals(config):
        model = config.model_class(config, train_data.dataset).to(config["device"])
        trainer = make_trainer(config, model)
    _check_last_batch(config, model, train_data)
    checkpoint = checkpoints / f"{config['model']}-{arm.name}.pth"
    # An earlier run's, which would stand where this one finds no best epoch.
    checkpoint.unlink(missing_ok=True)
    trainer.saved_model_file = str(checkpoint)
    show_progress = config["show_progress"]
    outcome: dict[str, Any] = {}
    predictions = {}
    with _subnormals_as_zero():
        started = time.perf_counter()
        with recbole_refusals(config):
            trainer.fit(train_data, valid_data, saved=True, show_progress=show_progress)
        outcome["seconds"] = time.perf_counter() - started
        if not checkpoint.is_file():
            raise _no_best_epoch(config, arm, valid_data)
        for name, data in (("valid", valid_data), ("test", test_data)):
            # Where candidates are sampled at evaluation, every arm must meet the same ones.
            init_seed(seed, reproducibility)
            with recbole_refusals(config):
                reported = trainer.evaluate(data, show_progress=show_progress) or {}
            if "gauc" in reported:
                # RecBole's weighs users by positives, ours by rows: another quantity.
                reported["recbole_gauc"] = reported.pop("gauc")
            predictions[name] = trainer.predictions
            _check_scores(config, arm, name, predictions[name])
            outcome[name] = {
                **plain(dict(reported)),
                **_metrics(config, predictions[name], dataset.behaviours.time),
            }
    outcome["fields"] = model_fields(model)
    # The dataset itself has the data's own fields, its views for arms the profiles' besides.
    data = dataset.field2type
    outcome["profile_fields"] = [name for name in outcome["fields"] if name not in data]
    outcome["user_id"] = arm.user_id
    outcome["config"] = plain(config.final_config_dict)
    outcome["epochs"] = len(trainer.train_loss_dict)
    outcome["score_seconds"] = trainer.score_seconds
    outcome["parameters"] = sum(weights.numel() for weights in model.parameters())
    return outcome, predictions


def _check_last_batch(config: UIPConfig, model: torch.nn.Module, train_data: Any) -> None:
    """Refuse a batch of one row where a model normalises over the batch."""
    normalises = any(isinstance(part, torch.nn.BatchNorm1d) for part in model.modules())
    n_rows, times = train_data.sample_size, train_data.times
    if normalises and times == 1 and n_rows % train_data.step == 1:
        raise SettingsError(
            f"train_batch_size={config['train_batch_size']} leaves one of {n_rows} training rows "
            f"to the last batch, which {config['model']} cannot normalise: raise it by 1"
        )


def _check_scores(
    config: UIPConfig, arm: ArmSettings, split: str, predictions: dict[str, np.ndarray]
) -> None:
    """Refuse scores that are no numbers, which an AUC would rank above all others."""
    wrong = ~np.isfinite(predictions["score"]) if predictions else np.zeros(0, bool)
    if wrong.any():
        raise SettingsError(
            f"{config['model']}, arm {arm.name}: {wrong.sum()} of {len(wrong)} scores of the "
            f"{split} split are no numbers: lower learning_rate={config['learning_rate']}, or "
            f"leave out of numerical_features={config['numerical_features']} what has values far "
            "from all others"
        )


def _no_best_epoch(config: UIPConfig, arm: ArmSettings, valid_data: Any) -> SettingsError:
    about = ""
    if config["LABEL_FIELD"] in valid_data.dataset.inter_feat:
        labels = valid_data.dataset.inter_feat[config["LABEL_FIELD"]]
        about = f" ({int(labels.sum())} of its {len(labels)} labels are 1)"
    return SettingsError(
        f"{config['model']}, arm {arm.name}: valid_metric={config['valid_metric']} of the "
        f"validation split{about} was a number in no epoch, so none is the best: change "
        "eval_args.split, threshold or the filters, the learning rate, or choose epochs by another "
        "metric, such as valid_metric=LogLoss"
    )


@contextlib.contextmanager
def _subnormals_as_zero() -> Iterator[None]:
    """Numbers below 1e-38 count as 0 in this thread and those that it starts meanwhile.

    Weight decay drives unused weights there (AutoInt's attention on MovieLens, for example), and
    CPUs are many times slower with them: an epoch took two to three times as long (measured).
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _metrics(
    config: UIPConfig, predictions: dict[str, np.ndarray], times: np.ndarray | None
) -> dict[str, float]:
    """RecBole's AUC and LogLoss without its rounding, GAUC, list AUC and the rows of the last."""
    if not predictions:
        return {**dict.fromkeys(("auc", "logloss", "gauc", "list_auc"), math.nan), "list_rows": 0}
    user, label, score = (predictions[name] for name in ("user", "label", "score"))
    of_lists = group_aucs(predicted_lists(predictions, times), label, score)
    return {
        "auc": float(AUC(config).metric_info(score, label)),
        "logloss": float(LogLoss(config).metric_info(score, label)),
        "gauc": gauc(user, label, score),
        "list_auc": of_lists.mean,
        "list_rows": int(of_lists.n_rows.sum()),
    }


def predicted_lists(predictions: dict[str, np.ndarray], times: np.ndarray | None) -> np.ndarray:
    """:func:`~recbole_uip.bridge.metrics.lists` of predicted rows; ``times`` are of all rows."""
    return lists(predictions["user"], None if times is None else times[predictions["row"]])


def write_profiles(path: Path, dataset: UIPDataset) -> int:
    """Write every interaction with its profile fields, in the input's order after filtering.

    Returns
    -------
    int
        Bytes that the profile fields take in memory, in the smallest integers that hold them.
    """
    behaviours, profiles = dataset.behaviours, dataset.profiles
    columns: dict[str, Any] = {
        dataset.uid_field: dataset.id2token(dataset.uid_field, behaviours.user),
        dataset.iid_field: dataset.id2token(dataset.iid_field, behaviours.item),
    }
    if behaviours.time is not None:
        columns[dataset.time_field] = behaviours.time
    columns["split"] = pa.array(_SPLITS[behaviours.split]).dictionary_encode()
    if behaviours.liked is not None:
        columns[dataset.label_field] = behaviours.liked.astype(np.int8)
    size = 0
    for field in profiles.fields:
        values = field.values.astype(np.min_scalar_type(field.size))
        columns[field.name] = values
        size += values.nbytes
    with atomic_write(path) as file:
        pq.write_table(pa.table(columns), file)
    return size


def _write_bank(folder: Path, dataset: UIPDataset) -> str:
    """Write the bank; what its codes were fitted by."""
    users, items = (
        [str(token) for token in dataset.field2id_token[field]]
        for field in (dataset.uid_field, dataset.iid_field)
    )
    with bank_of_profiles(
        folder, dataset.profiles, dataset.behaviours, users, items, dataset.settings
    ) as bank:
        return bank.model.fit


def protocol(config: UIPConfig, dataset: UIPDataset) -> dict:
    """How the rows were split, labelled and given their history, in plain values."""
    settings, eval_args = dataset.settings, config["eval_args"]
    counts = np.bincount(dataset.behaviours.split, minlength=3)
    liked = dataset.behaviours.liked
    return {
        "split": plain(config["benchmark_filename"] or eval_args["split"]),
        "order": eval_args["order"],
        "group_by": eval_args["group_by"],
        "mode": plain(eval_args["mode"]),
        "rows": dict(zip(_SPLITS.tolist(), counts.tolist(), strict=True)),
        "threshold": plain(config["threshold"]),
        "liked_share": None if liked is None else float(liked.mean()),
        "train_neg_sample_args": plain(config["train_neg_sample_args"]),
        "time": settings.time,
        "history": settings.history,
        "refresh_seconds": settings.refresh,
    }

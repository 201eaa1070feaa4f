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

import json
import logging
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from recbole_uip.bank.export_atomic import SPLITS, Layout, read_layout
from recbole_uip.bridge.metrics import gauc
from recbole_uip.evidence.outside_fuxictr import EXPERIMENT, INSTALL
from recbole_uip.evidence.summary import BASELINE, format_summary, summarise
from recbole_uip.settings import SettingsError

__all__ = ["FinishedRun", "format_outside", "outside_check", "read_run", "write_inputs"]

logger = logging.getLogger(__name__)

DRIVER = Path(__file__).with_name("outside_fuxictr.py")
MODEL = "DeepFM"
LABEL = "label"
_COMPARED = ("auc", "logloss")
_PAD = "[PAD]"
# What RecBole calls it, and what FuxiCTR calls it.
_BUDGET = {
    "epochs": "epochs",
    "stopping_step": "early_stop_patience",
    "train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "embedding_size": "embedding_dim",
    "mlp_hidden_size": "hidden_units",
    "dropout_prob": "net_dropout",
}


@dataclass(frozen=True)
class FinishedRun:
    """What of a run another library needs.

    Attributes
    ----------
    results : dict
        The run's ``results.json``.
    layout : Layout
        Names of the columns of its ``profiles.parquet``.
    arms : dict of str to tuple of str
        Fields that each arm's model reads.
    kinds : dict of str to str
        RecBole's type of each of these fields: ``token``, ``token_seq`` or ``float``.
    table : pyarrow.Table
        Every row with its split, its label and these fields.
    budget : dict
        RecBole's settings that :data:`_BUDGET` names, the same for all arms.
    left_out : tuple of str
        Fields and arms of the run that cannot be had.
    """

    results: dict[str, Any]
    layout: Layout
    arms: dict[str, tuple[str, ...]]
    kinds: dict[str, str]
    table: pa.Table
    budget: dict[str, Any]
    left_out: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """RecBole's settings of the plain arm."""
        return self.results["models"][MODEL][BASELINE]["config"]


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
    versions = _versions(python)
    run = read_run(run_dir, data)
    seeds = [run.results["seed"]] if seeds is None else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds={seeds} must list at least one seed, each once")
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
                outcomes[arm] = {**_train(run, python, path, seed), "fields": run.arms[arm]}
            runs.append(_as_results(run, seed, f"{MODEL}, FuxiCTR {versions['fuxictr']}", outcomes))
    return {
        "dataset": run.results["dataset"],
        "runs": runs,
        "same_sign": _same_sign(runs),
        "rows": {split: _rows(run.table, split).num_rows for split in SPLITS},
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


def read_run(run_dir: str | os.PathLike, data: str | os.PathLike | None = None) -> FinishedRun:
    """Rows of a finished run with the fields that its arms read, side features joined.

    Tokens stand as they are in the files; what RecBole makes [PAD] is the token ``[PAD]`` of a
    side feature and the token 0 of a profile field. Missing numbers are the column's mean, as in
    RecBole.

    Raises
    ------
    SettingsError
        If the folder is none of a run, the run has no DeepFM, no plain arm, no labels or other
        candidates than its rows, or its dataset's side files are not there.
    """
    run_dir = Path(run_dir)
    results = _read_results(run_dir / "results.json")
    arms = results["models"].get(MODEL)
    if arms is None:
        raise SettingsError(
            f"{run_dir} has no {MODEL} but {', '.join(results['models'])}, and the outside check "
            f"compares {MODEL} with {MODEL}: run with --model={MODEL}"
        )
    if BASELINE not in arms or len(arms) < 2:
        raise SettingsError(
            f"{run_dir} has the arms {', '.join(arms)}: the check needs {BASELINE} and another one"
        )
    layout = read_layout(run_dir / "profiles.parquet")
    config = arms[BASELINE]["config"]
    mode = config["eval_args"]["mode"]
    if layout.label is None or {mode["valid"], mode["test"]} != {"labeled"}:
        raise SettingsError(
            f"{run_dir} has labels only of sampled candidates (eval_args.mode {mode}), which are "
            "not in its profiles.parquet: check a run with labels and mode labeled"
        )
    kept, left_out = _exported_arms(arms, config)
    wanted = {name for fields in kept.values() for name in fields}
    wanted -= {layout.user, layout.item, *layout.fields}
    kinds, columns, missing = _side_columns(
        Path(data or config["data_path"]), results["dataset"], config, layout, wanted
    )
    left_out += [f"field {name} (of interactions: not in profiles.parquet)" for name in missing]
    for reason in left_out:
        logger.warning("left out: %s", reason)
    table = pq.read_table(run_dir / "profiles.parquet")
    table = table.set_column(
        table.schema.names.index("split"), "split", table["split"].cast(pa.string())
    )
    _check_labels(table, layout)
    for name, (key, ids, values) in columns.items():
        place = pc.index_in(table[key], value_set=ids)
        table = table.append_column(name, values.take(place.combine_chunks()))
    for name, kind in kinds.items():
        index = table.schema.names.index(name)
        table = table.set_column(index, name, _filled(table[name], kind))
    own = dict.fromkeys((layout.user, layout.item, *layout.fields), "token")
    return FinishedRun(
        results,
        layout,
        {
            arm: tuple(name for name in fields if name not in missing)
            for arm, fields in kept.items()
        },
        own | kinds,
        table,
        {name: config[name] for name in _BUDGET},
        tuple(left_out),
    )


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no {path}: name the output folder of recbole-uip run") from None
    except ValueError as error:
        raise SettingsError(f"{path} is no results.json of recbole-uip run ({error})") from error
    if not isinstance(results, dict) or not {"dataset", "seed", "models"} <= set(results):
        raise SettingsError(f"{path} is no results.json of recbole-uip run")
    return results


def _exported_arms(
    arms: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """Fields of the arms whose tokens are in ``profiles.parquet``, and the arms whose are not."""
    described = config.get("uip_arms") or {}
    kept, left_out = {}, []
    for name, outcome in arms.items():
        section = described.get(name) or {}
        control, values = section.get("control", "none"), section.get("values", "tokens")
        if control != "none" or values != "tokens":
            what = f"control {control}" if control != "none" else f"values {values}"
            left_out.append(f"arm {name} ({what}: not in profiles.parquet)")
        else:
            kept[name] = outcome["fields"]
    return kept, left_out


def _side_columns(
    folder: Path, dataset: str, config: Mapping[str, Any], layout: Layout, wanted: set[str]
) -> tuple[dict[str, str], dict[str, tuple[str, pa.Array, pa.Array]], list[str]]:
    """Types and values of the ``wanted`` fields of the dataset's ``.user`` and ``.item`` files.

    Returns
    -------
    kinds : dict of str to str
    columns : dict of str to (str, Array, Array)
        Name of the column that is joined on, its values in the file, and the field's.
    missing : list of str
        Fields that are the interactions' own.
    """
    if wanted and not folder.is_dir():
        raise SettingsError(
            f"the run's dataset is not in {folder}, and its arms read {', '.join(sorted(wanted))} "
            "from there: go to the folder of the run, or say --data=FOLDER"
        )
    separator = config.get("field_separator") or "\t"
    encoding = config.get("encoding") or "utf-8"
    kinds: dict[str, str] = {}
    columns: dict[str, tuple[str, pa.Array, pa.Array]] = {}
    for suffix, key in (("user", layout.user), ("item", layout.item)):
        path = folder / f"{dataset}.{suffix}"
        types = _header(path, separator, encoding)
        # A type that no list of FuxiCTR's has, float_seq, is refused below with its name.
        found = [name for name in types if name in wanted - set(kinds)]
        if not found:
            continue
        frame = pd.read_csv(
            path,
            sep=separator,
            usecols=[f"{name}:{types[name]}" for name in (key, *found)],
            dtype={
                f"{name}:{types[name]}": np.float64 if types[name] == "float" else object
                for name in (key, *found)
            },
            encoding=encoding,
            engine="c" if len(separator) == 1 else "python",
        )
        frame.columns = [column.partition(":")[0] for column in frame.columns]
        frame = frame.drop_duplicates(key)
        ids = pa.array(frame[key], pa.string())
        for name in found:
            kinds[name] = types[name]
            arrow = pa.float64() if types[name] == "float" else pa.string()
            columns[name] = key, ids, pa.array(frame[name], arrow, from_pandas=True)
    rest = sorted(wanted - set(kinds))
    of_rows = {
        name
        for path in sorted(folder.glob(f"{dataset}*.inter"))
        for name in _header(path, separator, encoding)
    }
    if unknown := [name for name in rest if name not in of_rows]:
        raise SettingsError(
            f"the run's arms read {', '.join(unknown)}, which no file in {folder} has: name the "
            "folder of the run's dataset with --data=FOLDER"
        )
    if odd := [name for name, kind in kinds.items() if kind not in ("token", "token_seq", "float")]:
        raise SettingsError(
            f"FuxiCTR has no features like {odd[0]} ({kinds[odd[0]]}): run without it in load_col"
        )
    return kinds, columns, rest


def _header(path: Path, separator: str, encoding: str) -> dict[str, str]:
    """Types of an atomic file's columns by name; empty without the file."""
    if not path.is_file():
        return {}
    with path.open(encoding=encoding) as lines:
        columns = lines.readline().rstrip("\r\n").split(separator)
    return {name: kind for name, _, kind in (column.partition(":") for column in columns)}


def _filled(column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray:
    if kind == "float":
        return pc.fill_null(column, pc.mean(column).as_py() or 0.0)
    return pc.fill_null(column, _PAD if kind == "token" else "")


def _check_labels(table: pa.Table, layout: Layout) -> None:
    for split in SPLITS:
        if len(pc.unique(_rows(table, split)[layout.label])) < 2:
            raise SettingsError(
                f"the {split} split has no rows of one of the two labels, so it has no AUC"
            )


def _rows(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


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
    splits = {split: _rows(run.table, split) for split in SPLITS}
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
        _write_yaml(path / "dataset_config.yaml", {arm: _dataset_config(run, fields, path)})
        _write_yaml(path / "model_config.yaml", {EXPERIMENT: _model_config(run, arm, path)})
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


def _model_config(run: FinishedRun, arm: str, path: Path) -> dict[str, Any]:
    budget = {_BUDGET[name]: value for name, value in run.budget.items()}
    # Their regularizer x adds x/2 of the squared norm to the loss: the same as a decay of x.
    decay = float(budget.pop("weight_decay"))
    return {
        "model": MODEL,
        "dataset_id": arm,
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
    """FuxiCTR's AUC and LogLoss, and GAUC of its scores."""
    for name in ("result.json", "scores.npz"):
        (folder / name).unlink(missing_ok=True)
    finished = _run_driver(python, str(folder), str(seed))
    if finished.returncode:
        raise RuntimeError(f"FuxiCTR failed:\n{finished.stderr[-4000:]}")
    outcome = json.loads((folder / "result.json").read_text())
    del outcome["versions"]
    with np.load(folder / "scores.npz") as scores:
        for split in ("valid", "test"):
            rows = _rows(run.table, split)
            users = rows[run.layout.user].combine_chunks().dictionary_encode().indices
            value = gauc(users.to_numpy(), rows[run.layout.label].to_numpy(), scores[split])
            outcome[split]["gauc"] = None if math.isnan(value) else value
    return outcome


def _as_results(run: FinishedRun, seed: int, model: str, arms: dict[str, Any]) -> dict[str, Any]:
    return {"dataset": run.results["dataset"], "seed": seed, "models": {model: arms}}


def _cells(runs: Sequence[dict]) -> list:
    """Means and differences of the test split; a metric that JSON has as null is NaN."""
    known = [
        {
            **each,
            "models": {
                model: {
                    arm: {
                        "test": {
                            name: math.nan if value is None else value
                            for name, value in outcome["test"].items()
                            if name in (*_COMPARED, "gauc")
                        }
                    }
                    for arm, outcome in arms.items()
                }
                for model, arms in each["models"].items()
            },
        }
        for each in runs
    ]
    return summarise(known)


def _same_sign(runs: Sequence[dict]) -> dict[str, dict[str, bool]]:
    """Whether both libraries' mean differences from plain have the same sign, by arm and metric."""
    changes: dict[str, list[dict[str, float]]] = {}
    for cell in _cells(runs):
        if cell.difference:
            change = {name: cell.difference[name][0] for name in _COMPARED}
            changes.setdefault(cell.arm, []).append(change)
    return {
        arm: {name: len({np.sign(change[name]) for change in both}) == 1 for name in _COMPARED}
        for arm, both in changes.items()
    }

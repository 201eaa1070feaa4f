"""A finished run as another library can take it: rows, fields, splits, budget."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recbole_uip.bank.export_atomic import SPLITS, Layout, read_layout
from recbole_uip.bridge.atomic_files import read_atomic_file
from recbole_uip.evidence.summary import BASELINE, read_results_file
from recbole_uip.settings import ArmSettings, SettingsError
from recbole_uip.texts import atomic_header

__all__ = ["BUDGET", "MODEL", "FinishedRun", "read_run"]

MODEL = "DeepFM"
# What RecBole calls it, and what FuxiCTR calls it.
BUDGET = {
    "epochs": "epochs",
    "stopping_step": "early_stop_patience",
    "train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "embedding_size": "embedding_dim",
    "mlp_hidden_size": "hidden_units",
    "dropout_prob": "net_dropout",
}
_PAD = "[PAD]"


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
        RecBole's settings that :data:`BUDGET` names, the same for all arms.
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

    def rows(self, split: str) -> pa.Table:
        """Rows of a split, in the order of ``profiles.parquet``."""
        return self.table.filter(pc.equal(self.table["split"], split))


@dataclass(frozen=True)
class _SideField:
    """A field of the dataset's ``.user`` or ``.item`` file.

    Attributes
    ----------
    kind : str
        RecBole's type.
    key : str
        Name of the column that it is joined on.
    ids : Array
        Values of that column in the file, each once.
    values : Array
        The field's values beside them.
    missing : str or float
        What stands for a value that is not there.
    """

    kind: str
    key: str
    ids: pa.Array
    values: pa.Array
    missing: str | float

    def of(self, table: pa.Table) -> pa.ChunkedArray:
        """The field in each row of ``table``."""
        place = pc.index_in(table[self.key], value_set=self.ids)
        return pc.fill_null(pc.take(self.values, place), self.missing)


def read_run(run_dir: str | os.PathLike, data: str | os.PathLike | None = None) -> FinishedRun:
    """Rows of a finished run with the fields that its arms read, side features joined.

    Tokens stand as they are in the files; what RecBole makes [PAD] is the token ``[PAD]`` of a
    side feature and the token 0 of a profile field. As in RecBole, a missing number is the mean
    of the file's, in which a user or item counts once, and a missing sequence is empty.

    Parameters
    ----------
    run_dir : path-like
        Output folder of ``recbole-uip run``.
    data : path-like, optional
        Folder of the run's dataset; where the run says that it was, by default.

    Raises
    ------
    SettingsError
        If the folder is none of a run, the run has no DeepFM trained by adam, no plain arm and
        other one, no labels, or other candidates than its rows, or its dataset's side files are
        not there.
    """
    run_dir = Path(run_dir)
    results = read_results_file(run_dir / "results.json")
    arms = results["models"].get(MODEL)
    if arms is None:
        raise SettingsError(
            f"{run_dir} has no {MODEL} but {', '.join(results['models'])}, and the outside check "
            f"compares {MODEL} with {MODEL}: run with --model={MODEL}"
        )
    if BASELINE not in arms:
        raise SettingsError(
            f"{run_dir} has the arms {', '.join(arms)}: the check needs {BASELINE} to compare with"
        )
    config = arms[BASELINE]["config"]
    kept, left_out = _exported_arms(arms, config)
    if BASELINE not in kept or len(kept) < 2:
        raise SettingsError(
            f"{run_dir} has the arms {', '.join(arms)}: the check needs {BASELINE} and another one "
            "whose tokens are in profiles.parquet, with control none and values tokens"
        )
    layout = read_layout(run_dir / "profiles.parquet")
    _check_protocol(run_dir, config, layout)
    wanted = {name for fields in kept.values() for name in fields}
    wanted -= {layout.user, layout.item, *layout.fields}
    folder = Path(data or config["data_path"])
    side, missing = _side_fields(folder, results["dataset"], config, layout, wanted)
    left_out += [f"field {name} (of interactions: not in profiles.parquet)" for name in missing]
    table = pq.read_table(run_dir / "profiles.parquet")
    table = table.set_column(
        table.schema.names.index("split"), "split", table["split"].cast(pa.string())
    )
    for name, field in side.items():
        table = table.append_column(name, field.of(table))
    run = FinishedRun(
        results,
        layout,
        {
            arm: tuple(name for name in fields if name not in missing)
            for arm, fields in kept.items()
        },
        dict.fromkeys((layout.user, layout.item, *layout.fields), "token")
        | {name: field.kind for name, field in side.items()},
        table,
        {name: config[name] for name in BUDGET},
        tuple(left_out),
    )
    for split in SPLITS:
        if len(pc.unique(run.rows(split)[layout.label])) < 2:
            raise SettingsError(
                f"the {split} split has no rows of one of the two labels, so it has no AUC"
            )
    return run


def _exported_arms(
    arms: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """Fields of the arms whose tokens are in ``profiles.parquet``, and the arms whose are not."""
    described = config.get("uip_arms") or {}
    kept, left_out = {}, []
    for name, outcome in arms.items():
        section = described.get(name) or {}
        chosen = {key: section[key] for key in ("control", "values") if key in section}
        if ArmSettings(name, **chosen).served:
            kept[name] = outcome["fields"]
        else:
            what = ", ".join(f"{key} {value}" for key, value in chosen.items())
            left_out.append(f"arm {name} ({what}: not in profiles.parquet)")
    return kept, left_out


def _check_protocol(run_dir: Path, config: Mapping[str, Any], layout: Layout) -> None:
    mode = config["eval_args"]["mode"]
    if layout.label is None or {mode["valid"], mode["test"]} != {"labeled"}:
        raise SettingsError(
            f"{run_dir} has labels only of sampled candidates (eval_args.mode {mode}), which are "
            "not in its profiles.parquet: check a run with labels and mode labeled"
        )
    # Only there is a penalty in the loss, which FuxiCTR has, the same as RecBole's weight decay.
    if config["learner"].lower() != "adam":
        raise SettingsError(
            f"{run_dir} was trained with learner={config['learner']}, and the check trains with "
            "adam: run with --learner=adam"
        )


def _side_fields(
    folder: Path, dataset: str, config: Mapping[str, Any], layout: Layout, wanted: set[str]
) -> tuple[dict[str, _SideField], list[str]]:
    """The ``wanted`` fields of the side files, and the names of those that interactions have."""
    if wanted and not folder.is_dir():
        raise SettingsError(
            f"the run's dataset is not in {folder}, and its arms read {', '.join(sorted(wanted))} "
            "from there: go to the folder of the run, or say --data=FOLDER"
        )
    separator = config.get("field_separator") or "\t"
    encoding = config.get("encoding") or "utf-8"
    side: dict[str, _SideField] = {}
    for suffix, key in (("user", layout.user), ("item", layout.item)):
        path = folder / f"{dataset}.{suffix}"
        types = _header(path, separator, encoding)
        kinds = {name: types[name] for name in types if name in wanted - set(side)}
        for name, kind in kinds.items():
            if kind not in ("token", "token_seq", "float"):
                raise SettingsError(
                    f"FuxiCTR has no features like {name} ({kind}): run without it in load_col"
                )
        if kinds:
            side |= _read_side(path, separator, encoding, key, kinds)
    rest = sorted(wanted - set(side))
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
    return side, rest


def _header(path: Path, separator: str, encoding: str) -> dict[str, str]:
    """Types of an atomic file's columns by name; empty without the file."""
    if not path.is_file():
        return {}
    columns = [column.partition(":") for column in atomic_header(path, separator, encoding)]
    return {name: kind for name, _, kind in columns}


def _read_side(
    path: Path, separator: str, encoding: str, key: str, kinds: Mapping[str, str]
) -> dict[str, _SideField]:
    frame, _ = read_atomic_file(str(path), lambda name: name in (key, *kinds), separator, encoding)
    frame = frame.drop_duplicates(key)
    ids = pa.array(frame[key], pa.string())
    side = {}
    for name, kind in kinds.items():
        arrow = pa.float64() if kind == "float" else pa.string()
        values = pa.array(frame[name], arrow, from_pandas=True)
        missing: str | float = {"token": _PAD, "token_seq": ""}.get(kind, 0.0)
        if kind == "float" and (mean := pc.mean(values).as_py()) is not None:
            missing = mean
        side[name] = _SideField(kind, key, ids, values, missing)
    return side

"""RecBole's atomic files with profile fields in them: unmodified RecBole trains on them."""

from __future__ import annotations

import codecs
import contextlib
import csv
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from recbole_uip.bank.store import BankError, check_folder
from recbole_uip.files import atomic_write
from recbole_uip.texts import atomic_header

__all__ = ["SPLITS", "Layout", "atomic_files", "read_layout"]

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
BATCH_ROWS = 100_000
#: RecBole's settings that name columns: those that are not in the files are left out of them.
OF_COLUMNS = ("normalize_field", "numerical_features", "discretization")
_MATCH = re.compile(r"_match(_[^_]+)?$")


@dataclass(frozen=True)
class Layout:
    """Names of the columns of a ``profiles.parquet``.

    Attributes
    ----------
    user, item : str
    time, label : str or None
        None where the data have none.
    fields : tuple of str
        Profile fields.
    """

    user: str
    item: str
    time: str | None
    label: str | None
    fields: tuple[str, ...]

    @property
    def match_fields(self) -> tuple[str, ...]:
        """Fields that depend on the row's item, by their names."""
        return tuple(name for name in self.fields if _MATCH.search(name))


def read_layout(profiles_parquet: str | os.PathLike) -> Layout:
    """Columns of the main job's ``profiles.parquet``; reads its footer alone.

    Raises
    ------
    BankError
        If the file is missing, damaged, or of another kind.
    """
    path = Path(profiles_parquet)
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise BankError(
            f"{path} cannot be read as Parquet ({error}): give the profiles.parquet in the output "
            "folder of `recbole-uip run`"
        ) from error
    # The columns before "split" are user, item and maybe the time; after it, maybe the label.
    at = names.index("split") if "split" in names else -1
    label = at + 1 < len(names) and not names[at + 1].startswith("uip_")
    fields = names[at + 1 + label :]
    if at not in (2, 3) or not all(name.startswith("uip_") for name in fields):
        raise BankError(
            f"{path} has the columns {', '.join(names)}, which is no profiles.parquet of "
            "`recbole-uip run`: give the one in its output folder"
        )
    return Layout(
        names[0],
        names[1],
        names[2] if at == 3 else None,
        names[at + 1] if label else None,
        tuple(fields),
    )


def atomic_files(
    profiles_parquet: str | os.PathLike,
    dataset_folder: str | os.PathLike,
    name: str,
    output: str | os.PathLike,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the dataset ``name`` for RecBole, with every profile field as a token field.

    In ``<output>/<name>/`` come ``<name>.train.inter``, ``.valid.inter`` and ``.test.inter``,
    whose rows are those of the run and in its split, copies of the dataset's ``.user`` and
    ``.item`` files, and last ``<name>.yaml``, which has RecBole take the split from the files
    (``benchmark_filename``) and filter no more. So plain RecBole sees the same rows::

        run_recbole(model="DeepFM", dataset=name, config_file_list=["<name>.yaml"])

    A profile of nothing ([PAD], token 0) is an empty cell, which RecBole numbers 0, its own
    [PAD]. A written "0" would be a token beside the [PAD] that RecBole adds in any case. Other
    tokens keep their text; RecBole numbers them in the order in which it meets them.

    Two things cannot be said in atomic files. RecBole's models always read the user ID, so arms
    that drop it cannot be had. And where RecBole samples negatives, it copies the positive row
    with another item: a match field, copied with it, would give the label away. So match fields
    are left out of data without labels. Columns of the ``.inter`` file that are not in
    ``profiles.parquet`` are left out too.

    Parameters
    ----------
    profiles_parquet : path-like
        Of the main job.
    dataset_folder : path-like
        Where the run read its ``.user`` and ``.item`` files.
    name : str
        Of the new dataset.
    output : path-like
        RecBole's ``data_path``.
    settings : mapping, optional
        More RecBole settings for the YAML file, such as ``load_col`` for ``user`` and ``item``
        (without it, all columns become features) or ``train_neg_sample_args``. Files are
        written with its ``field_separator`` and ``encoding``.

    Returns
    -------
    Path
        The YAML file.

    Raises
    ------
    BankError
        If a file is missing or is no ``profiles.parquet``, or ``name`` or ``output`` can be no
        folder's.
    """
    if not name or name == ".." or Path(name).name != name:
        raise BankError(f"name={name!r} must be the name of a folder in output, without a path")
    check_folder(Path(output, name))
    settings = dict(settings or {})
    layout = read_layout(profiles_parquet)
    source, folder = Path(dataset_folder), Path(output, name)
    if not source.is_dir():
        raise BankError(f"dataset_folder={str(source)!r} is no folder: give that of the dataset")
    if folder.exists() and folder.samefile(source):
        raise BankError(
            f"name={name!r} would write into the dataset's own folder {source}: give another name "
            "or output"
        )
    separator = settings.get("field_separator") or "\t"
    encoding = settings.get("encoding") or "utf-8"
    fields = list(layout.fields)
    if layout.label is None and layout.match_fields:
        fields = [field for field in fields if field not in layout.match_fields]
        logger.warning(
            "the data have no labels, so RecBole samples negatives and would copy match fields to "
            "them: left out %s",
            ", ".join(layout.match_fields),
        )
    types = {layout.user: "token", layout.item: "token"}
    types |= {column: "float" for column in (layout.time, layout.label) if column is not None}
    types |= dict.fromkeys(fields, "token")
    _write_interactions(Path(profiles_parquet), folder / name, types, fields, separator, encoding)
    given = settings.pop("load_col", None) or {}
    lost = [column for column in given.get("inter") or () if column not in types]
    if lost:
        logger.warning(
            "%s: columns of the interactions that profiles.parquet has not, so they are left out: "
            "plain RecBole does not read them, and the run did", ", ".join(lost),
        )  # fmt: skip
    load_col = {"inter": list(types)}
    load_col |= _copy_side_files(source, folder / name, given, separator, encoding)
    columns = set().union(*load_col.values())
    for key in OF_COLUMNS:
        if isinstance(given := settings.get(key), list):
            settings[key] = [name for name in given if name in columns]
        elif given:
            settings[key] = {name: value for name, value in given.items() if name in columns}
    config = {"data_path": str(output), **_recbole_config(layout, load_col), **settings}
    path = folder / f"{name}.yaml"
    with atomic_write(path, "w") as file:
        yaml.safe_dump(config, file, sort_keys=False, allow_unicode=True)
    return path


def _copy_side_files(
    source: Path, stem: Path, given: Mapping[str, Any], separator: str, encoding: str
) -> dict[str, list[str]]:
    """Copy the ``.user`` and ``.item`` files; the columns of each that RecBole is to load."""
    load_col = {}
    for kind in ("user", "item"):
        file = _side_file(source, kind)
        if file is None:
            continue
        with atomic_write(stem.with_name(f"{stem.name}.{kind}")) as copy, file.open("rb") as old:
            shutil.copyfileobj(old, copy)
        if not given:
            header = atomic_header(file, separator, encoding)
            load_col[kind] = [column.partition(":")[0] for column in header]
        elif given.get(kind):
            load_col[kind] = list(given[kind])
    return load_col


def _recbole_config(layout: Layout, load_col: Mapping[str, list[str]]) -> dict[str, Any]:
    """RecBole's settings for rows that are filtered, labelled and split already."""
    labelled = layout.label is not None
    return {
        "USER_ID_FIELD": layout.user,
        "ITEM_ID_FIELD": layout.item,
        **({} if layout.time is None else {"TIME_FIELD": layout.time}),
        **({"LABEL_FIELD": layout.label} if labelled else {}),
        "threshold": None,
        "load_col": dict(load_col),
        "benchmark_filename": list(SPLITS),
        "eval_args": {
            # RecBole wants all four, and with benchmark_filename reads the mode alone.
            "split": {"RS": [0.8, 0.1, 0.1]},
            "order": "RO",
            "group_by": None,
            "mode": "labeled" if labelled else "uni10",
        },
        "train_neg_sample_args": None if labelled else {"distribution": "uniform", "sample_num": 1},
        "metrics": ["AUC", "LogLoss"],
        "valid_metric": "AUC",
    }


def _write_interactions(
    source: Path,
    stem: Path,
    types: Mapping[str, str],
    fields: list[str],
    separator: str,
    encoding: str,
) -> None:
    header = separator.join(f"{column}:{kind}" for column, kind in types.items()) + "\n"
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(atomic_write(stem.with_name(f"{stem.name}.{split}.inter")))
            for split in SPLITS
        }
        # One encoder a file: some encodings begin with a mark, once.
        encode = {split: codecs.getincrementalencoder(encoding)().encode for split in SPLITS}
        for split, file in files.items():
            file.write(encode[split](header))
        wanted = [*types, "split"]
        for batch in pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=wanted):
            table = pa.table(batch)
            for field in fields:
                known = pc.greater(table[field], 0)
                # As text: pandas would make floats of integers with gaps.
                text = pc.if_else(known, table[field].cast(pa.string()), None)
                table = table.set_column(table.schema.names.index(field), field, text)
            for split, file in files.items():
                part = table.filter(pc.equal(table["split"], split)).select(list(types))
                text = part.to_pandas().to_csv(
                    sep=separator, header=False, index=False, quoting=csv.QUOTE_MINIMAL
                )
                file.write(encode[split](text))


def _side_file(folder: Path, kind: str) -> Path | None:
    """The folder's ``.user`` or ``.item`` file; None if it has none."""
    named = folder / f"{folder.name}.{kind}"
    if named.is_file():
        return named
    found = sorted(folder.glob(f"*.{kind}"))
    if len(found) > 1:
        raise BankError(
            f"{folder} has several .{kind} files ({', '.join(file.name for file in found)}): "
            f"leave one, or call it {named.name}"
        )
    return found[0] if found else None

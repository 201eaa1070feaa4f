"""What a run leaves for serving, and its reading: plain data, checked by checksums.

A run leaves, beside its checkpoints, what a model needs besides weights, as plain data:

=================================  ============================================================
``serving/features.safetensors``   features of users and items, row by row as the models read
                                   them (normalised, discretised, filled); row 0 is [PAD]
``serving/tokens.parquet``         vocabulary of every token field, in the order of the ids
``serving/<MODEL>-<ARM>.json``     fields of one model, how context values become features,
                                   and the SHA-256 of its checkpoint and of the files above
=================================  ============================================================

The checksums tell when checkpoints and features are of two runs, which would score with the
wrong rows and no error. Nothing here is unpickled, and no text of a file is run as code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recbole.utils import FeatureType
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from recbole_uip.files import atomic_write, sha256_of
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from recbole_uip.bridge.config import UIPConfig
    from recbole_uip.bridge.dataset import UIPDataset

__all__ = [
    "CODE",
    "FEATURES",
    "MATCH",
    "TOKENS",
    "check_file",
    "read_description",
    "read_features",
    "read_tokens",
    "write_serving",
]

FORMAT = 2
#: Files of the run's folder that all its models share.
FEATURES, TOKENS = "serving/features.safetensors", "serving/tokens.parquet"
#: A field is a code of the user, a match of the user and the item, or no profile field.
CODE, MATCH = "code", "match"


def write_serving(
    output: Path, dataset: UIPDataset, configs: Sequence[UIPConfig], fit: str | None
) -> str:
    """Write what serving the models of a finished run needs besides their weights.

    Parameters
    ----------
    output : Path
        The run's folder, where its checkpoints lie.
    dataset : UIPDataset
        Built, with its profiles.
    configs : sequence of UIPConfig
        One for each model.
    fit : str or None
        :attr:`ProfileModel.fit` of the run's bank; None without one.

    Returns
    -------
    str
        The folder that the files are in.
    """
    split = dataset.splits[0]
    profile = {field.name: field for field in split.profiles.fields}
    tensors = {
        f"{side}.{name}": column.contiguous()
        for side in ("user", "item")
        if (feat := getattr(split, f"{side}_feat")) is not None
        for name, column in feat.interaction.items()
        if name not in profile
    }
    with atomic_write(output / FEATURES) as file:
        file.write(save(tensors))
    tokens = {
        name: [str(token) for token in vocabulary]
        for name, vocabulary in split.field2id_token.items()
        if name not in profile and name in split.field2type
    }
    field = np.repeat(np.array([*tokens], dtype=object), [len(each) for each in tokens.values()])
    with atomic_write(output / TOKENS) as file:
        columns = {
            "field": pa.array(field, pa.string()).dictionary_encode(),
            "token": pa.array([token for each in tokens.values() for token in each], pa.string()),
        }
        pq.write_table(pa.table(columns), file)
    shared = {name: sha256_of(output / name) for name in (FEATURES, TOKENS)}
    for config in configs:
        for arm in filter(lambda arm: arm.served, config.uip.arms):
            name = f"{config['model']}-{arm.name}"
            checkpoint = f"checkpoints/{name}.pth"
            described = {
                "format": FORMAT,
                "fit": fit,
                "user_field": dataset.uid_field,
                "item_field": dataset.iid_field,
                "time_field": dataset.time_field,
                "fields": _describe_fields(split.select(arm, config), profile),
                "files": {**shared, checkpoint: sha256_of(output / checkpoint)},
            }
            with atomic_write(output / "serving" / f"{name}.json", "w") as file:
                file.write(json.dumps(described, indent=1, allow_nan=False) + "\n")
    return str(output / "serving")


def _describe_fields(view: UIPDataset, profile: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of one model's view, in the order in which its weights know them."""
    described = []
    for name in view.fields():
        source, ftype = view.field2source[name], view.field2type[name]
        field = {
            "name": name,
            "type": ftype.value,
            "source": getattr(source, "value", source),
            "size": int(view.num(name)),
            "length": int(view.field2seqlen[name]),
        }
        if name in profile:
            field["profile"] = MATCH if profile[name].kind == "match" else CODE
        elif ftype == FeatureType.FLOAT and np.isfinite(_range(view, name)).all():
            field["float"] = _describe_float(view, name)
        described.append(field)
    return described


def _range(view: UIPDataset, name: str) -> tuple[float, ...]:
    """Lowest, highest and mean value; NaN for fields of users and items."""
    # A dataset that an older version has saved lacks them all.
    return getattr(view, "float_ranges", {}).get(name, (np.nan,))


def _describe_float(view: UIPDataset, name: str) -> dict[str, Any]:
    config = view.config
    low, high, mean = view.float_ranges[name]
    discretised = (config["discretization"] or {}).get(name)
    return {
        "low": low,
        "high": high,
        # What RecBole puts in place of a missing value.
        "fill": mean,
        "normalised": bool(config["normalize_all"] or name in (config["normalize_field"] or ())),
        "method": discretised and discretised["method"],
        "buckets": discretised and discretised.get("bucket"),
    }


def read_description(output: Path, model: str, arm: str) -> dict[str, Any]:
    """What ``serving/<MODEL>-<ARM>.json`` of a run's folder says.

    Raises
    ------
    SettingsError
        If it is not there, damaged, or of another format.
    """
    path = output / "serving" / f"{model}-{arm}.json"
    if "/" in model or "/" in arm or not path.is_file():
        there = sorted(file.stem for file in (output / "serving").glob("*.json"))
        raise SettingsError(
            f"model={model!r} and arm={arm!r} of {output} cannot be served, for {path} is not "
            f"there: {'give one of ' + ', '.join(there) if there else 'run recbole-uip run first'}"
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        version = described["format"]
        known = version != FORMAT or {"files", "fields", "fit", "user_field"} <= described.keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}): train again") from error
    if version != FORMAT or not known:
        raise SettingsError(
            f"{path} has the format {version!r}, and this recbole-uip reads {FORMAT}: train again"
        )
    return described


def check_file(output: Path, name: str, file: str, expected: str | None) -> None:
    """Refuse a file that is missing or has another SHA-256 than ``expected``."""
    path = output / file
    if not path.is_file():
        raise SettingsError(f"{path} is missing, and {name} needs it: train again")
    if sha256_of(path) != expected:
        raise SettingsError(
            f"{path} is not the file that serving/{name}.json was written with: it is damaged, or "
            "of another run into the same folder. Train again"
        )


def read_features(path: Path, device: Any) -> dict[str, torch.Tensor]:
    """Features of users and items, each named ``<side>.<field>``."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, struct.error) as error:
        raise SettingsError(f"{path} cannot be read ({error}): train again") from error


def read_tokens(path: Path) -> dict[str, list[str]]:
    """Vocabulary of every token field, in the order of the ids."""
    table = pq.read_table(path)
    tokens: dict[str, list[str]] = {}
    for field, token in zip(table["field"].to_pylist(), table["token"].to_pylist(), strict=True):
        tokens.setdefault(field, []).append(token)
    return tokens

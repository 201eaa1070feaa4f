"""Click probabilities from a trained checkpoint and the bank, for users RecBole never saw too.

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
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recbole.data.interaction import Interaction
from recbole.model.context_aware_recommender import kd_dagfm
from recbole.utils import FeatureSource, FeatureType
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bridge.config import UIPConfig, restore_config
from recbole_uip.bridge.storage import load_checkpoint
from recbole_uip.files import atomic_write, sha256_of
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from recbole_uip.bridge.dataset import UIPDataset

__all__ = ["Scorer", "model_fields", "write_serving"]

FORMAT = 1
FEATURES, TOKENS = "serving/features.safetensors", "serving/tokens.parquet"
BANK = "bank"
# Rows that go through the model at a time.
BATCH_ROWS = 8192
# A field is a code of the user, a match of the user and the item, or no profile field.
CODE, MATCH = "code", "match"

_SOURCES = {source.value: source for source in FeatureSource}
_TYPES = {ftype.value: ftype for ftype in FeatureType}


# --- writing -------------------------------------------------------------------------------


def write_serving(output: Path, dataset: UIPDataset, configs: Sequence[UIPConfig]) -> str:
    """Write what serving the models of a finished run needs besides their weights.

    Parameters
    ----------
    output : Path
        The run's folder, where its checkpoints lie.
    dataset : UIPDataset
        Built, with its profiles.
    configs : sequence of UIPConfig
        One for each model.

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


# --- reading -------------------------------------------------------------------------------


class Scorer:
    """Click probabilities of a trained model, of the bank's profiles as they are now.

    A user is known to the model (its user ID and features), to the bank (its profile), to both
    or to neither; what is not known is [PAD], as RecBole has it in row 0. So is an item.

    It is safe to call :meth:`predict` in another thread than the bank's; all else reads the bank.

    Attributes
    ----------
    model : torch.nn.Module
        RecBole's model.
    name : str
        Such as ``DeepFM-uip``.
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        described: Mapping[str, Any],
        features: Mapping[str, torch.Tensor],
        tokens: Mapping[str, Sequence[str]],
        bank: FeatureBank | None,
    ) -> None:
        self.name, self.model = name, model
        self._user, self._item = described["user_field"], described["item_field"]
        self._time = described["time_field"]
        self._id_of = {
            field: {token: number for number, token in enumerate(vocabulary)}
            for field, vocabulary in tokens.items()
        }
        read = {*model_fields(model)}
        fields = [field for field in described["fields"] if field["name"] in read]
        self._codes = [field["name"] for field in fields if field.get("profile") == CODE]
        self._matches = [field["name"] for field in fields if field.get("profile") == MATCH]
        self._user_features, self._item_features = (
            {
                name: features[f"{side}.{name}"]
                for name in sorted(read - {key})
                if f"{side}.{name}" in features
            }
            for side, key in (("user", self._user), ("item", self._item))
        )
        given = {self._user, self._item, *self._user_features, *self._item_features}
        given |= {*self._codes, *self._matches}
        self._context = {field["name"]: field for field in fields if field["name"] not in given}
        self._sizes = {field["name"]: field["size"] for field in fields if "profile" in field}
        self.bank = bank

    @classmethod
    def load(
        cls,
        output_dir: str | os.PathLike,
        model: str = "DeepFM",
        arm: str = "uip",
        *,
        bank: FeatureBank | None = None,
        device: str | torch.device = "cpu",
    ) -> Scorer:
        """Load what ``run_recbole_uip`` has left in ``output_dir``.

        Parameters
        ----------
        output_dir : path-like
            The run's ``uip_output``.
        model, arm : str
        bank : FeatureBank, optional
            Where profiles come from; by default ``output_dir/bank``, opened for reading.
        device : str or torch.device
            Where the model computes.

        Raises
        ------
        SettingsError
            If the run, the model or the arm is not there, files are of two runs or damaged, or
            the bank lacks a field that the model reads.
        """
        output, name = Path(output_dir), f"{model}-{arm}"
        described = _read_description(output, model, arm)
        checkpoint = f"checkpoints/{name}.pth"
        for file in (FEATURES, TOKENS, checkpoint):
            _check_file(output, name, file, described["files"].get(file))
        saved = load_checkpoint(output / checkpoint, device)
        network = _make_model(model, saved, described["fields"], torch.device(device))
        if bank is None and any("profile" in field for field in described["fields"]):
            bank = FeatureBank.open(output / BANK)
        return cls(
            name,
            network,
            described,
            _read_features(output / FEATURES, device),
            _read_tokens(output / TOKENS),
            bank,
        )

    @property
    def bank(self) -> FeatureBank | None:
        """Where profiles come from; may be replaced by another state of the same bank.

        Raises
        ------
        SettingsError
            If it lacks fields that the model was trained with.
        """
        return self._bank

    @bank.setter
    def bank(self, bank: FeatureBank | None) -> None:
        # A plain model has no sizes to compare, and may have no bank.
        fields = bank.model.encoder.fields if self._sizes else ()
        there = {field.name: field.size + 1 for field in fields}
        for name, tokens in self._sizes.items():
            if there.get(name) != tokens:
                has = f"{there[name]} tokens of it" if name in there else "no such field"
                raise SettingsError(
                    f"{self.name} was trained with {tokens} tokens of {name!r}, and the bank "
                    f"{bank.folder} has {has}: take the bank of the same run, or train again"
                )
        self._bank = bank

    @property
    def context_fields(self) -> tuple[str, ...]:
        """Fields that are neither the user's nor the item's: ``context`` may give them."""
        return tuple(self._context)

    def score(
        self,
        user: str,
        items: Sequence[str],
        time: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Click probabilities of one user with candidate items.

        Parameters
        ----------
        user : str
        items : sequence of n str
        time : float, optional
            Timestamp, for models that read the time field.
        context : mapping, optional
            Raw values of :attr:`context_fields`, the same for all items or one for each: a token
            (unknown ones are [PAD]), a number, or a list of tokens where the field is a sequence.
            What is not given is what RecBole takes for a missing value.

        Returns
        -------
        ndarray of float32, shape (n,)

        Raises
        ------
        SettingsError
            If ``items`` is a text, or something in ``context`` cannot be used.
        """
        if isinstance(items, str):
            raise SettingsError(f"items={items!r} is a text: give a list of items")
        return self.predict(self.interaction([user] * len(items), items, time, context))

    def score_many(
        self,
        users: Sequence[str],
        items: Sequence[str],
        time: float | Sequence[float] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Click probabilities of pairs, ``users[i]`` with ``items[i]``; else as :meth:`score`."""
        return self.predict(self.interaction(users, items, time, context))

    def interaction(
        self,
        users: Sequence[str],
        items: Sequence[str],
        time: float | Sequence[float] | None = None,
        context: Mapping[str, Any] | None = None,
        profiles: Mapping[str, np.ndarray] | None = None,
    ) -> Interaction:
        """What the model reads of pairs; all that needs the bank.

        ``profiles`` has the tokens of each profile field, where they are not to be looked up now.
        """
        if len(users) != len(items):
            raise SettingsError(f"items has {len(items)} rows, but users has {len(users)}")
        profiles = self._profiles(users, items) if profiles is None else profiles
        columns = {
            name: torch.as_tensor(np.asarray(profiles[name], np.int64))
            for name in (*self._codes, *self._matches)
        }
        for key, tokens, features in (
            (self._user, users, self._user_features),
            (self._item, items, self._item_features),
        ):
            ids = torch.from_numpy(self._ids(key, tokens))
            columns[key] = ids
            for name, feature in features.items():
                columns[name] = feature[ids.to(feature.device)]
        context = dict(context or {})
        if time is not None and self._time in self._context:
            context.setdefault(self._time, time)
        for name in context:
            if name not in self._context:
                raise SettingsError(
                    f"context[{name!r}] is no context field of {self.name}: it reads "
                    f"{', '.join(self._context) or 'none'}"
                )
        for name, field in self._context.items():
            columns[name] = self._context_column(field, context.get(name), len(users))
        device = self.model.device
        return Interaction({name: column.to(device) for name, column in columns.items()})

    def predict(self, interaction: Interaction) -> np.ndarray:
        """Click probabilities, shape (n,), float32."""
        n, columns = len(interaction), interaction.interaction
        scores = np.empty(n, np.float32)
        with torch.no_grad():
            for low in range(0, n, BATCH_ROWS):
                part = slice(low, low + BATCH_ROWS)
                batch = Interaction({name: column[part] for name, column in columns.items()})
                scores[part] = self.model.predict(batch).reshape(-1).cpu().numpy()
        return scores

    # Features.

    def _ids(self, field: str, tokens: Sequence[str]) -> np.ndarray:
        known = self._id_of[field]
        return np.fromiter((known.get(token, 0) for token in tokens), np.int64, len(tokens))

    def _profiles(self, users: Sequence[str], items: Sequence[str]) -> dict[str, np.ndarray]:
        """Profile fields of pairs, from the bank as it is now."""
        columns: dict[str, np.ndarray] = {}
        if self._codes:
            codes = self.bank.look_up_many(users)
            place = {name: column for column, name in enumerate(self.bank.fields)}
            columns |= {name: codes[:, place[name]].astype(np.int64) for name in self._codes}
        if self._matches:
            matches = np.empty((len(users), len(self.bank.match_fields)), np.int64)
            numbers, rows_of = self.bank.model.numbers(items), {}
            for row, user in enumerate(users):
                rows_of.setdefault(user, []).append(row)
            for user, rows in rows_of.items():
                matches[rows] = self.bank.match(user, numbers[rows])
            place = {name: column for column, name in enumerate(self.bank.match_fields)}
            columns |= {name: matches[:, place[name]] for name in self._matches}
        return columns

    def _context_column(self, field: Mapping[str, Any], value: Any, n: int) -> torch.Tensor:
        ftype, name = _TYPES[field["type"]], field["name"]
        if ftype == FeatureType.TOKEN:
            values = _spread(name, [""] if value is None else value, n)
            return torch.from_numpy(self._ids(name, [str(token) for token in values]))
        if ftype == FeatureType.TOKEN_SEQ:
            sequences = _sequences(name, value, n)
            column = np.zeros((n, field["length"]), np.int64)
            for row, tokens in enumerate(sequences):
                ids = self._ids(name, [str(token) for token in tokens])[: field["length"]]
                column[row, : len(ids)] = ids
            return torch.from_numpy(column)
        if ftype == FeatureType.FLOAT:
            told = field.get("float")
            if told is None:
                raise SettingsError(
                    f"{name!r} of {self.name} has no finite range, or the run began with a dataset "
                    "saved by an older recbole-uip: delete that file, and train again"
                )
            values = _spread(name, [told["fill"]] if value is None else value, n)
            return _float_feature(name, told, field["size"], values)
        if value is not None:
            raise SettingsError(
                f"context[{name!r}] is a sequence of floats, which cannot be given: leave it out"
            )
        return torch.zeros((n, field["length"], 2))


def _spread(name: str, value: Any, n: int) -> list:
    """``n`` values of one, of a sequence of one, or of a sequence of ``n``."""
    values = [value] if isinstance(value, str) or np.ndim(value) == 0 else list(value)
    if len(values) not in (1, n):
        raise SettingsError(f"context[{name!r}] has {len(values)} values: give 1, or {n}")
    return values * n if len(values) == 1 else values


def _sequences(name: str, value: Any, n: int) -> list[list]:
    """``n`` sequences of tokens, of one or of a list of ``n``; none of what is not given."""
    if value is None:
        return [[]] * n
    if isinstance(value, (list, tuple, np.ndarray)):
        value = list(value)
        inner = [isinstance(each, (list, tuple, np.ndarray)) for each in value]
        if not any(inner):
            return [value] * n
        if all(inner) and len(value) == n:
            return [list(each) for each in value]
    raise SettingsError(
        f"context[{name!r}] must be a list of tokens, or {n} such lists, one for each item"
    )


def _float_feature(
    name: str, told: Mapping[str, Any], size: int, values: Sequence[Any]
) -> torch.Tensor:
    """Pairs (value, 1) or (1, bucket) of raw values, as RecBole makes them of a column."""
    try:
        value = np.array([float(each) for each in values])
    except (TypeError, ValueError) as error:
        raise SettingsError(f"context[{name!r}] must be numbers: {error}") from None
    if not np.isfinite(value).all():
        raise SettingsError(f"context[{name!r}] must be finite numbers, got {values!r:.80}")
    low, high = told["low"], told["high"]
    if told["normalised"]:
        value = np.ones(len(value)) if low == high else (value - low) / (high - low)
        low, high = (1.0, 1.0) if low == high else (0.0, 1.0)
    one = np.ones(len(value))
    if told["method"] is None:
        return torch.from_numpy(np.stack([value, one], axis=-1)).float()
    if told["method"] != "ED":
        raise SettingsError(
            f"{name!r} is discretised by {told['method']!r}, whose buckets are known for the "
            "training values alone: a model that reads it cannot be served; set method to ED"
        )
    upper = high + 1e-9
    bucket = np.floor((value - low) * told["buckets"] / (upper - low) + 1)
    # Values beyond those of the data go to the outermost buckets.
    bucket = np.clip(bucket, 1, size - 1)
    return torch.from_numpy(np.stack([one, bucket], axis=-1)).float()


# --- files ---------------------------------------------------------------------------------


def _read_description(output: Path, model: str, arm: str) -> dict[str, Any]:
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
        known = version != FORMAT or {"files", "fields", "user_field"} <= described.keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}): train again") from error
    if version != FORMAT or not known:
        raise SettingsError(
            f"{path} has the format {version!r}, and this recbole-uip reads {FORMAT}: train again"
        )
    return described


def _check_file(output: Path, name: str, file: str, expected: str | None) -> None:
    path = output / file
    if not path.is_file():
        raise SettingsError(f"{path} is missing, and {name} needs it: train again")
    if sha256_of(path) != expected:
        raise SettingsError(
            f"{path} is not the file that serving/{name}.json was written with: it is damaged, or "
            "of another run into the same folder. Train again"
        )


def _read_features(path: Path, device: Any) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, struct.error) as error:
        raise SettingsError(f"{path} cannot be read ({error}): train again") from error


def _read_tokens(path: Path) -> dict[str, list[str]]:
    table = pq.read_table(path)
    tokens: dict[str, list[str]] = {}
    for field, token in zip(table["field"].to_pylist(), table["token"].to_pylist(), strict=True):
        tokens.setdefault(field, []).append(token)
    return tokens


# --- the model -----------------------------------------------------------------------------


class _Fields:
    """In a dataset's place: what RecBole's context-aware models ask of it when they are made."""

    def __init__(self, fields: Sequence[Mapping[str, Any]], config: UIPConfig) -> None:
        self.config = config
        self.field2type = {field["name"]: _TYPES[field["type"]] for field in fields}
        self.field2source = {field["name"]: _SOURCES[field["source"]] for field in fields}
        self.field2seqlen = {field["name"]: field["length"] for field in fields}
        self._size = {field["name"]: field["size"] for field in fields}

    def fields(self, ftype: Any = None, source: Any = None) -> list[str]:
        return [
            name
            for name in self.field2type
            if (ftype is None or self.field2type[name] in ftype)
            and (source is None or self.field2source[name] in source)
        ]

    def num(self, field: str) -> int:
        return self._size[field]


def _make_model(
    name: str,
    saved: Mapping[str, Any],
    fields: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> torch.nn.Module:
    """RecBole's model of a checkpoint, with its weights, ready to predict."""
    settings = dict(saved["config"])
    settings["device"] = device
    if isinstance(settings.get("fields"), dict):
        # Numbers of FFM's and FwFM's fields became text in the checkpoint.
        settings["fields"] = {int(key): value for key, value in settings["fields"].items()}
    phase = settings.get("phase")
    if name == "KD_DAGFM":
        # RecBole evaluates the teacher's name as code.
        teacher = getattr(kd_dagfm, str(settings.get("teacher")), None)
        if not (isinstance(teacher, type) and issubclass(teacher, torch.nn.Module)):
            raise SettingsError(f"teacher={settings.get('teacher')!r} is no network of KD_DAGFM")
        # Any other phase loads the teacher's checkpoint, whose weights are in this one too.
        settings["phase"] = "teacher_training"
    config = restore_config(
        {"model": name, "model_class": None, "dataset": None, "final_config_dict": settings}
    )
    network = config.model_class(config, _Fields(fields, config))
    if name == "KD_DAGFM":
        network.phase = phase
    try:
        network.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"the checkpoint of {name} does not fit its fields: {reason}"
        ) from error
    network.load_other_parameter(saved.get("other_parameter"))
    return network.to(device).eval()


def model_fields(model: torch.nn.Module) -> list[str]:
    """Fields that a model reads; two-tower models keep (tower, names) pairs in some lists."""
    names: list[str] = []
    for kind in ("token", "float", "token_seq", "float_seq"):
        for item in getattr(model, f"{kind}_field_names", ()):
            names += [item] if isinstance(item, str) else list(item)
    return names

"""Click probabilities from a trained checkpoint and the bank, for users RecBole never saw too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bridge.served_model import make_model, model_fields
from recbole_uip.bridge.serving_files import (
    CODE,
    FEATURES,
    MATCH,
    TOKENS,
    check_file,
    read_description,
    read_features,
    read_tokens,
)
from recbole_uip.bridge.storage import load_checkpoint
from recbole_uip.settings import SettingsError

__all__ = ["Scorer"]

BANK = "bank"
# Rows that go through the model at a time.
BATCH_ROWS = 8192


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
        self._fit = described["fit"]
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
        described = read_description(output, model, arm)
        checkpoint = f"checkpoints/{name}.pth"
        for file in (FEATURES, TOKENS, checkpoint):
            check_file(output, name, file, described["files"].get(file))
        saved = load_checkpoint(output / checkpoint, device)
        network = make_model(model, saved, described["fields"], torch.device(device))
        if bank is None and any("profile" in field for field in described["fields"]):
            bank = FeatureBank.open(output / BANK)
        return cls(
            name,
            network,
            described,
            read_features(output / FEATURES, device),
            read_tokens(output / TOKENS),
            bank,
        )

    @property
    def bank(self) -> FeatureBank | None:
        """Where profiles come from; may be replaced by another state of the same bank.

        Raises
        ------
        SettingsError
            If it lacks fields that the model was trained with, or was fitted anew.
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
        if self._sizes and bank.model.fit != self._fit:
            raise SettingsError(
                f"{self.name} was trained with codes of another fit than those of the bank "
                f"{bank.folder}: take the bank of the same run, or train again"
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
            If the user or an item is no string, ``items`` is a text, or something in ``context``
            cannot be used.
        """
        items = _strings("item", items)
        return self.predict(self.interaction([user] * len(items), items, time, context))

    def score_many(
        self,
        users: Sequence[str],
        items: Sequence[str],
        time: float | Sequence[float] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Click probabilities of pairs, ``users[i]`` with ``items[i]``; else as :meth:`score`.

        Both are sequences of str, or Arrow arrays of strings.
        """
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
        # The tokens of the data's files are text: a number would be nobody, and say so to none.
        users, items = _strings("user", users), _strings("item", items)
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
        """Click probabilities, shape (n,), float32.

        Raises
        ------
        SettingsError
            If one is no number, for which a context value far out can be the cause.
        """
        n, columns = len(interaction), interaction.interaction
        scores = np.empty(n, np.float32)
        with torch.no_grad():
            for low in range(0, n, BATCH_ROWS):
                part = slice(low, low + BATCH_ROWS)
                batch = Interaction({name: column[part] for name, column in columns.items()})
                scores[part] = self.model.predict(batch).reshape(-1).cpu().numpy()
        if np.isnan(scores).any():
            raise SettingsError(
                f"{self.name} gives no number for {int(np.isnan(scores).sum())} of {n} pairs: "
                f"check the values of its context fields ({', '.join(self._context) or 'none'})"
            )
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
        ftype, name = FeatureType(field["type"]), field["name"]
        if ftype == FeatureType.TOKEN:
            values = _spread(name, "" if value is None else value, n)
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
            values = _spread(name, told["fill"] if value is None else value, n)
            return _float_feature(name, told, field["size"], values)
        if value is not None:
            raise SettingsError(
                f"context[{name!r}] is a sequence of floats, which cannot be given: leave it out"
            )
        return torch.zeros((n, field["length"], 2))


def _strings(what: str, tokens: Any) -> list[str]:
    """Tokens of users or items as a list."""
    if isinstance(tokens, str):
        raise SettingsError(f"{what}s={tokens!r} is a text: give a list of {what}s")
    tokens = tokens.to_pylist() if isinstance(tokens, pa.Array | pa.ChunkedArray) else list(tokens)
    for row, token in enumerate(tokens):
        if not isinstance(token, str):
            raise SettingsError(f"{what} {token!r} in row {row} is no string: give strings")
    return tokens


def _spread(name: str, value: Any, n: int) -> list:
    """``n`` values of one, of a sequence of one, or of a sequence of ``n``."""
    value = _plain(value)
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str | Number):
            raise SettingsError(
                f"context[{name!r}] must be text or a number, or {n} of them, one for each item; "
                f"got {each!r:.80}"
            )
    if len(values) not in (1, n):
        raise SettingsError(f"context[{name!r}] has {len(values)} values: give 1, or {n}")
    return values * n if len(values) == 1 else values


def _plain(value: Any) -> Any:
    """A list of Python's values, or one of them, of what came in an array or a series."""
    for convert in ("tolist", "to_pylist"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return list(value) if isinstance(value, tuple) else value


def _sequences(name: str, value: Any, n: int) -> list[list]:
    """``n`` sequences of tokens, of one or of a list of ``n``; none of what is not given."""
    if value is None:
        return [[]] * n
    value = _plain(value)
    if isinstance(value, list):
        value = [_plain(each) for each in value]
        if all(isinstance(each, str | Number) for each in value):
            return [value] * n
        if len(value) == n and all(
            isinstance(each, list) and all(isinstance(token, str | Number) for token in each)
            for each in value
        ):
            return value
    raise SettingsError(
        f"context[{name!r}] must be a list of tokens, or {n} such lists, one for each item"
    )


def _float_feature(
    name: str, told: Mapping[str, Any], size: int, values: Sequence[Any]
) -> torch.Tensor:
    """Pairs (value, 1) or (1, bucket) of raw values, as RecBole makes them of a column."""
    try:
        value = np.array([float(each) for each in values])
    except (TypeError, ValueError, OverflowError) as error:
        raise SettingsError(f"context[{name!r}] must be numbers: {error}") from None
    if not (np.abs(value) <= np.finfo(np.float32).max).all():
        raise SettingsError(
            f"context[{name!r}] must be finite numbers in single precision, got {values!r:.80}"
        )
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

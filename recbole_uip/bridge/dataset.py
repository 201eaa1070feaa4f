"""RecBole's dataset with profile IDs among its fields."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import pickle
import urllib.error
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import FeatureSource, FeatureType

from recbole_uip import profiles as profile_stage
from recbole_uip.behaviours import TEST, TRAIN, VALID, Behaviours, folds_of
from recbole_uip.bridge import controls
from recbole_uip.bridge.atomic_files import Frame, read_atomic_file, split_sequences
from recbole_uip.bridge.config import UIPConfig
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.bridge.sources import download, missing_files_error
from recbole_uip.bridge.storage import load_pickle
from recbole_uip.files import atomic_write
from recbole_uip.settings import ArmSettings, SettingsError, UIPSettings, default_time
from recbole_uip.texts import item_texts

__all__ = ["ROW", "UIPDataset", "create_dataset", "data_preparation", "data_settings"]

logger = logging.getLogger(__name__)

#: Column of ``inter_feat`` with the number of each interaction after filtering. It is data but
#: not a field (it is missing from ``field2type``), so no model ever sees it.
ROW = "uip_row"

# Keys that say where things go or which of the fields a model is given, not what the fields are.
_INERT = ("uip_output", "uip_cache", "uip_arms", "uip_user_id", "uip_lm_device")
# What RecBole's datasets know of each field, by its name.
_FIELD_TABLES = (
    "field2type", "field2source", "field2seqlen", "field2id_token", "field2token_id",
)  # fmt: skip
PHASES = ("train", "valid", "test")
# Of RecBole's keys, those that shape the data beside the ones it lists itself.
_DATA_KEYS = ("dataset", "data_path", "seed", "repeatable", "eval_args")


class UIPDataset(Dataset):
    """A RecBole dataset whose splits carry profile IDs as token fields.

    It is used as RecBole's own: ``data_preparation(config, UIPDataset(config))`` gives
    dataloaders that stock context-aware models train on. :meth:`build` splits as RecBole does,
    infers the profiles once, and attaches every facet's fields; :meth:`select` then makes cheap
    views of a split that show the fields of some facets only.

    Parameters
    ----------
    config : UIPConfig

    Attributes
    ----------
    behaviours : Behaviours or None
        Every row after filtering, in the input's order; ids are RecBole's (0 is [PAD]).
    profiles : Profiles or None
        What the profile stage made of them.
    settings : UIPSettings or None
        What it was told, with ``auto`` decided by the data.
    float_ranges : dict of str to tuple of float
        Lowest, highest and mean raw value of each float field of the interactions.
    """

    def __init__(self, config: UIPConfig) -> None:
        if not isinstance(config, UIPConfig):
            raise TypeError(f"UIPDataset needs a UIPConfig, not {type(config).__name__}")
        self.behaviours: Behaviours | None = None
        self.profiles = None
        self.settings: UIPSettings | None = None
        self._splits: list[UIPDataset] | None = None
        self._raw_time: np.ndarray | None = None
        self.float_ranges: dict[str, tuple[float, float, float]] = {}
        self._hidden: frozenset[str] = frozenset()
        self._match_fields: tuple[str, ...] = ()
        with recbole_refusals():
            super().__init__(config)

    # Loading: what pandas 3 and numpy 2 no longer do as RecBole 1.2.1 expects.

    def _load_data(self, token: str, dataset_path: str) -> None:
        suffixes = [f"{name}.inter" for name in self.benchmark_filename_list or ()] or ["inter"]
        files = [f"{token}.{suffix}" for suffix in suffixes]
        if not os.path.isdir(dataset_path):
            self._download()
        missing = [name for name in files if not os.path.isfile(os.path.join(dataset_path, name))]
        if missing:
            raise missing_files_error(token, dataset_path, missing, "files are missing")
        super()._load_data(token, dataset_path)

    def _download(self) -> None:
        files = [f"{self.dataset_name}.inter"]
        url = self._get_download_url("url", allow_none=True)
        if url is None:
            raise missing_files_error(
                self.dataset_name, self.dataset_path, files, "RecBole knows no download of it"
            )
        logger.info("downloading %s", url)
        try:
            download(self.dataset_name, url, self.dataset_path)
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            raise missing_files_error(
                self.dataset_name,
                self.dataset_path,
                files,
                f"it is not there, and its download failed ({reason})",
            ) from error

    def _load_feat(self, filepath: str, source: FeatureSource | str) -> pd.DataFrame | None:
        # RecBole's method fills missing sequences by a chained fillna(inplace=True), which
        # pandas 3 ignores, and parses with pandas' slow engine.
        load_col, unload_col = self._get_load_and_unload_col(source)
        if load_col == set():
            return None

        def wanted(name: str) -> bool:
            return (load_col is None or name in load_col) and name not in (unload_col or ())

        read = read_atomic_file(
            filepath, wanted, self.config["field_separator"], self.config["encoding"]
        )
        if read is None:
            return None
        frame, types = read
        for name, ftype in types.items():
            if source != "link":
                self.field2source[name] = source
                self.field2type[name] = ftype
                if ftype in (FeatureType.TOKEN, FeatureType.FLOAT):
                    self.field2seqlen[name] = 1
                if "float" in ftype.value:
                    self.field2bucketnum[name] = 2
            if ftype in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
                limit = (self.config["seq_len"] or {}).get(name)
                frame[name], longest = split_sequences(
                    frame[name], ftype, self.config["seq_separator"], limit
                )
                self.field2seqlen[name] = max(longest, 1)
        return frame

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        super()._load_inter_feat(token, dataset_path)
        self._check_columns([] if self.inter_feat is None else list(self.inter_feat))

    def _check_columns(self, loaded: list[str]) -> None:
        """Refuse interactions without IDs, or with columns of which no labels can be made."""
        for key, field in (("USER_ID_FIELD", self.uid_field), ("ITEM_ID_FIELD", self.iid_field)):
            if field not in loaded:
                raise SettingsError(
                    f"{key}={field!r} is not among the columns loaded of the interactions, "
                    f"{loaded}: load it by load_col, or name the right column by {key}"
                )
            if self.field2type[field] != FeatureType.TOKEN:
                raise SettingsError(
                    f"{key}={field!r} is a column of type {self.field2type[field].value}: IDs are "
                    f"tokens, so call it {field}:token in the file"
                )
        threshold = self.config["threshold"]
        if threshold is not None:
            self._check_threshold(threshold, loaded)
        elif self.label_field in loaded:
            self._check_is_float("LABEL_FIELD", self.label_field)
        if ROW in loaded:
            raise SettingsError(
                f"the interactions have a column {ROW!r}, which is a name of ours: rename it, or "
                "leave it out by unload_col"
            )

    def _check_threshold(self, threshold: Any, loaded: list[str]) -> None:
        example = "such as {rating: 4}"
        if not isinstance(threshold, dict) or len(threshold) != 1:
            raise SettingsError(
                f"threshold={threshold!r} must map one column to a number, {example}"
            )
        ((field, lowest),) = threshold.items()
        if isinstance(lowest, bool) or not isinstance(lowest, (int, float)):
            raise SettingsError(f"threshold.{field}={lowest!r} must be a number, {example}")
        if field not in loaded:
            raise SettingsError(
                f"threshold names {field!r}, which is not among the columns loaded of the "
                f"interactions, {loaded}: load it, such as by "
                f"load_col: {{inter: [{', '.join(map(str, [*loaded, field]))}]}}"
            )
        self._check_is_float(f"threshold.{field}", field)

    def _check_is_float(self, key: str, field: str) -> None:
        if self.field2type[field] != FeatureType.FLOAT:
            raise SettingsError(
                f"{key}: the column {field!r} is of type {self.field2type[field].value}, whose "
                f"values are names and no numbers: call it {field}:float in the file"
            )

    def _check_missing(self) -> None:
        """Refuse missing ratings and labels, of which RecBole would make some by their mean."""
        field = next(iter(self.config["threshold"] or (self.label_field,)))
        missing = 0 if field not in self.inter_feat else int(self.inter_feat[field].isna().sum())
        if missing:
            raise SettingsError(
                f"{field!r} is missing in {missing} of {len(self.inter_feat)} interactions, and "
                "without it there is no label: take these rows out of the file, or filter them by "
                f"val_interval, such as {{{field}: '[0,5]'}}"
            )

    def _remap_ID_all(self) -> None:
        # The first step after filtering, and before RecBole fills, normalises and rounds to
        # float32 what we need exact.
        self._check_missing()
        if self.time_field in self.inter_feat and (
            self.field2type[self.time_field] == FeatureType.FLOAT
        ):
            self._raw_time = self.inter_feat[self.time_field].to_numpy(np.float64, copy=True)
        super()._remap_ID_all()

    def _filter_inter_by_user_or_item(self) -> None:
        before = len(self.inter_feat)
        super()._filter_inter_by_user_or_item()
        gone = before - len(self.inter_feat)
        if gone:
            logger.warning(
                "dataset %s: %d of %d rows are left out, of users or items that its .user or .item "
                "file lacks; filter_inter_by_user_or_item=False keeps them",
                self.dataset_name, gone, before,
            )  # fmt: skip

    def _fill_nan(self) -> None:
        for feat_name in self.feat_name_list:
            # Joining users and items to their ids has made plain frames of them.
            feat = Frame(getattr(self, feat_name))
            setattr(self, feat_name, feat)
            for field in feat:
                ftype = self.field2type[field]
                if ftype == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0).astype(np.int64)
                elif ftype == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    dtype = np.int64 if ftype == FeatureType.TOKEN_SEQ else np.float64
                    empty = np.array([], dtype=dtype)
                    filled = np.empty(len(feat), dtype=object)
                    for row, value in enumerate(feat[field]):
                        filled[row] = empty if isinstance(value, float) else value
                    feat[field] = filled

    def _normalize(self) -> None:
        # A served model meets raw values, which this step and the next one rescale.
        for field in self.inter_feat:
            if self.field2type[field] == FeatureType.FLOAT and len(self.inter_feat):
                value = self.inter_feat[field].to_numpy(np.float64)
                described = value.min(), value.max(), value.mean()
                self.float_ranges[field] = tuple(map(float, described))
        super()._normalize()

    def _change_feat_format(self) -> None:
        super()._change_feat_format()
        self.inter_feat[ROW] = torch.arange(len(self.inter_feat))

    def sort(self, by: str | list[str], ascending: bool | list[bool] = True) -> None:
        """Sort as RecBole does, but by the exact raw time where the key is the time field."""
        if by == self.time_field and self._raw_time is not None:
            time = self._raw_time[self.inter_feat[ROW].numpy()]
            order = np.argsort(time if ascending else -time, kind="stable")
            self.inter_feat._reindex(torch.from_numpy(order))
        else:
            super().sort(by, ascending)

    # Profiles.

    def build(self) -> list[UIPDataset]:
        """Split the data, infer the profiles, and return the splits with every facet's fields.

        Returns
        -------
        list of UIPDataset
            Training, validation and test split. Calling it again returns new views of them, not
            a new split.

        Raises
        ------
        SettingsError
            If the rows have no labels and RecBole samples no negatives, or a setting does not
            fit the data.
        """
        if self._splits is None:
            self._check_order()
            with recbole_refusals():
                splits = super().build()
            if len(splits) != 3:
                raise SettingsError(
                    f"eval_args.split={self.config['eval_args']['split']} and benchmark_filename="
                    f"{self.config['benchmark_filename']} give {len(splits)} splits: there must be "
                    "three, for training, validation and test"
                )
            for phase, split in zip(PHASES, splits, strict=True):
                if len(split.inter_feat) == 1:
                    raise SettingsError(
                        f"eval_args.split={self.config['eval_args']['split']} gives the {phase} "
                        "split one row, of which there is no AUC: give it more, or none"
                    )
            self._check_labels()
            self.behaviours = self._make_behaviours(splits)
            self.profiles = self._infer()
            self._check_names()
            for split in splits:
                split.behaviours, split.profiles = self.behaviours, self.profiles
                split.settings = self.settings
            self._splits = splits
        return [split.select() for split in self._splits]

    def select(self, arm: ArmSettings | None = None, config: UIPConfig | None = None) -> UIPDataset:
        """A view of this split for one arm; tensors are shared, fields are the arm's.

        Parameters
        ----------
        arm : ArmSettings, optional
            Facets to show and whether to show the user ID. By default every facet, and the user
            ID as ``uip_user_id`` says.
        config : UIPConfig, optional
            The config of the model that will read the view. Where the arm has ``values: means``,
            their names enter its ``numerical_features``.

        Returns
        -------
        UIPDataset
        """
        config = config or self.config
        if arm is None:
            settings = config.uip
            names = tuple(facet.name for facet in settings.facets)
            arm = ArmSettings("all", names, settings.user_id if names else "keep")
        view = copy.copy(self)
        view.config = config
        view._splits = None
        for name in _FIELD_TABLES:
            setattr(view, name, dict(getattr(self, name)))
        view.inter_feat = Interaction(dict(self.inter_feat.interaction))
        if self.user_feat is not None:
            view.user_feat = Interaction(dict(self.user_feat.interaction))
        if self.profiles is not None:
            view._detach()
            if arm.values == "means":
                view._attach_means(arm.facets)
            else:
                for field in self.profiles.fields:
                    if field.facet in arm.facets:
                        view._attach(self._controlled(field, arm))
        view._hidden = frozenset([self.uid_field] if arm.user_id == "drop" else [])
        if config["double_tower"] and not view.fields(
            source=[FeatureSource.USER, FeatureSource.USER_ID]
        ):
            raise SettingsError(
                f"arm {arm.name!r} leaves the user tower of {config['model']} without a field: "
                "set user_id: keep in uip_arms, or give the arm a facet"
            )
        return view

    def fields(self, ftype: Any = None, source: Any = None) -> list[str]:
        """As in RecBole, without the user ID where the arm drops it.

        The data keep the user ID, so ``num``, ``join`` and the samplers work as ever.
        """
        return [name for name in super().fields(ftype, source) if name not in self._hidden]

    @property
    def profile_fields(self) -> list[str]:
        """Names of the profile fields that models see."""
        names = [field.name for field in self.profiles.fields] if self.profiles else []
        return [name for name in names if name in self.field2type]

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        if isinstance(index, np.ndarray):
            index = torch.from_numpy(index)
        df = _take(self.inter_feat, index)
        return self.join(df) if join else df

    def join(self, df: Interaction) -> Interaction:
        """Join user and item features; a match field follows the row's item.

        RecBole samples a negative by copying the positive row and replacing its item. A code is
        the user's and stays right; a match copied from the positive item would give the label
        away, so it is computed for the item that is there.
        """
        for feat, key in ((self.user_feat, self.uid_field), (self.item_feat, self.iid_field)):
            if feat is not None and key in df:
                df.update(_take(feat, df[key]))
        if self._match_fields and ROW in df and self.iid_field in df:
            rows, items = df[ROW].numpy(), df[self.iid_field].numpy()
            sampled = np.flatnonzero(items != self.behaviours.item[rows])
            if len(sampled):
                index = torch.from_numpy(sampled)
                matches = self.profiles.match(rows[sampled], items[sampled])
                for name in self._match_fields:
                    column = df[name].clone()
                    column[index] = torch.from_numpy(np.asarray(matches[name], dtype=np.int64))
                    df[name] = column
        return df

    def _samples_negatives(self) -> bool:
        return any(
            self.config[f"{phase}_neg_sample_args"]["distribution"] != "none" for phase in PHASES
        )

    def _check_order(self) -> None:
        if self.benchmark_filename_list or self.config["eval_args"]["order"] != "TO":
            return
        if self.time_field not in self.inter_feat:
            raise SettingsError(
                f"eval_args.order=TO needs the time field {self.time_field!r}, which is not "
                f"among the loaded fields {list(self.inter_feat)}: load it by load_col, name "
                "it by TIME_FIELD, or set order to RO"
            )
        if self._raw_time is None:
            raise SettingsError(
                f"eval_args.order=TO: the time field {self.time_field!r} is of type "
                f"{self.field2type[self.time_field].value}, which has no order: call it "
                f"{self.time_field}:float in the file, or set order to RO"
            )

    def _check_names(self) -> None:
        for field in self.profiles.fields:
            if field.name in self.field2type:
                raise SettingsError(
                    f"the data have a column {field.name!r}, which is the name of a field of facet "
                    f"{field.facet!r}: rename the facet in uip_facets, or leave the column out by "
                    "unload_col"
                )

    def _check_labels(self) -> None:
        labelled = self.label_field in self.inter_feat
        for phase in PHASES:
            key = "train_neg_sample_args" if phase == "train" else f"eval_args.mode.{phase}"
            samples = self.config[f"{phase}_neg_sample_args"]["distribution"] != "none"
            if labelled and samples:
                raise SettingsError(
                    f"{key} samples negatives, and the data have labels ({self.label_field!r}), "
                    "which RecBole then overwrites: every row would be a positive, disliked ones "
                    "too. Have one or the other: train_neg_sample_args: ~ and eval_args.mode: "
                    "labeled; or no threshold or LABEL_FIELD, and liked rows alone by "
                    "val_interval, such as {rating: '[4,inf)'}"
                )
            if not labelled and not samples:
                raise SettingsError(
                    f"{key} samples no negatives, and the data have no label field "
                    f"{self.label_field!r}: every row would be a positive. Make labels of ratings "
                    "by threshold, such as threshold: {rating: 4}, name a 0/1 column by "
                    "LABEL_FIELD, or have RecBole sample negatives by train_neg_sample_args: "
                    "{distribution: uniform, sample_num: 1} and eval_args.mode: uni10"
                )

    def _make_behaviours(self, splits: list[UIPDataset]) -> Behaviours:
        n_rows = sum(len(split.inter_feat) for split in splits)
        user = np.empty(n_rows, dtype=np.int64)
        item = np.empty(n_rows, dtype=np.int64)
        split_of = np.empty(n_rows, dtype=np.int8)
        liked = np.empty(n_rows) if self.label_field in self.inter_feat else None
        for number, split in zip((TRAIN, VALID, TEST), splits, strict=True):
            feat = split.inter_feat
            rows = feat[ROW].numpy()
            user[rows], item[rows] = feat[self.uid_field].numpy(), feat[self.iid_field].numpy()
            split_of[rows] = number
            if liked is not None:
                liked[rows] = feat[self.label_field].numpy()
        sizes = self.user_num, self.item_num
        try:
            return Behaviours(user, item, liked, self._raw_time, split_of, *sizes)
        except ValueError as error:
            raise SettingsError(f"dataset {self.dataset_name!r}: {error}") from error

    def _infer(self) -> Any:
        settings = self.config.uip
        if self._raw_time is None and settings.time == "point_in_time":
            raise SettingsError(
                f"uip_time=point_in_time needs the time field {self.time_field!r} as a loaded "
                "float field: load it by load_col, or set uip_time to cross_fitted"
            )
        if self._raw_time is None and settings.refresh:
            raise SettingsError(
                f"uip_refresh={settings.refresh:g}s needs timestamps, which the data lack: "
                "drop uip_refresh"
            )
        if self._raw_time is None and settings.time == "auto" and settings.facets:
            logger.warning(
                "the data have no timestamps, so profiles are cross-fitted: a training row's is of "
                "others of its user's training rows, a held-out row's of all of them"
            )
        settings = self.settings = self._resolve(settings)
        users = self.field2id_token[self.uid_field]
        folds = folds_of(users, settings.user_folds, settings.seed)
        return profile_stage.infer(self.behaviours, self.item_texts(settings), settings, folds)

    def item_texts(self, settings: UIPSettings) -> list[str | None] | None:
        """Text of each item by ``uip_item_text``, or None where no facet reads texts."""
        if not settings.text_facets:
            return None
        return item_texts(
            os.path.join(self.dataset_path, f"{self.dataset_name}.item"),
            settings.item_text,
            self.iid_field,
            self.field2token_id[self.iid_field],
            self.item_num,
            self.config["field_separator"],
            self.config["encoding"],
        )

    def _resolve(self, settings: UIPSettings) -> UIPSettings:
        """``settings`` with ``auto`` decided by what the data are."""
        if settings.time == "auto":
            timed = self._raw_time is not None
            settings = dataclasses.replace(settings, time=default_time(timed))
        if settings.history == "auto":
            ordered = settings.time == "point_in_time" and self.behaviours.is_time_ordered
            settings = dataclasses.replace(settings, history="observed" if ordered else "train")
        return settings

    def _detach(self) -> None:
        """Take every profile field out of this view."""
        for field in self.profiles.fields:
            for feat in (self.inter_feat, self.user_feat):
                if feat is not None and field.name in feat:
                    feat.drop(field.name)
            for name in _FIELD_TABLES:
                getattr(self, name).pop(field.name, None)
        self._match_fields = ()

    def _controlled(
        self, field: profile_stage.ProfileField, arm: ArmSettings
    ) -> profile_stage.ProfileField:
        """The field, or what stands in its place in a control arm."""
        if arm.control == "none":
            return field
        if field.kind == "match" and self._samples_negatives():
            raise SettingsError(
                f"uip_arms.{arm.name}.control={arm.control} has no match fields for sampled "
                "negatives: use it where every row has a label, or leave match out"
            )
        make = controls.random_tokens if arm.control == "random" else controls.shuffled_tokens
        values = make(field, self.behaviours, self.settings.seed)
        return dataclasses.replace(field, values=values)

    def _attach_means(self, facets: tuple[str, ...]) -> None:
        """Add the posterior means of ``facets`` to this view, as numerical fields."""
        if self._samples_negatives():
            raise SettingsError(
                "values=means has no match values for sampled negatives: use it where every row "
                "has a label"
            )
        if self.config["double_tower"]:
            raise SettingsError(
                f"values=means gives float fields of the interaction, for which "
                f"{self.config['model']} has no tower: leave the arm out"
            )
        columns = controls.float_fields(self.profiles, self.behaviours, facets)
        numerical = dict.fromkeys([*self.config["numerical_features"], *columns])
        self.config["numerical_features"] = list(numerical)
        self.field2bucketnum = {**self.field2bucketnum, **dict.fromkeys(columns, 2)}
        rows = self.inter_feat[ROW]
        for name, values in columns.items():
            # RecBole's numerical fields are pairs of a value and the index of its embedding.
            pair = np.stack([values, np.ones_like(values)], axis=1)
            self.inter_feat[name] = torch.from_numpy(pair)[rows]
            self.set_field_property(name, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)

    def _attach(self, field: profile_stage.ProfileField) -> None:
        """Add one profile field to this view."""
        name, of_user = field.name, field.kind != "match"
        towers = bool(self.config["double_tower"])
        if towers and not of_user:
            logger.info(
                "%s crosses user and item, so %s has no tower for it: left out",
                name,
                self.config["model"],
            )
            return
        values = torch.from_numpy(np.ascontiguousarray(field.values, dtype=np.int64))
        if of_user and self.profiles.static:
            table = torch.zeros(self.user_num, dtype=torch.int64)
            table[torch.from_numpy(self.behaviours.user)] = values
            if self.user_feat is None:
                self.user_feat = Interaction({self.uid_field: torch.arange(self.user_num)})
            self.user_feat[name] = table
            source = FeatureSource.USER
        else:
            self.inter_feat[name] = values[self.inter_feat[ROW]]
            # The source only tells a two-tower model which tower reads the field.
            source = FeatureSource.USER if towers else FeatureSource.INTERACTION
            if not of_user:
                self._match_fields += (name,)
        self.set_field_property(name, FeatureType.TOKEN, source, 1)
        tokens = np.array(["[PAD]", *map(str, range(1, field.size + 1))])
        self.field2id_token[name] = tokens
        self.field2token_id[name] = {token: index for index, token in enumerate(tokens)}

    # Saving.

    def save(self) -> None:
        """Write the dataset to ``checkpoint_dir``, as RecBole does, but whole or not at all."""
        path = _saved_dataset(self.config)
        logger.info("saving the filtered dataset to %s", path)
        with atomic_write(path) as file:
            pickle.dump(self, file)

    def __getstate__(self) -> dict:
        # Frames go as arrays: pickled frames name pandas internals that differ by version.
        state = dict(self.__dict__)
        del state["logger"]
        for name in self.feat_name_list:
            if isinstance(state[name], pd.DataFrame):
                frame = state[name]
                state[name] = {"frame": {field: frame[field].to_numpy() for field in frame}}
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.logger = logging.getLogger()
        for name in self.feat_name_list:
            if isinstance(state[name], dict):
                setattr(self, name, Frame(state[name]["frame"]))


def _take(feat: Interaction, index: Any) -> Interaction:
    # Interaction's own indexing makes a Python list of the index, and a tensor of it per field:
    # most of the time of a batch.
    return Interaction({name: column[index] for name, column in feat.interaction.items()})


def create_dataset(config: UIPConfig) -> UIPDataset:
    """The dataset of ``config``: a saved one, where no setting it depends on has changed.

    As in RecBole, files are not looked at: after a change to them, delete what was saved.
    """
    path = config["dataset_save_path"] or _saved_dataset(config)
    if os.path.isfile(path):
        dataset = load_pickle(path)
        if isinstance(dataset, UIPDataset) and _unchanged(config, dataset.config, splits=False):
            logger.info("loading the filtered dataset from %s", path)
            dataset.config = config
            return dataset
    dataset = UIPDataset(config)
    if config["save_dataset"]:
        dataset.save()
    return dataset


def data_preparation(
    config: UIPConfig, dataset: UIPDataset, arm: ArmSettings | None = None
) -> tuple[Any, Any, Any]:
    """RecBole's ``data_preparation`` for one arm of a dataset.

    The splits and profiles of ``dataset`` are made once, however many arms and models read them.

    Returns
    -------
    train_data, valid_data, test_data : AbstractDataLoader
    """
    if dataset._splits is None:
        saved = _load_splits(config)
        if saved is None:
            dataset.build()
            if config["save_dataloaders"]:
                _save_dataloaders(config, dataset)
        else:
            dataset._splits = saved
            dataset.behaviours, dataset.profiles = saved[0].behaviours, saved[0].profiles
            dataset.settings = saved[0].settings
    views = [split.select(arm, config) for split in dataset._splits]
    return _dataloaders(config, dataset, views)


def _dataloaders(config: UIPConfig, dataset: UIPDataset, splits: list) -> tuple[Any, Any, Any]:
    with recbole_refusals():
        samplers = create_samplers(config, dataset, splits)
        return tuple(
            get_dataloader(config, phase)(
                config, split, sampler, shuffle=config["shuffle"] if phase == "train" else False
            )
            for phase, split, sampler in zip(PHASES, splits, samplers, strict=True)
        )


def _saved_dataset(config: UIPConfig) -> str:
    return os.path.join(config["checkpoint_dir"], f"{config['dataset']}-{UIPDataset.__name__}.pth")


def _saved_dataloaders(config: UIPConfig) -> str:
    return os.path.join(
        config["checkpoint_dir"], f"{config['dataset']}-for-{config['model']}-dataloader.pth"
    )


def data_settings(config: UIPConfig) -> dict[str, Any]:
    """Every setting that shapes rows, splits and profiles."""
    keys = {*config.parameters["Dataset"], *_DATA_KEYS}
    keys |= {
        key for key in config.final_config_dict if key.startswith("uip_") and key not in _INERT
    }
    return {key: config[key] for key in keys}


def _unchanged(config: UIPConfig, saved: UIPConfig, splits: bool = True) -> bool:
    """Whether every setting that shapes the data is the same, as RecBole compares its own.

    The split counts only where the saved data are already split.
    """
    new, old = data_settings(config), data_settings(saved)
    different = {key for key in new.keys() | old.keys() if new.get(key) != old.get(key)}
    return not different - (set() if splits else {"eval_args"})


def _save_dataloaders(config: UIPConfig, dataset: UIPDataset) -> None:
    path = _saved_dataloaders(config)
    logger.info("saving the split dataloaders to %s", path)
    saved = []
    for loader in _dataloaders(config, dataset, dataset.build()):
        state = loader.generator.get_state()
        # RecBole's own file format: generators do not pickle, their states do.
        loader.generator = loader.sampler.generator = None
        saved.append((loader, state))
    with atomic_write(path) as file:
        pickle.dump(saved, file)


def _load_splits(config: UIPConfig) -> list[UIPDataset] | None:
    path = config["dataloaders_save_path"] or _saved_dataloaders(config)
    if not os.path.isfile(path):
        return None
    splits = [loader._dataset for loader, _ in load_pickle(path)]
    if not all(isinstance(split, UIPDataset) for split in splits) or not _unchanged(
        config, splits[0].config
    ):
        return None
    logger.info("loading the split dataloaders from %s", path)
    for split in splits:
        if split.label_field not in split.inter_feat:
            # A loader that samples has made it a field, which the next one does again, in order.
            for name in _FIELD_TABLES:
                getattr(split, name).pop(split.label_field, None)
    return splits

"""Loading of a RecBole dataset: what pandas 3 and numpy 2 no longer do as RecBole expects."""

from __future__ import annotations

import logging
import os
import re
import urllib.error
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType

import recbole_uip
from recbole_uip.bridge.atomic_files import Frame, read_atomic_file, split_sequences
from recbole_uip.bridge.config import UIPConfig
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.bridge.sources import download, missing_files_error
from recbole_uip.files import sha256_of
from recbole_uip.settings import SettingsError

__all__ = ["ROW", "LoadedDataset"]

logger = logging.getLogger(__name__)

#: Column of ``inter_feat`` with the number of each interaction after filtering. It is data but
#: not a field (it is missing from ``field2type``), so no model ever sees it.
ROW = "uip_row"

_INTERVAL = re.compile(r"[\[(]([^,]*),([^,]*)[\])]")


class LoadedDataset(Dataset):
    """RecBole's dataset as its files are loaded, filtered and numbered; nothing of profiles.

    Beside the columns that RecBole makes it keeps what profiles and services need exact: the raw
    times, a number of each row, and the ranges of float columns before they are normalised.

    Parameters
    ----------
    config : UIPConfig

    Attributes
    ----------
    raw_time : ndarray of float64 of shape (n_rows,) or None
        Timestamps as in the file, before RecBole normalises and rounds them; None without a
        float field of time.
    float_ranges : dict of str to tuple of float
        Lowest, highest and mean raw value of each float field of the interactions.
    files : dict of str to str
        SHA-256 of the files of interactions, users and items, as they were read.
    version : str
        Version of this package that has read them.
    """

    def __init__(self, config: UIPConfig) -> None:
        if not isinstance(config, UIPConfig):
            raise TypeError(f"{type(self).__name__} needs a UIPConfig, not {type(config).__name__}")
        self.raw_time: np.ndarray | None = None
        self.float_ranges: dict[str, tuple[float, float, float]] = {}
        self.files: dict[str, str] = {}
        self.version = recbole_uip.__version__
        with recbole_refusals(config):
            super().__init__(config)

    def _load_data(self, token: str, dataset_path: str) -> None:
        files = self._inter_files()
        if not os.path.isdir(dataset_path):
            self._download()
        missing = [name for name in files if not os.path.isfile(os.path.join(dataset_path, name))]
        if missing:
            raise missing_files_error(token, dataset_path, missing, "files are missing")
        super()._load_data(token, dataset_path)
        self._check_side_columns()
        self.files = self.hash_files()

    def _inter_files(self) -> list[str]:
        suffixes = [f"{name}.inter" for name in self.benchmark_filename_list or ()] or ["inter"]
        return [f"{self.dataset_name}.{suffix}" for suffix in suffixes]

    def hash_files(self) -> dict[str, str]:
        """SHA-256 of each file of interactions, users and items that is there now, by its name."""
        names = [*self._inter_files(), f"{self.dataset_name}.user", f"{self.dataset_name}.item"]
        paths = {name: os.path.join(self.dataset_path, name) for name in names}
        return {name: sha256_of(path) for name, path in paths.items() if os.path.isfile(path)}

    def _download(self) -> None:
        files = self._inter_files()
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

    def _get_load_and_unload_col(self, source: FeatureSource | str) -> tuple:
        kind = source.value if isinstance(source, FeatureSource) else source
        loaded, unloaded = (
            (self.config[key] or {}).get(kind) for key in ("load_col", "unload_col")
        )
        if loaded and loaded != "*" and unloaded:
            raise SettingsError(
                f"unload_col.{kind}={unloaded} stands beside load_col.{kind}={loaded}, of which "
                "RecBole takes one: leave the columns out of load_col, or set load_col to ~ "
                "(--load_col=None) if it is a default of the dataset"
            )
        return super()._get_load_and_unload_col(source)

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
        if absent := sorted(map(str, (load_col or set()) - types.keys())):
            logger.warning(
                "load_col names %s, which %s has no column of: what is loaded is %s",
                absent, filepath, list(types),
            )  # fmt: skip
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

    def _check_side_columns(self) -> None:
        """Refuse columns of users and items that have the name of another column.

        A row gets the columns of its user and item by name, in place of those that it has: a
        column of items that is called label would be what models are trained on.
        """
        taken = {self.label_field: "LABEL_FIELD", self.time_field: "TIME_FIELD", ROW: "ours"}
        # A column that two files have is one of the interactions, or of the users.
        first = dict.fromkeys(self.inter_feat, FeatureSource.INTERACTION)
        for source, key in (
            (FeatureSource.USER, self.uid_field),
            (FeatureSource.ITEM, self.iid_field),
        ):
            feat = getattr(self, f"{source.value}_feat")
            for name in [] if feat is None else feat:
                if name == key:
                    continue
                if name in first:
                    what = f"{self.dataset_name}.{first[name].value} has one of this name too"
                elif name in taken:
                    what = f"this name is {taken[name]}, of the interactions"
                else:
                    first[name] = source
                    continue
                by_setting = ", the label by LABEL_FIELD" if name == self.label_field else ""
                raise SettingsError(
                    f"{self.dataset_name}.{source.value} has a column {name!r}, and {what}: "
                    f"{self._way_to_leave_out(source, name)}, or rename one of the two{by_setting}"
                )

    def _way_to_leave_out(self, source: FeatureSource, name: str) -> str:
        # RecBole takes one of load_col and unload_col.
        if (self.config["load_col"] or {}).get(source.value, "*") == "*":
            return f"leave it out by unload_col: {{{source.value}: [{name}]}}"
        return f"take it out of load_col.{source.value}"

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

    def _filter_nan_user_or_item(self) -> None:
        # RecBole's own takes index labels for positions, and so drops other rows than it means
        # once rows were dropped before (those that lack the other ID).
        for field, side in ((self.uid_field, "user_feat"), (self.iid_field, "item_feat")):
            for name in (side, "inter_feat"):
                feat = getattr(self, name)
                missing = np.zeros(0, bool) if feat is None else feat[field].isna().to_numpy()
                if missing.any():
                    logger.warning(
                        "dataset %s: %d of %d rows of .%s have no %s (the first is row %d; a name "
                        "like NA or null counts as none) and are left out",
                        self.dataset_name, missing.sum(), len(feat), name.removesuffix("_feat"),
                        field, feat.index[missing.argmax()] + 1,
                    )  # fmt: skip
                    setattr(self, name, feat[~missing])

    def _check_ids(self) -> None:
        """Refuse interactions without an ID, all of which RecBole would take for one, [PAD]."""
        for field in (self.uid_field, self.iid_field):
            missing = self.inter_feat[field].isna().to_numpy()
            if missing.any():
                raise SettingsError(
                    f"{field!r} is missing in {missing.sum()} of {len(missing)} interactions (the "
                    f"first is row {missing.argmax() + 1}; a name like NA or null counts as none), "
                    "and with benchmark_filename no rows are filtered: take these out of the files"
                )

    def _check_numerical(self) -> None:
        """Refuse numerical features that are no numbers, or that are what is to be predicted."""
        for field in self.config["numerical_features"]:
            ftype = self.field2type.get(field, FeatureType.FLOAT)
            if "float" not in ftype.value:
                raise SettingsError(
                    f"numerical_features: the column {field!r} is of type {ftype.value}, whose "
                    f"values are names and no numbers: leave it out of them, or call it "
                    f"{field}:float in the file"
                )
            if field in (self.label_field, *(self.config["threshold"] or ())):
                raise SettingsError(
                    f"numerical_features: {field!r} is what labels are made of: leave it out of "
                    "them"
                )

    def _remap_ID_all(self) -> None:
        # The first step after filtering, and before RecBole fills, normalises and rounds to
        # float32 what we need exact.
        self._check_missing()
        self._check_ids()
        self._check_numerical()
        if self.time_field in self.inter_feat and (
            self.field2type[self.time_field] == FeatureType.FLOAT
        ):
            self.raw_time = self.inter_feat[self.time_field].to_numpy(np.float64, copy=True)
        super()._remap_ID_all()

    def _parse_intervals_str(self, intervals_str: str | None) -> list | None:
        # RecBole warns of an illegal interval, and goes on without it.
        for part in [] if intervals_str is None else str(intervals_str).split(";"):
            match = _INTERVAL.fullmatch(part.strip())
            try:
                legal = match is not None and float(match[1]) <= float(match[2])
            except ValueError:
                legal = False
            if not legal:
                keys = ("user_inter_num_interval", "item_inter_num_interval")
                key = next((key for key in keys if self.config[key] == intervals_str), None)
                raise SettingsError(
                    f"{key or 'val_interval'}: {part!r} is no interval: write a lower and an upper "
                    "bound, such as '[3,inf)' or '(0,10]'"
                )
        return super()._parse_intervals_str(intervals_str)

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
                    if field in self.config["numerical_features"]:
                        self._check_values(field, feat[field])
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    dtype = np.int64 if ftype == FeatureType.TOKEN_SEQ else np.float64
                    empty = np.array([], dtype=dtype)
                    filled = np.empty(len(feat), dtype=object)
                    for row, value in enumerate(feat[field]):
                        filled[row] = empty if isinstance(value, float) else value
                    feat[field] = filled

    def _check_values(self, field: str, column: pd.Series) -> None:
        """Refuse a feature of which RecBole would make NaN or infinity."""
        if column.isna().all():
            # RecBole would fill it by the mean of none.
            raise SettingsError(
                f"{field!r} is among numerical_features={self.config['numerical_features']}, and "
                "has no value in any row: leave it out of them"
            )
        too_large = column[column.abs() > np.finfo(np.float32).max]
        if len(too_large):
            raise SettingsError(
                f"{field!r} is among numerical_features, and has {float(too_large.iloc[0])!r} "
                f"({len(too_large)} of {len(column)} rows), which single precision cannot hold: "
                "mend the file, or leave it out of them"
            )

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
        if by == self.time_field and self.raw_time is not None:
            time = self.raw_time[self.inter_feat[ROW].numpy()]
            order = np.argsort(time if ascending else -time, kind="stable")
            self.inter_feat._reindex(torch.from_numpy(order))
        else:
            super().sort(by, ascending)

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

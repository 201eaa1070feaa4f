"""RecBole's dataset with profile IDs among its fields."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
import os
import pickle
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_uip import profiles as profile_stage
from recbole_uip.behaviours import TEST, TRAIN, VALID, Behaviours, folds_of
from recbole_uip.bridge import controls
from recbole_uip.bridge.config import UIPConfig
from recbole_uip.bridge.loading import ROW, LoadedDataset
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.files import atomic_write
from recbole_uip.lm.backbone import local_fingerprint
from recbole_uip.settings import ArmSettings, SettingsError, UIPSettings
from recbole_uip.texts import item_texts

__all__ = ["FIELD_TABLES", "PHASES", "UIPDataset", "saved_dataset"]

logger = logging.getLogger(__name__)

#: What RecBole's datasets know of each field, by its name.
FIELD_TABLES = (
    "field2type", "field2source", "field2seqlen", "field2id_token", "field2token_id",
)  # fmt: skip
#: RecBole's names of the splits, in order.
PHASES = ("train", "valid", "test")


class UIPDataset(LoadedDataset):
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
    splits : list of UIPDataset or None
        Training, validation and test split, once :meth:`build` or :meth:`restore` has made them.
    made_of : dict or None
        What a split's profiles were made of, as :meth:`ingredients` says.
    """

    def __init__(self, config: UIPConfig) -> None:
        self.behaviours: Behaviours | None = None
        self.profiles = None
        self.settings: UIPSettings | None = None
        self.splits: list[UIPDataset] | None = None
        self.made_of: dict[str, str | None] | None = None
        self._hidden: frozenset[str] = frozenset()
        self._match_fields: tuple[str, ...] = ()
        super().__init__(config)

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
        if self.splits is None:
            self._check_order()
            with recbole_refusals(self.config):
                splits = super().build()
            if len(splits) != 3:
                raise SettingsError(
                    f"eval_args.split={self.config['eval_args']['split']} and benchmark_filename="
                    f"{self.config['benchmark_filename']} give {len(splits)} splits: there must be "
                    "three, for training, validation and test"
                )
            for phase, split in zip(PHASES[1:], splits[1:], strict=True):
                if len(split.inter_feat) == 1 and not self._samples_negatives(phase):
                    raise SettingsError(
                        f"eval_args.split={self.config['eval_args']['split']} gives the {phase} "
                        "split one row, of which there is no AUC: give it more, or none"
                    )
            self._check_labels()
            self._say_what_is_not_read()
            self.behaviours = self._make_behaviours(splits)
            self.profiles = self._infer()
            self._check_names()
            made_of = self.ingredients()
            for split in splits:
                split.behaviours, split.profiles = self.behaviours, self.profiles
                split.settings, split.made_of = self.settings, made_of
            self.splits = splits
        return [split.select() for split in self.splits]

    def restore(self, splits: list[UIPDataset]) -> None:
        """Take ``splits`` that an earlier run built and saved as this dataset's own."""
        self.splits = splits
        self.behaviours, self.profiles = splits[0].behaviours, splits[0].profiles
        self.settings = splits[0].settings

    def ingredients(self) -> dict[str, str | None]:
        """What profiles are made of beside the settings: the package, the files and the LM.

        Returns
        -------
        dict of str to str or None
            The version of this package; SHA-256 of each file; and, where facets read texts, of
            the LM and adapter that lie on this machine (None of a hub id).
        """
        settings = self.config.uip
        made_of = {"recbole-uip": self.version, **self.files}
        if settings.text_facets:
            lm, cache = settings.lm, settings.cache
            made_of["uip_lm"] = local_fingerprint(lm.name, cache)
            made_of["uip_lm_adapter"] = lm.adapter and local_fingerprint(lm.adapter, cache, True)
        return made_of

    def has_rows_of(self, split: UIPDataset) -> bool:
        """Whether a split that was saved is of the same users, items, times and labels."""
        fields = self.uid_field, self.iid_field
        if any(
            not np.array_equal(self.field2id_token[field], split.field2id_token[field])
            for field in fields
        ):
            return False
        saved = split.behaviours
        columns = dict(zip(fields, (saved.user, saved.item), strict=True))
        if saved.liked is not None:
            columns[self.label_field] = saved.liked
        return (
            len(self.inter_feat) == len(saved)
            and (self.raw_time is None) == (saved.time is None)
            and (saved.time is None or np.array_equal(self.raw_time, saved.time, equal_nan=True))
            and all(np.array_equal(self.inter_feat[name], columns[name]) for name in columns)
        )

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
        view.splits = None
        for name in FIELD_TABLES:
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
        if config["double_tower"]:
            # Other models leave floats out that are not declared; these count them all the same.
            view._hidden |= view._undeclared_floats()
        if config["double_tower"] and not view.fields(
            source=[FeatureSource.USER, FeatureSource.USER_ID]
        ):
            raise SettingsError(
                f"arm {arm.name!r} leaves the user tower of {config['model']} without a field: "
                "set user_id: keep in uip_arms, or give the arm a facet"
            )
        return view

    def _undeclared_floats(self) -> set[str]:
        """Features of users and items that are numbers, and no numerical features."""
        floats = {FeatureType.FLOAT, FeatureType.FLOAT_SEQ}
        sources = {FeatureSource.USER, FeatureSource.ITEM}
        return {
            name
            for name, ftype in self.field2type.items()
            if ftype in floats
            and self.field2source[name] in sources
            and name not in self.config["numerical_features"]
        }

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

    def _samples_negatives(self, *phases: str) -> bool:
        """Whether RecBole samples negatives in any of ``phases``, by default in any at all."""
        return any(
            self.config[f"{phase}_neg_sample_args"]["distribution"] != "none"
            for phase in phases or PHASES
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
        if self.raw_time is None:
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
            samples = self._samples_negatives(phase)
            if labelled and samples:
                raise SettingsError(
                    f"{key} samples negatives, and the data have labels ({self.label_field!r}), "
                    "which RecBole then overwrites: every row would be a positive, disliked ones "
                    "too. Have one or the other: train_neg_sample_args: ~ and eval_args.mode: "
                    "labeled; or no threshold or LABEL_FIELD, and liked rows alone by "
                    "val_interval, such as {rating: '[4,inf)'}"
                )
            if not labelled and not samples:
                loaded = list(self.inter_feat.columns)
                near = difflib.get_close_matches(str(self.label_field), loaded, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise SettingsError(
                    f"LABEL_FIELD={self.label_field!r} is not among the loaded columns "
                    f"{', '.join(loaded)}{hint}, and {key} samples no negatives: every row would "
                    "be a positive. Load it by load_col if the file has it, make labels of ratings "
                    "by threshold, such as threshold: {rating: 4}, name a 0/1 column by "
                    "LABEL_FIELD, or have RecBole sample negatives by train_neg_sample_args: "
                    "{distribution: uniform, sample_num: 1} and eval_args.mode: uni10"
                )

    def _say_what_is_not_read(self) -> None:
        """Name the loaded numbers that are features of no model, for no setting says that they are.

        RecBole's models read floats that are numerical features alone.
        """
        told = {self.time_field, self.label_field, self.config["RATING_FIELD"], ROW}
        told |= {*(self.config["threshold"] or ()), *self.config["numerical_features"]}
        unread = [
            name
            for name, ftype in self.field2type.items()
            if ftype in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ) and name not in told
        ]
        if unread and not self.config["double_tower"]:
            logger.warning(
                "%s: loaded, and read by no model: name them in numerical_features (and their "
                "ranges in normalize_field, or normalize_all=True), or leave them out of load_col",
                ", ".join(unread),
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
            return Behaviours(user, item, liked, self.raw_time, split_of, *sizes)
        except ValueError as error:
            raise SettingsError(f"dataset {self.dataset_name!r}: {error}") from error

    def _infer(self) -> Any:
        settings = self.config.uip
        if self.raw_time is None and settings.time == "auto" and settings.facets:
            logger.warning(
                "the data have no timestamps, so profiles are cross-fitted: a training row's is of "
                "others of its user's training rows, a held-out row's of all of them"
            )
        settings = self.settings = profile_stage.resolved(settings, self.behaviours)
        return profile_stage.infer(
            self.behaviours, self.item_texts(settings), settings, self.user_folds(settings)
        )

    def user_folds(self, settings: UIPSettings) -> np.ndarray:
        """Fold of each user by its token, shape (n_users,), int64."""
        return folds_of(self.field2id_token[self.uid_field], settings.user_folds, settings.seed)

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

    def _detach(self) -> None:
        """Take every profile field out of this view."""
        for field in self.profiles.fields:
            for feat in (self.inter_feat, self.user_feat):
                if feat is not None and field.name in feat:
                    feat.drop(field.name)
            for name in FIELD_TABLES:
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

    def save(self) -> None:
        """Write the dataset to ``checkpoint_dir``, as RecBole does, but whole or not at all."""
        path = saved_dataset(self.config)
        logger.info("saving the filtered dataset to %s", path)
        with atomic_write(path) as file:
            pickle.dump(self, file)


def _take(feat: Interaction, index: Any) -> Interaction:
    # Interaction's own indexing makes a Python list of the index, and a tensor of it per field:
    # most of the time of a batch. For row numbers, index_select takes a third of indexing's time.
    by_number = torch.is_tensor(index) and index.dtype == torch.int64 and index.dim() == 1
    return Interaction(
        {
            name: column.index_select(0, index) if by_number else column[index]
            for name, column in feat.interaction.items()
        }
    )


def saved_dataset(config: UIPConfig) -> str:
    """Path of the filtered dataset that :meth:`UIPDataset.save` writes."""
    return os.path.join(config["checkpoint_dir"], f"{config['dataset']}-{UIPDataset.__name__}.pth")

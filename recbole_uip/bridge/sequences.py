"""Rows with their users' strictly earlier events as a sequence, for RecBole's DIN and DIEN.

RecBole's own sequences are not what a fair comparison needs: they drop each user's first event as
a row, take the order of the file for the order of events at the same time, and hold item IDs
alone, for DIN and DIEN look up the features of a sequence by the item and read nothing else of an
event. Here rows, splits, labels and times are those of :class:`UIPDataset`, the history of a row
is the one that profiles are made of, and an event is a *variant* of its item.

With n items (0 is [PAD]), the table of item features that the models look into has 3 n rows:

=================  ==============================================  ==========
rows               what they are                                   feedback
=================  ==============================================  ==========
0 to n - 1         the items, as targets                           0 ([PAD])
n to 2 n - 1       the same items, in events that were disliked    1
2 n to 3 n - 1     the same items, in events that were liked       2
=================  ==============================================  ==========

Every column of a variant is its item's, the item ID too. So the models' embedding of the item ID
is not tripled: a target and its variants share it, and the feedback has an embedding of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_uip.behaviours import Behaviours
from recbole_uip.bridge.config import UIPConfig, restore_config
from recbole_uip.bridge.dataset import UIPDataset
from recbole_uip.bridge.loading import ROW
from recbole_uip.em.states import History
from recbole_uip.settings import SettingsError

# The package of these models turns anomaly detection on (in its sine.py), which checks every
# gradient of the process, whatever the model.
with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled()):
    importlib.import_module("recbole.model.sequential_recommender")

__all__ = ["FEEDBACK", "MODELS", "SequenceConfig", "SequenceDataset", "event_variants"]

#: RecBole's models of a user's events that read item features and a label.
MODELS = ("DIN", "DIEN")

#: Field of the items with the feedback of a variant.
FEEDBACK = "feedback"

_ARM = {"history": {"facets": [], "user_id": "keep"}}
_SAVED = ("save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path")


class SequenceConfig(UIPConfig):
    """A config of DIN or DIEN with the data and protocol of a context-aware model.

    RecBole's defaults for the two (leave-one-out, sampled candidates) give way to those of
    context-aware models, so that the same settings give the same rows, splits and labels.
    Profiles (``uip_facets``, ``uip_arms``) are left out; ``uip_history`` and ``uip_refresh``
    hold.

    Parameters
    ----------
    model : {"DIN", "DIEN"}
    dataset : str
    config_file_list : sequence of path, optional
    config_dict : mapping, optional
    command_line : sequence of str, optional
        As in :class:`~recbole_uip.bridge.config.UIPConfig`.

    Raises
    ------
    SettingsError
        If it is another model, or a setting cannot be used.
    """

    def __init__(
        self,
        model: str,
        dataset: str,
        config_file_list: Sequence[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Sequence[str] = (),
    ) -> None:
        super().__init__(model, dataset, config_file_list, config_dict, command_line)
        for key in _SAVED:
            if self[key]:
                raise SettingsError(
                    f"{key}={self[key]!r}: datasets of {model} are not saved; leave it out"
                )
        if self.uip.time in ("cross_fitted", "static"):
            raise SettingsError(
                f"uip_time={self.uip.time} has no meaning for {model}, which reads the events "
                "before a row: set uip_time to point_in_time"
            )

    def _get_model_and_dataset(self, model: str, dataset: str) -> tuple[str, type, str]:
        if model not in MODELS:
            raise SettingsError(
                f"model={model!r} reads no sequence of events with feedback: take one of "
                f"{', '.join(MODELS)}"
            )
        # Past UIPConfig's own check, which admits context-aware models alone.
        return super(UIPConfig, self)._get_model_and_dataset(model, dataset)

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        # RecBole reads nothing but the type here, and chooses its defaults by it.
        like_context = SimpleNamespace(type=ModelType.CONTEXT)
        super()._load_internal_config_dict(model, like_context, dataset)

    def _get_final_config_dict(self) -> dict[str, Any]:
        return {**super()._get_final_config_dict(), "uip_facets": {}, "uip_arms": _ARM}

    def __reduce__(self) -> tuple:
        _, (state,) = super().__reduce__()
        return _restore, (state,)


def _restore(state: dict[str, Any]) -> SequenceConfig:
    """Rebuild a pickled config, which an experiment sends to its workers."""
    config = SequenceConfig.__new__(SequenceConfig)
    config.__dict__.update(restore_config(state).__dict__)
    return config


class SequenceDataset(UIPDataset):
    """A :class:`UIPDataset` whose rows carry the most recent events of their history.

    Batches have, under the names that RecBole's settings give them, ``item_id_list`` (variants of
    items, the earliest event first, then [PAD]) and ``item_length``; for DIEN also
    ``neg_item_id_list``: beside each event another item of the catalogue with the same feedback,
    drawn once an event, so that the auxiliary loss has to tell items and not feedback apart. They
    are made when a batch is asked for: nothing is stored but one number an event.

    A row without history has one event, [PAD]: DIEN's recurrent network knows no empty sequence,
    and what the model learns of this event is its answer to users it knows nothing of.

    Parameters
    ----------
    config : SequenceConfig

    Raises
    ------
    SettingsError
        If the data have no timestamps, or an item field of the name ``feedback``.
    """

    def __init__(self, config: SequenceConfig) -> None:
        if not isinstance(config, SequenceConfig):
            raise TypeError(f"SequenceDataset needs a SequenceConfig, not {type(config).__name__}")
        self.max_length: int = config["MAX_ITEM_LIST_LENGTH"]
        # Variants in the order of the history's events, behind one [PAD]: by name of the list.
        self._variants: dict[str, torch.Tensor] = {}
        super().__init__(config)

    def _change_feat_format(self) -> None:
        super()._change_feat_format()
        if FEEDBACK in self.field2type:
            raise SettingsError(
                f"the data have a field {FEEDBACK!r}, which is the name of the events' feedback: "
                "leave it out by unload_col, or rename the column"
            )
        items = self.get_item_feature()
        columns = {name: torch.cat([column] * 3) for name, column in items.interaction.items()}
        columns[FEEDBACK] = torch.arange(3).repeat_interleave(len(items))
        self.item_feat = Interaction(columns)
        self.set_field_property(FEEDBACK, FeatureType.TOKEN, FeatureSource.ITEM, 1)
        tokens = np.array(["[PAD]", "disliked", "liked"])
        self.field2id_token[FEEDBACK] = tokens
        self.field2token_id[FEEDBACK] = {token: index for index, token in enumerate(tokens)}

    def build(self) -> list[SequenceDataset]:
        """As :class:`UIPDataset` does it; the splits' rows carry sequences."""
        if self.splits is None:
            if self.raw_time is None:
                raise SettingsError(
                    f"{self.config['model']} reads the events before a row, and the data have no "
                    f"time field {self.time_field!r} of floats: load it by load_col, or name it "
                    "by TIME_FIELD"
                )
            super().build()
            variants = self._make_variants()
            for split in self.splits:
                split._variants = variants
        return super().build()

    def join(self, df: Interaction) -> Interaction:
        """Join user and item features, and the events before each row."""
        df = super().join(df)
        if self._variants and ROW in df:
            df.update(Interaction(self.sequences(df[ROW])))
        return df

    def sequences(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Events before each of ``rows``, the most recent ``MAX_ITEM_LIST_LENGTH`` of them.

        Parameters
        ----------
        rows : Tensor of int64, shape (n,)

        Returns
        -------
        dict of str to Tensor of int64
            By field name: lists, shape (n, ``MAX_ITEM_LIST_LENGTH``), and lengths, shape (n,).
        """
        history = self.profiles.history
        seen = torch.from_numpy(history.seen)[rows]
        first = torch.from_numpy(history.first)[torch.from_numpy(history.timeline)[rows]]
        known = seen.clamp(max=self.max_length)
        place = torch.arange(self.max_length)
        inside = place < known[:, None]
        # Event k of the history is entry k + 1; entry 0 is [PAD].
        entry = ((first + seen - known + 1)[:, None] + place) * inside
        found = {name: variants[entry] for name, variants in self._variants.items()}
        found[self.config["ITEM_LIST_LENGTH_FIELD"]] = known.clamp(min=1)
        return found

    def _make_variants(self) -> dict[str, torch.Tensor]:
        behaviours, history = self.behaviours, self.profiles.history
        of_events = event_variants(behaviours, history)
        name = self.iid_field + self.config["LIST_SUFFIX"]
        made = {name: of_events}
        if self.config["model"] == "DIEN":
            made[self.config["NEG_PREFIX"] + name] = _other_variants(
                of_events, behaviours.n_items, self.config["seed"]
            )
        return {
            name: torch.from_numpy(np.concatenate([[0], variants]))
            for name, variants in made.items()
        }


def event_variants(behaviours: Behaviours, history: History) -> np.ndarray:
    """Variant of each of the history's events: item + n (1 + liked), with n items.

    Implicit feedback is liked.

    Returns
    -------
    ndarray of int64, shape (n_events,)
    """
    item = behaviours.item[history.events]
    if behaviours.liked is None:
        return item + 2 * behaviours.n_items
    return item + behaviours.n_items * (1 + behaviours.liked[history.events].astype(np.int64))


def _other_variants(variants: np.ndarray, n_items: int, seed: int) -> np.ndarray:
    """Variants of other items, uniformly drawn, with the same feedback."""
    if n_items < 3:
        raise SettingsError("DIEN needs at least two items, to have another one beside an event")
    # A generator of our own: drawing from the global one would change the split.
    step = np.random.default_rng(seed).integers(1, n_items - 1, size=len(variants))
    feedback, item = np.divmod(variants, n_items)
    return feedback * n_items + 1 + (item - 1 + step) % (n_items - 1)

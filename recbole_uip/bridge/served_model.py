"""RecBole's models made from a checkpoint and a description of their fields, without a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from recbole.model.context_aware_recommender import kd_dagfm
from recbole.utils import FeatureSource, FeatureType

from recbole_uip.bridge.config import UIPConfig, restore_config
from recbole_uip.settings import SettingsError

__all__ = ["make_model", "model_fields"]

_SOURCES = {source.value: source for source in FeatureSource}
_TYPES = {ftype.value: ftype for ftype in FeatureType}


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


def make_model(
    name: str,
    saved: Mapping[str, Any],
    fields: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> torch.nn.Module:
    """RecBole's model of a checkpoint, with its weights, ready to predict.

    Parameters
    ----------
    name : str
    saved : mapping
        The checkpoint.
    fields : sequence of mapping
        ``fields`` of the model's description.
    device : torch.device

    Raises
    ------
    SettingsError
        If the weights do not fit the fields.
    """
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

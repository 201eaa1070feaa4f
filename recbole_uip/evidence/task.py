"""What the profile stage of a data set would be given, for commands that measure it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recbole.utils import init_seed

from recbole_uip.behaviours import Behaviours
from recbole_uip.bridge import UIPConfig, UIPDataset
from recbole_uip.bridge.config import load_config_files, parse_command_line
from recbole_uip.bridge.run import DEFAULT_DATASET, DEFAULT_MODEL
from recbole_uip.settings import SettingsError, UIPSettings

__all__ = ["Task", "load_dataset", "load_task", "parse_config"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What the profile stage is given.

    Attributes
    ----------
    behaviours : Behaviours
    texts : list of str or None, length n_items, or None
        Behaviour text of each item; None without LM facets.
    settings : UIPSettings
        With ``auto`` decided by the data.
    fold : ndarray of int64, shape (n_users,)
        Fold of each user, as a run has it.
    """

    behaviours: Behaviours
    texts: list[str | None] | None
    settings: UIPSettings
    fold: np.ndarray

    @property
    def prompts(self) -> list[str]:
        """Names in words of the facets that are soft tokens of the LM."""
        return [facet.prompt for facet in self.settings.prompted_facets]

    @property
    def endings(self) -> tuple[str, str] | None:
        """Feedback endings, where there is feedback."""
        return self.settings.endings if self.behaviours.liked is not None else None

    @property
    def distinct(self) -> list[str]:
        """Distinct texts, in the order of the items."""
        return list(dict.fromkeys(text for text in self.texts or () if text))

    def using(self, cache: Path, kept: Sequence[str] | None = None) -> Task:
        """The same with another cache folder, and of the texts only those ``kept``."""
        texts = self.texts
        if kept is not None:
            known = set(kept)
            texts = [text if text in known else None for text in texts]
        settings = dataclasses.replace(self.settings, cache=cache)
        return dataclasses.replace(self, texts=texts, settings=settings)


def parse_config(
    dataset: str | None,
    config_files: Sequence[str] | None,
    config: Mapping[str, Any] | None,
    command_line: Sequence[str],
) -> tuple[str, UIPConfig]:
    """The name of the one data set that is asked for, and its config.

    Raises
    ------
    SettingsError
        If a setting cannot be used, several data sets are named, or there are no facets.
    """
    given = {
        **load_config_files(config_files or ()),
        **(config or {}),
        **parse_command_line(command_line),
    }
    name = str(given.get("dataset", DEFAULT_DATASET) if dataset is None else dataset)
    if not name or "," in name:
        raise SettingsError(f"dataset={name!r}: this command takes the name of one dataset")
    # The profile stage is the same for every model that reads its fields.
    parsed = UIPConfig(DEFAULT_MODEL, name, config_files, config, command_line=command_line)
    if not parsed.uip.facets:
        raise SettingsError("uip_facets is empty: this command needs facets")
    return name, parsed


def load_dataset(config: UIPConfig) -> tuple[UIPDataset, UIPSettings]:
    """The data, loaded and split as a run does it, and the settings with ``auto`` decided."""
    settings = config.uip
    config = copy.deepcopy(config)
    config["uip_facets"], config["uip_arms"] = {}, None
    logger.info("loading and splitting %s", config["dataset"])
    # A random split comes from RecBole's global generator.
    init_seed(config["seed"], config["reproducibility"])
    dataset = UIPDataset(config)
    dataset.build()
    decided = dataset.settings
    return dataset, dataclasses.replace(settings, time=decided.time, history=decided.history)


def load_task(config: UIPConfig) -> Task:
    """Load and split the data as a run does, and stop before the profile stage."""
    dataset, settings = load_dataset(config)
    texts = dataset.item_texts(settings)
    if texts is not None and not any(texts):
        raise SettingsError(
            "no item has a text, so there is nothing to score: check uip_item_text, or take "
            "facets with source: collaborative or constant"
        )
    return Task(dataset.behaviours, texts, settings, dataset.user_folds(settings))

"""From a config to the dataloaders of an arm: datasets and splits made once, or loaded."""

from __future__ import annotations

import logging
import os
import pickle
from typing import Any

from recbole.data.utils import create_samplers, get_dataloader

import recbole_uip
from recbole_uip.bridge.config import UIPConfig
from recbole_uip.bridge.dataset import FIELD_TABLES, PHASES, UIPDataset, saved_dataset
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.bridge.storage import load_pickle
from recbole_uip.files import atomic_write
from recbole_uip.settings import ArmSettings

__all__ = ["create_dataset", "data_preparation", "data_settings"]

logger = logging.getLogger(__name__)

# Keys that say where things go or which of the fields a model is given, not what the fields are.
_INERT = ("uip_output", "uip_cache", "uip_arms", "uip_user_id", "uip_lm_device")
# Of RecBole's keys, those that shape the data beside the ones it lists itself.
_DATA_KEYS = (
    "dataset", "data_path", "seed", "repeatable", "eval_args", "encoding", "numerical_features",
    "discretization",
)  # fmt: skip


def create_dataset(config: UIPConfig) -> UIPDataset:
    """The dataset of ``config``: a saved one, where nothing that it depends on has changed.

    That is the settings, the files (as far as they are still there) and the version of this
    package.
    """
    path = config["dataset_save_path"] or saved_dataset(config)
    if os.path.isfile(path):
        dataset = load_pickle(path)
        if isinstance(dataset, UIPDataset) and _unchanged(config, dataset.config, splits=False):
            changed = _changed(dataset)
            if not changed:
                logger.info("loading the filtered dataset from %s", path)
                dataset.config = config
                return dataset
            logger.warning("%s has changed since %s was saved: made anew", changed, path)
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
    if dataset.splits is None:
        saved = _load_splits(config, dataset)
        if saved is None:
            dataset.build()
            if config["save_dataloaders"]:
                _save_dataloaders(config, dataset)
        else:
            dataset.restore(saved)
    views = [split.select(arm, config) for split in dataset.splits]
    return _dataloaders(config, dataset, views)


def _dataloaders(config: UIPConfig, dataset: UIPDataset, splits: list) -> tuple[Any, Any, Any]:
    with recbole_refusals(config):
        samplers = create_samplers(config, dataset, splits)
        return tuple(
            get_dataloader(config, phase)(
                config, split, sampler, shuffle=config["shuffle"] if phase == "train" else False
            )
            for phase, split, sampler in zip(PHASES, splits, samplers, strict=True)
        )


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


def _changed(dataset: UIPDataset) -> str | None:
    """What a saved dataset was made of and is another now; files that are gone are not."""
    # An early version did not say.
    if getattr(dataset, "version", None) != recbole_uip.__version__:
        return "recbole-uip"
    now = dataset.hash_files()
    return next((name for name in now if now[name] != dataset.files.get(name)), None)


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


def _load_splits(config: UIPConfig, dataset: UIPDataset) -> list[UIPDataset] | None:
    path = config["dataloaders_save_path"] or _saved_dataloaders(config)
    if not os.path.isfile(path):
        return None
    splits = [loader._dataset for loader, _ in load_pickle(path)]
    if not all(isinstance(split, UIPDataset) for split in splits) or not _unchanged(
        config, splits[0].config
    ):
        return None
    if not dataset.has_rows_of(splits[0]):
        logger.warning(
            "the dataloaders in %s are of other rows than the files hold now: made anew", path
        )
        return None
    made_of, now = getattr(splits[0], "made_of", None) or {}, dataset.ingredients()
    changed = [name for name in {**made_of, **now} if made_of.get(name) != now.get(name)]
    if changed:
        logger.warning(
            "%s has changed since the dataloaders in %s were saved: made anew", changed[0], path
        )
        return None
    logger.info("loading the split dataloaders from %s", path)
    for split in splits:
        if split.label_field not in split.inter_feat:
            # A loader that samples has made it a field, which the next one does again, in order.
            for name in FIELD_TABLES:
                getattr(split, name).pop(split.label_field, None)
    return splits

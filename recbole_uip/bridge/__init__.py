"""The bridge to RecBole: the only package here that imports it."""

from recbole_uip.bridge.config import UIPConfig
from recbole_uip.bridge.dataset import UIPDataset
from recbole_uip.bridge.preparation import create_dataset, data_preparation
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.bridge.trainer import make_trainer

__all__ = [
    "UIPConfig",
    "UIPDataset",
    "create_dataset",
    "data_preparation",
    "make_trainer",
    "run_recbole_uip",
]

"""Where RecBole 1.2.1 and today's numpy and torch disagree beyond the reach of a subclass.

Everything a subclass can override is overridden in :mod:`~recbole_uip.bridge.config`,
:mod:`~recbole_uip.bridge.loading` and :mod:`~recbole_uip.bridge.trainer`. Left are names that
RecBole's *module functions* look up. They get a stand-in in RecBole's own module namespace;
numpy, pandas and torch themselves are never touched.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import numpy as np
import recbole.data.dataset.dataset as recbole_dataset
import recbole.data.interaction as recbole_interaction
import recbole.evaluator.metrics as recbole_metrics
import recbole.trainer.trainer as recbole_trainer
import torch

__all__ = ["install"]


class _NumpyWithFloat(types.ModuleType):
    """numpy, and the alias ``np.float`` which numpy 1.24 removed."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def install() -> None:
    """Put the stand-ins in place; calling it again changes nothing."""
    numpy_with_float = _NumpyWithFloat("numpy")
    # _convert_to_tensor, the top-k metrics and Dataset._fill_nan read np.float when called.
    for module in (recbole_interaction, recbole_metrics, recbole_dataset):
        if not hasattr(module.np, "float"):
            module.np = numpy_with_float
    # torch.cuda.amp.GradScaler is deprecated; Trainer._train_epoch makes one in every epoch.
    if isinstance(recbole_trainer.amp, types.ModuleType):
        recbole_trainer.amp = types.SimpleNamespace(
            GradScaler=partial(torch.amp.GradScaler, "cuda")
        )

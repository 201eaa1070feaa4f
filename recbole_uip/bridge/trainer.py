"""RecBole's trainer with safe, atomic checkpoints and a record of what it predicted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import recbole.trainer.trainer as recbole_trainer
import torch
from recbole.evaluator import Collector
from recbole.utils import EvaluatorType, get_trainer

from recbole_uip.bridge import compat
from recbole_uip.bridge.loading import ROW
from recbole_uip.bridge.storage import load_checkpoint, plain
from recbole_uip.files import atomic_write
from recbole_uip.lm.backbone import multiplies_bfloat16
from recbole_uip.settings import SettingsError

__all__ = ["UIPTrainerMixin", "make_trainer"]


@contextlib.contextmanager
def _tensorboard_in(folder: str) -> Iterator[None]:
    """Have RecBole's writer put its events under ``folder``, not into the working directory.

    Trainer.__init__ makes the writer by a function of its module, which takes no folder.
    """
    original = recbole_trainer.get_tensorboard

    def get_tensorboard(logger: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder)

    recbole_trainer.get_tensorboard = get_tensorboard
    try:
        yield
    finally:
        recbole_trainer.get_tensorboard = original


class _Collector(Collector):
    """RecBole's collector, which moves all that it has to the CPU, numbers and counts too."""

    def get_data_struct(self) -> Any:
        found = self.data_struct._data_dict
        others = {key: value for key, value in found.items() if not torch.is_tensor(value)}
        for key in others:
            del found[key]
        collected = super().get_data_struct()
        # They are of the training rows, and stay for the next evaluation.
        for struct in (self.data_struct, collected):
            struct._data_dict.update(others)
        return collected


class UIPTrainerMixin:
    """Goes before a trainer class of RecBole.

    Attributes
    ----------
    predictions : dict of str to ndarray
        What the last evaluation predicted: ``row`` (number of the interaction, in the input's
        order), ``user``, ``item``, ``label`` and ``score``.
    score_seconds : float
        What the last evaluation spent in the model.
    """

    def __init__(self, config: Any, model: torch.nn.Module) -> None:
        compat.install()
        self._records: list[dict[str, np.ndarray]] = []
        self.score_seconds = 0.0
        if not hasattr(model, "other_parameter_name"):
            # FwFM has its field pairs' weights in a plain random tensor, which no state_dict
            # holds: without it, a checkpoint would score by other weights.
            loose = [name for name, value in vars(model).items() if torch.is_tensor(value)]
            model.other_parameter_name = loose
        # DIN and DIEN name their embedding module, which holds the whole dataset; state_dict has
        # its weights.
        model.other_parameter_name = [
            name
            for name in model.other_parameter_name
            if not isinstance(getattr(model, name), torch.nn.Module)
        ]
        with _tensorboard_in(os.path.join(config["checkpoint_dir"], "log_tensorboard")):
            super().__init__(config, model)
        self.eval_collector = _Collector(config)
        # On a GPU RecBole's mixed precision is float16.
        if self.enable_amp and self.device.type == "cpu" and not multiplies_bfloat16(self.device):
            self.logger.warning(
                "enable_amp=True computes in bfloat16, and this CPU has no instructions for it "
                "(AVX512-BF16 or AMX): training may take a hundred times as long; set "
                "enable_amp=False"
            )

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        names = self._records[0] if self._records else ()
        return {name: np.concatenate([part[name] for part in self._records]) for name in names}

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> dict[str, float] | None:
        """As in RecBole; the best model is loaded as weights only."""
        self._records, self.score_seconds = [], 0.0
        if eval_data and load_best_model:
            checkpoint = load_checkpoint(model_file or self.saved_model_file, self.device)
            self.model.load_state_dict(checkpoint["state_dict"])
            self.model.load_other_parameter(checkpoint.get("other_parameter"))
        return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    def resume_checkpoint(self, resume_file: str | os.PathLike) -> None:
        """As in RecBole; the checkpoint may hold weights and plain values only."""
        self.saved_model_file = os.fspath(resume_file)
        checkpoint = load_checkpoint(resume_file, self.device)
        self.start_epoch = checkpoint["epoch"] + 1
        self.cur_step = checkpoint["cur_step"]
        self.best_valid_score = checkpoint["best_valid_score"]
        if checkpoint["config"]["model"].lower() != self.config["model"].lower():
            self.logger.warning(
                "%s is a checkpoint of %s, not of %s",
                resume_file,
                checkpoint["config"]["model"],
                self.config["model"],
            )
        self.model.load_state_dict(checkpoint["state_dict"])
        self.model.load_other_parameter(checkpoint.get("other_parameter"))
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def _check_nan(self, loss: torch.Tensor) -> None:
        if torch.isnan(loss):
            raise SettingsError(
                f"the training loss of {self.config['model']} is NaN: lower learning_rate="
                f"{self.config['learning_rate']}, or leave out a numerical feature that has values "
                f"far out (numerical_features={self.config['numerical_features']})"
            )

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return
        path = kwargs.pop("saved_model_file", self.saved_model_file)
        state = {
            "config": plain(self.config.final_config_dict),
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": plain(self.best_valid_score),
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(path) as file:
            torch.save(state, file)
        if verbose:
            self.logger.info("saved the current model to %s", path)

    def _neg_sample_batch_eval(self, batched_data: tuple) -> tuple:
        started = time.perf_counter()
        interaction, scores, positive_u, positive_i = super()._neg_sample_batch_eval(batched_data)
        self.score_seconds += time.perf_counter() - started
        config = self.config
        row_scores = scores
        if config["eval_type"] == EvaluatorType.RANKING:
            # RecBole has spread the scores over a users x items matrix.
            row_scores = scores[batched_data[1], interaction[config["ITEM_ID_FIELD"]]]
        columns = {
            "row": ROW,
            "user": config["USER_ID_FIELD"],
            "item": config["ITEM_ID_FIELD"],
            "label": config["LABEL_FIELD"],
        }
        record = {
            name: interaction[column].cpu().numpy()
            for name, column in columns.items()
            if column in interaction
        }
        # A model's squeeze() turns a batch of one row into a scalar, which RecBole cannot append.
        row_scores = row_scores.reshape(-1)
        if config["eval_type"] == EvaluatorType.VALUE:
            scores = row_scores
        self._records.append({**record, "score": row_scores.detach().cpu().numpy()})
        return interaction, scores, positive_u, positive_i


def make_trainer(config: Any, model: torch.nn.Module) -> Any:
    """The trainer that RecBole has for ``model``, with :class:`UIPTrainerMixin` before it."""
    base = get_trainer(config["MODEL_TYPE"], config["model"])
    return type(f"UIP{base.__name__}", (UIPTrainerMixin, base), {})(config, model)

"""Adapt the LM to the texts of a catalogue before EM: LoRA, or a shared prompt encoder.

Both are PEFT's, trained by transformers' Trainer on item texts alone; no user and no label has a
part in it. ``lora`` moves the LM's weights by matrices of low rank (Hu et al. 2021). ``prompt``
(prompt tuning; Lester, Al-Rfou and Constant 2021) leaves them as they are and puts virtual tokens
before the prompt, which all facets and behaviours see. A tenth of the texts is kept apart: after
each epoch the adapter is judged on these, and that of the best epoch is kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone, load
from recbole_uip.lm.scoring import check_lengths, distinct_texts
from recbole_uip.settings import LMSettings, SettingsError

__all__ = ["Adaptation", "adapt"]

HELD_OUT = 0.1  # share of the texts that judge the adapter
FEWEST = 20  # texts that an adapter can be trained and judged on
BATCH = 32  # texts; they are short
LEARNING_RATES = {"lora": 1e-3, "prompt": 3e-2}
IGNORED = -100  # the label of tokens without loss


@dataclass(frozen=True)
class Adaptation:
    """What an adapter was trained on, and what it is worth.

    Attributes
    ----------
    texts, held_out : int
        Distinct texts that it was trained on, and judged on.
    before, after : float
        Loss of the held-out texts, nats a token, with the adapter as it begins (LoRA changes
        nothing yet, virtual tokens are random) and as it was kept.
    curve : list of float
        The same after each epoch.
    parameters : int
        Numbers that were trained.
    """

    texts: int
    held_out: int
    before: float
    after: float
    curve: list[float]
    parameters: int


def adapt(
    texts: Sequence[str],
    facets: Sequence[str],
    settings: LMSettings,
    cache: Path,
    folder: str | os.PathLike,
    *,
    method: str = "lora",
    size: int = 8,
    epochs: int = 5,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Adaptation:
    """Train an adapter on ``texts`` and write it to ``folder``, for ``uip_lm_adapter``.

    Parameters
    ----------
    texts : sequence of str
        Behaviour texts, already rendered; duplicates count once.
    facets : sequence of str
        Facet names in words, which come before a text (where it is scored, soft tokens stand
        between them).
    settings : LMSettings
        Without an adapter.
    cache : Path
        The user's cache directory; models are kept under ``models/``.
    folder : path-like
        Must not be there yet. It appears when the adapter is whole.
    method : {"lora", "prompt"}
    size : int
        Rank of LoRA's matrices, or number of virtual tokens.
    epochs : int
    learning_rate : float, optional
        Of AdamW; 1e-3 for LoRA and 3e-2 for a prompt by default.
    seed : int

    Raises
    ------
    SettingsError
        If ``folder`` is there already, or the texts or another argument cannot be used.
    ModelError
        If the LM cannot be found or loaded, or is too short for a text.
    """
    import peft
    from transformers import ProgressCallback, Trainer

    class Bar(ProgressCallback):
        """Trainer's bar, without its lines on the standard output."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    folder = Path(folder).expanduser()
    _check(folder, settings, method, size, epochs)
    rate = LEARNING_RATES[method] if learning_rate is None else learning_rate
    if not 0 < rate < math.inf:
        raise SettingsError(f"learning_rate={rate} must be positive and finite")
    texts, _ = distinct_texts(texts)
    if len(texts) < FEWEST:
        raise SettingsError(
            f"there are {len(texts)} distinct item texts, and an adapter needs at least {FEWEST}: "
            "check uip_item_text"
        )
    backbone = load(settings, cache)
    rows = _examples(texts, facets, backbone)
    order = np.random.default_rng(seed).permutation(len(rows))
    n_held_out = max(1, round(HELD_OUT * len(rows)))
    held_out, train = ([rows[row] for row in part] for part in np.split(order, [n_held_out]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        _seeded(seed),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch,
    ):
        model = peft.get_peft_model(backbone.model, _config(method, size))
        parameters, _ = model.get_nb_trainable_parameters()
        trainer = Trainer(
            model=model,
            args=_arguments(
                Path(scratch) / "trainer",
                num_train_epochs=epochs,
                learning_rate=rate,
                seed=seed,
                use_cpu=backbone.device.type == "cpu",
            ),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=_batch,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Bar)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        for config in model.peft_config.values():
            # where the LM lies on this machine is of no use elsewhere
            config.base_model_name_or_path = settings.name
        # embeddings are as they were; to find that out, PEFT would ask the hub
        model.save_pretrained(Path(scratch) / "adapter", save_embedding_layers=False)
        os.replace(Path(scratch) / "adapter", folder)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return Adaptation(
        texts=len(train),
        held_out=len(held_out),
        before=before,
        after=after,
        curve=losses[:epochs],
        parameters=parameters,
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which PEFT and Trainer draw from, and give them back after."""
    from transformers import set_seed

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _arguments(folder: Path, **chosen: Any) -> Any:
    """Trainer's arguments: an epoch is judged and kept, the best one wins, nothing is logged."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        logging_strategy="no",
        report_to="none",
        **chosen,
    )


def _check(folder: Path, settings: LMSettings, method: str, size: int, epochs: int) -> None:
    if folder.exists():
        raise SettingsError(f"{folder} is there already: choose another folder, or delete it first")
    if settings.adapter is not None:
        raise SettingsError(
            f"uip_lm_adapter={settings.adapter!r}: an adapter is trained on the LM alone; leave it "
            "out"
        )
    if method not in LEARNING_RATES:
        raise SettingsError(f"method={method!r} must be one of {', '.join(LEARNING_RATES)}")
    for name, value in (("size", size), ("epochs", epochs)):
        if value < 1:
            raise SettingsError(f"{name}={value} must be at least 1")


def _config(method: str, size: int) -> Any:
    """PEFT's configuration of an adapter."""
    from peft import LoraConfig, PromptTuningConfig, TaskType

    if method == "prompt":
        return PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=size)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=size, lora_alpha=2 * size, target_modules="all-linear"
    )


def _examples(
    texts: Sequence[str], facets: Sequence[str], backbone: Backbone
) -> list[dict[str, list[int]]]:
    """Token ids and labels of each text behind the facets' names, which have no loss."""
    ids, names = prompts.text_ids(backbone, texts), prompts.tokenize(backbone.tokenizer, facets)
    before = [*prompts.lead_ids(backbone), *(token for name in names for token in name)]
    check_lengths(texts, ids, backbone, len(before))
    return [
        {"input_ids": [*before, *text], "labels": [IGNORED] * len(before) + text} for text in ids
    ]


def _batch(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Examples side by side, padded on the right."""
    columns = {
        name: [torch.tensor(example[name]) for example in examples]
        for name in ("input_ids", "labels")
    }
    columns["attention_mask"] = [torch.ones_like(row) for row in columns["input_ids"]]
    filler = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler[name])
        for name, rows in columns.items()
    }

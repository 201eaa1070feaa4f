"""``recbole-uip adapt``: an adapter of the LM to a catalogue's texts, for ``uip_lm_adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip.cli.options import OVERRIDES, add_command, add_data, add_numbers, start

if TYPE_CHECKING:
    import argparse

__all__ = ["add_adapt"]

# RecBole's, which look as if they were of the adapter's training.
_OF_TRAINING = ("learner", "weight_decay", "train_batch_size", "stopping_step", "clip_grad_norm")


def add_adapt(subcommands: argparse._SubParsersAction) -> None:
    """Add ``adapt`` to the subcommands."""
    adapt = add_command(
        subcommands,
        "adapt",
        help="adapt the LM to the items' texts: LoRA, or a shared prompt encoder, by PEFT",
        epilog=OVERRIDES,
    )
    add_data(adapt)
    adapt.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder of the adapter"
    )
    adapt.add_argument(
        "--method",
        choices=("lora", "prompt"),
        default="lora",
        help="prompt: virtual tokens before every text (default: lora)",
    )
    numbers = [
        ("size", 8, "rank of LoRA's matrices, or number of virtual tokens"),
        ("epochs", 5, "passes over the texts; that with the least held-out loss is kept"),
    ]
    add_numbers(adapt, numbers)
    adapt.add_argument(
        "--learning_rate",
        type=float,
        metavar="RATE",
        help="of AdamW (default: 1e-3 for lora, 3e-2 for prompt); one in a file is RecBole's",
    )
    adapt.set_defaults(function=_adapt, parser=adapt)


def _adapt(namespace: argparse.Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.bridge.config import parse_command_line
    from recbole_uip.evidence.task import load_task, parse_config
    from recbole_uip.lm.adapt import adapt
    from recbole_uip.settings import SettingsError

    files = start(namespace, overrides)
    for key in parse_command_line(overrides):
        if key in _OF_TRAINING:
            raise SettingsError(
                f"--{key} is of RecBole's training and has no part in this one: leave it out; "
                "recbole-uip adapt --help names what can be set"
            )
    _, config = parse_config(namespace.dataset, files, None, overrides)
    task = load_task(config)
    if not task.distinct:
        raise SettingsError(
            "no facet reads the items' texts: uip_facets needs one of source: lm or prefix"
        )
    found = adapt(
        task.distinct,
        task.prompts,
        task.settings.lm,
        task.settings.cache,
        namespace.output,
        method=namespace.method,
        size=namespace.size,
        epochs=namespace.epochs,
        learning_rate=namespace.learning_rate,
        seed=task.settings.seed,
    )
    curve = ", ".join(f"{loss:.3f}" for loss in found.curve)
    print(
        f"{found.held_out:,} held-out texts, nats a token: {found.before:.3f} before, {curve} "
        f"after each epoch, {found.after:.3f} kept; {found.parameters:,} numbers trained on "
        f"{found.texts:,} texts. Use it by --uip_lm_adapter={namespace.output}"
    )

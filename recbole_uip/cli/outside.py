"""``recbole-uip outside``: the outside check of a run, by FuxiCTR's DeepFM."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip.cli.options import add_command, add_json, log_as, show_figures
from recbole_uip.evidence.outside.driver import INSTALL
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["add_outside"]

_DESCRIPTION = """\
Trains FuxiCTR's DeepFM on the rows and profiles that a run exported, arm by arm, with the run's
budget, and prints it beside RecBole's. FuxiCTR lives in an environment of its own:

  {}
  {}
"""


def add_outside(subcommands: argparse._SubParsersAction) -> None:
    """Add ``outside`` to the subcommands."""
    outside = add_command(
        subcommands,
        "outside",
        help="train another library's DeepFM on a run's profiles",
        description=_DESCRIPTION.format(*INSTALL),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    outside.add_argument(
        "folder", type=Path, metavar="RUN_DIR", help="output folder of recbole-uip run"
    )
    outside.add_argument(
        "--python", required=True, metavar="PATH", help="a Python that has FuxiCTR"
    )
    outside.add_argument(
        "--seeds", metavar="N,N", help="seeds of FuxiCTR's training (default: the run's)"
    )
    outside.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the run's dataset (default: where the run says it was)",
    )
    add_json(outside)
    outside.set_defaults(function=_outside, parser=outside)


def _outside(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.outside.check import format_outside, outside_check

    if overrides:
        raise SettingsError(
            f"argument {overrides[0]!r} is not understood: the budget is that of the run"
        )
    log_as(None)
    results = outside_check(
        namespace.folder, namespace.python, _seeds(namespace.seeds), namespace.data, command
    )
    show_figures(results, format_outside, namespace.json)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds={text} must be whole numbers, separated by commas") from None

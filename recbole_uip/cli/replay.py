"""``recbole-uip replay``: the test period of a finished run as an A/B test."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip.cli.options import add_command, add_json, log_as, show_figures
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["add_replay"]

_DESCRIPTION = """\
Replays the test rows of a run in the order of time: each row's profile is looked up in a live
feature bank, then its event enters the bank. Users are hashed into two arms, which two arms of
the run score: an A/A run, the A/B run, both by day, and what a look-up, a score and an update cost.
"""


def add_replay(subcommands: argparse._SubParsersAction) -> None:
    """Add ``replay`` to the subcommands."""
    replay = add_command(
        subcommands,
        "replay",
        help="replay a run's test period as an A/B test, as it would be served",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument(
        "folder", type=Path, metavar="RUN_DIR", help="output folder of recbole-uip run"
    )
    replay.add_argument("--model", "-m", default="DeepFM", help="of the run (default: DeepFM)")
    replay.add_argument("--a", default="plain", metavar="ARM", help="arm A (default: plain)")
    replay.add_argument("--b", default="uip", metavar="ARM", help="arm B (default: uip)")
    replay.add_argument("--salt", metavar="TEXT", help="another draw of the users who are in arm B")
    replay.add_argument("--limit", type=int, metavar="N", help="the first N test rows alone")
    add_json(replay)
    replay.set_defaults(function=_replay, parser=replay)


def _replay(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.replay.ab import SALT
    from recbole_uip.evidence.replay.report import format_replay
    from recbole_uip.evidence.replay.serve import replay

    if overrides:
        raise SettingsError(
            f"argument {overrides[0]!r} is not understood: models and profiles are the run's"
        )
    log_as(None)
    results = replay(
        namespace.folder,
        namespace.model,
        namespace.a,
        namespace.b,
        limit=namespace.limit,
        salt=SALT if namespace.salt is None else namespace.salt,
        command=command,
    )
    show_figures(results, format_replay, namespace.json)

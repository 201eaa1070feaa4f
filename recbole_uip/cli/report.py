"""``recbole-uip report``: what an experiment's finished runs say, as HTML and Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_uip.cli.options import add_command, log_as
from recbole_uip.settings import SettingsError

__all__ = ["add_report"]


def add_report(subcommands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = add_command(
        subcommands, "report", help="tables, intervals and charts of an experiment, finished or not"
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder of an experiment, or of several such as saved/experiments",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="the HTML file; a Markdown file goes beside it (default: DIR/report.html)",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=2000,
        metavar="N",
        help="draws of users for the intervals over users (default: 2000)",
    )
    parser.set_defaults(function=_report, parser=parser)


def _report(namespace: argparse.Namespace, overrides: list[str], command: str) -> None:
    if overrides:
        raise SettingsError(f"argument {overrides[0]!r} is not understood: report takes a folder")
    from recbole_uip.evidence.report.assemble import write_report

    log_as("WARNING")
    for path in write_report(
        namespace.folder, namespace.output, resamples=namespace.resamples, command=command
    ):
        print(f"report: {path}")

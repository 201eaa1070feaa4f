"""``recbole-uip bench``: what a stage costs on this machine, next to its floor."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from recbole_uip.cli.options import (
    OVERRIDES,
    add_command,
    add_data,
    add_json,
    add_numbers,
    show_figures,
    start,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

__all__ = ["add_bench"]


def add_bench(subcommands: argparse._SubParsersAction) -> None:
    """Add ``bench`` to the subcommands."""
    bench = add_command(
        subcommands, "bench", help="what a stage costs on this machine, next to its floor"
    )
    stages = bench.add_subparsers(metavar="STAGE", required=True)
    _stage(
        stages,
        "profiles",
        "bench",
        "LM scoring, reading the scores, and the profile stage",
        [("repeats", 3, "runs of all but the LM scoring")],
        items={"type": int, "metavar": "N", "help": "score only the first N distinct item texts"},
    )
    _stage(
        stages,
        "bank",
        "bench_bank",
        "building a feature bank of synthetic events, look-ups, matches and updates",
        [
            ("events", 25_000_000, "synthetic events, 25 a user"),
            ("repeats", 5, "runs of the batch figures"),
        ],
    )
    _stage(
        stages,
        "gradient",
        "bench_gradient",
        "tuning soft tokens through the LM: speed, agreement with the closed form, likelihood",
        [
            ("users", 200, "users that are tuned"),
            (
                "peers",
                4,
                "users for the comparison with the authors' formulation, at least 2; 0: none",
            ),
        ],
        speed={"action": "store_true", "help": "how fast the E-step is, and nothing else"},
    )


def _stage(
    stages: argparse._SubParsersAction,
    name: str,
    module: str,
    description: str,
    numbers: Sequence[tuple[str, int, str]],
    **others: dict[str, Any],
) -> None:
    """A stage's command: ``bench_<name>`` of the module measures it, with these options."""
    stage = add_command(stages, name, help=description, epilog=OVERRIDES)
    add_data(stage)
    add_json(stage)
    add_numbers(stage, numbers)
    for option, about in others.items():
        stage.add_argument(f"--{option}", **about)
    options = [*(number[0] for number in numbers), *others]

    def run(namespace: Namespace, overrides: list[str], command: str) -> None:
        from recbole_uip.evidence.figures import format_bench

        evidence = importlib.import_module(f"recbole_uip.evidence.{module}")
        measure = getattr(evidence, f"bench_{name}")
        given = {option: getattr(namespace, option) for option in options}
        results = measure(
            namespace.dataset,
            start(namespace, overrides),
            command_line=overrides,
            command=command,
            **given,
        )
        show_figures(results, format_bench, namespace.json)

    stage.set_defaults(function=run, parser=stage)

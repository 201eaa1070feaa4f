"""``recbole-uip bench``: what a stage costs on this machine, next to its floor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip.cli.options import OVERRIDES, add_config_files, show_figures, start

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["add_bench"]


def add_bench(subcommands: argparse._SubParsersAction) -> None:
    """Add ``bench`` to the subcommands."""
    bench = subcommands.add_parser(
        "bench", help="what a stage costs on this machine, next to its floor", allow_abbrev=False
    )
    stages = bench.add_subparsers(metavar="STAGE", required=True)
    profiles = _stage(
        stages, "profiles", _bench_profiles, "LM scoring, reading the scores, and the profile stage"
    )
    profiles.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="runs of all but the LM scoring (default: 3)",
    )
    profiles.add_argument(
        "--items", type=int, metavar="N", help="score only the first N distinct item texts"
    )
    bank = _stage(
        stages,
        "bank",
        _bench_bank,
        "building a feature bank of synthetic events, look-ups, matches and updates",
    )
    bank.add_argument(
        "--events", type=int, default=25_000_000, metavar="N",
        help="synthetic events, 25 a user (default: 25,000,000)",
    )  # fmt: skip
    bank.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of the batch figures (default: 5)"
    )
    gradient = _stage(
        stages,
        "gradient",
        _bench_gradient,
        "tuning soft tokens through the LM: speed, agreement with the closed form, likelihood",
    )
    gradient.add_argument(
        "--users", type=int, default=200, metavar="N", help="users that are tuned (default: 200)"
    )
    gradient.add_argument(
        "--peers", type=int, default=4, metavar="N",
        help="users for the comparison with the authors' formulation (default: 4; 0: none)",
    )  # fmt: skip
    gradient.add_argument(
        "--speed", action="store_true", help="how fast the E-step is, and nothing else"
    )


def _stage(
    stages: argparse._SubParsersAction, name: str, function: object, description: str
) -> ArgumentParser:
    """A stage's command with what all stages share."""
    stage = stages.add_parser(name, help=description, epilog=OVERRIDES, allow_abbrev=False)
    stage.add_argument(
        "--dataset", "-d", help="whose items and facets are taken (default: ml-100k)"
    )
    add_config_files(stage)
    stage.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    stage.set_defaults(function=function, parser=stage)
    return stage


def _bench_profiles(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.bench import bench_profiles

    files = start(namespace, overrides)
    results = bench_profiles(
        namespace.dataset,
        files,
        command_line=overrides,
        repeats=namespace.repeats,
        items=namespace.items,
        command=command,
    )
    _show_bench(results, namespace.json)


def _bench_bank(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.bench_bank import bench_bank

    files = start(namespace, overrides)
    results = bench_bank(
        namespace.dataset,
        files,
        command_line=overrides,
        events=namespace.events,
        repeats=namespace.repeats,
        command=command,
    )
    _show_bench(results, namespace.json)


def _bench_gradient(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.bench_gradient import bench_gradient

    files = start(namespace, overrides)
    results = bench_gradient(
        namespace.dataset,
        files,
        command_line=overrides,
        users=namespace.users,
        peers=namespace.peers,
        compare=not namespace.speed,
        command=command,
    )
    _show_bench(results, namespace.json)


def _show_bench(results: dict, path: Path | None) -> None:
    from recbole_uip.evidence.figures import format_bench

    show_figures(results, format_bench, path)

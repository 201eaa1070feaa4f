"""Command line: ``recbole-uip SUBCOMMAND`` and the script ``run_recbole_uip.py``."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip import __version__
from recbole_uip.cli.bank import add_bank
from recbole_uip.cli.ceiling import add_ceiling
from recbole_uip.cli.experiment import add_experiment
from recbole_uip.cli.likelihood import add_likelihood
from recbole_uip.cli.options import OVERRIDES, add_config_files, start
from recbole_uip.cli.outside import add_outside
from recbole_uip.cli.replay import add_replay
from recbole_uip.cli.report import add_report
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["entry_point", "main", "run_main"]

OK, UNEXPECTED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """``recbole-uip SUBCOMMAND ...``; returns the exit code."""
    parser = argparse.ArgumentParser(
        "recbole-uip",
        description="UserIP-Tuning for RecBole: inferred user profiles as token fields.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"recbole-uip {__version__}")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    run = subcommands.add_parser(
        "run",
        help="train RecBole's models with and without profile fields",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    _add_run_arguments(run)
    run.set_defaults(function=_run, parser=run)
    add_bank(subcommands)
    add_experiment(subcommands)
    add_report(subcommands)
    _add_bench(subcommands)
    add_outside(subcommands)
    add_replay(subcommands)
    add_ceiling(subcommands)
    add_likelihood(subcommands)
    summary = subcommands.add_parser(
        "summary",
        help="means over seeds and paired differences from plain, of finished runs",
        allow_abbrev=False,
    )
    summary.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="output folder of a run, or of several"
    )
    summary.add_argument(
        "--split", choices=("test", "valid"), default="test", help="whose metrics (default: test)"
    )
    summary.add_argument(
        "--by", metavar="SETTING", help="summarise each value of this setting apart"
    )
    summary.set_defaults(function=_summary, parser=summary)
    return _guarded(parser, arguments)


def entry_point() -> None:
    """The console script."""
    sys.exit(main())


def run_main(arguments: Sequence[str] | None = None) -> int:
    """``run_recbole_uip.py ...``, the same as ``recbole-uip run ...``."""
    parser = argparse.ArgumentParser(
        description="Train RecBole's models with and without profile fields.",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    _add_run_arguments(parser)
    parser.set_defaults(function=_run, parser=parser)
    return _guarded(parser, arguments)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", "-m", help="context-aware model of RecBole, or several: A,B (default: DeepFM)"
    )
    parser.add_argument(
        "--dataset", "-d", help="dataset, or several: a,b (default: ml-100k, which RecBole carries)"
    )
    add_config_files(parser)


def _add_bench(subcommands: argparse._SubParsersAction) -> None:
    bench = subcommands.add_parser(
        "bench", help="what a stage costs on this machine, next to its floor", allow_abbrev=False
    )
    stages = bench.add_subparsers(metavar="STAGE", required=True)
    profiles = stages.add_parser(
        "profiles",
        help="LM scoring, reading the scores, and the profile stage",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    profiles.add_argument(
        "--dataset", "-d", help="dataset (default: ml-100k, which RecBole carries)"
    )
    add_config_files(profiles)
    profiles.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
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
    profiles.set_defaults(function=_bench_profiles, parser=profiles)
    bank = stages.add_parser(
        "bank",
        help="building a feature bank of synthetic events, look-ups, matches and updates",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    bank.add_argument("--dataset", "-d", help="whose items and facets are taken (default: ml-100k)")
    add_config_files(bank)
    bank.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    bank.add_argument(
        "--events", type=int, default=25_000_000, metavar="N",
        help="synthetic events, 25 a user (default: 25,000,000)",
    )  # fmt: skip
    bank.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of the batch figures (default: 5)"
    )
    bank.set_defaults(function=_bench_bank, parser=bank)
    gradient = stages.add_parser(
        "gradient",
        help="tuning soft tokens through the LM: speed, agreement with the closed form, likelihood",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    gradient.add_argument("--dataset", "-d", help="dataset (default: ml-100k)")
    add_config_files(gradient)
    gradient.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    gradient.add_argument(
        "--users", type=int, default=200, metavar="N", help="users that are tuned (default: 200)"
    )
    gradient.add_argument(
        "--peers", type=int, default=2, metavar="N",
        help="users for the comparison with the authors' formulation (default: 2; 0: none)",
    )  # fmt: skip
    gradient.set_defaults(function=_bench_gradient, parser=gradient)


def _guarded(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the chosen function; say what went wrong, and by the exit code whose fault it is."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # argparse takes an unknown option with a space in it for a value, such as of --config_files.
    settings = [argument for argument in arguments if argument.startswith("--uip_")]
    others = [argument for argument in arguments if not argument.startswith("--uip_")]
    try:
        namespace, overrides = parser.parse_known_args(others)
        overrides += settings
    except SystemExit as stop:
        return int(stop.code or 0)
    command = shlex.join([parser.prog, *arguments])
    try:
        namespace.function(namespace, overrides, command)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SettingsError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except Exception:
        traceback.print_exc()
        return UNEXPECTED
    return OK


def _run(namespace: Namespace, overrides: list[str], command: str) -> None:
    # Imported late: --help and usage errors should not wait for torch.
    from recbole_uip.bridge.report import format_report
    from recbole_uip.bridge.run import run_recbole_uip

    files = start(namespace, overrides)
    results = run_recbole_uip(
        namespace.model, namespace.dataset, files, command_line=overrides, command=command
    )
    for each in [results] if "models" in results else filter(None, results.values()):
        print("\n" + format_report(each))


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
        command=command,
    )
    _show_bench(results, namespace.json)


def _show_bench(results: dict, path: Path | None) -> None:
    from recbole_uip.evidence.figures import format_bench, write_bench

    if path is not None:
        write_bench(path, results)
    print(format_bench(results))


def _summary(namespace: Namespace, overrides: list[str], command: str) -> None:
    if overrides:
        raise SettingsError(f"argument {overrides[0]!r} is not understood: summary takes folders")
    from recbole_uip.evidence.summary import format_summary, read_results, summarise

    cells = summarise(read_results(namespace.folders), namespace.split, namespace.by)
    print(format_summary(cells))

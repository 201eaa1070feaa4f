"""Command line: ``recbole-uip SUBCOMMAND`` and the script ``run_recbole_uip.py``."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip import __version__
from recbole_uip.cli.adapt import add_adapt
from recbole_uip.cli.bank import add_bank
from recbole_uip.cli.bench import add_bench
from recbole_uip.cli.ceiling import add_ceiling
from recbole_uip.cli.experiment import add_experiment
from recbole_uip.cli.likelihood import add_likelihood
from recbole_uip.cli.options import OVERRIDES, add_command, add_config_files, start
from recbole_uip.cli.outside import add_outside
from recbole_uip.cli.replay import add_replay
from recbole_uip.cli.report import add_report
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["entry_point", "main", "run_main"]

OK, UNEXPECTED, USAGE, INTERRUPTED = 0, 1, 2, 130
# What a file system refuses: no defect of ours, and for the user to mend.
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def main(arguments: Sequence[str] | None = None) -> int:
    """``recbole-uip SUBCOMMAND ...``; returns the exit code."""
    parser = argparse.ArgumentParser(
        "recbole-uip",
        description="UserIP-Tuning for RecBole: inferred user profiles as token fields.",
    )
    parser.add_argument("--version", action="version", version=f"recbole-uip {__version__}")
    subcommands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    run = add_command(
        subcommands,
        "run",
        help="train RecBole's models with and without profile fields",
        epilog=OVERRIDES,
    )
    _add_run_arguments(run)
    run.set_defaults(function=_run, parser=run)
    add_bank(subcommands)
    add_experiment(subcommands)
    add_report(subcommands)
    add_bench(subcommands)
    add_outside(subcommands)
    add_replay(subcommands)
    add_ceiling(subcommands)
    add_likelihood(subcommands)
    add_adapt(subcommands)
    summary = add_command(
        subcommands,
        "summary",
        help="means over seeds and paired differences from plain, of finished runs",
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


def _guarded(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the chosen function; say what went wrong, and by the exit code whose fault it is."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # argparse takes an unknown option with a space in it for a value, such as of --config_files.
    known = _options(parser, arguments)
    is_setting = [
        argument.startswith("--") and "=" in argument and argument.partition("=")[0] not in known
        for argument in arguments
    ]
    settings, others = (
        [argument for argument, each in zip(arguments, is_setting, strict=True) if each == wanted]
        for wanted in (True, False)
    )
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
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            traceback.print_exc()
            return UNEXPECTED
        print(
            f"{parser.prog}: error: {error}: make room or give other rights, or choose another "
            "folder (uip_output, uip_cache)",
            file=sys.stderr,
        )
        return USAGE
    except Exception:
        traceback.print_exc()
        return UNEXPECTED
    return OK


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> set[str]:
    """Names of the options of a parser and of the command below it that is chosen."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            chosen = next((each for each in arguments if each in action.choices), None)
            if chosen is not None:
                names |= _options(action.choices[chosen], arguments)
    return names


def _run(namespace: Namespace, overrides: list[str], command: str) -> None:
    # Imported late: --help and usage errors should not wait for torch.
    from recbole_uip.bridge.report import format_report
    from recbole_uip.bridge.run import run_recbole_uip

    files = start(namespace, overrides)
    results = run_recbole_uip(
        namespace.model, namespace.dataset, files, command_line=overrides, command=command
    )
    reports = [results] if "models" in results else list(filter(None, results.values()))
    for each in reports:
        print("\n" + format_report(each))
    failed = {model: reason for each in reports for model, reason in each["failed"].items()}
    if failed:
        raise SettingsError(f"not trained: {', '.join(failed)}; {'; '.join(failed.values())}")


def _summary(namespace: Namespace, overrides: list[str], command: str) -> None:
    if overrides:
        raise SettingsError(f"argument {overrides[0]!r} is not understood: summary takes folders")
    from recbole_uip.evidence.summary import format_summary, read_results, summarise

    cells = summarise(read_results(namespace.folders), namespace.split, namespace.by)
    print(format_summary(cells))

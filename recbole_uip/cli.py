"""Command line: ``recbole-uip run`` and the script ``run_recbole_uip.py``."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recbole_uip import __version__
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["entry_point", "main", "run_main"]

OK, UNEXPECTED, USAGE, INTERRUPTED = 0, 1, 2, 130

_OVERRIDES = "Any RecBole or uip_ setting may follow as --key=value; see properties/uip.yaml."


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
        epilog=_OVERRIDES,
        allow_abbrev=False,
    )
    _add_run_arguments(run)
    run.set_defaults(function=_run, parser=run)
    return _guarded(parser, arguments)


def entry_point() -> None:
    """The console script."""
    sys.exit(main())


def run_main(arguments: Sequence[str] | None = None) -> int:
    """``run_recbole_uip.py ...``, the same as ``recbole-uip run ...``."""
    parser = argparse.ArgumentParser(
        description="Train RecBole's models with and without profile fields.",
        epilog=_OVERRIDES,
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
    parser.add_argument(
        "--config_files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files, separated by spaces or commas; a later one overrides an earlier one",
    )


def _guarded(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the chosen function; say what went wrong, and by the exit code whose fault it is."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        namespace, overrides = parser.parse_known_args(arguments)
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
    from recbole_uip.bridge.config import load_config_files, parse_command_line
    from recbole_uip.bridge.report import format_report
    from recbole_uip.bridge.run import run_recbole_uip

    files = [name for part in namespace.config_files for name in re.split(r"[,\s]+", part) if name]
    given = {**load_config_files(files), **parse_command_line(overrides)}
    _log_to_stderr(str(given.get("state") or "INFO"))
    results = run_recbole_uip(
        namespace.model, namespace.dataset, files, command_line=overrides, command=command
    )
    for each in [results] if "models" in results else results.values():
        print("\n" + format_report(each))


class _Handler(logging.Handler):
    """Writes lines above tqdm's bars, without RecBole's colours where nobody sees them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line = self.format(record)
        if not sys.stderr.isatty():
            line = re.sub(r"\x1b\[[0-9;]*m", "", line)
        tqdm.write(line, file=sys.stderr)


def _log_to_stderr(state: str) -> None:
    # RecBole's own init_logger would also make a folder log/ in the working directory.
    level = logging.getLevelName(state.upper())
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.setLevel(level if isinstance(level, int) else logging.INFO)
    root.handlers = [handler]
    for name in ("absl", "filelock", "httpx", "huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)

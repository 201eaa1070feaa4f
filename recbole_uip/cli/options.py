"""What the commands share: config files, ``--key=value`` settings, and the log."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterable

__all__ = [
    "OVERRIDES",
    "add_command",
    "add_config_files",
    "add_data",
    "add_json",
    "add_numbers",
    "log_as",
    "show_figures",
    "start",
]

OVERRIDES = (
    "Any RecBole or uip_ setting may follow as --key=value; properties/uip.yaml (installed: "
    "recbole_uip/properties/uip.yaml) explains ours."
)


def add_command(
    subcommands: argparse._SubParsersAction, name: str, help: str, **more: Any
) -> ArgumentParser:
    """Add a command, whose own help begins with what the list of commands says of it."""
    more.setdefault("description", f"{help[0].upper()}{help[1:]}.")
    return subcommands.add_parser(name, help=help, allow_abbrev=False, **more)


def add_config_files(parser: ArgumentParser) -> None:
    """Add ``--config_files`` to a command."""
    parser.add_argument(
        "--config_files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files, separated by spaces or commas; a later one overrides an earlier one",
    )


def add_data(parser: ArgumentParser) -> None:
    """Add ``--dataset`` and ``--config_files`` to a command that takes one data set."""
    parser.add_argument("--dataset", "-d", help="dataset (default: ml-100k, which RecBole carries)")
    add_config_files(parser)


def add_numbers(parser: ArgumentParser, numbers: Iterable[tuple[str, int, str]]) -> None:
    """Add whole numbers, each a name, a default and a meaning, to a command."""
    for name, default, meaning in numbers:
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N",
            help=f"{meaning} (default: {default})",
        )  # fmt: skip


def add_json(parser: ArgumentParser) -> None:
    """Add ``--json`` to a command that measures something."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def show_figures(results: dict, format_: Callable[[dict], str], path: Path | None) -> None:
    """Print what was measured, then write it to the file of ``--json``."""
    from recbole_uip.evidence.figures import write_figures

    print(format_(results))
    if path is not None:
        write_figures(path, results)


def start(namespace: Namespace, overrides: list[str]) -> list[str]:
    """Log as the setting ``state`` says; the names given to ``--config_files``."""
    from recbole_uip.bridge.config import load_config_files, parse_command_line

    files = [name for part in namespace.config_files for name in _file_names(part)]
    given = {**load_config_files(files), **parse_command_line(overrides)}
    log_as(given.get("state"))
    return files


def _file_names(part: str) -> list[str]:
    """The names that one argument lists; a file's own name may have commas and spaces."""
    if os.path.isfile(part):
        return [part]
    if "," in part:
        return [name for piece in part.split(",") for name in _file_names(piece.strip())]
    return part.split()


def log_as(state: str | None, ours: str | None = None) -> None:
    """Log to the standard error from level ``state`` on, and one package from INFO on."""
    level = logging.getLevelName(str(state or "INFO").upper())
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.setLevel(level if isinstance(level, int) else logging.INFO)
    # RecBole's own init_logger would also make a folder log/ in the working directory.
    root.handlers = [handler]
    for name in ("absl", "filelock", "httpx", "huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if ours is not None:
        logging.getLogger(ours).setLevel(logging.INFO)


class _Handler(logging.Handler):
    """Writes lines above tqdm's bars, without RecBole's colours where nobody sees them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line = self.format(record)
        if not sys.stderr.isatty():
            line = re.sub(r"\x1b\[[0-9;]*m", "", line)
        tqdm.write(line, file=sys.stderr)

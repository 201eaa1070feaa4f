"""``recbole-uip ceiling``: what texts can say of items, next to what behaviour knows of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recbole_uip.cli.options import OVERRIDES, add_command, add_data, add_json, show_figures, start

if TYPE_CHECKING:
    import argparse

__all__ = ["add_ceiling"]


def add_ceiling(subcommands: argparse._SubParsersAction) -> None:
    """Add ``ceiling`` to the subcommands."""
    ceiling = add_command(
        subcommands,
        "ceiling",
        help="how much of what behaviour knows of items their texts say, and for unseen items",
        epilog=OVERRIDES,
    )
    add_data(ceiling)
    add_json(ceiling)
    ceiling.set_defaults(function=_ceiling, parser=ceiling)


def _ceiling(namespace: argparse.Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.ceiling import ceiling, format_ceiling

    files = start(namespace, overrides)
    results = ceiling(namespace.dataset, files, command_line=overrides, command=command)
    show_figures(results, format_ceiling, namespace.json)

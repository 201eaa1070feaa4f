"""``recbole-uip likelihood``: what codes, put back into the LM, predict of held-out behaviours."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    import argparse

__all__ = ["add_likelihood"]


def add_likelihood(subcommands: argparse._SubParsersAction) -> None:
    """Add ``likelihood`` to the subcommands."""
    likelihood = add_command(
        subcommands,
        "likelihood",
        help="whether a user's code makes later behaviours more likely to the LM",
        epilog=OVERRIDES,
    )
    add_data(likelihood)
    add_json(likelihood)
    numbers = [
        ("users", 40, "held-out users, and as many others that choose the step"),
        ("behaviours", 5, "behaviours of each user, at most"),
        ("codes", 4, "codes drawn for the mean over codes"),
    ]
    add_numbers(likelihood, numbers)
    likelihood.set_defaults(function=_likelihood, parser=likelihood)


def _likelihood(namespace: argparse.Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.likelihood import format_likelihood, likelihood

    files = start(namespace, overrides)
    results = likelihood(
        namespace.dataset,
        files,
        command_line=overrides,
        users=namespace.users,
        behaviours=namespace.behaviours,
        codes=namespace.codes,
        command=command,
    )
    show_figures(results, format_likelihood, namespace.json)

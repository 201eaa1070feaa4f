"""``recbole-uip bank ...``: build a feature bank, and say what is in one."""

from __future__ import annotations

import functools
from argparse import _SubParsersAction
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_uip.cli.bank_export import add_export
from recbole_uip.cli.bank_serve import add_serve
from recbole_uip.cli.options import add_command, add_config_files, start
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["add_bank"]


def add_bank(subcommands: _SubParsersAction) -> None:
    """Add ``bank`` and its subcommands."""
    bank = add_command(subcommands, "bank", help="profiles by user, without a language model")
    actions = bank.add_subparsers(metavar="ACTION", required=True)
    build = add_command(
        actions,
        "build",
        help="infer profiles from an interactions file",
        epilog="Any uip_ setting, and seed, may follow as --key=value; RecBole's do not apply. "
        "properties/uip.yaml (installed: recbole_uip/properties/uip.yaml) explains them.",
    )
    build.add_argument("folder", type=Path, help="where the bank goes")
    build.add_argument(
        "--events", nargs="+", required=True, metavar="FILE",
        help="interactions: RecBole's .inter, CSV or Parquet; files, a folder or a glob",
    )  # fmt: skip
    build.add_argument("--user", default="user_id", metavar="COLUMN", help="default: user_id")
    build.add_argument("--item", default="item_id", metavar="COLUMN", help="default: item_id")
    build.add_argument(
        "--time", default="timestamp", metavar="COLUMN",
        help="default: timestamp; none: events are in the order of the file",
    )  # fmt: skip
    build.add_argument(
        "--label", metavar="COLUMN",
        help="0 or 1; without it and --rating every event is a like, and uip_facets must be of "
        "weight positive or all",
    )  # fmt: skip
    build.add_argument("--rating", metavar="COLUMN", help="in place of --label; see --threshold")
    build.add_argument("--threshold", type=float, help="the lowest rating that is a like")
    build.add_argument(
        "--items", type=Path, metavar="FILE",
        help="items with their texts: .item, CSV or Parquet; see uip_item_text",
    )  # fmt: skip
    build.add_argument("--memory", default="1.5GB", help="for sorting events (default: 1.5GB)")
    add_config_files(build)
    build.set_defaults(function=_build, parser=build)
    info = add_command(actions, "info", help="what a bank holds")
    info.add_argument("folder", type=Path)
    info.set_defaults(function=_info, parser=info)
    add_export(actions)
    add_serve(actions)


def _build(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.bank.build import bank_of_events
    from recbole_uip.bank.events import EventColumns, EventFile
    from recbole_uip.bridge.config import profile_settings
    from recbole_uip.texts import item_texts

    settings = profile_settings(start(namespace, overrides), overrides)
    texts = None
    if namespace.items is not None:
        if not namespace.items.is_file():
            raise SettingsError(f"--items={namespace.items}: there is no such file")
        if settings.item_text is None:
            raise SettingsError(
                "--items is given, but uip_item_text does not say what an item's text is: add "
                '--uip_item_text="{title}" with the columns of that file'
            )
        texts = functools.partial(
            item_texts, namespace.items, settings.item_text, namespace.item,
            separator="," if ".csv" in map(str.lower, namespace.items.suffixes) else "\t",
        )  # fmt: skip
    columns = EventColumns(
        namespace.user,
        namespace.item,
        None if namespace.time == "none" else namespace.time,
        namespace.label,
        namespace.rating,
        namespace.threshold,
    )
    with EventFile(namespace.events, columns, memory=namespace.memory) as events:
        bank_of_events(namespace.folder, events, settings, texts).close()
    _print_info(namespace.folder)


def _info(namespace: Namespace, overrides: list[str], command: str) -> None:
    if overrides:
        raise SettingsError(f"argument {overrides[0]!r} is not understood: info takes a folder")
    _print_info(namespace.folder)


def _print_info(folder: Path) -> None:
    from recbole_uip.bank.bank import FeatureBank

    with FeatureBank.open(folder) as bank:
        model, size = bank.model, bank.bytes_per_user()
        by_facet = ", ".join(f"{name} {number}" for name, number in size.items())
        position = "" if bank.position is None else f", position {bank.position}"
        print(f"{folder}: generation {bank.generation}{position}")
        print(f"users: {len(bank):,}; items: {len(model.items) - 1:,}")
        print(f"bytes a user: {sum(size.values())} ({by_facet}), and the user's token")
        print(f"LM: {model.lm_fingerprint or 'none'}")
        for field in model.encoder.fields:
            print(f"  {field.name}: {field.kind}, {field.size} tokens")

"""``recbole-uip bank export``: a run's profiles and its bank, in the forms of other systems."""

from __future__ import annotations

import argparse
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_uip.cli.options import add_command
from recbole_uip.settings import SettingsError

__all__ = ["add_export"]

# Settings of the run that shape what RecBole makes of its files.
_ATOMIC_KEYS = (
    "load_col",
    "field_separator",
    "seq_separator",
    "encoding",
    "seq_len",
    "normalize_field",
    "normalize_all",
    "numerical_features",
    "discretization",
)


def add_export(subcommands: argparse._SubParsersAction) -> None:
    """Add ``export`` to the subcommands of ``recbole-uip bank``."""
    export = add_command(
        subcommands, "export", help="for RecBole without this package, Feast, Redis or PEFT"
    )
    forms = export.add_subparsers(metavar="FORM", required=True)
    _add_atomic(forms)
    _add_feast(forms)
    _add_redis(forms)
    _add_peft(forms)


def _add_atomic(forms: argparse._SubParsersAction) -> None:
    atomic = add_command(
        forms,
        "atomic",
        help="RecBole's atomic files, with profiles as token fields",
        description="Atomic files that RecBole trains on without this package.",
    )
    _add_run(atomic)
    atomic.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the run's dataset (default: where the run found it)",
    )
    atomic.add_argument("--name", required=True, help="name of the new dataset")
    atomic.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="RecBole's data_path"
    )
    atomic.set_defaults(function=_atomic, parser=atomic)


def _add_feast(forms: argparse._SubParsersAction) -> None:
    feast = add_command(
        forms, "feast", help="Parquet for a Feast feature store, exact at every point in time"
    )
    _add_run(feast)
    feast.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the Parquet file"
    )
    feast.add_argument(
        "--unit",
        choices=("s", "ms", "us"),
        default="s",
        help="what the timestamps count since 1970 (default: s)",
    )
    feast.set_defaults(function=_feast, parser=feast)


def _add_redis(forms: argparse._SubParsersAction) -> None:
    redis = add_command(forms, "redis", help="today's codes as one Redis key a user")
    _add_bank(redis)
    redis.add_argument(
        "--url", default="redis://localhost:6379/0", help="of the server (default: %(default)s)"
    )
    redis.add_argument(
        "--prefix", default="uip:", help="begins every key of this bank (default: %(default)s)"
    )
    redis.add_argument(
        "--batch", type=int, default=1000, metavar="N", help="users a round trip (default: 1000)"
    )
    redis.set_defaults(function=_redis, parser=redis)


def _add_peft(forms: argparse._SubParsersAction) -> None:
    peft = add_command(forms, "peft", help="one code's soft prompt as a PEFT adapter")
    _add_bank(peft)
    peft.add_argument("--facet", required=True, help="facet with source: lm, or its code field")
    peft.add_argument(
        "--code",
        type=int,
        nargs="+",
        required=True,
        metavar="N",
        help="from 1 to the facet's codes, one for each level",
    )
    peft.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="S",
        help="how far to go (default: 1, too long a step for SmolLM2)",
    )
    peft.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the adapter"
    )
    peft.set_defaults(function=_peft, parser=peft)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="output folder of recbole-uip run"
    )


def _add_bank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bank", type=Path, required=True, metavar="DIR", help="folder of the feature bank"
    )


def _atomic(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.bank.export_atomic import atomic_files

    _refuse(overrides)
    results = namespace.run / "results.json"
    config = _config_of(results)
    data = namespace.data or config.get("data_path")
    if data is None:
        raise SettingsError(
            f"{results}, which says where the run's dataset is, is not there: give --data"
        )
    path = atomic_files(
        namespace.run / "profiles.parquet",
        data,
        namespace.name,
        namespace.output,
        _settings_of(config),
    )
    print(f"wrote {path.parent}; train on it with config_file_list: [{path}]")


def _feast(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.bank.bank import FeatureBank
    from recbole_uip.bank.export_feast import feature_store_parquet
    from recbole_uip.evidence.summary import read_results_file

    _refuse(overrides)
    # The folder may hold the bank of a run before this one, which wrote none.
    if "bank" not in read_results_file(namespace.run / "results.json").get("artefacts", {}):
        raise SettingsError(
            f"the run in {namespace.run} has written no bank, which tells when codes change: run "
            "with facets, and with uip_posterior=score"
        )
    with FeatureBank.open(namespace.run / "bank") as bank:
        rows = feature_store_parquet(
            namespace.run / "profiles.parquet", bank, namespace.output, unit=namespace.unit
        )
    print(f"wrote {namespace.output}: {rows} rows")


def _redis(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.bank.bank import FeatureBank
    from recbole_uip.bank.export_redis import to_redis

    _refuse(overrides)
    try:
        import redis
    except ImportError:
        raise SettingsError(
            "export to Redis needs its client, the extra redis: pip install '.[redis]'"
        ) from None
    shown = _without_password(namespace.url)
    try:
        client = redis.Redis.from_url(namespace.url)
    except ValueError:  # which may quote a part of the password
        raise SettingsError(
            f"--url={shown} is no URL of a Redis server: give redis://host:port/number, rediss:// "
            "or unix://, with %xx for signs such as # and / in a password"
        ) from None
    with FeatureBank.open(namespace.bank) as bank:
        try:
            users = to_redis(bank, client, namespace.prefix, namespace.batch)
        except redis.RedisError as error:
            raise SettingsError(f"--url={shown}: {error}") from error
    print(f"wrote {users} users under {namespace.prefix}* to {shown}")


def _without_password(url: str) -> str:
    """A URL that may be shown, also where it is none."""
    return re.sub(r"password=[^&]*", "password=***", re.sub(r"(?<=://).*@", "***@", url))


def _peft(namespace: Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.bank.bank import FeatureBank
    from recbole_uip.bank.export_peft import soft_prompts

    _refuse(overrides)
    with FeatureBank.open(namespace.bank) as bank:
        folder = soft_prompts(
            bank, namespace.output, namespace.facet, namespace.code, scale=namespace.scale
        )
    print(f"wrote {folder}; load it with PeftModel.from_pretrained")


def _refuse(overrides: list[str]) -> None:
    if overrides:
        raise SettingsError(
            f"argument {overrides[0]!r} is not understood: an export takes no settings"
        )


def _config_of(path: Path) -> dict[str, Any]:
    """What the run's first model was configured with; empty where the run has no results."""
    if not path.is_file():
        return {}
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        return dict(next(iter(next(iter(models.values())).values()))["config"])
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise SettingsError(f"{path} is no results.json of recbole-uip run ({error!r})") from error


def _settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings that matter to a reader of its data."""
    settings = {key: config[key] for key in _ATOMIC_KEYS if config.get(key) is not None}
    if of_rows := (settings.get("load_col") or {}).get("inter"):
        # What labels were made of is not lost: the labels are there.
        kept = [name for name in of_rows if name not in (config.get("threshold") or {})]
        settings["load_col"] = {**settings["load_col"], "inter": kept}
    sampling = config.get("train_neg_sample_args") or {}
    if sampling.get("distribution", "none") != "none":
        settings["train_neg_sample_args"] = sampling
    if mode := (config.get("eval_args") or {}).get("mode"):
        settings["eval_args"] = {
            "split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": None, "mode": mode,
        }  # fmt: skip
    return settings

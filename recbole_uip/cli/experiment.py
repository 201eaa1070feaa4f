"""``recbole-uip experiment``: arms, models, datasets and seeds crossed, each run once."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_uip.cli.options import OVERRIDES, add_command, log_as
from recbole_uip.settings import SettingsError

__all__ = ["add_experiment"]


def add_experiment(subcommands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = add_command(
        subcommands,
        "experiment",
        help="run an experiment of properties/experiment, resuming where it stopped",
        epilog=OVERRIDES,
    )
    parser.add_argument(
        "name", nargs="?", help="name of an experiment, or a YAML file of one's own"
    )
    parser.add_argument("--list", action="store_true", help="name the experiments, a line each")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("saved", "experiments"),
        metavar="DIR",
        help="where runs and reports are kept (default: saved/experiments)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that train side by side (default: 1)",
    )
    for part in ("datasets", "models", "arms", "seeds"):
        parser.add_argument(f"--{part}", metavar="A,B", help=f"only these of its {part}")
    parser.set_defaults(function=_experiment, parser=parser)


def _experiment(namespace: argparse.Namespace, overrides: list[str], command: str) -> None:
    from recbole_uip.evidence.experiments.plan import experiment_names, load_experiment

    if namespace.list:
        for name in experiment_names():
            print(f"{name}: {load_experiment(name).title}")
        return
    if namespace.name is None:
        raise SettingsError("experiment: no name is given; --list names them")
    from recbole_uip.evidence.experiments.run import run_experiment

    # One line a run; what RecBole says of every epoch would drown it.
    log_as("WARNING", ours="recbole_uip.evidence")
    chosen = {
        part: value.split(",")
        for part in ("datasets", "models", "arms")
        if (value := getattr(namespace, part))
    }
    if namespace.seeds:
        try:
            chosen["seeds"] = [int(seed) for seed in namespace.seeds.split(",")]
        except ValueError:
            raise SettingsError(f"--seeds={namespace.seeds} must be whole numbers") from None
    whole = load_experiment(namespace.name, overrides)
    folder = run_experiment(
        whole.only(**chosen),
        namespace.output,
        workers=namespace.workers,
        whole=whole,
        command=command,
    )
    print(f"experiment: {folder / 'experiment.json'}")
    print(f"report it by: recbole-uip report {folder}")

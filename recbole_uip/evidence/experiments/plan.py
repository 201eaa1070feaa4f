"""What an experiment asks: a YAML file, and the runs that it stands for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_uip.bridge.config import (
    PLAN_KEY,
    UIPConfig,
    list_properties,
    load_config_files,
    parse_command_line,
    parse_yaml,
    read_properties,
)
from recbole_uip.bridge.preparation import data_settings
from recbole_uip.bridge.sequences import MODELS as SEQUENCE_MODELS
from recbole_uip.bridge.sequences import SequenceConfig
from recbole_uip.bridge.storage import plain
from recbole_uip.evidence.experiments.store import key_of
from recbole_uip.lm.backbone import local_fingerprint, resolve_dtype
from recbole_uip.settings import (
    LM_SOURCES,
    PROMPTED_SOURCES,
    TEXT_SOURCES,
    ArmSettings,
    CodebookSettings,
    FacetSettings,
    SettingsError,
    UIPSettings,
)
from recbole_uip.tuning import VERSION as TUNING

__all__ = [
    "INERT",
    "PROFILES",
    "RESULTS",
    "TEXTS",
    "TUNING",
    "Case",
    "Experiment",
    "Run",
    "Tuning",
    "experiment_names",
    "load_experiment",
]

FOLDER = "experiment"

#: Where things go, and how loudly: no result depends on these. The data are known by their name
#: and size, not by where they lie.
INERT = {
    "checkpoint_dir", "data_path", "dataset_save_path", "dataloaders_save_path", "device",
    "gpu_id", "local_rank", "log_wandb", "save_dataloaders", "save_dataset", "saved",
    "show_progress", "single_spec", "state", "use_gpu", "wandb_project", "worker", "nproc",
    "world_size", "offset", "ip", "port", "eval_step_log", "uip_cache", "uip_output",
    "uip_lm_device",
}  # fmt: skip

# Settings of a facet that only a codebook reads.
_OF_CODEBOOKS = ("codes", "rank", "levels", "directions")

# Raise it when the same settings give other results, or a run's files hold others: finished runs
# are then made anew.
RESULTS = 2
# The same of runs with profiles alone, and of those with facets of texts.
PROFILES = 4
TEXTS = 2

# What an arm of a model that reads events may say.
_READS_EVENTS = {"facets": [], "user_id": "keep", "control": "none", "values": "tokens"}


@dataclass(frozen=True)
class Tuning:
    """A grid that every model and arm is tuned on, by AUC on the validation split.

    Attributes
    ----------
    seed : int
    grid : dict of str to list
        Values of each RecBole setting; all combinations are run.
    """

    seed: int
    grid: dict[str, list]

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values."""
        return [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes
    ----------
    name : str
    section : dict
        As in ``uip_arms``: facets, user_id, control, values.
    settings : dict
        Settings of this arm alone.
    models : tuple of str
        The models that it is for; empty for the experiment's.
    """

    name: str
    section: dict[str, Any]
    settings: dict[str, Any]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """What is repeated over seeds: one model and arm, on one dataset, under one variant."""

    dataset: str
    model: str
    arm: str
    variant: tuple[tuple[str, Any], ...]

    def __hash__(self) -> int:
        # A setting's value may be a list or a mapping.
        return hash((self.dataset, self.model, self.arm, *(key for key, _ in self.variant)))


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes
    ----------
    case : Case
    seed : int
    config : UIPConfig
    arm : ArmSettings
    key : str
        Hash of all that shapes the result.
    group : str
        Hash of all that shapes rows and profiles, which runs of a group share.
    """

    case: Case
    seed: int
    config: UIPConfig = field(repr=False)
    arm: ArmSettings
    key: str
    group: str


@dataclass(frozen=True)
class Experiment:
    """An experiment as its YAML file says it.

    Attributes
    ----------
    name, title, question : str
    extends : tuple of str
        Config files below its own settings.
    datasets, models : tuple of str
    seeds : tuple of int
    settings : dict
        RecBole and ``uip_*`` settings of every run: all of the file but ``uip_experiment``. A key
        with dots changes one value inside another, such as ``uip_facets.interests.codes``; ``*``
        stands for every facet that has such a place.
    by_dataset : dict of str to dict
        The same for the runs on one dataset, stronger than ``settings``.
    vary : tuple of dict of str to list
        Grids of settings: everything is run at all combinations of each grid's values.
    arms : tuple of Arm
    compare : tuple of (str, str)
        Pairs of arms whose difference is tested, beside that from the first arm.
    tune : Tuning or None
    command_line : tuple of str
        ``--key=value`` arguments, stronger than all of these.
    """

    name: str
    title: str
    question: str
    extends: tuple[str, ...]
    datasets: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    by_dataset: dict[str, dict[str, Any]]
    vary: tuple[dict[str, list], ...]
    arms: tuple[Arm, ...]
    compare: tuple[tuple[str, str], ...]
    tune: Tuning | None
    command_line: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        """The arm that every other one is compared with: the first."""
        return self.arms[0].name

    def only(self, **chosen: Sequence | None) -> Experiment:
        """The experiment on fewer ``datasets``, ``models``, ``seeds`` or ``arms``.

        Raises
        ------
        SettingsError
            If it has no such one.
        """
        changes: dict[str, Any] = {}
        given = " ".join(
            f"--{part}={','.join(map(str, names))}" for part, names in chosen.items() if names
        )
        for part, names in chosen.items():
            if not names:
                continue
            known = {getattr(each, "name", each): each for each in getattr(self, part)}
            for name in names:
                if name not in known:
                    raise SettingsError(
                        f"--{part}={name}: experiment {self.name} has {', '.join(map(str, known))}"
                    )
            changes[part] = tuple(each for name, each in known.items() if name in names)
        experiment = dataclasses.replace(self, **changes)
        left = {arm.name for arm in experiment.arms}
        compare = tuple(pair for pair in self.compare if left.issuperset(pair))
        experiment = dataclasses.replace(experiment, compare=compare)
        if not any(True for _ in experiment.cases()):
            raise SettingsError(
                f"experiment {self.name}: nothing is left to run with {given}: models of a user's "
                f"events ({', '.join(SEQUENCE_MODELS)}) go with the arms that name them"
            )
        return experiment

    def cases(self) -> Iterator[Case]:
        """Every dataset, variant, model and arm, in this order."""
        variants = [
            tuple(zip(grid, values, strict=True))
            for grid in self.vary
            for values in itertools.product(*grid.values())
        ]
        for dataset, variant, model in itertools.product(self.datasets, variants, self.models):
            for arm in self.arms:
                # Models of a user's events read no profile: theirs are the arms that name them.
                if model in arm.models or not (arm.models or model in SEQUENCE_MODELS):
                    yield Case(dataset, model, arm.name, variant)

    def run(self, case: Case, seed: int, tuned: Mapping[str, Any] | None = None) -> Run:
        """The training of ``case`` with a seed and, where tuned, the values chosen."""
        arm = next(arm for arm in self.arms if arm.name == case.arm)
        settings = {
            **self.settings,
            **self.by_dataset.get(case.dataset, {}),
            **arm.settings,
            **dict(case.variant),
            **(tuned or {}),
            "seed": seed,
            # A sweep has a bar of its own.
            "show_progress": False,
            "uip_arms": {arm.name: arm.section},
        }
        config = self._config(case, settings)
        return Run(
            case,
            seed,
            config,
            config.uip.arms[0],
            key_of(_essence(config)),
            key_of(_shared(config)),
        )

    def _config(self, case: Case, settings: dict[str, Any]) -> UIPConfig:
        flat = {key: value for key, value in settings.items() if "." not in key}
        dotted = {key: value for key, value in settings.items() if "." in key}

        kind = SequenceConfig if case.model in SEQUENCE_MODELS else UIPConfig

        def config(given: dict[str, Any]) -> UIPConfig:
            return kind(
                case.model, case.dataset, self.extends, given, command_line=self.command_line
            )

        if dotted:
            # The arm may name a facet that is only there once the dotted settings are made.
            below = config({key: value for key, value in flat.items() if key != "uip_arms"})
            for key, value in dotted.items():
                root, *path = key.split(".")
                if kind is SequenceConfig and root == "uip_facets":
                    continue  # it has none, and so nothing of it changes
                flat[root] = copy.deepcopy(flat.get(root, below[root]))
                if not _set(flat[root], path, value):
                    raise SettingsError(f"experiment {self.name}: {key} names nothing that is set")
        return config(flat)


def _set(mapping: Any, path: Sequence[str], value: Any) -> bool:
    """Set what ``path`` names in nested mappings; whether there was such a place."""
    name, *rest = path
    if not isinstance(mapping, dict):
        return False
    if name == "*":
        return any([_set(each, rest, value) for each in mapping.values()])
    if not rest:
        mapping[name] = value
        return True
    return _set(mapping.get(name), rest, value)


def _essence(config: UIPConfig) -> dict[str, Any]:
    """All that shapes a run's result, in plain values.

    Settings at their default are left out, so that a setting that comes later leaves older runs
    what they are. A run without profiles has none of the profiles' settings, and one whose facets
    the LM does not score has those facets alone, others the LM's besides: runs are shared between
    experiments.
    """
    settings = config.uip
    arm, chosen = settings.arms[0], settings.facets_of(settings.arms[0])
    essence = {
        key: plain(value)
        for key, value in config.final_config_dict.items()
        if key not in INERT and not key.startswith("uip_")
    }
    essence["results"] = RESULTS
    parts = [f"{part}.inter" for part in config["benchmark_filename"] or ()]
    essence["data_bytes"] = [
        path.stat().st_size if path.is_file() else 0
        for path in (
            Path(config["data_path"], f"{config['dataset']}.{kind}")
            for kind in ("inter", "user", "item", *parts)
        )
    ]
    essence["arm"] = {
        "facets": [facet.name for facet in chosen], "user_id": arm.user_id,
        "control": arm.control, "values": arm.values,
    }  # fmt: skip
    if isinstance(config, SequenceConfig):
        essence["history"] = [settings.history, settings.refresh]
    if chosen:
        settings = _used(settings, chosen)
        given = _given(settings.to_dict(), UIPSettings().to_dict())
        given["uip_facets"] = {facet.name: _facet_essence(facet) for facet in settings.facets}
        if "uip_codebook" in given:
            defaults = dataclasses.asdict(CodebookSettings())
            given["uip_codebook"] = _given(given["uip_codebook"], defaults)
        scored = [facet.name for facet in settings.facets if facet.source in PROMPTED_SOURCES]
        if not set(scored).issubset(arm.facets):
            # Where all are chosen, the arm's facets say in which order the prompt has them.
            given["order"] = scored
        essence["profiles"] = {"version": PROFILES, **plain(given)}
        if any(facet.text_sources for facet in settings.facets):
            essence["profiles"]["texts"] = TEXTS
        if settings.posterior == "gradient":
            essence["profiles"]["tuning"] = TUNING
        if settings.reads_lm:
            essence |= _lm_essence(settings)
    return essence


def _lm_essence(settings: UIPSettings) -> dict[str, str]:
    """What the LM's settings stand for on this machine, as far as they do not say it themselves."""
    lm, essence = settings.lm, {}
    # The same name may stand for other weights by now, or elsewhere.
    for part, name in (("lm", lm.name), ("adapter", lm.adapter)):
        if name and (found := local_fingerprint(name, settings.cache, part == "adapter")):
            essence[part] = found
    if lm.dtype == "auto":
        _, dtype = resolve_dtype(lm)
        # Older runs' keys do not have it: they are of float32.
        if (name := str(dtype).removeprefix("torch.")) != "float32":
            essence["dtype"] = name
    return essence


def _used(settings: UIPSettings, chosen: tuple[FacetSettings, ...]) -> UIPSettings:
    """``settings`` with the defaults for what the ``chosen`` facets have no use for."""
    sources = {source for facet in chosen for source in (facet.source, *facet.texts)}
    default, unused = UIPSettings(), {}
    # The one prompt of all facets of such a source has the names of each.
    shared = sources & set(PROMPTED_SOURCES)
    read = [each for each in settings.facets if each in chosen or each.source in shared]
    unused["facets"] = tuple(read)
    if not shared:
        unused["endings"] = None
        unused |= {"posterior": default.posterior, "likelihood": default.likelihood}
    if not shared or settings.posterior == "score":
        unused["gradient"] = default.gradient
    if not sources & set(LM_SOURCES):
        unused["lm"] = default.lm
    if not sources & set(TEXT_SOURCES):
        unused["item_text"] = None
    if not any(facet.codes and facet.source != "constant" for facet in chosen):
        unused["codebook"] = default.codebook
    return dataclasses.replace(settings, **unused)


def _facet_essence(facet: FacetSettings) -> dict[str, Any]:
    default = FacetSettings(facet.name, source=facet.source, weight=facet.weight)
    values, defaults = (
        UIPSettings(facets=(each,)).to_dict()["uip_facets"][facet.name] for each in (facet, default)
    )
    # One dimension is not quantised by a codebook, and more than one not by bins.
    unread = _OF_CODEBOOKS if facet.source == "constant" else ("bins",)
    return {
        key: value
        for key, value in values.items()
        # Source and weight tell facets apart, so they always stand.
        if key in ("source", "weight") or (value != defaults[key] and key not in unread)
    }


def _shared(config: UIPConfig) -> dict[str, Any]:
    """All that shapes rows and profiles, in plain values."""
    shared = plain(data_settings(config))
    if isinstance(config, SequenceConfig):
        # Each of these models has sequences of its own in the rows.
        shared["model"] = config["model"]
    return shared


def _given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in values.items() if key not in defaults or value != defaults[key]
    }


def experiment_names() -> list[str]:
    """Names of the experiments in ``properties/``."""
    return [name.removesuffix(".yaml") for name in list_properties(FOLDER)]


def load_experiment(name: str, command_line: Sequence[str] = ()) -> Experiment:
    """Read an experiment of ``properties/``, or a YAML file of one's own.

    Raises
    ------
    SettingsError
        If there is none of this name, or it says something that cannot be run.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise SettingsError(f"experiment: there is no file {name!r}")
        text, name = path.read_text(encoding="utf-8"), path.stem
    else:
        text = read_properties(f"{FOLDER}/{name}.yaml")
        if text is None:
            raise SettingsError(
                f"experiment: there is none named {name!r}; known are "
                f"{', '.join(experiment_names())}, or give a path that ends in .yaml"
            )
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"experiment {name} is not YAML: {error}") from error
    if not isinstance(settings, Mapping) or not isinstance(settings.get(PLAN_KEY), Mapping):
        raise SettingsError(f"experiment {name} has no mapping {PLAN_KEY}, which says what to run")
    settings = dict(settings)
    experiment = _parse(name, settings.pop(PLAN_KEY), settings, tuple(command_line))
    _check_command_line(experiment)
    return experiment


def _check_command_line(experiment: Experiment) -> None:
    """Refuse what would make runs alike that are to differ: the command line is stronger."""
    grids = [*experiment.vary, *([experiment.tune.grid] if experiment.tune else [])]
    own = [*grids, *(arm.settings for arm in experiment.arms)]
    varied = {key.split(".")[0] for settings in own for key in settings}
    for key in parse_command_line(experiment.command_line):
        if key in _CHOSEN_BY:
            raise SettingsError(
                f"--{key}: experiment {experiment.name} sets it for each of its runs; "
                f"{_CHOSEN_BY[key]}"
            )
        if key in varied:
            raise SettingsError(
                f"--{key}: experiment {experiment.name} sets it apart for some of its runs: leave "
                "it out, or change a copy of the file"
            )


# What every run of an experiment has of its own, and how to choose among these.
_CHOSEN_BY = {
    "seed": "choose by --seeds",
    "model": "choose by --models",
    "dataset": "choose by --datasets",
    "uip_arms": "choose by --arms, or change them in a copy of the file",
    "config_files": "extends, in the file, names config files below it",
}


_PARTS = (
    "title", "question", "extends", "datasets", "by_dataset", "models", "seeds", "vary", "arms",
    "compare", "tune",
)  # fmt: skip


def _parse(
    name: str, given: Mapping[str, Any], settings: dict[str, Any], command_line: tuple[str, ...]
) -> Experiment:
    where = f"experiment {name}"
    for key in given:
        if key not in _PARTS:
            raise SettingsError(f"{where}: unknown key {key!r}; known are {', '.join(_PARTS)}")
    for key in ("title", "datasets", "models", "seeds"):
        if not given.get(key):
            raise SettingsError(f"{where}: {key} is missing")
    datasets, models = (
        _several(f"{where}: {key}", given[key], str) for key in ("datasets", "models")
    )
    extends = _several(f"{where}: extends", given.get("extends") or [], str)
    below = load_config_files(extends)
    arms = given.get("arms") or {**below, **settings}.get("uip_arms")
    if not arms:
        raise SettingsError(f"{where}: it has neither arms nor uip_arms")
    arms = tuple(
        _parse_arm(f"{where}: arms.{arm}", str(arm), section, models)
        for arm, section in _mapping(f"{where}: arms", arms).items()
    )
    for model in set(models).intersection(SEQUENCE_MODELS):
        if not any(model in arm.models for arm in arms):
            raise SettingsError(
                f"{where}: {model} reads a user's events and no profile, so it needs an arm of "
                f"its own, such as history: {{models: [{model}], facets: []}}"
            )
    return Experiment(
        name,
        str(given["title"]),
        " ".join(str(given.get("question") or "").split()),
        extends,
        datasets,
        models,
        _several(f"{where}: seeds", given["seeds"], int),
        settings,
        _parse_by_dataset(f"{where}: by_dataset", given.get("by_dataset") or {}, datasets),
        _parse_vary(f"{where}: vary", given.get("vary")),
        arms,
        _parse_compare(f"{where}: compare", given.get("compare") or [], arms),
        _parse_tune(f"{where}: tune", given.get("tune")),
        command_line,
    )


def _parse_arm(where: str, name: str, section: Any, models: tuple[str, ...]) -> Arm:
    section = dict(_mapping(where, section or {}))
    settings = _mapping(f"{where}.settings", section.pop("settings", None) or {})
    own = _several(f"{where}.models", section.pop("models", None) or [], str)
    for model in own:
        if model not in models:
            raise SettingsError(
                f"{where}.models: {model} is not among the experiment's, {', '.join(models)}"
            )
    sequential = [model for model in own if model in SEQUENCE_MODELS]
    given = {**_READS_EVENTS, **section, "facets": list(section.get("facets") or [])}
    if sequential and given != _READS_EVENTS:
        raise SettingsError(
            f"{where}: {', '.join(sequential)} read a user's events and no profile: leave facets "
            "empty ([]), and user_id, control and values out"
        )
    return Arm(name, section, dict(settings), own)


def _parse_by_dataset(
    where: str, given: Any, datasets: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    for dataset in _mapping(where, given):
        if dataset not in datasets:
            raise SettingsError(
                f"{where}.{dataset}: it is not among the experiment's, {', '.join(datasets)}"
            )
    return {name: dict(_mapping(f"{where}.{name}", each)) for name, each in given.items()}


def _parse_vary(where: str, given: Any) -> tuple[dict[str, list], ...]:
    if given is None:
        return ({},)
    if not isinstance(given, list) or not given:
        raise SettingsError(
            f"{where}={given!r} must be a list of grids, such as [{{uip_refresh: [0s, 1h]}}]"
        )
    return tuple(_parse_grid(where, grid) for grid in given)


def _parse_tune(where: str, given: Any) -> Tuning | None:
    if given is None:
        return None
    if set(_mapping(where, given)) != {"seed", "grid"}:
        raise SettingsError(f"{where}={given!r} must have the two keys seed and grid")
    (seed,) = _several(f"{where}.seed", [given["seed"]], int)
    return Tuning(seed, _parse_grid(f"{where}.grid", given["grid"]))


def _parse_grid(where: str, given: Any) -> dict[str, list]:
    grid = dict(_mapping(where, given))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SettingsError(f"{where}.{key}={values!r} must be a list of values to run")
    return grid


def _parse_compare(where: str, given: Any, arms: tuple[Arm, ...]) -> tuple[tuple[str, str], ...]:
    names = {arm.name for arm in arms}
    if not isinstance(given, list):
        raise SettingsError(f"{where}={given!r} must be a list of pairs of arms")
    for pair in given:
        two = isinstance(pair, list) and len(pair) == 2
        if not two or not names.issuperset(pair):
            known = ", ".join(sorted(names))
            raise SettingsError(f"{where}={pair!r} must name two arms of {known}")
    return tuple((first, second) for first, second in given)


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{where}={value!r} must map keys to values")
    return value


def _several(where: str, value: Any, kind: type) -> tuple:
    """A list's values, each of type ``kind`` and there once."""
    right = isinstance(value, list) and all(type(each) is kind for each in value)
    if not right or len(set(value)) != len(value):
        what = {str: "names", int: "whole numbers"}[kind]
        raise SettingsError(f"{where}={value!r} must be a list of {what}, each once")
    return tuple(value)

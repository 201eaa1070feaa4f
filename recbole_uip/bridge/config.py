"""RecBole's configuration with our defaults in it, and without its reach for ``sys.argv``."""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import importlib.resources
import itertools
import logging
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import recbole
import yaml
from recbole.config import Config
from recbole.utils import EvaluatorType, ModelType, get_model

import recbole_uip
from recbole_uip.bridge import compat
from recbole_uip.bridge.checks import check_settings, check_valid_metric
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.settings import NoItemTextError, SettingsError, UIPSettings
from recbole_uip.texts import atomic_header

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = [
    "PLAN_KEY",
    "UIPConfig",
    "context_models",
    "list_properties",
    "load_config_files",
    "parse_command_line",
    "profile_settings",
    "parse_yaml",
    "read_properties",
]

logger = logging.getLogger(__name__)

#: What an experiment runs stands under this key, beside the settings that it runs with.
PLAN_KEY = "uip_experiment"

_CONTEXT = "context_aware_recommender"
# What RecBole, or we in its place, read without a default for it.
_BARE_KEYS = ("model", "dataset", "save_dataset", "save_dataloaders", "dataset_save_path")
_BARE_KEYS += ("encoding",)
# RecBole tells a model's type by its class. The folder tells as much without importing it, which
# for decision trees would need xgboost or lightgbm.
_OTHER_TYPES = {
    "general_recommender": "a general model: it reads user and item IDs only",
    "sequential_recommender": "a sequential model: it reads a user's item sequence",
    "knowledge_aware_recommender": "a knowledge-aware model: it reads IDs and a knowledge graph",
    "exlib_recommender": (
        "a decision-tree model: RecBole trains it outside its own trainer, which profile fields "
        "have not been tried with"
    ),
}


# Text as it is: the template "{title}" would else become a mapping, the folder "2024" a number.
_TEXTS = ("uip_item_text", "uip_lm", "uip_lm_adapter", "uip_lm_device", "uip_cache", "uip_output")


class _Loader(yaml.FullLoader):
    """RecBole's YAML loader; it adds its resolver to ``yaml.FullLoader`` itself, for everyone."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:
         [-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |\.[0-9_]+(?:[eE][-+][0-9]+)?
        |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.X,
    ),
    list("-+0123456789."),
)


def _properties(name: str) -> Traversable:
    try:
        root = importlib.resources.files("recbole_uip.properties")
    except ModuleNotFoundError:
        # A checkout that is not installed: properties/ lies beside the package.
        root = Path(recbole_uip.__file__).parents[1] / "properties"
    for part in name.split("/"):
        root = root / part
    return root


def parse_yaml(text: str) -> Any:
    """What ``text`` says, with numbers as RecBole reads them (``1e-3``).

    Raises
    ------
    ValueError
        If it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_properties(name: str) -> str | None:
    """Text of the file ``name`` in ``properties/``, or None if there is no such file."""
    file = _properties(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def list_properties(folder: str) -> list[str]:
    """Names of the YAML files in a folder of ``properties/``, sorted."""
    files = _properties(folder).iterdir()
    return sorted(file.name for file in files if file.name.endswith(".yaml"))


def context_models() -> list[str]:
    """Names of RecBole's context-aware models, the ones that read profile fields."""
    from recbole.model import context_aware_recommender as package

    names = {
        name.lower(): name for name in dir(package) if isinstance(getattr(package, name), type)
    }
    return sorted(names[item.name] for item in pkgutil.iter_modules(package.__path__))


def load_config_files(files: str | os.PathLike | Sequence[str]) -> dict[str, Any]:
    """Settings of one YAML file or several; a later file overrides an earlier one, key by key.

    A path through ``properties/`` that is not there is looked up in the installed package. What
    an experiment's file says of its runs (``uip_experiment``) is no setting, and left out.
    """
    settings: dict[str, Any] = {}
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        path = Path(file)
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else None
        except UnicodeError as error:
            raise SettingsError(
                f"config_files: {str(file)!r} is not UTF-8 ({error}): save it as UTF-8"
            ) from error
        if text is None and "properties" in path.parts:
            text = read_properties("/".join(path.parts[path.parts.index("properties") + 1 :]))
        if text is None:
            raise SettingsError(f"config_files: there is no file {str(file)!r}")
        try:
            loaded = parse_yaml(text)
        except ValueError as error:
            raise SettingsError(f"config_files: {str(file)!r} is not YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise SettingsError(f"config_files: {str(file)!r} does not map keys to values")
        settings.update(loaded or {})
    settings.pop(PLAN_KEY, None)
    return settings


def parse_command_line(arguments: Sequence[str]) -> dict[str, str]:
    """``--key=value`` arguments as a dict of strings; only the first ``=`` separates.

    Raises
    ------
    SettingsError
        If an argument has another form, or a key comes twice with different values.
    """
    parsed: dict[str, str] = {}
    for argument in arguments:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not separator or not key:
            raise SettingsError(f"argument {argument!r} is not understood: write --key=value")
        if parsed.setdefault(key, value) != value:
            raise SettingsError(f"--{key} is given twice, as {parsed[key]!r} and as {value!r}")
    return parsed


def profile_settings(files: Sequence[str], arguments: Sequence[str]) -> UIPSettings:
    """The ``uip_*`` settings of config files and ``--key=value`` arguments, over the defaults.

    For commands that infer profiles without a RecBole dataset: of RecBole's keys only ``seed``
    counts, and an argument with another is refused.
    """
    defaults = parse_yaml(read_properties("uip.yaml") or "")
    given = _converted(parse_command_line(arguments))
    for key in given:
        if key != "seed" and not key.startswith("uip_"):
            raise SettingsError(
                f"argument --{key} is not understood: it is no option of this command, nor a uip_* "
                "key (see --help)"
            )
    return UIPSettings.from_dict({**defaults, **load_config_files(files), **given})


def _converted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every string read as a value, but for those that are texts."""
    converted = dict(settings)
    for key, value in settings.items():
        text = key in _TEXTS and value not in ("None", "null", "~")
        if isinstance(value, str) and not text:
            converted[key] = _convert(value)
    return converted


def _native(value: Any) -> Any:
    """Numbers of numpy as Python's, which is all that checkpoints hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _native(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_native, value))
    return value


def _convert(value: str) -> Any:
    """A string as RecBole reads it, by literals and YAML where RecBole calls ``eval``."""
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        literal = NotImplemented
    if literal is None or isinstance(literal, (str, int, float, list, tuple, dict, bool)):
        return literal
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value in ("null", "~"):
        return None
    # Only brackets are YAML: a bare word such as "no" stays the word it is in RecBole.
    if value.lstrip()[:1] in ("{", "["):
        try:
            return parse_yaml(value)
        except ValueError:
            return value
    return value


class UIPConfig(Config):
    """RecBole's :class:`~recbole.config.Config` with the defaults of ``properties/`` in it.

    Precedence, from weak to strong: RecBole's internal defaults, ``properties/uip.yaml``,
    ``properties/dataset/<dataset>.yaml``, config files, config dict, command line.

    Parameters
    ----------
    model : str or type, optional
        A context-aware model of RecBole, or a class derived from one.
    dataset : str, optional
        Name of the dataset.
    config_file_list : path or sequence of path, optional
        YAML files; a later one overrides an earlier one.
    config_dict : mapping, optional
        Settings; strings are converted as RecBole does, but never evaluated as code.
    command_line : sequence of str, optional
        Arguments of the form ``--key=value``. RecBole reads ``sys.argv`` here; we do not.

    Raises
    ------
    SettingsError
        If a ``uip_*`` key is unknown or any setting cannot be used.
    """

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: str | os.PathLike | Sequence[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Sequence[str] = (),
    ) -> None:
        self._command_line = tuple(command_line)
        # RecBole converts the strings of the dict in place; the caller's stays as it is.
        config_dict = _native(copy.deepcopy(dict(config_dict or {}))) or None
        with recbole_refusals(self):
            super().__init__(model, dataset, config_file_list, config_dict)
        self._warn_of_unknown_keys()
        self._warn_of_unread_data()
        check_valid_metric(self)
        modes = set(self.final_config_dict["eval_args"]["mode"].values())
        if self["eval_type"] == EvaluatorType.RANKING and "labeled" in modes:
            # RecBole would find out after the first epoch.
            raise SettingsError(
                f"metrics={self['metrics']} rank candidates, and eval_args.mode=labeled has none: "
                "take AUC and LogLoss, or a mode that samples candidates, such as uni100"
            )
        if self.uip.facets and "full" in modes:
            raise SettingsError(
                "eval_args.mode=full ranks items for a user outside any interaction, where a "
                "profile at a point in time has no value: set mode to labeled, or to sampled "
                "candidates such as uni100"
            )

    def _warn_of_unknown_keys(self) -> None:
        known = {*self.internal_config_dict, *itertools.chain(*self.parameters.values())}
        for key in map(str, self.external_config_dict):
            if key not in known and not key.startswith("uip_"):
                _warn_of_unknown_key(key, frozenset(known))

    def _warn_of_unread_data(self) -> None:
        # RecBole takes its own copy of this one, wherever the data are said to be.
        given = Path(self.external_config_dict.get("data_path") or "dataset", "ml-100k")
        if self.dataset == "ml-100k" and given.is_dir():
            logger.warning(
                "dataset ml-100k is RecBole's own, and the files in %s are not read: give folder "
                "and files another name to have these", given,
            )  # fmt: skip

    @property
    def uip(self) -> UIPSettings:
        """The ``uip_*`` keys, parsed."""
        try:
            return UIPSettings.from_dict(self.final_config_dict)
        except NoItemTextError as error:
            self._check_dataset(error)
            raise SettingsError(f"{error}{self._item_columns()}") from error
        except SettingsError as error:
            self._check_dataset(error)
            raise

    def _check_dataset(self, error: SettingsError) -> None:
        """A misspelt name has no properties/dataset/<name>.yaml, and so lacks settings too."""
        if not os.path.isdir(self["data_path"]):
            raise SettingsError(
                f"dataset {self['dataset']!r} (there is no folder {self['data_path']}; is the name "
                f"right?): {error}"
            ) from error

    def _item_columns(self) -> str:
        """What a template of an item's text can be made of, in words; nothing without a file."""
        path = Path(self["data_path"], f"{self['dataset']}.item")
        try:
            columns = atomic_header(path, self["field_separator"], self["encoding"])
        except (OSError, UnicodeError, LookupError):
            return ""
        return f"; {path} has {', '.join(columns)}"

    def compatibility_settings(self) -> None:
        """Stand-ins in RecBole's modules, where RecBole would patch numpy for the whole process."""
        compat.install()

    def _init_parameters_category(self) -> None:
        super()._init_parameters_category()
        # RecBole appends a dataset's keys to these lists of its own modules: copies keep one
        # run's keys out of the next.
        self.parameters = {name: list(keys) for name, keys in self.parameters.items()}

    def _build_yaml_loader(self) -> type:
        return _Loader

    def _convert_config_dict(self, config_dict: dict) -> dict:
        config_dict.update(_converted(config_dict))
        return config_dict

    def _load_config_files(self, file_list: Sequence[str] | None) -> dict:
        return load_config_files(file_list or ())

    def _load_cmd_line(self) -> dict:
        return self._convert_config_dict(parse_command_line(self._command_line))

    def _get_model_and_dataset(self, model: Any, dataset: str | None) -> tuple[str, type, str]:
        for key, value in (("model", model), ("dataset", dataset)):
            if value is None and key not in self.external_config_dict:
                raise SettingsError(f"{key} is not set: give --{key}=NAME")
        model = model if model is not None else self.external_config_dict["model"]
        if isinstance(model, str):
            _check_model_name(model)
        elif model.type != ModelType.CONTEXT:
            raise SettingsError(
                f"model={model.__name__} is of type {model.type.name}, and reads no token fields "
                "of the user: take a context-aware model"
            )
        return super()._get_model_and_dataset(model, dataset)

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        for name in ("uip.yaml", f"dataset/{dataset}.yaml"):
            if (text := read_properties(name)) is not None:
                self.internal_config_dict.update(parse_yaml(text) or {})

    def _set_default_parameters(self) -> None:
        check_settings(self.final_config_dict)
        try:
            super()._set_default_parameters()
        except (NotImplementedError, RuntimeError) as error:
            eval_args = self.final_config_dict.get("eval_args")
            metrics = self.final_config_dict.get("metrics")
            if "gauc" in str(metrics).lower():
                raise SettingsError(
                    f"metrics={metrics}: GAUC is reported in any case, and RecBole's own cannot "
                    "stand beside AUC: leave it out"
                ) from error
            raise SettingsError(
                f"{error} (metrics={metrics}, "
                f"eval_args={eval_args}; as in RecBole, eval_args replaces the default as a "
                "whole: give it a mode, such as labeled)"
            ) from error

    def __deepcopy__(self, memo: dict) -> UIPConfig:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            # Classes and loaders are shared; settings are copied.
            new.__dict__[key] = value if isinstance(value, type) else copy.deepcopy(value, memo)
        return new

    def __reduce__(self) -> tuple:
        state = dict(self.__dict__)
        del state["yaml_loader"]
        if self.model_class.__module__.startswith(f"recbole.model.{_CONTEXT}."):
            state["model_class"] = None
        return restore_config, (state,)


@functools.cache
def _warn_of_unknown_key(key: str, known: frozenset[str]) -> None:
    """Say, once, that a key is no setting of RecBole, whichever the model."""
    folder = importlib.resources.files("recbole") / "properties" / "model"
    models = [parse_yaml(file.read_text(encoding="utf-8")) or {} for file in folder.iterdir()]
    known = known.union(_BARE_KEYS, *models)
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    logger.warning("%s is no setting of RecBole or its models, and does nothing%s", key, hint)


def restore_config(state: dict) -> UIPConfig:
    """Rebuild a pickled config from its plain values; no value is evaluated."""
    config = UIPConfig.__new__(UIPConfig)
    config.__dict__.update(state)
    config.__dict__["yaml_loader"] = _Loader
    if config.__dict__.get("model_class") is None:
        _check_model_name(config.__dict__["model"])
        config.__dict__["model_class"] = get_model(config.__dict__["model"])
    return config


def _check_model_name(model: str) -> None:
    known = context_models()
    if model in known:
        return
    for folder, reason in _OTHER_TYPES.items():
        file = Path(recbole.__file__).parent / "model" / folder / f"{model.lower()}.py"
        if model.isidentifier() and file.is_file():
            raise SettingsError(
                f"model={model} is {reason}. Profile IDs are token fields, which RecBole's "
                f"context-aware models read: {', '.join(known)}"
            )
    written = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(model.lower(), written, n=1, cutoff=0.4)
    hint = f"; did you mean {written[nearest[0]]!r}?" if nearest else ""
    raise SettingsError(
        f"model={model!r} is not a model of RecBole{hint}. Context-aware models are "
        f"{', '.join(known)}"
    )

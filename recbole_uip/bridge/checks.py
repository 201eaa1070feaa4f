"""Settings of RecBole's that it would misread, or stumble over late and without their names."""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recbole.utils import EvaluatorType

from recbole_uip.settings import SettingsError

__all__ = ["check_settings", "check_valid_metric"]

# Numbers: what they are, and at least. A key that the model does not have is none.
_NUMBERS = {
    "epochs": (numbers.Integral, 0),
    "stopping_step": (numbers.Integral, 0),
    "eval_step": (numbers.Integral, -1),
    "train_batch_size": (numbers.Integral, 1),
    "eval_batch_size": (numbers.Integral, 1),
    "learning_rate": (numbers.Real, 0),
    "weight_decay": (numbers.Real, 0),
    "worker": (numbers.Integral, 0),
    "metric_decimal_place": (numbers.Integral, 0),
    "loss_decimal_place": (numbers.Integral, 0),
    "embedding_size": (numbers.Integral, 1),
}
_SAMPLE_NUMBERS = {
    "sample_num": (numbers.Integral, 1),
    "candidate_num": (numbers.Integral, 0),
    "alpha": (numbers.Real, 0),
}

_CLIP_KEYS = {"max_norm", "norm_type", "error_if_nonfinite", "foreach"}
_MODE = re.compile(r"labeled|full|(uni|pop)0*[1-9]\d*")


def _is_number(value: Any, kind: type, least: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    return _is_number(value, numbers.Integral, 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are(values: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(values, (list, tuple)) and all(map(test, values))


def _or_none(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


# Other settings: whether a value is of the form that RecBole takes, and what that is.
_FORMS = {
    "metrics": (
        lambda value: _is_text(value) or (_are(value, _is_text) and bool(value)),
        "a list of metrics, such as [AUC, LogLoss]",
    ),
    "valid_metric": (_is_text, "one of metrics, such as AUC or NDCG@10"),
    "numerical_features": (
        lambda value: _are(value, _is_text),
        "a list of columns, such as [price], or [] for none",
    ),
    "mlp_hidden_size": (
        lambda value: isinstance(value, list) and _are(value, _is_size) and bool(value),
        "a list of at least one size of a layer, such as [64, 64]",
    ),
    "clip_grad_norm": (
        _or_none(
            lambda value: (
                isinstance(value, Mapping) and "max_norm" in value and _CLIP_KEYS.issuperset(value)
            )
        ),
        "a mapping, such as {max_norm: 5, norm_type: 2}, or ~ for none",
    ),
    "val_interval": (
        _or_none(lambda value: isinstance(value, Mapping)),
        "a mapping of columns, such as {rating: '[3,inf)'}, or ~ for none",
    ),
    "seq_len": (
        _or_none(lambda value: isinstance(value, Mapping) and _are([*value.values()], _is_size)),
        "a mapping of columns to numbers, such as {title: 10}, or ~ for none",
    ),
    "benchmark_filename": (
        _or_none(lambda value: _are(value, _is_text) and len(value) == 3),
        "a list of three, such as [train, valid, test], or ~ for none",
    ),
    "field_separator": (_is_text, "the text between columns, such as ','"),
    "seq_separator": (_is_text, "the text between the values of a sequence, such as ' '"),
    "checkpoint_dir": (_is_text, "a folder"),
    "eval_args": (
        lambda value: isinstance(value, Mapping),
        "a mapping, such as {split: {RS: [0.8, 0.1, 0.1]}, order: TO, mode: labeled}",
    ),
    "train_neg_sample_args": (
        _or_none(lambda value: isinstance(value, Mapping) or value == "None"),
        "a mapping, such as {distribution: uniform, sample_num: 1}, or ~ for none",
    ),
}

_FIELDS = ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "LABEL_FIELD")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check what RecBole is to be given, before it puts its defaults in.

    Raises
    ------
    SettingsError
        If a value is not of the form that RecBole takes, or a key within a mapping is unknown.
    """
    _check_numbers("", settings, _NUMBERS)
    for key, (is_right, form) in _FORMS.items():
        if key in settings and not is_right(settings[key]):
            raise SettingsError(f"{key}={settings[key]!r} must be {form}")
    _check_fields(settings)
    _check_eval_args(settings["eval_args"])
    sampling = settings["train_neg_sample_args"]
    if isinstance(sampling, Mapping):
        known = ("distribution", "sample_num", "alpha", "dynamic", "candidate_num")
        example = "{distribution: uniform, sample_num: 1}"
        _check_keys("train_neg_sample_args", sampling, known, example)
        if str(sampling.get("distribution", "uniform")).lower() != "none":
            _check_numbers("train_neg_sample_args.", sampling, _SAMPLE_NUMBERS)


def check_valid_metric(settings: Mapping[str, Any]) -> None:
    """Check the metric that chooses the best epoch, which RecBole looks up after the first one."""
    chosen, metrics = settings["valid_metric"], settings["metrics"]
    name = chosen.partition("@")[0]
    if name.lower() not in {metric.lower() for metric in metrics}:
        raise SettingsError(
            f"valid_metric={chosen!r} is not among metrics={list(metrics)}: take one of them, or "
            "add it to metrics"
        )
    known, of_topk = [name], ""
    if settings["eval_type"] == EvaluatorType.RANKING and name.lower() != "gauc":
        known = [f"{name}@{k}" for k in settings["topk"]]
        of_topk = f", as topk={settings['topk']}"
    if chosen.lower() not in map(str.lower, known):
        raise SettingsError(f"valid_metric={chosen!r} must be {' or '.join(known)}{of_topk}")


def _check_numbers(
    prefix: str, settings: Mapping[str, Any], table: Mapping[str, tuple[type, float]]
) -> None:
    for key, (kind, least) in table.items():
        if key in settings and not _is_number(settings[key], kind, least):
            what = "a whole number" if kind is numbers.Integral else "a number"
            raise SettingsError(
                f"{prefix}{key}={settings[key]!r} must be {what} of at least {least}"
            )


def _check_keys(name: str, given: Iterable[Any], known: Iterable[str], example: str) -> None:
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"write such as {example}"
            raise SettingsError(f"{name} has no key {key!r}: {hint}")


def _check_fields(settings: Mapping[str, Any]) -> None:
    names: dict[str, str] = {}
    for key in _FIELDS:
        name = settings[key]
        if name is None and key == "TIME_FIELD":
            continue
        if not _is_text(name):
            raise SettingsError(f"{key}={name!r} must be the name of a column")
        if name == "split":
            raise SettingsError(
                f"{key}={name!r} is the name of the column of profiles.parquet that says the "
                f"split: give the column another name, in the files and by {key}"
            )
        if name in names:
            raise SettingsError(f"{key} and {names[name]} are both {name!r}: name two columns")
        names[name] = key


def _check_eval_args(eval_args: Mapping[str, Any]) -> None:
    example = "{split: {RS: [0.8, 0.1, 0.1]}, order: TO, mode: labeled}"
    _check_keys("eval_args", eval_args, ("split", "order", "group_by", "mode"), example)
    split = eval_args.get("split")
    if isinstance(split, Mapping) and "RS" in split:
        ratios = split["RS"]
        fine = _are(ratios, lambda ratio: _is_number(ratio, numbers.Real, 0))
        if not fine or not sum(ratios):
            raise SettingsError(
                f"eval_args.split.RS={ratios!r} must be the shares of the splits, such as "
                "[0.8, 0.1, 0.1]"
            )
    modes = eval_args.get("mode", {})
    if isinstance(modes, Mapping):
        _check_keys("eval_args.mode", modes, ("valid", "test"), "{valid: uni10, test: uni100}")
    for mode in modes.values() if isinstance(modes, Mapping) else [modes]:
        if not isinstance(mode, str) or not _MODE.fullmatch(mode):
            raise SettingsError(
                f"eval_args.mode={mode!r} must be labeled, full, or a number of sampled "
                "candidates of at least 1, such as uni100 or pop100"
            )

"""What an experiment's finished runs say: read, checked, measured and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recbole_uip.evidence import statistics
from recbole_uip.evidence.statistics import Difference, Relative, Reliability
from recbole_uip.evidence.store import RunStore
from recbole_uip.settings import SettingsError, parse_duration

__all__ = [
    "REFRESH",
    "CaseOutcome",
    "Comparison",
    "Measured",
    "Outcomes",
    "RunOutcome",
    "Series",
    "compare",
    "load",
    "measure",
    "pooled",
    "sensitivity",
]

METRICS = ("auc", "logloss", "gauc")
SIGNIFICANT = 0.05
#: The setting that a staleness curve is drawn of.
REFRESH = "uip_refresh"
# Scores are kept in single precision, which may tie or part a few of them.
AUC_TOLERANCE = 1e-4
_ARRAYS = ("row", "user", "item", "label", "score", "history", "user_rows", "item_rows")
# What shapes the rows of a split, of a record's protocol.
_ROWS = ("split", "order", "group_by", "mode", "threshold")


@dataclass(frozen=True)
class RunOutcome:
    """One finished run.

    Attributes
    ----------
    key : str
    record : dict
        What the store's JSON file holds.
    store : RunStore
    """

    key: str
    record: dict[str, Any] = field(repr=False)
    store: RunStore = field(repr=False)

    def metric(self, name: str, split: str = "test") -> float:
        """A metric of the record; NaN where it has none."""
        return _number(self.record.get(split, {}).get(name))

    def test_rows(self) -> dict[str, np.ndarray]:
        """Arrays of the test split, in the order of rows, and of items within a row.

        Raises
        ------
        SettingsError
            If the predictions are not what the store's format says.
        """
        path = self.store.folder / f"{self.key}.npz"
        try:
            found = self.store.predictions(self.key)
            arrays = {name: found[f"test_{name}"] for name in _ARRAYS}
            # Where candidates are sampled, several of them share a row number.
            order = np.lexsort((arrays["item"], arrays["row"]))
            return {name: values[order] for name, values in arrays.items()}
        except Exception as error:  # zipfile and numpy raise many kinds
            raise SettingsError(
                f"{path} cannot be read ({type(error).__name__}: {error}): delete it and the "
                "record beside it, and run the experiment again"
            ) from error


@dataclass
class CaseOutcome:
    """One model and arm on one dataset under one variant, over seeds.

    Attributes
    ----------
    dataset, model, arm : str
    variant : dict of str to value
        Settings that differ from the experiment's own, nested ones by dotted keys.
    runs : dict of int to RunOutcome
        Finished runs by seed.
    missing : dict of int to str
        Keys of the others by seed.
    """

    dataset: str
    model: str
    arm: str
    variant: dict[str, Any]
    runs: dict[int, RunOutcome] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)

    @property
    def variant_name(self) -> str:
        """The variant in words; empty without one."""
        return ", ".join(f"{key}={_shown(value)}" for key, value in self.variant.items())

    def values(self, metric: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """A metric of the test split by seed."""
        seeds = self.runs if seeds is None else seeds
        return np.array([self.runs[seed].metric(metric) for seed in seeds])


@dataclass
class Outcomes:
    """An experiment's plan, and the runs of it that are there.

    Attributes
    ----------
    folder : Path
    plan : dict
        What ``experiment.json`` holds.
    cases : list of CaseOutcome
        In the plan's order.
    """

    folder: Path
    plan: dict[str, Any] = field(repr=False)
    cases: list[CaseOutcome]

    @property
    def title(self) -> str:
        """The experiment's title, else its name."""
        return str(self.plan.get("title") or self.plan.get("name") or self.folder.name)

    @property
    def baseline(self) -> str:
        """The arm that every other one is compared with."""
        return str(self.plan.get("baseline", "plain"))

    @property
    def arms(self) -> list[str]:
        """Arms in the plan's order."""
        return list(dict.fromkeys(case.arm for case in self.cases))

    def runs(self) -> Iterator[RunOutcome]:
        """Finished runs, each once."""
        yield from {run.key: run for case in self.cases for run in case.runs.values()}.values()

    def missing(self) -> list[tuple[CaseOutcome, int, str]]:
        """Case, seed and key of every run that is not there."""
        return [(case, *each) for case in self.cases for each in case.missing.items()]

    def main_cases(self) -> list[CaseOutcome]:
        """Finished cases of each dataset and model under the first variant that has any."""
        first: dict[tuple[str, str], dict] = {}
        finished = [case for case in self.cases if case.runs]
        for case in sorted(finished, key=lambda case: bool(case.variant)):
            first.setdefault((case.dataset, case.model), case.variant)
        return [case for case in finished if case.variant == first[case.dataset, case.model]]


def load(folder: str | Path) -> Outcomes:
    """Read an experiment's plan and the records of its finished runs.

    Raises
    ------
    SettingsError
        If the folder has no plan, or a file is damaged.
    """
    folder = Path(folder)
    path = folder / "experiment.json"
    if not path.is_file():
        raise SettingsError(f"there is no {path}: name the output folder of recbole-uip experiment")
    plan = _read_json(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    store = RunStore(folder / str(plan.get("runs", "../runs")))
    cases = []
    try:
        for each in plan["cases"]:
            variant = dict(_flat(each.get("variant") or {}))
            case = CaseOutcome(each["dataset"], each["model"], each["arm"], variant)
            for seed, key in each["seeds"].items():
                if run := _run(store, key):
                    case.runs[int(seed)] = run
                else:
                    case.missing[int(seed)] = key
            cases.append(case)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{path} is not the plan of an experiment ({type(error).__name__}: {error}): run "
            "recbole-uip experiment again"
        ) from error
    return Outcomes(folder, plan, cases)


def _run(store: RunStore, key: str) -> RunOutcome | None:
    if key not in store or not (store.folder / f"{key}.npz").is_file():
        return None
    record = _read_json(store.folder / f"{key}.json", lambda: store.read(key))
    return RunOutcome(key, record, store)


def _read_json(path: Path, read: Any) -> dict[str, Any]:
    try:
        found = read()
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except ValueError as error:
        raise SettingsError(f"{path} is damaged ({error}): delete it and run again") from error


def _flat(values: Mapping[str, Any], stem: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with dotted keys in place of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{stem}{key}.")
        else:
            yield f"{stem}{key}", value


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- measures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a run's predictions say beyond its record.

    Attributes
    ----------
    rows : str
        Hash of rows, users, items and labels: runs that share it were judged on the same rows.
    users : ndarray of int
        Users of the split, sorted.
    auc : float
        Recomputed from the scores.
    reliability : Reliability
    slices : dict of str to dict of str to dict of str to float
        Metrics by what is sliced and by slice.
    replicates : ndarray of float, shape (n_boot,)
        AUC in each resample of users.
    """

    rows: str
    users: np.ndarray
    auc: float
    reliability: Reliability
    slices: dict[str, dict[str, dict[str, float]]]
    replicates: np.ndarray


def measure(
    experiments: Sequence[Outcomes], n_boot: int = statistics.N_BOOT, seed: int = 0
) -> dict[str, Measured]:
    """Measure every finished run, by key.

    Runs of one dataset and protocol meet the same resampled users, also where (as under a random
    split) the rows depend on the seed.
    """
    runs = {run.key: run for each in experiments for run in each.runs()}
    users: dict[str, np.ndarray] = {}
    for run in runs.values():
        known = users.get(_rows_of(run), np.empty(0, dtype=np.int64))
        users[_rows_of(run)] = np.union1d(known, run.test_rows()["user"])
    measured = {}
    for key, run in tqdm(runs.items(), desc="runs", leave=False, delay=2):
        rows = run.test_rows()
        label, score = rows["label"], rows["score"]
        digest = hashlib.sha256()
        for name in ("row", "user", "item", "label"):
            digest.update(np.ascontiguousarray(rows[name], dtype=np.int64).tobytes())
        masks = statistics.slices(rows["history"], rows["item_rows"], rows["user_rows"])
        measured[key] = Measured(
            digest.hexdigest(),
            np.unique(rows["user"]),
            statistics.auc(label, score),
            statistics.reliability_curve(label, score),
            {
                kind: {
                    name: statistics.slice_metrics(label, score, mask)
                    for name, mask in by_name.items()
                }
                for kind, by_name in masks.items()
            },
            statistics.bootstrap_aucs(
                rows["user"], label, score, n_boot, seed, users[_rows_of(run)]
            ),
        )
    return measured


def _rows_of(run: RunOutcome) -> str:
    protocol = run.record.get("protocol", {})
    parts = [run.record.get("dataset"), *(protocol.get(name) for name in _ROWS)]
    return json.dumps(parts, sort_keys=True)


def pooled(curves: Sequence[Reliability]) -> Reliability:
    """Curves of several seeds as one, bin by bin."""
    rows = np.sum([curve.rows for curve in curves], axis=0)
    with np.errstate(invalid="ignore"):
        score, share = (
            np.nansum([getattr(curve, name) * curve.rows for curve in curves], axis=0) / rows
            for name in ("score", "share")
        )
    return Reliability(score, share, rows)


# --- comparisons --------------------------------------------------------------------------------


@dataclass
class Comparison:
    """The difference of a case from another on the same rows.

    Attributes
    ----------
    case, against : CaseOutcome
    seeds : tuple of int
        Seeds finished on both sides, on the same rows.
    seeds_with_other_rows : tuple of int
        Seeds left out because the rows differ.
    over_seeds : dict of str to Difference
        By metric.
    over_users : Difference
        Of AUC.
    relative : Relative
        Of the mean AUCs.
    p_seeds, p_users : float
        Holm-adjusted p-values of the AUC difference.
    """

    case: CaseOutcome
    against: CaseOutcome
    seeds: tuple[int, ...]
    seeds_with_other_rows: tuple[int, ...]
    over_seeds: dict[str, Difference]
    over_users: Difference
    relative: Relative
    p_seeds: float = np.nan
    p_users: float = np.nan

    @property
    def name(self) -> str:
        """``arm - arm``, with the other side's model and settings where they differ."""
        differs = []
        if self.against.model != self.case.model:
            differs.append(self.against.model)
        differs += [f"no {key}" for key in self.case.variant if key not in self.against.variant]
        return f"{self.case.arm} − {self.against.arm}" + (
            f" ({', '.join(differs)})" if differs else ""
        )

    @property
    def verdict(self) -> str:
        """Higher or lower only where both adjusted p-values are below .05."""
        if np.isnan(self.p_seeds) or np.isnan(self.p_users):
            return "untested"
        if max(self.p_seeds, self.p_users) >= SIGNIFICANT:
            return "not told apart"
        return "higher" if self.over_users.mean > 0 else "lower"


def compare(outcomes: Outcomes, measured: Mapping[str, Measured]) -> list[Comparison]:
    """Differences from the baseline, then those of the plan's pairs; p-values adjusted over all.

    A case is compared with the other arm's case of the same dataset and model whose settings it
    shares (all of them, or as many as there is one with). An arm that does not exist with the
    case's model is taken with each model that it exists with.
    """
    wanted = [(arm, outcomes.baseline) for arm in outcomes.arms if arm != outcomes.baseline]
    wanted += [tuple(pair) for pair in outcomes.plan.get("compare") or ()]
    found = []
    for arm, other in dict.fromkeys(wanted):
        for case in outcomes.cases:
            if case.arm == arm:
                found += [
                    comparison
                    for against in _partners(outcomes, case, other)
                    if (comparison := _compare(case, against, measured))
                ]
    compared = [each for each in found if each.seeds]
    for name, p_values in (
        ("p_seeds", [each.over_seeds["auc"].p for each in compared]),
        ("p_users", [each.over_users.p for each in compared]),
    ):
        for each, p in zip(compared, statistics.holm(p_values), strict=True):
            setattr(each, name, float(p))
    return found


def _partners(outcomes: Outcomes, case: CaseOutcome, arm: str) -> list[CaseOutcome]:
    same_data = [each for each in outcomes.cases if (each.dataset, each.arm) == (case.dataset, arm)]
    pool = [each for each in same_data if each.model == case.model] or same_data
    best: dict[str, CaseOutcome] = {}
    for each in pool:
        if each is case or not each.variant.items() <= case.variant.items():
            continue
        if each.model not in best or len(each.variant) > len(best[each.model].variant):
            best[each.model] = each
    return list(best.values())


def _compare(
    case: CaseOutcome, against: CaseOutcome, measured: Mapping[str, Measured]
) -> Comparison | None:
    shared = sorted(case.runs.keys() & against.runs.keys())
    if not shared:
        return None
    sides = [[measured[side.runs[seed].key] for seed in shared] for side in (case, against)]
    same = [a.rows == b.rows for a, b in zip(*sides, strict=True)]
    seeds = [seed for seed, is_same in zip(shared, same, strict=True) if is_same]
    others = tuple(seed for seed in shared if seed not in seeds)
    empty = Difference(np.nan, np.nan, np.nan, np.nan, 0)
    if not seeds:
        return Comparison(
            case,
            against,
            (),
            others,
            dict.fromkeys(METRICS, empty),
            empty,
            Relative(np.nan, np.nan),
        )
    over_seeds = {
        metric: statistics.paired_difference(
            case.values(metric, seeds), against.values(metric, seeds)
        )
        for metric in METRICS
    }
    of_a, of_b = (
        [each for each, is_same in zip(side, same, strict=True) if is_same] for side in sides
    )
    replicates = [np.mean([each.replicates for each in side], axis=0) for side in (of_a, of_b)]
    aucs = [float(np.mean([each.auc for each in side])) for side in (of_a, of_b)]
    n_users = len(np.unique(np.concatenate([each.users for each in of_a])))
    return Comparison(
        case,
        against,
        tuple(seeds),
        others,
        over_seeds,
        statistics.bootstrap_difference(aucs[0] - aucs[1], replicates[0] - replicates[1], n_users),
        statistics.relative(
            float(case.values("auc", seeds).mean()), float(against.values("auc", seeds).mean())
        ),
    )


# --- sensitivity --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Cases that differ in one setting alone, in the order of its values.

    Attributes
    ----------
    dataset, model, arm : str
    rest : str
        The other settings of the variant, in words.
    values : tuple
        Of the setting.
    cases : tuple of CaseOutcome
    """

    dataset: str
    model: str
    arm: str
    rest: str
    values: tuple[Any, ...]
    cases: tuple[CaseOutcome, ...]


def sensitivity(outcomes: Outcomes) -> dict[str, list[Series]]:
    """Series of at least two values, by setting.

    A case without the setting stands at the value that its runs' configuration has.
    """
    keys = dict.fromkeys(key for case in outcomes.cases for key in case.variant)
    found: dict[str, list[Series]] = {}
    for key in keys:
        groups: dict[tuple, dict[str, tuple[Any, CaseOutcome]]] = {}
        for case in outcomes.cases:
            value = case.variant.get(key, _configured(case, key))
            if value is None or not case.runs:
                continue
            rest = ", ".join(f"{k}={_shown(v)}" for k, v in case.variant.items() if k != key)
            group = groups.setdefault((case.dataset, case.model, case.arm, rest), {})
            # Where a variant says the default once more, it is the same point.
            group.setdefault(_shown(value), (value, case))
        for group, points in groups.items():
            if len(points) > 1:
                ordered = sorted(points.values(), key=lambda point: _rank(key, point[0]))
                values, cases = zip(*ordered, strict=True)
                found.setdefault(key, []).append(Series(*group, values, cases))
    return found


def _configured(case: CaseOutcome, key: str) -> Any:
    """The value of a dotted setting in the configuration of the case's runs; None without one."""
    value: Any = next((run.record.get("config", {}) for run in case.runs.values()), None)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _rank(key: str, value: Any) -> tuple:
    """Numbers by size, durations by length, and all else as it comes."""
    if key == REFRESH:
        return (0, parse_duration(key, value))
    try:
        return (0, float(value))
    except (TypeError, ValueError):
        return (1, 0.0)

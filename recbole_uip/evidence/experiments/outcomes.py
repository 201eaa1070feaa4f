"""What an experiment's finished runs say: read, checked, measured and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recbole_uip.evidence import statistics
from recbole_uip.evidence.experiments.measured import (
    Measured,
    Stamp,
    digest,
    measure_rows,
    read_measured,
    write_measured,
)
from recbole_uip.evidence.experiments.store import RunStore
from recbole_uip.evidence.statistics import Difference, Relative, Reliability
from recbole_uip.files import sha256_of
from recbole_uip.settings import SettingsError, parse_duration

__all__ = [
    "METRICS",
    "REFRESH",
    "SIGNIFICANT",
    "TESTED",
    "CaseOutcome",
    "Comparison",
    "Outcomes",
    "RunOutcome",
    "Series",
    "Tuned",
    "compare",
    "load",
    "load_all",
    "measure",
    "pooled",
    "sensitivity",
]

PLAN = "experiment.json"
METRICS = ("auc", "logloss", "gauc", "list_auc")
#: Those of which a difference is tested over seeds and over users.
TESTED = ("auc", "list_auc")
SIGNIFICANT = 0.05
#: The setting that a staleness curve is drawn of.
REFRESH = "uip_refresh"
# Scores are kept in single precision, which may tie or part a few of them.
AUC_TOLERANCE = 1e-4
_ARRAYS = ("row", "user", "item", "list", "label", "score", "history", "user_rows", "item_rows")
_TOKENS = "test_token_"
# What shapes the rows of a split, of a record's protocol.
_ROWS = ("split", "order", "group_by", "mode", "threshold", "rows")


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

    @property
    def section(self) -> dict[str, Any]:
        """What ``uip_arms`` said of its arm, which may have had another name there."""
        arms = self.record.get("config", {}).get("uip_arms") or {}
        return next(iter(arms.values()), None) or {}

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
        arrays = self._read("test_")
        try:
            rows = {name: arrays[f"test_{name}"] for name in _ARRAYS}
            return _ordered(rows, rows)
        except Exception as error:  # numpy raises many kinds
            raise self.damaged(error) from error

    def test_tokens(self) -> dict[str, np.ndarray]:
        """Tokens of each code field, by field, in the order of :meth:`test_rows`.

        Empty where the arm has no codes, or the run did not keep them.
        """
        arrays = self._read("test_")
        try:
            rows = {name: arrays[f"test_{name}"] for name in ("row", "item")}
            tokens = {
                name.removeprefix(_TOKENS): values
                for name, values in arrays.items()
                if name.startswith(_TOKENS)
            }
            return _ordered(tokens, rows)
        except Exception as error:
            raise self.damaged(error) from error

    @property
    def predictions_path(self) -> Path:
        """Where its predictions lie."""
        return self.store.folder / f"{self.key}.npz"

    def _read(self, prefix: str) -> dict[str, np.ndarray]:
        try:
            return self.store.predictions(self.key, prefix)
        except Exception as error:  # zipfile and numpy raise many kinds
            raise self.damaged(error) from error

    def damaged(self, why: Exception | str) -> SettingsError:
        """The error that says so, with the way out."""
        if isinstance(why, Exception):
            why = f"{type(why).__name__}: {why}"
        return SettingsError(
            f"{self.predictions_path} cannot be used ({why}): delete it and run "
            "recbole-uip experiment again"
        )


def _ordered(arrays: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Where candidates are sampled, several of them share a row number.
    order = np.lexsort((rows["item"], rows["row"]))
    if any(len(values) != len(order) for values in arrays.values()):
        raise ValueError("its arrays differ in length")
    return {name: values[order] for name, values in arrays.items()}


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

    @property
    def overlap(self) -> float:
        """See :func:`~recbole_uip.evidence.statistics.split_overlap`; 0 without runs."""
        protocols = [run.record["protocol"] for run in self.runs.values()]
        return statistics.split_overlap(protocols[0]) if protocols else 0.0

    @property
    def keys(self) -> dict[int, str]:
        """Keys of all planned runs by seed."""
        return {**{seed: run.key for seed, run in self.runs.items()}, **self.missing}

    def values(self, metric: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """A metric of the test split by seed."""
        seeds = self.runs if seeds is None else seeds
        return np.array([self.runs[seed].metric(metric) for seed in seeds])


@dataclass(frozen=True)
class Tuned:
    """The grid that a case was tuned on.

    Attributes
    ----------
    case : CaseOutcome
        Without runs.
    points : list of (dict of str to value, RunOutcome or None)
        Settings, and the run that was made with them; None where it is not there.
    chosen : dict of str to value
    """

    case: CaseOutcome
    points: list[tuple[dict[str, Any], RunOutcome | None]]
    chosen: dict[str, Any]


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
    tuned : list of Tuned
        Empty where nothing was tuned.
    family : list of CaseOutcome
        All that the experiment's file asks, without runs, each with the key of one seed.
    """

    folder: Path
    plan: dict[str, Any] = field(repr=False)
    cases: list[CaseOutcome]
    tuned: list[Tuned] = field(default_factory=list)
    family: list[CaseOutcome] = field(default_factory=list)

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

    def counted(self) -> tuple[int, int]:
        """Numbers of finished and of planned runs; one that several cases share counts once."""
        finished = {run.key for run in self.runs()}
        return len(finished), len(finished.union(key for _, _, key in self.missing()))

    @property
    def main_settings(self) -> str:
        """What :meth:`main_cases` are of, where settings are varied, as a sentence; else empty."""
        if not any(case.variant for case in self.cases):
            return ""
        names = dict.fromkeys(case.variant_name or "the file's own" for case in self.main_cases())
        return f" Of these settings alone: {'; '.join(names)}."

    def main_cases(self) -> list[CaseOutcome]:
        """Finished cases of each dataset and model under the first variant that has any."""
        first: dict[tuple[str, str], dict] = {}
        finished = [case for case in self.cases if case.runs]
        for case in sorted(finished, key=lambda case: bool(case.variant)):
            first.setdefault((case.dataset, case.model), case.variant)
        return [case for case in finished if case.variant == first[case.dataset, case.model]]


def load_all(folder: str | Path) -> list[Outcomes]:
    """The experiment of a folder, or those of its subfolders, by name.

    Raises
    ------
    SettingsError
        If there is none, or a file is damaged.
    """
    folder = Path(folder)
    if (folder / PLAN).is_file():
        return [load(folder)]
    plans = sorted(folder.glob(f"*/{PLAN}"))
    if not plans:
        raise SettingsError(
            f"there is no {PLAN} in {folder} nor in a folder in it: name the output folder of "
            "recbole-uip experiment"
        )
    return [load(plan.parent) for plan in plans]


def load(folder: str | Path) -> Outcomes:
    """Read an experiment's plan and the records of its finished runs.

    Raises
    ------
    SettingsError
        If the folder has no plan, or a file is damaged.
    """
    folder = Path(folder)
    path = folder / PLAN
    if not path.is_file():
        raise SettingsError(f"there is no {path}: name the output folder of recbole-uip experiment")
    plan = _read_json(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    try:
        store = RunStore(folder / str(plan.get("runs", "../runs")))
        cases = []
        for each in plan["cases"]:
            case = _case(each)
            for seed, key in each["seeds"].items():
                if run := _run(store, key):
                    case.runs[int(seed)] = run
                else:
                    case.missing[int(seed)] = key
            cases.append(case)
        tuned = [
            Tuned(
                _case(each),
                [(point["settings"], _run(store, point["key"])) for point in each["grid"]],
                each["chosen"],
            )
            for each in plan.get("tuning") or ()
        ]
        family = []
        for each in plan["family"]:
            family.append(_case(each))
            family[-1].missing[0] = each["key"]
    except SettingsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{path} is not the plan of an experiment ({type(error).__name__}: {error}): run "
            "recbole-uip experiment again"
        ) from error
    return Outcomes(folder, plan, cases, tuned, family)


def _case(given: Mapping[str, Any]) -> CaseOutcome:
    variant = dict(_flat(given.get("variant") or {}))
    return CaseOutcome(given["dataset"], given["model"], given["arm"], variant)


def _run(store: RunStore, key: str) -> RunOutcome | None:
    if key not in store:
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


def measure(
    experiments: Sequence[Outcomes], n_boot: int = statistics.N_BOOT, seed: int = 0
) -> dict[str, Measured]:
    """Measure every finished run, by key, or read what was measured before.

    Runs of one dataset and protocol meet the same resampled users, also where (as under a random
    split) the rows depend on the seed. What is measured is kept in the store, beside the run.

    Raises
    ------
    SettingsError
        If predictions cannot be read, or are not those of the record.
    """
    runs = {run.key: run for each in experiments for run in each.runs()}
    files = {key: sha256_of(run.predictions_path) for key, run in runs.items()}
    kept = {key: read_measured(_kept_path(run)) for key, run in runs.items()}
    users: dict[str, np.ndarray] = {}
    for key, run in runs.items():
        is_kept = kept[key] and kept[key][0].predictions == files[key]
        own = kept[key][1].users if is_kept else run.test_rows()["user"]
        users[_split_of(run)] = np.union1d(users.get(_split_of(run), own[:0]), own)
    measured = {}
    for key, run in tqdm(runs.items(), desc="measuring runs", unit="run", leave=False, delay=2):
        drawn = users[_split_of(run)]
        stamp = Stamp(files[key], n_boot, seed, digest(drawn))
        if kept[key] and kept[key][0] == stamp:
            measured[key] = kept[key][1]
        else:
            measured[key] = _measure(run, n_boot, seed, drawn)
            write_measured(_kept_path(run), stamp, measured[key])
    return measured


def _measure(run: RunOutcome, n_boot: int, seed: int, users: np.ndarray) -> Measured:
    rows = run.test_rows()
    if np.isnan(rows["score"]).any():
        raise run.damaged("a score is NaN")
    found = measure_rows(rows, n_boot, seed, users)
    recorded = run.metric("auc")
    if abs(found.auc - recorded) > AUC_TOLERANCE:
        raise run.damaged(f"its AUC is {found.auc:.5f}, but that of the record {recorded:.5f}")
    return found


def _kept_path(run: RunOutcome) -> Path:
    return run.store.folder / f"{run.key}.measured.npz"


def _split_of(run: RunOutcome) -> str:
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
    over_users : dict of str to Difference
        By metric of :data:`TESTED`.
    relative : dict of str to Relative
        Of the means, by metric of :data:`TESTED`.
    n_tests : int
        Number of different comparisons that p-values are adjusted for.
    p_seeds, p_users : dict of str to float
        Holm-adjusted p-values, by metric of :data:`TESTED`.
    """

    case: CaseOutcome
    against: CaseOutcome
    seeds: tuple[int, ...]
    seeds_with_other_rows: tuple[int, ...]
    over_seeds: dict[str, Difference]
    over_users: dict[str, Difference]
    relative: dict[str, Relative]
    n_tests: int
    p_seeds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TESTED, np.nan))
    p_users: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TESTED, np.nan))

    @property
    def identity(self) -> tuple:
        """Says whether two comparisons are of the same runs."""
        return _identity(self.case, self.against)

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

    def verdict(self, metric: str) -> str:
        """Higher or lower only where both adjusted p-values are below .05."""
        p_values = self.p_seeds[metric], self.p_users[metric]
        if np.isnan(p_values).any():
            return "untested"
        if max(p_values) >= SIGNIFICANT:
            return "not told apart"
        return "higher" if self.over_users[metric].mean > 0 else "lower"


def compare(outcomes: Outcomes, measured: Mapping[str, Measured]) -> list[Comparison]:
    """Differences from the baseline, then those of the plan's pairs.

    A metric's p-values are adjusted for the number of all that the experiment's file asks, run or
    not, where what is of the same runs under two settings counts once.

    A case is compared with the other arm's case of the same dataset and model whose settings it
    shares (all of them, or as many as there is one with). An arm that does not exist with the
    case's model is taken with each model that it exists with.
    """
    n_tests = len({_identity(*pair) for pair in _pairs(outcomes, outcomes.family)})
    pairs = _pairs(outcomes, outcomes.cases)
    found = [each for pair in pairs if (each := _compare(*pair, measured, n_tests))]
    compared = {each.identity: each for each in found if each.seeds}
    for metric in TESTED:
        p_seeds = statistics.holm(
            [each.over_seeds[metric].p for each in compared.values()], n_tests
        )
        p_users = statistics.holm(
            [each.over_users[metric].p for each in compared.values()], n_tests
        )
        place = {identity: number for number, identity in enumerate(compared)}
        for each in found:
            if each.seeds:
                each.p_seeds[metric] = float(p_seeds[place[each.identity]])
                each.p_users[metric] = float(p_users[place[each.identity]])
    return found


def _pairs(
    outcomes: Outcomes, cases: Sequence[CaseOutcome]
) -> list[tuple[CaseOutcome, CaseOutcome]]:
    """All that are compared of ``cases``."""
    arms = dict.fromkeys(case.arm for case in cases)
    wanted = [(arm, outcomes.baseline) for arm in arms if arm != outcomes.baseline]
    wanted += [tuple(pair) for pair in outcomes.plan.get("compare") or ()]
    return [
        (case, against)
        for arm, other in dict.fromkeys(wanted)
        for case in cases
        if case.arm == arm
        for against in _partners(cases, case, other)
    ]


def _identity(case: CaseOutcome, against: CaseOutcome) -> tuple:
    """The planned runs of both sides: two settings may be one pair of runs."""
    return tuple(tuple(sorted(each.keys.items())) for each in (case, against))


def _partners(cases: Sequence[CaseOutcome], case: CaseOutcome, arm: str) -> list[CaseOutcome]:
    same_data = [each for each in cases if (each.dataset, each.arm) == (case.dataset, arm)]
    pool = [each for each in same_data if each.model == case.model] or same_data
    best: dict[str, CaseOutcome] = {}
    for each in pool:
        if each is case or not each.variant.items() <= case.variant.items():
            continue
        if each.model not in best or len(each.variant) > len(best[each.model].variant):
            best[each.model] = each
    return list(best.values())


def _compare(
    case: CaseOutcome, against: CaseOutcome, measured: Mapping[str, Measured], n_tests: int
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
            dict.fromkeys(TESTED, empty),
            dict.fromkeys(TESTED, Relative(np.nan, np.nan)),
            n_tests,
        )
    over_seeds = {
        metric: statistics.paired_difference(
            case.values(metric, seeds), against.values(metric, seeds), case.overlap
        )
        for metric in METRICS
    }
    of_a, of_b = (
        [each for each, is_same in zip(side, same, strict=True) if is_same] for side in sides
    )
    n_users = len(np.unique(np.concatenate([each.users for each in of_a])))
    over_users, relative = {}, {}
    for metric in TESTED:
        replicates = [
            np.mean([each.replicates[metric] for each in side], axis=0) for side in (of_a, of_b)
        ]
        means = [float(side.values(metric, seeds).mean()) for side in (case, against)]
        over_users[metric] = statistics.bootstrap_difference(
            means[0] - means[1], replicates[0] - replicates[1], n_users
        )
        relative[metric] = statistics.relative(*means)
    return Comparison(
        case,
        against,
        tuple(seeds),
        others,
        over_seeds,
        over_users,
        relative,
        n_tests,
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
            if not case.runs or (value is None and key not in case.variant):
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

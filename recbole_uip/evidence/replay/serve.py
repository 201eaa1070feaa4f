"""The test period of a finished run, replayed in the order of time as it would be served.

A feature bank begins as it was when the test period began, with every event before it. At each
row the bank is looked up first, and the row's event enters it afterwards; events of one time are
all looked up before any of them enters, for a row's profile may hold strictly earlier events
alone. With ``uip_refresh`` an event enters once so much time has passed. What was looked up must
be, token by token, what the run trained and tested with, and the scores must have the run's AUC;
a replay that fails this says so and gives no figures.

Users are hashed into two arms (:func:`~recbole_uip.evidence.replay.ab.in_arm_b`), and both models
score all rows, so that the same replay is an A/A run, the A/B run, and their difference.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.export_atomic import read_layout
from recbole_uip.bank.users import NO_TIME, user_table
from recbole_uip.behaviours import in_seconds
from recbole_uip.bridge.serving import Scorer
from recbole_uip.em.states import Events, iter_states, whole_history
from recbole_uip.evidence.figures import machine
from recbole_uip.evidence.replay.ab import SALT, Comparison, compare, in_arm_b, periods, redrawn
from recbole_uip.evidence.statistics import N_BOOT, auc, logloss
from recbole_uip.evidence.summary import read_results_file
from recbole_uip.records import finite, peak_memory, versions
from recbole_uip.settings import SettingsError

__all__ = ["Stream", "read_stream", "replay", "starting_bank"]

logger = logging.getLogger(__name__)

# How far a replayed metric of all test rows may lie from the run's, and a score of one request
# from the same row's in a block of rows.
METRIC_TOLERANCE, SCORE_TOLERANCE = 1e-4, 1e-5
# Rows at which a request is timed as well, and its candidate items.
REQUESTS, CANDIDATES = 2000, 100
CLOCK_READINGS = 10_000


@dataclass(frozen=True)
class Stream:
    """Rows of a finished run, as its ``profiles.parquet`` has them.

    Attributes
    ----------
    folder : Path
        The run's output folder.
    results : dict
        Its ``results.json``.
    users : list of str
        Token of each user number.
    user : ndarray of int64, shape (n_rows,)
    items : list of str, length n_rows
        Item token of each row.
    time, liked : ndarray of float64, shape (n_rows,)
    test : ndarray of bool, shape (n_rows,)
    time_field : str
    fields : tuple of str
        Profile fields.
    tokens : ndarray of int32, shape (n_rows, n_fields)
        Point-in-time tokens.
    """

    folder: Path
    results: dict[str, Any]
    users: list[str]
    user: np.ndarray
    items: list[str]
    time: np.ndarray
    liked: np.ndarray
    test: np.ndarray
    time_field: str
    fields: tuple[str, ...]
    tokens: np.ndarray

    @property
    def refresh(self) -> float:
        """Seconds that the bank lags behind."""
        return self.results["protocol"]["refresh_seconds"]

    @property
    def start(self) -> float:
        """Time of the first test row."""
        return float(self.time[self.test].min())

    def in_time_order(self, mask: np.ndarray) -> np.ndarray:
        """Rows in ``mask`` in the order of time, equal ones as in the input."""
        rows = np.flatnonzero(mask)
        return rows[np.argsort(self.time[rows], kind="stable")]


def replay(
    run_dir: str | os.PathLike,
    model: str = "DeepFM",
    a: str = "plain",
    b: str = "uip",
    *,
    limit: int | None = None,
    salt: str = SALT,
    n_boot: int = N_BOOT,
    command: str | None = None,
) -> dict[str, Any]:
    """Replay the test period of a finished run as an A/B test of two of its arms.

    Parameters
    ----------
    run_dir : path-like
        Output folder of ``recbole-uip run``.
    model, a, b : str
        A model of the run, and the arms of the run that score arm A's and arm B's users.
    limit : int, optional
        Replay the first so many test rows alone.
    salt : str
        Of the hash that puts users into arms.
    n_boot : int
        Resamples of users.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        Plain values; :func:`~recbole_uip.evidence.replay.report.format_replay` shows them.

    Raises
    ------
    SettingsError
        If the run cannot be replayed, or the replay does not give the run's tokens and metrics.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit} must be at least 1")
    started, here = time.perf_counter(), machine()
    stream = read_stream(run_dir)
    arm_b = in_arm_b(stream.users, salt)[stream.user]
    rows = stream.in_time_order(stream.test)[:limit]
    _check_arms(stream.liked[rows], arm_b[rows], salt)
    with (
        tempfile.TemporaryDirectory(prefix="recbole-uip-replay-") as folder,
        starting_bank(folder, stream) as bank,
    ):
        scorers = _scorers(stream, model, a, b, bank)
        bank_bytes = _size(Path(folder))
        played = _play(bank, stream, rows, arm_b, scorers)
        differing = _check_tokens(stream, rows, played.tokens)
        # A replay that ends early has not met the last events.
        last = _compare_banks(stream, bank) if limit is None else None
        bytes_per_user = bank.bytes_per_user()
    scores, block_seconds = _score(stream, rows, played.tokens, scorers)
    checks = {
        "rows": len(rows),
        "rows_differing": differing,
        "users_differing_at_the_end": last,
        "run": _check_metrics(stream, model, (a, b), scores),
        "requests": len(played.requests),
        "largest_score_difference": _check_requests(played, arm_b, scores),
    }
    replayed = [each[rows] for each in (stream.user, stream.liked, arm_b, *scores)]
    user, liked, in_b, baseline, _ = replayed
    days = periods(stream.time[rows], user, liked, in_b)
    logger.info("resampling users, %d times, of all rows and of %d periods", n_boot, len(days))
    overall = compare(*replayed, n_boot=n_boot)
    return finite(
        {
            "dataset": stream.results["dataset"],
            "model": model,
            "arms": {"a": a, "b": b},
            "salt": salt,
            "n_boot": n_boot,
            "limit": limit,
            "candidates": CANDIDATES,
            "test_rows": int(stream.test.sum()),
            "refresh_seconds": stream.refresh,
            "checks": checks,
            "overall": _described(stream, rows, overall),
            "redrawn": redrawn(user, liked, baseline, overall.a_a["auc"].mean),
            "periods": [
                _described(
                    stream, rows[day], compare(*(each[day] for each in replayed), n_boot=n_boot)
                )
                for day in days
            ],
            "latency": played.latency(),
            "cost": {
                "updates": len(played.seconds["update"]),
                "updates_per_second": _rate(played.seconds["update"]),
                "rows_per_second_in_blocks": dict(zip("ab", block_seconds, strict=True)),
                "users": len(stream.users),
                "bank_bytes": bank_bytes,
                "bytes_per_user": sum(bytes_per_user.values()),
                "peak_memory_bytes": peak_memory(),
                "clock_seconds": _clock_seconds(),
                "replay_seconds": played.wall,
                "total_seconds": time.perf_counter() - started,
            },
            "machine": here,
            "versions": versions(),
            "run": stream.results["command"],
            "command": command or f"replay({str(run_dir)!r})",
        }
    )


# --- what is replayed ---------------------------------------------------------------------------


def read_stream(run_dir: str | os.PathLike) -> Stream:
    """Rows of a finished run whose test period can be replayed.

    Raises
    ------
    SettingsError
        If the run has no timestamps, labels or test rows, its profiles are static or blind to
        held-out events, or other rows lie in its test period.
    """
    folder = Path(run_dir)
    results = read_results_file(folder / "results.json")
    protocol = results["protocol"]
    layout = read_layout(folder / "profiles.parquet")
    if layout.time is None:
        raise SettingsError(
            f"{folder} has no timestamps, so there is no order in which its test rows could be "
            "replayed: run on data with a time field"
        )
    if protocol["time"] != "point_in_time":
        raise SettingsError(
            f"{folder} has uip_time={protocol['time']}, one profile a user for all rows, which no "
            "event changes: run with uip_time=point_in_time"
        )
    if layout.label is None or protocol["mode"]["test"] != "labeled":
        raise SettingsError(
            f"{folder} has labels only of sampled candidates (eval_args.mode.test="
            f"{protocol['mode']['test']}), which are not in its profiles.parquet: run with labels "
            "and mode labeled"
        )
    if not layout.fields:
        raise SettingsError(f"{folder} has no profile fields: run with uip_facets")
    table = pq.read_table(folder / "profiles.parquet")
    test = table["split"].cast(pa.string()).to_numpy(zero_copy_only=False) == "test"
    when = table[layout.time].to_numpy().astype(np.float64)
    if not in_seconds(when):
        raise SettingsError(
            f"{folder} has timestamps of about {np.median(when):.3g}, which are no seconds since "
            "1970, and a replay goes by days: give the data's times in seconds, and run again"
        )
    _check_period(folder, when, test)
    if protocol["history"] != "observed":
        raise SettingsError(
            f"{folder} has uip_history={protocol['history']}, so its test rows know nothing of "
            "held-out events, and a live bank would: run with uip_history=observed"
        )
    users = table[layout.user].combine_chunks().dictionary_encode()
    return Stream(
        folder,
        results,
        users.dictionary.to_pylist(),
        users.indices.to_numpy().astype(np.int64),
        table[layout.item].to_pylist(),
        when,
        table[layout.label].to_numpy().astype(np.float64),
        test,
        layout.time,
        layout.fields,
        np.stack([table[name].to_numpy().astype(np.int32) for name in layout.fields], axis=1),
    )


def _check_period(folder: Path, when: np.ndarray, test: np.ndarray) -> None:
    if not test.any():
        raise SettingsError(f"{folder} has no test rows: run with a test split")
    later = int((when[~test] > when[test].min()).sum())
    if later:
        raise SettingsError(
            f"{folder} has {later:,} training and validation rows that are later than its first "
            "test row, so its models know the future of what would be replayed: run with a split "
            "by time (eval_args.order=TO and group_by=none, or such benchmark files)"
        )


def starting_bank(folder: str | os.PathLike, stream: Stream) -> FeatureBank:
    """Write the bank as it was when the test period began, and open it for writing.

    Its parameters are those of the run's own bank; nothing is fitted. States hold the events
    before the first test row's time, less the bank's refresh interval. Users who came later are
    there without events.
    """
    with FeatureBank.open(stream.folder / "bank") as whole:
        model = whole.model
    folds = model.folds_of(stream.users)
    if set(stream.fields) != {*model.profile_names, *model.match_names}:
        raise SettingsError(
            f"{stream.folder / 'bank'} has other fields than profiles.parquet: it is of another "
            "run; run again"
        )
    n_users = len(stream.users)
    known = stream.time < stream.start - stream.refresh
    history = whole_history(stream.user, stream.time, known, n_users)
    events = Events(model.numbers(stream.items), folds[stream.user], stream.liked)
    states = np.empty((n_users, len(model.kernels.initial)), np.float32)
    for at, block in iter_states(model.kernels, history, events):
        states[at] = block
    last_time = np.full(n_users, NO_TIME)
    np.maximum.at(last_time, stream.user[known], stream.time[known])
    table = user_table(model, stream.users, folds, history.seen, last_time, states)
    return FeatureBank.create(folder, model, table.combine_chunks())


def _scorers(stream: Stream, model: str, a: str, b: str, bank: FeatureBank) -> tuple[Scorer, ...]:
    """Models of both arms, which read the live bank."""
    scorers = tuple(Scorer.load(stream.folder, model, arm, bank=bank) for arm in (a, b))
    for scorer in scorers:
        strange = [name for name in scorer.context_fields if name != stream.time_field]
        if strange:
            raise SettingsError(
                f"{scorer.name} reads {', '.join(strange)} of the interactions, which are not in "
                "profiles.parquet: run without them (numerical_features, load_col.inter)"
            )
    return scorers


def _check_arms(label: np.ndarray, arm_b: np.ndarray, salt: str) -> None:
    for name, rows in (("A", ~arm_b), ("B", arm_b)):
        if len(np.unique(label[rows])) < 2:
            raise SettingsError(
                f"arm {name} has {int(rows.sum())} rows and not both labels among them, so it has "
                f"no AUC: replay more rows, or another salt than {salt!r}"
            )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


# --- the replay ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Played:
    """What a replay has looked up, and how long its calls took.

    Attributes
    ----------
    tokens : ndarray of int32, shape (n_replayed, n_fields)
        In the order of the stream's fields.
    requests : list of (int, float)
        Rows that were scored on the spot, and their scores.
    seconds : dict of str to list of float
        Of every call, by what was called.
    wall : float
        Seconds of the whole loop.
    """

    tokens: np.ndarray
    requests: list[tuple[int, float]]
    seconds: dict[str, list[float]]
    wall: float

    def latency(self) -> dict[str, dict[str, float]]:
        """Calls, and the median and the 99th percentile of their seconds."""
        found = {}
        for name, seconds in self.seconds.items():
            p50, p99 = np.percentile(seconds, [50, 99]) if seconds else (np.nan, np.nan)
            found[name] = {"calls": len(seconds), "p50": float(p50), "p99": float(p99)}
        return found


def _play(
    bank: FeatureBank,
    stream: Stream,
    rows: np.ndarray,
    arm_b: np.ndarray,
    scorers: Sequence[Scorer],
) -> _Played:
    """Look up, then update, in the order of time; now and then, score as a server would."""
    clock = time.perf_counter
    seconds: dict[str, list[float]] = {
        name: []
        for name in ("look_up", "match", "update", "score_a", "score_b", "rank_a", "rank_b")
    }
    when, items, liked = stream.time.tolist(), stream.items, stream.liked.tolist()
    users = [stream.users[number] for number in stream.user.tolist()]
    # Of every split: rows that are no test rows may have the time of the first test row.
    events = stream.in_time_order(stream.time >= stream.start - stream.refresh).tolist()
    tokens = np.empty((len(rows), len(bank.fields) + len(bank.match_fields)), np.int32)
    profile, requests, entered = slice(0, len(bank.fields)), [], 0
    match = slice(len(bank.fields), tokens.shape[1])
    asked = {*np.linspace(0, len(rows) - 1, min(REQUESTS, len(rows))).astype(int).tolist()}
    rng, catalogue = np.random.default_rng(0), bank.model.items[1:]
    n_candidates = min(CANDIDATES, len(catalogue))

    def enter(before: float) -> None:
        nonlocal entered
        while entered < len(events) and when[events[entered]] < before:
            row = events[entered]
            started = clock()
            bank.update(users[row], items[row], liked[row], when[row])
            seconds["update"].append(clock() - started)
            entered += 1

    def request(row: int) -> None:
        scorer, arm = scorers[int(arm_b[row])], "ab"[int(arm_b[row])]
        candidates = [catalogue[k] for k in rng.integers(len(catalogue), size=n_candidates)]
        started = clock()
        score = scorer.score(users[row], [items[row]], when[row])
        scored = clock()
        scorer.score(users[row], candidates, when[row])
        seconds[f"rank_{arm}"].append(clock() - scored)
        seconds[f"score_{arm}"].append(scored - started)
        requests.append((row, float(score[0])))

    for scorer in scorers:  # the first call of a model prepares what later ones find
        scorer.score(users[rows[0]], [items[rows[0]]], when[rows[0]])
    begun = clock()
    for position, row in enumerate(
        tqdm(rows.tolist(), desc="replay", unit="row", leave=False, delay=2)
    ):
        enter(when[row] - stream.refresh)
        started = clock()
        codes = bank.look_up(users[row])
        looked_up = clock()
        lifts = bank.match(users[row], [items[row]])
        seconds["match"].append(clock() - looked_up)
        seconds["look_up"].append(looked_up - started)
        tokens[position, profile], tokens[position, match] = codes, lifts[0]
        if position in asked:
            request(row)
    if len(rows) == stream.test.sum():
        enter(np.inf)
    wall = clock() - begun
    place = {name: column for column, name in enumerate((*bank.fields, *bank.match_fields))}
    return _Played(tokens[:, [place[name] for name in stream.fields]], requests, seconds, wall)


def _score(
    stream: Stream, rows: np.ndarray, tokens: np.ndarray, scorers: Sequence[Scorer]
) -> tuple[list[np.ndarray], list[float]]:
    """Scores of all test rows by each model, from what was looked up; and rows a second.

    A score depends on a row's tokens and on nothing that changes, so it may be computed when the
    replay is over. Test rows that ``--limit`` has left out have their point-in-time tokens.

    Returns
    -------
    scores : list of ndarray of float64, shape (n_rows,)
        NaN for rows that are no test rows.
    rate : list of float
    """
    everything = stream.tokens.copy()
    everything[rows] = tokens
    test = np.flatnonzero(stream.test)
    users = [stream.users[number] for number in stream.user[test]]
    items = [stream.items[row] for row in test]
    profiles = dict(zip(stream.fields, everything[test].T, strict=True))
    scores, rates = [], []
    for scorer in scorers:
        started = time.perf_counter()
        interaction = scorer.interaction(
            users, items, stream.time[test].tolist(), profiles=profiles
        )
        score = np.full(len(stream.test), np.nan)
        score[test] = scorer.predict(interaction)
        rates.append(len(test) / (time.perf_counter() - started))
        scores.append(score)
    return scores, rates


def _rate(seconds: Sequence[float]) -> float:
    return len(seconds) / sum(seconds) if seconds else float("nan")


def _clock_seconds() -> float:
    """What a pair of readings of the clock takes by itself."""
    clock = time.perf_counter
    found = []
    for _ in range(CLOCK_READINGS):
        started = clock()
        found.append(clock() - started)
    return float(np.median(found))


# --- checks -------------------------------------------------------------------------------------


def _check_tokens(stream: Stream, rows: np.ndarray, tokens: np.ndarray) -> int:
    """In how many rows other tokens were looked up live than the run had there; raises above 0."""
    expected = stream.tokens[rows]
    wrong = (tokens != expected).any(axis=1)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        column = int(np.flatnonzero(tokens[place] != expected[place])[0])
        raise SettingsError(
            f"the live bank gives other tokens than profiles.parquet in {int(wrong.sum()):,} of "
            f"{len(rows):,} rows (first, {stream.fields[column]} of user "
            f"{stream.users[stream.user[rows[place]]]!r}: {tokens[place, column]}, not "
            f"{expected[place, column]}): the bank in {stream.folder} is not as the run left it, "
            "or this is a mistake of ours; run again"
        )
    return int(wrong.sum())


def _compare_banks(stream: Stream, bank: FeatureBank) -> int:
    """How many users the run's own bank knows otherwise in the end; raises above 0."""
    with FeatureBank.open(stream.folder / "bank", verify=False) as whole:
        live, expected = (each.table_of(stream.users) for each in (bank, whole))
    differ = np.zeros(len(stream.users), bool)
    for name in ("seen", "last_time", "state", "codes"):
        differ |= (_values(live, name) != _values(expected, name)).any(axis=1)
    if differ.any():
        user = stream.users[int(np.flatnonzero(differ)[0])]
        raise SettingsError(
            f"after the last event the live bank differs from {stream.folder / 'bank'} in "
            f"{int(differ.sum()):,} users (first, {user!r}): that bank has been updated since the "
            "run, or this is a mistake of ours; run again"
        )
    return int(differ.sum())


def _values(table: pa.Table, name: str) -> np.ndarray:
    """A column of a user segment, shape (n_users, width)."""
    column = table[name].combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.to_numpy().reshape(table.num_rows, -1)


def _check_metrics(
    stream: Stream, model: str, arms: Sequence[str], scores: Sequence[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Metrics of all test rows by each arm's model, beside those of the run."""
    found = {}
    for arm, score in zip(arms, scores, strict=True):
        told = stream.results["models"][model][arm]["test"]
        here = stream.liked[stream.test], score[stream.test]
        ours = {"auc": auc(*here), "logloss": logloss(*here)}
        for name, value in ours.items():
            # NaN is no agreement either.
            if not abs(value - told[name]) <= METRIC_TOLERANCE:
                raise SettingsError(
                    f"{model}-{arm} has {name} {value:.6f} in the replay and {told[name]:.6f} in "
                    f"{stream.folder / 'results.json'}: files of two runs lie in that folder, or "
                    "this is a mistake of ours; run again"
                )
        found[arm] = ours | {f"{name}_of_the_run": told[name] for name in ours}
    return found


def _check_requests(played: _Played, arm_b: np.ndarray, scores: Sequence[np.ndarray]) -> float:
    """Largest difference of a score on the spot from the same row's in a block of rows."""
    rows, live = (np.array(each) for each in zip(*played.requests, strict=True))
    rows = rows.astype(np.int64)
    largest = float(np.abs(live - np.where(arm_b[rows], scores[1][rows], scores[0][rows])).max())
    if largest > SCORE_TOLERANCE:
        raise SettingsError(
            f"a request was scored {largest:.2g} away from the same row's score in a block of "
            "rows: this is a mistake of ours, please report it"
        )
    return largest


def _described(stream: Stream, rows: np.ndarray, comparison: Comparison) -> dict[str, Any]:
    ends = (stream.time[row] for row in (rows[0], rows[-1]))
    days = [datetime.fromtimestamp(each, timezone.utc).date() for each in ends]
    return {
        "first_day": days[0].isoformat(),
        "last_day": days[1].isoformat(),
        **dataclasses.asdict(comparison),
    }

"""What a feature bank costs on this machine, each figure next to its floor.

The catalogue, its LM scores and the facets are those of a real dataset; users and events are
synthetic, as many as asked for. Floors are measured in the same run: a bare dict look-up, a numpy
gather of the same rows, a memory copy of the same bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.build import bank_of_events
from recbole_uip.bank.events import EventColumns, EventFile
from recbole_uip.evidence.bench_http import http_figures
from recbole_uip.evidence.figures import Figure, machine, timed
from recbole_uip.evidence.task import load_task, parse_config
from recbole_uip.records import peak_memory, versions
from recbole_uip.settings import SettingsError, UIPSettings

__all__ = ["bench_bank", "write_events"]

logger = logging.getLogger(__name__)

EVENTS_PER_USER = 25
ROW_GROUP = 1_000_000
CANDIDATES = 1000
LOOK_UPS = 1_000_000
UPDATES = 1_000_000
FEW_USERS = 40_000
# Calls between two readings of the clock, which itself takes as long as a look-up.
CALLS = 100
COLUMNS = EventColumns("user", "item", time="time", label="liked")

_NOTES = (
    "building: recbole-uip bank build from a Parquet file of random events in random order: "
    "surveying, fitting on a sample of users, sorting, every user's state, writing. Floor: the "
    "file's bytes read and the bank's bytes written at the bandwidth of a memory copy. A second "
    "file of a fifth of the users shows how cost grows.",
    "one look-up, update or match: the median of means of 100 calls. Users are drawn at random; "
    "those asked for again are among the few thousand that were found lately. Floors: a bare dict "
    "look-up of the same users; a copy of one state; a numpy gather of the candidates' item "
    "vectors.",
    "batches: medians of whole calls, users given as a list of str or as a pyarrow array. The "
    "bank's files are in the system's page cache. Floor of look-ups: a numpy gather of the same "
    "rows of codes. Updates: by item numbers, without times, all codes of the users made anew. "
    "Cold is the one batch in which states leave the base, later ones are warm. Ceiling: the "
    "states read and written once an event (cold: twice) at the bandwidth of a memory copy.",
)

_SERVED = (
    "over HTTP: recbole-uip bank serve in a process of its own, the load generator hey beside it "
    "on the same machine. Floor: the same server's answer to GET /health."
)
_NOT_SERVED = "over HTTP: not measured, for hey or the extra serve is not installed."


def bench_bank(
    dataset: str | None = None,
    config_files: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    command_line: Sequence[str] = (),
    events: int = 25_000_000,
    repeats: int = 5,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure building, look-up, match and update of a bank, each with its floor.

    Parameters
    ----------
    dataset : str, optional
        Whose catalogue and facets are taken; by default ``dataset`` of the settings, else ml-100k.
        Its item texts are scored by the LM unless their scores are cached.
    config_files : sequence of path, optional
    config : mapping, optional
        Any RecBole or ``uip_*`` settings; stronger than the files.
    command_line : sequence of str, optional
        ``--key=value`` arguments; stronger than ``config``.
    events : int
        Synthetic events, 25 a user on average.
    repeats : int
        Runs of the batch figures.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        As :func:`~recbole_uip.evidence.bench.bench_profiles`.
    """
    for key, value, least in (("events", events, 1000), ("repeats", repeats, 1)):
        if value < least:
            raise SettingsError(f"{key}={value} must be at least {least}")
    here = machine()
    name, parsed = parse_config(dataset, config_files, config, command_line)
    task = load_task(parsed)
    if task.behaviours.liked is None:
        raise SettingsError(f"dataset={name!r} has no labels: bench bank takes one that has")
    texts = task.texts or [None] * task.behaviours.n_items
    with tempfile.TemporaryDirectory(prefix="recbole-uip-bench-") as temporary:
        folder = Path(temporary)
        figures = [
            _building(folder / f"bank-{n}", n, texts, task.settings, here["copy_bandwidth"])
            for n in (events // 5, events)
        ]
        figures.append(Figure("memory", "  peak memory of the process", peak_memory(), "B"))
        with FeatureBank.open(folder / f"bank-{events}", write=True, verify=False) as bank:
            figures += _reading(bank, repeats)
            figures += _writing(bank, repeats, here["copy_bandwidth"])
            user = bank.users()[0]
        served = http_figures(folder / f"bank-{events}", user)
    return {
        "dataset": name,
        "events": events,
        "repeats": repeats,
        "machine": here,
        "figures": [each.to_dict() for each in figures + served],
        "notes": [*_NOTES, _SERVED if served else _NOT_SERVED],
        "versions": versions(),
        "command": command or f"bench_bank({name!r})",
    }


def write_events(path: Path, n_events: int, n_items: int, seed: int = 0) -> None:
    """Write random events in random order: user, item, liked, time.

    Users differ in activity (log-normal) and items in popularity (Zipf-like).

    Parameters
    ----------
    path : path
        A Parquet file.
    n_events, n_items : int
        Items are ``i1`` to ``i<n_items>``.
    seed : int
    """
    rng = np.random.default_rng(seed)
    n_users = max(1, n_events // EVENTS_PER_USER)
    activity = np.cumsum(rng.lognormal(size=n_users))
    popularity = np.cumsum(1.0 / (np.arange(n_items) + 10.0))
    users = pa.array([f"u{number}" for number in range(n_users)])
    items = pa.array([f"i{number}" for number in range(1, n_items + 1)])
    schema = pa.schema(
        [("user", pa.string()), ("item", pa.string()), ("liked", pa.int8()), ("time", pa.int64())]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for low in range(0, n_events, ROW_GROUP):
            n = min(ROW_GROUP, n_events - low)
            user = np.searchsorted(activity, rng.random(n) * activity[-1])
            item = np.searchsorted(popularity, rng.random(n) * popularity[-1])
            liked = (rng.random(n) < 0.6).astype(np.int8)
            time_of = rng.integers(1_500_000_000, 1_700_000_000, n)
            columns = [users.take(pa.array(user)), items.take(pa.array(item)), liked, time_of]
            writer.write_table(pa.table(columns, schema=schema))


def _building(
    folder: Path, n_events: int, texts: Sequence[str | None], settings: UIPSettings, copy: float
) -> Figure:
    path = folder.with_suffix(".parquet")
    logger.info("writing %d random events", n_events)
    n_items = len(texts) - 1
    write_events(path, n_events, n_items)

    def texts_of(number_of: Mapping[str, int], size: int) -> list[str | None]:
        found: list[str | None] = [None] * size
        for number in range(1, n_items + 1):
            if (place := number_of.get(f"i{number}")) is not None:
                found[place] = texts[number]
        return found

    has_texts = any(texts)
    logger.info("building a bank")
    started = time.perf_counter()
    with EventFile(path, COLUMNS, memory="1.5GB") as events:
        settings = dataclasses.replace(settings, refresh=0.0)
        bank_of_events(folder, events, settings, texts_of if has_texts else None).close()
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Figure(
        "building",
        f"building from {n_events:,} events ({n_events / seconds:,.0f} a second)",
        seconds,
        "s",
        (path.stat().st_size + size) / copy,
        {"events": n_events, "bank_bytes": size, "file_bytes": path.stat().st_size},
    )


def _median_call(function: Callable[[Any], Any], arguments: Sequence[Any]) -> float:
    """Median seconds of a call, with the loop around it."""
    seconds = []
    for low in range(0, len(arguments) - CALLS + 1, CALLS):
        block = arguments[low : low + CALLS]
        started = time.perf_counter()
        for argument in block:
            function(argument)
        seconds.append((time.perf_counter() - started) / len(block))
    return statistics.median(seconds)


def _reading(bank: FeatureBank, repeats: int) -> list[Figure]:
    rng = np.random.default_rng(0)
    tokens = bank.users()
    some = [tokens[row] for row in rng.integers(0, len(tokens), 20_000)]
    plain = {user: None for user in tokens}
    first, again = _median_call(bank.look_up, some), _median_call(bank.look_up, some)
    floor = _median_call(plain.get, some)
    figures = [
        Figure("look_up", f"look-up of one of {len(tokens):,} users", first, "s", floor),
        Figure("look_up", "  of users that are asked for again", again, "s", floor),
    ]
    rows = rng.integers(0, len(tokens), LOOK_UPS)
    many = [tokens[row] for row in rows]
    codes = bank.look_up_many(tokens)
    floor = statistics.median(timed(lambda: codes[rows], repeats))
    for kind, users in (("list", many), ("pyarrow array", pa.array(many))):
        seconds = timed(lambda users=users: bank.look_up_many(users), repeats)
        name = f"look-up of {LOOK_UPS:,} users at once, a {kind}"
        figures.append(Figure("look_up_many", name, statistics.median(seconds), "s", floor))
    if bank.match_fields:
        numbers = rng.integers(1, len(bank.model.items), CANDIDATES)
        vectors = np.concatenate(
            [bank.model.encoder.vectors(facet)[0] for facet in set(bank.model.encoder.facets)],
            axis=1,
        )
        figures.append(
            Figure(
                "match",
                f"match of one user with {CANDIDATES:,} items",
                _median_call(lambda user: bank.match(user, numbers), some[:2000]),
                "s",
                statistics.median(timed(lambda: vectors[numbers], 200)),
            )
        )
    size = bank.bytes_per_user()
    figures.append(
        Figure("bytes", "bytes a user, without the token", sum(size.values()), "B", None, size)
    )
    figures += [Figure("bytes", f"  {name}", number, "B") for name, number in size.items()]
    return figures


def _writing(bank: FeatureBank, repeats: int, copy: float) -> list[Figure]:
    rng = np.random.default_rng(1)
    tokens, items = bank.users(), bank.model.items
    # The second time, as every later time, the users' states are in memory to be written to.
    busy = [tokens[row] for row in rng.integers(0, len(tokens), 5000)]
    some = [busy[row] for row in rng.integers(0, len(busy), 20_000)]
    item = items[1]
    bank.update_many(busy, [item] * len(busy), np.ones(len(busy)))
    state = bank.state_of(some[0])[0]
    target = np.empty_like(state)
    single = Figure(
        "update",
        "update by one event, codes included",
        _median_call(lambda user: bank.update(user, item, 1), some),
        "s",
        _median_call(lambda _: np.copyto(target, state), some),
    )
    numbers, liked = rng.integers(1, len(items), UPDATES), rng.integers(0, 2, UPDATES)
    ceiling = copy / (2 * state.nbytes)

    def batch(name: str, seconds: float, ceiling: float = ceiling) -> Figure:
        rate = UPDATES / seconds
        return Figure("update_many", name, rate, "events/s", ceiling, {"seconds": seconds})

    figures, written = [single], set(busy)
    for n_users in (len(tokens), min(FEW_USERS, len(tokens))):
        users = [tokens[row] for row in rng.integers(0, n_users, UPDATES)]
        what = f"updates of {n_users:,} users, {UPDATES:,} at once"
        if not written.issuperset(users):
            (seconds,) = timed(lambda users=users: bank.update_many(users, numbers, liked), 1)
            figures.append(batch(f"{what}, a list, cold", seconds, ceiling / 2))
            written.update(users)
        for kind, given in (("list", users), ("pyarrow array", pa.array(users))):
            seconds = timed(lambda given=given: bank.update_many(given, numbers, liked), repeats)
            figures.append(batch(f"{what}, a {kind}, warm", statistics.median(seconds)))
    (seconds,) = timed(bank.commit, 1)
    n_bytes = len(written) * sum(bank.bytes_per_user().values())
    name = f"commit of {len(written):,} users"
    figures.append(Figure("commit", name, seconds, "s", 2 * n_bytes / copy))
    return figures

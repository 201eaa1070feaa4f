"""A replay of a tiny run looks up what the run had, and refuses what it cannot replay."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from recbole_uip import cli
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.users import user_table
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.evidence.replay.report import format_replay
from recbole_uip.evidence.replay.serve import read_stream, replay, starting_bank
from recbole_uip.settings import SettingsError

from ..bridge.conftest import BY_TIME, LENIENCY, Atomic, make_items, make_rows

N_BOOT = 50
PLAIN = {"plain": {"facets": [], "user_id": "keep"}}
SPLIT = {**BY_TIME, "split": {"RS": [0.5, 0.1, 0.4]}}


def train(folder, rows, model="FM", **more):
    """Run on ``rows``, and return the output folder."""
    atomic = Atomic(folder, rows=rows, items=make_items(), **more.pop("atomic", {})).write()
    external = dict(atomic.config(**{"eval_args": SPLIT, **more}).variable_config_dict)
    output = folder / "out"
    run_recbole_uip(model, atomic.name, config={**external, "uip_output": str(output)})
    return output


@pytest.fixture(scope="module")
def rows():
    """Interactions with ties, and late users who are in the test period alone."""
    rows = make_rows(np.random.default_rng(20))
    last = max(row[3] for row in rows)
    late = [[f"late{n % 6}", f"i{n % 15}", 1 + n % 5, last + n // 4] for n in range(40)]
    return rows + late


@pytest.fixture(scope="module")
def output(rows, tmp_path_factory):
    arms = {
        **PLAIN,
        "uip": {"facets": "all", "user_id": "drop"},
        "random": {"facets": "all", "user_id": "drop", "control": "random"},
    }
    return train(tmp_path_factory.mktemp("replay"), rows, uip_arms=arms)


@pytest.fixture(scope="module")
def results(output):
    return replay(output, "FM", n_boot=N_BOOT)


@pytest.fixture
def copied(output, tmp_path):
    """A copy of the run that a test may spoil."""
    return shutil.copytree(output, tmp_path / "run")


def test_tokens_and_scores_are_those_of_the_run(output, results):
    checks = results["checks"]
    assert checks["rows"] == results["test_rows"] == 176
    assert checks["rows_differing"] == checks["users_differing_at_the_end"] == 0
    told = json.loads((output / "results.json").read_text())["models"]["FM"]
    for arm in ("plain", "uip"):
        assert checks["run"][arm]["auc"] == pytest.approx(told[arm]["test"]["auc"], abs=1e-4)
    assert checks["requests"] == 176
    assert checks["largest_score_difference"] < 1e-5
    assert results["cost"]["updates"] >= 176
    assert sum(results["overall"]["rows"]) == 176
    calls = {name: each["calls"] for name, each in results["latency"].items()}
    assert calls["look_up"] == calls["match"] == 176
    assert calls["score_a"] + calls["score_b"] == calls["rank_a"] + calls["rank_b"] == 176
    assert all(0 < each["p50"] <= each["p99"] for each in results["latency"].values())


def test_the_check_has_something_to_check(output):
    """There are ties within a user, users without history, and tokens that move."""
    stream = read_stream(output)
    test = pd.DataFrame(
        {"user": stream.user[stream.test], "time": stream.time[stream.test]}
    ).assign(token=stream.tokens[stream.test][:, 0])
    assert test.duplicated(["user", "time"]).any()
    assert test.groupby("user")["token"].nunique().max() > 2
    assert set(stream.user[stream.test]) - set(stream.user[~stream.test])


def test_the_bank_begins_with_the_events_before_the_test_period(output, tmp_path):
    stream = read_stream(output)
    table = pd.read_parquet(output / "profiles.parquet")
    before = table[table["timestamp"] < table["timestamp"][table["split"] == "test"].min()]
    with FeatureBank.open(output / "bank") as whole:
        model, folds = whole.model, [whole.state_of(user)[2] for user in stream.users]
    n, initial = len(stream.users), model.kernels.initial
    empty = user_table(
        model, stream.users, folds, np.zeros(n, int), np.full(n, -np.inf), np.tile(initial, (n, 1))
    )
    with (
        starting_bank(tmp_path / "start", stream) as bank,
        FeatureBank.create(tmp_path / "empty", model, empty) as one_by_one,
    ):
        for event in before.sort_values("timestamp", kind="stable").itertuples():
            one_by_one.update(event.user_id, event.item_id, float(event.label), event.timestamp)
        assert bank.table_of(stream.users).equals(one_by_one.table_of(stream.users))
        seen = before["user_id"].value_counts()
        assert [bank.state_of(user)[1] for user in stream.users] == [
            seen.get(user, 0) for user in stream.users
        ]


def test_a_lagging_bank_is_replayed_with_its_lag(rows, tmp_path):
    output = train(tmp_path, rows, uip_refresh="30s")
    found = replay(output, "FM", n_boot=2)
    assert found["refresh_seconds"] == 30
    assert found["checks"]["rows_differing"] == 0
    # Not by chance: without the lag, tokens differ.
    results = json.loads((output / "results.json").read_text())
    results["protocol"]["refresh_seconds"] = 0
    (output / "results.json").write_text(json.dumps(results))
    with pytest.raises(SettingsError, match=r"other tokens than profiles.parquet in \d+ of 176"):
        replay(output, "FM", n_boot=2)


def test_ties_would_show(output, tmp_path):
    """Where rows of one time see each other's events, the check fails."""
    shutil.copytree(output, tmp_path / "run")
    path = tmp_path / "run" / "profiles.parquet"
    table = pq.read_table(path)
    # The same rows in the same order, but no two of them at one time.
    when = table["timestamp"].to_numpy() + np.arange(len(table)) * 1e-4
    column = table.column_names.index("timestamp")
    pq.write_table(table.set_column(column, "timestamp", [when]), path)
    with pytest.raises(SettingsError, match="other tokens"):
        replay(tmp_path / "run", "FM", n_boot=2)


def test_a_first_part_is_replayed_alone(output):
    found = replay(output, "FM", limit=80, n_boot=2)
    assert found["checks"]["rows"] == sum(found["overall"]["rows"]) == 80
    assert found["checks"]["users_differing_at_the_end"] is None
    assert "80 test rows (the first, of 176)" in format_replay(found)
    with pytest.raises(SettingsError, match="limit=0"):
        replay(output, "FM", limit=0)
    with pytest.raises(SettingsError, match="not both labels"):
        replay(output, "FM", limit=1)


def test_one_token_or_metric_that_differs_is_an_error(copied):
    path = copied / "profiles.parquet"
    table = pd.read_parquet(path)
    row = int(np.flatnonzero(table["split"] == "test")[-1])
    spoilt = table.copy()
    spoilt.loc[row, "uip_leniency_5"] += 1
    spoilt.to_parquet(path)
    with pytest.raises(SettingsError, match="in 1 of 176 rows .first, uip_leniency_5 of user"):
        replay(copied, "FM", n_boot=2)
    table.to_parquet(path)
    results = json.loads((copied / "results.json").read_text())
    results["models"]["FM"]["uip"]["test"]["auc"] += 0.001
    (copied / "results.json").write_text(json.dumps(results))
    with pytest.raises(SettingsError, match="FM-uip has auc"):
        replay(copied, "FM", n_boot=2)


def test_a_bank_that_has_gone_on_is_an_error(copied):
    with FeatureBank.open(copied / "bank", write=True) as bank:
        bank.update("u1", "i1", 1, 2e9)
        bank.commit()
    with pytest.raises(SettingsError, match=r"in 1 users .first, 'u1'"):
        replay(copied, "FM", n_boot=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uip_time": "static"}, "uip_time=static"),
        ({"eval_args": {**SPLIT, "order": "RO"}}, "later than its first test row"),
        ({"uip_history": "train"}, "uip_history=train"),
        ({"uip_facets": {}, "uip_arms": PLAIN}, "no profile fields"),
        (
            {
                "atomic": {"columns": ("user_id:token", "item_id:token", "rating:float")},
                "eval_args": {**SPLIT, "order": "RO"},
            },
            "no timestamps",
        ),
    ],
)
def test_runs_that_cannot_be_replayed(rows, tmp_path, settings, words):
    given = {"uip_facets": {"leniency": LENIENCY}, "uip_arms": PLAIN, **settings}
    output = train(tmp_path, rows, "LR", **given)
    with pytest.raises(SettingsError, match=words):
        replay(output, "LR")


def test_folders_and_arms_that_are_not_there(output, copied, tmp_path):
    with pytest.raises(SettingsError, match="name the output folder"):
        replay(tmp_path, "FM")
    with pytest.raises(SettingsError, match="give one of FM-plain, FM-uip"):
        replay(output, "FM", b="random")
    with pytest.raises(SettingsError, match="give one of FM-plain, FM-uip"):
        replay(output, "DeepFM")
    shutil.rmtree(copied / "serving")
    with pytest.raises(SettingsError, match="run recbole-uip run first"):
        replay(copied, "FM")


def test_command_line(output, tmp_path, capsys):
    line = ["replay", str(output), "--model=FM", f"--json={tmp_path / 'replay.json'}"]
    assert cli.main([*line, "--salt=another"]) == 0
    written = json.loads((tmp_path / "replay.json").read_text())
    out = capsys.readouterr().out.rstrip("\n")
    assert out == format_replay(written)
    assert written["salt"] == "another"
    assert written["command"].startswith("recbole-uip replay")
    for words in (
        "0 of 176",
        "A/A: both arms scored by plain",
        "p99",
        "A/B less A/A",
        written["run"],
    ):
        assert words in out
    assert cli.main([*line, "--epochs=3"]) == 2
    assert "'--epochs=3' is not understood" in capsys.readouterr().err


def test_an_a_a_difference_is_said_plainly(results):
    spoilt = json.loads(json.dumps(results))
    spoilt["overall"]["a_a"]["auc"] = {"mean": 0.1, "low": 0.05, "high": 0.2, "p": 0.0, "n": 40}
    assert "AUC DIFFERS, +0.1000 [+0.0500, +0.2000]" in format_replay(spoilt)
    spoilt["overall"]["a_a"]["auc"]["low"] = -0.05
    assert "AUC: no difference" in format_replay(spoilt)


@pytest.mark.parametrize("load", [0.5, 3.0])
def test_times_of_a_busy_machine_are_marked(results, load):
    spoilt = json.loads(json.dumps(results))
    spoilt["machine"] |= {"cores": 2, "load_average": [load, load, load]}
    assert ("THE MACHINE WAS BUSY" in format_replay(spoilt)) == (load > 2)

"""Feast itself on our Parquet: its answers are the codes that rows were trained on.

Feast pins other versions than ours, so it gets an environment of its own, of 600 MB. That takes
one to four minutes and a network, so these tests are asked for: RECBOLE_UIP_FEAST=1 has pip make
the environment, RECBOLE_UIP_FEAST=<path> names a Python that has Feast.
"""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from recbole_uip.bank.export import feature_store_parquet, timestamps

from .test_export import Run

pytestmark = pytest.mark.feast

FEAST = "feast==0.67.0"
SECONDS = 600

REPOSITORY = """
import sys
from datetime import datetime, timedelta, timezone
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Int32

folder, *fields = sys.argv[1:]
source = FileSource(path=f"{folder}/features.parquet", timestamp_field="event_timestamp")
user = Entity(name="user_id", value_type=ValueType.STRING)
view = FeatureView(
    name="uip",
    entities=[user],
    source=source,
    ttl=timedelta(0),
    schema=[Field(name=name, dtype=Int32) for name in fields],
)
store = FeatureStore(config=RepoConfig(
    project="uip", provider="local", registry=f"{folder}/registry.db",
    online_store={"type": "sqlite", "path": f"{folder}/online.db"},
    offline_store={"type": "file"}, entity_key_serialization_version=3,
))
store.apply([user, view])
features = [f"uip:{name}" for name in fields]
rows = pd.read_parquet(f"{folder}/rows.parquet")
store.get_historical_features(entity_df=rows, features=features).to_df().to_parquet(
    f"{folder}/historical.parquet")
store.materialize(datetime(1969, 1, 1, tzinfo=timezone.utc), datetime.now(timezone.utc))
users = pd.read_parquet(f"{folder}/users.parquet")
online = store.get_online_features(
    features=features, entity_rows=[{"user_id": token} for token in users["user_id"]])
online.to_df().to_parquet(f"{folder}/online.parquet")
"""


@pytest.fixture(scope="module")
def feast(tmp_path_factory):
    """A Python that has Feast."""
    given = os.environ.get("RECBOLE_UIP_FEAST", "0")
    if given in ("", "0"):
        pytest.skip("set RECBOLE_UIP_FEAST=1 to install Feast and run it")
    if given != "1":
        return given
    folder = tmp_path_factory.mktemp("feast") / "env"
    python = folder / "bin" / "python"
    try:
        for arguments in (
            [sys.executable, "-m", "venv", folder],
            [python, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "10", FEAST],
        ):
            subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{FEAST} is not installed after {SECONDS} s")
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:]
        pytest.fail(f"{FEAST} cannot be installed here: {reason}")
    return str(python)


@pytest.mark.parametrize(("history", "refresh"), [("observed", "0s"), ("train", "3s")])
def test_feast_gives_the_codes_of_the_rows(feast, tmp_path, history, refresh):
    run = Run(tmp_path / "run", uip_history=history, uip_refresh=refresh)
    behaviours = run.behaviours
    with run.bank() as bank:
        feature_store_parquet(run.path, bank, tmp_path / "features.parquet")
        rng = np.random.default_rng(0)
        sample = rng.choice(len(behaviours), 800, replace=False)
        rows = pd.DataFrame(
            {
                "user_id": [run.users[user] for user in behaviours.user[sample]],
                "event_timestamp": timestamps(behaviours.time[sample]),
            }
        )
        rows["event_timestamp"] = rows["event_timestamp"].dt.tz_localize("UTC")
        rows.to_parquet(tmp_path / "rows.parquet")
        users = [*bank.users(), "nobody"]
        pd.DataFrame({"user_id": users}).to_parquet(tmp_path / "users.parquet")
        (tmp_path / "repository.py").write_text(REPOSITORY)
        environment = {**os.environ, "FEAST_USAGE": "False", "PYTHONPATH": ""}
        finished = subprocess.run(
            [feast, "repository.py", str(tmp_path), *bank.fields],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]

        # Feast answers entity rows that are alike once: it is joined back to the rows.
        key = ["user_id", "event_timestamp"]
        historical = pd.read_parquet(tmp_path / "historical.parquet")
        assert len(historical) == len(rows.drop_duplicates(key)) < len(rows)
        joined = rows.merge(historical, on=key, how="left", validate="many_to_one")
        fields = {field.name: field.values for field in run.profiles.fields}
        for name in bank.fields:
            np.testing.assert_array_equal(joined[name], fields[name][sample])
        # Ties are frequent: a store that let a row see events of its own time would fail.
        tied = (
            pd.Series(behaviours.time)
            .groupby(behaviours.user)
            .transform(lambda times: times.duplicated(keep=False))
        )
        assert tied[sample].mean() > 0.2

        online = pd.read_parquet(tmp_path / "online.parquet").set_index("user_id")
        served = online.loc[users[:-1], list(bank.fields)].to_numpy(dtype=int)
        np.testing.assert_array_equal(served, bank.look_up_many(users[:-1]))
        assert online.loc["nobody", list(bank.fields)].isna().all()

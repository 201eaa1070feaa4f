"""Banks from Spark, against those of the same files without it."""

import datetime
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recbole_uip.bank import build
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.build import bank_of_events
from recbole_uip.bank.events import EventColumns, EventFile
from recbole_uip.bank.spark import bank_of_spark
from recbole_uip.settings import SettingsError, UIPSettings

from ..test_profiles import FACETS

pytestmark = pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas")

pyspark = pytest.importorskip(
    "pyspark",
    reason="Spark is not installed (about 400 MB): pip install -c constraints.txt pyspark",
)
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip(
        "Spark needs Java, and there is none: apt-get install default-jre", allow_module_level=True
    )

COLUMNS = {
    "user": "user_id",
    "item": "item.id",
    "time": "timestamp",
    "rating": "rating",
    "threshold": 4,
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder, environment = tmp_path_factory.mktemp("spark"), pytest.MonkeyPatch()
    # Its Python processes find this package as the tests do, installed or not.
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    environment.setenv("PYSPARK_PYTHON", sys.executable)
    environment.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    builder = pyspark.sql.SparkSession.builder.master("local[2]").config(
        map={
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.local.dir": str(folder),
            "spark.sql.warehouse.dir": str(folder / "warehouse"),
            "spark.sql.shuffle.partitions": "2",
            # As it is, all of this small world would be one partition,
            "spark.sql.adaptive.coalescePartitions.enabled": "false",
            # and no user would have more events than a batch.
            "spark.sql.execution.arrow.maxRecordsPerBatch": "30",
            "spark.sql.session.timeZone": "America/New_York",
        }
    )
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()
    environment.undo()


@pytest.fixture(scope="module")
def table(world, users, items):
    behaviours = world.behaviours
    return pd.DataFrame(
        {
            "user_id": [f"{users[user]} é" for user in behaviours.user],
            "item.id": [items[item] for item in behaviours.item],
            "rating": np.where(behaviours.liked == 1, 5, 2),
            "timestamp": behaviours.time,
            "place": np.arange(len(behaviours)),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, table):
    """Two files, the larger one, which Spark reads first, being the first."""
    folder = tmp_path_factory.mktemp("events")
    cut = len(table) * 2 // 3
    table[:cut].to_parquet(folder / "a.parquet")
    table[cut:].to_parquet(folder / "b.parquet")
    return folder


def expected_bank(folder, events, columns, settings):
    with EventFile(events, EventColumns(**columns), memory="500MB") as file:
        return bank_of_events(folder, file, settings)


def rows_of(bank):
    return bank.table_of(bank.users()).combine_chunks()


def assert_same(bank, expected):
    assert bank.model.metadata() == expected.model.metadata()
    assert bank.model.items == expected.model.items
    tables, wanted = bank.model.all_tables(), expected.model.all_tables()
    assert tables.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(tables[name], array, err_msg=name)
    assert rows_of(bank).equals(rows_of(expected))


def test_a_bank_is_that_of_the_files(session, tmp_path, folder, bank_settings, monkeypatch):
    # Of 300 users with 40 events each, 100 are drawn, of whom 75 have no more than 3000.
    monkeypatch.setattr(build, "FIT_USERS", 100)
    monkeypatch.setattr(build, "FIT_EVENTS", 3000)
    events = session.read.parquet(str(folder))
    with (
        expected_bank(tmp_path / "expected", folder, COLUMNS, bank_settings) as expected,
        bank_of_spark(tmp_path / "bank", events, COLUMNS, bank_settings) as bank,
    ):
        assert bank.writable and len(bank) == 300
        assert_same(bank, expected)
        # What is on the disk, as another process would read it.
        with FeatureBank.open(bank.folder) as read:
            assert_same(read, expected)
    assert not session.sparkContext._jsc.getPersistentRDDs()


def test_a_given_model_and_a_given_order(session, tmp_path, folder, table, bank_settings):
    with expected_bank(tmp_path / "expected", folder, COLUMNS, bank_settings) as expected:
        # Rows come in another order than their places, and with an item that nobody knew.
        last = table[-1:].assign(**{"item.id": "new", "timestamp": 99.0, "place": len(table)})
        pd.concat([table, last])[::-1].to_parquet(tmp_path / "reversed.parquet")
        events = session.read.parquet(str(tmp_path / "reversed.parquet")).repartition(5)
        with bank_of_spark(
            tmp_path / "bank", events, COLUMNS, bank_settings, order="place", model=expected.model
        ) as bank:
            user = last["user_id"].item()
            expected.update(user, "new", last["rating"].item() >= 4, 99.0)
            assert_same(bank, expected)


def test_implicit_feedback_without_time(session, tmp_path, folder, bank_settings):
    columns = {"user": "user_id", "item": "item.id"}
    facets = {"likes": FACETS["likes"], "all": {**FACETS["likes"], "half_life": [5]}}
    settings = UIPSettings.from_dict({"uip_facets": facets, "uip_cache": str(tmp_path)})
    events = session.read.parquet(str(folder))
    with expected_bank(tmp_path / "expected", folder, columns, settings) as expected:
        with bank_of_spark(tmp_path / "bank", events, columns, settings, order="place") as bank:
            assert bank.model.implicit
            assert_same(bank, expected)
        with pytest.raises(SettingsError, match="model was fitted on events without labels"):
            bank_of_spark(tmp_path / "other", events, COLUMNS, settings, model=expected.model)
    with pytest.raises(SettingsError, match="columns.time=None needs order"):
        bank_of_spark(tmp_path / "other", events, columns, settings)


SECONDS = [1_700_000_000.25, -1.5, 1_710_054_000.0, 1_710_057_600.0]  # about a change of clocks
TIMES = {
    "date": pa.array([datetime.date(2024, 3, day) for day in (9, 10, 11, 1)]),
    "utc": pa.array(np.array(SECONDS) * 1e6).cast(pa.int64()).cast(pa.timestamp("us")),
    "zoned": pa.array(np.array(SECONDS) * 1e6).cast(pa.int64()).cast(pa.timestamp("us", "UTC")),
    "number": pa.array([3, 1, 2, 0], pa.int32()),
}


FLOATS = {"rating": "liked", "threshold": 3.6}, pa.array([3.6, 3.5, 3.7, -1.0], pa.float32())
BOOLEANS = {"label": "liked"}, pa.array([True, False, False, True])
TEXT = {"label": "liked"}, pa.array(["1", "0", "1.0", "0"])


@pytest.mark.parametrize(
    ("time", "feedback", "ratings"),
    [("date", *FLOATS), ("utc", *BOOLEANS), ("zoned", *TEXT), ("number", *FLOATS)],
    ids=TIMES,
)
def test_values_are_those_of_an_event_file(session, tmp_path, time, feedback, ratings):
    from recbole_uip.bank.spark import _as_they_are, _by_user, _fetched, _values

    path = tmp_path / "events.parquet"
    columns = {"user": pa.array([10, 9, 9, 9]), "item": pa.array(["007", "7", " ", "é"])}
    pq.write_table(pa.table({**columns, "liked": ratings, "time": TIMES[time]}), path)
    names = EventColumns("user", "item", "time", **feedback)
    with EventFile(path, names, memory="200MB") as file:
        (expected,) = file.blocks()
    values = _by_user(_values(session.read.parquet(str(path)), names, None))
    assert pa.concat_tables(_fetched(values, _as_they_are)).to_pylist() == expected.to_pylist()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "userid"}, r"no column 'userid' \(user\).*did you mean 'user_id'"),
        ({"item": "twice"}, r"several columns 'twice' \(item\)"),
        ({"item": "half"}, r"'half' \(item\) is of type double and must hold text"),
        ({"item": "void"}, r"'void' \(item\) is empty: every event needs its item"),
        ({"rating": "inf"}, r"'inf' \(rating\) is 'Infinity'"),
        ({"rating": None, "threshold": None, "label": "rating"}, r"\(label\) is '5'.*0 or 1"),
        ({"users": "user_id"}, "columns has the key 'users'"),
    ],
)
def test_what_cannot_be_used_is_named(session, tmp_path, bank_settings, columns, message):
    events = session.createDataFrame(
        [("a", "i", 5, 1.0, "t", "t", 0.5, "", float("inf"))],
        "user_id string, `item.id` string, rating int, timestamp double, twice string, "
        "twice string, half double, void string, inf double",
    )
    with pytest.raises(SettingsError, match=message):
        bank_of_spark(tmp_path / "bank", events, {**COLUMNS, **columns}, bank_settings)
    assert not (tmp_path / "bank").exists()


def test_no_events(session, tmp_path, bank_settings):
    events = session.createDataFrame(
        [], "user_id string, `item.id` string, rating int, timestamp double"
    )
    with pytest.raises(SettingsError, match="events is empty"):
        bank_of_spark(tmp_path / "bank", events, COLUMNS, bank_settings)


def test_no_spark_context(tmp_path, table, bank_settings):
    with pytest.raises(SettingsError, match="DataFrame.* has no SparkContext"):
        bank_of_spark(tmp_path / "bank", table, COLUMNS, bank_settings)

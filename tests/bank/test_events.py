"""Interactions files: what pandas would give in memory, read by streaming, and what is refused."""

import contextlib
import csv
import gc
import gzip
import hashlib
import re
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_uip.bank import events as module
from recbole_uip.bank.events import EventColumns, EventFile
from recbole_uip.settings import SettingsError

FORMATS = ["inter", "csv", "parquet"]
COLUMNS = EventColumns("user_id", "item_id", time="timestamp", rating="rating", threshold=4)
TYPES = {"user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float"}

# Text that a parser might take apart, strip, complete, or read as a number or as nothing.
TOKENS = ["007", "7", "7.0", "é", "漢", "😀", "￿", "a b", " a", 'q"q', '"', "''", "t\tt", "c,c"]
TOKENS += ["l\nl", "#", "NULL", "nan", "1e3", "\\N", "a", "A"]


def write(folder, frame, kind, name="events", types=TYPES):
    """The frame as a file; text columns as they are, all else as pandas writes it."""
    path = Path(folder) / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=7)
        return path
    header = [f"{name}:{types[name]}" if kind == "inter" else name for name in frame.columns]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if kind == "inter" else ",", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(frame.astype(object).where(frame.notna(), "").itertuples(index=False))
    return path


def expected(frame, columns=COLUMNS):
    """What pandas makes of it: by token, then time, then the order in the file."""
    result = pd.DataFrame(
        {"user": frame[columns.user].astype(str), "item": frame[columns.item].astype(str)}
    )
    if columns.rating is not None:
        result["liked"] = (frame[columns.rating] >= columns.threshold).astype(float)
    if columns.label is not None:
        result["liked"] = frame[columns.label].astype(float)
    keys = ["user"]
    if columns.time is not None:
        result["time"] = frame[columns.time].astype(float)
        keys.append("time")
    return result.sort_values(keys, kind="stable", ignore_index=True)


def frame_of(table):
    return pd.DataFrame({name: table[name].to_pylist() for name in table.column_names})


def same(table, frame):
    frame = frame.reset_index(drop=True)
    got = frame_of(table).astype({"user": "object", "item": "object"})
    pd.testing.assert_frame_equal(got, frame.astype({"user": "object", "item": "object"}))


@contextlib.contextmanager
def opened(path, columns=COLUMNS, **options):
    with EventFile(path, columns, memory="200MB", **{"threads": 2, **options}) as file:
        yield file


def random_frame(rng, rows, users=40, items=30, times=5):
    """Interactions with many ties."""
    return pd.DataFrame(
        {
            "user_id": [f"{n:03d}" for n in rng.integers(users, size=rows)],
            "item_id": [f"i{n}" for n in rng.integers(items, size=rows)],
            "rating": rng.integers(1, 11, rows) / 2,
            "timestamp": rng.integers(times, size=rows),
        }
    )


frames = st.lists(
    st.tuples(
        st.sampled_from(TOKENS),
        st.sampled_from(TOKENS),
        st.sampled_from([0.5, 3.5, 4.0, 5.0]),
        st.sampled_from([-1.5, 0.0, -0.0, 2.0, 1.7e9]),
    ),
    min_size=1,
    max_size=30,
).map(lambda rows: pd.DataFrame(rows, columns=list(TYPES)))


# --- what is read --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(frame=frames, max_rows=st.integers(1, 12))
def test_blocks_are_the_sorted_file(kind, frame, max_rows):
    with tempfile.TemporaryDirectory() as folder, opened(write(folder, frame, kind)) as file:
        blocks = list(file.blocks(max_rows))
        reference = expected(frame)
        same(pa.concat_tables(blocks), reference)
        sizes = reference.groupby("user").size()
        for block in blocks:
            assert block.schema == file.schema
            assert 0 < len(block) <= max(max_rows, sizes[block["user"][0].as_py()])
        # No block could have held the first user of the next one.
        for block, following in zip(blocks, blocks[1:], strict=False):
            assert len(block) + sizes[following["user"][0].as_py()] > max_rows
        assert sum(len(set(block["user"].to_pylist())) for block in blocks) == len(sizes)
        assert (file.n_events, file.n_users) == (len(frame), len(sizes))

        counts = reference.groupby("item")["liked"].agg(["size", "sum"]).sort_index()
        assert file.item_counts().to_pydict() == {
            "item": list(counts.index),
            "count": list(counts["size"]),
            "likes": list(counts["sum"]),
        }


@pytest.mark.parametrize("kind", ["inter", "csv"])
def test_text_is_parsed_as_pandas_and_recbole_do(tmp_path, kind):
    separator = {"inter": "\t", "csv": ","}[kind]
    rows = ["007,i1,1,0", '"a,b",i"x,1,0', '" s",NULL,2,0', 'z," ""q"" ",2,0', "", 'e",#,3,0']
    path = tmp_path / f"events.{kind}"
    path.write_text("\n".join(["u,i,t,x", *rows]).replace(",", separator), encoding="utf-8")
    frame = pd.read_csv(path, sep=separator, engine="python", dtype=str, keep_default_na=False)
    columns = EventColumns("u", "i", time="t")
    with opened(path, columns) as file:
        same(pa.concat_tables(file.blocks()), expected(frame, columns))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\N{BYTE ORDER MARK}"])
def test_line_ends_and_byte_order_marks(tmp_path, newline, mark):
    path = tmp_path / "events.inter"
    text = f"{mark}user_id:token\titem_id:token\nu\ti\nv\tj"
    path.write_text(text.replace("\n", newline), encoding="utf-8", newline="")
    with opened(path, EventColumns("user_id", "item_id")) as file:
        assert [b.to_pydict() for b in file.blocks()] == [{"user": ["u", "v"], "item": ["i", "j"]}]


def test_a_packed_file(tmp_path, rng):
    frame = random_frame(rng, 50)
    path = tmp_path / "events.inter.gz"
    path.write_bytes(gzip.compress(write(tmp_path, frame, "inter").read_bytes()))
    with opened(path) as file:
        same(pa.concat_tables(file.blocks()), expected(frame))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("threads", [1, 4])
def test_ties_keep_the_order_of_the_files(tmp_path, monkeypatch, rng, kind, threads):
    monkeypatch.setattr(module, "BATCH", 2048)
    frames = []
    for number in (10, 2, 1):  # by name: 1, 10, 2
        frame = random_frame(rng, 7000, users=20, times=2)
        frame["item_id"] = [f"{number}-{n}" for n in range(len(frame))]
        write(tmp_path, frame, kind, f"part-{number}")
        frames.append(frame)
    by_name = expected(pd.concat([frames[2], frames[0], frames[1]]))
    as_listed = expected(pd.concat(frames))
    listed = [tmp_path / f"part-{number}.{kind}" for number in (10, 2, 1)]
    (tmp_path / f"_metadata.{kind}").write_bytes(b"no events")
    (tmp_path / "_SUCCESS").touch()
    for path, reference in (
        (tmp_path, by_name),
        (str(tmp_path / f"part*.{kind}"), by_name),
        (listed, as_listed),
    ):
        with opened(path, threads=threads) as file:
            assert {p.name for p in file.files} == {p.name for p in listed}
            same(pa.concat_tables(file.blocks(5000)), reference)


@pytest.mark.parametrize("kind", FORMATS)
def test_files_may_order_their_columns_differently(tmp_path, rng, kind):
    frame = random_frame(rng, 60)
    write(tmp_path, frame[:30], kind, "a")
    write(tmp_path, frame[30:][list(TYPES)[::-1]], kind, "b")
    with opened(tmp_path) as file:
        same(pa.concat_tables(file.blocks()), expected(frame))


def test_a_column_is_the_files_own_and_not_its_folders(tmp_path, rng):
    frame = random_frame(rng, 20)
    folder = tmp_path / "item_id=none"
    folder.mkdir()
    write(folder, frame, "parquet")
    with opened(tmp_path) as file:
        same(pa.concat_tables(file.blocks()), expected(frame))


def test_names_that_look_like_patterns_or_sql(tmp_path, rng):
    frame = random_frame(rng, 20).rename(columns={"user_id": 'it\'s "u" \\ x'})
    folder = tmp_path / "[1]*'?"
    folder.mkdir()
    write(tmp_path, frame, "parquet", "1")
    columns = EventColumns('it\'s "u" \\ x', "item_id", time="timestamp")
    for kind in ("csv", "parquet"):
        write(folder, frame[:5], kind, "ab")  # the pattern's match, which is not meant
        with opened(write(folder, frame, kind, "a[b]"), columns) as file:
            same(pa.concat_tables(file.blocks()), expected(frame, columns))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("feedback", [None, "label", "rating"])
def test_columns_that_a_file_lacks(tmp_path, rng, kind, timed, feedback):
    frame = random_frame(rng, 200)
    frame["label"] = rng.integers(2, size=200)
    columns = EventColumns(
        "user_id",
        "item_id",
        time="timestamp" if timed else None,
        label="label" if feedback == "label" else None,
        rating="rating" if feedback == "rating" else None,
        threshold=3 if feedback == "rating" else None,
    )
    path = write(tmp_path, frame, kind, types={**TYPES, "label": "float"})
    with opened(path, columns) as file:
        reference = expected(frame, columns)
        same(pa.concat_tables(file.blocks(30)), reference)
        same(file.sample_users(1000, 0, 1000), reference)
        likes = reference["liked"].sum() if feedback else len(frame)
        assert sum(file.item_counts()["likes"].to_pylist()) == likes


@pytest.mark.parametrize(
    ("users", "items"),
    [
        (pa.array([7, 10, -3]), pa.array([2**63, 0, 1], pa.uint64())),
        (pa.array(["007", "7", "x"]).dictionary_encode(), pa.array(["é", "\x00", "a\x00b"])),
        (pa.array(["007", "7", "x"], pa.large_string()), pa.array([1, 2, 3], pa.int8())),
    ],
)
def test_tokens_in_parquet(tmp_path, users, items):
    path = tmp_path / "events.parquet"
    pq.write_table(pa.table({"u": users, "i": items}), path)
    with opened(path, EventColumns("u", "i")) as file:
        rows = sorted(zip(map(str, users.to_pylist()), map(str, items.to_pylist()), strict=True))
        table = pa.concat_tables(file.blocks())
        assert list(zip(*table.to_pydict().values(), strict=True)) == rows


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Asia/Tokyo"])
def test_timestamps_become_seconds(tmp_path, unit, zone):
    texts = ["2024-01-02 03:04:05.123456", "1960-07-01 12:00:00.000000"]
    times = pd.to_datetime(texts).as_unit(unit).tz_localize(zone)
    seconds = (times - pd.Timestamp(0, tz="UTC" if zone else None)).total_seconds()
    path = tmp_path / "events.parquet"
    pq.write_table(pa.table({"u": ["a", "b"], "i": ["x", "y"], "t": pa.array(times)}), path)
    with opened(path, EventColumns("u", "i", time="t")) as file:
        assert pa.concat_tables(file.blocks())["time"].to_pylist() == pytest.approx(seconds, 1e-15)


@pytest.mark.parametrize("kind", FORMATS)
def test_dates_in_text_are_utc(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TZ", "America/New_York")
    texts = ["2024-01-02", "2024-01-02 00:00:01.5", "2024-01-02T02:00:02+02:00"]
    frame = pd.DataFrame({"user_id": "u", "item_id": ["a", "b", "c"], "timestamp": texts})
    with opened(
        write(tmp_path, frame, kind), EventColumns("user_id", "item_id", time="timestamp")
    ) as file:
        assert next(file.blocks())["time"].to_pylist() == [1704153600, 1704153601.5, 1704153602]


@pytest.mark.parametrize("type_", [pa.float32(), pa.float64(), pa.decimal128(4, 1), pa.string()])
def test_a_rating_at_the_threshold_is_a_like(tmp_path, type_):
    ratings = pa.array([3.5, 3.6, 3.7]).cast(pa.string()).cast(type_)
    path = tmp_path / "events.parquet"
    pq.write_table(pa.table({"u": ["a", "b", "c"], "i": ["x", "x", "x"], "r": ratings}), path)
    with opened(path, EventColumns("u", "i", rating="r", threshold=3.6)) as file:
        assert next(file.blocks())["liked"].to_pylist() == [0, 1, 1]


def test_one_user_with_more_rows_than_a_block(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(module, "BATCH", 2048)
    frame = random_frame(rng, 9000, users=3)
    frame.loc[:5000, "user_id"] = "001"
    with opened(write(tmp_path, frame, "parquet")) as file:
        blocks = list(file.blocks(2500))
        assert [set(block["user"].to_pylist()) for block in blocks] == [{"000"}, {"001"}, {"002"}]
        same(pa.concat_tables(blocks), expected(frame))


def test_a_sort_that_spills(tmp_path, rng):
    frame = random_frame(rng, 1_000_000, users=1000)
    path = tmp_path / "events.parquet"
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=20_000)
    with EventFile(path, COLUMNS, memory="32MB", threads=1, scratch=tmp_path) as file:
        blocks = file.blocks(50_000)
        first = next(blocks)
        assert any(p.is_file() for p in tmp_path.glob("recbole-uip-events-*/spill/*"))
        reference = pa.Table.from_pandas(expected(frame), file.schema, preserve_index=False)
        assert pa.concat_tables([first, *blocks]).equals(reference)


def test_several_iterators_at_once(tmp_path, rng):
    frame = random_frame(rng, 3000)
    with opened(write(tmp_path, frame, "csv")) as file:
        one, two = file.blocks(100), file.blocks(100)
        pairs = []
        for first, second in zip(one, two, strict=True):
            file.sample_users(3, 0, 100)
            pairs.append((first, second))
        for column in zip(*pairs, strict=True):
            same(pa.concat_tables(column), expected(frame))


# --- samples -------------------------------------------------------------------------------


def drawn(frame, n_users, seed, max_events):
    """Users of the sample, in plain Python."""
    sizes = frame.groupby("user_id").size()
    users = sorted(sizes.index, key=lambda u: hashlib.md5(f"{seed}:{u}".encode()).hexdigest())
    total, chosen = 0, []
    for user in users[:n_users]:
        total += sizes[user]
        if chosen and total > max_events:
            break
        chosen.append(user)
    return chosen


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("n_users", "seed", "max_events"), [(5, 0, 1000), (5, 1, 1000), (100, 2, 70), (3, 0, 1)]
)
def test_a_sample_is_whole_users(tmp_path, rng, kind, n_users, seed, max_events):
    frame = random_frame(rng, 500)
    with opened(write(tmp_path, frame, kind)) as file:
        sample = file.sample_users(n_users, seed, max_events)
        users = drawn(frame, n_users, seed, max_events)
        same(sample, expected(frame[frame["user_id"].isin(users)]))
        assert sample.schema == file.schema
        assert len(sample) <= max_events or len(users) == 1


def test_a_sample_depends_on_tokens_and_seed_alone(tmp_path, rng):
    frame = random_frame(rng, 500)
    users = frame["user_id"].unique()
    place = frame["user_id"].map(dict(zip(users, rng.permutation(len(users)), strict=True)))
    moved = frame.iloc[np.argsort(place.to_numpy(), kind="stable")]
    samples = []
    for kind, data, threads in (("csv", frame, 1), ("parquet", moved, 4)):
        with opened(write(tmp_path, data, kind), threads=threads) as file:
            samples.append(file.sample_users(10, 3, 400))
            assert not samples[-1].equals(file.sample_users(10, 4, 400))
            larger = file.sample_users(20, 3, 400)
            assert set(samples[-1]["user"].to_pylist()) < set(larger["user"].to_pylist())
    assert samples[0].equals(samples[1])


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user": ""}, "user='' must be the name of a column"),
        ({"item": None}, "item=None must be the name of a column"),
        ({"time": 3}, "time=3 must be the name of a column"),
        ({"time": "u"}, "user and time are both the column 'u'"),
        ({"label": "l", "rating": "r", "threshold": 3}, "label='l' and rating='r' both say"),
        ({"rating": "r"}, "rating='r' needs threshold"),
        ({"threshold": 3}, "threshold=3 needs rating"),
        ({"label": "l", "threshold": 3}, "threshold=3 needs rating"),
        ({"rating": "r", "threshold": float("nan")}, "threshold=nan must be a finite number"),
        ({"rating": "r", "threshold": "4"}, "threshold='4' must be a finite number"),
    ],
)
def test_columns_that_make_no_sense(arguments, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        EventColumns(**{"user": "u", "item": "i", **arguments})


BASE = {"user_id": "u", "item_id": "i", "rating": "3", "timestamp": "1"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("columns", "column", "value", "message"),
    [
        (COLUMNS, "user_id", "", "column 'user_id' (user) is empty in event 3: every event needs"),
        (COLUMNS, "item_id", None, "column 'item_id' (item) is empty in event 3: every event nee"),
        (COLUMNS, "timestamp", None, "column 'timestamp' (time) is empty in event 3: every event"),
        (COLUMNS, "timestamp", "nan", "(time) is 'nan' in event 3: every event needs a finite"),
        (COLUMNS, "timestamp", "-inf", "(time) is '-inf' in event 3: every event needs a finite"),
        (COLUMNS, "timestamp", "2024-01-31", "(time) is '2024-01-31' in event 3: every event"),
        (COLUMNS, "rating", "good", "column 'rating' (rating) is 'good' in event 3: every event"),
        (COLUMNS, "rating", None, "column 'rating' (rating) is empty in event 3: every event"),
        (COLUMNS, "rating", "nan", "column 'rating' (rating) is 'nan' in event 3: every event"),
        (
            EventColumns("user_id", "item_id", label="timestamp"),
            "timestamp",
            "2",
            "column 'timestamp' (label) is '2' in event 3: labels are 0 or 1; leave such rows out",
        ),
    ],
)
def test_values_that_cannot_be_used(tmp_path, kind, number, columns, column, value, message):
    frame = pd.DataFrame([BASE] * 6)
    bad = frame.copy()
    bad.loc[2, column] = value
    bad.loc[4, column] = value
    paths = [write(tmp_path, bad if i == number else frame, kind, f"e{i}") for i in (0, 1)]
    with opened(tmp_path, columns) as file:
        for use in (
            lambda: file.n_events,
            lambda: file.n_users,
            file.item_counts,
            file.blocks,
            lambda: file.sample_users(1, 0, 1),
        ):
            with pytest.raises(SettingsError) as error:
                use()
            assert str(error.value).startswith(f"{paths[number]}: ")
            assert message in str(error.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", pa.array([1.0, 2.0]), "(user) is of type DOUBLE and must hold text or whole"),
        ("item_id", pa.array([b"a", b"b"]), "(item) is of type BLOB and must hold text or whole"),
        ("timestamp", pa.array([True, False]), "(time) is of type BOOLEAN and must hold numbers"),
        ("rating", pa.array([[1], [2]]), "(rating) is of type BIGINT[] and must hold numbers"),
        ("timestamp", pa.array([1.0, np.nan]), "(time) is 'nan' in event 2"),
        ("timestamp", pa.array([1.0, None]), "(time) is empty in event 2"),
        ("rating", pa.array([1.0, np.inf]), "(rating) is 'inf' in event 2"),
        ("user_id", pa.array([1, None]), "(user) is empty in event 2"),
    ],
)
def test_types_of_parquet_that_cannot_be_used(tmp_path, column, values, message):
    table = pa.table({name: [value] * 2 for name, value in BASE.items()})
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, tmp_path / "events.parquet")
    with pytest.raises(SettingsError) as error, opened(tmp_path / "events.parquet") as file:
        _ = file.n_events
    assert message in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_column_is_named_with_those_there(tmp_path, rng, kind):
    path = write(tmp_path, random_frame(rng, 5), kind)
    with pytest.raises(SettingsError) as error:
        EventFile(path, EventColumns("userid", "item_id"))
    assert str(error.value) == (
        f"{path} has no column 'userid' (user); it has 'user_id', 'item_id', 'rating', "
        "'timestamp'; did you mean 'user_id'?"
    )
    write(tmp_path, random_frame(rng, 5)[["user_id", "item_id"]], kind, "more")
    with pytest.raises(SettingsError, match="more.* has no column 'rating'"):
        EventFile(tmp_path, COLUMNS)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_events(tmp_path, rng, kind):
    path = write(tmp_path, random_frame(rng, 5)[:0].astype({"user_id": str, "item_id": str}), kind)
    with opened(path) as file, pytest.raises(SettingsError, match="has no events"):
        file.blocks()
    empty = tmp_path / f"empty.{kind}"
    empty.touch()
    with pytest.raises(SettingsError, match=r"empty\..* (is empty|cannot be read)"):
        EventFile(empty, COLUMNS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u", "Line: 3"),
        ("u\ti\t1\t2\t3", "Line: 3"),
        ('"u\ti\t1\t2', "Line: 3"),
        ("\udce9\ti\t1\t2", "utf-8"),
    ],
)
def test_lines_that_are_broken(tmp_path, line, message):
    path = tmp_path / "events.inter"
    header = "\t".join(f"{name}:{kind}" for name, kind in TYPES.items())
    text = "\n".join([header, "u\ti\t1\t2", line, "v\ti\t1\t2\n"])
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(SettingsError) as error, opened(path) as file:
        _ = file.n_events
    assert str(error.value).startswith(f"{path} cannot be read")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path, rng):
    def refused(path, message, columns=COLUMNS, **options):
        with pytest.raises(SettingsError, match=re.escape(message)):
            EventFile(path, columns, **options)

    path = write(tmp_path, random_frame(rng, 5), "csv")
    refused(tmp_path / "gone.csv", "gone.csv is not there: give a .inter, .csv or .parquet file")
    refused(tmp_path / "*.inter", "*.inter is not there")
    refused([], "path=[] names no file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no .inter, .csv or .parquet file")
    (tmp_path / "events.txt").touch()
    refused(tmp_path / "events.txt", "events.txt is no .inter, .csv or .parquet file: convert")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more PAR1")
    refused(tmp_path / "broken.parquet", "broken.parquet cannot be read")
    refused(tmp_path, "broken.parquet and")
    (tmp_path / "twice.inter").write_text("user_id:token\titem_id:token\tuser_id:float\n")
    refused(
        tmp_path / "twice.inter",
        "several columns 'user_id' (user)",
        EventColumns("user_id", "item_id"),
    )
    refused(path, "memory='much'", memory="much")
    refused(path, "threads=0", threads=0)
    refused(path, "scratch=", scratch=tmp_path / "nowhere")
    with opened(path) as file, pytest.raises(SettingsError, match="max_rows=0 must be at least 1"):
        file.blocks(max_rows=0)
    with opened(path) as file, pytest.raises(SettingsError, match="n_users=0 must be at least 1"):
        file.sample_users(0, 0, 1)


def test_parquet_files_that_do_not_fit_together(tmp_path):
    columns = EventColumns("u", "i")
    pq.write_table(pa.table({"u": [7], "i": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"u": ["007"], "i": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(SettingsError, match=r"b.parquet has the column 'u' \(user\) of type VARC"):
        EventFile(tmp_path, columns)
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"u": [7], "i": ["x"], "file_row_number": [0]}), path)
    with pytest.raises(SettingsError, match="hides the order of its rows"):
        EventFile(path, columns)


def test_too_little_memory_says_so(tmp_path, rng):
    frame = random_frame(rng, 200_000, users=100_000)
    path = tmp_path / "events.parquet"
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)
    with (
        EventFile(path, COLUMNS, memory="1MB", threads=2) as file,
        pytest.raises(SettingsError, match="memory='1MB' is too little to read"),
    ):
        list(file.blocks())


def test_nothing_is_left_behind(tmp_path, rng):
    path = write(tmp_path, random_frame(rng, 50), "csv")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with opened(path, scratch=scratch) as file:
        next(file.blocks())
        assert list(scratch.iterdir())
    assert not list(scratch.iterdir())
    file.close()

    file = EventFile(path, COLUMNS, scratch=scratch)  # never closed
    file.item_counts()
    del file
    gc.collect()
    assert not list(scratch.iterdir())

    with pytest.raises(SettingsError):
        EventFile(path, EventColumns("x", "y"), scratch=scratch)
    gc.collect()
    assert not list(scratch.iterdir())

"""The bank's files: what was committed is read back, and whatever is broken says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_uip.bank import store
from recbole_uip.bank.store import BankError, Writer, digest_of, read

WIDTH = 6


def users(names, fill=None, start=0):
    """Rows of users whose state is ``fill``, else counts up."""
    count = len(names)
    states = np.arange(start, start + count * WIDTH, dtype=np.float32)
    if fill is not None:
        states[:] = fill
    return pa.table(
        {
            "user": pa.array(names, pa.string()),
            "state": pa.FixedSizeListArray.from_arrays(pa.array(states), WIDTH),
            "events": pa.array(np.arange(count, dtype=np.int32)),
        }
    )


def catalogue(*names):
    column = pa.array(names, pa.string())
    return pa.table({"item": column, "likes": np.arange(len(names)), "title": column})


def tables(fill=1.0):
    return {"vectors": np.full((3, 2), fill, np.float32), "scale": np.array(fill)}


def parts(number):
    """All parts of a commit; each of them shows ``number``."""
    return {
        "metadata": {"number": number},
        "tables": tables(number),
        "items": catalogue("i1", f"i{number}"),
        "users": users(["u1", "u2"], fill=number),
        "replace_users": True,
    }


def numbers(snapshot):
    """The ``number`` that each part of the snapshot shows."""
    return (
        snapshot.metadata["number"],
        snapshot.tables["scale"].item(),
        int(snapshot.items["item"][1].as_py()[1:]),
        snapshot.users[0]["state"][0].as_py()[0],
    )


def build(folder, number=1):
    with Writer(folder, create=True) as writer:
        writer.commit(**parts(number))
    return folder


def listing(folder):
    return {path.name for path in folder.iterdir()} - {store.LOCK}


def states_of(table, chunk=0):
    return table["state"].chunk(chunk).flatten().to_numpy(zero_copy_only=True).reshape(-1, WIDTH)


def sign(folder, **changes):
    """Rewrite the manifest with ``changes`` and a checksum that fits them."""
    manifest = store._read_manifest(folder) | changes
    del manifest["sha256"]
    (folder / store.MANIFEST).write_bytes(store._encode(manifest))


@pytest.fixture
def bank(tmp_path):
    return build(tmp_path / "bank")


# --- round trips ---------------------------------------------------------------------------


def test_all_parts_come_back(tmp_path):
    given_tables = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "strided": np.arange(10)[::3],
        "big-endian": np.arange(3, dtype=">f8"),
        "scalar": np.array(3.5),
        "flags": np.array([True, False]),
        "half": np.arange(3, dtype=np.float16),
        "nothing": np.zeros((0, 4)),
    }
    metadata = {"facets": ["taste"], "half_life": 20.5, "text": 'é "\ud83d\ude00"', "none": None}
    items, base = catalogue("i1", "ïtém"), users(["u1", "ü2", ""])
    with Writer(tmp_path / "a" / "bank", create=True) as writer:
        assert writer.generation == 0
        arguments = {"tables": given_tables, "items": items, "users": base}
        assert writer.commit(metadata=metadata, **arguments) == 1
        assert writer.generation == 1
    found = read(tmp_path / "a" / "bank")
    assert found.generation == 1
    assert found.metadata == json.loads(json.dumps(metadata))
    assert found.tables.keys() == given_tables.keys()
    for name, array in given_tables.items():
        assert found.tables[name].shape == array.shape
        assert found.tables[name].dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found.tables[name], array)
    assert found.items.equals(items)
    assert len(found.users) == 1
    assert found.users[0].equals(base)


def test_parts_that_are_empty_come_back(tmp_path):
    with Writer(tmp_path, create=True) as writer:
        writer.commit(tables={}, items=catalogue(), users=users([]))
    found = read(tmp_path)
    assert (found.metadata, found.tables) == ({}, {})
    assert found.items.num_rows == found.users[0].num_rows == 0
    assert found.users[0].schema == users([]).schema


@pytest.mark.parametrize("part", ["metadata", "tables", "items"])
def test_what_is_not_given_is_kept(bank, part):
    before = listing(bank)
    with Writer(bank) as writer:
        assert writer.commit(**{part: parts(7)[part]}) == 2
    expected = {"metadata": (7, 1, 1, 1), "tables": (1, 7, 1, 1), "items": (1, 1, 7, 1)}
    assert numbers(read(bank)) == expected[part]
    assert len(before - listing(bank)) == (part != "metadata")  # the replaced file is gone


def test_deltas_are_appended_and_a_base_replaces_them(bank):
    base, first, second = users(["u1", "u2"], fill=1), users(["u2", "u3"]), users(["u4"])
    with Writer(bank) as writer:
        writer.commit(users=first)
        writer.commit(users=second, metadata={"number": 3})
    with Writer(bank) as writer:
        assert writer.generation == 3
        found = read(bank)
        assert found.metadata == {"number": 3}
        assert all(a.equals(b) for a, b in zip(found.users, (base, first, second), strict=True))
        of_both = users(["u2", "u3", "u4"])
        assert writer.commit(users=of_both, replace_deltas=True) == 4
        found = read(bank).users
        assert all(a.equals(b) for a, b in zip(found, (base, of_both), strict=True))
        merged = users(["u1", "u2", "u3", "u4"])
        assert writer.commit(users=merged, replace_users=True) == 5
    found = read(bank)
    assert len(found.users) == 1
    assert found.users[0].equals(merged)
    assert {name for name in listing(bank) if name.startswith("users")} == {"users-5.arrow"}


def test_a_digest_tells_commits_and_banks_apart(bank, tmp_path):
    digests = {digest_of(bank)}
    with Writer(bank) as writer:
        for generation in (2, 3):
            writer.commit(users=users([f"u{generation}"]))
            assert read(bank).generation == writer.generation == generation
            assert read(bank).sha256 == digest_of(bank)
            digests.add(digest_of(bank))
    with Writer(tmp_path / "other", create=True) as writer:
        writer.commit(**parts(7))
    assert len({*digests, digest_of(tmp_path / "other")}) == 4


def test_what_is_open_is_not_read_again(bank, monkeypatch):
    hashed, sha256_of = [], store.sha256_of

    def noted(path):
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(store, "sha256_of", noted)
    first = read(bank)
    assert len(hashed) == len(first.files) == 3
    with Writer(bank) as writer:
        writer.commit(users=users(["u3"]))
        hashed.clear()
        second = read(bank, known=first)
        assert hashed == ["users-2.arrow"]
        assert second.users[0] is first.users[0] and second.tables is first.tables
        assert second.users[1].equals(users(["u3"])) and second.items is first.items
        # A file of the same name is another file.
        writer.commit(**parts(3) | {"replace_users": True})
    shutil.rmtree(bank)
    build(bank, number=7)
    found = read(bank, known=second)
    assert numbers(found) == numbers(read(bank)) and found.users[0] is not first.users[0]


def test_rows_and_arrays_cost_no_copy(tmp_path):
    names = [f"u{number}" for number in range(50_000)]
    with Writer(tmp_path, create=True) as writer:
        writer.commit(tables={}, items=catalogue("i"), users=users(names))
    before = pa.total_allocated_bytes()
    snapshot = read(tmp_path)
    states = states_of(snapshot.users[0])
    assert pa.total_allocated_bytes() - before < states.nbytes / 10
    assert states.shape == (50_000, WIDTH)
    assert not states.flags.writeable
    assert states[-1].tolist() == list(range(50_000 * WIDTH - WIDTH, 50_000 * WIDTH))
    if sys.platform == "linux":
        address = states.__array_interface__["data"][0]
        assert any(begin <= address < end for begin, end in maps_of(tmp_path / "users-1.arrow"))


def maps_of(path):
    """Ranges of this process's addresses where the file is mapped."""
    with open("/proc/self/maps") as file:
        lines = [line.split(maxsplit=5) for line in file]
    spans = [line[0] for line in lines if len(line) == 6 and line[5].strip() == str(path)]
    return [[int(side, 16) for side in span.split("-")] for span in spans]


def test_a_base_is_written_batch_by_batch(tmp_path):
    schema = users([]).schema
    batches, alive = 40, []

    def produce():
        for number in range(batches):
            table = users([f"u{number}-{row}" for row in range(2000)], fill=number)
            yield from table.to_batches()
            alive.append(pa.total_allocated_bytes())

    with Writer(tmp_path, create=True) as writer:
        reader = pa.RecordBatchReader.from_batches(schema, produce())
        writer.commit(tables={}, items=catalogue("i"), users=reader)
    (base,) = read(tmp_path).users
    assert base.num_rows == batches * 2000
    assert [states_of(base, chunk)[0, 0] for chunk in range(batches)] == list(range(batches))
    # what lives while writing does not grow with the base
    assert max(alive) - alive[0] < base.nbytes / 4


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"half_life": float("inf")}}, "metadata cannot be written as JSON"),
        ({"metadata": {"path": os}}, "metadata cannot be written as JSON"),
        ({"tables": {"names": np.array(["a"])}}, r"tables\['names'\] of type <U1"),
        ({"tables": {"objects": np.array([None])}}, r"tables\['objects'\] of type object"),
        ({"tables": {"__metadata__": np.zeros(1)}}, "__metadata__"),
        ({"items": pa.table({"title": ["a"]})}, "items has the schema title: string"),
        ({"items": pa.table({"item": [1]})}, "items has the schema item: int64"),
        ({"items": catalogue("a", None)}, "1 null"),
        ({"users": users(["a", None])}, "1 null"),
        ({"users": users(["a"]).drop_columns("events")}, "users has the schema user: string"),
        ({"users": None}, "replace_users=True needs users"),
        ({"replace_deltas": True}, "replace_deltas=True needs users, and not as the base"),
    ],
)
def test_what_cannot_be_kept_leaves_no_trace(bank, changes, message):
    before = listing(bank)
    append = "users" in changes and changes["users"] is not None
    with Writer(bank) as writer:
        with pytest.raises(BankError, match=message):
            writer.commit(**(parts(2) | {"replace_users": not append} | changes))
        assert listing(bank) == before
        assert numbers(read(bank)) == (1, 1, 1, 1)
        # and the writer goes on
        assert writer.commit(**parts(2)) == 2
    assert numbers(read(bank)) == (2, 2, 2, 2)


def test_a_source_of_rows_that_fails_leaves_no_trace(bank):
    def produce():
        yield from users(["u1"]).to_batches()
        raise RuntimeError("the source broke")

    before = listing(bank)
    reader = pa.RecordBatchReader.from_batches(users([]).schema, produce())
    with Writer(bank) as writer, pytest.raises(Exception, match="the source broke"):
        writer.commit(**(parts(2) | {"users": reader}))
    assert listing(bank) == before
    assert numbers(read(bank)) == (1, 1, 1, 1)


def test_the_first_commit_needs_all_parts(tmp_path):
    with Writer(tmp_path, create=True) as writer:
        with pytest.raises(BankError, match="needs items, users"):
            writer.commit(tables={})
        assert listing(tmp_path) == set()
        writer.commit(tables={}, items=catalogue("i"), users=users(["u"]))


def test_an_interrupt_after_the_commit_point_keeps_the_commit(bank, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        if os.path.basename(target) == store.MANIFEST:
            raise KeyboardInterrupt

    with Writer(bank) as writer:
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit(**parts(2))
        monkeypatch.undo()
        assert writer.generation == 2
        assert numbers(read(bank)) == (2, 2, 2, 2)
        writer.commit(users=users(["u3"]))
    assert read(bank).generation == 3


def test_a_full_disk_is_told(bank, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = listing(bank)
    with Writer(bank) as writer:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(BankError, match=f"the bank {bank} .* No space left.*make room"):
                writer.commit(**parts(2))
        assert listing(bank) == before and numbers(read(bank)) == (1, 1, 1, 1)
        assert writer.commit(**parts(2)) == 2


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "bank"):
        for act in (lambda at: Writer(at, create=True), store.check_replaceable):
            with pytest.raises(BankError, match=f"{folder} cannot be a folder.*{tmp_path}/file is"):
                act(folder)
    store.check_replaceable(tmp_path / "new" / "bank")
    assert not (tmp_path / "new").exists()

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(BankError, match=f"{tmp_path}/new cannot be made .*Permission denied"):
        Writer(tmp_path / "new", create=True)


# --- damage --------------------------------------------------------------------------------


def with_a_delta(folder):
    build(folder)
    with Writer(folder) as writer:
        writer.commit(users=users(["u3"]))
    return folder


FILES = ("tables-1.safetensors", "items-1.arrow", "users-1.arrow", "users-2.arrow")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return with_a_delta(tmp_path_factory.mktemp("pristine"))


@pytest.mark.parametrize("name", FILES)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_byte_is_found(pristine, name, data):
    path = pristine / name
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(flipped)
    try:
        with pytest.raises(
            BankError, match=f"{name} is damaged.*SHA-256.*Restore .* or delete and rebuild"
        ):
            read(pristine)
    finally:
        path.write_bytes(content)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(pristine, rng):
    path = pristine / store.MANIFEST
    content = path.read_bytes()
    try:
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            with pytest.raises(BankError, match=r"manifest\.json"):
                digest_of(pristine)
    finally:
        path.write_bytes(content)
    assert read(pristine).generation == 2


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_truncation_is_found(tmp_path, name, verify):
    path = with_a_delta(tmp_path) / name
    size = path.stat().st_size
    for kept in (size - 1, size // 2, 0):
        os.truncate(path, kept)
        message = rf"{name} is damaged: cut off: it has {kept} bytes, not {size}\."
        with pytest.raises(BankError, match=message):
            read(tmp_path, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_appended_bytes_are_found(bank, verify):
    with (bank / "items-1.arrow").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BankError, match=r"items-1\.arrow is damaged: it has"):
        read(bank, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name, verify):
    (with_a_delta(tmp_path) / name).unlink()
    with pytest.raises(BankError, match=f"{name} is missing, and manifest.json names it"):
        read(tmp_path, verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named(tmp_path, name):
    path = with_a_delta(tmp_path) / name
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(BankError, match=f"{name} is damaged: it cannot be read"):
        read(tmp_path, verify=False)


def test_a_folder_without_a_bank_stays_as_it_is(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        for look in (read, digest_of, Writer):
            with pytest.raises(BankError, match="there is no bank in .*build one"):
                look(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(BankError, match="there is no bank"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "does not say its format"),
        (b"{}", "does not say its format"),
        (b'{"format": 3}', "has the format 3, and this recbole-uip reads 4"),
        (b'{"format": 4, "generation": 1}', "lacks metadata, tables, items, users, files, sha256"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bank, content, message):
    (bank / store.MANIFEST).write_bytes(content)
    for look in (read, digest_of, Writer):
        with pytest.raises(BankError, match=f"manifest.json.*{message}"):
            look(bank)
    assert {"tables-1.safetensors", "items-1.arrow", "users-1.arrow"} <= listing(bank)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": "1"},
        {"generation": 0},
        {"metadata": []},
        {"users": []},
        {"users": {}},
        {"users": [["users-1.arrow"]]},
        {"files": {}},
        {"files": {"tables-1.safetensors": 5}},
        {"tables": None},
    ],
)
def test_a_manifest_of_wrong_types_is_refused(bank, changes):
    sign(bank, **changes)
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        read(bank)


@pytest.mark.parametrize(
    "name",
    [
        "../secret-1.arrow",
        "../users-1.arrow",
        "/users-1.arrow",
        "sub/users-1.arrow",
        "..\\users-1.arrow",
        "C:users-1.arrow",
        "..",
        "",
        "users-1.arrow\n",
        "users-1.arrow\0",
        "manifest.json",
        "writer.lock",
    ],
)
@pytest.mark.parametrize("part", ["tables", "items", "users"])
def test_names_that_lead_elsewhere_are_refused(bank, part, name):
    entry = {"bytes": 1, "rows": 1, "sha256": ""}
    files = store._read_manifest(bank)["files"] | {name: entry}
    sign(bank, files=files, **{part: [name] if part == "users" else name})
    for look in (read, Writer):
        with pytest.raises(BankError, match="names .* which is no file of a bank"):
            look(bank)


# --- one writer ----------------------------------------------------------------------------


def test_a_second_writer_of_this_process_is_refused(bank):
    with (
        Writer(bank) as writer,
        pytest.raises(BankError, match=rf"this process \(pid {os.getpid()}\).*{bank}"),
    ):
        Writer(bank)
    with Writer(bank):  # the first has closed
        pass
    with pytest.raises(BankError, match="is closed"):
        writer.commit(**parts(2))


def run_code(code, *arguments, **options):
    code = "from tests.bank.test_store import *\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_second_process_is_refused_until_the_first_dies(bank):
    code = """
        writer = Writer(sys.argv[1])
        print("open", flush=True)
        sys.stdin.read()
    """
    with run_code(code, bank) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(BankError, match=rf"another process \(pid {other.pid}\)"):
            Writer(bank)
        assert numbers(read(bank)) == (1, 1, 1, 1)  # readers do not care
        other.kill()
        other.wait()
        with Writer(bank) as writer:
            assert writer.commit(**parts(2)) == 2


def test_a_forked_child_neither_commits_nor_gives_the_lock_away(bank):
    with Writer(bank) as writer:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                writer.commit(**parts(2))
            except BankError:
                writer.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(BankError, match="has locked"):
            Writer(bank)
        assert writer.commit(**parts(2)) == 2


def test_a_bank_restored_under_its_writer_is_not_written(bank, tmp_path):
    old = (bank / store.MANIFEST).read_bytes()
    with Writer(bank) as writer:
        writer.commit(metadata={"number": 2})
        (bank / store.MANIFEST).write_bytes(old)
        with pytest.raises(BankError, match="no longer at generation 2"):
            writer.commit(metadata={"number": 3})
    assert read(bank).generation == 1


# --- a writer that is killed ---------------------------------------------------------------

KILLED = """
    folder, point = sys.argv[1:]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    replace, calls = os.replace, 0

    def counting(source, target):
        global calls
        calls += 1
        if point == f"before {calls}":
            die()
        replace(source, target)
        if point == f"after {calls}":
            die()

    def rows():
        yield from users(["u1"], fill=2).to_batches()
        if point == "while streaming":
            die()

    writer = Writer(folder, create=True)
    os.replace = counting
    if point == "while deleting":
        store._clear = die
    base = pa.RecordBatchReader.from_batches(users([]).schema, rows())
    writer.commit(**(parts(2) | {"users": base}))
"""
UNCOMMITTED = ["before 1", "after 1", "after 2", "while streaming", "after 3", "before 4"]
COMMITTED = ["after 4", "while deleting"]


def killed_at(folder, point):
    process = run_code(KILLED, folder, point)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", UNCOMMITTED + COMMITTED)
def test_a_killed_writer_loses_at_most_its_commit(bank, point):
    (bank / "notes.txt").write_text("not the bank's")
    before = listing(bank)
    killed_at(bank, point)
    left = 2 if point in COMMITTED else 1
    assert listing(bank) - before  # else the point tests nothing
    assert numbers(read(bank)) == (left,) * 4
    with Writer(bank) as writer:
        assert writer.generation == left
        named = set(store._read_manifest(bank)["files"])
        assert listing(bank) == {store.MANIFEST, "notes.txt"} | named
        assert writer.commit(**parts(3)) == left + 1
    assert numbers(read(bank)) == (3, 3, 3, 3)


@pytest.mark.parametrize("point", ["before 4", "after 4"])
def test_a_first_commit_that_is_killed(tmp_path, point):
    killed_at(tmp_path, point)
    if point == "before 4":
        with pytest.raises(BankError, match="there is no bank"):
            read(tmp_path)
        with Writer(tmp_path, create=True) as writer:
            assert (listing(tmp_path), writer.generation) == (set(), 0)
    else:
        assert numbers(read(tmp_path)) == (2, 2, 2, 2)


# --- readers beside a writer ---------------------------------------------------------------


def test_a_reader_keeps_what_it_has_opened(bank):
    snapshot = read(bank)
    states = states_of(snapshot.users[0])
    with Writer(bank) as writer:
        writer.commit(**parts(2))
        writer.commit(users=users(["u9"]))
    assert not (bank / "users-1.arrow").exists()
    assert numbers(snapshot) == (1, 1, 1, 1)
    assert (states == 1).all()
    del snapshot
    assert (states == 1).all()  # the array itself holds the map
    assert numbers(read(bank)) == (2, 2, 2, 2)


@pytest.mark.parametrize("name", ["tables-1.safetensors", "users-1.arrow"])
def test_a_file_that_vanishes_while_opening_is_read_anew(bank, monkeypatch, name):
    def commit_meanwhile(path):
        if path.name == name:
            with Writer(bank) as writer:
                writer.commit(**parts(2))
        return sha256(path)

    sha256 = store.sha256_of
    monkeypatch.setattr(store, "sha256_of", commit_meanwhile)
    assert numbers(read(bank)) == (2, 2, 2, 2)


def test_a_reader_never_sees_half_a_commit(bank):
    last, seen, failures = 40, set(), []

    def look():
        try:
            while max(seen, default=0) < last:
                found = numbers(read(bank))
                assert len(set(found)) == 1, found
                seen.add(found[0])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    with Writer(bank) as writer:
        for number in range(2, last + 1):
            writer.commit(**parts(number))
    thread.join(timeout=60)
    assert not failures
    assert last in seen


def test_the_bank_never_imports_recbole_or_torch():
    code = (
        "import sys, recbole_uip.bank.store; "
        "sys.exit(any(name.split('.')[0] in ('recbole', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

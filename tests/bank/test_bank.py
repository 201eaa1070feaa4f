"""The bank against the point-in-time path, and what outlives a commit."""

import dataclasses
import datetime
import os
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recbole_uip.bank import bank as bank_module
from recbole_uip.bank import store
from recbole_uip.bank import users as users_module
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.build import bank_of_profiles
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import BankError
from recbole_uip.bank.users import user_table
from recbole_uip.behaviours import folds_of
from recbole_uip.cli import main
from recbole_uip.profiles import infer
from recbole_uip.settings import UIPSettings

from .conftest import N_ITEMS

DAY = datetime.datetime(2024, 1, 31)


@pytest.fixture
def full_bank(tmp_path, inferred, world, users, items, bank_settings):
    with bank_of_profiles(
        tmp_path / "full", inferred, world.behaviours, users, items, bank_settings
    ) as bank:
        yield bank


def stream(bank, behaviours, users, items, rows):
    for row in rows:
        bank.update(
            users[behaviours.user[row]],
            items[behaviours.item[row]],
            behaviours.liked[row],
            behaviours.time[row],
        )


def test_streaming_gives_the_point_in_time_tokens_bit_for_bit(
    empty_bank, inferred, world, users, items
):
    """Each row's fields, looked up before any event of its time has entered."""
    behaviours, bank = world.behaviours, empty_bank
    fields = {field.name: field.values for field in inferred.fields}
    compared = 0
    for now in np.unique(behaviours.time):
        rows = np.flatnonzero(behaviours.time == now)
        codes = bank.look_up_many([users[user] for user in behaviours.user[rows]])
        expected = np.column_stack([fields[name][rows] for name in bank.fields])
        np.testing.assert_array_equal(codes, expected)
        for row in rows[::5]:
            found = bank.match(users[behaviours.user[row]], [items[behaviours.item[row]]])
            assert found[0].tolist() == [fields[name][row] for name in bank.match_fields]
        stream(bank, behaviours, users, items, rows)
        compared += len(rows)
    assert compared == len(behaviours)


def test_a_batch_gives_the_bits_of_single_events(
    empty_bank, full_bank, world, users, items, tmp_path
):
    behaviours = world.behaviours
    # Neither by user nor by time, but equal times in the order of the rows.
    shuffled = np.lexsort((np.arange(len(behaviours)), behaviours.time % 7))
    n = empty_bank.update_many(
        [users[user] for user in behaviours.user[shuffled]],
        [items[item] for item in behaviours.item[shuffled]],
        behaviours.liked[shuffled],
        behaviours.time[shuffled],
    )
    assert n == len(behaviours)
    for user in users:
        batch, stored = empty_bank.state_of(user), full_bank.state_of(user)
        np.testing.assert_array_equal(batch[0], stored[0])
        assert batch[1:] == stored[1:]
        np.testing.assert_array_equal(empty_bank.look_up(user), full_bank.look_up(user))


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 90), st.booleans(), st.integers(0, 6)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 4),
)
@hypothesis_settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_mixture_of_batches_commits_and_single_events_agrees(
    tmp_path_factory, model, table, parts
):
    """Known and new users, known and unknown items, ties, deltas, merges, reopening."""
    users = [f"u{user}" for user, *_ in table]
    names = [f"i{item}" for _, item, *_ in table]
    liked = np.array([float(like) for *_, like, _ in table])
    time = np.sort(np.array([float(when) for *_, when in table]))
    known = user_table(
        model, ["u0", "u1"], [0, 3], np.zeros(2, int), [-np.inf] * 2,
        np.tile(model.kernels.initial, (2, 1)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("banks")
    single = FeatureBank.create(folder / "single", model, known)
    for row, user in enumerate(users):
        single.update(user, names[row], liked[row], time[row])
    batched = FeatureBank.create(folder / "batched", model, known)
    cuts = np.linspace(0, len(users), parts + 1).astype(int)
    for number, (low, high) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        part = slice(low, high)
        batched.update_many(users[part], names[part], liked[part], time[part])
        if number % 2 == 0:
            batched.commit()
            batched.close()
            batched = FeatureBank.open(folder / "batched", write=True)
    for user in {*users, "u0", "nobody"}:
        for left, right in zip(single.state_of(user), batched.state_of(user), strict=True):
            np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(single.look_up(user), batched.look_up(user))
    single.close()
    batched.close()


def test_a_reader_sees_commits_alone(full_bank, users, items):
    with FeatureBank.open(full_bank.folder) as reader:
        old = reader.look_up(users[0]).copy()
        state = reader.state_of(users[0])[0]
        for _ in range(30):
            full_bank.update(users[0], items[3], 0, 1e9)
        full_bank.update("new", items[3], 1, 1e9)
        assert not reader.refresh() and "new" not in reader
        np.testing.assert_array_equal(reader.look_up(users[0]), old)
        generation = full_bank.commit()
        assert reader.refresh() and reader.generation == generation
        assert "new" in reader and len(reader) == len(full_bank)
        np.testing.assert_array_equal(reader.look_up(users[0]), full_bank.look_up(users[0]))
        assert (reader.state_of(users[0])[0] != state).any()
        assert not reader.refresh()
        with pytest.raises(BankError, match="not open for writing"):
            reader.update(users[0], items[0])


def test_a_reader_sees_that_another_bank_took_the_place(full_bank, users, items, tmp_path):
    """A bank built anew begins with the same generation."""
    full_bank.commit()
    full_bank.close()
    other = tmp_path / "other"
    shutil.copytree(full_bank.folder, other)
    with FeatureBank.open(other, write=True) as bank:
        bank.update(users[0], items[3], 0, 1e9)
        bank.commit()
    shutil.copytree(full_bank.folder, tmp_path / "once")
    with FeatureBank.open(tmp_path / "once", write=True) as bank:
        bank.update("new", items[3], 1, 1e9)
        generation = bank.commit()
    with FeatureBank.open(other) as reader:
        assert reader.generation == generation and reader.is_current()
        other.rename(tmp_path / "old")
        (tmp_path / "once").rename(other)
        assert not reader.is_current() and reader.refresh() and "new" in reader
        assert reader.generation == generation


def test_a_reader_that_cannot_refresh_is_as_it_was(full_bank, users, monkeypatch):
    with FeatureBank.open(full_bank.folder) as reader:
        generation, n_users = reader.generation, len(reader)
        full_bank.update("new", "i1", 1, 1e9)
        full_bank.commit()
        with monkeypatch.context() as patched:
            # As where the bank is by now one of another version.
            patched.setattr(ProfileModel, "from_parts", Mock(side_effect=BankError("unknown")))
            with pytest.raises(BankError, match="unknown"):
                reader.refresh()
        assert (reader.generation, len(reader)) == (generation, n_users)
        assert not reader.is_current() and reader.refresh() and "new" in reader


def test_what_was_looked_up_stays_as_it_was(full_bank, users, items):
    first = full_bank.update(users[0], items[0], 1, 1e9)
    for answer in (first, full_bank.look_up(users[0]), full_bank.look_up("nobody")):
        answer[:] = -7  # the caller's own
    before, nobody = full_bank.look_up(users[0]), full_bank.look_up("nobody")
    assert (before >= 0).all() and (nobody >= 0).all()
    kept = before.copy()
    for number in range(40):
        full_bank.update(users[0], items[number % 7], number % 2, 1e9 + number)
    np.testing.assert_array_equal(before, kept)
    assert (full_bank.look_up(users[0]) != kept).any()


def test_items_are_given_as_strings(full_bank, users):
    for call in (
        lambda: full_bank.update(users[0], 3, 1, 1e9),
        lambda: full_bank.update_many([users[0]], [3], np.ones(1), np.full(1, 1e9)),
        lambda: full_bank.match(users[0], ["i1", 3]),
    ):
        with pytest.raises(BankError, match="item 3 is no string: give strings"):
            call()
    assert full_bank.match(users[0], ["i1", "unheard of"]).shape[0] == 2


def test_a_position_tells_where_a_stream_goes_on(full_bank, capsys):
    with FeatureBank.open(full_bank.folder) as reader:
        assert full_bank.position is reader.position is None
        full_bank.update("a", "i1", 1)
        assert full_bank.commit("topic:41") == 2 and full_bank.commit() == 2
        assert reader.refresh() and full_bank.position == reader.position == "topic:41"
        # It may move where no event has entered, and does not outlive events without one.
        assert full_bank.commit("topic:42") == 3 and full_bank.commit("topic:42") == 3
        assert reader.refresh() and reader.position == "topic:42"
        main(["bank", "info", str(full_bank.folder)])
        assert "generation 3, position topic:42" in capsys.readouterr().out
        with pytest.raises(BankError, match="position=43 must be text"):
            full_bank.commit(43)
        full_bank.update("a", "i1", 1)
        full_bank.commit()
        assert reader.refresh() and full_bank.position is reader.position is None


def segments(bank):
    """Rows of the base and of each delta on disk."""
    return [table.num_rows for table in store.read(bank.folder).users]


@pytest.mark.parametrize("reopen", [False, True])
def test_many_deltas_become_one(full_bank, users, items, reopen):
    """Whatever their number, small deltas never have the base written anew."""
    n = len(full_bank)
    for number in range(bank_module.MAX_DELTAS + 2):
        if reopen and number % 5 == 3:
            full_bank.close()
            full_bank = FeatureBank.open(full_bank.folder, write=True)
        # The users of every other commit have been in a delta before.
        full_bank.update_many(
            [users[number // 2], f"new{number}"], items[:2], [1, 0], np.full(2, 1e6 + number)
        )
        full_bank.commit()
        expected = [n, *[2] * (number + 1)]
        if number >= bank_module.MAX_DELTAS:
            expected = [n, 17 + 9, *[2] * (number - bank_module.MAX_DELTAS)]
        assert segments(full_bank) == expected
    with FeatureBank.open(full_bank.folder) as reader:
        assert reader.users() == full_bank.users()
        assert reader.table_of(reader.users()).equals(full_bank.table_of(reader.users()))
    full_bank.close()


def test_deltas_of_the_same_users_become_one(full_bank, users, items):
    few = users[: len(full_bank) // 3]
    for number in range(5):
        full_bank.update_many(few, [items[number]] * len(few), np.ones(len(few)))
        full_bank.commit()
        n = len(few)
        assert segments(full_bank)[1:] == [n] * [1, 2, 3, 1, 2][number]


def test_a_commit_of_most_users_is_a_new_base(full_bank, users, items, monkeypatch):
    monkeypatch.setattr(bank_module, "BATCH_ROWS", 37)
    for number in range(2):
        full_bank.update_many(users, [items[number]] * len(users), np.ones(len(users)))
        full_bank.commit()
        assert segments(full_bank) == [len(users)]
    # What has been in a delta of the base before is not of the next.
    full_bank.update(users[3], items[0], 1)
    full_bank.commit()
    assert segments(full_bank) == [len(users), 1]
    with FeatureBank.open(full_bank.folder) as reader:
        assert reader.users() == full_bank.users()
        np.testing.assert_array_equal(reader.look_up_many(users), full_bank.look_up_many(users))
        for user in users[::17]:
            assert reader.look_up(user).tolist() == full_bank.look_up(user).tolist()
            np.testing.assert_array_equal(reader.state_of(user)[0], full_bank.state_of(user)[0])


def test_unknown_users_have_the_profile_of_no_history(full_bank, inferred, items):
    assert full_bank.look_up("nobody").tolist() == [0] * len(full_bank.fields)
    assert (full_bank.match("nobody", items) == 0).all()
    many = full_bank.look_up_many(["nobody", full_bank.users()[0]])
    assert (many[0] == 0).all() and (many[1] > 0).all()


def test_late_events(full_bank, users, items):
    state = full_bank.state_of(users[0])[0]
    with pytest.raises(BankError, match="'u000' is earlier than .* with late 'drop' or 'apply'"):
        full_bank.update(users[0], items[0], 1, time=-5.0)
    batch = ([users[0], users[1]], [items[0]] * 2, [1, 1], [-5.0, 1e6])
    with pytest.raises(BankError, match="'u000' is earlier"):
        full_bank.update_many(*batch)
    np.testing.assert_array_equal(full_bank.state_of(users[0])[0], state)
    assert full_bank.update_many(*batch, late="drop") == 1
    np.testing.assert_array_equal(full_bank.state_of(users[0])[0], state)
    batch = ([users[0]], [items[0]], [1], [-5.0])
    assert full_bank.update_many(*batch, late="apply") == 1
    assert (full_bank.state_of(users[0])[0] != state).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["i1"], [2]), "liked is 2.0 in row 0"),
        ((["a", "b"], ["i1"], [1, 1]), "items has 1 rows, but users has 2"),
        ((["a"], ["i1"], [1], [np.nan]), "time is nan in row 0"),
        ((["a"], ["i1"], [1], ["2024-01-31"]), "time must hold numbers, .* '2024-01-31'"),
        ((["a"], ["i1"], [1], [DAY]), r"time must hold numbers, .* datetime"),
        ((["a"], np.array([N_ITEMS]), [1]), "item numbers must be from 0 to 79"),
    ],
)
def test_bad_batches_change_nothing(full_bank, arguments, message):
    with pytest.raises(BankError, match=message):
        full_bank.update_many(*arguments)
    assert "a" not in full_bank
    with pytest.raises(BankError, match="labels must be 0 or 1"):
        full_bank.update("a", "i1", 0.5)
    with pytest.raises(BankError, match="liked is missing for user 'a'"):
        full_bank.update("a", "i1")
    with pytest.raises(BankError, match="liked is missing: "):
        full_bank.update_many(["a"], ["i1"])
    with pytest.raises(BankError, match="items='i1' is a text"):
        full_bank.match("a", "i1")
    with pytest.raises(BankError, match="users='u1' is a text"):
        full_bank.look_up_many("u1")
    with pytest.raises(BankError, match="time=nan of user 'a' must be a finite number"):
        full_bank.update("a", "i1", 1, np.nan)
    with pytest.raises(BankError, match=r"time=datetime.* of user 'a' must be a finite number"):
        full_bank.update("a", "i1", 1, DAY)
    assert "a" not in full_bank


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bank: bank.look_up(["u196"]), r"user \['u196'\] is no string"),
        (lambda bank: bank.match("u000", [["i1"]]), r"item \['i1'\] is no string"),
        (lambda bank: bank.match("u000", np.array([["i1"]])), "item array.* is no string"),
        (lambda bank: bank.match("u000", np.array([[1]])), r"items has the shape \(1, 1\)"),
        (lambda bank: bank.update("u000", ["i1"], 1), r"item \['i1'\] is no string"),
        (lambda bank: bank.update("u000", "i1", np.array([1, 0])), "liked=array.*must be 0 or 1"),
        (lambda bank: bank.update("", "i1", 1), "user='' is empty: an event needs its user"),
        (lambda bank: bank.update("u000", "", 1), "item='' is empty: an event needs its item"),
        (lambda bank: bank.update_many(["a", ""], ["i1"] * 2, [1, 1]), "user in row 1 is empty"),
        (lambda bank: bank.update_many(["a"] * 2, ["i1", ""], [1, 1]), "item in row 1 is empty"),
        (lambda bank: bank.update_many(["a"], ["i1"], [1], 5.0), r"time has the shape \(\)"),
        (lambda bank: bank.update_many(["a"], ["i1"], [[1]]), r"liked has the shape \(1, 1\)"),
        (lambda bank: bank.update_many(["a"] * 2, ["i1"] * 2, [[1], [1, 0]]), "liked must be one"),
        (lambda bank: bank.update_many([["a"]], ["i1"], [1]), "users must be strings"),
        (lambda bank: bank.add_items([None], ["a film"]), "item in row 0 is null"),
        (lambda bank: bank.add_items([7777], ["a film"]), "items must be strings"),
        (lambda bank: bank.add_items(["7777", np.nan], ["a", "b"]), "items? .*(strings|null)"),
        (lambda bank: bank.add_items("7777", list("abcd")), "items='7777' is a text"),
        (lambda bank: bank.add_items([""], ["a film"]), "item in row 0 is empty"),
        (lambda bank: bank.add_items(["7777"], [np.nan]), "text of item '7777' is nan"),
        (lambda bank: bank.refit(sample=0), "sample=0 is fewer users"),
    ],
)
def test_what_is_of_the_wrong_kind_changes_nothing(full_bank, call, message):
    users, items = full_bank.users(), full_bank.model.items
    state, _, _ = full_bank.state_of("u000")
    with pytest.raises(BankError, match=message):
        call(full_bank)
    assert full_bank.users() == users and full_bank.model.items == items
    np.testing.assert_array_equal(full_bank.state_of("u000")[0], state)


def test_a_closed_bank_takes_no_events(full_bank, users, items):
    full_bank.close()
    for write in (
        lambda: full_bank.update(users[0], items[0], 1),
        lambda: full_bank.update_many(users[:1], items[:1], np.ones(1)),
        full_bank.commit,
    ):
        with pytest.raises(BankError, match="is not open for writing"):
            write()
    full_bank.close()


@pytest.fixture
def dated_bank(tmp_path, inferred, world, users, items, bank_settings):
    """Of events with timestamps in seconds."""
    behaviours = dataclasses.replace(world.behaviours, time=1.7e9 + world.behaviours.time)
    with bank_of_profiles(
        tmp_path / "dated", inferred, behaviours, users, items, bank_settings
    ) as bank:
        yield bank


def test_times_in_another_unit_are_refused(dated_bank, users, items):
    seconds = 1.8e9
    dated_bank.update("new", items[0], 1, seconds)
    before = dated_bank.state_of("new")[0]
    with pytest.raises(BankError, match="of user 'new' is not in the unit of the events .* 17"):
        dated_bank.update("new", items[0], 1, seconds * 1000)
    with pytest.raises(BankError, match="time=1800000.0 in row 0 is not in the unit"):
        dated_bank.update_many(["newer", "new"], items[:2], [1, 0], [seconds / 1000, seconds + 1])
    with pytest.raises(BankError, match="time=1800000000000.0 in row 1 is not in the unit"):
        dated_bank.update_many(["newer", "new"], items[:2], [1, 0], [seconds, seconds * 1000])
    assert "newer" not in dated_bank
    np.testing.assert_array_equal(dated_bank.state_of("new")[0], before)
    dated_bank.commit()
    dated_bank.close()
    with FeatureBank.open(dated_bank.folder, write=True) as bank:
        with pytest.raises(BankError, match="not in the unit"):
            bank.update("newest", items[0], 1, seconds * 1000)
        bank.update("newest", items[0], 1, seconds + 2)


def test_wrong_times_of_one_user_stop_no_other(dated_bank, users, items):
    """Each is within what a unit may be of the one before."""
    late = 1.7e9 * 99
    dated_bank.update("wrong", items[0], 1, late)
    with pytest.raises(BankError, match="not in the unit"):
        dated_bank.update("wrong", items[0], 1, late * 99)
    with pytest.raises(BankError, match="not in the unit"):
        dated_bank.update_many(["wrong"], items[:1], [1], [late * 99])
    dated_bank.commit()
    for write in (True, False):  # again, from the files
        dated_bank.update(users[0], items[0], 1, 1.8e9)
        assert dated_bank.update_many(users[1:3], items[:2], [1, 0], [1.8e9, 1.8e9 + 1]) == 2
        if write:
            dated_bank.close()
            dated_bank = FeatureBank.open(dated_bank.folder, write=True)
    dated_bank.close()


def test_what_was_fitted_is_in_its_unit(dated_bank, users, items):
    """Times that count from the first event of a file are no timestamps, however late it ends."""
    dated_bank.model = dataclasses.replace(dated_bank.model, times=(0.0, 2e8))
    dated_bank.update("new", items[0], 1, 1.0)
    assert dated_bank.model.times == (0.0, 2e8)


def test_refit_keeps_the_meaning_of_codes(full_bank, users, model):
    before = {user: full_bank.look_up(user).copy() for user in users}
    report = full_bank.refit(sample=250)
    moved = {(row["user"], row["field"]): row for row in report.users.to_pylist()}
    for user in users:
        for c, name in enumerate(full_bank.fields):
            new = int(full_bank.look_up(user)[c])
            assert (new != before[user][c]) == ((user, name) in moved)
            if (user, name) in moved:
                assert moved[user, name]["old"] == before[user][c]
                assert moved[user, name]["new"] == new
    assert set(report.moved) == set(full_bank.fields)
    # Traits have no codebook; codewords were fitted anew, and most users keep their codes.
    assert report.moved["uip_leniency_5"] == 0
    assert 0 < report.moved["uip_company"] < 0.4
    full_bank.commit()
    with FeatureBank.open(full_bank.folder) as reader:
        np.testing.assert_array_equal(reader.look_up_many(users), full_bank.look_up_many(users))
        left, right = reader.model.encoder.arrays(), full_bank.model.encoder.arrays()
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name])
        assert reader.model.encoder.fields == model.encoder.fields


def test_refit_says_what_it_has_too_few_of(full_bank):
    with pytest.raises(BankError, match=r"sample=2 is fewer users than .* has codes"):
        full_bank.refit(sample=2)


def test_refit_gives_new_users_the_new_priors_mode(world, items, users, bank_settings, tmp_path):
    settings = dataclasses.replace(bank_settings, empty="prior")
    inferred = infer(world.behaviours, None, settings)
    with bank_of_profiles(
        tmp_path / "prior", inferred, world.behaviours, users, items, settings
    ) as bank:
        column = bank.fields.index("uip_company")
        bank.refit()
        fields = bank.model.encoder.profile_fields
        number = int(np.flatnonzero(fields.column[:-1] == column)[0])
        n_codes, first = int(fields.size[number]), int(fields.first[number])
        heaviest = np.argmax(fields.numbers[first : first + n_codes]) + 1
        assert bank.look_up("somebody new")[column] == heaviest


def test_new_items_without_an_lm(full_bank, users):
    known = full_bank.match(users[0], ["i1", "i2"])
    full_bank.add_items(["new", "newer"], ["A new film", None])
    np.testing.assert_array_equal(full_bank.match(users[0], ["i1", "i2"]), known)
    assert full_bank.model.numbers(["new", "newer", "i1"]).tolist() == [80, 81, 1]
    full_bank.update(users[0], "new", 1, 1e9)
    full_bank.commit()
    with FeatureBank.open(full_bank.folder) as reader:
        assert reader.model.items == full_bank.model.items
        np.testing.assert_array_equal(
            reader.match(users[0], ["i1", "new"]), full_bank.match(users[0], ["i1", "new"])
        )
    with pytest.raises(BankError, match="item 'i1' is in the catalogue already"):
        full_bank.add_items(["i1"], ["text"])
    for texts in ([], ["a", "b"]):
        with pytest.raises(BankError, match="1 items have [02] texts"):
            full_bank.add_items(["newest"], texts)


def test_an_item_that_is_no_string_leaves_the_bank_as_it_was(full_bank, users):
    with pytest.raises(BankError, match="1"):
        full_bank.update("somebody new", 1, 1, time=1e9)
    assert "somebody new" not in full_bank
    with pytest.raises(BankError, match="1"):
        full_bank.update(users[0], 1, 1, time=1e9)
    full_bank.update(users[0], "i1", 1, time=1e8)  # would be late after the refused event


def test_bytes_per_user(full_bank):
    size = full_bank.bytes_per_user()
    # leniency: S and N at two half-lives
    assert size["leniency"] == 4 * 2 * 2
    state, _, _ = full_bank.state_of("nobody")
    assert sum(size.values()) == state.nbytes + 4 * len(full_bank.fields) + 18


def test_a_model_of_another_version_is_said(full_bank, model):
    metadata = model.metadata()
    del metadata["implicit"]
    full_bank._writer.commit(metadata=metadata)
    with pytest.raises(BankError, match="'implicit'.*another version"):
        FeatureBank.open(full_bank.folder)


KILLED = """
import os, signal, sys
from recbole_uip.bank.bank import FeatureBank
bank = FeatureBank.open(sys.argv[1], write=True)
bank.update("u000", "i1", 1, 2e9)
bank.commit()
bank.update("u001", "i1", 1, 2e9)
print("ready", flush=True)
signal.pause()
"""


def test_a_killed_process_loses_the_uncommitted_batch_alone(full_bank, users):
    folder = full_bank.folder
    before = {user: full_bank.state_of(user) for user in users[:2]}
    full_bank.close()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(BankError, match=str(process.pid)):
        FeatureBank.open(folder, write=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with FeatureBank.open(folder, write=True) as bank:
        assert bank.state_of("u000")[1] == before["u000"][1] + 1
        np.testing.assert_array_equal(bank.state_of("u001")[0], before["u001"][0])


def test_new_users_are_spread_over_folds():
    counts = np.bincount(folds_of(map(str, range(1000)), 4, 0))
    assert counts.min() > 200


def test_an_empty_bank_grows(tmp_path, model):
    table = user_table(
        model, [], np.zeros(0, int), np.zeros(0, int), np.zeros(0),
        np.zeros((0, len(model.kernels.initial)), np.float32),
    )  # fmt: skip
    with FeatureBank.create(tmp_path / "bank", model, table) as bank:
        assert len(bank) == 0
        bank.update_many(["a", "b", "a"], ["i1", "i2", "i3"], [1, 0, 1], [1.0, 1.0, 2.0])
        bank.commit()
    with FeatureBank.open(tmp_path / "bank") as bank:
        assert len(bank) == 2 and bank.state_of("a")[1] == 2


@pytest.mark.parametrize("sort_by_counting", [True, False])
def test_threads_chunks_and_arrow_change_nothing(
    full_bank, world, users, items, monkeypatch, sort_by_counting
):
    """Batches on threads, over a base of many chunks, against single updates."""
    monkeypatch.setattr(bank_module, "BATCH_ROWS", 37)
    full_bank._writer.commit(users=full_bank._merged(), replace_users=True)
    full_bank.close()
    rng, n = np.random.default_rng(0), 900
    names = [*users, *(f"new{number}" for number in range(40))]
    tokens = [names[number] for number in rng.integers(0, len(names), n)]
    met = [[*items, "unknown"][number] for number in rng.integers(0, N_ITEMS + 1, n)]
    liked, time = rng.integers(0, 2, n), rng.integers(100, 120, n).astype(float)
    with FeatureBank.open(full_bank.folder, write=True) as single:
        assert len(single._base.codes) == 9
        for row in np.argsort(time, kind="stable"):
            single.update(tokens[row], met[row], liked[row], time[row])
        expected = single.look_up_many(names)
        states = {user: single.state_of(user) for user in names}
    for module, name in (
        (users_module, "PARALLEL_EVENTS"),
        (bank_module, "MANY_ITEMS"),
        (bank_module, "ENCODED_ROWS"),
    ):
        monkeypatch.setattr(module, name, 10)
    if not sort_by_counting:
        counting = users_module._counting_order
        monkeypatch.setattr(
            users_module, "_counting_order", lambda rows, _: np.argsort(rows, kind="stable")
        )
        rows = rng.integers(0, 50, 1000)
        np.testing.assert_array_equal(counting(rows, 50), np.argsort(rows, kind="stable"))
    with FeatureBank.open(full_bank.folder, write=True) as batched:
        before = batched.look_up_many(pa.array(names))
        np.testing.assert_array_equal(before[5], batched.look_up(names[5]))
        batched.update_many(pa.chunked_array([tokens[:100], tokens[100:]]), met, liked, time)
        np.testing.assert_array_equal(batched.look_up_many(pa.array(names)), expected)
        np.testing.assert_array_equal(batched.look_up_many(names), expected)
        for user in names:
            for left, right in zip(batched.state_of(user), states[user], strict=True):
                np.testing.assert_array_equal(left, right)
        batched.commit()
    with FeatureBank.open(full_bank.folder) as reader:
        np.testing.assert_array_equal(reader.look_up_many(names), expected)


def test_a_refused_batch_adds_nobody(full_bank, users, items):
    known = full_bank.users()
    with pytest.raises(BankError, match="'u000' is earlier"):
        full_bank.update_many(["new", users[0]], items[1:3], [1, 1], [1e6, -5.0])
    assert full_bank.users() == known
    assert full_bank.update_many(["new", users[0]], items[1:3], [1, 1], [1e6, -5.0], late="drop")
    assert full_bank.users() == [*known, "new"]
    with pytest.raises(BankError, match="users must be strings"):
        full_bank.update_many([1], ["i1"], [1])
    assert full_bank.update_many([], [], []) == full_bank.update_many([], [], [], []) == 0
    assert full_bank.update_many([users[0]], [items[0]], [1], [-5.0], late="drop") == 0


def test_tables_of_unknown_users(full_bank, users):
    assert full_bank.table_of(users[3:5])["user"].to_pylist() == users[3:5]
    with pytest.raises(BankError, match="user 'nobody' is not in the bank"):
        full_bank.table_of([users[0], "nobody"])


def test_a_user_twice_in_the_base_is_said(tmp_path, model):
    table = user_table(
        model, ["a", "b", "a"], [0] * 3, np.zeros(3, int), [-np.inf] * 3,
        np.tile(model.kernels.initial, (3, 1)),
    )  # fmt: skip
    with pytest.raises(BankError, match="user 'a' is given twice"):
        FeatureBank.create(tmp_path / "bank", model, table)


def test_the_manifest_tells_prompts_apart(model):
    assert model.metadata()["prompt_fingerprint"] is None
    found = set()
    for name, ending in (("interests", " good"), ("tastes", " good"), ("interests", " fine")):
        settings = UIPSettings.from_dict(
            {
                "uip_facets": {"interests": {"prompt": name}},
                "uip_item_text": "{title}",
                "uip_endings": {"liked": ending, "disliked": " bad"},
            }
        )
        changed = dataclasses.replace(model, lm_fingerprint="an LM", settings=settings)
        found.add(changed.metadata()["prompt_fingerprint"])
    assert len(found) == 3 and None not in found

"""A bank from an event file, against the same events in memory."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from recbole_uip import cli
from recbole_uip.bank import build
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.build import bank_of_events
from recbole_uip.bank.events import EventColumns, EventFile
from recbole_uip.bank.store import BankError, Writer
from recbole_uip.settings import SettingsError

COLUMNS = EventColumns("user_id", "item_id", time="timestamp", rating="rating", threshold=4)


@pytest.fixture
def event_file(tmp_path, world, users, items):
    behaviours = world.behaviours
    table = pd.DataFrame(
        {
            "user_id": [users[user] for user in behaviours.user],
            "item_id": [items[item] for item in behaviours.item],
            "rating": np.where(behaviours.liked == 1, 5, 2),
            "timestamp": behaviours.time,
        }
    )
    path = tmp_path / "events.csv"
    table.to_csv(path, index=False)
    with EventFile(path, COLUMNS, memory="500MB") as events:
        yield events


def test_states_are_those_of_streaming(
    tmp_path, event_file, bank_settings, world, users, items, monkeypatch
):
    monkeypatch.setattr(build, "BLOCK_EVENTS", 1000)
    behaviours = world.behaviours
    with bank_of_events(tmp_path / "bank", event_file, bank_settings) as bank:
        assert sorted(bank.users()) == users
        assert bank.model.items == ["[PAD]", *sorted(items)]
        (rate,) = bank.model.kernels.rate[:, bank.model.numbers(items)]
        expected = np.bincount(behaviours.item, behaviours.liked) / np.bincount(behaviours.item)
        assert np.corrcoef(rate, expected)[0, 1] > 0.99
        order = np.argsort(behaviours.time, kind="stable")
        kept = {user: bank.state_of(user) for user in users}
        codes = bank.look_up_many(users)
        # The same events one by one, from nothing, under other names of the same fold.
        model = bank.model
        empty = bank.folder.parent / "empty"
        table = build.user_table(
            model, users, [kept[user][2] for user in users], np.zeros(300, int),
            np.full(300, -np.inf), np.tile(model.kernels.initial, (300, 1)),
        )  # fmt: skip
    with FeatureBank.create(empty, model, table) as streamed:
        for row in order:
            streamed.update(
                users[behaviours.user[row]], items[behaviours.item[row]], behaviours.liked[row]
            )
        np.testing.assert_array_equal(streamed.look_up_many(users), codes)
        for user in users:
            np.testing.assert_array_equal(streamed.state_of(user)[0], kept[user][0])
            assert streamed.state_of(user)[1:] == kept[user][1:]


def test_a_sample_is_enough_to_fit(tmp_path, event_file, bank_settings, users, monkeypatch):
    monkeypatch.setattr(build, "FIT_USERS", 150)
    with bank_of_events(tmp_path / "bank", event_file, bank_settings) as bank:
        assert sorted(bank.users()) == users
        assert len(np.unique(bank.look_up_many(users), axis=0)) > 20


def test_the_command_line(tmp_path, event_file, capsys):
    config = tmp_path / "facets.yaml"
    config.write_text(
        "uip_facets: {leniency: {weight: contrast, source: constant, half_life: [5, inf]}}"
    )
    events = str(event_file.files[0])
    command = ["bank", "build", str(tmp_path / "bank"), "--events", events, "--rating", "rating"]
    command += ["--threshold", "4", "--config_files", str(config)]
    assert cli.main([*command, "--uip_item_text={title} ({genre})"]) == 0
    assert "users: 300; items: 80" in capsys.readouterr().out
    assert cli.main(["bank", "info", str(tmp_path / "bank")]) == 0
    assert "uip_leniency_5: bin" in capsys.readouterr().out
    with FeatureBank.open(tmp_path / "bank") as bank:
        assert bank.model.settings.item_text == "{title} ({genre})"
    assert cli.main([*command, "--items", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: there is no such file" in capsys.readouterr().err
    assert cli.main([*command, "--items", str(config)]) == 2
    assert "uip_item_text does not say" in capsys.readouterr().err


def test_a_rule_of_time_that_events_cannot_bear_leaves_the_bank_as_it_was(
    tmp_path, event_file, capsys
):
    config = tmp_path / "facets.yaml"
    config.write_text("uip_facets: {leniency: {weight: contrast, source: constant}}")
    command = ["bank", "build", str(tmp_path / "bank"), "--events", str(event_file.files[0])]
    command += ["--rating", "rating", "--threshold", "4", "--config_files", str(config)]
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    assert "of 300 users, will be replaced" in capsys.readouterr().err
    untimed = [*command, "--time", "none"]
    for setting, words in (
        ("--uip_refresh=1h", "uip_refresh=3600s needs timestamps"),
        ("--uip_time=point_in_time", "uip_time=point_in_time needs timestamps"),
    ):
        assert cli.main([*untimed, setting]) == 2
        assert words in capsys.readouterr().err
        with FeatureBank.open(tmp_path / "bank") as bank:
            assert bank.model.settings.time == "point_in_time"
    assert cli.main([*command, "--uip_time=static"]) == 0
    with FeatureBank.open(tmp_path / "bank") as bank:
        assert bank.model.settings.time == "static"


def test_a_model_that_could_not_be_read_again_is_not_written(tmp_path, event_file, bank_settings):
    with bank_of_events(tmp_path / "bank", event_file, bank_settings) as bank:
        users, model = bank.table_of(bank.users()), bank.model
    settings = dataclasses.replace(model.settings, time="static", refresh=3600.0)
    broken = dataclasses.replace(model, settings=settings)
    with pytest.raises(SettingsError, match="uip_refresh=3600s has no meaning"):
        FeatureBank.create(tmp_path / "bank", broken, users)
    with FeatureBank.open(tmp_path / "bank") as bank:
        assert bank.table_of(bank.users()).equals(users)


def test_a_bank_that_cannot_be_opened_can_be_built_again(tmp_path, event_file, bank_settings):
    with bank_of_events(tmp_path / "bank", event_file, bank_settings) as bank:
        metadata, users = bank.model.metadata(), bank.users()
    metadata["settings"] |= {"uip_time": "static", "uip_refresh": 3600.0}
    writer = Writer(tmp_path / "bank")
    writer.commit(metadata=metadata)
    writer.close()
    with pytest.raises(SettingsError, match="uip_refresh=3600s has no meaning"):
        FeatureBank.open(tmp_path / "bank")
    with bank_of_events(tmp_path / "bank", event_file, bank_settings) as bank:
        assert bank.users() == users


def test_what_cannot_be_replaced_is_refused_before_any_work(
    tmp_path, event_file, bank_settings, monkeypatch
):
    folder = tmp_path / "bank"
    with bank_of_events(folder, event_file, bank_settings):
        monkeypatch.setattr(EventFile, "item_counts", lambda self: pytest.fail("it was read"))
        with pytest.raises(BankError, match="a bank has one writer"):
            bank_of_events(folder, event_file, bank_settings)
    with pytest.raises(BankError, match="manifest.json/bank cannot be a folder"):
        bank_of_events(folder / "manifest.json" / "bank", event_file, bank_settings)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(BankError, match=r"manifest\.json is damaged.* delete and rebuild"):
        bank_of_events(folder, event_file, bank_settings)


@pytest.mark.parametrize(("threshold", "label"), [("9", 0), ("0", 1)])
def test_labels_that_are_all_alike_are_said(tmp_path, event_file, capsys, threshold, label):
    command = ["bank", "build", str(tmp_path / "bank"), "--events", str(event_file.files[0])]
    command += ["--rating", "rating", "--threshold", threshold]
    assert cli.main([*command, "--uip_facets={leniency: {source: constant}}"]) == 2
    assert f"labels of all events are {label}, so nothing" in capsys.readouterr().err

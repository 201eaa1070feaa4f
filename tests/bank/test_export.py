"""Exports read back by what they are for: stock RecBole, an as-of join, and PEFT.

Feast and Redis themselves are in test_feast.py and test_redis.py.
"""

import argparse
import codecs
import dataclasses
import json
import logging
import sys

import numpy as np
import pandas as pd
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recbole.data
import torch
import yaml
from recbole.config import Config
from recbole.data.utils import data_preparation as stock_data_preparation
from recbole.trainer import Trainer

from recbole_uip import lm
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.build import bank_of_profiles
from recbole_uip.bank.export import (
    atomic_files,
    feature_rows,
    feature_store_parquet,
    soft_moves,
    soft_prompts,
    soft_tokens,
    timestamps,
)
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import BankError
from recbole_uip.behaviours import TRAIN, folds_of
from recbole_uip.bridge import compat
from recbole_uip.bridge.preparation import create_dataset, data_preparation
from recbole_uip.bridge.run import write_profiles
from recbole_uip.cli.bank_export import add_export
from recbole_uip.em.codebook import unpack
from recbole_uip.lm import prompt as prompts
from recbole_uip.profiles import infer, raw_scores
from recbole_uip.settings import SettingsError, UIPSettings

from ..bridge.conftest import Atomic, make_items, make_rows
from ..em.conftest import make_world
from ..lm.conftest import ENDINGS, WORDS, make_model, save_lm
from ..test_profiles import FACETS

SPLITS = np.array(["train", "valid", "test"])


def write_parquet(path, profiles, behaviours, users, items):
    """What bridge.run.write_profiles writes, of plain arrays."""
    columns = {
        "user_id": [users[user] for user in behaviours.user],
        "item_id": [items[item] for item in behaviours.item],
    }
    if behaviours.time is not None:
        columns["timestamp"] = behaviours.time
    columns["split"] = pa.array(SPLITS[behaviours.split]).dictionary_encode()
    if behaviours.liked is not None:
        columns["label"] = behaviours.liked.astype(np.int8)
    for field in profiles.fields:
        columns[field.name] = field.values.astype(np.min_scalar_type(field.size))
    pq.write_table(pa.table(columns), path)
    return path


class Run:
    """The artefacts of a small main job."""

    def __init__(self, folder, n_users=60, behaviours=None, **settings):
        folder.mkdir(exist_ok=True)
        self.behaviours = behaviours or make_world(n_users=n_users).behaviours
        self.settings = UIPSettings.from_dict(
            {"uip_facets": FACETS, "uip_history": "observed", **settings}
        )
        self.users = [f"u{number:03d}" for number in range(n_users)]
        fold = folds_of(self.users, self.settings.user_folds, self.settings.seed)
        self.profiles = infer(self.behaviours, None, self.settings, fold)
        self.items = [f"i{number}" for number in range(self.behaviours.n_items)]
        self.folder, self.path = folder, folder / "profiles.parquet"
        write_parquet(self.path, self.profiles, self.behaviours, self.users, self.items)
        bank_of_profiles(
            folder / "bank", self.profiles, self.behaviours, self.users, self.items, self.settings
        ).close()

    def bank(self):
        return FeatureBank.open(self.folder / "bank")


@pytest.fixture(scope="session")
def main_job(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


# --- RecBole -------------------------------------------------------------------------------


class StockConfig(Config):
    """RecBole's own Config, whose reach for names that numpy 2 lacks is our one replacement."""

    def compatibility_settings(self):
        compat.install()


@pytest.fixture
def labelled(tmp_path, rng):
    rows = make_rows(rng)
    # Tokens that a careless writer would break.
    names = {"u3": 'u "3"', "u4": "O'Neill, jr"}
    rows = [[names.get(user, user), *rest] for user, *rest in rows]
    atomic = Atomic(tmp_path, rows=rows, items=make_items())
    for row in atomic.rows:
        row[0] = row[0].replace('"', '""').join('""') if '"' in row[0] else row[0]
    return atomic.write()


def stock(monkeypatch, path, name, **settings):
    """Train splits of the exported dataset through RecBole's own classes."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    config = StockConfig(
        "DeepFM",
        name,
        [str(path)],
        {"epochs": 1, "use_gpu": False, "gpu_id": "", "show_progress": False, **settings},
    )
    config["checkpoint_dir"] = str(path.parent / "saved")
    dataset = recbole.data.create_dataset(config)
    assert type(dataset) is recbole.data.dataset.Dataset
    return config, dataset, stock_data_preparation(config, dataset)


def raw_rows(dataset, fields):
    """Values of a split's rows as they stand in the file; "" for [PAD]."""
    columns = []
    for name in fields:
        values = dataset.inter_feat[name].numpy()
        if name in dataset.field2id_token:
            values = dataset.id2token(name, values)
            values = np.where(values == "[PAD]", "", values)
        else:
            values = [f"{value:g}" for value in values]
        columns.append(np.asarray(values, dtype=str))
    return sorted(zip(*columns, strict=True))


@pytest.mark.filterwarnings("ignore::pandas.errors.ChainedAssignmentError")
def test_stock_recbole_reads_the_splits_and_trains(labelled, tmp_path, monkeypatch):
    """RecBole 1.2.1's own Dataset, dataloaders, DeepFM and Trainer.

    On numpy 2 they need the stand-ins of bridge.compat, and no other of our code. Sequences
    (here the genre) are beyond them on pandas 3, with or without profiles, and not loaded.
    """
    config = labelled.config("DeepFM")
    dataset = create_dataset(config)
    data_preparation(config, dataset)
    profiles = tmp_path / "profiles.parquet"
    write_profiles(profiles, dataset)
    path = atomic_files(
        profiles,
        labelled.folder / labelled.name,
        "small-uip",
        tmp_path / "out",
        {"load_col": {"user": ["user_id", "age"]}},
    )
    assert path == tmp_path / "out" / "small-uip" / "small-uip.yaml"
    for kind in ("user", "item"):
        copy = path.with_suffix(f".{kind}").read_bytes()
        assert copy == (labelled.folder / labelled.name / f"{labelled.name}.{kind}").read_bytes()

    config, whole, loaders = stock(monkeypatch, path, "small-uip")
    table = pq.read_table(profiles).to_pandas()
    fields = [name for name in table if name.startswith("uip_")]
    assert fields == [field.name for field in dataset.profiles.fields]
    for split, loader in zip(SPLITS, loaders, strict=True):
        rows = table[table["split"] == split]
        columns = [rows["user_id"], rows["item_id"], rows["label"]]
        columns += [rows[name].replace(0, "") for name in fields]
        expected = sorted(zip(*(column.astype(str) for column in columns), strict=True))
        names = ["user_id", "item_id", "label", *fields]
        assert raw_rows(loader.dataset, names) == expected
    # The check means something: there are users without history, and they are [PAD].
    assert (table[fields] == 0).any(axis=None)
    assert any('"' in user for user in table["user_id"])
    for name in fields:
        assert whole.num(name) == 1 + table.loc[table[name] > 0, name].nunique()

    model = config.model_class(config, loaders[0].dataset)
    assert set(fields) <= set(model.token_field_names)
    trainer = Trainer(config, model)
    _, best = trainer.fit(loaders[0], loaders[1], saved=False, show_progress=False)
    assert 0 < best["auc"] < 1
    result = trainer.evaluate(loaders[2], load_best_model=False, show_progress=False)
    assert np.isfinite(result["logloss"])


@pytest.mark.filterwarnings("ignore::pandas.errors.ChainedAssignmentError")
def test_without_labels_match_fields_stay_out(tmp_path, monkeypatch, caplog):
    behaviours = dataclasses.replace(make_world(n_users=60).behaviours, liked=None)
    facets = {"likes": {**FACETS["likes"], "match": {"rank": 3, "bins": 8}}}
    run = Run(tmp_path / "run", behaviours=behaviours, uip_facets=facets)
    (tmp_path / "plain").mkdir()
    with caplog.at_level(logging.WARNING):
        path = atomic_files(run.path, tmp_path / "plain", "implicit", tmp_path)
    assert "uip_likes_match" in caplog.text
    settings = yaml.safe_load(path.read_text())
    assert settings["load_col"] == {"inter": ["user_id", "item_id", "timestamp", "uip_likes"]}
    _, _, loaders = stock(monkeypatch, path, "implicit")
    batch = next(iter(loaders[0]))
    assert set(batch["label"].tolist()) == {0.0, 1.0}


def test_the_command_takes_the_runs_settings(main_job, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.item").write_text("item_id:token\ttitle:token_seq\tgenre:token\ni1\ta b\tx\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "profiles.parquet").write_bytes(main_job.path.read_bytes())
    with pytest.raises(SettingsError, match=r"results\.json.*is not there: give --data"):
        command("export", "atomic", "--run", run, "--name", "n", "--output", tmp_path / "out")
    config = {
        "data_path": str(tmp_path / "moved"),
        "load_col": {"inter": ["user_id"], "item": ["item_id", "genre"]},
        "normalize_all": True,
        "numerical_features": ["price", "age"],
        "discretization": {"age": {"method": "ED"}, "genre": {"method": "LD"}},
        "train_neg_sample_args": {"distribution": "none"},
        "eval_args": {"mode": {"valid": "labeled", "test": "labeled"}, "order": "TO"},
    }
    (run / "results.json").write_text(json.dumps({"models": {"FM": {"uip": {"config": config}}}}))
    arguments = ["export", "atomic", "--run", run, "--name", "n", "--output", tmp_path / "out"]
    with pytest.raises(BankError, match="moved' is no folder"):
        command(*arguments)
    command(*arguments, "--data", data)
    written = yaml.safe_load((tmp_path / "out/n/n.yaml").read_text())
    assert written["load_col"]["item"] == ["item_id", "genre"]
    assert "user" not in written["load_col"]
    # Columns that are not in the files would stop RecBole.
    assert written["numerical_features"] == []
    assert written["discretization"] == {"genre": {"method": "LD"}}
    assert written["normalize_all"] is True and written["train_neg_sample_args"] is None
    assert written["eval_args"]["mode"] == {"valid": "labeled", "test": "labeled"}
    assert str(tmp_path / "out/n") in capsys.readouterr().out
    # Without --data, where the run says that its dataset is.
    data.rename(tmp_path / "moved")
    command(*arguments[:-1], tmp_path / "again")
    again = yaml.safe_load((tmp_path / "again/n/n.yaml").read_text())
    assert again == {**written, "data_path": str(tmp_path / "again")}


def test_a_byte_order_mark_comes_once(main_job, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_uip.bank.export_atomic.BATCH_ROWS", 50)
    (tmp_path / "data").mkdir()
    path = atomic_files(
        main_job.path, tmp_path / "data", "marked", tmp_path, {"encoding": "utf-8-sig"}
    )
    for split in SPLITS:
        content = (path.parent / f"marked.{split}.inter").read_bytes()
        assert content.startswith(codecs.BOM_UTF8) and content.count(codecs.BOM_UTF8) == 1


def command(*arguments):
    """As recbole-uip bank ... would call it."""
    parser = argparse.ArgumentParser()
    add_export(parser.add_subparsers())
    namespace, overrides = parser.parse_known_args([str(argument) for argument in arguments])
    namespace.function(namespace, overrides, "")


@pytest.mark.parametrize("columns", [["user_id"], ["user_id", "item_id", "split", "label", "age"]])
def test_other_parquet_is_refused(columns, tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({name: ["a"] for name in columns}), path)
    with pytest.raises(BankError, match="no profiles.parquet"):
        atomic_files(path, tmp_path, "x", tmp_path / "out")
    with pytest.raises(BankError, match="cannot be read"):
        atomic_files(tmp_path / "missing.parquet", tmp_path, "x", tmp_path / "out")


def test_the_dataset_is_not_overwritten(main_job, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(BankError, match="own folder"):
        atomic_files(main_job.path, tmp_path / "data", "data", tmp_path)
    with pytest.raises(BankError, match="is no folder"):
        atomic_files(main_job.path, tmp_path / "nowhere", "data", tmp_path)


@pytest.mark.parametrize("name", ["../x", "..", "", "a/b", "/x"])
def test_a_name_leads_nowhere_else(main_job, tmp_path, name):
    (tmp_path / "data").mkdir()
    with pytest.raises(BankError, match=f"name='{name}' must be the name of a folder in output"):
        atomic_files(main_job.path, tmp_path / "data", name, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_output_that_cannot_be_is_refused_before_any_work(main_job, one, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match="file/new cannot be a folder"):
        atomic_files(main_job.path, tmp_path / "data", "new", tmp_path / "file")
    with main_job.bank() as bank:
        with pytest.raises(BankError, match="data is a folder: name the Parquet file"):
            feature_store_parquet(main_job.path, bank, tmp_path / "data")
        with pytest.raises(BankError, match="file cannot be a folder"):
            feature_store_parquet(main_job.path, bank, tmp_path / "file" / "f.parquet")
    with pytest.raises(BankError, match="file cannot be a folder"):
        soft_prompts(one[0], tmp_path / "file", "taste", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


# --- feature store -------------------------------------------------------------------------


def as_of(features, user, time):
    """What Feast's point-in-time join gives: the latest row not after ``time``."""
    rows = pd.DataFrame(
        {"row": np.arange(len(user)), "user_id": user, "event_timestamp": timestamps(time)}
    )
    rows["event_timestamp"] = rows["event_timestamp"].dt.tz_localize("UTC")
    joined = pd.merge_asof(
        rows.sort_values("event_timestamp", kind="stable"),
        features.sort_values("event_timestamp", kind="stable"),
        on="event_timestamp",
        by="user_id",
        allow_exact_matches=True,
    )
    return joined.sort_values("row")


def shifted(behaviours, how):
    """Times as they come: in days, in fractions of a second, of this century, before 1970."""
    time = behaviours.time
    if how == "fractions":
        time = 1_600_000_000 + time / 7 + 1e-6
    elif how == "early":
        time = time - 30
    return dataclasses.replace(behaviours, time=time)


@pytest.mark.parametrize(
    ("history", "refresh", "how", "empty"),
    [
        ("observed", "0s", "days", "pad"),
        ("train", "0s", "days", "prior"),
        ("observed", "3s", "early", "pad"),
        ("observed", "0s", "fractions", "prior"),
    ],
)
def test_an_as_of_join_gives_the_point_in_time_codes(history, refresh, how, empty, tmp_path):
    behaviours = shifted(make_world(n_users=60).behaviours, how)
    run = Run(
        tmp_path / "run",
        behaviours=behaviours,
        uip_history=history,
        uip_refresh=refresh,
        uip_empty=empty,
    )
    with run.bank() as bank:
        rows = feature_store_parquet(run.path, bank, tmp_path / "features.parquet")
        table = pq.read_table(tmp_path / "features.parquet")
        features = table.to_pandas()
        assert rows == len(features)
        users = [run.users[user] for user in behaviours.user]
        joined = as_of(features, users, behaviours.time)
        fields = {field.name: field.values for field in run.profiles.fields}
        for name in bank.fields:
            np.testing.assert_array_equal(joined[name], fields[name])
        latest = features.groupby("user_id").last()
        np.testing.assert_array_equal(
            latest[list(bank.fields)], bank.look_up_many(latest.index.tolist())
        )
        assert set(latest.index) == set(bank.users())
        # One row for each change: fewer than one for each time, and no two alike in a row.
        assert len(features) < len(set(zip(users, behaviours.time, strict=True))) + len(latest)
        same_user = features["user_id"].eq(features["user_id"].shift())
        repeated = features[list(bank.fields)].eq(features[list(bank.fields)].shift()).all(axis=1)
        assert not (same_user & repeated).any()
        assert list(features)[2:] == list(bank.fields)
    assert table.schema.field("event_timestamp").type == pa.timestamp("us", tz="UTC")


def test_blocks_change_nothing(main_job, monkeypatch):
    with main_job.bank() as bank:
        whole = feature_rows(main_job.path, bank).read_all()
        monkeypatch.setattr("recbole_uip.em.states.BLOCK_ROWS", 101)
        blocks = feature_rows(main_job.path, bank).read_all()
    assert blocks.num_rows == whole.num_rows and blocks.equals(whole)


def test_the_command_writes_the_same(main_job, tmp_path, capsys):
    results = main_job.folder / "results.json"
    with pytest.raises(SettingsError, match="no .*results.json: name the output folder"):
        command("export", "feast", "--run", main_job.folder, "--output", tmp_path / "f.parquet")
    told = {"dataset": "d", "seed": 1, "models": {}, "artefacts": {}}
    results.write_text(json.dumps(told))
    with pytest.raises(SettingsError, match="has written no bank"):
        command("export", "feast", "--run", main_job.folder, "--output", tmp_path / "f.parquet")
    results.write_text(json.dumps({**told, "artefacts": {"bank": "bank"}}))
    command("export", "feast", "--run", main_job.folder, "--output", tmp_path / "f.parquet")
    with main_job.bank() as bank:
        rows = feature_rows(main_job.path, bank).read_all()
    assert pq.read_table(tmp_path / "f.parquet").equals(rows)
    assert f"{rows.num_rows} rows" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="--epochs"):
        command("export", "feast", "--run", "x", "--output", "y", "--epochs=3")


def test_a_random_split_is_said_to_differ(tmp_path, caplog, rng):
    behaviours = make_world(n_users=60).behaviours
    behaviours = dataclasses.replace(behaviours, split=rng.permutation(behaviours.split))
    run = Run(tmp_path / "run", behaviours=behaviours)
    with run.bank() as bank, caplog.at_level(logging.WARNING):
        features = feature_rows(run.path, bank).read_all().to_pandas()
    assert "not later than training rows" in caplog.text
    held_out = behaviours.split != TRAIN
    users = [run.users[user] for user in behaviours.user[held_out]]
    joined = as_of(features, users, behaviours.time[held_out])
    for field in run.profiles.fields:
        if field.kind != "match":
            np.testing.assert_array_equal(joined[field.name], field.values[held_out])


def test_what_has_no_times_is_refused(main_job, tmp_path):
    behaviours = main_job.behaviours
    static = Run(tmp_path / "static", behaviours=behaviours, uip_time="static", uip_history="train")
    with static.bank() as bank, pytest.raises(BankError, match="static"):
        feature_rows(static.path, bank)
    with main_job.bank() as bank:
        table = pq.read_table(main_job.path)
        pq.write_table(table.drop_columns(["uip_company"]), tmp_path / "other.parquet")
        with pytest.raises(BankError, match="uip_company"):
            feature_rows(tmp_path / "other.parquet", bank)
        for time, message in ((behaviours.time * 1e12, "no time in s"), (1e-9, "same micro")):
            column = pa.array(time * behaviours.time if message[0] == "s" else time)
            at = table.schema.names.index("timestamp")
            pq.write_table(table.set_column(at, "timestamp", column), tmp_path / "t.parquet")
            with pytest.raises(BankError, match=message):
                feature_rows(tmp_path / "t.parquet", bank)
    np.testing.assert_array_equal(timestamps([1.5], "ms"), timestamps([1500.0], "us"))
    with pytest.raises(BankError, match="unit='h'"):
        timestamps([1.0], "h")


# --- PEFT ----------------------------------------------------------------------------------

N_ITEMS = 40


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_lm(folder)
    return folder


def lm_model(tiny_lm, cache, facets, implicit=False, **keys):
    """A model whose item vectors come from the tiny LM, the items' texts, and its settings."""
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(WORDS[7:-2], 4)) for _ in range(N_ITEMS)]
    behaviours = make_world(n_users=80, n_items=N_ITEMS).behaviours
    if implicit:
        behaviours = dataclasses.replace(behaviours, liked=None)
    settings = UIPSettings.from_dict(
        {
            "uip_facets": facets,
            "uip_history": "observed",
            "uip_lm": str(tiny_lm),
            "uip_lm_dtype": "float32",
            "uip_item_text": "{title}",
            "uip_cache": str(cache),
            **keys,
        }
    )
    items = [f"i{number}" for number in range(N_ITEMS)]
    profiles = infer(behaviours, texts, settings)
    return ProfileModel.from_profiles(profiles, items, settings, implicit), texts


ONE = {"taste": {"prompt": "taste", "source": "lm", "weight": "all", "codes": 4, "rank": 3}}
THREE = {
    "leniency": {"source": "constant", "weight": "contrast", "bins": 4},
    "interests": {
        "prompt": "interests", "source": "lm", "weight": "positive", "codes": 4, "rank": 3,
        "levels": 2, "half_life": [10, "inf"],
    },
    "taste": {
        "prompt": "taste in movies", "source": "lm", "weight": "contrast", "codes": 5, "rank": 4,
        "match": {"rank": 6, "bins": 4},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def one(tiny_lm, tmp_path_factory):
    return lm_model(tiny_lm, tmp_path_factory.mktemp("cache"), ONE, implicit=True)


@pytest.fixture(scope="module")
def three(tiny_lm, tmp_path_factory):
    return lm_model(tiny_lm, tmp_path_factory.mktemp("cache"), THREE)


def prompt_of(model, backbone):
    names = [facet.prompt for facet in model.settings.facets if facet.source == "lm"]
    return prompts.build(backbone, names)


def log_likelihoods(model, backbone, theta, texts):
    ids = prompts.tokenize(backbone.tokenizer, texts)
    theta = torch.from_numpy(np.asarray(theta, np.float32))
    with torch.no_grad():
        return prompts.log_likelihood(backbone, prompt_of(model, backbone), theta, ids).numpy()


@pytest.mark.parametrize("which", ["one", "three"])
def test_moving_along_a_code_raises_the_texts_it_lifts(which, request):
    """The finite difference of log p(text) is the lift, by the catalogue's own vectors."""
    model, texts = request.getfixturevalue(which)
    settings = model.settings
    backbone = lm.load(settings.lm, settings.cache)
    theta0 = model.tables["lm_theta0"]
    names = [facet.prompt for facet in settings.facets if facet.source == "lm"]
    endings = None if model.implicit else settings.endings
    scored = lm.score(texts, names, endings, settings.lm, settings.cache)
    move = soft_tokens(model, "taste", 2).astype(float) - theta0
    step = 0.02 / np.linalg.norm(move)
    up, down = (
        log_likelihoods(model, backbone, soft_tokens(model, "taste", 2, scale), texts)
        for scale in (step, -step)
    )
    rise = (up - down) / (2 * step)
    lift = scored.text.reshape(len(texts), -1) @ move.reshape(-1)
    assert np.corrcoef(rise, lift)[0, 1] > 0.999
    np.testing.assert_allclose(rise, lift, rtol=0.05, atol=0.02 * np.abs(lift).max())
    if which == "one":
        # Without feedback scores, the lift is all that the catalogue's vectors say of an item.
        encoder = model.encoder
        centred = raw_scores(scored) - model.tables["lm_mean"]
        vectors = encoder.vectors("taste")
        np.testing.assert_allclose(
            centred @ model.tables["lm_map.taste"][1], vectors[1, : len(texts)], atol=1e-3
        )
        (level,) = unpack(encoder.profile_fields.numbers, 4, 3)
        deviation = level.codewords[1] - encoder.kernels.priors[:3]
        by_vectors = vectors.mean(axis=0)[:, :3] @ deviation
        highest, lowest = by_vectors.argmax(), by_vectors.argmin()
        assert rise[highest] > rise[lowest]
        np.testing.assert_allclose(
            lift - lift.mean(), by_vectors - by_vectors.mean(), atol=1e-3 * np.ptp(by_vectors)
        )


def test_levels_and_half_lives(three):
    model, _ = three
    theta0 = model.tables["lm_theta0"]
    np.testing.assert_array_equal(soft_tokens(model, "taste", 0), theta0)
    first, second, both = (
        soft_tokens(model, "uip_interests_10", code) - theta0 for code in (3, (0, 2), (3, 2))
    )
    mean = soft_tokens(model, "uip_interests_10", (3, 0)) - first - theta0
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    assert np.abs(both - first).max() > 0 and np.abs(second).max() > 0
    with pytest.raises(BankError, match="uip_interests_10, uip_interests_inf"):
        soft_tokens(model, "interests", 1)
    for facet in ("leniency", "nonsense"):
        with pytest.raises(BankError, match="uip_taste"):
            soft_tokens(model, facet, 1)
    for code in (6, -1, (1, 1)):
        with pytest.raises(BankError, match="from 1 to 5"):
            soft_tokens(model, "taste", code)
    for scale in (np.nan, -np.inf):
        with pytest.raises(BankError, match=f"scale={scale} must be a finite number"):
            soft_tokens(model, "taste", 1, scale)


@pytest.mark.parametrize("which", ["one", "three"])
def test_peft_loads_the_prompt_and_generates(which, request, tmp_path, tiny_lm):
    model, texts = request.getfixturevalue(which)
    folder = soft_prompts(model, tmp_path / "adapter", "taste", 3, scale=0.5)
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, peft.PromptTuningConfig)
    assert config.base_model_name_or_path == str(tiny_lm)

    backbone = lm.load(model.settings.lm, model.settings.cache)
    prompt = prompt_of(model, backbone)
    theta = torch.from_numpy(soft_tokens(model, "taste", 3, 0.5))
    prefix = prompts.inputs(backbone, prompt, theta, [[]])["inputs_embeds"][0]
    adapted = peft.PeftModel.from_pretrained(make_model(), str(folder))
    assert (config.num_virtual_tokens, config.token_dim) == prefix.shape
    torch.testing.assert_close(adapted.get_prompt(1)[0], prefix.detach(), rtol=0, atol=0)

    ids = prompts.tokenize(backbone.tokenizer, texts[:3])
    start = torch.tensor([ids[0][:2]])
    tokens = adapted.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        min_new_tokens=4,
        max_new_tokens=4,
        do_sample=False,
    )
    assert tokens.shape[1] == 6
    if which == "one":
        # One facet has nobody to be hidden from, so PEFT's likelihood is ours.
        ours = prompts.logits(backbone, prompt, theta, ids)[:, 1:]
        theirs = adapted(input_ids=torch.tensor(ids)).logits[:, -ours.shape[1] :]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


PREFIXED = {
    **THREE,
    "interests": {**THREE["interests"], "source": "prefix", "half_life": "inf"},
    "taste": {**THREE["taste"], "source": "prefix"},
}


@pytest.fixture(scope="module")
def prefixed(tiny_lm, tmp_path_factory):
    endings = dict(zip(("liked", "disliked"), ENDINGS, strict=True))
    return lm_model(tiny_lm, tmp_path_factory.mktemp("cache"), PREFIXED, uip_endings=endings)


@pytest.mark.parametrize(("facet", "scores"), [("interests", "text"), ("taste", "feedback")])
def test_a_code_in_the_last_layers_raises_what_it_lifts(prefixed, facet, scores):
    """The finite difference of what the LM says is the lift, by the facet's own kind of score."""
    model, texts = prefixed
    settings = model.settings
    backbone = lm.load(settings.lm, settings.cache)
    names, _, endings = model.settings.prefix_prompt(model.endings)
    prefix = lm.Prefix(backbone, lm.build(backbone, names, endings))
    ids = prompts.text_ids(backbone, texts)
    move = soft_moves(model, facet, 2, scores=scores)
    other = int(scores == "text")  # the facet of the other kind
    assert np.abs(move[1 - other]).max() > 0 and not move[other].any()
    assert np.abs(soft_moves(model, facet, 2, scores=None)).max(axis=1).min() > 0
    step = 0.02 / np.linalg.norm(move)
    up, down = (
        lm.prefix_likelihoods(prefix, prefix.theta0 + torch.from_numpy(scale * move), ids)
        for scale in (step, -step)
    )
    kind = int(scores == "feedback")
    rise = (up[kind] - down[kind]).numpy() / (2 * step)
    found = lm.score_prefix(texts, names, [False, True], endings, settings.lm, settings.cache)
    lift = found.vectors @ move.ravel()
    np.testing.assert_allclose(rise, lift, rtol=0.05, atol=0.02 * np.abs(lift).max())
    assert np.ptp(lift) > 0


def test_peft_holds_a_prefix_and_its_mask(prefixed, tmp_path):
    model, texts = prefixed
    folder = soft_prompts(model, tmp_path / "adapter", "taste", 3, scale=0.5)
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, peft.PrefixTuningConfig)
    backbone = lm.load(model.settings.lm, model.settings.cache)
    names, _, endings = model.settings.prefix_prompt(model.endings)
    prefix = lm.Prefix(backbone, lm.build(backbone, names, endings))
    theta = prefix.theta0 + torch.from_numpy(soft_moves(model, "taste", 3, 0.5, None))
    adapted = peft.PeftModel.from_pretrained(make_model(), str(folder))
    for row in prompts.text_ids(backbone, texts[:3]):
        text = torch.tensor([[*prefix.bridge, *row]])
        ours = prefix.logits(prefix.run(theta.float()[None], [row]))
        theirs = adapted(input_ids=text, attention_mask=torch.ones_like(text)).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    still = prefix.logits(prefix.run(prefix.theta0[None], [row]))
    assert (ours - still).abs().max() > 1e-2  # the code says something
    tokens = adapted.generate(
        input_ids=text, attention_mask=torch.ones_like(text), min_new_tokens=3, max_new_tokens=3
    )
    assert tokens.shape[1] == text.shape[1] + 3
    with pytest.raises(BankError, match="soft_prompts writes them"):
        soft_tokens(model, "taste", 3)


def test_another_lm_is_refused(one, tmp_path):
    model, _ = one
    backbone = lm.load(model.settings.lm, model.settings.cache)
    with pytest.raises(BankError, match="is not the one that scored"):
        soft_prompts(
            model,
            tmp_path,
            "taste",
            1,
            backbone=dataclasses.replace(backbone, fingerprint="0" * 64),
        )
    assert not list(tmp_path.iterdir())

"""The outside check: what FuxiCTR is given, what is made of its answer, and FuxiCTR itself.

FuxiCTR and what it needs take 2 GB in an environment of their own (see INSTALL in
driver.py), so the test that runs it is asked for: RECBOLE_UIP_FUXICTR=<path> names a
Python that has it. In the other tests a function stands in its place.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from recbole_uip import cli
from recbole_uip.bridge.metrics import gauc
from recbole_uip.bridge.preparation import create_dataset
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.evidence.outside.check import DRIVER, format_outside, outside_check, write_inputs
from recbole_uip.evidence.outside.finished import MODEL, read_run
from recbole_uip.settings import SettingsError

from ..bridge.conftest import Atomic, make_rows

SPLITS = ("train", "valid", "test")
FACETS = {
    "leniency": {"source": "constant", "weight": "contrast", "bins": 6, "half_life": [5, "inf"]},
    "company": {
        "source": "collaborative",
        "rank": 4,
        "codes": 4,
        "match": {"rank": 4, "bins": 6, "half_life": ["inf"]},
    },
}
ARMS = {
    "plain": {"facets": [], "user_id": "keep"},
    "uip": {"facets": "all", "user_id": "drop"},
    "shuffled": {"facets": "all", "user_id": "drop", "control": "shuffled"},
    "means": {"facets": ["company"], "user_id": "drop", "values": "means"},
}
BUDGET = {
    "epochs": 2,
    "stopping_step": 1,
    "train_batch_size": 128,
    "learning_rate": 0.02,
    "weight_decay": 0.001,
    "embedding_size": 6,
    "mlp_hidden_size": [16, 8],
    "dropout_prob": 0.1,
}


class Dataset(Atomic):
    """Side features of every kind, with gaps, and a field of the interactions."""

    def write(self):
        path = self.folder / self.name
        path.mkdir()
        self._table(
            path / f"{self.name}.inter",
            (*self.columns, "device:token"),
            [[*row, "phone" if n % 3 else "desk"] for n, row in enumerate(self.rows)],
        )
        users = sorted({row[0] for row in self.rows}, reverse=True)
        # "01" and "1" are two tokens; u0 has no age and u1 no row.
        ages = ["01", "1", "35"]
        people = [
            [user, ages[n % 3] if user != "u0" else "", n]
            for n, user in enumerate(users)
            if user != "u1"
        ]
        self._table(path / f"{self.name}.user", ("user_id:token", "age:token", "zip:token"), people)
        # i0 has neither genre nor year, i1 no row. Years are not spread evenly over rows.
        films = [
            [f"i{n}", "Drama Comedy" if n % 2 else "Horror", 1960 + n * n, "0.5 1.5"]
            for n in range(14, 1, -1)
        ]
        films.append(["i0", "", "", "0 0"])
        header = ("item_id:token", "genre:token_seq", "release.year:float", "vector:float_seq")
        self._table(path / f"{self.name}.item", header, films)
        return self

    def settings(self):
        """RecBole's settings of a small run."""
        own = {
            "load_col": {
                "inter": ["user_id", "item_id", "rating", "timestamp", "device"],
                "user": ["user_id", "age"],
                "item": ["item_id", "genre", "release.year"],
            },
            "numerical_features": ["release.year"],
            "normalize_all": True,
            # Else RecBole drops the rows of users and items that have none in a side file.
            "filter_inter_by_user_or_item": False,
            "uip_facets": FACETS,
            "uip_arms": ARMS,
            **BUDGET,
        }
        return {**self.config().variable_config_dict, **own}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rows = make_rows(np.random.default_rng(20))
    return Dataset(tmp_path_factory.mktemp("data"), "small", rows).write()


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    run_recbole_uip(MODEL, "small", config={**dataset.settings(), "uip_output": str(folder)})
    return folder


@pytest.fixture(scope="module")
def inputs(finished, tmp_path_factory):
    """The run, and the folder of each arm that FuxiCTR is given."""
    run = read_run(finished)
    return run, write_inputs(run, tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def changed(finished, tmp_path):
    """A copy of the run whose results a function has changed."""

    def change(function):
        results = json.loads((finished / "results.json").read_text())
        function(results)
        shutil.copy(finished / "profiles.parquet", tmp_path)
        (tmp_path / "results.json").write_text(json.dumps(results))
        return tmp_path

    return change


def config_of(results):
    return results["models"][MODEL]["plain"]["config"]


# --- What FuxiCTR is given -----------------------------------------------------------------


def test_arms_have_their_own_fields_and_no_more(inputs):
    run, folders = inputs
    side = {"f_age", "f_genre", "f_release:year"}
    profile = {f"f_{name}" for name in run.layout.fields}
    assert len(profile) == 4
    expected = {
        "plain": {"label", "f_user_id", "f_item_id"} | side,
        "uip": {"label", "f_item_id"} | side | profile,
    }
    assert list(folders) == list(expected)
    for arm, folder in folders.items():
        for split in SPLITS:
            assert set(pd.read_parquet(folder / f"{split}.parquet")) == expected[arm]
        config = yaml.safe_load((folder / "dataset_config.yaml").read_text())["arm"]
        features = {each["name"]: each for each in config["feature_cols"]}
        assert {"label", *features} == expected[arm]
        assert all(each["active"] for each in features.values())
        assert features["f_age"]["type"] == "categorical"
        assert (features["f_genre"]["type"], features["f_genre"]["splitter"]) == ("sequence", " ")
        assert features["f_release:year"]["type"] == "numeric"
        assert features["f_release:year"]["normalizer"] == "MinMaxScaler"
        assert config["label_col"]["name"] == "label"
        for split in SPLITS:
            assert config[f"{split}_data"] == str(folder / f"{split}.parquet")
    assert run.left_out == (
        "arm shuffled (control shuffled: not in profiles.parquet)",
        "arm means (values means: not in profiles.parquet)",
        "field device (of interactions: not in profiles.parquet)",
    )


def test_rows_labels_and_profiles_are_those_of_the_split(inputs, finished):
    run, folders = inputs
    profiles = pd.read_parquet(finished / "profiles.parquet")
    assert profiles["split"].value_counts().to_dict() == {"train": 320, "valid": 40, "test": 40}
    for split in SPLITS:
        # Of one split, in order, and of no other.
        rows = profiles[profiles["split"] == split]
        plain = pd.read_parquet(folders["plain"] / f"{split}.parquet")
        uip = pd.read_parquet(folders["uip"] / f"{split}.parquet")
        assert plain["f_user_id"].tolist() == rows["user_id"].tolist()
        assert plain["f_item_id"].tolist() == rows["item_id"].tolist()
        assert uip["f_item_id"].tolist() == rows["item_id"].tolist()
        assert plain["label"].tolist() == uip["label"].tolist() == rows["label"].tolist()
        for name in run.layout.fields:
            assert uip[f"f_{name}"].tolist() == rows[name].astype(str).tolist()


def test_side_features_are_what_recbole_makes_of_them(inputs, dataset):
    _, folders = inputs
    settings = {**dataset.settings(), "normalize_all": False, "uip_facets": {}, "uip_arms": None}
    data = create_dataset(dataset.config(MODEL, **settings))
    age = data.id2token("age", data.user_feat["age"].to_numpy())
    genre = [
        " ".join(token for token in data.id2token("genre", ids) if token != "[PAD]")
        for ids in data.item_feat["genre"]
    ]
    # RecBole keeps a number and the index of its vector.
    year = np.stack(data.item_feat["release.year"])[:, 0]
    seen = {"age": set(), "genre": set(), "year": set()}
    for split in SPLITS:
        rows = pd.read_parquet(folders["plain"] / f"{split}.parquet")
        user = data.token2id("user_id", rows["f_user_id"].to_numpy())
        item = data.token2id("item_id", rows["f_item_id"].to_numpy())
        assert rows["f_age"].tolist() == age[user].tolist()
        assert rows["f_genre"].tolist() == [genre[n] for n in item]
        np.testing.assert_allclose(rows["f_release:year"], year[item], rtol=1e-6)
        seen["age"] |= set(rows["f_age"])
        seen["genre"] |= set(rows["f_genre"])
        seen["year"] |= set(rows["f_release:year"])
    assert seen["age"] == {"[PAD]", "01", "1", "35"}
    assert seen["genre"] == {"", "Horror", "Drama Comedy"}
    # Of the items that have a year, each once.
    assert np.mean([1960 + n * n for n in range(2, 15)]) in seen["year"]


def test_the_budget_is_that_of_the_run(inputs):
    run, folders = inputs
    assert run.budget == BUDGET
    for folder in folders.values():
        config = yaml.safe_load((folder / "model_config.yaml").read_text())["DeepFM"]
        assert config["epochs"] == 2
        # FuxiCTR stops after so many epochs without a better AUC, RecBole after more.
        assert config["early_stop_patience"] == 1 + 1
        assert config["batch_size"] == 128
        assert config["learning_rate"] == 0.02
        assert config["embedding_regularizer"] == config["net_regularizer"] == 0.001
        assert config["embedding_dim"] == 6
        assert config["hidden_units"] == [16, 8]
        assert config["net_dropout"] == 0.1
        assert (config["monitor"], config["monitor_mode"]) == ("AUC", "max")
        assert (config["optimizer"], config["gpu"]) == ("adam", -1)


def test_a_run_without_side_features_needs_no_dataset(changed):
    def drop(results):
        for arm in results["models"][MODEL].values():
            arm["fields"] = [
                name for name in arm["fields"] if name.startswith(("user_id", "item_id", "uip_"))
            ]
        config_of(results)["data_path"] = "gone"

    run = read_run(changed(drop))
    assert run.arms["plain"] == ("user_id", "item_id")
    assert not any(name.startswith("field") for name in run.left_out)


# --- What is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda results: results["models"].update(FM=results["models"].pop(MODEL)),
            "has no DeepFM but FM",
        ),
        (
            lambda results: results["models"][MODEL].pop("plain"),
            "has the arms uip, shuffled, means: the check needs plain to compare with",
        ),
        (
            lambda results: results["models"][MODEL].pop("uip"),
            "has the arms plain, shuffled, means: the check needs plain and another one whose",
        ),
        (
            lambda results: config_of(results)["eval_args"]["mode"].update(test="uni10"),
            "has labels only of sampled candidates",
        ),
        (
            lambda results: config_of(results).update(learner="sgd"),
            "was trained with learner=sgd",
        ),
        (
            lambda results: config_of(results).update(data_path="gone"),
            "the run's dataset is not in gone, and its arms read age, device, genre, release.year",
        ),
        (
            lambda results: results["models"][MODEL]["uip"]["fields"].append("vector"),
            r"FuxiCTR has no features like vector \(float_seq\)",
        ),
        (lambda results: results.pop("seed"), "results.json is no results.json of recbole-uip run"),
    ],
)
def test_runs_that_cannot_be_checked(changed, change, words):
    with pytest.raises(SettingsError, match=words):
        read_run(changed(change))


def test_side_files_that_are_not_there(finished, dataset, tmp_path):
    shutil.copy(dataset.folder / "small" / "small.inter", tmp_path)
    shutil.copy(dataset.folder / "small" / "small.user", tmp_path)
    with pytest.raises(SettingsError, match="read genre, release.year, which no file in"):
        read_run(finished, tmp_path)
    shutil.copy(dataset.folder / "small" / "small.item", tmp_path)
    run = read_run(finished, tmp_path)
    assert run.table == read_run(finished).table


def test_a_folder_that_is_none_of_a_run(tmp_path):
    with pytest.raises(SettingsError, match="no .*results.json: name the output folder"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(SettingsError, match="is no results.json of recbole-uip run"):
        read_run(tmp_path)


def test_a_split_of_one_label(changed):
    folder = changed(lambda results: None)
    table = pd.read_parquet(folder / "profiles.parquet")
    table.loc[table["split"] == "test", "label"] = 1
    table.to_parquet(folder / "profiles.parquet")
    with pytest.raises(SettingsError, match="the test split has no rows of one of the two labels"):
        read_run(folder)


def test_a_python_without_fuxictr(finished, tmp_path):
    # An environment of nothing but the standard library.
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    empty.chmod(0o755)
    with pytest.raises(SettingsError, match="no FuxiCTR that works .*No module.*pip install"):
        outside_check(finished, empty)
    with pytest.raises(SettingsError, match="cannot be run .*no-python.*-m venv"):
        outside_check(finished, tmp_path / "no-python")


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_listed_once(finished, seeds):
    with pytest.raises(SettingsError, match="at least one seed, each once"):
        outside_check(finished, "unused", seeds)


def test_the_driver_imports_nothing_of_the_package():
    imported = set()
    for node in ast.walk(ast.parse(DRIVER.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    allowed = {*sys.stdlib_module_names, "fuxictr", "numpy", "torch"}
    assert {name.partition(".")[0] for name in imported} <= allowed
    assert "fuxictr.preprocess" in imported


# --- What is made of its answer ------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """Has a function stand in for FuxiCTR, whose scores favour the liked.

    With profiles they do the more so where ``sign`` is 1, and the less where it is -1.
    """

    def stand_in(sign):
        def run(line, capture_output, text):
            assert line[:3] == ["its-python", "-I", str(DRIVER)]
            if len(line) == 3:
                versions = json.dumps({"fuxictr": "0.0", "torch": "1.0"})
                return subprocess.CompletedProcess(line, 0, versions, "")
            folder, seed = Path(line[3]), int(line[4])
            if seed == 13:
                return subprocess.CompletedProcess(line, 1, "", "no luck")
            result, scores = {"seconds": 1.0, "epochs": 2, "parameters": 3, "versions": {}}, {}
            for split in ("valid", "test"):
                rows = pd.read_parquet(folder / f"{split}.parquet")
                gain = sign * ("f_user_id" not in rows)
                scores[split] = score_of(rows["label"].to_numpy(), gain, seed)
                result[split] = {"auc": 0.7 + gain / 10, "logloss": 0.4}
            np.savez(folder / "scores.npz", **scores)
            (folder / "result.json").write_text(json.dumps(result))
            return subprocess.CompletedProcess(line, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return "its-python"

    return stand_in


def score_of(label, gain, seed):
    return label * (1.0 + gain) + np.random.default_rng(seed).normal(size=len(label))


def test_both_libraries_stand_side_by_side(finished, stand_in):
    run = json.loads((finished / "results.json").read_text())
    results = outside_check(finished, stand_in(1), seeds=[3, 4])
    json.dumps(results, allow_nan=False)
    ours, *theirs = results["runs"]
    assert [each["seed"] for each in results["runs"]] == [2020, 3, 4]
    (name,) = ours["models"]
    assert name.startswith("DeepFM, RecBole 1.2")
    assert list(ours["models"][name]) == ["plain", "uip"]
    for arm, outcome in ours["models"][name].items():
        assert outcome["test"] == run["models"][MODEL][arm]["test"]
    profiles = pd.read_parquet(finished / "profiles.parquet")
    rows = profiles[profiles["split"] == "test"]
    label, user = rows["label"].to_numpy(), pd.factorize(rows["user_id"])[0]
    for each in theirs:
        arms = each["models"]["DeepFM, FuxiCTR 0.0"]
        for gain, outcome in enumerate(arms.values()):
            score = score_of(label, gain, each["seed"])
            assert outcome["test"] == {
                "auc": pytest.approx(0.7 + gain / 10),
                "logloss": 0.4,
                "gauc": pytest.approx(gauc(user, label, score)),
                "list_auc": None,  # no two rows of a user have one time
            }
        assert "f_user_id" not in arms["uip"]["fields"]
        assert "user_id" in arms["plain"]["fields"]
    assert results["rows"] == {"train": 320, "valid": 40, "test": 40}
    assert results["versions"]["fuxictr"] == "0.0"
    table = format_outside(results)
    assert "| DeepFM, FuxiCTR 0.0 | uip | 2 | 0.8000 ± 0.0000 | 0.4000 ± 0.0000 |" in table
    assert "320 train, 40 valid, 40 test" in table
    assert "learning_rate 0.02" in table
    assert "left out: arm shuffled" in table


@pytest.mark.parametrize("sign", [1, -1])
def test_signs_are_compared_by_metric(changed, stand_in, sign):
    def set_figures(results):
        for arm, auc in (("plain", 0.6), ("uip", 0.65)):
            results["models"][MODEL][arm]["test"].update(auc=auc, logloss=auc)

    results = outside_check(changed(set_figures), stand_in(sign))
    # The stand-in's LogLoss is that of plain, which is no gain.
    assert results["same_sign"] == {"uip": {"auc": sign == 1, "logloss": False}}
    last = format_outside(results).splitlines()[-1]
    if sign == 1:
        assert "the same sign in auc, NOT the same sign in logloss" in last
    else:
        assert last.endswith("RecBole: NOT the same sign in auc and logloss")


def test_a_metric_that_there_is_not(changed, stand_in):
    def drop(results):
        for arm in results["models"][MODEL].values():
            arm["test"]["gauc"] = None

    results = outside_check(changed(drop), stand_in(1))
    assert (
        results["same_sign"]
        == outside_check(changed(lambda results: None), stand_in(1))["same_sign"]
    )
    assert "| nan |" in format_outside(results)


def test_what_fuxictr_says_is_passed_on(finished, stand_in):
    with pytest.raises(RuntimeError, match="FuxiCTR failed:\nno luck"):
        outside_check(finished, stand_in(1), seeds=[13])


def test_command(finished, stand_in, tmp_path, capsys):
    line = ["outside", str(finished), f"--python={stand_in(1)}", "--seeds=5"]
    assert cli.main([*line, f"--json={tmp_path / 'out.json'}"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert format_outside(results) == capsys.readouterr().out.rstrip("\n")
    assert results["command"].startswith(f"recbole-uip outside {finished}")
    assert results["runs"][1]["seed"] == 5
    for more, words in (("--seeds=1;2", "--seeds=1;2"), ("--epochs=3", "'--epochs=3'")):
        assert cli.main([*line, more]) == 2
        assert words in capsys.readouterr().err


# --- FuxiCTR itself ------------------------------------------------------------------------


@pytest.mark.fuxictr
def test_fuxictr_trains_on_what_it_is_given(inputs, finished):
    python = os.environ.get("RECBOLE_UIP_FUXICTR")
    if not python:
        pytest.skip("RECBOLE_UIP_FUXICTR=<a Python that has FuxiCTR> runs it")
    run, folders = inputs
    results = outside_check(finished, python, seeds=[7])
    arms = results["runs"][1]["models"][f"DeepFM, FuxiCTR {results['versions']['fuxictr']}"]
    for arm, folder in folders.items():
        line = [python, "-I", str(DRIVER), str(folder), "7"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        outcome = json.loads((folder / "result.json").read_text())
        assert outcome["epochs"] == 2
        # Its figures are those of its scores and our labels: the rows kept their order.
        with np.load(folder / "scores.npz") as scores:
            for split in ("valid", "test"):
                label = pd.read_parquet(folder / f"{split}.parquet")["label"]
                assert outcome[split]["auc"] == pytest.approx(roc_auc_score(label, scores[split]))
                assert outcome[split]["logloss"] == pytest.approx(log_loss(label, scores[split]))
                # The same seed gives the same figures.
                assert arms[arm][split].items() > outcome[split].items()
        # It knows the tokens of training rows, and no others.
        train = pd.read_parquet(folder / "train.parquet")
        known = json.loads((folder / "encoded" / "arm" / "feature_vocab.json").read_text())
        assert set(known) == set(train) - {"label", "f_release:year"}
        weights = 1
        for name, tokens in known.items():
            words = set(" ".join(train[name]).split()) if "genre" in name else set(train[name])
            assert set(tokens) == words | {"__PAD__", "__OOV__"}
            weights += len(tokens) * (6 + 1)
        # A DeepFM: a vector and a weight a token or number, a bias, and the hidden layers.
        weights += 6 + 1
        n_fields = len(known) + 1
        weights += (n_fields * 6 + 1) * 16 + (16 + 1) * 8 + 8 + 1
        assert outcome["parameters"] == weights

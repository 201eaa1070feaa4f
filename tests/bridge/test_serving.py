"""A served model gives what RecBole's trainer predicted, and something sane for the unknown."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from fastapi.testclient import TestClient

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.service import BankService, create_app
from recbole_uip.bank.users import user_table
from recbole_uip.bridge import run as run_module
from recbole_uip.bridge import served_model
from recbole_uip.bridge.config import context_models
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.bridge.serving import Scorer, _float_feature, _sequences, _spread
from recbole_uip.settings import SettingsError

from .conftest import Atomic, make_items, make_rows

SOME = ("DeepFM", "DCN", "AutoInt", "FM", "DSSM", "KD_DAGFM")
ARMS = {
    "plain": {"facets": [], "user_id": "keep"},
    "uip": {"facets": "all", "user_id": "drop"},
    "both": {"facets": "all", "user_id": "keep"},
}


def train(atomic, output, models, **more):
    """Run, and return the test predictions of each model and arm."""
    external = dict(atomic.config(**more).variable_config_dict)
    external["uip_output"] = str(output)
    external.setdefault("uip_arms", ARMS)
    predictions = {}
    original = run_module.train_arm

    def spy(config, dataset, arm, checkpoints):
        outcome, predicted = original(config, dataset, arm, checkpoints)
        predictions[f"{config['model']}-{arm.name}"] = predicted["test"]
        return outcome, predicted

    run_module.train_arm = spy
    try:
        results = run_recbole_uip(",".join(models), atomic.name, config=external)
    finally:
        run_module.train_arm = original
    return predictions, results


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    rows = make_rows(np.random.default_rng(20))
    atomic = Atomic(folder, rows=rows, items=make_items()).write()
    predictions, results = train(atomic, folder / "out", context_models())
    return folder / "out", predictions, results


@pytest.fixture
def output(small_run):
    return small_run[0]


@pytest.fixture(scope="module")
def table(small_run):
    return pd.read_parquet(small_run[0] / "profiles.parquet")


def profiles_of(table, scorer):
    names = [*scorer._codes, *scorer._matches]
    return {name: table[name].to_numpy(np.int64) for name in names}


@pytest.mark.parametrize("model", context_models())
@pytest.mark.parametrize("arm", ARMS)
def test_scores_of_test_rows_are_the_trainers(small_run, table, model, arm):
    output, predictions, _ = small_run
    predicted = predictions[f"{model}-{arm}"]
    scorer = Scorer.load(output, model, arm)
    assert (scorer.bank is None) == (arm == "plain")
    rows = table.iloc[predicted["row"]]
    users, items = rows["user_id"].tolist(), rows["item_id"].tolist()
    scores = scorer.predict(scorer.interaction(users, items, profiles=profiles_of(rows, scorer)))
    np.testing.assert_allclose(scores, predicted["score"], atol=1e-6, rtol=0)
    # One at a time, where models squeeze batches, too.
    one = profiles_of(rows.iloc[:1], scorer)
    alone = scorer.predict(scorer.interaction(users[:1], items[:1], profiles=one))
    np.testing.assert_allclose(alone, predicted["score"][:1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["DeepFM", "FM"])
def test_streamed_scores_are_the_trainers(small_run, table, tmp_path, model):
    """A bank that begins empty, and meets the events in the order of time."""
    output, predictions, _ = small_run
    predicted = predictions[f"{model}-uip"]
    expected = dict(zip(predicted["row"].tolist(), predicted["score"], strict=True))
    with FeatureBank.open(output / "bank") as full:
        users, fitted = full.users(), full.model
        folds = [full.state_of(user)[2] for user in users]
    n, start = len(users), fitted.kernels.initial
    empty = user_table(
        fitted, users, folds, np.zeros(n, np.int64), np.full(n, -np.inf), np.tile(start, (n, 1))
    )
    with FeatureBank.create(tmp_path / "bank", fitted, empty) as bank:
        scorer = Scorer.load(output, model, "uip", bank=bank)
        compared = 0
        for _, now in table.groupby("timestamp", sort=True):
            for row, user, item in zip(now.index, now["user_id"], now["item_id"], strict=True):
                if row in expected:
                    score = scorer.score(user, [item])[0]
                    assert abs(score - expected[row]) <= 1e-6
                    compared += 1
            for event in now.itertuples():
                bank.update(event.user_id, event.item_id, float(event.label), event.timestamp)
        assert compared == len(expected) == 40


def test_pairs_score_as_candidates_do(output, table):
    scorer = Scorer.load(output, "DeepFM", "both")
    items = [*dict.fromkeys(table["item_id"])]
    users = table["user_id"].unique()[:3]
    one_by_one = np.concatenate([scorer.score(user, items) for user in users])
    pairs = [(user, item) for user in users for item in items]
    np.random.default_rng(0).shuffle(pairs)
    scores = scorer.score_many([user for user, _ in pairs], [item for _, item in pairs])
    order = [list(users).index(user) * len(items) + items.index(item) for user, item in pairs]
    np.testing.assert_allclose(scores, one_by_one[order], atol=1e-6)
    assert scores.dtype == np.float32 and ((scores > 0) & (scores < 1)).all()
    assert scorer.score(users[0], []).shape == (0,)


@pytest.mark.parametrize("arm", ARMS)
def test_tokens_are_given_as_strings(output, table, arm):
    """Numbers would be nobody's tokens, and their scores those of [PAD]."""
    scorer = Scorer.load(output, "DeepFM", arm)
    users, items = table["user_id"][:3].tolist(), table["item_id"][:3].tolist()
    for wrong in (7, None, pa.scalar("i1")):
        shown = re.escape(repr(wrong))
        with pytest.raises(SettingsError, match=f"user {shown} in row 0 is no string"):
            scorer.score(wrong, items)
        with pytest.raises(SettingsError, match=f"item {shown} in row 1 is no string"):
            scorer.score(users[0], [items[0], wrong])
        with pytest.raises(SettingsError, match=f"user {shown} in row 2 is no string"):
            scorer.score_many([*users[:2], wrong], items)
    with pytest.raises(SettingsError, match="items='i1' is a text: give a list"):
        scorer.score(users[0], "i1")
    with pytest.raises(SettingsError, match="users='u1' is a text: give a list"):
        scorer.score_many("u1", items[:2])
    expected = scorer.score_many(users, items)
    for tokens in (pa.array, np.array, pd.Series, tuple, lambda each: pa.chunked_array([each])):
        np.testing.assert_array_equal(scorer.score_many(tokens(users), tokens(items)), expected)
    np.testing.assert_array_equal(
        scorer.score(users[0], pa.array(items)), scorer.score(users[0], items)
    )


@pytest.mark.parametrize("model", SOME)
@pytest.mark.parametrize("arm", ["plain", "both"])
def test_an_unknown_user_is_the_pad_row(output, table, model, arm):
    scorer = Scorer.load(output, model, arm)
    items = [*dict.fromkeys(table["item_id"])]
    scores = scorer.score("nobody", items)
    assert np.isfinite(scores).all() and scores.shape == (len(items),)
    columns = scorer.interaction(["nobody"] * len(items), items)
    assert (columns["user_id"] == 0).all() and (columns["age"] == 0).all()
    for name in (*scorer._codes, *scorer._matches):
        assert (columns[name] == 0).all()
    np.testing.assert_array_equal(scores, scorer.score("[PAD]", items))
    known = scorer.score(table["user_id"][0], items)
    assert (known != scores).any()


def test_a_new_user_is_scored_by_what_the_bank_has_learnt(output, table, tmp_path):
    shutil.copytree(output / "bank", tmp_path / "bank")
    liked = table[table["label"] == 1]["item_id"].tolist()
    with FeatureBank.open(tmp_path / "bank", write=True) as bank:
        scorer = Scorer.load(output, "DeepFM", "uip", bank=bank)
        before = scorer.score("new", ["i1", "i2"])
        for number in range(20):
            bank.update("new", liked[number], 1.0, 2e9 + number)
        after = scorer.score("new", ["i1", "i2"])
        assert (after != before).all()
        columns = scorer.interaction(["new"], ["i1"])
        codes = [int(columns[name][0]) for name in bank.fields]
        assert codes == bank.look_up("new").tolist()


def test_an_unknown_item_is_the_pad_row(output, table):
    scorer = Scorer.load(output, "DeepFM", "both")
    user = table["user_id"][0]
    columns = scorer.interaction([user], ["no such item"])
    assert columns["item_id"].tolist() == [0] and (columns["genre"] == 0).all()
    assert np.isfinite(scorer.score(user, ["no such item"])).all()


def test_the_files_are_plain_and_say_what_is_there(output, small_run):
    assert small_run[2]["artefacts"]["serving"] == str(output / "serving")
    described = json.loads((output / "serving" / "DeepFM-uip.json").read_text())
    assert described["format"] == 2
    with FeatureBank.open(output / "bank") as bank:
        assert described["fit"] == bank.model.fit
    assert {file.suffix for file in (output / "serving").iterdir()} == {
        ".json", ".parquet", ".safetensors",
    }  # fmt: skip


def test_what_cannot_be_loaded_is_said(output, tmp_path):
    with pytest.raises(SettingsError, match="arm='other'.*give one of.*DeepFM-uip"):
        Scorer.load(output, "DeepFM", "other")
    with pytest.raises(SettingsError, match="run recbole-uip run first"):
        Scorer.load(tmp_path, "DeepFM", "uip")
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    shutil.copy(copy / "checkpoints" / "DeepFM-both.pth", copy / "checkpoints" / "DeepFM-uip.pth")
    with pytest.raises(SettingsError, match=r"DeepFM-uip.pth is not the file.*of another run"):
        Scorer.load(copy, "DeepFM", "uip")
    (copy / "serving" / "tokens.parquet").unlink()
    with pytest.raises(SettingsError, match="tokens.parquet is missing"):
        Scorer.load(copy, "FM", "uip")
    (copy / "serving" / "FM-uip.json").write_text('{"format": 9}')
    with pytest.raises(SettingsError, match="has the format 9"):
        Scorer.load(copy, "FM", "uip")
    scorer = Scorer.load(output, "FM", "uip")
    with pytest.raises(SettingsError, match=r"context\['mood'\] is no context field"):
        scorer.score("u1", ["i1"], context={"mood": "good"})
    with pytest.raises(SettingsError, match="items has 2 rows, but users has 1"):
        scorer.score_many(["u1"], ["i1", "i2"])


def test_the_bank_must_have_the_models_fields(output, tmp_path):
    with FeatureBank.open(output / "bank") as bank:
        field = bank.model.encoder.fields[0]
        bank.model.encoder.fields = tuple(
            type(field)(each.name, each.facet, each.kind, each.size + (each is field))
            for each in bank.model.encoder.fields
        )
        with pytest.raises(SettingsError, match=f"tokens of '{field.name}', and the bank"):
            Scorer.load(output, "FM", "uip", bank=bank)


def test_the_bank_must_be_of_the_models_fit(output, small_run, tmp_path):
    """Codes of another fit have other meanings, though their number is the same."""
    rows = make_rows(np.random.default_rng(21))
    atomic = Atomic(tmp_path, rows=rows, items=make_items()).write()
    train(atomic, tmp_path / "out", ["FM"])
    with (
        FeatureBank.open(tmp_path / "out" / "bank") as other,
        pytest.raises(SettingsError, match="codes of another fit"),
    ):
        Scorer.load(output, "FM", "uip", bank=other)
    # A refit keeps the meaning, and new items do too.
    copied = tmp_path / "copied"
    shutil.copytree(output / "bank", copied)
    with FeatureBank.open(copied, write=True) as bank:
        bank.refit()
        bank.commit()
    with FeatureBank.open(copied) as bank:
        Scorer.load(output, "FM", "uip", bank=bank).score("u1", ["i1"])


@pytest.mark.parametrize("method", [None, "ED"])
@pytest.mark.parametrize("normalise", [False, True])
def test_context_of_the_interaction(tmp_path, method, normalise):
    """A place of the interaction, and its time as a number, beside user and item."""
    rng = np.random.default_rng(3)
    atomic = Atomic(tmp_path, rows=make_rows(rng, n_rows=300), items=make_items()).write()
    path = tmp_path / "small" / "small.inter"
    header, *lines = path.read_text().splitlines()
    places = [f"p{number}" for number in rng.integers(0, 4, len(lines))]
    lines = [f"{line}\t{place}" for line, place in zip(lines, places, strict=True)]
    path.write_text("\n".join([f"{header}\tplace:token", *lines]) + "\n")
    columns = [name.split(":")[0] for name in atomic.columns]
    predictions, _ = train(
        atomic,
        tmp_path / "out",
        ["DeepFM"],
        load_col={"inter": [*columns, "place"], "user": ["user_id", "age"]},
        numerical_features=["timestamp"],
        normalize_all=normalise,
        discretization={"timestamp": {"method": "ED", "bucket": 5}} if method else None,
        uip_arms={"uip": ARMS["both"]},
    )
    predicted = predictions["DeepFM-uip"]
    table = pd.read_parquet(tmp_path / "out" / "profiles.parquet")
    rows = table.iloc[predicted["row"]]
    scorer = Scorer.load(tmp_path / "out", "DeepFM", "uip")
    assert set(scorer.context_fields) == {"timestamp", "place"}
    users, items = rows["user_id"].tolist(), rows["item_id"].tolist()
    place = [places[row] for row in predicted["row"]]
    profiles = profiles_of(rows, scorer)
    scores = scorer.predict(
        scorer.interaction(users, items, rows["timestamp"].tolist(), {"place": place}, profiles)
    )
    np.testing.assert_allclose(scores, predicted["score"], atol=1e-6, rtol=0)
    # Not given: what RecBole takes for missing values.
    columns = scorer.interaction(users, items)
    assert (columns["place"] == 0).all()
    mean = scorer.interaction(users, items, time=float(table["timestamp"].mean()))
    torch.testing.assert_close(columns["timestamp"], mean["timestamp"])
    with pytest.raises(SettingsError, match="'timestamp'. must be numbers"):
        scorer.score("u1", ["i1"], time="yesterday")
    with pytest.raises(SettingsError, match="must be finite numbers in single precision"):
        scorer.score("u1", ["i1"], time=1e39)
    if method is None:
        with pytest.raises(SettingsError, match="gives no number for 1 of 1 pairs.*timestamp"):
            scorer.score("u1", ["i1"], time=1e38)
    with pytest.raises(SettingsError, match="'place'. has 3 values: give 1, or 2"):
        scorer.score("u1", ["i1", "i2"], context={"place": ["p1", "p2", "p3"]})


def test_context_sequences_are_lists_of_tokens():
    assert _sequences("tags", None, 2) == [[], []]
    assert _sequences("tags", ["a", "b", "c"], 2) == [["a", "b", "c"]] * 2
    assert _sequences("tags", [["a"], ["b", "c"]], 2) == [["a"], ["b", "c"]]
    assert _sequences("tags", np.array(["a", "b"]), 1) == [["a", "b"]]
    assert _sequences("tags", np.array([["a"], ["b"]]), 2) == [["a"], ["b"]]
    of_no_tokens = ({"a": 1}, [{"a": 1}], [["a"], [["b"]]], [None])
    for value in ("drama", 3, [["a"]], [["a"], "b"], *of_no_tokens):
        with pytest.raises(SettingsError, match="context.'tags'. must be a list of tokens, or 2"):
            _sequences("tags", value, 2)


@pytest.mark.parametrize(
    "value", [[["a"], ["b", "c"]], {"a": 1}, [["a"]], [None, "a"], [{"a": 1}], object()]
)
def test_context_values_are_text_or_numbers(value):
    with pytest.raises(SettingsError, match=r"context\['device'\] must be text or a number, or 2"):
        _spread("device", value, 2)


def test_context_values_are_one_or_one_for_each_item():
    for value in ("a", ["a"], ["a", "a"], ("a", "a"), np.array("a"), np.array(["a"]), np.str_("a"),
                  pd.Series(["a", "a"]), pa.array(["a", "a"])):  # fmt: skip
        assert _spread("device", value, 2) == ["a", "a"]
    assert _spread("bid", np.float64(0.5), 2) == [0.5, 0.5]


def test_context_numbers_are_finite():
    told = {"low": 0.0, "high": 1.0, "normalised": False, "method": None}
    with pytest.raises(SettingsError, match=r"context\['bid'\] must be numbers: int too large"):
        _float_feature("bid", told, 2, [10**400])


def test_static_profiles_are_served_from_the_bank(tmp_path):
    atomic = Atomic(tmp_path, rows=make_rows(np.random.default_rng(5)), items=make_items()).write()
    arms = {"uip": ARMS["uip"]}
    train(atomic, tmp_path / "out", ["FM"], uip_time="static", uip_arms=arms)
    scorer = Scorer.load(tmp_path / "out", "FM", "uip")
    columns = scorer.interaction(["u1"], ["i1"])
    assert [int(columns[name][0]) for name in scorer.bank.fields] == (
        scorer.bank.look_up("u1").tolist()
    )


def test_a_distilled_student_needs_no_teachers_file(tmp_path):
    atomic = Atomic(tmp_path, rows=make_rows(np.random.default_rng(5)), items=make_items()).write()
    arms = {"uip": ARMS["uip"]}
    train(atomic, tmp_path / "teacher", ["KD_DAGFM"], uip_arms=arms)
    warm_up = tmp_path / "teacher" / "checkpoints" / "KD_DAGFM-uip.pth"
    more = {"phase": "distillation", "warm_up": str(warm_up), "uip_arms": arms}
    predictions, _ = train(atomic, tmp_path / "out", ["KD_DAGFM"], **more)
    warm_up.unlink()
    scorer = Scorer.load(tmp_path / "out", "KD_DAGFM", "uip")
    predicted = predictions["KD_DAGFM-uip"]
    rows = pd.read_parquet(tmp_path / "out" / "profiles.parquet").iloc[predicted["row"]]
    users, items = rows["user_id"].tolist(), rows["item_id"].tolist()
    scores = scorer.predict(scorer.interaction(users, items, profiles=profiles_of(rows, scorer)))
    np.testing.assert_allclose(scores, predicted["score"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("arm", ["plain", "uip"])
def test_scores_over_http_follow_the_events(output, table, tmp_path, arm):
    """The service's bank is the scorer's: an event that has entered shows in the next score."""
    shutil.copytree(output / "bank", tmp_path / "bank")
    items = ["i1", "i2", "no such item"]
    with FeatureBank.open(tmp_path / "bank", write=True) as bank:
        scorer = Scorer.load(output, "DeepFM", arm, bank=bank)
        with TestClient(create_app(lambda: BankService(bank, scorer))) as client:

            def score():
                answer = client.post("/score", json={"user": "u1", "items": items})
                assert answer.status_code == 200, answer.text
                assert answer.json()["model"] == f"DeepFM-{arm}"
                return answer.json()["scores"]

            before = score()
            events = [{"user": "u1", "item": "i3", "liked": 0, "time": 2e9 + n} for n in range(20)]
            assert client.post("/update", json={"events": events}).json() == {"entered": 20}
            after = score()
            assert (after != before) == (arm == "uip")
            np.testing.assert_allclose(after, scorer.score("u1", items), atol=1e-6)
            answer = client.post(
                "/score", json={"user": "u1", "items": items, "context": {"mood": 1}}
            )
            assert answer.status_code == 422
            assert "context['mood'] is no context field of DeepFM" in answer.json()["error"]


def test_no_text_of_a_checkpoint_is_run_as_code(output, tmp_path):
    saved = torch.load(output / "checkpoints" / "KD_DAGFM-uip.pth", weights_only=True)
    fields = json.loads((output / "serving" / "KD_DAGFM-uip.json").read_text())["fields"]
    saved["config"]["teacher"] = f"open({str(tmp_path / 'run')!r}, 'w').close"
    with pytest.raises(SettingsError, match="is no network of KD_DAGFM"):
        served_model.make_model("KD_DAGFM", saved, fields, torch.device("cpu"))
    assert not (tmp_path / "run").exists()

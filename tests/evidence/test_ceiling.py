import dataclasses
import json

import numpy as np
import pytest

from recbole_uip import cli
from recbole_uip.behaviours import TEST
from recbole_uip.em.collaborative import balanced_folds
from recbole_uip.evidence import ceiling as module
from recbole_uip.evidence.ceiling import (
    behaviour_target,
    components,
    judge,
    predict_held_out,
    r_squared,
    read_from_texts,
    unseen_scores,
)
from recbole_uip.settings import UIPSettings

from ..bridge.conftest import Atomic, make_rows
from ..em.conftest import make_world
from ..lm.conftest import save_lm

SETTINGS = UIPSettings.from_dict({"uip_folds": 2, "uip_history": "observed"})


@pytest.fixture(scope="module")
def world():
    return make_world(n_users=250, n_items=100)


# --- regressions --------------------------------------------------------------------------------


def test_a_linear_function_of_features_is_read_and_noise_is_not(rng):
    n = 300
    features = rng.normal(size=(n, 10))
    linear = features @ rng.normal(size=(10, 2))
    targets = np.column_stack([linear, rng.normal(size=n)])
    weight, fold = rng.integers(1, 50, n).astype(float), balanced_folds(n, 4, 0)
    predicted = predict_held_out(features, targets, weight, fold)
    shares = r_squared(targets, predicted, weight)
    assert shares[:2].min() > 0.999
    assert shares[2] < 0.01
    # One share for all is that of the sums of squares.
    together = r_squared(targets, predicted, weight, np.array([1.0, 1.0, 0.0]))
    assert shares[:2].min() <= together <= shares[:2].max()


def test_more_features_than_items_do_not_leak(rng):
    """In sample they would explain everything."""
    features, targets = rng.normal(size=(80, 200)), rng.normal(size=(80, 3))
    predicted = predict_held_out(features, targets, np.ones(80), balanced_folds(80, 4, 0))
    assert r_squared(targets, predicted, np.ones(80)).max() < 0.1


def test_an_item_does_not_shape_its_own_prediction(rng):
    features, targets = rng.normal(size=(60, 5)), rng.normal(size=(60, 2))
    fold, weight = balanced_folds(60, 3, 0), np.ones(60)
    before = predict_held_out(features, targets, weight, fold)
    changed = targets.copy()
    changed[fold == 1] += 5
    after = predict_held_out(features, changed, weight, fold)
    np.testing.assert_array_equal(after[fold == 1], before[fold == 1])
    assert np.abs(after[fold != 1] - before[fold != 1]).max() > 0.1


def test_items_without_weight_teach_nothing(rng):
    features, targets = rng.normal(size=(60, 5)), rng.normal(size=(60, 2))
    weight = np.ones(60)
    weight[:10] = 0
    changed = targets.copy()
    changed[:10] = 99
    fold = balanced_folds(60, 3, 0)
    both = [predict_held_out(features, each, weight, fold) for each in (targets, changed)]
    np.testing.assert_array_equal(*both)


def test_components_keep_distances_up_to_a_scale(rng):
    vectors = rng.normal(size=(50, 8)) * np.arange(1, 9)
    found = components(vectors)
    centred = vectors - vectors.mean(axis=0)
    scale = (centred**2).sum() / 50
    np.testing.assert_allclose(found @ found.T, centred @ centred.T / scale, atol=1e-9)
    assert components(vectors, keep=3).shape == (50, 3)


# --- read from texts ----------------------------------------------------------------------------


def test_true_vectors_read_behaviour_and_random_ones_do_not(world, rng):
    items = np.arange(world.behaviours.n_items)
    features = {"true": world.vectors, "random": rng.normal(size=(len(items), 6))}
    found = {
        each["source"]: each for each in read_from_texts(world.behaviours, items, features, rank=2)
    }
    assert list(found) == ["true", "random", "other users"]
    assert found["true"]["overall"] > 0.5
    assert found["random"]["overall"] < 0.05
    # Behaviour of other users can tell a like rate, and the vectors that make taste cannot.
    assert found["other users"]["rate"] > 0.5
    assert found["true"]["rate"] < 0.2
    assert found["other users"]["overall"] > 0.5
    assert len(found["true"]["directions"]) == 2


def test_held_out_labels_do_not_shape_the_target(world):
    behaviours = world.behaviours
    liked = np.where(behaviours.train, behaviours.liked, 1 - behaviours.liked)
    flipped = dataclasses.replace(behaviours, liked=liked)
    one, other = (
        behaviour_target(each, each.in_time_order(each.train), 2) for each in (behaviours, flipped)
    )
    np.testing.assert_array_equal(one.vectors, other.vectors)
    np.testing.assert_array_equal(one.intercept, other.intercept)


# --- unseen items -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(world):
    items = np.arange(world.behaviours.n_items)
    noise = np.random.default_rng(3).normal(size=(len(items), 6))
    rows = np.flatnonzero(world.behaviours.split == TEST)
    features = {"random": noise, "true": world.vectors}
    return rows, unseen_scores(world.behaviours, items, features, SETTINGS, rows)


def test_texts_that_know_tastes_rank_unseen_items(world, scores):
    rows, found = scores
    user, liked = world.behaviours.user[rows], world.behaviours.liked[rows]
    judged = {each["source"]: each for each in judge(user, liked, found)}
    assert set(judged) == {
        "constant",
        "collaborative",
        "random, own",
        "true, own",
        "random, mapped",
        "true, mapped",
        "collaborative, seen",
    }
    for name in ("true, own", "true, mapped", "collaborative, seen"):
        assert judged[name]["difference"]["low"] > 0.05
        assert judged[name]["gauc"] > 0.65
    for name in ("random, own", "random, mapped", "collaborative"):
        assert abs(judged[name]["difference"]["mean"]) < 0.03
    assert judged["constant"]["difference"]["mean"] == 0


def test_no_event_of_a_hidden_item_shapes_its_score(world, scores):
    """Other labels for one item's rows change no score of its fold's items, seen ones apart."""
    rows, before = scores
    behaviours = world.behaviours
    fold = balanced_folds(behaviours.n_items, module.ITEM_FOLDS, SETTINGS.seed)
    item = int(np.flatnonzero(fold == 0)[0])
    liked = np.where(behaviours.item == item, 1 - behaviours.liked, behaviours.liked)
    flipped = dataclasses.replace(behaviours, liked=liked)
    items = np.arange(behaviours.n_items)
    after = unseen_scores(flipped, items, {"true": world.vectors}, SETTINGS, rows)
    same = fold[behaviours.item[rows]] == 0
    for name in ("constant", "collaborative", "true, own", "true, mapped"):
        np.testing.assert_array_equal(after[name][same], before[name][same])
        assert (after[name][~same] != before[name][~same]).any()


def test_without_times_no_row_shapes_its_own_profile(world):
    behaviours = dataclasses.replace(world.behaviours, time=None)
    settings = dataclasses.replace(SETTINGS, history="train")
    history = module._World(behaviours, np.zeros(behaviours.n_items, bool), settings).observed
    own = np.bincount(behaviours.user[behaviours.train], minlength=behaviours.n_users)
    seen = history.history.seen
    assert (seen[behaviours.train] < own[behaviours.user[behaviours.train]]).all()
    np.testing.assert_array_equal(seen[~behaviours.train], own[behaviours.user[~behaviours.train]])


# --- the command --------------------------------------------------------------------------------


def test_command(tmp_path, rng, capsys, monkeypatch):
    monkeypatch.setattr(module, "N_BOOT", 20)
    folder = tmp_path / "tiny"
    save_lm(folder)
    titles = ["star wars", "toy story", "heat", "the godfather", "city of night", "man", "a day"]
    genres = ["drama", "comedy action", "thriller"]
    items = [(f"i{i}", titles[i % 7], genres[i % 3]) for i in range(14)] + [("i14", "", "")]
    Atomic(tmp_path, "toy", make_rows(rng), items=items).write()
    line = [
        "ceiling",
        "--dataset=toy",
        f"--data_path={tmp_path}",
        f"--uip_cache={tmp_path / 'cache'}",
        "--load_col={inter: [user_id, item_id, rating, timestamp]}",
        "--threshold={rating: 4}",
        "--uip_facets={taste: {source: lm, prompt: taste, rank: 2, codes: 4}}",
        "--uip_item_text={title} ( {genre} )",
        f"--uip_lm={folder}",
        "--gpu_id=",
        f"--json={tmp_path / 'ceiling.json'}",
    ]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "ceiling.json").read_text())
    assert (results["items"], results["attributes"]) == (14, "{genre}")
    sources = [each["source"] for each in results["read"]]
    assert sources == [
        "random",
        "attributes",
        "words",
        "embedding",
        "prefix",
        "lm",
        "all",
        "other users",
    ]
    for source in sources:
        assert f"| {source} |" in out or f"| {source}, mapped |" in out
    assert "| lm, own |" in out
    without = [part for part in line if not part.startswith("--uip_facets")]
    assert cli.main([*without, "--uip_facets={mood: {source: constant}}"]) == 2
    assert "source: lm" in capsys.readouterr().err

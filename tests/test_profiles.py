"""The pipeline on arrays: what may depend on what, and how well known traits come out.

Leaks through RecBole's splits are tested in tests/bridge; here are the fitted parameters.
"""

import dataclasses
import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recbole_uip import profiles as profiles_module
from recbole_uip.behaviours import TEST, VALID
from recbole_uip.bridge.metrics import gauc
from recbole_uip.em import states
from recbole_uip.em.facet import Facet
from recbole_uip.em.weights import like_rate, out_of_fold_rates
from recbole_uip.lm import embed, score_prefix
from recbole_uip.profiles import infer
from recbole_uip.settings import SettingsError, UIPSettings

from .em.conftest import make_world
from .lm.conftest import WORDS, save_lm

FACETS = {
    "leniency": {"source": "constant", "half_life": [5, "inf"], "bins": 8, "codes": 0},
    "company": {
        "source": "collaborative",
        "codes": 4,
        "rank": 3,
        "levels": 2,
        "match": {"rank": 3, "bins": 8, "half_life": [20, "inf"]},
    },
    "sums": {
        "source": "collaborative",
        "weight": "contrast",
        "codes": 0,
        "match": {"rank": 3, "bins": 8, "posterior": "sums"},
    },
    "likes": {"source": "collaborative", "weight": "positive", "codes": 4, "rank": 3},
}


def settings(**keys):
    return UIPSettings.from_dict({"uip_facets": FACETS, "uip_history": "observed", **keys})


def with_labels(behaviours, rows):
    liked = behaviours.liked.copy()
    liked[rows] = 1 - liked[rows]
    return dataclasses.replace(behaviours, liked=liked)


def parameters(profiles):
    """Everything that was fitted, as one list of arrays."""
    out = []
    for facet in profiles.facets.values():
        for basis in (facet.basis_, *facet.text_bases_.values()):
            out += [basis.vectors, basis.mean, basis.variance]
        for codebook in facet.codebooks_.values():
            for level in codebook.levels_:
                out += [level.codewords_, level.weights_, level.variance_]
        out += list(facet.edges_.values()) + [getattr(facet, "prior_scales_", ())]
    return [*out, profiles.encoder.kernels.rate]


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def inferred(world):
    return infer(world.behaviours, None, settings())


def test_fields(inferred, world):
    fields = {item.name: item for item in inferred.fields}
    assert list(fields) == [
        "uip_leniency_5",
        "uip_leniency_inf",
        "uip_company",
        "uip_company_level2",
        "uip_company_match_20",
        "uip_company_match_inf",
        "uip_sums_match",
        "uip_likes",
    ]
    for item in fields.values():
        assert item.values.shape == (len(world.behaviours),)
        assert item.values.min() == 0 and item.values.max() <= item.size
        assert len(np.unique(item.values[item.values > 0])) > 1


def test_profiles_tell_likes_apart(inferred, world):
    test = world.behaviours.split == TEST
    liked = world.behaviours.liked[test]
    auc = {f.name: roc_auc_score(liked, f.values[test]) for f in inferred.fields}
    rate = inferred.encoder.kernels.rate[:, world.behaviours.item[test]].mean(axis=0)
    by_item = roc_auc_score(liked, rate)
    assert auc["uip_leniency_inf"] > 0.6
    assert auc["uip_company_match_inf"] > by_item + 0.1
    assert auc["uip_sums_match"] > 0.55


@pytest.mark.parametrize("history", ["observed", "train"])
@pytest.mark.parametrize("split", [VALID, TEST])
def test_held_out_labels_reach_no_parameter_and_no_earlier_row(world, history, split):
    behaviours = world.behaviours
    before = infer(behaviours, None, settings(uip_history=history))
    changed = np.flatnonzero(behaviours.split == split)[::7]
    after = infer(with_labels(behaviours, changed), None, settings(uip_history=history))
    for old, new in zip(parameters(before), parameters(after), strict=True):
        np.testing.assert_array_equal(old, new)
    first = np.full(behaviours.n_users, np.inf)
    np.minimum.at(first, behaviours.user[changed], behaviours.time[changed])
    untouched = behaviours.time <= first[behaviours.user]
    moved = 0
    for old, new in zip(before.fields, after.fields, strict=True):
        if history == "train":
            np.testing.assert_array_equal(old.values, new.values)
        np.testing.assert_array_equal(old.values[untouched], new.values[untouched])
        moved += (old.values != new.values).sum()
    # The check can fail: later rows of the same users do see the changed labels.
    assert (moved > 0) == (history == "observed")


def test_with_parameters_held_a_row_sees_neither_its_label_nor_the_future(world, inferred):
    """The labels of some training rows change; the facets, once fitted, stay as they are."""
    behaviours = world.behaviours
    rng = np.random.default_rng(0)
    changed = rng.choice(np.flatnonzero(behaviours.train), 40, replace=False)
    flipped = with_labels(behaviours, changed)
    first = np.full(behaviours.n_users, np.inf)
    np.minimum.at(first, behaviours.user[changed], behaviours.time[changed])
    untouched = behaviours.time <= first[behaviours.user]
    before = inferred.encoder.transform(inferred.history, inferred.events)
    after = inferred.encoder.transform(
        inferred.history, inferred.events._replace(liked=flipped.liked)
    )
    np.testing.assert_array_equal(before[untouched], after[untouched])
    assert (before != after).any(axis=0).all()


def test_of_labels_by_chance_no_field_tells_a_row_its_own():
    """Of an item with few events, a like rate would give the labels away.

    One of all events by being high, and one of other users' events, within the item, by being low.
    """
    behaviours = make_world(n_items=2000).behaviours
    rng = np.random.default_rng(0)
    chance = (rng.random(len(behaviours)) < 0.5).astype(float)
    found = infer(dataclasses.replace(behaviours, liked=chance), None, settings())
    train = behaviours.train
    labels, item, fold = chance[train], behaviours.item[train], found.events.fold[train]
    for field in found.fields:
        if field.kind != "code":
            assert abs(roc_auc_score(labels, field.values[train]) - 0.5) < 0.03
            assert abs(gauc(item, labels, field.values[train]) - 0.5) < 0.03
    # The checks can fail: so much do such rates tell.
    assert roc_auc_score(labels, like_rate(item, labels, 2000)[item]) > 0.6
    others = out_of_fold_rates(item, labels, fold, 2000, int(fold.max()) + 1)[fold, item]
    assert gauc(item, labels, others) < 0.2


@pytest.mark.parametrize("facet", ["likes", "company"])
def test_a_user_meets_vectors_that_their_labels_did_not_shape(world, inferred, facet):
    """A user's labels change the vectors of the other folds, never those that the user meets."""
    behaviours = world.behaviours
    before = inferred.facets[facet]
    # In the first fold, whose frame the others are turned to.
    user = int(behaviours.user[inferred.events.fold == 0][0])
    rows = np.flatnonzero(behaviours.train & (behaviours.user == user))
    after = infer(with_labels(behaviours, rows), None, settings()).facets[facet]
    for fold in range(4):
        mine = slice(fold * behaviours.n_items, (fold + 1) * behaviours.n_items)
        same = np.array_equal(before.basis_.vectors[mine], after.basis_.vectors[mine])
        assert same == (fold == 0)


def test_folds_out_of_range_are_refused(world):
    fold = np.arange(world.behaviours.n_users)
    with pytest.raises(ValueError, match="fold must be from 0 to 15, got 16"):
        infer(world.behaviours, None, settings(), fold)
    with pytest.raises(ValueError, match="fold must be from 0 to 15, got -1"):
        infer(world.behaviours, None, settings(), fold % 16 - 1)
    with pytest.raises(ValueError, match=r"fold has shape \(3,\), and there are 300 users"):
        infer(world.behaviours, None, settings(), fold[:3])


@pytest.mark.parametrize("n_texts", [79, 81])
def test_each_item_needs_its_place_among_the_texts(world, n_texts):
    with pytest.raises(ValueError, match=f"there are {n_texts} item_texts and 80 items"):
        infer(world.behaviours, ["Red"] * n_texts, settings())


@pytest.mark.parametrize(("name", "value"), [("user", 300), ("user", -1), ("item", 80)])
def test_indices_out_of_range_are_refused(world, name, value):
    column = getattr(world.behaviours, name).copy()
    column[7] = value
    with pytest.raises(ValueError, match=f"{name} is {value} in row 7: it must be from 0 to"):
        dataclasses.replace(world.behaviours, **{name: column})


def test_means_of_rows_without_history(world, monkeypatch):
    """A block of rows may have none that saw an event."""
    found = infer(world.behaviours, None, settings())
    expected = found.means()
    monkeypatch.setattr(states, "BLOCK_ROWS", 1)
    assert (found.history.seen == 0).any()
    for name, values in found.means().items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize(
    ("facet", "message"),
    [
        ({"source": "words"}, "the vectors of the items of the training rows do not differ"),
        (
            {"source": "collaborative", "texts": ["words"], "match": {"rank": 3}},
            "the texts of the items of the training rows say the same",
        ),
    ],
)
def test_texts_that_say_the_same_are_one_clear_error(world, facet, message):
    texts = [text for _, text in zip(range(80), itertools.cycle(["Red", "red!", "(RED)"]))]
    wanted = settings(uip_facets={"interests": facet}, uip_item_text="{title}")
    with pytest.raises(SettingsError, match=f"uip_facets.interests: {message}"):
        infer(world.behaviours, texts, wanted)


def test_items_that_nobody_met_have_no_collaborative_vector(world):
    behaviours = dataclasses.replace(world.behaviours, n_items=world.behaviours.n_items + 2)
    found = infer(behaviours, None, settings())
    vectors = found.facets["company"].vectors_
    assert (vectors[:, -2:] == 0).all()
    assert (vectors[:, :-2] != 0).any(axis=2).all()
    # They differ in nothing, so a user's match with both is the same.
    rows = np.flatnonzero(behaviours.split == TEST)[:50]
    one, other = (
        found.match(rows, np.full(len(rows), behaviours.n_items - 1 - item)) for item in (0, 1)
    )
    for name, tokens in one.items():
        np.testing.assert_array_equal(tokens, other[name])


def test_static_profiles_are_one_per_user(world):
    profiles = infer(world.behaviours, None, settings(uip_time="static", uip_history="train"))
    assert profiles.static
    for item in profiles.fields:
        if item.kind != "match":
            for user in range(20):
                assert len(np.unique(item.values[world.behaviours.user == user])) == 1


def test_history_is_observed_where_the_split_is_by_time(world):
    def seen(behaviours, **given):
        return infer(behaviours, None, settings(**{"uip_history": "auto", **given})).history.seen

    by_time = world.behaviours
    np.testing.assert_array_equal(seen(by_time), seen(by_time, uip_history="observed"))
    assert (seen(by_time) > seen(by_time, uip_history="train")).any()
    split = np.random.default_rng(0).permutation(by_time.split)
    at_random = dataclasses.replace(by_time, split=split)
    np.testing.assert_array_equal(seen(at_random), seen(at_random, uip_history="train"))
    assert (seen(at_random) < seen(at_random, uip_history="observed")).any()


def test_refresh_delays_history(world):
    delayed = infer(world.behaviours, None, settings(uip_refresh=10))
    history = delayed.history
    fresh = states.index_history(
        world.behaviours.user,
        world.behaviours.time,
        np.ones(len(world.behaviours), dtype=bool),
        world.behaviours.n_users,
    )
    assert (history.seen <= fresh.seen).all() and (history.seen < fresh.seen).any()
    early = world.behaviours.time < 10
    assert (delayed.fields[0].values[early] == 0).all()


def test_users_without_history_get_pad_or_the_prior(world):
    padded = infer(world.behaviours, None, settings())
    prior = infer(world.behaviours, None, settings(uip_empty="prior"))
    new = padded.history.seen == 0
    assert new.any()
    for pad_field, prior_field in zip(padded.fields, prior.fields, strict=True):
        assert (pad_field.values[new] == 0).all()
        assert (prior_field.values > 0).all()
        if prior_field.kind == "code":
            assert (prior_field.values[new] == 1).all()


def test_match_of_other_items(world, inferred):
    behaviours = world.behaviours
    rows = np.array([5, 5, 9])
    tokens = inferred.match(rows, behaviours.item[rows])
    assert set(tokens) == {f.name for f in inferred.fields if f.kind == "match"}
    for item in inferred.fields:
        if item.kind == "match":
            np.testing.assert_array_equal(tokens[item.name], item.values[rows])
    every = inferred.match(np.full(80, 3001), np.arange(80))
    assert len(np.unique(every["uip_company_match_inf"])) > 2


def test_implicit_feedback(world):
    behaviours = dataclasses.replace(world.behaviours, liked=None)
    implicit = {
        "likes": {**FACETS["likes"], "match": {"rank": 3, "bins": 8}},
        "habits": {"source": "collaborative", "weight": "all", "codes": 4, "rank": 3},
    }
    profiles = infer(behaviours, None, settings(uip_facets=implicit))
    assert [f.name for f in profiles.fields] == [
        "uip_likes",
        "uip_likes_match",
        "uip_habits",
    ]
    with pytest.raises(SettingsError, match="uip_facets.leniency: weight 'contrast' needs"):
        infer(behaviours, None, settings())


def test_weights_without_labels_are_refused_before_the_lm_reads(world, monkeypatch):
    behaviours = dataclasses.replace(world.behaviours, liked=None)
    facets = {"told": {"source": "embedding", "weight": "contrast"}}
    monkeypatch.setattr(profiles_module, "_text_vectors", lambda *_: pytest.fail("it read"))
    with pytest.raises(SettingsError, match="uip_facets.told: weight 'contrast' needs.*--label"):
        infer(behaviours, ["a"], settings(uip_facets=facets, uip_item_text="{title}"))


def test_point_in_time_without_timestamps_is_refused(world, caplog):
    behaviours = dataclasses.replace(world.behaviours, time=None)
    with pytest.raises(SettingsError, match="needs timestamps"):
        infer(behaviours, None, settings(uip_time="point_in_time"))
    with caplog.at_level(logging.WARNING):
        assert infer(
            world.behaviours, None, settings(uip_time="static", uip_history="train")
        ).static
    assert "static profiles" in caplog.text
    caplog.clear()
    assert not infer(behaviours, None, settings(uip_history="train")).static
    assert not caplog.text


def test_cross_fitted_profiles_do_not_know_their_own_label(world):
    behaviours = dataclasses.replace(world.behaviours, time=None)
    inferred = infer(behaviours, None, settings(uip_history="train"))
    transform = inferred.encoder.transform
    before = transform(inferred.history, inferred.events)
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.flatnonzero(behaviours.train))
    # one training row of each user
    _, first = np.unique(behaviours.user[rows], return_index=True)
    changed = rows[first]
    flipped = with_labels(behaviours, changed)
    after = transform(inferred.history, inferred.events._replace(liked=flipped.liked))
    np.testing.assert_array_equal(before[changed], after[changed])
    assert (before != after).any(axis=0).all()
    # labels of held-out rows move nothing
    held_out = with_labels(behaviours, np.flatnonzero(~behaviours.train))
    again = infer(held_out, None, settings(uip_history="train"))
    for one, other in zip(inferred.fields, again.fields, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_no_training_rows_is_said(world):
    behaviours = dataclasses.replace(
        world.behaviours, split=np.full(len(world.behaviours), VALID, dtype=np.int8)
    )
    with pytest.raises(SettingsError, match="training split has no rows"):
        infer(behaviours, None, settings())


def test_a_cache_that_cannot_be_written_to_is_named(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    texts = [f"film {number}" for number in range(world.behaviours.n_items)]
    wanted = {"uip_facets": {"told": {"source": "embedding"}}, "uip_item_text": "{title}"}
    folder = tmp_path / "file" / "cache"
    with pytest.raises(SettingsError, match="uip_cache='.*cache' cannot be used: .*directory"):
        infer(world.behaviours, texts, settings(**wanted, uip_cache=str(folder)))


def test_lm_facets_need_texts(world):
    facets = {"interests": {"weight": "positive"}}
    with pytest.raises(SettingsError, match="no item has a text"):
        infer(
            world.behaviours,
            [None] * world.behaviours.n_items,
            settings(uip_facets=facets, uip_item_text="{title}"),
        )


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_lm(folder)
    return {"uip_lm": str(folder), "uip_lm_dtype": "float32", "uip_cache": str(folder / "cache")}


@pytest.fixture(scope="module")
def texts(world):
    """Words that tell of the two planted tastes, and one that tells nothing; some have none."""
    rng = np.random.default_rng(3)
    high = np.digitize(world.vectors[:, :2], [-0.5, 0.5])
    telling = np.array([["drama", "day", "city"], ["action", "night", "war"]])
    told = [" ".join([telling[0, a], telling[1, b], rng.choice(WORDS[15:-2])]) for a, b in high]
    return [None if item % 20 == 0 else text for item, text in enumerate(told)]


def of_texts(source, tiny_lm, **keys):
    if source == "together":
        source, keys = "collaborative", {"texts": ["embedding", "words"]}
    facet = {
        "source": source, "weight": "contrast", "codes": 4, "rank": 2,
        "match": {"rank": 2, "bins": 8}, **keys,
    }  # fmt: skip
    return settings(uip_facets={"told": facet}, uip_item_text="{title}", **tiny_lm)


@pytest.mark.parametrize("source", ["prefix", "embedding", "words"])
@pytest.mark.parametrize("directions", ["between", "fisher"])
def test_facets_of_texts_without_scores(world, texts, tiny_lm, source, directions):
    wanted = of_texts(source, tiny_lm, directions=directions)
    profiles = infer(world.behaviours, texts, wanted)
    assert [field.name for field in profiles.fields] == ["uip_told", "uip_told_match"]
    for field in profiles.fields:
        assert len(np.unique(field.values[field.values > 0])) > 1
    facet, about = profiles.facets["told"], profiles.texts[source]
    missing = [item for item, text in enumerate(texts) if text is None]
    assert missing and (facet.vectors_[:, missing] == 0).all()
    assert (about.fingerprint is None) == (source == "words")
    if source == "words":
        assert set(about.vocabulary) == {w for text in texts if text for w in text.lower().split()}
        assert "lm_tokens" not in profiles.cost
    else:
        # What a facet works with is the LM's vectors, centred and turned.
        rows = [item for item, text in enumerate(texts) if text]
        told = [texts[row] for row in rows]
        if source == "prefix":
            prompt = ["told"], [wanted.endings is not None], wanted.endings
            raw = score_prefix(told, *prompt, wanted.lm, wanted.cache).vectors
        else:
            raw = embed(told, wanted.lm, wanted.cache).vectors
        turned = (raw - about.whitening.mean) @ about.whitening.directions()
        np.testing.assert_allclose(
            turned @ facet.basis_.directions[1], facet.vectors_[1, rows], rtol=1e-3, atol=1e-3
        )
        assert infer(world.behaviours, texts, wanted).cost["lm_tokens"] == 0
    if directions == "between":
        test = world.behaviours.split == TEST
        liked, tokens = world.behaviours.liked[test], profiles.fields[1].values[test]
        assert roc_auc_score(liked, tokens) > 0.6


def test_fisher_directions_find_less_of_how_users_differ(world, texts, tiny_lm):
    captured = {}
    for directions in ("between", "fisher"):
        profiles = infer(world.behaviours, texts, of_texts("words", tiny_lm, directions=directions))
        captured[directions] = profiles.facets["told"].basis_.variance.sum()
    assert captured["fisher"] < 0.8 * captured["between"]


@pytest.mark.parametrize("source", ["prefix", "embedding", "words", "together"])
def test_held_out_labels_reach_no_parameter_of_text_facets(world, texts, tiny_lm, source):
    behaviours = world.behaviours
    wanted = of_texts(source, tiny_lm, directions="fisher")
    before = infer(behaviours, texts, wanted)
    changed = np.flatnonzero(behaviours.split == TEST)[::7]
    after = infer(with_labels(behaviours, changed), texts, wanted)
    for old, new in zip(parameters(before), parameters(after), strict=True):
        np.testing.assert_array_equal(old, new)
    first = np.full(behaviours.n_users, np.inf)
    np.minimum.at(first, behaviours.user[changed], behaviours.time[changed])
    untouched = behaviours.time <= first[behaviours.user]
    moved = 0
    for old, new in zip(before.fields, after.fields, strict=True):
        np.testing.assert_array_equal(old.values[untouched], new.values[untouched])
        moved += (old.values != new.values).sum()
    assert moved > 0


@pytest.mark.parametrize("source", ["prefix", "embedding", "words", "together"])
def test_a_user_meets_text_vectors_of_other_users(world, texts, tiny_lm, source):
    """The basis of each fold of users, by fisher too, comes from the other folds' labels."""
    behaviours, wanted = world.behaviours, of_texts(source, tiny_lm, directions="fisher")
    before = infer(behaviours, texts, wanted)
    user = int(behaviours.user[before.events.fold == 0][0])
    rows = np.flatnonzero(behaviours.train & (behaviours.user == user))
    after = infer(with_labels(behaviours, rows), texts, wanted)
    old, new = before.facets["told"].vectors_, after.facets["told"].vectors_
    same = [np.array_equal(old[fold], new[fold]) for fold in range(4)]
    assert same == [True, False, False, False]


def test_texts_say_what_few_events_cannot(tiny_lm):
    """Where items have few events, a collaborative facet that knows their texts predicts better."""
    world = make_world(n_users=200, n_items=400, events_per_user=15, noise_directions=0)
    telling = np.array(["drama day", "city", "action night", "war"])
    texts = [" ".join(telling[2 * (v[:2] > 0) + [0, 1]]) for v in world.vectors]
    test = world.behaviours.split == TEST
    auc = {}
    for known in ([], ["words"]):
        company = {
            "source": "collaborative", "rank": 2, "codes": 4, "match": {"rank": 2}, "texts": known,
        }  # fmt: skip
        wanted = settings(uip_facets={"company": company}, uip_item_text="{title}", **tiny_lm)
        profiles = infer(world.behaviours, texts, wanted)
        tokens = profiles.fields[1].values[test]
        auc[len(known)] = roc_auc_score(world.behaviours.liked[test], tokens)
        assert set(profiles.text_priors) == ({"company"} if known else set())
    assert auc[1] > auc[0] + 0.02


@pytest.mark.parametrize("source", ["prefix", "embedding", "words", "together"])
def test_text_facets_need_texts(world, tiny_lm, source):
    nothing = [None] * world.behaviours.n_items
    first = "embedding" if source == "together" else source
    with pytest.raises(SettingsError, match=f"no item has a text, so source: {first} facets"):
        infer(world.behaviours, nothing, of_texts(source, tiny_lm))


def test_texts_without_words_are_said(world, tiny_lm):
    dots = [("...", "?!")[item % 2] for item in range(world.behaviours.n_items)]
    with pytest.raises(SettingsError, match="source: words facets cannot be inferred: empty voc"):
        infer(world.behaviours, dots, of_texts("words", tiny_lm))


def test_folds_that_know_fewer_directions_than_others():
    """On a small catalogue, the users of one fold may span less than the rank that is asked for."""
    world = make_world(n_users=40, n_items=13, events_per_user=8)
    company = {"source": "collaborative", "weight": "contrast", "codes": 4, "rank": 12, "match": {}}
    profiles = infer(world.behaviours, None, settings(uip_facets={"company": company}))
    facet = profiles.facets["company"]
    assert facet.vectors_.shape[0] == 4 and facet.vectors_.shape[2] <= 12
    assert all(field.values.max() > 0 for field in profiles.fields)


def test_same_seed_same_profiles(world, inferred):
    again = infer(world.behaviours, None, settings())
    for old, new in zip(inferred.fields, again.fields, strict=True):
        np.testing.assert_array_equal(old.values, new.values)


def test_too_few_rows_for_the_codebook_names_the_facet(world):
    facets = {"company": {**FACETS["company"], "codes": 10_000_000}}
    codebook = {"sample": 10_000_000}
    with pytest.raises(SettingsError, match="uip_facets.company: n_codes=10000000"):
        infer(world.behaviours, None, settings(uip_facets=facets, uip_codebook=codebook))


def test_the_order_of_rows_moves_hardly_a_token(world):
    """Where no two events are of one time; sums of another order are rounded otherwise."""
    distinct = np.argsort(np.lexsort((world.behaviours.item, world.behaviours.time)))
    b = dataclasses.replace(world.behaviours, time=distinct.astype(float))
    order = np.random.default_rng(1).permutation(len(b))
    columns = {name: getattr(b, name)[order] for name in ("user", "item", "liked", "time", "split")}
    fields = infer(b, None, settings()).fields
    again = infer(dataclasses.replace(b, **columns), None, settings()).fields
    moved = {
        one.name: (other.values != one.values[order]).mean()
        for one, other in zip(fields, again, strict=True)
    }
    assert len(moved) == 8
    assert max(moved.values()) < 0.01, moved


@pytest.mark.parametrize(
    "module",
    ["lm", "em", "profiles", "texts", "bank", "bank.build", "bank.transformer", "bank.service"],
)
def test_the_core_never_imports_recbole(module):
    code = (
        f"import sys, recbole_uip.{module}; "
        "sys.exit(any(name.split('.')[0] in ('recbole', 'ray') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_facet_attributes_are_learned_only_by_fitting():
    facet = Facet(settings().facets[0])
    assert not [name for name in vars(facet) if name.endswith("_")]

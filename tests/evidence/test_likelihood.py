import dataclasses
import json

import numpy as np
import pytest

from recbole_uip import cli, lm
from recbole_uip.behaviours import TEST, TRAIN, Behaviours, folds_of
from recbole_uip.evidence import likelihood as module
from recbole_uip.evidence.likelihood import format_likelihood, measure
from recbole_uip.evidence.statistics import clustered_mean
from recbole_uip.evidence.task import Task
from recbole_uip.settings import SettingsError, UIPSettings

from ..bridge.conftest import Atomic, make_rows
from ..lm.conftest import ENDINGS, WORDS, save_lm

N_ITEMS, N_USERS, N_EVENTS = 40, 80, 30
FACETS = {
    "interests": {"source": "lm", "weight": "positive", "rank": 2, "codes": 4},
    "taste": {"source": "lm", "prompt": "taste in movies", "rank": 2, "codes": 4},
}


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    # of as many layers that values move in two, where feedback has directions of its own
    return save_lm(tmp_path_factory.mktemp("tiny"), num_hidden_layers=8)


@pytest.fixture(scope="module", params=["lm", "prefix"])
def task(tiny_lm, tmp_path_factory, request):
    """Users of two kinds: what the one likes, by the LM's scores, the other hates."""
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(WORDS[3:], size=4)) for _ in range(N_ITEMS)]
    settings = UIPSettings.from_dict(
        {
            "uip_facets": {k: {**facet, "source": request.param} for k, facet in FACETS.items()},
            "uip_item_text": "{title}",
            "uip_endings": {"liked": ENDINGS[0], "disliked": ENDINGS[1]},
            "uip_lm": str(tiny_lm),
            "uip_lm_dtype": "float32",
            "uip_folds": 2,
            "uip_time": "point_in_time",
            "uip_history": "observed",
            "uip_cache": str(tmp_path_factory.mktemp("cache")),
        }
    )
    names, more = [facet.prompt for facet in settings.facets], (settings.lm, settings.cache)
    if request.param == "prefix":
        scored = lm.score_prefix(texts, names, [False, True], settings.endings, *more)
        parts = np.split(scored.vectors, 2, axis=1)
    else:
        scored = lm.score(texts, names, settings.endings, *more)
        parts = scored.text, scored.feedback
    # Both kinds of score, so that both facets have something to find.
    signs = []
    for part in parts:
        flat = part.reshape(len(texts), -1)
        flat = flat - flat.mean(axis=0)
        signs.append(flat @ np.linalg.svd(flat, full_matrices=False)[2][0])
    signs = sum(each / each.std() for each in signs)
    user = np.repeat(np.arange(N_USERS), N_EVENTS)
    item = rng.integers(0, N_ITEMS, len(user))
    kind = np.where(np.arange(N_USERS) % 2 == 0, 1.0, -1.0)
    logit = 8 * kind[user] * signs[item]
    liked = (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(float)
    time = np.tile(np.arange(N_EVENTS, dtype=float), N_USERS)
    split = np.where(time < N_EVENTS - 8, TRAIN, TEST).astype(np.int8)
    behaviours = Behaviours(user, item, liked, time, split, N_USERS, N_ITEMS)
    fold = folds_of(map(str, range(N_USERS)), settings.user_folds, settings.seed)
    return Task(behaviours, texts, settings, fold)


@pytest.fixture(scope="module")
def found(task):
    return measure(task, users=60, behaviours=8, codes=3)


def of(found, name):
    return next(each for each in found["fields"] if each["field"] == name)


def test_the_planted_code_is_found(found):
    for name in ("uip_interests", "uip_taste"):
        field = of(found, name)
        for comparison in ("own_theta0", "own_other", "own_codes"):
            assert field[comparison]["low"] > 0, (name, comparison)
        assert field["step"] in module.STEPS
    assert of(found, "uip_taste")["measured"] == "(y - p) feedback logit"
    assert of(found, "uip_taste")["auc"]["own"] > of(found, "uip_taste")["auc"]["other"]
    assert "auc" not in of(found, "uip_interests")


def test_short_steps_are_first_order_and_long_ones_are_not(found):
    for field in found["fields"]:
        steps = {each["step"]: each for each in field["steps"]}
        assert list(steps) == list(module.STEPS)
        small = steps[0.003]
        assert small["correlation"] > 0.98
        assert small["own_other"]["mean"] == pytest.approx(small["predicted_own_other"], rel=0.2)
        assert steps[1.0]["correlation"] < small["correlation"]


def test_the_step_is_chosen_by_the_tuning_rows(found):
    for field in found["fields"]:
        best = max(field["steps"], key=lambda each: each["tuning"] - each["tuning_error"])
        assert field["step"] == best["step"]
        assert field["own_theta0"] == best["own_theta0"]


def test_held_out_labels_shape_nothing_that_is_fitted(task, found):
    events = task.behaviours
    liked = np.where(events.train, events.liked, 1 - events.liked)
    flipped = dataclasses.replace(task, behaviours=dataclasses.replace(events, liked=liked))
    other = measure(flipped, users=60, behaviours=8, codes=3)
    before, after = of(found, "uip_taste"), of(other, "uip_taste")
    assert after["step"] == before["step"]
    assert [each["tuning"] for each in after["steps"]] == pytest.approx(
        [each["tuning"] for each in before["steps"]]
    )
    # What is judged turns round: the codes are still those of the training labels.
    assert after["own_other"]["high"] < 0


def test_another_users_code_is_a_different_one():
    sample = module._Sample(np.arange(5), [(1,), (1,), (2,), (3,), (3,)])
    user = np.array([0, 0, 1, 2, 2])
    others = module._others(sample, user, np.random.default_rng(0))
    assert all(one != own for one, own in zip(others, sample.own, strict=True))
    assert others[0] == others[1] and others[3] == others[4]


def test_clustered_mean(rng):
    user, values = np.repeat(np.arange(20), 5), rng.normal(size=100)
    found = clustered_mean(user, values)
    assert found.mean == pytest.approx(values.mean())
    assert found.n == 20
    # Users of equal size: the t-interval of their means.
    means = values.reshape(20, 5).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(20)
    assert (found.high - found.mean) == pytest.approx(2.093024 * error, rel=1e-5)
    # Rows that repeat say no more than once.
    again = clustered_mean(np.tile(user, 3), np.tile(values, 3))
    assert again.low == pytest.approx(found.low)
    assert np.isnan(clustered_mean(np.zeros(5), np.ones(5)).low)


def test_nothing_to_judge(task):
    events = task.behaviours
    everything = dataclasses.replace(events, split=np.full(len(events), TRAIN, np.int8))
    with pytest.raises(SettingsError, match="held-out"):
        measure(dataclasses.replace(task, behaviours=everything), users=4)


def test_command(tiny_lm, tmp_path, rng, capsys):
    titles = ["star wars", "toy story", "heat", "the godfather", "city of night", "man", "a day"]
    items = [(f"i{i}", titles[i % 7], "drama") for i in range(15)]
    rows = make_rows(rng, n_users=30, n_rows=420)
    Atomic(tmp_path, "toy", rows, items=items).write()
    line = [
        "likelihood",
        "--dataset=toy",
        f"--data_path={tmp_path}",
        f"--uip_cache={tmp_path / 'cache'}",
        "--load_col={inter: [user_id, item_id, rating, timestamp]}",
        "--threshold={rating: 4}",
        f"--uip_facets={json.dumps(FACETS)}",
        "--uip_item_text={title}",
        f"--uip_lm={tiny_lm}",
        "--gpu_id=",
        "--users=10",
        "--behaviours=3",
        f"--json={tmp_path / 'likelihood.json'}",
        # Every user has held-out rows then.
        "--eval_args={split: {RS: [0.6, 0.2, 0.2]}, order: RO, group_by: null, mode: labeled}",
    ]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "likelihood.json").read_text())
    assert [each["field"] for each in results["fields"]] == ["uip_interests", "uip_taste"]
    assert results["lm_tokens"] > 0
    assert f"{results['lm_tokens']:,} LM tokens" in out
    assert format_likelihood({**results}).splitlines()[0] == out.splitlines()[0]
    assert cli.main([*line, "--users=1"]) == 2
    assert "users=1" in capsys.readouterr().err

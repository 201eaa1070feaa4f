"""The benchmark of the gradient posterior, on a tiny LM: what it counts and what it says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_uip.evidence import bench_authors
from recbole_uip.evidence import bench_gradient as module
from recbole_uip.evidence.bench import Matrices
from recbole_uip.evidence.figures import format_bench
from recbole_uip.evidence.task import Task
from recbole_uip.evidence.tuning_slice import Slice
from recbole_uip.settings import SettingsError

from ..em.conftest import make_world
from ..lm.conftest import WORDS, save_lm


@pytest.fixture
def task(tmp_path, monkeypatch):
    save_lm(tmp_path / "lm", max_position_embeddings=512)
    world = make_world(n_users=12, n_items=20, events_per_user=40)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[2:], 3)) for _ in range(20)]
    monkeypatch.setattr(
        module,
        "load_task",
        lambda config: Task(world.behaviours, texts, config.uip, np.arange(12) % 2),
    )
    monkeypatch.setattr(module, "matmul_ceiling", lambda *_: 1e12)
    return {
        "uip_lm": str(tmp_path / "lm"),
        "uip_cache": str(tmp_path / "cache"),
        "uip_item_text": "{title}",
        "uip_facets": {
            "interests": {"weight": "positive", "rank": 2},
            "taste": {"weight": "contrast", "rank": 2},
        },
        "uip_gradient": {"steps": 3, "learning_rate": 0.03},
    }


def test_all_of_it(task):
    results = module.bench_gradient("ml-100k", config=task, users=10, peers=2)

    figures = {each["key"]: each for each in results["figures"]}
    tuning = figures["tuning"]
    assert tuning["details"]["lm_tokens"] > 0 and tuning["measured"] > 0
    assert figures["flops"]["floor"] == 1e12
    assert {each["facet"] for each in results["agreement"]} == {"interests", "taste"}
    which = {(each["facets"], each["which"]) for each in results["likelihood"]}
    assert ("taste", "held out") in which and ("interests", "own") in which
    for each in results["likelihood"]:
        places = {"start", "gradient", "relinearized", "score x 1", "score x 0.1", "score x 0.01"}
        assert set(each["at"]) == places
    assert [each["facets"] for each in results["relinearized"]] == ["interests", "taste"]
    assert all(each["lm_tokens"] > 0 for each in results["relinearized"])
    ours, theirs = results["authors"]["rows"]
    gains = [each["reached"] - each["start"] for each in (ours, theirs)]
    assert ours["steps"] == 3
    assert ("not reached" in results["authors"]["lines"][1]) == (gains[1] < gains[0])
    assert all(each["own"] != 0 for each in (ours, theirs))
    # Each of its steps puts all texts of both users through the LM.
    assert ours["lm_tokens"] > 0 and theirs["lm_tokens"] % theirs["steps"] == 0
    json.dumps(results, allow_nan=False)
    assert "authors: 2 users" in format_bench(results)


def test_the_authors_way_ends_where_it_has_gained_as_much(task):
    config = {"uip_posterior": "gradient", **task}
    made = module.load_task(module.parse_config("ml-100k", None, config, ())[1])
    slice_ = Slice.of(made, 10)
    group = next(each for each in slice_.groups(made) if not each.passages[0].verbs)
    passages, owner, _ = slice_.passages(group, held_out=True)
    of_two = [(each, user) for each, user in zip(passages, owner, strict=True) if user < 2]
    passages, owner = [each for each, _ in of_two], np.array([user for _, user in of_two])

    def way(gain, most_steps=3):
        found = bench_authors._authors_way(group, np.arange(2), passages, owner, gain, most_steps)
        return found["steps"], found["reached"] - found["start"], found["lm_tokens"]

    steps, gains, lm_tokens = zip(*(way(np.inf, most) for most in (1, 2, 3)), strict=True)
    assert steps == (1, 2, 3)
    assert lm_tokens == (lm_tokens[0], 2 * lm_tokens[0], 3 * lm_tokens[0])
    # One step at least, however little is asked for; and no more than it takes.
    assert way(-np.inf)[0] == 1
    first = 1 + int(np.argmax(gains))
    assert way(max(gains) - 1e-6)[0] == first


def test_agreement_is_the_correlation_with_the_closed_form(rng):
    """Of profiles by the length of their history, both facets apart."""
    owner = np.repeat(np.arange(9), [3, 4, 5, 12, 13, 14, 30, 31, 1])
    gradient = rng.normal(size=(len(owner), 3))
    evidence = np.repeat(np.bincount(owner)[:, None], 2, axis=1)
    group = SimpleNamespace(
        units=SimpleNamespace(gradient=gradient, owner=owner, evidence=evidence),
        frame=SimpleNamespace(slices=[slice(0, 2), slice(2, 3)], variance=[0.5, 0.25]),
        fold=np.zeros(9, dtype=int),
        facets=[SimpleNamespace(name="interests"), SimpleNamespace(name="taste")],
    )
    sums = np.stack([gradient[owner == profile].sum(axis=0) for profile in range(9)])
    means = sums[:, :2] / (2 + evidence[:, :1]), sums[:, 2:] / (4 + evidence[:, 1:])
    offset = [rng.normal(size=each.shape) for each in means]
    offset[0] = 3 - means[0]
    posterior = SimpleNamespace(mode_=[2 * each + 1 for each in means], offset_=offset)
    found = module._agreement(posterior, group)
    assert [(each["facet"], each["least"], each["most"]) for each in found] == [
        (facet, *lengths)
        for facet in ("interests", "taste")
        for lengths in ((1, 10), (11, 25), (26, 31))
    ]
    assert [each["profiles"] for each in found] == [4, 3, 2] * 2
    np.testing.assert_allclose([each["mode"] for each in found], 1.0)
    np.testing.assert_allclose([each["offset"] for each in found[:3]], -1.0)
    short = [0, 1, 2, 8]
    expected = np.corrcoef(means[1][short, 0], offset[1][short, 0])[0, 1]
    np.testing.assert_allclose(found[3]["offset"], expected)


def test_flops_are_counted_by_hand():
    weights = Matrices(((4, 3), (3, 4)), (10, 3))
    assert module.tuning_flops(weights, 7, 5) == 4 * (24 * 7 + 30 * 5)


def test_the_authors_prompt_has_no_blocks():
    prompt = bench_authors.CausalPrompt(("a", "b"), (), ((1,), (2, 3)))
    mask = prompt.mask(2)
    assert torch.equal(mask, torch.ones(7, 7).tril().bool())


def test_users_that_are_not_there_are_said(task):
    with pytest.raises(SettingsError, match="users=400, but 12 have 20 training rows"):
        module.bench_gradient("ml-100k", config=task, users=400)
    with pytest.raises(SettingsError, match="users=2 must be at least 8"):
        module.bench_gradient("ml-100k", config=task, users=2)

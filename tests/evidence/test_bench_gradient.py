"""The benchmark of the gradient posterior, on a tiny LM: what it counts and what it says."""

import json

import numpy as np
import pytest
import torch

from recbole_uip.evidence import bench_authors
from recbole_uip.evidence import bench_gradient as module
from recbole_uip.evidence.bench import Matrices
from recbole_uip.evidence.figures import format_bench
from recbole_uip.evidence.task import Task
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
    assert all(-1 <= each["mode"] <= 1 for each in results["agreement"])
    which = {(each["facets"], each["which"]) for each in results["likelihood"]}
    assert ("taste", "held out") in which and ("interests", "own") in which
    for each in results["likelihood"]:
        places = {"start", "gradient", "relinearized", "score x 1", "score x 0.1", "score x 0.01"}
        assert set(each["at"]) == places
    assert [each["facets"] for each in results["relinearized"]] == ["interests", "taste"]
    assert all(each["lm_tokens"] > 0 for each in results["relinearized"])
    ours, theirs = results["authors"]["rows"]
    # Theirs goes on until it has gained as much as ours, or has made as many steps.
    gains = [each["reached"] - each["start"] for each in (ours, theirs)]
    assert ours["steps"] == 3 and 1 <= theirs["steps"] <= 3
    assert gains[1] >= gains[0] or theirs["steps"] == 3
    assert all(each["own"] != 0 for each in (ours, theirs))
    # Each of its steps puts all texts of both users through the LM.
    assert ours["lm_tokens"] > 0 and theirs["lm_tokens"] % theirs["steps"] == 0
    json.dumps(results, allow_nan=False)
    assert "authors: 2 users" in format_bench(results)


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

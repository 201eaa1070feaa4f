"""Adapters: trained on texts alone, whole or absent, and read as any other by the LM."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.adapt import adapt
from recbole_uip.lm.backbone import ModelError, load
from recbole_uip.lm.scoring import score, score_by_autograd
from recbole_uip.settings import LMSettings, SettingsError

from .conftest import ENDINGS

FACETS = ["interests", "taste"]
GENRES = ("comedy", "drama", "action", "thriller")
TEXTS = [
    f"{first} {second} ( {genre} )"
    for (first, second), genre in itertools.product(
        (("star", "wars"), ("toy", "story"), ("night", "city"), ("war", "man"), ("the", "heat")),
        (*GENRES, "war", "drama thriller"),
    )
]


@pytest.fixture
def settings(model_folder):
    return LMSettings(name=str(model_folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_texts_that_were_never_seen_become_likelier(settings, tmp_path, method):
    folder = tmp_path / "adapter"
    found = adapt(
        TEXTS, FACETS, settings, tmp_path, folder, method=method, size=4, epochs=15,
        learning_rate=3e-2,
    )  # fmt: skip
    assert found.texts + found.held_out == len(TEXTS)
    assert len(found.curve) == 15
    # training logs anew, so the curve begins with the first epoch
    assert found.curve[0] != pytest.approx(found.before) and min(found.curve) < found.curve[0]
    assert found.after == pytest.approx(min(found.curve), abs=1e-4)
    assert found.after < found.before - 0.1
    adapted = dataclasses.replace(settings, adapter=str(folder))
    plain, moved = (score(TEXTS, FACETS, ENDINGS, s, tmp_path) for s in (settings, adapted))
    assert moved.log_likelihood.mean() > plain.log_likelihood.mean() + 0.1
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(settings.name)


def test_virtual_tokens_come_first_and_all_see_them(settings, tmp_path):
    folder = tmp_path / "adapter"
    adapt(TEXTS, FACETS, settings, tmp_path, folder, method="prompt", size=3, epochs=1)
    plain = load(settings, tmp_path)
    backbone = load(dataclasses.replace(settings, adapter=str(folder)), tmp_path)
    n_words = len(plain.model.get_input_embeddings().weight)
    assert backbone.virtual_ids == (n_words, n_words + 1, n_words + 2)
    assert backbone.model.get_output_embeddings().weight.shape[0] == n_words
    virtual = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    weight = backbone.model.get_input_embeddings().weight
    assert not weight.requires_grad
    torch.testing.assert_close(weight[n_words:], virtual)
    prompt = prompts.build(backbone, FACETS, ENDINGS)
    assert prompt.token_ids[:3].tolist() == list(backbone.virtual_ids)
    assert prompt.mask()[prompt.soft_positions][:, :3].all()
    # the fast path says what the model itself says
    ids = prompts.tokenize(backbone.tokenizer, TEXTS[:4])
    exact = score_by_autograd(backbone, prompt, ids)
    fast = score(
        TEXTS[:4], FACETS, ENDINGS, dataclasses.replace(settings, adapter=str(folder)), tmp_path
    )
    np.testing.assert_allclose(fast.log_likelihood, exact["log_likelihood"], rtol=1e-4)
    np.testing.assert_allclose(fast.text, exact["text"], rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_adapter(settings, tmp_path):
    weights = []
    for name in ("first", "second"):
        adapt(TEXTS, FACETS, settings, tmp_path, tmp_path / name, size=2, epochs=1, seed=3)
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])


def test_an_interrupted_training_leaves_nothing(settings, tmp_path, monkeypatch):
    import peft

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", interrupted)
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        adapt(TEXTS, FACETS, settings, tmp_path, target / "adapter", epochs=1)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ia3"}, r"method='ia3' must be one of lora, prompt"),
        ({"size": 0}, r"size=0 must be at least 1"),
        ({"epochs": 0}, r"epochs=0 must be at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0 must be positive and finite"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan must be positive and finite"),
    ],
)
def test_refusals(settings, tmp_path, change, message):
    with pytest.raises(SettingsError, match=message):
        adapt(TEXTS, FACETS, settings, tmp_path, tmp_path / "adapter", **change)


def test_more_refusals(settings, tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SettingsError, match="adapter is there already"):
        adapt(TEXTS, FACETS, settings, tmp_path, tmp_path / "adapter")
    with pytest.raises(SettingsError, match="3 distinct item texts"):
        adapt(TEXTS[:3] * 9, FACETS, settings, tmp_path, tmp_path / "other")
    adapted = dataclasses.replace(settings, adapter="some/where")
    with pytest.raises(SettingsError, match="leave it out"):
        adapt(TEXTS, FACETS, adapted, tmp_path, tmp_path / "other")


def test_virtual_tokens_that_are_no_embeddings_are_refused(settings, tmp_path):
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load(settings, tmp_path).model, config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match="PREFIX_TUNING"):
        load(dataclasses.replace(settings, adapter=str(tmp_path / "prefix")), tmp_path)

"""Mean embeddings: those of a plain forward pass, whatever the batch, and each text run once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from recbole_uip.lm import backbone as backbones
from recbole_uip.lm import embedding, vectors
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.embedding import embed, mean_states
from recbole_uip.settings import LMSettings

from .conftest import TEXTS, WORDS, make_tokenizer


@pytest.fixture
def settings(model_folder):
    return LMSettings(name=str(model_folder), dtype="float32", device="cpu", batch_tokens=12)


@pytest.fixture
def lengths(backbone, ids):
    return {text: len(row) for text, row in zip(TEXTS, ids, strict=True)}


def test_vectors_are_those_of_a_forward_pass_for_each_text(settings, tmp_path, backbone, ids):
    texts = [TEXTS[2], *TEXTS, TEXTS[0]]
    result = embed(texts, settings, tmp_path)
    assert result.vectors.dtype == np.float32
    expected = {}
    for text, row in zip(TEXTS, ids, strict=True):
        output = backbone.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        expected[text] = output.hidden_states[-1][0].mean(0).numpy()
    np.testing.assert_allclose(
        result.vectors, np.stack([expected[text] for text in texts]), rtol=1e-5, atol=1e-5
    )
    # texts differ, so the order is tested
    assert np.ptp(result.vectors[1:-1], axis=0).min() > 0.01
    assert result.fingerprint == backbones.resolve(settings, tmp_path).fingerprint


def test_padding_and_company_do_not_matter(backbone64, ids):
    alone = torch.cat([mean_states(backbone64, (), [row]) for row in ids])
    together = mean_states(backbone64, (), ids)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert together.dtype == torch.float64


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_the_token_budget_does_not_matter(batch_tokens, settings, tmp_path):
    other = dataclasses.replace(settings, batch_tokens=batch_tokens)
    np.testing.assert_allclose(
        embed(TEXTS, other, tmp_path / "other").vectors,
        embed(TEXTS, settings, tmp_path).vectors,
        rtol=1e-5,
        atol=1e-6,
    )


def test_tokens_before_the_text_are_seen_but_not_counted(backbone, ids):
    lead = [3, 5]
    actual = mean_states(backbone, lead, ids)
    row = torch.tensor([[*lead, *ids[1]]])
    states = backbone.model(input_ids=row, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(actual[1], states[2:].mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, mean_states(backbone, (), ids), atol=1e-3)


def test_a_second_run_does_not_even_load_the_lm(settings, tmp_path, monkeypatch, lengths):
    first = embed(TEXTS, settings, tmp_path)
    assert first.lm_tokens == sum(lengths.values())
    monkeypatch.setattr(vectors, "load", lambda *_: pytest.fail("the LM was loaded"))
    second = embed(TEXTS[::-1], settings, tmp_path)
    assert second.lm_tokens == 0
    np.testing.assert_array_equal(second.vectors, first.vectors[::-1])


def test_one_new_text_costs_one_text(settings, tmp_path, lengths):
    before = embed(TEXTS[:-1], settings, tmp_path)
    result = embed([*TEXTS, TEXTS[-1]], settings, tmp_path)
    assert result.lm_tokens == lengths[TEXTS[-1]]
    np.testing.assert_array_equal(result.vectors[: len(TEXTS) - 1], before.vectors)
    np.testing.assert_array_equal(result.vectors[-1], result.vectors[-2])


def test_an_interrupted_run_resumes(settings, tmp_path, monkeypatch, lengths):
    calls = []

    def fail_third(loaded, lead, texts):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(sum(len(lead) + len(text) for text in texts))
        return mean_states(loaded, lead, texts)

    monkeypatch.setattr("recbole_uip.lm.scoring.n_workers", lambda _: 1)
    monkeypatch.setattr(embedding, "mean_states", fail_third)
    with pytest.raises(KeyboardInterrupt):
        embed(TEXTS, settings, tmp_path)
    monkeypatch.setattr(embedding, "mean_states", mean_states)
    assert embed(TEXTS, settings, tmp_path).lm_tokens == sum(lengths.values()) - sum(calls)


def test_other_types_have_their_own_embeddings(settings, tmp_path):
    embed(TEXTS[:1], settings, tmp_path)
    narrow = dataclasses.replace(settings, dtype="bfloat16")
    assert embed(TEXTS[:1], narrow, tmp_path).lm_tokens > 0
    assert len(list((tmp_path / "embeddings").iterdir())) == 2


def test_another_prompt_version_is_read_anew(settings, tmp_path, monkeypatch):
    first = embed(TEXTS[:1], settings, tmp_path)
    monkeypatch.setattr(prompts, "VERSION", prompts.VERSION + 1)
    assert embed(TEXTS[:1], settings, tmp_path).lm_tokens == first.lm_tokens > 0


def test_no_texts(settings, tmp_path):
    result = embed([], settings, tmp_path)
    assert result.vectors.shape == (0, 32) and result.vectors.dtype == np.float32
    assert result.lm_tokens == 0


def test_last_states_may_be_narrower_than_the_layers(tmp_path):
    """Of OPT-350m they are projected to the width of its embeddings."""
    config = OPTConfig(
        vocab_size=len(WORDS) + 1, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        do_layer_norm_before=False,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    settings = LMSettings(name=str(tmp_path / "opt"), dtype="float32", device="cpu")
    for texts in ([], TEXTS):
        assert embed(texts, settings, tmp_path).vectors.shape == (len(texts), 16)


@pytest.mark.parametrize("text", ["", "  ", None])
def test_empty_texts_are_refused(text, settings, tmp_path):
    with pytest.raises(ValueError, match=r"texts\[1\]"):
        embed([TEXTS[0], text], settings, tmp_path)


def test_texts_longer_than_the_lm_are_refused(settings, tmp_path):
    with pytest.raises(backbones.ModelError, match="needs 80 positions in all, but the LM has 64"):
        embed(["star " * 80], settings, tmp_path)

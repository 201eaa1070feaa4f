"""The score cache: nothing is scored twice, and nothing that is lost stays lost."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from recbole_uip.lm import backbone as backbones
from recbole_uip.lm import llama, scoring
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.embedding import embed, mean_states
from recbole_uip.lm.scoring import holds_scores, score
from recbole_uip.lm.store import MAX_SHARDS, ScoreStore, digest
from recbole_uip.settings import LMSettings
from recbole_uip.work import even_batches

from .conftest import ENDINGS, TEXTS, WORDS, make_tokenizer

FACETS = ["interests", "taste"]


@pytest.fixture
def settings(model_folder):
    return LMSettings(name=str(model_folder), dtype="float32", device="cpu", batch_tokens=12)


@pytest.fixture
def lengths(model_folder):
    """Tokens that a text costs, its ending included."""
    tokenizer = backbones.load(
        LMSettings(name=str(model_folder), dtype="float32", device="cpu"), model_folder
    ).tokenizer
    return {text: len(prompts.tokenize(tokenizer, [text])[0]) + 1 for text in TEXTS}


def same(first, second):
    for name in ("log_likelihood", "n_tokens", "text", "feedback", "feedback_logit", "theta0"):
        np.testing.assert_allclose(
            getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_scores_are_those_of_autograd_in_the_order_given(settings, tmp_path):
    texts = [TEXTS[2], *TEXTS, TEXTS[0]]
    result = score(texts, FACETS, ENDINGS, settings, tmp_path)
    loaded = backbones.load(settings, tmp_path)
    prompt = prompts.build(loaded, FACETS, ENDINGS)
    ids = prompts.tokenize(loaded.tokenizer, texts)
    expected = scoring.score_by_autograd(loaded, prompt, ids)
    for name, values in expected.items():
        actual = getattr(result, name)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, values.numpy(), rtol=1e-4, atol=1e-4)
    assert result.n_tokens.tolist() == [len(row) for row in ids]
    assert result.text.shape == (len(texts), 2, 32)
    assert result.theta0.shape == (2, 32)
    assert loaded.embed_dim == 32


def test_second_run_does_not_even_load_the_lm(settings, tmp_path, monkeypatch, lengths):
    first = score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    assert first.lm_tokens >= sum(lengths.values())
    monkeypatch.setattr(scoring, "load", lambda *_: pytest.fail("the LM was loaded"))
    second = score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    assert second.lm_tokens == 0
    for name in ("log_likelihood", "text", "feedback", "feedback_logit", "theta0"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_of_a_long_text_the_lm_reads_the_beginning(settings, tmp_path, caplog):
    cut = dataclasses.replace(settings, text_tokens=3)
    with caplog.at_level(logging.WARNING):
        found = score(TEXTS, FACETS, ENDINGS, cut, tmp_path)
    n_long = sum(score(TEXTS, FACETS, ENDINGS, settings, tmp_path).n_tokens > 3)
    assert n_long > 0 and f"{n_long} of {len(TEXTS)} texts are longer" in caplog.text
    assert found.n_tokens.max() == 3
    loaded = backbones.load(settings, tmp_path)
    ids = [row[:3] for row in prompts.tokenize(loaded.tokenizer, TEXTS)]
    prompt = prompts.build(loaded, FACETS, ENDINGS)
    expected = scoring.score_by_autograd(loaded, prompt, ids)
    np.testing.assert_allclose(found.text, expected["text"].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        embed(TEXTS, cut, tmp_path).vectors,
        mean_states(loaded, prompts.lead_ids(loaded), ids).numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_one_new_text_costs_one_text(settings, tmp_path, lengths):
    score(TEXTS[:-1], FACETS, ENDINGS, settings, tmp_path)
    result = score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    assert result.lm_tokens == lengths[TEXTS[-1]]
    same(result, score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "other"))


def test_duplicates_are_scored_once(settings, tmp_path, lengths):
    score(TEXTS[:1], FACETS, ENDINGS, settings, tmp_path)
    result = score([TEXTS[1]] * 5, FACETS, ENDINGS, settings, tmp_path)
    assert result.lm_tokens == lengths[TEXTS[1]]
    assert (result.text == result.text[:1]).all()
    assert holds_scores([TEXTS[1]] * 5, FACETS, ENDINGS, settings, tmp_path)
    assert not holds_scores(TEXTS, FACETS, ENDINGS, settings, tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_resumes(error, settings, tmp_path, monkeypatch, lengths):
    original, calls = llama.LlamaScorer.score, []

    def fail_third(self, texts):
        if len(calls) == 2:
            raise error
        calls.append(sum(len(text) + 1 for text in texts))  # an ending of one token
        return original(self, texts)

    monkeypatch.setattr(scoring, "n_workers", lambda _: 1)
    monkeypatch.setattr(llama.LlamaScorer, "score", fail_third)
    with pytest.raises(error):
        score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    monkeypatch.setattr(llama.LlamaScorer, "score", original)
    result = score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    assert calls[0] == max(lengths.values())  # longest first
    assert result.lm_tokens == sum(lengths.values()) - sum(calls)
    same(result, score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "other"))


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_share_what_they_score_at_once(damaged, settings, tmp_path, monkeypatch, lengths):
    settings = dataclasses.replace(settings, batch_tokens=1)  # a batch a text
    alone = score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "other")
    (theirs,) = tmp_path.glob("other/scores/*/shard-*.safetensors")
    content = bytearray(theirs.read_bytes())
    if damaged:
        content[-50] ^= 4
    original, calls = llama.LlamaScorer.score, []

    def while_another_writes(self, texts):
        calls.append(sum(len(text) + 1 for text in texts))
        ours = tmp_path / "ours" / theirs.parent.relative_to(tmp_path / "other")
        (ours / theirs.name).write_bytes(content)
        return original(self, texts)

    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    monkeypatch.setattr(scoring, "n_workers", lambda _: 1)
    monkeypatch.setattr(llama.LlamaScorer, "score", while_another_writes)
    shared = score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "ours")
    same(shared, alone)
    prefix = alone.lm_tokens - sum(lengths.values())
    assert shared.lm_tokens == prefix + sum(calls)
    assert damaged or sum(calls) < sum(lengths.values())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_shard_is_named_and_scored_again(damage, settings, tmp_path, lengths, caplog):
    first = score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    (path,) = tmp_path.glob("scores/*/shard-*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    elif damage == "flipped":
        content[-50] ^= 4
    else:
        content = b""
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = score(TEXTS, FACETS, ENDINGS, settings, tmp_path)
    assert path.name in caplog.text and "damaged" in caplog.text
    assert second.lm_tokens == sum(lengths.values())
    same(first, second)
    caplog.clear()
    assert score(TEXTS, FACETS, ENDINGS, settings, tmp_path).lm_tokens == 0
    assert not caplog.text


def test_other_prompts_and_types_have_their_own_scores(settings, tmp_path, lengths):
    import dataclasses

    score(TEXTS[:1], FACETS, ENDINGS, settings, tmp_path)
    narrow = dataclasses.replace(settings, dtype="bfloat16")
    for facets, endings, chosen in (
        (FACETS[::-1], ENDINGS, settings),
        (FACETS, None, settings),
        (FACETS, ENDINGS, narrow),
    ):
        assert score(TEXTS[:1], facets, endings, chosen, tmp_path).lm_tokens > 0
    assert len(list((tmp_path / "scores").iterdir())) == 4


def test_without_endings_there_is_no_feedback(settings, tmp_path):
    result = score(TEXTS, FACETS, None, settings, tmp_path)
    assert result.feedback is None and result.feedback_logit is None
    assert np.isfinite(result.text).all()


def test_no_texts(settings, tmp_path):
    result = score([], FACETS, ENDINGS, settings, tmp_path)
    assert result.text.shape == result.feedback.shape == (0, 2, 32)
    assert result.lm_tokens == 0


@pytest.mark.parametrize("text", ["", "  ", None])
def test_empty_texts_are_refused(text, settings, tmp_path):
    with pytest.raises(ValueError, match=r"texts\[1\]"):
        score([TEXTS[0], text], FACETS, ENDINGS, settings, tmp_path)


def test_texts_longer_than_the_lm_are_refused(settings, tmp_path):
    with pytest.raises(backbones.ModelError, match="the LM has 64"):
        score(["star " * 80], FACETS, ENDINGS, settings, tmp_path)


def test_the_general_way_gives_the_same_scores(settings, tmp_path, monkeypatch):
    fast = score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "fast")
    monkeypatch.setattr(llama, "supports", lambda *_: False)
    same(fast, score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "general"))


def test_batches_hold_every_row_once_and_keep_the_budget():
    lengths = np.array([3, 9, 1, 1, 7, 30, 2, 2])
    batches = list(even_batches(lengths, 10))
    assert sorted(np.concatenate(batches).tolist()) == list(range(8))
    assert all(len(b) == 1 or len(b) * lengths[b].max() <= 10 for b in batches)


class TestStore:
    def columns(self, keys):
        return {"value": np.array([[float(key[0])] for key in keys], np.float32)}

    def test_many_shards_are_merged(self, tmp_path):
        store = ScoreStore(tmp_path / "s", {})
        keys = [digest(str(number)) for number in range(MAX_SHARDS + 3)]
        for key in keys:
            store.write([key], self.columns([key]))
        store.compact()
        assert len(list((tmp_path / "s").glob("shard-*"))) == 1
        columns, found = store.read(keys[::-1])
        assert found.all()
        np.testing.assert_array_equal(columns["value"], self.columns(keys[::-1])["value"])

    def test_two_writers_of_the_same_text(self, tmp_path):
        keys = [digest("a"), digest("b")]
        for _ in range(2):
            ScoreStore(tmp_path, {}).write(keys, self.columns(keys))
        columns, found = ScoreStore(tmp_path, {}).read([keys[1], digest("c")])
        assert found.tolist() == [True, False]
        assert columns["value"][0, 0] == keys[1][0]

    def test_nothing_half_written_stays(self, tmp_path, monkeypatch):
        store = ScoreStore(tmp_path, {})
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write([digest("a")], self.columns([digest("a")]))
        assert list(tmp_path.iterdir()) == []


def test_a_mask_that_is_not_honoured_is_refused(backbone, prompt, monkeypatch):
    original = prompts.inputs
    monkeypatch.setattr(
        prompts,
        "inputs",
        lambda *args: original(*args) | {"attention_mask": None},
    )
    with pytest.raises(backbones.ModelError, match="4-D attention mask"):
        scoring.check_mask(backbone, prompt)


def test_an_lm_that_takes_no_mask_is_refused(prompt):
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = BloomForCausalLM(BloomConfig(vocab_size=len(WORDS) + 1, **sizes))
    bloom = backbones.Backbone(model, make_tokenizer(), torch.device("cpu"), torch.float32, "bloom")
    with pytest.raises(backbones.ModelError, match="BloomForCausalLM cannot be run on embeddings"):
        scoring.check_mask(bloom, prompt)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_workers_do_not_matter(n_workers, settings, tmp_path, monkeypatch):
    first = score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "first")
    monkeypatch.setattr(scoring, "n_workers", lambda _: n_workers)
    same(first, score(TEXTS, FACETS, ENDINGS, settings, tmp_path / "second"))


def test_no_global_state_is_touched(settings, tmp_path):
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    score(TEXTS[:2], FACETS, ENDINGS, settings, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == n_threads

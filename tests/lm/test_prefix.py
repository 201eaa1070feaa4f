"""Prefix scores: the gradients of what the model itself says of texts behind a prompt."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recbole_uip.lm import llama, prefix_llama, vectors
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone, ModelError, load, resolve
from recbole_uip.lm.forward import prefix_likelihoods
from recbole_uip.lm.likelihood import PrefixLikelihood, feedback_passage, text_passage
from recbole_uip.lm.prefix import Prefix, PrefixScorer, score_prefix
from recbole_uip.settings import LMSettings

from .conftest import ENDINGS, TEXTS, WORDS, make_tokenizer

FACETS = ["interests", "taste"]
OF_FEEDBACK = [False, True]


@pytest.fixture
def settings(model_folder):
    return LMSettings(name=str(model_folder), dtype="float32", device="cpu", batch_tokens=12)


@pytest.fixture
def scorer(backbone64):
    return PrefixScorer(backbone64, prompts.build(backbone64, FACETS, ENDINGS), OF_FEEDBACK)


def said(scorer, row, values, f):
    """What the LM says in one pass over prompt and text, values of facet ``f`` set by a hook."""
    backbone, prompt = scorer.backbone, scorer.prompt
    full = [*scorer.bridge, *row, *prompt.ending.common]
    position, (layers, kv_heads, head_dim) = prompt.soft_positions[f], values.shape
    hooks = []
    for number, layer in enumerate(backbone.model.model.layers[-layers:]):

        def put(_, __, output, number=number):
            output = output.clone()
            # what the prefix itself makes of it is not part of the model: texts alone read it
            output[0, position] = values[number].reshape(kv_heads * head_dim)
            return output

        hooks.append(layer.self_attn.v_proj.register_forward_hook(put))
    theta = prompt.theta0(backbone)
    given = prompts.inputs(backbone, prompt, theta, [full])
    n_prefix = len(prompt)
    try:
        logits = backbone.model(**given, use_cache=False).logits[0, n_prefix:]
    finally:
        for hook in hooks:
            hook.remove()
    if scorer.of_feedback[f]:
        end = logits[-1]
        return end[prompt.ending.liked] - end[prompt.ending.disliked]
    return logits[: len(row)].log_softmax(-1)[torch.arange(len(row)), torch.tensor(row)].sum()


def test_scores_are_slopes_of_what_the_model_says(scorer, ids):
    found = scorer.score(ids).unflatten(1, (2, *scorer.shape))
    # the last layer alone of the two is moved, so nothing of the prefix depends on it
    assert scorer.shape[0] == 1
    for f in range(2):
        values = scorer.theta0[f].unflatten(0, scorer.shape)
        step = 1e-5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(f)).double()
        for number, row in enumerate(ids):
            up, down = (said(scorer, row, values + sign * step, f) for sign in (1, -1))
            slope = (found[number, f] * step).sum()
            torch.testing.assert_close((up - down) / 2, slope, rtol=1e-5, atol=1e-12)
    assert (found.abs().amax(dim=(2, 3, 4)) > 1e-6).all()


def test_padding_and_company_do_not_matter(scorer, ids):
    alone = torch.cat([scorer.score([row]) for row in ids])
    torch.testing.assert_close(scorer.score(ids), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
        ("gemma2", {"head_dim": 8, "sliding_window": 12}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_other_layouts(kind, sizes, ids):
    """A text's scores are its own, whatever stands beside it."""
    common = {
        "vocab_size": len(WORDS) + 1, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **common, **sizes, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().requires_grad_(False).eval()
    backbone = Backbone(model, make_tokenizer(), torch.device("cpu"), torch.float64, kind)
    scorer = PrefixScorer(backbone, prompts.build(backbone, FACETS, ENDINGS), OF_FEEDBACK)
    alone = torch.cat([scorer.score([row]) for row in ids])
    assert torch.isfinite(alone).all() and (alone.abs().amax(dim=1) > 1e-3).all()
    # softmax of some layouts is in float32
    torch.testing.assert_close(scorer.score(ids), alone, rtol=1e-5, atol=1e-6)


def test_passes_of_few_logits_say_the_same(scorer, ids, monkeypatch):
    together = scorer.score(ids)
    monkeypatch.setattr(prompts, "LOGIT_BYTES", 1)
    torch.testing.assert_close(scorer.score(ids), together, rtol=1e-10, atol=1e-12)


def test_a_text_of_one_token_has_scores_of_its_own(scorer):
    first, second = scorer.score([[3], [4]])
    of_texts = slice(len(first) // 2)
    assert not torch.allclose(first[of_texts], second[of_texts], atol=1e-3)


def test_the_token_budget_and_the_order_do_not_matter(settings, tmp_path):
    other = dataclasses.replace(settings, batch_tokens=1000)
    first = score_prefix(TEXTS, FACETS, OF_FEEDBACK, ENDINGS, settings, tmp_path)
    second = score_prefix(TEXTS[::-1], FACETS, OF_FEEDBACK, ENDINGS, other, tmp_path / "other")
    assert first.vectors.shape == (len(TEXTS), 2 * 1 * 2 * 8)
    np.testing.assert_allclose(first.vectors, second.vectors[::-1], rtol=1e-3, atol=1e-5)
    # texts differ, so the order is tested
    assert np.ptp(first.vectors, axis=0).min() > 1e-3


def test_what_is_there_does_not_even_load_the_lm(settings, tmp_path, monkeypatch):
    first = score_prefix(TEXTS, FACETS, OF_FEEDBACK, ENDINGS, settings, tmp_path)
    assert first.lm_tokens > 0
    monkeypatch.setattr(vectors, "load", lambda *_: pytest.fail("the LM was loaded"))
    second = score_prefix([*TEXTS, TEXTS[0]], FACETS, OF_FEEDBACK, ENDINGS, settings, tmp_path)
    assert second.lm_tokens == 0
    np.testing.assert_array_equal(second.vectors, first.vectors[[*range(len(TEXTS)), 0]])


@pytest.mark.parametrize(
    "changed",
    [
        (["interests", "aversions"], OF_FEEDBACK, ENDINGS),
        (FACETS, [True, True], ENDINGS),
        (FACETS, OF_FEEDBACK, (" and loved it", " and the night")),
    ],
)
def test_other_prompts_are_scored_anew(changed, settings, tmp_path):
    first = score_prefix(TEXTS, FACETS, OF_FEEDBACK, ENDINGS, settings, tmp_path)
    second = score_prefix(TEXTS, *changed, settings, tmp_path)
    assert second.lm_tokens > 0 and not np.allclose(first.vectors, second.vectors)


def test_transformers_is_imported_when_an_lm_is_loaded_and_not_before():
    code = "import sys, recbole_uip.lm; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_endings_that_no_facet_is_judged_by_do_not_matter(settings, tmp_path):
    first = score_prefix(TEXTS, FACETS, [False, False], ENDINGS, settings, tmp_path)
    second = score_prefix(TEXTS, FACETS, [False, False], None, settings, tmp_path)
    assert second.lm_tokens == 0
    np.testing.assert_array_equal(first.vectors, second.vectors)


def test_an_lm_that_forgets_its_prefix_is_refused(settings, tmp_path, monkeypatch):
    backbone = load(settings, tmp_path, resolve(settings, tmp_path))
    forward = type(backbone.model).forward
    monkeypatch.setattr(llama, "supports", lambda *_: False)

    def forgetful(self, *args, past_key_values=None, **kwargs):
        if kwargs.get("input_ids") is not None:
            kwargs["attention_mask"], past_key_values = None, None
        return forward(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(backbone.model), "forward", forgetful)
    with pytest.raises(ModelError, match="source: prefix cannot be used"):
        PrefixScorer(backbone, prompts.build(backbone, FACETS, ENDINGS), OF_FEEDBACK)


def test_likelihoods_are_those_of_the_model(scorer, ids):
    """Values far from θ⁰, and gradients at it: the scores."""
    moved = scorer.theta0 + 0.3 * torch.randn(
        scorer.theta0.shape, generator=torch.Generator().manual_seed(0)
    ).to(scorer.theta0)
    _, _, lm_tokens = prefix_likelihoods(scorer, moved, ids)
    assert lm_tokens == sum(len(row) + len(scorer.prompt.ending.common) + 1 for row in ids)
    for facets in ([0, 1], [1]):
        given = scorer.theta0.clone()
        given[facets] = moved[facets]
        tuned = PrefixLikelihood(scorer, facets)
        tuned.max_norm = 1e9  # scaling back has its own test
        theta = given[facets].expand(len(ids), -1, -1).numpy()
        found = tuned.value([text_passage([row]) for row in ids], theta)
        np.testing.assert_allclose(found, prefix_likelihoods(scorer, given, ids)[0], rtol=1e-9)
        assert tuned.n_tokens(text_passage(ids[:2])) == len(ids[0]) + len(ids[1]) + 1
    tuned = PrefixLikelihood(scorer, [0, 1])
    theta = np.repeat(tuned.theta0[None], len(ids), axis=0)
    scores = scorer.score(ids).unflatten(1, (2, -1)).numpy()
    _, gradient = tuned.value_and_gradient([text_passage([row]) for row in ids], theta)
    np.testing.assert_allclose(gradient[:, 0], scores[:, 0], rtol=1e-4, atol=1e-6)
    # with p = 1/2, a liked behaviour's gradient is half of the logit's
    _, logits, _ = prefix_likelihoods(scorer, scorer.theta0, ids)
    answers = [
        feedback_passage([row], scorer.prompt.ending, [1], [-logit])
        for row, logit in zip(ids, logits.tolist(), strict=True)
    ]
    value, gradient = tuned.value_and_gradient(answers, theta)
    np.testing.assert_allclose(value, np.log(0.5), atol=1e-5)
    np.testing.assert_allclose(gradient[:, 1], 0.5 * scores[:, 1], rtol=1e-4, atol=1e-6)


def near(scorer, n):
    """Soft tokens near θ⁰, a set for each of n texts."""
    noise = torch.randn(n, *scorer.theta0.shape, generator=torch.Generator().manual_seed(1))
    return scorer.theta0 + 0.3 * noise.to(scorer.theta0)


def test_the_general_way_says_the_same(scorer, ids, monkeypatch):
    monkeypatch.setattr(llama, "supports", lambda *_: False)
    general = PrefixScorer(scorer.backbone, scorer.prompt, OF_FEEDBACK)
    theta = near(scorer, len(ids))
    full = [[*row, *scorer.prompt.ending.common] for row in ids]
    for way in (scorer, general):
        run = way.run(theta, full)
        assert run.shape[-1] == (32 if way is scorer else len(WORDS) + 1)
    # padding aside: behind a text's end either says what it likes
    for ours, theirs in zip(
        scorer.likelihoods(scorer.run(theta, full), ids),
        general.likelihoods(general.run(theta, full), ids),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scorer.score(ids), general.score(ids), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("room", [1 << 30, 0, 3000])
def test_trunks_that_are_kept_change_nothing(backbone64, ids, room, monkeypatch):
    monkeypatch.setattr(prefix_llama, "KEPT_BYTES", room)
    kept = Prefix(backbone64, prompts.build(backbone64, FACETS, ENDINGS))
    theta = near(kept, len(ids))
    alone = torch.stack([kept.run(theta[[n]], [row])[0, len(row)] for n, row in enumerate(ids)])
    run = 0

    def counted(function):
        def count(layer, x, *rest):
            nonlocal run
            run += len(x) * (layer is kept._llama.layers[0])
            return function(layer, x, *rest)

        return count

    monkeypatch.setattr(kept._llama, "_layer", counted(kept._llama._layer))
    last = torch.tensor([len(row) for row in ids])
    together = kept.run(theta, ids)[torch.arange(len(ids)), last]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    every = sum(len(row) + len(kept.bridge) for row in ids)
    assert run == 0 if room > 3000 else run == every if room == 0 else 0 < run < every


def test_trunks_of_a_catalogue_are_run_once_with_endings_and_without(backbone64, ids, monkeypatch):
    prefix = Prefix(backbone64, prompts.build(backbone64, FACETS, ENDINGS))
    common = prefix.prompt.ending.common
    full = [[*row, *common] for row in ids]
    expected = [prefix._llama._trunk([[*prefix.bridge, *row]], False)[0] for row in [*ids, *full]]
    prefix.keep(full, len(common))
    monkeypatch.setattr(prefix._llama, "_run_trunks", None)
    for row, trunk in zip([*ids, *full], expected, strict=True):
        found = prefix._llama._trunk([[*prefix.bridge, *row]], True)[0]
        torch.testing.assert_close(found, trunk, rtol=1e-10, atol=1e-10)


def test_a_trunk_is_the_same_in_any_company(backbone, ids):
    """To the bit: or a run that was killed would end otherwise than one that was not."""
    prompt = prompts.build(backbone, FACETS, ENDINGS)
    first, second = (Prefix(backbone, prompt)._llama for _ in range(2))
    together = first._trunk(ids, True)
    for row, text in reversed(list(enumerate(ids))):
        alone = second._trunk([text], True)[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=0)


def test_values_longer_than_any_name_has_are_scaled_back(scorer, ids):
    tuned = PrefixLikelihood(scorer, [0])
    assert tuned.max_norm == pytest.approx(1.001 * float(scorer.theta0.norm(dim=1).max()))
    direction = np.random.default_rng(0).normal(size=(1, *tuned.theta0.shape))
    direction *= tuned.max_norm / np.linalg.norm(direction)
    passages = [text_passage([ids[0]])]
    far = tuned.value(passages, 7.0 * direction)
    np.testing.assert_allclose(far, tuned.value(passages, direction), rtol=1e-9)

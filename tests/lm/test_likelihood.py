"""True likelihoods under soft tokens: values, gradients, and that nothing else moves."""

import shutil

import numpy as np
import pytest
import torch
from scipy.special import expit

from recbole_uip.lm import llama
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.likelihood import (
    PrefixLikelihood,
    SoftTokenLikelihood,
    feedback_passage,
    text_passage,
)
from recbole_uip.lm.prefix import Prefix

from .conftest import ENDINGS, TEXTS, make_backbone


@pytest.fixture
def backbone():
    return make_backbone(torch.float64)


@pytest.fixture
def theta(backbone, prompt, rng):
    """A set of soft tokens for each text, near their start."""
    start = prompt.theta0(backbone).numpy()
    return start + 0.1 * rng.normal(size=(len(TEXTS), *start.shape))


def likelihood(backbone, prompt, facets, **options):
    made = SoftTokenLikelihood(backbone, prompt, facets, **options)
    made.max_norm = 1e9  # scaling back has its own test
    return made


@pytest.mark.parametrize("facets", [[0, 1, 2], [0], [2], [1, 2]])
def test_text_likelihood_is_that_of_the_model(backbone, prompt, ids, theta, facets):
    full = np.repeat(prompt.theta0(backbone).numpy()[None], len(ids), axis=0)
    full[:, facets] = theta[:, facets]
    leaf = torch.tensor(full, requires_grad=True)
    expected = prompts.log_likelihood(backbone, prompt, leaf, ids)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    tuned = likelihood(backbone, prompt, facets)
    passages = [text_passage([text]) for text in ids]
    value, actual = tuned.value_and_gradient(passages, theta[:, facets])
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-9)
    np.testing.assert_allclose(actual, gradient[:, facets], atol=1e-6)
    np.testing.assert_allclose(tuned.value(passages, theta[:, facets]), value, rtol=1e-12)


def test_feedback_likelihood_is_that_of_the_verbs(backbone, prompt, ids, theta):
    liked, intercepts = np.array([1, 0, 1, 1, 0, 0]), np.linspace(-1, 1, 6)
    lift = prompts.feedback_logit(backbone, prompt, torch.tensor(theta), ids).numpy()
    probability = expit(lift + intercepts)
    passages = [
        feedback_passage([text], prompt.ending, [y], [b])
        for text, y, b in zip(ids, liked, intercepts, strict=True)
    ]
    value, gradient = likelihood(backbone, prompt, [0, 1, 2]).value_and_gradient(passages, theta)
    np.testing.assert_allclose(value, np.log(np.where(liked, probability, 1 - probability)))
    leaf = torch.tensor(theta, requires_grad=True)
    (slope,) = torch.autograd.grad(prompts.feedback_logit(backbone, prompt, leaf, ids).sum(), leaf)
    # y - p times the slope of the logit: the evidence of a contrast facet
    expected = (liked - probability)[:, None, None] * slope.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_a_sequence_is_one_text_after_another(backbone, prompt, ids, theta):
    tuned = likelihood(backbone, prompt, [0, 2])
    together = text_passage(ids[:3])
    value, _ = tuned.value_and_gradient([together], theta[:1, [0, 2]])
    full = prompt.theta0(backbone).numpy().copy()
    full[[0, 2]] = theta[0, [0, 2]]
    expected = prompts.log_likelihood(
        backbone, prompt, torch.tensor(full), [[token for text in ids[:3] for token in text]]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    apart, _ = tuned.value_and_gradient(
        [text_passage([text]) for text in ids[:3]], np.repeat(theta[:1, [0, 2]], 3, axis=0)
    )
    assert abs(apart.sum() - value[0]) > 1e-3  # later texts see the earlier ones


def test_verbs_of_a_sequence(backbone, prompt, ids, theta):
    """The second verb is predicted behind the first behaviour and its own verb."""
    tuned = likelihood(backbone, prompt, [2])
    passage = feedback_passage(ids[:2], prompt.ending, [1, 0], [0.0, 0.5])
    value, _ = tuned.value_and_gradient([passage], theta[:1, [2]])
    full = prompt.theta0(backbone).numpy().copy()
    full[2] = theta[0, 2]
    common = prompt.ending.common
    context = [*ids[0], *common, prompt.ending.liked, *ids[1]]
    first = prompts.feedback_logit(backbone, prompt, torch.tensor(full), [ids[0]]).item()
    second = prompts.feedback_logit(backbone, prompt, torch.tensor(full), [context]).item()
    expected = np.log(expit(first)) + np.log(expit(-(second + 0.5)))
    np.testing.assert_allclose(value, expected, rtol=1e-8)


@pytest.mark.parametrize("source", ["lm", "prefix"])
def test_passes_of_few_logits_say_the_same(backbone, prompt, ids, source, monkeypatch):
    monkeypatch.setattr("recbole_uip.lm.llama.supports", lambda *_: False)
    facets = [0, 2]
    if source == "lm":
        general = likelihood(backbone, prompt, facets)
    else:
        general = PrefixLikelihood(Prefix(backbone, prompt), facets)
    noise = np.random.default_rng(0).normal(size=(len(ids), *general.theta0.shape))
    theta = general.theta0 + 0.1 * noise
    rows = []
    backbone.model.register_forward_hook(lambda *given: rows.append(len(given[-1].logits)))
    for passages in (
        [text_passage([text]) for text in ids],
        [feedback_passage([text], prompt.ending, [1], [0.3]) for text in ids],
    ):
        together = *general.value_and_gradient(passages, theta), general.value(passages, theta)
        with monkeypatch.context() as patch:
            patch.setattr(prompts, "LOGIT_BYTES", 1)
            rows.clear()
            apart = *general.value_and_gradient(passages, theta), general.value(passages, theta)
        assert rows == [1] * (2 * len(ids))
        for values, expected in zip(apart, together, strict=True):
            np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-9)


def test_the_general_way_says_the_same(backbone, prompt, ids, theta, monkeypatch):
    passages = [text_passage([text]) for text in ids]
    endings = [feedback_passage([text], prompt.ending, [1], [0.3]) for text in ids]
    fast = likelihood(backbone, prompt, [0, 2])
    monkeypatch.setattr("recbole_uip.lm.llama.supports", lambda *_: False)
    general = likelihood(backbone, prompt, [0, 2])
    assert general._llama is None
    for each in (passages, endings):
        for left, right in zip(
            fast.value_and_gradient(each, theta[:, [0, 2]]),
            general.value_and_gradient(each, theta[:, [0, 2]]),
            strict=True,
        ):
            np.testing.assert_allclose(left, right, atol=1e-6)


def test_recomputing_changes_nothing(backbone, prompt, ids, theta):
    passages = [text_passage([text]) for text in ids]
    kept = likelihood(backbone, prompt, [0]).value_and_gradient(passages, theta[:, [0]])
    again = likelihood(backbone, prompt, [0], recompute=True)
    for left, right in zip(kept, again.value_and_gradient(passages, theta[:, [0]]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12)


@pytest.mark.parametrize("longest_plain", [16, 256])
def test_gpu_rows_say_the_same(backbone, prompt, ids, theta, longest_plain, monkeypatch):
    """What a GPU runs, on the CPU: packed texts, masks and grouped heads, fused and plain."""
    monkeypatch.setattr("recbole_uip.lm.soft_llama.LONGEST_PLAIN", longest_plain)
    for passages in (
        [text_passage([text]) for text in ids],
        [text_passage(ids[:4]), text_passage(ids[2:])],
    ):
        chosen = theta[: len(passages), [0, 2]]
        plain = likelihood(backbone, prompt, [0, 2]).value_and_gradient(passages, chosen)
        packed = likelihood(backbone, prompt, [0, 2])
        packed._llama.on_gpu = True
        for left, right in zip(plain, packed.value_and_gradient(passages, chosen), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.skipif(shutil.which("c++") is None, reason="PyTorch compiles for CPUs with C++")
def test_compiled_stages_say_the_same(backbone, prompt, ids, theta):
    plain, compiled = (likelihood(backbone, prompt, [0, 2]) for _ in range(2))
    compiled._llama.compiled = compiled._llama.on_gpu = True
    for passages in ([text_passage([text]) for text in ids], [text_passage(ids)]):
        chosen = theta[: len(passages), [0, 2]]
        for left, right in zip(
            plain.value_and_gradient(passages, chosen),
            compiled.value_and_gradient(passages, chosen),
            strict=True,
        ):
            np.testing.assert_allclose(left, right, atol=1e-6)


def test_batches_and_chunks_of_logits_do_not_matter(backbone, prompt, ids, theta, monkeypatch):
    passages = [text_passage([text]) for text in ids]
    tuned = likelihood(backbone, prompt, [0, 1])
    value, gradient = tuned.value_and_gradient(passages, theta[:, :2])
    monkeypatch.setitem(llama.HEAD_ROWS, "cpu", 3)
    for row in range(len(ids)):
        alone = tuned.value_and_gradient([passages[row]], theta[row : row + 1, :2])
        np.testing.assert_allclose(alone[0], value[row], rtol=1e-9)
        np.testing.assert_allclose(alone[1][0], gradient[row], atol=1e-7)


def test_no_weight_gets_a_gradient(prompt, ids):
    backbone = make_backbone()
    before = {name: weight.clone() for name, weight in backbone.model.named_parameters()}
    tuned = SoftTokenLikelihood(backbone, prompt, [0, 1])
    theta = np.repeat(tuned.theta0[None], len(ids), axis=0)
    tuned.value_and_gradient([text_passage([text]) for text in ids], theta)
    for name, weight in backbone.model.named_parameters():
        assert not weight.requires_grad and weight.grad is None
        assert torch.equal(weight, before[name])


def test_long_soft_tokens_are_scaled_back(backbone, prompt, ids):
    tuned = SoftTokenLikelihood(backbone, prompt, [0])
    lengths = backbone.model.get_input_embeddings().weight.norm(dim=1)
    start = prompt.theta0(backbone).norm(dim=1)
    # with room to spare, for on the edge itself rounding decides whether a gradient is cut
    assert tuned.max_norm == pytest.approx(1.001 * max(float(lengths.mean()), float(start.max())))
    direction = np.random.default_rng(0).normal(size=(1, 1, backbone.embed_dim))
    direction *= tuned.max_norm / np.linalg.norm(direction)
    passages = [text_passage([ids[0]])]
    far, gradient = tuned.value_and_gradient(passages, 7.0 * direction)
    np.testing.assert_allclose(far, tuned.value(passages, direction), rtol=1e-9)
    # along its own direction it cannot move any more
    assert abs((gradient * direction).sum()) < 1e-6 < np.abs(gradient).max()


def test_cached_scores_are_the_gradients_at_theta0(prompt, ids):
    from recbole_uip.lm.llama import LlamaScorer

    backbone = make_backbone()
    scored = LlamaScorer(backbone, prompt).score(ids)
    tuned = SoftTokenLikelihood(backbone, prompt, [0, 1, 2])
    theta = np.repeat(tuned.theta0[None], len(ids), axis=0)
    value, gradient = tuned.value_and_gradient([text_passage([text]) for text in ids], theta)
    np.testing.assert_allclose(value, scored["log_likelihood"], atol=1e-4)
    np.testing.assert_allclose(gradient, scored["text"], atol=1e-4)
    # with p = 1/2, a liked behaviour's gradient is half of the logit's
    passages = [
        feedback_passage([text], prompt.ending, [1], [-logit])
        for text, logit in zip(ids, scored["feedback_logit"], strict=True)
    ]
    _, gradient = tuned.value_and_gradient(passages, theta)
    np.testing.assert_allclose(gradient, 0.5 * scored["feedback"].numpy(), atol=1e-4)


def test_endings_are_needed_for_feedback_alone(backbone):
    prompt = prompts.build(backbone, ["taste"])
    assert prompt.ending is None and ENDINGS
    tuned = SoftTokenLikelihood(backbone, prompt, [0])
    assert tuned.n_tokens(text_passage([[1, 2, 3]])) == 4

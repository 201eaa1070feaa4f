"""Scores against autograd, one by one, and against finite differences."""

from __future__ import annotations

import pytest
import torch

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.llama import LlamaScorer, head_log_probs, supports
from recbole_uip.lm.scoring import score_by_autograd

from .conftest import ENDINGS, make_backbone

FACETS = {
    1: ["taste"],
    2: ["interests", "aversions in movies"],
    3: ["interests", "aversions in movies", "taste"],
}


def reference(backbone, prompt, text):
    """Autograd on one text alone."""
    theta = prompt.theta0(backbone).requires_grad_()
    value = prompts.log_likelihood(backbone, prompt, theta, [text])[0]
    result = {"log_likelihood": value, "text": torch.autograd.grad(value, theta)[0]}
    if prompt.ending:
        value = prompts.feedback_logit(backbone, prompt, theta, [text])[0]
        result |= {"feedback_logit": value, "feedback": torch.autograd.grad(value, theta)[0]}
    return {name: tensor.detach() for name, tensor in result.items()}


def scorers(backbone, prompt):
    assert supports(backbone, 64)
    yield "fast", LlamaScorer(backbone, prompt).score
    yield "general", lambda texts: score_by_autograd(backbone, prompt, texts)


def rows_of(model):
    """Rows of the passes of a model from now on."""
    rows = []
    model.register_forward_hook(lambda *given: rows.append(len(given[-1].logits)))
    return rows


@pytest.mark.parametrize("endings", [ENDINGS, None])
def test_passes_of_few_logits_say_the_same(backbone64, ids, endings, monkeypatch):
    prompt = prompts.build(backbone64, FACETS[2], endings)
    together = score_by_autograd(backbone64, prompt, ids)
    rows = rows_of(backbone64.model)
    vocabulary, longest = backbone64.model.config.vocab_size, max(map(len, ids)) + 2
    monkeypatch.setattr(prompts, "LOGIT_BYTES", 2 * 4 * vocabulary * longest)
    apart = score_by_autograd(backbone64, prompt, ids)
    assert rows == [2, 2, 2]
    for name, values in together.items():
        torch.testing.assert_close(apart[name], values, rtol=1e-10, atol=1e-12)


def test_log_probabilities_in_bfloat16_are_not_rounded_to_it():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(shape, generator=generator).to(torch.bfloat16)
        for shape in ((200, 64), (50, 64))
    )
    targets = torch.randint(50, (200,), generator=generator)
    logits = hidden.double() @ head.double().T
    targets[::2] = logits.argmax(-1)[::2]
    exact = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    value, _ = head_log_probs(hidden, head, targets)
    assert value.dtype == torch.float32 and (value < 1e-6).all()
    rounded = (hidden @ head.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    error, of_rounded = ((each - exact).abs().mean() for each in (value, rounded))
    assert error < 0.3 * of_rounded


@pytest.mark.parametrize("endings", [None, ENDINGS, (" loved", " hated")])
@pytest.mark.parametrize("n_facets", FACETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_equal_autograd_one_by_one(n_facets, endings, dtype, ids):
    backbone = make_backbone(dtype)
    prompt = prompts.build(backbone, FACETS[n_facets], endings)
    limit = 1e-4 if dtype == torch.float32 else 1e-9
    tolerance = {"rtol": limit, "atol": limit}
    expected = [reference(backbone, prompt, text) for text in ids]
    for which, score in scorers(backbone, prompt):
        actual = score(ids)
        assert set(actual) == set(expected[0])
        for name, values in actual.items():
            wanted = torch.stack([row[name] for row in expected])
            torch.testing.assert_close(
                values.to(dtype),
                wanted,
                **tolerance,
                msg=lambda m, n=name, w=which: f"{w} {n}: {m}",
            )


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": False, "num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_fast_path_follows_the_configuration(changes, ids):
    backbone = make_backbone(torch.float64, **changes)
    prompt = prompts.build(backbone, FACETS[3], ENDINGS)
    (_, fast), (_, general) = scorers(backbone, prompt)
    actual, expected = fast(ids), general(ids)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)


def test_query_key_value_biases(ids):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    base = make_backbone()
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=base.model.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config).requires_grad_(False).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.normal_()
        layer.self_attn.q_proj.bias.data.normal_()
    backbone = type(base)(model, base.tokenizer, base.device, base.dtype, "qwen")
    prompt = prompts.build(backbone, FACETS[2], ENDINGS)
    (_, fast), (_, general) = scorers(backbone, prompt)
    actual, expected = fast(ids), general(ids)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["text", "feedback"])
def test_scores_equal_finite_differences(kind, backbone64, ids):
    prompt = prompts.build(backbone64, FACETS[3], ENDINGS)
    theta = prompt.theta0(backbone64)
    value = prompts.log_likelihood if kind == "text" else prompts.feedback_logit
    actual = LlamaScorer(backbone64, prompt).score(ids)[kind]
    generator = torch.Generator().manual_seed(0)
    step = 1e-6  # the norm of a small embedding makes θ strongly curved
    for _ in range(5):
        direction = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        up, down = (
            value(backbone64, prompt, theta + sign * step * direction, ids) for sign in (1, -1)
        )
        wanted = (up - down) / (2 * step)
        torch.testing.assert_close((actual * direction).sum((1, 2)), wanted, rtol=1e-5, atol=1e-6)


def test_batch_composition_does_not_matter(backbone, prompt, ids):
    score = LlamaScorer(backbone, prompt).score
    together = score(ids)
    for name, values in together.items():
        alone = torch.cat([score([text])[name] for text in ids])
        torch.testing.assert_close(alone, values, rtol=1e-4, atol=1e-5)
    shuffled = score(ids[::-1])
    torch.testing.assert_close(shuffled["text"].flip(0), together["text"], rtol=1e-4, atol=1e-5)


def test_bfloat16_points_where_float32_points(prompt, ids):
    wide, narrow = (
        LlamaScorer(make_backbone(dtype), prompt).score(ids)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for kind in ("text", "feedback"):
        cosine = torch.cosine_similarity(wide[kind].flatten(1), narrow[kind].flatten(1), dim=1)
        assert cosine.min() > 0.99

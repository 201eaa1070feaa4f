"""The prompt: tokens, block mask, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.likelihood import SoftTokenLikelihood

from .conftest import ENDINGS, TEXTS, WORDS, make_tokenizer


def hidden_states(backbone, prompt, theta, texts):
    """Hidden states of all layers, shape (layers + 1, n, P + T, d)."""
    output = backbone.model.model(
        **prompts.inputs(backbone, prompt, theta, texts),
        use_cache=False,
        output_hidden_states=True,
    )
    return torch.stack(output.hidden_states)


def test_layout(prompt, backbone):
    words = backbone.tokenizer.convert_ids_to_tokens(prompt.token_ids.clamp(min=0).tolist())
    assert [w for w, i in zip(words, prompt.token_ids.tolist(), strict=True) if i >= 0] == (
        ["interests", "aversions", "in", "movies", "taste"]
    )
    assert prompt.soft_positions.tolist() == [1, 5, 7]
    assert prompt.block.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert len(prompt) == 8


def test_mask_is_causal_and_block_wise(prompt):
    mask = prompt.mask(2)
    assert mask.shape == (10, 10)
    assert not mask.triu(1).any()
    for query in range(8):
        for key in range(query + 1):
            assert mask[query, key] == (prompt.block[query] == prompt.block[key])
    assert mask[8, :9].all() and mask[9].all()


def test_lead_tokens_are_seen_by_all():
    prompt = prompts.Prompt(("a", "b"), (7,), ((1,), (2, 3)))
    assert prompt.token_ids.tolist() == [7, 1, -1, 2, 3, -1]
    mask = prompt.mask(1)
    assert mask[:, 0].all()
    assert not mask[5, 1:3].any()


def test_theta0_is_the_mean_embedding_of_the_name(prompt, backbone):
    weight = backbone.model.get_input_embeddings().weight
    expected = torch.stack([weight[list(ids)].mean(0) for ids in prompt.name_ids])
    torch.testing.assert_close(prompt.theta0(backbone), expected)


def test_embeddings_are_those_that_the_layers_read():
    """Gemma scales what it looks up: a soft token of one token's name is that token, read again."""
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(WORDS) + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
            max_position_embeddings=64, attn_implementation="eager", pad_token_id=0,
        )
    ).eval()  # fmt: skip
    backbone = Backbone(model, make_tokenizer(), torch.device("cpu"), torch.float32, "gemma")
    prompt = prompts.build(backbone, ["interests"])
    (text,) = prompts.text_ids(backbone, TEXTS[:1])
    with torch.no_grad():
        soft = prompts.log_likelihood(backbone, prompt, prompt.theta0(backbone), [text])
        twice = [*prompt.name_ids[0], *prompt.name_ids[0]]
        logits = model(input_ids=torch.tensor([[*twice, *text]])).logits[0, 1:-1]
        read = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum()
    torch.testing.assert_close(soft[0], read, rtol=1e-4, atol=1e-4)
    longest = SoftTokenLikelihood(backbone, prompt, [0]).max_norm
    lengths = model.get_input_embeddings()(torch.arange(len(WORDS) + 1)).norm(dim=1)
    assert longest >= lengths.mean()


def test_ending_is_cut_at_the_verb(prompt, backbone):
    convert = backbone.tokenizer.convert_tokens_to_ids
    assert prompt.ending == prompts.Ending((convert("and"),), convert("loved"), convert("hated"))


@pytest.mark.parametrize("function", [prompts.log_likelihood, prompts.feedback_logit])
def test_gradients_reach_the_soft_tokens_and_nothing_else(function, backbone, prompt, ids):
    theta = prompt.theta0(backbone).requires_grad_()
    # ids[0] has several tokens, so every facet is in its history
    function(backbone, prompt, theta, ids[:1]).sum().backward()
    assert (theta.grad.abs().sum(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("change", ["soft token", "name"])
def test_a_soft_token_sees_its_own_facet_alone(change, backbone, prompt, ids):
    theta = prompt.theta0(backbone)
    before = hidden_states(backbone, prompt, theta, ids[:1])
    for facet in range(prompt.n_facets):
        other, new_theta = prompt, theta
        if change == "soft token":
            new_theta = theta.clone()
            new_theta[facet] += 1
        else:
            names = list(prompt.name_ids)
            names[facet] = tuple(reversed([i + 1 for i in names[facet]]))
            other = prompts.Prompt(prompt.names, prompt.lead_ids, tuple(names), prompt.ending)
        after = hidden_states(backbone, other, new_theta, ids[:1])
        moved = (after - before).abs().amax((1, 3))  # layers + 1, positions
        own = prompt.block == facet
        assert (moved[:, : len(prompt)][:, ~own] == 0).all()
        soft = int(prompt.soft_positions[facet])
        assert (moved[1:, soft] > 0).all()
        # every behaviour token sees every facet from the first attention layer on
        assert (moved[1:, len(prompt) :] > 0).all()


def test_padding_does_not_matter(backbone, prompt, ids):
    theta = prompt.theta0(backbone)
    together = prompts.log_likelihood(backbone, prompt, theta, ids)
    alone = torch.cat([prompts.log_likelihood(backbone, prompt, theta, [text]) for text in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_one_set_of_soft_tokens_per_text(backbone, prompt, ids):
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(len(ids), *prompt.theta0(backbone).shape, generator=generator)
    together = prompts.log_likelihood(backbone, prompt, theta, ids)
    alone = [
        prompts.log_likelihood(backbone, prompt, t, [text])
        for t, text in zip(theta, ids, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_refusals(backbone, prompt, ids):
    with pytest.raises(ValueError, match="facets is empty"):
        prompts.build(backbone, [])
    with pytest.raises(ValueError, match="the prompt '  ' has no tokens"):
        prompts.build(backbone, ["taste", "  "])
    with pytest.raises(ValueError, match="no token tells them apart"):
        prompts.build(backbone, ["taste"], (" and loved", " and loved it"))
    plain = prompts.build(backbone, ["taste"])
    with pytest.raises(ValueError, match="build the prompt with endings"):
        prompts.feedback_logit(backbone, plain, plain.theta0(backbone), ids)


def test_content_key_depends_on_everything_but_the_text():
    base = ("f", torch.float32, ["a", "b"], ENDINGS, 256)
    others = [
        ("g", torch.float32, ["a", "b"], ENDINGS, 256),
        ("f", torch.bfloat16, ["a", "b"], ENDINGS, 256),
        ("f", torch.float32, ["a b"], ENDINGS, 256),
        ("f", torch.float32, ["b", "a"], ENDINGS, 256),
        ("f", torch.float32, ["a", "b"], None, 256),
        ("f", torch.float32, ["a", "b"], ENDINGS, 255),
    ]
    keys = {prompts.content_key(*parts) for parts in [base, *others]}
    assert len(keys) == 1 + len(others)
    assert prompts.content_key(*base) == prompts.content_key(*base)

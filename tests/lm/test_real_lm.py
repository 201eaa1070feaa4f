"""The default LM, resolved as users resolve it, on titles of ml-100k."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_uip.lm import backbone as backbones
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm import score
from recbole_uip.lm.llama import LlamaScorer
from recbole_uip.lm.prefix import PrefixScorer
from recbole_uip.settings import LMSettings, default_cache_dir

pytestmark = pytest.mark.integration

ENDINGS = (" and loved it", " and hated it")
FACETS = ["interests", "aversions", "taste"]
TITLES = [
    "Toy Story (Animation Children's Comedy)",
    "GoldenEye (Action Adventure Thriller)",
    "Four Rooms (Thriller)",
    "Star Wars (Action Adventure Romance Sci-Fi War)",
    "Godfather, The (Action Crime Drama)",
    "Fargo (Crime Drama Thriller)",
    "Return of the Jedi (Action Adventure Romance Sci-Fi War)",
    "Heat (Action Crime Thriller)",
    "Casablanca (Drama Romance War)",
    "Free Willy (Adventure Children's Drama)",
]


@pytest.fixture(scope="module")
def backbone():
    return backbones.load(LMSettings(dtype="float32", device="cpu"), default_cache_dir())


def test_titles_are_likelier_than_their_shuffled_tokens(backbone):
    prompt = prompts.build(backbone, FACETS, ENDINGS)
    ids = prompts.tokenize(backbone.tokenizer, TITLES)
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(row).tolist() for row in ids]
    with torch.no_grad():
        theta = prompt.theta0(backbone)
        plain, mixed = (
            prompts.log_likelihood(backbone, prompt, theta, rows).numpy()
            for rows in (ids, shuffled)
        )
    assert np.isfinite(plain).all()
    lengths = np.array([len(row) for row in ids])
    assert (plain / lengths).mean() > (mixed / lengths).mean() + 1
    assert (plain > mixed).mean() >= 0.9


def test_fast_path_equals_autograd(backbone):
    prompt = prompts.build(backbone, FACETS, ENDINGS)
    ids = prompts.tokenize(backbone.tokenizer, TITLES[:3])
    fast = LlamaScorer(backbone, prompt).score(ids)
    theta = prompt.theta0(backbone).requires_grad_()
    for row, text in enumerate(ids):
        value = prompts.log_likelihood(backbone, prompt, theta, [text])[0]
        (grad,) = torch.autograd.grad(value, theta)
        torch.testing.assert_close(fast["log_likelihood"][row], value.detach(), rtol=1e-4, atol=0)
        assert torch.cosine_similarity(fast["text"][row], grad, dim=1).min() > 0.99999


def test_scores_as_users_get_them():
    result = score(TITLES, FACETS, ENDINGS, LMSettings(), default_cache_dir())
    assert result.text.shape == result.feedback.shape == (10, 3, 576)
    for values in (result.log_likelihood, result.text, result.feedback, result.feedback_logit):
        assert np.isfinite(values).all()
    assert (result.log_likelihood < 0).all()
    assert score(TITLES, FACETS, ENDINGS, LMSettings(), default_cache_dir()).lm_tokens == 0


@pytest.mark.parametrize("facet", ["interests", "a"])
def test_one_short_facet_in_bfloat16_passes_the_check_against_the_model(facet, backbone, tmp_path):
    # the model's own rounding once was taken for an error of the fast path
    (tmp_path / "models").symlink_to(default_cache_dir() / "models", target_is_directory=True)
    result = score(TITLES[:2], [facet], None, LMSettings(dtype="bfloat16"), tmp_path)
    assert result.lm_tokens > 0


def test_prefix_scores_are_the_slope_of_the_likelihood(backbone):
    scorer = PrefixScorer(backbone, prompts.build(backbone, FACETS[:1]), [False])
    ids = prompts.tokenize(backbone.tokenizer, TITLES[:3])
    slopes = scorer.score(ids)
    # five of thirty layers, three heads of 64 values
    assert slopes.shape == (3, 5 * 3 * 64)
    step = 0.01 / slopes.norm()
    with torch.no_grad():
        up, down = (
            prompts.sum_log_probs(
                scorer.logits(scorer.run(scorer.theta0 + sign * step * slopes[:, None], ids)), ids
            )
            for sign in (1, -1)
        )
    expected = step * slopes.square().sum(1)
    torch.testing.assert_close((up - down) / 2, expected, rtol=0.02, atol=0)

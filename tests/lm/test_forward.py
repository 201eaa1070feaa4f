"""Likelihoods on a shared prefix are those of the prompt in one piece."""

import dataclasses

import numpy as np
import pytest
import torch

from recbole_uip.lm import likelihoods
from recbole_uip.lm import prompt as prompts


@pytest.mark.parametrize("batch_tokens", [1, 1024])
def test_as_the_whole_prompt_says(backbone, prompt, ids, batch_tokens, rng):
    theta = prompt.theta0(backbone)
    theta = theta + torch.from_numpy(rng.normal(size=theta.shape, scale=0.3).astype(np.float32))
    backbone = dataclasses.replace(backbone, batch_tokens=batch_tokens)
    values, logits, lm_tokens = likelihoods(backbone, prompt, theta, ids)
    with torch.no_grad():
        expected = prompts.log_likelihood(backbone, prompt, theta, ids)
        feedback = prompts.feedback_logit(backbone, prompt, theta, ids)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, feedback, rtol=1e-4, atol=1e-4)
    n_batches = len(ids) if batch_tokens == 1 else 1
    text_tokens = sum(map(len, ids)) + len(ids) * len(prompt.ending.common)
    assert lm_tokens == text_tokens + n_batches * len(prompt)
    # The soft tokens matter.
    assert not torch.allclose(
        values, likelihoods(backbone, prompt, prompt.theta0(backbone), ids)[0], atol=0.1
    )


def test_passes_of_few_logits_say_the_same(backbone64, prompt, ids, monkeypatch):
    theta = prompt.theta0(backbone64)
    *together, lm_tokens = likelihoods(backbone64, prompt, theta, ids)
    monkeypatch.setattr(prompts, "LOGIT_BYTES", 1)
    *apart, more = likelihoods(backbone64, prompt, theta, ids)
    # each pass has the prefix of its own
    assert more == lm_tokens + (len(ids) - 1) * len(prompt)
    for values, expected in zip(apart, together, strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)


def test_without_endings(backbone, ids):
    prompt = prompts.build(backbone, ["taste"])
    values, logits, _ = likelihoods(backbone, prompt, prompt.theta0(backbone), ids)
    assert logits is None
    assert (values < 0).all()

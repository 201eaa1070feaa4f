"""On a GPU the LM says what it says on a CPU. Skipped where there is none."""

import dataclasses

import numpy as np
import pytest
import torch

from recbole_uip.lm.forward import prefix_likelihoods
from recbole_uip.lm.likelihood import (
    PrefixLikelihood,
    SoftTokenLikelihood,
    feedback_passage,
    text_passage,
)
from recbole_uip.lm.llama import LlamaScorer
from recbole_uip.lm.prefix import Prefix, PrefixScorer

from .conftest import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def on_gpu(backbone):
    device = torch.device("cuda")
    return dataclasses.replace(backbone, model=make_model().to(device), device=device)


def in_last_layers(backbone, prompt, facets):
    return PrefixLikelihood(Prefix(backbone, prompt), facets)


@pytest.mark.parametrize("likelihood", [SoftTokenLikelihood, in_last_layers])
def test_likelihoods_and_gradients(backbone, on_gpu, prompt, ids, likelihood):
    for passages in (
        [text_passage([text]) for text in ids] * 20,
        [feedback_passage([text], prompt.ending, [1], [0.3]) for text in ids] * 20,
        [text_passage(ids * 12)] * 3,
    ):
        cpu, gpu = (likelihood(each, prompt, [0, 2]) for each in (backbone, on_gpu))
        theta = np.repeat(cpu.theta0[None], len(passages), axis=0)
        for left, right in zip(
            cpu.value_and_gradient(passages, theta),
            gpu.value_and_gradient(passages, theta),
            strict=True,
        ):
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


def test_scores_in_the_last_layers(backbone, on_gpu, prompt, ids):
    cpu, gpu = (PrefixScorer(each, prompt, [False, True, True]) for each in (backbone, on_gpu))
    torch.testing.assert_close(gpu.score(ids).cpu(), cpu.score(ids), rtol=1e-3, atol=1e-4)
    for left, right in zip(
        prefix_likelihoods(cpu, cpu.theta0, ids),
        prefix_likelihoods(gpu, gpu.theta0, ids),
        strict=True,
    ):
        assert left == pytest.approx(right, rel=1e-3)


def test_scores(backbone, on_gpu, prompt, ids):
    cpu, gpu = (LlamaScorer(each, prompt).score(ids) for each in (backbone, on_gpu))
    for name, values in cpu.items():
        torch.testing.assert_close(gpu[name].cpu(), values.float(), rtol=1e-3, atol=1e-4)

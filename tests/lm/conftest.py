"""A tiny LM, built in place: random Llama with grouped queries, and a word tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone

SENTENCE = (
    "x interests aversions taste in movies and loved hated it the a of star wars toy story heat "
    "godfather comedy drama action thriller war night day city man woman ( )"
)
WORDS = SENTENCE.split()
ENDINGS = (" and loved it", " and hated it")
TEXTS = [
    "star wars ( action )",
    "toy story ( comedy drama )",
    "heat",
    "the godfather",
    "a night of the city ( drama thriller war )",
    "man",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    settings = {
        "vocab_size": len(WORDS) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # larger than usual: an LM that has opinions
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings | changes))
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.weight.data.uniform_(0.5, 1.5)
    return model.requires_grad_(False).eval()


def save_lm(folder: Path, **changes) -> Path:
    """Write the tiny LM, as ``uip_lm`` may name it; returns its folder."""
    make_model(**changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class _WideNorm(torch.nn.Module):
    """LlamaRMSNorm computes in float32 whatever comes in; this one keeps float64."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def make_backbone(dtype: torch.dtype = torch.float32, **changes) -> Backbone:
    if dtype == torch.float64:
        # eager attention computes its softmax in float32 whatever comes in
        changes.setdefault("attn_implementation", "sdpa")
    model = make_model(**changes).to(dtype)
    if dtype == torch.float64:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(parent, name, _WideNorm(child))
    return Backbone(model, make_tokenizer(), torch.device("cpu"), dtype, "tiny")


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone()


@pytest.fixture
def backbone64() -> Backbone:
    return make_backbone(torch.float64)


@pytest.fixture
def prompt(backbone) -> prompts.Prompt:
    names = ["interests", "aversions in movies", "taste"]
    return prompts.build(backbone, names, ENDINGS)


@pytest.fixture
def ids(backbone) -> list[list[int]]:
    return prompts.tokenize(backbone.tokenizer, TEXTS)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """The tiny LM as a local folder."""
    folder = save_lm(tmp_path_factory.mktemp("tiny"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder

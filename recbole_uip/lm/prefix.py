r"""Score vectors of texts with respect to a prefix: soft tokens in the LM's last layers.

Prompt tuning moves a soft token's embedding. Prefix tuning (Li and Liang 2021) moves what a soft
token is in each layer; here, its values v in the last sixth of the layers, which are what later
tokens read of it. The score vector of a text e, or of the feedback after it, is then

    g_e = ∇_v log p_LM(text_e | prompt(v)),   d_e = ∇_v [log p(verb liked) − log p(verb disliked)]

at the v that the facet's name gives. Scores of embeddings are images of such gradients, of all
layers, under one fixed matrix of low rank, in which much of what tells texts apart is lost.

The prompt is that of :mod:`recbole_uip.lm.prompt` and a colon, which reads the soft tokens and
predicts the text's first token. The prefix is run once. Weights are frozen and the prefix below the
moved layers is constant, so the backward pass ends at these: with P weights in the layers' matrix
products and H in the head's, a token costs 2·(P + H) FLOPs forward and 2·(P/6 + H) backward.

What a text is in the layers below is the same under any v, so where texts are met again these
layers are run once (:mod:`recbole_uip.lm.prefix_llama`).

A first layer that is moved is linear in v, for what attention weighs does not change; and the few
that follow bend little. So scores say what the LM does far from v⁰, where those of embeddings do
not (``recbole-uip likelihood``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from recbole_uip.lm import llama
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone, ModelError
from recbole_uip.lm.prefix_llama import PrefixLlama
from recbole_uip.lm.prompt import Prompt
from recbole_uip.lm.scoring import check_mask, most_error
from recbole_uip.lm.vectors import Reader, Vectors, holds_texts, read_texts
from recbole_uip.settings import LMSettings

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["Prefix", "PrefixScorer", "holds_prefix_scores", "n_moved", "score_prefix"]

# part of every cache key: raise it when what is kept of a text changes
VERSION = 1
# Of the layers, the last one in so many is moved.
MOVED = 6
BRIDGE = ":"


def score_prefix(
    texts: Sequence[str],
    facets: Sequence[str],
    of_feedback: Sequence[bool],
    endings: tuple[str, str] | None,
    settings: LMSettings,
    cache: Path,
) -> Vectors:
    """Score every text under the prefix of ``facets``, from the cache where it is there.

    Parameters
    ----------
    texts : sequence of n str
        Behaviour texts, already rendered; duplicates are scored once.
    facets : sequence of F str
        Facet names in words.
    of_feedback : sequence of F bool
        Whether a facet's scores are of the feedback, not of the text.
    endings : (liked, disliked) or None
        Feedback endings.
    settings : LMSettings
    cache : Path
        The user's cache directory; scores are kept under ``prefix/``.

    Returns
    -------
    Vectors
        Facet by facet and layer by layer, in the order of ``texts``.

    Raises
    ------
    ModelError
        If the LM cannot be found or loaded, takes no prefix, or is too short for a text.
    ValueError
        If a text is empty, the prompt cannot be built, or feedback has no endings.
    """
    if not any(of_feedback):
        endings = None
    elif endings is None:
        raise ValueError("endings is None: scores of feedback are of its endings")

    def open_reader(backbone: Backbone) -> Reader:
        prompt = prompts.build(backbone, facets, endings)
        scorer = PrefixScorer(backbone, prompt, of_feedback)
        n_ending = len(prompt.ending.common) if prompt.ending else 0
        n_more = 1 + n_ending
        return Reader(scorer.score, len(prompt) + n_more, n_more)

    about = _about(facets, of_feedback, endings)
    return read_texts(texts, "prefix", about, open_reader, settings, cache)


def holds_prefix_scores(
    texts: Sequence[str],
    facets: Sequence[str],
    of_feedback: Sequence[bool],
    endings: tuple[str, str] | None,
    settings: LMSettings,
    cache: Path,
) -> bool:
    """Whether :func:`score_prefix` would find every text in the cache."""
    about = _about(facets, of_feedback, endings)
    return holds_texts(texts, "prefix", about, settings, cache)


def _about(
    facets: Sequence[str], of_feedback: Sequence[bool], endings: tuple[str, str] | None
) -> dict[str, Any]:
    """What scores depend on, besides texts and LM."""
    return {
        "version": VERSION,
        "facets": list(facets),
        "of_feedback": [bool(each) for each in of_feedback],
        "endings": list(endings) if endings and any(of_feedback) else None,
    }


def n_moved(n_layers: int) -> int:
    """Number of the layers in which soft tokens are moved: the last."""
    return math.ceil(n_layers / MOVED)


def _empty_cache() -> DynamicCache:
    from transformers import DynamicCache  # takes its time, and scores may all be there

    return DynamicCache()


class Prefix:
    """A prompt that was run once, and texts behind it under any values of its soft tokens.

    Parameters
    ----------
    backbone : Backbone
        Any causal LM of transformers that keeps keys and values.
    prompt : Prompt
        Of F facets.

    Attributes
    ----------
    shape : (layers, kv_heads, head_dim)
        Of what is moved of a soft token; its product is D.
    theta0 : Tensor of the LM's type, shape (F, D)
        v⁰, facet by facet and layer by layer.
    moved : float
        Share of the layers.
    bridge : list of int
        What stands between prefix and text.
    keeps_trunks : bool
        Whether texts will be met again (see :mod:`recbole_uip.lm.prefix_llama`).

    Raises
    ------
    ModelError
        If the LM says something else of texts behind a prefix than of prefix and texts in one.
    """

    keeps_trunks = True

    def __init__(self, backbone: Backbone, prompt: Prompt) -> None:
        self.backbone, self.prompt = backbone, prompt
        self.bridge = prompts.tokenize(backbone.tokenizer, [BRIDGE])[0][-1:]
        check_mask(backbone, prompt)
        self._soft = prompt.soft_positions.to(backbone.device)
        with torch.no_grad():
            given = prompts.inputs(backbone, prompt, prompt.theta0(backbone), [[]])
            cache = _empty_cache()
            backbone.model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._keys = [layer.keys for layer in cache.layers]
        self._values = [layer.values for layer in cache.layers]
        n_layers = len(self._values)
        self._first = n_layers - n_moved(n_layers)
        self.moved = n_moved(n_layers) / n_layers
        # (layers, kv_heads, F, head_dim)
        moved = torch.stack([values[0] for values in self._values[self._first :]])
        moved = moved.index_select(2, self._soft)
        self.shape = moved.shape[0], moved.shape[1], moved.shape[3]
        self.theta0 = moved.permute(2, 0, 1, 3).flatten(1)
        config = backbone.model.config.get_text_config()
        self._llama = None
        if llama.supports(backbone, getattr(config, "max_position_embeddings", None) or 0):
            self._llama = PrefixLlama(backbone, self.states(self.theta0[None]), self._first)
        self._check()

    def states(self, theta: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the prefix in each layer, each (n, kv_heads, P, head_dim).

        Parameters
        ----------
        theta : Tensor, shape (n, F, D)
        """
        n = len(theta)
        theta = theta.to(self.theta0).unflatten(2, self.shape).permute(2, 0, 3, 1, 4)
        found = []
        for index, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            values = values.expand(n, -1, -1, -1)
            if index >= self._first:
                values = values.index_copy(2, self._soft, theta[index - self._first])
            found.append((keys.expand(n, -1, -1, -1), values))
        return found

    def keep(self, texts: Sequence[Sequence[int]], n_last: int) -> None:
        """Run now, in one batch, what of texts does not depend on soft tokens, for later runs.

        Of the texts as they are, and less their last ``n_last`` tokens.
        """
        if self._llama is not None:
            self._llama.keep([[*self.bridge, *text] for text in texts], n_last)

    def run(self, theta: torch.Tensor, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What the LM makes of texts, from the bridge on: hidden states or logits, (n, T + 1, ..).

        Of an LM of Llama's layout they are hidden states, and logits are made of those alone that
        are asked for. Differentiable in ``theta`` (n, F, D), a set for each text.
        """
        full = [[*self.bridge, *text] for text in texts]
        if self._llama is not None:
            values = [own for _, own in self.states(theta)[self._first :]]
            return self._llama.hidden(full, values, self.keeps_trunks)
        device, n_prefix = self.backbone.device, len(self.prompt)
        ids, _ = prompts.side_by_side(full)
        n, longest = ids.shape
        cache = _empty_cache()
        for index, (keys, values) in enumerate(self.states(theta)):
            cache.update(keys, values, index)
        # padded on the right, so no token of a text sees a padding token, whatever the mask says;
        # and all are to see something, or softmax would be 0/0
        return self.backbone.model(
            input_ids=ids.to(device),
            attention_mask=torch.ones(n, n_prefix + longest, device=device),
            position_ids=torch.arange(n_prefix, n_prefix + longest, device=device).expand(n, -1),
            past_key_values=cache,
            use_cache=True,
        ).logits

    @property
    def makes_logits(self) -> bool:
        """Whether a run is of logits."""
        return self._llama is None

    def logits(self, run: torch.Tensor) -> torch.Tensor:
        """Of all tokens of a run, as :func:`recbole_uip.lm.prompt.logits`."""
        logits = run if self._llama is None else functional.linear(run, self._llama.head)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_probs(
        self, run: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """As :func:`recbole_uip.lm.prompt.log_probs`."""
        if self._llama is None:
            return prompts.log_probs(self.logits(run), at, targets)
        return llama.LogProbs.apply(run[at], self._llama.head, targets)

    def verb_lifts(self, run: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """As :func:`recbole_uip.lm.prompt.verb_lifts`."""
        ending = self.prompt.ending
        if self._llama is None:
            return prompts.verb_lifts(self.logits(run), at, ending)
        return llama.verb_lifts(run[at], self._llama.head, ending)

    def likelihoods(
        self, run: torch.Tensor, texts: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-likelihood of each text, and its feedback logit if the prompt has an ending, (n,).

        The run is of the texts with the endings' common tokens after each.
        """
        say = functools.partial(self.log_probs, run)
        log_likelihood = prompts.sum_tokens(texts, run.device, say)
        if self.prompt.ending is None:
            return log_likelihood, None
        last = torch.tensor([len(text) + len(self.prompt.ending.common) for text in texts])
        return log_likelihood, self.verb_lifts(run, (torch.arange(len(texts)), last))

    @torch.no_grad()
    def _check(self) -> None:
        text = [*self.prompt.name_ids[0], *self.prompt.name_ids[-1]]
        theta = self.prompt.theta0(self.backbone)
        expected = prompts.logits(self.backbone, self.prompt, theta, [[*self.bridge, *text]])
        expected = expected[0, 1:].log_softmax(-1)
        found = self.logits(self.run(self.theta0[None], [text]))[0].log_softmax(-1)
        error = float((found - expected).abs().mean())
        if not error < most_error(self.backbone.dtype):
            raise ModelError(
                f"uip_lm: {type(self.backbone.model).__name__} differs by {error:.3g} nats a token "
                "between a text behind kept keys and values and the same in one pass, so source: "
                "prefix cannot be used with it: take source: lm or embedding, or another LM"
            )


class PrefixScorer(Prefix):
    """Scores batches of texts with respect to a prefix.

    Parameters
    ----------
    backbone, prompt
        As for :class:`Prefix`.
    of_feedback : sequence of F bool
    """

    keeps_trunks = False

    def __init__(self, backbone: Backbone, prompt: Prompt, of_feedback: Sequence[bool]) -> None:
        super().__init__(backbone, prompt)
        self.of_feedback = list(of_feedback)

    def score(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Score a batch.

        Parameters
        ----------
        texts : n sequences of int
            Token ids, at least one each; best of like lengths.

        Returns
        -------
        Tensor, shape (n, F · D)
        """
        common = self.prompt.ending.common if self.prompt.ending else ()
        full = [[*text, *common] for text in texts]
        parts = prompts.passes(self.backbone, full)
        return torch.cat([self._score(texts[part], full[part]) for part in parts])

    def _score(self, texts: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores of texts, whose endings are part of ``full``."""
        # one copy of the values per text, so that one backward pass gives each its own gradient
        theta = self.theta0.expand(len(texts), -1, -1).clone().requires_grad_()
        log_likelihood, logit = self.likelihoods(self.run(theta, full), texts)
        found = {}
        if not all(self.of_feedback):
            (found[False],) = torch.autograd.grad(
                log_likelihood.sum(), theta, retain_graph=any(self.of_feedback)
            )
        if any(self.of_feedback):
            (found[True],) = torch.autograd.grad(logit.sum(), theta)
        return torch.cat([found[kind][:, f] for f, kind in enumerate(self.of_feedback)], 1)

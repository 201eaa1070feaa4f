"""True log-likelihoods of behaviours under soft tokens, and their gradients in them.

A *passage* is what the LM reads behind one prompt: one behaviour's text (``uip_likelihood: item``),
or the user's texts one after another (``sequence``). For the soft tokens θ_f of the facets that
are tuned, the others at θ⁰,

    text      ℓ(θ) = log p_LM(passage | prompt(θ)),
    feedback  ℓ(θ) = Σ_v log σ(s_v (f_v(θ) + b_v)),
              f_v = log p(verb liked) − log p(verb disliked) after the text of behaviour v,

with s_v = ±1 for liked and disliked and b_v an intercept. With b_v = logit p_i − f_i(θ⁰), p_i the
item's like rate, the gradient at θ⁰ is (y − p_i) ∇f_i: the evidence of a contrast facet.

Weights get no gradient, only soft tokens do. LMs of Llama's layout are run by :mod:`soft_llama`, or
with soft tokens in the last layers by :mod:`prefix_llama`; logits are made at predicted tokens
alone, and never all at once. Other LMs go through transformers' public API.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from recbole_uip.lm import llama
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.prefix import Prefix
from recbole_uip.lm.prompt import Ending, Prompt
from recbole_uip.lm.soft_llama import SoftLlama

__all__ = [
    "Likelihood",
    "Passage",
    "PrefixLikelihood",
    "SoftTokenLikelihood",
    "feedback_passage",
    "text_passage",
]

EMBEDDED = 4096  # tokens whose embeddings are looked at together


@dataclass(frozen=True)
class Passage:
    """What the LM reads behind one prompt, and what of it counts.

    Attributes
    ----------
    tokens : tuple of int
    verbs : tuple of int
        Numbers of tokens before each verb of a feedback ending; without verbs the passage's own
        tokens are what counts.
    signs : tuple of float
        Of each verb, 1 where liked and -1 where not.
    intercepts : tuple of float
        b_v of each verb.
    """

    tokens: tuple[int, ...]
    verbs: tuple[int, ...] = ()
    signs: tuple[float, ...] = ()
    intercepts: tuple[float, ...] = ()


def text_passage(texts: Sequence[Sequence[int]]) -> Passage:
    """The texts, given by their token ids, one after another."""
    return Passage(tuple(token for text in texts for token in text))


def feedback_passage(
    texts: Sequence[Sequence[int]],
    ending: Ending,
    liked: Sequence[float],
    intercepts: Sequence[float],
) -> Passage:
    """The texts with their feedback endings, one after another; the verbs are what counts.

    The last verb itself is left out, for nothing is predicted behind it.

    Parameters
    ----------
    texts : n sequences of int
    ending : Ending
    liked : sequence of n float
        1 where liked, 0 where not.
    intercepts : sequence of n float
    """
    tokens: list[int] = []
    verbs = []
    for text, label in zip(texts, liked, strict=True):
        tokens += [*text, *ending.common]
        verbs.append(len(tokens))
        tokens.append(ending.liked if label else ending.disliked)
    return Passage(
        tuple(tokens[:-1]),
        tuple(verbs),
        tuple(1.0 if label else -1.0 for label in liked),
        tuple(map(float, intercepts)),
    )


class Likelihood:
    """Log-likelihoods of passages, each under soft tokens of its own.

    A subclass says what a soft token's D numbers are, and what the LM makes of them, at places in
    texts: pairs of text and number of the token, each of shape (m,).

    Parameters
    ----------
    backbone : Backbone
    prompt : Prompt
        With an ending, if any passage has verbs.
    facets : sequence of G int
        Which facets' soft tokens are given; the others' are θ⁰.
    every : Tensor, shape (F, D)
        θ⁰ of all facets.
    length : float
        Length of a soft token, beside those of θ⁰, that an LM knows.

    Attributes
    ----------
    theta0 : ndarray of float32, shape (G, D)
        θ⁰ of these facets.
    n_positions : int or None
        Positions that the LM has; None where there is no limit.
    n_before : int
        Positions of the LM before a passage.
    max_norm : float
        Length beyond which a soft token is scaled back, ``length`` or that of the longest θ⁰: far
        outside an LM has seen nothing.
    moved : float
        Share of the LM's layers that gradients go back through.
    makes_logits : bool
        Whether logits are made of all tokens of passages that are run together.
    """

    moved = 1.0
    makes_logits = False

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        facets: Sequence[int],
        every: torch.Tensor,
        length: float = 0.0,
    ) -> None:
        self.backbone, self.prompt, self.facets = backbone, prompt, list(facets)
        self._theta0 = every
        self.theta0 = every[self.facets].float().cpu().numpy()
        # A little more, so that no θ⁰ lies on the edge, where rounding would decide its gradient.
        self.max_norm = 1.001 * max(length, float(every.float().norm(dim=1).max()))
        self.n_positions = getattr(
            backbone.model.config.get_text_config(), "max_position_embeddings", None
        )
        self.n_before = len(prompt)

    def n_tokens(self, passage: Passage) -> int:
        """Tokens that go through the LM for a passage."""
        raise NotImplementedError

    def log_likelihood(self, passages: Sequence[Passage], theta: torch.Tensor) -> torch.Tensor:
        """ℓ of each passage, differentiable in ``theta``; nats.

        Parameters
        ----------
        passages : n Passages, all with verbs or all without; best of like lengths
        theta : Tensor, shape (n, G, D)

        Returns
        -------
        Tensor of at least float32, shape (n,)

        Raises
        ------
        ValueError
            If there is no passage, or some have verbs and others not.
        """
        if len({bool(passage.verbs) for passage in passages}) != 1:
            raise ValueError("passages must be at least one, and all have verbs or none")
        norm = theta.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(theta.dtype).tiny)
        theta = theta * (self.max_norm / norm).clamp(max=1.0)
        texts = [list(passage.tokens) for passage in passages]
        if not passages[0].verbs:
            say = functools.partial(self._tokens, theta, texts)
            return prompts.sum_tokens(texts, self.backbone.device, say)
        rows, _ = prompts.places([len(passage.verbs) for passage in passages])
        numbers = torch.tensor([verb for passage in passages for verb in passage.verbs])
        lift = self._verbs(theta, texts, (rows, numbers))
        signs, intercepts = (
            torch.tensor([x for passage in passages for x in side(passage)]).to(lift)
            for side in (lambda p: p.signs, lambda p: p.intercepts)
        )
        values = functional.logsigmoid(signs * (lift + intercepts))
        return values.new_zeros(len(texts)).index_add(0, rows.to(values.device), values)

    def value_and_gradient(
        self, passages: Sequence[Passage], theta: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """ℓ of each passage and its gradient in the passage's own soft tokens.

        Parameters
        ----------
        passages, theta
            As in :meth:`log_likelihood`; theta as an array.

        Returns
        -------
        value : ndarray of float64, shape (n,)
        gradient : ndarray of float32, shape (n, G, D)
        """
        values, gradients = [], []
        for part in self._passes(passages):
            leaf = self._leaf(theta[part]).requires_grad_()
            value = self.log_likelihood(passages[part], leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach().double().cpu().numpy())
            gradients.append(gradient.float().cpu().numpy())
        return np.concatenate(values), np.concatenate(gradients)

    @torch.no_grad()
    def value(self, passages: Sequence[Passage], theta: np.ndarray) -> np.ndarray:
        """ℓ of each passage alone, shape (n,), float64: a third of the cost."""
        values = [
            self.log_likelihood(passages[part], self._leaf(theta[part])).double().cpu().numpy()
            for part in self._passes(passages)
        ]
        return np.concatenate(values)

    def _passes(self, passages: Sequence[Passage]) -> list[slice]:
        """Passages that are run together: all, unless logits are made of all their tokens."""
        if not self.makes_logits:
            return [slice(None)]
        return prompts.passes(self.backbone, [passage.tokens for passage in passages])

    def _leaf(self, theta: np.ndarray) -> torch.Tensor:
        wide = torch.promote_types(self.backbone.dtype, torch.float32)
        return torch.from_numpy(np.ascontiguousarray(theta)).to(self.backbone.device, wide)

    def _tokens(
        self,
        theta: torch.Tensor,
        texts: list[list[int]],
        at: tuple[torch.Tensor, torch.Tensor],
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probabilities of ``targets``, the texts' tokens at these places."""
        raise NotImplementedError

    def _verbs(
        self,
        theta: torch.Tensor,
        texts: list[list[int]],
        at: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Differences of the verbs' logits at these places."""
        raise NotImplementedError

    def _of_all(self, theta: torch.Tensor) -> torch.Tensor:
        every = self._theta0.to(theta).expand(len(theta), -1, -1)
        return every.index_copy(1, torch.tensor(self.facets, device=theta.device), theta)


class SoftTokenLikelihood(Likelihood):
    """Of soft tokens that are embeddings, as in prompt tuning; D is the LM's width d.

    Parameters
    ----------
    backbone, prompt, facets
        As for :class:`Likelihood`.
    recompute : bool
        Keep no activations within layers but compute them again (gradient checkpointing): a third
        slower, for long passages on a small device.
    general : bool
        Go through transformers whatever the LM's layout, for a prompt with another mask.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        facets: Sequence[int],
        recompute: bool = False,
        general: bool = False,
    ) -> None:
        theta0 = prompt.theta0(backbone)
        super().__init__(backbone, prompt, facets, theta0, float(_mean_length(backbone)))
        self._llama = None
        if not general and llama.supports(backbone, self.n_positions or 0):
            self._llama = SoftLlama(backbone, prompt, theta0, self.facets, recompute)
        self.makes_logits = self._llama is None

    def n_tokens(self, passage: Passage) -> int:
        """Tokens that go through the LM: the passage and the soft tokens before it."""
        return len(passage.tokens) + len(self.facets)

    def _tokens(self, theta, texts, at, targets):
        if self._llama is None:
            return prompts.log_probs(self._logits(theta, texts), at, targets)
        # the last token predicts nothing: it need not be run
        hidden = self._llama.hidden(theta, [text[:-1] for text in texts], at)
        return llama.LogProbs.apply(hidden, self._llama.head, targets)

    def _verbs(self, theta, texts, at):
        ending = self.prompt.ending
        if self._llama is None:
            return prompts.verb_lifts(self._logits(theta, texts), at, ending)
        return llama.verb_lifts(self._llama.hidden(theta, texts, at), self._llama.head, ending)

    def _logits(self, theta, texts):
        return prompts.logits(self.backbone, self.prompt, self._of_all(theta), texts)


class PrefixLikelihood(Likelihood):
    """Of soft tokens that are values in the LM's last layers (see :mod:`recbole_uip.lm.prefix`).

    Parameters
    ----------
    prefix : Prefix
    facets : sequence of G int
    """

    def __init__(self, prefix: Prefix, facets: Sequence[int]) -> None:
        super().__init__(prefix.backbone, prefix.prompt, facets, prefix.theta0)
        self.prefix = prefix
        self.moved, self.makes_logits = prefix.moved, prefix.makes_logits
        self.n_before += len(prefix.bridge)

    def n_tokens(self, passage: Passage) -> int:
        """Tokens that go through the LM: the passage and what bridges it to the prefix."""
        return len(passage.tokens) + len(self.prefix.bridge)

    def _tokens(self, theta, texts, at, targets):
        return self.prefix.log_probs(self.prefix.run(self._of_all(theta), texts), at, targets)

    def _verbs(self, theta, texts, at):
        return self.prefix.verb_lifts(self.prefix.run(self._of_all(theta), texts), at)


@torch.no_grad()
def _mean_length(backbone: Backbone) -> torch.Tensor:
    """Mean length of token embeddings, as the layers read them."""
    embed = backbone.model.get_input_embeddings()
    tokens = torch.arange(len(embed.weight), device=embed.weight.device)
    return torch.cat([embed(part).float().norm(dim=1) for part in tokens.split(EMBEDDED)]).mean()

"""True log-likelihoods of behaviours under soft tokens, and their gradients in them.

A *passage* is what the LM reads behind one prompt: one behaviour's text (``uip_likelihood: item``),
or the user's texts one after another (``sequence``). For the soft tokens θ_f of the facets that
are tuned, the others at θ⁰,

    text      ℓ(θ) = log p_LM(passage | prompt(θ)),
    feedback  ℓ(θ) = Σ_v log σ(s_v (f_v(θ) + b_v)),
              f_v = log p(verb liked) − log p(verb disliked) after the text of behaviour v,

with s_v = ±1 for liked and disliked and b_v an intercept. With b_v = logit p_i − f_i(θ⁰), p_i the
item's like rate, the gradient at θ⁰ is (y − p_i) ∇f_i: the evidence of a contrast facet.

Weights get no gradient, only soft tokens do. For LMs of Llama's layout (:mod:`llama`) a prompt is
run in three parts, each behind the keys and values of those before: names and lead once for all,
soft tokens once a passage, the passage's own tokens. The block mask is all in the second part; the
third is plainly causal, so PyTorch takes whichever fast attention it has. Logits are made at
predicted tokens alone, and never all at once. Other LMs go through transformers' public API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from recbole_uip.lm import llama
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.prompt import Ending, Prompt

__all__ = ["Passage", "SoftTokenLikelihood", "feedback_passage", "text_passage"]


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


class SoftTokenLikelihood:
    """Log-likelihoods of passages, each under soft tokens of its own.

    Parameters
    ----------
    backbone : Backbone
    prompt : Prompt
        With an ending, if any passage has verbs.
    facets : sequence of G int
        Which facets' soft tokens are given; the others' are θ⁰.
    recompute : bool
        Keep no activations within layers but compute them again (gradient checkpointing): a third
        slower, for long passages on a small device.
    general : bool
        Go through transformers whatever the LM's layout, for a prompt with another mask.

    Attributes
    ----------
    theta0 : ndarray of float32, shape (G, d)
        θ⁰ of these facets.
    longest : float
        Length beyond which a soft token is scaled back, the mean length of token embeddings or
        that of the longest θ⁰: far outside the embeddings an LM has seen nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        facets: Sequence[int],
        recompute: bool = False,
        general: bool = False,
    ) -> None:
        self.backbone, self.prompt, self.facets = backbone, prompt, list(facets)
        self._theta0 = prompt.theta0(backbone)
        self.theta0 = self._theta0[self.facets].float().cpu().numpy()
        lengths = backbone.model.get_input_embeddings().weight.float().norm(dim=1)
        longest = torch.maximum(lengths.mean(), self._theta0.norm(dim=1).max())
        # A little more, so that no θ⁰ lies on the edge, where rounding would decide its gradient.
        self.longest = 1.001 * float(longest)
        self._llama = None
        #: Positions that the LM has; None where there is no limit.
        self.n_positions = getattr(
            backbone.model.config.get_text_config(), "max_position_embeddings", None
        )
        if not general and llama.supports(backbone, self.n_positions or 0):
            self._llama = _SoftLlama(backbone, prompt, self._theta0, self.facets, recompute)

    def n_tokens(self, passage: Passage) -> int:
        """Tokens that go through the LM: the passage and the soft tokens before it."""
        return len(passage.tokens) + len(self.facets)

    def log_likelihood(self, passages: Sequence[Passage], theta: torch.Tensor) -> torch.Tensor:
        """ℓ of each passage, differentiable in ``theta``; nats.

        Parameters
        ----------
        passages : n Passages, all with verbs or all without; best of like lengths
        theta : Tensor, shape (n, G, d)

        Returns
        -------
        Tensor of at least float32, shape (n,)
        """
        theta = theta * (self.longest / theta.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        texts = [list(passage.tokens) for passage in passages]
        device = self.backbone.device
        if passages[0].verbs:
            counts = [len(passage.verbs) for passage in passages]
            positions = [verb for passage in passages for verb in passage.verbs]
        else:
            counts = [len(text) for text in texts]
            positions = [position for count in counts for position in range(count)]
        rows = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(counts)).to(device)
        at = rows, torch.tensor(positions, device=device)
        if passages[0].verbs:
            values = self._verbs(passages, theta, texts, at)
        else:
            targets = torch.tensor([token for text in texts for token in text], device=device)
            values = self._tokens(theta, texts, at, targets)
        return values.new_zeros(len(texts)).index_add(0, rows, values)

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
        gradient : ndarray of float32, shape (n, G, d)
        """
        leaf = self._leaf(theta).requires_grad_()
        value = self.log_likelihood(passages, leaf)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        else:
            # texts of one token, predicted at a soft token that is not tuned
            gradient = torch.zeros_like(leaf)
        return value.detach().double().cpu().numpy(), gradient.float().cpu().numpy()

    @torch.no_grad()
    def value(self, passages: Sequence[Passage], theta: np.ndarray) -> np.ndarray:
        """ℓ of each passage alone, shape (n,), float64: a third of the cost."""
        return self.log_likelihood(passages, self._leaf(theta)).double().cpu().numpy()

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
        if self._llama is None:
            logits = self._logits(theta, texts)[at]
            return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        # the last token predicts nothing: it need not be run
        hidden = self._llama.hidden(theta, [text[:-1] for text in texts], at)
        return _LogProbs.apply(hidden, self._llama.head, targets)

    def _verbs(
        self,
        passages: Sequence[Passage],
        theta: torch.Tensor,
        texts: list[list[int]],
        at: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        ending = self.prompt.ending
        if self._llama is None:
            logits = self._logits(theta, texts)[at]
            lift = logits[:, ending.liked] - logits[:, ending.disliked]
        else:
            head = self._llama.head[[ending.liked, ending.disliked]].to(self._llama.wide)
            lift = self._llama.hidden(theta, texts, at).to(head.dtype) @ (head[0] - head[1])
        signs, intercepts = (
            torch.tensor([x for passage in passages for x in side(passage)]).to(lift)
            for side in (lambda p: p.signs, lambda p: p.intercepts)
        )
        return functional.logsigmoid(signs * (lift + intercepts))

    def _logits(self, theta: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        every = self._theta0.to(theta).expand(len(texts), -1, -1)
        every = every.index_copy(1, torch.tensor(self.facets, device=theta.device), theta)
        return prompts.logits(self.backbone, self.prompt, every, texts)


class _SoftLlama(llama.FoldedLlama):
    """Hidden states behind prompts whose soft tokens differ, for LMs of Llama's layout."""

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        theta0: torch.Tensor,
        facets: list[int],
        recompute: bool,
    ) -> None:
        super().__init__(backbone)
        self.recompute = recompute
        # PyTorch's fused attention for CPUs takes half of the time of a backward pass over short
        # texts (measured); plain products, the heads that share keys side by side, do not.
        self.fused = self.device.type != "cpu"
        self.n_prefix = len(prompt)
        self.positions = prompt.soft_positions[facets]
        fixed = torch.ones(len(prompt), dtype=torch.bool)
        fixed[self.positions] = False
        constant = torch.nonzero(fixed).flatten()
        mask = prompt.mask().to(self.device)
        x = self.embedding[prompt.token_ids.clamp(min=0).to(self.device)].to(self.wide)
        x = x.index_copy(0, prompt.soft_positions.to(self.device), theta0.to(x))
        with torch.no_grad():
            # nothing before a soft token sees it, so what does not move is run once
            hidden, self.constant = self._run(
                x[constant][None], constant, None, mask[constant][:, constant]
            )
        # the last facet's position predicts the first token
        self.last = None if self.n_prefix - 1 in self.positions else hidden[:, -1:]
        # what soft tokens see: the constants, then one another
        self.soft_mask = torch.cat(
            [mask[self.positions][:, constant], mask[self.positions][:, self.positions]], 1
        )

    def hidden(
        self,
        theta: torch.Tensor,
        texts: Sequence[Sequence[int]],
        at: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Normalised hidden states from which tokens are predicted.

        Parameters
        ----------
        theta : Tensor, shape (n, G, d)
        texts : n sequences of int
        at : (rows, positions), Tensors of shape (m,)
            Text and number of each token that is predicted.

        Returns
        -------
        Tensor, shape (m, d)
        """
        n, device = len(texts), self.device
        constant = [tuple(side.expand(n, -1, -1, -1) for side in layer) for layer in self.constant]
        soft, moved = self._run(theta.to(self.wide), self.positions, constant, self.soft_mask)
        states = soft[:, -1] if self.last is None else self.last[:, 0].expand(n, -1)
        lengths = torch.tensor([len(text) for text in texts])
        # states of all first predictions, then those behind each token, text by text
        before = torch.cumsum(lengths, 0) - lengths
        rows, positions = at[0].cpu(), at[1].cpu()
        where = torch.where(positions == 0, rows, n + before[rows] + positions - 1).to(device)
        longest = int(lengths.max())
        if longest:
            past = [
                tuple(torch.cat(sides, 2) for sides in zip(*pair, strict=True))
                for pair in zip(constant, moved, strict=True)
            ]
            ids = torch.tensor([token for text in texts for token in text], device=device)
            column = torch.cat([torch.arange(length) for length in lengths.tolist()])
            place = torch.repeat_interleave(torch.arange(n) * longest, lengths) + column
            x = self.embedding[ids].to(self.wide)
            run, _ = self._run(
                x, self.n_prefix + column, past, self._causal(longest), (longest, place.to(device))
            )
            states = torch.cat([states, run])
        return states[where]

    def _causal(self, length: int) -> torch.Tensor:
        """A passage's tokens see the whole prompt, and one another from the left."""
        if self.fused:
            return causal_lower_right(length, self.n_prefix + length)
        every = torch.ones(length, self.n_prefix + length, dtype=torch.bool)
        return every.tril(self.n_prefix)

    def _run(self, x, positions, past, mask, packed=None):
        """Run tokens behind the keys and values ``past`` of each layer.

        Parameters
        ----------
        x : Tensor, shape (n, T, d); or (m, d), packed
        positions : Tensor, shape (T,) or (m,)
        past : list of (keys, values), or None
        mask : Tensor of bool or attention bias, (T, past + T)
        packed : (T, places), optional
            Texts of different lengths lie one after another in x, for products with weights need
            no padding; only attention has them at ``places`` in n rows of T, on the right of
            which there is padding. No real token sees it: the mask is causal.

        Returns
        -------
        hidden : Tensor, like x
        pairs : list of (keys, values), each of shape (n, kv_heads, T, head_dim)
        """
        cos, sin = (part[:, None] for part in self.rotation(positions, self.dtype))
        pairs = []
        for index, layer in enumerate(self.layers):
            behind = (None, None) if past is None else past[index]
            arguments = layer, x, cos, sin, *behind, mask, packed
            if self.recompute and torch.is_grad_enabled():
                x, *pair = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                x, *pair = self._layer(*arguments)
            pairs.append(tuple(pair))
        return functional.rms_norm(x, x.shape[-1:], None, self.eps).to(self.dtype), pairs

    def _layer(self, layer, x, cos, sin, past_keys, past_values, mask, packed):
        width = x.shape[-1:]
        normed = functional.rms_norm(x, width, None, self.eps).to(self.dtype)
        heads = functional.linear(normed, layer.qkv, layer.qkv_bias)
        heads = heads.unflatten(-1, (-1, self.head_dim))
        rotated, value = heads.split([self.n_heads + self.n_kv, self.n_kv], -2)
        heads = torch.cat([_rotate(rotated, cos, sin), value], -2)
        if packed is not None:
            longest, places = packed
            n = len(past_keys)
            padded = heads.new_zeros(n * longest, *heads.shape[1:])
            heads = padded.index_copy(0, places, heads).unflatten(0, (n, longest))
        query, key, value = heads.transpose(1, 2).split([self.n_heads, self.n_kv, self.n_kv], 1)
        keys, values = key, value
        if past_keys is not None:
            keys, values = torch.cat([past_keys, key], 2), torch.cat([past_values, value], 2)
        mixed = self._attend(query, keys, values, mask).transpose(1, 2).flatten(2)
        if packed is not None:
            mixed = mixed.flatten(0, 1).index_select(0, places)
        x = x + functional.linear(mixed, layer.out)
        normed = functional.rms_norm(x, width, None, self.eps).to(self.dtype)
        gate, up = functional.linear(normed, layer.gate_up).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, layer.down), key, value

    def _attend(self, query, keys, values, mask):
        if self.fused:
            return functional.scaled_dot_product_attention(
                query, keys, values, mask, scale=self.scaling, enable_gqa=self.group > 1
            )
        n, _, length, _ = query.shape
        query = (query * self.scaling).reshape(n, self.n_kv, self.group * length, -1)
        scores = (query @ keys.transpose(2, 3)).view(n, self.n_kv, self.group, length, -1)
        attention = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        mixed = attention.view(n, self.n_kv, self.group * length, -1) @ values
        return mixed.view(n, self.n_heads, length, -1)


class _LogProbs(torch.autograd.Function):
    """Log-probabilities of targets by hidden states, with no more than a chunk of logits at once.

    The gradient is made with the value, while a chunk's probabilities are there.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in torch.arange(len(hidden), device=hidden.device).split(llama.HEAD_ROWS):
            values[chunk], slope = llama.head_log_probs(
                hidden[chunk], head, targets[chunk], gradient is not None
            )
            if gradient is not None:
                gradient[chunk] = slope.to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx, d_values):
        (gradient,) = ctx.saved_tensors
        return (gradient * d_values[:, None]).to(gradient.dtype), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, without the in-place steps that autograd would have to copy for."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin

"""True log-likelihoods of behaviours under soft tokens, and their gradients in them.

A *passage* is what the LM reads behind one prompt: one behaviour's text (``uip_likelihood: item``),
or the user's texts one after another (``sequence``). For the soft tokens θ_f of the facets that
are tuned, the others at θ⁰,

    text      ℓ(θ) = log p_LM(passage | prompt(θ)),
    feedback  ℓ(θ) = Σ_v log σ(s_v (f_v(θ) + b_v)),
              f_v = log p(verb liked) − log p(verb disliked) after the text of behaviour v,

with s_v = ±1 for liked and disliked and b_v an intercept. With b_v = logit p_i − f_i(θ⁰), p_i the
item's like rate, the gradient at θ⁰ is (y − p_i) ∇f_i: the evidence of a contrast facet.

Weights get no gradient, only soft tokens do. For LMs of Llama's layout (:mod:`llama`) names and
lead of a prompt are run once for all, and behind their keys and values each passage: its soft
tokens, then its own. Passages lie one after another, for products with weights need no padding; in
attention as many share a row as fit, and the mask keeps them apart. Logits are made at predicted
tokens alone, and never all at once. Other LMs, and soft tokens in the last layers, go through
transformers' public API.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recbole_uip.lm import llama
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.prefix import Prefix
from recbole_uip.lm.prompt import Ending, Prompt

__all__ = [
    "Likelihood",
    "Passage",
    "PrefixLikelihood",
    "SoftTokenLikelihood",
    "feedback_passage",
    "text_passage",
]

TILE = 64  # a GPU multiplies matrices of multiples of this fast, others by fractions of its speed
EMBEDDED = 4096  # tokens whose embeddings are looked at together
LONGEST_PLAIN = 256  # keys of a row of attention, above which a GPU does not keep its scores


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
    """

    moved = 1.0

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
        if passages[0].verbs:
            rows, numbers = prompts.places([len(passage.verbs) for passage in passages])
            numbers = torch.tensor([verb for passage in passages for verb in passage.verbs])
            lift = self._verbs(theta, texts, (rows, numbers))
            signs, intercepts = (
                torch.tensor([x for passage in passages for x in side(passage)]).to(lift)
                for side in (lambda p: p.signs, lambda p: p.intercepts)
            )
            values = functional.logsigmoid(signs * (lift + intercepts))
        else:
            rows, numbers = prompts.places([len(text) for text in texts])
            targets = torch.tensor([token for text in texts for token in text])
            values = self._tokens(theta, texts, (rows, numbers), targets.to(self.backbone.device))
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
        leaf = self._leaf(theta).requires_grad_()
        value = self.log_likelihood(passages, leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
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
            self._llama = _SoftLlama(backbone, prompt, theta0, self.facets, recompute)

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
        head = self._llama.head[[ending.liked, ending.disliked]].to(self._llama.wide)
        return self._llama.hidden(theta, texts, at).to(head.dtype) @ (head[0] - head[1])

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
        self.moved = prefix.moved
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


@dataclass(frozen=True)
class _Packing:
    """Where the tokens of passages, which lie one after another, are in rows of attention.

    Products with weights need no padding; attention has its rows of T places, each with as many
    whole passages as fit.

    Attributes
    ----------
    shape : (n, T)
    place : Tensor of int64, shape (m,)
        Of each token, among the n T places.
    source : Tensor of int64, shape (n T,)
        The token of each place; any token where there is none.
    mask : Tensor of bool, shape (n, T, C + T)
        Whom the token at each place sees: of the C constants of the prompt, then of its own row.
    """

    shape: tuple[int, int]
    place: torch.Tensor
    source: torch.Tensor
    mask: torch.Tensor


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
        self.on_gpu = self.device.type == "cuda"
        # On a GPU what lies between the products moves more bytes than they do, unless it is fused.
        self.compiled = self.on_gpu and bool(importlib.util.find_spec("triton"))
        self.n_prefix = len(prompt)
        self.positions = prompt.soft_positions[facets]
        fixed = torch.ones(len(prompt), dtype=torch.bool)
        fixed[self.positions] = False
        constant = torch.nonzero(fixed).flatten()
        mask = prompt.mask().to(self.device)
        x = self.embedding[prompt.token_ids.clamp(min=0).to(self.device)].to(self.wide)
        x = x.index_copy(0, prompt.soft_positions.to(self.device), theta0.to(x))
        alone = torch.arange(len(constant), device=self.device)
        packing = _Packing((1, len(constant)), alone, alone, mask[constant][:, constant][None])
        none = self.embedding.new_empty(self.n_kv, 0, self.head_dim)
        self.constant: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            # nothing before a soft token sees it, so what does not move is run once
            nothing = [(none, none)] * len(self.layers)
            hidden = self._run(x[constant], constant, nothing, packing, self.constant)
        # the last facet's position predicts the first token
        self.last = None if self.n_prefix - 1 in self.positions else hidden[-1:]
        # what each soft token sees, and in the last row what a passage's own tokens see: everything
        rows = [*self.positions.tolist(), self.n_prefix - 1]
        self.sees_constant = mask[rows][:, constant]
        self.sees_constant[-1] = True
        self.sees_soft = functional.pad(mask[rows][:, self.positions], (0, 1))
        self.sees_soft[-1] = True

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
        at : (rows, positions), Tensors of shape (m,), on the CPU
            Text and number of each token that is predicted.

        Returns
        -------
        Tensor, shape (m, d)
        """
        n, n_soft = theta.shape[:2]
        # soft tokens, then the text, passage by passage
        lengths = torch.tensor([len(text) for text in texts]) + n_soft
        start = torch.cumsum(lengths, 0) - lengths
        passage = torch.repeat_interleave(torch.arange(n), lengths)
        column = torch.arange(len(passage)) - start[passage]
        is_text = column >= n_soft
        soft = self.positions[column.clamp(max=n_soft - 1)]
        positions = torch.where(is_text, self.n_prefix + column - n_soft, soft)
        order = torch.empty(len(passage), dtype=torch.int64)
        order[~is_text] = torch.arange(n * n_soft)
        order[is_text] = torch.arange(n * n_soft, len(passage))
        ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        embedded = self.embedding[ids.to(self.device)].to(self.wide)
        x = torch.cat([theta.to(self.wide).flatten(0, 1), embedded])[order.to(self.device)]
        packing = self._pack(lengths, passage, column, n_soft)
        run = self._run(x, positions, self.constant, packing)
        rows, numbers = at
        where = start[rows] + n_soft + numbers - 1
        if self.last is not None:
            where = torch.where(numbers == 0, len(run), where)
            run = torch.cat([run, self.last])
        return run[where.to(self.device)]

    def _pack(
        self, lengths: torch.Tensor, passage: torch.Tensor, column: torch.Tensor, n_soft: int
    ) -> _Packing:
        """Passages into rows of attention, in turn; a row ends where the next does not fit.

        Of m tokens the passage and the number in it, soft tokens first.
        """
        longest = int(lengths.max())
        if self.on_gpu:
            # room for two, so that few places stay empty
            n_constant = self.sees_constant.shape[1]
            longest = TILE * math.ceil((n_constant + 2 * longest) / TILE) - n_constant
        starts, end = [], 0
        for length in lengths.tolist():
            left = longest - end % longest
            if length > left:
                end += left
            starts.append(end)
            end += length
        shape = math.ceil(end / longest), longest
        place = torch.tensor(starts)[passage] + column
        n_places = math.prod(shape)
        source = torch.zeros(n_places, dtype=torch.int64).scatter(
            0, place, torch.arange(len(place))
        )
        owner = torch.full((n_places,), -1).scatter(0, place, passage)
        kind = torch.full((n_places,), n_soft).scatter(0, place, column.clamp(max=n_soft))
        place, source, owner, kind = (each.to(self.device) for each in (place, source, owner, kind))
        owner, kind = owner.view(shape), kind.view(shape)
        own = (owner[:, :, None] == owner[:, None]) & self.sees_soft[
            kind[:, :, None], kind[:, None]
        ]
        mask = torch.cat([self.sees_constant[kind], own.tril()], -1)
        return _Packing(shape, place, source, mask)

    def _run(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        past: Sequence[tuple[torch.Tensor, torch.Tensor]],
        packing: _Packing,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Run tokens behind the keys and values ``past`` of each layer.

        Parameters
        ----------
        x : Tensor, shape (m, d)
        positions : Tensor, shape (m,)
        past : list of (keys, values), each of shape (kv_heads, C, head_dim)
        packing : _Packing
        kept : list, optional
            Gets the keys and values of the first row of attention, layer by layer.

        Returns
        -------
        Tensor, like x, of the LM's type
            Normalised hidden states.
        """
        cos, sin = (part[:, None] for part in self.rotation(positions, self.dtype))
        left, right = sin.chunk(2, -1)
        sin = torch.cat([-left, right], -1)
        for layer, (keys, values) in zip(self.layers, past, strict=True):
            arguments = layer, x, cos, sin, keys, values, packing
            if self.recompute and torch.is_grad_enabled():
                x, own_keys, own_values = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                x, own_keys, own_values = self._layer(*arguments)
            if kept is not None:
                kept.append((own_keys.clone(), own_values.clone()))
        return functional.rms_norm(x, x.shape[-1:], None, self.eps).to(self.dtype)

    def _layer(
        self,
        layer: llama.Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
        packing: _Packing,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a layer gives, and keys and values of the first row, (kv_heads, T, head_dim)."""
        fused = self.on_gpu and packing.mask.shape[2] > LONGEST_PLAIN
        before, attend, after = _before_attention, _attend, _after_attention
        if self.compiled and x.requires_grad and packing.shape[0] > 1:
            # neither values alone nor a single row are worth a compilation of their own
            before, after = _compiled(before, 3), _compiled(after, 2)
            attend = attend if fused else _compiled(attend, 3)
        rotated = self.n_heads + self.n_kv
        turned, value = before(x, cos, sin, layer.qkv, layer.qkv_bias, rotated, self.eps)
        turned, value = (
            _Take.apply(part, packing.source, packing.place).unflatten(0, packing.shape)
            for part in (turned, value)
        )
        mixed = attend(turned, value, packing.mask, past_keys, past_values, self.scaling, fused)
        mixed = _Take.apply(mixed, packing.place, packing.source)
        x = after(x, mixed, layer.out, layer.gate_up, layer.down, self.eps)
        return x, turned[0, :, self.n_heads :].transpose(0, 1), value[0].transpose(0, 1)


class _Take(torch.autograd.Function):
    """Rows ``there`` of x; ``back`` are those of the result, for the gradient.

    To and from padded rows, either is the inverse of the other but for padding, which no token
    sees: what stands there, and what flows back from there, does not matter.
    """

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


def _before_attention(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    n_rotated: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of a layer, rotated, (m, heads + kv_heads, head_dim), and its values."""
    normed = functional.rms_norm(x, x.shape[-1:], None, eps).to(qkv.dtype)
    heads = functional.linear(normed, qkv, bias).unflatten(-1, (-1, cos.shape[-1]))
    turned, value = heads[:, :n_rotated], heads[:, n_rotated:]
    swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return turned * cos + swapped * sin, value


def _attend(
    turned: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    past_keys: torch.Tensor,
    past_values: torch.Tensor,
    scaling: float,
    fused: bool,
) -> torch.Tensor:
    """Attention of rows (n, T, heads, head_dim) to the past and themselves, (n T, d).

    By plain products, the heads that share keys side by side: for short rows PyTorch's fused
    attention takes half of the time of a whole pass, on CPU and GPU alike. ``fused``, by that
    attention, keeps no scores.
    """
    query, keys, values = _by_kv_head(turned, value, past_keys, past_values)
    n, length = turned.shape[:2]
    if fused:
        mask = mask.repeat(1, query.shape[2] // length, 1)[:, None]
        mixed = functional.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    else:
        scores = (query * scaling) @ keys.transpose(2, 3)
        scores = scores.unflatten(2, (-1, length)).masked_fill(~mask[:, None, None], -torch.inf)
        mixed = torch.softmax(scores, -1).flatten(2, 3) @ values
    return mixed.view(n, -1, length, mixed.shape[-1]).transpose(1, 2).reshape(n * length, -1)


def _by_kv_head(
    turned: torch.Tensor, value: torch.Tensor, past_keys: torch.Tensor, past_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (n, kv_heads, group T, head_dim), keys and values (n, kv_heads, C + T, head_dim)."""
    n, _, n_kv, size = value.shape
    n_heads = turned.shape[2] - n_kv
    query = turned[:, :, :n_heads].transpose(1, 2).reshape(n, n_kv, -1, size)
    keys, values = (
        torch.cat([past.expand(n, -1, -1, -1), own.transpose(1, 2)], 2)
        for past, own in ((past_keys, turned[:, :, n_heads:]), (past_values, value))
    )
    return query, keys, values


def _after_attention(
    x: torch.Tensor,
    mixed: torch.Tensor,
    out: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """What a layer gives, (m, d): its input, what attention adds to it, and what the MLP adds."""
    x = x + functional.linear(mixed, out)
    normed = functional.rms_norm(x, x.shape[-1:], None, eps).to(gate_up.dtype)
    gate, up = functional.linear(normed, gate_up).chunk(2, -1)
    return x + functional.linear(functional.silu(gate) * up, down)


@functools.cache
def _compiled(stage: Callable, n_varying: int) -> Callable:
    """The stage with all between its products fused.

    Its first ``n_varying`` arguments may be of any number of tokens, or of rows of attention.
    """
    fused = torch.compile(stage, dynamic=False)

    def run(*arguments: Any) -> Any:
        for varying in arguments[:n_varying]:
            torch._dynamo.maybe_mark_dynamic(varying, 0)
        return fused(*arguments)

    return run

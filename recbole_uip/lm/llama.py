"""The fast path: score vectors for LMs of Llama's layout, with the prefix computed once.

Thanks to the block mask, keys and values at θ_f's position depend on θ_f and constants only.
So the whole prefix is shared by all texts, and the chain rule splits:

    ∇_θf ℓ_e = J_fᵀ γ_ef,   J_f = ∂(K, V at θ_f, all layers)/∂θ_f,   γ_ef = ∂ℓ_e/∂(K, V at θ_f).

J_f is one fixed matrix per prompt; γ comes from a forward and backward pass over the behaviour
tokens alone. The first behaviour token is predicted at the position of θ_F, so θ_F's last
hidden state belongs to the leaves too. All of this is exact.

The backward pass is written out. Weights need no gradients, so only what input gradients need
is kept, and the gradients of text and feedback go through each matrix product together.

The pre-norm layer, in the notation of the code (weights of the norms folded into the matrices
that follow them):

    n₁ = x/rms(x);  q, k, v = W_qkv n₁;  x ← x + W_o attention(rope(q), rope(k), v)
    n₂ = x/rms(x);  g, u = W_gu n₂;      x ← x + W_down (silu(g) ⊙ u)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from tqdm import tqdm

from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.prompt import Ending, Prompt, side_by_side

__all__ = [
    "HEAD_ROWS",
    "FoldedLlama",
    "Layer",
    "LlamaScorer",
    "LogProbs",
    "SharedPrefix",
    "head_log_probs",
    "supports",
    "verb_lifts",
]

MODEL_TYPES = ("llama", "mistral", "qwen2")
#: Rows of the vocabulary projection at a time: bounds its memory.
HEAD_ROWS = {"cpu": 512, "cuda": 8192}

#: Layers and head of each model that is still there, folded: one copy, whoever reads them.
_FOLDED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[list[Layer], torch.Tensor]]
_FOLDED = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Layer:
    """Weights as (out, in); those behind a norm carry its weight in their columns."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class SharedPrefix:
    """What all texts share under one prompt.

    Attributes
    ----------
    keys, values : Tensor, shape (layers, kv_heads, P, head_dim)
        Keys after rotation.
    hidden : Tensor, shape (d,)
        Last hidden state at θ_F, normalised.
    jacobian : Tensor, shape (F, layers * 2 * kv_heads * head_dim + d, d)
        J_f; the last d rows are those of ``hidden``, zero but for the last facet.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor
    jacobian: torch.Tensor


@dataclass
class _Saved:
    """What the backward pass of one layer needs."""

    norm1: torch.Tensor
    scale1: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention: torch.Tensor
    norm2: torch.Tensor
    scale2: torch.Tensor
    d_gate: torch.Tensor
    d_up: torch.Tensor


def supports(backbone: Backbone, n_positions: int) -> bool:
    """Whether the LM has the layout this module knows, for prompts of ``n_positions``."""
    model, config = backbone.model, backbone.model.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return False
    window = getattr(config, "sliding_window", None)
    slides = getattr(config, "use_sliding_window", config.model_type == "mistral")
    if slides and window and n_positions > window:
        return False
    linear = [
        module
        for layer in model.model.layers
        for module in (
            layer.self_attn.o_proj,
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        )
    ]
    # exact classes: quantised or adapted layers go the general way
    return all(type(m) is torch.nn.Linear and m.bias is None for m in linear)


class FoldedLlama:
    """Sizes and weights of an LM of Llama's layout, norms folded into what follows them.

    Parameters
    ----------
    backbone : Backbone
        For which :func:`supports` is true.
    """

    def __init__(self, backbone: Backbone) -> None:
        model, config = backbone.model, backbone.model.config
        self.dtype, self.device = backbone.dtype, backbone.device
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.n_heads = config.num_attention_heads
        self.n_kv = config.num_key_value_heads
        self.group = self.n_heads // self.n_kv
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.scaling = model.model.layers[0].self_attn.scaling
        self.eps = config.rms_norm_eps
        self.embedding = model.get_input_embeddings().weight
        self.rotary = model.model.rotary_emb
        if model not in _FOLDED:
            head = model.get_output_embeddings().weight
            _FOLDED[model] = (
                [_fold(layer, self.wide) for layer in model.model.layers],
                _scale_columns(head, model.model.norm, self.wide),
            )
        self.layers, self.head = _FOLDED[model]

    def rotation(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotary embedding, each (n, head_dim)."""
        like = torch.zeros(1, dtype=dtype, device=self.device)
        cos, sin = self.rotary(like, positions[None].to(self.device))
        return cos[0], sin[0]

    def turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for :mod:`llama_stages`, (n, 1, head_dim), the sines' left half negated."""
        cos, sin = (part[:, None] for part in self.rotation(positions, self.dtype))
        left, right = sin.chunk(2, -1)
        return cos, torch.cat([-left, right], -1)


class LlamaScorer(FoldedLlama):
    """Scores batches of texts under one prompt.

    Parameters
    ----------
    backbone : Backbone
        For which :func:`supports` is true.
    prompt : Prompt
    prefix : SharedPrefix, optional
        From an earlier run; computed if not given.
    """

    def __init__(
        self, backbone: Backbone, prompt: Prompt, prefix: SharedPrefix | None = None
    ) -> None:
        super().__init__(backbone)
        self.prompt = prompt
        self.prefix = prefix or self._prefix(prompt.theta0(backbone))
        self._keys = self.prefix.keys.to(self.device, self.dtype)
        self._values = self.prefix.values.to(self.device, self.dtype)
        self._jacobian = self.prefix.jacobian.to(self.device)
        self._soft = prompt.soft_positions.to(self.device)
        hidden = self.prefix.hidden.to(self.device, self.wide)
        first = _matvec(self.head, hidden)
        self.first_log_probs = first.log_softmax(-1)
        self._first_mean = _matvec(self.head.T, self.first_log_probs.exp())

    # --- the prefix ------------------------------------------------------------------------

    @torch.no_grad()
    def _prefix(self, theta: torch.Tensor) -> SharedPrefix:
        """Forward pass over the prefix, with the forward-mode Jacobian at the soft tokens.

        ``tangent[f, i]`` is ∂x/∂θ_f[i] at the position of θ_f; it meets no other position's,
        thanks to the block mask. States in at least float32; the d · F tangent rows go
        through the matrix products in the LM's own type, like the texts.
        """
        prompt, wide, dtype = self.prompt, self.wide, self.dtype
        soft = prompt.soft_positions.to(self.device)
        facets = torch.arange(prompt.n_facets, device=self.device)
        mask = prompt.mask().to(self.device)
        cos, sin = self.rotation(torch.arange(len(prompt)), wide)
        cos_soft, sin_soft = (part[soft][:, None, None] for part in (cos, sin))
        x = self.embedding[prompt.token_ids.clamp(min=0).to(self.device)].to(wide)
        x = x.index_copy(0, soft, theta.to(self.device, wide))
        tangent = torch.eye(x.shape[1], dtype=wide, device=self.device).repeat(len(soft), 1, 1)
        keys, values, jacobian = [], [], []

        def pull(normed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            # the Jacobian of n = x / rms(x) is symmetric: forward and backward are one formula
            return _normalise_backward(tangent, normed[soft][:, None], scale[soft][:, None])

        bar = tqdm(self.layers, desc="prompt's Jacobian", unit="layer", leave=False, delay=2)
        for layer in bar:
            normed, scale = _normalise(x, self.eps)
            bias = None if layer.qkv_bias is None else layer.qkv_bias.to(wide)
            heads = functional.linear(normed, layer.qkv.to(wide), bias)
            heads = heads.view(len(x), -1, self.head_dim).transpose(0, 1)
            query, key, value = heads.split([self.n_heads, self.n_kv, self.n_kv])
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            d_heads = functional.linear(pull(normed, scale).to(dtype), layer.qkv).to(wide)
            d_heads = d_heads.unflatten(-1, (-1, self.head_dim))
            d_query, d_key, d_value = d_heads.split([self.n_heads, self.n_kv, self.n_kv], 2)
            d_query = _rotate(d_query, cos_soft, sin_soft)
            d_key = _rotate(d_key, cos_soft, sin_soft)
            keys.append(key)
            values.append(value)
            jacobian.append(torch.stack([d_key, d_value], 2))  # F, d, 2, kv_heads, head_dim

            key, value = (side.repeat_interleave(self.group, 0) for side in (key, value))
            d_key, d_value = (side.repeat_interleave(self.group, 2) for side in (d_key, d_value))
            scores = (query @ key.transpose(1, 2)) * self.scaling
            attention = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            d_scores = torch.einsum("fihe,hpe->fihp", d_query, key)
            d_scores[facets, :, :, soft] += torch.einsum("fihe,hfe->fih", d_key, query[:, soft])
            seen = attention[:, soft].transpose(0, 1)[:, None]  # F, 1, heads, P
            d_attention = d_scores.mul_(self.scaling).mul_(seen)
            d_attention = d_attention - seen * d_attention.sum(-1, keepdim=True)
            d_mixed = torch.einsum("fihp,hpe->fihe", d_attention, value)
            d_mixed += seen[facets, :, :, soft][..., None] * d_value
            mixed = (attention @ value).transpose(0, 1).flatten(1)
            x = x + functional.linear(mixed, layer.out.to(wide))
            tangent += functional.linear(d_mixed.flatten(2).to(dtype), layer.out)

            normed, scale = _normalise(x, self.eps)
            gate, up = functional.linear(normed, layer.gate_up.to(wide)).chunk(2, -1)
            d_gate_up = functional.linear(pull(normed, scale).to(dtype), layer.gate_up)
            d_gate, d_up = d_gate_up.chunk(2, -1)
            active = functional.silu(gate)
            by_gate = torch.ops.aten.silu_backward(up, gate)[soft][:, None].to(dtype)
            d_active = d_gate * by_gate + d_up * active[soft][:, None].to(dtype)
            x = x + functional.linear(active * up, layer.down.to(wide))
            tangent += functional.linear(d_active, layer.down)
        normed, scale = _normalise(x, self.eps)
        d_hidden = pull(normed, scale)
        d_hidden[:-1] = 0  # only the last facet's position predicts a behaviour token
        # F, d, layers * 2 * kv_heads * head_dim
        pairs = torch.stack(jacobian, 2).flatten(2)
        columns = torch.cat([pairs, d_hidden], 2).transpose(1, 2).contiguous()
        return SharedPrefix(torch.stack(keys), torch.stack(values), normed[-1], columns)

    # --- a batch of texts ------------------------------------------------------------------

    @torch.no_grad()
    def score(self, texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Score a batch.

        Parameters
        ----------
        texts : n sequences of int
            Token ids, at least one each; best of like lengths.

        Returns
        -------
        dict
            As :func:`recbole_uip.lm.scoring.score_by_autograd`.
        """
        ending = self.prompt.ending
        # the last token of a text without ending predicts nothing: it need not be run
        run = [[*text, *ending.common] if ending else list(text[:-1]) for text in texts]
        first = torch.tensor([text[0] for text in texts], device=self.device)
        log_likelihood = self.first_log_probs[first]
        d_hidden = self.head[first].to(self.wide) - self._first_mean
        n_kinds = 2 if ending else 1
        n_facets = self.prompt.n_facets
        grads = torch.zeros(
            n_kinds,
            len(texts),
            n_facets,
            self._jacobian.shape[1],
            dtype=self.wide,
            device=self.device,
        )
        grads[0, :, -1, -d_hidden.shape[1] :] = d_hidden
        result = {}
        if any(run):
            ids, _ = side_by_side(run)
            normed, scale, saved, rotation = self._forward(ids.to(self.device))
            d_normed = torch.zeros(n_kinds, *normed.shape, dtype=self.wide, device=self.device)
            log_likelihood = log_likelihood + self._text_loss(normed, texts, d_normed[0])
            if ending:
                last = torch.tensor([len(tokens) - 1 for tokens in run], device=self.device)
                rows = torch.arange(len(run), device=self.device)
                verbs = self.head[ending.liked].to(self.wide) - self.head[ending.disliked]
                result["feedback_logit"] = normed[rows, last].to(self.wide) @ verbs
                d_normed[1, rows, last] = verbs
            self._backward(d_normed, normed, scale, saved, rotation, grads)
        scores = torch.einsum("cnfm,fmd->cnfd", grads, self._jacobian.to(self.wide))
        result |= {"log_likelihood": log_likelihood, "text": scores[0]}
        if ending:
            result["feedback"] = scores[1]
        return result

    def _forward(
        self, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[_Saved], tuple[torch.Tensor, torch.Tensor]]:
        """Forward pass over behaviour tokens (n, T), the prefix's keys and values given."""
        n, length = ids.shape
        n_prefix = len(self.prompt)
        rotation = self.rotation(torch.arange(n_prefix, n_prefix + length), self.dtype)
        cos, sin = (part[:, None] for part in rotation)
        # right padding: no real token sees a padding token, so the causal mask is enough
        future = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)
        x = self.embedding[ids].to(self.wide)
        n_rotated = self.n_heads + self.n_kv
        saved = []
        for layer, prefix_keys, prefix_values in zip(
            self.layers, self._keys, self._values, strict=True
        ):
            norm1, scale1 = _normalise(x, self.eps)
            norm1 = norm1.to(self.dtype)
            heads = functional.linear(norm1, layer.qkv, layer.qkv_bias)
            heads = heads.view(n, length, -1, self.head_dim)
            rotated = _rotate(heads[:, :, :n_rotated], cos, sin)
            query = rotated[:, :, : self.n_heads] * self.scaling
            query = self._group(query.unflatten(2, (self.n_kv, self.group)))
            key = rotated[:, :, self.n_heads :].transpose(1, 2).contiguous()
            value = heads[:, :, n_rotated:].transpose(1, 2).contiguous()
            scores = torch.cat(
                [
                    query @ prefix_keys.transpose(1, 2),
                    (query @ key.transpose(2, 3))
                    .view(n, self.n_kv, self.group, length, length)
                    .masked_fill_(future, -torch.inf)
                    .flatten(2, 3),
                ],
                -1,
            )
            attention = torch.softmax(scores, -1)
            mixed = attention[..., :n_prefix] @ prefix_values
            mixed += attention[..., n_prefix:] @ value
            mixed = mixed.view(n, self.n_kv, self.group, length, -1).permute(0, 3, 1, 2, 4)
            x += functional.linear(mixed.reshape(n, length, -1), layer.out)
            norm2, scale2 = _normalise(x, self.eps)
            norm2 = norm2.to(self.dtype)
            gate, up = functional.linear(norm2, layer.gate_up).chunk(2, -1)
            active = functional.silu(gate)
            x += functional.linear(active * up, layer.down)
            d_gate = torch.ops.aten.silu_backward(up, gate)
            saved.append(
                _Saved(norm1, scale1, query, key, value, attention, norm2, scale2, d_gate, active)
            )
        normed, scale = _normalise(x, self.eps)
        return normed.to(self.dtype), scale, saved, rotation

    def _text_loss(
        self, normed: torch.Tensor, texts: Sequence[Sequence[int]], d_normed: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each text's tokens after the first (n,); its gradient to d_normed."""
        rows = [row for row, text in enumerate(texts) for _ in text[1:]]
        positions = [position for text in texts for position in range(len(text) - 1)]
        targets = [token for text in texts for token in text[1:]]
        rows, positions, targets = (
            torch.tensor(column, dtype=torch.long, device=self.device)
            for column in (rows, positions, targets)
        )
        total = torch.zeros(len(texts), dtype=self.wide, device=self.device)
        for chunk in torch.arange(len(rows), device=self.device).split(HEAD_ROWS[self.device.type]):
            row, position = rows[chunk], positions[chunk]
            value, gradient = head_log_probs(normed[row, position], self.head, targets[chunk])
            total.index_add_(0, row, value)
            d_normed[row, position] = gradient
        return total

    def _backward(
        self,
        d_normed: torch.Tensor,
        normed: torch.Tensor,
        scale: torch.Tensor,
        saved: list[_Saved],
        rotation: tuple[torch.Tensor, torch.Tensor],
        grads: torch.Tensor,
    ) -> None:
        """Pull gradients (kinds, n, T, d) back to the soft tokens' keys and values: ``grads``."""
        kinds, n, length, _ = d_normed.shape
        n_prefix, n_kv, group, soft = len(self.prompt), self.n_kv, self.group, self._soft
        width = n_kv * self.head_dim
        cos, sin = (part[:, None] for part in rotation)
        dx = _normalise_backward(d_normed, normed, scale)
        for index in range(len(self.layers) - 1, -1, -1):
            layer, state = self.layers[index], saved[index]
            saved[index] = None  # free the memory as we go
            d_active = dx.to(self.dtype) @ layer.down
            d_gate_up = torch.empty(
                *d_active.shape[:-1], 2 * d_active.shape[-1], dtype=self.dtype, device=self.device
            )
            d_gate, d_up = d_gate_up.chunk(2, -1)
            torch.mul(d_active, state.d_gate, out=d_gate)
            torch.mul(d_active, state.d_up, out=d_up)
            dx += _normalise_backward(d_gate_up @ layer.gate_up, state.norm2, state.scale2)

            # attention; the kinds lie next to the rows of a head, so that one product per text
            # and head serves them all
            d_mixed = (dx.to(self.dtype) @ layer.out).view(kinds, n, length, n_kv, group, -1)
            d_mixed = d_mixed.permute(1, 3, 0, 4, 2, 5).reshape(n, n_kv, kinds * group * length, -1)
            d_attention = torch.cat(
                [
                    d_mixed @ self._values[index].transpose(1, 2),
                    d_mixed @ state.value.transpose(2, 3),
                ],
                -1,
            ).view(n, n_kv, kinds, group * length, -1)
            d_mixed = d_mixed.view(n, n_kv, kinds, group * length, -1)
            attention = state.attention[:, :, None]
            d_scores = torch.ops.aten._softmax_backward_data(
                d_attention, attention.expand_as(d_attention), -1, self.dtype
            )
            query = state.query[:, :, None]
            leaf = torch.stack(
                [
                    d_scores[..., soft].transpose(3, 4) @ query,
                    attention[..., soft].transpose(3, 4) @ d_mixed,
                ]
            )  # 2, n, kv_heads, kinds, F, head_dim
            leaf = leaf.permute(3, 1, 4, 0, 2, 5).reshape(kinds, n, -1, 2 * width)
            grads[..., index * 2 * width : (index + 1) * 2 * width] = leaf
            if index == 0:
                break  # the behaviour tokens' embeddings are constants
            within = d_scores[..., n_prefix:]
            d_query = d_scores[..., :n_prefix] @ self._keys[index][:, None]
            d_query += within @ state.key[:, :, None]
            d_query = d_query.view(n, n_kv, kinds, group, length, -1) * self.scaling
            d_key = within.transpose(3, 4) @ query
            d_value = attention[..., n_prefix:].transpose(3, 4) @ d_mixed
            rotated = torch.cat(
                [
                    d_query.permute(2, 0, 4, 1, 3, 5).flatten(3, 4),
                    d_key.permute(2, 0, 3, 1, 4),
                ],
                3,
            )
            d_heads = torch.cat(
                [_rotate(rotated, cos, -sin), d_value.permute(2, 0, 3, 1, 4)], 3
            ).flatten(3)
            dx += _normalise_backward(d_heads @ layer.qkv, state.norm1, state.scale1)

    @staticmethod
    def _group(query: torch.Tensor) -> torch.Tensor:
        """(n, T, kv_heads, group, head_dim) to (n, kv_heads, group * T, head_dim)."""
        return query.permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()


def head_log_probs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, gradient: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of targets by hidden states, and their gradients in these, if asked for.

    Parameters
    ----------
    hidden : Tensor, shape (m, d)
        At most :data:`HEAD_ROWS` at a time, since all rows of logits are in memory at once.
    head : Tensor, shape (vocabulary, d)
    targets : Tensor of int64, shape (m,)

    Returns
    -------
    value : Tensor of at least float32, shape (m,)
    gradient : Tensor of at least float32, shape (m, d), or None
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = functional.linear(hidden, head)
    largest, where = (each[:, 0] for each in logits.max(-1, keepdim=True))
    probs = torch.softmax(logits, -1, dtype=wide)
    wanted = head[targets].to(wide)
    # the target's logit and the largest once more in full precision: the rounding of bfloat16
    # logits is the largest error of a log-likelihood
    rounding = (hidden.to(wide) * head[where].to(wide)).sum(-1) - largest
    most = probs.gather(1, where[:, None])[:, 0]
    log_norm = largest - most.log() + torch.log1p(most * torch.expm1(rounding))
    value = (hidden.to(wide) * wanted).sum(-1) - log_norm
    return value, wanted - (probs.to(head.dtype) @ head).to(wide) if gradient else None


def verb_lifts(hidden: torch.Tensor, head: torch.Tensor, ending: Ending) -> torch.Tensor:
    """Differences of the verbs' logits by hidden states (m, d); of at least float32, shape (m,)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    liked, disliked = head[[ending.liked, ending.disliked]].to(wide)
    return hidden.to(wide) @ (liked - disliked)


class LogProbs(torch.autograd.Function):
    """Log-probabilities of targets by hidden states, with no more than a chunk of logits at once.

    The gradient is made with the value, while a chunk's probabilities are there.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = HEAD_ROWS[hidden.device.type]
        for chunk in torch.arange(len(hidden), device=hidden.device).split(rows):
            values[chunk], slope = head_log_probs(
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


def _fold(layer: torch.nn.Module, wide: torch.dtype) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = None
    if projections[0].bias is not None:
        bias = torch.cat([projection.bias for projection in projections])
    return Layer(
        qkv=_scale_columns(
            torch.cat([projection.weight for projection in projections]),
            layer.input_layernorm,
            wide,
        ),
        qkv_bias=bias,
        out=attention.o_proj.weight,
        gate_up=_scale_columns(
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            layer.post_attention_layernorm,
            wide,
        ),
        down=mlp.down_proj.weight,
    )


def _scale_columns(weight: torch.Tensor, norm: torch.nn.Module, wide: torch.dtype) -> torch.Tensor:
    return (weight.to(wide) * norm.weight.to(wide)).to(weight.dtype)


def _matvec(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Product in the vector's precision, without a copy of the whole matrix in it."""
    return torch.cat([rows.to(vector.dtype) @ vector for rows in matrix.split(8192)])


def _normalise(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x), and 1 / rms(x) of shape (..., 1)."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def _normalise_backward(
    d_normed: torch.Tensor, normed: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Gradient with respect to x of n = x / rms(x): (dn − n · mean(dn ⊙ n)) / rms(x).

    Types promote to that of ``scale``; the Jacobian is symmetric, so this is also its tangent.
    """
    inner = (d_normed * normed).mean(-1, keepdim=True, dtype=scale.dtype)
    return torch.mul(d_normed, scale).addcmul_(normed, inner.mul_(scale), value=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding; with −sin its inverse, which is its transpose."""
    half = x.shape[-1] // 2
    left, right = x.chunk(2, -1)
    rotated = x * cos
    rotated[..., :half].addcmul_(right, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(left, sin[..., half:])
    return rotated

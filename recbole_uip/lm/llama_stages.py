"""The stages of a pre-norm layer of Llama's layout: before, in and after attention.

Differentiable; the weights are those of :class:`recbole_uip.lm.llama.Layer`, norms folded in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["Packing", "Take", "after_attention", "attend", "before_attention"]


def before_attention(
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


def attend(
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


def after_attention(
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


@dataclass(frozen=True)
class Packing:
    """Where the tokens of passages, which lie one after another, are in rows of attention.

    Products with weights need no padding; attention has its rows of T places, each with one or
    more whole passages.

    Attributes
    ----------
    shape : (n, T)
    place : Tensor of int64, shape (m,)
        Of each token, among the n T places.
    source : Tensor of int64, shape (n T,)
        The token of each place; any token where there is none.
    mask : Tensor of bool, shape (n, T, C + T)
        Whom the token at each place sees: of the C tokens of the past, then of its own row.
    """

    shape: tuple[int, int]
    place: torch.Tensor
    source: torch.Tensor
    mask: torch.Tensor


class Take(torch.autograd.Function):
    """Rows ``there`` of x; ``back`` are those of the result, for the gradient.

    To and from padded rows, either is the inverse of the other but for padding. What stands there
    does not matter, for no token sees it; nor does what flows back from there, if it sees none.
    """

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None

"""Hidden states behind prompts whose soft tokens differ, for LMs of Llama's layout.

Names and lead of a prompt are run once for all, and behind their keys and values each passage: its
soft tokens, then its own. Passages lie one after another, for products with weights need no
padding; in attention as many share a row as fit, and the mask keeps them apart.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recbole_uip.lm import llama
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.llama_stages import Packing, Take, after_attention, attend, before_attention
from recbole_uip.lm.prompt import Prompt

__all__ = ["SoftLlama"]

TILE = 64  # a GPU multiplies matrices of multiples of this fast, others by fractions of its speed
LONGEST_PLAIN = 256  # keys of a row of attention, above which a GPU does not keep its scores


class SoftLlama(llama.FoldedLlama):
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
        packing = Packing((1, len(constant)), alone, alone, mask[constant][:, constant][None])
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
    ) -> Packing:
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
        return Packing(shape, place, source, mask)

    def _run(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        past: Sequence[tuple[torch.Tensor, torch.Tensor]],
        packing: Packing,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Run tokens behind the keys and values ``past`` of each layer.

        Parameters
        ----------
        x : Tensor, shape (m, d)
        positions : Tensor, shape (m,)
        past : list of (keys, values), each of shape (kv_heads, C, head_dim)
        packing : Packing
        kept : list, optional
            Gets the keys and values of the first row of attention, layer by layer.

        Returns
        -------
        Tensor, like x, of the LM's type
            Normalised hidden states.
        """
        cos, sin = self.turns(positions)
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
        packing: Packing,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a layer gives, and keys and values of the first row, (kv_heads, T, head_dim)."""
        fused = self.on_gpu and packing.mask.shape[2] > LONGEST_PLAIN
        before, mix, after = before_attention, attend, after_attention
        if self.compiled and x.requires_grad and packing.shape[0] > 1:
            # neither values alone nor a single row are worth a compilation of their own
            before, after = _compiled(before, 3), _compiled(after, 2)
            mix = attend if fused else _compiled(attend, 3)
        rotated = self.n_heads + self.n_kv
        turned, value = before(x, cos, sin, layer.qkv, layer.qkv_bias, rotated, self.eps)
        turned, value = (
            Take.apply(part, packing.source, packing.place).unflatten(0, packing.shape)
            for part in (turned, value)
        )
        mixed = mix(turned, value, packing.mask, past_keys, past_values, self.scaling, fused)
        mixed = Take.apply(mixed, packing.place, packing.source)
        x = after(x, mixed, layer.out, layer.gate_up, layer.down, self.eps)
        return x, turned[0, :, self.n_heads :].transpose(0, 1), value[0].transpose(0, 1)


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

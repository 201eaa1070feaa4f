"""Hidden states behind a prefix whose values differ, for LMs of Llama's layout.

Where soft tokens are moved in the last layers alone, what a text is before these depends on the
text and on nothing else: its *trunk*. It is run once, and kept while there is room, so that of a
text that is met under many soft tokens only the last layers are run again. What is kept must not
depend on the company that a text happened to be met in, not by a bit: then runs that were killed,
or share their work, end with the same numbers. So a catalogue's trunks are made together
(:meth:`PrefixLlama.keep`) in the same batches each time, and any other text's alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from recbole_uip.lm import llama
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.llama_stages import Packing, Take, after_attention, attend, before_attention
from recbole_uip.lm.prompt import places

__all__ = ["PrefixLlama"]

# Bytes of trunks that are kept, at most.
KEPT_BYTES = 1 << 30


class PrefixLlama(llama.FoldedLlama):
    """Runs texts behind keys and values of a prefix.

    Parameters
    ----------
    backbone : Backbone
        For which :func:`recbole_uip.lm.llama.supports` is true.
    states : list of (keys, values), each Tensor of shape (1, kv_heads, P, head_dim)
        Of the prefix, layer by layer, keys after rotation.
    first : int
        The first layer whose values differ.
    """

    def __init__(
        self,
        backbone: Backbone,
        states: Sequence[tuple[torch.Tensor, torch.Tensor]],
        first: int,
    ) -> None:
        super().__init__(backbone)
        self.states, self.first = list(states), first
        self.n_prefix = states[0][0].shape[2]
        self._trunks: dict[tuple[int, ...], torch.Tensor] = {}
        self._room = KEPT_BYTES

    def hidden(
        self, texts: Sequence[Sequence[int]], values: Sequence[torch.Tensor], keep: bool
    ) -> torch.Tensor:
        """Normalised hidden states of texts, shape (n, T, d), of the LM's type.

        Parameters
        ----------
        texts : n sequences of int
        values : sequence of Tensor, shape (n, kv_heads, P, head_dim)
            Of the prefix in the layers from ``first`` on, for each text.
        keep : bool
            Whether the texts will be met again.
        """
        packing, column = self._pack([len(text) for text in texts])
        last = zip(self.layers[self.first :], self.states[self.first :], values, strict=True)
        x = torch.cat(self._trunk(texts, keep))
        x = self._run(x, packing, column, [(layer, keys, own) for layer, (keys, _), own in last])
        x = functional.rms_norm(x, x.shape[-1:], None, self.eps).to(self.dtype)
        return Take.apply(x, packing.source, packing.place).unflatten(0, packing.shape)

    @torch.no_grad()
    def keep(self, texts: Sequence[Sequence[int]], n_last: int = 0) -> None:
        """Run a batch's trunks if there is room to keep them, unless all are kept.

        Less their last ``n_last`` tokens texts are kept as well, and take no room.
        """
        texts = [tuple(text) for text in texts]
        fresh = {text for text in texts if text not in self._trunks}
        size = sum(map(len, fresh)) * self.embedding.shape[1] * self.wide.itemsize
        if not fresh or size > self._room:
            return
        self._room -= size
        for text, trunk in zip(texts, self._run_trunks(texts), strict=True):
            if text not in self._trunks:
                self._trunks[text] = trunk.clone()  # or all the batch would be held
            shorter = len(text) - n_last
            self._trunks.setdefault(text[:shorter], self._trunks[text][:shorter])

    @torch.no_grad()
    def _trunk(self, texts: Sequence[Sequence[int]], keep: bool) -> list[torch.Tensor]:
        """What each text is before layer ``first``, (T, d)."""
        texts = [tuple(text) for text in texts]
        if keep:
            for text in texts:
                self.keep([text])
        known = {text: self._trunks[text] for text in texts if text in self._trunks}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        for part in [[text] for text in missing] if keep else [missing] * bool(missing):
            known.update(zip(part, self._run_trunks(part), strict=True))
        return [known[text] for text in texts]

    def _run_trunks(self, texts: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
        """The trunk (T, d) of each text, all run together."""
        lengths = [len(text) for text in texts]
        ids = torch.tensor([token for text in texts for token in text])
        x = self.embedding[ids.to(self.device)].to(self.wide)
        first = zip(self.layers[: self.first], self.states[: self.first], strict=True)
        layers = [(layer, *past) for layer, past in first]
        return self._run(x, *self._pack(lengths), layers).split(lengths)

    def _pack(self, lengths: Sequence[int]) -> tuple[Packing, torch.Tensor]:
        """Texts in a row of attention each, and the number of each token in its text, (m,)."""
        shape = n, longest = len(lengths), max(lengths)
        row, column = places(lengths)
        place = row * longest + column
        source = torch.zeros(math.prod(shape), dtype=torch.int64)
        source[place] = torch.arange(len(place))
        # padded on the right, so no token of a text sees a padding token
        mask = torch.ones(longest, self.n_prefix + longest, dtype=torch.bool, device=self.device)
        mask = mask.tril(self.n_prefix).expand(n, -1, -1)
        return Packing(shape, place.to(self.device), source.to(self.device), mask), column

    def _run(
        self,
        x: torch.Tensor,
        packing: Packing,
        column: torch.Tensor,
        layers: Sequence[tuple[llama.Layer, torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Run tokens (m, d) through layers, each behind keys and values."""
        cos, sin = self.turns(self.n_prefix + column)
        for layer, keys, values in layers:
            x = self._layer(layer, x, cos, sin, keys, values, packing)
        return x

    def _layer(
        self,
        layer: llama.Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
        packing: Packing,
    ) -> torch.Tensor:
        """What a layer gives of tokens (m, d) behind keys and values (n or 1, kv_heads, P, ..)."""
        rotated = self.n_heads + self.n_kv
        turned, value = (
            Take.apply(part, packing.source, packing.place).unflatten(0, packing.shape)
            for part in before_attention(x, cos, sin, layer.qkv, layer.qkv_bias, rotated, self.eps)
        )
        mixed = attend(turned, value, packing.mask, past_keys, past_values, self.scaling, False)
        # nothing flows back to padding, which sees all
        mixed = mixed.index_select(0, packing.place)
        return after_attention(x, mixed, layer.out, layer.gate_up, layer.down, self.eps)

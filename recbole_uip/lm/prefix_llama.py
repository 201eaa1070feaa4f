"""Hidden states behind a prefix whose values differ, for LMs of Llama's layout.

Where soft tokens are moved in the last layers alone, what a text is before these depends on the
text and on nothing else: its *trunk*. It is run once, and kept while there is room, so that of a
text that is met under many soft tokens only the last layers are run again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from recbole_uip.lm import llama
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.llama_stages import after_attention, attend, before_attention

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
        x = self._trunk(texts, keep)
        for layer, (keys, _), own in zip(
            self.layers[self.first :], self.states[self.first :], values, strict=True
        ):
            x = self._layer(layer, x, keys, own)
        return functional.rms_norm(x, x.shape[-1:], None, self.eps).to(self.dtype)

    @torch.no_grad()
    def _trunk(self, texts: Sequence[Sequence[int]], keep: bool) -> torch.Tensor:
        """What texts are before layer ``first``, (n, T, d)."""
        known = {text: self._trunks.get(text) for text in map(tuple, texts)}
        missing = [text for text, trunk in known.items() if trunk is None]
        # What is kept must not depend on the company that a text was first met in, not by a bit:
        # then runs that were killed, or share their work, end with the same numbers.
        parts = [[text] for text in missing] if keep else [missing] * bool(missing)
        for part in parts:
            ids = pad_sequence([torch.tensor(text) for text in part], batch_first=True)
            x = self.embedding[ids.to(self.device)].to(self.wide)
            for layer, (keys, values) in zip(
                self.layers[: self.first], self.states[: self.first], strict=True
            ):
                x = self._layer(layer, x, keys, values)
            for text, trunk in zip(part, x, strict=True):
                known[text] = trunk[: len(text)]
                if keep and trunk.nbytes <= self._room:
                    self._trunks[text] = trunk
                    self._room -= trunk.nbytes
        return pad_sequence([known[text] for text in map(tuple, texts)], batch_first=True)

    def _layer(
        self, layer: llama.Layer, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """What a layer gives of x (n, T, d) behind keys and values (n or 1, kv_heads, P, ..)."""
        shape = x.shape[:2]
        positions = torch.arange(self.n_prefix, self.n_prefix + shape[1])
        cos, sin = (part.repeat(shape[0], 1, 1) for part in self.turns(positions))
        # padded on the right, so no token of a text sees a padding token
        mask = torch.ones(shape[1], self.n_prefix + shape[1], dtype=torch.bool, device=x.device)
        mask = mask.tril(self.n_prefix).expand(shape[0], -1, -1)
        rotated = self.n_heads + self.n_kv
        turned, value = (
            part.unflatten(0, shape)
            for part in before_attention(
                x.flatten(0, 1), cos, sin, layer.qkv, layer.qkv_bias, rotated, self.eps
            )
        )
        mixed = attend(turned, value, mask, keys, values, self.scaling, False)
        return after_attention(
            x.flatten(0, 1), mixed, layer.out, layer.gate_up, layer.down, self.eps
        ).unflatten(0, shape)

"""Mean embeddings of texts, without a prompt: the control for score vectors.

For a text e of tokens t_1 … t_n and the LM's last hidden states h (after the final norm)

    v_e = 1/n Σ_i h_i(t_1 … t_i),

batched by length and cached by content, as :mod:`recbole_uip.lm.scoring` does. Tokens that the
tokenizer puts before every text (BOS) are seen, but are not part of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.vectors import Reader, Vectors, holds_texts, read_texts
from recbole_uip.settings import LMSettings

__all__ = ["embed", "holds_embeddings", "mean_states"]

# part of every cache key: raise it when what is kept of a text changes
VERSION = 1
_ABOUT = {"version": VERSION}


def embed(texts: Sequence[str], settings: LMSettings, cache: Path) -> Vectors:
    """Mean embedding of every text, from the cache where it is there.

    Parameters
    ----------
    texts : sequence of n str
        Behaviour texts, already rendered; duplicates are run once.
    settings : LMSettings
    cache : Path
        The user's cache directory; embeddings are kept under ``embeddings/``.

    Returns
    -------
    Vectors
        Of the width of the last hidden states, in the order of ``texts``.

    Raises
    ------
    ModelError
        If the LM cannot be found or loaded, or is too short for a text.
    ValueError
        If a text is empty.
    """

    def open_reader(backbone: Backbone) -> Reader:
        lead = prompts.lead_ids(backbone)
        return Reader(lambda batch: mean_states(backbone, lead, batch), len(lead), len(lead))

    return read_texts(texts, "embeddings", _ABOUT, open_reader, settings, cache)


def holds_embeddings(texts: Sequence[str], settings: LMSettings, cache: Path) -> bool:
    """Whether :func:`embed` would find every text in the cache."""
    return holds_texts(texts, "embeddings", _ABOUT, settings, cache)


@torch.no_grad()
def mean_states(
    backbone: Backbone, lead: Sequence[int], texts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Mean last hidden state over each text's own tokens.

    Parameters
    ----------
    backbone : Backbone
    lead : sequence of int
        Token ids before every text.
    texts : n sequences of int
        Token ids, at least one each.

    Returns
    -------
    Tensor of at least float32, shape (n, d)
    """
    ids, real = prompts.side_by_side([[*lead, *text] for text in texts])
    device, n_lead = backbone.device, len(lead)
    # padded on the right, so no token of a text sees a padding token
    states = backbone.model.base_model(
        input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
    ).last_hidden_state
    states = states[:, n_lead:].to(torch.promote_types(states.dtype, torch.float32))
    counted = real[:, n_lead:, None].to(device, states.dtype)
    return (states * counted).sum(1) / counted.sum(1)

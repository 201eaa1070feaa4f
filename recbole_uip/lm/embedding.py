"""Mean embeddings of texts, without a prompt: the control for score vectors.

For a text e of tokens t_1 … t_n and the LM's last hidden states h (after the final norm)

    v_e = 1/n Σ_i h_i(t_1 … t_i),

batched by length and cached by content, as :mod:`recbole_uip.lm.scoring` does. Tokens that the
tokenizer puts before every text (BOS) are seen, but are not part of the mean.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone, load, resolve, resolve_dtype
from recbole_uip.lm.scoring import check_lengths, check_texts, put_through
from recbole_uip.lm.store import ScoreStore, digest
from recbole_uip.settings import LMSettings

__all__ = ["Embeddings", "embed", "mean_states"]

# part of every cache key: raise it when what is kept of a text changes
VERSION = 1


@dataclass(frozen=True)
class Embeddings:
    """Mean embeddings of n texts; LM width d.

    Attributes
    ----------
    vectors : ndarray of float32, shape (n, d)
    lm_tokens : int
        Tokens put through the LM in this call; 0 if everything was in the cache.
    seconds : float
        Wall time of this call.
    fingerprint : str
        Content hash of LM and adapter.
    """

    vectors: np.ndarray
    lm_tokens: int
    seconds: float
    fingerprint: str


def embed(texts: Sequence[str], settings: LMSettings, cache: Path) -> Embeddings:
    """Mean embedding of every text, from the cache where it is there.

    Parameters
    ----------
    texts : sequence of n str
        Behaviour texts, already rendered; duplicates are run once.
    settings : LMSettings
    cache : Path
        The user's cache directory; embeddings are kept under ``embeddings/``, models under
        ``models/``.

    Returns
    -------
    Embeddings
        In the order of ``texts``.

    Raises
    ------
    ModelError
        If the LM cannot be found or loaded, or is too short for a text.
    ValueError
        If a text is empty.
    """
    started = time.perf_counter()
    texts = list(texts)
    check_texts(texts)
    distinct = list(dict.fromkeys(texts))
    order = {text: row for row, text in enumerate(distinct)}

    cache = Path(cache).expanduser()
    source = resolve(settings, cache)
    _, dtype = resolve_dtype(settings)
    parts = [VERSION, source.fingerprint, str(dtype), settings.text_tokens]
    key = hashlib.sha256(json.dumps(parts).encode())
    about = {
        "lm": settings.name,
        "adapter": settings.adapter,
        "fingerprint": source.fingerprint,
        "dtype": str(dtype),
        "text_tokens": settings.text_tokens,
    }
    store = ScoreStore(cache / "embeddings" / key.hexdigest()[:32], about)
    columns, found = store.read([digest(text) for text in distinct])
    vectors, lm_tokens = columns.get("vectors"), 0
    # without any text, only the LM knows how wide it is
    if vectors is None or not found.all():
        backbone = load(settings, cache, source)
        missing = np.flatnonzero(~found)
        fresh = np.zeros((0, backbone.model.config.get_text_config().hidden_size), np.float32)
        if len(missing):
            fresh, lm_tokens = _embed_missing([distinct[row] for row in missing], backbone, store)
            store.compact()
        if vectors is None:
            vectors = np.zeros((len(distinct), fresh.shape[1]), np.float32)
        vectors[missing] = fresh
    if len(distinct) < len(texts):
        vectors = vectors[[order[text] for text in texts]]
    return Embeddings(vectors, lm_tokens, time.perf_counter() - started, source.fingerprint)


def _embed_missing(
    texts: list[str], backbone: Backbone, store: ScoreStore
) -> tuple[np.ndarray, int]:
    """Vectors of ``texts``, put through the LM, and LM tokens."""
    lead = prompts.lead_ids(backbone)
    ids = prompts.text_ids(backbone, texts)
    check_lengths(texts, ids, backbone, len(lead))
    lengths = np.array([len(lead) + len(row) for row in ids])
    columns, lm_tokens = put_through(
        texts,
        ids,
        lengths,
        lambda batch: {"vectors": mean_states(backbone, lead, batch)},
        backbone,
        store,
        "embedding texts",
    )
    return columns["vectors"], lm_tokens


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
    n_lead, longest = len(lead), max(map(len, texts))
    ids = torch.zeros(len(texts), n_lead + longest, dtype=torch.long)
    real = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : n_lead + len(text)] = torch.tensor([*lead, *text])
        real[row, : n_lead + len(text)] = 1
    device = backbone.device
    # padded on the right, so no token of a text sees a padding token
    states = backbone.model.base_model(
        input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False
    ).last_hidden_state
    states = states[:, n_lead:].to(torch.promote_types(states.dtype, torch.float32))
    counted = real[:, n_lead:, None].to(device, states.dtype)
    return (states * counted).sum(1) / counted.sum(1)

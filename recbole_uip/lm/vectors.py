"""One vector for each text by a frozen LM, batched by length and cached by content."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone, ModelSource, load, resolve, resolve_dtype
from recbole_uip.lm.scoring import (
    check_lengths,
    distinct_texts,
    holds,
    open_store,
    put_through,
    read_or_run,
)
from recbole_uip.lm.store import ScoreStore
from recbole_uip.settings import LMSettings

__all__ = ["Reader", "Vectors", "holds_texts", "read_texts"]


@dataclass(frozen=True)
class Vectors:
    """Vectors of n texts.

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


@dataclass(frozen=True)
class Reader:
    """How a loaded LM makes vectors of texts.

    Attributes
    ----------
    read : callable
        Takes the token ids of a batch of n texts; their vectors, shape (n, d).
    n_before, n_more : int
        Positions before each text's own that the LM has to have, and tokens that each text costs
        besides its own.
    """

    read: Callable[[list[list[int]]], torch.Tensor]
    n_before: int
    n_more: int


def read_texts(
    texts: Sequence[str],
    kind: str,
    about: dict[str, Any],
    open_reader: Callable[[Backbone], Reader],
    settings: LMSettings,
    cache: Path,
) -> Vectors:
    """The vector of every text, from the cache where it is there.

    Parameters
    ----------
    texts : sequence of n str
        Behaviour texts, already rendered; duplicates are run once.
    kind : str
        What the vectors are: folder of the cache.
    about : dict
        All that they depend on besides the texts, the LM and ``settings``; JSON.
    open_reader : callable
        Makes a reader of the LM; called when a text is missing from the cache.
    settings : LMSettings
    cache : Path
        The user's cache directory; models are kept there under ``models/``.

    Returns
    -------
    Vectors
        In the order of ``texts``.

    Raises
    ------
    ModelError
        If the LM cannot be found or loaded, or is too short for a text.
    ValueError
        If a text is empty.
    """
    started = time.perf_counter()
    distinct, row_of = distinct_texts(texts)

    source, store = _open_vectors(kind, about, settings, cache)

    def opened() -> tuple[Reader, Backbone]:
        backbone = load(settings, cache, source)
        return open_reader(backbone), backbone

    columns, lm_tokens = read_or_run(
        distinct, store, lambda missing: _read_missing(missing, kind, *opened(), store)
    )
    if not distinct:
        # only the LM knows how wide a vector is, by one of any text
        reader, _ = opened()
        columns = {"vectors": reader.read([[0]])[:0].float().cpu().numpy()}
    vectors = columns["vectors"]
    return Vectors(vectors[row_of], lm_tokens, time.perf_counter() - started, source.fingerprint)


def holds_texts(
    texts: Sequence[str], kind: str, about: dict[str, Any], settings: LMSettings, cache: Path
) -> bool:
    """Whether :func:`read_texts` would find every text in the cache."""
    _, store = _open_vectors(kind, about, settings, cache)
    return holds(store, texts)


def _open_vectors(
    kind: str, about: dict[str, Any], settings: LMSettings, cache: Path
) -> tuple[ModelSource, ScoreStore]:
    """Where the LM is, and the store of the vectors."""
    cache = Path(cache).expanduser()
    source = resolve(settings, cache)
    _, dtype = resolve_dtype(settings)
    parts = [prompts.VERSION, *about.values()]
    parts += [source.fingerprint, str(dtype), settings.text_tokens]
    key = hashlib.sha256(json.dumps(parts).encode())
    folder = cache / kind / key.hexdigest()[:32]
    return source, open_store(folder, settings, source.fingerprint, dtype, about)


def _read_missing(
    texts: list[str], kind: str, reader: Reader, backbone: Backbone, store: ScoreStore
) -> tuple[dict[str, np.ndarray], int]:
    """Put ``texts`` through the LM, saving shards on the way; their columns, and LM tokens."""
    ids = prompts.text_ids(backbone, texts)
    check_lengths(texts, ids, backbone, reader.n_before)
    return put_through(
        texts,
        ids,
        np.array([reader.n_more + len(row) for row in ids]),
        lambda batch: {"vectors": reader.read(batch)},
        backbone,
        store,
        f"{kind} of texts",
    )

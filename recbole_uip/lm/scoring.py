"""Log-likelihoods and score vectors of behaviour texts, batched and cached.

For a text e and the prompt's soft tokens θ (see :mod:`recbole_uip.lm.prompt`)

    ℓ_e(θ) = log p_LM(text_e | prompt(θ)),   g_e = ∇_θ ℓ_e(θ) at θ⁰,
    d_e = ∇_θ [log p(verb liked) − log p(verb disliked)] at θ⁰, after text and ending.

Cost. With P weights in matrix products, a token costs 2·P FLOPs forward and 2·P backward (the
weights are frozen, so only input gradients). Text and feedback gradients share the forward
pass, and the feedback's backward pass leaves out the head: 750 MFLOP per token for
SmolLM2-135M (P = 106 M in the layers, 28 M in the head), against 540 without endings.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recbole_uip.lm import llama
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import (
    Backbone,
    ModelError,
    ModelSource,
    load,
    resolve,
    resolve_dtype,
)
from recbole_uip.lm.prompt import Prompt
from recbole_uip.lm.store import ScoreStore, digest
from recbole_uip.settings import LMSettings, SettingsError
from recbole_uip.work import even_batches, in_parallel

__all__ = [
    "Scores",
    "check_lengths",
    "distinct_texts",
    "holds",
    "holds_scores",
    "open_store",
    "put_through",
    "read_or_run",
    "score",
]

logger = logging.getLogger(__name__)

SAVE_SECONDS = 10.0  # a killed run, or two that share the work, lose at most about this much
MAX_WORKERS = 8  # batches at once on CPU; each holds about 0.4 MB per token of its batch
KEEP_PREFIX_BYTES = 256 << 20  # a small LM's prefix is kept on disk (88 MB for SmolLM2-135M)


@dataclass(frozen=True)
class Scores:
    """Scores of n texts under a prompt with F facets; LM width d. Arrays are float32.

    Attributes
    ----------
    log_likelihood : ndarray, shape (n,)
        log p(text | prompt(θ⁰)), nats.
    n_tokens : ndarray, shape (n,)
        Tokens of the text.
    text : ndarray, shape (n, F, d)
        Score vectors g: gradients of the log-likelihood with respect to θ_f.
    feedback : ndarray, shape (n, F, d), or None
        Gradients of the feedback logit; None without endings.
    feedback_logit : ndarray, shape (n,), or None
        log p(verb liked) − log p(verb disliked), nats.
    theta0 : ndarray, shape (F, d)
        The soft tokens θ⁰ at which all this was evaluated.
    lm_tokens : int
        Tokens put through the LM in this call: texts and endings, and the prefix if it was
        not in the cache; 0 if everything was.
    seconds : float
        Wall time of this call.
    fingerprint : str
        Content hash of LM and adapter.
    """

    log_likelihood: np.ndarray
    n_tokens: np.ndarray
    text: np.ndarray
    feedback: np.ndarray | None
    feedback_logit: np.ndarray | None
    theta0: np.ndarray
    lm_tokens: int
    seconds: float
    fingerprint: str


def score(
    texts: Sequence[str],
    facets: Sequence[str],
    endings: tuple[str, str] | None,
    settings: LMSettings,
    cache: Path,
) -> Scores:
    """Score every text under the prompt of ``facets``, from the cache where it is there.

    Parameters
    ----------
    texts : sequence of n str
        Behaviour texts, already rendered; duplicates are scored once.
    facets : sequence of F str
        Facet names in words.
    endings : (liked, disliked) or None
        Feedback endings, such as ``(" and loved it", " and hated it")``.
    settings : LMSettings
    cache : Path
        The user's cache directory; scores are kept under ``scores/``, models under ``models/``.

    Returns
    -------
    Scores
        In the order of ``texts``.

    Raises
    ------
    ModelError
        If the LM cannot be found or loaded, or is too short for a text.
    ValueError
        If a text is empty, or the prompt cannot be built.
    """
    started = time.perf_counter()
    facets = list(facets)
    distinct, row_of = distinct_texts(texts)
    source, store = _open_scores(facets, endings, settings, cache)

    @functools.cache  # once, and only where something is missing
    def opened() -> tuple[Backbone, Prompt]:
        backbone = load(settings, cache, source)
        return backbone, prompts.build(backbone, facets, endings)

    theta0 = (store.read_file("theta0") or {}).get("theta0")
    if theta0 is None:
        backbone, prompt = opened()
        theta0 = prompt.theta0(backbone).float().cpu().numpy()
        store.write_file("theta0", {"theta0": theta0})
    columns, lm_tokens = read_or_run(
        distinct, store, lambda missing: _score_missing(missing, *opened(), store)
    )

    out = {name: values[row_of] for name, values in columns.items()}
    shape = (0, len(facets), theta0.shape[1])
    return Scores(
        log_likelihood=out.get("log_likelihood", np.zeros(0, np.float32)),
        n_tokens=out.get("n_tokens", np.zeros(0, np.float32)),
        text=out.get("text", np.zeros(shape, np.float32)),
        feedback=None if endings is None else out.get("feedback", np.zeros(shape, np.float32)),
        feedback_logit=(
            None if endings is None else out.get("feedback_logit", np.zeros(0, np.float32))
        ),
        theta0=theta0,
        lm_tokens=lm_tokens,
        seconds=time.perf_counter() - started,
        fingerprint=source.fingerprint,
    )


def _score_missing(
    texts: list[str], backbone: Backbone, prompt: Prompt, store: ScoreStore
) -> tuple[dict[str, np.ndarray], int]:
    """Put ``texts`` through the LM, saving shards on the way; their columns, and LM tokens."""
    ids = prompts.text_ids(backbone, texts)
    n_ending = len(prompt.ending.common) if prompt.ending else 0
    check_lengths(texts, ids, backbone, len(prompt) + n_ending)
    lengths = np.array([len(row) + n_ending for row in ids])
    run, lm_tokens, more = _runner(backbone, prompt, store, int(lengths.max()))
    lengths += more
    columns, fresh = put_through(texts, ids, lengths, run, backbone, store, "scoring texts")
    return columns, lm_tokens + fresh


def read_or_run(
    texts: Sequence[str],
    store: ScoreStore,
    run: Callable[[list[str]], tuple[dict[str, np.ndarray], int]],
) -> tuple[dict[str, np.ndarray], int]:
    """Columns of distinct texts, from the store where they are there, and LM tokens.

    ``run`` gives the same of the texts that are missing, which it puts into the store; it is
    called if there are any. Without any text there are no columns.
    """
    columns, found = store.read([digest(text) for text in texts])
    missing = np.flatnonzero(~found)
    if not len(missing):
        return columns, 0
    fresh, lm_tokens = run([texts[row] for row in missing])
    for name, values in fresh.items():
        if name not in columns:
            columns[name] = np.zeros((len(texts), *values.shape[1:]), np.float32)
        columns[name][missing] = values
    store.compact()
    return columns, lm_tokens


def holds(store: ScoreStore, texts: Sequence[str]) -> bool:
    """Whether the store has every text."""
    _, found = store.read([digest(text) for text in dict.fromkeys(texts)])
    return bool(found.all())


def put_through(
    texts: Sequence[str],
    ids: Sequence[list[int]],
    lengths: np.ndarray,
    run: Callable[[list[list[int]]], dict[str, torch.Tensor]],
    backbone: Backbone,
    store: ScoreStore,
    description: str,
) -> tuple[dict[str, np.ndarray], int]:
    """Run all texts in batches of like length, saving shards on the way.

    Processes that run the same texts at once share them: each has an order of its own, and leaves
    out what it finds in the store.

    Parameters
    ----------
    texts : sequence of n str
    ids : sequence of n lists of int
        Their token ids.
    lengths : ndarray of int, shape (n,)
        Tokens that each costs.
    run : callable
        Takes the ids of a batch; columns by name, one row for each of them.
    backbone : Backbone
    store : ScoreStore
    description : str
        Of the progress bar.

    Returns
    -------
    columns : dict of str to ndarray of float32, each of shape (n, ...)
        The columns, and ``n_tokens``.
    lm_tokens : int
        What this process has put through the LM.
    """
    keys = [digest(text) for text in texts]
    columns: dict[str, np.ndarray] = {}
    mine = np.zeros(len(texts), dtype=bool)
    done = mine.copy()  # by this process or another
    pending: list[np.ndarray] = []
    saved_at = time.monotonic()

    def fill(rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        for name, column in values.items():
            if name not in columns:
                columns[name] = np.zeros((len(texts), *column.shape[1:]), np.float32)
            columns[name][rows] = column

    def save() -> None:
        nonlocal saved_at
        chosen = np.concatenate(pending)
        store.write(
            [keys[row] for row in chosen],
            {name: values[chosen] for name, values in columns.items()},
        )
        pending.clear()
        there = store.keys()
        done[[key in there for key in keys]] = True
        saved_at = time.monotonic()

    def run_rest(batch: np.ndarray) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        # When its turn comes, not when it is queued: another process may have been faster.
        rows = batch[~done[batch]]
        return rows, run([ids[row] for row in rows]) if len(rows) else {}

    longest, *batches = even_batches(lengths, backbone.batch_tokens)
    random.Random(os.getpid()).shuffle(batches)
    bar = tqdm(total=int(lengths.sum()), desc=description, unit="tok", leave=False, delay=2)
    try:
        for _, (rows, result) in in_parallel(
            run_rest,
            [longest, *batches],
            n_workers(backbone),
            backbone.device.type == "cpu",
        ):
            if len(rows):
                fill(rows, {name: values.float().cpu().numpy() for name, values in result.items()})
                fill(rows, {"n_tokens": np.array([len(ids[row]) for row in rows])})
                mine[rows] = done[rows] = True
                pending.append(rows)
            bar.update(int(lengths[done].sum()) - bar.n)
            if pending and time.monotonic() - saved_at > SAVE_SECONDS:
                save()
    finally:
        # also when interrupted: what is done is done
        bar.close()
        if pending:
            save()
    lm_tokens = int(lengths[mine].sum())
    if len(theirs := np.flatnonzero(~mine)):
        values, found = store.read([keys[row] for row in theirs])
        fill(theirs, values)
        if len(lost := theirs[~found]):  # damaged or deleted since
            again = [texts[row] for row in lost], [ids[row] for row in lost], lengths[lost]
            values, more = put_through(*again, run, backbone, store, description)
            fill(lost, values)
            lm_tokens += more
    return columns, lm_tokens


def open_store(
    folder: Path, settings: LMSettings, fingerprint: str, dtype: torch.dtype, about: Mapping
) -> ScoreStore:
    """The store in ``folder`` of what an LM made of texts, which says so and ``about``."""
    described = {
        "lm": settings.name,
        "adapter": settings.adapter,
        "fingerprint": fingerprint,
        "dtype": str(dtype),
        "text_tokens": settings.text_tokens,
    }
    return ScoreStore(folder, {**described, **about})


def holds_scores(
    texts: Sequence[str],
    facets: Sequence[str],
    endings: tuple[str, str] | None,
    settings: LMSettings,
    cache: Path,
) -> bool:
    """Whether :func:`score` would find every text in the cache."""
    _, store = _open_scores(facets, endings, settings, cache)
    return holds(store, texts) and store.read_file("theta0") is not None


def _open_scores(
    facets: Sequence[str], endings: tuple[str, str] | None, settings: LMSettings, cache: Path
) -> tuple[ModelSource, ScoreStore]:
    """Where the LM is, and the store of its scores under this prompt."""
    cache = Path(cache).expanduser()
    source = resolve(settings, cache)
    _, dtype = resolve_dtype(settings)
    key = prompts.content_key(source.fingerprint, dtype, facets, endings, settings.text_tokens)
    about = {"facets": list(facets), "endings": endings}
    folder = cache / "scores" / key[:32]
    return source, open_store(folder, settings, source.fingerprint, dtype, about)


def distinct_texts(texts: Sequence[str]) -> tuple[list[str], np.ndarray | slice]:
    """Each text once, in the order of their first, and which of these every text is.

    The latter is an index of rows: a slice, which copies nothing, where no text comes twice.

    Raises
    ------
    SettingsError
        If a text is empty.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise SettingsError(
                f"texts[{row}]={text!r} is empty: leave out items that have no text"
            )
    order = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    if len(order) == len(texts):
        return list(order), slice(None)
    return list(order), np.array([order[text] for text in texts])


def check_lengths(
    texts: Sequence[str], ids: Sequence[Sequence[int]], backbone: Backbone, n_more: int
) -> None:
    """Refuse a text without tokens, or one too long for the LM with ``n_more`` tokens about it.

    Raises
    ------
    SettingsError
        If a text has no tokens.
    ModelError
        If one has too many.
    """
    limit = getattr(backbone.model.config.get_text_config(), "max_position_embeddings", None)
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise SettingsError(f"text {text!r} has no tokens: leave out items that have no text")
        length = len(row) + n_more
        if limit is not None and length > limit:
            raise ModelError(
                f"text {text[:60]!r}… needs {length} positions in all, but the LM has "
                f"{limit}: lower uip_lm_text_tokens, or choose an LM with a longer context"
            )


def n_workers(backbone: Backbone) -> int:
    """Batches at once: on CPU one per thread, up to a bound on memory.

    On a GPU two, so that it has work while results of the other go to the CPU and back.
    """
    return min(torch.get_num_threads(), MAX_WORKERS) if backbone.device.type == "cpu" else 2


def _runner(
    backbone: Backbone, prompt: Prompt, store: ScoreStore, longest: int
) -> tuple[Callable[[list[list[int]]], dict[str, torch.Tensor]], int, int]:
    """The function that scores a batch, the LM tokens it took, and those it adds to each text."""
    if not llama.supports(backbone, len(prompt) + longest):
        logger.info("%s goes the general way", type(backbone.model).__name__)
        check_mask(backbone, prompt)
        # every text carries its own copy of the prefix
        run = functools.partial(score_by_autograd, backbone, prompt)
        return run, 2 * len(prompt), len(prompt)
    kept = store.read_file("prefix")
    if kept is not None:
        prefix = llama.SharedPrefix(
            **{name: torch.from_numpy(array) for name, array in kept.items()}
        )
        return llama.LlamaScorer(backbone, prompt, prefix).score, 0, 0
    scorer = llama.LlamaScorer(backbone, prompt)
    _check_against_model(scorer, backbone)
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in vars(scorer.prefix).items()}
    if sum(array.nbytes for array in arrays.values()) < KEEP_PREFIX_BYTES:
        store.write_file("prefix", arrays)
    return scorer.score, len(prompt) + prompt.n_facets * backbone.embed_dim, 0


@torch.no_grad()
def _check_against_model(scorer: llama.LlamaScorer, backbone: Backbone) -> None:
    """Refuse the fast path where it does not say what the model itself says."""
    prompt = scorer.prompt
    given = prompts.inputs(backbone, prompt, prompt.theta0(backbone), [[]])
    # As the fast path does, keep the sum over layers in full precision: where a model keeps it in
    # bfloat16, its own rounding is as large as an error would be.
    given["inputs_embeds"] = given["inputs_embeds"].to(scorer.wide)
    narrow = backbone.dtype != scorer.wide
    with torch.autocast(backbone.device.type, backbone.dtype if narrow else None, enabled=narrow):
        logits = backbone.model(**given, use_cache=False, logits_to_keep=1).logits[0, -1].cpu()
    expected = logits.to(scorer.wide).log_softmax(-1)
    error = float((scorer.first_log_probs.cpu() - expected).abs().mean())
    if not error < most_error(backbone.dtype):
        raise ModelError(
            f"the fast path for {backbone.model.config.model_type!r} models differs from this "
            f"model by {error:.3g} nats per token: please report it with the LM's name"
        )


def most_error(dtype: torch.dtype) -> float:
    """Nats a token by which two ways of running one LM of this type may differ."""
    return 0.25 if dtype != torch.promote_types(dtype, torch.float32) else 1e-2


@torch.no_grad()
def check_mask(backbone: Backbone, prompt: Prompt) -> None:
    """Refuse an LM that takes no mask, or lets one facet see another in spite of it.

    Raises
    ------
    ModelError
        If it cannot be run, or the last facet's hidden state changes with the first facet's soft
        token.
    """
    name, way_out = type(backbone.model).__name__, "a decoder-only transformer, softmax attention"
    theta = prompt.theta0(backbone)
    other = theta.clone()
    other[0] = -theta[0]
    try:
        first, second = (prompts.logits(backbone, prompt, t, [[]])[0, 0] for t in (theta, other))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"uip_lm: {name} cannot be run on embeddings and a 4-D attention mask ({error}); "
            f"choose {way_out}"
        ) from error
    if prompt.n_facets > 1 and not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"uip_lm: {name} does not honour a 4-D attention mask, so its facets would see one "
            f"another; choose {way_out}"
        )


def score_by_autograd(
    backbone: Backbone, prompt: Prompt, texts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Score a batch for any causal LM: differentiable passes over prefix and texts.

    Parameters
    ----------
    backbone : Backbone
    prompt : Prompt
    texts : n sequences of int
        Token ids.

    Returns
    -------
    dict
        ``log_likelihood`` (n,), ``text`` (n, F, d), and with an ending ``feedback`` (n, F, d),
        ``feedback_logit`` (n,).
    """
    common = prompt.ending.common if prompt.ending else ()
    full = [[*text, *common] for text in texts]
    results = [
        _score_pass(backbone, prompt, texts[part], full[part])
        for part in prompts.passes(backbone, full)
    ]
    return {name: torch.cat([each[name] for each in results]) for name in results[0]}


def _score_pass(
    backbone: Backbone,
    prompt: Prompt,
    texts: Sequence[Sequence[int]],
    full: Sequence[Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Scores of texts, whose endings are part of ``full``, in one pass."""
    # one copy of θ per text, so that one backward pass gives each text its own gradient
    theta = prompt.theta0(backbone).expand(len(texts), -1, -1).clone().requires_grad_()
    logits = prompts.logits(backbone, prompt, theta, full)
    value = prompts.sum_log_probs(logits, texts)
    (grad,) = torch.autograd.grad(value.sum(), theta, retain_graph=prompt.ending is not None)
    result = {"log_likelihood": value.detach(), "text": grad}
    if prompt.ending is not None:
        value = prompts.verb_difference(logits, prompt.ending, full)
        (grad,) = torch.autograd.grad(value.sum(), theta)
        result |= {"feedback_logit": value.detach(), "feedback": grad}
    return result

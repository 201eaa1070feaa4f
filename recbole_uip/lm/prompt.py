"""The prompt: facets with names and soft tokens, the block mask, and the behaviour text.

``{name of facet 1}[θ_1]{name of facet 2}[θ_2] … {behaviour text}{feedback ending}``

Attention is causal. In addition θ_f and the tokens of name f attend to no other facet, so that
θ_f is a function of its own facet alone, all layers through; behaviour tokens see everything
before them. Tokens that the tokenizer puts before every text (a BOS token, where the LM was
trained with one) come first and are seen by all, and before them the virtual tokens of a
prompt-tuning adapter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from recbole_uip.lm.backbone import Backbone
from recbole_uip.settings import SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Ending",
    "Prompt",
    "build",
    "content_key",
    "feedback_logit",
    "inputs",
    "lead_ids",
    "log_likelihood",
    "log_probs",
    "logits",
    "passes",
    "places",
    "side_by_side",
    "sum_log_probs",
    "sum_tokens",
    "text_ids",
    "tokenize",
    "verb_difference",
    "verb_lifts",
]

logger = logging.getLogger(__name__)

# part of every cache key: raise it when the prompt or what is kept of a score changes
VERSION = 2
SOFT = -1  # stands for a soft token among token ids
LEAD = -1  # stands for "no facet" among the blocks
LOGIT_BYTES = 1 << 30  # of a pass, at most; what is made of logits takes a few times as much


@dataclass(frozen=True)
class Ending:
    """The feedback ending, up to the verb: where liked and disliked first differ.

    Attributes
    ----------
    common : tuple of int
        Token ids that the two endings share before the verb.
    liked, disliked : int
        Token ids of the two verbs.
    """

    common: tuple[int, ...]
    liked: int
    disliked: int


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt's prefix, F facets, and its feedback ending.

    Attributes
    ----------
    names : tuple of str, length F
        Facet names in words.
    lead_ids : tuple of int
        Tokens before the first facet.
    name_ids : tuple of tuple of int, length F
        Token ids of each facet's name.
    ending : Ending or None
    """

    names: tuple[str, ...]
    lead_ids: tuple[int, ...]
    name_ids: tuple[tuple[int, ...], ...]
    ending: Ending | None = None

    @property
    def n_facets(self) -> int:
        """Number of facets F."""
        return len(self.names)

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """Token ids of the prefix, ``SOFT`` at soft tokens; int64, shape (P,)."""
        ids = list(self.lead_ids)
        for name in self.name_ids:
            ids += [*name, SOFT]
        return torch.tensor(ids)

    @cached_property
    def block(self) -> torch.Tensor:
        """Facet of each position of the prefix, ``LEAD`` before the first; shape (P,)."""
        blocks = [LEAD] * len(self.lead_ids)
        for facet, name in enumerate(self.name_ids):
            blocks += [facet] * (len(name) + 1)
        return torch.tensor(blocks)

    @cached_property
    def soft_positions(self) -> torch.Tensor:
        """Positions of θ_1 … θ_F; shape (F,)."""
        return torch.nonzero(self.token_ids == SOFT).flatten()

    def __len__(self) -> int:
        """Length P of the prefix."""
        return len(self.token_ids)

    def mask(self, n_behaviour: int = 0) -> torch.Tensor:
        """Who may attend to whom: bool, shape (P + n, P + n), row = query, column = key."""
        n_prefix = len(self)
        allowed = torch.ones(n_prefix + n_behaviour, n_prefix + n_behaviour).tril().bool()
        same = (self.block[:, None] == self.block) | (self.block == LEAD)
        allowed[:n_prefix, :n_prefix] &= same
        return allowed

    def theta0(self, backbone: Backbone) -> torch.Tensor:
        """θ⁰: the mean embedding of each facet's name tokens; float32, shape (F, d)."""
        # As the layers read them: some LMs scale their embeddings.
        embed = backbone.model.get_input_embeddings()
        wide = torch.promote_types(embed.weight.dtype, torch.float32)
        with torch.no_grad():
            rows = [
                embed(torch.tensor(ids, device=embed.weight.device)).to(wide).mean(0)
                for ids in self.name_ids
            ]
        return torch.stack(rows)


def build(
    backbone: Backbone,
    names: Sequence[str],
    endings: tuple[str, str] | None = None,
) -> Prompt:
    """Tokenize the facet names and the endings.

    Parameters
    ----------
    backbone : Backbone
    names : sequence of str
        Facet names in words, at least one.
    endings : (liked, disliked), optional
        Such as ``(" and loved it", " and hated it")``.

    Returns
    -------
    Prompt

    Raises
    ------
    SettingsError
        If a name has no tokens, or no token tells one ending from the other.
    """
    if not names:
        raise ValueError("facets is empty: a prompt needs the name of at least one facet")
    name_ids = tokenize(backbone.tokenizer, names)
    for name, ids in zip(names, name_ids, strict=True):
        if not ids:
            raise SettingsError(
                f"uip_facets: the prompt {name!r} has no tokens; give it at least one word"
            )
    ending = None
    if endings is not None:
        liked, disliked = tokenize(backbone.tokenizer, endings)
        shared = min(len(liked), len(disliked))
        n_common = next((i for i in range(shared) if liked[i] != disliked[i]), shared)
        if n_common == shared:
            raise SettingsError(
                f"uip_endings={endings!r}: no token tells them apart (one begins with the other); "
                "choose two verbs, such as ' and loved it' and ' and hated it'"
            )
        ending = Ending(tuple(liked[:n_common]), liked[n_common], disliked[n_common])
    return Prompt(
        names=tuple(names),
        lead_ids=tuple(lead_ids(backbone)),
        name_ids=tuple(tuple(ids) for ids in name_ids),
        ending=ending,
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    """Token ids of each string as the continuation of a running text (after a space)."""
    # behind an anchor, because tokenizers treat the very beginning of a text differently
    # (SentencePiece puts a space of its own there)
    anchor = "x"
    head = tokenizer(anchor, add_special_tokens=False)["input_ids"]
    running = [f"{anchor} {string.strip()}" if string.strip() else anchor for string in strings]
    if not running:
        return []
    n_head = len(head)
    ids = tokenizer(running, add_special_tokens=False)["input_ids"]
    for position, row in enumerate(ids):
        if row[:n_head] != head:
            # a tokenizer without word boundaries merged the anchor into the text
            ids[position] = tokenizer(running[position][1:], add_special_tokens=False)["input_ids"]
        else:
            ids[position] = row[n_head:]
    return ids


def text_ids(backbone: Backbone, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of items' texts, of each as many as the LM is to read; see :func:`tokenize`."""
    ids, limit = tokenize(backbone.tokenizer, texts), backbone.text_tokens
    if n_long := sum(len(row) > limit for row in ids) if limit else 0:
        logger.warning(
            "%d of %d texts are longer than uip_lm_text_tokens=%d: the LM reads their beginning",
            n_long, len(ids), limit,
        )  # fmt: skip
    return [row[:limit] for row in ids]


def content_key(
    fingerprint: str,
    dtype: torch.dtype,
    names: Sequence[str],
    endings: tuple[str, str] | None,
    text_tokens: int,
) -> str:
    """Hash of everything a text's scores depend on, but for the text; hexadecimal."""
    endings = list(endings) if endings else None
    parts = [VERSION, fingerprint, str(dtype), list(names), endings, text_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def side_by_side(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of any lengths in the rows of one tensor, padded on the right.

    Parameters
    ----------
    texts : n sequences of int
        Token ids; T is the length of the longest.

    Returns
    -------
    ids : Tensor of int64, shape (n, T)
    real : Tensor of bool, shape (n, T)
        False where padding stands.
    """
    ids = pad_sequence([torch.tensor(text, dtype=torch.long) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def inputs(
    backbone: Backbone, prompt: Prompt, theta: torch.Tensor, texts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Arguments of a transformers model: prompt and behaviour texts, padded on the right.

    Parameters
    ----------
    backbone : Backbone
    prompt : Prompt
    theta : Tensor, shape (F, d) or (n, F, d)
        Soft tokens, shared or one set per text.
    texts : n sequences of int
        Token ids of the behaviour texts; T is the length of the longest.

    Returns
    -------
    dict
        ``inputs_embeds`` (n, P + T, d), differentiable in ``theta``; ``attention_mask``,
        additive, (n, 1, P + T, P + T); ``position_ids`` (n, P + T).
    """
    device = backbone.device
    n_texts, n_prefix = len(texts), len(prompt)
    before = prompt.token_ids.clamp(min=0).tolist()
    ids, real = side_by_side([[*before, *text] for text in texts])
    longest = ids.shape[1] - n_prefix
    embeds = backbone.model.get_input_embeddings()(ids.to(device))
    theta = theta.to(device=device, dtype=embeds.dtype).expand(n_texts, -1, -1)
    embeds = embeds.index_copy(1, prompt.soft_positions.to(device), theta)
    # a padding token sees itself too, or its softmax would be 0/0
    allowed = prompt.mask(longest) & (real[:, None, :] | torch.eye(real.shape[1]).bool())
    mask = torch.zeros(allowed.shape, dtype=embeds.dtype)
    mask.masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    positions = torch.arange(n_prefix + longest, device=device).expand(n_texts, -1)
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask[:, None].to(device),
        "position_ids": positions,
    }


def logits(
    backbone: Backbone, prompt: Prompt, theta: torch.Tensor, texts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Next-token logits from the prefix's last position on, through transformers' public API.

    Works for any causal LM that takes embeddings and a 4-D mask, and is differentiable in
    ``theta``. The fast path of :mod:`recbole_uip.lm.llama` is tested against it.

    Parameters
    ----------
    backbone, prompt, theta, texts
        As in :func:`inputs`.

    Returns
    -------
    Tensor of at least float32, shape (n, T + 1, vocabulary)
        ``[:, t]`` are the logits of behaviour token t.
    """
    keep = max((len(text) for text in texts), default=0) + 1
    output = backbone.model(
        **inputs(backbone, prompt, theta, texts), use_cache=False, logits_to_keep=keep
    ).logits[:, -keep:]
    return output.to(torch.promote_types(output.dtype, torch.float32))


def passes(backbone: Backbone, texts: Sequence[Sequence[int]]) -> list[slice]:
    """Rows of texts that are run together, so that their logits take ``LOGIT_BYTES`` at most.

    Texts that are longer have passes of their own; without texts there is one pass of none.
    """
    vocabulary = backbone.model.config.get_text_config().vocab_size
    longest = max(map(len, texts), default=0) + 1
    n_rows = max(1, LOGIT_BYTES // (4 * vocabulary * longest))
    return [slice(start, start + n_rows) for start in range(0, max(1, len(texts)), n_rows)]


def log_likelihood(
    backbone: Backbone, prompt: Prompt, theta: torch.Tensor, texts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """log p(text | prompt(θ)), differentiable in θ; nats.

    Parameters
    ----------
    backbone, prompt, theta, texts
        As in :func:`inputs`; each text has at least one token.

    Returns
    -------
    Tensor, shape (n,)
        Sum over the text's tokens of their log-probability; the ending is not part of it.
    """
    return sum_log_probs(logits(backbone, prompt, theta, texts), texts)


def feedback_logit(
    backbone: Backbone, prompt: Prompt, theta: torch.Tensor, texts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """log p(verb liked) − log p(verb disliked) after each text, differentiable in θ; nats.

    Parameters
    ----------
    backbone, prompt, theta, texts
        As in :func:`inputs`; ``prompt.ending`` must be there.

    Returns
    -------
    Tensor, shape (n,)

    Raises
    ------
    ValueError
        If the prompt has no ending.
    """
    if prompt.ending is None:
        raise ValueError("prompt.ending is None: build the prompt with endings")
    full = [[*text, *prompt.ending.common] for text in texts]
    return verb_difference(logits(backbone, prompt, theta, full), prompt.ending, full)


def sum_log_probs(logits: torch.Tensor, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Sum of the log-probabilities of the texts' tokens; logits as from :func:`logits`."""
    return sum_tokens(texts, logits.device, functools.partial(log_probs, logits))


def verb_difference(
    logits: torch.Tensor, ending: Ending, texts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Difference of the verbs' logits after each text (common ending included)."""
    last = torch.tensor([len(text) for text in texts])
    return verb_lifts(logits, (torch.arange(len(texts)), last), ending)


def sum_tokens(
    texts: Sequence[Sequence[int]],
    device: torch.device,
    say: Callable[[tuple[torch.Tensor, torch.Tensor], torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sums over the texts' tokens of what ``say`` gives of (text, number) and token, shape (n,)."""
    at = places([len(text) for text in texts])
    found = say(at, torch.tensor([token for text in texts for token in text], device=device))
    return found.new_zeros(len(texts)).index_add(0, at[0].to(device), found)


def places(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text, and number in it, of each token of texts of these lengths, on the CPU."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return rows, torch.cat([torch.arange(length) for length in lengths])


def log_probs(
    logits: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of the tokens ``targets`` at (text, number), each of shape (m,)."""
    return logits[at].log_softmax(-1).gather(1, targets[:, None])[:, 0]


def verb_lifts(
    logits: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], ending: Ending
) -> torch.Tensor:
    """Differences of the verbs' logits at (text, number), shape (m,)."""
    rows, numbers = at
    return logits[rows, numbers, ending.liked] - logits[rows, numbers, ending.disliked]


def lead_ids(backbone: Backbone) -> list[int]:
    """Virtual tokens, and special tokens that the tokenizer puts before a text, such as BOS."""
    plain = backbone.tokenizer("x", add_special_tokens=False)["input_ids"]
    special = backbone.tokenizer("x")["input_ids"]
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return [*backbone.virtual_ids, *special[:start]]
    return list(backbone.virtual_ids)

"""True log-likelihoods at any soft tokens: the prefix once, then all texts on top of it.

The scores of :mod:`recbole_uip.lm.scoring` are derivatives at one point. Here the LM itself is
asked, forward only, through transformers' public API and its cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import Backbone
from recbole_uip.lm.prefix import Prefix
from recbole_uip.lm.prompt import Prompt
from recbole_uip.work import even_batches

__all__ = ["likelihoods", "prefix_likelihoods"]


@torch.no_grad()
def likelihoods(
    backbone: Backbone,
    prompt: Prompt,
    theta: torch.Tensor,
    texts: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Log-likelihood and feedback logit of each text under one set of soft tokens.

    Parameters
    ----------
    backbone : Backbone
    prompt : Prompt
    theta : Tensor, shape (F, d)
    texts : n sequences of int
        Token ids, at least one each.

    Returns
    -------
    log_likelihood : Tensor, shape (n,)
        log p(text | prompt(θ)), nats, as :func:`recbole_uip.lm.prompt.log_likelihood`.
    feedback_logit : Tensor, shape (n,), or None
        As :func:`recbole_uip.lm.prompt.feedback_logit`; None without an ending.
    lm_tokens : int
        Tokens put through the LM.
    """
    arguments = prompts.inputs(backbone, prompt, theta, [[]])

    def say(
        texts: list[list[int]], full: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The cache grows as it is used, so each batch has its own.
        prefix = backbone.model(**arguments, use_cache=True, logits_to_keep=1)
        logits = _continued(backbone, prompt, prefix, full)
        logit = prompts.verb_difference(logits, prompt.ending, full) if prompt.ending else None
        return prompts.sum_log_probs(logits, texts), logit

    return _in_batches(backbone, prompt, say, texts, len(prompt), 0, True)


@torch.no_grad()
def prefix_likelihoods(
    prefix: Prefix, theta: torch.Tensor, texts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The same of soft tokens in the LM's last layers; theta (F, D).

    The prefix keeps what it can use of these texts again, with the endings and without.
    """

    def say(
        texts: list[list[int]], full: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        prefix.keep(full, len(full[0]) - len(texts[0]))
        return prefix.likelihoods(prefix.run(theta.expand(len(full), -1, -1), full), texts)

    n_text = len(prefix.bridge)
    return _in_batches(prefix.backbone, prefix.prompt, say, texts, 0, n_text, prefix.makes_logits)


def _in_batches(
    backbone: Backbone,
    prompt: Prompt,
    say: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    texts: Sequence[Sequence[int]],
    n_pass: int,
    n_text: int,
    makes_logits: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """What :func:`likelihoods` gives, by what is said of texts, and of them with their endings.

    A pass costs ``n_pass`` LM tokens and each of its texts ``n_text`` besides the texts' own. A
    batch is run in several passes where logits of all tokens are made.
    """
    common = prompt.ending.common if prompt.ending else ()
    lengths = np.array([len(text) + len(common) for text in texts], dtype=np.int64)
    log_likelihood = torch.zeros(len(texts), dtype=torch.promote_types(backbone.dtype, torch.float))
    logit = torch.zeros_like(log_likelihood) if prompt.ending else None
    lm_tokens = 0
    for rows in even_batches(lengths, backbone.batch_tokens):
        batch = [list(texts[row]) for row in rows]
        full = [[*text, *common] for text in batch]
        for part in prompts.passes(backbone, full) if makes_logits else [slice(None)]:
            found, answers = say(batch[part], full[part])
            log_likelihood[rows[part]] = found.to(log_likelihood)
            if answers is not None:
                logit[rows[part]] = answers.to(logit)
            lm_tokens += n_pass + sum(len(text) + n_text for text in full[part])
    return log_likelihood, logit, lm_tokens


def _continued(
    backbone: Backbone, prompt: Prompt, prefix, texts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Next-token logits from the prefix's last position on; as :func:`prompts.logits`."""
    ids, _ = prompts.side_by_side(texts)
    (n, longest), n_prefix = ids.shape, len(prompt)
    cache = prefix.past_key_values
    cache.batch_repeat_interleave(n)
    # Right padding: no real token sees a padding token, so the causal mask is enough.
    allowed = prompt.mask(longest)[n_prefix:]
    mask = torch.zeros(allowed.shape, dtype=backbone.dtype)
    mask.masked_fill_(~allowed, torch.finfo(backbone.dtype).min)
    positions = torch.arange(n_prefix, n_prefix + longest, device=backbone.device)
    output = backbone.model(
        input_ids=ids.to(backbone.device),
        attention_mask=mask.to(backbone.device).expand(n, 1, -1, -1),
        position_ids=positions.expand(n, -1),
        past_key_values=cache,
        use_cache=True,
    ).logits
    first = prefix.logits[:, -1:].expand(n, -1, -1)
    logits = torch.cat([first, output], dim=1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

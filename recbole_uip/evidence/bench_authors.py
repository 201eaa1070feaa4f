"""The authors' way of tuning soft tokens beside ours: the same users, LM and machine."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recbole_uip.em.ascent import State, ascend
from recbole_uip.evidence.task import Task
from recbole_uip.evidence.tuning_slice import Slice, posterior_of
from recbole_uip.lm.likelihood import Passage, SoftTokenLikelihood, text_passage
from recbole_uip.lm.prompt import Prompt
from recbole_uip.passages import Group
from recbole_uip.settings import FacetSettings

__all__ = ["CausalPrompt", "against_authors"]

#: The paper's facets and its prompts; every behaviour speaks for both.
AUTHORS_FACETS = ("hobby", "background")
AUTHORS_RATE = 0.01


@dataclass(frozen=True)
class CausalPrompt(Prompt):
    """The authors' prompt: the same words, but every position sees all before it."""

    def mask(self, n_behaviour: int = 0) -> torch.Tensor:
        """Plainly causal."""
        length = len(self) + n_behaviour
        return torch.ones(length, length).tril().bool()


def against_authors(task: Task, slice_: Slice, peers: int) -> dict[str, Any]:
    """LM tokens and seconds to the same gain in held-out likelihood, ours and the authors' way.

    Gains are from where each starts, for under another prompt the same texts have another
    likelihood. Both tune the paper's two facets for the same users. The authors' way: the texts
    in one sequence, no block mask, soft tokens that are free up to the length at which the LM's
    likelihood scales them back, all of the sequence at each step of Adam, through transformers as
    it is. Their codebook learns from soft tokens but does not move them
    (MSE weight .5, no commitment), so it has no part in this.

    Free soft tokens also find what makes every text likelier. So ``own`` is how much likelier a
    user's behaviours are by the user's own tokens than by those of the next user.
    """
    facets = tuple(
        FacetSettings(each, "lm", "all", prompt=each, codes=2) for each in AUTHORS_FACETS
    )
    settings = dataclasses.replace(task.settings, facets=facets, likelihood="item")
    ours = dataclasses.replace(task, settings=settings)
    (group,) = slice_.groups(ours)
    chosen = np.arange(peers)
    posterior = posterior_of(ours, group)
    state = State.start(group.units, chosen)
    passages, owner, active = slice_.passages(group, held_out=True)
    kept = [row for row in range(len(owner)) if owner[row] < peers]
    passages, owner, active = [passages[row] for row in kept], owner[kept], active[kept]
    started = time.perf_counter()
    rate = posterior.settings.learning_rate or group.frame.learning_rates[1]
    result = ascend(
        state, group.units, chosen, group.fold[chosen], group.frame, posterior.priors(), group,
        posterior.settings, rate, (settings.seed, 1),
    )  # fmt: skip
    seconds = time.perf_counter() - started

    def said(users: np.ndarray) -> float:
        theta = group.frame.tokens(result.where[users], group.fold[users], active)
        return float(group.likelihood.value(passages, theta).mean())

    reached = said(owner)
    theta0 = np.repeat(group.likelihood.theta0[None], len(owner), axis=0)
    start = float(group.likelihood.value(passages, theta0).mean())
    rows = [
        {
            "way": "ours",
            "start": start,
            "reached": reached,
            "own": reached - said((owner + 1) % peers),
            "steps": posterior.settings.steps,
            "lm_tokens": int(result.lm_tokens),
            "seconds": seconds,
        },
        _authors_way(group, chosen, passages, owner, reached - start, posterior.settings.steps),
    ]
    lines = [
        f"{row['way']}: {peers} users, {len(passages)} held-out behaviours from "
        f"{row['start']:.3f} nats each by {row['reached'] - row['start']:+.3f} in {row['steps']} "
        f"steps ({row['own']:+.3f} more than by another user's tokens), "
        f"{row['lm_tokens']:,} LM tokens, {row['seconds']:.1f} s"
        for row in rows
    ]
    if rows[1]["reached"] - rows[1]["start"] < reached - start:
        lines[1] += " (our gain not reached in as many steps)"
    return {"rows": rows, "lines": lines}


def _authors_way(
    group: Group,
    chosen: np.ndarray,
    passages: list[Passage],
    owner: np.ndarray,
    gain: float,
    most_steps: int,
) -> dict[str, Any]:
    backbone, prompt = group.likelihood.backbone, group.likelihood.prompt
    plain = CausalPrompt(prompt.names, prompt.lead_ids, prompt.name_ids)
    likelihood = SoftTokenLikelihood(backbone, plain, range(len(group.facets)), general=True)
    first = group.units.first
    sequences = [
        text_passage([group.passages[u].tokens for u in range(first[p], first[p + 1])])
        for p in chosen
    ]
    theta = torch.tensor(np.repeat(likelihood.theta0[None], len(chosen), axis=0))
    theta.requires_grad_()
    adam = torch.optim.Adam([theta], lr=AUTHORS_RATE)

    def said(users: np.ndarray) -> float:
        return float(likelihood.value(passages, theta.detach().numpy()[users]).mean())

    reached = start = said(owner)
    seconds, tokens, steps = 0.0, 0, 0
    while (reached - start < gain or steps == 0) and steps < most_steps:
        started = time.perf_counter()
        slopes = []
        for user, sequence in enumerate(sequences):  # one at a time: full logits are large
            _, slope = likelihood.value_and_gradient(
                [sequence], theta.detach().numpy()[user : user + 1]
            )
            slopes.append(slope)
            tokens += len(sequence.tokens) + len(plain)
        theta.grad = -torch.from_numpy(np.concatenate(slopes))
        adam.step()
        seconds += time.perf_counter() - started
        steps += 1
        reached = said(owner)
    return {
        "way": "authors",
        "start": start,
        "reached": reached,
        "own": reached - said((owner + 1) % len(chosen)),
        "steps": steps,
        "lm_tokens": tokens,
        "seconds": seconds,
    }

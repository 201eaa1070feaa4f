r"""Does a code, put back into the LM as a soft token, predict what its user does later?

A codeword e_k is a soft token theta_k(s) = theta0 + s P (e_k - mu) (see
:mod:`recbole_uip.bank.export_peft`). Here the LM itself says what that is worth, forward pass by
forward pass: each user has the code of the end of the training rows, and what is measured is its
lift of the user's held-out (valid and test) behaviours,

* facets of weight positive, negative or all: log p(text | theta) of the items that the user
  liked, disliked or met;
* facets of weight contrast: (y - p_i) times the feedback logit after the text, whose soft token
  follows the feedback scores; and the AUC of that logit,

over that of theta0, of another user's code and of codes at large. A lift that is predicted to
first order is s g' P (e_k - mu); how far that holds is reported step by step. The step is chosen
on training rows of users who are judged nowhere, each by the code it had at that time: that of
the largest mean lift over theta0 less its standard error, for long steps are mostly noise. No
held-out label has a part in it.

The LM runs in float32: at small steps bfloat16 rounds the move of a soft token away.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from recbole_uip import lm, profiles
from recbole_uip.bank.export_peft import soft_moves
from recbole_uip.bank.model import ProfileModel
from recbole_uip.em import states
from recbole_uip.em.kernels import CODE
from recbole_uip.evidence.statistics import (
    auc,
    clustered_error,
    clustered_mean,
    user_clustered_bootstrap,
)
from recbole_uip.evidence.task import Task, load_task, parse_config
from recbole_uip.lm import prompt as prompts
from recbole_uip.records import versions
from recbole_uip.settings import PROMPTED_SOURCES, SettingsError

__all__ = ["STEPS", "format_likelihood", "likelihood", "measure"]

logger = logging.getLogger(__name__)

STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# Share of users on whose training rows the step is chosen; they are judged nowhere.
TUNING_SHARE = 0.2

Code = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Field:
    """A code field of an LM facet.

    Attributes
    ----------
    name, facet, weight : str
    source : {"lm", "prefix"}
        Where its soft tokens are: among the LM's embeddings, or in its last layers.
    number : int
        Among the encoder's profile fields.
    columns : tuple of int
        Of its levels, among the profile columns.
    scores : {"text", "feedback"}
        What its soft tokens follow.
    """

    name: str
    facet: str
    weight: str
    source: str
    number: int
    columns: tuple[int, ...]
    scores: str


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Behaviours and the codes of their users.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
    own : list of n Code
    """

    rows: np.ndarray
    own: list[Code]


class _Speaker:
    """The LM with soft tokens of codes; nothing is asked twice.

    Parameters
    ----------
    task : Task
    model : ProfileModel
    source : {"lm", "prefix"}

    Attributes
    ----------
    theta0 : Tensor, shape (F, D)
    """

    def __init__(self, task: Task, model: ProfileModel, source: str) -> None:
        lm_settings, cache = task.settings.lm, task.settings.cache
        self.model = model
        self.backbone = lm.load(dataclasses.replace(lm_settings, dtype="float32"), cache)
        self.texts = task.texts
        self.lm_tokens = 0
        self._said: dict[tuple, float] = {}
        # by kind of score, in the type that the profiles were made of
        self._scores: dict[str, np.ndarray | None]
        if source == "prefix":
            names, of_feedback, endings = task.settings.prefix_prompt(task.endings)
            prefix = lm.Prefix(self.backbone, prompts.build(self.backbone, names, endings))
            self.theta0 = prefix.theta0
            self._ask = functools.partial(lm.prefix_likelihoods, prefix)
            found = lm.score_prefix(task.distinct, names, of_feedback, endings, lm_settings, cache)
            self._scores = dict.fromkeys(("text", "feedback"), found.vectors)
        else:
            names, endings = task.settings.prompts, task.endings
            prompt = prompts.build(self.backbone, names, endings)
            self.theta0 = torch.from_numpy(model.tables["lm_theta0"])
            self._ask = functools.partial(lm.likelihoods, self.backbone, prompt)
            scored = lm.score(task.distinct, names, endings, lm_settings, cache)
            self._scores = {"text": scored.text, "feedback": scored.feedback}
        self._row_of = {text: row for row, text in enumerate(task.distinct)}

    def slope(self, field: _Field, item: int, move: np.ndarray) -> float:
        """Rise of an item's value along a move of the soft tokens, to first order."""
        scores = self._scores[field.scores][self._row_of[self.texts[item]]]
        return float(scores.ravel() @ move)

    def values(
        self, field: _Field, step: float, codes: Sequence[Code], items: Sequence[int]
    ) -> np.ndarray:
        """Log-likelihood or feedback logit of each item's text under each code, shape (n,)."""
        step = step if any(any(code) for code in codes) else 0.0
        asked = [
            (field.name, step, code, self.texts[item])
            for code, item in zip(codes, items, strict=True)
        ]
        missing = defaultdict(list)
        for key in dict.fromkeys(asked):
            if key not in self._said:
                missing[key[2]].append(key[3])
        for code, texts in tqdm(missing.items(), desc=field.name, leave=False, delay=2):
            move = soft_moves(self.model, field.name, code, step, field.scores)
            theta = self.theta0 + torch.from_numpy(move).to(self.theta0)
            ids = prompts.text_ids(self.backbone, texts)
            likelihoods, logits, spent = self._ask(theta, ids)
            self.lm_tokens += spent
            found = logits if field.scores == "feedback" else likelihoods
            for text, value in zip(texts, found.tolist(), strict=True):
                self._said[field.name, step, code, text] = value
        return np.array([self._said[key] for key in asked])


def measure(task: Task, users: int = 40, behaviours: int = 5, codes: int = 4) -> dict[str, Any]:
    """The figures of every code field of an LM facet.

    Parameters
    ----------
    task : Task
        What a run's profile stage is given.
    users : int
        Held-out users a field is judged on, at most; as many others choose the step.
    behaviours : int
        Behaviours of each, at most, drawn at random.
    codes : int
        Codes drawn for each behaviour, which stand for the mean over codes.

    Returns
    -------
    dict
        ``fields`` (a list), ``lm_tokens``.

    Raises
    ------
    SettingsError
        If no LM facet has a codebook, or nobody has held-out behaviours.
    """
    settings, events = task.settings, task.behaviours
    inferred = profiles.infer(events, task.texts, settings, task.fold)
    items = [str(item) for item in range(events.n_items)]
    model = ProfileModel.from_profiles(inferred, items, settings, implicit=events.liked is None)
    fields = _fields(task, model)
    if not fields:
        raise SettingsError(
            "likelihood needs a facet with source: lm or prefix, and codes; uip_facets has none"
        )
    sources = dict.fromkeys(field.source for field in fields)
    speakers = {source: _Speaker(task, model, source) for source in sources}
    tuning = np.random.default_rng(settings.seed).random(events.n_users) < TUNING_SHARE
    last = _last_codes(task, inferred)
    tokens = {each.name: each.values for each in inferred.fields}
    results = []
    for field in fields:
        levels = model.profile_names[field.columns[0] : field.columns[-1] + 1]
        at_row = np.column_stack([tokens[name] for name in levels])
        # Each has chance of its own, so that no held-out label moves what chooses the step.
        draws = [np.random.default_rng([settings.seed, field.number, part]) for part in range(3)]
        judged = _draw(
            task, field, last[:, list(field.columns)][events.user], ~events.train,
            ~tuning, users, behaviours, draws[0],
        )  # fmt: skip
        chooser = _draw(task, field, at_row, events.train, tuning, users, behaviours, draws[1])
        if min(len(np.unique(events.user[each.rows])) for each in (judged, chooser)) < 2:
            logger.warning(
                "%s: too few users have a code and behaviours to judge it on", field.name
            )
            continue
        results.append(
            _field_figures(
                _Lifts(task, field, speakers[field.source], inferred),
                judged,
                chooser,
                codes,
                draws[2],
            )  # fmt: skip
        )
    if not results:
        raise SettingsError(
            "no user with a code has held-out behaviours: nothing to measure a likelihood on"
        )
    return {"fields": results, "lm_tokens": sum(each.lm_tokens for each in speakers.values())}


def _fields(task: Task, model: ProfileModel) -> list[_Field]:
    of_facet = {facet.name: facet for facet in task.settings.facets}
    facet_of = {info.name: info.facet for info in model.encoder.fields}
    fields, found = model.encoder.profile_fields, []
    for number in np.flatnonzero((fields.kind == CODE) & (fields.size > 0)):
        columns = tuple(range(fields.column[number], fields.column[number + 1]))
        name = model.profile_names[columns[0]]
        facet = of_facet[facet_of[name]]
        if facet.source in PROMPTED_SOURCES:
            feedback = facet.by_feedback(task.endings)
            found.append(
                _Field(
                    name,
                    facet.name,
                    facet.weight,
                    facet.source,
                    int(number),
                    columns,
                    "feedback" if feedback else "text",
                )  # fmt: skip
            )
    return found


def _last_codes(task: Task, inferred: profiles.Profiles) -> np.ndarray:
    """Profile tokens of each user after the last training row, shape (n_users, n_columns)."""
    events = task.behaviours
    history = states.whole_history(events.user, events.time, events.train, events.n_users)
    encoder = inferred.encoder
    tokens = np.zeros((events.n_users, len(encoder.profile_columns)), dtype=np.int32)
    for at, block in states.iter_states(encoder.kernels, history, inferred.events):
        tokens[at] = encoder.profiles(block, history.seen[at])
    return tokens


def _draw(
    task: Task,
    field: _Field,
    codes: np.ndarray,
    mask: np.ndarray,
    users: np.ndarray,
    n_users: int,
    n_rows: int,
    generator: np.random.Generator,
) -> _Sample:
    """Some behaviours of the field's kind, of some users, with their codes of each row."""
    events = task.behaviours
    has_text = np.array([bool(text) for text in task.texts])
    usable = mask & users[events.user] & has_text[events.item] & (codes[:, 0] > 0)
    if field.weight in ("positive", "negative") and events.liked is not None:
        usable &= events.liked == float(field.weight == "positive")
    rows = generator.permutation(np.flatnonzero(usable))
    chosen = generator.permutation(np.unique(events.user[rows]))[:n_users]
    rows = rows[np.isin(events.user[rows], chosen)]
    rows = rows[np.argsort(events.user[rows], kind="stable")]
    position = np.arange(len(rows)) - np.searchsorted(events.user[rows], events.user[rows])
    rows = rows[position < n_rows]
    return _Sample(rows, [tuple(code) for code in codes[rows].tolist()])


def _others(sample: _Sample, user: np.ndarray, generator: np.random.Generator) -> list[Code]:
    """For each row the code of another user of the sample, of a different code where there is one.

    A user has the same other in all rows.
    """
    code_of = dict(zip(user.tolist(), sample.own, strict=True))
    drawn = {}
    for each, own in code_of.items():
        different = [code for code in code_of.values() if code != own] or [own]
        drawn[each] = different[generator.integers(len(different))]
    return [drawn[each] for each in user.tolist()]


class _Lifts:
    """How much likelier the LM finds a field's behaviours under codes; nats."""

    def __init__(
        self,
        task: Task,
        field: _Field,
        speaker: _Speaker,
        inferred: profiles.Profiles,
    ) -> None:
        self.task, self.field, self.speaker = task, field, speaker
        self.events, self.inferred = task.behaviours, inferred

    def factors(self, sample: _Sample) -> np.ndarray:
        """What each behaviour's value counts: y - p where it is of feedback, shape (n,)."""
        if self.field.scores == "text":
            return np.ones(len(sample.rows))
        rate, fold = self.inferred.encoder.kernels.rate, self.inferred.events.fold
        item = self.events.item[sample.rows]
        return self.events.liked[sample.rows] - rate[fold[sample.rows], item]

    def said(self, sample: _Sample, step: float, codes: Sequence[Code]) -> np.ndarray:
        """What the LM says of each behaviour under its code, shape (n,)."""
        return self.speaker.values(self.field, step, codes, self.events.item[sample.rows])

    def said_at_theta0(self, sample: _Sample) -> np.ndarray:
        """The same under no code."""
        nothing: Code = (0,) * len(self.field.columns)
        return self.said(sample, 0.0, [nothing] * len(sample.rows))

    def move(self, code: Code) -> np.ndarray:
        """From θ0 to the soft tokens of a code, at step 1, flat."""
        field = self.field
        return soft_moves(self.speaker.model, field.name, code, 1.0, field.scores).ravel()

    def predicted(self, sample: _Sample, codes: Sequence[Code]) -> np.ndarray:
        """Lifts at step 1 to first order, by the scores, shape (n,)."""
        moves = {code: self.move(code) for code in set(codes)}
        items = self.events.item[sample.rows]
        return np.array(
            [
                self.speaker.slope(self.field, item, moves[code])
                for item, code in zip(items, codes, strict=True)
            ]
        )


def _field_figures(
    lifts: _Lifts,
    judged: _Sample,
    chooser: _Sample,
    n_codes: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    field, events = lifts.field, lifts.events
    user = events.user[judged.rows]
    others = _others(judged, user, generator)
    base, weight = lifts.said_at_theta0(judged), lifts.factors(judged)
    steps, own_at = _step_figures(lifts, judged, others, base, chooser)
    best = max(steps, key=lambda each: each["tuning"] - each["tuning_error"])["step"]
    own, other = own_at[best]
    drawn = _drawn_codes(lifts.inferred, field, n_codes, len(judged.rows), generator)
    at_large = np.mean([lifts.said(judged, best, codes) for codes in drawn], axis=0)
    lengths = [np.linalg.norm(lifts.move(code)) for code in set(judged.own)]
    figures = {
        "field": field.name,
        "facet": field.facet,
        "weight": field.weight,
        "measured": "(y - p) feedback logit" if field.scores == "feedback" else "log p(text)",
        "users": len(np.unique(user)),
        "behaviours": len(judged.rows),
        "tuning_behaviours": len(chooser.rows),
        "theta0_mean": float((weight * base).mean()),
        "move": float(np.mean(lengths) / lifts.speaker.theta0.norm()),
        "step": best,
        "own_theta0": _difference(user, weight * (own - base)),
        "own_other": _difference(user, weight * (own - other)),
        "own_codes": _difference(user, weight * (own - at_large)),
        "steps": steps,
    }
    if field.scores == "feedback":
        liked = events.liked[judged.rows]
        figures["auc"] = {
            name: float(auc(liked, each))
            for name, each in (("own", own), ("theta0", base), ("other", other))
        }
        figures["auc_own_theta0"] = dataclasses.asdict(
            user_clustered_bootstrap(user, liked, own, base, seed=lifts.task.settings.seed)
        )
    return figures


def _step_figures(
    lifts: _Lifts, judged: _Sample, others: list[Code], base: np.ndarray, chooser: _Sample
) -> tuple[list[dict[str, Any]], dict[float, tuple[np.ndarray, np.ndarray]]]:
    """Figures of each step, and what the LM says at each under own and others' codes."""
    user, weight = lifts.events.user[judged.rows], lifts.factors(judged)
    first_order, of_others = (lifts.predicted(judged, codes) for codes in (judged.own, others))
    chooser_user, chooser_weight = lifts.events.user[chooser.rows], lifts.factors(chooser)
    chooser_base = lifts.said_at_theta0(chooser)
    steps, own_at = [], {}
    for step in STEPS:
        tuned = chooser_weight * (lifts.said(chooser, step, chooser.own) - chooser_base)
        own, other = (lifts.said(judged, step, codes) for codes in (judged.own, others))
        own_at[step] = own, other
        steps.append(
            {
                "step": step,
                "tuning": float(tuned.mean()),
                "tuning_error": clustered_error(chooser_user, tuned),
                "own_theta0": _difference(user, weight * (own - base)),
                "own_other": _difference(user, weight * (own - other)),
                "predicted_own_theta0": float((weight * step * first_order).mean()),
                "predicted_own_other": float((weight * step * (first_order - of_others)).mean()),
                "correlation": _correlation(
                    step * np.concatenate([first_order, of_others]),
                    np.concatenate([own - base, other - base]),
                ),
            }
        )
    return steps, own_at


def _drawn_codes(
    inferred: profiles.Profiles,
    field: _Field,
    n_codes: int,
    n_rows: int,
    generator: np.random.Generator,
) -> Iterable[list[Code]]:
    """``n_codes`` lists of one code a row, uniform over the codebook's first level."""
    size = int(inferred.encoder.profile_fields.size[field.number])
    rest = (0,) * (len(field.columns) - 1)
    for _ in range(n_codes):
        yield [(int(code), *rest) for code in generator.integers(1, size + 1, size=n_rows)]


def _difference(user: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(clustered_mean(user, values))


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    if left.std() == 0 or right.std() == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


# --- the command --------------------------------------------------------------------------------


def likelihood(
    dataset: str | None = None,
    config_files: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    command_line: Sequence[str] = (),
    users: int = 40,
    behaviours: int = 5,
    codes: int = 4,
    command: str | None = None,
) -> dict[str, Any]:
    """Whether codes make later behaviours more likely, by the LM's own likelihood.

    Parameters
    ----------
    dataset, config_files, config, command_line
        As for :func:`recbole_uip.evidence.bench.bench_profiles`.
    users, behaviours, codes : int
        As for :func:`measure`.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        What :func:`measure` returns, ``dataset``, ``versions`` and ``command``.

    Raises
    ------
    SettingsError
        If a setting cannot be used, or there is nothing to measure.
    """
    for key, value, least in (
        ("users", users, 2),
        ("behaviours", behaviours, 1),
        ("codes", codes, 1),
    ):
        if value < least:
            raise SettingsError(f"{key}={value} must be at least {least}")
    name, parsed = parse_config(dataset, config_files, config, command_line)
    if not parsed.uip.prompted_facets:
        raise SettingsError(
            "likelihood needs a facet with source: lm or prefix, and uip_facets has none"
        )
    if parsed.uip.posterior != "score":
        raise SettingsError(
            f"uip_posterior={parsed.uip.posterior}: likelihood puts codes of scores back into the "
            "LM; of tuned soft tokens recbole-uip bench gradient tells"
        )
    found = measure(load_task(parsed), users, behaviours, codes)
    return {
        "dataset": name,
        **found,
        "versions": versions(),
        "command": command or f"likelihood({name!r})",
    }


def format_likelihood(results: Mapping[str, Any]) -> str:
    """A Markdown table of the fields at their steps, and the curve of each."""
    lines = [
        f"{results['dataset']}: held-out behaviours under the LM with a user's code as a soft "
        f"token; nats per behaviour, 95% intervals over users; {results['lm_tokens']:,} LM tokens",
        "",
        "| field | measured | users | behaviours | step | own - theta0 | own - another's "
        "| own - mean code |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results["fields"]:
        cells = [
            each["field"], each["measured"], str(each["users"]), str(each["behaviours"]),
            f"{each['step']:g}",
            *(_shown(each[key]) for key in ("own_theta0", "own_other", "own_codes")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| field | step | own - theta0 | first order | own - another's | first order "
        "| correlation | tuning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results["fields"]:
        for step in each["steps"]:
            lines.append(
                f"| {each['field']} | {step['step']:g} | {_shown(step['own_theta0'])} "
                f"| {step['predicted_own_theta0']:+.4f} | {_shown(step['own_other'])} "
                f"| {step['predicted_own_other']:+.4f} | {step['correlation']:.2f} "
                f"| {step['tuning']:+.4f} |"
            )
    lines.append("")
    for each in results["fields"]:
        line = f"{each['field']}: at step 1 a code moves the soft tokens by {each['move']:.2f} "
        line += "times their length"
        if "auc" in each:
            aucs, change = each["auc"], each["auc_own_theta0"]
            line += (
                f"; AUC of the feedback logit {aucs['own']:.3f} with the own code, "
                f"{aucs['theta0']:.3f} with theta0, {aucs['other']:.3f} with another's "
                f"(own - theta0 {_shown(change)})"
            )
        lines.append(line)
    return "\n".join(lines)


def _shown(difference: Mapping[str, float]) -> str:
    return f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"

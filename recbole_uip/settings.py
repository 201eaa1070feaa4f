"""What a user may set: frozen dataclasses, parsed strictly from ``uip_*`` keys.

A key that does not exist, a value of the wrong type and a combination that makes no
sense each raise :class:`SettingsError`, which names the key, the value and the way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_uip.behaviours import DataError

__all__ = [
    "ArmSettings",
    "CodebookSettings",
    "FacetSettings",
    "GradientSettings",
    "LMSettings",
    "MatchSettings",
    "NoItemTextError",
    "SettingsError",
    "UIPSettings",
    "default_cache_dir",
    "default_time",
    "parse_duration",
    "refusals_of",
]

SOURCES = ("lm", "prefix", "embedding", "words", "collaborative", "constant")
TEXT_SOURCES = ("lm", "prefix", "embedding", "words")
LM_SOURCES = ("lm", "prefix", "embedding")
PROMPTED_SOURCES = ("lm", "prefix")
PRIOR_SOURCES = ("embedding", "words")
WEIGHTS = ("positive", "negative", "all", "contrast")
POSTERIORS = ("auto", "filter", "sums")
DIRECTIONS = ("between", "fisher")
CONTROLS = ("none", "random", "shuffled")
VALUES = ("tokens", "means")
METHODS = ("em", "kmeans", "vq", "fsq", "sinkhorn", "random")
DEFAULT_LM = "SmolLM2-135M"
# Folds of users for like rates, within each fold for item vectors.
RATE_FOLDS = 4


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the key, the value and the way out."""


class NoItemTextError(SettingsError):
    """A facet reads the items' texts, and ``uip_item_text`` does not say what these are."""


@dataclass(frozen=True)
class MatchSettings:
    """The item's side of a facet: quantile bins of what the profile says of the row's item.

    Parameters
    ----------
    posterior : {"auto", "filter", "sums"}
        E-step: the online Laplace filter of the labels' likelihood, or the closed form on
        running sums. ``auto`` takes the filter for contrast weights, and sums otherwise.
    rank : int
        Number of between-user directions.
    bins : int
        Number of quantile bins, each one token of the field.
    half_life : tuple of float
        Forgetting, in events of the user; one field each. ``inf`` never forgets.
    """

    posterior: str = "auto"
    rank: int = 24
    bins: int = 32
    half_life: tuple[float, ...] = (math.inf,)


@dataclass(frozen=True)
class FacetSettings:
    """One facet of a profile.

    Parameters
    ----------
    name : str
        Name of the facet, and stem of its fields (``uip_<name>``).
    source : {"lm", "prefix", "embedding", "words", "collaborative", "constant"}
        Where the item vectors come from: the LM's scores of the item texts, with respect to a soft
        token's embedding or to what it is in the last layers (see
        :mod:`recbole_uip.lm.prefix`), the LM's mean embeddings of the texts, their words, the
        training rows, or nowhere (every item has the same).
    weight : {"positive", "negative", "all", "contrast"}
        Evidence weight of an event.
    prompt : str
        The facet's name in words, as it stands in the prompt (``source: lm`` or ``prefix``).
    codes : int
        Size of the codebook; 0 for no code field.
    rank : int
        Number of directions that are quantised.
    directions : {"between", "fisher"}
        Which: those in which users differ most, or those of most Fisher information (in which
        items differ most).
    levels : int
        Residual quantisation levels, one code field each.
    half_life : tuple of float
        Forgetting of the code's state, in events; one field each.
    bins : int
        Quantile bins of a one-dimensional facet (``source: constant``).
    match : MatchSettings or None
        The match field, if any.
    texts : tuple of {"embedding", "words"}
        What a collaborative facet knows of the items' texts besides: they are the prior mean of
        its item vectors, and give its filter further directions. An item without events is not
        unknown to it then.
    """

    name: str
    source: str = "prefix"
    weight: str = "contrast"
    prompt: str = ""
    codes: int = 32
    rank: int = 16
    directions: str = "between"
    levels: int = 1
    half_life: tuple[float, ...] = (math.inf,)
    bins: int = 24
    match: MatchSettings | None = None
    texts: tuple[str, ...] = ()

    @property
    def n_directions(self) -> int:
        """Number of directions that codes and match field take; leniency has one."""
        if self.source == "constant":
            return 1
        return max(self.rank if self.codes else 0, self.match.rank if self.match else 0)

    @property
    def fields(self) -> list[tuple[str, float]]:
        """Name of each field of codes or bins, further levels left out, and its half-life."""
        if self.source != "constant" and not self.codes:
            return []
        return self._by_half_life("", self.half_life)

    @property
    def match_fields(self) -> list[tuple[str, float]]:
        """Name of each match field, and its half-life."""
        return self._by_half_life("_match", self.match.half_life) if self.match else []

    @property
    def field_names(self) -> list[str]:
        """Names of all token fields."""
        names = [level for name, _ in self.fields for level in self.level_names(name)]
        return names + [name for name, _ in self.match_fields]

    def level_names(self, name: str) -> list[str]:
        """Names of the levels of field ``name``, the first of which is its own."""
        levels = 1 if self.source == "constant" else self.levels
        return [name, *(f"{name}_level{level}" for level in range(2, levels + 1))]

    def _by_half_life(self, kind: str, half_lives: tuple[float, ...]) -> list[tuple[str, float]]:
        # Where there are several, a field's name ends in its half-life.
        several = len(half_lives) > 1
        return [
            (f"uip_{self.name}{kind}" + (f"_{half_life:g}" if several else ""), half_life)
            for half_life in half_lives
        ]

    @property
    def has_filter(self) -> bool:
        """Whether its match fields come from the filter."""
        if self.match is None or self.match.posterior == "auto":
            return self.match is not None and self.weight == "contrast"
        return self.match.posterior == "filter"

    def by_feedback(self, endings: tuple[str, str] | None) -> bool:
        """Whether the LM judges it by feedback: its evidence is of liking, and endings say it."""
        return self.weight == "contrast" and endings is not None

    @property
    def text_sources(self) -> tuple[str, ...]:
        """Sources by which it reads the items' texts."""
        return (self.source,) if self.source in TEXT_SOURCES else self.texts


@dataclass(frozen=True)
class CodebookSettings:
    """How a codebook is fitted (see :class:`recbole_uip.em.codebook.Codebook`).

    Parameters
    ----------
    method : {"em", "kmeans", "vq", "fsq", "sinkhorn", "random"}
        Mixture EM, or one of the alternatives of :mod:`recbole_uip.em.quantizers`.
    sample : int
        Number of point-in-time states of training rows it is fitted on.
    n_init, max_iter : int
        Restarts, and the most iterations of each.
    tol : float
        Least gain of an iteration, in nats a sample; for ``kmeans`` the least move of codewords,
        relative to the variance of the offsets.
    """

    method: str = "em"
    sample: int = 5_000
    n_init: int = 1
    max_iter: int = 200
    tol: float = 1e-3


@dataclass(frozen=True)
class GradientSettings:
    """How soft tokens are tuned (see :mod:`recbole_uip.em.gradient`).

    Parameters
    ----------
    e_step : {"adam", "relinearize"}
        Steps of Adam for each profile, or scores recomputed at the profiles' codewords (see
        :mod:`recbole_uip.em.relinearize`).
    steps : int
        Steps of Adam in a round.
    behaviours : int
        Number of a user's latest behaviours that count.
    batch : int
        Of these, how many a step puts through the LM (``uip_likelihood: item``; a sequence goes
        through it whole).
    learning_rate : float or None
        Move of a soft token's entries at the first step, root mean square; None takes that by
        which the log posterior of some held-out users climbs highest.
    snapshots : tuple of int
        History sizes at which a user's soft tokens are inferred, besides the end of training.
    rounds : int
        Rounds of E and M, at most.
    tol : float
        Rounds end when the held-out users' bound rises by less, in nats a behaviour.
    held_out : float
        Share of users held out for that.
    space : {"frame", "token"}
        Soft tokens move in the ``rank`` directions of the facet, or anywhere.
    prior : {"mixture", "none"}
        Whether codewords draw the soft tokens.
    recompute : bool
        Gradient checkpointing: less memory, a third more time.
    """

    e_step: str = "adam"
    steps: int = 20
    behaviours: int = 50
    batch: int = 2
    learning_rate: float | None = None
    snapshots: tuple[int, ...] = (5, 20, 80)
    rounds: int = 3
    tol: float = 1e-3
    held_out: float = 0.1
    space: str = "frame"
    prior: str = "mixture"
    recompute: bool = False


@dataclass(frozen=True)
class LMSettings:
    """Which language model scores the item texts, and how.

    Parameters
    ----------
    name : str
        Hub id, local folder, GGUF file, or ``SmolLM2-135M`` (the default, which can also
        come from a PyPI wheel).
    adapter : str or None
        Folder or hub id of a PEFT adapter, merged into the frozen LM.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    dtype : str
        ``auto``, ``float32`` or ``bfloat16``.
    batch_tokens : int or None
        Token budget of one batch; None for what suits the device, see
        :class:`~recbole_uip.lm.Backbone`.
    text_tokens : int
        Tokens of an item's text that the LM reads, at most: what they cost grows with their
        number, and their memory faster.
    """

    name: str = DEFAULT_LM
    adapter: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None
    text_tokens: int = 256


@dataclass(frozen=True)
class ArmSettings:
    """One side of a comparison: which facets a model is given.

    Parameters
    ----------
    name : str
        Name of the arm, as it stands in the results.
    facets : tuple of str
        Facets whose fields the model sees; empty for the plain model.
    user_id : {"keep", "drop"}
        Whether the model also sees the user ID.
    control : {"none", "random", "shuffled"}
        ``random`` puts random tokens in the place of profiles, ``shuffled`` another user's.
    values : {"tokens", "means"}
        ``means`` gives the posterior means before quantisation, as float fields.
    """

    name: str
    facets: tuple[str, ...] = ()
    user_id: str = "keep"
    control: str = "none"
    values: str = "tokens"

    @property
    def served(self) -> bool:
        """Whether its fields are the profile's own tokens, which a bank can serve."""
        return self.control == "none" and self.values == "tokens"


@dataclass(frozen=True)
class UIPSettings:
    """All ``uip_*`` keys; see ``properties/uip.yaml`` for the defaults and their meaning."""

    facets: tuple[FacetSettings, ...] = ()
    item_text: str | None = None
    endings: tuple[str, str] | None = None
    lm: LMSettings = field(default_factory=LMSettings)
    codebook: CodebookSettings = field(default_factory=CodebookSettings)
    posterior: str = "score"
    likelihood: str = "item"
    gradient: GradientSettings = field(default_factory=GradientSettings)
    time: str = "auto"
    history: str = "auto"
    refresh: float = 0.0
    user_id: str = "drop"
    empty: str = "pad"
    folds: int = 4
    arms: tuple[ArmSettings, ...] = ()
    seed: int = 2020
    cache: Path = field(default_factory=lambda: default_cache_dir())
    output: Path | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UIPSettings:
        """Parse the ``uip_*`` keys of ``config`` (other keys are not looked at, save ``seed``).

        Raises
        ------
        SettingsError
            If a key is unknown, or a value is not valid.
        """
        given = {key: value for key, value in config.items() if str(key).startswith("uip_")}
        for key in given:
            if key not in _KEYS:
                raise SettingsError(f"unknown setting {key!r}{_nearest(key, _KEYS)}")
        given = {key: value for key, value in given.items() if value is not None}
        facets = _parse_facets(given.get("uip_facets", {}))
        user_id = _choice("uip_user_id", given.get("uip_user_id", "drop"), ("keep", "drop"))
        settings = cls(
            facets=facets,
            item_text=_parse_text("uip_item_text", given.get("uip_item_text")),
            endings=_parse_endings(given.get("uip_endings")),
            lm=LMSettings(
                name=_typed("uip_lm", given.get("uip_lm", DEFAULT_LM), str),
                adapter=_optional("uip_lm_adapter", given.get("uip_lm_adapter"), str),
                device=str(given.get("uip_lm_device", "auto")),
                dtype=_choice(
                    "uip_lm_dtype",
                    given.get("uip_lm_dtype", "auto"),
                    ("auto", "float32", "bfloat16"),
                ),
                batch_tokens=_positive_or_auto(
                    "uip_lm_batch_tokens", given.get("uip_lm_batch_tokens", "auto")
                ),
                text_tokens=_positive("uip_lm_text_tokens", given.get("uip_lm_text_tokens", 256)),
            ),
            codebook=_parse_section(
                CodebookSettings, "uip_codebook", given.get("uip_codebook", {})
            ),
            posterior=_choice(
                "uip_posterior", given.get("uip_posterior", "score"), ("score", "gradient")
            ),
            likelihood=_choice(
                "uip_likelihood", given.get("uip_likelihood", "item"), ("item", "sequence")
            ),
            gradient=_parse_gradient(given.get("uip_gradient", {})),
            time=_choice(
                "uip_time",
                given.get("uip_time", "auto"),
                ("auto", "point_in_time", "cross_fitted", "static"),
            ),
            history=_choice(
                "uip_history", given.get("uip_history", "auto"), ("auto", "train", "observed")
            ),
            refresh=parse_duration("uip_refresh", given.get("uip_refresh", 0)),
            user_id=user_id,
            empty=_choice("uip_empty", given.get("uip_empty", "pad"), ("pad", "prior")),
            folds=_positive("uip_folds", given.get("uip_folds", 4), minimum=2),
            arms=_parse_arms(given.get("uip_arms"), facets, user_id),
            seed=_positive("seed", config.get("seed", 2020), minimum=0, maximum=2**32 - 1),
            cache=_parse_path("uip_cache", given.get("uip_cache") or default_cache_dir()),
            output=_parse_path("uip_output", given.get("uip_output")),
        )
        settings._check()
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The keys that shape profiles, as plain values that :meth:`from_dict` parses back.

        Where things lie and which arms are compared (``uip_cache``, ``uip_output``,
        ``uip_arms``, ``uip_user_id``) is not in it.
        """
        return {
            "uip_facets": {facet.name: _plain_facet(facet) for facet in self.facets},
            "uip_item_text": self.item_text,
            "uip_endings": self.endings
            and dict(zip(("liked", "disliked"), self.endings, strict=True)),
            "uip_lm": self.lm.name,
            "uip_lm_adapter": self.lm.adapter,
            "uip_lm_dtype": self.lm.dtype,
            "uip_lm_batch_tokens": self.lm.batch_tokens or "auto",
            "uip_lm_text_tokens": self.lm.text_tokens,
            "uip_codebook": dataclasses.asdict(self.codebook),
            "uip_posterior": self.posterior,
            "uip_likelihood": self.likelihood,
            "uip_gradient": _plain_gradient(self.gradient),
            "uip_time": self.time,
            "uip_history": self.history,
            "uip_refresh": self.refresh,
            "uip_empty": self.empty,
            "uip_folds": self.folds,
            "seed": self.seed,
        }

    def _check(self) -> None:
        self._check_fields()
        if self.text_facets and self.item_text is None:
            raise NoItemTextError(
                f"uip_item_text is not set, and the facets {self.text_facets} read the items' "
                'texts: set it to a template of item fields such as "{movie_title} ({genre})" (for '
                "recbole-uip bank build, with --items), or take facets with source: collaborative "
                "or constant"
            )
        if self.time in ("cross_fitted", "static") and self.refresh:
            raise SettingsError(
                f"uip_refresh={self.refresh:g}s has no meaning with uip_time={self.time}: "
                "set uip_time=point_in_time or drop uip_refresh"
            )
        if self.posterior == "gradient":
            self._check_gradient()
        elif self.likelihood != "item":
            raise SettingsError(
                f"uip_likelihood={self.likelihood} has no meaning with uip_posterior=score, whose "
                "scores are of single items: set uip_posterior=gradient or drop uip_likelihood"
            )

    def _check_fields(self) -> None:
        owner = {"uip_row": "the number of each row"}
        for facet in self.facets:
            if facet.codes > self.codebook.sample:
                raise SettingsError(
                    f"uip_facets.{facet.name}.codes={facet.codes} is more than the "
                    f"uip_codebook.sample={self.codebook.sample} rows that a codebook is fitted "
                    "on: lower the first, or raise the second"
                )
            for name in facet.field_names:
                if name in owner:
                    raise SettingsError(
                        f"uip_facets.{facet.name} gives the field {name}, which is that of "
                        f"{owner[name]} as well: choose another name or half_life"
                    )
                owner[name] = f"uip_facets.{facet.name}"

    def _check_gradient(self) -> None:
        tuned = self.tuned_facets
        if self.facets and not tuned:
            raise SettingsError(
                "uip_posterior=gradient tunes facets with source: lm or prefix, and uip_facets has "
                "none: add one, or set uip_posterior=score"
            )
        for facet in tuned:
            key = f"uip_facets.{facet.name}"
            if facet.half_life != (math.inf,):
                raise SettingsError(
                    f"{key}.half_life has no meaning with uip_posterior=gradient, by which the "
                    f"{self.gradient.behaviours} latest behaviours count alike: drop it, or set "
                    "uip_gradient.behaviours"
                )
            if facet.codes == 0:
                raise SettingsError(
                    f"{key} has codes: 0, and uip_posterior=gradient gives no match field: set "
                    "codes, or uip_posterior=score"
                )

    @property
    def user_folds(self) -> int:
        """Folds of users by which like rates are fitted: finer than those of item vectors."""
        return self.folds * RATE_FOLDS

    @property
    def tuned_facets(self) -> tuple[FacetSettings, ...]:
        """Facets whose soft tokens are tuned by gradients."""
        return self.prompted_facets if self.posterior == "gradient" else ()

    @property
    def prompted_facets(self) -> tuple[FacetSettings, ...]:
        """Facets that are soft tokens of the LM, wherever in it."""
        return tuple(facet for facet in self.facets if facet.source in PROMPTED_SOURCES)

    def with_soft_tokens(self, source: str) -> UIPSettings:
        """The same with all soft tokens in one place of the LM: ``lm`` or ``prefix``."""
        facets = tuple(
            dataclasses.replace(facet, source=source) if facet in self.prompted_facets else facet
            for facet in self.facets
        )
        return dataclasses.replace(self, facets=facets)

    @property
    def prompts(self) -> list[str]:
        """Names in words of the facets that the LM scores at soft tokens' embeddings."""
        return [facet.prompt for facet in self.facets if facet.source == "lm"]

    @property
    def prefix_facets(self) -> tuple[FacetSettings, ...]:
        """Facets that the LM scores with respect to a prefix."""
        return tuple(facet for facet in self.facets if facet.source == "prefix")

    def prefix_prompt(
        self, endings: tuple[str, str] | None
    ) -> tuple[list[str], list[bool], tuple[str, str] | None]:
        """What the LM is given of these facets, where it has ``endings``.

        Returns
        -------
        names : list of str
            In words.
        of_feedback : list of bool
            Whether the LM judges each by feedback.
        endings : (liked, disliked) or None
            None where none is.
        """
        of_feedback = [facet.by_feedback(endings) for facet in self.prefix_facets]
        names = [facet.prompt for facet in self.prefix_facets]
        return names, of_feedback, endings if any(of_feedback) else None

    @property
    def reads_lm(self) -> bool:
        """Whether the LM reads the items' texts, for any facet."""
        return any(set(facet.text_sources) & set(LM_SOURCES) for facet in self.facets)

    @property
    def text_facets(self) -> list[str]:
        """Names of the facets that read the items' texts."""
        return [facet.name for facet in self.facets if facet.text_sources]

    def facets_of(self, arm: ArmSettings) -> tuple[FacetSettings, ...]:
        """The facets that ``arm`` uses, in the order of ``uip_facets``."""
        return tuple(facet for facet in self.facets if facet.name in arm.facets)


_KEYS = (
    "uip_facets",
    "uip_item_text",
    "uip_endings",
    "uip_lm",
    "uip_lm_adapter",
    "uip_lm_device",
    "uip_lm_dtype",
    "uip_lm_batch_tokens",
    "uip_lm_text_tokens",
    "uip_codebook",
    "uip_posterior",
    "uip_likelihood",
    "uip_gradient",
    "uip_time",
    "uip_history",
    "uip_refresh",
    "uip_user_id",
    "uip_empty",
    "uip_folds",
    "uip_arms",
    "uip_cache",
    "uip_output",
)


def default_time(timed: bool) -> str:
    """What ``uip_time: auto`` stands for, with timestamps or without."""
    return "point_in_time" if timed else "cross_fitted"


def default_cache_dir() -> Path:
    """``$RECBOLE_UIP_CACHE``, else ``recbole_uip`` in the user's cache folder."""
    if folder := os.environ.get("RECBOLE_UIP_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recbole_uip"


@contextlib.contextmanager
def refusals_of(facet: FacetSettings) -> Iterator[None]:
    """Have what the data cannot give a facet name the facet."""
    try:
        yield
    except DataError as error:
        raise SettingsError(f"uip_facets.{facet.name}: {error}") from error


def parse_duration(key: str, value: Any) -> float:
    """Seconds in ``value``: a number, alone or with one of the units s, m, h, d, w."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([smhdw]?)\s*", str(value))
    if match is None:
        raise SettingsError(f"{key}={value!r} is not a duration: write 0s, 30m, 1h, 1d or 1w")
    unit = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]
    seconds = float(match[1]) * unit
    if math.isinf(seconds):
        raise SettingsError(f"{key}={value!r} is too long")
    return seconds


def _nearest(word: str, words: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(words)}"


def _typed(key: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(each.__name__ for each in kinds)
        raise SettingsError(f"{key}={value!r} must be of type {names}")
    return value


def _optional(key: str, value: Any, kind: type) -> Any:
    return None if value is None else _typed(key, value, kind)


def _choice(key: str, value: Any, choices: tuple) -> Any:
    # 1 == True, and is not the same.
    if not isinstance(value, (str, bool)) or value not in choices:
        raise SettingsError(f"{key}={value!r} must be one of {', '.join(map(str, choices))}")
    return value


def _positive(key: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise SettingsError(f"{key}={value!r} must be an integer of at least {minimum}")
    if maximum is not None and value > maximum:
        raise SettingsError(f"{key}={value!r} must be at most {maximum}")
    return value


def _positive_or_auto(key: str, value: Any) -> int | None:
    if value == "auto":
        return None
    if isinstance(value, str):
        raise SettingsError(f"{key}={value!r} must be auto or an integer of at least 1")
    return _positive(key, value)


def _parse_path(key: str, value: Any) -> Path | None:
    if value is None:
        return None
    if value == "":
        raise SettingsError(f"{key} is an empty text: name a folder")
    return Path(_typed(key, value, (str, os.PathLike))).expanduser()


def _parse_text(key: str, value: Any) -> str | None:
    if value is None:
        return None
    _typed(key, value, str)
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError as error:
        raise SettingsError(f"{key}={value!r} is not a template: {error}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or not all(names):
        raise SettingsError(
            f"{key}={value!r} must name at least one item field in braces, "
            'such as "{movie_title} ({genre})"'
        )
    for _, name, spec, conversion in parts:
        if spec or conversion:
            raise SettingsError(
                f"{key}={value!r}: a field is its name in braces and no more, such as {{{name}}}"
            )
    return value


def _parse_endings(value: Any) -> tuple[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) != {"liked", "disliked"}:
        raise SettingsError(
            f"uip_endings={value!r} must have the two keys liked and disliked, "
            'such as {liked: " and loved it", disliked: " and hated it"}'
        )
    endings = tuple(_typed(f"uip_endings.{key}", value[key], str) for key in ("liked", "disliked"))
    if endings[0] == endings[1]:
        raise SettingsError(f"uip_endings: liked and disliked are both {endings[0]!r}")
    return endings


def _parse_half_life(key: str, value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    parsed = []
    for item in values:
        try:
            number = float(item)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(item, bool) or not number > 0:
            raise SettingsError(f"{key}={item!r} must be a positive number of events, or inf")
        parsed.append(number)
    if not parsed or len(set(parsed)) != len(parsed):
        raise SettingsError(f"{key}={value!r} must hold at least one half-life, each once")
    return tuple(parsed)


def _parse_texts(key: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    for item in values:
        _choice(key, item, PRIOR_SOURCES)
    if len(set(values)) != len(values):
        raise SettingsError(f"{key}={value!r} names a source twice")
    return tuple(values)


def _one_of(*choices: Any) -> Callable[[str, Any], Any]:
    return lambda key, value: _choice(key, value, choices)


def _parse_share(key: str, value: Any) -> float:
    number = float(_typed(key, value, (int, float)))
    if not 0 <= number < 1:
        raise SettingsError(f"{key}={number!r} must be at least 0 and below 1")
    return number


def _parse_tolerance(key: str, value: Any) -> float:
    number = float(_typed(key, value, (int, float)))
    if not 0 <= number < math.inf:
        raise SettingsError(f"{key}={number!r} must be at least 0")
    return number


def _parse_learning_rate(key: str, value: Any) -> float | None:
    if value in (None, "auto"):
        return None
    rate = float(_typed(key, value, (int, float)))
    if not 0 < rate < math.inf:
        raise SettingsError(f"{key}={rate!r} must be positive and finite, or auto")
    return rate


def _parse_snapshots(key: str, value: Any) -> tuple[int, ...]:
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(sorted({_positive(key, size) for size in sizes}))


def _parse_match(key: str, value: Any) -> MatchSettings | None:
    return None if value is None else _parse_section(MatchSettings, key, value)


# How each setting of a section is parsed, by its key and value.
_PARSERS: dict[type, dict[str, Callable[[str, Any], Any]]] = {
    MatchSettings: {
        "posterior": _one_of(*POSTERIORS),
        "rank": _positive,
        "bins": _positive,
        "half_life": _parse_half_life,
    },
    FacetSettings: {
        "source": _one_of(*SOURCES),
        "weight": _one_of(*WEIGHTS),
        "prompt": functools.partial(_typed, kind=str),
        "codes": functools.partial(_positive, minimum=0),
        "rank": _positive,
        "directions": _one_of(*DIRECTIONS),
        "levels": _positive,
        "half_life": _parse_half_life,
        "bins": _positive,
        "match": _parse_match,
        "texts": _parse_texts,
    },
    CodebookSettings: {
        "method": _one_of(*METHODS),
        "sample": _positive,
        "n_init": _positive,
        "max_iter": _positive,
        "tol": _parse_tolerance,
    },
    GradientSettings: {
        "e_step": _one_of("adam", "relinearize"),
        "steps": _positive,
        "behaviours": _positive,
        "batch": _positive,
        "learning_rate": _parse_learning_rate,
        "snapshots": _parse_snapshots,
        "rounds": _positive,
        "tol": _parse_share,
        "held_out": _parse_share,
        "space": _one_of("frame", "token"),
        "prior": _one_of("mixture", "none"),
        "recompute": _one_of(True, False),
    },
}


def _parse_section(kind: type, key: str, value: Any, **fixed: Any) -> Any:
    """Build the dataclass ``kind`` from a mapping of its fields, but those that are ``fixed``."""
    if not isinstance(value, Mapping):
        raise SettingsError(f"{key}={value!r} must be a mapping")
    parsers, parsed = _PARSERS[kind], dict(fixed)
    for name, item in value.items():
        path = f"{key}.{name}"
        if name not in parsers:
            raise SettingsError(f"unknown setting {path!r}{_nearest(str(name), tuple(parsers))}")
        parsed[name] = parsers[name](path, item)
    return kind(**parsed)


def _parse_gradient(value: Any) -> GradientSettings:
    key = "uip_gradient"
    gradient = _parse_section(GradientSettings, key, value)
    if gradient.e_step == "relinearize":
        for name in ("steps", "batch", "learning_rate", "prior"):
            if getattr(gradient, name) != getattr(GradientSettings, name):
                raise SettingsError(
                    f"{key}.{name}={getattr(gradient, name)!r} has no meaning with e_step: "
                    "relinearize, which takes no steps: drop it, or set e_step: adam"
                )
    return gradient


def _plain_gradient(gradient: GradientSettings) -> dict[str, Any]:
    plain = dataclasses.asdict(gradient)
    plain["snapshots"] = list(gradient.snapshots)
    plain["learning_rate"] = gradient.learning_rate or "auto"
    return plain


def _parse_facets(value: Any) -> tuple[FacetSettings, ...]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"uip_facets={value!r} must map facet names to their settings")
    facets = []
    for name, section in value.items():
        key = f"uip_facets.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise SettingsError(f"{key}: a facet's name is lower-case letters, digits and _")
        if "match" in name.split("_"):
            raise SettingsError(
                f"{key}: match in a facet's name is kept for match fields: choose another name"
            )
        section = {} if section is None else section
        facet = _parse_section(FacetSettings, key, section, name=name)
        if facet.source in PROMPTED_SOURCES and not facet.prompt:
            facet = dataclasses.replace(facet, prompt=name.replace("_", " "))
        if facet.source not in PROMPTED_SOURCES and facet.prompt:
            raise SettingsError(
                f"{key}.prompt={facet.prompt!r} has no meaning with source: {facet.source}"
            )
        if facet.source == "constant" and facet.weight != "contrast":
            raise SettingsError(
                f"{key}.weight={facet.weight} has no meaning with source: constant, by which every "
                "user's events would say the same: set weight: contrast"
            )
        if facet.source == "constant" and facet.directions == "fisher":
            raise SettingsError(
                f"{key}.directions=fisher has no meaning with source: constant, which has one "
                "direction: leave it out"
            )
        _check_is_read(key, facet)
        if facet.match and facet.weight != "contrast" and facet.match.posterior == "filter":
            raise SettingsError(
                f"{key}.match.posterior=filter needs weight: contrast, but weight is "
                f"{facet.weight}: set weight: contrast or posterior: sums"
            )
        if facet.texts and (facet.source != "collaborative" or not facet.has_filter):
            raise SettingsError(
                f"{key}.texts={list(facet.texts)} needs source: collaborative, weight: contrast "
                "and a match field by the filter, which is what weighs texts: set "
                "these, or leave texts out"
            )
        if facet.source != "constant" and facet.codes == 0 and facet.match is None:
            raise SettingsError(f"{key} has codes: 0 and no match, so it gives no field")
        facets.append(facet)
    return tuple(facets)


def _check_is_read(key: str, facet: FacetSettings) -> None:
    """Refuse settings that are meant for the match field, which has its own.

    A constant facet may have codes, so that an experiment can set those of all facets at once.
    """
    if facet.source == "constant":
        return
    unread = ["bins"] if facet.codes else ["bins", "half_life"]
    for name in unread:
        value = getattr(facet, name)
        if value != getattr(FacetSettings, name):
            raise SettingsError(
                f"{key}.{name}={value!r} has no meaning with source: {facet.source} and codes: "
                f"{facet.codes}: drop it, or set {key}.match.{name}"
            )


def _plain_facet(facet: FacetSettings) -> dict[str, Any]:
    plain = dataclasses.asdict(facet)
    del plain["name"]
    if facet.source not in PROMPTED_SOURCES:
        del plain["prompt"]
    if facet.source != "collaborative":
        del plain["texts"]
    for section in (plain, plain["match"] or {}):
        if "half_life" in section:
            # JSON has no infinity.
            section["half_life"] = [
                "inf" if math.isinf(value) else value for value in section["half_life"]
            ]
    return plain


def _parse_arms(
    value: Any, facets: tuple[FacetSettings, ...], user_id: str
) -> tuple[ArmSettings, ...]:
    names = tuple(facet.name for facet in facets)
    if value is None:
        plain = ArmSettings("plain")
        return (plain, ArmSettings("uip", names, user_id)) if names else (plain,)
    if not isinstance(value, Mapping) or not value:
        raise SettingsError(f"uip_arms={value!r} must map arm names to their settings")
    arms = []
    for name, section in value.items():
        key = f"uip_arms.{name}"
        if not str(name).strip() or "/" in str(name):
            raise SettingsError(f"{key}: an arm's name is part of file names, and has no /")
        section = {} if section is None else section
        if not isinstance(section, Mapping):
            raise SettingsError(f"{key}={section!r} must be a mapping, such as {{facets: all}}")
        section = dict(section)
        wanted = section.pop("facets", "all")
        wanted = () if wanted is None else wanted
        if not isinstance(wanted, (str, list, tuple)):
            raise SettingsError(f"{key}.facets={wanted!r} must be all, or a list of facets")
        if isinstance(wanted, str):
            wanted = names if wanted == "all" else (wanted,)
        wanted = tuple(map(str, wanted))
        # Without profiles there is nothing that could stand in for the user ID.
        default_id = user_id if wanted else "keep"
        chosen = {
            option: _choice(f"{key}.{option}", section.pop(option, default), choices)
            for option, default, choices in (
                ("user_id", default_id, ("keep", "drop")),
                ("control", "none", CONTROLS),
                ("values", "tokens", VALUES),
            )
        }
        if section:
            unknown = next(iter(section))
            raise SettingsError(
                f"unknown setting {f'{key}.{unknown}'!r}"
                f"{_nearest(str(unknown), ('facets', *chosen))}"
            )
        for facet in wanted:
            if facet not in names:
                raise SettingsError(f"{key}.facets: no facet {facet!r}{_nearest(facet, names)}")
        if chosen["control"] != "none" and chosen["values"] == "means":
            raise SettingsError(
                f"{key}: control={chosen['control']} replaces tokens, and values=means has none: "
                "set one of the two"
            )
        arms.append(ArmSettings(str(name), wanted, **chosen))
    return tuple(arms)

"""What is fitted: kernels, codebooks and the item catalogue, without any user."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recbole_uip import __version__
from recbole_uip import profiles as profile_stage
from recbole_uip.bank.store import BankError
from recbole_uip.bank.tokens import token_array
from recbole_uip.behaviours import folds_of
from recbole_uip.em.encoder import Encoder
from recbole_uip.em.facet import Facet
from recbole_uip.em.kernels import Kernels
from recbole_uip.profiles import TEXT_DIRECTIONS, Profiles
from recbole_uip.settings import TEXT_SOURCES, UIPSettings
from recbole_uip.texts import bag_of_words

__all__ = ["NO_ITEM", "UNKNOWN_ITEM", "ProfileModel"]

#: Item number of every item that is not in the catalogue: no vector, and the like rate of all.
UNKNOWN_ITEM = 0
#: Token of that number, where there is no other.
NO_ITEM = "[PAD]"
# What the names of tables for new items begin with.
_OF_TEXTS = (*(f"{source}_" for source in TEXT_SOURCES), "texts_")
# Timestamps since 1970 are further apart than this factor only if their units (s, ms) differ;
# a smaller number than that is no such timestamp, in whatever unit.
UNIT_FACTOR = 100
SINCE_1970 = 1e8


def _check_token(item: str) -> None:
    if not isinstance(item, str):
        raise BankError(f"item {item!r} is no string: give strings")


@dataclasses.dataclass
class ProfileModel:
    """Fitted facets over a catalogue of items.

    Attributes
    ----------
    encoder : Encoder
    items : list of str
        Token of each item number; the first stands for items that are not in the catalogue.
    settings : UIPSettings
        What the facets were fitted with. Like rates may differ by all ``user_folds`` folds of
        users, item vectors by fewer (n_vector_folds).
    implicit : bool
        Whether events have no labels.
    lm_fingerprint : str or None
        Of the LM, where a facet has its vectors from it.
    tables : dict of str to ndarray
        For new items: ``lm_mean`` (d,), ``lm_theta0`` (n_facets, width) and, for each facet of
        the LM, ``lm_map.<facet>`` (n_vector_folds, d, rank), from raw scores to item vectors. In
        the same way ``embedding_mean`` and ``embedding_map.<facet>``, and those of ``prefix`` and
        ``words``; and ``words_vocabulary``, UTF-8, a line for each word. Of a collaborative facet
        that knows texts, what these sources say adds up with ``texts_offset.<facet>``
        (n_vector_folds, rank).
    fit : str
        Content hash of what was fitted first. New items and refits keep it, and with it the
        meaning of codes: a model that was trained with codes of one fit cannot read another's.
    times : tuple of two float, optional
        First and last time of the events that were fitted, which tell their unit; None where they
        have none. No later event changes them, so that none can make others be refused.
    """

    encoder: Encoder
    items: list[str]
    settings: UIPSettings
    implicit: bool
    lm_fingerprint: str | None
    tables: dict[str, np.ndarray]
    fit: str
    times: tuple[float, float] | None = None

    @classmethod
    def from_profiles(
        cls,
        profiles: Profiles,
        items: Sequence[str],
        settings: UIPSettings,
        implicit: bool,
        time: np.ndarray | None = None,
    ) -> ProfileModel:
        """The model behind inferred profiles.

        Parameters
        ----------
        profiles : Profiles
        items : sequence of str, length n_items
            Item tokens; the first is no item ([PAD]).
        settings : UIPSettings
        implicit : bool
        time : ndarray of float64, shape (n_events,), optional
            Times of the events, where they have them.
        """
        tables, fingerprint = {}, None
        for source, about in profiles.texts.items():
            directions = about.whitening.directions()
            tables[f"{source}_mean"] = about.whitening.mean
            if about.theta0 is not None:
                tables[f"{source}_theta0"] = about.theta0
            if about.vocabulary:
                lines = "\n".join(about.vocabulary).encode()
                tables[f"{source}_vocabulary"] = np.frombuffer(lines, np.uint8)
            for name, facet in profiles.facets.items():
                if source in facet.settings.text_sources:
                    maps = [directions @ each for each in _of_whitened(source, facet, profiles)]
                    tables[f"{source}_map.{name}"] = np.stack(maps).astype(np.float32)
            # Scores and embeddings are of the same LM.
            fingerprint = about.fingerprint or fingerprint
        for name, text_priors in profiles.text_priors.items():
            facet = profiles.facets[name]
            offsets = np.zeros((len(text_priors), facet.vectors_.shape[2]), np.float32)
            for fold, text_prior in enumerate(text_priors):
                turned = text_prior.intercept @ facet.basis_.directions[fold]
                offsets[fold, : len(turned)] = turned
            tables[f"texts_offset.{name}"] = offsets
        digest = hashlib.sha256(json.dumps(settings.to_dict(), sort_keys=True).encode())
        for name, array in sorted({**profiles.encoder.arrays(), **tables}.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return cls(
            encoder=profiles.encoder,
            items=[str(item) for item in items],
            settings=settings,
            implicit=implicit,
            lm_fingerprint=fingerprint,
            tables=tables,
            fit=digest.hexdigest(),
            times=None if time is None else (float(time.min()), float(time.max())),
        )

    @classmethod
    def from_parts(
        cls, metadata: Mapping[str, Any], tables: Mapping[str, np.ndarray], items: pa.Table
    ) -> ProfileModel:
        """The model that :meth:`metadata`, :meth:`all_tables` and :meth:`item_table` describe."""
        try:
            times = metadata["times"]
            return cls(
                encoder=Encoder.from_arrays(tables, metadata["encoder"]),
                items=items["item"].to_pylist(),
                settings=UIPSettings.from_dict(metadata["settings"]),
                implicit=metadata["implicit"],
                lm_fingerprint=metadata["lm_fingerprint"],
                tables={name: tables[name] for name in tables if name.startswith(_OF_TEXTS)},
                fit=metadata["fit"],
                times=times and tuple(times),
            )
        except (KeyError, TypeError) as error:
            raise BankError(
                f"the bank does not say {error}, which every bank of this version says: it was "
                "written by another version; build it again"
            ) from error

    def metadata(self) -> dict[str, Any]:
        """What is no array, as JSON can hold it."""
        return {
            "version": __version__,
            "encoder": self.encoder.description(),
            "settings": self.settings.to_dict(),
            "implicit": self.implicit,
            "lm_fingerprint": self.lm_fingerprint,
            "fit": self.fit,
            "times": self.times and list(self.times),
            "prompt_fingerprint": self.prompt_fingerprint,
        }

    @property
    def prompt_fingerprint(self) -> str | None:
        """SHA-256 of the facets' names in the prompt and the endings; None without a prompt."""
        prefix = [facet.prompt for facet in self.settings.prefix_facets]
        if self.lm_fingerprint is None or not (self.settings.prompts or prefix):
            return None
        content = json.dumps([self.settings.prompts, self.endings, *prefix])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def endings(self) -> tuple[str, str] | None:
        """Feedback endings, where there is feedback."""
        return None if self.implicit else self.settings.endings

    def all_tables(self) -> dict[str, np.ndarray]:
        """Every array, by name."""
        return {**self.encoder.arrays(), **self.tables}

    def item_table(self) -> pa.Table:
        """The catalogue: item tokens in the order of their numbers."""
        return pa.table({"item": pa.array(self.items, pa.string())})

    @property
    def kernels(self) -> Kernels:
        """Kernels of the state, as compiled code reads them."""
        return self.encoder.kernels

    @property
    def profile_names(self) -> tuple[str, ...]:
        """Names of the fields that a look-up gives."""
        return tuple(field.name for field in self.encoder.fields if field.kind != "match")

    @property
    def match_names(self) -> tuple[str, ...]:
        """Names of the fields that a match with an item gives."""
        return tuple(field.name for field in self.encoder.fields if field.kind == "match")

    @functools.cached_property
    def _number_of(self) -> dict[str, int]:
        return {item: number for number, item in enumerate(self.items) if number != UNKNOWN_ITEM}

    def folds_of(self, users: Iterable[str]) -> np.ndarray:
        """Fold of each user by its token, shape (n,), int64."""
        return folds_of(users, self.settings.user_folds, self.settings.seed)

    def check_time(self, time: float, of: str = "") -> None:
        """Refuse a time in another unit than that of the fitted events, such as milliseconds.

        Parameters
        ----------
        time : float
        of : str
            Whose time it is, for the message.

        Raises
        ------
        BankError
            If the fitted events have timestamps, and this one is far before or after them all.
        """
        if self.times is None:
            return
        first, last = self.times
        if last > SINCE_1970 and not min(first, last / UNIT_FACTOR) <= time <= last * UNIT_FACTOR:
            raise BankError(
                f"time={time}{of} is not in the unit of the events that were fitted, whose times "
                f"are from {first} to {last}: give times in that unit, such as seconds since 1970"
            )

    def check_times(self, time: np.ndarray, of: str = "") -> None:
        """As :meth:`check_time` of each of many rows; ``of`` says of what they are rows."""
        # The outermost stand for all.
        for row in (time.argmin(), time.argmax()) if len(time) else ():
            self.check_time(float(time[row]), f" in row {row}{of}")

    def number(self, item: str) -> int:
        """Item number of a token; :data:`UNKNOWN_ITEM` if the catalogue lacks it.

        Raises
        ------
        BankError
            If it is no string.
        """
        _check_token(item)
        return self._number_of.get(item, UNKNOWN_ITEM)

    def numbers(self, items: Sequence[str]) -> np.ndarray:
        """Item numbers of tokens, shape (n,), int64; see :meth:`number`."""
        found = map(self._number_of.get, items, itertools.repeat(UNKNOWN_ITEM))
        try:
            numbers = np.fromiter(found, dtype=np.int64, count=len(items))
        except TypeError:  # one has no hash
            numbers = None
        if numbers is None or not numbers.all():
            for item in items:
                _check_token(item)
        return numbers

    def with_items(self, items: Sequence[str], texts: Sequence[str | None]) -> ProfileModel:
        """A model with more items: the LM sees their texts, and theirs alone.

        An item's vector is zero where nothing is known of it: in collaborative facets that know
        no texts, and without a text. Its like rate is the overall one.

        Parameters
        ----------
        items : sequence of n str
        texts : sequence of n str or None

        Raises
        ------
        BankError
            If an item is in the catalogue already, or no string, or empty, there are not as many
            texts as items, or the LM is not the one that the catalogue was scored with.
        """
        items = token_array(items, "item").to_pylist()
        if "" in items:
            raise BankError(f"item in row {items.index('')} is empty: leave that row out")
        if len(texts) != len(items):
            raise BankError(
                f"{len(items)} items have {len(texts)} texts: give one for each, None for no text"
            )
        for item, text in zip(items, texts, strict=True):
            if not (text is None or isinstance(text, str)):
                raise BankError(f"the text of item {item!r} is {text!r}: give text, or None")
        known = set(self.items)
        for item in items:
            if item in known:
                raise BankError(
                    f"item {item!r} is in the catalogue already: leave it out, or build the bank "
                    "again if its text has changed"
                )
            known.add(item)
        vectors = {
            facet: np.zeros((table.shape[0], len(items), table.shape[2]), np.float32)
            for facet in dict.fromkeys(self.encoder.facets)
            for table in [self.encoder.vectors(facet)]
        }
        for facet in self.settings.facets:
            if facet.source == "constant":
                vectors[facet.name][:] = self.encoder.vectors(facet.name)[:, :1]
        rows = [row for row, text in enumerate(texts) if text and text.strip()]
        for source in TEXT_SOURCES:
            facets = [facet.name for facet in self.settings.facets if source in facet.text_sources]
            if facets and rows:
                raw = self._raw_vectors(source, [texts[row] for row in rows])
                centred = raw - self.tables[f"{source}_mean"]
                for name in facets:
                    vectors[name][:, rows] += centred @ self.tables[f"{source}_map.{name}"]
        for facet in self.settings.facets:
            if facet.texts:
                offset = self.tables[f"texts_offset.{facet.name}"]
                vectors[facet.name][:, rows] += offset[:, None]
        rate = np.repeat(self.kernels.rate[:, [UNKNOWN_ITEM]], len(items), axis=1)
        return dataclasses.replace(
            self, encoder=self.encoder.with_items(vectors, rate), items=[*self.items, *items]
        )

    def _raw_vectors(self, source: str, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts before whitening, shape (n, d)."""
        if source == "words":
            lines = self.tables["words_vocabulary"].tobytes().decode()
            return bag_of_words(texts, lines.split("\n"))[0]
        vectors, scored = profile_stage.lm_vectors(source, texts, self.implicit, self.settings)
        if scored.fingerprint != self.lm_fingerprint:
            raise BankError(
                f"uip_lm={self.settings.lm.name!r} is not the LM that scored this bank's catalogue "
                f"(fingerprint {scored.fingerprint[:12]}, not {self.lm_fingerprint[:12]}): use the "
                "same LM, or build the bank again"
            )
        return vectors


def _of_whitened(source: str, facet: Facet, profiles: Profiles) -> list[np.ndarray]:
    """For each fold the map from whitened text vectors to item vectors, shape (m, rank)."""
    if facet.settings.source == source:
        return list(facet.basis_.directions)
    width = profiles.texts[source].whitening.vectors.shape[1]
    read = min(width, TEXT_DIRECTIONS)
    # Where the source's directions begin among those that vectors are read from, and where its
    # own basis begins beside the collaborative one.
    first, column = 0, facet.basis_.vectors.shape[1]
    for other in facet.settings.texts[: facet.settings.texts.index(source)]:
        first += min(profiles.texts[other].whitening.vectors.shape[1], TEXT_DIRECTIONS)
        column += facet.text_bases_[other].vectors.shape[1]
    own = facet.text_bases_[source].directions
    maps = []
    for fold, text_prior in enumerate(profiles.text_priors[facet.settings.name]):
        turned = np.zeros((width, facet.vectors_.shape[2]))
        slope = text_prior.slope[first : first + read] @ facet.basis_.directions[fold]
        turned[:read, : slope.shape[1]] = slope
        turned[:, column : column + own[fold].shape[1]] = own[fold]
        maps.append(turned)
    return maps

"""Fitted facets as one state a user: what an event adds to it, and the tokens it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import joblib
import numpy as np

from recbole_uip.em import kernels as em_kernels
from recbole_uip.em.facet import FieldRecipe
from recbole_uip.em.kernels import CODE, VALUE, Fields, Kernels, encode, encode_matches
from recbole_uip.em.states import Events, History, iter_states

__all__ = ["Encoder", "FieldInfo"]

ROWS_A_THREAD = 10_000  # fewer rows are not worth a second thread


@dataclass(frozen=True)
class FieldInfo:
    """One token field.

    Attributes
    ----------
    name : str
        Field name, such as ``uip_interests`` or ``uip_taste_match_20``.
    facet : str
        The facet it belongs to.
    kind : {"code", "bin", "match"}
        A code of the user, a bin of the user, or a bin of the user and an item.
    size : int
        Number of tokens, [PAD] (0) not counted.
    """

    name: str
    facet: str
    kind: str
    size: int


@dataclass
class Encoder:
    """All kernels and fields of fitted facets, packed for compiled code.

    Attributes
    ----------
    fields : tuple of FieldInfo
        All fields, facet by facet.
    facets : tuple of str
        Facet of each kernel.
    kernels : Kernels
    profile_fields, match_fields : Fields
        Fields of the user alone, and of the user and an item.
    """

    fields: tuple[FieldInfo, ...]
    facets: tuple[str, ...]
    kernels: Kernels
    profile_fields: Fields
    match_fields: Fields

    @classmethod
    def from_recipes(
        cls, recipes: Mapping[str, Sequence[FieldRecipe]], rate: np.ndarray
    ) -> Encoder:
        """Pack the fields of each facet, by its name.

        Parameters
        ----------
        recipes : mapping of str to sequence of FieldRecipe
        rate : ndarray of float64, shape (n_items,) or (n_rate_folds, n_items)
            Smoothed like rates; zeros without labels.
        """
        every = [(facet, recipe) for facet, each in recipes.items() for recipe in each]
        numbered = [(k, recipe) for k, (_, recipe) in enumerate(every)]
        return cls(
            fields=tuple(
                FieldInfo(name, facet, recipe.kind, recipe.tokens)
                for facet, recipe in every
                for name in recipe.names
            ),
            facets=tuple(facet for facet, _ in every),
            kernels=em_kernels.pack([recipe.kernel for _, recipe in every], rate),
            profile_fields=_pack([pair for pair in numbered if pair[1].kind != "match"]),
            match_fields=_pack([pair for pair in numbered if pair[1].kind == "match"]),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], description: Mapping) -> Encoder:
        """The encoder that :meth:`arrays` and :meth:`description` came from."""

        def part(kind: type, prefix: str) -> Kernels | Fields:
            return kind(**{name: arrays[f"{prefix}.{name}"] for name in kind._fields})

        return cls(
            tuple(FieldInfo(**field) for field in description["fields"]),
            tuple(description["facets"]),
            part(Kernels, "kernels"),
            part(Fields, "profile_fields"),
            part(Fields, "match_fields"),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All numbers, by name."""
        return {
            f"{prefix}.{name}": values
            for prefix in ("kernels", "profile_fields", "match_fields")
            for name, values in getattr(self, prefix)._asdict().items()
        }

    def description(self) -> dict:
        """All the rest, as JSON can hold it."""
        fields = [dataclasses.asdict(field) for field in self.fields]
        return {"fields": fields, "facets": list(self.facets)}

    def vectors(self, facet: str) -> np.ndarray:
        """Item vectors of a facet, shape (n_folds or 1, n_items, rank); a view."""
        kernels, k = self.kernels, self.facets.index(facet)
        shape = self._table_shape(k)
        first = kernels.table[k]
        return kernels.vectors[first : first + np.prod(shape)].reshape(shape)

    def with_items(self, vectors: Mapping[str, np.ndarray], rate: np.ndarray) -> Encoder:
        """An encoder with more items, after those it has.

        Parameters
        ----------
        vectors : mapping of str to ndarray, each of shape (n_folds or 1, n_new, rank)
            Vectors of the new items, by facet.
        rate : ndarray of float64, shape (n_rate_folds or 1, n_new)
            Their like rates.
        """
        kernels, tables, places, size = self.kernels, [], {}, 0
        for facet in dict.fromkeys(self.facets):
            table = np.concatenate([self.vectors(facet), vectors[facet]], axis=1)
            tables.append(table.astype(np.float32).reshape(-1))
            places[facet] = size
            size += table.size
        rate = np.concatenate([kernels.rate, rate], axis=1)
        return dataclasses.replace(
            self,
            kernels=kernels._replace(
                table=np.array([places[facet] for facet in self.facets], dtype=np.int64),
                vectors=np.concatenate([*tables, np.empty(0, np.float32)]),
                rate=rate,
                intercept=em_kernels.intercepts(rate),
            ),
        )

    def with_rate(self, rate: np.ndarray) -> Encoder:
        """An encoder with other like rates, shape (n_items,) or (n_rate_folds, n_items)."""
        rate = np.atleast_2d(rate)
        kernels = self.kernels._replace(rate=rate, intercept=em_kernels.intercepts(rate))
        return dataclasses.replace(self, kernels=kernels)

    def _table_shape(self, k: int) -> tuple[int, int, int]:
        kernels = self.kernels
        n_items, stride = kernels.rate.shape[1], int(kernels.stride[k])
        if not kernels.folded[k]:
            return 1, n_items, stride
        return int(kernels.n_folds[0]), n_items, stride

    @property
    def profile_columns(self) -> list[int]:
        """Where the columns of ``profile_fields`` stand among all fields."""
        return [c for c, field in enumerate(self.fields) if field.kind != "match"]

    @property
    def match_columns(self) -> list[int]:
        """Where the columns of ``match_fields`` stand among all fields."""
        return [c for c, field in enumerate(self.fields) if field.kind == "match"]

    def transform(self, history: History, events: Events) -> np.ndarray:
        """Tokens of all fields, each row's from what the row may see.

        Parameters
        ----------
        history : History
        events : Events

        Returns
        -------
        ndarray of int32, shape (n_rows, n_fields)
        """
        n_rows = len(history.timeline)
        tokens = np.empty((n_rows, len(self.fields)), dtype=np.int32)

        def fill(rows: np.ndarray) -> None:
            for at, states in iter_states(self.kernels, history, events, rows):
                block = rows[at]
                tokens[block] = self.tokens(
                    states, history.seen[block], events.item[block], events.fold[block]
                )

        # Users are independent of one another, and the compiled code lets go of the interpreter.
        workers = joblib.cpu_count() if n_rows > ROWS_A_THREAD else 1
        by_timeline = np.argsort(history.timeline, kind="stable")
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, np.array_split(by_timeline, workers)))
        return tokens

    def tokens(
        self, states: np.ndarray, seen: np.ndarray, items: np.ndarray, folds: np.ndarray
    ) -> np.ndarray:
        """Tokens of all fields of each state with one item, shape (n, n_fields), int32."""
        tokens = np.empty((len(states), len(self.fields)), dtype=np.int32)
        tokens[:, self.profile_columns] = self.profiles(states, seen)
        tokens[:, self.match_columns] = self.matches(states, seen, items, folds)
        return tokens

    def means(self, history: History, events: Events) -> dict[str, np.ndarray]:
        """What all rows' fields are before they are quantised.

        A code field has the posterior mean deviation from the average user, before the first of
        its levels; a bin or match field the value that is binned.

        Parameters
        ----------
        history : History
        events : Events

        Returns
        -------
        dict of str to ndarray of float32, shape (n_rows, rank) or (n_rows, 1)
            By field name; zeros for rows without history.
        """
        readers = [
            (self.fields[columns[fields.column[f]]], fields.kind[f], fields.kernel[f])
            for fields, columns in (
                (self.profile_fields, self.profile_columns),
                (self.match_fields, self.match_columns),
            )
            for f in range(len(fields.kernel))
        ]
        n_rows = len(history.timeline)
        means = {
            field.name: np.zeros(
                (n_rows, self.kernels.rank[k] if kind == CODE else 1), dtype=np.float32
            )
            for field, kind, k in readers
        }
        for at, states in iter_states(self.kernels, history, events):
            known = history.seen[at] > 0
            if not known.any():
                continue
            rows, states = at[known], states[known]
            for field, kind, k in readers:
                if kind == CODE:
                    values = em_kernels.posterior_means(states, self.kernels, k)
                else:
                    item, fold = events.item[rows], events.fold[rows]
                    values = em_kernels.profile_values(states, self.kernels, k, item, fold)
                means[field.name][rows] = values.reshape(len(rows), -1)
        return means

    def match(
        self, history: History, events: Events, rows: np.ndarray, items: np.ndarray
    ) -> np.ndarray:
        """Match tokens of the profiles that ``rows`` may see with other ``items``.

        Parameters
        ----------
        history : History
        events : Events
        rows, items : ndarray of int64, shape (n,)

        Returns
        -------
        ndarray of int32, shape (n, n_match_fields)
        """
        tokens = np.empty((len(rows), len(self.match_columns)), dtype=np.int32)
        for at, states in iter_states(self.kernels, history, events, rows):
            block = rows[at]
            tokens[at] = self.matches(states, history.seen[block], items[at], events.fold[block])
        return tokens

    def profiles(self, states: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Tokens of the users' own fields, shape (n, n_profile_fields)."""
        out = np.empty((len(states), len(self.profile_columns)), dtype=np.int32)
        encode(states, seen, self.kernels, self.profile_fields, out)
        return out

    def matches(
        self, states: np.ndarray, seen: np.ndarray, items: np.ndarray, folds: np.ndarray
    ) -> np.ndarray:
        """Tokens of the match fields of each state with one item, shape (n, n_match_fields)."""
        out = np.empty((len(states), len(self.match_columns)), dtype=np.int32)
        if out.size:
            encode_matches(states, seen, self.kernels, self.match_fields, items, folds, out)
        return out


def _pack(recipes: Sequence[tuple[int, FieldRecipe]]) -> Fields:
    """Fields of (kernel number, recipe) pairs."""

    def integers(values) -> np.ndarray:
        return np.array(list(values), dtype=np.int64)

    numbers = [recipe.numbers for _, recipe in recipes]
    return Fields(
        kernel=integers(k for k, _ in recipes),
        kind=integers(CODE if recipe.kind == "code" else VALUE for _, recipe in recipes),
        column=np.cumsum([0, *(len(recipe.names) for _, recipe in recipes)], dtype=np.int64),
        size=integers(recipe.size for _, recipe in recipes),
        first=np.cumsum([0, *(len(part) for part in numbers)], dtype=np.int64)[:-1],
        numbers=np.concatenate([*numbers, np.empty(0)]),
        unknown=integers(token for _, recipe in recipes for token in recipe.unknown),
    )

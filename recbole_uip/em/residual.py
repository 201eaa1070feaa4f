"""Residual quantisation: a profile as a sum of codewords, one of each level."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone

from recbole_uip.em.codebook import Codebook, check_samples
from recbole_uip.em.kernels import nearest_codes
from recbole_uip.em.mixture import CodebookMixture
from recbole_uip.em.quantizers import QUANTIZERS
from recbole_uip.settings import CodebookSettings, FacetSettings

__all__ = ["CODEBOOKS", "ResidualCodebook"]

#: The class of each ``uip_codebook.method``.
CODEBOOKS: dict[str, type[Codebook]] = {"em": CodebookMixture, **QUANTIZERS}


class ResidualCodebook(BaseEstimator):
    """Levels of codebooks, each of what the one before left: the next one quantises y - e_z.

    Parameters
    ----------
    codebook : Codebook
        What each level is a copy of, before it is fitted.
    levels : int

    Attributes
    ----------
    levels_ : list of Codebook
    """

    def __init__(self, codebook: Codebook, levels: int = 1) -> None:
        self.codebook = codebook
        self.levels = levels

    @classmethod
    def from_settings(
        cls, facet: FacetSettings, codebook: CodebookSettings, seed: int
    ) -> ResidualCodebook:
        """As ``uip_facets`` and ``uip_codebook`` say, to be fitted."""
        parameters = dataclasses.asdict(codebook)
        del parameters["sample"]
        kind = CODEBOOKS[parameters.pop("method")]
        return cls(kind(facet.codes, random_state=seed, **parameters), facet.levels)

    def fit(
        self, offsets: np.ndarray, noise: np.ndarray, start: Sequence[np.ndarray] | None = None
    ) -> ResidualCodebook:
        """Fit the levels in turn; see :meth:`Codebook.fit`.

        Parameters
        ----------
        offsets, noise
        start : sequence of ndarray, optional
            :attr:`Codebook.packed` of each level of a fitted codebook to start from, where the
            method can.
        """
        self.levels_ = []
        residual = np.asarray(offsets, dtype=np.float64)
        for number in range(self.levels):
            level = clone(self.codebook)
            if start is not None:
                level.set_params(start=start[number])
            self.levels_.append(level.fit(residual, noise))
            residual = residual - level.codewords_[level.predict(residual, noise)]
        return self

    def predict(self, offsets: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Codes of every level, shape (n, levels)."""
        samples = check_samples(offsets, noise)
        return nearest_codes(*samples, self.packed, self.codebook.n_codes, self.levels)

    @property
    def packed(self) -> np.ndarray:
        """The levels' :attr:`Codebook.packed`, one after another."""
        return np.concatenate([level.packed for level in self.levels_])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Sum of the levels' codewords, shape (n, r)."""
        return sum(level.codewords_[codes[:, i]] for i, level in enumerate(self.levels_))

    def report(self) -> list[dict[str, Any]]:
        """Diagnostics of each level's fit, as plain values."""
        return [
            {
                "converged": level.converged_,
                "iterations": level.n_iter_,
                "lower_bound": round(level.lower_bound_, 5),
                "lower_bounds": np.round(level.lower_bounds_, 5).tolist(),
                "perplexity": round(level.perplexity_, 2),
                "usage": np.round(level.usage_, 5).tolist(),
                "reseeded": len(level.reseeded_),
            }
            for level in self.levels_
        ]

    def prior_codes(self) -> np.ndarray:
        """The prior's mode at every level, shape (levels,)."""
        return np.array([int(np.argmax(level.weights_)) for level in self.levels_])

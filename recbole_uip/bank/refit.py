"""New codebooks of a bank, whose codes keep the numbers of the nearest old ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import scipy.optimize
import scipy.spatial.distance

from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import BankError
from recbole_uip.em.codebook import unpack
from recbole_uip.em.residual import CODEBOOKS, ResidualCodebook
from recbole_uip.em.states import offsets

__all__ = ["RefitReport", "refit_field"]


@dataclass(frozen=True)
class RefitReport:
    """What a new codebook changed.

    Attributes
    ----------
    moved : dict of str to float
        Share of users whose code changed, by field.
    users : pyarrow.Table
        Columns user, field, old, new: one row for each code that changed.
    """

    moved: dict[str, float]
    users: pa.Table


def refit_field(
    model: ProfileModel, f: int, states: np.ndarray, numbers: np.ndarray, sample: int
) -> ResidualCodebook | None:
    """Fit the codebook of code field ``f`` on users' states; write it into ``numbers``.

    New codewords are matched with the old ones so that their total squared distance is least
    (Hungarian algorithm).

    Parameters
    ----------
    model : ProfileModel
    f : int
        Among the encoder's ``profile_fields``.
    states : ndarray of float32, shape (n_users, width)
    numbers : ndarray of float64
        Of all fields, as in :class:`~recbole_uip.em.kernels.Fields`; written in place.
    sample : int
        Number of users to fit on, at most.

    Returns
    -------
    ResidualCodebook or None
        None where the field has no codes.

    Raises
    ------
    BankError
        If fewer users than codes have evidence.
    """
    kernels, fields, settings = model.kernels, model.encoder.profile_fields, model.settings
    k, n_codes = fields.kernel[f], int(fields.size[f])
    if n_codes == 0:
        return None
    levels = int(fields.column[f + 1] - fields.column[f])
    rank = int(kernels.rank[k])
    offset, noise, known = offsets(states[:, kernels.start[k] : kernels.start[k + 1]])
    name = model.profile_names[fields.column[f]]
    if known.sum() < n_codes:
        raise BankError(
            f"{known.sum()} users have evidence for {name}, fewer than its {n_codes} codes: refit "
            "when there are more"
        )
    if sample < n_codes:
        raise BankError(
            f"sample={sample} is fewer users than {name} has codes ({n_codes}): raise it"
        )
    chosen = np.random.default_rng(settings.seed).permutation(np.flatnonzero(known))[:sample]
    size, first = n_codes * (rank + 1) + rank, int(fields.first[f])
    old = numbers[first : first + levels * size].copy()
    one_level = CODEBOOKS[settings.codebook.method](
        n_codes,
        max_iter=settings.codebook.max_iter,
        tol=settings.codebook.tol,
        random_state=settings.seed,
    )
    codebook = ResidualCodebook(one_level, levels)
    codebook.fit(offset[chosen], noise[chosen], start=np.split(old, levels))
    for before, level in zip(unpack(old, n_codes, rank), codebook.levels_, strict=True):
        distance = scipy.spatial.distance.cdist(before.codewords, level.codewords_, "sqeuclidean")
        _, order = scipy.optimize.linear_sum_assignment(distance)
        level.reorder(order)
    numbers[first : first + levels * size] = codebook.packed
    return codebook

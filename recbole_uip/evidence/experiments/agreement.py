"""How far the codes of two seeds say the same: the adjusted Rand index."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import adjusted_rand_score

from recbole_uip.evidence.experiments.outcomes import CaseOutcome

__all__ = ["Agreement", "seed_agreement"]

# RecBole's padding token.
NO_CODE = 0


@dataclass(frozen=True)
class Agreement:
    """Adjusted Rand indices of a code field over pairs of seeds.

    Attributes
    ----------
    field : str
    indices : ndarray of float, shape (n_pairs,)
        1 where two seeds part the rows alike, 0 as for codes drawn at random.
    """

    field: str
    indices: np.ndarray


def seed_agreement(case: CaseOutcome) -> list[Agreement]:
    """Agreement of every two seeds on the test rows, by code field.

    Rows to which a seed gives no code (those without history) are left out: they would agree by
    themselves. Seeds with other rows, as under a random split, cannot be compared; a field that
    no two seeds kept tokens of is left out.
    """
    kept = []
    for _, run in sorted(case.runs.items()):
        if tokens := run.test_tokens():
            rows = run.test_rows()
            kept.append((np.stack([rows["row"], rows["item"]]), tokens))
    found: dict[str, list[float]] = {}
    for (rows_a, of_a), (rows_b, of_b) in itertools.combinations(kept, 2):
        if np.array_equal(rows_a, rows_b):
            for name in of_a.keys() & of_b.keys():
                coded = (of_a[name] != NO_CODE) & (of_b[name] != NO_CODE)
                if coded.any():
                    index = adjusted_rand_score(of_a[name][coded], of_b[name][coded])
                    found.setdefault(name, []).append(index)
    # In the order in which the runs keep them.
    names = dict.fromkeys(name for _, tokens in kept for name in tokens)
    return [Agreement(name, np.array(found[name])) for name in names if name in found]

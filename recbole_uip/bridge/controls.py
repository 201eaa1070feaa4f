"""What stands in the place of a profile's tokens, to see what the profile itself is worth."""

from __future__ import annotations

import numpy as np

from recbole_uip.behaviours import Behaviours
from recbole_uip.profiles import ProfileField, Profiles

__all__ = ["float_fields", "random_tokens", "shuffled_tokens"]


def random_tokens(field: ProfileField, behaviours: Behaviours, seed: int) -> np.ndarray:
    """Tokens drawn at random: a user's own for codes and bins, a row's own for matches.

    They have the field's number of tokens, and [PAD] where the field has it, so a model meets the
    same tables and the same users without history.

    Returns
    -------
    ndarray of int32, shape (n_rows,)
    """
    # Each field its own draw, whichever others are drawn beside it.
    generator = np.random.default_rng([seed, *field.name.encode()])
    if field.size == 0:  # nobody has a history
        return np.zeros(len(behaviours), dtype=np.int32)
    if field.kind == "match":
        drawn = generator.integers(1, field.size + 1, len(behaviours))
    else:
        drawn = generator.integers(1, field.size + 1, behaviours.n_users)[behaviours.user]
    return np.where(field.values == 0, 0, drawn).astype(np.int32)


def shuffled_tokens(field: ProfileField, behaviours: Behaviours, seed: int) -> np.ndarray:
    """Another user's tokens, at the same place in that user's history.

    Users are paired with users of about as many rows, and a user's n-th row has the other's n-th
    tokens (the last ones where the other has fewer). So tokens keep their distribution, and how
    they settle as a history grows, but say nothing of whom they stand beside.

    Returns
    -------
    ndarray of int32, shape (n_rows,)
    """
    order = behaviours.in_time_order(np.ones(len(behaviours), dtype=bool))
    count = np.bincount(behaviours.user, minlength=behaviours.n_users)
    first = np.cumsum(count) - count
    position = np.empty(len(behaviours), dtype=np.int64)
    position[order] = np.arange(len(behaviours)) - first[behaviours.user[order]]
    other = _partners(count, seed)[behaviours.user]
    source = first[other] + np.minimum(position, count[other] - 1)
    return field.values[order[source]]


def _partners(count: np.ndarray, seed: int) -> np.ndarray:
    """Another user for each one with rows, from among those with about as many, shape (n_users,).

    Users stand in a circle by number of rows, ties at random, and each takes the next: nobody has
    itself, and everybody is somebody's. (So the user of most rows takes that of fewest.)
    """
    generator = np.random.default_rng(seed)
    users = np.flatnonzero(count)
    users = users[np.lexsort((generator.random(len(users)), count[users]))]
    partners = np.arange(len(count))
    partners[users] = np.roll(users, -1)
    return partners


def float_fields(
    profiles: Profiles, behaviours: Behaviours, facets: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Posterior means as one float field a direction, of unit variance over training rows.

    Returns
    -------
    dict of str to ndarray of float32, shape (n_rows,)
    """
    means = profiles.means()
    columns = {}
    for field in profiles.fields:
        # Further levels quantise what the first left of the same means.
        if field.facet not in facets or field.name not in means:
            continue
        for number, column in enumerate(means[field.name].T, start=1):
            spread = column[behaviours.train].std()
            name = field.name if means[field.name].shape[1] == 1 else f"{field.name}_{number}"
            columns[name] = column / spread if spread > 0 else column
    return columns

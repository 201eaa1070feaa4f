"""A small world with known tastes, for the tests of em."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.special

from recbole_uip.behaviours import TEST, TRAIN, VALID, Behaviours


@dataclass(frozen=True)
class World:
    """Events of users whose leniency and taste are known.

    ``logit p(like) = intercept[item] + leniency[user] + taste[user] @ vectors[item]``.
    """

    behaviours: Behaviours
    vectors: np.ndarray
    intercept: np.ndarray
    leniency: np.ndarray
    taste: np.ndarray


def make_world(
    seed: int = 0,
    n_users: int = 300,
    n_items: int = 80,
    events_per_user: int = 40,
    rank: int = 2,
    noise_directions: int = 4,
) -> World:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n_items, rank + noise_directions))
    taste = np.zeros((n_users, rank + noise_directions))
    taste[:, :rank] = rng.normal(size=(n_users, rank)) * np.linspace(1.6, 0.9, rank)
    intercept = rng.normal(size=n_items)
    leniency = rng.normal(size=n_users)
    user = np.repeat(np.arange(n_users), events_per_user)
    item = rng.integers(0, n_items, len(user))
    logit = intercept[item] + leniency[user] + (taste[user] * vectors[item]).sum(axis=1)
    liked = (rng.random(len(user)) < scipy.special.expit(logit)).astype(float)
    # Whole days, so that equal timestamps are common.
    time = rng.integers(0, 60, len(user)).astype(float)
    split = np.where(time < 48, TRAIN, np.where(time < 54, VALID, TEST)).astype(np.int8)
    shuffled = rng.permutation(len(user))
    behaviours = Behaviours(
        user[shuffled],
        item[shuffled],
        liked[shuffled],
        time[shuffled],
        split[shuffled],
        n_users,
        n_items,
    )
    return World(behaviours, vectors, intercept, leniency, taste)


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()

"""From inferred profiles to a bank."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from recbole_uip.bank.bank import FeatureBank, user_table
from recbole_uip.bank.model import ProfileModel
from recbole_uip.behaviours import Behaviours
from recbole_uip.em.states import run, whole_history
from recbole_uip.profiles import Profiles
from recbole_uip.settings import UIPSettings

__all__ = ["bank_of_profiles"]


def bank_of_profiles(
    folder: str | os.PathLike,
    profiles: Profiles,
    behaviours: Behaviours,
    users: Sequence[str],
    items: Sequence[str],
    settings: UIPSettings,
) -> FeatureBank:
    """Write the bank of ``profiles``, with every user's state after the last event.

    Parameters
    ----------
    folder : path-like
    profiles : Profiles
        What was inferred from ``behaviours``.
    behaviours : Behaviours
        With ``settings.history=train``, only training rows enter the states.
    users, items : sequence of str, of lengths n_users and n_items
        Tokens by number. Users without any event have no row; item 0 is no item ([PAD]).
    settings : UIPSettings

    Returns
    -------
    FeatureBank
        Open for writing.
    """
    is_event = np.ones(len(behaviours), dtype=bool)
    if settings.history == "train":
        is_event = behaviours.train
    history = whole_history(behaviours.user, behaviours.time, is_event, behaviours.n_users)
    model = ProfileModel.of(profiles, items, settings, behaviours.liked is None)
    present = np.flatnonzero(history.seen)
    states = np.empty((len(present), len(model.kernels.initial)), dtype=np.float32)
    for at, block in run(model.kernels, history, profiles.events, present):
        states[at] = block
    last_time = np.full(len(present), -np.inf)
    fold = np.zeros(behaviours.n_users, dtype=np.int64)
    fold[behaviours.user] = profiles.events.fold
    last_event = history.events[history.first[present + 1] - 1]
    if behaviours.time is not None:
        last_time = behaviours.time[last_event]
    table = user_table(
        model,
        [str(users[number]) for number in present],
        fold[present],
        history.seen[present],
        last_time,
        states,
    )
    return FeatureBank.create(folder, model, table.combine_chunks())

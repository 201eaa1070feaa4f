"""Banks from inferred profiles, and from event files that need not fit into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.events import EventFile
from recbole_uip.bank.model import NO_ITEM, ProfileModel
from recbole_uip.bank.store import check_replaceable
from recbole_uip.bank.users import NO_TIME, advance_in_parallel, user_schema, user_table
from recbole_uip.behaviours import TRAIN, Behaviours, folds_of
from recbole_uip.em.states import iter_states, whole_history
from recbole_uip.em.weights import smoothed_rate
from recbole_uip.profiles import Profiles, infer, resolved
from recbole_uip.settings import SettingsError, UIPSettings

__all__ = ["bank_of_events", "bank_of_profiles", "fit_model"]

logger = logging.getLogger(__name__)

# Parameters are fitted on whole users who have at most this many events together.
FIT_EVENTS = 2_000_000
FIT_USERS = 50_000
BLOCK_EVENTS = 1_000_000


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
    _check_servable(settings)
    history = whole_history(behaviours.user, behaviours.time, is_event, behaviours.n_users)
    model = ProfileModel.from_profiles(
        profiles, items, settings, behaviours.liked is None, behaviours.time
    )
    present = np.flatnonzero(history.seen)
    states = np.empty((len(present), len(model.kernels.initial)), dtype=np.float32)
    for at, block in iter_states(model.kernels, history, profiles.events, present):
        states[at] = block
    last_time = np.full(len(present), NO_TIME)
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


def bank_of_events(
    folder: str | os.PathLike,
    events: EventFile,
    settings: UIPSettings,
    texts: Callable[[Mapping[str, int], int], Sequence[str | None]] | None = None,
) -> FeatureBank:
    """Write the bank of an event file; all of its events are history.

    Parameters are fitted on a sample of whole users; like rates, on all events. Then the events
    are streamed, so memory is bounded however many there are.

    Parameters
    ----------
    folder : path-like
    events : EventFile
    settings : UIPSettings
    texts : callable, optional
        From the number of each item token, and the number of items, to the items' texts.

    Returns
    -------
    FeatureBank
        Open for writing.
    """
    _check_servable(settings)
    check_replaceable(folder)
    # One of settings that are none any more cannot be opened, and is no loss.
    with contextlib.suppress(SettingsError), FeatureBank.open(folder, verify=False) as old:
        logger.warning("the bank in %s, of %d users, will be replaced", folder, len(old))
    counts = events.item_counts()
    sample = events.sample_users(FIT_USERS, settings.seed, FIT_EVENTS)
    model = fit_model(sample, counts, settings, texts)
    schema = user_schema(model)
    batches = _user_batches(model, events, counts["item"])
    return FeatureBank.create(folder, model, pa.RecordBatchReader.from_batches(schema, batches))


def fit_model(
    sample: pa.Table,
    counts: pa.Table,
    settings: UIPSettings,
    texts: Callable[[Mapping[str, int], int], Sequence[str | None]] | None = None,
) -> ProfileModel:
    """Fit the model of a bank on the events of some users.

    Parameters
    ----------
    sample : pyarrow.Table
        As of :meth:`EventFile.sample_users`.
    counts : pyarrow.Table
        As of :meth:`EventFile.item_counts`: like rates are those of all events.
    settings : UIPSettings
    texts : callable, optional
        From the number of each item token, and the number of items, to the items' texts.

    Returns
    -------
    ProfileModel
    """
    _check_servable(settings)
    items = [NO_ITEM, *counts["item"].to_pylist()]
    number_of = {item: number for number, item in enumerate(items) if number}
    item_texts = None if texts is None else texts(number_of, len(items))
    behaviours, users = _behaviours(sample, counts["item"], len(items))
    logger.info("fitting on %d users and %d events", behaviours.n_users, len(behaviours))
    if behaviours.liked is not None and (behaviours.liked == behaviours.liked[0]).all():
        raise SettingsError(
            f"the labels of all events are {behaviours.liked[0]:g}, so nothing can be learned from "
            "them: change the threshold, or leave labels out where every event is of liking"
        )
    settings = resolved(dataclasses.replace(settings, history="observed"), behaviours)
    profiles = infer(
        behaviours, item_texts, settings, folds_of(users, settings.user_folds, settings.seed)
    )
    model = ProfileModel.from_profiles(
        profiles, items, settings, behaviours.liked is None, behaviours.time
    )
    if behaviours.liked is not None:
        # Number 0, no item, has no events.
        count, likes = (np.append(0, counts[name].to_numpy()) for name in ("count", "likes"))
        model.encoder = model.encoder.with_rate(smoothed_rate(count, likes))
    return model


def _check_servable(settings: UIPSettings) -> None:
    if settings.tuned_facets:
        raise SettingsError(
            f"uip_facets.{settings.tuned_facets[0].name}: a feature bank cannot update soft tokens "
            "that uip_posterior=gradient tunes, because that takes the LM: set uip_posterior=score"
        )


def _behaviours(
    events: pa.Table, catalogue: pa.ChunkedArray, n_items: int
) -> tuple[Behaviours, list[str]]:
    """Events of whole users, sorted, as training rows; and the users' tokens."""
    first, user = _runs(events["user"])
    n = len(user)
    has = events.column_names
    behaviours = Behaviours(
        user=user,
        item=_item_numbers(events["item"], catalogue),
        liked=events["liked"].to_numpy() if "liked" in has else None,
        time=events["time"].to_numpy() if "time" in has else None,
        split=np.full(n, TRAIN, dtype=np.int8),
        n_users=len(first),
        n_items=n_items,
    )
    return behaviours, events["user"].take(first).to_pylist()


def _runs(users: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each user in a sorted column, and the user's number in each row."""
    codes = pc.run_end_encode(users.combine_chunks())
    ends = codes.run_ends.to_numpy().astype(np.int64)
    first = np.concatenate([[0], ends[:-1]])
    return first, np.repeat(np.arange(len(ends)), np.diff(np.append(first, len(users))))


def _item_numbers(items: pa.ChunkedArray, catalogue: pa.ChunkedArray) -> np.ndarray:
    found = pc.index_in(items, value_set=catalogue.combine_chunks())
    return found.to_numpy().astype(np.int64) + 1


def _user_batches(
    model: ProfileModel, events: EventFile, catalogue: pa.ChunkedArray
) -> Iterator[pa.RecordBatch]:
    """Every user's state after the last event."""
    with tqdm(total=events.n_events, desc="events", unit="row", leave=False, delay=2) as progress:
        for block in events.blocks(BLOCK_EVENTS):
            first, user = _runs(block["user"])
            tokens = block["user"].take(first)
            n = len(first)
            folds = model.folds_of(tokens.to_pylist())
            liked = (
                block["liked"].to_numpy() if "liked" in block.column_names else np.ones(len(user))
            )
            last = np.append(first[1:], len(user)) - 1
            time = np.full(n, NO_TIME)
            if "time" in block.column_names:
                time = block["time"].to_numpy()[last]
            states = np.tile(model.kernels.initial, (n, 1))
            advance_in_parallel(
                states, user, first, model.kernels, _item_numbers(block["item"], catalogue),
                folds[user], liked,
            )  # fmt: skip
            seen = np.diff(np.append(first, len(user)))
            table = user_table(model, tokens.combine_chunks(), folds, seen, time, states)
            yield from table.to_batches()
            progress.update(len(user))

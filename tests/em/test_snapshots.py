"""Snapshots: which events each row's profile is made of."""

import numpy as np
import pytest

from recbole_uip.em.snapshots import take_snapshots
from recbole_uip.em.states import index_history


def history_of(world, held_out_too=True, refresh=0.0, time=True):
    b = world.behaviours
    is_event = np.ones(len(b), dtype=bool) if held_out_too else b.train
    return index_history(b.user, b.time if time else None, is_event, b.n_users, refresh)


@pytest.mark.parametrize("refresh", [0.0, 5.0])
def test_events_of_a_rows_snapshot_are_strictly_earlier(world, refresh):
    b = world.behaviours
    history = history_of(world, refresh=refresh)
    snapshots = take_snapshots(history, (4, 10), b.train)
    sizes = np.where(snapshots.of_row >= 0, snapshots.size[snapshots.of_row], 0)
    assert set(np.unique(sizes[b.train])) == {0, 4, 10}
    assert len(np.unique(sizes)) > 10  # ends of training
    for row in range(0, len(b), 37):
        if snapshots.of_row[row] < 0:
            assert history.seen[row] < 4
            continue
        events = snapshots.events(history, snapshots.of_row[row])
        assert len(events) == sizes[row]
        assert (b.user[events] == b.user[row]).all()
        assert (b.time[events] < b.time[row] - refresh).all()
        # no later snapshot would do
        assert history.seen[row] < 4 or sizes[row] >= 10 or history.seen[row] < 10


def test_only_snapshots_of_training_rows_are_fitted_on(world):
    b = world.behaviours
    history = history_of(world)
    snapshots = take_snapshots(history, (4, 10, 36), b.train)
    for index in range(len(snapshots)):
        events = snapshots.events(history, index)
        assert snapshots.fitted[index] == b.train[events].all()
    assert snapshots.fitted.any() and not snapshots.fitted.all()


def test_a_training_row_does_not_know_how_many_events_follow(world):
    """Taking away later events leaves a row's snapshot what it was."""
    b = world.behaviours
    before = take_snapshots(history_of(world), (4, 10), b.train)
    history = index_history(b.user, b.time, b.time < 30, b.n_users)
    after = take_snapshots(history, (4, 10), b.train)
    early = np.flatnonzero(b.train & (b.time < 30))
    for row in early[::11]:
        old, new = before.of_row[row], after.of_row[row]
        assert (old < 0) == (new < 0)
        if old >= 0:
            assert before.size[old] == after.size[new]


def test_static_profiles_have_one_snapshot_a_user(world):
    b = world.behaviours
    history = history_of(world, held_out_too=False, time=False)
    snapshots = take_snapshots(history, (4, 10), b.train)
    assert len(snapshots) == b.n_users and snapshots.fitted.all()
    assert (snapshots.size == np.bincount(b.user[b.train])).all()
    assert (snapshots.timeline[snapshots.of_row] == b.user).all()

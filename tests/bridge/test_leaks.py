"""No label may reach the fields of its own row, of an earlier row, or of a training row.

The whole pipeline is asked: a rating changes in the input file, everything is loaded, split and
inferred again, and every field that may not change is compared.
"""

import numpy as np
import pytest
from recbole.utils import init_seed

from recbole_uip.behaviours import TEST, TRAIN, VALID
from recbole_uip.bridge import UIPDataset

RS = {"RS": [0.8, 0.1, 0.1]}
SPLITS = {
    "RS": {"split": RS, "group_by": None},
    "RS by user": {"split": RS, "group_by": "user"},
    "LS": {"split": {"LS": "valid_and_test"}, "group_by": "user"},
    "TS": {"split": {"TS": [0.8, 0.1, 0.1]}, "group_by": "user"},
}


def infer(atomic, **settings):
    config = atomic.write().config(**settings)
    init_seed(7, True)
    dataset = UIPDataset(config)
    dataset.build()
    fields = {field.name: field.values for field in dataset.profiles.fields}
    return dataset.behaviours, fields


def flipped(rating):
    return 1 if rating >= 4 else 5


@pytest.mark.parametrize("history", ["train", "observed"])
@pytest.mark.parametrize("order", ["RO", "TO"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_held_out_label_stays_out(atomic, split, order, history):
    settings = {
        "eval_args": {**SPLITS[split], "order": order, "mode": "labeled"},
        "uip_history": history,
    }
    before, fields = infer(atomic, **settings)
    used = 0
    for part in (VALID, TEST):
        held_out = np.flatnonzero(before.split == part)
        # An early row of the part, so that there are later rows to look at.
        row = int(held_out[np.argsort(before.time[held_out], kind="stable")[len(held_out) // 3]])
        rating = atomic.rows[row][2]
        atomic.rows[row][2] = flipped(rating)
        after, changed = infer(atomic, **settings)
        atomic.rows[row][2] = rating
        assert (after.split == before.split).all()
        assert (after.liked != before.liked).nonzero()[0].tolist() == [row]
        may_not_change = (before.time <= before.time[row]) | (before.split == TRAIN)
        may_not_change |= before.user != before.user[row]
        assert may_not_change[row]
        if history == "train":
            may_not_change[:] = True
        for name, values in fields.items():
            assert (values == changed[name])[may_not_change].all(), name
            used += (values != changed[name]).sum()
    if history == "observed" and split != "LS":
        # The test can see a change where one is due.
        assert used > 0


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("split", ["RS", "RS by user"])
def test_cross_fitted_profiles_know_no_held_out_label(atomic, split, timed):
    settings = {
        "eval_args": {**SPLITS[split], "order": "RO", "mode": "labeled"},
        "uip_time": "cross_fitted",
    }
    if not timed:
        atomic.columns = atomic.columns[:3]
    before, fields = infer(atomic, **settings)
    for part in (VALID, TEST):
        row = int(np.flatnonzero(before.split == part)[0])
        rating = atomic.rows[row][2]
        atomic.rows[row][2] = flipped(rating)
        after, changed = infer(atomic, **settings)
        atomic.rows[row][2] = rating
        assert (after.liked != before.liked).nonzero()[0].tolist() == [row]
        for name, values in fields.items():
            np.testing.assert_array_equal(values, changed[name], err_msg=name)


@pytest.mark.parametrize("time", ["point_in_time", "static"])
def test_a_training_label_moves_its_users_later_rows(atomic, time):
    before, fields = infer(atomic, uip_time=time)
    train = np.flatnonzero(before.split == TRAIN)
    counts = np.bincount(before.user[train])
    rows = [row for row in train if counts[before.user[row]] >= 5]
    row = int(rows[np.argmin(before.time[rows])])
    atomic.rows[row][2] = flipped(atomic.rows[row][2])
    _, changed = infer(atomic, uip_time=time)
    later = (before.user == before.user[row]) & (before.time > before.time[row])
    moved = np.any([fields[name] != changed[name] for name in fields], axis=0)
    assert moved[later].any()


def test_ties_see_nothing_of_each_other(atomic):
    facets = {"leniency": {"source": "constant", "weight": "contrast", "half_life": ["inf"]}}
    # One user whose events all have the same time: none of them is history of another.
    for row in atomic.rows:
        if row[0] == atomic.rows[0][0]:
            row[3] = 978_300_050
    behaviours, fields = infer(atomic, uip_facets=facets)
    tied = behaviours.user == behaviours.user[0]
    assert tied.sum() > 3
    assert fields
    assert all((values[tied] == 0).all() for values in fields.values())


def test_refresh_delays_history(atomic):
    facets = {"leniency": {"source": "constant", "weight": "contrast", "half_life": ["inf"]}}
    for seconds, refresh in ((0, "0s"), (60, "1m")):
        behaviours, fields = infer(atomic, uip_facets=facets, uip_refresh=refresh)
        same_user = behaviours.user[:, None] == behaviours.user[None, :]
        earlier = behaviours.time[None, :] < behaviours.time[:, None] - seconds
        known = (same_user & earlier).any(axis=1)
        assert 0 < known.sum() < len(known)
        for values in fields.values():
            assert ((values > 0) == known).all()


def test_no_row_has_history(atomic):
    # All of these events fall within a few minutes, so a day-old bank knows none of them.
    _, fields = infer(atomic, uip_refresh="1d")
    assert all((values == 0).all() for values in fields.values())

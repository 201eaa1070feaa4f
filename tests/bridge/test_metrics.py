import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recbole_uip.bridge.metrics import gauc, lists


def test_gauc_is_the_weighted_mean_of_user_aucs(rng):
    user = rng.integers(0, 30, 500)
    label = rng.integers(0, 2, 500)
    score = rng.integers(0, 8, 500) / 8  # many ties
    label[user == 3] = 1  # a user of one class does not count
    aucs, weights = [], []
    for one in np.unique(user):
        rows = user == one
        if len(np.unique(label[rows])) == 2:
            aucs.append(roc_auc_score(label[rows], score[rows]))
            weights.append(rows.sum())
    assert gauc(user, label, score) == pytest.approx(np.average(aucs, weights=weights))


def test_gauc_without_a_user_of_both_classes():
    assert np.isnan(gauc(np.array([1, 2]), np.array([0, 1]), np.array([0.1, 0.2])))
    assert np.isnan(gauc(np.array([]), np.array([]), np.array([])))


def test_a_list_is_what_a_user_meets_at_one_time(rng):
    user = rng.integers(0, 5, 60)
    time = rng.integers(0, 4, 60) + 0.25
    number = lists(user, time)
    for first in range(60):
        together = (user == user[first]) & (time == time[first])
        np.testing.assert_array_equal(number == number[first], together)
    np.testing.assert_array_equal(lists(user, None), user)


def test_a_lift_of_all_that_a_user_meets_at_one_time_does_not_change_list_auc(rng):
    user, time = rng.integers(0, 9, 400), rng.integers(0, 9, 400).astype(float)
    label, score = rng.integers(0, 2, 400), rng.random(400)
    number = lists(user, time)
    lifted = score + 10 * rng.random(number.max() + 1)[number]
    assert gauc(number, label, lifted) == gauc(number, label, score)
    assert gauc(user, label, lifted) != gauc(user, label, score)


def test_gauc_falls_where_scores_know_a_users_past_and_list_auc_does_not(rng):
    """With labels by chance, whoever liked more than half so far has fewer likes left."""
    n_users, n_rows, at_a_time = 300, 60, 3
    label = rng.integers(0, 2, (n_users, n_rows))
    user = np.repeat(np.arange(n_users), n_rows)
    time = np.tile(np.arange(n_rows) // at_a_time, n_users)
    past = at_a_time * (np.arange(n_rows) // at_a_time)  # events before that time
    likes = np.cumsum(np.c_[np.zeros(n_users), label], axis=1)[:, past]
    past_like_rate = ((likes + 1) / (past + 2)).ravel()
    assert gauc(user, label.ravel(), past_like_rate) < 0.45
    assert gauc(lists(user, time), label.ravel(), past_like_rate) == 0.5

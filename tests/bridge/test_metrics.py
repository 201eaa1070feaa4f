import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recbole_uip.bridge.metrics import gauc


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

import numpy as np
import pytest
import scipy.linalg

from recbole_uip.em import collaborative
from recbole_uip.em.collaborative import balanced_folds, logistic_factors, svd_vectors
from recbole_uip.em.weights import like_rate

from .conftest import make_world


def test_vectors_are_those_of_the_dense_svd():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 12)) * (rng.random((30, 12)) < 0.6)
    user, item = np.nonzero(matrix)
    vectors = svd_vectors(user, item, matrix[user, item], 30, 12, rank=4)
    _, values, right = np.linalg.svd(matrix, full_matrices=False)
    expected = (values[:4, None] * right[:4]).T
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-8)


def test_items_without_events_have_no_vector():
    user, item = np.array([0, 0, 1, 1, 2]), np.array([0, 2, 0, 3, 2])
    vectors = svd_vectors(user, item, np.ones(5), 4, 6, rank=2)
    assert (vectors[[1, 4, 5]] == 0).all() and (vectors[[0, 2, 3]] != 0).any(axis=1).all()


def test_rank_is_padded_where_the_matrix_is_small():
    vectors = svd_vectors(np.array([0, 1, 1]), np.array([0, 0, 1]), np.ones(3), 2, 2, rank=5)
    assert vectors.shape == (2, 5)


def test_too_few_users_is_said():
    with pytest.raises(ValueError, match="1 users on 2 items: leave"):
        svd_vectors(np.zeros(2, dtype=int), np.array([0, 1]), np.ones(2), 3, 3, rank=2)


def test_logistic_factors_beat_the_svd_they_start_from():
    world = make_world(n_users=800, events_per_user=40)
    b = world.behaviours
    train = np.flatnonzero(b.train)
    user, item, liked = b.user[train], b.item[train], b.liked[train]
    rate = like_rate(item, liked, b.n_items)
    start = svd_vectors(user, item, liked - rate[item], b.n_users, b.n_items, rank=2)
    factors = logistic_factors(user, item, liked, b.n_users, rate, start).vectors

    def angle(vectors):
        truth = world.vectors[:, :2]
        return np.cos(scipy.linalg.subspace_angles(vectors, truth)).min()

    assert angle(factors) > max(0.9, angle(start))


def test_blocks_of_users_do_not_change_factors(monkeypatch):
    world = make_world(n_users=50)
    b = world.behaviours
    rate = like_rate(b.item, b.liked, b.n_items)
    start = np.random.default_rng(0).normal(size=(b.n_items, 3))
    whole = logistic_factors(b.user, b.item, b.liked, b.n_users, rate, start).vectors
    monkeypatch.setattr(collaborative, "BLOCK_ROWS", 7)
    blocks = logistic_factors(b.user, b.item, b.liked, b.n_users, rate, start).vectors
    np.testing.assert_allclose(blocks, whole)


def test_folds_are_balanced():
    assert np.bincount(balanced_folds(10, 4, seed=0)).tolist() == [3, 3, 2, 2]

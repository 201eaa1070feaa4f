import numpy as np
import pytest

from recbole_uip.em.collaborative import align, svd_vectors, user_folds


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
    with pytest.raises(ValueError, match="1 users on 2 items"):
        svd_vectors(np.zeros(2, dtype=int), np.array([0, 1]), np.ones(2), 3, 3, rank=2)


def test_align_undoes_a_rotation():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    np.testing.assert_allclose(align(vectors @ rotation, vectors), vectors)


def test_folds_are_balanced():
    assert np.bincount(user_folds(10, 4, seed=0)).tolist() == [3, 3, 2, 2]

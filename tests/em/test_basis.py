import numpy as np
import pytest
import scipy.linalg
import scipy.special

from recbole_uip.behaviours import DataError
from recbole_uip.em import basis, states, weights

from .conftest import make_world


def train_events(behaviours):
    history = states.index_history(
        behaviours.user, behaviours.time, behaviours.train, behaviours.n_users
    )
    return history.events


def fitted(world, rank, directions="between"):
    behaviours = world.behaviours
    train = train_events(behaviours)
    item, liked = behaviours.item[train], behaviours.liked[train]
    rate = weights.like_rate(item, liked, behaviours.n_items)
    evidence = weights.evidence("contrast", item, liked, rate)
    counts = np.bincount(item, minlength=behaviours.n_items)
    whitened = basis.whiten(world.vectors, counts).vectors
    return basis.fit(
        whitened, behaviours.user[train], item, evidence, behaviours.n_users, rank, directions
    ), whitened


def test_whitened_vectors_have_mean_zero_and_identity_moment():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 3.0
    counts = rng.integers(0, 9, 50)
    whitened = basis.whiten(vectors, counts).vectors
    share = counts / counts.sum()
    np.testing.assert_allclose(share @ whitened, 0.0, atol=1e-10)
    np.testing.assert_allclose((whitened * share[:, None]).T @ whitened, np.eye(6), atol=1e-8)


def test_wide_vectors_give_the_same_inner_products_as_the_pseudo_inverse():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 40))
    counts = np.ones(12)
    whitened = basis.whiten(vectors, counts).vectors
    centred = vectors - vectors.mean(axis=0)
    expected = centred @ np.linalg.pinv(centred.T @ centred / 12) @ centred.T
    np.testing.assert_allclose(whitened @ whitened.T, expected, atol=1e-6)


def test_empty_directions_are_dropped():
    rng = np.random.default_rng(0)
    vectors = np.zeros((30, 5))
    vectors[:, :2] = rng.normal(size=(30, 2))
    assert basis.whiten(vectors, np.ones(30)).vectors.shape == (30, 2)


def test_keep_takes_the_leading_directions():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 5)) * [9, 5, 1, 0.5, 0.1]
    whole = basis.whiten(vectors, np.ones(30)).vectors
    np.testing.assert_allclose(
        np.abs(basis.whiten(vectors, np.ones(30), keep=2).vectors), np.abs(whole[:, :2])
    )


def test_planted_taste_directions_are_found():
    world = make_world(n_users=1500, events_per_user=60)
    found, _ = fitted(world, rank=2)
    # The planted directions are the first two columns of the item vectors.
    angles = scipy.linalg.subspace_angles(
        found.vectors, world.vectors[:, :2] - world.vectors[:, :2].mean(axis=0)
    )
    assert np.cos(angles).min() > 0.97
    assert found.variance[0] > found.variance[1] > 0


def test_between_user_variance_is_not_biased_by_noise():
    # Without any taste, mean scores still scatter; the two halves must not call that taste.
    world = make_world(n_users=1500, events_per_user=20, rank=0, noise_directions=4)
    found, _ = fitted(world, rank=4)
    assert abs(found.variance.mean()) < 0.01


def test_one_event_has_unit_noise():
    world = make_world(n_users=1500, events_per_user=60)
    found, _ = fitted(world, rank=6)
    behaviours = world.behaviours
    train = train_events(behaviours)
    item, liked = behaviours.item[train], behaviours.liked[train]
    rate = weights.like_rate(item, liked, behaviours.n_items)
    scores = found.vectors[item] * (liked - rate[item])[:, None]
    total = scores.var(axis=0)
    np.testing.assert_allclose(total, 1.0 + found.variance, rtol=0.1)


def test_events_on_few_items_make_no_giants_of_the_others(rng):
    """Dislikes of 8 items, and 16 directions: half of them have no event at all."""
    vectors = rng.normal(size=(60, 20))
    user, item = np.repeat(np.arange(60), 6), rng.integers(0, 8, 360)
    weight = np.ones(len(item))
    evidence = weights.Evidence(weight, weight)
    found = basis.fit(vectors, user, item, evidence, 60, 16)
    counted = np.linalg.norm(found.vectors[:8], axis=1).mean()
    assert np.linalg.norm(found.vectors[8:], axis=1).max() < 10 * counted


def test_fisher_takes_the_leading_item_directions(world):
    found, whitened = fitted(world, 3, "fisher")
    scale = np.diag(found.directions[0][:3])
    np.testing.assert_allclose(found.vectors, whitened[:, :3] * scale)
    (directions,) = found.directions
    assert directions.shape == (whitened.shape[1], 3)
    assert np.count_nonzero(directions) == 3
    # What is estimated along a direction does not depend on how it was chosen.
    wide, _ = fitted(world, 5, "fisher")
    np.testing.assert_allclose(found.variance, wide.variance[:3])
    np.testing.assert_allclose(found.mean, wide.mean[:3])


def test_fisher_captures_less_of_how_users_differ():
    world = make_world(n_users=1500, events_per_user=60)
    between, whitened = fitted(world, 2)
    fisher, _ = fitted(world, 2, "fisher")
    assert fisher.variance.sum() < 0.8 * between.variance.sum()
    # With all directions there is nothing to choose.
    everything = [fitted(world, whitened.shape[1], way)[0] for way in ("between", "fisher")]
    captured = [basis.variance.sum() for basis in everything]
    np.testing.assert_allclose(captured[1], captured[0], rtol=0.1)


def test_blocks_of_users_add_up(world, monkeypatch):
    assert world.behaviours.n_users < basis.USERS_A_BLOCK
    whole, _ = fitted(world, 3)
    monkeypatch.setattr(basis, "USERS_A_BLOCK", 7)
    parts, _ = fitted(world, 3)
    for name in ("vectors", "mean", "variance"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-8)


def test_evidence_of_items_without_vectors_alone_is_refused(rng):
    vectors = np.r_[np.zeros((5, 3)), rng.normal(size=(20, 3))]
    user, item = np.repeat(np.arange(30), 4), rng.integers(0, 5, 120)
    evidence = weights.Evidence(np.ones(120), np.ones(120))
    with pytest.raises(DataError, match="the items of its training events have no vectors"):
        basis.fit(vectors, user, item, evidence, 30, 2)


def test_too_few_users_is_said():
    evidence = weights.Evidence(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="only 1 users have two training events"):
        basis.fit(np.eye(3), np.zeros(2, dtype=int), np.array([0, 1]), evidence, 4, 2)


def test_no_evidence_is_said():
    evidence = weights.Evidence(np.zeros(4), np.zeros(4))
    with pytest.raises(ValueError, match="no training event is evidence"):
        basis.fit(np.eye(3), np.zeros(4, dtype=int), np.arange(4) % 3, evidence, 1, 2)


def test_directions_are_given_up_where_users_are_few():
    rng = np.random.default_rng(0)
    m, rank = 256, 2

    def covariance(n_users, strength):
        taste = np.zeros((n_users, m))
        taste[:, :rank] = rng.normal(size=(n_users, rank)) * strength
        halves = [taste + rng.normal(size=(n_users, m)) for _ in range(2)]
        return halves[0].T @ halves[1] / 2 + halves[1].T @ halves[0] / 2

    weak = [covariance(150, 0.5) for _ in range(2)]
    assert basis.supported_directions(weak, rank) < m


def test_merged_bases_share_a_frame():
    rng = np.random.default_rng(0)
    whitened, directions = rng.normal(size=(20, 5)), rng.normal(size=(5, 3))
    variance = np.array([3.0, 2.0, 1.0])
    first = basis.Basis(whitened @ directions, rng.normal(size=3), variance, (directions,))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    # The same basis in another frame: its covariance is no longer diagonal there.
    second = basis.Basis(
        first.vectors @ turn,
        first.mean @ turn,
        np.diag(turn.T @ np.diag(variance) @ turn),
        (directions @ turn,),
    )
    merged = basis.merge([first, second])
    assert merged.vectors.shape == (40, 3)
    np.testing.assert_allclose(merged.vectors[20:], first.vectors)
    np.testing.assert_allclose(merged.mean, first.mean)
    assert (merged.variance > 0).all()
    for fold in (0, 1):
        mapped = whitened @ merged.directions[fold]
        np.testing.assert_allclose(mapped, merged.vectors[20 * fold : 20 * fold + 20])


@pytest.mark.parametrize("dim", [5, 40])
def test_whitening_maps_new_items_as_it_maps_its_own(dim):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, dim))
    whitening = basis.whiten(vectors, rng.integers(0, 9, 20), keep=4)
    mapped = (vectors - whitening.mean) @ whitening.directions()
    np.testing.assert_allclose(mapped, whitening.vectors, atol=1e-9)

import numpy as np
import pytest

from recbole_uip.em.weights import evidence, like_rate, out_of_fold_rates

ITEM = np.array([0, 0, 0, 1])
LIKED = np.array([1.0, 1.0, 0.0, 0.0])


def test_like_rate_is_smoothed_towards_the_overall_rate():
    rate = like_rate(ITEM, LIKED, n_items=3, prior_count=2.0)
    np.testing.assert_allclose(rate, [(2 + 1.0) / 5, 1.0 / 3, 0.5])


def test_a_fold_meets_like_rates_of_the_others(rng):
    item, fold = rng.integers(0, 7, 500), rng.integers(0, 3, 500)
    liked = (rng.random(500) < 0.6).astype(float)
    rates = out_of_fold_rates(item, liked, fold, n_items=9, n_folds=3)
    for own in range(3):
        others = fold != own
        np.testing.assert_allclose(rates[own], like_rate(item[others], liked[others], 9))
        flipped = np.where(others, liked, 1.0 - liked)
        np.testing.assert_array_equal(rates[own], out_of_fold_rates(item, flipped, fold, 9, 3)[own])


@pytest.mark.parametrize(
    ("kind", "weight", "count"),
    [
        ("positive", [1, 1, 0, 0], [1, 1, 0, 0]),
        ("negative", [0, 0, 1, 1], [0, 0, 1, 1]),
        ("all", [1, 1, 1, 1], [1, 1, 1, 1]),
        ("contrast", [0.4, 0.4, -0.6, -0.2], [1, 1, 1, 1]),
    ],
)
def test_weights(kind, weight, count):
    found = evidence(kind, ITEM, LIKED, np.array([0.6, 0.2]))
    np.testing.assert_allclose(found.weight, weight)
    np.testing.assert_allclose(found.count, count)


@pytest.mark.parametrize("kind", ["positive", "all"])
def test_without_labels_every_event_is_positive(kind):
    assert (evidence(kind, ITEM, None, None).weight == 1).all()


@pytest.mark.parametrize("kind", ["negative", "contrast"])
def test_without_labels_some_weights_have_no_meaning(kind):
    with pytest.raises(ValueError, match=f"weight '{kind}' needs"):
        evidence(kind, ITEM, None, None)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_like_rate_is_never_certain(label):
    rate = like_rate(ITEM, np.full(4, label), n_items=2)
    assert (rate > 0).all() and (rate < 1).all()

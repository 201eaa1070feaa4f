"""Every codebook but EM's: what is planted is found, and the rule is the compiled one's."""

import itertools
import warnings

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score

from recbole_uip.em.kernels import nearest_codes
from recbole_uip.em.quantizers import (
    QUANTIZERS,
    FiniteScalar,
    HardEM,
    OnlineVQ,
    RandomCodebook,
    Sinkhorn,
    grid_levels,
    transport_potentials,
)
from recbole_uip.em.residual import CODEBOOKS, ResidualCodebook
from recbole_uip.settings import METHODS

CLUSTERING = ("kmeans", "vq", "sinkhorn")


def planted(seed=0, n=2000, shares=None, rank=2, distance=4.0):
    """Four corners of a square, and users of whom very different amounts are known."""
    rng = np.random.default_rng(seed)
    codewords = np.zeros((4, rank))
    codewords[:, :2] = list(itertools.product([-distance, distance], repeat=2))
    codes = rng.choice(4, n, p=shares)
    noise = rng.gamma(1.0, 1.0, n)
    offsets = codewords[codes] + rng.normal(size=(n, rank)) * np.sqrt(0.3 + noise)[:, None]
    return offsets, noise, codewords, codes


def fitted(method, offsets, noise, n_codes=4, **parameters):
    parameters = {"random_state": 0, "max_iter": 300, **parameters}
    return CODEBOOKS[method](n_codes, **parameters).fit(offsets, noise)


def test_every_method_of_the_settings_has_a_codebook():
    assert tuple(CODEBOOKS) == METHODS


@pytest.mark.parametrize("method", ("em", *CLUSTERING, "fsq"))
def test_planted_clusters_are_recovered(method):
    offsets, noise, codewords, codes = planted()
    codebook = fitted(method, offsets, noise)
    distance = ((codebook.codewords_[:, None] - codewords) ** 2).sum(axis=2)
    found, true = linear_sum_assignment(distance)
    # FSQ has its levels at quartiles of both clusters of an axis, pulled outwards by noise.
    assert distance[found, true].max() < 0.5
    known = noise < 1.0
    predicted = codebook.predict(offsets, noise)
    assert adjusted_rand_score(codes[known], predicted[known]) > 0.95


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("n_codes", [4, 7])
def test_the_rule_is_the_documented_one_and_the_compiled_one(method, n_codes):
    offsets, noise, *_ = planted(rank=3, distance=2.0)
    codebook = fitted(method, offsets, noise, n_codes)
    distance = ((offsets[:, None] - codebook.codewords_) ** 2).sum(axis=2)
    scores = codebook.potentials_ - distance / (2 * (codebook.rule_variance_ + noise[:, None]))
    expected = scores.argmax(axis=1)
    compiled = nearest_codes(offsets, noise, codebook.packed, n_codes, 1)[:, 0]
    np.testing.assert_array_equal(compiled, expected)
    np.testing.assert_array_equal(codebook.predict(offsets, noise), expected)
    if method in ("kmeans", "vq", "random"):
        np.testing.assert_array_equal(expected, distance.argmin(axis=1))


@pytest.mark.parametrize("method", QUANTIZERS)
def test_the_likelihood_never_falls_and_is_that_of_the_mixture(method):
    rng = np.random.default_rng(3)
    offsets, noise = rng.standard_t(3, size=(400, 3)), rng.gamma(0.5, 1.0, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codebook = fitted(method, offsets, noise, 6, tol=1e-9, max_iter=40)
    assert len(codebook.lower_bounds_) > 3
    assert np.diff(codebook.lower_bounds_).min() > -1e-9
    # One more step may follow the last bound.
    assert codebook.score(offsets, noise) > codebook.lower_bound_ - 1e-9
    np.testing.assert_allclose(codebook.weights_.sum(), 1.0)
    ended = fitted(method, offsets, noise, 6)
    np.testing.assert_allclose(ended.score(offsets, noise), ended.lower_bound_, rtol=1e-9)
    assert (codebook.variance_ > 0).all()


def test_em_has_the_best_likelihood_and_random_codewords_the_worst():
    offsets, noise, *_ = planted(distance=2.0)
    score = {method: fitted(method, offsets, noise).lower_bound_ for method in METHODS}
    assert max(score, key=score.get) == "em"
    assert min(score, key=score.get) == "random"
    assert min(score[method] for method in CLUSTERING) > score["random"] + 0.05


def test_kmeans_weighs_offsets_by_what_is_known_of_them():
    rng = np.random.default_rng(0)
    sure, unsure = rng.normal(0.0, 0.1, (200, 2)), rng.normal(3.0, 0.1, (200, 2))
    noise = np.repeat([0.0, 1e4], 200)
    codebook = HardEM(1, random_state=0).fit(np.concatenate([sure, unsure]), noise)
    np.testing.assert_allclose(codebook.codewords_[0], sure.mean(axis=0), atol=0.05)


def test_vq_brings_back_codes_that_nobody_is_near():
    offsets, noise, *_ = planted()
    far = np.array([[0, 0], [90, 90], [91, 90], [90, 91]])
    start = np.concatenate([np.zeros(4), far.T.ravel(), np.ones(2)])
    codebook = OnlineVQ(4, random_state=0, start=start, max_iter=100, decay=0.9)
    codebook.fit(offsets, noise)
    assert codebook.reseeded_
    assert codebook.usage_.min() > 0.15
    assert np.abs(codebook.codewords_).max() < 10


def test_vq_with_more_commitment_trusts_the_unsure_less():
    """s = 1 / (2 beta): with a small s, an offset counts by 1 / nu, with a large one like any."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([rng.normal(0, 0.1, (300, 1)), rng.normal(2, 0.1, (300, 1))])
    noise = np.repeat([0.1, 10.0], 300)
    near = [
        OnlineVQ(1, commitment=beta, random_state=0, tol=1e-6, decay=0.9).fit(offsets, noise)
        for beta in (5.0, 0.005)
    ]
    assert near[0].codewords_[0, 0] < 0.2 < 0.7 < near[1].codewords_[0, 0]


def test_sinkhorn_uses_all_codes_alike_where_clusters_are_not():
    offsets, noise, *_ = planted(shares=[0.7, 0.1, 0.1, 0.1], distance=2.0)
    balanced, nearest = fitted("sinkhorn", offsets, noise), fitted("kmeans", offsets, noise)
    np.testing.assert_allclose(balanced.usage_, 0.25, atol=0.05)
    assert nearest.usage_.max() > 0.5
    assert balanced.perplexity_ > 3.9 > nearest.perplexity_


def test_transport_uses_codes_equally_and_rows_sum_to_one():
    cost = np.random.default_rng(0).gamma(1.0, 2.0, (300, 5)) + np.arange(5)
    potentials, plan = transport_potentials(cost, 0.5, np.zeros(5), tol=1e-6, max_iter=5000)
    np.testing.assert_allclose(plan.sum(axis=1), 1.0)
    np.testing.assert_allclose(5 * plan.mean(axis=0), 1.0, atol=1e-5)
    np.testing.assert_allclose(potentials.mean(), 0.0, atol=1e-12)
    # The plan's own form: rows are softmax((g - c) / epsilon).
    ratio = np.log(plan[:, 1] / plan[:, 0]) * 0.5
    np.testing.assert_allclose(ratio, potentials[1] - potentials[0] - cost[:, 1] + cost[:, 0])


@pytest.mark.parametrize(
    ("variance", "n_codes", "levels"),
    [
        ([1.0], 8, (8,)),
        ([1.0, 1.0], 16, (4, 4)),
        ([1.0, 1e-6], 8, (8, 1)),
        ([1.0, 4.0], 1, (1, 1)),
        ([1e-6, 1.0, 1.0], 9, (1, 3, 3)),
    ],
)
def test_levels_go_where_profiles_vary(variance, n_codes, levels):
    assert grid_levels(np.array(variance), n_codes) == levels


@pytest.mark.parametrize("n_codes", [2, 7, 12, 32])
def test_levels_make_a_grid_of_at_most_the_codes(n_codes):
    variance = np.array([0.3, 2.0, 0.9, 0.1])
    levels = np.array(grid_levels(variance, n_codes))
    assert n_codes / 2 < levels.prod() <= n_codes
    assert (np.diff(levels[np.argsort(-variance)]) <= 0).all()


def test_fsq_is_a_grid_and_gives_only_its_codes():
    rng = np.random.default_rng(0)
    offsets, noise = rng.normal(size=(3000, 3)) * [3.0, 2.0, 0.1], np.full(3000, 0.01)
    codebook = FiniteScalar(7, random_state=0).fit(offsets, noise)
    used = np.isfinite(codebook.potentials_)
    assert used.sum() == 6
    assert sorted(len(np.unique(axis)) for axis in codebook.codewords_[used].T) == [1, 2, 3]
    assert (codebook.usage_[~used] == 0).all() and codebook.usage_[used].min() > 0.1
    # Levels are quantile midpoints: 1/6, 3/6 and 5/6 of the widest direction.
    np.testing.assert_allclose(
        np.unique(codebook.codewords_[used, 0]),
        np.quantile(offsets[:, 0], [1 / 6, 1 / 2, 5 / 6]),
        atol=0.02,
    )
    # Codes without a level come last, and keep out of the likelihood.
    assert (np.flatnonzero(~used) == [6]).all()
    assert codebook.weights_[6] < 1e-300
    assert np.isfinite(codebook.score(offsets, noise))


def test_fsq_quantises_each_direction_by_itself():
    rng = np.random.default_rng(0)
    offsets, noise = rng.normal(size=(1000, 2)), np.full(1000, 0.05)
    codebook = FiniteScalar(16, random_state=0).fit(offsets, noise)
    given = codebook.codewords_[codebook.predict(offsets, noise)]
    for axis in range(2):
        levels = np.unique(codebook.codewords_[:, axis])
        nearest = np.abs(offsets[:, axis, None] - levels).argmin(axis=1)
        np.testing.assert_array_equal(given[:, axis], levels[nearest])


def test_random_codewords_are_drawn_from_the_prior_and_from_the_seed():
    rng = np.random.default_rng(0)
    offsets, noise = rng.normal(5.0, 2.0, (1000, 2)), np.full(1000, 1e-3)
    first, second, other = (
        RandomCodebook(300, max_iter=3, random_state=seed).fit(offsets, noise) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.codewords_, second.codewords_)
    assert (first.codewords_ != other.codewords_).all()
    np.testing.assert_allclose(first.codewords_.mean(), 5.0, atol=0.2)
    np.testing.assert_allclose(first.codewords_.std(), 2.0, atol=0.2)
    assert first.converged_ and first.n_iter_ == 0


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_codebook(method):
    offsets, noise, *_ = planted(n=300)
    first, second = (fitted(method, offsets, noise, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first.packed, second.packed)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_several_starts_is_kept(method):
    offsets, noise, *_ = planted(n=300, distance=1.5)
    one, many = (fitted(method, offsets, noise, 8, n_init=n) for n in (1, 4))
    assert many.lower_bound_ >= one.lower_bound_
    np.testing.assert_allclose(many.score(offsets, noise), many.lower_bound_, rtol=1e-6)
    # The rule is that of the start that was kept, not of the last one.
    np.testing.assert_allclose(
        many.usage_, np.bincount(many.predict(offsets, noise), minlength=8) / 300
    )


@pytest.mark.parametrize("method", CLUSTERING)
def test_not_converged_is_said_by_name(method):
    offsets, noise, *_ = planted(n=500, distance=1.0)
    name = CODEBOOKS[method].method
    with pytest.warns(ConvergenceWarning, match=f"^{name} did not converge in max_iter=2"):
        codebook = fitted(method, offsets, noise, max_iter=2, tol=1e-9)
    assert not codebook.converged_ and codebook.n_iter_ == 2


@pytest.mark.parametrize("method", QUANTIZERS)
def test_what_converges_is_silent(method):
    offsets, noise, *_ = planted(n=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fitted(method, offsets, noise)
    assert codebook.converged_ and codebook.n_iter_ < 300


@pytest.mark.parametrize("method", CLUSTERING)
def test_a_start_is_where_it_begins(method):
    offsets, noise, *_ = planted(n=500)
    first = fitted(method, offsets, noise)
    again = fitted(method, offsets, noise, start=first.packed, random_state=9)
    distance = ((again.codewords_[:, None] - first.codewords_) ** 2).sum(axis=2)
    found, true = linear_sum_assignment(distance)
    assert distance[found, true].max() < 0.02
    assert again.n_iter_ <= first.n_iter_


@pytest.mark.parametrize("method", QUANTIZERS)
def test_few_distinct_offsets_do_not_break_it(method):
    offsets = np.repeat(np.array([[0.0, 1.0], [2.0, 3.0]]), 10, axis=0)
    noise = np.linspace(0.1, 1.0, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fitted(method, offsets, noise, 4)
    assert np.isfinite(codebook.codewords_).all()
    assert np.isfinite(codebook.lower_bound_)


@pytest.mark.parametrize("method", METHODS)
def test_residual_levels(method):
    """The compiled rule goes down all levels as the levels do one by one."""
    offsets, noise, *_ = planted(n=500, rank=3)
    one_level = CODEBOOKS[method](4, random_state=0, max_iter=300)
    codebook = ResidualCodebook(one_level, 2).fit(offsets, noise)
    codes = codebook.predict(offsets, noise)
    first, second = codebook.levels_
    np.testing.assert_array_equal(codes[:, 0], first.predict(offsets, noise))
    residual = offsets - first.codewords_[codes[:, 0]]
    np.testing.assert_array_equal(codes[:, 1], second.predict(residual, noise))
    np.testing.assert_array_equal(
        codebook.decode(codes), first.codewords_[codes[:, 0]] + second.codewords_[codes[:, 1]]
    )
    assert codebook.prior_codes().tolist() == [0, 0]


def test_sinkhorn_plan_is_of_its_own_codewords():
    """Potentials that were fitted to other codewords would not balance."""
    offsets, noise, *_ = planted(n=800, shares=[0.55, 0.25, 0.1, 0.1], distance=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codebooks = [Sinkhorn(4, random_state=0, max_iter=n).fit(offsets, noise) for n in (2, 300)]
    for codebook in codebooks:
        np.testing.assert_allclose(codebook.usage_, 0.25, atol=0.06)


@pytest.mark.parametrize("kind", CODEBOOKS.values())
def test_codebooks_are_estimators(kind):
    codebook = kind(4, tol=0.1, random_state=3)
    assert clone(codebook).get_params() == codebook.get_params()
    for name in ("predict", "predict_proba", "score", "posterior_mean"):
        with pytest.raises(NotFittedError):
            getattr(codebook, name)(np.zeros((5, 2)), np.ones(5))

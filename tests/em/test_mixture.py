import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning

from recbole_uip.em.codebook import component_log_densities, perplexity, unpack
from recbole_uip.em.mixture import CodebookMixture
from recbole_uip.em.residual import ResidualCodebook


def planted(seed=0, n=4000, n_codes=5, rank=3):
    """Codewords far apart, and users of whom very different amounts are known."""
    rng = np.random.default_rng(seed)
    codewords = np.array(list(itertools.product([-4.0, 4.0], repeat=rank)))[:n_codes]
    codes = rng.integers(0, n_codes, n)
    noise = rng.gamma(1.0, 1.0, n)
    variance = np.linspace(0.2, 0.8, rank)
    truth = codewords[codes] + rng.normal(size=(n, rank)) * np.sqrt(variance)
    offsets = truth + rng.normal(size=(n, rank)) * np.sqrt(noise)[:, None]
    return offsets, noise, codewords, codes, variance


def test_log_densities_are_those_of_scipy():
    rng = np.random.default_rng(0)
    offsets, noise = rng.normal(size=(4, 3)), rng.gamma(1, 1, 4)
    codewords, variance = rng.normal(size=(2, 3)), np.array([0.1, 0.5, 2.0])
    found = component_log_densities(offsets, noise, codewords, variance)
    for u, k in itertools.product(range(4), range(2)):
        expected = multivariate_normal(codewords[k], np.diag(variance + noise[u]))
        np.testing.assert_allclose(found[u, k], expected.logpdf(offsets[u]))


def test_planted_codebook_is_recovered_up_to_permutation():
    offsets, noise, codewords, codes, variance = planted()
    mixture = CodebookMixture(5, random_state=0, n_init=3, tol=1e-6, max_iter=500)
    mixture.fit(offsets, noise)
    distance = ((mixture.codewords_[:, None] - codewords[None]) ** 2).sum(axis=2)
    found, true = linear_sum_assignment(distance)
    assert distance[found, true].max() < 0.1
    np.testing.assert_allclose(mixture.variance_, variance, rtol=0.2)
    relabelled = true[np.argsort(found)][mixture.predict(offsets, noise)]
    well_known = noise < 1.0
    assert (relabelled == codes)[well_known].mean() > 0.99


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 4), st.sampled_from([0, 1e4]))
@hypothesis_settings(deadline=None, max_examples=50)
def test_likelihood_never_falls(seed, n_codes, rank, location):
    rng = np.random.default_rng(seed)
    offsets, noise = rng.standard_t(3, size=(200, rank)), rng.gamma(0.5, 1.0, 200)
    offsets += location
    mixture = CodebookMixture(n_codes, random_state=seed, max_iter=30, tol=0.0, min_share=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(offsets, noise)
    assert not mixture.reseeded_
    assert np.diff(mixture.lower_bounds_).min() > -1e-9


def test_the_lower_bound_is_the_log_likelihood():
    offsets, noise, *_ = planted(n=500)
    mixture = CodebookMixture(5, random_state=0).fit(offsets, noise)
    np.testing.assert_allclose(mixture.score(offsets, noise), mixture.lower_bound_)


def test_responsibilities_sum_to_one():
    offsets, noise, *_ = planted(n=500)
    mixture = CodebookMixture(5, random_state=0).fit(offsets, noise)
    responsibilities = mixture.predict_proba(offsets, noise)
    np.testing.assert_allclose(responsibilities.sum(axis=1), 1.0)
    np.testing.assert_array_equal(responsibilities.argmax(axis=1), mixture.predict(offsets, noise))


def test_an_unknown_user_gets_the_prior():
    offsets, noise, *_ = planted(n=500)
    mixture = CodebookMixture(5, random_state=0).fit(offsets, noise)
    far, hardly_known = np.full((1, 3), 50.0), np.array([1e12])
    np.testing.assert_allclose(mixture.predict_proba(far, hardly_known)[0], mixture.weights_)
    np.testing.assert_allclose(
        mixture.posterior_mean(far, hardly_known)[0],
        mixture.weights_ @ mixture.codewords_,
        atol=1e-6,
    )


def test_empty_codes_are_reseeded():
    """At users who lie apart for what is known of them, not at those of whom little is known."""
    rng, rank, spread = np.random.default_rng(0), 16, 0.02
    groups = 0.35 * rng.normal(size=(5, rank))
    events = np.exp(rng.uniform(0, np.log(300), 3000)).astype(int)
    noise = 1.0 / events
    offsets = groups[rng.integers(5, size=3000)]
    offsets = offsets + rng.normal(size=(3000, rank)) * np.sqrt(spread + noise[:, None])
    mixture = CodebookMixture(5, max_iter=200)
    mixture._initialize(offsets, noise, np.random.RandomState(0))
    mixture.codewords_ = groups.copy()
    mixture.codewords_[0] = 1e3  # nobody is near
    mixture.codewords_[1] = (groups[0] + groups[1]) / 2  # two groups share this one
    mixture.weights_, mixture.variance_ = np.full(5, 0.2), np.full(rank, 2 * spread)
    run = mixture._fit_single(offsets, noise)
    assert len(run["reseeded_"]) == 1
    assert run["weights_"].min() > 0.15
    assert run["lower_bound_"] > -6.5


def test_not_converged_is_said():
    offsets, noise, *_ = planted(n=500)
    with pytest.warns(ConvergenceWarning, match="max_iter=2"):
        mixture = CodebookMixture(5, max_iter=2, random_state=0).fit(offsets, noise)
    assert not mixture.converged_ and mixture.n_iter_ == 2


def test_convergence_is_reported():
    offsets, noise, *_ = planted(n=500)
    mixture = CodebookMixture(5, random_state=0, max_iter=500).fit(offsets, noise)
    assert mixture.converged_
    assert mixture.n_iter_ == len(mixture.lower_bounds_)
    assert mixture.lower_bounds_[-1] - mixture.lower_bounds_[-2] < mixture.tol


def test_same_seed_same_codebook():
    offsets, noise, *_ = planted(n=500)
    first, second = (CodebookMixture(5, random_state=3).fit(offsets, noise) for _ in range(2))
    np.testing.assert_array_equal(first.codewords_, second.codewords_)


def test_codes_are_ordered_by_use():
    offsets, noise, *_ = planted(n=500)
    mixture = CodebookMixture(5, random_state=0).fit(offsets, noise)
    assert (np.diff(mixture.weights_) <= 0).all()


def test_perplexity_counts_codes_in_use():
    np.testing.assert_allclose(perplexity(np.array([0.25, 0.25, 0.25, 0.25, 0.0])), 4.0)


def test_residual_levels_come_closer():
    offsets, noise, *_ = planted(n=2000)
    errors = []
    for levels in (1, 2, 3):
        one_level = CodebookMixture(5, random_state=0, max_iter=300)
        codebook = ResidualCodebook(one_level, levels).fit(offsets, np.zeros(2000))
        codes = codebook.predict(offsets, np.zeros(2000))
        assert codes.shape == (2000, levels)
        errors.append(((codebook.decode(codes) - offsets) ** 2).mean())
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("offsets", "noise", "message"),
    [
        (np.zeros((3, 2)), np.zeros(3), "n_codes=5 needs at least as many samples"),
        (np.zeros((9, 2)), np.zeros(8), "must have shape"),
        (np.full((9, 2), np.nan), np.zeros(9), "must be finite"),
        (np.zeros((9, 2)), np.full(9, -1.0), "must not be negative, got -1.0"),
    ],
)
def test_bad_input_is_refused(offsets, noise, message):
    with pytest.raises(ValueError, match=message):
        CodebookMixture(5).fit(offsets, noise)


def test_packed_levels_can_be_taken_apart_again():
    offsets, noise, *_ = planted(n=500)
    codebook = ResidualCodebook(CodebookMixture(5, random_state=0), 2).fit(offsets, noise)
    levels = unpack(codebook.packed, 5, 3)
    assert len(levels) == 2
    for found, level in zip(levels, codebook.levels_, strict=True):
        np.testing.assert_array_equal(found.codewords, level.codewords_)
        np.testing.assert_array_equal(found.variance, level.variance_)
        np.testing.assert_allclose(np.exp(found.log_weights), level.weights_)


def test_a_start_is_tried_once(monkeypatch):
    offsets, noise, *_ = planted(n=500)
    codebook = CodebookMixture(5, random_state=0).fit(offsets, noise)
    fits = []
    fit_single = CodebookMixture._fit_single
    monkeypatch.setattr(
        CodebookMixture, "_fit_single", lambda self, *a: fits.append(1) or fit_single(self, *a)
    )
    again = CodebookMixture(5, n_init=3, start=codebook.packed).fit(offsets, noise)
    assert len(fits) == 1
    assert again.lower_bound_ >= codebook.lower_bound_ - 1e-9

"""EM with scores recomputed at codewords, on likelihoods whose optimum is known."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from recbole_uip.em.gradient import GradientPosterior
from recbole_uip.em.relinearize import RelinearizedPosterior
from recbole_uip.settings import CodebookSettings, GradientSettings

from .test_gradient import FACETS, RANK, Bent, at_start, make_world


def fit(kind, frame, units, likelihood, **changes):
    n = len(units.first) - 1
    settings = GradientSettings(**{"e_step": "relinearize", **changes})
    posterior = kind(FACETS, frame, settings, CodebookSettings(), batch_tokens=200)
    everyone = np.ones(n, dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fold = np.zeros(n, dtype=int)
        return posterior.fit(units, fold, everyone, np.arange(n) % 10 == 0, likelihood)


def test_the_first_round_is_the_closed_form_and_costs_nothing(rng):
    frame, units, likelihood, _ = make_world(rng)
    before = likelihood.calls
    posterior = fit(RelinearizedPosterior, frame, units, likelihood, rounds=1)
    assert posterior.tokens_ == likelihood.calls - before == 0
    counts = np.add.reduceat(np.repeat(units.active, RANK, axis=1), units.first[:-1])
    closed = np.add.reduceat(units.gradient, units.first[:-1]) / counts
    np.testing.assert_allclose(np.concatenate(posterior.offset_, axis=1), closed, atol=1e-5)
    np.testing.assert_allclose(posterior.noise_, 1.0 / counts[:, [0, RANK]], rtol=0.05)


def test_where_scores_are_linear_nothing_changes(rng):
    frame, units, likelihood, _ = make_world(rng)
    once = fit(RelinearizedPosterior, frame, units, likelihood, rounds=1)
    thrice = fit(RelinearizedPosterior, frame, units, likelihood, rounds=3)
    np.testing.assert_allclose(thrice.offset_[0], once.offset_[0], atol=5e-3)
    np.testing.assert_allclose(thrice.curvature_, 1.0, atol=5e-3)
    # a behaviour is evidence of one facet or of both, and is read once a round
    assert thrice.tokens_ == 2 * units.cost.sum()


def test_curvature_is_measured_between_start_and_codeword(rng):
    frame, units, likelihood, _ = make_world(rng, curvature=4.0)
    posterior = fit(RelinearizedPosterior, frame, units, likelihood, rounds=2)
    np.testing.assert_allclose(posterior.curvature_, 4.0, rtol=1e-3)
    weight = np.repeat(units.active, RANK, axis=1)
    counts = np.add.reduceat(weight, units.first[:-1])
    mean = np.add.reduceat(weight * likelihood.targets, units.first[:-1]) / counts
    np.testing.assert_allclose(np.concatenate(posterior.offset_, axis=1), mean, atol=3e-3)


def test_it_comes_nearer_to_the_truth_than_scores_at_the_start(rng):
    frame, units, quadratic, truth = make_world(rng, n=120)
    likelihood = Bent(quadratic)
    units = at_start(units, frame, likelihood)
    errors = {}
    for rounds in (1, 3):
        posterior = fit(RelinearizedPosterior, frame, units, likelihood, rounds=rounds)
        means = np.concatenate([posterior.means(f) for f in range(2)], axis=1)
        errors[rounds] = np.sqrt(((means - truth) ** 2).mean())
    assert errors[3] < 0.7 * errors[1]


def test_gradient_steps_find_what_it_finds(rng):
    frame, units, quadratic, _ = make_world(rng, n=120)
    likelihood = Bent(quadratic)
    units = at_start(units, frame, likelihood)
    ours = fit(RelinearizedPosterior, frame, units, likelihood, rounds=4, tol=0.0)
    steps = fit(
        GradientPosterior, frame, units, likelihood,
        e_step="adam", rounds=1, steps=60, batch=12, learning_rate=0.1,
    )  # fmt: skip
    for f in range(2):
        correlation = np.corrcoef(ours.means(f).ravel(), steps.means(f).ravel())[0, 1]
        assert correlation > 0.95


def test_profiles_of_one_code_share_what_the_lm_reads(rng):
    frame, units, quadratic, _ = make_world(rng)
    # all profiles did the same twelve things
    n = len(units.first) - 1
    quadratic.targets[:] = np.tile(quadratic.targets[:12], (n, 1))
    quadratic.active[:] = np.tile(quadratic.active[:12], (n, 1))
    likelihood = Bent(quadratic)
    units = dataclasses.replace(units, passage=np.tile(np.arange(12), n), active=quadratic.active)
    units = at_start(units, frame, likelihood)
    likelihood.read.clear()
    posterior = fit(RelinearizedPosterior, frame, units, likelihood, rounds=2)
    read = np.concatenate([chosen for chosen, _ in likelihood.read])
    assert all(len(np.unique(posterior.codes(f))) == 1 for f in range(2)) and len(read) == 12
    assert posterior.tokens_ == units.cost[:12].sum()
    every = np.concatenate(posterior.offset_, axis=1)
    np.testing.assert_array_equal(every, np.broadcast_to(every[:1], every.shape))


def test_batches_keep_the_budget(rng):
    frame, units, quadratic, _ = make_world(rng)
    likelihood = Bent(quadratic)
    fit(RelinearizedPosterior, frame, at_start(units, frame, likelihood), likelihood, rounds=2)
    sizes = [len(chosen) for chosen, _ in likelihood.read[1:]]
    assert max(sizes) == 200 // 5 and sum(sizes) == len(units.cost)


def test_codes_outlive_a_change_of_scale(rng):
    """Where c turns out larger, offsets shrink, and the next codebook must not collapse."""
    frame, units, likelihood, truth = make_world(rng, n=120)
    frame = likelihood.frame = dataclasses.replace(frame, reach=0.05)
    steep = copy.copy(likelihood)
    steep.curvature = 400.0  # of moves within reach; the scores at θ⁰ say 1
    posterior = fit(RelinearizedPosterior, frame, units, steep, rounds=3)
    assert (posterior.curvature_ > 10).all()
    for f in range(2):
        kinds = fit(RelinearizedPosterior, frame, units, likelihood, rounds=1).codes(f)[:, 0]
        codes = posterior.codes(f)[:, 0]
        assert len(np.unique(codes)) == 3
        assert adjusted_rand_score(kinds, codes) > 0.5


def test_rounds_that_change_nothing_keep_the_codes_in_use(rng):
    frame, units, likelihood, _ = make_world(rng, n=400, per_profile=20)
    facets = [dataclasses.replace(facet, codes=16) for facet in FACETS]
    found = []
    for rounds in (1, 4):
        settings = GradientSettings(e_step="relinearize", rounds=rounds, tol=-np.inf)
        posterior = RelinearizedPosterior(facets, frame, settings, CodebookSettings())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            posterior.fit(
                units, np.zeros(400, int), np.ones(400, bool), np.arange(400) % 10 == 0, likelihood
            )
        found.append([book.levels_[0].perplexity_ for book in posterior.codebooks_])
    np.testing.assert_allclose(found[1], found[0], rtol=0.15)


@pytest.mark.parametrize("last", [10, 30])
def test_profiles_not_fitted_on_touch_no_parameter(rng, last):
    frame, units, quadratic, truth = make_world(rng)
    n = len(truth)
    fitted = np.arange(n) < n - last
    found = []
    for shift in (0.0, 3.0):
        quadratic.targets[units.first[n - last] :] += shift
        likelihood = Bent(quadratic)
        posterior = RelinearizedPosterior(
            FACETS, frame, GradientSettings(e_step="relinearize"), CodebookSettings()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            posterior.fit(
                at_start(units, frame, likelihood), np.zeros(n, dtype=int), fitted,
                np.arange(n) % 10 == 0, likelihood,
            )  # fmt: skip
        found.append(posterior)
    before, after = found
    for old, new in zip(before.codebooks_, after.codebooks_, strict=True):
        np.testing.assert_array_equal(old.packed, new.packed)
    assert (before.offset_[0][: n - last] == after.offset_[0][: n - last]).all()
    assert (before.offset_[0][n - last :] != after.offset_[0][n - last :]).any()
    # those are measured at codewords as well
    assert (np.abs(after.mode_[0][n - last :]) > 0).any()


def test_what_is_evidence_of_one_facet_is_not_taken_for_that_of_another(rng):
    """All profiles read the same, but it speaks for the first facet alone, or for both."""
    frame, units, quadratic, _ = make_world(rng, n=20)
    quadratic.active[:, 1] = np.repeat(np.arange(20) % 2, 12)
    quadratic.targets[:] = np.tile(quadratic.targets[:12], (20, 1))
    every = np.full((len(units.value), frame.size), np.float32(0))
    # as sequences are, with nothing known of them at the start
    unknown = dataclasses.replace(
        units,
        passage=np.tile(np.arange(12), 20),
        active=quadratic.active,
        value=np.full(len(units.value), np.nan),
        gradient=every,
    )
    likelihood = Bent(quadratic)
    found = fit(RelinearizedPosterior, frame, unknown, likelihood, rounds=1)
    known = dataclasses.replace(unknown, passage=units.passage)
    expected = fit(RelinearizedPosterior, frame, known, likelihood, rounds=1)
    for f in range(2):
        np.testing.assert_allclose(found.offset_[f], expected.offset_[f], atol=1e-5)
    assert np.abs(found.offset_[1][1::2]).max() > 0.1
    assert found.tokens_ == 2 * 12 * 5

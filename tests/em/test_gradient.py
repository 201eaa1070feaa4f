"""EM around tuned profiles, on likelihoods whose optimum is known."""

import dataclasses
import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from recbole_uip.em.ascent import Prior, State, ascend
from recbole_uip.em.frame import Frame, Units
from recbole_uip.em.gradient import GradientPosterior, in_turn
from recbole_uip.settings import CodebookSettings, FacetSettings, GradientSettings

WIDTH, RANK = 6, 3


class Quadratic:
    """ℓ_i(θ) = −|C (Mᵀθ − t_i)|²/2 per facet: with C = I, what the closed form assumes."""

    def __init__(self, frame, targets, active, curvature=1.0):
        self.frame, self.targets, self.active = frame, targets, active
        self.curvature = curvature
        self.inverse = [np.linalg.pinv(maps[0]) for maps in frame.maps]
        self.calls = 0

    def coordinates(self, theta):
        parts = [
            (theta[:, f] - self.frame.theta0[f]) @ inverse.T
            for f, inverse in enumerate(self.inverse)
        ]
        return np.concatenate(parts, axis=1)

    def __call__(self, units, theta):
        self.calls += len(units)
        gap = self.targets[units] - self.coordinates(theta.astype(np.float64))
        gap = gap * np.repeat(self.active[units] > 0, RANK, axis=1)
        slopes = [
            self.curvature * gap[:, part] @ inverse
            for part, inverse in zip(self.frame.slices, self.inverse, strict=True)
        ]
        return -0.5 * self.curvature * (gap**2).sum(axis=1), np.stack(slopes, axis=1)


class Bent:
    """ℓ of a quadratic likelihood whose coordinates are bent, so that its curvature changes."""

    def __init__(self, quadratic):
        self.quadratic, self.read = quadratic, []

    def __call__(self, units, theta):
        self.read.append((units, theta))
        frame, active = self.quadratic.frame, self.quadratic.active[units]
        at = self.quadratic.coordinates(theta.astype(np.float64))
        gap = (self.quadratic.targets[units] - at) * np.repeat(active > 0, RANK, axis=1)
        # −log cosh: as a square near its top, as an absolute value far from it
        slope = np.tanh(gap)
        slopes = [
            slope[:, part] @ inverse
            for part, inverse in zip(frame.slices, self.quadratic.inverse, strict=True)
        ]
        return -np.log(np.cosh(gap)).sum(axis=1), np.stack(slopes, axis=1)


def make_frame(rng, n_facets=2):
    maps = []
    for _ in range(n_facets):
        basis, _ = np.linalg.qr(rng.normal(size=(WIDTH, RANK)))
        maps.append(2.0 * basis[None])
    variance = tuple(np.full(RANK, 0.5) for _ in maps)
    return Frame(rng.normal(size=(n_facets, WIDTH)), tuple(maps), variance)


def make_world(rng, n=60, per_profile=12, curvature=1.0):
    """Profiles of three kinds; behaviours scatter about each with the variance 1 / curvature."""
    frame = make_frame(rng)
    kinds = 1.5 * rng.normal(size=(3, 2 * RANK))
    truth = kinds[rng.integers(3, size=n)] + 0.2 * rng.normal(size=(n, 2 * RANK))
    targets = np.repeat(truth, per_profile, axis=0)
    targets += rng.normal(size=targets.shape) / np.sqrt(curvature)
    active = np.ones((len(targets), 2))
    active[rng.random(len(targets)) < 0.3, 1] = 0
    likelihood = Quadratic(frame, targets, active, curvature)
    value, slope = likelihood(
        np.arange(len(targets)), np.repeat(frame.theta0[None], len(targets), axis=0)
    )
    gradient = frame.pull(slope, np.zeros(len(targets), dtype=int), active)
    first = np.arange(n + 1) * per_profile
    each = np.arange(len(targets))
    units = Units(first, each, np.full(len(targets), 5), active, value, gradient)
    return frame, units, likelihood, truth


def at_start(units, frame, likelihood):
    """Units with values and gradients of ``likelihood`` at θ⁰."""
    every = np.arange(len(units.value))
    value, slope = likelihood(every, np.repeat(frame.theta0[None], len(every), axis=0))
    gradient = frame.pull(slope, np.zeros(len(every), dtype=int), units.active)
    return dataclasses.replace(units, value=value, gradient=gradient)


FACETS = [FacetSettings("one", weight="all", codes=3), FacetSettings("two", "lm", "all", codes=3)]


def fitted(rng, curvature=1.0, run=None, reach=np.inf, **changes):
    frame, units, quadratic, truth = make_world(rng, curvature=curvature)
    frame = quadratic.frame = dataclasses.replace(frame, reach=reach)
    n = len(truth)
    posterior = GradientPosterior(
        FACETS, frame, GradientSettings(learning_rate=0.1, **changes), CodebookSettings(),
        batch_tokens=200,
    )  # fmt: skip
    held_out = np.arange(n) % 10 == 0
    extra = {} if run is None else {"run": run}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior.fit(
            units, np.zeros(n, dtype=int), np.arange(n) < n - 10, held_out, quadratic, **extra
        )
    return posterior, units, quadratic, truth


def test_coordinates_there_and_back(rng):
    frame = make_frame(rng)
    where, fold = rng.normal(size=(5, frame.size)), np.zeros(5, dtype=int)
    active = np.ones((5, 2))
    active[2, 0] = 0
    theta = frame.tokens(where, fold, active)
    np.testing.assert_array_equal(theta[2, 0], frame.theta0[0].astype(np.float32))
    assert not np.allclose(theta[2, 1], frame.theta0[1])
    # pull is the transpose of the move
    slope = rng.normal(size=theta.shape)
    moved = (slope * (theta - frame.theta0)).sum(axis=(1, 2))
    pulled = (frame.pull(slope, fold, active) * where).sum(axis=1)
    np.testing.assert_allclose(moved, pulled, rtol=1e-4)


def test_learning_rate_is_a_move_of_entries(rng):
    frame = make_frame(rng)
    step = frame.steps(0.01)[None] * rng.choice([-1, 1], frame.size)
    moved = frame.tokens(step, np.zeros(1, dtype=int), np.ones((1, 2))) - frame.theta0
    np.testing.assert_allclose(np.sqrt((moved**2).mean(axis=2)), 0.01, rtol=1e-3)


def test_prior_gradient_is_that_of_its_density(rng):
    prior = Prior(np.array([0.3, 0.7]), rng.normal(size=(2, RANK)), np.full(RANK, 0.4))
    where = rng.normal(size=(4, RANK))
    _, gradient = prior.value_and_gradient(where)
    for axis in range(RANK):
        shift = 1e-5 * np.eye(RANK)[axis]
        up, _ = prior.value_and_gradient(where + shift)
        down, _ = prior.value_and_gradient(where - shift)
        np.testing.assert_allclose(gradient[:, axis], (up - down) / 2e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, 12])
def test_the_mode_is_found(rng, batch):
    """All behaviours a step or a few in turn: to the same, known optimum."""
    frame, units, likelihood, _ = make_world(rng, n=20)
    prior = Prior(np.ones(1), np.zeros((1, RANK)), np.full(RANK, 0.5))
    settings = GradientSettings(steps=150, batch=batch)
    chosen = np.arange(20)
    result = ascend(
        State.start(units, chosen), units, chosen, np.zeros(20, dtype=int), frame, [prior, prior],
        likelihood, settings, 0.2, (0,),
    )  # fmt: skip
    weight = np.repeat(units.active, RANK, axis=1)
    sums = np.add.reduceat(weight * likelihood.targets, units.first[:-1])
    counts = np.add.reduceat(weight, units.first[:-1])
    np.testing.assert_allclose(result.where, sums / (counts + 2.0), atol=0.02)
    assert result.curve[-1] > result.curve[0] + 1
    # monotone within a tolerance of the whole climb
    fall = np.minimum(np.diff(result.curve), 0).sum()
    assert fall > -0.02 * (result.curve[-1] - result.curve[0])
    assert likelihood.calls - len(units.value) == 20 * 150 * batch
    assert result.lm_tokens == 5 * 20 * 150 * batch


@pytest.mark.parametrize("curvature", [1.0, 4.0])
def test_the_curve_ends_at_the_log_posterior_there(rng, curvature):
    """Though most behaviours were last visited elsewhere, or not at all."""
    frame, units, likelihood, _ = make_world(rng, n=20, per_profile=30, curvature=curvature)
    prior = Prior(np.array([0.4, 0.6]), rng.normal(size=(2, RANK)), np.full(RANK, 0.5))
    chosen, fold = np.arange(20), np.zeros(20, dtype=int)
    result = ascend(
        State.start(units, chosen), units, chosen, fold, frame, [prior, prior], likelihood,
        GradientSettings(steps=8, batch=2), 0.2, (0,),
    )  # fmt: skip
    for curve, where in ((result.curve[0], 0 * result.where), (result.curve[-1], result.where)):
        theta = frame.tokens(where[units.owner], fold[units.owner], units.active)
        value, _ = likelihood(np.arange(len(units.value)), theta)
        of_prior = sum(prior.value_and_gradient(where[:, part])[0].sum() for part in frame.slices)
        np.testing.assert_allclose(curve, value.sum() + of_prior, rtol=1e-5)
    stale = result.value.sum()
    assert abs(stale - value.sum()) > 0.05 * abs(value.sum())


def test_offsets_are_those_of_the_closed_form(rng):
    """Where scores are linear, gradient steps and one Newton step from θ⁰ say the same."""
    posterior, units, likelihood, _ = fitted(rng, rounds=1, steps=30, batch=12)
    weight = np.repeat(units.active, RANK, axis=1)
    counts = np.add.reduceat(weight, units.first[:-1])
    closed = np.add.reduceat(units.gradient, units.first[:-1]) / counts
    measured = np.concatenate(posterior.offset_, axis=1)
    np.testing.assert_allclose(measured, closed, atol=0.02)
    # of true likelihoods, the gradient's variance is the curvature
    np.testing.assert_allclose(posterior.spread_, 1.0, rtol=0.05)
    noise = posterior.spread_ / posterior.curvature_**2 / counts[:, [0, RANK]]
    np.testing.assert_allclose(posterior.noise_, noise, rtol=1e-6)


def test_curvature_is_measured(rng):
    """A likelihood more curved than scores say: less noise, the same offsets."""
    posterior, units, likelihood, _ = fitted(rng, curvature=4.0, rounds=1, steps=30, batch=12)
    np.testing.assert_allclose(posterior.curvature_, 4.0, rtol=1e-3)
    np.testing.assert_allclose(posterior.spread_, 4.0, rtol=0.05)
    weight = np.repeat(units.active, RANK, axis=1)
    counts = np.add.reduceat(weight, units.first[:-1])
    mean = np.add.reduceat(weight * likelihood.targets, units.first[:-1]) / counts
    np.testing.assert_allclose(np.concatenate(posterior.offset_, axis=1), mean, atol=0.02)
    np.testing.assert_allclose(posterior.noise_, 0.25 / counts[:, [0, RANK]], rtol=0.05)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("curvature", [1.0, 4.0, 25.0])
def test_visits_at_different_places_are_brought_to_one(rng, curvature, rounds):
    """A step visits few behaviours: the last gradients are of where a profile was then."""
    frame, units, likelihood, _ = make_world(rng, n=100, per_profile=50, curvature=curvature)
    posterior = GradientPosterior(
        FACETS, frame, GradientSettings(batch=2, rounds=rounds, tol=-np.inf), CodebookSettings()
    )
    everyone = np.ones(100, dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior.fit(units, np.zeros(100, int), everyone, np.arange(100) % 10 == 0, likelihood)
    np.testing.assert_allclose(posterior.spread_, curvature, rtol=0.05)
    weight = np.repeat(units.active, RANK, axis=1)
    counts = np.add.reduceat(weight, units.first[:-1])
    mean = np.add.reduceat(weight * likelihood.targets, units.first[:-1]) / counts
    np.testing.assert_allclose(np.concatenate(posterior.offset_, axis=1), mean, atol=1e-3)


def test_noise_is_how_far_offsets_scatter(rng):
    """Also where behaviours scatter more than the likelihood's curvature says."""
    frame, units, likelihood, truth = make_world(rng, n=400)
    centre = np.repeat(truth, 12, axis=0)
    likelihood.targets[:] = centre + 3.0 * (likelihood.targets - centre)
    units = dataclasses.replace(
        units, gradient=likelihood.targets * np.repeat(units.active, RANK, axis=1)
    )
    start = State.start(units, np.arange(400))
    step = ascend(
        start, units, np.arange(400), np.zeros(400, int), frame, None, likelihood,
        GradientSettings(steps=10, batch=12), 0.1, (0,),
    )  # fmt: skip
    # The curvature is 1: g + a is the behaviour's target, of variance 9.
    squares = step.spread @ [1.0, 2.0, 1.0, 0.0]
    np.testing.assert_allclose(squares / step.spread[:, 3], 9.0, rtol=0.05)


def test_soft_tokens_stay_within_reach(rng):
    posterior, units, likelihood, _ = fitted(rng, rounds=2, steps=10, batch=12, reach=1.0)
    frame = likelihood.frame
    for f, maps in enumerate(frame.maps):
        length = np.linalg.norm(posterior.mode_[f] @ maps[0].T, axis=1)
        assert length.max() < 1.0 + 1e-5 and (length > 1.0 - 1e-5).any()
    where = rng.normal(size=(5, 2 * RANK)).astype(np.float32)
    fold = np.zeros(5, dtype=int)
    wide = dataclasses.replace(frame, reach=1e3)
    np.testing.assert_array_equal(wide.within(where, fold), where)
    drawn = frame.within(10 * where, fold)
    for part in frame.slices:
        ratio = drawn[:, part] / where[:, part]
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
    # along one coordinate a soft token may go as far as there is room
    alone = np.zeros((1, 2 * RANK), np.float32)
    alone[0, 0] = 1e6
    furthest = np.concatenate([maps[0] for maps in frame.maps], axis=1)
    expected = frame.reach / np.linalg.norm(furthest, axis=0)
    assert frame.within(alone, fold[:1])[0, 0] == pytest.approx(expected[0], rel=1e-4)
    for room, part in zip(frame.room, frame.slices, strict=True):
        assert room == pytest.approx(expected[part].mean(), rel=0.05)


def test_codes_are_the_kinds(rng):
    posterior, _, _, truth = fitted(rng, rounds=2)
    for f in range(2):
        codes = posterior.codes(f)[:, 0]
        part = truth[:, f * RANK : (f + 1) * RANK]
        within = sum(((part[codes == k] - part[codes == k].mean(0)) ** 2).sum() for k in set(codes))
        assert within < 0.25 * ((part - part.mean(axis=0)) ** 2).sum()
    assert posterior.bounds_[-1] > posterior.bounds_[0] - 0.05
    assert len(posterior.bounds_) == posterior.n_iter_ == 2


def test_profiles_not_fitted_on_touch_no_parameter(rng):
    seed = rng.integers(1 << 30)
    before, *_ = fitted(np.random.default_rng(seed), rounds=2)
    frame, units, likelihood, truth = make_world(np.random.default_rng(seed))
    last = len(truth) - 10
    likelihood.targets[units.first[last] :] += 3.0
    after = GradientPosterior(
        FACETS, frame, GradientSettings(learning_rate=0.1, rounds=2), CodebookSettings(),
        batch_tokens=200,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        after.fit(
            units, np.zeros(len(truth), dtype=int), np.arange(len(truth)) < last,
            np.arange(len(truth)) % 10 == 0, likelihood,
        )  # fmt: skip
    for old, new in zip(before.codebooks_, after.codebooks_, strict=True):
        np.testing.assert_array_equal(old.packed, new.packed)
    np.testing.assert_array_equal(before.curvature_, after.curvature_)
    assert (before.offset_[0][:last] == after.offset_[0][:last]).all()
    assert (before.offset_[0][last:] != after.offset_[0][last:]).any()


def test_rounds_that_do_not_suffice_are_warned_about(rng):
    frame, units, quadratic, _ = make_world(rng, n=40)
    likelihood = Bent(quadratic)
    units = at_start(units, frame, likelihood)
    posterior = GradientPosterior(
        FACETS, frame, GradientSettings(learning_rate=0.1, rounds=2, steps=10, tol=0.0),
        CodebookSettings(),
    )  # fmt: skip
    nobody, fold = np.zeros(40, dtype=bool), np.zeros(40, dtype=int)
    with pytest.warns(ConvergenceWarning, match="did not converge in rounds=2"):
        posterior.fit(units, fold, ~nobody, np.arange(40) % 4 == 0, likelihood)
    assert not posterior.converged_ and len(posterior.bounds_) == 2
    # without users held out, there is no bound to be judged by
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        posterior.fit(units, fold, ~nobody, nobody, likelihood)
    assert not posterior.converged_ and np.isnan(posterior.bounds_).all()


def test_the_learning_rate_is_chosen_by_what_is_reached(rng):
    frame, units, likelihood, truth = make_world(rng, n=40)
    posterior = GradientPosterior(FACETS, frame, GradientSettings(rounds=1), CodebookSettings())
    everyone = np.ones(40, dtype=bool)
    posterior.fit(units, np.zeros(40, dtype=int), everyone, np.arange(40) < 8, likelihood)
    assert posterior.learning_rate_ == frame.learning_rates[-1]  # far optima: long steps
    # shares of a soft token's own entries, of d = theta0.shape[1] numbers
    near = dataclasses.replace(frame, reach=2.0)
    expected = np.array(frame.learning_rates) * 2.0 / np.sqrt(frame.theta0.shape[1])
    np.testing.assert_allclose(near.learning_rates, expected)


@pytest.mark.parametrize("start", [-1.0, np.nan])
def test_a_learning_rate_whose_steps_overshoot_is_not_chosen(rng, start):
    """Even where it ends the highest; whether or not the likelihood at θ⁰ is known."""
    frame, units, likelihood, _ = make_world(rng, n=40)
    courses = [[start, 0.0, 1.0, 2.0], [start, 0.0, 3.0, 4.0], [start, 0.0, -5.0, 5.0]]

    def run(phase, function, n, shared):
        if phase != "rate":
            return in_turn(phase, function, n)
        return [{"curve": np.array(curve), "lm_tokens": 0} for curve in courses * (n // 3)]

    posterior = GradientPosterior(FACETS, frame, GradientSettings(rounds=1), CodebookSettings())
    everyone = np.ones(40, dtype=bool)
    posterior.fit(units, np.zeros(40, int), everyone, np.arange(40) < 8, likelihood, run)
    assert posterior.learning_rate_ == frame.learning_rates[1]


def test_profiles_without_evidence_have_no_code(rng):
    frame, units, likelihood, truth = make_world(rng, n=30)
    units.active[: units.first[5], 1] = 0
    likelihood.active = units.active
    units.gradient[: units.first[5], RANK:] = 0
    posterior = GradientPosterior(
        FACETS, frame, GradientSettings(learning_rate=0.1, rounds=1), CodebookSettings()
    )
    everyone = np.ones(30, dtype=bool)
    posterior.fit(units, np.zeros(30, dtype=int), everyone, np.arange(30) < 8, likelihood)
    assert (posterior.codes(1)[:5] == -1).all() and (posterior.means(1)[:5] == 0).all()
    assert (posterior.codes(1)[5:] >= 0).all() and (posterior.codes(0) >= 0).all()

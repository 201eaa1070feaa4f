import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from recbole_uip.em import states
from recbole_uip.em.kernels import TasteFilter, advance, pack
from recbole_uip.em.prior import climb, log_evidence

from .conftest import make_world


def taste_filter(world, half_life=np.inf, rank=2, prior=None):
    prior = np.ones(rank + 1) if prior is None else prior
    return TasteFilter(world.vectors[None].astype(np.float32), prior, half_life)


def events_of(world):
    return states.Events.from_behaviours(
        world.behaviours, np.zeros(world.behaviours.n_users, dtype=np.int64)
    )


def final_states(world, kernel):
    """States after all of a user's events, in the order of users."""
    behaviours = world.behaviours
    history = states.index_history(
        behaviours.user, None, np.ones(len(behaviours), dtype=bool), behaviours.n_users
    )
    _, first_row = np.unique(behaviours.user, return_index=True)
    kernels = pack([kernel], expit(world.intercept))
    out = np.empty((behaviours.n_users, len(kernels.initial)))
    for at, state in states.iter_states(kernels, history, events_of(world), first_row):
        out[at] = state
    return out


def test_planted_traits_are_recovered():
    world = make_world(events_per_user=120)
    mean = final_states(world, taste_filter(world))[:, :3]
    truth = np.column_stack([world.leniency, world.taste[:, :2]])
    for trait in range(3):
        assert np.corrcoef(mean[:, trait], truth[:, trait])[0, 1] > 0.9


def test_the_filter_is_near_the_map_of_the_model():
    world = make_world(n_users=30, events_per_user=60)
    behaviours = world.behaviours
    state = final_states(world, taste_filter(world))
    vectors = np.column_stack([np.ones(behaviours.n_items), world.vectors[:, :2]])
    for user in range(5):
        rows = np.flatnonzero(behaviours.user == user)
        x, a = vectors[behaviours.item[rows]], world.intercept[behaviours.item[rows]]
        y = behaviours.liked[rows]

        def loss(trait, x=x, a=a, y=y):
            logit = a + x @ trait
            return np.logaddexp(0, -(2 * y - 1) * logit).sum() + (trait**2).sum() / 2

        exact = minimize(loss, np.zeros(3)).x
        assert np.abs(state[user, :3] - exact).max() < 0.5
        assert np.dot(state[user, :3], exact) / np.linalg.norm(exact) ** 2 > 0.7


def test_variance_falls_with_events_and_never_below_zero():
    world = make_world()
    state = final_states(world, taste_filter(world))
    assert (state[:, 3:] > 0).all() and (state[:, 3:] < 1.0).all()


def test_with_forgetting_the_prior_is_the_steady_state():
    kernel = TasteFilter(
        np.zeros((1, 1, 2), dtype=np.float32), np.array([0.7, 0.3, 0.2]), half_life=5.0
    )
    kernels = pack([kernel], np.array([0.5]))
    state = kernels.initial.copy()
    state[:3], state[3:] = 2.0, 0.01
    for _ in range(200):
        # An item without vectors teaches nothing of taste; half a like, nothing of leniency.
        advance(state, kernels, 0, 0, 0.5)
    np.testing.assert_allclose(state[1:3], 0, atol=1e-6)
    np.testing.assert_allclose(state[4:], kernels.initial[4:], rtol=1e-6)
    np.testing.assert_allclose(state[0], 0, atol=1e-6)


def test_evidence_prefers_the_planted_prior():
    world = make_world(events_per_user=60)
    behaviours = world.behaviours
    history = states.index_history(
        behaviours.user, behaviours.time, behaviours.train, behaviours.n_users
    )
    rows = np.flatnonzero(behaviours.train)
    rate, events = expit(world.intercept), events_of(world)

    def evidence(scales):
        prior = np.array([scales[0], scales[1], scales[1]])
        return log_evidence(taste_filter(world, prior=prior), rate, history, events, rows)

    planted = evidence((1.0, 1.5))
    assert planted > evidence((1.0, 0.02))
    assert planted > evidence((0.02, 1.5))
    found = climb(evidence, start=(16.0, 0.1))
    assert 0.3 < found[0] < 3.0 and 0.4 < found[1] < 5.0
    assert evidence(found) >= planted - 1e-3


def test_evidence_predicts_before_it_learns():
    # The first event of a user is predicted by the item alone.
    world = make_world(n_users=20, events_per_user=1)
    behaviours = world.behaviours
    history = states.index_history(
        behaviours.user, behaviours.time, behaviours.train, behaviours.n_users
    )
    rows = np.arange(len(behaviours))
    sign = 2 * behaviours.liked - 1
    expected = -np.logaddexp(0, -sign * world.intercept[behaviours.item]).mean()
    found = log_evidence(
        taste_filter(world), expit(world.intercept), history, events_of(world), rows
    )
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("start", [(1.0, 1.0), (32.0, 1 / 32)])
def test_climb_finds_the_top(start):
    top = np.array([4.0, 0.5])
    found = climb(lambda scales: -np.sum(np.log(np.array(scales) / top) ** 2), start)
    np.testing.assert_allclose(found, top)


def test_climb_stays_within_its_limit():
    assert climb(lambda scales: scales[0], (1.0,), limit=8.0) == (8.0,)

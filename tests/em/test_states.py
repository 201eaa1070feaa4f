import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from recbole_uip.em import states
from recbole_uip.em.kernels import RunningSums, TasteFilter, advance, pack, retention
from recbole_uip.em.weights import evidence

N_ITEMS, RANK = 6, 3


@st.composite
def event_tables(draw):
    """Users, items, labels and times with many ties, and which rows count as history."""
    n = draw(st.integers(1, 60))
    integers = lambda high: st.lists(st.integers(0, high), min_size=n, max_size=n)  # noqa: E731
    return {
        "user": np.array(draw(integers(4)), dtype=np.int64),
        "item": np.array(draw(integers(N_ITEMS - 1)), dtype=np.int64),
        "liked": np.array(draw(integers(1)), dtype=float),
        "time": np.array(draw(integers(8)), dtype=float),
        "is_event": np.array(draw(integers(3))) > 0,
        "refresh": float(draw(st.integers(0, 3))),
        "half_life": draw(st.sampled_from([0.7, 5.0, np.inf])),
        "weight": draw(st.sampled_from(["positive", "negative", "all", "contrast"])),
        "seed": draw(st.integers(0, 100)),
    }


def world_of(table):
    """Two folds of item vectors, like rates, priors and the fold of each of five users."""
    rng = np.random.default_rng(table["seed"])
    vectors = rng.normal(size=(2, N_ITEMS, RANK)).astype(np.float32)
    return vectors, expit(rng.normal(size=N_ITEMS)), np.array([1.0, 0.5, 0.2, 0.1]), rng.integers(
        0, 2, 5
    )  # fmt: skip


def kernels_of(table):
    vectors, rate, prior, _ = world_of(table)
    sums = RunningSums(vectors, prior[1:] * 0, prior[1:], table["weight"], table["half_life"])
    return pack([sums, TasteFilter(vectors, prior, table["half_life"])], rate)


def history_of(table):
    return states.index_history(
        table["user"], table["time"], table["is_event"], 5, table["refresh"]
    )


def events_of(table):
    fold = world_of(table)[3]
    return states.Events(table["item"], fold[table["user"]], table["liked"])


def reference_state(table, events):
    """The module's equations, in numpy and double precision."""
    vectors, rate, prior, fold = world_of(table)
    a = retention(table["half_life"])
    item, liked = table["item"][events], table["liked"][events]
    weight, count = evidence(table["weight"], item, liked, rate)
    g = vectors[fold[table["user"][events]], item].astype(float)
    age = np.arange(len(events))[::-1]
    sums = [(a**age * weight) @ g, [(a**age * count).sum()]]
    mean, variance = np.zeros(RANK + 1), prior.copy()
    for x, i, y in zip(np.column_stack([np.ones(len(g)), g]), item, liked, strict=True):
        mean, variance = a * mean, a**2 * variance + (1 - a**2) * prior
        p = expit(logit(rate[i]) + x @ mean)
        curvature = p * (1 - p)
        mean = mean + variance * x * (y - p) / (1 + curvature * (variance * x**2).sum())
        variance = variance / (1 + curvature * variance * x**2)
    return np.concatenate([*sums, mean, variance])


@given(event_tables())
@hypothesis_settings(deadline=None, max_examples=60)
def test_history_is_strictly_earlier(table):
    history = history_of(table)
    for row in range(len(table["user"])):
        expected = {
            other
            for other in np.flatnonzero(table["is_event"])
            if table["user"][other] == table["user"][row]
            and table["time"][other] < table["time"][row] - table["refresh"]
        }
        first = history.first[table["user"][row]]
        assert set(history.events[first : first + history.seen[row]]) == expected


@given(event_tables())
@hypothesis_settings(deadline=None, max_examples=60)
def test_states_follow_the_equations_and_batch_equals_streaming_bit_for_bit(table):
    history, events, kernels = history_of(table), events_of(table), kernels_of(table)
    ((at, batch),) = states.iter_states(kernels, history, events)
    assert sorted(at) == list(range(len(table["user"])))
    for row, state in zip(at, batch, strict=True):
        first = history.first[table["user"][row]]
        seen = history.events[first : first + history.seen[row]]
        streamed = kernels.initial.copy()
        for event in seen:
            advance(streamed, kernels, *(int(c[event]) for c in events[:2]), events.liked[event])
        np.testing.assert_array_equal(streamed, state)
        np.testing.assert_allclose(state, reference_state(table, seen), rtol=2e-5, atol=2e-6)


def test_blocks_do_not_change_states(world, monkeypatch):
    behaviours = world.behaviours
    history = states.index_history(
        behaviours.user, behaviours.time, behaviours.train, behaviours.n_users
    )
    vectors = world.vectors[None].astype(np.float32)
    kernels = pack(
        [RunningSums(vectors, np.zeros(2), np.ones(2), "contrast", 10.0)],
        np.full(behaviours.n_items, 0.5),
    )
    events = states.Events.from_behaviours(behaviours, np.zeros(behaviours.n_users, dtype=np.int64))

    def table():
        out = np.full((len(behaviours), len(kernels.initial)), np.nan)
        for at, state in states.iter_states(kernels, history, events):
            out[at] = state
        return out

    whole = table()
    monkeypatch.setattr(states, "BLOCK_ROWS", 17)
    np.testing.assert_array_equal(table(), whole)
    assert np.isfinite(whole).all()


def test_sums_forget_with_their_half_life():
    vectors = np.full((1, 1, 1), 3.0, dtype=np.float32)
    kernels = pack([RunningSums(vectors, np.zeros(1), np.ones(1), "contrast", 1.0)], np.zeros(1))
    history = states.index_history(np.zeros(4, dtype=np.int64), np.arange(4.0), np.arange(4) < 3, 1)
    zeros = np.zeros(4, dtype=np.int64)
    events = states.Events(zeros, zeros, np.array([1.0, -2.0, 0.5, 0.0]))
    ((at, state),) = states.iter_states(kernels, history, events, np.array([3]))
    assert at.tolist() == [0]
    # ages 2, 1 and 0 at half-life 1: factors 1/4, 1/2 and 1.
    np.testing.assert_allclose(state[0], [3 * (0.25 - 1.0 + 0.5), 1.75])
    offset, noise, known = states.offsets(state)
    np.testing.assert_allclose(offset[0], 3 * -0.25 / 1.75)
    np.testing.assert_allclose(noise, 1 / 1.75)
    assert known.all()


def test_what_is_all_but_forgotten_is_no_evidence():
    """The noise of one old event grows with each event that is none, until there is none left."""
    vectors = np.full((1, 1, 1), 3.0, dtype=np.float32)
    kernels = pack([RunningSums(vectors, np.zeros(1), np.ones(1), "negative", 1.0)], np.zeros(1))
    state = kernels.initial.copy()
    advance(state, kernels, 0, 0, 0.0)
    for age in range(100):
        offset, noise, known = states.offsets(state[None])
        assert known[0] == (age < 40)
        assert noise[0] == (2.0**age if known[0] else np.inf)
        assert offset[0, 0] == (3.0 if known[0] else 0.0)
        advance(state, kernels, 0, 0, 1.0)
    assert not state.any()


def test_the_noise_is_that_of_a_drifting_profile():
    """A random walk whose Kalman gain is 1 - a, seen with unit noise, is missed by 1 / N."""
    a, rng, n_users = retention(5.0), np.random.default_rng(0), 4000
    # gain 1 - a = P / (P + 1) before an event leaves P a after it; the walk brings P back
    step = np.sqrt((1 - a) ** 2 / a)
    profile, total = np.zeros(n_users), np.zeros(n_users)
    for _ in range(60):
        profile += step * rng.normal(size=n_users)
        total = a * total + profile + rng.normal(size=n_users)
    count = (1 - a**60) / (1 - a)
    _, noise, _ = states.offsets(np.array([[0.0, count]]))
    assert ((total / count - profile) ** 2).mean() == pytest.approx(noise[0], rel=0.1)


@pytest.mark.parametrize("weight", ["positive", "all", "contrast"])
def test_an_item_without_a_vector_is_no_evidence(weight):
    vectors = np.array([[[3.0, 1.0], [0.0, 0.0]]], dtype=np.float32)
    kernel = RunningSums(vectors, np.zeros(2), np.ones(2), weight, np.inf)
    kernels = pack([kernel], np.full(2, 0.5))
    state = kernels.initial.copy()
    advance(state, kernels, 1, 0, 1.0)
    assert not state.any()
    advance(state, kernels, 0, 0, 1.0)
    before = state.copy()
    advance(state, kernels, 1, 0, 1.0)
    np.testing.assert_array_equal(state, before)


def test_static_history_sees_all_training_events():
    user = np.array([1, 0, 1, 1])
    history = states.index_history(user, None, np.array([True, True, True, False]), 2)
    assert history.seen.tolist() == [2, 1, 2, 2]
    assert history.events[history.first[1] : history.first[2]].tolist() == [0, 2]


@pytest.mark.parametrize("timed", [True, False])
def test_a_cross_fitted_history_is_of_the_other_parts(timed):
    rng = np.random.default_rng(0)
    user = rng.integers(0, 20, 600)
    user[user == 19] = 18  # the last user has no rows
    time = rng.permutation(600).astype(float) if timed else None
    is_event = rng.random(600) < 0.8
    history = states.cross_fitted_history(user, time, is_event, 20, 4, seed=1)
    for row in range(600):
        first = history.first[history.timeline[row]]
        assert history.first[history.timeline[row] + 1] - first == history.seen[row]
        seen = history.events[first : first + history.seen[row]]
        mine = np.flatnonzero(is_event & (user == user[row]))
        assert row not in seen and np.isin(seen, mine).all()
        assert (np.diff(seen if time is None else time[seen]) > 0).all()
        if is_event[row]:
            # parts differ by one event at most
            assert abs(len(mine) * 3 / 4 - len(seen)) < 1
        else:
            assert len(seen) == len(mine)


def test_a_user_without_evidence_has_infinite_noise():
    offset, noise, known = states.offsets(np.zeros((1, 5)))
    assert not known.any() and np.isinf(noise).all() and (offset == 0).all()


@pytest.mark.parametrize("half_life", [1.0, 7.0, np.inf])
def test_retention_halves_after_a_half_life(half_life):
    expected = 1.0 if np.isinf(half_life) else 0.5
    steps = 1 if np.isinf(half_life) else int(half_life)
    np.testing.assert_allclose(retention(half_life) ** steps, expected)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recbole_uip.em import states
from recbole_uip.em.filter import TasteFilter
from recbole_uip.em.weights import Evidence


@st.composite
def event_tables(draw):
    """Users, items, labels and times with many ties, and which rows count as history."""
    n = draw(st.integers(1, 60))
    integers = lambda high: st.lists(st.integers(0, high), min_size=n, max_size=n)  # noqa: E731
    return {
        "user": np.array(draw(integers(4)), dtype=np.int64),
        "item": np.array(draw(integers(5)), dtype=np.int64),
        "liked": np.array(draw(integers(1)), dtype=float),
        "time": np.array(draw(integers(8)), dtype=float),
        "is_event": np.array(draw(integers(3))) > 0,
        "refresh": float(draw(st.integers(0, 3))),
        "half_life": draw(st.sampled_from([0.7, 5.0, np.inf])),
        "seed": draw(st.integers(0, 100)),
    }


def kernels(table):
    rng = np.random.default_rng(table["seed"])
    vectors, intercept = rng.normal(size=(6, 3)), rng.normal(size=6)
    weight = table["liked"] - 0.3
    evidence = Evidence(weight, np.ones_like(weight))
    yield states.RunningSums(vectors, table["item"], evidence, table["half_life"])
    yield TasteFilter(
        vectors,
        intercept,
        np.array([1.0, 0.5, 0.2, 0.1]),
        table["item"],
        table["liked"],
        table["half_life"],
    )


def history_of(table):
    return states.index_history(
        table["user"], table["time"], table["is_event"], 5, table["refresh"]
    )


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
def test_batch_equals_streaming_bit_for_bit(table):
    history = history_of(table)
    for kernel in kernels(table):
        for at, batch in states.run(kernel, history):
            for row, state in zip(at, batch, strict=True):
                first = history.first[table["user"][row]]
                streamed = kernel.initial()[None, :]
                for event in history.events[first : first + history.seen[row]]:
                    kernel.advance(streamed, kernel.inputs(np.array([event])))
                np.testing.assert_array_equal(streamed[0], state)


def test_blocks_do_not_change_states(world, monkeypatch):
    behaviours = world.behaviours
    history = states.index_history(
        behaviours.user, behaviours.time, behaviours.train, behaviours.n_users
    )
    weight = behaviours.liked - 0.5
    kernel = states.RunningSums(
        world.vectors, behaviours.item, Evidence(weight, np.ones_like(weight)), 10.0
    )

    def table():
        out = np.full((len(behaviours), len(kernel.initial())), np.nan)
        for at, state in states.run(kernel, history):
            out[at] = state
        return out

    whole = table()
    monkeypatch.setattr(states, "BLOCK_EVENTS", 100)
    np.testing.assert_array_equal(table(), whole)
    assert np.isfinite(whole).all()


def test_sums_forget_with_their_half_life():
    evidence = Evidence(np.array([1.0, -2.0, 0.5]), np.ones(3))
    kernel = states.RunningSums(np.array([[3.0]]), np.zeros(3, dtype=np.int64), evidence, 1.0)
    history = states.index_history(np.zeros(4, dtype=np.int64), np.arange(4.0), np.arange(4) < 3, 1)
    ((at, state),) = states.run(kernel, history, np.array([3]))
    assert at.tolist() == [0]
    # ages 2, 1 and 0 at half-life 1: factors 1/4, 1/2 and 1.
    np.testing.assert_allclose(state[0], [3 * (0.25 - 1.0 + 0.5), 1.75, 1 + 1 / 4 + 1 / 16])
    offset, noise, known = states.offsets(state)
    np.testing.assert_allclose(offset[0], 3 * -0.25 / 1.75)
    np.testing.assert_allclose(noise, 1.3125 / 1.75**2)
    assert known.all()


def test_static_history_sees_all_training_events():
    user = np.array([1, 0, 1, 1])
    history = states.index_history(user, None, np.array([True, True, True, False]), 2)
    assert history.seen.tolist() == [2, 1, 2, 2]
    assert history.events[history.first[1] : history.first[2]].tolist() == [0, 2]


def test_a_user_without_evidence_has_infinite_noise():
    offset, noise, known = states.offsets(np.zeros((1, 5)))
    assert not known.any() and np.isinf(noise).all() and (offset == 0).all()


@pytest.mark.parametrize("half_life", [1.0, 7.0, np.inf])
def test_retention_halves_after_a_half_life(half_life):
    expected = 1.0 if np.isinf(half_life) else 0.5
    steps = 1 if np.isinf(half_life) else int(half_life)
    np.testing.assert_allclose(states.retention(half_life) ** steps, expected)

import numpy as np

from recbole_uip.em.match import assign_bins, quantile_edges


def test_bins_hold_equal_shares():
    values = np.random.default_rng(0).normal(size=1000)
    tokens = assign_bins(values, quantile_edges(values, 10), np.ones(1000, dtype=bool))
    assert np.bincount(tokens)[1:].tolist() == [100] * 10


def test_unknown_is_pad_and_outside_is_the_outermost_bin():
    edges = quantile_edges(np.arange(10.0), 5)
    tokens = assign_bins(np.array([-99.0, 99.0, 5.0]), edges, np.array([True, True, False]))
    assert tokens.tolist() == [1, 5, 0]


def test_equal_edges_are_merged():
    edges = quantile_edges(np.array([0.0] * 9 + [1.0]), 4)
    assert edges.tolist() == [0.0]

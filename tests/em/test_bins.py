import numpy as np

from recbole_uip.em.bins import quantile_edges


def test_bins_hold_equal_shares():
    values = np.random.default_rng(0).normal(size=1000)
    bins = np.searchsorted(quantile_edges(values, 10), values, side="right")
    assert np.bincount(bins).tolist() == [100] * 10


def test_equal_edges_are_merged():
    edges = quantile_edges(np.array([0.0] * 9 + [1.0]), 4)
    assert edges.tolist() == [0.0]


def test_without_values_there_is_one_bin():
    assert quantile_edges(np.empty(0), 8).tolist() == []

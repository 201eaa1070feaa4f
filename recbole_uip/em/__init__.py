"""Expectation-Maximisation over profiles: from item vectors and events to tokens.

The modules read in the order of the data: :mod:`weights` (how much an event says),
:mod:`collaborative` (item vectors from behaviour), :mod:`basis` (directions in which users
differ), :mod:`states` (running sums up to a point in time), :mod:`mixture` (the codebook),
:mod:`match` (user against item), and :mod:`facet`, which puts them together.
"""

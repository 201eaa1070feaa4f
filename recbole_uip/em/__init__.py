"""Expectation-Maximisation over profiles: from item vectors and events to tokens.

The modules read in the order of the data: :mod:`weights` (how much an event says),
:mod:`collaborative` (item vectors from behaviour), :mod:`basis` (directions in which users
differ), :mod:`states` (what is known of a user up to a point in time, and running sums of it),
:mod:`filter` (the online Laplace E-step), :mod:`mixture` (the codebook), :mod:`match` (bins of a
user against an item), and :mod:`facet`, which puts them together.
"""

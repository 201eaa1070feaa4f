"""Expectation-Maximisation over profiles: from item vectors and events to tokens.

The modules read in the order of the data: :mod:`weights` (how much an event says),
:mod:`collaborative` (item vectors from behaviour), :mod:`basis` (directions in which users differ),
:mod:`kernels` (states, and the compiled arithmetic on them), :mod:`states` (what is known of a user
up to a point in time), :mod:`prior` (prior variances by empirical Bayes), :mod:`codebook` (what
every codebook has), :mod:`mixture` (the codebook by EM), :mod:`quantizers` (by other ways),
:mod:`residual` (levels of codebooks),
:mod:`bins` (scalars as tokens), :mod:`facet`, which fits one facet by all of these,
:mod:`encoder`, which turns the events of many users into the tokens of all facets; and, for the
gradient posterior, :mod:`snapshots` (points in time at which profiles are inferred),
:mod:`frame` (soft tokens in coordinates), :mod:`ascent` (the E-step by a likelihood given to it),
:mod:`gradient` (EM around it) and :mod:`relinearize` (its middle way to the closed form).
"""

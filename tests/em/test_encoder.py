"""Tokens against their definitions in numpy: codes, bins, matches, users without evidence."""

import numpy as np
import pytest

from recbole_uip.em import states
from recbole_uip.em.kernels import profile_values, score_candidates
from recbole_uip.profiles import infer
from recbole_uip.settings import UIPSettings

from ..test_profiles import FACETS


@pytest.fixture(scope="module")
def inferred(world):
    settings = UIPSettings.from_dict({"uip_facets": FACETS, "uip_history": "observed"})
    return infer(world.behaviours, None, settings)


@pytest.fixture(scope="module")
def encoded(inferred):
    """States and tokens of every row, in the input's order."""
    kernels = inferred.encoder.kernels
    all_states = np.empty((len(inferred.history.timeline), len(kernels.initial)), np.float32)
    for at, block in states.iter_states(kernels, inferred.history, inferred.events):
        all_states[at] = block
    return all_states, inferred.encoder.transform(inferred.history, inferred.events)


def column(inferred, name):
    return [field.name for field in inferred.encoder.fields].index(name)


def stretch(inferred, all_states, k):
    start = inferred.encoder.kernels.start
    return all_states[:, start[k] : start[k + 1]]


def test_codes_are_of_largest_responsibility(inferred, encoded):
    all_states, tokens = encoded
    offset, noise, known = states.offsets(stretch(inferred, all_states, 2))
    residual = offset[known]
    for level, name in enumerate(["uip_company", "uip_company_level2"]):
        mixture = inferred.facets["company"].codebooks_["uip_company"].levels_[level]
        responsibilities = mixture.predict_proba(residual, noise[known])
        codes = tokens[known, column(inferred, name)] - 1
        chosen = np.take_along_axis(responsibilities, codes[:, None].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, responsibilities.max(axis=1), rtol=1e-9)
        residual = residual - mixture.codewords_[codes]
    assert (tokens[~known, column(inferred, "uip_company")] == 0).all() and (~known).any()


def posterior(basis, offset, noise):
    """Posterior mean deviation from the average user, lambda / (lambda + noise) (y - mean)."""
    return basis.variance / (basis.variance + noise[:, None]) * (offset - basis.mean)


def test_traits_are_bins_of_the_lift_of_any_item(inferred, encoded):
    all_states, tokens = encoded
    facet = inferred.facets["leniency"]
    offset, noise, known = states.offsets(stretch(inferred, all_states, 0))
    assert len(np.unique(facet.vectors_)) == 1
    lift = posterior(facet.basis_, offset, noise)[:, 0] * np.float64(facet.vectors_[0, 0, 0])
    expected = np.searchsorted(facet.edges_["uip_leniency_5"], lift, side="right") + 1
    np.testing.assert_array_equal(
        tokens[:, column(inferred, "uip_leniency_5")], np.where(known, expected, 0)
    )


def test_matches_of_sums_are_bins_of_the_lift(inferred, encoded, world):
    all_states, tokens = encoded
    facet = inferred.facets["sums"]
    offset, noise, known = states.offsets(stretch(inferred, all_states, 5))
    vectors = facet.vectors_[inferred.events.fold % 4, world.behaviours.item].astype(float)
    lift = (posterior(facet.basis_, offset, noise) * vectors).sum(axis=1)
    edges = facet.edges_["uip_sums_match"]
    # Sums in another order: values within rounding of an edge may fall on either side.
    clear = np.abs(lift[:, None] - edges).min(axis=1) > 1e-9
    expected = np.where(known, np.searchsorted(edges, lift, side="right") + 1, 0)
    np.testing.assert_array_equal(
        tokens[clear, column(inferred, "uip_sums_match")], expected[clear]
    )
    assert clear.mean() > 0.99


def test_values_of_the_filter_are_lifts_of_the_logit(inferred, encoded, world):
    all_states, _ = encoded
    kernels, item, fold = inferred.encoder.kernels, world.behaviours.item, inferred.events.fold
    values = profile_values(all_states, kernels, 3, item, fold)
    mean = stretch(inferred, all_states, 3)[:, :4].astype(float)
    vectors = inferred.facets["company"].vectors_[fold % 4, item].astype(float)
    expected = mean[:, 0] + (mean[:, 1:] * vectors).sum(axis=1)
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-9)


def test_one_user_with_many_items_gives_the_same_tokens(inferred, encoded):
    all_states, _ = encoded
    row = int(np.argmax(inferred.history.seen))
    items = np.arange(80)
    folds = np.full(80, inferred.events.fold[row])
    seen = np.full(80, inferred.history.seen[row])
    expected = inferred.encoder.matches(np.tile(all_states[row], (80, 1)), seen, items, folds)
    out = np.empty_like(expected)
    score_candidates(
        all_states[row], seen[0], inferred.encoder.kernels, inferred.encoder.match_fields, items,
        folds, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, expected)
    assert len(np.unique(out[:, 0])) > 2

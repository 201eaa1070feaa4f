"""The statistics against scipy, scikit-learn, brute force, and truths that were planted."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from recbole_uip.bridge.metrics import gauc
from recbole_uip.evidence.statistics import (
    auc,
    bootstrap_aucs,
    bootstrap_difference,
    bootstrap_gaucs,
    half_width,
    holm,
    logloss,
    paired_difference,
    relative,
    reliability_curve,
    slice_metrics,
    slices,
    user_clustered_bootstrap,
)

# --- seeds --------------------------------------------------------------------------------------


def test_splits_that_share_rows_leave_more_to_chance(rng):
    a, b = rng.normal(size=(2, 5)) * 0.01 + 0.7
    plain, corrected = paired_difference(a, b), paired_difference(a, b, overlap=0.125)
    assert corrected.mean == plain.mean and corrected.p > plain.p
    # s^2 (1/n + n_test/n_train), Nadeau and Bengio (2003)
    ratio = (corrected.high - corrected.low) / (plain.high - plain.low)
    np.testing.assert_allclose(ratio**2, (1 / 5 + 1 / 8) / (1 / 5))
    error = (a - b).std(ddof=1) * np.sqrt(1 / 5 + 1 / 8)
    expected = 2 * scipy.stats.t(4).sf(abs((a - b).mean()) / error)
    np.testing.assert_allclose(corrected.p, expected)


def test_paired_difference_is_the_paired_t_test(rng):
    a, b = rng.normal(size=7), rng.normal(size=7)
    found, expected = paired_difference(a, b), scipy.stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(
        [found.mean, found.low, found.high, found.p],
        [(a - b).mean(), interval.low, interval.high, expected.pvalue],
    )
    assert found.n == 7
    np.testing.assert_allclose(half_width(a - b), (found.high - found.low) / 2)


def test_pairs_without_a_number_do_not_count():
    found = paired_difference([0.7, np.nan, 0.9], [0.6, 0.5, 0.7])
    np.testing.assert_allclose(found.mean, 0.15)
    assert found.n == 2


def test_one_pair_has_a_difference_but_no_interval():
    found = paired_difference([0.7], [0.6])
    np.testing.assert_allclose(found.mean, 0.1)
    assert np.isnan([found.low, found.high, found.p]).all() and found.n == 1
    assert np.isnan(paired_difference([], []).mean)


def test_the_same_difference_each_time_is_certain():
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p == 0
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1


def test_values_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        paired_difference([0.1, 0.2], [0.1])


def test_holm_by_hand():
    # R: p.adjust(c(.01, .04, .03, .005), "holm")
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    # Ties share the larger factor's value; nothing exceeds one.
    np.testing.assert_allclose(holm([0.02, 0.02, 0.6]), [0.06, 0.06, 0.6])
    np.testing.assert_allclose(holm([0.7, 0.9]), [1.0, 1.0])
    assert len(holm([])) == 0


def test_holm_does_not_count_what_was_not_tested():
    np.testing.assert_allclose(holm([np.nan, 0.01, 0.04]), [np.nan, 0.02, 0.04])


def test_holm_counts_what_is_still_to_be_tested():
    np.testing.assert_allclose(holm([np.nan, 0.01, 0.04], 4), [np.nan, 0.04, 0.12])


def test_holm_keeps_the_family_wise_error(rng):
    # 400 families of 10 true hypotheses: about one in twenty may reject any.
    rejected = [holm(rng.random(10)).min() < 0.05 for _ in range(400)]
    assert 0.02 < np.mean(rejected) < 0.08


def test_relative_improvement_in_both_customs():
    found = relative(0.84, 0.8)
    np.testing.assert_allclose([found.ratio, found.above_half], [0.05, 0.04 / 0.3])
    assert np.isnan(relative(0.6, 0.5).above_half)


# --- AUC and LogLoss ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_auc_with_ties(rng, levels):
    label = (rng.random(300) < 0.4).astype(np.int8)
    score = rng.integers(levels, size=300).astype(np.float32) / levels
    np.testing.assert_allclose(auc(label, score), sklearn.metrics.roc_auc_score(label, score))


def test_auc_of_one_class_is_not_a_number():
    assert np.isnan(auc(np.ones(3), np.arange(3.0)))
    assert auc(np.array([0, 1]), np.array([0.5, 0.5])) == 0.5


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="a score is NaN"):
        auc(np.array([0, 1]), np.array([0.1, np.nan]))


def test_logloss(rng):
    label, score = rng.integers(2, size=50), rng.random(50)
    np.testing.assert_allclose(logloss(label, score), sklearn.metrics.log_loss(label, score))
    np.testing.assert_allclose(logloss(np.array([1]), np.array([0.0])), -np.log(1e-15))
    assert np.isnan(logloss(np.empty(0), np.empty(0)))


# --- users --------------------------------------------------------------------------------------


def rows(rng, n_users, per_user=10, skill=0.0):
    """Users who differ in how well two models know them; ``skill`` is what a has over b."""
    user = np.repeat(np.arange(n_users), per_user)
    truth = rng.normal(size=len(user))
    label = (truth + rng.normal(size=len(user)) > 0).astype(int)
    scores = []
    for extra in (skill, 0.0):
        known = 0.5 + extra + 0.7 * rng.normal(size=n_users)[user]
        scores.append(known * truth + rng.normal(size=len(user)))
    return user, label, *scores


def test_bootstrap_repeats_the_rows_of_the_users_drawn(rng):
    user, label, score, _ = rows(rng, 12)
    score = score.round(1)  # with ties
    shuffled = rng.permutation(len(user))
    user, label, score = user[shuffled], label[shuffled], score[shuffled]
    found = bootstrap_aucs(user, label, score, n_boot=20, seed=3)
    generator = np.random.default_rng(3)
    for replicate in found:
        drawn = generator.integers(12, size=12)
        chosen = np.concatenate([np.flatnonzero(user == each) for each in drawn])
        np.testing.assert_allclose(
            replicate, sklearn.metrics.roc_auc_score(label[chosen], score[chosen])
        )


def test_resamples_do_not_depend_on_the_order_of_rows(rng):
    user, label, score, _ = rows(rng, 15)
    order = rng.permutation(len(user))
    np.testing.assert_allclose(
        bootstrap_aucs(user, label, score, 10),
        bootstrap_aucs(user[order], label[order], score[order], 10),
    )


def test_users_to_draw_from_may_be_more_than_those_with_rows(rng):
    user, label, score, _ = rows(rng, 10)
    more = np.arange(20)
    found = bootstrap_aucs(user, label, score, 5, 0, more)
    drawn = np.random.default_rng(0).integers(20, size=20)
    weight = np.bincount(drawn, minlength=20)[user]
    expected = sklearn.metrics.roc_auc_score(label, score, sample_weight=weight)
    np.testing.assert_allclose(found[0], expected)
    with pytest.raises(ValueError, match="a row's user is not among the users to draw from"):
        bootstrap_aucs(user, label, score, 5, 0, np.arange(9))


def test_a_result_does_not_differ_from_itself(rng):
    user, label, score, _ = rows(rng, 20)
    found = user_clustered_bootstrap(user, label, score, score, n_boot=50)
    assert (found.mean, found.low, found.high, found.p, found.n) == (0, 0, 0, 1, 20)


def test_several_seeds_are_averaged_within_each_resample(rng):
    user, label, a, b = rows(rng, 20)
    found = user_clustered_bootstrap(user, label, np.stack([a, b]), np.stack([b, a]), n_boot=50)
    np.testing.assert_allclose([found.mean, found.low, found.high], 0, atol=1e-12)


def test_list_auc_is_resampled_by_user(rng):
    user, label, score, _ = rows(rng, 12)
    group = 3 * user + rng.integers(0, 3, len(user))
    found = bootstrap_gaucs(user, group, label, score, n_boot=20, seed=4)
    # The same users drawn, a copy of a user's rows being lists of its own.
    generator = np.random.default_rng(4)
    users = np.unique(user)
    for replicate in found:
        drawn = users[generator.integers(len(users), size=len(users))]
        copies = [np.flatnonzero(user == each) for each in drawn]
        own = np.concatenate([100 * copy + group[at] for copy, at in enumerate(copies)])
        at = np.concatenate(copies)
        np.testing.assert_allclose(replicate, gauc(own, label[at], score[at]))
    # One that all rows of a list share makes no difference of it.
    np.testing.assert_array_equal(
        bootstrap_gaucs(user, group, label, score + group, n_boot=20, seed=4), found
    )


@pytest.fixture(scope="module")
def repeated_studies():
    """Intervals of 200 studies of 60 users each, and the true difference of AUC."""
    rng = np.random.default_rng(5)
    user, label, a, b = rows(rng, 20_000, skill=0.3)
    truth = auc(label, a) - auc(label, b)
    return truth, [
        user_clustered_bootstrap(*rows(rng, 60, skill=0.3), n_boot=100) for _ in range(200)
    ]


def test_intervals_over_users_cover_the_truth(repeated_studies):
    truth, found = repeated_studies
    # 95% but for what 200 studies (1.5%) and 60 users leave open.
    assert 0.89 < np.mean([each.low <= truth <= each.high for each in found]) < 0.99


def test_p_values_over_users_under_no_difference():
    rng = np.random.default_rng(6)
    p = [user_clustered_bootstrap(*rows(rng, 60), n_boot=100).p for _ in range(200)]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.11
    assert 0.35 < np.median(p) < 0.65


def test_rows_of_a_user_are_no_independent_evidence(rng):
    """Each row ten times over: no more users, hence no narrower an interval."""
    user, label, a, b = rows(rng, 60, skill=0.3)
    once = user_clustered_bootstrap(user, label, a, b, n_boot=300)
    tenfold = user_clustered_bootstrap(*(np.repeat(each, 10) for each in (user, label, a, b)), 300)
    np.testing.assert_allclose(
        [tenfold.low, tenfold.high, tenfold.p], [once.low, once.high, once.p], atol=1e-9
    )


def test_bootstrap_difference_by_hand():
    replicates = np.append(np.linspace(-1, 1, 201), np.nan)
    found = bootstrap_difference(0.5, replicates, 9)
    np.testing.assert_allclose([found.low, found.high], [-0.95, 0.95])
    spread = np.linspace(-1, 1, 201).std(ddof=1)
    np.testing.assert_allclose(found.p, 2 * scipy.stats.norm.sf(0.5 / spread))
    assert found.n == 9
    assert np.isnan(bootstrap_difference(0.5, np.array([np.nan, 0.1]), 9).p)


def test_few_users_who_tell_anything_give_no_interval(rng):
    user = np.repeat(np.arange(40), 2)
    label = np.tile([1, 1], 40)
    for n_mixed, expected in ((1, True), (3, True), (12, False)):
        label[1 : 2 * n_mixed : 2] = 0
        a, b = rng.random((2, len(user)))
        drawn = [
            bootstrap_aucs(user[: 2 * n_mixed], label[: 2 * n_mixed], each[: 2 * n_mixed], 300, 0)
            for each in (a, b)
        ]
        absent = np.random.default_rng(0).random(300) < (1 - n_mixed / 40) ** 40
        change = np.where(absent, np.nan, drawn[0] - drawn[1])
        found = bootstrap_difference(np.nanmean(change), change, 40)
        assert np.isnan([found.low, found.high, found.p]).all() == expected
    # No difference in any resample is none, and known.
    assert bootstrap_difference(0.0, np.zeros(100), 40).p == 1.0


# --- calibration --------------------------------------------------------------------------------


def test_reliability_in_bins_of_equal_mass(rng):
    score = rng.permutation(150) / 150
    label = rng.integers(2, size=150)
    found = reliability_curve(label, score, bins=15)
    order = np.argsort(score)
    np.testing.assert_array_equal(found.rows, 10)
    np.testing.assert_allclose(found.score, score[order].reshape(15, 10).mean(axis=1))
    np.testing.assert_allclose(found.share, label[order].reshape(15, 10).mean(axis=1))
    gaps = np.abs(label[order].reshape(15, 10).mean(axis=1) - found.score)
    np.testing.assert_allclose(found.error, gaps.mean())


def test_calibration_error_is_the_planted_one(rng):
    truth = rng.uniform(0.2, 0.7, size=200_000)
    label = rng.random(len(truth)) < truth
    assert reliability_curve(label, truth).error < 0.005
    np.testing.assert_allclose(reliability_curve(label, truth + 0.1).error, 0.1, atol=0.005)


def test_rows_of_one_score_share_a_bin_whatever_their_order(rng):
    score = np.repeat([0.2, 0.2, 0.8], 10)
    label = rng.integers(2, size=30)
    order = rng.permutation(30)
    found = reliability_curve(label, score, bins=3)
    other = reliability_curve(label[order], score[order], bins=3)
    np.testing.assert_allclose(found.share, other.share)
    assert sorted(found.rows) == [0, 10, 20]
    gap = [abs(label[:20].mean() - 0.2) * 20, abs(label[20:].mean() - 0.8) * 10]
    np.testing.assert_allclose(found.error, sum(gap) / 30)


def test_no_rows_have_no_calibration():
    assert np.isnan(reliability_curve(np.empty(0), np.empty(0)).error)


# --- slices -------------------------------------------------------------------------------------


def test_slices_part_the_rows():
    history = np.array([0, 1, 4, 5, 19, 20, 500])
    item_rows = np.array([0, 1, 9, 10, 99, 1000, 100])
    user_rows = np.array([0, 1, 0, 2, 0, 3, 0])
    found = slices(history, item_rows, user_rows)
    for by_name in found.values():
        np.testing.assert_array_equal(np.sum(list(by_name.values()), axis=0), 1)
    by_history = found["history length"]
    assert {name: mask.sum() for name, mask in by_history.items()} == {
        "0": 1, "1-4": 2, "5-19": 2, "20+": 2,
    }  # fmt: skip
    np.testing.assert_array_equal(np.flatnonzero(found["user in training"]["unseen"]), [0, 2, 4, 6])
    by_item = found["training rows of the item"]
    np.testing.assert_array_equal(np.flatnonzero(by_item["0 (unseen)"]), [0])
    np.testing.assert_array_equal(np.flatnonzero(by_item["1000+"]), [5])


def test_metrics_of_a_slice(rng):
    label, score = rng.integers(2, size=100), rng.random(100)
    mask = np.arange(100) < 40
    found = slice_metrics(label, score, mask)
    assert found["rows"] == 40
    np.testing.assert_allclose(
        [found["auc"], found["logloss"]],
        [
            sklearn.metrics.roc_auc_score(label[:40], score[:40]),
            sklearn.metrics.log_loss(label[:40], score[:40]),
        ],
    )
    nothing = slice_metrics(label, score, np.zeros(100, dtype=bool))
    assert np.isnan(nothing["auc"]) and np.isnan(nothing["logloss"]) and nothing["rows"] == 0
    assert np.isnan(slice_metrics(label, score, label == 1)["auc"])

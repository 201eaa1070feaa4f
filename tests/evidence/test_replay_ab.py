"""Hashed arms, periods, and differences between users, on rows whose truth is known."""

import hashlib

import numpy as np
import pytest
import sklearn.metrics

from recbole_uip.evidence.replay import ab
from recbole_uip.evidence.replay.ab import compare, effective_users, in_arm_b, periods, redrawn
from recbole_uip.evidence.statistics import bootstrap_aucs, bootstrap_sums, rerandomised_aucs

N_BOOT = 300


def test_a_user_stays_in_its_arm():
    users = [f"u{number}" for number in range(1000)]
    first = in_arm_b(users)
    # The rule in words: the first bit of SHA-256 of "salt:user".
    digits = [hashlib.sha256(f"recbole-uip:{user}".encode()).hexdigest()[0] for user in users]
    assert first.tolist() == [digit >= "8" for digit in digits]
    assert (in_arm_b(users[::-1])[::-1] == first).all()
    assert 0.4 < (in_arm_b(users, "other") == first).mean() < 0.6


@pytest.mark.parametrize("salt", ["recbole-uip", "", "größe"])
def test_arms_are_balanced(salt):
    share = in_arm_b([str(number) for number in range(20_000)], salt).mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(20_000)


def world(rng, n_users=200, rows_per_user=20, gain=1.0):
    """Users with a taste; the treatment's scores know it, the baseline's do not."""
    user = np.repeat(np.arange(n_users), rows_per_user)
    level, taste = rng.normal(size=len(user)), rng.normal(size=n_users)[user]
    truth = 1 / (1 + np.exp(-(level + gain * taste)))
    label = (rng.random(len(user)) < truth).astype(float)
    arm_b = in_arm_b([f"u{number}" for number in range(n_users)])[user]
    return user, label, arm_b, 1 / (1 + np.exp(-level)), truth


def test_metrics_are_those_of_the_rows(rng):
    user, label, arm_b, baseline, treatment = world(rng)
    found = compare(user, label, arm_b, baseline, treatment, n_boot=20)
    assert found.rows == ((~arm_b).sum(), arm_b.sum())
    assert found.users == (len(set(user[~arm_b])), len(set(user[arm_b])))
    for part, rows, score in (
        (found.a, ~arm_b, baseline),
        (found.b_before, arm_b, baseline),
        (found.b, arm_b, treatment),
    ):
        here = label[rows], score[rows]
        assert part["auc"].mean == pytest.approx(sklearn.metrics.roc_auc_score(*here))
        assert part["logloss"].mean == pytest.approx(sklearn.metrics.log_loss(*here))
        assert part["score"].mean == pytest.approx(here[1].mean())
        assert part["share"].mean == pytest.approx(here[0].mean())
        assert part["gap"].mean == pytest.approx(here[1].mean() - here[0].mean())
        # Fifteen bins of equal mass, by hand.
        bins = np.array_split(np.argsort(here[1], kind="stable"), 15)
        gaps = [abs(here[1][each].mean() - here[0][each].mean()) * len(each) for each in bins]
        assert part["ece"].mean == pytest.approx(sum(gaps) / len(here[0]), abs=2e-3)
    for name in ab.METRICS:
        a, before, after = (part[name].mean for part in (found.a, found.b_before, found.b))
        assert found.a_a[name].mean == pytest.approx(before - a)
        assert found.a_b[name].mean == pytest.approx(after - a)
        assert found.did[name].mean == pytest.approx(found.a_b[name].mean - found.a_a[name].mean)
        for part in (found.a, found.b, found.a_a, found.a_b, found.did):
            assert part[name].low <= part[name].mean <= part[name].high


def test_a_planted_gain_shows_and_none_does_not(rng):
    user, label, arm_b, baseline, treatment = world(rng)
    found = compare(user, label, arm_b, baseline, treatment, N_BOOT)
    for name, sign in (("auc", 1), ("logloss", -1)):
        assert found.a_a[name].low < 0 < found.a_a[name].high
        for difference in (found.a_b[name], found.did[name]):
            assert (sign * difference.low > 0) and (sign * difference.high > 0)
        widths = [each[name].high - each[name].low for each in (found.a_b, found.did)]
        assert widths[1] < widths[0]  # the paired difference is the tighter one
    nothing = compare(user, label, arm_b, baseline, baseline, N_BOOT)
    assert nothing.a_b == nothing.a_a
    assert {each.mean for each in nothing.did.values()} == {0.0}


def test_an_imbalance_of_the_arms_is_in_a_a_and_not_in_the_difference(rng):
    user, label, arm_b, baseline, treatment = world(rng)
    # Arm B's users are harder to tell: half of their labels are a coin's.
    coin = arm_b & (rng.random(len(label)) < 0.5)
    label = np.where(coin, rng.random(len(label)) < 0.5, label).astype(float)
    found = compare(user, label, arm_b, baseline, treatment, N_BOOT)
    assert found.a_a["auc"].high < 0
    assert found.did["auc"].low > 0
    assert found.a_b["auc"].mean < found.did["auc"].mean


def test_intervals_hold_the_truth_as_often_as_they_say(rng):
    """A/A of users who differ: of 95% intervals, about one in twenty misses zero."""
    missed, n_users, rows = 0, 60, 10
    user = np.repeat(np.arange(n_users), rows)
    score = np.full(len(user), 0.5)
    for seed in range(120):
        likes = np.repeat(rng.beta(2, 2, n_users), rows)
        label = (rng.random(len(user)) < likes).astype(float)
        arm_b = np.repeat(rng.random(n_users) < 0.5, rows)
        found = compare(user, label, arm_b, score, score, 100, seed).a_a["share"]
        missed += not found.low < 0 < found.high
    assert 1 <= missed <= 16


def test_sums_are_of_the_same_resamples_as_aucs(rng):
    user = rng.integers(0, 8, 60)
    label, score = rng.integers(0, 2, 60), rng.random(60)
    sums = bootstrap_sums(user, np.column_stack([np.ones(60), label]), 5, seed=3)
    aucs = bootstrap_aucs(user, label, score, 5, seed=3)
    generator, users = np.random.default_rng(3), np.unique(user)
    for replicate in range(5):
        drawn = users[generator.integers(len(users), size=len(users))]
        rows = np.concatenate([np.flatnonzero(user == each) for each in drawn])
        np.testing.assert_allclose(sums[replicate], [len(rows), label[rows].sum()])
        expected = sklearn.metrics.roc_auc_score(label[rows], score[rows])
        assert aucs[replicate] == pytest.approx(expected)


def test_other_draws_of_the_arms(rng):
    user = np.repeat(np.arange(30), 4)
    label, score = rng.integers(0, 2, 120), rng.random(120)
    found = rerandomised_aucs(user, label, score, 4, seed=5)
    generator = np.random.default_rng(5)
    for difference in found:
        half = generator.integers(2, size=30)[user] == 1
        one, other = (sklearn.metrics.roc_auc_score(label[m], score[m]) for m in (half, ~half))
        assert difference == pytest.approx(one - other)
    told = redrawn(user, label, score, 0.0)
    assert told["low"] < 0 < told["high"] and told["as_far"] == 1.0
    assert redrawn(user, label, score, 1.0)["as_far"] == 0.0
    # The spread is that which resampled users show.
    arm_b = in_arm_b([str(number) for number in range(30)])[user]
    interval = compare(user, label, arm_b, score, score, N_BOOT).a_a["auc"]
    assert 0.5 < (told["high"] - told["low"]) / (interval.high - interval.low) < 2


def test_effective_users():
    assert effective_users(np.repeat(np.arange(12), 5)) == pytest.approx(12)
    assert effective_users(np.repeat(np.arange(101), [900] + [1] * 100)) < 1.3
    assert effective_users(np.empty(0, int)) == 0


def test_small_days_are_merged_with_those_that_follow(rng, monkeypatch):
    monkeypatch.setattr(ab, "MIN_ROWS", 10)
    monkeypatch.setattr(ab, "MIN_USERS", 3)
    sizes = (100, 6, 6, 100, 100, 4)
    day = np.repeat(np.arange(len(sizes)), sizes)
    time = 86_400 * (day + 10_000.0) + rng.integers(0, 86_400, len(day))
    shuffled = rng.permutation(len(day))
    user, label = rng.integers(0, 40, len(day)), rng.integers(0, 2, len(day))
    arm_b = user % 2 == 0
    found = periods(time[shuffled], user, label, arm_b)
    days = [sorted(set(day[shuffled][rows])) for rows in found]
    # The third day makes no period with the second; the last one joins the one before it.
    assert days == [[0], [1, 2, 3], [4, 5]]
    assert sorted(np.concatenate(found)) == list(range(len(day)))
    assert all((np.diff(time[shuffled][rows]) >= 0).all() for rows in found)


def test_a_short_test_period_is_one_period(rng):
    time = 86_400.0 * np.arange(30)
    (rows,) = periods(time, np.arange(30), np.arange(30) % 2, np.arange(30) % 3 == 0)
    assert rows.tolist() == list(range(30))

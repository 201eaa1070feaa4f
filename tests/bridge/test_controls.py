"""Control arms: tokens that say nothing, and means before they are quantised."""

import numpy as np
import pytest
from recbole.utils import FeatureType
from sklearn.metrics import roc_auc_score

from recbole_uip.behaviours import TEST, TRAIN, Behaviours
from recbole_uip.bridge import UIPDataset
from recbole_uip.bridge.controls import float_fields, random_tokens, shuffled_tokens
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.profiles import ProfileField
from recbole_uip.settings import ArmSettings, SettingsError

from .conftest import COMPANY, rows_of

SAMPLED_CANDIDATES = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"}

BOTH = ("leniency", "company")


def informed(n_users=400, n_rows=20, kind="match", equal=True):
    """Users with tastes, and a field whose tokens tell the label; the first row has [PAD]."""
    rng = np.random.default_rng(0)
    counts = np.full(n_users, n_rows) if equal else rng.integers(1, 2 * n_rows, n_users)
    user = np.repeat(np.arange(n_users), counts)
    position = np.concatenate([np.arange(count) for count in counts])
    rate = rng.uniform(0.1, 0.9, n_users)
    liked = (rng.random(len(user)) < rate[user]).astype(float)
    values = 1 + np.clip(8 * (0.5 * rate[user] + 0.5 * liked), 0, 7).astype(np.int32)
    values[position == 0] = 0
    shuffle = rng.permutation(len(user))
    behaviours = Behaviours(
        user[shuffle],
        np.zeros(len(user), dtype=np.int64),
        liked[shuffle],
        position[shuffle].astype(float),
        np.where(position < 15, TRAIN, TEST).astype(np.int8)[shuffle],
        n_users,
        1,
    )
    field = ProfileField("uip_told", "told", kind, 8, values[shuffle])
    return field, behaviours, position[shuffle]


@pytest.mark.parametrize("kind", ["code", "bin", "match"])
def test_random_tokens(kind):
    field, behaviours, _ = informed(kind=kind)
    tokens = random_tokens(field, behaviours, seed=1)
    np.testing.assert_array_equal(tokens == 0, field.values == 0)
    drawn = tokens[tokens > 0]
    np.testing.assert_array_equal(np.unique(drawn), np.arange(1, 9))
    shares = np.bincount(drawn, minlength=9)[1:] / len(drawn)
    np.testing.assert_allclose(shares, 1 / 8, atol=0.05)
    of_a_user = [set(tokens[(behaviours.user == u) & (tokens > 0)]) for u in range(40)]
    if kind == "match":
        assert min(map(len, of_a_user)) > 3
    else:
        # As codes are: the user's.
        assert {len(each) for each in of_a_user} == {1}
    if kind == "match":
        known = field.values > 0
        assert roc_auc_score(behaviours.liked[known], field.values[known]) > 0.9
        assert abs(roc_auc_score(behaviours.liked[known], tokens[known]) - 0.5) < 0.02
    np.testing.assert_array_equal(tokens, random_tokens(field, behaviours, seed=1))
    assert (tokens != random_tokens(field, behaviours, seed=2)).any()
    other = ProfileField("uip_other", "told", kind, 8, field.values)
    assert (tokens != random_tokens(other, behaviours, seed=1)).any()


def test_shuffled_tokens_are_all_of_another_user_at_the_same_place():
    field, behaviours, position = informed()
    # Tokens that tell whose they are and where.
    told = ProfileField("uip_told", "told", "code", 10**6, 1 + behaviours.user * 100 + position)
    whose, where = np.divmod(shuffled_tokens(told, behaviours, seed=1) - 1, 100)
    np.testing.assert_array_equal(where, position)
    assert (whose != behaviours.user).all()
    pairs = {(int(u), int(w)) for u, w in zip(behaviours.user, whose, strict=True)}
    assert len(pairs) == 400 == len({other for _, other in pairs})

    tokens = shuffled_tokens(field, behaviours, seed=1)
    np.testing.assert_array_equal(np.bincount(tokens), np.bincount(field.values))
    np.testing.assert_array_equal(tokens == 0, field.values == 0)
    assert abs(roc_auc_score(behaviours.liked, tokens) - 0.5) < 0.03
    assert abs(roc_auc_score(behaviours.liked, field.values) - 0.5) > 0.2
    np.testing.assert_array_equal(tokens, shuffled_tokens(field, behaviours, seed=1))
    assert (tokens != shuffled_tokens(field, behaviours, seed=2)).any()


def test_shuffled_tokens_of_users_of_different_lengths():
    field, behaviours, position = informed(equal=False)
    counts = np.bincount(behaviours.user)
    told = ProfileField("uip_told", "told", "code", 10**6, 1 + behaviours.user * 100 + position)
    whose, where = np.divmod(shuffled_tokens(told, behaviours, seed=1) - 1, 100)
    assert (whose != behaviours.user).all()
    np.testing.assert_array_equal(where, np.minimum(position, counts[whose] - 1))
    # The longest user has the shortest as its other; all others are of about one length.
    assert np.quantile(np.abs(counts[whose] - counts[behaviours.user]), 0.95) <= 1
    shares = [
        np.bincount(each, minlength=9) / len(each)
        for each in (shuffled_tokens(field, behaviours, seed=1), field.values)
    ]
    assert 0.5 * np.abs(shares[0] - shares[1]).sum() < 0.02


def test_all_fields_of_a_user_come_from_the_same_other():
    """A shuffled profile is a whole profile: its fields still belong together."""
    field, behaviours, position = informed()
    told = [
        ProfileField(name, "told", kind, 10**6, 1 + behaviours.user * 100 + position)
        for name, kind in (("uip_a", "code"), ("uip_b", "match"))
    ]
    first, second = (shuffled_tokens(each, behaviours, seed=1) for each in told)
    np.testing.assert_array_equal(first, second)


@pytest.fixture
def built(small):
    dataset = UIPDataset(small.config())
    return dataset, dataset.build()


@pytest.mark.parametrize(
    ("control", "make"), [("random", random_tokens), ("shuffled", shuffled_tokens)]
)
def test_a_control_arm_has_the_fields_of_the_profile(built, control, make):
    dataset, splits = built
    arm = ArmSettings("control", BOTH, "drop", control)
    different = 0
    for split in splits:
        view, true = split.select(arm), split.select(ArmSettings("uip", BOTH, "drop"))
        assert view.profile_fields == true.profile_fields
        for field in dataset.profiles.fields:
            expected = make(field, dataset.behaviours, dataset.settings.seed)[rows_of(split)]
            np.testing.assert_array_equal(view.inter_feat[field.name].numpy(), expected)
            assert view.num(field.name) == true.num(field.name) == field.size + 1
            different += (expected != true.inter_feat[field.name].numpy()).sum()
    assert different > 0


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_static_controls_are_one_token_a_user(small, control):
    dataset = UIPDataset(small.config(uip_time="static"))
    train = dataset.build()[0].select(ArmSettings("control", BOTH, "drop", control))
    make = {"random": random_tokens, "shuffled": shuffled_tokens}[control]
    for field in dataset.profiles.fields:
        if field.kind == "match":
            continue
        expected = make(field, dataset.behaviours, dataset.settings.seed)
        table = train.user_feat[field.name].numpy()
        np.testing.assert_array_equal(table[dataset.behaviours.user], expected)


def test_means_are_float_fields_of_unit_variance(built):
    dataset, splits = built
    columns = float_fields(dataset.profiles, dataset.behaviours, BOTH)
    means = dataset.profiles.encoder.means(dataset.profiles.history, dataset.profiles.events)
    assert {name for name in columns if "match" not in name} == {
        "uip_leniency_5",
        "uip_leniency_inf",
        *(f"uip_company_{number}" for number in range(1, 5)),
    }
    train = dataset.behaviours.train
    for name, column in columns.items():
        np.testing.assert_allclose(column[train].std(), 1.0, rtol=1e-4)
        stem = name if name in means else name.rpartition("_")[0]
        number = 0 if name in means else int(name.rpartition("_")[2]) - 1
        assert np.corrcoef(column, means[stem][:, number])[0, 1] > 0.9999
        unknown = dataset.profiles.history.seen == 0
        assert (column[unknown] == 0).all() and unknown.any()
    only = float_fields(dataset.profiles, dataset.behaviours, ("company",))
    assert only.keys() == {name for name in columns if name.startswith("uip_company")}

    view = splits[2].select(ArmSettings("means", BOTH, "drop", values="means"))
    assert not [name for name in view.profile_fields if view.field2type[name] == FeatureType.TOKEN]
    for name, column in columns.items():
        assert view.field2type[name] == FeatureType.FLOAT
        value, index = view.inter_feat[name].numpy().T
        np.testing.assert_array_equal(value, column[rows_of(splits[2])])
        assert (index == 1).all()
        assert name in view.config["numerical_features"]


def test_a_binned_value_grows_with_its_bin(built):
    """Means and tokens are of the same thing."""
    dataset, _ = built
    columns = float_fields(dataset.profiles, dataset.behaviours, BOTH)
    compared = 0
    for field in dataset.profiles.fields:
        if field.kind == "code":
            continue
        known = field.values > 0
        order = np.argsort(columns[field.name][known], kind="stable")
        assert (np.diff(field.values[known][order]) >= 0).all(), field.name
        compared += 1
    assert compared >= 3


def test_controls_through_a_run(small, tmp_path):
    arms = {
        "uip": {"facets": "all"},
        "random": {"facets": "all", "control": "random"},
        "shuffled": {"facets": "all", "control": "shuffled"},
        "means": {"facets": "all", "values": "means"},
    }
    external = dict(small.config().variable_config_dict)
    results = run_recbole_uip(
        "FM", "small", config={**external, "uip_arms": arms, "uip_output": str(tmp_path / "out")}
    )["models"]["FM"]
    fields = {name: set(arm["profile_fields"]) for name, arm in results.items()}
    assert fields["uip"] == fields["random"] == fields["shuffled"]
    assert {"uip_company_1", "uip_leniency_5"} <= fields["means"]
    assert "uip_company" not in fields["means"]
    losses = [arm["test"]["logloss"] for arm in results.values()]
    assert len(set(losses)) == 4 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"control": "random"}, r"uip_arms.arm.control=random has no match fields for sampled"),
        ({"control": "shuffled"}, r"uip_arms.arm.control=shuffled has no match fields"),
        ({"values": "means"}, r"values=means has no match values for sampled negatives"),
    ],
)
def test_sampled_negatives_are_refused(small, section, message):
    config = small.config(
        threshold=None,
        train_neg_sample_args={"distribution": "uniform", "sample_num": 1},
        eval_args=SAMPLED_CANDIDATES,
        uip_facets={"company": {**COMPANY, "weight": "all"}},
        uip_arms={"arm": {"facets": "all", **section}},
    )
    train = UIPDataset(config).build()[0]
    with pytest.raises(SettingsError, match=message):
        train.select(config.uip.arms[0])


def test_a_control_without_match_goes_with_sampled_negatives(small):
    facets = {"company": {"source": "collaborative", "weight": "all", "rank": 4, "codes": 4}}
    config = small.config(
        threshold=None,
        eval_args=SAMPLED_CANDIDATES,
        train_neg_sample_args={"distribution": "uniform", "sample_num": 1},
        uip_facets=facets,
        uip_arms={"arm": {"facets": "all", "control": "random"}},
    )
    train = UIPDataset(config).build()[0].select(config.uip.arms[0])
    assert train.profile_fields

"""The scikit-learn transformer against the pipeline, in time, and across banks."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils import estimator_checks

from recbole_uip import ProfileEncoder
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.store import BankError
from recbole_uip.behaviours import TEST, TRAIN, Behaviours, folds_of
from recbole_uip.em.weights import like_rate
from recbole_uip.profiles import infer
from recbole_uip.settings import SettingsError, UIPSettings

from ..em.conftest import make_world
from ..lm.conftest import ENDINGS, TEXTS, save_lm
from ..test_profiles import FACETS

HALF = 30.0  # of 60 days


@pytest.fixture(scope="module")
def table():
    behaviours = make_world(n_users=120, n_items=50, events_per_user=30).behaviours
    return pd.DataFrame(
        {
            "user_id": [f"u{user}" for user in behaviours.user],
            "item_id": behaviours.item,
            "label": behaviours.liked.astype(int),
            "timestamp": behaviours.time,
        },
        index=np.arange(len(behaviours))[::-1],
    )


@pytest.fixture(scope="module")
def early(table):
    return table[table.timestamp < HALF]


@pytest.fixture(scope="module")
def late(table):
    return table[table.timestamp >= HALF]


@pytest.fixture(scope="module")
def whole(table):
    return ProfileEncoder(FACETS).fit(table)


@pytest.fixture(scope="module")
def _encoder(early):
    return ProfileEncoder(FACETS).fit(early)


@pytest.fixture
def encoder(_encoder):
    """Fitted on the first half."""
    return copy.copy(_encoder)


def behaviours_of(table, split):
    """As the encoder numbers tokens: sorted as text; item 0 is none."""
    users, user = np.unique(table.user_id.to_numpy(str), return_inverse=True)
    items, item = np.unique(table.item_id.to_numpy().astype(str), return_inverse=True)
    liked, time = table.label.to_numpy(float), table.timestamp.to_numpy()
    return Behaviours(user, item + 1, liked, time, split, len(users), len(items) + 1)


def inferred(table, split=None, texts=None, **keys):
    split = np.zeros(len(table), np.int8) if split is None else split
    settings = UIPSettings.from_dict({"uip_facets": FACETS, "uip_history": "observed", **keys})
    folds = folds_of(np.unique(table.user_id.to_numpy(str)), settings.user_folds, settings.seed)
    profiles = infer(behaviours_of(table, split), texts, settings, folds)
    return np.column_stack([field.values for field in profiles.fields])


def test_match_fields_without_codes(early, late, tmp_path):
    facets = {"company": {**FACETS["company"], "codes": 0}}
    encoder = ProfileEncoder(facets).fit(early)
    with encoder.to_bank(tmp_path / "bank") as bank:
        assert bank.look_up("u0").shape == (0,)
        assert bank.look_up_many(["u0", "nobody"]).shape == (2, 0)
        expected = encoder.transform(
            pd.DataFrame({"user_id": "u0", "item_id": [7], "timestamp": HALF})
        )
        np.testing.assert_array_equal(bank.match("u0", ["7"]), expected)
    again = ProfileEncoder.from_bank(tmp_path / "bank").partial_fit(late)
    later = late.assign(timestamp=1000.0)
    np.testing.assert_array_equal(
        again.transform(later), encoder.partial_fit(late).transform(later)
    )


def test_times_in_another_unit(early, late, tmp_path):
    def dated(table, factor=1.0):
        return table.assign(timestamp=(1.7e9 + table.timestamp) * factor)

    encoder = ProfileEncoder(FACETS).fit(dated(early))
    encoder.to_bank(tmp_path / "bank").close()
    for known in (encoder, ProfileEncoder.from_bank(tmp_path / "bank")):
        with pytest.raises(SettingsError, match="time=17.* of X is not in the unit of the events"):
            known.partial_fit(dated(late, 1000.0))
        # One row is enough, before or after.
        for factor in (0.001, 1000.0):
            rows = pd.concat([dated(late), dated(late[:1], factor)])
            for call in (known.partial_fit, known.transform):
                with pytest.raises(SettingsError, match=f"in row {len(late)} of X is not in the"):
                    call(rows)
        known.partial_fit(dated(late))
    with pytest.raises(SettingsError, match="is not in the unit"):
        ProfileEncoder(FACETS).fit(dated(early, 1000.0)).partial_fit(dated(late))


def test_fields_are_those_of_the_pipeline(whole, table):
    expected = inferred(table)
    tokens = whole.transform(table)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(ProfileEncoder(FACETS).fit_transform(table), expected)
    assert list(whole.get_feature_names_out()) == [
        "uip_leniency_5",
        "uip_leniency_inf",
        "uip_company",
        "uip_company_level2",
        "uip_company_match_20",
        "uip_company_match_inf",
        "uip_sums_match",
        "uip_likes",
    ]
    assert (tokens.max(axis=0) <= [field.size for field in whole.fields_]).all()


def test_parameters_stay_and_history_grows(encoder, table, early, late):
    """As the pipeline with held-out rows that are observed."""
    split = np.where(table.timestamp < HALF, TRAIN, TEST).astype(np.int8)
    expected = inferred(table, split)
    before = encoder.transform(late)
    np.testing.assert_array_equal(encoder.partial_fit(late).transform(table), expected)
    held_out = (table.timestamp >= HALF).to_numpy()
    assert (before != expected[held_out]).mean() > 0.2
    # What is later does not matter to what is earlier.
    np.testing.assert_array_equal(encoder.transform(early), expected[~held_out])


def test_history_comes_in_any_parts(encoder, _encoder, late):
    at_once = encoder.partial_fit(late).transform(late)
    in_parts, days = copy.copy(_encoder), late.timestamp.to_numpy() // 7
    for day in np.unique(days)[::-1]:
        in_parts.partial_fit(late[days == day])
    np.testing.assert_array_equal(in_parts.transform(late), at_once)


@given(
    changed=st.lists(st.integers(0, 1700), min_size=1, max_size=5),
    what=st.sampled_from(["label", "item_id", "gone"]),
)
@hypothesis_settings(deadline=None, max_examples=25)
def test_no_row_sees_itself_a_tie_or_the_future(_encoder, late, changed, what):
    other = late.copy()
    rows = np.array(changed) % len(late)
    if what == "gone":
        other = other.drop(index=other.index[rows])
    else:
        column = other.columns.get_loc(what)
        other.iloc[rows, column] = 1 - late.label.iloc[rows] if what == "label" else 7
    first = late.iloc[rows].groupby("user_id").timestamp.min()
    untouched = (late.timestamp <= late.user_id.map(first).fillna(np.inf)).to_numpy()
    before = copy.copy(_encoder).partial_fit(late).transform(late)
    after = copy.copy(_encoder).partial_fit(other).transform(late)
    np.testing.assert_array_equal(before[untouched], after[untouched])


def test_later_rows_do_see_what_has_changed(encoder, _encoder, late):
    """So that the test above can fail."""
    flipped = late.assign(label=1 - late.label)
    before, after = encoder.partial_fit(late), copy.copy(_encoder).partial_fit(flipped)
    assert (before.transform(late) != after.transform(late)).any(axis=0).all()


def test_transform_reads_no_labels(encoder, late):
    expected = encoder.transform(late)
    np.testing.assert_array_equal(encoder.transform(late.drop(columns="label")), expected)
    np.testing.assert_array_equal(encoder.transform(late.assign(label=np.nan)), expected)
    known = encoder.transform(late.assign(timestamp=HALF))
    np.testing.assert_array_equal(known, expected)


def test_kinds_of_tables_and_columns(encoder, early, late):
    expected = encoder.transform(late)
    other = late.assign(
        user_id=late.user_id.astype("category"),
        item_id=late.item_id.astype("category"),
        timestamp=late.timestamp.astype(np.int64),
    )
    np.testing.assert_array_equal(encoder.transform(other), expected)
    np.testing.assert_array_equal(encoder.transform(late.assign(item_id="7")).shape, expected.shape)
    arrow = pa.table(other.assign(user_id=late.user_id, item_id=late.item_id.astype(str)))
    np.testing.assert_array_equal(encoder.transform(arrow), expected)
    views = arrow["user_id"].combine_chunks().cast(pa.string_view()).dictionary_encode()
    of_polars = arrow.set_column(arrow.column_names.index("user_id"), "user_id", views)
    np.testing.assert_array_equal(encoder.transform(of_polars), expected)

    def dated(table, unit="ns"):
        days = pd.to_datetime(table.timestamp, unit="D").astype(f"datetime64[{unit}]")
        return table.assign(timestamp=days, label=table.label.astype(bool))

    by_date = ProfileEncoder(FACETS).fit(dated(early))
    np.testing.assert_array_equal(by_date.transform(dated(late, "s")), expected)
    assert encoder.transform(late[:0]).shape == (0, expected.shape[1])


def test_strangers_have_no_history(encoder, late):
    stranger = late[:3].assign(user_id="nobody")
    assert (encoder.transform(stranger) == 0).all()
    prior = ProfileEncoder(FACETS, empty="prior").fit(late)
    assert (prior.transform(stranger) > 0).all()
    encoder.partial_fit(stranger.assign(item_id=-1, timestamp=1e6))
    tokens = encoder.transform(stranger.assign(timestamp=2e6))
    # What is liked of an item that nothing is known of tells of leniency, and of no taste.
    of_taste = {"uip_company", "uip_company_level2", "uip_sums_match", "uip_likes"}
    named = zip(encoder.get_feature_names_out(), tokens.T, strict=True)
    assert {name for name, values in named if not values.any()} == of_taste


def test_labels_may_come_as_y(encoder, early, late):
    bare = early.drop(columns="label")
    by_y = ProfileEncoder(FACETS).fit(bare, early.label)
    np.testing.assert_array_equal(by_y.transform(late), encoder.transform(late))
    by_y.partial_fit(late.drop(columns="label"), late.label.tolist())
    encoder.partial_fit(late)
    np.testing.assert_array_equal(by_y.transform(late), encoder.transform(late))


def test_labels_in_both_places_must_agree(encoder, early, late):
    twice = ProfileEncoder(FACETS).fit(early, early.label)
    np.testing.assert_array_equal(twice.transform(late), encoder.transform(late))
    other = early.label.to_numpy().copy()
    other[3] = 1 - other[3]
    for call in (ProfileEncoder(FACETS).fit, ProfileEncoder().fit_transform, encoder.partial_fit):
        with pytest.raises(SettingsError, match="y is [01] in row 3, but the column 'label'"):
            call(early, other)


def test_implicit_feedback(early, late):
    encoder = ProfileEncoder(label=None).fit(early.drop(columns="label"))
    assert encoder.model_.implicit
    names = ["uip_company", "uip_company_match_30", "uip_company_match_200"]
    assert list(encoder.get_feature_names_out()) == names
    assert (encoder.transform(late) > 0).mean() > 0.9


def test_a_bank_without_labels_takes_none(early, tmp_path):
    encoder = ProfileEncoder(label=None).fit(early.drop(columns="label"))
    with encoder.to_bank(tmp_path / "bank"):
        pass
    with FeatureBank.open(tmp_path / "bank", write=True) as bank:
        user, item, time = *map(str, early[["user_id", "item_id"]].iloc[0]), 1e6
        before = bank.state_of(user)[0]
        with pytest.raises(BankError, match="liked=0 of user .*: without labels"):
            bank.update(user, item, 0, time)
        with pytest.raises(BankError, match="liked is 0.0 in row 1: without labels"):
            bank.update_many([user, user], [item, item], np.array([1, 0]), np.full(2, time))
        np.testing.assert_array_equal(bank.state_of(user)[0], before)
        bank.update(user, item, None, time)
        assert bank.update_many([user], [item], np.ones(1), np.full(1, time)) == 1


def test_without_match_fields_no_item_is_read(early, late):
    encoder = ProfileEncoder(match=False).fit(early)
    assert {field.kind for field in encoder.fields_} == {"code", "bin"}
    bare = late[["user_id", "timestamp"]]
    np.testing.assert_array_equal(encoder.transform(bare), encoder.transform(late))


def test_rows_in_the_order_of_time(table, late):
    ordered = table.sort_values("timestamp", kind="stable")
    counted = ordered.assign(timestamp=np.arange(len(ordered)))
    by_time = ProfileEncoder(FACETS)
    expected = by_time.fit_transform(counted)
    by_order = ProfileEncoder(FACETS, time=None)
    np.testing.assert_array_equal(by_order.fit_transform(ordered), expected)
    later = late.assign(timestamp=1e9)
    np.testing.assert_array_equal(by_order.transform(late), by_time.transform(later))
    by_order.partial_fit(late)
    by_time.partial_fit(late.assign(timestamp=1e9 + np.arange(len(late))))
    later = late.assign(timestamp=2e9)
    np.testing.assert_array_equal(by_order.transform(late), by_time.transform(later))


# --- scikit-learn --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_get_params_invariance",
        "check_mixin_order",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
        "check_valid_tag_types",
    ],
)
def test_scikit_learn_checks(check):
    getattr(estimator_checks, check)("ProfileEncoder", ProfileEncoder())


def test_clone_and_parameters(whole):
    items = pd.DataFrame({"item_id": [1], "title": ["heat"]})
    encoder = ProfileEncoder(FACETS, items=items, item_text="title", folds=3)
    copied = clone(encoder).set_params(folds=2)
    assert copied.facets == FACETS and copied.folds == 2 and encoder.folds == 3
    assert copied.items.equals(items)
    unfitted = clone(whole)
    assert not [name for name in vars(unfitted) if name.endswith("_") or name == "_known"]


def test_pickle(encoder, late):
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.transform(late), encoder.transform(late))


def test_output_of_pandas(encoder, early, late):
    expected = encoder.transform(late)
    framed = encoder.set_output(transform="pandas").transform(late)
    assert list(framed.columns) == list(encoder.get_feature_names_out())
    assert framed.index.equals(late.index) and (framed.dtypes == np.int32).all()
    np.testing.assert_array_equal(framed.to_numpy(), expected)
    fitted = ProfileEncoder(FACETS).set_output(transform="pandas").fit_transform(early)
    assert fitted.index.equals(early.index)
    encoder.set_output(transform="default")
    assert isinstance(encoder.transform(late), np.ndarray)


def test_pipeline(early, late):
    """The labels are y alone; the features of the fit are point-in-time."""
    bare = early.drop(columns="label")
    one_hot = OneHotEncoder(handle_unknown="ignore")
    model = make_pipeline(ProfileEncoder(FACETS), one_hot, LogisticRegression(max_iter=300))
    model.fit(bare, early.label)
    auc = roc_auc_score(late.label, model.predict_proba(late.drop(columns="label"))[:, 1])
    assert auc > 0.65
    fields = ProfileEncoder(FACETS).fit_transform(early)
    np.testing.assert_array_equal(
        model[-1].coef_,
        LogisticRegression(max_iter=300)
        .fit(OneHotEncoder(handle_unknown="ignore").fit_transform(fields), early.label)
        .coef_,
    )


def test_column_transformer(early, late):
    columns = ["user_id", "item_id", "timestamp"]
    transformer = ColumnTransformer(
        [("profiles", ProfileEncoder(FACETS), columns)],
        verbose_feature_names_out=False,
        remainder="drop",
    ).set_output(transform="pandas")
    fields = transformer.fit(early[columns], early.label).transform(late[columns])
    expected = ProfileEncoder(FACETS).fit(early).transform(late)
    np.testing.assert_array_equal(fields.to_numpy(), expected)


# --- banks ---------------------------------------------------------------------------------


def test_a_bank_goes_on_where_the_encoder_stood(encoder, early, late, tmp_path):
    with encoder.to_bank(tmp_path / "bank") as bank:
        assert len(bank) == early.user_id.nunique()
        rows = late.drop_duplicates("user_id")
        fields = encoder.set_output(transform="pandas").transform(rows)
        codes = bank.look_up_many(rows.user_id.tolist())
        np.testing.assert_array_equal(codes, fields[list(bank.fields)])
        for row in range(0, len(rows), 20):
            match = bank.match(rows.user_id.iloc[row], [str(rows.item_id.iloc[row])])
            assert match[0].tolist() == fields[list(bank.match_fields)].iloc[row].tolist()
    encoder.set_output(transform="default")

    loaded = ProfileEncoder.from_bank(tmp_path / "bank")
    assert loaded.fields_ == encoder.fields_
    np.testing.assert_array_equal(loaded.transform(late), encoder.transform(late))
    stranger = late[:1].assign(user_id="nobody")
    np.testing.assert_array_equal(loaded.transform(stranger), encoder.transform(stranger))
    new = late[::5].assign(user_id="new")
    for part in (late[::2], pd.concat([late[1::2], new])):
        loaded.partial_fit(part)
        encoder.partial_fit(part)
        np.testing.assert_array_equal(loaded.transform(late), encoder.transform(late))
    np.testing.assert_array_equal(loaded.transform(new), encoder.transform(new))

    tables = []
    for name, each in (("again", loaded), ("whole", encoder)):
        with each.to_bank(tmp_path / name) as bank:
            tables.append(bank.table_of(sorted(bank.users())))
    assert tables[0].equals(tables[1])
    settings = clone(loaded).fit(early)
    np.testing.assert_array_equal(settings.transform(early), encoder.transform(early))


def test_the_bank_and_the_encoder_learn_alike(encoder, late, tmp_path):
    encoder.to_bank(tmp_path / "bank").close()
    new = [late[late.index % 9 == k].assign(user_id=f"new{k}") for k in range(9)]
    late = pd.concat([late, *new])
    with FeatureBank.open(tmp_path / "bank", write=True) as bank:
        items = late.item_id.astype(str).tolist()
        bank.update_many(late.user_id.tolist(), items, late.label, late.timestamp)
        bank.commit()
    updated = ProfileEncoder.from_bank(tmp_path / "bank")
    rows = late.assign(timestamp=1e6)
    np.testing.assert_array_equal(
        updated.transform(rows), encoder.partial_fit(late).transform(rows)
    )


def test_a_bank_keeps_no_earlier_profiles(encoder, early, late, tmp_path):
    encoder.to_bank(tmp_path / "bank").close()
    loaded = ProfileEncoder.from_bank(tmp_path / "bank")
    user = early.user_id.iloc[0]
    mine = early[early.user_id == user]
    last = mine.timestamp.max()
    with pytest.raises(SettingsError, match=f"time={last} in row 0 .* not later .* {user!r}"):
        loaded.transform(mine[mine.timestamp == last])
    before = loaded.transform(late)
    with pytest.raises(SettingsError, match=f"earlier than the last event of user {user!r}"):
        loaded.partial_fit(pd.concat([late, mine[mine.timestamp < last]]))
    np.testing.assert_array_equal(loaded.transform(late), before)
    tie = mine[mine.timestamp == last]
    loaded.partial_fit(tie)
    np.testing.assert_array_equal(loaded.transform(late), encoder.partial_fit(tie).transform(late))


def test_banks_without_labels_and_without_times(early, late, tmp_path):
    implicit = ProfileEncoder(label=None, time=None).fit(early)
    with implicit.to_bank(tmp_path / "bank") as bank:
        assert np.isneginf(bank.table_of(bank.users())["last_time"].to_numpy()).all()
    loaded = ProfileEncoder.from_bank(tmp_path / "bank", time=None)
    assert loaded.label is None
    for each in (implicit, loaded):
        each.partial_fit(late)
    np.testing.assert_array_equal(loaded.transform(late), implicit.transform(late))
    ProfileEncoder(FACETS).fit(early).to_bank(tmp_path / "labelled").close()
    with pytest.raises(SettingsError, match="label=None, but the events of the bank"):
        ProfileEncoder.from_bank(tmp_path / "labelled", label=None)
    with pytest.raises(BankError):
        ProfileEncoder.from_bank(tmp_path / "nothing")


def test_last_times_outlive_an_encoder_that_reads_none(encoder, early, late, tmp_path):
    encoder.to_bank(tmp_path / "bank").close()
    untimed = ProfileEncoder.from_bank(tmp_path / "bank", time=None)
    untimed.partial_fit(late[:1])
    untimed.transform(late)
    with encoder.to_bank(tmp_path / "before") as before:
        table = before.table_of(before.users())
    with untimed.to_bank(tmp_path / "bank") as bank:
        after = bank.table_of(before.users())
    assert np.isfinite(after["last_time"].to_numpy()).all()
    assert after["last_time"].equals(table["last_time"])


def test_a_file_is_no_folder_of_a_bank(encoder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(encoder._known.__class__, "table", lambda *_, **__: pytest.fail("for it"))
    with pytest.raises(BankError, match="cannot be a folder, because .*file is a file"):
        encoder.to_bank(tmp_path / "file")


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns={"user_id": "user-id"}), "'user_id' .user.; it has 'user-id', "
         "'item_id', 'label', 'timestamp'; did you mean 'user-id'"),
        (lambda t: t.rename(columns={"timestamp": "when"}), "no column 'timestamp'.*time=None"),
        (lambda t: t.drop(columns="label"), "no column 'label' .*give y, or set label=None"),
        (lambda t: pd.concat([t, t.label], axis=1), "2 columns 'label'"),
        (lambda t: t.assign(timestamp=np.nan), "'timestamp' .time. is None in row 0"),
        (lambda t: t.assign(timestamp=np.where(t.label, t.timestamp, np.inf)), "is inf in row"),
        (lambda t: t.assign(timestamp=pd.NaT), "'timestamp' .time. is None in row 0"),
        (lambda t: t.assign(timestamp="noon"), "'timestamp' .time. holds .*numbers or timestamps"),
        (lambda t: t.assign(label=t.label * 2), "'label' .label. is 2 in row .*needs 0 or 1"),
        (lambda t: t.assign(label="yes"), "'label' .label. holds .*must hold 0 or 1"),
        (lambda t: t.assign(user_id=t.user_id.where(t.label == 1)), "'user_id' .user. is None"),
        (lambda t: t.assign(item_id=t.item_id / 2), "'item_id' .item. holds double"),
        (lambda t: t.assign(item_id=[1, "a"] * (len(t) // 2)), "'item_id' .item. .* several types"),
        (lambda t: t.to_numpy(), "X is of type ndarray"),
        (lambda t: t[:0], "no rows"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(table, encoder, change, message):
    wrong = change(table[:1000])
    with pytest.raises(SettingsError, match=message):
        ProfileEncoder(FACETS).fit(wrong)
    if "no rows" not in message:
        known = encoder._known
        with pytest.raises(SettingsError, match=message):
            encoder.partial_fit(wrong)
        assert encoder._known is known


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"facets": {}}, "facets={} gives no field"),
        ({"facets": {"company": {"rnk": 3}}}, "uip_facets.company.rnk.*did you mean 'rank'"),
        ({"facets": {"taste": {}}}, r"item_text=None, and the facets \['taste'\] read"),
        ({"facets": {"taste": {}}, "item_text": "title"}, r"items=None, .*\['taste'\] read"),
        ({"empty": "none"}, "uip_empty='none' must be one of pad, prior"),
        ({"folds": 1}, "uip_folds=1 must be"),
        ({"lm": {"nme": "x"}}, "unknown setting 'uip_lm_nme'"),
        ({"label": None, "facets": FACETS}, "weight 'contrast' needs"),
        ({"match": False, "facets": {"sums": FACETS["sums"]}}, "gives no field"),
    ],
)
def test_parameters_that_cannot_be_used(early, parameters, message):
    with pytest.raises(SettingsError, match=message):
        ProfileEncoder(**parameters).fit(early)


def test_what_is_not_fitted_says_so(late, tmp_path):
    for call in (
        lambda encoder: encoder.transform(late),
        lambda encoder: encoder.partial_fit(late),
        lambda encoder: encoder.get_feature_names_out(),
        lambda encoder: encoder.to_bank(tmp_path / "bank"),
    ):
        with pytest.raises(NotFittedError):
            call(ProfileEncoder())
    with pytest.raises(SettingsError, match="y has 3 rows, but X has"):
        ProfileEncoder().fit(late.drop(columns="label"), [0, 1, 0])


# --- a language model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_lm(folder / "tiny")
    items = pd.DataFrame({"item_id": np.arange(len(TEXTS)), "title": TEXTS, "year": 1995})
    taste = {
        "source": "lm",
        "weight": "contrast",
        "codes": 3,
        "rank": 2,
        "match": {"rank": 2, "bins": 6},
    }
    return ProfileEncoder(
        {"taste": taste},
        items=items,
        item_text="title",
        endings=ENDINGS,
        lm=str(folder / "tiny"),
        cache=folder / "cache",
    )


def test_facets_of_a_language_model(lm_encoder, early, late, tmp_path):
    few = early.assign(item_id=early.item_id % (len(TEXTS) + 1))
    later = late.assign(item_id=late.item_id % (len(TEXTS) + 1))
    encoder = clone(lm_encoder).fit(few)
    expected = inferred(
        few,
        texts=[None, *TEXTS, None],
        uip_facets=encoder.facets,
        uip_item_text="{title}",
        uip_endings=dict(zip(("liked", "disliked"), ENDINGS, strict=True)),
        uip_lm=encoder.lm,
        uip_cache=encoder.cache,
    )
    np.testing.assert_array_equal(encoder.transform(few), expected)
    assert (expected > 0).all(axis=1).mean() > 0.8
    encoder.to_bank(tmp_path / "bank").close()
    loaded = ProfileEncoder.from_bank(tmp_path / "bank")
    np.testing.assert_array_equal(loaded.transform(later), encoder.transform(later))
    templated = clone(lm_encoder).set_params(item_text="{title} ({year})").fit(few)
    means = [each.model_.tables["lm_mean"] for each in (encoder, templated)]
    assert means[0].shape == means[1].shape and (means[0] != means[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns={"title": "titel"}), "items has no column 'title' .item_text.*"
         "did you mean 'titel'"),
        (lambda t: t.assign(title=None), "no item has a text"),
        (lambda t: t.assign(item_id=t.item_id + 1000), "no item of the training rows has a text"),
        (lambda t: pd.concat([t, t[:1]]), "items has 2 rows of the item '0'"),
    ],
)  # fmt: skip
def test_items_without_text(lm_encoder, early, change, message):
    encoder = clone(lm_encoder)
    encoder.set_params(items=change(encoder.items))
    with pytest.raises(SettingsError, match=message):
        encoder.fit(early)


# --- the whole way -------------------------------------------------------------------------


def test_it_is_exported_without_recbole():
    code = (
        "import sys; from recbole_uip import ProfileEncoder; ProfileEncoder(); "
        "sys.exit(any(name.split('.')[0] in ('recbole', 'ray', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lightgbm_gains_by_profiles_on_ml_100k():
    """By global time, without an LM. Most test users are new, so that history counts."""
    [folder] = importlib.util.find_spec("recbole").submodule_search_locations
    file = Path(folder, "dataset_example", "ml-100k", "ml-100k.inter")
    events = pd.read_csv(file, sep="\t").rename(columns=lambda name: name.split(":")[0])
    events["label"] = (events.pop("rating") >= 4).astype(int)
    events = events.sort_values("timestamp", kind="stable", ignore_index=True)
    train, test = events[:80_000], events[80_000:]

    encoder = ProfileEncoder().set_output(transform="pandas")
    profiles = [encoder.fit_transform(train), encoder.partial_fit(test).transform(test)]
    rate = like_rate(train.item_id.to_numpy(), train.label.to_numpy(), events.item_id.max() + 1)
    plain = [
        part[["user_id", "item_id"]].assign(item_rate=rate[part.item_id]) for part in (train, test)
    ]
    codes = [field.name for field in encoder.fields_ if field.kind == "code"]

    def auc(features, categories):
        model = lightgbm.LGBMClassifier(
            n_estimators=100, num_leaves=15, min_child_samples=50, cat_smooth=50,
            random_state=0, n_jobs=1, verbose=-1,
        ).fit(features[0], train.label, categorical_feature=categories)  # fmt: skip
        return roc_auc_score(test.label, model.predict_proba(features[1])[:, 1])

    without = auc(plain, ["user_id", "item_id"])
    both = [left.join(right) for left, right in zip(plain, profiles, strict=True)]
    with_id = auc(both, ["user_id", "item_id", *codes])
    in_its_place = auc([part.drop(columns="user_id") for part in both], ["item_id", *codes])
    assert without > 0.69
    assert in_its_place > without + 0.04
    assert with_id > without + 0.03

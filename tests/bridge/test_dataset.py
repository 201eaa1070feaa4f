import dataclasses
import logging
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data import data_preparation as recbole_data_preparation
from recbole.utils import FeatureSource, FeatureType, init_seed

import recbole_uip
from recbole_uip.behaviours import TEST, TRAIN, VALID, folds_of
from recbole_uip.bridge import UIPDataset, create_dataset, data_preparation
from recbole_uip.bridge.loading import ROW
from recbole_uip.settings import METHODS, ArmSettings, SettingsError

from .conftest import COMPANY, LENIENCY, field_table, rows_of

SAMPLED = {
    "threshold": None,
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 2},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"},
}
# Without ratings there is no contrast; every event counts.
IMPLICIT_FACETS = {"company": {**COMPANY, "weight": "all"}}


def test_fields_are_tokens_of_the_interaction(small):
    dataset = UIPDataset(small.config())
    splits = dataset.build()
    table = field_table(dataset)
    assert {field.kind for field in dataset.profiles.fields} == {"bin", "code", "match"}
    for split, number in zip(splits, (TRAIN, VALID, TEST), strict=True):
        assert (dataset.behaviours.split[rows_of(split)] == number).all()
        assert set(split.profile_fields) == set(table)
        for field in dataset.profiles.fields:
            name = field.name
            assert split.field2type[name] == FeatureType.TOKEN
            assert split.field2source[name] == FeatureSource.INTERACTION
            assert split.field2seqlen[name] == 1
            assert split.num(name) == field.size + 1
            assert split.field2id_token[name][0] == "[PAD]"
            assert split.token2id(name, str(field.size)) == field.size
            assert name in split.fields(ftype=[FeatureType.TOKEN])
            values = split.inter_feat[name].numpy()
            assert (values == table[name][rows_of(split)]).all()
            assert values.min() >= 0
            assert values.max() <= field.size
    assert any((values > 0).any() for values in table.values())
    assert ROW not in splits[0].fields()


def test_rows_are_the_inputs_rows(small):
    dataset = UIPDataset(small.config())
    dataset.build()
    behaviours = dataset.behaviours
    raw = pd.DataFrame(small.rows)
    assert dataset.id2token("user_id", behaviours.user).tolist() == raw[0].tolist()
    assert dataset.id2token("item_id", behaviours.item).tolist() == raw[1].tolist()
    assert (behaviours.liked == (raw[2] >= 4)).all()
    assert (behaviours.time == raw[3]).all()


def test_folds_are_those_that_a_bank_gives_the_same_users(small):
    dataset = UIPDataset(small.config())
    dataset.build()
    users = [str(user) for user in dataset.id2token("user_id", dataset.behaviours.user)]
    expected = folds_of(users, dataset.settings.user_folds, dataset.settings.seed)
    np.testing.assert_array_equal(dataset.profiles.events.fold, expected)
    assert len(set(expected)) > 4


def test_time_order_is_exact_and_stable(small):
    train, valid, test = UIPDataset(small.config(normalize_all=True)).build()
    order = np.concatenate([rows_of(split) for split in (train, valid, test)])
    time = np.array([row[3] for row in small.rows])
    assert len(np.unique(time.astype(np.float32))) < len(np.unique(time))
    assert (order == np.argsort(time, kind="stable")).all()


def test_recboles_own_data_preparation(small):
    config = small.config()
    init_seed(1, True)
    train, valid, test = recbole_data_preparation(config, UIPDataset(config))
    batch = next(iter(train))
    assert "uip_leniency_5" in " ".join(batch.columns)
    assert len(valid.dataset) == len(test.dataset) == 40


def test_filtering_comes_before_the_rows(atomic):
    atomic.rows[7][2] = 3
    config = atomic.write().config(val_interval={"rating": "[0,3);(3,5]"})
    dataset = UIPDataset(config)
    dataset.build()
    kept = [row for row in atomic.rows if row[2] != 3]
    assert 0 < len(kept) < len(atomic.rows)
    assert (dataset.behaviours.time == [row[3] for row in kept]).all()


def test_select_shows_one_arms_fields(small):
    config = small.config()
    dataset = UIPDataset(config)
    train = dataset.build()[0]
    plain = train.select(ArmSettings("plain"))
    some = train.select(ArmSettings("some", ("leniency",), "drop"))
    assert plain.profile_fields == []
    assert not any(name.startswith("uip") for name in plain.fields())
    assert "user_id" in plain.fields()
    assert some.profile_fields and all("leniency" in name for name in some.profile_fields)
    assert "user_id" not in some.fields()
    # Out of the fields, not out of the data.
    assert some.num("user_id") == some.user_num
    assert "user_id" in some.inter_feat
    assert set(some.select(ArmSettings("all", ("leniency", "company"))).profile_fields) == set(
        field_table(dataset)
    )
    assert "user_id" in UIPDataset(small.config(uip_user_id="keep")).build()[0].fields()
    # Views share tensors, but no tables.
    assert plain.inter_feat["item_id"] is train.inter_feat["item_id"]
    assert "uip_leniency" in "".join(train.fields())


def test_profiles_are_inferred_once(small, monkeypatch):
    from recbole_uip import profiles

    calls = []
    original = profiles.infer
    monkeypatch.setattr(profiles, "infer", lambda *a: calls.append(1) or original(*a))
    config = small.config()
    dataset = UIPDataset(config)
    for arm in config.uip.arms:
        data_preparation(config, dataset, arm)
    dataset.build()
    assert len(calls) == 1


def test_benchmark_files(small):
    folder = small.folder / small.name
    header, *lines = (folder / "small.inter").read_text().splitlines()
    parts = {"train": lines[:300], "valid": lines[300:350], "test": lines[350:]}
    for name, part in parts.items():
        (folder / f"small.{name}.inter").write_text("\n".join([header, *part]) + "\n")
    (folder / "small.inter").unlink()
    dataset = UIPDataset(small.config(benchmark_filename=["train", "valid", "test"]))
    splits = dataset.build()
    assert [len(split) for split in splits] == [300, 50, 50]
    assert (np.concatenate([rows_of(split) for split in splits]) == np.arange(400)).all()
    assert all(split.profile_fields for split in splits)
    assert dataset.settings.history == "train"  # these files are not in time order


@pytest.mark.parametrize("filtered", [True, False])
def test_rows_without_ids(filtered, atomic, caplog):
    """A row may lack either ID, and RecBole's own filter then drops other rows than these."""
    for number, column, name in ((3, 0, ""), (50, 0, "null"), (7, 1, "NA"), (399, 1, "")):
        atomic.rows[number][column] = name
    if not filtered:
        folder = atomic.write().folder / "small"
        (folder / "small.inter").rename(folder / "small.train.inter")
        for name in ("valid", "test"):
            (folder / f"small.{name}.inter").write_text((folder / "small.train.inter").read_text())
        with pytest.raises(SettingsError, match="'user_id' is missing in 6 of 1200.* row 4;"):
            UIPDataset(atomic.config(benchmark_filename=["train", "valid", "test"]))
        return
    dataset = UIPDataset(atomic.write().config())
    wanted = [row for row in atomic.rows if {"", "NA", "null"}.isdisjoint(row)]
    users, items = (
        dataset.id2token(name, np.asarray(dataset.inter_feat[name]))
        for name in ("user_id", "item_id")
    )
    assert [*zip(users, items, strict=True)] == [(row[0], row[1]) for row in wanted]
    assert re.search(r"2 of 400 rows of .inter have no user_id \(the first is row 4;", caplog.text)
    assert re.search(r"2 of 398 rows of .inter have no item_id \(the first is row 8;", caplog.text)


def test_columns_to_load_that_are_not_there(small, caplog):
    UIPDataset(small.config())
    assert "load_col" not in caplog.text
    load_col = {"inter": ["user_id", "item_id", "rating", "timestamp"], "user": ["user_id", "aeg"]}
    UIPDataset(small.config(load_col=load_col))
    assert re.search(r"load_col names \['aeg'\], which \S*small.user has no column of", caplog.text)


def test_no_user_features(atomic):
    atomic.users = False
    dataset = UIPDataset(atomic.write().config())
    assert dataset.build()[0].profile_fields


def test_missing_item_features_are_filled(atomic):
    # Items without a row in the .item file, and one with an empty sequence: pandas 3 would leave
    # NaN where RecBole fills in place.
    atomic.items = [
        (item, title, "" if item == "i3" else genre) for item, title, genre in atomic.items[:10]
    ]
    dataset = UIPDataset(atomic.write().config(filter_inter_by_user_or_item=False))
    dataset.build()
    genre = dataset.item_feat["genre"]
    assert len(genre) == 16
    empty = [0, *dataset.token2id("item_id", ["i3", *(f"i{n}" for n in range(10, 15))])]
    assert not genre[empty].any()
    assert genre[dataset.token2id("item_id", "i1")].all()


def test_float_sequences_are_normalised(small):
    path = small.folder / small.name / "small.item"
    lines = path.read_text().splitlines()
    values = ["w:float_seq", *(f"{n} {n + 1}" if n % 3 else "" for n in range(15))]
    path.write_text("\n".join(f"{a}\t{b}" for a, b in zip(lines, values, strict=True)) + "\n")
    load_col = {"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id", "w"]}
    dataset = UIPDataset(small.config(load_col=load_col, normalize_all=True))
    dataset.build()
    values = dataset.item_feat["w"]
    assert values.shape == (16, 2)
    assert values.max() == 1
    assert values[dataset.token2id("item_id", "i4")].tolist() == pytest.approx([3 / 14, 4 / 14])


def test_item_texts_reach_the_profile_stage(small, monkeypatch):
    from recbole_uip import profiles

    seen, original = {}, profiles.infer

    def infer(behaviours, texts, settings, fold):
        seen["texts"] = texts
        return original(behaviours, None, dataclasses.replace(settings, facets=()), fold)

    monkeypatch.setattr(profiles, "infer", infer)
    facets = {"interests": {"prompt": "interests", "source": "lm"}}
    dataset = UIPDataset(small.config(uip_facets=facets, uip_item_text="{title} ({genre})"))
    dataset.build()
    # The title is not loaded as a feature, and is the raw text.
    assert "title" not in dataset.field2type
    assert seen["texts"][0] is None
    assert seen["texts"][dataset.token2id("item_id", "i1")] == "Film 1 (Drama Comedy)"
    assert len(seen["texts"]) == dataset.item_num
    with pytest.raises(SettingsError, match="'year'.*title"):
        UIPDataset(small.config(uip_facets=facets, uip_item_text="{year}")).build()


def test_without_timestamps_profiles_are_cross_fitted_with_a_warning(atomic, caplog):
    atomic.columns = atomic.columns[:3]
    eval_args = {
        "split": {"RS": [0.8, 0.1, 0.1]},
        "order": "RO",
        "group_by": None,
        "mode": "labeled",
    }
    atomic.write()
    with caplog.at_level(logging.WARNING):
        dataset = UIPDataset(atomic.config(eval_args=eval_args))
        train = dataset.build()[0]
    assert "cross-fitted" in caplog.text
    assert not dataset.profiles.static
    assert dataset.behaviours.time is None
    assert dataset.settings.history == "train"
    for field in dataset.profiles.fields:
        assert train.field2source[field.name] == FeatureSource.INTERACTION
        batch = train[np.arange(len(train))]
        assert (batch[field.name].numpy() == field.values[rows_of(train)]).all()
    with pytest.raises(SettingsError, match="uip_time"):
        UIPDataset(atomic.config(eval_args=eval_args, uip_time="point_in_time")).build()
    with pytest.raises(SettingsError, match="TIME_FIELD"):
        UIPDataset(atomic.config()).build()


def test_a_missing_timestamp_is_an_error(atomic):
    atomic.rows[5][3] = ""
    with pytest.raises(SettingsError, match="finite timestamp"):
        UIPDataset(atomic.write().config()).build()


def test_positives_alone_are_an_error(atomic):
    atomic.columns = ("user_id:token", "item_id:token", "timestamp:float")
    with pytest.raises(SettingsError, match="train_neg_sample_args.*threshold"):
        UIPDataset(atomic.write().config(uip_facets=IMPLICIT_FACETS)).build()


def test_sampled_negatives_have_matches_of_their_own(atomic):
    atomic.columns = ("user_id:token", "item_id:token", "timestamp:float")
    config = atomic.write().config(uip_facets=IMPLICIT_FACETS, **SAMPLED)
    dataset = UIPDataset(config)
    loaders = data_preparation(config, dataset)
    assert dataset.behaviours.liked is None
    changed = 0
    names = [field.name for field in dataset.profiles.fields if field.kind == "match"]
    codes = [field.name for field in dataset.profiles.fields if field.kind == "code"]
    table = field_table(dataset)
    for loader in loaders:
        for batch in loader:
            batch = batch if loader is loaders[0] else batch[0]
            rows, items = batch[ROW].numpy(), batch["item_id"].numpy()
            negative = batch["label"].numpy() == 0
            assert negative.mean() > 0.5
            assert (items[~negative] == dataset.behaviours.item[rows[~negative]]).all()
            expected = dataset.profiles.match(rows, items)
            for name in names:
                values = batch[name].numpy()
                assert (values == expected[name]).all()
                assert (values[~negative] == table[name][rows[~negative]]).all()
                changed += (values != table[name][rows])[negative].sum()
            for name in codes:
                assert (batch[name].numpy() == table[name][rows]).all()
    assert changed > 100


def test_match_of_a_rows_own_item_is_its_field(small):
    dataset = UIPDataset(small.config())
    dataset.build()
    rows = np.arange(len(dataset.behaviours))
    matches = dataset.profiles.match(rows, dataset.behaviours.item)
    table = field_table(dataset)
    assert matches
    for name, values in matches.items():
        assert (values == table[name]).all()


def test_two_towers_put_codes_on_the_users_side(small, caplog):
    config = small.config("DSSM")
    with caplog.at_level(logging.INFO):
        train = UIPDataset(config).build()[0]
    kinds = {field.name: field.kind for field in train.profiles.fields}
    assert "left out" in caplog.text
    assert train.profile_fields
    for name in train.profile_fields:
        assert kinds[name] != "match"
        assert train.field2source[name] == FeatureSource.USER
    with pytest.raises(SettingsError, match="user tower"):
        no_users = small.config("DSSM", unload_col=None)
        train.user_feat = None
        for name in ("age",):
            del train.field2type[name], train.field2source[name]
        train.select(ArmSettings("bare", (), "drop"), no_users)


def test_saved_dataset(small):
    config = small.config(save_dataset=True)
    first = create_dataset(config)
    path = small.folder / "saved" / "small-UIPDataset.pth"
    assert path.is_file()
    (small.folder / small.name / "small.inter").unlink()  # only the saved file is left
    second = create_dataset(small.config())
    first.build(), second.build()
    for name, values in field_table(first).items():
        assert (values == field_table(second)[name]).all()
    assert (second.behaviours.time == first.behaviours.time).all()
    # Another uip_ setting shapes other data, so the saved file does not serve it.
    with pytest.raises(SettingsError, match=r"small\.inter"):
        create_dataset(small.config(uip_folds=3))
    for key, value in (
        ("encoding", "latin-1"),
        ("numerical_features", ["timestamp"]),
        ("discretization", {"timestamp": {"method": "ED", "bucket": 3}}),
    ):
        with pytest.raises(SettingsError, match=r"small\.inter"):
            create_dataset(small.config(**{key: value}))
    # What only says where things go does not.
    assert create_dataset(small.config(uip_output="elsewhere")).build()
    moved = path.rename(small.folder / "other.pth")
    assert create_dataset(small.config(dataset_save_path=str(moved))).build()


def test_rows_of_items_that_the_item_file_lacks_are_counted(small, caplog):
    small.items = small.items[:-2]
    small.write()
    UIPDataset(small.config())
    assert re.search(r"[1-9]\d* of \d+ rows are left out, of users or items", caplog.text)


def test_labels_and_sampled_negatives_are_refused_together(small):
    sampled = {key: value for key, value in SAMPLED.items() if key != "threshold"}
    with pytest.raises(SettingsError, match=r"train_neg_sample_args samples negatives.*labels"):
        UIPDataset(small.config(**sampled)).build()
    candidates = {"eval_args": SAMPLED["eval_args"]}
    with pytest.raises(SettingsError, match=r"eval_args.mode.valid samples negatives"):
        UIPDataset(small.config(**candidates)).build()


def test_one_labelled_row_has_no_auc(small):
    def split(rows, mode):
        args = {"split": {"RS": rows}, "order": "TO", "group_by": None, "mode": mode}
        return {"eval_args": args}

    n_rows = len(small.rows)
    one_of_test = [(n_rows - 30) / n_rows, 29 / n_rows, 1 / n_rows]
    with pytest.raises(SettingsError, match="gives the test split one row, of which there is no"):
        UIPDataset(small.config(**split(one_of_test, "labeled"))).build()
    sampled = {**SAMPLED, **split(one_of_test, "uni10"), "uip_facets": IMPLICIT_FACETS}
    assert [len(part) for part in UIPDataset(small.config(**sampled)).build()][2] == 1


@pytest.mark.parametrize("sampled", [False, True])
def test_saved_dataloaders(small, sampled, monkeypatch):
    from recbole_uip import profiles

    settings = {**SAMPLED, "uip_facets": IMPLICIT_FACETS} if sampled else {}
    config = small.config(save_dataloaders=True, **settings)
    dataset = UIPDataset(config)
    first = data_preparation(config, dataset)
    path = small.folder / "saved" / "small-for-FM-dataloader.pth"
    assert path.is_file()
    monkeypatch.setattr(profiles, "infer", None)  # not needed again
    later = small.config(dataloaders_save_path=str(path), **settings)
    second = data_preparation(later, UIPDataset(later))
    for one, other in zip(first, second, strict=True):
        assert one.dataset.fields() == other.dataset.fields()
        assert len(one) == len(other)
    for one, other in zip(first[0], second[0], strict=True):
        for column in one.columns:
            if not (sampled and column not in ("user_id", ROW)):
                assert torch.equal(one[column], other[column]), column
    changed = small.config(uip_folds=3, dataloaders_save_path=str(path), **settings)
    with pytest.raises(TypeError):  # infer is called, for the saved file does not fit
        data_preparation(changed, UIPDataset(changed))


def test_dataloaders_of_other_rows_are_made_anew(small, caplog):
    config = small.config(save_dataloaders=True)
    data_preparation(config, UIPDataset(config))
    for change in (
        lambda: small.rows.reverse(),  # RecBole numbers users as they come
        lambda: small.rows[0].__setitem__(2, 6 - small.rows[0][2]),
        lambda: small.rows[0].__setitem__(3, small.rows[0][3] + 1),
        lambda: small.rows.pop(),
    ):
        change()
        dataset = UIPDataset(small.write().config())
        caplog.clear()
        data_preparation(dataset.config, dataset)
        assert "are of other rows than the files hold now" in caplog.text
        fresh = UIPDataset(small.config())
        fresh.build()
        for one, other in zip(dataset.profiles.fields, fresh.profiles.fields, strict=True):
            np.testing.assert_array_equal(one.values, other.values)


def change_item_file(small):
    small.items = [(item, f"{title} again", genre) for item, title, genre in small.items]
    small.write()


def test_dataloaders_of_other_titles_or_of_another_version_are_made_anew(
    small, caplog, monkeypatch
):
    def loaded():
        dataset = UIPDataset(small.config(save_dataloaders=True))
        caplog.clear()
        data_preparation(dataset.config, dataset)
        return "made anew" not in caplog.text

    loaded()
    assert loaded()
    change_item_file(small)
    assert not loaded() and "small.item has changed since the dataloaders in" in caplog.text
    assert loaded()
    monkeypatch.setattr(recbole_uip, "__version__", "9.9")
    assert not loaded() and "recbole-uip has changed since the dataloaders in" in caplog.text
    assert loaded()


def test_dataloaders_of_another_lm_in_the_same_folder_are_made_anew(small, caplog, monkeypatch):
    from recbole_uip import profiles

    monkeypatch.setattr(
        profiles,
        "infer",
        lambda behaviours, texts, settings, fold, original=profiles.infer: original(
            behaviours, None, dataclasses.replace(settings, facets=()), fold
        ),
    )
    folder = small.folder / "lm"
    folder.mkdir()
    facets = {"interests": {"prompt": "interests", "source": "lm"}}
    keys = {"uip_facets": facets, "uip_item_text": "{title}", "uip_lm": str(folder)}
    keys["uip_cache"] = str(small.folder / "cache")
    for content, anew in (("one", False), ("one", False), ("other", True), ("other", False)):
        (folder / "model.safetensors").write_text(content)
        dataset = UIPDataset(small.config(save_dataloaders=True, **keys))
        caplog.clear()
        data_preparation(dataset.config, dataset)
        assert ("uip_lm has changed since the dataloaders" in caplog.text) == anew


def test_a_saved_dataset_of_other_files_or_another_version_is_made_anew(small, caplog, monkeypatch):
    config = small.config(save_dataset=True)
    create_dataset(config)
    create_dataset(config)
    assert "made anew" not in caplog.text
    small.rows[0][2] = 6 - small.rows[0][2]
    small.write()
    dataset = create_dataset(config)
    assert "small.inter has changed since" in caplog.text
    assert dataset.inter_feat["label"][0] == (small.rows[0][2] >= 4)
    caplog.clear()
    monkeypatch.setattr(recbole_uip, "__version__", "9.9")
    create_dataset(config)
    assert "recbole-uip has changed since" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_dataloaders_are_saved_with_any_codebook(small, method):
    facets = {"company": {"source": "collaborative", "codes": 3, "rank": 2}}
    keys = {"uip_facets": facets, "uip_codebook": {"method": method}}
    config = small.config(save_dataloaders=True, **keys)
    (first, *_) = data_preparation(config, UIPDataset(config))
    (again, *_) = data_preparation(small.config(**keys), UIPDataset(small.config(**keys)))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["uip_company"], other["uip_company"])


def test_dataloaders_saved_by_recbole_are_read_by_us(small):
    config = small.config(save_dataloaders=True)
    first = recbole_data_preparation(config, UIPDataset(config))
    later = small.config()
    second = data_preparation(later, UIPDataset(later))
    for one, other in zip(first, second, strict=True):
        assert one.dataset.profile_fields
        assert one.dataset.fields() == other.dataset.fields()


def test_dataloaders_saved_by_us_are_read_by_recbole(small):
    # With sampled candidates: RecBole's reload of labeled ones asks a sampler that is not there.
    config = small.config(save_dataloaders=True, uip_facets=IMPLICIT_FACETS, **SAMPLED)
    first = data_preparation(config, UIPDataset(config))
    later = small.config(uip_facets=IMPLICIT_FACETS, **SAMPLED)
    second = recbole_data_preparation(later, UIPDataset(later))
    for one, other in zip(first, second, strict=True):
        assert other.dataset.profile_fields
        assert one.dataset.fields() == other.dataset.fields()


def test_datasets_pickle(small):
    dataset = pickle.loads(pickle.dumps(UIPDataset(small.config())))
    assert dataset.build()[0].profile_fields


def test_needs_our_config():
    with pytest.raises(TypeError, match="UIPConfig"):
        UIPDataset({})


def test_leniency_alone(small):
    dataset = UIPDataset(small.config(uip_facets={"leniency": LENIENCY}))
    dataset.build()
    assert len(dataset.profiles.fields) == 2
    assert {field.kind for field in dataset.profiles.fields} == {"bin"}

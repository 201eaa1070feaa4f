"""Settings and files that cannot be used: one clear error each, and never a silent wrong result."""

import gzip
import re
import sys

import pytest
import torch
from recbole.model.context_aware_recommender.fm import FM

from recbole_uip import run_recbole_uip
from recbole_uip.bridge import UIPDataset
from recbole_uip.bridge.refusals import recbole_refusals
from recbole_uip.settings import SettingsError

from .conftest import BY_TIME, LENIENCY

UNI = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "mode": "uni10"}
LIST = {"inter": ["user_id", "item_id", "rating", "timestamp"]}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"threshold": {"stars": 4}}, "threshold names 'stars'.*load_col: {inter:"),
        ({"load_col": {"inter": ["user_id", "item_id"]}}, "threshold names 'rating'"),
        ({"threshold": 4}, "threshold=4 must map one column to a number"),
        ({"threshold": {"rating": "four"}}, "threshold.rating='four' must be a number"),
        ({"threshold": {"rating": 4, "timestamp": 4}}, "must map one column"),
        ({"load_col": {"inter": ["user_id", "rating"]}}, "ITEM_ID_FIELD='item_id' is not among"),
        ({"load_col": {"inter": ["other"]}}, "USER_ID_FIELD='user_id' is not among"),
        ({"USER_ID_FIELD": "uid"}, "USER_ID_FIELD='uid' is not among"),
        ({"USER_ID_FIELD": "rating"}, "rating' is a column of type float: IDs are tokens"),
        ({"valid_metric": "NDCG@10"}, "valid_metric='NDCG@10' is not among metrics"),
        ({"eval_args": {**BY_TIME, "split": {"RS": [0.8, 0.2]}}}, "give 2 splits"),
        ({"eval_args": {**BY_TIME, "split": {"XX": 3}}}, "XX.*NotImplementedError in build"),
        ({"eval_args": {**BY_TIME, "order": "XX"}}, "XX.*NotImplementedError in build"),
        ({"eval_args": {**BY_TIME, "mode": "foo"}}, "foo"),
        ({"additional_feat_suffix": "foo"}, r"small.foo.* \(given are .*additional_feat_suffix"),
        ({"user_inter_num_interval": "[2000,inf)"}, "Some feat is empty"),
        ({"val_interval": {"stars": "[1,5]"}}, "stars"),
        ({"encoding": "foo"}, "unknown encoding: foo"),
    ],
)
def test_settings_that_recbole_cannot_use(settings, words, small):
    with pytest.raises(SettingsError, match=words):
        UIPDataset(small.config(**settings)).build()


@pytest.mark.parametrize(
    "key, value",
    [
        ("epochs", "abc"),
        ("learning_rate", "fast"),
        ("train_batch_size", 0),
        ("stopping_step", 1.5),
        ("eval_step", "a"),
        ("worker", -1),
        ("metric_decimal_place", "a"),
        ("embedding_size", -3),
        ("metrics", []),
        ("metrics", None),
        ("valid_metric", None),
        ("numerical_features", "price"),
        ("mlp_hidden_size", 64),
        ("mlp_hidden_size", []),
        ("mlp_hidden_size", [64, "a"]),
        ("clip_grad_norm", 5),
        ("clip_grad_norm", {"foo": 5}),
        ("val_interval", 3),
        ("seq_len", 2),
        ("seq_len", {"genre": "a"}),
        ("benchmark_filename", "train"),
        ("benchmark_filename", ["train", "test"]),
        ("field_separator", ""),
        ("eval_args", 3),
        ("train_neg_sample_args", "uniform"),
    ],
)
def test_values_that_recbole_would_stumble_over(key, value, small):
    with pytest.raises(SettingsError, match=re.escape(f"{key}={value!r} must be ")):
        small.config(model="DeepFM", **{key: value})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"metrics": ["NDCG"], "valid_metric": "NDCG@7"}, "'NDCG@7' must be NDCG@5 or NDCG@10, as"),
        ({"metrics": ["NDCG"], "valid_metric": "NDCG"}, "'NDCG' must be NDCG@5 or NDCG@10, as"),
        ({"metrics": ["GAUC"], "valid_metric": "GAUC@5"}, "'GAUC@5' must be GAUC"),
        ({"metrics": ["AUC"], "valid_metric": "AUC@10"}, "'AUC@10' must be AUC"),
        ({"eval_args": {**UNI, "mode": "foo"}}, "eval_args.mode='foo' must be labeled, full, or"),
        ({"eval_args": {**UNI, "mode": "uni0"}}, "eval_args.mode='uni0' must be"),
        ({"eval_args": {**UNI, "mode": {"valid": "unia"}}}, "eval_args.mode='unia' must be"),
        ({"eval_args": {**UNI, "mode": {"vald": "uni5"}}}, "eval_args.mode has no key 'vald'.*'va"),
        ({"eval_args": {**UNI, "splt": 1}}, "eval_args has no key 'splt': did you mean 'split'"),
        ({"eval_args": {**UNI, "split": {"RS": [0.8, -0.1, 0.3]}}}, "eval_args.split.RS=.*shares"),
        (
            {"train_neg_sample_args": {"uniform": 1}},
            "args has no key 'uniform': write such as {dis",
        ),
        ({"train_neg_sample_args": {"sample_num": 0}}, "args.sample_num=0 must be a whole number"),
        ({"LABEL_FIELD": "user_id"}, "LABEL_FIELD and USER_ID_FIELD are both 'user_id'"),
        ({"USER_ID_FIELD": "split"}, "USER_ID_FIELD='split' is the name of the column of profiles"),
        ({"ITEM_ID_FIELD": 3}, "ITEM_ID_FIELD=3 must be the name of a column"),
    ],
)
def test_settings_that_are_another_protocol_than_meant(settings, words, small):
    sampled = {"eval_args": UNI, "metrics": ["NDCG"], "valid_metric": "NDCG@5", "topk": [5, 10]}
    with pytest.raises(SettingsError, match=words):
        small.config(**{**sampled, **settings})


def test_no_arm_is_trained_before_one_that_cannot_be(small, tmp_path):
    arms = {
        "plain": {"facets": [], "user_id": "keep"},
        "means": {"facets": ["leniency"], "user_id": "drop", "values": "means"},
    }
    with pytest.raises(SettingsError, match="values=means.*DSSM has no tower"):
        run(small, tmp_path / "out", model="DSSM", uip_arms=arms)
    assert not (tmp_path / "out" / "profiles.parquet").exists()


def test_our_own_defects_are_not_called_settings():
    with pytest.raises(ValueError, match="a defect") as caught, recbole_refusals():
        raise ValueError("a defect")
    assert not isinstance(caught.value, SettingsError)


@pytest.mark.parametrize(
    "column, words",
    [
        ("rating:token", "'rating' is of type token, whose values are names"),
        ("timestamp:token", "'timestamp' is of type token, which has no order"),
        ("item_id:float", "could not|no number|IDs are tokens"),
    ],
)
def test_columns_of_the_wrong_type(column, words, atomic):
    name = column.split(":")[0]
    atomic.columns = tuple(column if c.startswith(f"{name}:") else c for c in atomic.columns)
    with pytest.raises(SettingsError, match=words):
        UIPDataset(atomic.write().config()).build()


def test_values_that_are_no_numbers_are_named(atomic):
    atomic.rows[6][2] = "five"
    with pytest.raises(SettingsError, match="'rating:float' has 'five' in row 7.*type token"):
        UIPDataset(atomic.write().config())


def test_dates_are_said_how_to_turn_into_seconds(atomic):
    atomic.rows[6][3] = "2020-01-31 10:00:00"
    with pytest.raises(SettingsError, match="'timestamp:float' has '2020.* in row 7.*in seconds"):
        UIPDataset(atomic.write().config())


def test_missing_ratings_make_no_labels(atomic):
    for row in atomic.rows[3:6]:
        row[2] = ""
    with pytest.raises(SettingsError, match="'rating' is missing in 3 of 400"):
        UIPDataset(atomic.write().config())
    dataset = UIPDataset(atomic.config(val_interval={"rating": "[0,5]"}))
    dataset.build()
    assert len(dataset.behaviours) == 397


def test_labels_must_be_floats_and_there(atomic):
    for row in atomic.rows:
        row[2] = int(row[2] >= 4)
    settings = {"threshold": None, "LABEL_FIELD": "rating"}
    UIPDataset(atomic.write().config(**settings)).build()
    atomic.rows[0][2] = ""
    with pytest.raises(SettingsError, match="'rating' is missing in 1 of 400"):
        UIPDataset(atomic.write().config(**settings))
    atomic.columns = ("user_id:token", "item_id:token", "rating:token", "timestamp:float")
    with pytest.raises(SettingsError, match="LABEL_FIELD: the column 'rating' is of type token"):
        UIPDataset(atomic.write().config(**settings))


def test_open_quotation_marks_swallow_no_rows(atomic):
    for row in (10, 200):
        atomic.rows[row][0] = f'"{atomic.rows[row][0]}'
    atomic.users = False
    with pytest.raises(SettingsError, match="has 400 rows, of which 210 would be read"):
        UIPDataset(atomic.write().config())


def test_an_open_quotation_mark_to_the_end(atomic):
    atomic.rows[10][0] = '"open'
    with pytest.raises(SettingsError, match=r"small.inter cannot be read.*row|small.inter has 400"):
        UIPDataset(atomic.write().config())


def test_a_byte_order_mark_is_no_part_of_a_name(small):
    path = small.folder / "small" / "small.inter"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    dataset = UIPDataset(small.config())
    dataset.build()
    assert len(dataset.behaviours) == 400


def test_another_encoding_is_named(atomic):
    atomic.rows[0][0] = "Zoë"
    path = atomic.write().folder / "small" / "small.inter"
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(SettingsError, match="small.inter cannot be read.*encoding"):
        UIPDataset(atomic.config())


def test_a_label_that_is_not_loaded(small):
    with pytest.raises(
        SettingsError, match=r"LABEL_FIELD='ratin' is not among .*did you mean 'rating'\?"
    ):
        UIPDataset(small.config(threshold=None, LABEL_FIELD="ratin")).build()


def test_numbers_that_no_model_reads_are_said(small, caplog):
    settings = with_years(small, range(1980, 1995))
    UIPDataset(small.config(**settings)).build()
    assert "year: loaded, and read by no model" in caplog.text
    caplog.clear()
    UIPDataset(small.config(**settings, numerical_features=["year"])).build()
    assert "read by no model" not in caplog.text


def test_another_separator_is_asked_for(small):
    path = small.folder / "small" / "small.inter"
    path.write_text(path.read_text(encoding="utf-8").replace("\t", ","), encoding="utf-8")
    with pytest.raises(SettingsError, match="field_separator='\\\\t' right, or is it ','"):
        UIPDataset(small.config())


def test_encodings_of_two_bytes(small):
    path = small.folder / "small" / "small.inter"
    # U+010A has the byte of a line feed.
    text = path.read_text(encoding="utf-8").replace("u1\t", "\u010a\t")
    for kind in ("user", "item"):
        file = small.folder / "small" / f"small.{kind}"
        written = file.read_text(encoding="utf-8").replace("u1\t", "\u010a\t")
        file.write_bytes(written.encode("utf-16"))
    path.write_bytes(text.encode("utf-16"))
    dataset = UIPDataset(small.config(encoding="utf-16"))
    dataset.build()
    assert len(dataset.behaviours) == 400 and "\u010a" in dataset.field2id_token["user_id"]


def test_columns_with_our_names(atomic):
    for name in ("uip_row", "uip_leniency_5"):
        path = atomic.write().folder / "small" / "small.inter"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"{lines[0]}\t{name}:token", *(f"{line}\tx" for line in lines[1:])]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        columns = {"inter": [*LIST["inter"], name]}
        with pytest.raises(SettingsError, match=f"column '{name}'"):
            UIPDataset(atomic.config(load_col=columns)).build()


def test_one_class_of_validation_labels_does_not_leave_an_earlier_runs_model(atomic, tmp_path):
    atomic.rows.sort(key=lambda row: row[3])
    first = run(atomic.write(), tmp_path / "out")
    assert "plain" in first["models"]["FM"]
    for row in atomic.rows[320:360]:
        row[2] = 5
    # The boundaries of the split are among ties, so that the rows about it are alike as well.
    for row in atomic.rows[310:370]:
        row[2] = 5
    with pytest.raises(SettingsError, match="40 of its 40 labels are 1.*valid_metric=LogLoss"):
        run(atomic.write(), tmp_path / "out")
    again = run(atomic, tmp_path / "out", valid_metric="LogLoss")
    assert again["models"]["FM"]["plain"]["test"]["logloss"] > 0


def test_a_loss_that_is_no_number(small, tmp_path):
    with pytest.raises(SettingsError, match=r"loss of FM is NaN: lower learning_rate=1e\+30"):
        run(small, tmp_path / "out", learning_rate=1e30, epochs=5)


def with_years(small, years):
    """Settings that load ``years``, which the items' file gets as a column of floats."""
    lines = ["item_id:token\tyear:float", *(f"i{n}\t{year}" for n, year in enumerate(years))]
    (small.folder / "small" / "small.item").write_text("\n".join(lines) + "\n")
    return {"load_col": {**LIST, "user": ["user_id", "age"], "item": ["item_id", "year"]}}


def test_a_numerical_feature_without_numbers(small):
    settings = with_years(small, [""] * 15)
    with pytest.raises(SettingsError, match="'year' is among numerical_features=.*no value in any"):
        UIPDataset(small.config(**settings, numerical_features=["year"]))
    UIPDataset(small.config(**settings))  # which no model reads


@pytest.mark.parametrize("value", ["inf", "-1e300"])
def test_a_numerical_feature_beyond_single_precision(value, small):
    settings = with_years(small, [value, *range(14)])
    with pytest.raises(
        SettingsError, match=r"'year' is among numerical_features, and has -?(inf|1e\+300) "
    ):
        UIPDataset(small.config(**settings, numerical_features=["year"]))
    UIPDataset(small.config(**settings))  # which no model reads


@pytest.mark.parametrize(
    "field, words", [("age", "'age' is of type token"), ("rating", "'rating' is what labels are")]
)
def test_numerical_features_that_are_none(field, words, small):
    with pytest.raises(SettingsError, match=f"numerical_features: .*{words}"):
        UIPDataset(small.config(numerical_features=[field]))


def test_scores_that_are_no_numbers(small, tmp_path, monkeypatch):
    predict = FM.predict

    def with_one_nan(model, interaction):
        score = predict(model, interaction)
        return score.where(torch.arange(len(score)) > 0, torch.nan)

    monkeypatch.setattr(FM, "predict", with_one_nan)
    with pytest.raises(SettingsError, match="FM, arm plain: 1 of 40 scores of the valid split are"):
        run(small, tmp_path / "out")


def test_a_last_batch_of_one_row(small, tmp_path):
    with pytest.raises(
        SettingsError, match="train_batch_size=319 leaves one of 320 .* raise it by"
    ):
        run(small, tmp_path / "out", model="NFM", train_batch_size=319)
    run(small, tmp_path / "out", model="FM", train_batch_size=319)


def test_two_towers_leave_out_floats_that_are_not_declared(small, tmp_path):
    settings = with_years(small, range(1980, 1995))
    results = run(small, tmp_path / "out", model="DSSM", **settings)
    assert "year" not in results["models"]["DSSM"]["uip"]["fields"]
    results = run(small, tmp_path / "out", model="DSSM", **settings, numerical_features=["year"])
    assert "year" in results["models"]["DSSM"]["uip"]["fields"]


def test_more_folds_than_users(small):
    with pytest.raises(SettingsError, match="uip_folds=1000 is more than there are users"):
        UIPDataset(small.config(uip_folds=1000)).build()


def test_a_package_that_is_missing(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match="please install wandb"):
        run(small, tmp_path / "out", log_wandb=True)


def test_an_output_that_is_a_file(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="uip_output=.*cannot be written to"):
        run(small, tmp_path / "file")


def test_compressed_item_files(tmp_path):
    from recbole_uip.texts import item_texts

    path = tmp_path / "items.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8-sig") as file:
        file.write('item,the title\ni1 ,"A, B"\n"i2",C\n')
    texts = item_texts(path, "{the title}", "item", {"i1 ": 1, "i2": 2}, 3, ",")
    assert texts == [None, "A, B", "C"]


def run(atomic, output, model="FM", **settings):
    config = {
        "data_path": str(atomic.folder),
        "checkpoint_dir": str(atomic.folder / "saved"),
        "load_col": LIST,
        "threshold": {"rating": 4},
        "eval_args": BY_TIME,
        "epochs": 1,
        "train_batch_size": 256,
        "show_progress": False,
        "use_gpu": False,
        "gpu_id": "",
        "uip_facets": {"leniency": LENIENCY},
        "uip_arms": {
            "plain": {"facets": [], "user_id": "keep"},
            "uip": {"facets": ["leniency"], "user_id": "drop"},
        },
        "uip_output": str(output),
    }
    return run_recbole_uip(model, atomic.name, config={**config, **settings})


def test_items_without_a_template_of_their_text_are_answered_with_their_columns(tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "shop.item").write_text("item_id:token\tname:token_seq\tprice:float\n")
    with pytest.raises(SettingsError, match="uip_item_text is not set.*has .*name:token_seq, pri"):
        run_recbole_uip("FM", "shop", config={"data_path": str(tmp_path)})


def test_a_dataset_that_is_not_there_is_named_before_what_its_settings_lack(tmp_path):
    with pytest.raises(SettingsError, match="dataset 'nosuch' .there is no folder.*uip_item_text"):
        run_recbole_uip("FM", "nosuch", config={"data_path": str(tmp_path)})


@pytest.mark.parametrize("role", ["label", "timestamp", "user_id", "uip_row"])
def test_items_have_no_column_that_is_one_of_the_interactions(role, small):
    lines = [f"item_id:token\t{role}:float", *(f"i{item}\t{item % 2}" for item in range(15))]
    (small.folder / "small" / "small.item").write_text("\n".join(lines) + "\n")
    inter = ["user_id", "item_id", "rating"]
    load_col = {"inter": inter, "item": ["item_id", role]}
    with pytest.raises(SettingsError, match=f"small.item has a column '{role}'.*load_col.item"):
        UIPDataset(small.config(load_col=load_col))
    load_col["item"] = "*"
    with pytest.raises(SettingsError, match=rf"unload_col: {{item: \[{role}\]}}"):
        UIPDataset(small.config(load_col=load_col))
    UIPDataset(small.config(load_col=load_col, unload_col={"item": [role]}))


@pytest.mark.parametrize("files", [("inter", "item"), ("inter", "user"), ("user", "item")])
def test_a_column_that_two_files_have(files, small):
    for kind in files:
        path = small.folder / "small" / f"small.{kind}"
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"{header}\tcat:token", *(f"{line}\tx" for line in lines)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second = files
    with pytest.raises(
        SettingsError, match=rf"small.{second} has a column 'cat', and small.{first} has one"
    ):
        UIPDataset(small.config(load_col=None))
    UIPDataset(small.config(load_col=None, unload_col={second: ["cat"]}))


def test_a_line_with_more_fields_than_columns(small):
    path = small.folder / "small" / "small.item"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[4] = lines[4].replace(" ", "\t", 1)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(
        SettingsError, match=r"small.item: line 5 has 4 fields, and the header 3 .*'\\t' out"
    ):
        UIPDataset(small.config())


def test_separators_that_end_lines_or_are_quoted_add_no_fields(small):
    inter, item = (small.folder / "small" / f"small.{kind}" for kind in ("inter", "item"))
    expected = UIPDataset(small.config())
    header, *lines = inter.read_text(encoding="utf-8").replace("\t", ",").splitlines()
    inter.write_text("\n".join([header, *(f"{line}," for line in lines)]) + "\n", encoding="utf-8")
    text = item.read_text(encoding="utf-8").replace("\t", ",").replace("Film 3", '"Film, 3"')
    item.write_text(text, encoding="utf-8")
    small.users = False
    (small.folder / "small" / "small.user").unlink()
    dataset = UIPDataset(small.config(field_separator=","))
    assert (dataset.field2id_token["user_id"] == expected.field2id_token["user_id"]).all()
    # Of few columns pandas would take the first for the index.
    few = {"inter": ["user_id", "item_id"]}
    dataset = UIPDataset(small.config(field_separator=",", load_col=few, threshold=None))
    assert (dataset.field2id_token["user_id"] == expected.field2id_token["user_id"]).all()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"val_interval": {"rating": 3}}, r"val_interval: '3' is no interval: write .*'\[3,inf\)'"),
        ({"val_interval": {"rating": "[a,5]"}}, r"val_interval: '\[a,5\]' is no interval"),
        ({"val_interval": {"rating": "[1,2];[5,4]"}}, r"val_interval: '\[5,4\]' is no interval"),
        ({"user_inter_num_interval": 5}, "user_inter_num_interval: '5' is no interval"),
        ({"item_inter_num_interval": "[5,)"}, "item_inter_num_interval: .* is no interval"),
    ],
)
def test_illegal_intervals(settings, words, small):
    with pytest.raises(SettingsError, match=words):
        UIPDataset(small.config(**settings))


def test_legal_intervals(small):
    settings = {"val_interval": {"rating": "[1,2]; (3,inf)"}, "user_inter_num_interval": "[1,inf)"}
    dataset = UIPDataset(small.config(**settings))
    kept = [row for row in small.rows if row[2] != 3]
    assert 0 < len(dataset) <= len(kept)


@pytest.mark.parametrize("separator", ["||", "::", ".", "|"])
def test_separators_are_no_regular_expressions(separator, small):
    expected = UIPDataset(small.config())
    for kind in ("inter", "user", "item"):
        path = small.folder / "small" / f"small.{kind}"
        path.write_text(path.read_text(encoding="utf-8").replace("\t", separator), encoding="utf-8")
    dataset = UIPDataset(small.config(field_separator=separator))
    assert (dataset.field2id_token["user_id"] == expected.field2id_token["user_id"]).all()
    assert (dataset.field2id_token["genre"] == expected.field2id_token["genre"]).all()


def test_an_empty_file(small):
    path = small.folder / "small" / "small.item"
    path.write_text("")
    with pytest.raises(SettingsError, match="small.item is empty, .*first line must name"):
        UIPDataset(small.config())


def test_load_col_and_unload_col_of_one_file(small):
    with pytest.raises(
        SettingsError, match="unload_col.item=.*beside load_col.item=.*--load_col=None"
    ):
        UIPDataset(small.config(unload_col={"item": ["genre"]}))


def test_benchmark_files_in_a_folder_that_is_not_there(tmp_path, small):
    names = ["train", "valid", "test"]
    with pytest.raises(
        SettingsError, match="Put small.train.inter and small.valid.inter and small.test.inter"
    ):
        UIPDataset(small.config(benchmark_filename=names, data_path=str(tmp_path / "none")))


def test_a_checkpoint_dir_that_cannot_be_made(small, tmp_path, monkeypatch):
    monkeypatch.setattr(UIPDataset, "build", None)  # not come to
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="checkpoint_dir='.*file/x' cannot be made: .*another"):
        run(small, tmp_path / "out", checkpoint_dir=str(tmp_path / "file" / "x"))


def test_a_config_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_bytes("uip_output: Zoë".encode("latin-1"))
    with pytest.raises(SettingsError, match="config_files: '.*some.yaml' is not UTF-8 .*save it"):
        run_recbole_uip("FM", "small", config_files=path)


@pytest.mark.parametrize("model", [FM, [FM], 3])
def test_models_are_named(model):
    with pytest.raises(SettingsError, match="model=.* must be a name, .*of your own .*UIPConfig"):
        run_recbole_uip(model, "small")

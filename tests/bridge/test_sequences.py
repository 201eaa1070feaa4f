"""What DIN and DIEN read: their user's strictly earlier events, with feedback, and nothing else."""

import pickle
import sys

import numpy as np
import pytest
import torch
from recbole.utils import init_seed

from recbole_uip.bridge import UIPConfig, UIPDataset
from recbole_uip.bridge.preparation import data_preparation
from recbole_uip.bridge.run import train_arm
from recbole_uip.bridge.sequences import FEEDBACK, MODELS, SequenceConfig, SequenceDataset
from recbole_uip.records import finite
from recbole_uip.settings import SettingsError

from .conftest import rows_of

LENGTH = 4
RS = {"RS": [0.8, 0.1, 0.1]}
NEGATIVES = "neg_item_id_list"
SPLITS = {
    "RS TO": {"split": RS, "order": "TO", "group_by": None, "mode": "labeled"},
    "RS RO": {"split": RS, "order": "RO", "group_by": None, "mode": "labeled"},
    "LS TO": {
        "split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "labeled"
    },
}  # fmt: skip


def configured(atomic, model="DIN", **more):
    given = dict(atomic.write().config().variable_config_dict)
    small = {"MAX_ITEM_LIST_LENGTH": LENGTH, "mlp_hidden_size": [8], "embedding_size": 4}
    return SequenceConfig(model, atomic.name, config_dict={**given, **small, **more})


def build(atomic, model="DIN", **more):
    config = configured(atomic, model, **more)
    init_seed(7, True)
    dataset = SequenceDataset(config)
    return dataset, dataset.build()


def sequences(dataset, splits):
    """Lists and lengths of all rows, in the input's order, as batches carry them."""
    parts = [split[np.arange(len(split))] for split in splits]
    rows = torch.cat([part["uip_row"] for part in parts])
    order = torch.argsort(rows)
    names = [name for name in (dataset.iid_field + "_list", "item_length", NEGATIVES)]
    return {
        name: torch.cat([part[name] for part in parts])[order].numpy()
        for name in names
        if name in parts[0]
    }


def expected_sequence(behaviours, row, history, refresh=0.0):
    """(item, liked) of the events that a row may see, by definition."""
    earlier = (behaviours.user == behaviours.user[row]) & (
        behaviours.time < behaviours.time[row] - refresh
    )
    if history == "train" or behaviours.split[row] == 0:
        earlier &= behaviours.split == 0
    events = np.flatnonzero(earlier)
    events = events[np.argsort(behaviours.time[events], kind="stable")][-LENGTH:]
    return [(int(behaviours.item[e]), int(behaviours.liked[e])) for e in events]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("history", ["train", "observed"])
@pytest.mark.parametrize("refresh", ["0s", "40s"])
def test_a_row_has_its_users_strictly_earlier_events(small, split, history, refresh):
    dataset, splits = build(
        small, eval_args=SPLITS[split], uip_history=history, uip_refresh=refresh
    )
    behaviours, n = dataset.behaviours, dataset.item_num
    found = sequences(dataset, splits)
    lengths = set()
    for row in range(len(behaviours)):
        expected = expected_sequence(behaviours, row, history, float(refresh[:-1]))
        lengths.add(len(expected))
        variants = found["item_id_list"][row]
        feedback, item = np.divmod(variants, n)
        assert found["item_length"][row] == max(1, len(expected))
        assert (variants[len(expected) :] == 0).all()
        events = list(zip(item, feedback - 1, strict=True))[: len(expected)]
        assert events == expected
    assert lengths == set(range(LENGTH + 1))


def flip(atomic, row):
    atomic.rows[row][2] = 1 if atomic.rows[row][2] >= 4 else 5


@pytest.mark.parametrize(
    ("model", "split"), [("DIN", "RS TO"), ("DIEN", "RS RO"), ("DIN", "LS TO")]
)
def test_a_label_reaches_later_rows_of_its_user_alone(atomic, model, split):
    settings = {"eval_args": SPLITS[split], "uip_history": "observed", "MAX_ITEM_LIST_LENGTH": 20}
    dataset, splits = build(atomic, model, **settings)
    before, behaviours = sequences(dataset, splits), dataset.behaviours
    reached = 0
    for row in (3, 150, int(np.argmin(behaviours.time))):
        flip(atomic, row)
        changed = sequences(*build(atomic, model, **settings))
        flip(atomic, row)
        may = (behaviours.user == behaviours.user[row]) & (behaviours.time > behaviours.time[row])
        if behaviours.split[row] != 0:
            # A training row knows no held-out label, whenever that was given.
            may &= behaviours.split != 0
        for name, values in before.items():
            moved = (values != changed[name]).reshape(len(values), -1).any(axis=1)
            assert not moved[~may].any(), name
            reached += moved.sum()
    assert reached > 0


def test_tied_events_are_no_history_of_each_other(atomic):
    user = atomic.rows[0][0]
    for row in atomic.rows:
        if row[0] == user:
            row[3] = 978_300_050
    dataset, splits = build(atomic)
    tied = dataset.behaviours.user == dataset.behaviours.user[0]
    found = sequences(dataset, splits)
    assert tied.sum() > 3
    assert (found["item_id_list"][tied] == 0).all() and (found["item_length"][tied] == 1).all()


def test_rows_splits_and_labels_are_those_of_a_context_model(small):
    plain = small.config("FM", uip_facets={})
    init_seed(7, True)
    others = UIPDataset(plain).build()
    _, splits = build(small)
    for ours, theirs in zip(splits, others, strict=True):
        np.testing.assert_array_equal(rows_of(ours), rows_of(theirs))
        assert torch.equal(ours.inter_feat["label"], theirs.inter_feat["label"])
    for key in ("eval_args", "metrics", "valid_metric", "train_neg_sample_args", "stopping_step"):
        assert configured(small)[key] == plain[key], key


def test_variants_are_their_items_with_a_feedback(small):
    dataset, splits = build(small)
    items, n = splits[0].get_item_feature(), dataset.item_num
    np.testing.assert_array_equal(items[FEEDBACK].numpy(), np.repeat([0, 1, 2], n))
    for name in items.interaction:
        if name != FEEDBACK:
            first, disliked, liked = items[name].split(n)
            assert torch.equal(first, disliked) and torch.equal(first, liked), name
    np.testing.assert_array_equal(items["item_id"][:n].numpy(), np.arange(n))
    assert dataset.num("item_id") == n and dataset.num(FEEDBACK) == 3
    # A row's own item is a target: it says nothing of how it was liked.
    batch = splits[0][np.arange(len(splits[0]))]
    assert (batch[FEEDBACK] == 0).all()
    assert (batch["item_id"] < n).all()


def test_implicit_feedback_is_liked(atomic):
    atomic.columns = ("user_id:token", "item_id:token", "timestamp:float")
    sampled = {"distribution": "uniform", "sample_num": 1}
    dataset, splits = build(
        atomic,
        train_neg_sample_args=sampled,
        eval_args={**SPLITS["RS TO"], "mode": "uni2"},
        metrics=["AUC", "LogLoss"],
    )
    found = sequences(dataset, splits)["item_id_list"]
    assert set(np.unique(found // dataset.item_num)) == {0, 2}


def test_dien_has_other_items_of_the_same_feedback_beside_events(small):
    dataset, splits = build(small, "DIEN")
    found, n = sequences(dataset, splits), dataset.item_num
    events, others = found["item_id_list"], found[NEGATIVES]
    np.testing.assert_array_equal(events == 0, others == 0)
    there = events > 0
    np.testing.assert_array_equal((events // n)[there], (others // n)[there])
    assert (events != others)[there].all() and (others % n > 0)[there].all()
    assert len(np.unique(others % n)) == n  # [PAD] and every item
    again = sequences(*build(small, "DIEN"))
    np.testing.assert_array_equal(again[NEGATIVES], others)
    assert NEGATIVES not in sequences(*build(small, "DIN"))


def model_and_batch(atomic, model):
    config = configured(atomic, model, eval_batch_size=512, uip_history="observed")
    dataset = SequenceDataset(config)
    train, _, _ = data_preparation(config, dataset)
    init_seed(3, True)
    net = config.model_class(config, train.dataset).eval()
    batch = train.dataset[np.arange(len(train.dataset))]
    return net, batch, dataset.item_num


@pytest.mark.parametrize("model", MODELS)
def test_what_stands_after_the_last_event_is_not_read(small, model):
    net, batch, n = model_and_batch(small, model)
    events, length = batch["item_id_list"], batch["item_length"]
    after = torch.arange(LENGTH) >= length[:, None]
    with torch.no_grad():
        scores = net.predict(batch)
        batch["item_id_list"] = torch.where(after, n + 1, events)
        np.testing.assert_allclose(net.predict(batch), scores, atol=1e-6)
        # The last event counts, and so does its feedback.
        liked = torch.where((events // n == 1) & ~after, events + n, events)
        batch["item_id_list"] = liked
        moved = (net.predict(batch) - scores).abs() > 1e-7
    changed = (liked != events).any(dim=1)
    assert (moved == changed).float().mean() > 0.95 and changed.any()


@pytest.mark.parametrize("model", MODELS)
def test_events_share_the_items_embedding(small, model):
    net, _, n = model_and_batch(small, model)
    layer = net.embedding_layer
    names = layer.token_field_names["item"]
    dims = dict(zip(names, layer.token_field_dims["item"], strict=True))
    assert dims == {"item_id": n, FEEDBACK: 3}
    embedded, _ = layer(
        torch.zeros(3, dtype=torch.int64), torch.tensor([[5], [n + 5], [2 * n + 5]])
    )
    of = {name: embedded["item"][:, 0, number] for number, name in enumerate(names)}
    assert torch.equal(of["item_id"][0], of["item_id"][1])
    assert torch.equal(of["item_id"][0], of["item_id"][2])
    assert not torch.equal(of[FEEDBACK][1], of[FEEDBACK][2])
    assert not torch.equal(of[FEEDBACK][0], of[FEEDBACK][1])


@pytest.mark.parametrize("model", MODELS)
def test_a_model_trains_and_is_evaluated_on_the_same_rows(small, tmp_path, model):
    config = configured(small, model, uip_history="observed", epochs=2)
    dataset = SequenceDataset(config)
    outcome, predictions = train_arm(config, dataset, config.uip.arms[0], tmp_path)
    assert outcome["epochs"] == 2 and outcome["profile_fields"] == []
    for number, split in enumerate(("train", "valid", "test")):
        if number:
            rows = np.flatnonzero(dataset.behaviours.split == number)
            np.testing.assert_array_equal(np.sort(predictions[split]["row"]), rows)
            assert 0 <= outcome[split]["auc"] <= 1
    again, _ = train_arm(config, dataset, config.uip.arms[0], tmp_path)
    assert finite(again["test"]) == finite(outcome["test"])


def test_recboles_package_leaves_anomaly_detection_as_it_was():
    assert "recbole.model.sequential_recommender.sine" in sys.modules
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("model", MODELS)
def test_a_pickled_config_is_still_one_of_sequences(small, model):
    config = configured(small, model)
    back = pickle.loads(pickle.dumps(config))
    assert type(back) is SequenceConfig
    assert back.model_class is config.model_class
    assert back.final_config_dict == config.final_config_dict
    assert back.uip == config.uip


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("DeepFM", {}, "model='DeepFM' reads no sequence of events with feedback: take one of DIN"),
        ("DIN", {"save_dataset": True}, "save_dataset=True: datasets of DIN are not saved"),
        ("DIEN", {"save_dataloaders": True}, "datasets of DIEN are not saved; leave it out"),
        ("DIN", {"uip_time": "static"}, "uip_time=static has no meaning for DIN"),
    ],
)
def test_settings_that_make_no_sense_are_refused(small, model, settings, message):
    with pytest.raises(SettingsError, match=message):
        configured(small, model, **settings)


def test_data_without_times_are_refused(atomic):
    atomic.columns = ("user_id:token", "item_id:token", "rating:float")
    random = {**SPLITS["RS RO"]}
    with pytest.raises(SettingsError, match="DIN reads the events before a row, and the data have"):
        build(atomic, eval_args=random)


def test_a_field_of_the_feedbacks_name_is_refused(small):
    config = configured(small, load_col=None)
    path = small.folder / small.name / f"{small.name}.item"
    path.write_text(path.read_text().replace("genre:", "feedback:"))
    with pytest.raises(SettingsError, match="the data have a field 'feedback'"):
        SequenceDataset(config).build()


def test_a_dataset_of_another_config_is_refused(small):
    config = small.config()
    assert type(config) is UIPConfig
    with pytest.raises(TypeError, match="needs a SequenceConfig, not UIPConfig"):
        SequenceDataset(config)

"""Every context-aware model of RecBole trains on profile fields."""

import numpy as np
import pytest
import torch
from recbole.data import data_preparation as recbole_data_preparation
from recbole.data.dataset import Dataset

from recbole_uip.bridge import UIPConfig, UIPDataset, data_preparation, make_trainer
from recbole_uip.bridge import trainer as trainers
from recbole_uip.bridge.config import context_models
from recbole_uip.bridge.loading import ROW
from recbole_uip.bridge.run import train_arm
from recbole_uip.bridge.storage import UnsafeFileError
from recbole_uip.settings import ArmSettings

from .conftest import COMPANY, FACETS


@pytest.fixture(scope="module")
def ml_100k():
    """The splits of ml-100k with profile fields, for every model."""
    config = UIPConfig("FM", "ml-100k", config_dict=settings())
    dataset = UIPDataset(config)
    dataset.build()
    # One epoch over a twentieth of the rows tells whether a model trains.
    for split in dataset.splits:
        rows = torch.arange(0, len(split), 20)
        split.inter_feat._reindex(rows)
        split.inter_feat.length = len(rows)
    return dataset


def settings(**more):
    return {
        "epochs": 1,
        "show_progress": False,
        "gpu_id": "",
        "use_gpu": False,
        "uip_facets": FACETS,
        "uip_codebook": {"sample": 2000, "n_init": 1, "max_iter": 20},
        **more,
    }


@pytest.mark.parametrize("model", context_models())
@pytest.mark.parametrize("user_id", ["keep", "drop"])
def test_trains_one_epoch(ml_100k, tmp_path, model, user_id):
    config = UIPConfig(model, "ml-100k", config_dict=settings(checkpoint_dir=str(tmp_path)))
    arm = ArmSettings("uip", tuple(FACETS), user_id)
    outcome, predictions = train_arm(config, ml_100k, arm, tmp_path)
    kinds = {field.name: field.kind for field in ml_100k.profiles.fields}
    expected = {name for name, kind in kinds.items() if model != "DSSM" or kind != "match"}
    assert set(outcome["profile_fields"]) == expected
    assert ("user_id" in outcome["fields"]) == (user_id == "keep")
    assert 0 < outcome["test"]["auc"] < 1
    assert len(predictions["test"]["score"]) == 500


def test_plain_arm_reads_what_the_stock_model_reads(small, tmp_path):
    config = small.config("DeepFM")
    dataset = UIPDataset(config)
    train, *_ = data_preparation(config, dataset, ArmSettings("plain"))
    none = small.config("DeepFM", uip_facets={})
    stock = UIPDataset(none)
    train_stock, *_ = recbole_data_preparation(none, stock)
    assert train.dataset.fields() == train_stock.dataset.fields() == Dataset.fields(stock)
    for one, other in zip(train, train_stock, strict=True):
        assert set(one.columns) == set(other.columns)
        for column in one.columns:
            assert torch.equal(one[column], other[column])


def test_predictions_are_recorded_row_by_row(small, tmp_path):
    config = small.config()
    dataset = UIPDataset(config)
    outcome, predictions = train_arm(config, dataset, config.uip.arms[1], tmp_path)
    test = predictions["test"]
    behaviours = dataset.behaviours
    assert sorted(test["row"]) == np.flatnonzero(behaviours.split == 2).tolist()
    assert (behaviours.user[test["row"]] == test["user"]).all()
    assert (behaviours.item[test["row"]] == test["item"]).all()
    assert (behaviours.liked[test["row"]] == test["label"]).all()
    assert 0 < test["score"].min() < test["score"].max() < 1
    # RecBole's own figures are these, rounded.
    assert outcome["test"]["auc"] == pytest.approx(
        np.mean(
            [
                (a > b) + 0.5 * (a == b)
                for a in test["score"][test["label"] == 1]
                for b in test["score"][test["label"] == 0]
            ]
        )
    )


def test_ranking_metrics_with_sampled_candidates(small, tmp_path):
    config = small.config(
        metrics=["Recall", "NDCG"],
        valid_metric="NDCG@5",
        topk=5,
        threshold=None,
        uip_facets={"company": {**COMPANY, "weight": "all"}},
        train_neg_sample_args={"distribution": "uniform", "sample_num": 1},
        eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"},
    )
    outcome, _ = train_arm(config, UIPDataset(config), config.uip.arms[1], tmp_path)
    assert 0 <= outcome["test"]["ndcg@5"] <= 1
    assert 0 <= outcome["test"]["auc"] <= 1


def test_a_batch_of_one_row_is_evaluated(small, tmp_path):
    config = small.config(eval_batch_size=39)  # the 40 rows leave one over
    outcome, predictions = train_arm(config, UIPDataset(config), config.uip.arms[1], tmp_path)
    assert len(predictions["test"]["score"]) == 40


def fitted(small, tmp_path, **more):
    config = small.config(checkpoint_dir=str(tmp_path), **more)
    train, valid, _ = data_preparation(config, UIPDataset(config))
    trainer = make_trainer(config, config.model_class(config, train.dataset))
    trainer.fit(train, valid, show_progress=False)
    return trainer, train, valid


@pytest.mark.parametrize(("enable_amp", "native"), [(True, False), (True, True), (False, False)])
def test_mixed_precision_without_instructions_is_warned_of(
    small, monkeypatch, caplog, enable_amp, native
):
    monkeypatch.setattr(trainers, "multiplies_bfloat16", lambda device: native)
    config = small.config(enable_amp=enable_amp)
    train, _, _ = data_preparation(config, UIPDataset(config))
    with caplog.at_level("WARNING"):
        make_trainer(config, config.model_class(config, train.dataset))
    assert ("set enable_amp=False" in caplog.text) == (enable_amp and not native)


def test_checkpoints_resume_and_are_safe(small, tmp_path):
    trainer, train, valid = fitted(small, tmp_path)
    path = trainer.saved_model_file
    # Weights and plain values: torch's strict loader reads all of it.
    assert torch.load(path, weights_only=True)["config"]["model"] == "FM"
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    config = small.config(checkpoint_dir=str(tmp_path), epochs=2)
    other = make_trainer(config, config.model_class(config, train.dataset))
    other.resume_checkpoint(path)
    assert other.start_epoch == 1
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, weights[name])
    other.fit(train, valid, show_progress=False)
    assert other.evaluate(valid)["auc"] > 0


def test_a_checkpoint_that_holds_code_is_refused(small, tmp_path):
    trainer, _, valid = fitted(small, tmp_path)
    state = torch.load(trainer.saved_model_file, weights_only=True)
    torch.save({**state, "config": trainer.config}, tmp_path / "pickled.pth")
    for load in (trainer.resume_checkpoint, lambda path: trainer.evaluate(valid, model_file=path)):
        with pytest.raises(UnsafeFileError, match="more than weights"):
            load(tmp_path / "pickled.pth")


def test_nothing_is_left_in_the_working_directory(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    fitted(small, tmp_path / "checkpoints")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "checkpoints"}


def test_row_numbers_are_no_feature(small):
    config = small.config()
    train = UIPDataset(config).build()[0]
    assert ROW not in config.model_class(config, train).field_names


def test_distillation_starts_from_a_teachers_checkpoint(small, tmp_path):
    # KD_DAGFM loads its teacher by a bare torch.load: as our checkpoints are plain, torch's safe
    # default reads them, where RecBole's own, with a pickled config, are refused.
    config = small.config("KD_DAGFM")
    dataset = UIPDataset(config)
    arm = config.uip.arms[1]
    train_arm(config, dataset, arm, tmp_path)
    later = small.config(
        "KD_DAGFM", phase="distillation", warm_up=str(tmp_path / "KD_DAGFM-uip.pth")
    )
    outcome, _ = train_arm(later, dataset, arm, tmp_path / "student")
    assert outcome["test"]["auc"] > 0

"""A run with tuned soft tokens: their fields reach the models, and what cannot be served is not."""

import json

import numpy as np
import pytest

from recbole_uip import profiles
from recbole_uip.bridge.config import load_config_files, profile_settings
from recbole_uip.bridge.preparation import create_dataset, data_preparation
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.settings import UIPSettings

from ..lm.conftest import save_lm


@pytest.fixture
def tuned(small, tmp_path):
    save_lm(tmp_path / "lm", max_position_embeddings=256)
    return {
        "uip_facets": {
            "interests": {"weight": "positive", "codes": 3, "rank": 2},
            "leniency": {"source": "constant", "bins": 4},
        },
        "uip_item_text": "{title} ({genre})",
        "uip_lm": str(tmp_path / "lm"),
        "uip_cache": str(tmp_path / "cache"),
        "uip_posterior": "gradient",
        "uip_gradient": {"steps": 2, "rounds": 1, "snapshots": [3], "learning_rate": 0.05},
        "uip_arms": {"plain": {"facets": []}, "uip": None, "means": {"values": "means"}},
    }


def test_a_run(small, tuned, tmp_path):
    external = dict(small.config().variable_config_dict)
    results = run_recbole_uip(
        "FM", "small", config={**external, **tuned, "uip_output": str(tmp_path / "out")}
    )
    arms = results["models"]["FM"]
    assert arms["uip"]["profile_fields"] == ["uip_interests", "uip_leniency"]
    assert any(name.startswith("uip_interests") for name in arms["means"]["profile_fields"])
    assert results["profiles"]["interests"]["posterior"] == "gradient"
    assert results["cost"]["lm_tokens"] > 0
    # neither can be kept fresh without the LM
    assert {"bank", "serving"}.isdisjoint(results["artefacts"])
    assert not (tmp_path / "out" / "bank").exists()
    json.loads((tmp_path / "out" / "results.json").read_text())


def test_saved_splits_hold_tuned_fields(small, tuned, monkeypatch):
    config = small.config(save_dataloaders=True, **tuned)
    dataset = create_dataset(config)
    data_preparation(config, dataset)
    before = {field.name: field.values for field in dataset.profiles.fields}
    path = small.folder / "saved" / "small-for-FM-dataloader.pth"
    monkeypatch.setattr(profiles, "infer", None)  # not needed again
    config = small.config(dataloaders_save_path=str(path), **tuned)
    again = create_dataset(config)
    data_preparation(config, again)
    assert list(again.profiles.tuned) == ["interests"]
    for field in again.profiles.fields:
        np.testing.assert_array_equal(field.values, before[field.name])


def test_another_process_of_accelerate_stops_after_the_profiles(
    small, tuned, tmp_path, monkeypatch
):
    monkeypatch.setattr("recbole_uip.bridge.run.is_main_process", lambda: False)
    external = dict(small.config().variable_config_dict)
    results = run_recbole_uip(
        "FM", "small", config={**external, **tuned, "uip_output": str(tmp_path / "out")}
    )
    assert results == {} and not (tmp_path / "out").exists()


def test_the_papers_own_settings():
    given = load_config_files(["properties/authors.yaml"])
    settings = UIPSettings.from_dict({**given, "uip_item_text": "{title}"})
    assert [facet.codes for facet in settings.tuned_facets] == [4, 3]
    assert settings.gradient.learning_rate == 0.01 and settings.gradient.prior == "none"
    assert settings.likelihood == "sequence" and settings.codebook.method == "vq"
    ours = profile_settings([], ["--uip_item_text={title}"])
    assert ours.gradient == UIPSettings().gradient  # uip.yaml says what the code's defaults are

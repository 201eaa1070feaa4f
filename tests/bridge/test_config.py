import copy
import pickle
import sys

import numpy as np
import pytest
import yaml

from recbole_uip.bridge import UIPConfig
from recbole_uip.bridge.config import context_models, parse_command_line, read_properties
from recbole_uip.settings import SettingsError


def config(model="FM", dataset="ml-100k", files=None, line=(), **settings):
    return UIPConfig(model, dataset, files, {"gpu_id": "", **settings}, command_line=line)


def test_precedence_from_internal_defaults_to_command_line(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("epochs: 2\nstopping_step: 2\nlearner: sgd\nweight_decay: 0.5\n")
    second.write_text("stopping_step: 3\nlearner: adagrad\nweight_decay: 0.25\n")
    result = config(
        files=[str(first), str(second)],
        line=["--weight_decay=0.125"],
        learner="adamw",
        weight_decay=0.75,
    )
    assert result["metric_decimal_place"] == 6  # properties/uip.yaml over RecBole's 4
    assert result["uip_item_text"] == "{movie_title} ({class})"  # dataset yaml over uip.yaml
    assert result["threshold"] == {"rating": 4}  # RecBole's own for ml-100k
    assert result["epochs"] == 2
    assert result["stopping_step"] == 3
    assert result["learner"] == "adamw"
    assert result["weight_decay"] == 0.125


def test_user_settings_override_our_protocol():
    eval_args = {"split": {"LS": "valid_and_test"}, "order": "RO", "mode": "uni5"}
    result = config(eval_args=eval_args)
    assert result["eval_args"]["order"] == "RO"
    assert result["valid_neg_sample_args"] == {"distribution": "uniform", "sample_num": 5}


def test_one_config_file_needs_no_list(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("epochs: 7\n")
    assert config(files=path)["epochs"] == config(files=str(path))["epochs"] == 7


def test_sys_argv_is_not_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--epochs=77", "--uip_nonsense=1"])
    assert config()["epochs"] == 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("no", "no"),
        ("1h", "1h"),
        ("a=b", "a=b"),
        ("['AUC']", ["AUC"]),
        ("[5, inf]", [5, "inf"]),
        ("{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
        ("{'RS':[0.8,0.1,0.1]}", {"RS": [0.8, 0.1, 0.1]}),
        ("__import__('os').getcwd()", "__import__('os').getcwd()"),
    ],
)
def test_command_line_values(text, value):
    assert config(line=[f"--some_key={text}"])["some_key"] == value


@pytest.mark.parametrize("text", ["{title}", "{title} ({genre})", "a {title}"])
def test_templates_stay_text(text):
    assert config(uip_item_text=text).uip.item_text == text
    assert config(line=[f"--uip_item_text={text}"]).uip.item_text == text


def test_durations_and_facets_on_the_command_line():
    line = ["--uip_refresh=1h", "--uip_facets={mood: {source: constant, half_life: [5, inf]}}"]
    settings = config(line=line).uip
    assert settings.refresh == 3600
    assert settings.facets[0].half_life == (5, np.inf)


@pytest.mark.parametrize("line", [["--epochs", "3"], ["epochs=3"], ["--=3"], ["--a=1", "--a=2"]])
def test_malformed_command_line(line):
    with pytest.raises(SettingsError):
        parse_command_line(line)


def test_unknown_uip_key_names_the_nearest():
    with pytest.raises(SettingsError, match="uip_facet'; did you mean 'uip_facets'"):
        config(uip_facet={})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("BPR", "general model"),
        ("SASRec", "sequential model"),
        ("KGAT", "knowledge-aware model"),
        ("xgboost", "decision-tree model"),
        ("DeepFN", "did you mean 'DeepFM'"),
        ("../../etc", "not a model"),
    ],
)
def test_other_models_are_refused(model, words):
    with pytest.raises(SettingsError, match=words) as error:
        config(model=model)
    assert model in str(error.value)
    assert "DeepFM" in str(error.value)


def test_full_sort_evaluation_is_refused():
    eval_args = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "mode": "full"}
    with pytest.raises(SettingsError, match="labeled"):
        config(eval_args=eval_args)
    with pytest.raises(SettingsError, match="uni100"):
        config(eval_args=eval_args, metrics=["Recall"], valid_metric="Recall@10")


def test_metrics_that_cannot_be_had():
    with pytest.raises(SettingsError, match=r"metrics=\['Recall'\] rank candidates"):
        config(metrics=["Recall"], valid_metric="Recall@10")
    with pytest.raises(SettingsError, match="GAUC is reported in any case"):
        config(metrics=["AUC", "GAUC"])


def test_files_that_recbole_passes_over_are_told(tmp_path, caplog):
    config(data_path=str(tmp_path))
    assert "are not read" not in caplog.text
    (tmp_path / "ml-100k").mkdir()
    config(data_path=str(tmp_path))
    assert f"the files in {tmp_path / 'ml-100k'} are not read" in caplog.text


def test_unknown_keys_are_named(caplog):
    config(learning_rte=0.1)
    assert "learning_rte is no setting" in caplog.text
    assert "did you mean 'learning_rate'?" in caplog.text
    caplog.clear()
    config(learning_rate=0.1, mlp_hidden_size=[8], data_path="there")
    assert "is no setting" not in caplog.text


def test_encoding_is_a_setting(small, caplog):
    small.config(encoding="latin-1")
    assert "encoding" not in caplog.text


def test_nothing_leaks_between_configs_of_several_datasets():
    from recbole.utils import dataset_arguments

    before = list(dataset_arguments)
    resolvers = copy.deepcopy(yaml.FullLoader.yaml_implicit_resolvers)
    settings = {"train_neg_sample_args": {"distribution": "uniform"}}
    config(**settings)
    config(dataset="unknown-dataset", load_col=None, uip_item_text="{title}")
    assert dataset_arguments == before
    assert yaml.FullLoader.yaml_implicit_resolvers.keys() == resolvers.keys()
    assert settings == {"train_neg_sample_args": {"distribution": "uniform"}}


def test_numpy_is_not_patched():
    config()
    assert not hasattr(np, "float")
    assert not hasattr(np, "unicode")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(clone):
    original = config("DeepFM")
    new = clone(original)
    assert new.final_config_dict == original.final_config_dict
    assert new.model_class is original.model_class
    new["eval_args"]["order"] = "RO"
    assert original["eval_args"]["order"] == "TO"


def test_properties_are_found_and_valid():
    experiment = "properties/experiment/ml-1m-time.yaml"
    for dataset in ("ml-100k", "ml-1m", "ml-latest-small", "amazon-games"):
        assert read_properties(f"dataset/{dataset}.yaml")
        assert config(dataset=dataset).uip.facets
    # Also where the file is not on disk relative to here, as with an installed wheel.
    result = config(dataset="ml-1m", files=[f"nowhere/{experiment}"])
    assert [arm.name for arm in result.uip.arms] == ["plain", "leniency", "uip", "all"]
    assert read_properties("dataset/no-such-dataset.yaml") is None
    with pytest.raises(SettingsError, match="missing.yaml"):
        config(files=["missing.yaml"])


def test_context_models_are_recboles():
    assert len(context_models()) == 18

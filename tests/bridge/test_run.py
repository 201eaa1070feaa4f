import errno
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import recbole_uip
from recbole_uip import cli
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.store import BankError
from recbole_uip.bridge import run as run_module
from recbole_uip.bridge.report import format_report
from recbole_uip.bridge.run import run_recbole_uip
from recbole_uip.bridge.serving import Scorer
from recbole_uip.files import lock, unlock
from recbole_uip.settings import SettingsError

from .conftest import COMPANY, LENIENCY


@pytest.fixture
def go(small, tmp_path):
    """Run on the small dataset; the keys are the fixture's config's."""

    def go(model="FM", **more):
        external = dict(small.config().variable_config_dict)
        external["uip_output"] = str(tmp_path / "out")
        return run_recbole_uip(model, "small", config={**external, **more})

    return go


def test_results(go, tmp_path):
    results = go(command="ignored")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"dataset", "seed", "models", "cost", "versions", "command"} <= set(results)
    assert results["dataset"] == "small"
    assert results["seed"] == 2020
    arms = results["models"]["FM"]
    assert list(arms) == ["plain", "uip"]
    for name, arm in arms.items():
        assert {"valid", "test", "fields", "config"} <= set(arm)
        for part in ("valid", "test"):
            assert {"auc", "logloss", "gauc", "list_auc"} <= set(arm[part])
        assert arm["config"]["learning_rate"] == arms["plain"]["config"]["learning_rate"]
        assert any(field.startswith("uip_") for field in arm["fields"]) == (name == "uip")
        assert ("user_id" in arm["fields"]) == (name == "plain")
    assert arms["plain"]["config"] == arms["uip"]["config"]
    cost = results["cost"]
    assert cost["field_bytes"] > 0
    assert cost["peak_memory_bytes"] > 1e7
    assert set(cost["train_seconds"]["FM"]) == {"plain", "uip"}
    assert results["protocol"]["rows"] == {"train": 320, "valid": 40, "test": 40}
    assert results["protocol"]["history"] == "observed"
    report = format_report(results)
    for words in (
        "AUC",
        "LogLoss",
        "GAUC",
        "plain",
        "uip_leniency",
        "rating >= 4",
        "RS [0.8",
        "order TO",
        "results.json",
        "profiles.parquet",
        "history observed",
    ):
        assert words in report


def test_profiles_parquet(go, small, tmp_path):
    go()
    table = pd.read_parquet(tmp_path / "out" / "profiles.parquet")
    raw = pd.DataFrame(small.rows, columns=["user", "item", "rating", "time"])
    assert table["user_id"].tolist() == raw["user"].tolist()
    assert table["item_id"].tolist() == raw["item"].tolist()
    assert table["timestamp"].tolist() == raw["time"].tolist()
    assert (table["label"] == (raw["rating"] >= 4)).all()
    assert table["split"].value_counts().to_dict() == {"train": 320, "valid": 40, "test": 40}
    assert table["timestamp"][table["split"] == "train"].max() <= (
        table["timestamp"][table["split"] == "test"].min()
    )
    fields = [name for name in table if name.startswith("uip_")]
    assert len(fields) == 4
    assert all(table[name].between(0, 6).all() for name in fields)


def test_the_bank_knows_every_user_after_the_last_event(go, small, tmp_path):
    go()
    table = pd.read_parquet(tmp_path / "out" / "profiles.parquet")
    users = table["user_id"].unique().tolist()
    with FeatureBank.open(tmp_path / "out" / "bank") as bank:
        assert sorted(bank.users()) == sorted(users)
        assert [bank.state_of(user)[1] for user in users] == (
            table["user_id"].value_counts()[users].tolist()
        )
        fields = {*bank.fields, *bank.match_fields}
        assert fields == {name for name in table if name.startswith("uip_")}


def test_arms_and_runs_are_reproducible(go):
    arms = {
        "plain": {"facets": [], "user_id": "keep"},
        "again": {"facets": [], "user_id": "keep"},
        "leniency": {"facets": ["leniency"], "user_id": "keep"},
    }
    models = go(uip_arms=arms)["models"]["FM"]
    assert models["plain"]["test"] == models["again"]["test"]
    assert models["leniency"]["test"] != models["plain"]["test"]
    assert go(uip_arms=arms)["models"]["FM"]["leniency"]["test"] == models["leniency"]["test"]


def test_training_does_not_dwell_on_subnormal_numbers(go, monkeypatch):
    """What weight decay has made of dead weights: slow on CPUs, and nothing else."""
    original = run_module.make_trainer
    products = []

    def product():
        return float(torch.full((16,), 1e-30).mul(1e-10).sum())

    def make_trainer(*arguments):
        trainer = original(*arguments)
        fit = trainer.fit

        def watched(*arguments, **keywords):
            products.append(product())
            return fit(*arguments, **keywords)

        trainer.fit = watched
        return trainer

    before = product()
    assert before > 0
    monkeypatch.setattr(run_module, "make_trainer", make_trainer)
    go()
    assert products and set(products) == {0.0}
    assert product() == before


def test_arms_meet_the_same_sampled_candidates(go, monkeypatch):
    seen = {}
    original = run_module.train_arm

    def spy(config, dataset, arm, checkpoints):
        outcome, predictions = original(config, dataset, arm, checkpoints)
        seen[arm.name] = predictions
        return outcome, predictions

    monkeypatch.setattr(run_module, "train_arm", spy)
    go(
        threshold=None,
        uip_facets={"company": {**COMPANY, "weight": "all"}},
        train_neg_sample_args={"distribution": "uniform", "sample_num": 1},
        eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"},
        epochs=2,
    )
    for part in ("valid", "test"):
        for column in ("row", "item", "label"):
            one, other = (seen[arm][part][column] for arm in ("plain", "uip"))
            assert np.array_equal(one, other)


def test_several_models_and_datasets(small, tmp_path):
    other = type(small)(small.folder, "other", small.rows[:300], items=small.items).write()
    external = dict(other.config().variable_config_dict)
    external |= {"uip_output": str(tmp_path / "out"), "uip_facets": {"leniency": LENIENCY}}
    results = run_recbole_uip("FM, LR", ["small", "other"], config=external)
    assert list(results) == ["small", "other"]
    assert list(results["other"]["models"]) == ["FM", "LR"]
    for name in results:
        assert (tmp_path / "out" / name / "results.json").is_file()
        assert len(pd.read_parquet(tmp_path / "out" / name / "profiles.parquet")) == (
            400 if name == "small" else 300
        )


def test_ranking_metrics_are_printed_too(go):
    sampled = {
        "threshold": None,
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"},
        "metrics": ["Recall", "NDCG"],
        "topk": [3],
        "valid_metric": "NDCG@3",
        "uip_facets": {"likes": {**COMPANY, "weight": "positive"}},
    }
    results = go(**sampled)
    lines = format_report(results).splitlines()
    header, _, plain, *_ = lines[lines.index("other metrics") + 1 :]
    assert header.split() == ["model", "arm", "recall@3", "ndcg@3"]
    test = results["models"]["FM"]["plain"]["test"]
    assert plain.split() == ["FM", "plain", f"{test['recall@3']:.4f}", f"{test['ndcg@3']:.4f}"]


def test_metrics_of_what_is_recommended(go):
    metrics = ["ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy", "TailPercentage"]
    sampled = {
        "threshold": None,
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"},
        "metrics": metrics,
        "topk": [3],
        "valid_metric": "ItemCoverage@3",
        "uip_facets": {"likes": {**COMPANY, "weight": "positive"}},
    }
    test = go(**sampled)["models"]["FM"]["uip"]["test"]
    assert all(test[f"{metric.lower()}@3"] >= 0 for metric in metrics)
    assert 0 < test["itemcoverage@3"] <= 1


def test_recboles_gauc_has_a_name_of_its_own(go):
    sampled = {
        "threshold": None,
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "mode": "uni5"},
        "uip_facets": {"likes": {**COMPANY, "weight": "positive"}},
    }
    usual = go(**sampled)["models"]["FM"]["plain"]["test"]
    asked = go(**sampled, metrics=["GAUC"], valid_metric="GAUC")["models"]["FM"]["plain"]["test"]
    assert "recbole_gauc" not in usual
    assert asked["gauc"] == usual["gauc"] != asked["recbole_gauc"]


def test_no_test_rows_give_no_figures(go):
    eval_args = {"split": {"LS": "valid_only"}, "order": "TO", "mode": "labeled"}
    results = go(eval_args=eval_args)
    assert results["protocol"]["rows"]["test"] == 0
    assert results["models"]["FM"]["uip"]["test"]["auc"] is None
    assert "-" in format_report(results)


def test_an_interrupt_leaves_no_half_written_file(go, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(run_module.json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock",
        "profiles.parquet",
        "bank",
        "checkpoints",
        "serving",
    }


def test_a_bank_that_is_being_written_to_stops_a_rerun_before_anything_is_lost(go, tmp_path):
    results = go()
    with (
        FeatureBank.open(tmp_path / "out" / "bank", write=True),
        pytest.raises(BankError, match="a bank has one writer"),
    ):
        go()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert list((tmp_path / "out" / "serving").glob("*.json"))


def test_an_interrupted_rerun_leaves_no_results_of_the_run_before(go, tmp_path, monkeypatch):
    go()
    out = tmp_path / "out"
    (out / "checkpoints" / f".FM-plain.pth.{'0' * 32}").write_text("of a killed process")
    assert (out / "serving" / "FM-uip.json").is_file()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train_arm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(seed=7)
    assert not (out / "results.json").exists()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "FM-plain.pth",
        "FM-uip.pth",
    ]
    with pytest.raises(SettingsError, match="cannot be served.*run recbole-uip run first"):
        Scorer.load(out, "FM", "uip")
    monkeypatch.undo()
    go()
    Scorer.load(out, "FM", "uip")


def test_numbers_of_numpy_are_numbers(go, small):
    grid = {"learning_rate": np.float32(0.125), "epochs": np.int64(1), "mlp": [np.float64(0.5)]}
    assert go(**grid)["models"]["FM"]["uip"]["config"]["learning_rate"] == 0.125
    assert small.config(**grid)["mlp"] == [0.5]


def test_a_folder_has_one_run_at_a_time(go, tmp_path):
    (tmp_path / "out").mkdir()
    held = lock(tmp_path / "out" / ".lock")
    with pytest.raises(SettingsError, match=r"uip_output='.*out': this process .* has a run there"):
        go()
    unlock(held)
    go()


def test_names_must_be_names():
    for value in ("", [], "FM,,LR", "FM,FM"):
        with pytest.raises(SettingsError, match="each once"):
            run_recbole_uip(value, "ml-100k")


def test_exported_from_the_package():
    assert recbole_uip.run_recbole_uip is run_recbole_uip
    with pytest.raises(AttributeError, match="nonsense"):
        _ = recbole_uip.nonsense


def arguments(small, tmp_path, *more):
    settings = small.config().variable_config_dict
    keys = ("data_path", "checkpoint_dir", "eval_args", "epochs", "show_progress", "gpu_id")
    line = [f"--{key}={settings[key]}" for key in keys]
    return [
        "--model=FM",
        "--dataset=small",
        *line,
        "--load_col={inter: [user_id, item_id, rating, timestamp]}",
        "--threshold={rating: 4}",
        "--uip_facets={mood: {source: constant, half_life: [5, inf]}}",
        f"--uip_output={tmp_path / 'out'}",
        *more,
    ]


def test_command_line(small, tmp_path, capsys):
    assert cli.main(["run", *arguments(small, tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "uip_mood_5" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["command"].startswith("recbole-uip run --model=FM")
    assert cli.run_main(arguments(small, tmp_path)) == 0


def test_a_model_that_cannot_be_trained_does_not_cost_the_others_results(small, tmp_path, capsys):
    # NFM normalises over batches, of which the last has one row.
    given = arguments(small, tmp_path, "--model=NFM,FM", "--train_batch_size=319")
    assert cli.main(["run", *given]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("recbole-uip: error: not trained: NFM; train_batch_size")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"]) == ["FM"] and list(results["failed"]) == ["NFM"]
    assert "raise it by 1" in results["failed"]["NFM"]
    assert f"{results['models']['FM']['uip']['test']['auc']:.4f}" in out
    served = (tmp_path / "out" / "serving").glob("*.json")
    assert sorted(file.stem for file in served) == ["FM-plain", "FM-uip"]
    given = [each for each in given if not each.startswith("--epochs")]
    given += ["--model=NFM,AFM", "--learning_rate=1e30", "--epochs=5"]
    assert cli.main(["run", *given]) == 2
    assert "loss of AFM is NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "setting, words",
    [
        ("--mlp_hidden_size=[10000000000]", "allocate"),
        ("--learner=sparse_adam", "SparseAdam does not support dense gradients"),
    ],
)
def test_what_torch_refuses_is_a_setting(setting, words, small, tmp_path, capsys):
    assert cli.main(["run", *arguments(small, tmp_path, "--model=DeepFM", setting)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "RecBole cannot use a setting or the data" in error and words in error


def test_a_model_with_a_defect_does_not_cost_the_others_results(go, monkeypatch, caplog):
    train_model = run_module._train_model

    def fail_for_fm(config, *args):
        if config["model"] == "FM":
            raise RuntimeError("a defect")
        return train_model(config, *args)

    monkeypatch.setattr(run_module, "_train_model", fail_for_fm)
    results = go(model=["FM", "LR"])
    assert list(results["models"]) == ["LR"] and results["failed"] == {"FM": "a defect"}
    assert "Traceback" in caplog.text
    with pytest.raises(RuntimeError, match="a defect"):
        go()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--uip_facet=1"], "did you mean 'uip_facets'"),
        (["--uip_refresh=soon"], "uip_refresh='soon'"),
        (["--model=BPR"], "general model"),
        (["--model=deepfm"], "did you mean 'DeepFM'"),
        (["--seed=99999999999"], "seed=99999999999 must be at most 4294967295"),
        (["--uip_output="], "uip_output is an empty text"),
        (["--epochs", "3"], "--key=value"),
        (["--config_files", "missing.yaml"], "missing.yaml"),
        (["--dataset=no-such-data", "--uip_facets={}"], "no-such-data.inter"),
    ],
)
def test_bad_settings_exit_with_2_and_one_line(line, words, capsys):
    assert cli.run_main([*line, "--gpu_id="]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_a_setting_with_spaces_after_config_files(tmp_path, capsys):
    path = tmp_path / "some.yaml"
    path.write_text("uip_facets: {}\n")
    split = "{'split': {'XX': 1}, 'order': 'TO', 'group_by': None, 'mode': 'labeled'}"
    assert cli.run_main(["--config_files", str(path), f"--eval_args={split}", "--gpu_id="]) == 2
    assert "[XX] has not been implemented" in capsys.readouterr().err


def test_a_setting_that_is_an_option_of_another_command(tmp_path, capsys):
    path = tmp_path / "some.yaml"
    path.write_text("uip_facets: {}\n")
    line = ["run", "--config_files", str(path), "--threshold={rating: 4}", "--dataset=no-such-data"]
    assert cli.main([*line, "--gpu_id="]) == 2
    assert "no-such-data" in capsys.readouterr().err


def test_usage_errors_exit_with_2():
    assert cli.main([]) == 2
    assert cli.main(["nonsense"]) == 2
    assert cli.main(["--help"]) == 0


def test_exit_codes_of_interrupts_and_accidents(monkeypatch, capsys):
    def fail_with(error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(run_module, "run_recbole_uip", fail)
        return cli.run_main([])

    assert fail_with(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert fail_with(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert "No space left on device: make room" in capsys.readouterr().err
    assert fail_with(OSError(errno.EBADF, "Bad file descriptor")) == 1
    assert "Traceback" in capsys.readouterr().err
    assert fail_with(RuntimeError("what is this")) == 1
    assert "what is this" in capsys.readouterr().err


def test_config_files_in_any_form(small, tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "of a, and b.yaml"
    first.write_text("epochs: 2\nlearning_rate: 0.5\n")
    second.write_text("learning_rate: 0.25\n")
    line = [each for each in arguments(small, tmp_path) if not each.startswith("--epochs")]
    third = tmp_path / "3.yaml"
    third.write_text(second.read_text())
    spaced = tmp_path / "of a.yaml"
    spaced.write_text(second.read_text())
    forms = [[str(first), str(second)], [f"{first},{spaced}"], [f"{first}, {third}"]]
    for form in (*forms, [f"{first} {third}"]):
        assert cli.run_main([*line, "--config_files", *form]) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        config = results["models"]["FM"]["uip"]["config"]
        assert (config["epochs"], config["learning_rate"]) == (2, 0.25)


BLOCKER = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)


sys.meta_path.insert(0, Blocker())
{code}
"""


def in_subprocess(blocked, code):
    program = BLOCKER.format(blocked=blocked, code=code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_runs_where_ray_is_not_importable(small, tmp_path):
    line = arguments(small, tmp_path)
    code = f"from recbole_uip.cli import run_main\nsys.exit(run_main({line!r}))"
    done = in_subprocess({"ray"}, code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.json").is_file()


def test_the_core_imports_no_recbole():
    code = (
        "import recbole_uip, recbole_uip.settings, recbole_uip.behaviours, recbole_uip.profiles, "
        "recbole_uip.cli"
    )
    done = in_subprocess({"recbole"}, code)
    assert done.returncode == 0, done.stderr

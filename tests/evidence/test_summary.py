import json

import numpy as np
import pytest
import scipy.stats

from recbole_uip.evidence.summary import format_summary, read_results, summarise
from recbole_uip.settings import SettingsError


def result(seed, plain, uip, dataset="toy", order="TO"):
    def arm(auc):
        return {"test": {"auc": auc, "logloss": 1 - auc, "gauc": auc / 2, "list_auc": auc / 3}}

    return {
        "dataset": dataset,
        "seed": seed,
        "protocol": {
            "split": {"RS": [0.8, 0.1, 0.1]},
            "order": order,
            "rows": {"train": 800, "valid": 100, "test": 100},
        },
        "models": {"DeepFM": {"plain": arm(plain), "uip": arm(uip)}},
    }


RESULTS = [result(1, 0.70, 0.76), result(2, 0.72, 0.77), result(3, 0.71, 0.78)]


def test_means_and_paired_intervals():
    plain, uip = summarise(RESULTS)
    assert uip.seeds == (1, 2, 3)
    np.testing.assert_allclose(plain.mean["auc"], 0.71)
    np.testing.assert_allclose(plain.deviation["auc"], 0.01)
    changes = [0.06, 0.05, 0.07]
    low, high = scipy.stats.t.interval(
        0.95, 2, loc=np.mean(changes), scale=scipy.stats.sem(changes)
    )
    mean, half = uip.difference["auc"].mean, uip.difference["auc"].high - uip.difference["auc"].mean
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert plain.difference == {}


def test_unpaired_seeds_are_left_out_of_differences():
    plain_only = result(4, 0.9, 0.0)
    del plain_only["models"]["DeepFM"]["uip"]
    _, uip = summarise([*RESULTS, plain_only])
    np.testing.assert_allclose(uip.difference["auc"].mean, 0.06)


def test_splits_that_share_rows_have_wider_intervals():
    _, fixed = summarise(RESULTS)
    rows = [(1, 0.70, 0.76), (2, 0.72, 0.77), (3, 0.71, 0.78)]
    _, anew = summarise([result(*row, order="RO") for row in rows])
    widths = [each.difference["auc"].high - each.difference["auc"].mean for each in (fixed, anew)]
    # Nadeau and Bengio (2003): 1/n + n_test / n_train in the place of 1/n.
    np.testing.assert_allclose(widths[1] / widths[0], np.sqrt((1 / 3 + 1 / 8) / (1 / 3)))


def test_a_seed_without_auc_is_left_out():
    nothing = result(4, 0.9, 0.9)
    nothing["models"]["DeepFM"]["uip"]["test"]["auc"] = None
    plain, uip = summarise([*RESULTS, nothing])
    np.testing.assert_allclose(uip.mean["auc"], 0.77)
    np.testing.assert_allclose(uip.difference["auc"].mean, 0.06)
    # The ratio is of the same seeds.
    assert "| +8.45% |" in format_summary([plain, uip])


def test_a_metric_that_a_file_does_not_have_is_left_out():
    """List AUC came later than the other metrics."""
    older = [result(1, 0.70, 0.76), result(2, 0.72, 0.77)]
    for each in older:
        for arm in each["models"]["DeepFM"].values():
            del arm["test"]["list_auc"]
    plain, uip = summarise(older)
    assert np.isnan(uip.mean["list_auc"]) and np.isnan(uip.difference["list_auc"].mean)
    np.testing.assert_allclose(uip.difference["auc"].mean, 0.055)
    assert "| nan | +0.0550 ±" in format_summary([plain, uip])
    _, uip = summarise([*older, RESULTS[2]])
    np.testing.assert_allclose(uip.mean["list_auc"], 0.78 / 3)


def test_one_seed_has_no_interval():
    table = format_summary(summarise(RESULTS[:1]))
    row = "| DeepFM | uip | 1 | 0.7600 | 0.2400 | 0.3800 | 0.2533 | +0.0600 | -0.0600 | +8.57% |"
    assert row in table
    assert "±" not in table


def test_table_states_spread():
    assert "0.7700 ± 0.0100" in format_summary(summarise(RESULTS))


def test_a_seed_run_twice_is_refused():
    with pytest.raises(SettingsError, match="DeepFM, arm plain, seed 1 was run twice"):
        summarise([RESULTS[0], RESULTS[0]])


def test_files_are_found_in_folders(tmp_path):
    for each in RESULTS:
        folder = tmp_path / "runs" / str(each["seed"])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(each))
    assert read_results([tmp_path / "runs"]) == RESULTS
    assert read_results([tmp_path / "runs" / "2"]) == RESULTS[1:2]


def test_no_results_is_said(tmp_path):
    with pytest.raises(SettingsError, match="no results.json in"):
        read_results([tmp_path])


def test_datasets_are_not_mixed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(result(1, 0.5, 0.6, name)))
    with pytest.raises(SettingsError, match="different datasets.*a, b"):
        read_results([tmp_path])


def test_a_setting_that_differs_is_kept_apart():
    runs = []
    for decay, plain in ((0.1, 0.7), (0.2, 0.6)):
        each = result(1, plain, 0.8)
        for arm in each["models"]["DeepFM"].values():
            arm["config"] = {"weight_decay": decay}
            arm["valid"] = {"auc": 0.5, "logloss": 0.5, "gauc": 0.5, "list_auc": 0.5}
        runs.append(each)
    cells = summarise(runs, by="weight_decay")
    assert [cell.model for cell in cells[::2]] == [
        "DeepFM, weight_decay=0.1",
        "DeepFM, weight_decay=0.2",
    ]
    np.testing.assert_allclose(cells[3].difference["auc"].mean, 0.2)
    valid = summarise(runs, "valid", "weight_decay")
    assert valid[3].mean["auc"] == 0.5
    with pytest.raises(SettingsError, match="--by=dropout: the runs have no such setting"):
        summarise(runs, by="dropout")
    runs[1]["seed"] = 2
    with pytest.raises(SettingsError, match="runs of DeepFM differ in weight_decay"):
        summarise(runs)

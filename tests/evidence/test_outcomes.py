"""What is read from a store of runs, what is refused, and what is compared with what."""

import json

import numpy as np
import pytest
import sklearn.metrics

from recbole_uip.evidence import statistics
from recbole_uip.evidence.experiments.agreement import seed_agreement
from recbole_uip.evidence.experiments.outcomes import (
    TESTED,
    compare,
    load,
    load_all,
    measure,
    pooled,
    sensitivity,
)
from recbole_uip.settings import SettingsError

from .conftest import complete

PLAIN = {"arm": "plain", "skill": 0.5}
UIP = {"arm": "uip", "skill": 2.0, "facets": ["taste"]}
N_BOOT = 40


def measured_and_compared(folder):
    outcomes = load(folder)
    measured = measure([outcomes], N_BOOT)
    return outcomes, measured, compare(outcomes, measured)


# --- reading ------------------------------------------------------------------------------------


def test_finished_and_missing_runs(laboratory):
    folder = laboratory.experiment("help", [PLAIN, UIP], missing={("uip", 2), ("uip", 5)})
    outcomes = load(folder)
    plain, uip = outcomes.cases
    assert list(plain.runs) == [1, 2, 3, 4, 5] and not plain.missing
    assert list(uip.runs) == [1, 3, 4] and list(uip.missing) == [2, 5]
    assert [(case.arm, seed) for case, seed, _ in outcomes.missing()] == [("uip", 2), ("uip", 5)]
    labels, scores = laboratory.predictions["uip", "{}", 3]
    np.testing.assert_allclose(
        uip.values("auc", [3]), sklearn.metrics.roc_auc_score(labels, scores)
    )


def test_a_record_without_predictions_is_not_finished(laboratory):
    folder = laboratory.experiment("help", [PLAIN], seeds=(1, 2))
    outcomes = load(folder)
    outcomes.cases[0].runs[1].predictions_path.unlink()
    again = load(folder)
    assert list(again.cases[0].missing) == [1]
    # So that the experiment makes it again.
    assert again.cases[0].missing[1] not in laboratory.store


def test_rows_are_put_in_order(laboratory, rng):
    case = complete(PLAIN)
    key = laboratory.run(case, 1)
    ordered = load(one_run(laboratory, "a", case, key)).cases[0].runs[1].test_rows()
    laboratory.run(case, 1, order=rng.permutation(900))
    again = load(laboratory.folder / "a").cases[0].runs[1].test_rows()
    for name, values in ordered.items():
        np.testing.assert_array_equal(values, again[name])


def one_run(laboratory, name, case, key):
    place = {part: case[part] for part in ("dataset", "model", "arm", "variant")}
    return laboratory.plan(name, [{**place, "seeds": {"1": key}}])


def test_folders_of_several_experiments(laboratory):
    laboratory.experiment("second", [PLAIN], seeds=(1,))
    laboratory.experiment("first", [PLAIN], seeds=(1,))
    assert [each.plan["name"] for each in load_all(laboratory.folder)] == ["first", "second"]
    assert [each.plan["name"] for each in load_all(laboratory.folder / "second")] == ["second"]
    with pytest.raises(SettingsError, match=r"there is no experiment\.json in .*runs nor in"):
        load_all(laboratory.folder / "runs")


def test_damaged_files_are_named(laboratory):
    folder = laboratory.experiment("help", [PLAIN], seeds=(1,))
    (record,) = laboratory.store.folder.glob("*.json")
    whole = record.read_text()
    record.write_text(whole[:100])
    with pytest.raises(
        SettingsError, match=rf"{record.name} is damaged .* delete it and run again"
    ):
        load(folder)
    record.write_text("[1]")
    with pytest.raises(SettingsError, match=rf"{record.name} is damaged \(it holds no object\)"):
        load(folder)
    record.write_text(whole)
    plan = folder / "experiment.json"
    for content in ("{", "[]"):
        plan.write_text(content)
        with pytest.raises(SettingsError, match=r"experiment\.json is damaged"):
            load(folder)
    case = {"dataset": "toy", "model": "DeepFM", "arm": "plain"}
    for content in ({}, {"cases": [case]}, {"cases": [{**case, "seeds": {"first": "key"}}]}):
        plan.write_text(json.dumps(content))
        with pytest.raises(SettingsError, match=r"experiment\.json is not the plan of an exp"):
            load(folder)
    plan.unlink()
    with pytest.raises(SettingsError, match=r"there is no .*experiment\.json"):
        load(folder)


@pytest.mark.parametrize("damage", ["cut", "no array", "lengths", "nan", "record"])
def test_predictions_that_cannot_be_used_are_named(laboratory, damage):
    folder = laboratory.experiment("help", [PLAIN], seeds=(1,))
    outcomes = load(folder)
    run = outcomes.cases[0].runs[1]
    arrays = laboratory.store.predictions(run.key)
    if damage == "cut":
        run.predictions_path.write_bytes(run.predictions_path.read_bytes()[:500])
    elif damage == "record":  # predictions of another run
        arrays["test_score"] = arrays["test_score"][::-1]
    elif damage == "no array":
        del arrays["test_history"]
    elif damage == "lengths":
        arrays["test_score"] = arrays["test_score"][:-1]
    else:
        arrays["test_score"][3] = np.nan
    if damage != "cut":
        np.savez(run.predictions_path, **arrays)
    why = {"nan": "a score is NaN", "record": "its AUC is .* but that of the record"}
    with pytest.raises(
        SettingsError,
        match=rf"{run.key}\.npz cannot be used \({why.get(damage, '')}.*\): delete it and run",
    ):
        measure([outcomes], N_BOOT)


# --- measuring ----------------------------------------------------------------------------------


def test_measures_are_those_of_the_predictions(laboratory):
    outcomes = load(laboratory.experiment("help", [UIP], seeds=(1,)))
    (found,) = measure([outcomes], N_BOOT).values()
    rows = outcomes.cases[0].runs[1].test_rows()
    label, score = rows["label"], rows["score"]
    np.testing.assert_allclose(found.auc, sklearn.metrics.roc_auc_score(label, score))
    assert found.n_rows == 900
    new = rows["history"] == 0
    np.testing.assert_allclose(
        found.slices["history length"]["0"]["auc"],
        sklearn.metrics.roc_auc_score(label[new], score[new]),
    )
    expected = {
        "auc": statistics.bootstrap_aucs(rows["user"], label, score, N_BOOT),
        "list_auc": statistics.bootstrap_gaucs(rows["user"], rows["list"], label, score, N_BOOT),
    }
    for name, replicates in expected.items():
        np.testing.assert_allclose(found.replicates[name], replicates)


def test_a_second_report_measures_nothing_again(laboratory, monkeypatch):
    outcomes = load(laboratory.experiment("help", [PLAIN, UIP], seeds=(1, 2)))
    first = measure([outcomes], N_BOOT)
    calls = []
    real = statistics.bootstrap_aucs
    monkeypatch.setattr(
        statistics,
        "bootstrap_aucs",
        lambda *given, **drawn: calls.append(given) or real(*given, **drawn),
    )
    second = measure([outcomes], N_BOOT)
    assert not calls
    for key, found in first.items():
        np.testing.assert_equal(second[key].slices, found.slices)  # a NaN equals itself here
        assert second[key].auc == found.auc
        np.testing.assert_equal(second[key].replicates, found.replicates)
        np.testing.assert_array_equal(found.reliability.share, second[key].reliability.share)
        np.testing.assert_array_equal(found.users, second[key].users)

    # Other resamples, other predictions, or a damaged file: measured again.
    more = next(iter(measure([outcomes], N_BOOT + 1).values()))
    assert len(more.replicates["auc"]) == N_BOOT + 1
    assert len(calls) == 4
    measure([outcomes], N_BOOT)
    del calls[:]
    key = outcomes.cases[1].runs[2].key
    (laboratory.store.folder / f"{key}.measured.npz").write_bytes(b"damaged")
    assert measure([outcomes], N_BOOT)[key].auc == first[key].auc
    assert len(calls) == 1
    laboratory.run(complete(UIP), 2, finished="later")
    arrays = laboratory.store.predictions(key)
    np.savez(outcomes.cases[1].runs[2].predictions_path, **arrays)
    measure([outcomes], N_BOOT)
    assert len(calls) == 2


def test_pooled_reliability(rng):
    label, score = rng.integers(2, size=(2, 60)), rng.random((2, 60))
    curves = [
        statistics.reliability_curve(*each, bins=3) for each in zip(label, score, strict=True)
    ]
    found = pooled(curves)
    np.testing.assert_array_equal(found.rows, 40)
    np.testing.assert_allclose(found.share, (curves[0].share + curves[1].share) / 2)
    np.testing.assert_allclose(found.score, (curves[0].score + curves[1].score) / 2)


# --- comparing ----------------------------------------------------------------------------------


def test_differences_are_paired_by_seed(laboratory):
    folder = laboratory.experiment("help", [PLAIN, UIP], missing={("uip", 2), ("plain", 3)})
    _, _, (found,) = measured_and_compared(folder)
    assert found.seeds == (1, 4, 5) and found.name == "uip − plain"
    changes = [
        sklearn.metrics.roc_auc_score(*laboratory.predictions["uip", "{}", seed])
        - sklearn.metrics.roc_auc_score(*laboratory.predictions["plain", "{}", seed])
        for seed in (1, 4, 5)
    ]
    np.testing.assert_allclose(found.over_seeds["auc"].mean, np.mean(changes))
    over_users = found.over_users["auc"]
    np.testing.assert_allclose(over_users.mean, np.mean(changes), atol=1e-6)
    assert over_users.low < np.mean(changes) < over_users.high
    # One comparison: nothing to adjust.
    assert found.p_seeds["auc"] == found.over_seeds["auc"].p


def test_intervals_over_users_are_those_of_the_bootstrap(laboratory):
    outcomes, _, (found,) = measured_and_compared(laboratory.experiment("help", [PLAIN, UIP]))
    rows = outcomes.cases[0].runs[1].test_rows()
    scores = [
        np.stack([run.test_rows()["score"] for run in case.runs.values()])
        for case in outcomes.cases[::-1]
    ]
    expected = statistics.user_clustered_bootstrap(rows["user"], rows["label"], *scores, N_BOOT)
    over_users = found.over_users["auc"]
    np.testing.assert_allclose(
        [over_users.low, over_users.high, over_users.p], [expected.low, expected.high, expected.p]
    )
    assert over_users.n == expected.n


def test_seeds_on_other_rows_are_left_out_and_named(laboratory):
    folder = laboratory.experiment("help", [PLAIN, UIP])
    laboratory.run(complete(UIP), 4, world=1)
    _, _, (found,) = measured_and_compared(folder)
    assert found.seeds == (1, 2, 3, 5)
    assert found.seeds_with_other_rows == (4,)


def test_a_random_split_is_paired_within_each_seed(laboratory):
    folder = laboratory.experiment("help", [PLAIN, UIP], seeds=(1, 2))
    for case in (PLAIN, UIP):
        laboratory.run(complete(case), 2, world=7)
    _, measured, (found,) = measured_and_compared(folder)
    assert found.seeds == (1, 2)
    assert len({each.rows for each in measured.values()}) == 2


def test_nothing_in_common_is_no_comparison(laboratory):
    folder = laboratory.experiment("help", [PLAIN, UIP], seeds=(1,), missing={("uip", 1)})
    assert measured_and_compared(folder)[2] == []
    folder = laboratory.experiment("rows", [PLAIN, {**UIP, "arm": "other"}], seeds=(1,))
    laboratory.run(complete({**UIP, "arm": "other"}), 1, world=1)
    _, _, (found,) = measured_and_compared(folder)
    assert found.seeds == () and found.seeds_with_other_rows == (1,)
    assert np.isnan(found.over_users["auc"].mean) and found.verdict("auc") == "untested"


def test_verdicts_need_both_kinds_of_chance_ruled_out(laboratory):
    arms = [
        PLAIN,
        UIP,
        {"arm": "worse", "skill": 0.1},
        {"arm": "same", "skill": 0.5},
    ]
    _, _, found = measured_and_compared(laboratory.experiment("help", arms))
    for metric in TESTED:
        assert {each.name: each.verdict(metric) for each in found} == {
            "uip − plain": "higher",
            "worse − plain": "lower",
            "same − plain": "not told apart",
        }
        np.testing.assert_allclose(
            [each.p_seeds[metric] for each in found],
            statistics.holm([each.over_seeds[metric].p for each in found]),
        )
        np.testing.assert_allclose(
            [each.p_users[metric] for each in found],
            statistics.holm([each.over_users[metric].p for each in found]),
        )
    higher = found[0]
    higher.p_users["auc"] = 0.2
    assert higher.verdict("auc") == "not told apart" and higher.verdict("list_auc") == "higher"


def test_one_seed_is_untested(laboratory):
    _, _, (found,) = measured_and_compared(laboratory.experiment("help", [PLAIN, UIP], seeds=(1,)))
    assert found.verdict("auc") == "untested" and not np.isnan(found.p_users["auc"])


def test_an_arm_of_other_models_is_met_with_each_of_them(laboratory):
    cases = [
        PLAIN,
        UIP,
        {"arm": "history", "model": "DIN", "skill": 1.0},
        {"arm": "history", "model": "DIEN", "skill": 1.0},
    ]
    folder = laboratory.experiment("peers", cases, seeds=(1, 2), compare=[["uip", "history"]])
    _, _, found = measured_and_compared(folder)
    assert [(each.case.model, each.name) for each in found] == [
        ("DeepFM", "uip − plain"),
        ("DIN", "history − plain (DeepFM)"),
        ("DIEN", "history − plain (DeepFM)"),
        ("DeepFM", "uip − history (DIN)"),
        ("DeepFM", "uip − history (DIEN)"),
    ]


def test_variants_meet_their_own_baseline_or_the_nearest(laboratory):
    week = {"uip_refresh": "1w"}
    cases = [
        {**PLAIN, "variant": {}},
        {**UIP, "variant": week},
        {**PLAIN, "variant": week},
        {**UIP, "variant": {**week, "uip_facets": {"taste": {"bins": [8, 9]}}}},
        {**UIP, "variant": {"uip_facets": {"taste": {"rank": 4}}}},
    ]
    _, _, found = measured_and_compared(laboratory.experiment("stale", cases, seeds=(1, 2)))
    assert [(each.case.variant_name, each.against.variant_name, each.name) for each in found] == [
        ("uip_refresh=1w", "uip_refresh=1w", "uip − plain"),
        (
            "uip_refresh=1w, uip_facets.taste.bins=[8, 9]",
            "uip_refresh=1w",
            "uip − plain (no uip_facets.taste.bins)",
        ),
        ("uip_facets.taste.rank=4", "", "uip − plain (no uip_facets.taste.rank)"),
    ]


def test_main_cases_are_those_without_a_variant_if_there_are_any(laboratory):
    cases = [
        {**UIP, "variant": {"uip_refresh": "1h"}},
        {**UIP, "variant": {}},
        {**PLAIN, "model": "DCN", "variant": {"uip_refresh": "0s"}},
        {**PLAIN, "model": "DCN", "variant": {"uip_refresh": "1d"}},
    ]
    outcomes = load(laboratory.experiment("stale", cases, seeds=(1,)))
    assert [(case.model, case.variant_name) for case in outcomes.main_cases()] == [
        ("DeepFM", ""),
        ("DCN", "uip_refresh=0s"),
    ]


# --- settings -----------------------------------------------------------------------------------


def test_series_are_in_the_order_of_their_values(laboratory):
    values = ["1d", "0s", "1w", "2h"]
    cases = [{**UIP, "variant": {"uip_refresh": value}} for value in values]
    cases += [{**UIP, "variant": {"uip_facets.*.codes": codes}} for codes in (128, 8, 32)]
    cases += [{**UIP, "variant": {"uip_codebook": {"method": name}}} for name in ("vq", "em")]
    found = sensitivity(load(laboratory.experiment("all", cases, seeds=(1,))))
    assert {key: [each.values for each in series] for key, series in found.items()} == {
        "uip_refresh": [("0s", "2h", "1d", "1w")],
        "uip_facets.*.codes": [(8, 32, 128)],
        "uip_codebook.method": [("vq", "em")],
    }
    (series,) = found["uip_facets.*.codes"]
    assert [case.variant["uip_facets.*.codes"] for case in series.cases] == [8, 32, 128]


def test_the_configured_value_is_a_point_too(laboratory):
    config = {"uip_facets": {"taste": {"match": {"bins": 32}}}}
    key = "uip_facets.taste.match.bins"
    cases = [{**UIP, "config": config}]
    cases += [{**UIP, "config": config, "variant": {key: bins}} for bins in (32, 8, None)]
    found = sensitivity(load(laboratory.experiment("bins", cases, seeds=(1,))))
    ((series,),) = found.values()
    assert series.values == (8, 32, None)
    assert series.cases[1].variant == {}


def test_series_hold_all_else_fixed(laboratory):
    cases = [
        {**arm, "variant": {"uip_refresh": refresh, "uip_folds": folds}}
        for arm in (PLAIN, UIP)
        for refresh in ("0s", "1h")
        for folds in (2, 4)
    ]
    found = sensitivity(load(laboratory.experiment("grid", cases, seeds=(1,))))
    assert [(each.arm, each.rest, each.values) for each in found["uip_refresh"]] == [
        ("plain", "uip_folds=2", ("0s", "1h")),
        ("plain", "uip_folds=4", ("0s", "1h")),
        ("uip", "uip_folds=2", ("0s", "1h")),
        ("uip", "uip_folds=4", ("0s", "1h")),
    ]


def test_unfinished_cases_are_no_points(laboratory):
    cases = [{**UIP, "variant": {"uip_refresh": value}} for value in ("0s", "1h", "1d")]
    folder = laboratory.experiment("stale", cases, seeds=(1,))
    run = load(folder).cases[1].runs[1]
    (run.store.folder / f"{run.key}.json").unlink()
    ((series,),) = sensitivity(load(folder)).values()
    assert series.values == ("0s", "1d")


def test_tuning_is_read_from_the_plan(laboratory):
    grid = []
    for rate in (0.1, 0.2):
        case = complete({**PLAIN, "point": rate})
        key = laboratory.run(case, 1) if rate == 0.1 else "not-there"
        grid.append({"settings": {"learning_rate": rate}, "key": key})
    case = {"dataset": "toy", "model": "DeepFM", "arm": "plain", "variant": {}}
    tuning = [{**case, "grid": grid, "chosen": {"learning_rate": 0.1}}]
    outcomes = load(
        laboratory.plan("tuned", [{**case, "seeds": {"1": grid[0]["key"]}}], tuning=tuning)
    )
    (tuned,) = outcomes.tuned
    assert tuned.chosen == {"learning_rate": 0.1}
    assert [run is not None for _, run in tuned.points] == [True, False]


# --- agreement of seeds -------------------------------------------------------------------------


def test_agreement_is_the_adjusted_rand_index_of_rows_with_codes(laboratory):
    outcomes = load(laboratory.experiment("help", [UIP], seeds=(1, 2, 3)))
    (case,) = outcomes.cases
    (found,) = seed_agreement(case)
    tokens = [run.test_tokens()["uip_taste"] for run in case.runs.values()]
    coded = tokens[0] > 0
    assert found.field == "uip_taste" and not coded.all()
    np.testing.assert_allclose(
        found.indices,
        [
            sklearn.metrics.adjusted_rand_score(tokens[a][coded], tokens[b][coded])
            for a, b in ((0, 1), (0, 2), (1, 2))
        ],
    )
    assert (found.indices > 0.3).all()


def test_seeds_on_other_rows_cannot_agree(laboratory):
    folder = laboratory.experiment("help", [UIP, PLAIN], seeds=(1, 2))
    laboratory.run(complete(UIP), 2, world=1)
    uip, plain = load(folder).cases
    assert seed_agreement(uip) == [] and seed_agreement(plain) == []


def test_a_run_that_cases_share_counts_once(laboratory):
    folder = laboratory.experiment("help", [PLAIN, UIP], seeds=(1, 2), missing={("uip", 2)})
    plan = json.loads((folder / "experiment.json").read_text())
    plan["cases"].append({**plan["cases"][0], "variant": {"uip_refresh": "1h"}})
    plan["cases"].append({**plan["cases"][1], "variant": {"uip_refresh": "1h"}})
    (folder / "experiment.json").write_text(json.dumps(plan))
    assert load(folder).counted() == (3, 4)

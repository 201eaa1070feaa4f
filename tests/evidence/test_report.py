"""The report of a made-up store: what stands in it, and that it needs nothing but itself."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from recbole_uip.cli import main
from recbole_uip.evidence import statistics
from recbole_uip.evidence.experiments.outcomes import compare, load, measure
from recbole_uip.evidence.report.assemble import write_report
from recbole_uip.evidence.report.comparison import verdicts
from recbole_uip.evidence.report.format import (
    difference,
    joined,
    mean_and_deviation,
    number,
    p_value,
    share,
)
from recbole_uip.evidence.report.markdown import to_markdown
from recbole_uip.evidence.report.parts import Section, Table, Text
from recbole_uip.settings import SettingsError

from .conftest import Laboratory, complete

PLAIN = {"arm": "plain", "skill": 0.5}
UIP = {"arm": "uip", "skill": 2.0, "facets": ["taste"], "cost": {"bytes_per_user": 668}}
SAME = {"arm": "same", "skill": 0.5}
N_BOOT = 50


class Page(HTMLParser):
    """What a test asks of a page: its links, its ids, its tables, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loads, self.scripts = [], [], [], []
        self.tables, self.headings, self.policy = {}, [], None
        self._path, self._caption, self._row = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        elif given.get("src") or given.get("href") or tag in ("link", "iframe", "object", "embed"):
            self.loads.append((tag, given))
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "tr":
            self._row = []
        if tag in ("th", "td"):
            self._row.append("")
        if tag == "caption":
            self._caption = ""
        self._path.append(tag)

    def handle_endtag(self, tag):
        while self._path and self._path.pop() != tag:
            pass
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append(self._row)

    def handle_data(self, data):
        if not self._path:
            return
        if self._path[-1] == "script":
            self.scripts.append(data)
        elif "caption" in self._path:
            self._caption += data
        elif self._path[-1] in ("th", "td"):
            self._row[-1] += data
        elif {"h1", "h2", "h3"} & set(self._path):
            self.headings.append(data)

    def table(self, words):
        """Rows of the one table whose caption has these words, as dicts by column."""
        (found,) = [rows for caption, rows in self.tables.items() if words in caption]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def tuned(laboratory):
    grid = []
    for rate, skill in ((0.1, 0.5), (0.2, 1.5)):
        case = complete({"arm": "uip", "skill": skill, "variant": {}, "point": rate})
        grid.append({"settings": {"learning_rate": rate}, "key": laboratory.run(case, 1)})
    case = {"dataset": "toy", "model": "DeepFM", "arm": "uip", "variant": {}}
    return [{**case, "grid": grid, "chosen": {"learning_rate": 0.2}}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def whole(shared):
    """An experiment that has all that a report can show, and lacks two runs."""
    cases = [PLAIN, UIP, SAME]
    cases += [
        {**arm, "variant": {"uip_refresh": lag}, "skill": skill}
        for lag, skill in (("1d", 0.7), ("1h", 1.0))
        for arm in (PLAIN, UIP)
    ]
    cases += [
        {**UIP, "variant": {"uip_facets.*.codes": codes}, "cost": {"bytes_per_user": 8 * codes}}
        for codes in (128, 8)
    ]
    for case in cases:
        case.setdefault("config", {"uip_refresh": "0s"})
    return shared.experiment(
        "whole",
        cases,
        seeds=(1, 2, 3),
        missing={("same", 2), ("same", 3)},
        compare=[["uip", "same"]],
        tuning=tuned(shared),
    )


@pytest.fixture(scope="module")
def pages(whole):
    html, markdown = write_report(whole, resamples=N_BOOT, command="recbole-uip report here")
    assert html == whole / "report.html" and markdown == whole / "report.md"
    return Page(html.read_text()), markdown.read_text()


def test_the_page_needs_nothing_but_itself(pages):
    page, _ = pages
    assert page.loads == []
    assert page.policy.startswith("default-src 'none'")
    assert sum("plotly.js v" in script[:300] for script in page.scripts) == 1
    text = "".join(script for script in page.scripts if "plotly.js v" not in script[:300])
    assert "http" not in text
    assert len([script for script in page.scripts if "Plotly.newPlot" in script[:2000]]) >= 8


def test_every_link_leads_somewhere(pages):
    page, _ = pages
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_sections_stand_where_their_data_are(pages):
    page, markdown = pages
    expected = [
        "The whole experiment", "Protocol", "What is missing", "Results", "Differences",
        "Staleness", "Sensitivity", "uip_facets.*.codes", "AUC against bytes per user", "Tuning",
        "Slices", "Calibration", "Codebooks", "Costs", "Environment and commands",
        "How to read this",
    ]  # fmt: skip
    assert page.headings == ["Contents", *expected]
    headings = [line.lstrip("# ").replace("\\", "") for line in re.findall("^#.*$", markdown, re.M)]
    assert headings == expected


def test_sections_without_data_are_left_out(laboratory):
    folder = laboratory.experiment("small", [PLAIN], seeds=(1,))
    html, markdown = write_report(folder, resamples=N_BOOT)
    text = markdown.read_text()
    for title in ("Staleness", "Sensitivity", "Tuning", "Slices", "Codebooks"):
        assert f"# {title}" not in text
    assert "There is one arm, and no other to compare it with." in text
    assert "Nothing: all runs of the plan are finished (1)." in text
    assert Page(html.read_text()).loads == []


def test_results_are_means_and_deviations_over_seeds(pages, shared):
    page, markdown = pages
    aucs = [
        sklearn.metrics.roc_auc_score(*shared.predictions["uip", "{}", seed]) for seed in (1, 2, 3)
    ]
    shown = f"{np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}"
    rows = [row for row in page.table("Test split") if row["arm"] == "uip"]
    assert rows[0]["AUC"] == shown and rows[0]["settings"] == "" and rows[0]["seeds"] == "3"
    assert f"| uip |  | 3 | {shown} |" in markdown


def test_differences_are_those_of_paired_seeds_and_users(pages, shared, whole):
    page, _ = pages
    changes = [
        sklearn.metrics.roc_auc_score(*shared.predictions["uip", "{}", seed])
        - sklearn.metrics.roc_auc_score(*shared.predictions["plain", "{}", seed])
        for seed in (1, 2, 3)
    ]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(changes), scipy.stats.sem(changes))
    rows = page.table("AUC differences on the same rows")
    (row,) = [row for row in rows if row["comparison"] == "uip − plain" and row["settings"] == ""]
    assert row["ΔAUC"] == number(np.mean(changes), sign=True)
    assert row["95% over seeds"] == f"[{number(low, sign=True)}, {number(high, sign=True)}]"

    outcomes = load(whole)
    plain, uip = outcomes.cases[:2]
    arrays = plain.runs[1].test_rows()
    scores = [
        np.stack([run.test_rows()["score"] for run in case.runs.values()]) for case in (uip, plain)
    ]
    users = statistics.user_clustered_bootstrap(arrays["user"], arrays["label"], *scores, N_BOOT)
    assert row["95% over users"] == difference(users).split(" ", 1)[1]
    base = np.mean([run.metric("auc") for run in plain.runs.values()])
    ours = np.mean([run.metric("auc") for run in uip.runs.values()])
    assert row["rel. AUC"] == f"+{100 * (ours / base - 1):.2f}%"
    assert row["RelaImpr"] == f"+{100 * ((ours - 0.5) / (base - 0.5) - 1):.2f}%"
    compared = compare(outcomes, measure([outcomes], N_BOOT))
    assert [row["verdict"] for row in rows] == [each.verdict("auc") for each in compared]
    rows = page.table("List AUC")
    assert [row["verdict"] for row in rows] == [each.verdict("list_auc") for each in compared]
    assert [row["Δlist AUC"] for row in rows] == [
        number(each.over_users["list_auc"].mean, sign=True) for each in compared
    ]


def test_null_results_stay_in_the_tables(laboratory):
    folder = laboratory.experiment("null", [PLAIN, SAME], seeds=(1, 2, 3))
    html, markdown = write_report(folder, resamples=N_BOOT)
    (row,) = Page(html.read_text()).table("AUC differences on the same rows")
    assert row["verdict"] == "not told apart" and row["comparison"] == "same − plain"
    assert "AUC differences: 1 not told apart, of 1." in markdown.read_text()


def test_unfinished_runs_are_named(pages):
    page, markdown = pages
    assert page.table("Unfinished runs") == [{"arm": "same", "seeds not finished": "2, 3"}]
    assert "2 of 27 runs are not finished." in markdown
    assert "25 of 27 runs are finished." in markdown
    (row,) = [
        row for row in page.table("AUC differences on") if row["comparison"] == "same − plain"
    ]
    assert row["verdict"] == "untested" and row["p, seeds"] == "–"


def test_nothing_finished_is_said(laboratory):
    folder = laboratory.experiment(
        "start", [PLAIN], seeds=(1, 2), missing={("plain", 1), ("plain", 2)}
    )
    html, markdown = write_report(folder, resamples=N_BOOT)
    assert "No run is finished yet." in markdown.read_text()
    assert Page(html.read_text()).table("Unfinished")[0]["seeds not finished"] == "1, 2"


def test_protocol_in_words(pages):
    _, markdown = pages
    assert (
        "toy: 7,200 train, 900 valid, 900 test rows; split 0.8:0.1:0.1 in order of time" in markdown
    )
    assert "liked is rating ≥ 4 (55.0% of rows)" in markdown
    assert (
        "row by row; history at evaluation: all strictly earlier events; refreshed at once"
        in markdown
    )
    assert "Seeds: 1, 2, 3." in markdown


def test_staleness_and_sensitivity_tables(pages, shared):
    page, _ = pages
    rows = [row for row in page.table("By uip_refresh") if row["arm"] == "uip"]
    assert [row["uip_refresh"] for row in rows] == ["0s", "1h", "1d"]
    aucs = [
        [
            sklearn.metrics.roc_auc_score(*shared.predictions["uip", variant, seed])
            for seed in (1, 2, 3)
        ]
        for variant in ("{}", "{'uip_refresh': '1d'}")
    ]
    expected = statistics.paired_difference(aucs[1], aucs[0])
    assert rows[2]["ΔAUC from the first value"] == difference(expected)
    codes = page.table("By uip_facets.*.codes")
    assert [(row["uip_facets.*.codes"], row["bytes per user"]) for row in codes] == [
        ("8", "64"),
        ("128", "1,024"),
    ]


def test_tuning_names_what_was_chosen_on_validation_data(pages, whole):
    page, _ = pages
    points = page.table("Every point of the grid")
    assert [(row["learning_rate"], row["choice"]) for row in points] == [
        ("0.1", ""),
        ("0.2", "chosen"),
    ]
    (tuned,) = load(whole).tuned
    assert [row["validation AUC"] for row in points] == [
        f"{run.record['valid']['auc']:.4f}" for _, run in tuned.points
    ]
    (best,) = page.table("What was chosen")
    assert best["best validation AUC"] == points[1]["validation AUC"]


def test_slices_are_differences_from_the_baseline(pages, whole):
    page, _ = pages
    rows = page.table("AUC by history length")
    assert [row["arm"] for row in rows] == ["plain (itself)", "uip − plain", "same − plain"]
    (column,) = [name for name in rows[0] if name.startswith("20+")]
    plain, uip = load(whole).cases[:2]
    aucs = []
    for case in (uip, plain):
        for run in case.runs.values():
            arrays = run.test_rows()
            known = arrays["history"] >= 20
            aucs.append(
                sklearn.metrics.roc_auc_score(arrays["label"][known], arrays["score"][known])
            )
    assert column == f"20+ ({known.sum()} rows)"
    assert rows[1][column] == difference(statistics.paired_difference(aucs[:3], aucs[3:]))


def test_calibration_codebooks_and_costs(pages, whole):
    page, _ = pages
    plain = load(whole).cases[0]
    errors, predictions = [], []
    for run in plain.runs.values():
        arrays = run.test_rows()
        predictions.append(float(arrays["score"].astype(float).mean()))
        curve = statistics.reliability_curve(arrays["label"], arrays["score"])
        errors.append(curve.error)
    calibration = page.table("Expected calibration error")[0]
    assert calibration["ECE"] == mean_and_deviation(errors)
    assert calibration["mean prediction"] == mean_and_deviation(predictions)
    assert calibration["share of likes"].startswith(f"{arrays['label'].mean():.4f}")
    (codebook,) = [row for row in page.table("Codebooks: mean") if row["arms"].startswith("uip")]
    assert codebook["field"] == "uip_taste" and codebook["perplexity"] == "1.9 ± 0.0"
    assert codebook["converged"] == "3 of 3" and codebook["largest fall"] == "none"
    assert page.table("Agreement of seeds")[0]["pairs of seeds"] == "3"
    costs = {row["arm"]: row for row in page.table("wall-clock")}
    assert costs["uip"]["bytes per user"] == "668" and costs["plain"]["bytes per user"] == "–"
    assert costs["uip"]["scoring, ms per 1000 rows"] == "1.00 ± 0.00"
    assert costs["uip"]["training s"] == "12.0 ± 1.0"


def test_a_falling_bound_is_shown(laboratory):
    folder = laboratory.experiment("fall", [UIP], seeds=(1,))
    run = load(folder).cases[0].runs[1]
    record = run.record
    record["profiles"]["taste"]["uip_taste"][0]["lower_bounds"] = [-3.0, -1.0, -1.25]
    laboratory.store.write(run.key, record, laboratory.store.predictions(run.key))
    html, _ = write_report(folder, resamples=N_BOOT)
    (row,) = Page(html.read_text()).table("Codebooks: mean")
    assert row["largest fall"] == "0.25000"


def test_commands_and_versions(pages):
    page, markdown = pages
    assert "recbole-uip experiment whole" in markdown and "recbole-uip report here" in markdown
    assert {"package": "recbole", "version": "1.2.1"} in page.table("Versions")


def test_a_folder_of_several_experiments(laboratory):
    laboratory.experiment("first", [PLAIN, UIP], seeds=(1, 2))
    laboratory.experiment("second", [PLAIN, SAME], seeds=(1,), title="<b>Second</b> & last")
    html, markdown = write_report(
        laboratory.folder, laboratory.folder / "all.html", resamples=N_BOOT
    )
    assert (html.name, markdown.name) == ("all.html", "all.md")
    page = Page(html.read_text())
    overview = page.table("The experiments.")
    assert [row["experiment"] for row in overview] == [
        "The first experiment",
        "<b>Second</b> & last",
    ]
    assert [row["runs finished"] for row in overview] == ["4 of 4", "2 of 2"]
    assert "2 experiments of recbole-uip" in page.headings
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "<b>Second" not in html.read_text()


# --- words and command line ---------------------------------------------------------------------


def test_numbers_in_words():
    assert number(-0.00123, sign=True) == "−0.0012" and number(float("nan")) == "–"
    assert share(0.0512) == "+5.12%" and share(0.5, 1, sign=False) == "50.0%"
    assert p_value(0.00004) == "< 0.001" and p_value(0.0123) == "0.012"
    assert mean_and_deviation([0.5]) == "0.5000" and mean_and_deviation([]) == "–"
    assert mean_and_deviation([0.4, 0.6, float("nan")]) == "0.5000 ± 0.1414"
    assert joined(["a", "b", "a", ""]) == "a, b" and joined("abcdef", 2) == "a, b and 4 more"


def test_markdown_shows_signs_as_they_are():
    table = Table("A_b", ["x|y", "n"], [["a*b", "1"], ["c", "−2"]])
    text = to_markdown("T", [Text("[0, 1] < 2")], [Section("S", [table])])
    assert text.splitlines() == [
        "# T", "", r"\[0, 1\] \< 2", "", "## S", "", r"A\_b", "", r"| x\|y | n |", "| :-- | --: |",
        r"| a\*b | 1 |", "| c | −2 |",
    ]  # fmt: skip


def test_columns_that_say_the_same_are_dropped():
    table = Table("", ["model", "arm", "settings"], [["A", "x", ""], ["A", "y", ""]], heads=3)
    found = table.without("model", "settings", "arm")
    assert list(found.columns) == ["arm"] and found.rows == [["x"], ["y"]] and found.heads == 1
    assert found.caption.strip() == "All rows: model A."


def test_command(laboratory, capsys):
    folder = laboratory.experiment("help", [PLAIN, UIP], seeds=(1, 2))
    assert main(["report", str(folder), "--resamples=20"]) == 0
    printed = capsys.readouterr().out
    assert f"report: {folder / 'report.html'}" in printed and "report.md" in printed
    assert f"recbole-uip report {folder} --resamples=20" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{}", "--output=report.pdf"], r"--output=report.pdf must end in .html"),
        (["{}", "--resamples=1"], r"--resamples=1 must be at least 2"),
        (["{}", "--epochs=3"], r"argument '--epochs=3' is not understood"),
        (["{}/none"], r"there is no experiment.json in .*none nor in a folder in it"),
    ],
)
def test_usage_errors(laboratory, capsys, arguments, words):
    folder = laboratory.experiment("help", [PLAIN], seeds=(1,))
    assert main(["report", *(each.format(folder) for each in arguments)]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and re.search(words, errors)
    assert not (folder / "report.html").exists()


def test_a_damaged_run_leaves_no_half_a_report(laboratory):
    folder = laboratory.experiment("help", [PLAIN], seeds=(1,))
    load(folder).cases[0].runs[1].predictions_path.write_bytes(b"damaged")
    with pytest.raises(SettingsError, match="cannot be used"):
        write_report(folder, resamples=N_BOOT)
    assert [path.name for path in folder.iterdir()] == ["experiment.json"]


def test_arms_share_a_codebook_where_their_seeds_have_the_same_fit(laboratory):
    """Also where the first seed of one is not finished; other fits keep a row of their own."""
    more = {**UIP, "arm": "more"}
    folder = laboratory.experiment("help", [UIP, more], seeds=(1, 2), missing={("more", 1)})
    other = laboratory.run(complete({**UIP, "arm": "other"}), 1)
    record = laboratory.store.read(other)
    record["profiles"]["taste"]["uip_taste"][0]["perplexity"] = 1.2
    laboratory.store.write(other, record, laboratory.store.predictions(other))
    plan = json.loads((folder / "experiment.json").read_text())
    plan["cases"].append({**plan["cases"][0], "arm": "other", "seeds": {"1": other}})
    (folder / "experiment.json").write_text(json.dumps(plan))
    html, _ = write_report(folder, resamples=N_BOOT)
    rows = Page(html.read_text()).table("Codebooks: mean")
    assert [(row["arms"], row["seeds"]) for row in rows] == [("uip, more", "2"), ("other", "1")]


def test_an_arm_is_what_its_run_says_under_whatever_name(laboratory):
    """Runs are shared between experiments, whose arms may have other names."""
    section = {"uip_arms": {"elsewhere": {"facets": ["taste"], "control": "shuffled"}}}
    cases = [PLAIN, {**UIP, "config": section}]
    html, _ = write_report(laboratory.experiment("names", cases, seeds=(1,)), resamples=N_BOOT)
    page = Page(html.read_text())
    found = {row["arm"]: row for row in page.table("What each arm reads")}
    assert (found["uip"]["facets"], found["uip"]["control"]) == ("taste", "shuffled")


def test_the_same_runs_under_two_settings_are_one_comparison(laboratory):
    """And a comparison that is planned counts before it is finished."""
    cases = [PLAIN, UIP, SAME]
    folder = laboratory.experiment("twice", cases, seeds=(1, 2, 3), missing={("same", 2)})
    plan = json.loads((folder / "experiment.json").read_text())
    again = [
        {**case, "variant": {key: value}}
        for case in plan["cases"]
        for key, value in (("codes", 8), ("rank", 4))
    ]
    plan["cases"] = [*again, *plan["cases"]]
    (folder / "experiment.json").write_text(json.dumps(plan))
    outcomes = load(folder)
    comparisons = compare(outcomes, measure([outcomes], N_BOOT))
    assert len(comparisons) == 6 and {each.n_tests for each in comparisons} == {2}
    assert verdicts(comparisons).endswith("of 2.")
    uip = [each for each in comparisons if each.case.arm == "uip"]
    p = uip[0].over_users["auc"].p
    assert {each.p_users["auc"] for each in uip} == {min(1.0, 2 * p)}


def test_runs_of_two_lms_are_said(laboratory):
    folder = laboratory.experiment("lms", [PLAIN, UIP], seeds=(1, 2))
    plan = json.loads((folder / "experiment.json").read_text())
    for nth, key in enumerate(plan["cases"][1]["seeds"].values()):
        record = {**laboratory.store.read(key), "lm_fingerprint": f"weights-{nth}"}
        laboratory.store.write(key, record, laboratory.store.predictions(key))
    _, markdown = write_report(folder, resamples=N_BOOT)
    assert "Not all runs had the same weights" in markdown.read_text()


def test_arms_are_said_as_their_settings_mean_them(laboratory):
    """Without the key facets an arm has all of them, and a control of none is no control."""
    arms = {"all": {"control": "none"}, "apart": {"facets": ["taste"], "control": "shuffled"}}
    cases = [{**UIP, "arm": name, "config": {"uip_arms": {name: arms[name]}}} for name in arms]
    html, _ = write_report(laboratory.experiment("arms", cases, seeds=(1,)), resamples=N_BOOT)
    page = Page(html.read_text())
    rows = page.table("What each arm reads")
    assert [(row["arm"], row["facets"]) for row in rows] == [("all", "all"), ("apart", "taste")]
    (codebook,) = page.table("Codebooks: mean")
    assert codebook["arms"] == "all, apart"

"""The report of one experiment or of several: an HTML file and a Markdown file."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from recbole_uip.evidence import statistics
from recbole_uip.evidence.experiments.measured import Measured
from recbole_uip.evidence.experiments.outcomes import (
    Comparison,
    Outcomes,
    compare,
    load_all,
    measure,
)
from recbole_uip.evidence.report.about import costs, environment, missing, protocol
from recbole_uip.evidence.report.codebooks import codebooks
from recbole_uip.evidence.report.comparison import (
    calibration,
    differences,
    results,
    slices,
    verdicts,
)
from recbole_uip.evidence.report.html import to_html
from recbole_uip.evidence.report.markdown import to_markdown
from recbole_uip.evidence.report.parts import Block, Code, Items, Section, Table, Text
from recbole_uip.evidence.report.settings import sensitivities, staleness, tuning
from recbole_uip.files import atomic_write
from recbole_uip.settings import SettingsError

__all__ = ["write_report"]

NAME = "report.html"


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    resamples: int = statistics.N_BOOT,
    command: str | None = None,
) -> tuple[Path, Path]:
    """Write the report of an experiment, or of all in a folder.

    Parameters
    ----------
    folder : path-like
        An experiment's folder, or one of several such.
    output : path-like, optional
        The HTML file; by default ``report.html`` in ``folder``. The Markdown file stands beside
        it, under the same name.
    resamples : int
        Of users, for each interval over users.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    html, markdown : Path

    Raises
    ------
    SettingsError
        If there is no experiment, or one of its files is damaged.
    """
    if resamples < 2:
        raise SettingsError(f"--resamples={resamples} must be at least 2")
    page = Path(folder, NAME) if output is None else Path(output)
    if page.suffix != ".html":
        raise SettingsError(f"--output={page} must end in .html; the Markdown file goes beside it")
    experiments = load_all(folder)
    measured = measure(experiments, resamples)
    compared = [compare(each, measured) for each in experiments]
    sections = [
        _experiment(each, comparisons, measured)
        for each, comparisons in zip(experiments, compared, strict=True)
    ]
    if len(experiments) == 1:
        title = experiments[0].title
        lead, sections = sections[0].blocks, sections[0].sections
    else:
        title = f"{len(experiments)} experiments of recbole-uip"
        lead = [_overview(experiments, compared)]
    sections = [*sections, _how_to_read(resamples, command)]
    paths = page, page.with_suffix(".md")
    for path, write in zip(paths, (to_html, to_markdown), strict=True):
        with atomic_write(path, "w") as file:
            file.write(write(title, lead, sections))
    return paths


def _experiment(
    outcomes: Outcomes, comparisons: Sequence[Comparison], measured: dict[str, Measured]
) -> Section:
    lead: list[Block] = []
    if question := outcomes.plan.get("question"):
        lead.append(Text(f"Question: {question}"))
    lead.append(Text(f"{_finished(outcomes)} runs are finished. {verdicts(comparisons)}".strip()))
    section = Section(outcomes.title, lead)
    sections = [protocol(outcomes), missing(outcomes)]
    if any(case.runs for case in outcomes.cases):
        sections += [results(outcomes), differences(outcomes, comparisons)]
    sections += [
        staleness(outcomes, measured),
        sensitivities(outcomes, measured),
        tuning(outcomes),
        slices(outcomes, comparisons, measured),
        calibration(outcomes, measured),
        codebooks(outcomes),
        costs(outcomes, measured),
        environment(outcomes),
    ]
    section.sections = [each for each in sections if each is not None]
    return section


def _finished(outcomes: Outcomes) -> str:
    finished, planned = outcomes.counted()
    return f"{finished} of {planned}"


def _overview(experiments: Sequence[Outcomes], compared: Sequence[Sequence[Comparison]]) -> Table:
    rows = []
    for each, comparisons in zip(experiments, compared, strict=True):
        rows.append(
            [
                each.title,
                _finished(each),
                verdicts(comparisons),
                str(each.plan.get("question") or ""),
            ]
        )
    return Table(
        "The experiments. What is higher or lower is the first arm of each comparison.",
        ["experiment", "runs finished", "outcome", "question"],
        rows,
    )


def _how_to_read(resamples: int, command: str | None) -> Section:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    blocks: list[Block] = [
        Items(
            [
                "AUC: over all test rows. LogLoss: mean negative log-likelihood in nats. GAUC: "
                "mean over users of the AUC among a user's own rows, weighted by rows. List AUC: "
                "the same among a user's rows of one time, which one profile serves.",
                "Interval over seeds: paired t-interval of the differences, seed by seed. It tells "
                "what another training would give on these rows; where every seed splits the rows "
                "anew, on another such split (with Nadeau and Bengio's correction, for splits "
                "share rows).",
                f"Interval over users: users are drawn with replacement {resamples:,} times, with "
                "all their rows; the AUC difference is the mean over seeds within each draw; "
                "2.5% and 97.5% quantiles. It tells what other users would give. Its p-value "
                "takes the draws' standard deviation as the standard error of a normal statistic.",
                "Holm: p-values are adjusted for the number of comparisons that the experiment's "
                "file asks, run or not, seeds and users apart. Higher or lower is said only where "
                "both are below .05.",
                "Not told apart does not mean equal: the interval says what is still possible.",
                "Intervals of slices, settings and other metrics are not adjusted.",
            ]
        ),
        Text(f"Written at {now}" + (" by:" if command else ".")),
    ]
    if command:
        blocks.append(Code([command]))
    return Section("How to read this", blocks)

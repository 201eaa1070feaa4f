"""A report as one HTML file that needs nothing else: no network, no file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from plotly.offline import get_plotlyjs

from recbole_uip.evidence.report.parts import (
    Block,
    Chart,
    Code,
    Items,
    Section,
    Table,
    Text,
    set_anchors,
)

__all__ = ["to_html"]

# Longer words than this in a cell are broken over lines.
WRAP = 48  # characters

_STYLE = """
:root { --ink: #1a1a1a; --quiet: #595959; --rule: #d4d4d4; --shade: #f5f6f7; --link: #0b57a4; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
a { color: var(--link); }
.page { display: grid; grid-template-columns: 13rem minmax(0, 1fr); }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto;
  padding: 1.5rem 1rem; border-right: 1px solid var(--rule); font-size: 13px; }
nav h2 { font-size: 13px; margin: 0 0 .5rem; padding: 0; border: 0; }
nav ul { list-style: none; margin: 0; padding: 0 0 0 .75rem; }
nav > ul { padding: 0; }
nav li { margin: .25rem 0; overflow-wrap: anywhere; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
main { padding: 1.5rem 1.5rem 4rem; min-width: 0; max-width: 80rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
main h2 { font-size: 1.4rem; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h2, h3, h4 { scroll-margin-top: .5rem; }
h2 a, h3 a, h4 a { color: inherit; text-decoration: none; }
h2 a:hover, h3 a:hover, h4 a:hover { text-decoration: underline; }
p, ul { max-width: 48rem; }
pre { background: var(--shade); border: 1px solid var(--rule); padding: .6rem .8rem;
  overflow-x: auto; font-size: 13px; }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
/* A caption may be wider than its table, and stays in place when the table scrolls. */
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem; contain: inline-size; }
caption span { display: block; position: sticky; left: 0; width: min(48rem, 88vw); }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); background: var(--shade); vertical-align: bottom;
  white-space: normal; min-width: 4.5rem; }
th { font-weight: 600; }
tbody th { font-weight: 400; }
th.name, td.name { text-align: left; }
th.words, td.words { text-align: left; white-space: normal; min-width: 16rem; }
tbody tr:hover { background: #eef4fb; }
figure { margin: 1rem 0 1.5rem; }
figcaption { color: var(--quiet); font-size: 13px; max-width: 48rem; }
details summary { cursor: pointer; color: var(--link); font-size: 13px; }
@media (max-width: 60rem) {
  .page { display: block; } nav { position: static; max-height: none; border: 0; }
  main { padding: 1rem; } }
@media print { nav { display: none; } .page { display: block; } .scroll { overflow: visible; } }
"""
# The browser itself holds the file to what it says: nothing is loaded from anywhere.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def to_html(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """The whole report.

    Parameters
    ----------
    title : str
    lead : sequence of Block
        What stands above the first section.
    sections : sequence of Section
    """
    set_anchors(sections)
    counter = _Counter()
    body = [f"<h1>{escape(title)}</h1>", *(_block(block, counter) for block in lead)]
    body += [_section(section, 2, counter) for section in sections]
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script>" if counter.charts else "",
        "</head>",
        '<body><div class="page">',
        f'<nav aria-label="Contents"><h2>Contents</h2>{_contents(sections)}</nav>',
        "<main>",
        *body,
        "</main></div></body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


class _Counter:
    """Numbers for the ids of tables and charts."""

    def __init__(self) -> None:
        self.tables = self.charts = 0


def _contents(sections: Sequence[Section]) -> str:
    items = [
        f'<li><a href="#{section.anchor}">{escape(section.title)}</a>'
        f"{_contents(section.sections) if section.sections else ''}</li>"
        for section in sections
    ]
    return f"<ul>{''.join(items)}</ul>"


def _section(section: Section, level: int, counter: _Counter) -> str:
    tag, anchor = f"h{min(level, 6)}", section.anchor
    parts = [
        f'<section aria-labelledby="{anchor}">',
        f'<{tag} id="{anchor}"><a href="#{anchor}">{escape(section.title)}</a></{tag}>',
        *(_block(block, counter) for block in section.blocks),
        *(_section(each, level + 1, counter) for each in section.sections),
        "</section>",
    ]
    return "\n".join(parts)


def _block(block: Block, counter: _Counter) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{escape(chr(10).join(block.lines))}</code></pre>"
    if isinstance(block, Table):
        return _table(block, counter)
    return _chart(block, counter)


def _table(table: Table, counter: _Counter) -> str:
    counter.tables += 1
    name = f"table-{counter.tables}"
    kinds = [_class(index, table) for index in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{kinds[index]}>{escape(column)}</th>'
        for index, column in enumerate(table.columns)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{kinds[index]}>{escape(cell)}</th>'
            if index < table.heads
            else f"<td{kinds[index]}>{escape(cell)}</td>"
            for index, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    shown = (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">'
        f'<table><caption id="{name}"><span>{escape(table.caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{escape(table.caption)}</summary>{shown}</details>"
    return shown


def _class(index: int, table: Table) -> str:
    if not table.is_text(index):
        return ""
    longest = max((len(row[index]) for row in table.rows), default=0)
    return ' class="words"' if longest > WRAP else ' class="name"'


def _chart(chart: Chart, counter: _Counter) -> str:
    counter.charts += 1
    drawn = chart.figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{counter.charts}",
        config={
            "displaylogo": False,
            "responsive": True,
            "modeBarButtonsToRemove": ["select2d", "lasso2d"],
        },
    )
    return (
        f'<figure><div role="img" aria-label="{escape(chart.description)}">{drawn}</div>'
        f"<figcaption>{escape(chart.description)}</figcaption></figure>"
    )

"""A report as Markdown: its texts and tables; charts are left to the HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recbole_uip.evidence.report.parts import Block, Chart, Code, Items, Section, Table, Text

__all__ = ["to_markdown"]


def to_markdown(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """The whole report.

    Parameters
    ----------
    title : str
    lead : sequence of Block
        What stands above the first section.
    sections : sequence of Section
    """
    parts = [f"# {_escaped(title)}", *_blocks(lead)]
    for section in sections:
        parts += _section(section, 2)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int) -> list[str]:
    parts = [f"{'#' * level} {_escaped(section.title)}", *_blocks(section.blocks)]
    for each in section.sections:
        parts += _section(each, level + 1)
    return parts


def _blocks(blocks: Sequence[Block]) -> list[str]:
    return [_block(block) for block in blocks if not isinstance(block, Chart)]


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_escaped(item)}" for item in block.items)
    if isinstance(block, Code):
        return "\n".join(["```sh", *block.lines, "```"])
    if isinstance(block, Table):
        rules = [":--" if block.is_text(column) else "--:" for column in range(len(block.columns))]
        lines = [_row(block.columns), f"| {' | '.join(rules)} |", *map(_row, block.rows)]
        return "\n".join([_escaped(block.caption), "", *lines])
    raise TypeError(f"{type(block).__name__} is not a block of text")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)

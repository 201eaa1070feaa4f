"""What a report is made of, whatever it is written in: sections, texts, tables and charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go

__all__ = ["Block", "Chart", "Code", "Items", "Section", "Table", "Text", "set_anchors"]

# Cells that need no word where all say the same.
_UNSAID = {"", "–", "none"}
# What a number's cell begins with; an empty cell says nothing about its column.
_NUMBER = re.compile(r"$|[–+−<\[]|\d")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of short statements."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to copy as they are, such as commands."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells in words.

    Attributes
    ----------
    caption : str
        What the table shows, and how its numbers are meant.
    columns : sequence of str
    rows : sequence of sequence of str
        As many cells as columns each.
    heads : int
        Leading columns that name the row.
    folded : bool
        Whether a reader has to open it first, where the format can do that.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heads: int = 1
    folded: bool = False

    def without(self, *columns: str) -> Table:
        """The table without those of ``columns`` that say the same in every row.

        What they say stands in the caption.
        """
        kept = [
            index
            for index, name in enumerate(self.columns)
            if name not in columns or len({row[index] for row in self.rows}) > 1
        ]
        same = [
            f"{self.columns[index]} {self.rows[0][index]}"
            for index in sorted({*range(len(self.columns))} - {*kept})
            if self.rows and self.rows[0][index] not in _UNSAID
        ]
        return Table(
            f"{self.caption} All rows: {', '.join(same)}." if same else self.caption,
            [self.columns[index] for index in kept],
            [[row[index] for index in kept] for row in self.rows],
            max(1, sum(index < self.heads for index in kept)),
            self.folded,
        )

    def is_text(self, column: int) -> bool:
        """Whether a column holds words rather than numbers."""
        cells = [row[column] for row in self.rows]
        return column < self.heads or not all(_NUMBER.match(cell) for cell in cells)


@dataclass(frozen=True)
class Chart:
    """A figure whose numbers stand in a table beside it.

    Attributes
    ----------
    figure : Figure
    description : str
        What is seen, for those who cannot see it; its caption too.
    """

    figure: go.Figure = field(repr=False)
    description: str


Block = Text | Items | Code | Table | Chart


@dataclass
class Section:
    """A heading, and what stands below it.

    Attributes
    ----------
    title : str
    blocks : list of Block
    sections : list of Section
    anchor : str
        Where a link leads; set by :func:`set_anchors`.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    anchor: str = ""


def set_anchors(sections: Sequence[Section]) -> None:
    """Give every section an anchor of its own, by its title and those above it."""
    taken: set[str] = set()

    def walk(sections: Sequence[Section], stem: str) -> None:
        for section in sections:
            name = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
            anchor, number = f"{stem}{name}", 2
            while anchor in taken:
                anchor, number = f"{stem}{name}-{number}", number + 1
            taken.add(anchor)
            section.anchor = anchor
            walk(section.sections, f"{anchor}--")

    walk(sections, "")

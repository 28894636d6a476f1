"""Text tables and their rendering as Markdown that is also readable as plain text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Text cells with a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1  # left-aligned, the others are numbers

    def markdown(self) -> str:
        """The cells as Markdown, without the title."""
        return markdown_table(self.header, self.rows, num_text_columns=self.num_text_columns)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int
) -> str:
    """Columns padded to their widest cell: text left-aligned, numbers right-aligned."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    # Markdown needs a dash and a colon to know a column of numbers.
    widths = [max(2, *(len(cell) for cell in column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if i < num_text_columns else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])

"""Options and results of a benchmark case: measures with targets, details, a plot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from brainray.config import Config
from brainray.report.table import markdown_table


@dataclass(frozen=True)
class CaseOptions:
    """Command line options; a case uses those that it needs."""

    quick: bool  # smaller sizes
    source: Path | None  # folder of real slices; phantoms or random rows if None
    seed: int  # of everything random; for labels only of their draw
    storage: Path  # where runs of the case are kept
    config: Config  # from --config and --set, for the cases in READS_CONFIG
    save: Callable[["BenchmarkResult"], None] = lambda result: None  # what is known so far


@dataclass(frozen=True)
class Measure:
    """A measured value, with its target if it has one."""

    name: str
    value: float
    unit: str = ""  # "x" for a ratio against a peer, "img/s", "s", ...
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The bound as text; empty if there is none."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, or empty if there is no target."""
        if self.at_least is not None:
            return "met" if self.value >= self.at_least else "missed"
        if self.at_most is not None:
            return "met" if self.value <= self.at_most else "missed"
        return ""


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of a case."""

    measures: Sequence[Measure]
    details: dict[str, Any] = field(default_factory=dict)  # plain JSON: curves, settings, counts
    figure: Figure | None = None
    report: str | None = None  # Markdown, in addition to the measures


def measures_table(measures: Sequence[Measure]) -> str:
    """The measures as a Markdown table that is also readable as plain text."""
    header = ["measure", "unit", "target", "verdict", "value"]
    rows = [
        [item.name, item.unit, item.target, item.verdict, f"{item.value:.4g}"] for item in measures
    ]
    return markdown_table(header, rows, num_text_columns=4)

"""The leakage report as Markdown that is also readable as plain text."""

from collections.abc import Mapping
from typing import Any

from brainray.report.table import markdown_table
from brainray.schema import SUBSETS

LEVEL_COLUMNS = ["level", "test slices with a match in training", "within training", "within test"]


def leakage_table(leakage: Mapping[str, Any]) -> str:
    """Counts of duplicates by level and split, and sizes of the clean and strict test subsets."""
    twins = markdown_table(LEVEL_COLUMNS, leakage_counts(leakage), num_text_columns=1)
    header, rows = subset_counts(leakage)
    subsets = markdown_table(header, rows, num_text_columns=1)
    conflicts = (
        "Slices whose copies, in any orientation, have another label: "
        f"{len(leakage['label_conflicts']):,}."
    )
    return "\n\n".join([twins, subsets, conflicts])


def leakage_counts(leakage: Mapping[str, Any]) -> list[list[str]]:
    """Rows with the columns `LEVEL_COLUMNS`."""
    parts = [leakage[part] for part in ("across_splits", "within_train", "within_test")]
    return [
        [level, *(f"{len(part[level]):,}" if level in part else "" for part in parts)]
        for level in leakage["levels"]
    ]


def subset_counts(leakage: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of test slices by subset and class."""
    by_class = leakage["num_test_by_class"]
    header = ["test slices", *(name or "unlabelled" for name in by_class["all"]), "total"]
    rows = [
        [
            subset,
            *(f"{by_class[subset].get(name, 0):,}" for name in by_class["all"]),
            f"{leakage['num_test'][subset]:,}",
        ]
        for subset in SUBSETS
        if subset in by_class  # strict is left out if subjects are unknown
    ]
    return header, rows

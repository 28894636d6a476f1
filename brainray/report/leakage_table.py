"""The leakage report as tables, and as Markdown that is also readable as plain text."""

from collections.abc import Mapping
from typing import Any

from brainray.report.table import Table
from brainray.schema import SUBSETS

_LEVEL_COLUMNS = ["level", "test slices with a match in training", "within training", "within test"]


def leakage_markdown(leakage: Mapping[str, Any]) -> str:
    """`leakage_tables` and the number of label conflicts."""
    conflicts = (
        "Slices whose copies, in any orientation, have another label: "
        f"{len(leakage['label_conflicts']):,}."
    )
    return "\n\n".join([*(table.markdown() for table in leakage_tables(leakage)), conflicts])


def leakage_tables(leakage: Mapping[str, Any]) -> list[Table]:
    """Duplicates by level and split, and test slices by subset and class."""
    parts = [leakage[part] for part in ("across_splits", "within_train", "within_test")]
    duplicates = [
        [level, *(f"{len(part[level]):,}" if level in part else "" for part in parts)]
        for level in leakage["levels"]
    ]
    by_class = leakage["num_test_by_class"]
    classes = list(by_class["all"])
    subsets = [
        [
            subset,
            *(f"{by_class[subset].get(name, 0):,}" for name in classes),
            f"{leakage['num_test'][subset]:,}",
        ]
        for subset in SUBSETS
        if subset in by_class  # strict is left out if subjects are unknown
    ]
    subset_columns = ["test slices", *(name or "unlabelled" for name in classes), "total"]
    return [
        Table("Duplicates", _LEVEL_COLUMNS, duplicates),
        Table("Test slices", subset_columns, subsets),
    ]

"""The leakage report as Markdown that also reads well as plain text."""

from collections.abc import Mapping
from typing import Any

from brainray.report.table import markdown_table

_SUBSETS = ("all", "clean", "strict")


def leakage_table(leakage: Mapping[str, Any]) -> str:
    """How many slices have a twin where, and how much of the test split is clean and strict."""
    across, train, test = (
        {level: len(found) for level, found in leakage[part].items()}
        for part in ("across_splits", "within_train", "within_test")
    )
    rows = [
        [
            level,
            *(f"{counts[level]:,}" if level in counts else "" for counts in (across, train, test)),
        ]
        for level in leakage["levels"]
    ]
    twins = markdown_table(
        ["level", "test slices with one in training", "within training", "within test"],
        rows,
        num_text_columns=1,
    )
    by_class = leakage["num_test_by_class"]
    subsets = markdown_table(
        ["test slices", *(name or "unlabelled" for name in by_class["all"]), "together"],
        [
            [
                subset,
                *(f"{by_class[subset].get(name, 0):,}" for name in by_class["all"]),
                f"{leakage['num_test'][subset]:,}",
            ]
            for subset in _SUBSETS
        ],
        num_text_columns=1,
    )
    conflicts = f"Slices whose copies carry another label: {len(leakage['label_conflicts']):,}."
    return "\n\n".join([twins, subsets, conflicts])

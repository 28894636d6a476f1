"""The leakage report in words."""

from typing import Any

from brainray.report.leakage_table import leakage_markdown

LEAKAGE: dict[str, Any] = {
    "levels": {"exact": "", "near": "", "subject": ""},
    "num_test": {"all": 5, "clean": 3, "strict": 2},
    "num_test_by_class": {"all": {"a": 4, "b": 1}, "clean": {"a": 3}, "strict": {"a": 2}},
    "across_splits": {"exact": [{}], "near": [{}], "subject": [{}]},
    "within_train": {"exact": [{}, {}], "near": []},
    "within_test": {"exact": [], "near": [{}]},
    "label_conflicts": [{}, {}],
}


def rows_of(text: str) -> dict[str, list[str]]:
    return {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
        for cells in [line.split("|")]
    }


def test_levels_subsets_and_conflicts_are_counted() -> None:
    text = leakage_markdown(LEAKAGE)
    rows = rows_of(text)
    assert rows["exact"] == ["1", "2", "0"]
    assert rows["near"] == ["1", "0", "1"]
    assert rows["subject"] == ["1", "", ""]
    assert rows["all"] == ["4", "1", "5"]
    assert rows["strict"] == ["2", "0", "2"]
    assert text.endswith("have another label: 2.")


def test_an_unknown_subset_has_no_row() -> None:
    by_class = {name: LEAKAGE["num_test_by_class"][name] for name in ("all", "clean")}
    rows = rows_of(leakage_markdown(LEAKAGE | {"num_test_by_class": by_class}))
    assert "clean" in rows
    assert "strict" not in rows


def test_test_slices_without_a_label_are_a_column() -> None:
    by_class = {"all": {"a": 4, "": 1}}
    text = leakage_markdown(LEAKAGE | {"num_test_by_class": by_class})
    assert rows_of(text)["test slices"] == ["a", "unlabelled", "total"]

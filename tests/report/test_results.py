"""The tables must show what was measured, and nothing where nothing was."""

import pytest

from brainray.report.results import results_markdown, results_tables

CLASSES = ["glioma", "notumor"]

METRICS = {
    "test/all/num_slices": 1311.0,
    "test/clean/num_slices": 4.0,
    "test/strict/num_slices": 3.0,
    "test/strict/head/accuracy": 0.6,
    "test/all/head/accuracy": 0.93512,
    "test/all/head/accuracy_low": 0.92,
    "test/all/head/accuracy_high": 0.9494,
    "test/all/head/balanced_accuracy": 0.9,
    "test/all/head/f1_macro": 0.8,
    "test/clean/head/accuracy": 0.75,
    "test/clean/cluster/f1_macro": 0.625,
    "test/all/thumbnail_1nn/accuracy": 0.962,
    "test/all/thumbnail_1nn/f1_macro": 0.875,
    "test/all/thumbnail_1nn/recall/notumor": 0.625,
    "test/all_as_clean/head/accuracy": 0.7,
    "test/all/head/support/glioma": 150.0,
    "test/all/head/precision/glioma": 0.1,
    "test/all/head/recall/glioma": 0.2,
    "test/all/head/f1/glioma": 0.3,
    "test/all/cluster/f1/glioma": 0.4,
    "test/clean/cluster/recall/notumor": 0.5,
    "test/all/cluster/silhouette": 0.51249,
    "test/clean/cluster/nmi": -0.0101,
}


def _cells(text: str) -> dict[str, list[str]]:
    """Cells of each row of Markdown by its first cell."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def test_figures_are_found_in_their_cells() -> None:
    text = results_markdown(METRICS, CLASSES)
    rows = _cells(text)
    assert text.startswith(
        "Accuracy on test slices [95 % interval, resampled by copies and known or likely subjects;"
    )
    assert "all (1,311) |" in text
    assert rows["head"] == ["0.935 [0.920, 0.949]", "0.750", "0.600", "0.700"]
    assert rows["head, balanced accuracy"] == ["0.900", "–", "–", "–"]
    assert rows["head, macro F1"] == ["0.800", "–", "–", "–"]
    assert rows["clusters, macro F1"] == ["–", "0.625", "–", "–"]
    assert rows["nearest thumbnail"] == ["0.962", "–", "–", "–"]
    assert rows["nearest thumbnail, macro F1"] == ["0.875", "–", "–", "–"]
    assert rows["nearest thumbnail, all"] == ["– / – / –", "– / 0.625 / –"]
    assert rows["slices, all"] == ["150", "0"]
    assert rows["head, all"] == ["0.100 / 0.200 / 0.300", "– / – / –"]
    assert rows["clusters, all"] == ["– / – / 0.400", "– / – / –"]
    assert rows["clusters, clean"] == ["– / – / –", "– / 0.500 / –"]
    assert rows["all"] == ["0.512", "–", "–", "–"]
    assert rows["clean"] == ["–", "-0.010", "–", "–"]


def test_another_run_stands_beside_it_by_its_name() -> None:
    control = {"test/all/head/accuracy": 0.5, "test/all/cluster/silhouette": 0.25}
    control |= {"test/all/head/f1_macro": 0.375, "test/all/head/recall/glioma": 0.125}
    accuracies, by_class, clusters = results_tables(METRICS, CLASSES, {"control (c)": control})
    rows = {row[0]: row[1:] for row in (*accuracies.rows, *clusters.rows)}
    assert rows["head, control (c), macro F1"][0] == "0.375"
    assert {row[0]: row[1] for row in by_class.rows}["head, control (c), all"] == "– / 0.125 / –"
    assert rows["head"][0] == "0.935 [0.920, 0.949]"
    assert rows["head, control (c)"][0] == "0.500"
    assert rows["all, control (c)"][0] == "0.250"


def test_the_baseline_of_another_run_is_shown_if_it_differs() -> None:
    for value, shown in ((0.962, False), (0.5, True)):
        control = {"test/all/thumbnail_1nn/accuracy": value, "test/all/head/accuracy": 0.93512}
        control |= {f"test/all/head/accuracy_{side}": value for side in ("low", "high")}
        accuracies, by_class, _ = results_tables(METRICS, CLASSES, {"control (c)": control})
        rows = {row[0] for row in accuracies.rows}
        assert ("nearest thumbnail, control (c)" in rows) == shown
        assert {"head, control (c)", "clusters, control (c)"} <= rows
        named = {row[0] for row in by_class.rows}
        assert ("nearest thumbnail, control (c), clean" in named) == shown
        assert "nearest thumbnail, clean" in named


@pytest.mark.parametrize("num_clean", [2, 1200])
def test_other_slices_of_another_run_are_reported(num_clean: int) -> None:
    sizes = {"test/all/num_slices": 1311.0, "test/clean/num_slices": float(num_clean)}
    accuracies, *_ = results_tables(METRICS, CLASSES, {"control (c)": sizes})
    assert f"head, control (c) (clean: {num_clean:,} slices)" in {row[0] for row in accuracies.rows}


def test_the_effective_rank_stands_beside_the_silhouettes() -> None:
    rank = "cluster/effective_rank"
    *_, clusters = results_tables(METRICS | {rank: 9.44}, CLASSES, {"control (c)": {rank: 8.0}})
    ranks = "effective rank of the fitted embeddings: 9.4; 8.0, control (c)"
    assert clusters.title == f"Clusters ({ranks})"
    assert results_tables(METRICS, CLASSES)[-1].title == "Clusters"


def test_without_metrics_every_cell_is_a_dash() -> None:
    for table in results_tables({"test/all/head/accuracy": float("nan")}, CLASSES):
        assert {cell for row in table.rows for cell in row[1:]} <= {"–", "– / – / –"}
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_rows_are_as_wide_as_their_header_whatever_the_class_is_called() -> None:
    blocks = results_markdown({}, ["a|b", "notumor"]).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1

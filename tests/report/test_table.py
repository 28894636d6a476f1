"""The table must show what was measured, and nothing where nothing was."""

from brainray.report.table import results_table

CLASSES = ["glioma", "notumor"]


def _rows(text: str) -> dict[str, list[str]]:
    """Cells of each table row after its first cell; of the class table, after its second."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith(("| prediction", "|--", "| ---")):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows["/".join(cells[:2])] = cells[2:]
    return rows


def test_figures_are_found_in_their_cells() -> None:
    metrics = {
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
    text = results_table(metrics, CLASSES)
    rows = _rows(text)
    assert text.startswith("Test slices: 1,311 all, 4 clean, 3 strict. In brackets: 95 % intervals")
    assert rows["head/all"] == ["0.935 [0.920, 0.949]", "0.900", "0.800"]
    assert rows["head/clean"] == ["0.750", "–", "–"]
    assert rows["head/strict"] == ["0.600", "–", "–"]
    assert rows["head/all at clean's class mix"] == ["0.700", "–", "–"]
    assert rows["cluster/clean"] == ["–", "–", "0.625"]
    assert rows["thumbnail_1nn/all"] == ["0.962", "–", "–"]
    assert rows["all/glioma"] == ["150", "0.100", "0.200", "0.300", "–", "–", "0.400"]
    assert rows["clean/notumor"] == ["–", "–", "–", "–", "–", "0.500", "–"]
    assert text.endswith(
        "Clusters, all: silhouette 0.512, NMI –, ARI –, FMI –; "
        "clean: silhouette –, NMI -0.010, ARI –, FMI –; "
        "strict: silhouette –, NMI –, ARI –, FMI –."
    )


def test_without_metrics_every_cell_is_a_dash() -> None:
    text = results_table({"test/all/head/accuracy": float("nan")}, CLASSES)
    rows = _rows(text)
    del rows["test slices/class"]
    subsets = ("all", "clean", "strict")
    assert set(rows) == {
        *(
            f"{predictor}/{subset}"
            for predictor in ("head", "cluster", "thumbnail_1nn")
            for subset in (*subsets, "all at clean's class mix")
        ),
        *(f"{subset}/{name}" for subset in subsets for name in CLASSES),
    }
    assert {cell for cells in rows.values() for cell in cells} == {"–"}


def test_rows_are_as_wide_as_their_header_whatever_the_class_is_called() -> None:
    lines = results_table({}, ["a|b", "notumor"]).splitlines()
    tables = [[line for line in block if line.startswith("|")] for block in _blocks(lines)]
    tables = [table for table in tables if table]
    assert len(tables) == 2
    for table in tables:
        assert len({len(line) for line in table}) == 1
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def _blocks(lines: list[str]) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line:
            blocks[-1].append(line)
        else:
            blocks.append([])
    return blocks

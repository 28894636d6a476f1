"""A study's tables by hand: means and deviations over seeds, dashes where there is no figure."""

import csv
import io

import pytest

from brainray.report.study_tables import (
    average_over_seeds,
    csv_text,
    datasets_rows,
    datasets_table,
    features_table,
    methods_table,
)
from brainray.report.table import markdown_table

BY = ("dataset", "features", "clusterer", "pca_dim")


def row(dataset: str, seed: int, **figures: float | str | None) -> dict:
    method = {"features": "pixels", "clusterer": "kmeans", "pca_dim": 8}
    return {"dataset": dataset, "seed": seed, "problem": None, **method, **figures}


ROWS = [
    row("one", 0, nmi=0.2, silhouette=0.5, num_clusters=4.0, noise_share=0.0),
    row("one", 1, nmi=0.4, num_clusters=4.0, noise_share=0.0),
    row("one", 2, problem="no luck"),
    row("two", 0, nmi=0.6, num_clusters=3.0, noise_share=0.25),
]


def test_means_and_sample_deviations_over_the_seeds_that_have_the_figure() -> None:
    one, two = average_over_seeds(ROWS, BY)
    assert abs(one["nmi_mean"] - 0.3) < 1e-12
    assert abs(one["nmi_std"] - 0.02**0.5) < 1e-12
    assert one["silhouette_mean"] == 0.5
    assert "silhouette_std" not in one  # one seed has no deviation
    assert (one["num_seeds"], one["silhouette_seeds"]) == (2, 1)
    assert "nmi_seeds" not in one
    assert "ari_mean" not in one
    assert (two["nmi_mean"], two["num_seeds"]) == (0.6, 1)


def test_the_methods_table_shows_what_there_is() -> None:
    table = methods_table("one", average_over_seeds(ROWS, BY))
    first, second = table.rows
    assert table.header == [
        "features",
        "clusterer",
        "PCA",
        "seeds",
        "clusters",
        "noise",
        "silhouette",
        "NMI",
    ]
    assert first == ["pixels", "kmeans", "8", "2", "4", "0.0%", "0.500 (1 of 2)", "0.300 ± 0.141"]
    assert second == ["pixels", "kmeans", "8", "1", "3", "25.0%", "–", "0.600"]


def test_the_data_sets_stand_side_by_side_with_their_mean() -> None:
    table = datasets_table("NMI", average_over_seeds(ROWS, BY), "nmi")
    assert table is not None
    assert table.rows == [["pixels", "kmeans", "8", "0.300 ± 0.141", "0.600", "0.450"]]
    # A mean over one of two data sets would not compare.
    other = row("two", 0, silhouette=0.7) | {"clusterer": "gmm"}
    averaged = average_over_seeds([*ROWS, other], BY)
    silhouettes = datasets_table("silhouette", averaged, "silhouette")
    assert silhouettes is not None
    assert [cells[-1] for cells in silhouettes.rows] == ["–", "–"]
    assert [row["mean"] for row in datasets_rows(averaged, "silhouette")] == [None, None]


def test_the_csv_by_data_set_has_the_numbers_of_the_table() -> None:
    averaged = average_over_seeds(ROWS, BY)
    (only,) = csv.DictReader(io.StringIO(csv_text(datasets_rows(averaged, "nmi"))))
    method = {"features": "pixels", "clusterer": "kmeans", "pca_dim": "8", "metric": "nmi"}
    assert {name: only.pop(name) for name in method} == method
    assert only.pop("two_std") == ""  # of one seed
    expected = {"one_mean": 0.3, "one_std": 0.02**0.5, "two_mean": 0.6, "mean": 0.45}
    assert {name: float(value) for name, value in only.items()} == pytest.approx(expected)
    assert datasets_rows(average_over_seeds([row("one", 0, silhouette=0.1)], BY), "nmi") == []


def test_a_data_set_without_labels_is_not_compared_by_them() -> None:
    averaged = average_over_seeds([*ROWS, row("c", 0, silhouette=0.3)], BY)
    table = datasets_table("NMI", averaged, "nmi")
    assert table is not None
    assert "c" not in table.header
    assert [cells[-1] for cells in table.rows] == ["0.450"]


def test_a_column_of_numbers_may_be_one_character_wide() -> None:
    table = markdown_table(["k", "a"], [["x", "–"]], num_text_columns=1)
    assert table.splitlines()[1] == "| -- | -: |"  # a colon alone would make it no table


def test_without_labels_there_is_no_table_of_them() -> None:
    averaged = average_over_seeds([row("one", 0, silhouette=0.1)], BY)
    assert datasets_table("NMI", averaged, "nmi") is None


def test_csv_has_every_column_and_gaps_where_a_row_lacks_one() -> None:
    read = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [line["nmi"] for line in read] == ["0.2", "0.4", "", "0.6"]
    assert read[2]["problem"] == "no luck"


def test_what_features_tell_is_shown_once_for_all_clusterers() -> None:
    by = (*BY, "slices")
    rows = [
        row("one", 0, slices="fitted", nmi=0.5),
        row("one", 0, slices="clean", neighbours=0.7),
        row("one", 1, slices="clean", neighbours=0.5),
        row("one", 0, slices="clean", neighbours=0.7) | {"clusterer": "gmm"},
    ]
    table = features_table("neighbours", average_over_seeds(rows, by))
    assert table is not None
    assert table.header == ["features", "PCA", "clean"]
    assert table.rows == [["pixels", "8", "0.600 ± 0.141"]]
    assert features_table("neighbours", average_over_seeds(rows[:1], by)) is None


def test_deviations_are_shown_of_what_varies_with_the_seed() -> None:
    rows = [row("one", seed, nmi=0.5, num_clusters=3.0 + seed) for seed in (0, 1)]
    (cells,) = methods_table("one", average_over_seeds(rows, BY)).rows
    assert cells[4:] == ["3.5 ± 0.7", "–", "0.500"]


def test_features_of_every_pca_dimension_have_a_row() -> None:
    rows = [
        row("one", 0, slices="clean", neighbours=value) | {"pca_dim": pca_dim}
        for pca_dim, value in ((8, 0.5), (16, 0.7))
    ]
    table = features_table("neighbours", average_over_seeds(rows, (*BY, "slices")))
    assert table is not None
    assert table.rows == [["pixels", "8", "0.500"], ["pixels", "16", "0.700"]]


def test_a_data_set_keeps_its_column() -> None:
    rows = [row("two", 0, nmi=0.6), row("one", 0, nmi=0.2)]
    table = datasets_table("NMI", average_over_seeds(rows, BY), "nmi")
    assert table is not None
    assert table.header[3:] == ["two", "one", "mean NMI"]
    assert table.rows[0][3:] == ["0.600", "0.200", "0.400"]

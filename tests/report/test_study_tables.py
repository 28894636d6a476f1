"""A study's tables by hand: means and deviations over seeds, dashes where there is no figure."""

import csv
import io

from brainray.report.study_tables import (
    average_over_seeds,
    csv_text,
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
    lines = methods_table(average_over_seeds(ROWS, BY)).splitlines()
    header, first, second = ([c.strip() for c in lines[i].split("|")[1:-1]] for i in (0, 2, 3))
    assert header == [
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
    table = datasets_table(average_over_seeds(ROWS, BY), "nmi")
    assert table is not None
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert cells == ["pixels", "kmeans", "8", "0.300 ± 0.141", "0.600", "0.450"]
    # A mean over one of two data sets would not compare.
    other = row("two", 0, silhouette=0.7) | {"clusterer": "gmm"}
    silhouettes = datasets_table(average_over_seeds([*ROWS, other], BY), "silhouette")
    assert silhouettes is not None
    means = [line.split("|")[-2].strip() for line in silhouettes.splitlines()[2:]]
    assert means == ["–", "–"]


def test_a_data_set_without_labels_is_not_compared_by_them() -> None:
    table = datasets_table(average_over_seeds([*ROWS, row("c", 0, silhouette=0.3)], BY), "nmi")
    assert table is not None
    header, _, line = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    assert "c" not in header
    assert line[-2] == "0.450"


def test_a_column_of_numbers_may_be_one_character_wide() -> None:
    table = markdown_table(["k", "a"], [["x", "–"]], num_text_columns=1)
    assert table.splitlines()[1] == "| -- | -: |"  # a colon alone would make it no table


def test_without_labels_there_is_no_table_of_them() -> None:
    assert datasets_table(average_over_seeds([row("one", 0, silhouette=0.1)], BY), "nmi") is None


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
    table = features_table(average_over_seeds(rows, by))
    assert table is not None
    header, _, only = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
    assert header == ["features", "PCA", "clean"]
    assert only == ["pixels", "8", "0.600 ± 0.141"]
    assert features_table(average_over_seeds(rows[:1], by)) is None


def test_deviations_are_shown_of_what_varies_with_the_seed() -> None:
    rows = [row("one", seed, nmi=0.5, num_clusters=3.0 + seed) for seed in (0, 1)]
    line = methods_table(average_over_seeds(rows, BY)).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[5:-1]] == ["3.5 ± 0.7", "–", "0.500"]


def test_features_of_every_pca_dimension_have_a_row() -> None:
    rows = [
        row("one", 0, slices="clean", neighbours=value) | {"pca_dim": pca_dim}
        for pca_dim, value in ((8, 0.5), (16, 0.7))
    ]
    table = features_table(average_over_seeds(rows, (*BY, "slices")))
    assert table is not None
    lines = [[c.strip() for c in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    assert lines == [["8", "0.500"], ["16", "0.700"]]


def test_a_data_set_keeps_its_column() -> None:
    rows = [row("two", 0, nmi=0.6), row("one", 0, nmi=0.2)]
    table = datasets_table(average_over_seeds(rows, BY), "nmi")
    assert table is not None
    header, _, only = ([c.strip() for c in line.split("|")[4:-1]] for line in table.splitlines())
    assert (header, only) == (["two", "one", "mean NMI"], ["0.600", "0.200", "0.400"])

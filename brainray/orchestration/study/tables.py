"""Tables of a study, as CSV and Markdown, and its metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brainray.clustering.partition import NUM_NEIGHBOURS
from brainray.orchestration.pretraining.driver import collapsed_rounds
from brainray.orchestration.study.data import FeatureKey
from brainray.orchestration.study.grid import FITTED_SUBSET, Outcome, outcome_row
from brainray.orchestration.study.results import StudyResults
from brainray.report.study_tables import (
    average_over_seeds,
    csv_text,
    datasets_rows,
    datasets_table,
    features_table,
    methods_table,
)
from brainray.report.table import Table
from brainray.storage import Folder

_METHOD = ("dataset", "slices", "features", "clusterer", "pca_dim")
_SUBSET_TITLES = {
    FITTED_SUBSET: "fitted slices",
    "all": "held-out slices, all",
    "clean": "held-out slices, clean (no upright copy among the slices that were fitted or that "
    "the starting weights saw)",
    "strict": "held-out slices, strict (also no turned copy and no likely subject in common)",
}
_NEIGHBOURS_TITLE = (
    f"share of the {NUM_NEIGHBOURS} nearest fitted slices with the same label, per held-out slice"
)


@dataclass(frozen=True)
class StudyTables:
    """The tables of a study."""

    files: dict[str, str]  # contents by name
    tables: list[Table]  # all but those of single cells
    notes: list[str]
    text: str  # the main tables, to be shown
    metrics: dict[str, float]  # means and standard deviations by name, for MLflow


def study_tables(results: StudyResults) -> StudyTables:
    """All tables of a study."""
    subsets = list(
        dict.fromkeys(name for each in results.sets.values() for name in each.slices.subsets)
    )
    rows = _rows(results, results.main)
    averaged = average_over_seeds(rows, _METHOD)
    files = {"cells.csv": csv_text(rows), "methods.csv": csv_text(averaged)}
    tables, shown = [], []
    for dataset, each in results.sets.items():
        for subset, members in each.slices.subsets.items():
            chosen = [r for r in averaged if (r["dataset"], r["slices"]) == (dataset, subset)]
            title = f"{dataset}: {int(members.sum()):,} {_SUBSET_TITLES[subset]}"
            tables.append(methods_table(title, chosen))
            if subset == FITTED_SUBSET:
                shown.append(tables[-1])
    for dataset in results.sets:
        chosen = [r for r in averaged if r["dataset"] == dataset]
        knowing = features_table(f"{dataset}: {_NEIGHBOURS_TITLE}", chosen)
        if knowing is not None:
            tables.append(knowing)
            shown.append(knowing)
    notes = sorted({f"{o.cell.clusterer}: {note}" for o in results.main for note in o.notes})
    notes += _collapses(results.features.encoders)
    noted = ["\n".join(["Notes:", *(f"- {note}" for note in notes)]) + "\n"] if notes else []
    files["methods.md"] = "\n".join([*map(_section, tables), *noted])
    by_dataset, rows_by_dataset = [], []
    for metric in ("nmi", "fmi"):
        for subset in subsets:
            chosen = [r for r in averaged if r["slices"] == subset]
            title = f"{metric.upper()} by data set, {_SUBSET_TITLES[subset]}"
            table = datasets_table(title, chosen, metric)
            if table is not None:
                by_dataset.append(table)
            rows_by_dataset += [{"slices": subset} | r for r in datasets_rows(chosen, metric)]
    files["datasets.md"] = "\n".join(map(_section, by_dataset))
    files["datasets.csv"] = csv_text(rows_by_dataset)
    varied = _rows(results, results.varied)
    files["sensitivity.csv"] = csv_text(varied)
    if len(results.sets) > 1:  # of a single one, they repeat the tables of its methods
        tables += by_dataset
    tables += _sensitivity_tables(results.sets, varied)
    text = "\n".join(map(_section, shown))
    return StudyTables(files, tables, notes, text, _flat(averaged))


def _sensitivity_tables(datasets: Iterable[str], varied: list[dict[str, Any]]) -> list[Table]:
    """A table for each data set: the setting that was varied stands beside its clusterer."""
    settings = ("num_clusters_asked", "eps_factor", "linkage")
    fitted = [row for row in varied if row["slices"] == FITTED_SUBSET]
    named = [
        row | {"clusterer": f"{row['clusterer']}, {_setting(row)}"}
        for row in average_over_seeds(fitted, (*_METHOD, *settings))
    ]
    return [
        methods_table(
            f"{dataset}: sensitivity, fitted slices",
            [row for row in named if row["dataset"] == dataset],
        )
        for dataset in datasets
        if named
    ]


def _setting(row: Mapping[str, Any]) -> str:
    """What `sensitivity_cells` varies of this clusterer."""
    match row["clusterer"]:
        case "dbscan":
            return f"eps = {row['eps_factor']:g} x knee"
        case "agglomerative":
            return f"{row['linkage']} linkage"
    return f"K = {row['num_clusters_asked']}"


def _section(table: Table) -> str:
    return f"## {table.title}\n\n{table.markdown()}\n"


def _rows(results: StudyResults, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each outcome and subset of its data set."""
    return [
        outcome_row(outcome, subset)
        for outcome in outcomes
        for subset in results.sets[outcome.cell.dataset].slices.subsets
    ]


def _flat(averaged: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        f"{row['dataset']}/{row['slices']}/{row['features']}/{row['clusterer']}"
        f"/pca{row['pca_dim']}/{name}": value
        for row in averaged
        for name, value in row.items()
        if name.startswith(("nmi_", "fmi_", "ari_", "silhouette_", "accuracy_", "neighbours_"))
    }


def _collapses(encoders: Mapping[FeatureKey, Folder]) -> list[str]:
    """Notes on refined encoders whose clusters collapsed, which `on_collapse=warn` lets pass."""
    notes = []
    for (dataset, feature, seed), folder in encoders.items():
        if rounds := collapsed_rounds(folder):
            notes.append(
                f"{dataset}, {feature}, seed {seed}: the clusters of its refinement collapsed in "
                f"round {', '.join(map(str, rounds))}"
            )
    return notes

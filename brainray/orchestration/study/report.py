"""Write a study's results: its tables, figures and recommended numbers of clusters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from brainray import layout
from brainray.clustering.metrics import clustering_metrics
from brainray.engine.shard import sample_keys
from brainray.orchestration.study.figures import DrawnSet, draw_feature_sets
from brainray.orchestration.study.grid import FITTED_SUBSET, Outcome, Slices, outcome_row
from brainray.orchestration.study.page import write_page
from brainray.orchestration.study.results import StudyResults
from brainray.orchestration.study.tables import study_tables
from brainray.report.study_figures import Varied, explained_variance, refinement, sensitivity
from brainray.report.study_tables import average_over_seeds
from brainray.report.style import png_bytes
from brainray.schema import UNLABELLED, History

_NUM_CLUSTERS = "num_clusters.md"


@dataclass(frozen=True)
class StudyReport:
    """The files and metrics of a written report."""

    metrics: dict[str, float]
    files: list[str]
    text: str


def write_report(results: StudyResults) -> StudyReport:
    """Write tables, figures and the page into the study's folder."""
    tables = study_tables(results)
    for name, text in tables.files.items():
        results.folder.write_bytes(f"{layout.TABLES}/{name}", text.encode())
    drawn = draw_feature_sets(results)
    advice = _advice(drawn)
    figures = {
        **_sensitivity_figures(results),
        **_refinement_figure(results),
        **_explained_variance_figures(drawn),
    }
    results.folder.write_bytes(f"{layout.TABLES}/{_NUM_CLUSTERS}", advice.encode())
    for name, image in figures.items():
        results.folder.write_bytes(f"{layout.FIGURES}/{name}", image)
    recommended = {
        f"{dataset}/{feature}/recommended_num_clusters": float(each.recommendation.num_clusters)
        for (dataset, feature), each in drawn.items()
        if each.recommendation.num_clusters is not None
    }
    outcomes = [*results.main, *results.varied]
    counts = {
        "num_cells": float(len({o.cell for o in outcomes})),
        "num_failed_cells": float(len({o.cell for o in outcomes if o.problem})),
    }
    names = [*figures, *(name for each in drawn.values() for name in each.figures)]
    write_page(results, tables, drawn, counts, names)
    return StudyReport(
        metrics=tables.metrics | recommended | counts,
        files=[layout.REPORT]
        + [f"{layout.TABLES}/{name}" for name in [*tables.files, _NUM_CLUSTERS]]
        + [f"{layout.FIGURES}/{name}" for name in names],
        text=f"{tables.text}\n{advice}",
    )


def _advice(drawn: Mapping[tuple[str, str], DrawnSet]) -> str:
    """Recommended numbers of clusters with their reasons, as Markdown."""
    lines = ["## Recommended number of clusters (without reading labels)", ""]
    for (dataset, feature), each in drawn.items():
        number = each.recommendation.num_clusters
        recommended = "no recommendation" if number is None else f"K = {number}"
        lines.append(f"- {dataset}, {feature}: {recommended}")
        lines += [f"  - {reason}" for reason in each.recommendation.reasons]
    return "\n".join(lines) + "\n"


def _explained_variance_figures(drawn: Mapping[tuple[str, str], DrawnSet]) -> dict[str, bytes]:
    """A figure for each data set: the variance that its feature sets' components explain."""
    shares: dict[str, dict[str, np.ndarray]] = {}
    for (dataset, feature), each in drawn.items():
        shares.setdefault(dataset, {})[feature] = np.asarray(each.explained)
    return {
        f"{dataset}/explained_variance.png": png_bytes(explained_variance(shares_by_feature))
        for dataset, shares_by_feature in shares.items()
    }


def _sensitivity_figures(results: StudyResults) -> dict[str, bytes]:
    """A figure for each data set: K, eps, linkage, encoder and PCA dimension."""
    figures = {}
    for dataset in results.sets:
        varied = _fitted_rows(results.varied, dataset)
        main = _fitted_rows(results.main, dataset)
        first_dim = results.config.study.pca_dims[0]
        varied_feature = varied[0]["features"] if varied else ""
        panels = [
            _panel("K (K-means)", _with_clusterer(varied, "kmeans"), "num_clusters_asked"),
            _panel("eps over the knee (DBSCAN)", _with_clusterer(varied, "dbscan"), "eps_factor"),
            _panel("linkage (agglomerative)", _with_clusterer(varied, "agglomerative"), "linkage"),
            _panel(
                "features (K-means)",
                [r for r in _with_clusterer(main, "kmeans") if r["pca_dim"] == first_dim],
                "features",
            ),
            _panel(
                f"PCA of {varied_feature} (K-means)",
                [r for r in _with_clusterer(main, "kmeans") if r["features"] == varied_feature],
                "pca_dim",
            ),
        ]
        panels = [panel for panel in panels if panel.values]
        if panels:
            figures[f"{dataset}/sensitivity.png"] = png_bytes(sensitivity(panels))
    return figures


def _fitted_rows(outcomes: Sequence[Outcome], dataset: str) -> list[dict[str, Any]]:
    return [outcome_row(o, FITTED_SUBSET) for o in outcomes if o.cell.dataset == dataset]


def _with_clusterer(rows: list[dict[str, Any]], clusterer: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["clusterer"] == clusterer]


def _panel(title: str, rows: list[dict[str, Any]], key: str) -> Varied:
    averaged = average_over_seeds(rows, (key,))
    averaged = (
        averaged if key in ("features", "linkage") else sorted(averaged, key=lambda r: r[key])
    )
    shown = {"nmi": "nmi", "ari": "ari", "silhouette": "silhouette"}
    if key == "eps_factor":
        shown["noise share"] = "noise_share"
    return Varied(
        title,
        [str(row[key]) for row in averaged],
        {
            label: [
                (row[f"{name}_mean"], row.get(f"{name}_std", 0.0))
                if f"{name}_mean" in row
                else None
                for row in averaged
            ]
            for label, name in shown.items()
        },
    )


def _refinement_figure(results: StudyResults) -> dict[str, bytes]:
    """The rounds of all refined encoders; labels, if any, are only used for scoring."""
    histories: dict[str, History] = {}
    for (dataset, feature, seed), folder in results.features.encoders.items():
        if results.config.study.features[feature].lambda_cluster == 0:
            continue
        rounds = {
            row["round"]: row for row in folder.read_json_lines(layout.METRICS) if "round" in row
        }
        slices = results.sets[dataset].slices
        history = []
        for name in (folder / layout.ROUNDS).names():
            number = float(name.removeprefix("round-").removesuffix(".parquet"))
            row = {"round": number} | rounds.get(number, {})
            clusters = (folder / layout.ROUNDS).read_table(name)
            history.append(row | _agreement(slices, clusters))
        histories[f"{dataset}, {feature}, seed {seed}"] = history
    if not histories:
        return {}
    tolerance = results.config.self_supervision.tolerance
    return {"refinement.png": png_bytes(refinement(histories, tolerance))}


def _agreement(slices: Slices, clusters: pa.Table) -> dict[str, float]:
    """NMI of a round's clusters with the labels; empty without labels."""
    fitted = np.flatnonzero(slices.fitted)
    keys = sample_keys(slices.table["sample_id"].take(fitted).to_pylist())
    position = np.searchsorted(clusters["key"].to_numpy(), keys)
    labels = slices.labels[fitted]
    known = labels != UNLABELLED
    if not known.any():
        return {}
    found = clusters["cluster"].to_numpy()[position]
    return {"nmi": clustering_metrics(labels[known], found[known])["nmi"]}

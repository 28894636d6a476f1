"""Output of a study: tables, figures, contact sheets, and a recommended K."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from brainray import layout
from brainray.clustering.clusterers import hierarchy_of, k_distances, knee
from brainray.clustering.metrics import clustering_metrics
from brainray.clustering.num_clusters import NumClustersScores, score_num_clusters
from brainray.clustering.partition import NUM_NEIGHBOURS
from brainray.clustering.seeding import draw_sample
from brainray.clustering.stability import Stability, measure_stability, recommend
from brainray.config import Config
from brainray.engine.shard import sample_keys
from brainray.errors import BrainrayError
from brainray.log import log
from brainray.orchestration.pretraining.driver import collapsed_rounds
from brainray.orchestration.pretraining.features import content_key
from brainray.orchestration.study.data import FeatureKey, StudiedFeatures, StudiedSet
from brainray.orchestration.study.grid import (
    FITTED,
    Cell,
    Grid,
    Outcome,
    Reduced,
    Slices,
    assignments,
    outcome_row,
)
from brainray.report.num_clusters_figure import num_clusters_figure
from brainray.report.study_figures import (
    ClusterTiles,
    Varied,
    cluster_map,
    cluster_sheet,
    dendrogram,
    explained_variance,
    k_distance_curve,
    refinement,
    sensitivity,
)
from brainray.report.study_tables import (
    average_over_seeds,
    csv_text,
    datasets_table,
    features_table,
    methods_table,
)
from brainray.report.style import png_bytes
from brainray.report.tsne import MIN_SLICES, tsne_sequence
from brainray.schema import NOISE, TRAIN, UNLABELLED
from brainray.storage import Folder

_DRAWING_FORMAT = 6  # of the figures and the recommended K
_DRAWN = "drawn"  # a JSON file per feature set for what was plotted or recommended
_METHOD = ("dataset", "slices", "features", "clusterer", "pca_dim")
_NUM_TILES = 7
_MAX_SHEET_CLUSTERS = 12
_SUBSET_TITLES = {
    FITTED: "fitted slices",
    "all": "held-out slices, all",
    "clean": "held-out slices, clean (no upright copy among the slices that were fitted or that "
    "the starting weights saw)",
    "strict": "held-out slices, strict (also no turned copy and no likely subject in common)",
}

_NEIGHBOURS_TITLE = (
    f"share of the {NUM_NEIGHBOURS} nearest fitted slices with the same label, per held-out slice"
)


@dataclass(frozen=True)
class StudyResults:
    """Everything the report is made from."""

    config: Config
    folder: Folder
    sets: Mapping[str, StudiedSet]
    features: StudiedFeatures
    grid: Grid
    main: Sequence[Outcome]
    varied: Sequence[Outcome]


@dataclass(frozen=True)
class StudyReport:
    """The files and metrics of a written report."""

    metrics: dict[str, float]
    files: list[str]
    text: str


def write_report(results: StudyResults) -> StudyReport:
    """Write tables and figures into the study's folder."""
    tables, text, metrics = _tables(results)
    figures = {
        **_sensitivity_figures(results),
        **_refinement_figure(results),
    }
    for name, content in tables.items():
        results.folder.write_bytes(f"{layout.TABLES}/{name}", content.encode())
    for name, image in figures.items():
        results.folder.write_bytes(f"{layout.FIGURES}/{name}", image)
    drawn, advice = _draw_feature_sets(results)
    advice_text = _advice_table(advice)
    results.folder.write_bytes(f"{layout.TABLES}/num_clusters.md", advice_text.encode())
    for (dataset, feature), found in advice.items():
        if found.get("num_clusters") is not None:
            metrics[f"{dataset}/{feature}/recommended_num_clusters"] = float(found["num_clusters"])
    metrics["num_cells"] = float(len({o.cell for o in [*results.main, *results.varied]}))
    metrics["num_failed_cells"] = float(
        len({o.cell for o in [*results.main, *results.varied] if o.problem})
    )
    files = [f"{layout.TABLES}/{name}" for name in [*tables, "num_clusters.md"]]
    files += [f"{layout.FIGURES}/{name}" for name in [*figures, *drawn]]
    return StudyReport(metrics, files, f"{text}\n{advice_text}")


def _tables(results: StudyResults) -> tuple[dict[str, str], str, dict[str, float]]:
    """Files by name, the text to show, and flat metrics."""
    subsets = list(
        dict.fromkeys(name for each in results.sets.values() for name in each.slices.subsets)
    )
    rows = _rows(results, results.main)
    averaged = average_over_seeds(rows, _METHOD)
    files = {"cells.csv": csv_text(rows), "methods.csv": csv_text(averaged)}
    parts, shown = [], []
    for dataset, each in results.sets.items():
        for subset, members in each.slices.subsets.items():
            chosen = [r for r in averaged if (r["dataset"], r["slices"]) == (dataset, subset)]
            title = f"## {dataset}: {int(members.sum()):,} {_SUBSET_TITLES[subset]}"
            parts.append(f"{title}\n\n{methods_table(chosen)}\n")
            if subset == FITTED:
                shown.append(parts[-1])
    for dataset in results.sets:
        knowing = features_table([r for r in averaged if r["dataset"] == dataset])
        if knowing is not None:
            title = f"## {dataset}: {_NEIGHBOURS_TITLE}"
            parts.append(f"{title}\n\n{knowing}\n")
            shown.append(parts[-1])
    notes = sorted({f"- {o.cell.clusterer}: {note}" for o in results.main for note in o.notes})
    notes += _collapses(results.features.encoders)
    if notes:
        parts.append("\n".join(["Notes:", *notes]) + "\n")
    files["methods.md"] = "\n".join(parts)
    by_dataset = []
    for metric in ("nmi", "fmi"):
        for subset in subsets:
            table = datasets_table([r for r in averaged if r["slices"] == subset], metric)
            if table is not None:
                title = f"## {metric.upper()} by data set, {_SUBSET_TITLES[subset]}"
                by_dataset.append(f"{title}\n\n{table}\n")
    files["datasets.md"] = "\n".join(by_dataset)
    files["sensitivity.csv"] = csv_text(_rows(results, results.varied))
    return files, "\n".join(shown), _flat(averaged)


def _rows(results: StudyResults, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each outcome and subset of its data set."""
    return [
        outcome_row(outcome, subset)
        for outcome in outcomes
        for subset in results.sets[outcome.cell.dataset].slices.subsets
    ]


def _flat(averaged: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means and standard deviations by name, for MLflow."""
    return {
        f"{row['dataset']}/{row['slices']}/{row['features']}/{row['clusterer']}"
        f"/pca{row['pca_dim']}/{name}": value
        for row in averaged
        for name, value in row.items()
        if name.startswith(("nmi_", "fmi_", "ari_", "silhouette_", "accuracy_", "neighbours_"))
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
            _panel("K (K-means)", _of(varied, "kmeans"), "num_clusters_asked"),
            _panel("eps over the knee (DBSCAN)", _of(varied, "dbscan"), "eps_factor"),
            _panel("linkage (agglomerative)", _of(varied, "agglomerative"), "linkage"),
            _panel(
                "features (K-means)",
                [r for r in _of(main, "kmeans") if r["pca_dim"] == first_dim],
                "features",
            ),
            _panel(
                f"PCA of {varied_feature} (K-means)",
                [r for r in _of(main, "kmeans") if r["features"] == varied_feature],
                "pca_dim",
            ),
        ]
        panels = [panel for panel in panels if panel.values]
        if panels:
            figures[f"{dataset}/sensitivity.png"] = png_bytes(sensitivity(panels))
    return figures


def _fitted_rows(outcomes: Sequence[Outcome], dataset: str) -> list[dict[str, Any]]:
    return [outcome_row(o, FITTED) for o in outcomes if o.cell.dataset == dataset]


def _of(rows: list[dict[str, Any]], clusterer: str) -> list[dict[str, Any]]:
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
    histories: dict[str, list[dict[str, float]]] = {}
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


def _collapses(encoders: Mapping[FeatureKey, Folder]) -> list[str]:
    """Notes on refined encoders whose clusters collapsed, which `on_collapse=warn` lets pass."""
    notes = []
    for (dataset, feature, seed), folder in encoders.items():
        if rounds := collapsed_rounds(folder):
            notes.append(
                f"- {dataset}, {feature}, seed {seed}: the clusters of its refinement collapsed in "
                f"round {', '.join(map(str, rounds))}"
            )
    return notes


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


Advice = dict[str, Any]


def _draw_feature_sets(results: StudyResults) -> tuple[list[str], dict[tuple[str, str], Advice]]:
    """Maps, contact sheets, curves and the recommended K of every feature set's first seed.

    Plots that an earlier run made of the same clusters are kept.
    """
    shown = _shown_cells(results)
    config, folder = results.config, results.folder
    keys = {cell: _drawing_key(results, cell) for cell in shown}
    tasks: dict[Cell, ray.ObjectRef[Any]] = {}
    for cell in shown:
        name = _drawn_file(cell)
        if folder.exists(name) and folder.read_json(name)["key"] == keys[cell]:
            continue
        each = results.sets[cell.dataset]
        tasks[cell] = _draw_feature_set.remote(
            cell, keys[cell], config, folder, each, results.grid.reduced(cell)
        )
    if tasks:
        log(f"plotting {len(tasks)} feature sets")
        ray.get(list(tasks.values()))
    files: list[str] = []
    advice: dict[tuple[str, str], Advice] = {}
    drawn = {cell: folder.read_json(_drawn_file(cell)) for cell in shown}
    for cell, of_set in drawn.items():
        files += of_set["figures"]
        advice[cell.dataset, cell.feature] = of_set["advice"]
    for dataset in results.sets:
        shares = {
            cell.feature: np.asarray(of_set["explained"])
            for cell, of_set in drawn.items()
            if cell.dataset == dataset
        }
        if shares:
            name = f"{dataset}/explained_variance.png"
            folder.write_bytes(f"{layout.FIGURES}/{name}", png_bytes(explained_variance(shares)))
            files.append(name)
    return files, advice


def _shown_cells(results: StudyResults) -> list[Cell]:
    """One computed cell per feature set: the first seed's mixture, or else its first clusterer."""
    shown: dict[tuple[str, str], Cell] = {}
    order = sorted(results.main, key=lambda outcome: outcome.cell.clusterer != "gmm")
    for outcome in order:
        if outcome.problem is None:
            shown.setdefault((outcome.cell.dataset, outcome.cell.feature), outcome.cell)
    wanted = dict.fromkeys((o.cell.dataset, o.cell.feature) for o in results.main)
    return [shown[key] for key in wanted if key in shown]


def _drawn_file(cell: Cell) -> str:
    return f"{_DRAWN}/{cell.dataset}/{cell.feature}.json"


def _drawing_key(results: StudyResults, cell: Cell) -> str:
    config = results.config
    return content_key(
        {
            "format": _DRAWING_FORMAT,
            "cell": results.grid.key(cell),
            "classes": results.sets[cell.dataset].classes,
            "study": config.study.model_dump(
                mode="json",
                include={"candidate_num_clusters", "depth", "min_samples", "max_quadratic_rows"},
            ),
            "pca_dims": list(config.study.pca_dims),
            "clustering": config.clustering.model_dump(mode="json"),
            "tsne_max_slices": config.evaluation.tsne_max_slices,
        }
    )


@ray.remote(num_cpus=1)
def _draw_feature_set(
    cell: Cell,
    key: str,
    config: Config,
    folder: Folder,
    studied: StudiedSet,
    reduced: Reduced,
) -> None:
    """Plots and recommendation for one feature set; its JSON file is written last."""
    with threadpool_limits(1):
        torch.set_num_threads(1)
        x = reduced.coordinates[:, : cell.pca_dim]
        clusters = assignments(folder, cell)
        prefix = f"{cell.dataset}/{cell.feature}"
        figures = {}
        fitted = x[studied.slices.fitted]
        sample = fitted[draw_sample(len(fitted), config.study.max_quadratic_rows, cell.seed)]
        tsne = _tsne_figure(cell, config, studied, x, clusters)
        if tsne is not None:
            figures[f"{prefix}-tsne.png"] = tsne
        figures[f"{prefix}-clusters.png"] = _contact_sheet(cell, studied, x, clusters)
        for name, draw in (("dendrogram", _dendrogram), ("k_distances", _k_distances)):
            try:
                figures[f"{prefix}-{name}.png"] = draw(sample, config)
            except BrainrayError:  # reported by the cells that need it
                continue
        advice = _choose_num_clusters(sample, config, cell.seed)
        if "scores" in advice:
            scores = NumClustersScores(**advice["scores"])
            figures[f"{prefix}-num_clusters.png"] = png_bytes(num_clusters_figure(scores))
    for name, content in figures.items():
        folder.write_bytes(f"{layout.FIGURES}/{name}", content)
    folder.write_json(
        _drawn_file(cell),
        {
            "key": key,
            "figures": list(figures),
            "advice": advice,
            "explained": reduced.explained.tolist(),
        },
    )


def _tsne_figure(
    cell: Cell,
    config: Config,
    studied: StudiedSet,
    x: NDArray[np.float64],
    clusters: NDArray[np.int64],
) -> bytes | None:
    rows = draw_sample(len(x), config.evaluation.tsne_max_slices, cell.seed)
    if len(rows) < MIN_SLICES:
        return None
    (points,) = tsne_sequence([x[rows]], seed=cell.seed)
    labels = studied.names_of_labels
    title = f"{cell.dataset}, {cell.feature}: t-SNE of {len(rows):,} slices, {cell.clusterer}"
    return png_bytes(cluster_map(points, clusters[rows], [labels[row] for row in rows], title))


def _contact_sheet(
    cell: Cell, studied: StudiedSet, x: NDArray[np.float64], clusters: NDArray[np.int64]
) -> bytes:
    """Fitted slices of the largest clusters, by distance to their cluster's centroid."""
    fitted = np.flatnonzero(studied.slices.fitted)
    found, sizes = np.unique(clusters[fitted], return_counts=True)
    largest = sorted(found[np.argsort(-sizes, kind="stable")][:_MAX_SHEET_CLUSTERS].tolist())
    titles, rows = [], []
    for cluster in largest:
        members = fitted[clusters[fitted] == cluster]
        distances = np.linalg.norm(x[members] - x[members].mean(axis=0), axis=1)
        by_distance = members[np.argsort(distances, kind="stable")]
        name = "noise" if cluster == NOISE else f"cluster {cluster}"
        titles.append(f"{name}\n{len(members):,} slices")
        rows += [by_distance[:_NUM_TILES], by_distance[_NUM_TILES:][::-1][:_NUM_TILES]]
    images = _images(studied, np.concatenate(rows))
    parts = iter(np.split(images, np.cumsum([len(each) for each in rows])[:-1]))
    sheet = [ClusterTiles(title, list(next(parts)), list(next(parts))) for title in titles]
    return png_bytes(cluster_sheet(sheet, f"{cell.dataset}, {cell.feature}, {cell.clusterer}"))


def _images(studied: StudiedSet, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Fitted slices (n, side, side), in one pass over the store."""
    sample_ids = studied.slices.table["sample_id"].take(rows).to_pylist()
    side = studied.store.preprocess.image_size
    return studied.store.images(sample_ids, TRAIN, side)[:, 0]


def _dendrogram(x: NDArray[np.float64], config: Config) -> bytes:
    return png_bytes(dendrogram(hierarchy_of(x, "average"), config.study.depth))


def _k_distances(x: NDArray[np.float64], config: Config) -> bytes:
    distances = k_distances(x, config.study.min_samples)
    return png_bytes(k_distance_curve(distances, knee(distances), config.study.min_samples))


def _choose_num_clusters(x: NDArray[np.float64], config: Config, seed: int) -> Advice:
    """Scores of every candidate K and the recommendation, or why there is none."""
    candidates = sorted(config.study.candidate_num_clusters)
    try:
        scores = score_num_clusters(
            x,
            candidates,
            covariance_type=config.clustering.covariance_type,
            seed=seed,
        )
        stability: Stability = measure_stability(x, candidates, seed=seed)
        found = recommend(scores, stability)
    except BrainrayError as error:
        return {"num_clusters": None, "reasons": [str(error)]}
    return {
        "num_clusters": found.num_clusters,
        "reasons": found.reasons,
        "scores": asdict(scores),
        "stability": asdict(stability),
    }


def _advice_table(advice: Mapping[tuple[str, str], Advice]) -> str:
    """Recommended numbers of clusters with their reasons, as Markdown."""
    lines = ["## Recommended number of clusters (without reading labels)", ""]
    for (dataset, feature), found in advice.items():
        number = found["num_clusters"]
        said = "no recommendation" if number is None else f"K = {number}"
        lines.append(f"- {dataset}, {feature}: {said}")
        lines += [f"  - {reason}" for reason in found["reasons"]]
    return "\n".join(lines) + "\n"

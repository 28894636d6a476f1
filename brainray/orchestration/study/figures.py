"""Maps, contact sheets, curves and the recommended K of every feature set of a study."""

from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import ray
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from brainray import layout
from brainray.clustering.clusterers import hierarchy_of, k_distances, knee
from brainray.clustering.num_clusters import score_num_clusters
from brainray.clustering.seeding import draw_sample
from brainray.clustering.stability import Recommendation, measure_stability, recommend
from brainray.config import Config
from brainray.engine.recluster import build_mixture
from brainray.errors import BrainrayError
from brainray.log import log
from brainray.mri.identity import content_key
from brainray.orchestration.store import read_images
from brainray.orchestration.study.data import StudiedSet
from brainray.orchestration.study.grid import Cell, Reduced, assignments
from brainray.orchestration.study.results import StudyResults
from brainray.report.num_clusters_figure import num_clusters_figure
from brainray.report.study_figures import (
    ClusterTiles,
    cluster_map,
    cluster_sheet,
    dendrogram,
    k_distance_curve,
)
from brainray.report.study_page import ClusterMap
from brainray.report.style import png_bytes
from brainray.report.tsne import MIN_SLICES, tsne_sequence
from brainray.schema import NOISE, TRAIN
from brainray.storage import Folder

_FORMAT = 10  # of the figures and the recommended K
_DRAWN = "drawn"  # a JSON file per feature set
_NUM_TILES = 7
_MAX_SHEET_CLUSTERS = 12


@dataclass(frozen=True)
class DrawnSet:
    """Figures and recommended number of clusters of a feature set."""

    figures: list[str]  # files
    explained: list[float]  # (D,) shares of the total variance
    recommendation: Recommendation
    map: ClusterMap | None  # None with too few slices


def draw_feature_sets(results: StudyResults) -> dict[tuple[str, str], DrawnSet]:
    """Draw every feature set's first seed, as Ray tasks, by data set and feature.

    Figures that an earlier run drew of the same clusters are kept.
    """
    shown = _shown_cells(results)
    folder = results.folder
    keys = {cell: _key(results, cell) for cell in shown}
    tasks = [
        _draw_feature_set.remote(
            cell,
            keys[cell],
            results.config,
            folder,
            results.sets[cell.dataset],
            results.grid.reduced(cell),
        )
        for cell in shown
        if not _is_drawn(folder, _file(cell), keys[cell])
    ]
    if tasks:
        log(f"plotting {len(tasks)} feature sets")
        ray.get(tasks)
    drawn = {}
    for cell in shown:
        found = folder.read_json(_file(cell))
        drawn[cell.dataset, cell.feature] = DrawnSet(
            found["figures"],
            found["explained"],
            Recommendation(**found["recommendation"]),
            None if found["map"] is None else ClusterMap(**found["map"]),
        )
    return drawn


def _is_drawn(folder: Folder, file: str, key: str) -> bool:
    """Whether figures of the same clusters exist; someone may have deleted some."""
    if not folder.exists(file):
        return False
    found, figures = folder.read_json(file), folder / layout.FIGURES
    return found["key"] == key and all(figures.exists(name) for name in found["figures"])


def _shown_cells(results: StudyResults) -> list[Cell]:
    """One computed cell per feature set: the first seed's mixture, or else its first clusterer."""
    shown: dict[tuple[str, str], Cell] = {}
    order = sorted(results.main, key=lambda outcome: outcome.cell.clusterer != "gmm")
    for outcome in order:
        if outcome.problem is None:
            shown.setdefault((outcome.cell.dataset, outcome.cell.feature), outcome.cell)
    wanted = dict.fromkeys((o.cell.dataset, o.cell.feature) for o in results.main)
    return [shown[key] for key in wanted if key in shown]


def _file(cell: Cell) -> str:
    return f"{_DRAWN}/{cell.dataset}/{cell.feature}.json"


def _key(results: StudyResults, cell: Cell) -> str:
    config = results.config
    return content_key(
        {
            "format": _FORMAT,
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
        distances = _centroid_distances(x, clusters, studied.slices.fitted)
        drawn_map = _map(cell, config, x, clusters, distances)
        if drawn_map is not None:
            figures[f"{prefix}-tsne.png"] = _tsne_figure(cell, studied, drawn_map)
        figures[f"{prefix}-clusters.png"] = _contact_sheet(cell, studied, clusters, distances)
        for name, draw in (("dendrogram", _dendrogram), ("k_distances", _k_distances)):
            try:
                figures[f"{prefix}-{name}.png"] = draw(sample, config)
            except BrainrayError:  # reported by the cells that need it
                continue
        criteria, recommendation = _choose_num_clusters(sample, config, cell.seed)
        if criteria is not None:
            figures[f"{prefix}-num_clusters.png"] = png_bytes(criteria)
    folder.delete_file(_file(cell), missing_ok=True)  # which would otherwise be of other figures
    for name, content in figures.items():
        folder.write_bytes(f"{layout.FIGURES}/{name}", content)
    drawn = DrawnSet(list(figures), reduced.explained.tolist(), recommendation, drawn_map)
    folder.write_json(_file(cell), {"key": key, **asdict(drawn)})


def _centroid_distances(
    x: NDArray[np.float64], clusters: NDArray[np.int64], fitted: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(N,) distance of each fitted slice to the centroid of its cluster; NaN for the others."""
    distances = np.full(len(x), np.nan)
    for cluster in np.unique(clusters[fitted]):
        members = fitted & (clusters == cluster)
        distances[members] = np.linalg.norm(x[members] - x[members].mean(axis=0), axis=1)
    return distances


def _map(
    cell: Cell,
    config: Config,
    x: NDArray[np.float64],
    clusters: NDArray[np.int64],
    distances: NDArray[np.float64],
) -> ClusterMap | None:
    rows = draw_sample(len(x), config.evaluation.tsne_max_slices, cell.seed)
    if len(rows) < MIN_SLICES:
        return None
    (points,) = tsne_sequence([x[rows]], seed=cell.seed)
    found, sizes = np.unique(clusters[~np.isnan(distances)], return_counts=True)
    return ClusterMap(
        title=(
            f"{cell.dataset}, {cell.feature}: {cell.clusterer}, {cell.pca_dim} components, "
            f"seed {cell.seed}"
        ),
        rows=rows.tolist(),
        x=points[:, 0].astype(np.float64).round(2).tolist(),
        y=points[:, 1].astype(np.float64).round(2).tolist(),
        clusters=clusters[rows].tolist(),
        distances=[None if np.isnan(each) else each for each in distances[rows].tolist()],
        sizes=list(zip(found.tolist(), sizes.tolist(), strict=True)),
    )


def _tsne_figure(cell: Cell, studied: StudiedSet, drawn: ClusterMap) -> bytes:
    labels = studied.names_of_labels
    title = f"{cell.dataset}, {cell.feature}: t-SNE of {len(drawn.rows):,} slices, {cell.clusterer}"
    points, clusters = np.column_stack([drawn.x, drawn.y]), np.array(drawn.clusters)
    return png_bytes(cluster_map(points, clusters, [labels[row] for row in drawn.rows], title))


def _contact_sheet(
    cell: Cell,
    studied: StudiedSet,
    clusters: NDArray[np.int64],
    distances: NDArray[np.float64],
) -> bytes:
    """Fitted slices of the largest clusters, by distance to their cluster's centroid."""
    fitted = np.flatnonzero(studied.slices.fitted)
    found, sizes = np.unique(clusters[fitted], return_counts=True)
    largest = sorted(found[np.argsort(-sizes, kind="stable")][:_MAX_SHEET_CLUSTERS].tolist())
    titles, rows = [], []
    for cluster in largest:
        members = fitted[clusters[fitted] == cluster]
        by_distance = members[np.argsort(distances[members], kind="stable")]
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
    side = studied.store.manifest.preprocess.image_size
    return read_images(studied.store.folder, sample_ids, TRAIN, side)[:, 0]


def _dendrogram(x: NDArray[np.float64], config: Config) -> bytes:
    return png_bytes(dendrogram(hierarchy_of(x, "average"), config.study.depth))


def _k_distances(x: NDArray[np.float64], config: Config) -> bytes:
    distances = k_distances(x, config.study.min_samples)
    return png_bytes(k_distance_curve(distances, knee(distances), config.study.min_samples))


def _choose_num_clusters(
    x: NDArray[np.float64], config: Config, seed: int
) -> tuple[Figure | None, Recommendation]:
    """A figure of the criteria by candidate K and the recommendation, or why there is none."""
    candidates = sorted(config.study.candidate_num_clusters)
    mixture = partial(build_mixture, config.clustering)
    try:
        scores = score_num_clusters(x, candidates, mixture=mixture, seed=seed)
        stability = measure_stability(x, candidates, seed=seed)
        return num_clusters_figure(scores, stability), recommend(scores, stability)
    except BrainrayError as error:
        return None, Recommendation(None, [str(error)])

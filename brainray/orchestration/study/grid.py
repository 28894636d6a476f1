"""The grid of a study: cells run as Ray tasks, and each finished cell is saved as a file."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from brainray import layout
from brainray.clustering import clusterers
from brainray.clustering.clusterers import Clustered
from brainray.clustering.partition import neighbour_agreement, score_partition
from brainray.clustering.pca import PCA
from brainray.config import ClustererName, ClusteringConfig, Config, StudyConfig
from brainray.engine.recluster import build_mixture
from brainray.errors import BrainrayError, ConfigError, DataError
from brainray.log import ProgressLines, log
from brainray.models.features import PIXELS
from brainray.mri.identity import content_hash, content_key
from brainray.orchestration.pretraining.features import FeatureStore, check_clusterable
from brainray.schema import ASSIGNED
from brainray.storage import Folder

FITTED_SUBSET = "fitted"
"""Subset of the slices to which a clusterer is fitted; the others are held out."""

_CELL_FORMAT = 7  # increase when the computation of a cell changes
_MIXTURE_STARTS = 3
_MAX_FEATURES = 4096  # PCA of this many takes 15 s and 0.7 GB


@dataclass(frozen=True)
class Cell:
    """One clustering of one feature set."""

    dataset: str
    feature: str
    seed: int
    clusterer: ClustererName
    pca_dim: int
    num_clusters: int
    eps_factor: float = 1.0
    linkage: str = "average"

    @property
    def file(self) -> str:
        """Name of its JSON file below the study's cells."""
        parts = [f"pca{self.pca_dim}", self.clusterer, f"k{self.num_clusters}"]
        if self.eps_factor != 1:
            parts.append(f"eps{self.eps_factor:g}")
        if self.linkage != "average":
            parts.append(self.linkage)
        return f"{self.dataset}/{self.feature}/{'-'.join(parts)}-seed{self.seed}.json"


@dataclass(frozen=True)
class Outcome:
    """A finished cell."""

    cell: Cell
    scores: Mapping[str, Mapping[str, float]]  # metrics of each subset of the slices
    notes: tuple[str, ...] = ()
    problem: str | None = None  # why there are no scores


@dataclass(frozen=True)
class Slices:
    """The slices of a data set, in the order of every feature store."""

    table: pa.Table  # sample_id, split, path, frame
    labels: NDArray[np.int64]  # (N,) class indices or UNLABELLED; for scoring only
    subsets: Mapping[str, NDArray[np.bool_]]  # (N,) by name: fitted, and held-out ones

    @property
    def fitted(self) -> NDArray[np.bool_]:
        return self.subsets[FITTED_SUBSET]

    @property
    def key(self) -> str:
        """Changes with the labels and subsets, on which scores depend."""
        parts = [self.labels, *(self.subsets[name] for name in sorted(self.subsets))]
        return content_key({"parts": [content_hash(part.tobytes()) for part in parts]})


@dataclass(frozen=True)
class Reduced:
    """Principal coordinates of every slice; components are fitted to the fitted slices."""

    coordinates: NDArray[np.float64]  # (N, D) for the largest requested D
    explained: NDArray[np.float64]  # (D,) shares of the total variance
    problem: str | None = None  # why there are no coordinates


def cluster_rows(
    x: NDArray[np.float64], cell: Cell, study: StudyConfig, clustering: ClusteringConfig
) -> Clustered:
    """Rows (N, D) by the cell's clusterer; adding one takes a function in clustering/ and a case
    here.
    """
    num_clusters = cell.num_clusters
    sampled = {"seed": cell.seed, "max_rows": study.max_quadratic_rows}
    match cell.clusterer:
        case "kmeans":
            max_iter = clustering.kmeans_max_iter
            return clusterers.kmeans(x, num_clusters, seed=cell.seed, max_iter=max_iter)
        case "gmm":
            mixture = build_mixture(
                clustering, num_clusters, seed=cell.seed, num_init=_MIXTURE_STARTS
            )
            return clusterers.gaussian_mixture(x, mixture)
        case "agglomerative":
            return clusterers.agglomerative(x, num_clusters, **sampled, linkage=cell.linkage)
        case "agglomerative_depth":
            return clusterers.agglomerative(
                x, num_clusters, **sampled, linkage=cell.linkage, depth=study.depth
            )
        case "dbscan":
            eps_factor = cell.eps_factor
            return clusterers.dbscan(x, study.min_samples, **sampled, eps_factor=eps_factor)
        case "spectral":
            return clusterers.spectral(x, num_clusters, **sampled)
        case "hdbscan":
            return clusterers.hdbscan(x, study.min_samples, **sampled)


def main_cells(config: Config, dataset: str) -> list[Cell]:
    """Every feature x PCA dimension x clusterer x seed."""
    study = config.study
    return [
        Cell(dataset, feature, seed, clusterer, pca_dim, config.clustering.num_clusters)
        for feature in study.features
        for pca_dim in study.pca_dims
        for clusterer in study.clusterers
        for seed in study.seeds
    ]


def sensitivity_cells(config: Config, dataset: str) -> list[Cell]:
    """Settings that the main grid keeps fixed, varied one at a time on one feature set."""
    settings, study = config.study.sensitivity, config.study
    feature = settings.feature or list(study.features)[-1]
    cells = []
    for seed in study.seeds:
        base = Cell(
            dataset, feature, seed, "kmeans", study.pca_dims[0], config.clustering.num_clusters
        )
        cells += [replace(base, num_clusters=k) for k in settings.num_clusters]
        if "dbscan" in study.clusterers:
            cells += [
                replace(base, clusterer="dbscan", eps_factor=factor)
                for factor in settings.eps_factors
            ]
        if "agglomerative" in study.clusterers:
            cells += [
                replace(base, clusterer="agglomerative", linkage=linkage)
                for linkage in settings.linkages
            ]
    return cells


def check_sizes(
    config: Config, dataset: str, num_fitted: int, num_features: dict[str, int]
) -> None:
    """Refuse a grid for which a data set or encoder is too small.

    Raises:
        ConfigError: names the key to lower.
    """
    study = config.study
    wanted = {
        "clustering.num_clusters": config.clustering.num_clusters,
        "study.candidate_num_clusters": max(study.candidate_num_clusters),
        "study.sensitivity.num_clusters": max(study.sensitivity.num_clusters, default=0),
    }
    if {"dbscan", "hdbscan"} & set(study.clusterers):
        wanted["study.min_samples"] = study.min_samples + 1
    if any(feature.lambda_cluster > 0 for feature in study.features.values()):
        wanted["clustering.pca_dim"] = config.clustering.pca_dim
    for key, needed in wanted.items():
        if needed > num_fitted:
            raise ConfigError(
                f"{key} needs {needed} slices, but {dataset} has {num_fitted} to fit: lower it "
                "or add slices"
            )
    for name, width in num_features.items():
        if width > _MAX_FEATURES:
            is_pixels = study.features[name].encoder == PIXELS
            remedy = "lower its image_size" if is_pixels else "choose another encoder"
            raise ConfigError(
                f"study.features.{name} has {width:,} features, but PCA takes at most "
                f"{_MAX_FEATURES:,}: {remedy}"
            )
    largest = max(study.pca_dims)
    for name, width in (("slices to fit", num_fitted), *num_features.items()):
        if largest > width:
            what = name if name == "slices to fit" else f"features of {name!r}"
            raise ConfigError(
                f"study.pca_dims needs {largest} components, but {dataset} has {width} {what}: "
                "lower it"
            )


class Grid:
    """Runs the unfinished cells of a study, a few at a time."""

    def __init__(
        self,
        config: Config,
        folder: Folder,
        stores: Mapping[tuple[str, str, int], FeatureStore],
        slices: Mapping[str, Slices],
    ) -> None:
        """
        Args:
            config: sections ``study`` and ``clustering``.
            folder: folder of the study.
            stores: features by data set, feature and seed.
            slices: slices by data set.
        """
        self._config = config
        self._folder = folder
        self._stores = stores
        self._slices = {name: ray.put(each) for name, each in slices.items()}
        self._slices_keys = {name: each.key for name, each in slices.items()}
        self._reduced: dict[str, ray.ObjectRef[Any]] = {}

    def store(self, cell: Cell) -> FeatureStore:
        """The features that the cell clusters."""
        return self._stores[cell.dataset, cell.feature, cell.seed]

    def reduced(self, cell: Cell) -> ray.ObjectRef[Any]:
        """The cell's features as `Reduced`, computed once per feature store."""
        store, study = self.store(cell), self._config.study
        if store.key not in self._reduced:
            is_encoded = study.features[cell.feature].encoder != PIXELS
            self._reduced[store.key] = _reduce.remote(
                store, self._slices[cell.dataset], max(study.pca_dims), is_encoded
            )
        return self._reduced[store.key]

    def run(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Outcomes in the order of the cells; finished cells are read from their files."""
        outcomes = {cell: found for cell in cells if (found := self._finished(cell))}
        distinct = dict.fromkeys(cells)
        waiting = deque(cell for cell in distinct if cell not in outcomes)
        num_before = len(outcomes)
        log(f"grid: {len(distinct)} cells, {num_before} of them already finished")
        running: dict[ray.ObjectRef[Any], Cell] = {}
        limit = self._config.study.max_concurrent_cells or int(
            ray.cluster_resources().get("CPU", 1)
        )
        progress = ProgressLines("finished", "cells")
        while waiting or running:
            while waiting and len(running) < limit:
                cell = waiting.popleft()
                task = _run_cell.remote(
                    cell,
                    self.key(cell),
                    self._config,
                    self._folder / layout.CELLS,
                    self._slices[cell.dataset],
                    self.reduced(cell),
                )
                running[task] = cell
            (done,), _ = ray.wait(list(running), num_returns=1)
            outcome = ray.get(done)
            outcomes[running.pop(done)] = outcome
            if outcome.problem:
                log(f"cell {outcome.cell.file}: {outcome.problem}")
            # Cells that were read tell nothing of the time that is left.
            progress.update(len(outcomes) - num_before, len(distinct) - num_before)
        return [outcomes[cell] for cell in cells]

    def key(self, cell: Cell) -> str:
        """Hash of everything on which the cell's metrics depend."""
        study, clustering = self._config.study, self._config.clustering
        settings = {
            "format": _CELL_FORMAT,
            "features": self.store(cell).key,
            "slices": self._slices_keys[cell.dataset],
            "cell": [cell.clusterer, cell.pca_dim, cell.num_clusters, cell.seed],
            "varied": [cell.eps_factor, cell.linkage],
            "study": [study.depth, study.min_samples, study.max_quadratic_rows],
            "mixture": [clustering.covariance_type, clustering.reg_covar],
            "limits": [clustering.kmeans_max_iter, clustering.gmm_max_iter, clustering.gmm_tol],
        }
        return content_key(settings)

    def _finished(self, cell: Cell) -> Outcome | None:
        cells = self._folder / layout.CELLS
        if not cells.exists(cell.file):
            return None
        saved = cells.read_json(cell.file)
        if saved["key"] != self.key(cell):
            return None
        return Outcome(cell, saved["scores"], tuple(saved["notes"]))


@ray.remote(num_cpus=1)
def _reduce(store: FeatureStore, slices: Slices, num_components: int, normalise: bool) -> Reduced:
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            table, features = store.read()
            rows = torch.tensor(features, dtype=torch.float64)
            if normalise:  # as in training: only directions matter
                rows = torch.nn.functional.normalize(rows)
                check_clusterable(rows.numpy(), f"{store.folder}, by direction")
        except DataError as error:  # one broken feature set must not stop the study of the others
            return Reduced(np.empty((0, 0)), np.empty(0), str(error))
        same = ["sample_id", "split", "frame"]  # paths may have changed since
        if not table.select(same).equals(slices.table.select(same)):
            problem = f"{store.folder} has features of other slices: delete it and submit again"
            return Reduced(np.empty((0, 0)), np.empty(0), problem)
        fitted = rows[torch.tensor(slices.fitted)]
        pca = PCA(num_components).fit(fitted)
        return Reduced(pca.transform(rows).numpy(), pca.explained_variance_ratio_.numpy())


@ray.remote(num_cpus=1)
def _run_cell(
    cell: Cell, key: str, config: Config, folder: Folder, slices: Slices, reduced: Reduced
) -> Outcome:
    """Cluster the fitted slices, assign the others, score and save the cell."""
    started = time.monotonic()
    if reduced.problem:
        return Outcome(cell, {}, problem=reduced.problem)
    x = reduced.coordinates[:, : cell.pca_dim]
    try:
        with threadpool_limits(1):
            torch.set_num_threads(1)
            found = cluster_rows(x[slices.fitted], cell, config.study, config.clustering)
            clusters = np.empty(len(x), dtype=np.int64)
            clusters[slices.fitted] = found.labels
            if not slices.fitted.all():
                clusters[~slices.fitted] = found.assign(x[~slices.fitted])
            scores = {
                name: score_partition(x[rows], clusters[rows], slices.labels[rows], cell.seed)
                for name, rows in slices.subsets.items()
                if rows.any()
            }
            for name in scores.keys() - {FITTED_SUBSET}:
                agreement = _agreement_of_neighbours(x, slices, slices.subsets[name])
                if agreement is not None:
                    scores[name]["neighbours"] = agreement
    except BrainrayError as error:
        return Outcome(cell, {}, problem=str(error))
    seconds = time.monotonic() - started
    table = slices.table.append_column(
        ASSIGNED.field("cluster"), pa.array(clusters.astype(np.int32), pa.int32())
    )
    folder.delete_file(cell.file, missing_ok=True)  # which would otherwise be of other clusters
    folder.write_table(cell.file.removesuffix(".json") + ".parquet", table)
    folder.write_json(
        cell.file,
        {
            "key": key,
            "scores": scores,
            "details": dict(found.details),
            "notes": list(found.notes),
            "seconds": seconds,
        },
    )
    return Outcome(cell, scores, found.notes)


def _agreement_of_neighbours(
    x: NDArray[np.float64], slices: Slices, rows: NDArray[np.bool_]
) -> float | None:
    fitted = slices.fitted
    return neighbour_agreement(x[fitted], slices.labels[fitted], x[rows], slices.labels[rows])


def assignments(folder: Folder, cell: Cell) -> NDArray[np.int64]:
    """(N,) clusters of a finished cell's slices, in the order of every feature store."""
    table = (folder / layout.CELLS).read_table(cell.file.removesuffix(".json") + ".parquet")
    return np.asarray(table["cluster"].to_numpy(), dtype=np.int64)


def outcome_row(outcome: Outcome, subset: str) -> dict[str, Any]:
    """One flat table row of a cell's scores on a subset."""
    cell = outcome.cell
    return {
        "dataset": cell.dataset,
        "features": cell.feature,
        "pca_dim": cell.pca_dim,
        "clusterer": cell.clusterer,
        "num_clusters_asked": cell.num_clusters,
        "eps_factor": cell.eps_factor,
        "linkage": cell.linkage,
        "seed": cell.seed,
        "slices": subset,
        **outcome.scores.get(subset, {}),
        "problem": outcome.problem,
    }

"""Collects what a study's page shows: `report/study_page.py` writes it."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from brainray import layout
from brainray.orchestration.provenance import about_software
from brainray.orchestration.run_report import software_rows
from brainray.orchestration.store import scan_images
from brainray.orchestration.study.data import StudiedSet
from brainray.orchestration.study.figures import DrawnSet
from brainray.orchestration.study.grid import FITTED_SUBSET
from brainray.orchestration.study.results import StudyResults
from brainray.orchestration.study.tables import StudyTables
from brainray.report.study_page import (
    MAX_SLICES,
    ClusterMap,
    ShownSet,
    shown_rows,
    write_study_page,
)
from brainray.report.table import Table
from brainray.schema import THUMBNAIL_SIDE

_SUBSETS = {
    FITTED_SUBSET: "fitted",
    "all": "held out",
    "clean": "held out, clean",
    "strict": "held out, strict",
}


def write_page(
    results: StudyResults,
    tables: StudyTables,
    drawn: Mapping[tuple[str, str], DrawnSet],
    counts: Mapping[str, float],
    figures: Iterable[str],
) -> None:
    """Write the study's ``report.html`` from its tables and figures, which have been written."""
    folder = results.folder
    limit = MAX_SLICES // len(results.sets)
    sets, coverage = [], []
    for name, studied in results.sets.items():
        maps = [each.map for (dataset, _), each in drawn.items() if dataset == name and each.map]
        if maps:
            sets.append(_shown_set(studied, maps, limit))
            num_slices = len(studied.slices.labels)
            coverage.append(f"{len(sets[-1].rows):,} of {num_slices:,} slices of {name}")
    recommended = _recommended(drawn)
    about = software_rows(about_software())
    for name, studied in results.sets.items():
        store = studied.store
        about[f"data set {name}"] = f"{store.folder} (data hash {store.manifest.data_hash})"
    write_study_page(
        folder,
        summary=[
            "Slices were clustered without labels. Labels, where there are any, only score: "
            f"{counts['num_cells']:,.0f} cells, {counts['num_failed_cells']:,.0f} of them failed.",
            "Recommended number of clusters: "
            + "; ".join(f"{dataset}, {feature}: {k}" for dataset, feature, k, _ in recommended.rows)
            + ".",
            "Nothing ranks feature sets without labels. Silhouettes compare clusterers of the same "
            "features and components, not features.",
            f"Maps show {', '.join(coverage) or 'nothing: there are too few slices'}.",
            *tables.notes,
        ],
        tables=[recommended, *tables.tables],
        sets=sets,
        figures={name: folder.read_bytes(f"{layout.FIGURES}/{name}") for name in figures},
        about=about,
        settings=folder.read_bytes(layout.CONFIG).decode(),
    )


def _shown_set(studied: StudiedSet, maps: Sequence[ClusterMap], limit: int) -> ShownSet:
    rows = shown_rows(maps, limit)
    slices = studied.slices
    shown = slices.table.take(rows).to_pylist()
    keys = [(row["split"], row["sample_id"]) for row in shown]
    images = dict(scan_images(studied.store.folder, set(keys), THUMBNAIL_SIDE))
    everything = {"all": np.full(len(rows), True)}
    subsets = {_SUBSETS[name]: mask[rows] for name, mask in slices.subsets.items()}
    return ShownSet(
        rows,
        paths=[row["path"] + (f" {row['frame']}" if row["frame"] else "") for row in shown],
        subsets=everything | subsets,
        images=[images[key] for key in keys],
        maps=maps,
    )


def _recommended(drawn: Mapping[tuple[str, str], DrawnSet]) -> Table:
    rows = []
    for (dataset, feature), each in drawn.items():
        found = each.recommendation
        rows.append([dataset, feature, str(found.num_clusters or "none"), "; ".join(found.reasons)])
    title = "Recommended number of clusters (without reading labels)"
    return Table(title, ["data set", "features", "K", "reasons"], rows, num_text_columns=4)

"""The results of a study as one self-contained, interactive HTML report, without labels."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainray.report.page import NUM_IMAGES, Contents, PageFigure, jpeg_uri, write_contents
from brainray.report.style import GREY, cluster_colour
from brainray.report.table import Table
from brainray.schema import NOISE
from brainray.storage import Folder

MAX_SLICES = 6000
"""Slices on the maps of a page, all data sets together."""

_MAX_CARDS = 12
_MAX_BYTES = 19_000_000  # of data and figures; Plotly has 5 MB more
_WIDE = 1000  # pixels


@dataclass(frozen=True)
class ClusterMap:
    """A t-SNE map of slices of a data set under one clustering."""

    title: str
    rows: list[int]  # (n,) of the data set's slices
    x: list[float]
    y: list[float]
    clusters: list[int]  # (n,) or NOISE
    distances: list[float | None]  # (n,) of fitted slices to the centroid of their cluster
    sizes: list[tuple[int, int]]
    """Clusters and the number of their fitted slices, on the map or not."""


@dataclass(frozen=True)
class ShownSet:
    """The slices of a data set that a page shows, with their maps."""

    rows: NDArray[np.int64]  # (n,) of the data set's slices
    paths: Sequence[str]
    subsets: Mapping[str, NDArray[np.bool_]]  # (n,) by name, the first has all
    images: Sequence[NDArray[np.uint8]]  # (S, S) each
    maps: Sequence[ClusterMap]


def shown_rows(maps: Sequence[ClusterMap], limit: int) -> NDArray[np.int64]:
    """At most ``limit`` of the slices on the maps of a data set, evenly spaced."""
    rows = np.unique(np.concatenate([np.asarray(each.rows, dtype=np.int64) for each in maps]))
    places = np.linspace(0, len(rows) - 1, min(limit, len(rows)))
    return np.asarray(rows[places.round().astype(np.int64)])


def write_study_page(
    folder: Folder,
    *,
    summary: Sequence[str],
    tables: Sequence[Table],
    sets: Sequence[ShownSet],
    figures: Mapping[str, bytes],
    about: Mapping[str, str],
    settings: str,
) -> None:
    """Write ``report.html`` of a study, below 25 MB.

    Args:
        folder: where the report is written; its name is that of the study.
        summary: paragraphs.
        tables: in their order.
        sets: the shown slices of each data set, at most ``MAX_SLICES`` in all.
        figures: PNG files by name. The smallest are embedded, as many as there is room for.
        about: provenance of the study: data sets, versions, command.
        settings: of the study, as YAML.
    """
    data = _data(sets)
    room = _MAX_BYTES - len(json.dumps(data))
    contents = Contents(
        title=f"brainray: study {folder.name}",
        summary=summary,
        tables=tables,
        quality=[],
        about=about,
        settings=settings,
        data=data,
        figures=_embedded(figures, room),
    )
    write_contents(folder, contents)


def _data(sets: Sequence[ShownSet]) -> dict[str, Any]:
    """Data for the report's script; a map has no place for slices of other data sets."""
    num_slices = sum(len(each.rows) for each in sets)
    slices: list[dict[str, Any]] = []
    maps: list[dict[str, Any]] = []
    for each in sets:
        places = {row: len(slices) + i for i, row in enumerate(each.rows.tolist())}
        maps += [_map(drawn, places, num_slices) for drawn in each.maps]
        slices += [
            {
                "path": path,
                "label": None,
                "subsets": [name for name, mask in each.subsets.items() if mask[row]],
                "image": jpeg_uri(image),
            }
            for row, (path, image) in enumerate(zip(each.paths, each.images, strict=True))
        ]
    clusters = sorted({k for drawn in maps for k in drawn["cluster"] if k is not None})
    return {
        "classes": [],
        "slices": slices,
        "maps": maps,
        "chosen": {"epoch": maps[0]["epoch"]} if maps else {},
        "clusters": clusters,
        "cluster_colours": [
            ("noise", GREY) if k == NOISE else (f"cluster {k}", cluster_colour(k)) for k in clusters
        ],
        "class_colours": [],
        "subsets": list(dict.fromkeys(name for each in sets for name in each.subsets)),
        "charts": [],
        "cards": [],
        "explained": [],
    }


def _map(drawn: ClusterMap, places: Mapping[int, int], num_slices: int) -> dict[str, Any]:
    """A map of the slices that have a place, and the cards of its clusters."""
    columns: dict[str, Sequence[float]]
    columns = {"x": drawn.x, "y": drawn.y, "cluster": drawn.clusters}
    placed: dict[str, list[float | None]] = {name: [None] * num_slices for name in columns}
    for name, values in columns.items():
        for row, value in zip(drawn.rows, values, strict=True):
            if row in places:
                placed[name][places[row]] = value
    return {"epoch": drawn.title, "cards": _cards(drawn, places)} | placed


def _cards(drawn: ClusterMap, places: Mapping[int, int]) -> list[dict[str, Any]]:
    """Of the largest clusters: the shown slices nearest to the centroid, and the farthest."""
    members: dict[int, list[tuple[float, int]]] = {}
    for row, cluster, distance in zip(drawn.rows, drawn.clusters, drawn.distances, strict=True):
        if distance is not None and row in places:
            members.setdefault(cluster, []).append((distance, places[row]))
    cards = []
    for cluster, size in sorted(sorted(drawn.sizes, key=lambda each: -each[1])[:_MAX_CARDS]):
        near = [place for _, place in sorted(members.get(cluster, []))]
        farthest = near[NUM_IMAGES:][::-1][:NUM_IMAGES]
        card = {"cluster": cluster, "size": size, "labels": []}
        cards.append(card | {"typical": near[:NUM_IMAGES], "borderline": farthest})
    return cards


def _embedded(figures: Mapping[str, bytes], room: int) -> list[PageFigure]:
    """The figures as data URIs; none for those that do not fit into ``room`` bytes."""
    uris: dict[str, str] = {}
    for name, image in sorted(figures.items(), key=lambda each: len(each[1])):
        uri = "data:image/png;base64," + base64.b64encode(image).decode()
        room -= len(uri)
        if room < 0:
            break
        uris[name] = uri
    return [
        PageFigure(name, uris.get(name), Image.open(io.BytesIO(image)).width > _WIDE)
        for name, image in figures.items()
    ]

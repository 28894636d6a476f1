"""The results of a run or an evaluation as one self-contained, interactive HTML report."""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment
from markupsafe import Markup
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from brainray import layout
from brainray.clustering.subtypes import find_subtypes
from brainray.config import EvaluationConfig
from brainray.report.comparison_table import comparison_table, verdict
from brainray.report.curves import ACCURACIES, AGREEMENT, LOSSES, SILHOUETTE
from brainray.report.figures import UNLABELLED_NAME, confusion_counts
from brainray.report.leakage_table import leakage_tables
from brainray.report.maps import SliceMap, map_sequence, shown
from brainray.report.results import results_tables
from brainray.report.style import GREY, class_colours, cluster_colour
from brainray.report.table import Table
from brainray.schema import THUMBNAIL_SIDE, History, Metrics, has_class_support, subset_masks
from brainray.storage import Folder

NUM_IMAGES = 6
"""Images of each kind on a cluster card."""

_MAX_LISTED = 100  # rows of a table that names slices or files
_JPEG_QUALITY = 60
_GLOW = 0.6  # opacity of the overlay where the activation is highest
_CHARTS = {
    "Loss and its unweighted terms": LOSSES,
    "Accuracy of the head": ACCURACIES["head"],
    "Accuracy of the clusters": ACCURACIES["cluster"],
    "Clustering": (*AGREEMENT, *SILHOUETTE),
}
_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}  # Plotly's names
_LEAST_RANGE = 0.1  # smallest range of an accuracy axis


@dataclass(frozen=True)
class Explained:
    """A slice as the encoder sees it, with the activation map of the predicted class."""

    path: str
    label: str | None
    predicted: str
    confidence: float
    image: NDArray[np.uint8]  # (S, S)
    activation: NDArray[np.float32]  # (S, S) in [0, 1]


@dataclass(frozen=True)
class PageFigure:
    """A PNG file, embedded unless there is no room."""

    name: str
    uri: str | None
    is_wide: bool


@dataclass(frozen=True)
class Contents:
    """What differs between the reports of a run, an evaluation and a study."""

    title: str
    summary: Sequence[str]
    tables: Sequence[Table]
    quality: Sequence[Table]  # of the data: duplicates, leakage, rejected files
    about: Mapping[str, str]
    settings: str
    data: Mapping[str, Any]
    figures: Sequence[PageFigure] = ()


def write_page(
    run: Folder,
    classes: Sequence[str],
    evaluation: EvaluationConfig,
    metrics: Metrics,
    about: Mapping[str, str],
    maps: Sequence[SliceMap],
    *,
    control: Metrics | None = None,
    explained: Sequence[Explained] = (),
    siblings: Mapping[str, pa.Table] | None = None,
) -> None:
    """Write ``report.html`` of a trained run, if it has predictions of the chosen epoch.

    Args:
        run: folder with the logs, the config and the predictions of the chosen epoch.
        classes: class names in the run's order.
        evaluation: settings, among them how many slices are shown.
        metrics: reported metrics, including those of `engine.compare` if there is a control.
        about: provenance of the run: versions, machine, command.
        maps: t-SNE maps of the slices that are shown (`maps.run_maps`).
        control: reported metrics of the control, shown next to the run's.
        explained: slices with activation maps.
        siblings: by name, predictions for the same slices by runs with other seeds, used to
            assess which clusters are stable.
    """
    chosen, whose = int(metrics["chosen_epoch"]), evaluation.control
    if not run.exists(layout.predictions_file(chosen)):
        return
    whole = run.read_table(layout.predictions_file(chosen))
    table = shown(whole, evaluation.tsne_max_slices)
    history = run.read_json_lines(layout.METRICS)
    data = _data(table, whole, classes, chosen, explained) | {
        "maps": _maps(maps),
        "charts": _charts(history),
        "subtypes": _subtypes(whole, siblings or {}),
    }
    compared = comparison_table(metrics, whose)
    contents = Contents(
        title=f"brainray: {run.name}",
        summary=[
            *_summary(metrics, chosen, len(history)),
            *filter(None, [verdict(metrics, whose)]),
            _coverage_note(table, whole),
        ],
        tables=[
            *results_tables(
                metrics, classes, {} if control is None else {f"control ({whose})": control}
            ),
            *([] if compared is None else [compared]),
            *_timings(metrics),
        ],
        quality=_quality(run),
        about=about,
        settings=run.read_bytes(layout.CONFIG).decode(),
        data=data,
    )
    write_contents(run, contents)


def write_evaluation_page(
    folder: Folder,
    name: str,
    predictions: pa.Table,
    *,
    rejected: pa.Table,
    classes: Sequence[str],
    evaluation: EvaluationConfig,
    metrics: Metrics,
    about: Mapping[str, str],
    settings: str,
    explained: Sequence[Explained] = (),
    num_seen: Mapping[str, int] | None = None,
) -> None:
    """Write ``report.html`` of an evaluation.

    Args:
        folder: where the report is written.
        name: of the evaluation.
        predictions: ``PREDICTIONS`` rows.
        rejected: ``REJECTED`` rows.
        classes: class names of the predicting run, in its order.
        evaluation: settings, among them how many slices are mapped.
        metrics: reported metrics, including the ``epoch`` of the model.
        about: provenance of the evaluation: run, source, versions, command.
        settings: of the evaluation, as YAML.
        explained: slices with activation maps.
        num_seen: by level, the number of slices with a duplicate that the run has seen; None if
            unknown.
    """
    table = shown(predictions, evaluation.tsne_max_slices)
    epoch = int(metrics["epoch"])
    data = _data(table, predictions, classes, epoch, explained) | {
        "maps": _maps(map_sequence({epoch: table})),
        "charts": [],
        "subtypes": _subtypes(predictions, {}),
    }
    contents = Contents(
        title=f"brainray: evaluation {name}",
        summary=_evaluation_summary(metrics, _coverage_note(table, predictions)),
        tables=results_tables(metrics, classes),
        quality=[
            *([] if num_seen is None else [_seen_slices(num_seen)]),
            *([_rejected_files(rejected)] if rejected.num_rows else []),
        ],
        about=about,
        settings=settings,
        data=data,
    )
    write_contents(folder, contents)


def write_contents(folder: Folder, contents: Contents) -> None:
    """Write them as ``report.html``. Sections of which there are no data are left out."""
    template = resources.files("brainray.report").joinpath("page.html").read_text("utf-8")
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    html = page.render(
        contents=contents,
        plotly=Markup(get_plotlyjs()),
        # A "<" in the data must not end the script element.
        data=Markup(json.dumps(contents.data, allow_nan=False).replace("<", "\\u003c")),
    )
    folder.write_bytes(layout.REPORT, html.encode())


def _data(
    table: pa.Table,
    whole: pa.Table,
    classes: Sequence[str],
    epoch: int,
    explained: Sequence[Explained],
) -> dict[str, Any]:
    """Data of the shown slices, a sample of the whole, for the report's script."""
    subsets = subset_masks(table)
    responsibilities = np.stack(table["responsibilities"].to_numpy()).astype(np.float64)
    num_slices, num_clusters = responsibilities.shape
    own = responsibilities[np.arange(num_slices), table["cluster"].to_numpy()]
    return {
        "classes": list(classes),
        "unlabelled": UNLABELLED_NAME,
        # Pairs, since a script puts the keys of an object that are integers first.
        "class_colours": [*class_colours(classes).items(), (UNLABELLED_NAME, GREY)],
        "clusters": list(range(num_clusters)),
        "cluster_colours": [(f"cluster {k}", cluster_colour(k)) for k in range(num_clusters)],
        "subsets": list(subsets),
        "slices": _slices(table, subsets),
        "chosen": {"epoch": epoch, "responsibility": own.round(4).tolist()} | _predicted(table),
        "cards": _cards(table, whole, own, num_clusters),
        "confusion": _confusion(whole, classes),
        "explained": [_blended(slice_) for slice_ in explained],
    }


def _blended(explained: Explained) -> dict[str, Any]:
    """The slice, and the slice with its activation map as an overlay."""
    grey = np.repeat(explained.image[:, :, None], 3, axis=2).astype(np.float32)
    # Brightness rises with the activation, so that reading the map needs no colour vision.
    glow = 255 * colormaps["inferno"](explained.activation)[:, :, :3]
    weight = _GLOW * explained.activation[:, :, None]
    blended = (1 - weight) * grey + weight * glow
    return {
        "path": explained.path,
        "label": explained.label,
        "predicted": explained.predicted,
        "confidence": round(explained.confidence, 3),
        "image": jpeg_uri(explained.image),
        "blended": jpeg_uri(blended.round().astype(np.uint8)),
    }


def _slices(table: pa.Table, subsets: Mapping[str, NDArray[np.bool_]]) -> list[dict[str, Any]]:
    return [
        {
            "path": path + (f" {frame}" if frame else ""),
            "label": label,
            "subsets": [name for name, mask in subsets.items() if mask[row]],
            "image": _data_uri(thumbnail),
        }
        for row, (path, frame, label, thumbnail) in enumerate(
            zip(
                *(table[name].to_pylist() for name in ("path", "frame", "label", "thumbnail")),
                strict=True,
            )
        )
    ]


def _data_uri(thumbnail: bytes) -> str:
    pixels = np.frombuffer(thumbnail, dtype=np.uint8).reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return jpeg_uri(pixels)


def jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W) grey or (H, W, 3) RGB as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _confusion(table: pa.Table, classes: Sequence[str]) -> dict[str, dict[str, list[list[int]]]]:
    """Confusion counts (C, C) by subset, if it is large enough for metrics by class, and predictor
    (column).
    """
    found = {}
    for subset, mask in subset_masks(table).items():
        rows = table.filter(pc.and_(pa.array(mask), pc.is_valid(table["label"])))
        labels = rows["label"].to_pylist()
        if labels and has_class_support(labels, subset):
            found[subset] = {
                column: confusion_counts(labels, rows[column].to_pylist(), classes).tolist()
                for column in ("head", "cluster_class")
            }
    return found


def _predicted(table: pa.Table) -> dict[str, list[Any]]:
    columns = {name: table[name].to_pylist() for name in ("head", "cluster_class", "cluster")}
    columns["confidence"] = [round(value, 4) for value in table["confidence"].to_pylist()]
    return columns


def _maps(maps: Sequence[SliceMap]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": each.epoch,
            # As float64, in which two decimals stay two decimals.
            "x": each.points[:, 0].astype(np.float64).round(2).tolist(),
            "y": each.points[:, 1].astype(np.float64).round(2).tolist(),
        }
        | _predicted(each.rows)
        for each in maps
    ]


def _charts(history: History) -> list[dict[str, Any]]:
    charts = []
    for title, curves in _CHARTS.items():
        drawn: list[dict[str, Any]] = [
            {
                "name": curve.label,
                "values": [epoch.get(curve.metric) for epoch in history],
                "colour": curve.colour,
                "dash": _DASHES[curve.line],
            }
            for curve in curves
            if any(curve.metric in epoch for epoch in history)
        ]
        if drawn:
            epochs = [int(epoch["epoch"]) for epoch in history]
            chart = {"title": title, "epochs": epochs, "curves": drawn}
            if title.startswith("Accuracy"):
                chart["range"] = _range_of(curve["values"] for curve in drawn)
            charts.append(chart)
    return charts


def _range_of(curves: Iterable[Sequence[float | None]]) -> list[float]:
    """Range of an accuracy axis: that of the values with a margin, at most about 0 to 1."""
    values = [value for curve in curves for value in curve if value is not None]
    room = max(_LEAST_RANGE - (max(values) - min(values)), 0.02) / 2
    return [max(min(values) - room, -0.02), min(max(values) + room, 1.02)]


def _cards(
    table: pa.Table, whole: pa.Table, responsibilities: NDArray[np.floating], num_clusters: int
) -> list[dict[str, Any]]:
    """Size and labels of each cluster, and typical and borderline ones of the shown slices."""
    likelihood = np.asarray(table["log_likelihood"].to_numpy())
    clusters = np.asarray(table["cluster"].to_numpy())
    cards = []
    for k in range(num_clusters):
        members = whole.filter(pc.equal(whole["cluster"], k))
        if members.num_rows == 0:
            continue
        rows = np.flatnonzero(clusters == k)
        sure = responsibilities[rows]
        typical = rows[np.lexsort((-likelihood[rows], -np.round(sure, 3)))]
        counts = Counter(label or UNLABELLED_NAME for label in members["label"].to_pylist())
        cards.append(
            {
                "cluster": k,
                "class": members["cluster_class"][0].as_py(),
                "size": members.num_rows,
                "labels": counts.most_common(),
                "typical": typical[:NUM_IMAGES].tolist(),
                "borderline": rows[np.argsort(sure, kind="stable")][:NUM_IMAGES].tolist(),
            }
        )
    return cards


def _subtypes(table: pa.Table, siblings: Mapping[str, pa.Table]) -> list[dict[str, Any]]:
    """Clusters that share a class, with their stability across runs."""
    ids = table["sample_id"].to_pylist()  # not paths: files may be renamed between runs
    others = []
    for sibling in siblings.values():
        columns = (sibling[name].to_pylist() for name in ("sample_id", "cluster"))
        cluster = dict(zip(*columns, strict=True))
        others.append(np.array([cluster[identity] for identity in ids]))
    found = find_subtypes(
        np.asarray(table["cluster"].to_numpy()), table["cluster_class"].to_pylist(), others
    )
    return [
        {
            "class": kind.name,
            "ari": kind.ari,
            "runs": list(siblings),
            "clusters": [
                {
                    "cluster": part.cluster,
                    "size": part.size,
                    "stability": part.stability,
                    "stable": part.is_stable,
                }
                for part in kind.subtypes
            ],
        }
        for kind in found
    ]


def _percent(metrics: Metrics, name: str) -> str:
    value = metrics.get(name)
    return "an unknown share" if value is None else f"{100 * value:.1f} %"


def _coverage_note(shown: pa.Table, whole: pa.Table) -> str:
    if shown.num_rows == whole.num_rows:
        return f"All {shown.num_rows:,} slices are shown below."
    return (
        f"The map and the images show {shown.num_rows:,} of {whole.num_rows:,} slices, sampled "
        "evenly; tables, confusion matrices and sizes cover all of them. Raise "
        "evaluation.tsne_max_slices to show more."
    )


def _summary(metrics: Metrics, chosen: int, num_epochs: int) -> list[str]:
    return [
        "An encoder was trained on brain MRI slices, some or all of them labelled. The embeddings "
        "of all training slices were clustered after every epoch.",
        f"Epoch {chosen} of {num_epochs} was chosen on held-out labelled slices. "
        + _scores(metrics),
    ]


def _evaluation_summary(metrics: Metrics, shown: str) -> list[str]:
    return [
        f"The encoder of epoch {int(metrics['epoch'])} predicted these slices. Their files were "
        "preprocessed with the settings used in training. " + _scores(metrics, "slices"),
        f"{shown} Left out: {', '.join(_left_out(metrics)) or 'nothing'}.",
    ]


_LEFT_OUT = {
    "num_rejected": "rejected",
    "num_without_class": "without a class",
    "num_slices_without_class": "slices without a class in other files",
    "num_outside_of_test": "outside the test split",
    "num_ignored_files": "of other types",
}


def _left_out(metrics: Metrics) -> list[str]:
    return [f"{metrics[name]:,.0f} {what}" for name, what in _LEFT_OUT.items() if metrics.get(name)]


def _scores(metrics: Metrics, slices: str = "test slices") -> str:
    if metrics.get("test/all/num_slices") == 0:
        return f"None of the {slices} has a label: predictions are not scored."
    share = _percent(metrics, "test/all/head/accuracy")
    text = f"The head classifies {share} of all labelled {slices}"
    clusters = f"the clusters {_percent(metrics, 'test/all/cluster/accuracy')}"
    if "test/clean/head/accuracy" not in metrics:
        known = metrics.get("test/clean/num_slices")
        why = "Which slices are clean (no upright copy in the data that the run saw) is unknown."
        if known == 0:
            why = "No labelled slice is clean: the run saw a copy of each."
        return f"{text} correctly, {clusters}. {why}"
    return (
        f"{text} correctly and {_percent(metrics, 'test/clean/head/accuracy')} of the clean ones, "
        f"which have no upright copy in the data that the run saw; {clusters} and "
        f"{_percent(metrics, 'test/clean/cluster/accuracy')}. Copying the label of the most "
        f"similar thumbnail gets {_percent(metrics, 'test/clean/thumbnail_1nn/accuracy')} of the "
        "clean ones right."
    )


def _timings(metrics: Metrics) -> list[Table]:
    """Mean seconds of each part of an epoch."""
    parts = {
        name.removeprefix("time/").removesuffix("_s").replace("_", " "): value
        for name, value in metrics.items()
        if name.startswith("time/") and name.endswith("_s") and name != "time/images_per_s"
    }
    if not parts:
        return []
    speed = metrics.get("time/images_per_s")
    header = ["", *parts] + ([] if speed is None else ["images/s in training"])
    row = ["seconds", *(f"{value:.1f}" for value in parts.values())]
    return [Table("Time per epoch", header, [row + ([] if speed is None else [f"{speed:.0f}"])])]


def _quality(run: Folder) -> list[Table]:
    """Duplicates, test subsets and rejected files, as recorded by the image store."""
    folder = run / layout.DATASET
    tables = []
    if folder.exists(layout.LEAKAGE):
        leakage = folder.read_json(layout.LEAKAGE)
        tables += leakage_tables(leakage)
        if leakage["label_conflicts"]:
            tables.append(_conflicts(leakage["label_conflicts"]))
    if folder.exists(layout.MANIFEST):
        reasons = folder.read_json(layout.MANIFEST)["rejected_reasons"]
        if reasons:
            counted = [[reason, f"{count:,}"] for reason, count in reasons.items()]
            tables.append(Table("Rejected", ["reason", "files or slices"], counted))
    return tables


def _conflicts(slices: Sequence[Mapping[str, Any]]) -> Table:
    """Slices whose copies have another label, group by group."""
    names = ("group", "path", "frame", "label")
    rows = sorted([slice_.get(name) or "" for name in names] for slice_ in slices)
    title = f"Copies with different labels ({len(slices):,}{_more(len(slices))})"
    cells = [[group[:8], *others] for group, *others in rows[:_MAX_LISTED]]
    return Table(title, ["group", "path", "frame", "label"], cells, num_text_columns=4)


def _more(count: int) -> str:
    return "" if count <= _MAX_LISTED else f", first {_MAX_LISTED} shown"


def _seen_slices(num_seen: Mapping[str, int]) -> Table:
    rows = [[level, f"{count:,}"] for level, count in num_seen.items()]
    return Table("Slices with a match in the data that the run saw", ["level", "slices"], rows)


def _rejected_files(rejected: pa.Table) -> Table:
    columns = ["path", "frame", "reason", "detail"]
    rows = rejected.slice(0, _MAX_LISTED).select(columns).to_pylist()
    title = f"Rejected ({rejected.num_rows:,}{_more(rejected.num_rows)})"
    cells = [[row[column] or "" for column in columns] for row in rows]
    return Table(title, ["path", "frame", "reason", ""], cells, num_text_columns=4)

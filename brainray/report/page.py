"""A run's results as one self-contained interactive HTML page, without network."""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from brainray import layout
from brainray.config import EvaluationConfig
from brainray.report.leakage_table import LEVEL_COLUMNS, leakage_counts, subset_counts
from brainray.report.style import BLUE, GREEN, GREY, VERMILLION, class_colours, cluster_colour
from brainray.report.tsne import MIN_SLICES, tsne_sequence
from brainray.schema import SUBSETS, THUMBNAIL_SIDE
from brainray.storage import Folder

Metrics = Mapping[str, float]

_NUM_IMAGES = 6  # of each kind on a cluster's card
_THUMBNAIL_QUALITY = 60
_SEED = 0
_PREDICTORS = {"head": "head", "cluster": "clusters", "thumbnail_1nn": "nearest thumbnail"}
_CHARTS = {
    "Loss": {
        "total": "train/loss/total",
        "cross entropy": "train/loss/ce",
        "clustering": "train/loss/cluster",
    },
    "Accuracy of the head": {
        "validation": "validation/head/accuracy",
        "test, all": "test/all/head/accuracy",
        "test, clean": "test/clean/head/accuracy",
    },
    "Accuracy of the clusters": {
        "validation": "validation/cluster/accuracy",
        "test, all": "test/all/cluster/accuracy",
        "test, clean": "test/clean/cluster/accuracy",
    },
    "Clustering": {
        "NMI with the last epoch": "cluster/nmi_previous",
        "NMI with the classes": "cluster/nmi",
        "silhouette": "cluster/silhouette",
    },
}
_LINES = ((BLUE, "solid"), (VERMILLION, "dash"), (GREEN, "dot"), (GREY, "dashdot"))


@dataclass(frozen=True)
class Table:
    """Text cells with a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    run: Folder,
    classes: Sequence[str],
    evaluation: EvaluationConfig,
    metrics: Metrics,
    about: Mapping[str, str],
    control: Metrics | None = None,
) -> str | None:
    """Write ``report.html`` of a trained run; its name, or None where there is nothing to show.

    Args:
        run: folder with the logs, the config and the predictions of the chosen epoch.
        classes: of the run, in its order.
        evaluation: which epochs are mapped, and with how many slices.
        metrics: the reported figures.
        about: what made the run: versions, machine, command.
        control: the reported figures of the control, to stand beside the run's.
    """
    chosen = int(metrics["chosen_epoch"])
    if not run.exists(layout.predictions_file(chosen)):
        return None
    table = run.read_table(layout.predictions_file(chosen)).slice(0, evaluation.tsne_max_slices)
    history = run.read_json_lines(layout.METRICS)
    subsets = _subsets(table)
    num_clusters = len(table["responsibilities"][0].as_py())
    data = {
        "classes": list(classes),
        "class_colours": class_colours(classes) | {"no label": GREY},
        "cluster_names": [f"cluster {k}" for k in range(num_clusters)],
        "cluster_colours": {f"cluster {k}": cluster_colour(k) for k in range(num_clusters)},
        "subsets": list(subsets),
        "slices": _slices(table, subsets),
        "chosen": {"epoch": chosen} | _predicted(table),
        "maps": _maps(run, table, evaluation, chosen),
        "charts": _charts(history),
        "cards": _cards(table, num_clusters),
    }
    name = str(run).rpartition("/")[2]
    template = resources.files("brainray.report").joinpath("page.html").read_text("utf-8")
    page = Environment(autoescape=True).from_string(template)
    html = page.render(
        title=f"brainray: {name}",
        summary=_summary(metrics, chosen, len(history), table.num_rows),
        tables=_tables(metrics, classes, control),
        leakage=_leakage(run),
        about=about,
        settings=run.read_bytes(layout.CONFIG).decode(),
        plotly=Markup(get_plotlyjs()),
        # Nothing in it may end the script element.
        data=Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
    )
    run.write_bytes(layout.REPORT, html.encode())
    return layout.REPORT


def _subsets(table: pa.Table) -> dict[str, NDArray[np.bool_]]:
    found = {"all": np.ones(table.num_rows, dtype=np.bool_)}
    for name in SUBSETS[1:]:
        if table[name].null_count == 0:
            found[name] = np.asarray(table[name].to_numpy(zero_copy_only=False), dtype=np.bool_)
    return found


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
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _predicted(table: pa.Table) -> dict[str, list[Any]]:
    columns = {name: table[name].to_pylist() for name in ("head", "cluster_class", "cluster")}
    columns["confidence"] = [round(value, 4) for value in table["confidence"].to_pylist()]
    return columns


def _maps(
    run: Folder, chosen_table: pa.Table, evaluation: EvaluationConfig, chosen: int
) -> list[dict[str, Any]]:
    """A map of the same slices after each epoch whose predictions were kept."""
    if chosen_table.num_rows < MIN_SLICES:
        return []
    epochs = sorted(
        epoch
        for epoch in {*evaluation.tsne_epochs, chosen}
        if run.exists(layout.predictions_file(epoch))
    )
    keys = _keys(chosen_table)
    tables = []
    for epoch in epochs:
        table = run.read_table(layout.predictions_file(epoch))
        place = {key: row for row, key in enumerate(_keys(table))}
        tables.append(table.take([place[key] for key in keys]))
    points = tsne_sequence([np.stack(table["embedding"].to_numpy()) for table in tables], _SEED)
    return [
        {
            "epoch": epoch,
            "rows": list(range(table.num_rows)),
            "x": np.round(xy[:, 0], 2).tolist(),
            "y": np.round(xy[:, 1], 2).tolist(),
        }
        | _predicted(table)
        for epoch, table, xy in zip(epochs, tables, points, strict=True)
    ]


def _keys(table: pa.Table) -> list[tuple[str, ...]]:
    return list(zip(*(table[name].to_pylist() for name in ("sample_id", "path")), strict=True))


def _charts(history: Sequence[Metrics]) -> list[dict[str, Any]]:
    charts = []
    for title, curves in _CHARTS.items():
        logged = {
            label: [epoch.get(metric) for epoch in history] for label, metric in curves.items()
        }
        drawn = [
            {"name": label, "values": values, "colour": colour, "dash": dash}
            for (label, values), (colour, dash) in zip(logged.items(), _LINES, strict=False)
            if any(value is not None for value in values)
        ]
        if drawn:
            epochs = [int(epoch["epoch"]) for epoch in history]
            charts.append({"title": title, "epochs": epochs, "curves": drawn})
    return charts


def _cards(table: pa.Table, num_clusters: int) -> list[dict[str, Any]]:
    """What each cluster holds: sure members first, then those that nearly went elsewhere."""
    responsibilities = np.stack(table["responsibilities"].to_numpy())
    likelihood = np.asarray(table["log_likelihood"].to_numpy())
    clusters = np.asarray(table["cluster"].to_numpy())
    labels, classes = table["label"].to_pylist(), table["cluster_class"].to_pylist()
    cards = []
    for k in range(num_clusters):
        rows = np.flatnonzero(clusters == k)
        if len(rows) == 0:
            continue
        sure = responsibilities[rows, k]
        typical = rows[np.lexsort((-likelihood[rows], -np.round(sure, 3)))]
        counts = Counter(labels[row] or "no label" for row in rows.tolist())
        cards.append(
            {
                "cluster": k,
                "class": classes[int(rows[0])],
                "size": len(rows),
                "labels": dict(counts.most_common()),
                "typical": typical[:_NUM_IMAGES].tolist(),
                "borderline": rows[np.argsort(sure, kind="stable")][:_NUM_IMAGES].tolist(),
            }
        )
    return cards


def _summary(metrics: Metrics, chosen: int, num_epochs: int, num_shown: int) -> list[str]:
    def percent(name: str) -> str:
        value = metrics.get(name)
        return "an unknown share" if value is None else f"{100 * value:.1f} %"

    return [
        "An encoder was trained on brain MRI slices of which few have a label. After every epoch "
        "the embeddings of all training slices were clustered, and the clusters guided the next.",
        f"Epoch {chosen} of {num_epochs} was chosen on labelled slices held out for that. Its head "
        f"gets {percent('test/all/head/accuracy')} of all test slices right, and "
        f"{percent('test/clean/head/accuracy')} of the clean ones, which have no copy among what "
        f"the run saw; its clusters {percent('test/all/cluster/accuracy')} and "
        f"{percent('test/clean/cluster/accuracy')}. Looking up the most similar labelled thumbnail "
        f"gets {percent('test/clean/thumbnail_1nn/accuracy')} of the clean ones.",
        f"{num_shown:,} test slices are shown below.",
    ]


def _tables(metrics: Metrics, classes: Sequence[str], control: Metrics | None) -> list[Table]:
    runs = {"this run": metrics} | ({} if control is None else {"control": control})
    accuracy = [
        [f"{whose}, {title}"]
        + [_with_interval(values, f"test/{subset}/{predictor}/accuracy") for subset in SUBSETS]
        + [_figure(values, f"test/all_as_clean/{predictor}/accuracy")]
        for whose, values in runs.items()
        for predictor, title in _PREDICTORS.items()
    ]
    by_class = [
        [f"{whose}, {_PREDICTORS[predictor]}, {subset}"]
        + [
            " / ".join(
                _figure(values, f"test/{subset}/{predictor}/{figure}/{name}")
                for figure in ("precision", "recall", "f1")
            )
            for name in classes
        ]
        for whose, values in runs.items()
        for predictor in ("head", "cluster")
        for subset in ("all", "clean")
    ]
    clusters = [
        [f"{whose}, {subset}"]
        + [
            _figure(values, f"test/{subset}/cluster/{name}")
            for name in ("silhouette", "nmi", "ari", "fmi")
        ]
        for whose, values in runs.items()
        for subset in ("all", "clean")
    ]
    return [
        Table("Accuracy [95 % interval]", ["", *SUBSETS, "all, at clean's class mix"], accuracy),
        Table("Precision / recall / F1", ["", *classes], by_class),
        Table("Clusters", ["", "silhouette", "NMI", "ARI", "FMI"], clusters),
    ]


def _figure(metrics: Metrics, name: str) -> str:
    value = metrics.get(name)
    return "–" if value is None else f"{value:.3f}"


def _with_interval(metrics: Metrics, name: str) -> str:
    low, high = (_figure(metrics, f"{name}_{side}") for side in ("low", "high"))
    return f"{_figure(metrics, name)} [{low}, {high}]" if "–" not in (low, high) else "–"


def _leakage(run: Folder) -> list[Table]:
    folder = run / layout.DATASET
    if not folder.exists(layout.LEAKAGE):
        return []
    leakage = folder.read_json(layout.LEAKAGE)
    header, rows = subset_counts(leakage)
    return [
        Table("Copies", LEVEL_COLUMNS, leakage_counts(leakage)),
        Table("Test slices", header, rows),
    ]

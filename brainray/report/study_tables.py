"""A study's tables: means and standard deviations over seeds, as Markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from brainray.report.cells import MISSING
from brainray.report.table import Table

METRICS = ("silhouette", "ari", "nmi", "fmi", "accuracy")
_FEATURE_METRIC = "neighbours"
_COUNTS = ("num_clusters", "noise_share")
_TITLES = {
    "silhouette": "silhouette",
    "ari": "ARI",
    "nmi": "NMI",
    "fmi": "FMI",
    "accuracy": "clustering accuracy",
    "num_clusters": "clusters",
    "noise_share": "noise",
}
_METHOD = ("features", "clusterer", "pca_dim")
_ROUNDING = 1e-9

Row = Mapping[str, Any]


def average_over_seeds(rows: Iterable[Row], by: Sequence[str]) -> list[dict[str, Any]]:
    """One row per combination of ``by``, in the order of first appearance.

    A metric becomes ``NAME_mean`` and ``NAME_std`` (sample standard deviation; none for one seed)
    over the rows that have it. Their number is ``num_seeds``, or ``NAME_seeds`` if it is smaller.
    A metric that no row has is left out.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    averaged = []
    for values, members in groups.items():
        result: dict[str, Any] = dict(zip(by, values, strict=True))
        result["num_seeds"] = sum(row.get("problem") is None for row in members)
        for name in (*_COUNTS, *METRICS, _FEATURE_METRIC):
            found = [float(row[name]) for row in members if row.get(name) is not None]
            if found:
                result[f"{name}_mean"] = fmean(found)
            if len(found) > 1:
                result[f"{name}_std"] = stdev(found)
            if 0 < len(found) < result["num_seeds"]:
                result[f"{name}_seeds"] = len(found)
        averaged.append(result)
    return averaged


def methods_table(title: str, averaged: Sequence[Row]) -> Table:
    """Metrics of every method on one subset of one data set, in the order of the grid."""
    shown = [name for name in METRICS if any(f"{name}_mean" in row for row in averaged)]
    columns = (*_COUNTS, *shown)
    header = ["features", "clusterer", "PCA", "seeds", *(_TITLES[name] for name in columns)]
    rows = [
        [
            row["features"],
            row["clusterer"],
            str(row["pca_dim"]),
            str(row["num_seeds"]),
            *(_cell(row, name) for name in columns),
        ]
        for row in averaged
    ]
    return Table(title, header, rows, num_text_columns=2)


def features_table(title: str, averaged: Sequence[Row]) -> Table | None:
    """Label agreement of held-out slices with their nearest fitted slices, by features and subset.

    This metric depends on the features only, so the rows of all clusterers repeat it. None without
    labels or held-out slices.
    """
    measured = [row for row in averaged if f"{_FEATURE_METRIC}_mean" in row]
    if not measured:
        return None
    subsets = list(dict.fromkeys(row["slices"] for row in measured))
    features: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in measured:
        found = features.setdefault((row["features"], row["pca_dim"]), {})
        found.setdefault(row["slices"], row)
    rows = [
        [name, str(pca_dim), *(_cell(found.get(subset, {}), _FEATURE_METRIC) for subset in subsets)]
        for (name, pca_dim), found in features.items()
    ]
    return Table(title, ["features", "PCA", *subsets], rows)


def datasets_table(title: str, averaged: Sequence[Row], metric: str) -> Table | None:
    """One metric of every method by data set and on average; None if no row has the metric."""
    datasets = _datasets_with(metric, averaged)
    if not datasets:
        return None
    rows = [
        [
            *map(str, each.method),
            *(_cell(each.by_dataset.get(name, {}), metric) for name in datasets),
            MISSING if each.mean is None else f"{each.mean:.3f}",
        ]
        for each in _compared(datasets, averaged, metric)
    ]
    header = ["features", "clusterer", "PCA", *datasets, f"mean {_TITLES[metric]}"]
    return Table(title, header, rows, num_text_columns=2)


def datasets_rows(averaged: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """The numbers of `datasets_table`: ``DATASET_mean``, ``DATASET_std`` and ``mean``."""
    datasets = _datasets_with(metric, averaged)
    return [
        dict(zip(_METHOD, each.method, strict=True))
        | {"metric": metric}
        | {
            f"{name}_{statistic}": each.by_dataset.get(name, {}).get(f"{metric}_{statistic}")
            for name in datasets
            for statistic in ("mean", "std")
        }
        | {"mean": each.mean}
        for each in _compared(datasets, averaged, metric)
    ]


def _datasets_with(metric: str, averaged: Sequence[Row]) -> list[str]:
    """Those with the metric: without labels there is none that compares with them."""
    return list(dict.fromkeys(row["dataset"] for row in averaged if f"{metric}_mean" in row))


@dataclass(frozen=True)
class _Compared:
    """A method on several data sets."""

    method: tuple[Any, ...]  # values of _METHOD
    by_dataset: Mapping[str, Row]
    mean: float | None  # None if a data set lacks the metric: it would not be comparable


def _compared(datasets: Sequence[str], averaged: Sequence[Row], metric: str) -> list[_Compared]:
    """Every method on these data sets; none if there are no data sets."""
    methods: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in averaged if datasets else ():
        method = tuple(row[name] for name in _METHOD)
        methods.setdefault(method, {})[row["dataset"]] = row
    compared = []
    for method, by_dataset in methods.items():
        found = [by_dataset.get(name, {}).get(f"{metric}_mean") for name in datasets]
        means = [mean for mean in found if mean is not None]
        is_complete = len(means) == len(datasets)
        compared.append(_Compared(method, by_dataset, fmean(means) if is_complete else None))
    return compared


def csv_text(rows: Sequence[Row]) -> str:
    """All rows with the union of their columns; missing values are empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _cell(row: Row, name: str) -> str:
    mean, std = row.get(f"{name}_mean"), row.get(f"{name}_std")
    if mean is None:
        return MISSING
    if name == "num_clusters":
        return f"{mean:.1f} ± {std:.1f}" if std else f"{mean:.0f}"
    if name == "noise_share":
        return f"{mean:.1%}"
    varies = std is not None and std > _ROUNDING  # a clusterer may not depend on the seed
    formatted = f"{mean:.3f} ± {std:.3f}" if varies else f"{mean:.3f}"
    fewer = row.get(f"{name}_seeds")  # such as DBSCAN with a single cluster
    return formatted if fewer is None else f"{formatted} ({fewer} of {row['num_seeds']})"

"""The reported metrics as tables, for a run's report, its log and its model card."""

from collections.abc import Callable, Mapping, Sequence

from brainray.report.cells import MISSING, PREDICTOR_TITLES, count, decimal, with_interval
from brainray.report.table import Table
from brainray.schema import MIN_STRICT_SUPPORT, SUBSETS, Metrics

_AVERAGES = {"balanced_accuracy": "balanced accuracy", "f1_macro": "macro F1"}
_BY_CLASS = ("precision", "recall", "f1")
_BASELINE = "thumbnail_1nn"
_EFFECTIVE_RANK = "cluster/effective_rank"
_CLUSTER_METRICS = {"silhouette": "silhouette", "nmi": "NMI", "ari": "ARI", "fmi": "FMI"}


def results_markdown(metrics: Metrics, classes: Sequence[str]) -> str:
    """`results_tables` of one run as Markdown."""
    return "\n\n".join(
        f"{table.title}:\n\n{table.markdown()}" for table in results_tables(metrics, classes)
    )


def results_tables(
    metrics: Metrics, classes: Sequence[str], others: Mapping[str, Metrics] | None = None
) -> list[Table]:
    """Test metrics on all, clean and strict slices; a dash where there is no value.

    First accuracies (with intervals, and over all slices re-weighted to the class mix of clean),
    balanced accuracies and macro F1; then precision, recall and F1 by class; then clustering
    metrics.

    Args:
        metrics: of a run, flat.
        classes: of the run, in its order.
        others: metrics of other runs on the same test slices, by the name to show.
    """
    runs = {"": metrics} | {
        f", {whose}{_other_sizes(metrics, theirs)}": theirs
        for whose, theirs in (others or {}).items()
    }
    return [
        _accuracies(metrics, runs),
        _metrics_by_class(metrics, runs, classes),
        _clusters(runs),
    ]


def _other_sizes(metrics: Metrics, theirs: Metrics) -> str:
    """Subsets that have other slices in another run, whose starting weights have seen others."""
    sizes = [
        f"{subset}: {count(theirs, f'test/{subset}/num_slices')}"
        for subset in SUBSETS
        if (name := f"test/{subset}/num_slices") in theirs and theirs[name] != metrics.get(name)
    ]
    return f" ({', '.join(sizes)} slices)" if sizes else ""


def _accuracies(metrics: Metrics, runs: Mapping[str, Metrics]) -> Table:
    def row(
        title: str, values: Metrics, name: str, cell: Callable[[Metrics, str], str]
    ) -> list[str]:
        subsets = (*SUBSETS, "all_as_clean")
        return [title, *(cell(values, f"test/{subset}/{name}") for subset in subsets)]

    predicted = _predicted(runs)
    rows = [
        row(title, values, f"{predictor}/accuracy", with_interval)
        for title, values, predictor in predicted
    ]
    rows += [
        row(f"{title}, {average}", values, f"{predictor}/{name}", decimal)
        for title, values, predictor in predicted
        for name, average in _AVERAGES.items()
    ]
    sizes = {subset: count(metrics, f"test/{subset}/num_slices") for subset in SUBSETS}
    subsets = [
        subset if size == MISSING else f"{subset} ({size})" for subset, size in sizes.items()
    ]
    return Table(
        "Accuracy on test slices [95 % interval, resampled by copies and known or likely "
        "subjects; none with fewer than ten of these groups or without variation between them]; "
        "classes without slices are excluded",
        ["", *subsets, "all, at clean's class mix"],
        rows,
    )


def _predicted(runs: Mapping[str, Metrics]) -> list[tuple[str, Metrics, str]]:
    """Title, metrics of the run and predictor of each row; none for a baseline without values, or
    with those of an earlier run, as is usual.
    """
    predicted = []
    baselines: list[Metrics] = [{}]
    for whose, values in runs.items():
        baseline = {
            name: value for name, value in values.items() if name.endswith(f"/{_BASELINE}/accuracy")
        }
        for predictor, title in PREDICTOR_TITLES.items():
            if predictor != _BASELINE or baseline not in baselines:
                predicted.append((f"{title}{whose}", values, predictor))
        baselines.append(baseline)
    return predicted


def _metrics_by_class(
    metrics: Metrics, runs: Mapping[str, Metrics], classes: Sequence[str]
) -> Table:
    def num_slices(subset: str, name: str) -> str:
        if f"test/{subset}/num_slices" not in metrics:
            return MISSING
        return f"{metrics.get(f'test/{subset}/head/support/{name}', 0):,.0f}"

    rows = [
        [f"slices, {subset}", *(num_slices(subset, name) for name in classes)] for subset in SUBSETS
    ]
    rows += [
        [f"{title}, {subset}"]
        + [
            " / ".join(
                decimal(values, f"test/{subset}/{predictor}/{kind}/{name}") for kind in _BY_CLASS
            )
            for name in classes
        ]
        for title, values, predictor in _predicted(runs)
        for subset in SUBSETS
    ]
    title = f"Precision / recall / F1 by class (strict: of {MIN_STRICT_SUPPORT} slices or more)"
    return Table(title, ["", *classes], rows)


def _clusters(runs: Mapping[str, Metrics]) -> Table:
    rows = [
        [f"{subset}{whose}"]
        + [decimal(values, f"test/{subset}/cluster/{name}") for name in _CLUSTER_METRICS]
        for whose, values in runs.items()
        for subset in SUBSETS
    ]
    # A silhouette may also be high because the embeddings vary in few directions.
    ranks = [
        f"{values[_EFFECTIVE_RANK]:.1f}{whose}"
        for whose, values in runs.items()
        if _EFFECTIVE_RANK in values
    ]
    ranks_note = f" (effective rank of the fitted embeddings: {'; '.join(ranks)})" if ranks else ""
    return Table(f"Clusters{ranks_note}", ["", *_CLUSTER_METRICS.values()], rows)

"""Paired comparison of a run with its control, for the log and the run's report."""

from brainray.report.cells import PREDICTOR_TITLES, difference, share
from brainray.report.table import Table
from brainray.schema import CLASS_COLUMNS, SUBSETS, Metrics

_COLUMNS = [
    "prediction",
    "test slices",
    "difference of these two trainings [95 %, over copies and subjects]",
    "fewer errors [95 %]",
    "right where exactly one is",
    "McNemar's p, as if slices were independent",
]


def comparison_table(metrics: Metrics, control: str | None) -> Table | None:
    """The metrics returned by `engine.compare`, a row per predictor and subset; None if there are
    none.
    """
    rows = [
        [
            PREDICTOR_TITLES[predictor],
            subset,
            *_cells(metrics, f"test/{subset}/{predictor}/accuracy"),
        ]
        for predictor in CLASS_COLUMNS
        for subset in SUBSETS
        if f"p/test/{subset}/{predictor}/accuracy" in metrics
    ]
    title = f"Paired comparison with the control ({control}), slice by slice"
    return Table(title, _COLUMNS, rows, num_text_columns=2) if rows else None


def verdict(metrics: Metrics, control: str | None) -> str | None:
    """Whether the head beats its control on clean slices, or on all if it is unknown which are.

    None if the two were not compared.
    """
    for subset in ("clean", "all"):
        name = f"difference/test/{subset}/head/accuracy"
        if name in metrics:
            break
    else:
        return None
    low, high = (metrics.get(f"{name}_{side}") for side in ("low", "high"))
    found, note = "not distinguishable from", " includes 0"
    if low is None or high is None:
        note = ", without an interval"
    elif low > 0 or high < 0:
        found, note = "ahead of" if low > 0 else "behind", ""
    return (
        f"The head is {found} its control {control} in accuracy on {subset} test slices: "
        f"{difference(metrics, name)}{note}."
    )


def _cells(metrics: Metrics, name: str) -> list[str]:
    wins, losses = (metrics[f"{whose}/{name}"] for whose in ("only_run", "only_control"))
    return [
        difference(metrics, f"difference/{name}"),
        share(metrics, f"fewer_errors/{name}"),
        f"{wins:,.0f} of {wins + losses:,.0f}",
        f"{metrics[f'p/{name}']:.2g}",
    ]

"""Figures of a sweep: the settings of its trials and their results."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import optuna
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.visualization import matplotlib as optuna_plots

from brainray import layout
from brainray.config import SearchDomain, SearchSpace
from brainray.report.style import (
    BLUE,
    GREY,
    count_epochs,
    new_figure,
    plain_text,
    png_bytes,
    tidy,
)
from brainray.storage import Folder

_MIN_FOR_IMPORTANCE = 4  # trials; fewer give no meaningful importances


@dataclass(frozen=True)
class ScoredTrial:
    """A trial that completed at least one epoch."""

    trial_id: str
    parameters: Mapping[str, Any]
    value: float  # of its chosen epoch
    curve: Sequence[float]  # of every epoch


def draw_sweep_figures(
    folder: Folder,
    trials: Sequence[ScoredTrial],
    space: SearchSpace,
    *,
    metric: str,
    maximise: bool,
) -> None:
    """Write learning curves, slice plots, parallel coordinates and importances as PNG files.

    Args:
        folder: of the sweep; files go to its ``figures`` folder.
        trials: best first.
        space: kind and values of each searched key.
        metric: name of the optimised metric.
        maximise: whether larger is better.
    """
    figures = folder / layout.FIGURES
    figures.write_bytes("learning_curves.png", png_bytes(learning_curves(trials, metric)))
    study = _study(trials, space, maximise=maximise)
    plots: dict[str, Callable[[], Any]] = {
        "slices.png": lambda: optuna_plots.plot_slice(study, target_name=metric),
        "parallel_coordinates.png": lambda: optuna_plots.plot_parallel_coordinate(
            study, target_name=metric
        ),
    }
    if len({trial.value for trial in trials}) >= _MIN_FOR_IMPORTANCE:
        plots["importances.png"] = lambda: optuna_plots.plot_param_importances(
            study, target_name=metric
        )
    for name, plot in plots.items():
        figures.write_bytes(name, _drawn_by_optuna(plot))


def learning_curves(trials: Sequence[ScoredTrial], metric: str) -> Figure:
    """The metric of every trial by epoch, with the best trial in colour."""
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for place, trial in reversed(list(enumerate(trials))):
        epochs = range(1, len(trial.curve) + 1)
        best = place == 0
        axes.plot(
            epochs,
            trial.curve,
            color=BLUE if best else GREY,
            linewidth=2.0 if best else 1.0,
            alpha=1.0 if best else 0.6,
            marker="o" if len(trial.curve) == 1 else None,
            label=f"best: {trial.trial_id}" if best else None,
        )
    axes.set_ylabel(metric)
    count_epochs(axes)
    tidy(axes, grid="y")
    axes.legend(loc="best")
    axes.set_title(f"{metric} of {len(trials)} trials")
    return figure


def _study(
    trials: Sequence[ScoredTrial],
    space: SearchSpace,
    *,
    maximise: bool,
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        key: _distribution(entry, [trial.parameters[key] for trial in trials])
        for key, entry in space.items()
    }
    study = optuna.create_study(direction="maximize" if maximise else "minimize")
    # In grid and random search, ids are in the order in which trials began; Optuna's are random.
    for trial in sorted(trials, key=lambda trial: trial.trial_id):
        study.add_trial(
            optuna.trial.create_trial(
                params={key: trial.parameters[key] for key in space},
                distributions=distributions,
                value=trial.value,
            )
        )
    return study


def _distribution(entry: SearchDomain, found: Sequence[Any]) -> BaseDistribution:
    """Choices are those ``found`` in trials, as settings parsed them (``yes`` is true)."""
    ((kind, values),) = entry.items()
    if kind == "choice":
        return CategoricalDistribution(tuple(dict.fromkeys(found)))
    if kind == "integer":
        return IntDistribution(values[0], values[1])
    return FloatDistribution(values[0], values[1], log=kind == "log_uniform")


def _drawn_by_optuna(plot: Callable[[], Any]) -> bytes:
    """PNG of a plot by Optuna, which draws into pyplot's current figure."""
    plt.switch_backend("Agg")
    buffer = BytesIO()
    # Optuna sets a style for all later figures. The size leaves room for the names of settings.
    with plt.rc_context({"figure.figsize": (8.0, 4.8)}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.simplefilter("ignore", UserWarning)  # about tight layouts
            plot()
        try:
            _keep_labels_apart(plt.gcf())
            plain_text(plt.gcf())
            plt.gcf().savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        finally:
            plt.close("all")
    return buffer.getvalue()


def _keep_labels_apart(figure: Figure) -> None:
    """Slant words, and label logarithmic axes with plain numbers, only at decades."""
    for axes in figure.axes:
        if isinstance(axes.xaxis.get_major_formatter(), StrCategoryFormatter):
            axes.xaxis.set_tick_params(labelrotation=20)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())

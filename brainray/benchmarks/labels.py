"""Accuracy by share of labels, for a recipe and its control."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.config import Config
from brainray.errors import ConfigError
from brainray.log import log
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.training.draws import train_draws
from brainray.report import cells
from brainray.report.style import BLUE, GREY, ORANGE, new_figure, tidy
from brainray.report.table import markdown_table
from brainray.schema import PREDICTORS, Metrics

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
QUICK_FRACTIONS = (0.1, 0.5)
SUBSET = "clean"
HEAD, CLUSTERS, THUMBNAILS = (f"test/{SUBSET}/{predictor}/accuracy" for predictor in PREDICTORS)
_NUM_DRAWS = 3


def run(options: CaseOptions) -> BenchmarkResult:
    """Accuracy by share of labels, for the recipe of --config and its control.

    For every share, the recipe and cross entropy only are trained on
    ``evaluation.num_label_draws`` label draws (default 3), with the same image passes, seeds and
    labels. All runs are kept under storage, and finished runs are not repeated. The results of a
    share are logged and saved when it is done.

    Raises:
        ConfigError: no slices to train on are given.
    """
    config = options.config
    if options.source is None and config.dataset is None:
        raise ConfigError("labels needs --source DIR, or --config FILE with --set dataset=NAME")
    attach_to_ray()
    name = config.name or "labels"
    config = config.model_copy(
        update={"storage": str(options.storage), "dataset": config.dataset or name}
    )
    if options.source is not None:
        made = {"name": config.dataset, "source": str(options.source)}
        preprocess(config.model_copy(update=made))
    fractions = QUICK_FRACTIONS if options.quick else FRACTIONS
    found: dict[float, Metrics] = {}
    for share in fractions:
        found[share] = _at(config, name, share, options)
        log(_line(share, found[share]))
        if num_missing := len(fractions) - len(found):
            options.save(_result(found, num_missing))
    return _result(found, num_missing=0)


def _result(found: Mapping[float, Metrics], num_missing: int) -> BenchmarkResult:
    """The curve over the shares that are done."""
    measures = []
    for share, metrics in found.items():
        for predictor in PREDICTORS:
            key = f"test/{SUBSET}/{predictor}/accuracy"
            if key in metrics:
                measures.append(Measure(f"{share:.0%} labels: {predictor}", metrics[key]))
        difference = f"difference/{HEAD}"
        if difference in metrics:  # missing if no test slice is clean
            measures.append(
                Measure(f"{share:.0%} labels: head against the control", metrics[difference])
            )
    of_shares = {str(share): metrics for share, metrics in found.items()}
    details = {"metrics": of_shares, "num_missing_shares": num_missing}
    report = _table(found)
    if num_missing:
        report += f"\n\nUnfinished: {num_missing} more shares follow.\n"
    return BenchmarkResult(measures, details, _figure(found), report=report)


def _at(config: Config, name: str, share: float, options: CaseOptions) -> Metrics:
    """Metrics over the label draws of one share, including the control's."""
    num_draws = _num_draws(config, quick=options.quick)
    split = config.split.model_copy(update={"labelled_fraction": share, "seed": options.seed})
    recipe = f"{name}-{share:g}"
    control = f"{recipe}-control"
    drawn: Metrics = {}
    for run_name, objective, compared in (
        (control, "supervised", None),
        (recipe, config.objective.name, control),
    ):
        log(f"{share:.0%} labels: {run_name}")
        evaluation = config.evaluation.model_copy(
            update={"num_label_draws": num_draws, "control": compared}
        )
        update = {
            "name": run_name,
            "split": split,
            "objective": config.objective.model_copy(update={"name": objective}),
            "evaluation": evaluation,
        }
        drawn = train_draws(config.model_copy(update=update)).metrics
    return drawn


def _num_draws(config: Config, *, quick: bool) -> int:
    if "num_label_draws" in config.evaluation.model_fields_set:
        return config.evaluation.num_label_draws
    return 1 if quick else _NUM_DRAWS


def _line(share: float, metrics: Metrics) -> str:
    return (
        f"{share:.0%} labels, {SUBSET} test slices: "
        f"head {cells.mean_and_deviation(metrics, HEAD)}, "
        f"head of the control {cells.mean_and_deviation(metrics, f'control/{HEAD}')}, "
        f"difference {cells.difference(metrics, f'difference/{HEAD}')}"
    )


def _table(found: Mapping[float, Metrics]) -> str:
    header = ["labels", "draws"]
    for title in ("head", "clusters"):
        header += [title, f"control's {title}", "difference [95 %]", "fewer errors [95 %]"]
    rows = []
    for share, metrics in found.items():
        row = [f"{share:.0%}", cells.count(metrics, "num_label_draws")]
        for key in (HEAD, CLUSTERS):
            row += [cells.mean_and_deviation(metrics, name) for name in (key, f"control/{key}")]
            row.append(cells.difference(metrics, f"difference/{key}"))
            row.append(cells.share(metrics, f"fewer_errors/{key}"))
        rows.append([*row, cells.mean_and_deviation(metrics, THUMBNAILS)])
    return f"Accuracy on {SUBSET} test slices:\n\n" + markdown_table(
        [*header, "thumbnails"], rows, num_text_columns=1
    )


def _figure(found: Mapping[float, Metrics]) -> Figure:
    """Accuracies with standard deviations, and differences with intervals, over label draws."""

    def values(key: str) -> NDArray[np.float64]:
        return np.array([metrics.get(key, math.nan) for metrics in found.values()])

    figure = new_figure(10.0, 4.0)
    accuracies, differences = figure.subplots(1, 2)
    shares = list(found)
    for label, colour, line, key in (
        ("recipe, head", BLUE, "o-", HEAD),
        ("recipe, clusters", BLUE, "o--", CLUSTERS),
        ("control, head", ORANGE, "o-", f"control/{HEAD}"),
        ("control, clusters", ORANGE, "o--", f"control/{CLUSTERS}"),
        ("nearest labelled thumbnail", GREY, "o-", THUMBNAILS),
    ):
        style = {"fmt": line, "color": colour, "capsize": 3, "label": label}
        accuracies.errorbar(shares, values(key), values(f"{key}_std"), **style)
    beside = np.array(shares) * 1.06  # so that the bars can be told apart
    for label, line, x, key in (
        ("head", "o-", shares, HEAD),
        ("clusters", "o--", beside, CLUSTERS),
    ):
        gains, low, high = (values(f"difference/{key}{side}") for side in ("", "_low", "_high"))
        style = {"fmt": line, "color": BLUE, "capsize": 3, "label": label}
        differences.errorbar(x, gains, [gains - low, high - gains], **style)
    differences.axhline(0, color=GREY, linewidth=0.8)
    accuracies.set_ylabel(f"accuracy, {SUBSET} test slices")
    differences.set_ylabel("lead over the control [95 %]")
    for axes in (accuracies, differences):
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("labelled share of the training slices")
        axes.legend(frameon=False)
        tidy(axes, grid="y")
    return figure

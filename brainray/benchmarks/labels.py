"""Accuracy by share of labels, for a recipe and its control."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.config import Config
from brainray.errors import ConfigError
from brainray.log import log
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.training.draws import train_draws
from brainray.report.cells import mean_and_deviation
from brainray.report.style import BLUE, GREY, ORANGE, new_figure, tidy
from brainray.report.table import markdown_table
from brainray.schema import PREDICTORS, Metrics

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
QUICK_FRACTIONS = (0.1, 0.5)
SUBSET = "clean"
_NUM_DRAWS = 3


def run(options: CaseOptions) -> BenchmarkResult:
    """Accuracy by share of labels, for the recipe of --config and its control.

    For every share, the recipe and cross entropy only are trained on
    ``evaluation.num_label_draws`` label draws (default 3), with the same image passes, seeds and
    labels. All runs are kept under storage, and finished runs are not repeated. The results of a
    share are logged when it is done.

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
    measures = []
    for share, metrics in found.items():
        for predictor in PREDICTORS:
            key = f"test/{SUBSET}/{predictor}/accuracy"
            if key in metrics:
                measures.append(Measure(f"{share:.0%} labels: {predictor}", metrics[key]))
        difference = f"difference/test/{SUBSET}/head/accuracy"
        if difference in metrics:  # missing if no test slice is clean
            measures.append(
                Measure(f"{share:.0%} labels: head against the control", metrics[difference])
            )
    details = {"metrics": {str(share): metrics for share, metrics in found.items()}}
    return BenchmarkResult(measures, details, _figure(found), report=_table(found))


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
    key = f"test/{SUBSET}/head/accuracy"
    return (
        f"{share:.0%} labels, {SUBSET} test slices: head {mean_and_deviation(metrics, key)}, "
        f"head of the control {metrics.get(f'control/{key}', math.nan):.3f}"
    )


def _table(found: Mapping[float, Metrics]) -> str:
    header = ["labels", "draws", "head", "cluster", "control's head", "thumbnails", "fewer errors"]
    rows = []
    for share, metrics in found.items():
        key = f"test/{SUBSET}/head/accuracy"
        rows.append(
            [
                f"{share:.0%}",
                f"{metrics['num_label_draws']:.0f}",
                mean_and_deviation(metrics, key),
                mean_and_deviation(metrics, f"test/{SUBSET}/cluster/accuracy"),
                f"{metrics.get(f'control/{key}', math.nan):.3f}",
                mean_and_deviation(metrics, f"test/{SUBSET}/thumbnail_1nn/accuracy"),
                f"{metrics.get(f'fewer_errors/{key}', math.nan):.0%}",
            ]
        )
    return f"Accuracy on {SUBSET} test slices:\n\n" + markdown_table(
        header, rows, num_text_columns=1
    )


def _figure(found: Mapping[float, Metrics]) -> Figure:
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    shares = list(found)
    for label, colour, prefix in (
        ("recipe, head", BLUE, f"test/{SUBSET}/head"),
        ("control, head", ORANGE, f"control/test/{SUBSET}/head"),
        ("nearest labelled thumbnail", GREY, f"test/{SUBSET}/thumbnail_1nn"),
    ):
        name = f"{prefix}/accuracy"
        values: Sequence[float] = [metrics.get(name, math.nan) for metrics in found.values()]
        spread = [metrics.get(f"{name}_std", math.nan) for metrics in found.values()]
        axes.errorbar(shares, values, yerr=spread, marker="o", capsize=3, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("labelled share of the training slices")
    axes.set_ylabel(f"accuracy, {SUBSET} test slices")
    axes.legend(frameon=False)
    tidy(axes, grid="y")
    return figure

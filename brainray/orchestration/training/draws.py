"""Training of one recipe on several label draws."""

from collections.abc import Sequence
from dataclasses import dataclass

from brainray import layout
from brainray.config import Config
from brainray.config_text import parse_config
from brainray.engine.compare import intervals_of_mean_gains, without_comparison
from brainray.engine.draws import summarise_draws
from brainray.errors import ConfigError
from brainray.log import log
from brainray.orchestration.compared_runs import compare_with_control
from brainray.orchestration.run import Run, check_same_draw, groups_of_test_slices, open_run
from brainray.orchestration.training.driver import TrainedRun, train
from brainray.report.draws_table import draws_table
from brainray.schema import Metrics
from brainray.storage import Folder

_TABLE = "table.md"


@dataclass(frozen=True)
class DrawnRuns:
    """The runs of all draws, and the metrics over them."""

    folder: Folder
    runs: list[TrainedRun]
    metrics: Metrics


def train_draws(config: Config) -> DrawnRuns:
    """Train ``config`` on ``evaluation.num_label_draws`` label draws, or resume them.

    Each draw is a separate run, ``NAME-draw1`` and so on, so finished draws are never repeated, on
    the slices of the first. ``evaluation.control`` refers to the runs of a control in the same way.

    Raises:
        BrainrayError: settings or data with which training cannot start, or a control with a
            missing draw or on other data.
    """
    name, control = config.given("name"), config.evaluation.control
    num_draws = config.evaluation.num_label_draws
    parse_config(_config_of_draw(config, num_draws - 1).model_dump(mode="json"))  # the longest name
    if control is not None:
        for number in range(num_draws):
            _check_control(config, control, number)
    if num_draws > 1 and config.split.labelled_fraction == 1:
        log(
            "note: split.labelled_fraction=1 uses all labels: the draws differ only in which of "
            "them are for validation"
        )
    runs: list[TrainedRun] = []
    compared = []
    for number in range(num_draws):
        log(f"label draw {number + 1} of {num_draws}: run {draw_name(name, number)}")
        config_of_draw = _config_of_draw(config, number)
        runs.append(train(config_of_draw, runs[0].run.record.data_hash if runs else None))
        compared.append(_compared(config_of_draw, runs[-1]))
    controls = [control for _, control in compared if control is not None]
    if 0 < len(controls) < num_draws:
        log(f"not compared: only {len(controls)} of {num_draws} draws have a comparable control")
        controls = []
    metrics = summarise_draws(
        [metrics for metrics, _ in compared],
        [control.folder.read_json(layout.SUMMARY) for control in controls] or None,
        _intervals([run.run for run in runs], controls, config),
    )
    folder = Folder(config.storage) / layout.DRAWS / name
    folder.write_bytes(_TABLE, (draws_table(metrics) + "\n").encode())
    folder.write_json(layout.SUMMARY, metrics)
    return DrawnRuns(folder, runs, metrics)


def draw_name(name: str, number: int) -> str:
    """Name of a draw's run; ``number`` counts from 0."""
    return f"{name}-draw{number + 1}"


def _config_of_draw(config: Config, number: int) -> Config:
    control = config.evaluation.control
    split = config.split.model_copy(update={"seed": config.split.seed + number})
    evaluation = config.evaluation.model_copy(
        update={"control": None if control is None else draw_name(control, number)}
    )
    return config.model_copy(
        update={
            "name": draw_name(config.given("name"), number),
            "split": split,
            "evaluation": evaluation,
        }
    )


def _compared(config: Config, trained: TrainedRun) -> tuple[Metrics, Run | None]:
    """Metrics of a draw compared with its control of today, and that control if there is one.

    If the draw was complete before, its summary may compare it with another control, or with an
    earlier run of that name.
    """
    metrics = without_comparison(trained.metrics)
    control = compare_with_control(config, trained.run, int(metrics["chosen_epoch"]))
    return (metrics, None) if control is None else (metrics | control.comparison, control.run)


def _check_control(config: Config, control: str, number: int) -> None:
    advice = "first train the control on the same number of label draws"
    storage, name = Folder(config.storage), draw_name(control, number)
    if not (storage / layout.RUNS / name).exists(layout.SUMMARY):
        raise ConfigError(
            f"evaluation.control={control}: there is no complete run {name} in {storage}; {advice}"
        )
    split = _config_of_draw(config, number).split
    check_same_draw(split, open_run(storage, name), f"evaluation.control={control}")


def _intervals(
    runs: Sequence[Run], controls: Sequence[Run], config: Config
) -> dict[str, tuple[float, float]]:
    """Intervals of the mean gains over the controls, for new subjects; empty if predictions are
    missing.
    """
    ours, theirs = ([run.predictions() for run in side] for side in (runs, controls))
    if not theirs or any(each is None for each in [*ours, *theirs]):
        return {}
    return intervals_of_mean_gains(
        ours,
        theirs,
        groups_of_test_slices(runs[0].folder),
        num_resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
    )

from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.study import StudyDirection

from brainray.config import SearchSpace
from brainray.report import sweep_figures
from brainray.report.sweep_figures import (
    ScoredTrial,
    _study,
    draw_sweep_figures,
    learning_curves,
)
from brainray.storage import Folder


def test_choices_are_drawn_as_the_settings_have_parsed_them(tmp_path: Path) -> None:
    """In YAML ``yes`` is true, and a quoted number is one for a numeric setting."""
    space: SearchSpace = {
        "train.compile": {"choice": ["yes", "no"]},
        "train.num_epochs": {"choice": ["20", "40"]},
    }
    trials = [
        ScoredTrial("a", {"train.compile": False, "train.num_epochs": 40}, 0.6, [0.6]),
        ScoredTrial("b", {"train.compile": True, "train.num_epochs": 20}, 0.5, [0.5]),
    ]
    draw_sweep_figures(Folder(tmp_path), trials, space, metric="accuracy", maximise=True)
    assert (tmp_path / "figures" / "parallel_coordinates.png").stat().st_size > 0


def test_the_first_trial_is_drawn_as_the_best() -> None:
    trials = [ScoredTrial(name, {}, 0.5, [0.25, 0.5]) for name in ("first", "second")]
    (axes,) = learning_curves(trials, "accuracy").axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["best: first"]


@pytest.mark.parametrize(
    ("maximise", "direction", "best"),
    [(True, StudyDirection.MAXIMIZE, 0.6), (False, StudyDirection.MINIMIZE, 0.5)],
)
def test_a_study_searches_as_the_sweep_did(
    maximise: bool, direction: StudyDirection, best: float
) -> None:
    space: SearchSpace = {
        "train.learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "augment.max_zoom": {"uniform": [0.0, 0.5]},
        "clustering.num_clusters": {"integer": [4, 8]},
    }
    values = (
        {"train.learning_rate": 1e-3, "augment.max_zoom": 0.25, "clustering.num_clusters": 8},
    )
    trials = [ScoredTrial("a", *values, 0.6, [0.6]), ScoredTrial("b", *values, 0.5, [0.5])]
    study = _study(trials, space, maximise=maximise)
    assert (study.direction, study.best_value) == (direction, best)
    assert study.trials[0].distributions == {
        "train.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "augment.max_zoom": FloatDistribution(0.0, 0.5),
        "clustering.num_clusters": IntDistribution(4, 8),
    }


def test_trials_are_numbered_as_they_began() -> None:
    trials = [ScoredTrial(f"abc_0000{n}", {"seed": n}, 0.1 * n, [0.1 * n]) for n in (2, 0, 1)]
    study = _study(trials, {"seed": {"integer": [0, 9]}}, maximise=True)
    assert [trial.params["seed"] for trial in study.trials] == [0, 1, 2]


def test_logarithmic_axes_are_labelled_with_plain_numbers_and_no_style_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []

    def record(figure: Figure) -> None:
        figure.draw_without_rendering()
        for axes in figure.axes:
            labels.extend(text.get_text() for text in axes.get_xticklabels(which="both"))
            labels.extend(text.get_text() for text in axes.get_yticklabels(which="both"))

    monkeypatch.setattr(sweep_figures, "plain_text", record)
    space: SearchSpace = {"rate": {"log_uniform": [1e-4, 1e-1]}, "zoom": {"uniform": [0.0, 1.0]}}
    trials = [
        ScoredTrial(str(n), {"rate": rate, "zoom": 0.1 * n}, 0.1 * n, [0.1 * n])
        for n, rate in enumerate((1e-4, 2e-3, 0.03, 0.1))
    ]
    before = mpl.rcParams.copy()
    draw_sweep_figures(Folder(tmp_path), trials, space, metric="accuracy", maximise=True)
    assert labels.count("0.001") == 2  # of the slices and of the parallel coordinates
    assert not [label for label in labels if "$" in label]
    assert mpl.rcParams == before


@pytest.mark.parametrize(("num_values", "drawn"), [(3, False), (4, True)])
def test_importances_need_four_different_values(
    num_values: int, drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_figures, "_drawn_by_optuna", lambda _: b"")
    trials = [ScoredTrial(str(n), {"seed": n}, 0.1 * n, [0.1 * n]) for n in range(num_values)]
    trials.append(ScoredTrial("again", {"seed": 9}, 0.0, [0.0]))
    space: SearchSpace = {"seed": {"integer": [0, 9]}}
    draw_sweep_figures(Folder(tmp_path), trials, space, metric="accuracy", maximise=True)
    assert (tmp_path / "figures" / "importances.png").exists() == drawn

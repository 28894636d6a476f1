from pathlib import Path

from brainray.config import SearchSpace
from brainray.report.sweep_figures import TrialOutcome, draw_sweep_figures
from brainray.storage import Folder


def test_choices_are_drawn_as_the_settings_have_parsed_them(tmp_path: Path) -> None:
    """In YAML ``yes`` is true, and a quoted number is one for a numeric setting."""
    space: SearchSpace = {
        "train.compile": {"choice": ["yes", "no"]},
        "train.num_epochs": {"choice": ["20", "40"]},
    }
    trials = [
        TrialOutcome("a", {"train.compile": False, "train.num_epochs": 40}, 0.6, [0.6]),
        TrialOutcome("b", {"train.compile": True, "train.num_epochs": 20}, 0.5, [0.5]),
    ]
    draw_sweep_figures(Folder(tmp_path), trials, space, metric="accuracy", maximise=True)
    assert (tmp_path / "figures" / "parallel_coordinates.png").stat().st_size > 0

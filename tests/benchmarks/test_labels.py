"""The label-efficiency curve: which runs it trains, and what it reports."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from brainray.benchmarks import labels
from brainray.benchmarks.runner import run_case
from brainray.config import Config
from brainray.config_text import load_config
from brainray.orchestration.job import JobResult
from brainray.schema import Metrics
from brainray.storage import Folder

ONE_DRAW = {"num_label_draws": 1.0, labels.HEAD: 0.9}
THREE_DRAWS = {
    "num_label_draws": 3.0,
    labels.HEAD: 0.9,
    f"{labels.HEAD}_std": 0.011,
    f"control/{labels.HEAD}": 0.8,
    f"control/{labels.HEAD}_std": 0.022,
    f"difference/{labels.HEAD}": 0.1,
    f"difference/{labels.HEAD}_low": 0.033,
    f"difference/{labels.HEAD}_high": 0.167,
    f"fewer_errors/{labels.HEAD}": 0.5,
    labels.CLUSTERS: 0.7,
    f"control/{labels.CLUSTERS}": 0.6,
}


class Interrupted(Exception):
    """While the runs of a share are trained."""


@pytest.fixture
def interrupted() -> set[str]:
    """Names whose training is interrupted."""
    return set()


@pytest.fixture
def trained(interrupted: set[str], monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that are trained, in order, without training."""
    configs: list[Config] = []

    def train(config: Config) -> SimpleNamespace:
        if config.name in interrupted:
            raise Interrupted
        configs.append(config)
        return SimpleNamespace(metrics=_metrics_of(config))

    monkeypatch.setattr(labels, "attach_to_ray", lambda: None)
    monkeypatch.setattr(labels, "train_draws", train)
    return configs


def _metrics_of(config: Config) -> Metrics:
    """An accuracy that tells which run it is of."""
    of_control = 0.0 if config.evaluation.control else 0.5
    accuracy = config.split.labelled_fraction / 4 + of_control
    return ONE_DRAW | {labels.HEAD: accuracy}


@pytest.fixture
def benchmark(tmp_path: Path) -> Callable[..., JobResult]:
    def run(*settings: str, quick: bool = True, seed: int = 0) -> JobResult:
        arguments = Namespace(
            case="labels", quick=quick, source=None, seed=seed, storage=str(tmp_path)
        )
        return run_case(arguments, load_config(None, ["dataset=mri", *settings]))

    return run


def test_every_share_trains_a_control_and_then_the_recipe_on_the_same_draws(
    trained: list[Config], benchmark: Callable[..., JobResult], tmp_path: Path
) -> None:
    benchmark("name=curve", "objective.name=anchored", "split.validation=subject", seed=7)
    assert [
        (config.name, config.objective.name, config.evaluation.control) for config in trained
    ] == [
        ("curve-0.1-control", "supervised", None),
        ("curve-0.1", "anchored", "curve-0.1-control"),
        ("curve-0.5-control", "supervised", None),
        ("curve-0.5", "anchored", "curve-0.5-control"),
    ]
    for control, recipe in (trained[:2], trained[2:]):
        varied = {"name", "objective", "evaluation"}
        assert control.model_dump(exclude=varied) == recipe.model_dump(exclude=varied)
        assert control.evaluation.num_label_draws == recipe.evaluation.num_label_draws == 1
    assert {(each.dataset, each.storage) for each in trained} == {("mri", str(tmp_path))}
    assert {(each.split.seed, each.split.validation) for each in trained} == {(7, "subject")}
    assert [config.split.labelled_fraction for config in trained] == [0.1, 0.1, 0.5, 0.5]


def test_the_whole_curve_has_every_share_and_reports_the_recipe(
    trained: list[Config], benchmark: Callable[..., JobResult]
) -> None:
    found = benchmark(quick=False)
    shares = [0.01, 0.02, 0.05, 0.1, 0.2, 1.0]
    assert [config.split.labelled_fraction for config in trained[::2]] == shares
    assert [config.name for config in trained[1::2]] == [f"labels-{share:g}" for share in shares]
    assert found.metrics == {f"{share:.0%} labels: head": share / 4 for share in shares}


def test_curves_have_folders_of_their_own(
    trained: list[Config], benchmark: Callable[..., JobResult], tmp_path: Path
) -> None:
    folders = [benchmark(*names).out for names in (["name=a"], ["name=b"], [])]
    assert folders == [f"{tmp_path}/benchmarks/labels-quick{end}" for end in ("/a", "/b", "")]
    for folder in folders:
        assert {"figure.png", "report.md", "result.json"} <= set(Folder(folder).names())


def test_an_interrupted_curve_has_the_shares_that_are_done_and_resumes(
    trained: list[Config],
    interrupted: set[str],
    benchmark: Callable[..., JobResult],
    tmp_path: Path,
) -> None:
    interrupted.add("curve-0.5")
    with pytest.raises(Interrupted):
        benchmark("name=curve")
    folder = Folder(tmp_path / "benchmarks/labels-quick/curve")
    done = folder.read_json("result.json")["details"]["metrics"]
    assert done == {"0.1": _metrics_of(trained[1])}
    assert "10%" in folder.read_bytes("report.md").decode()
    assert "Unfinished: 1 more" in folder.read_bytes("report.md").decode()
    assert folder.exists("figure.png")

    interrupted.clear()
    benchmark("name=curve")
    assert trained[3:6] == trained[:3]  # complete runs of the same names are not trained again
    resumed = folder.read_json("result.json")["details"]["metrics"]
    assert resumed == done | {"0.5": _metrics_of(trained[-1])}
    assert "Unfinished" not in folder.read_bytes("report.md").decode()


@pytest.mark.parametrize(
    ("overrides", "quick", "expected"),
    [([], False, 3), ([], True, 1), (["evaluation.num_label_draws=1"], False, 1)],
)
def test_it_trains_on_the_requested_number_of_draws(
    overrides: list[str], quick: bool, expected: int
) -> None:
    config = load_config(None, overrides)
    assert labels._num_draws(config, quick=quick) == expected


def test_the_table_has_a_row_for_every_share_and_a_dash_for_what_is_missing() -> None:
    table = labels._table({0.01: ONE_DRAW, 0.2: THREE_DRAWS})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert rows == [
        ["1%", "1", "0.900", *["–"] * 8],
        [
            *("20%", "3", "0.900 ± 0.011", "0.800 ± 0.022", "+0.100 [+0.033, +0.167]", "50 %"),
            *("0.700", "0.600", "–", "–", "–"),
        ],
    ]


def test_without_clean_test_slices_nothing_is_measured() -> None:
    found = labels._result({0.1: {"num_label_draws": 1.0, "test/all/head/accuracy": 0.9}}, 0)
    assert found.measures == []
    assert "nan" not in f"{found.report}{labels._line(0.1, ONE_DRAW)}"


def test_the_figure_has_deviations_of_accuracies_and_intervals_of_differences() -> None:
    accuracies, differences = labels._figure({0.01: ONE_DRAW, 0.2: THREE_DRAWS}).axes

    def bar(axes: Any, label: str) -> list[float]:
        """Ends of the bar at the second share."""
        (lines,) = (each for each in axes.containers if each.get_label() == label)
        return lines[2][0].get_segments()[1][:, 1].tolist()

    assert bar(accuracies, "recipe, head") == pytest.approx([0.889, 0.911])
    assert bar(accuracies, "control, head") == pytest.approx([0.778, 0.822])
    assert bar(differences, "head") == pytest.approx([0.033, 0.167])

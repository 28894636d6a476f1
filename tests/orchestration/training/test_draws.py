"""Several draws of labels, most of them on a real Ray cluster, beside a control's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from brainray import layout
from brainray.config import Config, PreprocessConfig
from brainray.config_text import load_config, to_yaml
from brainray.errors import ConfigError
from brainray.orchestration.run import RunRecord, open_run
from brainray.orchestration.training import draws
from brainray.orchestration.training.draws import (
    DrawnRuns,
    _config_of_draw,
    _intervals,
    train_draws,
)
from brainray.orchestration.training.driver import TrainedRun
from brainray.schema import PREDICTIONS
from brainray.storage import Folder
from tests.conftest import logged, tiny_config

NAME = "test/all/head/accuracy"


def drawn_config(storage: Path, name: str, *overrides: str) -> Config:
    return tiny_config(
        storage,
        f"name={name}",
        "dataset=mri",
        "evaluation.num_label_draws=2",
        "evaluation.tsne_epochs=[]",
        "train.num_epochs=1",
        *overrides,
    )


def labelled(drawn: DrawnRuns, number: int) -> set[str]:
    seen = drawn.runs[number].run.folder.read_table("seen.parquet").to_pylist()
    return {row["sample_id"] for row in seen if row["label"] is not None}


def write_complete_run(config: Config, num_right: int) -> None:
    """A run on disk that has the given number of ten test slices right."""
    folder = Folder(config.storage) / layout.RUNS / config.given("name")
    RunRecord(
        format=layout.RUN_FORMAT,
        name=config.given("name"),
        dataset="mri",
        data_hash="0",
        classes=["a", "b"],
        preprocess=PreprocessConfig(),
        versions={},
        subject_salt="",
        num_slices={},
    ).write(folder)
    folder.write_bytes(layout.CONFIG, to_yaml(config).encode())
    ids = [f"{number:032x}" for number in range(10)]
    folder.write_table(layout.SEEN, pa.table({"sample_id": ids[:2], "role": ["labelled"] * 2}))
    folder.write_table(layout.TEST_SLICES, pa.table({"sample_id": ids, "split_group_id": ids}))
    rows = [
        dict.fromkeys(PREDICTIONS.names)
        | {"sample_id": name, "label": "a", "cluster_class": "a", "clean": True, "strict": True}
        | {"head": "a" if number < num_right else "b"}
        for number, name in enumerate(ids)
    ]
    table = pa.Table.from_pylist(rows, schema=PREDICTIONS)
    folder.write_table(layout.predictions_file(1), table)
    folder.write_json_lines(layout.METRICS, [{"epoch": 1.0, "train/num_workers": 1.0}])
    folder.write_json(layout.SUMMARY, {NAME: num_right / 10, "chosen_epoch": 1.0})


def test_complete_draws_are_compared_with_the_control_that_is_named_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_of(name: str, *overrides: str) -> Config:
        return drawn_config(tmp_path, name, *overrides)

    for name, num_right in (("mine", 9), ("first", 8), ("second", 7)):
        for number in range(2):
            seed = f"split.seed={config_of(name).split.seed + number}"
            write_complete_run(config_of(f"{name}-draw{number + 1}", seed), num_right)

    def nothing_to_train(config: Config, data_hash: str | None) -> TrainedRun:
        hashes.append(data_hash)
        run = open_run(Folder(config.storage), config.given("name"))
        return TrainedRun(run, run.folder.read_json(layout.SUMMARY), None, "")

    hashes: list[str | None] = []
    monkeypatch.setattr(draws, "train", nothing_to_train)
    for number in range(2):  # as training leaves it
        folder = Folder(tmp_path) / layout.RUNS / f"mine-draw{number + 1}"
        compared = folder.read_json(layout.SUMMARY) | {f"difference/{NAME}": 0.1}
        folder.write_json(layout.SUMMARY, compared)

    found = train_draws(config_of("mine", "evaluation.control=first")).metrics
    assert found[f"control/{NAME}"] == pytest.approx(0.8)
    assert hashes == [None, "0"]  # all draws on the slices of the first
    found = train_draws(config_of("mine", "evaluation.control=second")).metrics
    assert found[f"control/{NAME}"] == pytest.approx(0.7)
    assert found[f"difference/{NAME}"] == pytest.approx(0.2)
    assert found[f"fewer_errors/{NAME}"] == pytest.approx(2 / 3)

    with pytest.raises(ConfigError, match="control=mine-draw1 is the run itself: name another"):
        train_draws(config_of("mine", "evaluation.control=mine"))

    other = Folder(tmp_path) / layout.RUNS / "second-draw2"  # as drawn by another version
    other.write_table(layout.SEEN, pa.table({"sample_id": ["f" * 32], "role": ["labelled"]}))
    found = train_draws(config_of("mine", "evaluation.control=second")).metrics
    assert found[NAME] == pytest.approx(0.9)
    assert not any(name.startswith(("control/", "difference/")) for name in found)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_draws_are_runs_of_their_own_paired_with_the_control(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = train_draws(drawn_config(storage, "plain", "objective.name=supervised"))
    config = drawn_config(storage, "paired", "evaluation.control=plain")
    recipe = train_draws(config)
    assert [run.run.folder.path.rpartition("/")[2] for run in recipe.runs] == [
        "paired-draw1",
        "paired-draw2",
    ]
    for number in range(2):
        assert labelled(recipe, number) == labelled(control, number)
    assert labelled(recipe, 0) != labelled(recipe, 1)
    name = "test/all/head/accuracy"
    values, others = ([run.metrics[name] for run in drawn.runs] for drawn in (recipe, control))
    assert recipe.metrics[name] == pytest.approx(sum(values) / 2)
    assert recipe.metrics[f"difference/{name}"] == pytest.approx((sum(values) - sum(others)) / 2)
    assert "| head" in recipe.folder.read_bytes("table.md").decode()
    again = train_draws(config)
    said = logged(capsys)
    assert sum("complete, nothing to train" in line for line in said) == 2
    assert again.metrics == recipe.metrics


def test_every_draw_has_a_seed_and_a_control_of_its_own() -> None:
    config = load_config(None, ["name=a", "split.seed=5", "evaluation.control=b"])
    third = _config_of_draw(config, 2)
    assert (third.name, third.split.seed, third.evaluation.control) == ("a-draw3", 7, "b-draw3")
    alone = load_config(None, ["name=a"])
    assert _config_of_draw(alone, 0).evaluation.control is None


def test_the_interval_of_a_gain_is_of_runs_less_controls_and_resamples_subjects(
    tmp_path: Path,
) -> None:
    def run(num_right: int, folder: str = "run") -> Any:
        """A run that is right about so many of 40 slices."""
        names = [str(number) for number in range(40)]
        found = ["a"] * num_right + ["b"] * (40 - num_right)
        flags = {"clean": [True] * 40, "strict": [True] * 40}
        columns = {"sample_id": names, "label": ["a"] * 40, "head": found, "cluster_class": found}
        predictions = pa.table(columns | flags)
        return SimpleNamespace(folder=Folder(tmp_path / folder), predictions=lambda: predictions)

    alone = {
        name: [str(number) for number in range(40)] for name in ("sample_id", "split_group_id")
    }
    Folder(tmp_path / "run").write_table("test.parquet", pa.table(alone))
    name, config = "difference/test/all/head/accuracy", load_config(None, [])
    low, high = _intervals([run(36), run(40)], [run(20), run(16)], config)[name]
    assert 0.3 < low < (36 + 40 - 20 - 16) / 80 < high < 0.7
    half = {"sample_id": [str(number) for number in range(40)], "split_group_id": ["p"] * 40}
    Folder(tmp_path / "of-one-subject").write_table("test.parquet", pa.table(half))
    assert _intervals([run(36, "of-one-subject")], [run(20)], config) == {}
    lost: Any = SimpleNamespace(predictions=lambda: None)
    assert _intervals([run(36), lost], [run(20), run(16)], config) == {}


def test_a_control_that_was_not_trained_is_named_at_once(storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"no complete run absent-draw1 in .* label draws"):
        train_draws(drawn_config(storage, "alone", "evaluation.control=absent"))
    assert not (storage / "runs" / "alone-draw1").exists()


def test_a_name_that_is_too_long_for_its_draws_is_refused_at_once(storage: Path) -> None:
    name = "n" * 97
    with pytest.raises(ConfigError, match=f"{name}-draw2' is not a plain name"):
        train_draws(drawn_config(storage, name))
    assert not (storage / "runs" / f"{name}-draw1").exists()

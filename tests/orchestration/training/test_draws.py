"""Several draws of labels on a real Ray cluster, beside a control's."""

from pathlib import Path

import pytest

from brainray.config import Config
from brainray.errors import ConfigError
from brainray.orchestration.training.draws import DrawnRuns, train_draws
from tests.conftest import logged, tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


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


@pytest.mark.slow
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


def test_a_control_that_was_not_trained_is_named_at_once(storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"no complete run absent-draw1 in .* label draws"):
        train_draws(drawn_config(storage, "alone", "evaluation.control=absent"))
    assert not (storage / "runs" / "alone-draw1").exists()


def test_a_name_that_is_too_long_for_its_draws_is_refused_at_once(storage: Path) -> None:
    name = "n" * 97
    with pytest.raises(ConfigError, match=f"{name}-draw2' is not a plain name"):
        train_draws(drawn_config(storage, name))
    assert not (storage / "runs" / f"{name}-draw1").exists()

from pathlib import Path

import numpy as np
import pytest

from brainray import layout
from brainray.benchmarks import robustness
from brainray.benchmarks.result import CaseOptions
from brainray.config_text import load_config
from brainray.errors import ConfigError
from brainray.mri.phantom import make_slice
from brainray.orchestration.training.driver import TrainedRun


def _options(storage: Path, source: Path | None, *settings: str) -> CaseOptions:
    config = load_config(None, list(settings))
    return CaseOptions(False, source, 0, storage, config)


def test_alterations_leave_slices_that_differ_by_what_they_say() -> None:
    image = make_slice("glioma", np.random.default_rng(0)).image
    height, width = image.shape
    altered = {
        name: alter(image, np.random.default_rng(0))
        for name, alter in robustness.ALTERATIONS.items()
    }
    assert {made.dtype for made in altered.values()} == {image.dtype}
    assert np.array_equal(altered.pop("as they are"), image)
    for made in altered.values():
        assert not np.array_equal(made, image)
    assert altered["field of view 1.3 times as wide"].shape == (
        height + 2 * int(0.15 * height),
        width + 2 * int(0.15 * width),
    )
    assert altered["6 % cropped at each side"].shape[0] == height - 2 * int(0.06 * height)
    assert altered["half as bright"].max() == image.max() // 2
    assert altered["gamma 0.6"].mean() > image.mean() > altered["gamma 1.6"].mean()
    assert altered["shaded to half at one side"][:, -1].tolist() == image[:, -1].tolist()


def test_as_they_are_slices_score_what_the_run_has_reported(
    trained: TrainedRun, storage: Path, phantoms: Path
) -> None:
    found = robustness.run(
        _options(storage, phantoms, "run=two-ranks", "evaluation.control=two-ranks")
    )
    values = {item.name: item.value for item in found.measures}
    reported = trained.run.folder.read_json(layout.SUMMARY)
    for subset in ("all", "clean"):
        name = f"test/{subset}/head/accuracy"
        assert values[f"as they are: run, {subset} head"] == pytest.approx(reported[name])
    assert found.details["num_slices"] == 17
    assert found.details["num_clean"] == reported["test/clean/num_slices"]
    altered = [values[f"{name}: run, all head"] for name in list(robustness.ALTERATIONS)[1:]]
    assert values["mean of the altered ones: run, all head"] == pytest.approx(np.mean(altered))
    assert values["noisy: run, all cluster"] == values["noisy: control, all cluster"]
    assert found.report is not None
    assert "| noisy " in found.report


def test_slices_that_are_lost_count_as_wrong(
    trained: TrainedRun, storage: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        robustness,
        "ALTERATIONS",
        {"as they are": lambda image, rng: image, "dark": lambda image, rng: image * 0},
    )
    found = robustness.run(_options(storage, phantoms, "run=two-ranks"))
    values = {item.name: item.value for item in found.measures}
    assert values["as they are: run, all head"] > 0
    assert values["dark: run, all head"] == 0


def test_what_is_missing_is_named(storage: Path, phantoms: Path) -> None:
    with pytest.raises(ConfigError, match="run=NAME"):
        robustness.run(_options(storage, phantoms))
    with pytest.raises(ConfigError, match="--source DIR"):
        robustness.run(_options(storage, None, "run=two-ranks"))

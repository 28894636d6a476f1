"""On the real slices, where they are: METHOD's figures about the data come out again."""

from pathlib import Path

import pytest

from brainray.orchestration.data import preprocess
from tests.conftest import tiny_config


@pytest.mark.usefixtures("ray_cluster")
def test_copies_and_clean_test_slices_are_those_that_were_measured(
    real_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "name=mri", f"source={real_data}", "preprocess.image_size=64")
    store = preprocess(config)
    leakage = store.folder.read_json("leakage.json")
    assert leakage["num_test"]["all"] == 655
    # Of this half of Testing, METHOD counts these without a twin in Training, by class.
    measured = {"glioma": 150, "meningioma": 94, "notumor": 27, "pituitary": 147}
    for name, count in measured.items():
        assert abs(leakage["num_test_by_class"]["clean"][name] - count) <= 0.03 * count
    assert leakage["label_conflicts"] == []
    assert store.manifest["num_rejected"] == 0
    assert store.manifest["classes"] == sorted(measured)

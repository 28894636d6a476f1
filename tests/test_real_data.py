"""On the real slices, where they are: METHOD's figures about the data come out again."""

from pathlib import Path

import pyarrow.compute as pc
import pytest

from brainray.mri.thumbnails import coarse, most_similar, thumbnail_matrix
from brainray.orchestration.preprocessing.driver import preprocess
from tests.conftest import tiny_config


@pytest.mark.real
@pytest.mark.usefixtures("ray_cluster")
def test_copies_and_clean_test_slices_are_those_that_were_measured(
    real_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "name=mri", f"source={real_data}", "preprocess.image_size=64")
    store = preprocess(config)
    leakage = store.folder.read_json("leakage.json")
    # Slices without a twin in Training, as METHOD counts them: of half of Testing, and of all.
    without_twin = {655: 418, 1311: 845}[leakage["num_test"]["all"]]
    assert abs(leakage["num_test"]["clean"] - without_twin) <= 0.05 * without_twin
    assert leakage["num_test"]["strict"] < 0.5 * leakage["num_test"]["clean"]
    # Mirrored copies in another class's folder.
    conflicts = {Path(row["path"]).stem for row in leakage["label_conflicts"]}
    pairs = [("me_0831", "pi_0520"), ("me_0942", "pi_0515"), ("me_1311", "pi_0043")]
    assert conflicts == {f"Tr-{name}" for pair in pairs for name in pair}
    assert len({row["group"] for row in leakage["label_conflicts"]}) == 3
    assert store.manifest.num_rejected == 0
    assert store.manifest.classes == ["glioma", "meningioma", "notumor", "pituitary"]
    # Its rule for twins: a correlation of thumbnails above 0.999.
    index = store.index(thumbnails=True)
    test, train = (index.filter(pc.equal(index["split"], split)) for split in ("test", "train"))
    correlation, _ = most_similar(
        coarse(thumbnail_matrix(test["thumbnail"].to_pylist())),
        coarse(thumbnail_matrix(train["thumbnail"].to_pylist())),
    )
    found = {
        pair["path"] for level in ("exact", "near") for pair in leakage["across_splits"][level]
    }
    twins = {
        path for path, r in zip(test["path"].to_pylist(), correlation, strict=True) if r > 0.999
    }
    # Of 237, five with smudged contrast are just below the similarity of copies.
    assert len(twins & found) >= 0.975 * len(twins)

"""What a study's page shows of a data set."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.store import ImageStore
from brainray.orchestration.study.data import StudiedSet
from brainray.orchestration.study.grid import Slices
from brainray.orchestration.study.page import _shown_set
from brainray.report.study_page import ClusterMap
from brainray.storage import Folder


@pytest.mark.parametrize("num_held_out", [0, 2])
def test_slices_come_with_their_own_picture_path_and_subsets(
    tmp_path: Path, num_held_out: int
) -> None:
    num_slices = 6
    splits = ["test"] * num_held_out + ["train"] * (num_slices - num_held_out)
    table = pa.table(
        {
            "sample_id": [f"{row:032x}" for row in range(num_slices)],
            "split": splits,
            "path": [f"{row}.nii" for row in range(num_slices)],
            "frame": ["axial=7" if row == 3 else "" for row in range(num_slices)],
        }
    )
    stored = table.append_column("height", pa.array([4] * num_slices))
    stored = stored.append_column("width", pa.array([4] * num_slices))
    pixels = pa.array([bytes([10 * row] * 16) for row in range(num_slices)])
    folder = Folder(tmp_path)
    reverse = list(reversed(range(num_slices)))  # a store has an order of its own
    folder.write_table("images/0.parquet", stored.append_column("image", pixels).take(reverse))
    store = ImageStore(folder, Manifest.model_construct(preprocess=PreprocessConfig()))
    fitted = np.array([split == "train" for split in splits])
    subsets = {"fitted": fitted} | ({"all": ~fitted} if num_held_out else {})
    labels = np.zeros(num_slices, np.int64)
    studied = StudiedSet(store, Slices(table, labels, subsets), ["a"])

    rows = [1, 3, 4]
    clusters = ClusterMap("mri", rows, [0.0] * 3, [0.0] * 3, [0] * 3, [0.0] * 3, [(0, 6)])
    shown = _shown_set(studied, [clusters], limit=10)

    assert shown.rows.tolist() == rows
    assert shown.paths == ["1.nii", "3.nii axial=7", "4.nii"]
    assert [np.unique(image).tolist() for image in shown.images] == [[10], [30], [40]]
    found = {name: mask.tolist() for name, mask in shown.subsets.items()}
    held_out = {"held out": [True, False, False]} if num_held_out else {}
    expected = {"all": [True] * 3, "fitted": [not num_held_out, True, True]}
    assert found == expected | held_out

"""Labels that unlabelled slices of a run inherit."""

from pathlib import Path

import pyarrow as pa
import pytest

from brainray import layout
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.store import ImageStore
from brainray.orchestration.training.rank_data import _seen_with_inherited_labels
from brainray.schema import (
    ESTIMATED,
    IMAGE_STORE,
    LABELLED,
    SEEN,
    TABLE,
    UNLABELLED_ROLE,
    VALIDATION,
)
from brainray.storage import Folder
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("inherit", "source"), [("none", ESTIMATED), ("subject", ESTIMATED), ("subject", TABLE)]
)
def test_labels_are_inherited_within_estimated_subjects_but_not_by_copies_of_validation_slices(
    tmp_path: Path, inherit: str, source: str
) -> None:
    rows = [
        ("d", LABELLED, "glioma", "d"),
        ("c", UNLABELLED_ROLE, None, "c"),
        ("b", UNLABELLED_ROLE, None, "a"),  # a mirrored copy of the validation slice
        ("a", VALIDATION, "glioma", "a"),
    ]
    common = {"split": "train", "subject_id": "p1", "subject_source": source}
    told = [
        {**common, "sample_id": identity, "role": role, "label": label, "kin_group_id": kin}
        for identity, role, label, kin in rows
    ]
    run, images = Folder(tmp_path / "run"), Folder(tmp_path / "store")
    run.write_table(layout.SEEN, pa.Table.from_pylist(told, schema=SEEN))
    images.write_table(layout.IMAGES, pa.Table.from_pylist(told[::-1], schema=IMAGE_STORE))
    config = tiny_config(
        tmp_path, "objective.name=consistency", f"objective.inherit_labels={inherit}"
    )
    seen = _seen_with_inherited_labels(config, run, ImageStore(images, Manifest.model_construct()))
    inherits = inherit == "subject" and source == ESTIMATED
    expected = [None, "glioma" if inherits else None, None, None]
    assert seen["inherited"].to_pylist() == expected

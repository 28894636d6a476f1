"""Labels that unlabelled slices of a run inherit."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from brainray import layout
from brainray.engine.shard import sample_keys
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.store import ImageStore
from brainray.orchestration.training.rank_data import (
    _seen_with_inherited_labels,
    load_rank_data,
)
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


def test_each_rank_draws_its_labelled_slices_by_their_own_weights(tmp_path: Path) -> None:
    identities = [f"{number:016x}{0:016x}" for number in (7, 3, 9, 1, 5)]
    subjects = ["p1", "p1", "p1", "p2", None]
    rows = [
        {"sample_id": identity, "role": LABELLED, "label": "glioma", "subject_id": subject}
        for identity, subject in zip(identities, subjects, strict=True)
    ]
    run, images = Folder(tmp_path / "run"), Folder(tmp_path / "store")
    run.write_table(layout.SEEN, pa.Table.from_pylist(rows, schema=SEEN))
    run.write_table(layout.TEST_SLICES, SEEN.empty_table())
    pixels = {"split": "train", "height": 64, "width": 64, "image": bytes(64 * 64)}
    stored = [{"sample_id": identity, **pixels} for identity in identities]
    images.write_table(
        f"{layout.IMAGES}/part.parquet", pa.Table.from_pylist(stored, schema=IMAGE_STORE)
    )
    store = ImageStore(images, Manifest.model_construct(classes=["glioma"]))
    each = 5 / 3  # slices of a subject
    weights = [each / 3, each / 3, each / 3, each, each]
    expected = dict(zip(sample_keys(identities).tolist(), weights, strict=True))
    found: dict[int, float] = {}
    for rank in range(2):
        config = tiny_config(tmp_path, "train.labelled_sampling=subject", "train.image_size=64")
        data = load_rank_data(config, run, store, torch.device("cpu"), rank, 2)
        assert data.labelled_weights is not None
        keys = data.labelled.keys.tolist()
        found |= dict(zip(keys, data.labelled_weights.tolist(), strict=True))
    assert found == pytest.approx(expected)

"""Features that are kept for later runs."""

from pathlib import Path

import pytest

from brainray import layout
from brainray.config import FeatureConfig
from brainray.errors import DataError
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.pretraining import features
from brainray.orchestration.pretraining.features import extract_features
from brainray.orchestration.pretraining.weights import EncoderStart, Weights
from brainray.orchestration.store import ImageStore
from brainray.storage import Folder
from tests.conftest import tiny_config


def test_features_of_a_store_that_changes_meanwhile_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = (
        Manifest.model_construct(slices_hash=state, num_slices={"train": {"a": num_slices}})
        for state, num_slices in (("before", 1), ("after", 2))
    )
    store = ImageStore(Folder(tmp_path / "store"), before)
    monkeypatch.setattr(features, "_write_parts", lambda *_: 2)
    monkeypatch.setattr(Manifest, "read", lambda _: after)
    weights = Weights("random", lambda: "random")
    start = EncoderStart(FeatureConfig(encoder="resnet18"), weights, seed=0)
    with pytest.raises(DataError, match="was updated meanwhile: submit again"):
        extract_features(tiny_config(tmp_path), store, start)
    assert not list(tmp_path.glob(f"{layout.FEATURES}/*/{layout.MANIFEST}"))

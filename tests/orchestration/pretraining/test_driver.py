"""What an encoder that learned without labels is found again by."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from brainray.config import FeatureConfig
from brainray.errors import CheckpointError, ConfigError
from brainray.orchestration.pretraining.driver import _made_by, _read_head
from brainray.orchestration.pretraining.weights import EncoderStart, Weights, weights_from
from brainray.storage import Folder
from tests.conftest import tiny_config

STORE: Any = SimpleNamespace(manifest=SimpleNamespace(slices_hash="abc"))


def made_by(feature: FeatureConfig, storage: Path, *overrides: str) -> dict[str, Any]:
    config = tiny_config(storage, *overrides)
    return _made_by(config, STORE, EncoderStart(feature, Weights("random", lambda: "random"), 0))


@pytest.mark.parametrize(
    ("pretext", "setting", "counts"),
    [
        ("contrastive", "self_supervision.temperature=0.3", True),
        ("rotation", "self_supervision.temperature=0.3", False),
        ("rotation", "self_supervision.positives=subject", False),
        ("rotation", "self_supervision.learning_rate=0.1", True),
        ("rotation", "self_supervision.augment.max_zoom=0.4", True),
        ("contrastive", "self_supervision.augment.max_zoom=0.4", True),
        ("contrastive", "self_supervision.patience=5", False),
        ("contrastive", "train.num_workers=2", False),
        ("contrastive", "train.learning_rate=0.1", False),
        ("contrastive", "clustering.num_clusters=9", False),
    ],
)
def test_an_encoder_is_made_anew_where_a_setting_counts(
    tmp_path: Path, pretext: Any, setting: str, counts: bool
) -> None:
    feature = FeatureConfig(pretext=pretext)
    assert (made_by(feature, tmp_path) != made_by(feature, tmp_path, setting)) == counts


def test_a_refined_encoder_depends_on_how_it_is_clustered(tmp_path: Path) -> None:
    feature = FeatureConfig(pretext="none", lambda_cluster=0.5)
    before = made_by(feature, tmp_path)
    assert made_by(feature, tmp_path, "clustering.num_clusters=9") != before
    assert made_by(feature, tmp_path, "clustering.on_collapse=warn") != before
    assert made_by(feature, tmp_path, "self_supervision.learning_rate=0.1") == before
    assert made_by(feature, tmp_path, "self_supervision.round_learning_rate=0.1") != before


def test_a_setting_at_its_default_is_no_part_of_it(tmp_path: Path) -> None:
    """One that comes in a later version leaves encoders of this one to be found."""
    feature = FeatureConfig(pretext="contrastive")
    told = made_by(feature, tmp_path, "self_supervision.augment.max_zoom=0.4")
    assert told["self_supervision"]["augment"]["max_zoom"] == 0.4
    assert "max_blur_sigma" not in told["self_supervision"]["augment"]


@pytest.mark.parametrize("content", [b"", b"cut"])
def test_a_damaged_encoder_is_named(tmp_path: Path, content: bytes) -> None:
    folder = Folder(tmp_path)
    folder.write_bytes("encoder.pt", content)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder}/encoder.pt")):
        _read_head(folder)
    with pytest.raises(ConfigError, match=re.escape(f"{folder}/encoder.pt")):
        weights_from(folder, "encoder.pt")

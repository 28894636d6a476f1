"""Checkpoints: whole, safe to load, and keyed by sample."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from brainray import layout
from brainray.config import load_config
from brainray.engine.recluster import recluster
from brainray.engine.shard import PixelScale
from brainray.engine.state import (
    Checkpoint,
    TrainerState,
    checkpoint_bytes,
    load_checkpoint,
    load_trainer,
    rows_of_keys,
    trainer_bytes,
)
from brainray.errors import CheckpointError
from brainray.models.encoder import Encoder
from brainray.storage import Folder


def checkpoint() -> tuple[Checkpoint, Tensor]:
    config = load_config(None, ["clustering.num_clusters=3", "clustering.pca_dim=4"])
    encoder = Encoder("resnet18", num_classes=2)
    z = torch.nn.functional.normalize(torch.randn(60, 512))
    labels = torch.arange(60) % 2
    fitted = recluster(z, torch.arange(60), labels, config=config.clustering, num_classes=2, seed=0)
    return Checkpoint(config, ["a", "b"], PixelScale(0.2, 0.3), 7, encoder, fitted.model), z


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved, z = checkpoint()
    Folder(tmp_path).write_bytes(layout.MODEL, checkpoint_bytes(saved))
    loaded = load_checkpoint(Folder(tmp_path))
    assert loaded.config == saved.config
    assert (loaded.classes, loaded.epoch, loaded.scale) == (["a", "b"], 7, PixelScale(0.2, 0.3))
    for one, two in zip(saved.encoder.parameters(), loaded.encoder.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(saved.clusters.responsibilities(z), loaded.clusters.responsibilities(z))
    assert torch.equal(saved.clusters.class_of_cluster, loaded.clusters.class_of_cluster)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / layout.MODEL).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{layout.MODEL} is not a checkpoint"):
        load_checkpoint(Folder(tmp_path))


def test_a_state_dict_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / layout.MODEL)
    with pytest.raises(CheckpointError, match="is not a brainray-checkpoint/1"):
        load_checkpoint(Folder(tmp_path))
    with pytest.raises(CheckpointError, match=rf"holds no {layout.MODEL}"):
        load_checkpoint(Folder(tmp_path / "absent"))


def test_a_trainer_state_comes_back_as_it_was(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = TrainerState(
        optimizer.state_dict(),
        torch.arange(2),
        torch.rand(2, 4),
        torch.rand(2, 3),
        {"head.weight": torch.rand(3, 5)},
        [{"epoch": 1.0}],
    )
    Folder(tmp_path).write_bytes(layout.TRAINER, trainer_bytes(state))
    loaded = load_trainer(Folder(tmp_path))
    assert loaded.history == state.history
    assert torch.equal(loaded.responsibilities, state.responsibilities)
    assert torch.equal(loaded.probabilities, state.probabilities)
    assert loaded.trained is not None
    assert state.trained is not None
    assert torch.equal(loaded.trained["head.weight"], state.trained["head.weight"])
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], torch.full((3,), 0.1))


def test_rows_are_found_by_key_whatever_their_order() -> None:
    keys = torch.tensor([30, -10, 20])
    values = torch.tensor([[3.0], [1.0], [2.0]])
    found = rows_of_keys(keys, values, torch.tensor([-10, 20]))
    assert found.tolist() == [[1.0], [2.0]]
    with pytest.raises(CheckpointError, match="does not know"):
        rows_of_keys(keys, values, torch.tensor([25]))

"""Parts of the training worker that need no Ray."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from brainray.engine.shard import SliceShard
from brainray.orchestration.training.worker import _Trainer


def test_labelled_slices_in_place_of_unlabelled_ones_keep_their_labels() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    labelled = SliceShard(cast(Any, range(4)), torch.arange(4), labels)
    trainer = SimpleNamespace(
        data=SimpleNamespace(labelled=labelled, unlabelled=None),
        pool=labelled,
        _trains_on_unlabelled=False,
        classes=["glioma", "pituitary"],
        _probabilities=torch.tensor([[0.1, 0.9]] * 4),  # wrong about half of them
        responsibilities=torch.eye(4),
        clusters=SimpleNamespace(centers=torch.eye(2), class_of_cluster=torch.arange(2)),
        epoch=1,
        config=SimpleNamespace(objective=SimpleNamespace(ramp_epochs=2)),
    )
    targets = _Trainer._targets(cast(Any, trainer))
    assert torch.equal(targets.pseudo_labels, labels)
    assert torch.equal(targets.confidences, torch.ones(4))

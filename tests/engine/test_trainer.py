"""A training on one rank, without Ray: epochs are saved, and another process goes on from them."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from brainray import layout
from brainray.config import Config
from brainray.config_text import load_config
from brainray.engine.shard import CachedImages, PixelScale, RankData, SliceShard, sample_keys
from brainray.engine.state import load_checkpoint, newest_readable_epoch
from brainray.engine.trainer import Trainer
from brainray.models.encoder import build_encoder
from brainray.schema import UNLABELLED, Metrics
from brainray.storage import Folder

CLASSES = ["dark", "bright"]
SIDE = 32


def slices(num: int, first: int, *, labelled: bool = True) -> tuple[SliceShard, list[str]]:
    """Dark and bright slices in turns, and their sample_ids."""
    generator = torch.Generator().manual_seed(first)
    labels = torch.arange(num) % 2
    noise = torch.randint(0, 60, (num, 1, SIDE, SIDE), generator=generator)
    images = (noise + 120 * labels[:, None, None, None]).to(torch.uint8)
    ids = [f"{number:032x}" for number in range(first << 64, (first + num) << 64, 1 << 64)]
    shown = labels if labelled else torch.full_like(labels, UNLABELLED)
    return SliceShard(CachedImages(images), torch.from_numpy(sample_keys(ids)), shown), ids


def config_of(num_epochs: int, *overrides: str) -> Config:
    return load_config(
        None,
        [
            "seed=1",
            "objective.name=anchored",
            "clustering.num_clusters=2",
            "clustering.pca_dim=2",
            f"train.num_epochs={num_epochs}",
            f"train.image_size={SIDE}",
            "train.batch_size_per_worker=8",
            "train.labelled_batch_size_per_worker=8",
            "train.precision=fp32",
            "train.learning_rate=1e-3",
            *overrides,
        ],
    )


def train(folder: Path, config: Config, *, stop_after: int | None = None) -> list[Metrics]:
    """The metrics of each reported epoch; ``stop_after`` some, as when a process is lost."""
    run, reported = Folder(folder), list[Metrics]()

    def report(metrics: Metrics, saved: Folder) -> None:
        assert saved.exists(layout.MODEL)
        reported.append(metrics)
        if len(reported) == stop_after:
            raise InterruptedError

    parts = [slices(12, 0), slices(24, 100, labelled=False), slices(8, 200), slices(6, 300)]
    (labelled, labelled_ids), (unlabelled, unlabelled_ids) = parts[:2]
    (validation, validation_ids), (test, _) = parts[2:]
    ids = labelled_ids + unlabelled_ids + validation_ids
    run.write_table(layout.SEEN, pa.table({"sample_id": ids}))
    inherited = torch.full((len(unlabelled),), UNLABELLED)
    encoder = build_encoder("resnet18", "random", len(CLASSES))
    trainer = Trainer(
        config,
        run,
        RankData(
            labelled=labelled,
            unlabelled=unlabelled,
            validation=validation,
            test=test,
            inherited=inherited,
            labelled_weights=None,
        ),
        pa.table({name: ["x"] * 6 for name in ("sample_id", "path", "frame")}),
        encoder,
        encoder,
        classes=CLASSES,
        scale=PixelScale(0.3, 0.2),
        report=report,
    )
    trainer.fit()
    return reported


@pytest.mark.parametrize("overrides", [["train.ema_decay=0.9"], ["objective.name=supervised"]])
def test_a_lost_process_costs_no_epoch_and_changes_no_weight(
    tmp_path: Path, overrides: list[str]
) -> None:
    config = config_of(3, *overrides, "evaluation.test_each_epoch=false")
    torch.manual_seed(0)
    expected = train(tmp_path / "whole", config)
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        train(tmp_path / "lost", config, stop_after=2)
    assert newest_readable_epoch(Folder(tmp_path / "lost")) == 2
    torch.manual_seed(99)  # the initial weights are not those that it goes on with
    found = train(tmp_path / "lost", config)

    assert [metrics["epoch"] for metrics in expected] == [1, 2, 3]
    assert found == expected[2:]
    one, two = (
        load_checkpoint(Folder(tmp_path / name / layout.LAST)) for name in ("whole", "lost")
    )
    assert one.epoch == two.epoch == 3
    for name, value in one.encoder.state_dict().items():
        assert torch.equal(value, two.encoder.state_dict()[name]), name
    assert torch.equal(one.clusters.centers, two.clusters.centers)


def test_what_differs_in_brightness_alone_is_learned(tmp_path: Path) -> None:
    config = config_of(4, "evaluation.test_each_epoch=false", "augment.policy=none")
    reported = train(tmp_path, config)
    assert reported[-1]["validation/cluster/accuracy"] == 1.0
    chosen = load_checkpoint(Folder(tmp_path) / layout.BEST).epoch
    predictions = Folder(tmp_path).read_table(layout.predictions_file(chosen))
    assert predictions["cluster_class"].to_pylist() == CLASSES * 3

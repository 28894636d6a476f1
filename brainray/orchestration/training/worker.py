"""Ray Train's entry point for training, on every rank."""

from typing import Any

import ray.train
import ray.train.torch
import torch

from brainray import dist, layout
from brainray.config_text import parse_config
from brainray.engine.shard import PixelScale
from brainray.engine.trainer import Trainer
from brainray.models.encoder import build_encoder
from brainray.orchestration.paths import check_is_here
from brainray.orchestration.ray_train import configure_rank, distributed, return_user_errors
from brainray.orchestration.run import Run
from brainray.orchestration.store import ImageStore
from brainray.orchestration.training.rank_data import load_rank_data
from brainray.schema import Metrics
from brainray.storage import Folder


@return_user_errors
def train_worker(settings: dict[str, Any]) -> None:
    """Load this rank's share of the slices, and train to the end."""
    config, start = parse_config(settings["config"]), ray.get(settings["start"])
    run = Folder(settings["run"])
    device = ray.train.torch.get_device()
    configure_rank()
    torch.manual_seed(config.seed)
    with dist.raise_on_all_ranks(device):
        check_is_here(run)
        store = ImageStore.open(Folder(settings["store"]), Run.open(run).record.data_hash)
        data = load_rank_data(config, run, store, device, dist.rank(), dist.world_size())
        encoder = build_encoder(config.encoder.name, start, len(store.manifest.classes))
        # Only the first rank makes predictions of them that need more.
        columns = None if dist.rank() == 0 else ["sample_id"]
        test_slices = run.read_table(layout.TEST_SLICES, columns)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    trainer = Trainer(
        config,
        run,
        data,
        test_slices,
        encoder,
        distributed(encoder),
        classes=store.manifest.classes,
        scale=PixelScale(store.manifest.pixel_mean, store.manifest.pixel_std),
        report=_report,
    )
    trainer.fit()


def _report(metrics: Metrics, folder: Folder) -> None:
    """The files are already in storage: Ray is only given their location and the metrics."""
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint(folder.path, folder.filesystem)
        if dist.rank() == 0
        else None,
        checkpoint_dir_name=folder.name,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )

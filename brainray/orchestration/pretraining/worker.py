"""Ray Train's entry point for self-supervised training, on every rank."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch

from brainray import dist
from brainray.config import FeatureConfig
from brainray.config_text import parse_config
from brainray.engine.pretrainer import Pretrainer
from brainray.engine.self_supervised import Groups, PretextSlices, build_pretext
from brainray.engine.shard import CachedImages, PixelScale, sample_keys
from brainray.models.features import build_feature_encoder, num_features
from brainray.models.pretext import PretextModel
from brainray.orchestration.paths import check_is_here
from brainray.orchestration.ray_train import configure_rank, distributed, return_user_errors
from brainray.orchestration.store import ImageStore, read_images
from brainray.schema import TRAIN
from brainray.storage import Folder

_GROUPED_BY = {"subject": "split_group_id", "slice": "sample_id"}  # by kind of positives


@return_user_errors
def pretrain_worker(settings: dict[str, Any]) -> None:
    """Load this rank's share of the slices, and train to the end."""
    config = parse_config(settings["config"])
    feature, folder = FeatureConfig.model_validate(settings["feature"]), Folder(settings["folder"])
    seed: int = settings["seed"]
    configure_rank()
    device = ray.train.torch.get_device()
    torch.manual_seed(seed)
    with dist.raise_on_all_ranks(device):
        check_is_here(folder)
        store = ImageStore.open(Folder(settings["store"]), settings["data_hash"])
        slices = _load_slices(store, config.self_supervision.positives, feature.image_size, device)
        scale = PixelScale(store.manifest.pixel_mean, store.manifest.pixel_std)
        encoder = build_feature_encoder(
            feature.encoder,
            ray.get(settings["state"]),
            seed=seed,
            pixel_mean=scale.mean,
            pixel_std=scale.std,
        ).standardised_by(scale.mean, scale.std)
        pretext = build_pretext(feature.pretext, config.self_supervision)
        head = pretext.head(num_features(encoder, feature.image_size))
        learned_head = ray.get(settings["head"])
        if learned_head is not None:
            head.load_state_dict(learned_head)
    learner = PretextModel(encoder, head).to(device).to(memory_format=torch.channels_last)
    pretrainer = Pretrainer(
        config,
        feature,
        folder,
        slices,
        learner,
        distributed(learner),
        seed=seed,
        scale=scale,
        report=ray.train.report,
    )
    pretrainer.fit()


def _load_slices(
    store: ImageStore, positives: str, side: int, device: torch.device
) -> PretextSlices:
    """Load this rank's share of the slices, with their groups of positives."""
    rows = _rows_of_store(store)
    first, end = (
        place * len(rows) // dist.world_size() for place in (dist.rank(), dist.rank() + 1)
    )
    mine = rows["sample_id"].to_pylist()[first:end]
    keys = torch.from_numpy(sample_keys(mine)).to(device)
    _, groups = np.unique(rows[_GROUPED_BY[positives]].to_numpy(), return_inverse=True)
    images = torch.from_numpy(read_images(store.folder, mine, TRAIN, side)).to(device)
    return PretextSlices(CachedImages(images), keys, Groups(torch.from_numpy(groups[first:end])))


def _rows_of_store(store: ImageStore) -> pa.Table:
    """The training slices without labels, with slices of one (likely) subject adjacent.

    A group's name depends on its size (it is the smallest sample_id), so groups are ordered by a
    hash of it: every rank gets large and small ones.
    """
    index = store.index()
    rows = index.filter(pc.equal(index["split"], TRAIN)).select(["sample_id", "split_group_id"])
    groups = rows["split_group_id"].to_pylist()
    order = pa.array([hashlib.sha256(group.encode()).hexdigest() for group in groups], pa.string())
    rows = rows.append_column("order", order)
    return rows.sort_by([("order", "ascending"), ("sample_id", "ascending")])

"""Features of every slice of an image store, extracted by Ray Data and kept for later runs."""

import os
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from brainray import layout
from brainray.config import Config, FeatureConfig
from brainray.engine.forward import infer
from brainray.engine.recipe import resolve_precision
from brainray.engine.slice_model import stored_pixels
from brainray.errors import ConfigError, DataError
from brainray.log import log
from brainray.models.features import PIXELS, FeatureEncoder, build_feature_encoder, num_features
from brainray.mri.identity import content_key
from brainray.orchestration.blocks import blocks_on_actors, read_parts
from brainray.orchestration.lock import held
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.pretraining.weights import EncoderStart, State, Weights
from brainray.orchestration.resources import alive_nodes, plan_actors
from brainray.orchestration.store import ImageStore
from brainray.schema import FEATURES, matrix_of
from brainray.storage import Folder

_BATCH = 64  # slices
ROW = ["sample_id", "split", "path", "frame"]
ROW_ORDER = [(name, "ascending") for name in ROW]


@dataclass(frozen=True)
class FeatureStore:
    """Finished features; the manifest is written last, so a folder without one is incomplete."""

    folder: Folder
    key: str  # changes with the slices, the encoder, its weights or its input settings

    def read(self) -> tuple[pa.Table, NDArray[np.float32]]:
        """The ``ROW`` columns, by which rows are ordered, and the features (N, E).

        Raises:
            DataError: a feature is NaN or infinite, or all slices have the same features.
        """
        table = (self.folder / layout.PARTS).read_table("")
        rows = table.select(ROW)
        order = pc.sort_indices(rows, sort_keys=ROW_ORDER)
        features = matrix_of(table["features"])[order.to_numpy()]
        check_clusterable(features, self.folder.uri)
        return rows.take(order), features


def check_clusterable(features: NDArray[np.floating], where: str) -> None:
    """Raises DataError for features (N, E) that cannot be clustered."""
    num_bad = int((~np.isfinite(features).all(axis=1)).sum())
    if num_bad:
        raise DataError(
            f"{num_bad} of {len(features)} slices have NaN or infinite features ({where}): the "
            "encoder's weights are broken or its training has diverged; choose other weights or a "
            "lower learning rate"
        )
    if len(features) and np.ptp(features, axis=0).max() <= 1e-6 * np.abs(features).max():
        raise DataError(
            f"all {len(features)} slices have the same features ({where}) and cannot be "
            "clustered: the encoder has collapsed or the slices are copies; choose other weights "
            "or slices"
        )


def checked_num_features(
    store: ImageStore, name: str, feature: FeatureConfig, weights: Weights
) -> int:
    """Number of features E; refuses settings that would fail on every actor.

    Args:
        store: the slices.
        name: name of the feature, for errors.
        feature: the encoder and the size of the slices.
        weights: weights of the encoder; those of ImageNet always fit and are not loaded here.

    Raises:
        ConfigError: an unknown encoder, or weights or a slice size that do not fit it.
    """
    try:
        encoder = build_feature_encoder(
            feature.encoder,
            "random" if weights.identity == "imagenet" else weights.state,
            seed=0,
            pixel_mean=store.manifest.pixel_mean,
            pixel_std=store.manifest.pixel_std,
        )
        return num_features(encoder, feature.image_size)
    except ConfigError as error:
        raise ConfigError(f"study.features.{name}: {error}") from None


def extract_features(config: Config, store: ImageStore, start: EncoderStart) -> FeatureStore:
    """Features of every slice of the store, extracted now or by an earlier run.

    Args:
        config: storage, device and precision.
        store: the slices.
        start: the encoder; if its feature asks for training, with trained weights.
    """
    feature, identity = start.feature, start.weights.identity
    made_by = {
        "format": layout.FEATURES_FORMAT,
        "data_hash": store.manifest.slices_hash,
        "encoder": feature.encoder,
        "weights": identity,
        "image_size": feature.image_size,
        "seed": start.seed if identity == "random" and feature.encoder != PIXELS else None,
        "precision": config.train.precision,
    }
    key = content_key(made_by)
    target = Folder(config.storage) / layout.FEATURES / f"{feature.encoder}-{key}"
    if not target.exists(layout.MANIFEST):
        # Concurrent studies share features: the later ones wait, then find them.
        with held(Folder(config.storage), layout.FEATURES, target.name, in_turn=True):
            if not target.exists(layout.MANIFEST):
                _extract(config, store, start, made_by | {"key": key}, target)
                return FeatureStore(target, key)
    log(f"features {target}: up to date, reusing them")
    return FeatureStore(target, key)


def _extract(
    config: Config,
    store: ImageStore,
    start: EncoderStart,
    made_by: dict[str, Any],
    target: Folder,
) -> None:
    """Extract and write features; ``made_by`` becomes part of the manifest."""
    started = time.monotonic()
    with target.rebuilt(layout.MANIFEST) as building:
        num_rows = _write_parts(config, store, start, building / layout.PARTS)
        if Manifest.read(store.folder).slices_hash != store.manifest.slices_hash:
            raise DataError(f"the image store {store.folder} was updated meanwhile: submit again")
        expected = sum(sum(by_class.values()) for by_class in store.manifest.num_slices.values())
        if num_rows != expected:
            raise DataError(
                f"{store.folder}: {expected - num_rows} slices of its manifest are missing; delete "
                "the store and preprocess again"
            )
        seconds = time.monotonic() - started
        manifest = made_by | {"num_rows": num_rows, "seconds": round(seconds, 2)}
        building.write_json(layout.MANIFEST, manifest)
    log(f"features {target}: {num_rows} slices in {seconds:.0f} s")


def _write_parts(config: Config, store: ImageStore, start: EncoderStart, parts: Folder) -> int:
    """Extract on actors and write Parquet; returns the number of rows."""
    actors = plan_actors(config.train, alive_nodes(), one_per_node=False)
    columns = [*ROW, "height", "width", "image"]
    slices = read_parts(store.folder / layout.IMAGES, columns)
    arguments = {
        "feature": start.feature,
        "state": start.weights.state,
        "seed": start.seed,
        "pixel_mean": store.manifest.pixel_mean,
        "pixel_std": store.manifest.pixel_std,
        "precision": config.train.precision,
        "device": torch.device(actors.device),
    }
    # Complete blocks: every run batches the same slices together.
    dataset = blocks_on_actors(slices, _Extractor, arguments, actors)
    dataset.write_parquet(parts.path, filesystem=parts.filesystem, try_create_dir=parts.has_folders)
    return int(parts.read_table("", columns=["sample_id"]).num_rows)


@dataclass
class _Extractor:
    """Keeps the encoder on one actor's device.

    The encoder is built with the first block: Ray Data reports an exception in an actor's
    ``__init__`` as a lost actor, which would hide the error.
    """

    feature: FeatureConfig
    state: State
    seed: int
    pixel_mean: float
    pixel_std: float
    precision: str
    device: torch.device

    @torch.inference_mode()
    def __call__(self, block: pa.Table) -> pa.Table:
        batches = (block.slice(first, _BATCH) for first in range(0, block.num_rows, _BATCH))
        pixels = (
            torch.from_numpy(stored_pixels(batch, self.feature.image_size)).to(self.device) / 255.0
            for batch in batches
        )
        precision = resolve_precision(self.precision, self.device)
        parts = infer(self.encoder, pixels, self.device, precision)
        rows = [row for part in parts for row in part.float().cpu().numpy()]
        values = pa.array(rows, FEATURES.field("features").type)
        return pa.table([*(block[name] for name in ROW), values], schema=FEATURES)

    @cached_property
    def encoder(self) -> FeatureEncoder:
        if self.device.type == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        encoder = build_feature_encoder(
            self.feature.encoder,
            self.state,
            seed=self.seed,
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
        )
        return encoder.to(self.device).to(memory_format=torch.channels_last)

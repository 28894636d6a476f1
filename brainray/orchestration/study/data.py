"""Input of a study: its data sets, their slices by subset, and their features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from brainray import layout
from brainray.config import Config, FeatureConfig
from brainray.errors import DataError
from brainray.models.features import PIXELS
from brainray.mri.identity import content_key
from brainray.mri.leakage import Fingerprints, exposure
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.pretraining.driver import pretrain
from brainray.orchestration.pretraining.features import (
    ROW,
    ROW_ORDER,
    FeatureStore,
    extract_features,
)
from brainray.orchestration.pretraining.weights import EncoderStart, Weights, weights_from
from brainray.orchestration.seen import all_seen, seen_by_weights, training_slices
from brainray.orchestration.store import ImageStore, open_store
from brainray.orchestration.study.grid import FITTED_SUBSET, Slices
from brainray.schema import SEEN, TEST, TRAIN, UNLABELLED, subset_masks
from brainray.storage import Folder

FeatureKey = tuple[str, str, int]
"""Data set, name in ``study.features``, and seed."""


_COMPARISON = 5  # increased when `clean` or `strict` of the same slices may change


@dataclass(frozen=True)
class StudiedSet:
    """A data set of a study."""

    store: ImageStore
    slices: Slices
    classes: list[str]  # names of the labels; empty if there are none

    @property
    def names_of_labels(self) -> list[str]:
        """Label of each slice (N,), empty where unknown."""
        return ["" if i == UNLABELLED else self.classes[i] for i in self.slices.labels]


@dataclass(frozen=True)
class StudiedFeatures:
    """Features and trained encoders of every data set."""

    stores: Mapping[FeatureKey, FeatureStore]
    encoders: Mapping[FeatureKey, Folder]  # trained encoders only


def open_stores(config: Config) -> dict[str, ImageStore]:
    """The image stores by data set name, created if they do not exist yet.

    Raises:
        BrainrayError: a data set cannot be used.
    """
    if config.sources:
        stores = {}
        for name, source in config.sources.items():
            update = {"name": f"{config.name}-{name}", "source": source}
            stores[name] = preprocess(config.model_copy(update=update))
        return stores
    name = config.dataset or config.given("name")
    if config.source is not None:
        return {name: preprocess(config.model_copy(update={"name": name}))}
    return {name: open_store(Folder(config.storage), name)}


def seen_by_features(config: Config) -> pa.Table:
    """``SEEN`` rows of the training of the starting weights of all the study's features."""
    tables = [
        seen_by_weights(feature.weights, Folder(config.storage))
        for feature in config.study.features.values()
    ]
    return pa.concat_tables([SEEN.empty_table(), *(rows for rows in tables if rows is not None)])


def study_set(store: ImageStore, folder: Folder, seen_before: pa.Table) -> StudiedSet:
    """The slices of a store, with masks of those fitted, held out, ``clean`` and ``strict``.

    Args:
        store: the store, whose training slices are fitted.
        folder: of the study, where the subsets are saved.
        seen_before: ``SEEN`` rows of further slices that were seen.

    Raises:
        DataError: no slice to fit.
    """
    index = store.index().sort_by(ROW_ORDER)
    training = pc.equal(index["split"], TRAIN)
    fitted = np.asarray(training.to_numpy(), dtype=np.bool_)
    if not fitted.any():
        raise DataError(f"{store.folder} has no training slices to fit")
    names = index["label"].to_pylist()
    classes = sorted({name for name in names if name is not None})
    position = {name: number for number, name in enumerate(classes)}
    labels = np.array([position.get(name, UNLABELLED) for name in names], dtype=np.int64)
    subsets = {FITTED_SUBSET: fitted}
    if not fitted.all():
        for subset, flags in _held_out(store, folder, seen_before).items():
            rows = np.zeros(len(fitted), dtype=np.bool_)
            rows[~fitted] = flags
            subsets[subset] = rows
    slices = Slices(index.select(ROW), labels, subsets)
    return StudiedSet(store, slices, classes)


def _held_out(store: ImageStore, folder: Folder, seen_before: pa.Table) -> dict[str, np.ndarray]:
    """Masks of the test slices, in ``ROW_ORDER``, in each subset; saved with the study."""
    depends_on = {
        "comparison": _COMPARISON,
        "data_hash": store.manifest.data_hash,
        "listing": store.manifest.listing,  # names of subjects
        "seen_before": seen_before["sample_id"].to_pylist(),
    }
    name = f"subsets-{content_key(depends_on)}.parquet"
    if not folder.exists(name):
        index = store.index(thumbnails=True).sort_by(ROW_ORDER)
        test = index.filter(pc.equal(index["split"], TEST))
        seen = all_seen(training_slices(store), seen_before)
        found = ray.get(
            _expose.remote(
                Fingerprints.from_table(test),
                Fingerprints.from_table(seen),
                store.manifest.preprocess,
            )
        )
        folder.write_table(name, pa.table(found.columns))
    return subset_masks(folder.read_table(name))


_expose = ray.remote(num_cpus=1)(exposure)


def study_features(
    config: Config,
    sets: Mapping[str, StudiedSet],
    weights: Mapping[str, Weights],
) -> StudiedFeatures:
    """Train the encoders that need training, and extract every feature set for every seed.

    Args:
        config: ``study`` and all settings of training.
        sets: data sets by name.
        weights: initial weights of the encoders, by feature.
    """
    stores: dict[FeatureKey, FeatureStore] = {}
    encoders: dict[FeatureKey, Folder] = {}
    for dataset, each in sets.items():
        for feature_name, feature in config.study.features.items():
            for seed in config.study.seeds:
                key = (dataset, feature_name, seed)
                if not _depends_on_seed(feature) and seed != config.study.seeds[0]:
                    stores[key] = stores[dataset, feature_name, config.study.seeds[0]]
                    continue
                start = EncoderStart(feature, weights[feature_name], seed)
                if feature.is_trained:
                    encoders[key] = pretrain(config, each.store, start)
                    start = replace(start, weights=weights_from(encoders[key], layout.ENCODER))
                stores[key] = extract_features(config, each.store, start)
    return StudiedFeatures(stores, encoders)


def _depends_on_seed(feature: FeatureConfig) -> bool:
    has_drawn_weights = feature.weights == "random" and feature.encoder != PIXELS
    return feature.is_trained or has_drawn_weights

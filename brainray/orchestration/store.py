"""The image store: written by preprocessing and read by all later stages."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel

from brainray import layout
from brainray.config import Config
from brainray.errors import ConfigError, DataError, StoreChangedError
from brainray.mri.resize import stretch
from brainray.orchestration.manifest import Manifest, check_versions
from brainray.orchestration.records import NOT_OF_SLICES, differing_settings, with_defaults
from brainray.schema import ESTIMATED, IMAGE_INDEX_COLUMNS, TEST
from brainray.storage import Folder


@dataclass(frozen=True)
class ImageStore:
    """A finished store; ``manifest`` is written last, so a folder without one is not a store."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def open(cls, folder: Folder, data_hash: str | None = None) -> "ImageStore":
        """
        Args:
            folder: the store's folder.
            data_hash: expected hash, if given.

        Raises:
            DataError: no finished store, or one of another version.
            StoreChangedError: its slices are not those of the expected hash.
        """
        if not folder.exists(layout.MANIFEST):
            raise DataError(
                f"no image store at {folder}: run jobs/preprocess.py with --set name=... first, "
                "and name that store with --set dataset=..."
            )
        manifest = Manifest.read(folder)
        if data_hash is not None and manifest.data_hash != data_hash:
            raise StoreChangedError(
                f"the image store {folder} has changed (hash {data_hash} before, "
                f"{manifest.data_hash} now): train on it under another name"
            )
        return cls(folder, manifest)

    def index(self, *, thumbnails: bool = False) -> pa.Table:
        """Every column except the pixels, ordered by split and sample_id.

        For hundreds of thousands of slices, ``thumbnails`` are gigabytes.
        """
        columns = [*IMAGE_INDEX_COLUMNS, *(["thumbnail"] if thumbnails else [])]
        table = self.folder.read_table(layout.IMAGES, columns=columns)
        return table.sort_by([("split", "descending"), ("sample_id", "ascending")])

    def test_paths(self) -> set[str]:
        """Paths, relative to the source, of the labelled test slices."""
        index = self.index()
        is_scored = pc.and_(pc.equal(index["split"], TEST), pc.is_valid(index["label"]))
        return set(index.filter(is_scored)["path"].to_pylist())

    def has_outdated_subjects(self) -> bool:
        """Whether another version of brainray estimated subjects of its slices."""
        if not self.manifest.is_compared_otherwise:
            return False
        sources = self.folder.read_table(layout.IMAGES, columns=["subject_source"])
        return ESTIMATED in set(sources["subject_source"].to_pylist())


def open_store(storage: Folder, name: str, data_hash: str | None = None) -> ImageStore:
    """Open a store by name; arguments and errors are those of `ImageStore.open`."""
    return ImageStore.open(storage / layout.DATASETS / name, data_hash)


def read_images(store: Folder, sample_ids: list[str], split: str, side: int) -> NDArray[np.uint8]:
    """Slices (n, 1, side, side) uint8 of one split of a store, in the order of ``sample_ids``."""
    images = np.empty((len(sample_ids), 1, side, side), dtype=np.uint8)
    rows: dict[tuple[str, str], list[int]] = {}
    for row, identity in enumerate(sample_ids):
        rows.setdefault((split, identity), []).append(row)
    for key, image in scan_images(store, rows, side):
        images[rows[key], 0] = image
    return images


def scan_images(
    store: Folder, wanted: Collection[tuple[str, str]], side: int
) -> Iterator[tuple[tuple[str, str], NDArray[np.uint8]]]:
    """Each wanted (split, sample_id) with its slice (side, side) uint8, in stored order.

    The store is read once, one row group in memory at a time.
    """
    missing = set(wanted)
    folder = store / layout.IMAGES
    for name in folder.names():
        with folder.open_table(name) as part:
            for number in range(part.num_row_groups):
                names = part.read_row_group(number, columns=["split", "sample_id"])
                keys = list(zip(*names.to_pydict().values(), strict=True))
                rows = [row for row, key in enumerate(keys) if key in wanted]
                if not rows:
                    continue
                group = part.read_row_group(number, columns=["height", "width", "image"])
                for row, stored in zip(rows, group.take(rows).to_pylist(), strict=True):
                    pixels = np.frombuffer(stored["image"], dtype=np.uint8)
                    image = pixels.reshape(stored["height"], stored["width"])
                    missing.discard(keys[row])
                    yield keys[row], stretch(image, side)
    if missing:
        raise DataError(
            f"{store}: {len(missing)} slices in the index are missing, such as "
            f"{min(missing)[1]}; delete the store and preprocess again"
        )


def as_store_was_made(config: Config, store: ImageStore) -> Config:
    """The config with the preprocessing and the split of an existing store.

    Raises:
        ConfigError: it sets a different value; settings that it does not set are taken over.
    """
    slices = store.manifest.preprocess.model_dump(mode="json", exclude=NOT_OF_SLICES)
    # The seed also draws labels, so it may differ.
    split = {key: value for key, value in store.manifest.split.items() if key != "seed"}
    problems = [
        _difference(config.preprocess, slices, "preprocess."),
        _difference(config.split, split, "split."),
    ]
    if config.classes.map:
        made_map = store.manifest.classes_map
        problems.append(differing_settings(made_map, config.classes.map, "classes.map."))
    difference = "; ".join(problem for problem in problems if problem)
    if difference:
        raise ConfigError(
            f"the image store {store.folder} was made with other settings ({difference}): "
            "choose another dataset, or preprocess again under another name"
        )
    made = {"preprocess": store.manifest.preprocess, "split": config.split.model_copy(update=split)}
    return config.model_copy(update=made)


def store_to_train_on(config: Config, data_hash: str | None = None) -> tuple[Config, ImageStore]:
    """The config with the settings of the image store ``config.dataset``, and the store.

    Raises:
        ConfigError: the config names no store, or does not fit it.
        DataError: no such store, or another version of brainray made it.
        StoreChangedError: its slices are not those of ``data_hash``, if given.
    """
    store = open_store(Folder(config.storage), config.given("dataset"), data_hash)
    config = as_store_was_made(config, store)
    check_versions(
        f"the image store {store.folder} was",
        store.manifest.preprocess,
        store.manifest.versions,
        "preprocess again under another name",
    )
    check_sides(config)
    return config, store


def check_sides(config: Config) -> None:
    """Raises ConfigError if training uses a larger slice size than preprocessing stores."""
    sides = {"train.image_size": config.train.image_size}
    if config.encoder.pretext != "none":
        sides["encoder.pretext_image_size"] = config.encoder.pretext_image_size
    for key, side in sides.items():
        if side > config.preprocess.image_size:
            raise ConfigError(
                f"{key} ({side}) exceeds preprocess.image_size ({config.preprocess.image_size}): "
                "lower the former, or preprocess again with a larger preprocess.image_size"
            )


def _difference(config: BaseModel, made: dict[str, Any], prefix: str) -> str:
    """Settings of the config that differ from those the store was made with."""
    requested = config.model_dump(mode="json", exclude_unset=True, include=set(made))
    made = {key: made[key] for key in requested}
    return differing_settings(made, with_defaults(requested, made), prefix)  # also within sections


def describe(store: ImageStore) -> str:
    """A summary of the store in a few lines."""
    manifest = store.manifest
    lines = [f"image store {store.folder}:"]
    for split, by_class in manifest.num_slices.items():
        counts = ", ".join(f"{count:,} {name or 'unlabelled'}" for name, count in by_class.items())
        lines.append(f"  {split}: {sum(by_class.values()):,} slices ({counts or 'none'})")
    lines.append(f"  removed copies: {manifest.num_removed_copies:,}")
    reasons = ", ".join(
        f"{count:,} {reason}" for reason, count in manifest.rejected_reasons.items()
    )
    lines.append(f"  rejected: {manifest.num_rejected:,}" + (f" ({reasons})" if reasons else ""))
    used = ", ".join(f"{count:,} {name}" for name, count in manifest.skull_strip_used.items())
    lines.append(f"  skull strip: {used}")
    return "\n".join(lines)


def store_metrics(store: ImageStore) -> dict[str, float]:
    """The numbers of slices, by split and class, and of what became of the files."""
    manifest = store.manifest
    leakage = store.folder.read_json(layout.LEAKAGE)
    by_class = {
        f"num_slices/{split}/{label or 'unlabelled'}": float(count)
        for split, by_label in manifest.num_slices.items()
        for label, count in by_label.items()
    }
    by_subset = {f"num_test/{subset}": float(n) for subset, n in leakage["num_test"].items()}
    return {
        **by_class,
        **by_subset,
        "num_files_decoded": float(manifest.num_files_decoded),
        "num_rejected": float(manifest.num_rejected),
        "num_removed_copies": float(manifest.num_removed_copies),
    }

"""Example slices for a store's figures: a few source files, decoded again."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.config import PreprocessConfig
from brainray.mri.decode import decode_file
from brainray.mri.skull_strip import StrippedSlice
from brainray.mri.slices import RejectedImage
from brainray.orchestration.preprocessing.plan import StorePlan
from brainray.orchestration.preprocessing.preparation import decode_options, read_file, strip
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.orchestration.store import ImageStore
from brainray.report.store_figures import SlicePair, draw_store_figures
from brainray.schema import TRAIN
from brainray.storage import Folder

_NUM_BEFORE_AFTER = 8
_NUM_ON_SHEET = 64
_NUM_PAIRS_PER_LEVEL = 6
_ANY_SALT = b"figures name no subjects"


def draw_figures(store: Folder, source: Folder, plan: StorePlan, config: PreprocessConfig) -> None:
    """Draw the store's figures; files that no longer exist are left out."""
    rows = plan.rows.sort_by("sample_id")  # ids are hashes, so this order is effectively random
    train = rows.filter(pc.equal(rows["split"], TRAIN))
    draw_store_figures(
        store,
        plan.statistics["num_slices"],
        before_after=_before_and_after(store, source, train, config),
        sheet=_stripped(source, rows.slice(0, _NUM_ON_SHEET), config),
        pairs=_pairs(source, plan.leakage["across_splits"], config),
    )


def _before_and_after(
    store: Folder, source: Folder, train: pa.Table, config: PreprocessConfig
) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """(class, original slice, stored slice) of training slices, spread over the classes."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in train.select(["label", "path", "frame", "sample_id"]).to_pylist():
        chosen.setdefault(row["label"] or "unlabelled", []).append(row)
    num_each = -(-_NUM_BEFORE_AFTER // len(chosen))
    samples = []
    for label, candidates in sorted(chosen.items()):
        for row in candidates[:num_each]:
            before = _decode(source, row["path"], row["frame"], config)
            if before is not None:
                samples.append((label, before, row["sample_id"]))
    del samples[_NUM_BEFORE_AFTER:]
    names = [identity for _, _, identity in samples]
    stored = ImageStore(store, {}).images(names, TRAIN, config.image_size)
    return [
        (label, before, after[0]) for (label, before, _), after in zip(samples, stored, strict=True)
    ]


def _stripped(source: Folder, rows: pa.Table, config: PreprocessConfig) -> list[StrippedSlice]:
    decoded = [
        _decode(source, row["path"], row["frame"], config)
        for row in rows.select(["path", "frame"]).to_pylist()
    ]
    return [strip(image, config) for image in decoded if image is not None]


def _pairs(
    source: Folder, across_splits: dict[str, list[dict[str, Any]]], config: PreprocessConfig
) -> list[SlicePair]:
    """Test slices next to their duplicates in training, spread over each level's list."""
    examples = []
    for level, found in across_splits.items():
        step = max(1, len(found) // _NUM_PAIRS_PER_LEVEL)
        for pair in found[::step][:_NUM_PAIRS_PER_LEVEL]:
            tested = _decode(source, pair["path"], pair.get("frame", ""), config)
            trained = _decode(source, pair["twin"], pair.get("twin_frame", ""), config)
            if tested is not None and trained is not None:
                title = f"{level}: {pair['kind']}, {pair['similarity']:.3f}"
                examples.append(SlicePair(title, tested, trained))
    return examples


def _decode(
    source: Folder, path: str, frame: str, config: PreprocessConfig
) -> NDArray[np.uint8] | None:
    try:
        content = read_file(source, FoundFile(path, 0, 0))
        for decoded in decode_file(content, decode_options(config, _ANY_SALT)):
            if decoded.frame == frame:
                return decoded.image
    except RejectedImage:
        pass
    return None

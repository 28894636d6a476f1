"""Example slices for a store's figures: a few source files, decoded again."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
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
from brainray.orchestration.preprocessing.slice_rows import decode_options, read_file, strip
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.orchestration.store import read_images
from brainray.report.figures import SlicePair
from brainray.report.store_figures import draw_store_figures
from brainray.schema import TRAIN
from brainray.storage import Folder

_NUM_BEFORE_AFTER = 8
_NUM_ON_SHEET = 64
_NUM_PAIRS_PER_LEVEL = 5  # a row of the figure
_ANY_SALT = b"figures name no subjects"

SlicePlace = tuple[str, str]  # path and frame


def draw_figures(store: Folder, source: Folder, plan: StorePlan, config: PreprocessConfig) -> None:
    """Draw the store's figures; files that no longer exist are left out."""
    rows = plan.rows.sort_by("sample_id")  # ids are hashes, so this order is effectively random
    train = rows.filter(pc.equal(rows["split"], TRAIN))
    draw_store_figures(
        store,
        plan.statistics["num_slices"],
        stripped=_before_and_after(store, source, train, config),
        sheet=_stripped(source, rows.slice(0, _NUM_ON_SHEET), config),
        leaked=_leaked(source, plan.leakage["across_splits"], config),
    )


def _before_and_after(
    store: Folder, source: Folder, train: pa.Table, config: PreprocessConfig
) -> list[SlicePair]:
    """Original and stored training slices, spread over the classes."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in train.select(["label", "path", "frame", "sample_id"]).to_pylist():
        chosen.setdefault(row["label"] or "unlabelled", []).append(row)
    num_each = -(-_NUM_BEFORE_AFTER // len(chosen))
    rows = [(label, row) for label, found in sorted(chosen.items()) for row in found[:num_each]]
    originals = _decoded(source, [_place(row) for _, row in rows], config)
    rows = [(label, row) for label, row in rows if _place(row) in originals][:_NUM_BEFORE_AFTER]
    names = [row["sample_id"] for _, row in rows]
    stored = read_images(store, names, TRAIN, config.image_size)
    return [
        SlicePair(label, originals[_place(row)], after[0])
        for (label, row), after in zip(rows, stored, strict=True)
    ]


def _stripped(source: Folder, rows: pa.Table, config: PreprocessConfig) -> list[StrippedSlice]:
    places = [_place(row) for row in rows.select(["path", "frame"]).to_pylist()]
    decoded = _decoded(source, places, config)
    return [strip(decoded[place], config) for place in places if place in decoded]


def _leaked(
    source: Folder, across_splits: dict[str, list[dict[str, Any]]], config: PreprocessConfig
) -> list[SlicePair]:
    """Test slices next to their duplicates in training, spread over each level's list."""
    chosen = []
    for level, found in across_splits.items():
        step = max(1, len(found) // _NUM_PAIRS_PER_LEVEL)
        for pair in found[::step][:_NUM_PAIRS_PER_LEVEL]:
            title = f"{level}: {pair['kind']}, {pair['similarity']:.3f}"
            chosen.append((title, _place(pair), _place(pair, "twin", "twin_frame")))
    decoded = _decoded(source, [place for _, *places in chosen for place in places], config)
    return [
        SlicePair(title, decoded[tested], decoded[trained])
        for title, tested, trained in chosen
        if tested in decoded and trained in decoded
    ]


def _place(row: Mapping[str, Any], path: str = "path", frame: str = "frame") -> SlicePlace:
    return row[path], row.get(frame, "")


def _decoded(
    source: Folder, places: Iterable[SlicePlace], config: PreprocessConfig
) -> dict[SlicePlace, NDArray[np.uint8]]:
    """The slices at these places, without those that no longer exist; reads each file once."""
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for path, frame in places:
        wanted[path].add(frame)
    found: dict[SlicePlace, NDArray[np.uint8]] = {}
    for path, frames in wanted.items():
        try:
            content = read_file(source, FoundFile(path, 0, 0))
            slices = decode_file(content, decode_options(config, _ANY_SALT))
        except RejectedImage:
            continue
        found |= {(path, each.frame): each.image for each in slices if each.frame in frames}
    return found

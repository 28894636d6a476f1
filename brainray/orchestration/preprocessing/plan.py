"""Plans the content of a store: duplicates, groups, splits and statistics of all slices.

Reads light columns only (hashes, fingerprints, labels, sums of pixels), in one process.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.config import Config, PreprocessConfig
from brainray.errors import DataError
from brainray.log import log
from brainray.mri.duplicates import COPY, KINDS
from brainray.mri.file_order import successive_files
from brainray.mri.groups import conflicting_groups
from brainray.mri.row_file import RowFile, SelectedRows
from brainray.mri.slices import commonest_reasons
from brainray.mri.split import draw_test
from brainray.orchestration.manifest import versions_of
from brainray.orchestration.preprocessing.grouping import SliceGroups, group_slices
from brainray.orchestration.preprocessing.leakage import leakage_report
from brainray.orchestration.preprocessing.previous_records import FILES, PreviousRecords
from brainray.orchestration.preprocessing.source import (
    Listing,
    SourceFile,
    check_frames,
    renaming_advice,
)
from brainray.orchestration.records import NOT_OF_SLICES
from brainray.schema import DUPLICATES, IMAGE_STORE, NAMED, TEST, TRAIN


@dataclass(frozen=True)
class StorePlan:
    """What happens to every accepted slice."""

    rows: pa.Table  # every kept slice: IMAGE_STORE without image and thumbnail, plus part
    files: pa.Table  # every slice of every file, for the next preprocessing; FILES
    duplicates: pa.Table
    leakage: dict[str, Any]
    statistics: dict[str, Any]


def plan_store(
    slices: pa.Table,
    fingerprints: RowFile,
    listing: Listing,
    config: Config,
    records: PreviousRecords,
) -> StorePlan:
    """Plan duplicates, groups, splits and statistics from the LIGHT rows of all files.

    Raises:
        DataError: no usable file, too many rejected ones, or inconsistent classes or splits.
    """
    accepted = slices.filter(pc.is_null(slices["reason"]))
    _check_rejections(slices, len(listing.files), config)
    check_frames(listing.files, slices)
    accepted_fingerprints = SelectedRows(fingerprints, accepted["fingerprint"].to_numpy())
    groups = group_slices(accepted, accepted_fingerprints, listing, config, records)
    file_by_path = {file.path: file for file in listing.files}
    files = [file_by_path[path] for path in accepted["path"].to_pylist()]
    frames = accepted["frame"].to_pylist()
    labels = [file.label_of(frame) for file, frame in zip(files, frames, strict=True)]
    ids = accepted["sample_id"].to_pylist()
    places = records.places()
    before = [places.get(identity) for identity in ids]
    generations = [place.generation if place else records.generation for place in before]
    given = official_splits(files, config)
    first_copy = _first_copies(ids, given, labels)
    kept = np.array([copy is None for copy in first_copy], dtype=np.bool_)
    if given is None:
        held_before = [place.split if place else None for place in before]
        # Slices whose copies contradict them are no slices of a class that training could keep.
        readable = _readable_labels(labels, groups.also_turned, [TRAIN] * len(labels))
        splits = _drawn_splits(accepted, kept, readable, groups, generations, held_before, config)
        num_moved = sum(old == TRAIN != new for old, new in zip(held_before, splits, strict=True))
        if num_moved:
            log(
                f"note: {num_moved} slices move from training to test, because new slices or "
                "subjects connect them with test slices"
            )
    else:
        splits = given
        # Copies are removed from training only: a published test set is not changed.
        kept |= np.array([split == TEST for split in splits], dtype=np.bool_)
        if config.split.mode == "purge":
            kept &= ~_twins_of_test(groups.also_turned, splits)
    table = accepted
    for name, column in {
        "split": splits,
        "label": _readable_labels(labels, groups.also_turned, splits),
        **groups.columns(),
        "generation": generations,
    }.items():
        table = table.append_column(name, pa.array(column, IMAGE_STORE.field(name).type))
    rows = table.filter(pa.array(kept))
    source_table = table.set_column(table.column_names.index("label"), "label", pa.array(labels))
    was_drawn_before = given is None and records.generation > 0
    classes = _check_classes(
        rows, source_table, config.classes.map, was_drawn_before=was_drawn_before
    )
    duplicates = _duplicates_table(table, kept, first_copy, groups)
    conflicting = conflicting_groups(groups.also_turned, labels)
    conflict_groups = [group if group in conflicting else None for group in groups.also_turned]
    statistics = _statistics(rows, classes, duplicates, config.preprocess)
    if given is not None and classes and set(statistics["num_slices"].get(TEST, {})) <= {""}:
        log(
            "note: no test slice has a label, so there will be no test metrics: give a labels "
            "table, or set split.mode=grouped to draw a test part"
        )
    return StorePlan(
        rows,
        _files_table(slices, table, rows),
        duplicates,
        leakage_report(
            source_table,
            accepted_fingerprints,
            kept,
            groups.pairs,
            conflict_groups,
            config.preprocess,
        ),
        statistics,
    )


def _check_rejections(slices: pa.Table, num_files: int, config: Config) -> None:
    accepted = slices.filter(pc.is_null(slices["reason"]))
    refused = slices.filter(pc.invert(pc.is_in(slices["path"], pc.unique(accepted["path"]))))
    num_rejected = pc.count_distinct(refused["path"]).as_py()
    reasons = zip(refused["reason"].to_pylist(), refused["detail"].to_pylist(), strict=True)
    commonest = commonest_reasons(list(reasons))
    if num_rejected == num_files:
        raise DataError(f"none of the {num_files} files in {config.source} is usable: {commonest}")
    if num_rejected > config.preprocess.max_rejected_fraction * num_files:
        raise DataError(
            f"{num_rejected} of {num_files} files in {config.source} were rejected, more than "
            f"preprocess.max_rejected_fraction={config.preprocess.max_rejected_fraction}: "
            f"{commonest}"
        )


def official_splits(files: Sequence[SourceFile], config: Config) -> list[str] | None:
    """The source's own split for each file, or None if the split must be drawn.

    Raises:
        DataError: the source does not have the splits that the settings need.
    """
    given = [file.split for file in files]
    if config.split.mode == "purge" and TEST not in given:
        raise DataError(
            f"split.mode=purge needs a test split, but {config.source} has none: add Training/ and "
            "Testing/ folders or a split column, or set split.mode=grouped"
        )
    if config.split.mode == "grouped" or not any(given):
        return None
    if None in given:
        remedy = "move it into the folder of a split, or out of the source"
        if config.labels is not None:
            remedy = (
                "give every row of the labels table a split, or give none and set "
                "split.mode=grouped"
            )
        raise DataError(
            f"{files[given.index(None)].path} has no split, which others have: {remedy}"
        )
    if TRAIN not in given:
        raise DataError(
            "the source has a test split but no readable training slice: add training slices or "
            "set split.mode=grouped"
        )
    return [str(split) for split in given]


def _first_copies(
    ids: list[str], splits: list[str] | None, labels: list[str | None]
) -> list[int | None]:
    """For each slice, the row of the byte-identical slice that comes first, or None; training rows
    come before others, labelled before unlabelled ones.
    """
    is_test = [splits is not None and split != TRAIN for split in splits or [TRAIN] * len(ids)]
    order = sorted(range(len(ids)), key=lambda row: (is_test[row], labels[row] is None))
    first: dict[str, int] = {}
    copies: list[int | None] = [None] * len(ids)
    for row in order:
        original = first.setdefault(ids[row], row)
        copies[row] = None if original == row else original
    return copies


def _drawn_splits(
    accepted: pa.Table,
    kept: NDArray[np.bool_],
    labels: list[str | None],
    groups: SliceGroups,
    generations: list[int],
    held_before: list[str | None],
    config: Config,
) -> list[str]:
    """Draw a stratified split of whole groups; copies follow the slice that they copy.

    A group keeps its previous split, whatever labels and slices were added or removed, so slices
    held out of one training are held out of the next. If groups from both sides have merged, all of
    their slices are held out.
    """
    split_groups = groups.split
    files = _unnamed_files(accepted, groups)
    rows = np.flatnonzero(kept).tolist()
    was_held_out: dict[str, bool] = {}
    for group, split in zip(split_groups, held_before, strict=True):
        if split is not None:
            was_held_out[group] = was_held_out.get(group, False) or split == TEST
    is_test = draw_test(
        [labels[row] for row in rows],
        [split_groups[row] for row in rows],
        [generations[row] for row in rows],
        was_held_out,
        successive_files([files[row] for row in rows]),
        fraction=config.split.test_fraction,
        seed=config.split.seed,
    )
    is_test_group = {split_groups[row]: bool(flag) for row, flag in zip(rows, is_test, strict=True)}
    return [TEST if is_test_group[group] else TRAIN for group in split_groups]


def _unnamed_files(accepted: pa.Table, groups: SliceGroups) -> list[str | None]:
    """Path and frame of slices whose subject no metadata tells, else None."""
    return [
        None if subject.source in NAMED else f"{path}/{frame}"
        for path, frame, subject in zip(
            accepted["path"].to_pylist(),
            accepted["frame"].to_pylist(),
            groups.subjects,
            strict=True,
        )
    ]


def _twins_of_test(groups: list[str], splits: list[str]) -> NDArray[np.bool_]:
    """Mask of training slices whose group of copies also contains test slices."""
    tested = {group for group, split in zip(groups, splits, strict=True) if split == TEST}
    return np.array(
        [split == TRAIN and group in tested for group, split in zip(groups, splits, strict=True)],
        dtype=np.bool_,
    )


def _readable_labels(
    labels: list[str | None], copies: list[str], splits: list[str]
) -> list[str | None]:
    """Labels without those of training slices whose copies in training, mirrored and rotated ones
    included, have a different label.

    Test labels have no influence on training slices.
    """
    train_labels = [
        label if split == TRAIN else None for label, split in zip(labels, splits, strict=True)
    ]
    conflicting = conflicting_groups(copies, train_labels)
    return [
        None if split == TRAIN and group in conflicting else label
        for label, group, split in zip(labels, copies, splits, strict=True)
    ]


def _duplicates_table(
    table: pa.Table,
    kept: NDArray[np.bool_],
    first_copy: list[int | None],
    groups: SliceGroups,
) -> pa.Table:
    """Every slice that is an exact, near or turned (mirrored or rotated) copy of another.

    Each is listed with the first slice with the same bytes, of its group of copies, or of its group
    of copies in any orientation; kept slices come first, training slices before test slices.
    """
    pairs = groups.pairs
    columns = [name for name in DUPLICATES.names if name in table.column_names]
    rows = table.select(columns).to_pylist()
    kinds = {  # all copies in a group have the same orientation
        frozenset((groups.copies[first], groups.copies[second])): KINDS[kind]
        for first, second, kind in zip(pairs.first, pairs.second, pairs.kind, strict=True)
    }
    first_of_group: dict[str, int] = {}
    first_of_turned_group: dict[str, int] = {}
    for number in sorted(
        range(len(rows)), key=lambda number: (not kept[number], rows[number]["split"] != TRAIN)
    ):
        first_of_group.setdefault(groups.copies[number], number)
        first_of_turned_group.setdefault(groups.also_turned[number], number)
    found = []
    for number, row in enumerate(rows):
        originals = {
            "exact": first_copy[number],
            "near": first_of_group[groups.copies[number]],
            "turned": first_of_turned_group[groups.also_turned[number]],
        }
        for level, original in originals.items():
            if original is None or original == number:
                continue
            ends = frozenset((groups.copies[original], groups.copies[number]))
            found.append(
                row
                | {
                    "level": level,
                    "kind": kinds.get(ends) if level == "turned" else KINDS[COPY],
                    "kept_path": rows[original]["path"],
                    "kept_frame": rows[original]["frame"],
                    "removed": not kept[number],
                }
            )
            break
    return pa.Table.from_pylist(found, schema=DUPLICATES)


def _check_classes(
    rows: pa.Table,
    source_rows: pa.Table,
    class_map: Mapping[str, str | None],
    *,
    was_drawn_before: bool,
) -> list[str]:
    """The training classes; a test class missing in training could never be predicted.

    ``source_rows`` are the slices before any was dropped or lost its label.
    """

    def classes(table: pa.Table, split: str) -> set[str]:
        return set(table.filter(pc.equal(table["split"], split))["label"].to_pylist()) - {None}

    by_split = {split: classes(rows, split) for split in (TRAIN, TEST)}
    unknown = sorted(by_split[TEST] - by_split[TRAIN])
    unusable = [name for name in unknown if name in classes(source_rows, TRAIN)]
    if unusable and by_split[TRAIN]:
        raise DataError(
            f"no training slice of class {', '.join(map(repr, unusable))} can be used: all are "
            "copies of slices with another label or, with split.mode=purge, of test slices: add "
            "slices of this class, or correct the labels"
        )
    if unknown and was_drawn_before:
        raise DataError(
            f"all slices of class {', '.join(map(repr, unknown))} are of subjects held out for "
            "testing: label slices of other subjects, or draw a new split under another name"
        )
    if unknown and by_split[TRAIN]:
        raise DataError(
            f"the test slices have class {', '.join(map(repr, unknown))}, but the training slices "
            f"have {', '.join(sorted(by_split[TRAIN]))}: {renaming_advice(unknown, class_map)}"
        )
    return sorted(by_split[TRAIN])


def _files_table(slices: pa.Table, table: pa.Table, rows: pa.Table) -> pa.Table:
    """FILES rows, including rejected and removed slices, with the part that stores their pixels."""
    part_of = dict(zip(rows["sample_id"].to_pylist(), rows["part"].to_pylist(), strict=True))
    parts = [part_of.get(identity) for identity in table["sample_id"].to_pylist()]
    place = table.column_names.index("part")
    accepted = table.set_column(place, FILES.field("part"), pa.array(parts, pa.string()))
    rejected = slices.filter(pc.is_valid(slices["reason"]))
    everything = pa.concat_tables([accepted, rejected], promote_options="default")
    return everything.select(FILES.names).cast(FILES)


def _statistics(
    rows: pa.Table, classes: list[str], duplicates: pa.Table, config: PreprocessConfig
) -> dict[str, Any]:
    train = rows.filter(pc.equal(rows["split"], TRAIN))
    if train.num_rows == 0:
        raise DataError(
            "no training slice is left: with split.mode=purge, all are copies of test slices; "
            "otherwise, all are of one subject or group of copies: add slices of other subjects"
        )
    num_pixels = train.num_rows * config.image_size**2
    mean = pc.sum(train["pixel_sum"]).as_py() / num_pixels / 255
    square = pc.sum(train["pixel_square_sum"]).as_py() / num_pixels / 255**2
    defaults = PreprocessConfig().model_dump(mode="json", include=NOT_OF_SLICES)
    made_by = config.model_dump(mode="json") | defaults | versions_of(config)

    def hash_of(*names: str) -> str:
        content = rows.select(names).sort_by([(name, "ascending") for name in names])
        identity = json.dumps([made_by, content.to_pylist()])
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    # Stores that were made at once have the hash that earlier versions gave them.
    generation_column = ["generation"] if pc.any(pc.greater(rows["generation"], 0)).as_py() else []
    return {
        "classes": classes,
        "num_slices": _count_by_split_and_class(rows),
        "num_removed_copies": int(pc.sum(duplicates["removed"]).as_py() or 0),
        "skull_strip_used": dict(sorted(Counter(rows["skull_strip"].to_pylist()).items())),
        "pixel_mean": mean,
        "pixel_std": max(square - mean * mean, 1e-8) ** 0.5,
        "data_hash": hash_of(
            "split", "sample_id", "label", "draw_group_id", "kin_group_id", *generation_column
        ),
        "slices_hash": hash_of("split", "sample_id", "split_group_id"),
    }


def _count_by_split_and_class(index: pa.Table) -> dict[str, dict[str, int]]:
    """``{"train": {"glioma": 1321, ...}, "test": ...}``; unlabelled slices count as ""."""
    counted = index.group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist()
    counts: dict[str, dict[str, int]] = {TRAIN: {}}
    for row in sorted(counted, key=lambda row: (row["split"], row["label"] or "")):
        counts.setdefault(row["split"], {})[row["label"] or ""] = row["count_all"]
    return counts

"""What a store will hold: copies, groups, splits and statistics of all slices at once.

It looks at the light columns only (hashes, thumbnails, labels, sums of pixels), in one process.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.config import Config, PreprocessConfig
from brainray.errors import DataError
from brainray.mri.duplicates import (
    most_similar,
    near_duplicate_groups,
    sample_id,
    thumbnail_matrix,
)
from brainray.mri.split import draw_test, joint_groups
from brainray.orchestration.store import count_by_split_and_class
from brainray.schema import DUPLICATES, TEST, TRAIN


@dataclass(frozen=True)
class StorePlan:
    """The decision about every accepted file."""

    rows: pa.Table  # path, sample_id, split, label, duplicate_group_id of every kept slice
    duplicates: pa.Table
    leakage: dict[str, Any]
    statistics: dict[str, Any]


def plan_store(index: pa.Table, config: Config) -> StorePlan:
    """Copies, groups, splits and statistics from the light columns of all files."""
    accepted = index.filter(pc.is_null(index["reason"]))
    _check_rejections(index, accepted.num_rows, config)
    threshold = config.preprocess.near_duplicate.thumbnail_correlation
    ids = [sample_id(digest) for digest in accepted["sha256"].to_pylist()]
    thumbnails = thumbnail_matrix(accepted["thumbnail"].to_pylist())
    groups = near_duplicate_groups(thumbnails, ids, threshold=threshold)
    labels: list[str | None] = accepted["label"].to_pylist()
    splits = _official_splits(accepted, config)
    first_copy = _first_copies(ids, splits)
    if splits is None:
        kept = np.array([copy is None for copy in first_copy], dtype=np.bool_)
        together = joint_groups(groups, accepted["subject_id"].to_pylist())
        is_test = np.zeros(len(ids), dtype=np.bool_)
        is_test[kept] = draw_test(
            [labels[row] for row in np.flatnonzero(kept)],
            [together[row] for row in np.flatnonzero(kept)],
            fraction=config.split.test_fraction,
            seed=config.split.seed,
        )
        split_column = [TEST if flag else TRAIN for flag in is_test]
    else:
        split_column = splits
        # Copies are removed from training only: a published test set stays what it is.
        kept = np.array(
            [copy is None or split == TEST for copy, split in zip(first_copy, splits, strict=True)]
        )
    # Test labels decide nothing about training slices: they may only be told of.
    of_training = [
        label if split == TRAIN else None for label, split in zip(labels, split_column, strict=True)
    ]
    conflicting = _conflicting_groups(groups, of_training)
    readable = [
        None if split == TRAIN and group in conflicting else label
        for label, group, split in zip(labels, groups, split_column, strict=True)
    ]
    paths = accepted["path"].to_pylist()
    table = pa.table(
        {
            "path": paths,
            "sample_id": ids,
            "split": split_column,
            "label": pa.array(readable, pa.string()),
            "duplicate_group_id": groups,
            "pixel_sum": accepted["pixel_sum"],
            "pixel_square_sum": accepted["pixel_square_sum"],
            "thumbnail": accepted["thumbnail"],
        }
    )
    duplicates = _duplicates_table(table, kept, first_copy)
    rows = table.filter(pa.array(kept))
    classes = _check_classes(rows)
    leakage = _leakage(rows, threshold, _conflicting_groups(groups, labels), paths, groups)
    return StorePlan(
        rows, duplicates, leakage, _statistics(rows, classes, duplicates, config.preprocess)
    )


def _check_rejections(index: pa.Table, num_accepted: int, config: Config) -> None:
    num_files = index.num_rows
    rejected = num_files - num_accepted
    reasons = Counter(reason for reason in index["reason"].to_pylist() if reason is not None)
    commonest = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    if num_accepted == 0:
        raise DataError(f"none of the {num_files} files in {config.source} is usable: {commonest}")
    if rejected > config.preprocess.max_rejected_fraction * num_files:
        raise DataError(
            f"{rejected} of {num_files} files in {config.source} were rejected, more than "
            f"preprocess.max_rejected_fraction={config.preprocess.max_rejected_fraction}: "
            f"{commonest}"
        )


def _official_splits(accepted: pa.Table, config: Config) -> list[str] | None:
    """The source's own split of every slice, or None where the split must be drawn."""
    given = accepted["source_split"].to_pylist()
    if config.split.mode == "grouped" or not any(given):
        return None
    unknown = [
        path
        for path, split in zip(accepted["path"].to_pylist(), given, strict=True)
        if split is None
    ]
    if unknown:
        raise DataError(
            f"{len(unknown)} slices belong to no split, such as {unknown[0]}: give every row of "
            "the labels table a split, or none and set split.mode=grouped"
        )
    if TRAIN not in given:
        raise DataError("the source has a test split and no readable training slice")
    return list(given)


def _first_copies(ids: list[str], splits: list[str] | None) -> list[int | None]:
    """For each slice, the row of an earlier byte-identical one, training rows first."""
    order = range(len(ids))
    if splits is not None:
        order = sorted(order, key=lambda row: splits[row] != TRAIN)  # type: ignore[assignment]
    first: dict[str, int] = {}
    copies: list[int | None] = [None] * len(ids)
    for row in order:
        original = first.setdefault(ids[row], row)
        copies[row] = None if original == row else original
    return copies


def _conflicting_groups(groups: list[str], labels: list[str | None]) -> set[str]:
    """Groups of copies that carry more than one label."""
    names: dict[str, set[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        if label is not None:
            names.setdefault(group, set()).add(label)
    return {group for group, found in names.items() if len(found) > 1}


def _duplicates_table(
    table: pa.Table, kept: NDArray[np.bool_], first_copy: list[int | None]
) -> pa.Table:
    """Every slice that copies another: exactly, or nearly (then of the group's first slice).

    Training slices come first in either order.
    """
    rows = table.drop_columns(["pixel_sum", "pixel_square_sum", "thumbnail"]).to_pylist()
    first_of_group: dict[str, int] = {}
    kept_rows: list[int] = np.flatnonzero(kept).tolist()
    for number in sorted(kept_rows, key=lambda number: rows[number]["split"] != TRAIN):
        first_of_group.setdefault(rows[number]["duplicate_group_id"], number)
    found = []
    for number, row in enumerate(rows):
        original = first_copy[number]
        level = "near" if original is None else "exact"
        if original is None:
            original = first_of_group[row["duplicate_group_id"]]
        if original != number:
            kept_path = rows[original]["path"]
            found.append(
                row | {"level": level, "kept_path": kept_path, "removed": not kept[number]}
            )
    return pa.Table.from_pylist(found, schema=DUPLICATES)


def _check_classes(rows: pa.Table) -> list[str]:
    """The training classes; a test class that training lacks could never be predicted."""
    by_split = {
        split: set(rows.filter(pc.equal(rows["split"], split))["label"].to_pylist()) - {None}
        for split in (TRAIN, TEST)
    }
    unknown = sorted(by_split[TEST] - by_split[TRAIN])
    if unknown and by_split[TRAIN]:
        raise DataError(
            f"the test slices have class {unknown[0]!r}, the training slices have "
            f"{', '.join(sorted(by_split[TRAIN]))}: rename with "
            f"--set classes.map.{unknown[0]}=NAME"
        )
    return sorted(by_split[TRAIN])


def _leakage(
    rows: pa.Table,
    threshold: float,
    conflicting: set[str],
    paths: list[str],
    groups: list[str],
) -> dict[str, Any]:
    """Which test slices have a twin in training, and how many of each class have none."""
    train = rows.filter(pc.equal(rows["split"], TRAIN))
    test = rows.filter(pc.equal(rows["split"], TEST))
    correlation, nearest = most_similar(
        thumbnail_matrix(test["thumbnail"].to_pylist()),
        thumbnail_matrix(train["thumbnail"].to_pylist()),
    )
    train_paths, train_ids = train["path"].to_pylist(), train["sample_id"].to_pylist()
    first_path = dict(zip(reversed(train_ids), reversed(train_paths), strict=True))
    pairs = []
    counts = {"all": Counter[str](), "clean": Counter[str]()}
    for row, value, twin in zip(
        test.select(["path", "sample_id", "label"]).to_pylist(),
        correlation.tolist(),
        nearest.tolist(),
        strict=True,
    ):
        counts["all"][row["label"] or ""] += 1
        exact = row["sample_id"] in first_path
        if not exact and value < threshold:
            counts["clean"][row["label"] or ""] += 1
            continue
        pairs.append(
            {
                "path": row["path"],
                "twin": first_path[row["sample_id"]] if exact else train_paths[twin],
                "level": "exact" if exact else "near",
                "thumbnail_correlation": round(value, 6),
            }
        )
    return {
        "thumbnail_correlation_threshold": threshold,
        "num_test": {subset: sum(counter.values()) for subset, counter in counts.items()},
        "num_test_by_class": {
            subset: dict(sorted(counter.items())) for subset, counter in counts.items()
        },
        "twins_in_training": pairs,
        "label_conflicts": [
            path for path, group in zip(paths, groups, strict=True) if group in conflicting
        ],
    }


def _statistics(
    rows: pa.Table, classes: list[str], duplicates: pa.Table, config: PreprocessConfig
) -> dict[str, Any]:
    train = rows.filter(pc.equal(rows["split"], TRAIN))
    num_pixels = train.num_rows * config.image_size**2
    mean = pc.sum(train["pixel_sum"]).as_py() / num_pixels / 255
    square = pc.sum(train["pixel_square_sum"]).as_py() / num_pixels / 255**2
    content = rows.select(["sample_id", "split", "label"]).sort_by(
        [("split", "ascending"), ("sample_id", "ascending"), ("label", "ascending")]
    )
    identity = json.dumps([config.model_dump(mode="json"), content.to_pylist()])
    return {
        "classes": classes,
        "num_slices": count_by_split_and_class(rows),
        "num_removed_copies": int(pc.sum(duplicates["removed"]).as_py() or 0),
        "pixel_mean": mean,
        "pixel_std": max(square - mean * mean, 1e-8) ** 0.5,
        "data_hash": hashlib.sha256(identity.encode()).hexdigest()[:12],
    }

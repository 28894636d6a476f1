"""What a store will hold: copies, groups, splits and statistics of all slices at once.

It looks at the light columns only (hashes, fingerprints, labels, sums of pixels), in one process.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.config import Config, PreprocessConfig
from brainray.errors import DataError
from brainray.log import Log, ProgressLines
from brainray.mri.duplicates import (
    COPY,
    KINDS,
    DuplicatePairs,
    near_duplicate_pairs,
)
from brainray.mri.groups import connected_groups, joint_groups, keep_names
from brainray.mri.row_file import RowFile, Rows, SelectedRows
from brainray.mri.split import draw_test
from brainray.mri.subjects import estimate_subjects
from brainray.orchestration.earlier import FILES, Earlier
from brainray.orchestration.leakage import leakage_report
from brainray.orchestration.preparation import named_subject, subject_salt
from brainray.orchestration.source import Listing, renaming_advice
from brainray.orchestration.store import count_by_split_and_class, versions_of
from brainray.schema import DUPLICATES, ESTIMATED, HEADER, NAMED, STUDY, TABLE, TEST, TRAIN, VOLUME
from brainray.storage import Folder


@dataclass(frozen=True)
class StorePlan:
    """The decision about every accepted slice."""

    rows: pa.Table  # every kept slice: IMAGE_STORE without image and thumbnail, and part
    files: pa.Table  # every slice of every file, for the next run; FILES
    duplicates: pa.Table
    leakage: dict[str, Any]
    statistics: dict[str, Any]


def plan_store(
    slices: pa.Table,
    fingerprints: RowFile,
    listing: Listing,
    config: Config,
    earlier: Earlier,
    log: Log,
) -> StorePlan:
    """Copies, groups, splits and statistics from the LIGHT rows of all files.

    Raises:
        DataError: nothing usable, too much rejected, or classes or splits that do not fit.
    """
    accepted = slices.filter(pc.is_null(slices["reason"]))
    _check_rejections(slices, len(listing.files), config)
    said = {file.path: file for file in listing.files}
    files = [said[path] for path in accepted["path"].to_pylist()]
    ids = accepted["sample_id"].to_pylist()
    looks = SelectedRows(fingerprints, accepted["fingerprint"].to_numpy())
    pairs = _near_duplicates(accepted, looks, config.preprocess, log)
    copies = pairs.of_kind(COPY)
    groups = keep_names(connected_groups(ids, copies.first, copies.second), _was(ids, earlier))
    also_turned = connected_groups(ids, pairs.first, pairs.second)
    subjects, subject_sources = _subjects(accepted, looks, listing, groups, config, earlier, log)
    # A draw of labels may part likely neighbours, as the published protocol does; a split may not.
    named = [
        subject if source in NAMED else None
        for subject, source in zip(subjects, subject_sources, strict=True)
    ]
    draw_groups = keep_names(
        joint_groups(groups, named), _was(ids, earlier, column="draw_group_id")
    )
    kin_groups = keep_names(
        joint_groups(draw_groups, also_turned), _was(ids, earlier, column="kin_group_id")
    )
    split_groups = keep_names(
        joint_groups(kin_groups, subjects), _was(ids, earlier, column="split_group_id")
    )
    born = earlier.generations()
    generations = [born.get(identity, earlier.generation) for identity in ids]
    labels = [file.label for file in files]
    splits = _official_splits([file.split for file in files], accepted, config)
    first_copy = _first_copies(ids, splits, labels)
    kept = np.array([copy is None for copy in first_copy], dtype=np.bool_)
    is_drawn = splits is None
    if splits is None:
        before = earlier.splits()
        held_before = [before.get(identity) for identity in ids]
        splits = _drawn_splits(kept, labels, split_groups, generations, held_before, config)
    else:
        # Copies are removed from training only: a published test set stays what it is.
        kept |= np.array([split == TEST for split in splits], dtype=np.bool_)
        if config.split.mode == "purge":
            kept &= ~_twins_of_test(also_turned, splits)
    # Test labels decide nothing about training slices: they may only be told of.
    of_training = [
        label if split == TRAIN else None for label, split in zip(labels, splits, strict=True)
    ]
    conflicting = _conflicting_groups(groups, of_training)
    readable = [
        None if split == TRAIN and group in conflicting else label
        for label, group, split in zip(labels, groups, splits, strict=True)
    ]
    table = accepted
    for name, column, kind in (
        ("split", splits, pa.string()),
        ("label", readable, pa.string()),
        ("duplicate_group_id", groups, pa.string()),
        ("subject_id", subjects, pa.string()),
        ("subject_source", subject_sources, pa.string()),
        ("draw_group_id", draw_groups, pa.string()),
        ("kin_group_id", kin_groups, pa.string()),
        ("split_group_id", split_groups, pa.string()),
        ("generation", generations, pa.int32()),
    ):
        table = table.append_column(name, pa.array(column, kind))
    rows = table.filter(pa.array(kept))
    classes = _check_classes(rows, was_drawn_before=is_drawn and earlier.generation > 0)
    duplicates = _duplicates_table(table, kept, first_copy, also_turned, pairs)
    told = table.set_column(table.column_names.index("label"), "label", pa.array(labels))
    return StorePlan(
        rows,
        _memory(slices, table, rows),
        duplicates,
        leakage_report(
            told, looks, kept, pairs, _conflicting_groups(groups, labels), config.preprocess
        ),
        _statistics(rows, classes, duplicates, config.preprocess),
    )


def _check_rejections(slices: pa.Table, num_files: int, config: Config) -> None:
    accepted = slices.filter(pc.is_null(slices["reason"]))
    refused = slices.filter(pc.invert(pc.is_in(slices["path"], pc.unique(accepted["path"]))))
    num_rejected = pc.count_distinct(refused["path"]).as_py()
    reasons = Counter(refused["reason"].to_pylist())
    commonest = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    if num_rejected == num_files:
        raise DataError(f"none of the {num_files} files in {config.source} is usable: {commonest}")
    if num_rejected > config.preprocess.max_rejected_fraction * num_files:
        raise DataError(
            f"{num_rejected} of {num_files} files in {config.source} were rejected, more than "
            f"preprocess.max_rejected_fraction={config.preprocess.max_rejected_fraction}: "
            f"{commonest}"
        )


def _near_duplicates(
    accepted: pa.Table, looks: Rows, config: PreprocessConfig, log: Log
) -> DuplicatePairs:
    """Slices of one volume lie at different places: they are never copies of one another."""
    volumes = [
        digest if frame else None
        for digest, frame in zip(
            accepted["sha256"].to_pylist(), accepted["frame"].to_pylist(), strict=True
        )
    ]
    progress = ProgressLines("compared", "pairs of slices that look alike", log)
    return near_duplicate_pairs(
        looks, config.near_duplicate, not_together=volumes, on_compared=progress.tell
    )


def _was(ids: list[str], earlier: Earlier, column: str = "duplicate_group_id") -> list[str | None]:
    names = earlier.previous(column)
    return [names.get(identity) for identity in ids]


def _subjects(
    accepted: pa.Table,
    looks: Rows,
    listing: Listing,
    groups: list[str],
    config: Config,
    earlier: Earlier,
    log: Log,
) -> tuple[list[str | None], list[str | None]]:
    """Subject of each slice and where it is from: the labels table, the header, or its looks.

    Where a table names some files of a patient whom headers name, the others are of that subject
    as well. Looks are asked of the slices that nothing names. Such a slice keeps the subject that
    it was once guessed to be of.
    """
    in_table = {file.path: file.subject for file in listing.files}
    headers = accepted["header_subject"].to_pylist()
    salt = subject_salt(Folder(config.storage))
    given: list[str | None] = []
    sources: list[str | None] = []
    for path, header, sha256 in zip(
        accepted["path"].to_pylist(), headers, accepted["sha256"].to_pylist(), strict=True
    ):
        subject, source = named_subject(in_table[path], header, sha256, salt)
        given.append(subject)
        sources.append(source)
    for kind, told in ((VOLUME, "volume files"), (STUDY, "DICOM studies")):
        count = len({h for h, source in zip(headers, sources, strict=True) if source == kind})
        if count > 1:
            log(
                f"note: {count} {told} name no patient, and count as a subject each: where "
                "patients have several, name them in a labels table (path,label,subject)"
            )
    subjects, sources = _as_tables_name_them(given, sources, headers)
    nameless = [row for row, subject in enumerate(subjects) if subject is None]
    if not nameless or not config.preprocess.subject.estimate:
        return subjects, sources
    if len(nameless) < len(subjects):
        log(
            f"note: nothing names the subjects of {len(nameless):,} of {len(subjects):,} slices: "
            "they are estimated, of these slices among themselves, by their looks"
        )
    ids = [accepted["sample_id"][row].as_py() for row in nameless]
    estimated = estimate_subjects(
        SelectedRows(looks, np.array(nameless, np.int64)),
        ids,
        [groups[row] for row in nameless],
        config.preprocess.subject,
    )
    was_by = _was(ids, earlier, column="subject_source")
    before = [
        subject if source == ESTIMATED else None
        for subject, source in zip(_was(ids, earlier, column="subject_id"), was_by, strict=True)
    ]
    joined = keep_names(estimated, before)
    for row, old, new in zip(nameless, before, joined, strict=True):
        subjects[row], sources[row] = old or new, ESTIMATED
    return subjects, sources


def _as_tables_name_them(
    given: list[str | None], sources: list[str | None], headers: list[str | None]
) -> tuple[list[str | None], list[str | None]]:
    """Subjects and sources, with the table's name for all slices of a patient of whom it has some.

    A header's name that the table has several for (as de-identification leaves one) stays.
    """
    names: dict[str, set[str]] = {}
    for subject, source, header in zip(given, sources, headers, strict=True):
        if source == TABLE and header is not None and subject is not None:
            names.setdefault(header, set()).add(subject)
    known = {header: min(found) for header, found in names.items() if len(found) == 1}
    renamed = [
        (known[header], TABLE)
        if source in {HEADER, STUDY} and header in known
        else (subject, source)
        for subject, source, header in zip(given, sources, headers, strict=True)
    ]
    return [subject for subject, _ in renamed], [source for _, source in renamed]


def _official_splits(
    given: list[str | None], accepted: pa.Table, config: Config
) -> list[str] | None:
    """The source's own split of every slice, or None where the split must be drawn."""
    if config.split.mode == "purge" and TEST not in given:
        raise DataError(
            f"split.mode=purge needs a test split, and {config.source} has none: give it "
            "Training/ and Testing/ folders or a split column, or set split.mode=grouped"
        )
    if config.split.mode == "grouped" or not any(given):
        return None
    if None in given:
        path = accepted["path"][given.index(None)].as_py()
        raise DataError(
            f"{given.count(None)} slices belong to no split, such as {path}: give every row of "
            "the labels table a split, or none and set split.mode=grouped"
        )
    if TRAIN not in given:
        raise DataError("the source has a test split and no readable training slice")
    return [str(split) for split in given]


def _first_copies(
    ids: list[str], splits: list[str] | None, labels: list[str | None]
) -> list[int | None]:
    """For each slice, the row of an earlier byte-identical one: training rows before others, those
    with a label before those without.
    """
    of_test = [splits is not None and split != TRAIN for split in splits or [TRAIN] * len(ids)]
    order = sorted(range(len(ids)), key=lambda row: (of_test[row], labels[row] is None))
    first: dict[str, int] = {}
    copies: list[int | None] = [None] * len(ids)
    for row in order:
        original = first.setdefault(ids[row], row)
        copies[row] = None if original == row else original
    return copies


def _drawn_splits(
    kept: NDArray[np.bool_],
    labels: list[str | None],
    split_groups: list[str],
    generations: list[int],
    held_before: list[str | None],
    config: Config,
) -> list[str]:
    """Our own split: stratified, whole groups; copies go with the slice that they copy.

    A group stays where the store had it before, whatever labels and slices have come or gone: what
    was held out of a training is held out of the next. Of groups that have become one, with a
    slice on either side, all are held out.
    """
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
        fraction=config.split.test_fraction,
        seed=config.split.seed,
    )
    of_group = {split_groups[row]: bool(flag) for row, flag in zip(rows, is_test, strict=True)}
    return [TEST if of_group[group] else TRAIN for group in split_groups]


def _twins_of_test(groups: list[str], splits: list[str]) -> NDArray[np.bool_]:
    """Training slices whose group of copies reaches into the test split."""
    tested = {group for group, split in zip(groups, splits, strict=True) if split == TEST}
    return np.array(
        [split == TRAIN and group in tested for group, split in zip(groups, splits, strict=True)],
        dtype=np.bool_,
    )


def _conflicting_groups(groups: list[str], labels: Sequence[str | None]) -> set[str]:
    """Groups of copies that carry more than one label."""
    names: dict[str, set[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        if label is not None:
            names.setdefault(group, set()).add(label)
    return {group for group, found in names.items() if len(found) > 1}


def _duplicates_table(
    table: pa.Table,
    kept: NDArray[np.bool_],
    first_copy: list[int | None],
    also_turned: list[str],
    pairs: DuplicatePairs,
) -> pa.Table:
    """Every slice that copies another: byte by byte, nearly, or turned.

    It is told of the first slice of its bytes, of its group of copies, or of its group of copies
    in any orientation; kept slices are first, training slices before test slices.
    """
    columns = [name for name in DUPLICATES.names if name in table.column_names]
    rows = table.select(columns).to_pylist()
    kinds = {
        (int(first), int(second)): KINDS[kind]
        for first, second, kind in zip(pairs.first, pairs.second, pairs.kind, strict=True)
    }
    groups = table["duplicate_group_id"].to_pylist()
    first_of_group: dict[str, int] = {}
    first_of_any: dict[str, int] = {}
    for number in sorted(
        range(len(rows)), key=lambda number: (not kept[number], rows[number]["split"] != TRAIN)
    ):
        first_of_group.setdefault(groups[number], number)
        first_of_any.setdefault(also_turned[number], number)
    found = []
    for number, row in enumerate(rows):
        originals = {
            "exact": first_copy[number],
            "near": first_of_group[groups[number]],
            "turned": first_of_any[also_turned[number]],
        }
        for level, original in originals.items():
            if original is None or original == number:
                continue
            ends = min(original, number), max(original, number)
            found.append(
                row
                | {
                    "level": level,
                    "kind": KINDS[COPY] if level == "exact" else kinds.get(ends),
                    "kept_path": rows[original]["path"],
                    "removed": not kept[number],
                }
            )
            break
    return pa.Table.from_pylist(found, schema=DUPLICATES)


def _check_classes(rows: pa.Table, *, was_drawn_before: bool) -> list[str]:
    """The training classes; a test class that training lacks could never be predicted."""
    by_split = {
        split: set(rows.filter(pc.equal(rows["split"], split))["label"].to_pylist()) - {None}
        for split in (TRAIN, TEST)
    }
    unknown = sorted(by_split[TEST] - by_split[TRAIN])
    if unknown and was_drawn_before:
        raise DataError(
            f"all slices of class {', '.join(map(repr, unknown))} are of subjects that the store "
            "holds out for testing: label some of the others, or draw anew under another name"
        )
    if unknown and by_split[TRAIN]:
        raise DataError(
            f"the test slices have class {', '.join(map(repr, unknown))}, the training slices have "
            f"{', '.join(sorted(by_split[TRAIN]))}: {renaming_advice(unknown)}"
        )
    return sorted(by_split[TRAIN])


def _memory(slices: pa.Table, table: pa.Table, rows: pa.Table) -> pa.Table:
    """FILES: also what was rejected or removed, with the part that will hold its pixels."""
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
            "no training slice is left: with split.mode=purge each is a copy of a test slice, "
            "otherwise all are of one subject or group of copies"
        )
    num_pixels = train.num_rows * config.image_size**2
    mean = pc.sum(train["pixel_sum"]).as_py() / num_pixels / 255
    square = pc.sum(train["pixel_square_sum"]).as_py() / num_pixels / 255**2
    settings = config.model_copy(update={"files_per_task": 0})  # which changes no slice
    made_by = settings.model_dump(mode="json") | versions_of(config)

    def hash_of(*names: str) -> str:
        content = rows.select(names).sort_by([(name, "ascending") for name in names])
        identity = json.dumps([made_by, content.to_pylist()])
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    return {
        "classes": classes,
        "num_slices": count_by_split_and_class(rows),
        "num_removed_copies": int(pc.sum(duplicates["removed"]).as_py() or 0),
        "skull_strip_used": dict(sorted(Counter(rows["skull_strip"].to_pylist()).items())),
        "subject_sources": sorted(set(rows["subject_source"].to_pylist()) - {None}),
        "pixel_mean": mean,
        "pixel_std": max(square - mean * mean, 1e-8) ** 0.5,
        "data_hash": hash_of("split", "sample_id", "label", "draw_group_id", "kin_group_id"),
        "slices_hash": hash_of("split", "sample_id", "split_group_id"),
    }

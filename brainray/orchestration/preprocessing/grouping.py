"""Groups of slices: copies of one another, and slices of one subject."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from brainray.config import Config, PreprocessConfig
from brainray.log import ProgressLines, log
from brainray.mri.duplicates import COPY, DuplicatePairs, near_duplicate_pairs
from brainray.mri.groups import connected_groups, earliest_names, joint_groups, keep_names
from brainray.mri.row_file import Rows, SelectedRows
from brainray.mri.subjects import estimate_subjects
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.orchestration.preprocessing.previous_records import PreviousRecords
from brainray.orchestration.preprocessing.slice_rows import Subject, named_subject
from brainray.orchestration.preprocessing.source import Listing
from brainray.orchestration.preprocessing.subject_salt import subject_salt
from brainray.schema import ESTIMATED, HEADER, NAMED, STUDY, TABLE, VOLUME
from brainray.storage import Folder


@dataclass(frozen=True)
class SliceGroups:
    """Group names of n accepted slices, one per slice and level.

    Each group of ``copies`` is contained in one of ``draw``, each of these in one of ``kin``,
    and each of these in one of ``split``.
    """

    pairs: DuplicatePairs
    copies: list[str]
    also_turned: list[str]  # copies in any orientation; names may change between runs
    subjects: list[Subject]
    draw: list[str]  # kept together by label draws: copies, and subjects given by metadata
    kin: list[str]  # not on both sides of a validation split: also mirrored or rotated copies
    split: list[str]  # kept together by our own splits: also estimated subjects

    def columns(self) -> dict[str, list[str] | list[str | None]]:
        """Columns of the image store."""
        return {
            "duplicate_group_id": self.copies,
            "subject_id": [subject.name for subject in self.subjects],
            "subject_source": [subject.source for subject in self.subjects],
            "draw_group_id": self.draw,
            "kin_group_id": self.kin,
            "split_group_id": self.split,
        }


def group_slices(
    accepted: pa.Table,
    fingerprints: Rows,
    listing: Listing,
    config: Config,
    records: PreviousRecords,
) -> SliceGroups:
    """Groups of the LIGHT rows of accepted slices, by their ``fingerprints`` and their subjects
    from metadata; groups known from an earlier run keep their names.
    """
    ids = accepted["sample_id"].to_pylist()

    def named_as_before(groups: list[str], column: str) -> list[str]:
        return keep_names(groups, records.lookup(ids, column))

    pairs = _near_duplicates(accepted, fingerprints, config.preprocess)
    near = pairs.filter_by_kind(COPY)
    copies = named_as_before(connected_groups(ids, near.first, near.second), "duplicate_group_id")
    also_turned = connected_groups(ids, pairs.first, pairs.second)
    subjects = _subjects(accepted, fingerprints, listing, copies, config, records)
    # Like the published protocol, a label draw may separate likely neighbours; a split may not.
    named = [subject.name if subject.source in NAMED else None for subject in subjects]
    studies = _linking_studies(subjects, accepted["header_study"].to_pylist())
    draw = named_as_before(joint_groups(copies, named, studies), "draw_group_id")
    kin = named_as_before(joint_groups(draw, also_turned), "kin_group_id")
    every = [subject.name for subject in subjects]
    split = named_as_before(joint_groups(kin, every), "split_group_id")
    return SliceGroups(pairs, copies, also_turned, subjects, draw, kin, split)


@dataclass(frozen=True)
class StrangerGroups:
    """Group names of n slices that are not in a store, one per slice."""

    copies: list[str]
    dependent: list[str]  # copies in any orientation, and slices of one subject, named or estimated


def group_strangers(accepted: pa.Table, preprocess: PreprocessConfig) -> StrangerGroups:
    """Groups of slices by image similarity and by subjects from metadata.

    Args:
        accepted: rows with ``sample_id``, ``sha256``, ``frame``, ``thumbnail``, ``subject_id``.
        preprocess: thresholds for copies and for slices likely of one subject.
    """
    ids, subjects = (accepted[name].to_pylist() for name in ("sample_id", "subject_id"))
    fingerprints = thumbnail_matrix(accepted["thumbnail"].to_pylist())
    pairs = _near_duplicates(accepted, fingerprints, preprocess)
    near = pairs.filter_by_kind(COPY)
    copies = connected_groups(ids, near.first, near.second)
    nameless = [row for row, name in enumerate(subjects) if name is None]
    if preprocess.subject.estimate:
        for row, name in _estimated(nameless, ids, fingerprints, copies, preprocess).items():
            subjects[row] = name
    also_turned = connected_groups(ids, pairs.first, pairs.second)
    return StrangerGroups(copies, joint_groups(also_turned, subjects))


def _near_duplicates(
    accepted: pa.Table, fingerprints: Rows, config: PreprocessConfig
) -> DuplicatePairs:
    """Pairs of near-duplicates; slices at different positions of one volume are never copies."""
    volumes = [
        digest if frame else None
        for digest, frame in zip(
            accepted["sha256"].to_pylist(), accepted["frame"].to_pylist(), strict=True
        )
    ]
    progress = ProgressLines("compared", "pairs of similar slices")
    return near_duplicate_pairs(
        fingerprints, config.near_duplicate, not_together=volumes, on_compared=progress.update
    )


def _subjects(
    accepted: pa.Table,
    fingerprints: Rows,
    listing: Listing,
    copies: list[str],
    config: Config,
    records: PreviousRecords,
) -> list[Subject]:
    """Subject of each slice, from the labels table, the header, or an estimate.

    A slice without metadata keeps its subject from an earlier estimate.
    """
    ids = accepted["sample_id"].to_pylist()
    subjects = _subjects_in_metadata(accepted, listing, config)
    nameless = [row for row, subject in enumerate(subjects) if subject.name is None]
    if nameless and not config.preprocess.subject.estimate:
        log(
            f"note: {len(nameless):,} of {len(subjects):,} slices have no subject metadata, and "
            "preprocess.subject.estimate=false: a subject may be on both sides of the split, and "
            "there are no strict metrics"
        )
        return subjects
    if not nameless:
        return subjects
    if len(nameless) < len(subjects):
        log(
            f"note: {len(nameless):,} of {len(subjects):,} slices have no subject metadata: their "
            "subjects are estimated by image similarity among these slices only"
        )
    estimated = _estimated(nameless, ids, fingerprints, copies, config.preprocess)
    was, was_by = (records.lookup(ids, name) for name in ("subject_id", "subject_source"))
    before = [was[row] if was_by[row] == ESTIMATED else None for row in nameless]
    names = earliest_names(list(estimated.values()), before)
    for row, old in zip(nameless, before, strict=True):
        subjects[row] = Subject(old or names[estimated[row]], ESTIMATED)
    return subjects


def _estimated(
    nameless: list[int],
    ids: list[str],
    fingerprints: Rows,
    copies: list[str],
    config: PreprocessConfig,
) -> dict[int, str]:
    """Subjects by image similarity among the slices at the rows ``nameless``, by row."""
    if not nameless:
        return {}
    names = estimate_subjects(
        SelectedRows(fingerprints, np.array(nameless, np.int64)),
        [ids[row] for row in nameless],
        [copies[row] for row in nameless],
        config.subject,
    )
    return dict(zip(nameless, names, strict=True))


def _subjects_in_metadata(accepted: pa.Table, listing: Listing, config: Config) -> list[Subject]:
    """Subject of each slice, without a name where neither table nor header gives one.

    If a table names some files of a patient given by headers, that patient's other files get the
    same subject; so do byte-identical files of which some have a subject.
    """
    in_table = {file.path: file.subject for file in listing.files}
    headers = accepted["header_subject"].to_pylist()
    salt = subject_salt(Folder(config.storage))
    subjects = [
        named_subject(in_table[path], header, sha256, salt)
        for path, header, sha256 in zip(
            accepted["path"].to_pylist(), headers, accepted["sha256"].to_pylist(), strict=True
        )
    ]
    for kind, noun in ((VOLUME, "volume files"), (STUDY, "DICOM studies")):
        count = len({subject.name for subject in subjects if subject.source == kind})
        if count > 1:
            log(
                f"note: {count} {noun} do not name a patient, so each counts as one subject: if a "
                "patient has several, name subjects in a labels table (path,label,subject)"
            )
    subjects = _with_names_from_table(subjects, headers)
    return _with_subjects_of_copies(accepted["sample_id"].to_pylist(), subjects)


def _linking_studies(subjects: list[Subject], studies: list[str | None]) -> list[str | None]:
    """The DICOM study of each slice: a header or the table may name the patient of some of its
    files, and nobody that of others.

    None where the headers or the table name several patients of a study, as if one UID had been
    written into all of them.
    """
    patients: dict[tuple[str | None, str | None], set[str | None]] = {}
    for subject, study in zip(subjects, studies, strict=True):
        patients.setdefault((study, subject.source), set()).add(subject.name)
    return [
        None
        if any(len(patients.get((study, source), ())) > 1 for source in (HEADER, TABLE))
        else study
        for study in studies
    ]


def _with_names_from_table(subjects: list[Subject], headers: list[str | None]) -> list[Subject]:
    """Subjects, with the table's name for all slices of a patient if it names some.

    A header name that the table maps to several subjects (such as a de-identified one) is kept.
    """
    names: dict[str, set[str]] = {}
    for subject, header in zip(subjects, headers, strict=True):
        if subject.source == TABLE and header is not None and subject.name is not None:
            names.setdefault(header, set()).add(subject.name)
    known = {header: min(found) for header, found in names.items() if len(found) == 1}
    return [
        Subject(known[header], TABLE)
        if subject.source in {HEADER, STUDY, VOLUME} and header in known
        else subject
        for subject, header in zip(subjects, headers, strict=True)
    ]


def _with_subjects_of_copies(ids: list[str], subjects: list[Subject]) -> list[Subject]:
    """Subjects; slices without one have that of byte-identical ones, as only one of these may be
    kept.
    """
    pairs = list(zip(ids, subjects, strict=True))
    known = {identity: subject for identity, subject in pairs if subject.name is not None}
    return [
        known.get(identity, subject) if subject.name is None else subject
        for identity, subject in pairs
    ]

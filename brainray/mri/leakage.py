"""Exposure of test slices to a training split or to the data that a run has seen.

Levels, reported separately: byte-identical files; near-duplicates; mirrored or rotated
near-duplicates; slices likely of one subject. A test slice is ``clean`` without the first two, as
METHOD defines it, and ``strict`` without all four.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.config import PreprocessConfig
from brainray.mri.duplicates import COPY, KINDS, find_twins, thumbnail_matrix
from brainray.mri.reframe import find_twins_by_head
from brainray.mri.row_file import Rows, SelectedRows
from brainray.mri.subjects import find_same_subject
from brainray.schema import HEADER, NAMED, TABLE


@dataclass(frozen=True)
class Fingerprints:
    """The data of N slices that is needed to compare others with them."""

    sample_ids: Sequence[str]
    thumbnails: Rows  # (N, 9216) uint8
    subjects: Sequence[str | None]  # from a table or a header, never estimated
    sources: Sequence[str | None]  # where the subjects are from

    @classmethod
    def of(cls, table: pa.Table, thumbnails: Rows | None = None) -> "Fingerprints":
        """From rows with ``sample_id`` and, if known, subjects.

        Thumbnails are read from the table unless given separately.
        """
        subjects: list[str | None] = [None] * table.num_rows
        sources = subjects
        if "subject_source" in table.column_names:
            told = table["subject_source"].to_pylist()
            sources = [source if source in NAMED else None for source in told]
            subjects = [
                None if source is None else subject
                for subject, source in zip(table["subject_id"].to_pylist(), sources, strict=True)
            ]
        if thumbnails is None:
            thumbnails = thumbnail_matrix(table["thumbnail"].to_pylist())
        return cls(table["sample_id"].to_pylist(), thumbnails, subjects, sources)


@dataclass(frozen=True)
class Exposure:
    """Matches of Q slices among the seen slices, as row indices; -1 if there is none."""

    exact: NDArray[np.int64]  # (Q,) the same bytes
    twin: NDArray[np.int64]  # (Q,) the nearest near-duplicate, an upright one if possible
    kind: NDArray[np.str_]  # (Q,) copy (upright), mirrored or rotated; empty without a duplicate
    twin_similarity: NDArray[np.float32]  # (Q,)
    mate: NDArray[np.int64]  # (Q,) a slice of the same subject, given or estimated
    mate_similarity: NDArray[np.float32]  # (Q,) 1 if the subject is given

    @property
    def clean(self) -> NDArray[np.bool_]:
        """(Q,) without an upright copy."""
        return np.asarray((self.exact < 0) & (self.kind != KINDS[COPY]))

    @property
    def strict(self) -> NDArray[np.bool_]:
        """(Q,) clean, and without a mirrored or rotated copy or a slice likely of one subject."""
        return np.asarray(self.clean & (self.twin < 0) & (self.mate < 0))


def exposure(
    queries: Fingerprints,
    seen: Fingerprints,
    config: PreprocessConfig,
    *,
    from_elsewhere: NDArray[np.bool_] | None = None,
) -> Exposure:
    """Compare each query with everything that was seen.

    Slices with the same subject name are of one subject, whatever collection names them. All others
    are compared by image similarity, unless this is switched off in the settings or both subjects
    come from the same kind of source, a table or headers: within one collection different names are
    different subjects.

    Args:
        queries: Q slices.
        seen: the slices to compare them with.
        config: thresholds for near-duplicates and for slices likely of one subject.
        from_elsewhere: (Q,) queries from another collection. Its copies may be padded, cropped or
            darkened, so they are also compared by the head alone. It may name subjects differently,
            so different names do not prove different subjects.
    """
    exact = _first_match(queries.sample_ids, seen.sample_ids)
    twins = find_twins(queries.thumbnails, seen.thumbnails, config.near_duplicate)
    unmatched = np.empty(0, np.int64)
    if from_elsewhere is not None:
        unmatched = np.flatnonzero(from_elsewhere & ~twins.is_upright)
    if len(unmatched):
        looking = SelectedRows(queries.thumbnails, unmatched)
        by_head = find_twins_by_head(looking, seen.thumbnails, config.near_duplicate)
        twins = twins.completed_by(unmatched, by_head)
    mate = _first_match(queries.subjects, seen.subjects)
    mate_similarity = np.where(mate >= 0, 1.0, 0.0).astype(np.float32)
    seen_by = np.array([source or "" for source in seen.sources], dtype=object)
    # The kind of source in which other names prove another subject.
    proven_by = np.array(
        [source if source in (TABLE, HEADER) else "" for source in queries.sources], dtype=object
    )
    if from_elsewhere is not None:
        proven_by[from_elsewhere] = ""
    for source in ("", TABLE, HEADER) if config.subject.estimate else ():
        asking = (mate < 0) & (proven_by == source)
        rows = np.flatnonzero((source == "") | (seen_by != source))
        if not asking.any() or len(rows) == 0:
            continue
        looking = SelectedRows(queries.thumbnails, np.flatnonzero(asking))
        likely = find_same_subject(looking, SelectedRows(seen.thumbnails, rows), config.subject)
        found = likely.reference >= 0
        mate[asking] = np.where(found, rows[likely.reference], -1)
        mate_similarity[asking] = likely.similarity
    kind = np.where(twins.reference >= 0, np.array(KINDS)[twins.kind], "")
    return Exposure(exact, twins.reference, kind, twins.similarity, mate, mate_similarity)


def _first_match(
    queries: Sequence[str | None], references: Sequence[str | None]
) -> NDArray[np.int64]:
    first: dict[str | None, int] = {None: -1}
    for row, name in enumerate(references):
        if name is not None:
            first.setdefault(name, row)
    return np.array([first.get(name, -1) for name in queries], dtype=np.int64)

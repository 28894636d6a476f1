"""Exposure of test slices to a training split or to the data that a run has seen.

Levels, reported separately: byte-identical files; near-duplicates; mirrored or rotated
near-duplicates; slices likely of one subject. A test slice is ``clean`` without the first two, as
METHOD defines it, and ``strict`` without all four.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.config import NearDuplicateConfig, PreprocessConfig
from brainray.mri.duplicates import COPY, KINDS, Twins, find_twins
from brainray.mri.reframe import find_twins_by_head
from brainray.mri.row_file import Rows, SelectedRows
from brainray.mri.subjects import find_same_subject
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.schema import HEADER, NAMED, TABLE

_Pairing = tuple[NDArray[np.int64], NDArray[np.int64]]  # of some queries and of some seen slices


@dataclass(frozen=True)
class Fingerprints:
    """The data of N slices that is needed to compare others with them."""

    sample_ids: Sequence[str]
    thumbnails: Rows  # (N, 9216) uint8
    subjects: Sequence[str | None]  # from a table or a header, never estimated
    sources: Sequence[str | None]  # where the subjects are from
    elsewhere: NDArray[np.bool_]  # whether they are from another collection than the run's own
    groups: Sequence[str | None]  # that no split of the run's own collection parts

    @classmethod
    def from_table(cls, table: pa.Table, thumbnails: Rows | None = None) -> "Fingerprints":
        """From rows with ``sample_id`` and, if known, subjects, groups and ``elsewhere``.

        Thumbnails are read from the table unless given separately.
        """
        subjects: list[str | None] = [None] * table.num_rows
        sources = subjects
        if "subject_source" in table.column_names:
            stored_sources = table["subject_source"].to_pylist()
            sources = [source if source in NAMED else None for source in stored_sources]
            subjects = [
                None if source is None else subject
                for subject, source in zip(table["subject_id"].to_pylist(), sources, strict=True)
            ]
        if thumbnails is None:
            thumbnails = thumbnail_matrix(table["thumbnail"].to_pylist())
        elsewhere = np.zeros(table.num_rows, np.bool_)
        if "elsewhere" in table.column_names:
            elsewhere = table["elsewhere"].to_numpy()
        groups: list[str | None] = [None] * table.num_rows
        if "split_group_id" in table.column_names:
            names = table["split_group_id"].to_pylist()
            groups = [
                None if is_foreign else name
                for name, is_foreign in zip(names, elsewhere, strict=True)
            ]
        ids = table["sample_id"].to_pylist()
        return cls(ids, thumbnails, subjects, sources, elsewhere, groups)

    @property
    def told_apart_by(self) -> NDArray[np.object_]:
        """(N,) the kind of source in which another name proves another subject; empty if none."""
        proving = [source if source in (TABLE, HEADER) else "" for source in self.sources]
        return np.where(self.elsewhere, "", np.array(proving, dtype=object))


@dataclass(frozen=True)
class Exposure:
    """Matches of Q slices among the seen slices, as row indices; -1 if there is none."""

    exact: NDArray[np.int64]  # (Q,) the same bytes
    twin: NDArray[np.int64]  # (Q,) the nearest near-duplicate, an upright one if possible
    kind: NDArray[np.str_]  # (Q,) copy (upright), mirrored or rotated; empty without a duplicate
    twin_similarity: NDArray[np.float32]  # (Q,)
    mate: NDArray[np.int64]  # (Q,) a slice of the same subject, given or estimated
    mate_similarity: NDArray[np.float32]  # (Q,) 1 if the subject is given
    is_mate_known: NDArray[np.bool_]  # (Q,) false if neither names nor an estimate can tell mates

    @property
    def clean(self) -> NDArray[np.bool_]:
        """(Q,) without an upright copy."""
        return np.asarray((self.exact < 0) & (self.kind != KINDS[COPY]))

    @property
    def strict(self) -> NDArray[np.bool_]:
        """(Q,) clean, and without a mirrored or rotated copy or a slice likely of one subject."""
        return np.asarray(self.clean & (self.twin < 0) & (self.mate < 0))

    @property
    def columns(self) -> dict[str, pa.Array]:
        """``clean`` and ``strict``, the latter null if it depends on a subject that is unknown."""
        is_unknown = self.strict & ~self.is_mate_known
        return {
            "clean": pa.array(self.clean, pa.bool_()),
            "strict": pa.array(self.strict, pa.bool_(), mask=is_unknown),
        }


def exposure(queries: Fingerprints, seen: Fingerprints, config: PreprocessConfig) -> Exposure:
    """Compare each query with everything that was seen.

    Slices with the same subject name are of one subject, whatever collection names them. All others
    are compared by image similarity, unless this is switched off in the settings or both subjects
    come from the same kind of source, a table or headers: within one collection different names are
    different subjects.

    Nor are names asked against groups: queries that no name proves to be of another subject are of
    the same as the slices of their group, which was formed with more evidence, such as mutual
    similarity, or a third slice between two.

    Another collection may name subjects differently, so then different names prove nothing. Its
    copies may be padded, cropped or darkened, so they are also compared by the head alone.

    Args:
        queries: Q slices.
        seen: the slices to compare them with.
        config: thresholds for near-duplicates and for slices likely of one subject.
    """
    twins = _twins(queries, seen, config.near_duplicate)
    mate = _first_match(queries.subjects, seen.subjects)
    mate_similarity = (mate >= 0).astype(np.float32)
    estimate, not_told_apart = config.subject.estimate, _not_told_apart(queries, seen)
    comparisons = [(*pair, config.subject.link_similarity) for pair in not_told_apart if estimate]
    comparisons += [(*pair, -1.0) for pair in _of_one_group(queries, seen)]
    for asking, rows, least in comparisons:
        asking = asking[mate[asking] < 0]
        if len(asking):
            looking = SelectedRows(queries.thumbnails, asking)
            likely = find_same_subject(looking, SelectedRows(seen.thumbnails, rows), least)
            mate[asking] = np.where(likely.reference >= 0, rows[likely.reference], -1)
            mate_similarity[asking] = likely.similarity
    is_mate_known = np.ones(len(mate), np.bool_)
    if not estimate:
        for asking, _ in not_told_apart:
            is_mate_known[asking] = mate[asking] >= 0
    return Exposure(
        exact=_first_match(queries.sample_ids, seen.sample_ids),
        twin=twins.reference,
        kind=np.where(twins.reference >= 0, np.array(KINDS)[twins.kind], ""),
        twin_similarity=twins.similarity,
        mate=mate,
        mate_similarity=mate_similarity,
        is_mate_known=is_mate_known,
    )


def _twins(queries: Fingerprints, seen: Fingerprints, settings: NearDuplicateConfig) -> Twins:
    """By the whole frame and, if either slice is from another collection, by the head."""
    twins = find_twins(queries.thumbnails, seen.thumbnails, settings)
    everything, foreign = np.arange(len(seen.elsewhere)), np.flatnonzero(seen.elsewhere)
    for asking, rows in ((queries.elsewhere, everything), (~queries.elsewhere, foreign)):
        unmatched = np.flatnonzero(asking & ~twins.is_upright)
        if len(unmatched) and len(rows):
            looking = SelectedRows(queries.thumbnails, unmatched)
            by_head = find_twins_by_head(looking, SelectedRows(seen.thumbnails, rows), settings)
            reference = np.where(by_head.reference >= 0, rows[by_head.reference], -1)
            twins = twins.completed_by(unmatched, replace(by_head, reference=reference))
    return twins


def _not_told_apart(queries: Fingerprints, seen: Fingerprints) -> list[_Pairing]:
    """Queries, and the slices that no name proves to be of another subject."""
    ours, theirs = queries.told_apart_by, seen.told_apart_by
    pairs = [
        (np.flatnonzero(ours == source), np.flatnonzero((source == "") | (theirs != source)))
        for source in ("", TABLE, HEADER)
    ]
    return [(asking, rows) for asking, rows in pairs if len(rows)]


def _of_one_group(queries: Fingerprints, seen: Fingerprints) -> list[_Pairing]:
    """Queries that no name proves to be of another subject, and the slices of their group."""
    rows_of: defaultdict[str | None, list[int]] = defaultdict(list)
    for row, name in enumerate(seen.groups):
        rows_of[name].append(row)
    asking_of: defaultdict[str | None, list[int]] = defaultdict(list)
    for row in np.flatnonzero(queries.told_apart_by == "").tolist():
        asking_of[queries.groups[row]].append(row)
    return [
        (np.array(asking), np.array(rows_of[name]))
        for name, asking in asking_of.items()
        if name is not None and name in rows_of
    ]


def _first_match(
    queries: Sequence[str | None], references: Sequence[str | None]
) -> NDArray[np.int64]:
    first: dict[str | None, int] = {None: -1}
    for row, name in enumerate(references):
        if name is not None:
            first.setdefault(name, row)
    return np.array([first.get(name, -1) for name in queries], dtype=np.int64)

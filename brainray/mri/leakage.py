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

from brainray.config import PreprocessConfig
from brainray.mri.duplicates import COPY, KINDS, find_twins
from brainray.mri.reframe import find_twins_by_head
from brainray.mri.row_file import Rows, SelectedRows
from brainray.mri.subjects import find_same_subject
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.schema import HEADER, NAMED, TABLE


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
    exact = _first_match(queries.sample_ids, seen.sample_ids)
    twins = find_twins(queries.thumbnails, seen.thumbnails, config.near_duplicate)
    everything, foreign = np.arange(len(seen.elsewhere)), np.flatnonzero(seen.elsewhere)
    for asking, rows in ((queries.elsewhere, everything), (~queries.elsewhere, foreign)):
        unmatched = np.flatnonzero(asking & ~twins.is_upright)
        if len(unmatched) and len(rows):
            looking = SelectedRows(queries.thumbnails, unmatched)
            others = SelectedRows(seen.thumbnails, rows)
            by_head = find_twins_by_head(looking, others, config.near_duplicate)
            reference = np.where(by_head.reference >= 0, rows[by_head.reference], -1)
            twins = twins.completed_by(unmatched, replace(by_head, reference=reference))
    mate = _first_match(queries.subjects, seen.subjects)
    mate_similarity = np.where(mate >= 0, 1.0, 0.0).astype(np.float32)
    seen_by = np.array([source or "" for source in seen.sources], dtype=object)
    # The kind of source in which other names prove another subject.
    proven_by = np.array(
        [source if source in (TABLE, HEADER) else "" for source in queries.sources], dtype=object
    )
    proven_by[queries.elsewhere] = ""
    min_similarity = config.subject.link_similarity
    is_mate_known = np.ones(len(mate), np.bool_)
    for source in ("", TABLE, HEADER):
        asking = (mate < 0) & (proven_by == source)
        rows = np.flatnonzero((source == "") | (seen_by != source) | seen.elsewhere)
        if not asking.any() or len(rows) == 0:
            continue
        if not config.subject.estimate:
            is_mate_known[asking] = False
            continue
        looking = SelectedRows(queries.thumbnails, np.flatnonzero(asking))
        likely = find_same_subject(looking, SelectedRows(seen.thumbnails, rows), min_similarity)
        found = likely.reference >= 0
        mate[asking] = np.where(found, rows[likely.reference], -1)
        mate_similarity[asking] = likely.similarity
    asking = (mate < 0) & (proven_by == "")
    _match_in_groups(queries, seen, asking, mate, mate_similarity)
    kind = np.where(twins.reference >= 0, np.array(KINDS)[twins.kind], "")
    return Exposure(
        exact, twins.reference, kind, twins.similarity, mate, mate_similarity, is_mate_known
    )


def _match_in_groups(
    queries: Fingerprints,
    seen: Fingerprints,
    asking: NDArray[np.bool_],
    mate: NDArray[np.int64],
    mate_similarity: NDArray[np.float32],
) -> None:
    """Match queries that are ``asking`` with the nearest seen slice of their group, in place."""
    rows_of_group: defaultdict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(seen.groups):
        if name is not None:
            rows_of_group[name].append(row)
    asking_in_group: defaultdict[str, list[int]] = defaultdict(list)
    for row in np.flatnonzero(asking).tolist():
        name = queries.groups[row]
        if name is not None and name in rows_of_group:
            asking_in_group[name].append(row)
    for name, asked in asking_in_group.items():
        rows, others = np.array(asked), np.array(rows_of_group[name])
        nearest = find_same_subject(
            SelectedRows(queries.thumbnails, rows),
            SelectedRows(seen.thumbnails, others),
            min_similarity=-1.0,
        )
        mate[rows], mate_similarity[rows] = others[nearest.reference], nearest.similarity


def _first_match(
    queries: Sequence[str | None], references: Sequence[str | None]
) -> NDArray[np.int64]:
    first: dict[str | None, int] = {None: -1}
    for row, name in enumerate(references):
        if name is not None:
            first.setdefault(name, row)
    return np.array([first.get(name, -1) for name in queries], dtype=np.int64)

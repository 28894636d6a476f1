"""Leakage report of a store: duplicates and slices of one subject, within and across splits."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.config import PreprocessConfig
from brainray.mri.duplicates import COPY, KINDS, DuplicatePairs, distinct_rows
from brainray.mri.leakage import Exposure, Fingerprints, exposure
from brainray.mri.row_file import Rows, SelectedRows
from brainray.schema import TEST, TRAIN, subset_masks

LEVELS = {
    "exact": "byte-identical files",
    "near": "near-duplicates that are not byte-identical",
    "turned": "near-duplicates after mirroring or rotation by 90, 180 or 270 degrees",
    "subject": "slices likely of one subject that are not copies of one another",
}


def leakage_report(
    table: pa.Table,
    fingerprints: Rows,
    kept: NDArray[np.bool_],
    pairs: DuplicatePairs,
    conflict_groups: Sequence[str | None],
    config: PreprocessConfig,
) -> dict[str, Any]:
    """Contents of ``leakage.json``.

    Args:
        table: every accepted slice with its split and its label in the source.
        fingerprints: (N, 9216) uint8, of these slices.
        kept: (N,) which of them are in the store.
        pairs: the near-duplicates among them.
        conflict_groups: (N,) the group of copies, in any orientation, of slices whose copies have
            another label; else None.
        config: preprocessing settings of the store.

    Returns:
        ``across_splits``: for each level the affected test slices, each with its nearest
        training slice; ``within_train`` and ``within_test``: copies of an earlier slice of the
        same split; ``num_test`` and ``num_test_by_class``: how many test slices are ``all``,
        ``clean`` and, unless subjects are unknown, ``strict``; ``label_conflicts``: slices
        whose copies have another label, with their ``group``.
    """
    splits = np.array(table["split"].to_pylist(), dtype=object)
    train_rows, test_rows = (np.flatnonzero(kept & (splits == split)) for split in (TRAIN, TEST))
    train, test = (table.take(pa.array(rows)) for rows in (train_rows, test_rows))
    exposed = exposure(
        Fingerprints.from_table(test, SelectedRows(fingerprints, test_rows)),
        Fingerprints.from_table(train, SelectedRows(fingerprints, train_rows)),
        config,
    )
    subsets = subset_masks(pa.table(exposed.columns))
    labels = np.array([label or "" for label in test["label"].to_pylist()], dtype=object)
    by_class = {
        name: dict(sorted(Counter(labels[mask].tolist()).items())) for name, mask in subsets.items()
    }
    _, fingerprint_ids = distinct_rows(fingerprints)
    return {
        "levels": LEVELS,
        "num_test": {name: int(mask.sum()) for name, mask in subsets.items()},
        "num_test_by_class": by_class,
        "across_splits": twins_of_test_slices(test, train, exposed),
        "within_train": _within(table, fingerprint_ids, pairs, TRAIN),
        "within_test": _within(table, fingerprint_ids, pairs, TEST),
        "label_conflicts": [
            place | {"label": label, "duplicate_group_id": copies, "group": group}
            for place, label, copies, group in zip(
                _places(table, "path"),
                table["label"].to_pylist(),
                table["duplicate_group_id"].to_pylist(),
                conflict_groups,
                strict=True,
            )
            if group is not None
        ],
    }


def twins_of_test_slices(
    test: pa.Table, train: pa.Table, exposed: Exposure
) -> dict[str, list[dict[str, Any]]]:
    """For each level the affected test slices, each with its nearest training slice.

    Args:
        test: rows with ``path``, ``frame`` and ``label``, of the exposed slices.
        train: rows with ``path``, ``frame`` and ``label`` (null if unknown) and, if known,
            ``role``, of the slices that they are exposed to.
        exposed: `exposure` of ``test`` to ``train``.
    """
    found: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
    trained = _described(train, "twin", "twin_")
    for row, tested in enumerate(_described(test, "path", "")):
        if exposed.exact[row] >= 0:
            twin, level, kind, similarity = exposed.exact[row], "exact", "copy", 1.0
        elif exposed.twin[row] >= 0:
            twin = exposed.twin[row]
            level = "near" if exposed.kind[row] == KINDS[COPY] else "turned"
            kind, similarity = str(exposed.kind[row]), float(exposed.twin_similarity[row])
        elif exposed.mate[row] >= 0:
            twin, level, kind = exposed.mate[row], "subject", "same subject"
            similarity = float(exposed.mate_similarity[row])
        else:
            continue
        about = {"kind": kind, "similarity": round(similarity, 6)}
        found[level].append(tested | trained[twin] | about)
    return found


def _described(table: pa.Table, name: str, prefix: str) -> list[dict[str, Any]]:
    """`_places`, with each slice's label and, if known, its role in a run."""
    columns = [column for column in ("label", "role") if column in table.column_names]
    label_rows = table.select(columns).rename_columns([prefix + column for column in columns])
    return [
        place | row for place, row in zip(_places(table, name), label_rows.to_pylist(), strict=True)
    ]


def _within(
    table: pa.Table, fingerprint_ids: NDArray[np.int64], pairs: DuplicatePairs, split: str
) -> dict[str, list[dict[str, Any]]]:
    """Slices of the split that are copies of an earlier slice of the same split, by level, each in
    the first level that applies.

    ``fingerprint_ids``, (N,): rows with the same id have equal fingerprints.
    """
    places, twins = _places(table, "path"), _places(table, "twin")
    digests, frames = table["sha256"].to_pylist(), table["frame"].to_pylist()
    inside = np.array([of == split for of in table["split"].to_pylist()], dtype=np.bool_)
    exact: dict[int, dict[str, Any]] = {}
    first: dict[tuple[str, str], int] = {}
    for row in np.flatnonzero(inside).tolist():
        original = first.setdefault((digests[row], frames[row]), row)
        if original != row:
            exact[row] = places[row] | twins[original]
    found: dict[str, dict[int, dict[str, Any]]] = {"near": {}, "turned": {}}
    for one, other, kind, similarity in _links_of(np.flatnonzero(inside), fingerprint_ids, pairs):
        if other in exact or digests[one] == digests[other]:
            continue  # counted as exact, or another slice of the volume
        about = {"kind": KINDS[kind], "similarity": round(similarity, 6)}
        level = found["near" if kind == COPY else "turned"]
        level.setdefault(other, places[other] | twins[one] | about)
    near, turned = found["near"], found["turned"]
    return {
        "exact": list(exact.values()),
        "near": [near[row] for row in sorted(near)],
        "turned": [turned[row] for row in sorted(turned.keys() - near.keys())],
    }


def _links_of(
    rows: NDArray[np.int64], fingerprint_ids: NDArray[np.int64], pairs: DuplicatePairs
) -> list[tuple[int, int, int, float]]:
    """(earlier row, later row, kind, similarity) of near-duplicates among these rows.

    For equal fingerprints, ``pairs`` links only the first one to others, and it may not be among
    the rows: here the first of the rows is linked to each other one. Earlier partners come first.
    """
    alike: dict[int, list[int]] = defaultdict(list)
    for row in rows.tolist():
        alike[int(fingerprint_ids[row])].append(row)
    links = [(equal[0], other, COPY, 1.0) for equal in alike.values() for other in equal[1:]]
    for first, second, kind, similarity in zip(
        pairs.first.tolist(),
        pairs.second.tolist(),
        pairs.kind.tolist(),
        pairs.similarity.tolist(),
        strict=True,
    ):
        if fingerprint_ids[first] == fingerprint_ids[second]:
            continue
        ends = alike.get(int(fingerprint_ids[first])), alike.get(int(fingerprint_ids[second]))
        for here, there in (ends, ends[::-1]):
            if here and there:
                links += [(here[0], row, kind, similarity) for row in there if here[0] < row]
    return sorted(links, key=lambda link: (link[1], link[0]))


def _places(table: pa.Table, name: str) -> list[dict[str, Any]]:
    """Location of each slice, under ``name``: its path and, in multi-slice files, its frame."""
    frame_name = "frame" if name == "path" else f"{name}_frame"
    return [
        {name: row["path"]} | ({frame_name: row["frame"]} if row["frame"] else {})
        for row in table.select(["path", "frame"]).to_pylist()
    ]

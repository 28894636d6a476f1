"""What an earlier preprocessing under the same name has left to continue from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.mri.duplicates import thumbnail_matrix
from brainray.mri.row_file import RowFile
from brainray.orchestration.preprocessing.preparation import LIGHT_COLUMNS, PART, SLICES
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.orchestration.store import ImageStore
from brainray.schema import IMAGE_STORE
from brainray.storage import Folder

GROUPS = [
    "generation",
    "duplicate_group_id",
    "subject_id",
    "subject_source",
    "draw_group_id",
    "kin_group_id",
    "split_group_id",
]

_REMEMBERED = [*(SLICES.field(name) for name in LIGHT_COLUMNS), PART]

LIGHT = pa.schema([*_REMEMBERED, pa.field("fingerprint", pa.int64())])
"""All slices without their pixels; ``fingerprint`` is a row number in the fingerprint file."""

FILES = pa.schema([*_REMEMBERED, *(IMAGE_STORE.field(name) for name in GROUPS)])
"""What a store records of every slice that it was made from, including those left out."""


class Place(NamedTuple):
    """Where a slice is, or was when it was last in the store."""

    split: str  # train | test
    generation: int | None  # the preprocessing that first saw it; None from earlier versions


@dataclass(frozen=True)
class Earlier:
    """The records of an earlier store; empty if there is none."""

    generation: int  # of the current preprocessing: 0 for the first
    files: pa.Table  # of the FILES schema
    images: Folder | None  # the store's parts, with thumbnails; None without a store

    @classmethod
    def of(cls, store: ImageStore | None) -> "Earlier":
        if store is None:
            return cls(0, FILES.empty_table(), None)
        files = store.folder.read_table(layout.FILES, columns=FILES.names)
        generation = store.manifest.generation + 1
        return cls(generation, files, store.folder / layout.IMAGES)

    def reusable(self, fingerprints: RowFile) -> pa.Table:
        """LIGHT rows of files that need no decoding: pixels of all their accepted slices exist.

        Files that gave no slice are read again, as their problem may be solved. The slices'
        fingerprints are appended to ``fingerprints``.
        """
        accepted = pc.is_null(self.files["reason"])
        without_pixels = pc.and_(accepted, pc.is_null(self.files["part"]))
        incomplete = self.files.filter(without_pixels)["path"]
        giving = self.files.filter(accepted)["path"]
        paths = self.files["path"]
        keep = pc.and_(pc.is_in(paths, giving), pc.invert(pc.is_in(paths, incomplete)))
        kept = self.files.filter(keep)
        row_of: dict[str, int] = {}
        for part in sorted(set(kept["part"].to_pylist()) - {None}):
            assert self.images is not None, "slices with a part are in a store"
            told = self.images.read_table(part, columns=["sample_id", "thumbnail"])
            rows = range(len(fingerprints), len(fingerprints) + told.num_rows)
            row_of |= dict(zip(told["sample_id"].to_pylist(), rows, strict=True))
            fingerprints.append(thumbnail_matrix(told["thumbnail"].to_pylist()))
        numbers = [row_of.get(identity) for identity in kept["sample_id"].to_pylist()]
        told_of = kept.append_column("fingerprint", pa.array(numbers, pa.int64()))
        return told_of.select(LIGHT.names)

    def of_slices(self, ids: Sequence[str], column: str) -> list[Any]:
        """Values of a column for slices by sample_id; None for new ones."""
        accepted = self.files.filter(pc.is_valid(self.files["sample_id"]))
        names = zip(accepted["sample_id"].to_pylist(), accepted[column].to_pylist(), strict=True)
        known = {sample: name for sample, name in names if name is not None}
        return [known.get(identity) for identity in ids]

    def places(self) -> dict[str, Place]:
        """Places by sample_id, also of slices that only earlier stores of the name contained, as
        these may return.
        """
        if self.images is None:
            return {}
        rows = self.images.parent.read_table(layout.SPLITS).to_pylist()
        return {row["sample_id"]: Place(row["split"], row.get("generation")) for row in rows}

    def generations(self, ids: Sequence[str], places: Mapping[str, Place]) -> list[int]:
        """The preprocessing that first saw each slice: the current one for new slices."""
        of_returning = [places[one].generation if one in places else None for one in ids]
        return [
            next((born for born in known if born is not None), self.generation)
            for known in zip(self.of_slices(ids, "generation"), of_returning, strict=True)
        ]


def unchanged(files: list[FoundFile], reusable: pa.Table) -> set[str]:
    """Paths of files whose size and modification time equal the recorded ones."""
    stamps = {
        row["path"]: (row["num_bytes"], row["mtime_ns"])
        for row in reusable.select(["path", "num_bytes", "mtime_ns"]).to_pylist()
    }
    return {
        file.path
        for file in files
        if file.mtime_ns and stamps.get(file.path) == (file.num_bytes, file.mtime_ns)
    }

"""Records of the previous preprocessing under the same name, from which this one continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.mri.row_file import RowFile
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.orchestration.preprocessing.slice_rows import LIGHT_COLUMNS, PART, SLICES
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.orchestration.store import ImageStore
from brainray.schema import IMAGE_STORE
from brainray.storage import Folder

_PLANNED_COLUMNS = [  # which the plan of a store adds to a slice
    "duplicate_group_id",
    "subject_id",
    "subject_source",
    "draw_group_id",
    "kin_group_id",
    "split_group_id",
]

_RECORDED_FIELDS = [*(SLICES.field(name) for name in LIGHT_COLUMNS), PART]

LIGHT = pa.schema([*_RECORDED_FIELDS, pa.field("fingerprint", pa.int64())])
"""All slices without their pixels; ``fingerprint`` is a row number in the fingerprint file."""

FILES = pa.schema([*_RECORDED_FIELDS, *(IMAGE_STORE.field(name) for name in _PLANNED_COLUMNS)])
"""What a store records of every slice that it was made from, including those left out."""


class Place(NamedTuple):
    """Where a slice is, or was when it was last in the store."""

    split: str  # train | test
    generation: int  # in which it was first in the store


@dataclass(frozen=True)
class PreviousRecords:
    """The records of the store that is continued; empty if there is none."""

    generation: int  # of the current preprocessing: 0 for the first
    files: pa.Table  # of the FILES schema
    images: Folder | None  # the store's parts, with thumbnails; None without a store

    @classmethod
    def from_store(cls, store: ImageStore | None) -> "PreviousRecords":
        if store is None:
            return cls(0, FILES.empty_table(), None)
        files = store.folder.read_table(layout.FILES, columns=FILES.names)
        generation = store.manifest.generation + 1
        return cls(generation, files, store.folder / layout.IMAGES)

    def reusable(self, fingerprints: RowFile) -> pa.Table:
        """LIGHT rows of files that need no decoding: pixels of all their accepted slices exist.

        Files without an accepted slice are read again, as their problem may be solved. The slices'
        fingerprints are appended to ``fingerprints``.
        """
        accepted = pc.is_null(self.files["reason"])
        without_pixels = pc.and_(accepted, pc.is_null(self.files["part"]))
        incomplete = self.files.filter(without_pixels)["path"]
        accepted_paths = self.files.filter(accepted)["path"]
        paths = self.files["path"]
        keep = pc.and_(pc.is_in(paths, accepted_paths), pc.invert(pc.is_in(paths, incomplete)))
        kept = self.files.filter(keep)
        row_of: dict[str, int] = {}
        for part in sorted(set(kept["part"].to_pylist()) - {None}):
            assert self.images is not None, "slices with a part are in a store"
            thumbnails = self.images.read_table(part, columns=["sample_id", "thumbnail"])
            rows = range(len(fingerprints), len(fingerprints) + thumbnails.num_rows)
            row_of |= dict(zip(thumbnails["sample_id"].to_pylist(), rows, strict=True))
            fingerprints.append(thumbnail_matrix(thumbnails["thumbnail"].to_pylist()))
        numbers = [row_of.get(identity) for identity in kept["sample_id"].to_pylist()]
        light = kept.append_column("fingerprint", pa.array(numbers, pa.int64()))
        return light.select(LIGHT.names)

    def lookup(self, ids: Sequence[str], column: str) -> list[Any]:
        """Values of a column for slices by sample_id; None for new ones."""
        accepted = self.files.filter(pc.is_valid(self.files["sample_id"]))
        names = zip(accepted["sample_id"].to_pylist(), accepted[column].to_pylist(), strict=True)
        known = {sample: name for sample, name in names if name is not None}
        return [known.get(identity) for identity in ids]

    def places(self) -> dict[str, Place]:
        """Places by sample_id, also of slices that only older stores of this name contained, as
        these may return.
        """
        if self.images is None:
            return {}
        rows = self.images.parent.read_table(layout.SPLITS).to_pylist()
        # Earlier versions left generations unknown.
        return {row["sample_id"]: Place(row["split"], row.get("generation") or 0) for row in rows}


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

"""What an earlier run of preprocessing under the same name has left to go on from."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.orchestration.preparation import SLICES
from brainray.orchestration.source import FoundFile
from brainray.orchestration.store import ImageStore
from brainray.schema import IMAGE_STORE

LIGHT_COLUMNS = [name for name in SLICES.names if name != "image"]
PART = pa.field("part", pa.string())  # of images/ that holds the pixels; null where none does
GROUPS = [
    "generation",
    "duplicate_group_id",
    "subject_id",
    "subject_source",
    "draw_group_id",
    "kin_group_id",
    "split_group_id",
]

LIGHT = pa.schema([*(SLICES.field(name) for name in LIGHT_COLUMNS), PART])
"""All slices without their pixels."""

FILES = pa.schema([*LIGHT, *(IMAGE_STORE.field(name) for name in GROUPS)])
"""What a store remembers of every slice that it was made from, also of those left out."""


@dataclass(frozen=True)
class Earlier:
    """The memory of a store; empty where there is none."""

    generation: int  # of the run that asks: 0 for the first
    files: pa.Table  # of the FILES schema

    @classmethod
    def of(cls, store: ImageStore | None) -> "Earlier":
        if store is None:
            return cls(0, FILES.empty_table())
        files = store.folder.read_table(layout.FILES)
        return cls(int(store.manifest["generation"]) + 1, files)

    def reusable(self) -> pa.Table:
        """LIGHT rows of files that need no second decoding: of each accepted slice we have pixels.

        Files that gave no slice are read again: what was missing may be there now.
        """
        accepted = pc.is_null(self.files["reason"])
        without_pixels = pc.and_(accepted, pc.is_null(self.files["part"]))
        incomplete = self.files.filter(without_pixels)["path"]
        giving = self.files.filter(accepted)["path"]
        paths = self.files["path"]
        keep = pc.and_(pc.is_in(paths, giving), pc.invert(pc.is_in(paths, incomplete)))
        return self.files.filter(keep).select(LIGHT.names)

    def previous(self, column: str) -> dict[str, str]:
        """A group column by sample_id."""
        accepted = self.files.filter(pc.is_valid(self.files["sample_id"]))
        names = zip(accepted["sample_id"].to_pylist(), accepted[column].to_pylist(), strict=True)
        return {sample: name for sample, name in names if name is not None}

    def generations(self) -> dict[str, int]:
        """First generation of each sample_id."""
        accepted = self.files.filter(pc.is_null(self.files["reason"]))
        return dict(
            zip(accepted["sample_id"].to_pylist(), accepted["generation"].to_pylist(), strict=True)
        )


def unchanged(files: list[FoundFile], reusable: pa.Table) -> set[str]:
    """Paths of files whose size and time of modification are those that were recorded."""
    stamps = {
        row["path"]: (row["num_bytes"], row["mtime_ns"])
        for row in reusable.select(["path", "num_bytes", "mtime_ns"]).to_pylist()
    }
    return {
        file.path
        for file in files
        if file.mtime_ns and stamps.get(file.path) == (file.num_bytes, file.mtime_ns)
    }

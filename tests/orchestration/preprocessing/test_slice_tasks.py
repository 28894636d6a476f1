"""Reading ahead, each failure with its own file; decoding and writing a few slices at a time."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig
from brainray.errors import DataError
from brainray.mri.identity import content_hash
from brainray.mri.slices import RejectedImage
from brainray.orchestration.preprocessing import slice_tasks
from brainray.orchestration.preprocessing.slice_rows import SLICES, read_file
from brainray.orchestration.preprocessing.slice_tasks import _decoded, _read_ahead, _write_part
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.schema import IMAGE_STORE, THUMBNAIL_SIDE
from brainray.storage import Folder


def test_files_are_read_while_others_are_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [FoundFile(f"{number}.png", 0, 0) for number in range(6)]
    for file in files:
        (tmp_path / file.path).write_bytes(file.path.encode())
    together = threading.Barrier(3, timeout=30)  # breaks unless three reads are under way

    def slow(source: Folder, file: FoundFile) -> bytes:
        together.wait()
        return read_file(source, file)

    monkeypatch.setattr(slice_tasks, "read_file", slow)
    contents = [read() for read in _read_ahead(Folder(tmp_path), files)]
    assert contents == [file.path.encode() for file in files]


@pytest.mark.parametrize(("num_bytes", "most"), [(1, 8), (2**24, 4), (2**30, 1)])
def test_what_is_read_ahead_is_bounded_in_files_and_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, most: int
) -> None:
    begun: list[str] = []

    def read(source: Folder, file: FoundFile) -> bytes:
        begun.append(file.path)
        return b""

    monkeypatch.setattr(slice_tasks, "read_file", read)
    files = [FoundFile(f"{number}.png", num_bytes, 0) for number in range(20)]
    ahead = []
    for number, content in enumerate(_read_ahead(Folder(tmp_path), files)):
        content()
        ahead.append(len(begun) - number)
    assert len(begun) == 20
    assert max(ahead) <= most


def test_a_file_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "c").write_bytes(b"c")
    a, b, c = _read_ahead(Folder(tmp_path), [FoundFile(name, 0, 0) for name in "abc"])
    assert (a(), c()) == (b"a", b"c")
    with pytest.raises(RejectedImage, match="unreadable file"):
        b()


def test_files_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_tasks, "_SLICES_AT_ONCE", 2)
    rng = np.random.default_rng(0)
    files = [FoundFile(f"{number}.png", 0, 0) for number in range(5)]
    for file in files:
        cv2.imwrite(str(tmp_path / file.path), rng.integers(0, 256, (64, 64), np.uint8))
    (tmp_path / "3.png").write_bytes(b"no image")
    known = content_hash((tmp_path / "1.png").read_bytes())
    settings = PreprocessConfig(image_size=32, skull_strip="none")
    tables = list(_decoded(files, Folder(tmp_path), settings, b"salt", {known}))
    assert [table.num_rows for table in tables] == [2, 2, 1]
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["path"] for row in rows] == [file.path for file in files]
    assert [row["image"] is None for row in rows] == [False, True, False, True, False]
    assert [row["path"] for row in rows if row["reason"]] == ["3.png"]


def test_a_part_keeps_its_slices_pixels_row_group_by_row_group(tmp_path: Path) -> None:
    parts, images = Folder(tmp_path / "parts"), Folder(tmp_path / "images")

    def slice_row(name: str) -> dict[str, Any]:
        thumbnail = name.encode() * THUMBNAIL_SIDE**2
        return {"sample_id": name, "image": name.encode() * 4, "thumbnail": thumbnail}

    with parts.table_writer("part", SLICES) as writer:
        for names in ("ab", "ca", "d"):  # of a, which is there twice, either will do
            table = pa.Table.from_pylist([slice_row(name) for name in names], schema=SLICES)
            writer.write_table(table)
    # b was removed; a is a training and a test slice.
    requested = [("d", "train"), ("a", "test"), ("c", "train"), ("a", "train")]
    about_slice = [field for field in IMAGE_STORE if field.name not in {"image", "thumbnail"}]
    final = pa.Table.from_pylist(
        [{"sample_id": name, "split": split} for name, split in requested],
        schema=pa.schema(about_slice),
    )
    _write_part("part", final, parts, images)
    written = images.read_table("part")
    assert written.schema.names == IMAGE_STORE.names
    rows = written.to_pylist()
    assert sorted((row["sample_id"], row["split"]) for row in rows) == sorted(requested)
    assert all(row["image"] == row["sample_id"].encode() * 4 for row in rows)
    assert all(row["thumbnail"][:1] == row["sample_id"].encode() for row in rows)
    assert [len(group) for group in images.row_groups("part", ["path"])] == [2, 1, 1]
    with pytest.raises(DataError, match="1 slices are missing, such as gone"):
        _write_part(
            "part",
            pa.concat_tables([final, final.slice(0, 1)]).set_column(
                0, IMAGE_STORE.field("sample_id"), pa.array(["d", "a", "c", "a", "gone"])
            ),
            parts,
            images,
        )

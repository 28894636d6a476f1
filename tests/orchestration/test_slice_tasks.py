"""Reading ahead: several files at a time, in order, each failure with its own file."""

import threading
from pathlib import Path

import pytest

from brainray.mri.decode import RejectedImage
from brainray.orchestration import slice_tasks
from brainray.orchestration.preparation import read_file
from brainray.orchestration.slice_tasks import _read_ahead
from brainray.orchestration.source import FoundFile
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

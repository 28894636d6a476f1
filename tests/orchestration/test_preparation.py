"""Files that change or vanish while they are read, and what is hashed with."""

import os
from pathlib import Path

import pytest

from brainray.errors import ConfigError
from brainray.mri.decode import RejectedImage
from brainray.orchestration.preparation import read_file, subject_salt
from brainray.orchestration.source import FoundFile, list_source
from brainray.storage import Folder


def test_a_file_that_changes_or_vanishes_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    (listed,) = list_source(Folder(tmp_path), None, {}).files
    assert read_file(Folder(tmp_path), listed.file) == b"first"
    path.write_bytes(b"longer than before")
    with pytest.raises(RejectedImage, match="changed while being read"):
        read_file(Folder(tmp_path), listed.file)
    path.write_bytes(b"other")
    os.utime(path, (1, 1))
    with pytest.raises(RejectedImage, match="changed while being read"):
        read_file(Folder(tmp_path), listed.file)
    path.unlink()
    with pytest.raises(RejectedImage, match="unreadable file"):
        read_file(Folder(tmp_path), listed.file)


def test_a_known_problem_is_told_without_reading(tmp_path: Path) -> None:
    with pytest.raises(RejectedImage, match="not UTF-8"):
        read_file(Folder(tmp_path), FoundFile("a", 0, 0, "file name is not UTF-8"))


def test_the_salt_stays_and_a_short_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRAINRAY_SALT", raising=False)
    made = subject_salt(Folder(tmp_path))
    assert len(made) == 64
    assert subject_salt(Folder(tmp_path)) == made
    monkeypatch.setenv("BRAINRAY_SALT", "short")
    with pytest.raises(ConfigError, match="16 characters"):
        subject_salt(Folder(tmp_path))

"""Files under storage appear whole or not at all, whatever the file system."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from brainray.errors import ConfigError, DataError
from brainray.storage import Folder


def test_a_written_file_leaves_no_temporary_name(tmp_path: Path) -> None:
    folder = Folder(tmp_path) / "a"
    folder.write_bytes("b/c.txt", b"hello")
    assert folder.read_bytes("b/c.txt") == b"hello"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.txt"]


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert Folder(tmp_path).read_json_lines("m.jsonl") == [{"a": 1}, {"a": 2}]
    assert Folder(tmp_path).read_json_lines("absent.jsonl") == []


def test_tables_and_names(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_table("t.parquet", pa.table({"x": [1, 2]}))
    assert folder.read_table("t.parquet")["x"].to_pylist() == [1, 2]
    assert folder.names() == ["t.parquet"]
    assert (folder / "absent").names() == []
    assert not (folder / "absent").exists()


def test_a_uri_is_a_folder_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path.as_uri())
    folder.write_json("x.json", {"a": 1})
    assert pickle.loads(pickle.dumps(folder)).read_json("x.json") == {"a": 1}
    assert folder.local_path == tmp_path


def test_moving_needs_no_parent(tmp_path: Path) -> None:
    source = Folder(tmp_path) / "source"
    source.write_bytes("f", b"x")
    source.move_to(Folder(tmp_path) / "deep" / "target", last="f")
    assert (tmp_path / "deep" / "target" / "f").read_bytes() == b"x"
    assert not source.exists()


def test_a_relative_path_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="relative/path"):
        Folder("relative/path")
    with pytest.raises(DataError, match="absent"):
        Folder(tmp_path).read_bytes("absent")


def test_moving_without_renames_copies_and_completes_last(tmp_path: Path) -> None:
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    source, target = Folder(tmp_path), Folder(tmp_path)
    for folder, path in ((source, "source"), (target, "target")):
        folder.filesystem, folder.path = remote, path
    source.write_bytes("images/part", b"x")
    source.write_bytes("manifest.json", b"{}")
    assert source.local_path is None
    source.move_to(target, last="manifest.json")
    assert (tmp_path / "target" / "images" / "part").read_bytes() == b"x"
    assert (tmp_path / "target" / "manifest.json").read_bytes() == b"{}"
    assert not (tmp_path / "source").exists()

"""Files under storage appear whole or not at all, whatever the file system."""

import errno
import itertools
import os
import pickle
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from brainray import storage
from brainray.errors import ConfigError, DataError, StorageError, UnreachableError
from brainray.storage import Folder, _temporary


def test_a_written_file_leaves_no_temporary_name(tmp_path: Path) -> None:
    folder = Folder(tmp_path) / "a"
    folder.write_bytes("b/c.txt", b"hello")
    assert folder.read_bytes("b/c.txt") == b"hello"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.txt"]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: named.append((tmp_path / "summary.json").exists()))
    Folder(tmp_path).write_bytes("summary.json", b"{}")
    assert named == [False]
    assert (tmp_path / "summary.json").read_bytes() == b"{}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_spent_quota_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left to write .*summary\.json: free some"):
        Folder(tmp_path).write_bytes("summary.json", b"{}")


def test_hidden_files_of_others_are_not_listed(tmp_path: Path) -> None:
    for name in (".DS_Store", "._part.parquet", "part.parquet"):
        (tmp_path / name).touch()
    assert Folder(tmp_path).names() == ["part.parquet"]


def test_a_folder_contains_what_lies_below_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    source = Folder(tmp_path / "data")
    assert source.contains(source)
    assert source.contains(Folder(tmp_path / "link" / "data" / "out"))
    assert not source.contains(Folder(tmp_path / "data2"))
    assert not source.contains(Folder(tmp_path))
    bucket = Folder("s3://bucket/data?region=r")
    assert bucket.contains(Folder("s3://bucket/data/out?region=r"))
    assert not bucket.contains(Folder("s3://bucket/data2?region=r"))
    assert not bucket.contains(source)


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


def test_only_columns_without_pixels_are_indexed(tmp_path: Path) -> None:
    """A dictionary and bounds of images would take longer than writing them, and serve nobody."""
    folder = Folder(tmp_path)
    table = pa.table(
        {
            "split": ["train", "test"],
            "image": [b"ab", b"abc"],
            "thumbnail": pa.array([b"ab", b"cd"], pa.binary(2)),
        }
    )
    folder.write_table("part.parquet", table)
    assert folder.read_table("part.parquet") == table
    written = pq.ParquetFile(tmp_path / "part.parquet").metadata.row_group(0)
    about = {written.column(i).path_in_schema: written.column(i) for i in range(3)}
    assert about["split"].statistics.min == "test"
    assert about["split"].has_dictionary_page
    for name in ("image", "thumbnail"):
        assert about[name].statistics is None
        assert not about[name].has_dictionary_page


def test_of_a_table_that_fails_midway_nothing_is_left(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    table = pa.table({"x": [1, 2]})
    folder.write_table("part.parquet", table)

    def fail() -> None:
        with folder.table_writer("part.parquet", table.schema) as writer:
            writer.write_table(pa.table({"x": [3]}))
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fail()
    assert folder.read_table("part.parquet") == table
    assert list(tmp_path.iterdir()) == [tmp_path / "part.parquet"]


def test_what_a_killed_writer_left_behind_is_passed_over(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "parts")
    folder.write_table("part-0.parquet", pa.table({"x": [1, 2]}))

    cut = _temporary(f"{tmp_path}/parts/part-1.parquet")
    Path(cut).write_bytes(b"PAR1")  # not moved to its name any more
    assert folder.names() == ["part-0.parquet"]
    assert Folder(tmp_path).read_table("parts")["x"].to_pylist() == [1, 2]


def test_a_uri_is_a_folder_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path.as_uri())
    folder.write_json("x.json", {"a": 1})
    assert pickle.loads(pickle.dumps(folder)).read_json("x.json") == {"a": 1}
    assert folder.local_path == tmp_path


def test_options_of_a_uri_go_with_everything_in_the_folder() -> None:
    folder = Folder("s3://bucket/brainray/?region=eu-west-1")
    run = folder / "runs" / "first"
    assert run.uri == "s3://bucket/brainray/runs/first?region=eu-west-1"
    assert (run.path, run.name) == ("bucket/brainray/runs/first", "first")
    assert run.parent.uri == "s3://bucket/brainray/runs?region=eu-west-1"
    assert (Folder("/a/b?c") / "d").path == "/a/b?c/d"


def test_a_fragment_is_refused_in_which_all_subfolders_would_be_one(tmp_path: Path) -> None:
    for uri in ("s3://bucket/scans#1?region=eu-west-1", f"{tmp_path.as_uri()}/scans#1"):
        with pytest.raises(ConfigError, match=r"scans#1.*: in a URI, write %23"):
            Folder(uri)
    with pytest.raises(ConfigError, match="write %23"):
        Folder(tmp_path.as_uri()) / "scans#1"
    for given in (str(tmp_path / "scans#1"), (tmp_path / "scans#1").as_uri()):
        folder = Folder(given)
        assert (folder / "a").local_path == tmp_path / "scans#1" / "a"


def test_a_folder_is_rebuilt_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = Folder(tmp_path) / "kept"
    with folder.rebuilt("last") as building:
        building.write_bytes("last", b"1")
    with pytest.raises(DataError, match="leads out"), folder.rebuilt("last") as building:
        building.write_bytes("../last", b"2")
    assert folder.read_bytes("last") == b"1"
    with folder.rebuilt("last") as building:
        building.write_bytes("last", b"3")
    assert folder.read_bytes("last") == b"3"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_was_moved_aside_comes_back_if_nothing_has_taken_its_place(
    tmp_path: Path,
) -> None:
    (Folder(tmp_path) / ".kept.replaced").write_bytes("last", b"1")
    folder = Folder(tmp_path) / "kept"
    folder.restore("last")
    assert folder.read_bytes("last") == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


class _Killed(BaseException):
    """Nothing that handles it can change the file system either."""


class _Mortal:
    """The local file system, of a process that is killed instead of its n-th change."""

    type_name = "local"

    def __init__(self, num_changes: int) -> None:
        self._local = pafs.LocalFileSystem()
        self.num_left = num_changes

    def from_uri(self, path: str) -> tuple["_Mortal", str]:
        return self, path

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._local, name)
        if name == "open_input_file":
            return method

        def change(*arguments: Any, **options: Any) -> Any:
            if self.num_left <= 0:
                raise _Killed
            self.num_left -= 1
            return method(*arguments, **options)

        return change

    def get_file_info(self, asked: Any) -> Any:
        """Of a folder's files, the one that completes it is listed first."""
        infos = self._local.get_file_info(asked)
        is_listed = isinstance(infos, list)
        return sorted(infos, key=lambda info: info.base_name != "last") if is_listed else infos

    def delete_dir(self, path: str) -> None:
        """One file after the other, as object stores do."""
        for file in sorted(Path(path).rglob("*")):
            if file.is_file():
                self.delete_file(str(file))
        self.__getattr__("delete_dir")(path)


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_is_wholly_old_or_wholly_new_whenever_its_rebuilding_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool, fails: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(storage, "_COPIES_AT_ONCE", 1)
    local_path = property(lambda self: Path(self.path)) if is_local else None
    monkeypatch.setattr(Folder, "local_path", local_path)
    old = {"a": b"1", "b": b"1", "gone/c": b"1", "last": b"1"}
    new = {"a": b"2", "b": b"2", "new/d": b"2", "last": b"2"}

    def rebuild(path: Path, files: dict[str, bytes], *, fails: bool = False) -> None:
        with suppress(KeyError), Folder(path).rebuilt("last") as building:
            for name, content in files.items():
                building.write_bytes(name, content)
            if fails:
                raise KeyError

    def content(path: Path) -> dict[str, bytes]:
        files = [file for file in path.rglob("*") if file.is_file()]
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}

    for num_changes in itertools.count():
        kept = tmp_path / str(num_changes) / "kept"
        rebuild(kept, old)
        process = _Mortal(num_changes)
        with monkeypatch.context() as until_killed, suppress(_Killed):
            until_killed.setattr(pafs, "FileSystem", process)
            rebuild(kept, new, fails=fails)
        left = content(kept)
        assert left in (old, new) or "last" not in left  # until the next job with this name
        rebuild(kept, {}, fails=True)
        assert content(kept) in (old, new)
        assert [path.name for path in kept.parent.iterdir()] == ["kept"]
        if process.num_left > 0:
            assert left == (old if fails else new)
            break


def test_a_relative_path_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="relative/path"):
        Folder("relative/path")
    with pytest.raises(DataError, match="absent"):
        Folder(tmp_path).read_bytes("absent")


def test_a_csv_file_has_no_formulas(tmp_path: Path) -> None:
    names = ["=1+1", "-a.png", "@b", "+c", "\td", "c=d.png", "", None]
    table = pa.table({"path": pa.array(names, pa.string()), "value": [-1.5] * 8})
    Folder(tmp_path).write_csv("list.csv", table)
    lines = (tmp_path / "list.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0].strip('"') for line in lines] == [
        "'=1+1",
        "'-a.png",
        "'@b",
        "'+c",
        "'\td",
        "c=d.png",
        "",
        "",
    ]
    assert all(line.endswith(",-1.5") for line in lines)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_a_name_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / "inner")
    for reach in (folder.read_bytes, folder.exists, folder.__truediv__, folder.read_json):
        with pytest.raises(DataError, match="leads out of"):
            reach(name)
    with pytest.raises(DataError, match="leads out of"):
        folder.write_bytes(name, b"x")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content + b"\n")
    for read in (Folder(tmp_path).read_json, Folder(tmp_path).read_json_lines):
        if content or read.__name__ == "read_json_lines":
            with pytest.raises(DataError, match=r"x\.json is not JSON"):
                read("x.json")


@pytest.mark.parametrize(
    "error",
    [
        OSError("When uploading key 'x' in bucket 'ro': AWS Error ACCESS_DENIED during PutObject"),
        OSError("When uploading key 'x' in bucket 'no': AWS Error NO_SUCH_BUCKET during PutObject"),
        PermissionError(errno.EACCES, "google::cloud::Status(PERMISSION_DENIED: ...)"),
        FileNotFoundError(errno.ENOENT, "google::cloud::Status(NOT_FOUND: no such bucket)"),
        pa.ArrowInvalid("google::cloud::Status(INVALID_ARGUMENT: missing project id)"),
    ],
)
def test_an_object_store_that_refuses_writes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = Folder(tmp_path)
    monkeypatch.setattr(folder, "filesystem", _Failing(error))
    named = (
        rf"/a cannot be written \({re.escape(str(error))}\): check the bucket's name and the cred"
    )
    for content in (b"x", bytes(6 << 20)):  # in one request, and in several
        with pytest.raises(StorageError, match=named):
            folder.write_bytes("a", content)
    monkeypatch.setattr(folder, "filesystem", _Failing(OSError("AWS Error NETWORK_CONNECTION")))
    with pytest.raises(UnreachableError, match="NETWORK_CONNECTION"):  # workers are restarted
        folder.write_bytes("a", b"x")


@contextmanager
def small_files() -> Iterator[None]:
    """Files of this process end at 100 kB, as on a disk that is full; a log of its output too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_or_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    folder = Folder(tmp_path / "file" / "storage")
    for write in (folder.write_bytes, folder.create_file):
        with pytest.raises(DataError, match=r"file/storage/a cannot be written \(Not a directory"):
            write("a", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"link/a cannot be written .*give another storage"):
        Folder(tmp_path / "link").write_bytes("a", b"x")
    folder = Folder(tmp_path)
    folder.write_bytes("secret", b"x")
    monkeypatch.setattr(
        folder, "filesystem", _Failing(PermissionError(errno.EACCES, "Permission denied"))
    )
    for read in (folder.read_bytes, folder.exists):
        with pytest.raises(StorageError, match="secret cannot be read by this user"):
            read("secret")
    monkeypatch.setattr(folder, "filesystem", _Failing(OSError("AWS Error NETWORK_CONNECTION")))
    asks = (lambda: folder.read_bytes("secret"), lambda: folder.exists("x"), folder.names)
    for ask in asks:
        with pytest.raises(StorageError, match=r"cannot be reached \(AWS Error NETWORK_CONN"):
            ask()
    monkeypatch.setattr(folder, "filesystem", _Failing(pa.ArrowInvalid("Empty path component")))
    for ask in asks:
        with pytest.raises(StorageError, match=r"is no possible path \(Empty path component\)"):
            ask()


def test_folders_that_no_file_stands_for_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pyarrow lists Google Cloud Storage: files alone."""
    folder = Folder(tmp_path)
    for name in ("deep/er/a", "deep/b", "c", ".hidden/d"):
        folder.write_bytes(name, b"x")
    local = folder.filesystem

    def files(selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return [info for info in local.get_file_info(selector) if info.is_file]

    monkeypatch.setattr(folder, "filesystem", Mock(type_name="gcs", get_file_info=files))
    assert folder.names() == ["c", "deep"]


def test_a_folder_is_deleted_where_no_file_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    answers = [Mock(type=pafs.FileType.Directory), Mock(type=pafs.FileType.NotFound)]
    gcs = Mock(
        type_name="gcs",
        get_file_info=Mock(side_effect=answers),
        delete_dir=Mock(side_effect=FileNotFoundError(errno.ENOENT, "when all files are deleted")),
    )
    monkeypatch.setattr(folder, "filesystem", gcs)
    folder.delete()
    gcs.get_file_info.side_effect = None
    gcs.get_file_info.return_value = answers[0]  # a file is left
    with pytest.raises(FileNotFoundError):
        folder.delete()


def test_a_bucket_that_cannot_be_looked_up_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Mock(from_uri=Mock(side_effect=OSError("When resolving region for bucket 'b': ...")))
    monkeypatch.setattr(pafs, "FileSystem", found)
    with pytest.raises(StorageError, match=r"^s3://b/x cannot be reached \(When resolving region"):
        Folder("s3://b/x")


@pytest.mark.usefixtures("no_hard_links")
def test_a_file_is_created_once_where_there_are_no_hard_links(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.create_file("a", b"first", mode=0o600)
    assert not folder.create_file("a", b"second")
    assert folder.read_bytes("a") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_a_link_that_was_made_though_its_answer_was_lost_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.link

    def link(source: str, target: str) -> None:
        original(source, target)
        raise FileExistsError(errno.EEXIST, "as NFS answers a repeated request")

    monkeypatch.setattr(os, "link", link)
    assert Folder(tmp_path).create_file("a", b"first")
    assert not Folder(tmp_path).create_file("a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_path_that_cannot_be_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for path in (tmp_path / "loop" / "x", tmp_path / ("n" * 300), tmp_path / "file" / "x"):
        with pytest.raises(DataError, match=r"cannot be a path here|no such file"):
            Folder(path).read_bytes("a")
    with pytest.raises(DataError, match="cannot be a path here: Not a directory"):
        Folder(tmp_path / "file").names()


class _Failing:
    """As a file system is to those without rights, which tests may have as root, or one away."""

    type_name = "s3"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def open_input_file(self, path: str) -> None:
        raise self._error

    def get_file_info(self, selector: object) -> None:
        raise self._error

    def open_output_stream(self, path: str) -> None:
        raise self._error

    def delete_file(self, path: str) -> None:
        raise self._error


def test_a_full_disk_is_reported_and_the_old_file_stays_whole(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_table("part.parquet", pa.table({"x": [1, 2]}))
    noise = [os.urandom(1000) for _ in range(300)]
    refused = pytest.raises(DataError, match=r"no space left to write .*part\.parquet")
    with refused, small_files():
        folder.write_table("part.parquet", pa.table({"x": noise}))
    assert folder.read_table("part.parquet")["x"].to_pylist() == [1, 2]
    assert folder.names() == ["part.parquet"]


@pytest.mark.parametrize("place", [10, -6])  # a page, and the footer
def test_a_damaged_table_is_not_taken_for_a_network(tmp_path: Path, place: int) -> None:
    folder = Folder(tmp_path)
    folder.write_table("t.parquet", pa.table({"x": list(range(10_000))}))
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[place : place + 4] = b"\xff" * 4
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.parquet cannot be read, it may be damaged") as refused:
        folder.read_table("t.parquet")
    assert not isinstance(refused.value, StorageError)


def test_a_missing_table_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*/t\.parquet"):
        Folder(tmp_path).read_table("t.parquet")

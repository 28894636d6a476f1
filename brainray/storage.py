"""Files under ``storage``: one interface to a local folder or any URI supported by pyarrow."""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from brainray.errors import BrainrayError, ConfigError, DataError, StorageError, UnreachableError

_OBJECT_STORES = {"gcs", "s3"}
"""File systems of pyarrow without folders, where an upload appears when it is complete."""
_ONE_UPLOAD_BYTES = 5 << 20  # of S3, pyarrow keeps more in memory until the stream is closed
_COPIES_AT_ONCE = 8

_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = ("ACCESS_DENIED", "NO_SUCH_BUCKET")  # by an object store; outages may be temporary
_HAS_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # a file system, such as exFAT or SMB
_IMPOSSIBLE_PATHS = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}
_NOT_WRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENOENT),  # a file or a broken link in place of the folder
}


class Folder:
    """A folder on a local or remote file system; small enough to pickle to workers.

    Files appear complete or not at all: they are written under a temporary name and then moved, or,
    by `write_bytes` in object stores, in one request if they are small. Temporary files left by a
    killed writer are ignored, here and by pyarrow's folder readers.

    Names are relative; those that lead out of the folder raise DataError. Methods that read raise
    DataError if there is no such file or it is damaged, and StorageError if it cannot be reached or
    read by this user; those that write raise StorageError if the storage is full or refuses it.
    """

    def __init__(self, uri: str | Path) -> None:
        is_uri = "://" in str(uri)
        if is_uri and "#" in str(uri):  # its path would end there, also that of every subfolder
            raise ConfigError(f"{uri}: in a URI, write %23 for #")
        base, question, query = str(uri).partition("?" if is_uri else "\0")
        self._base = base.rstrip("/") or "/"
        self._query = question + query  # such as ?region=eu-west-1, for everything in the folder
        self.uri = self._base + self._query
        # From this URI others, too, get a file system that is equal to this one's.
        self.arrow_uri = self.uri + _one_request_option(self.uri)
        try:
            self.filesystem, self.path = pafs.FileSystem.from_uri(self.arrow_uri)
        except ValueError as error:  # ArrowInvalid is one
            raise ConfigError(
                f"{self.uri!r} is neither an absolute path nor a URI supported by pyarrow "
                f"({error}): write /a/path, s3://bucket/path, ..."
            ) from None
        except OSError as error:  # such as a bucket whose region is looked up
            raise _unreachable(self.uri, error) from None

    def __truediv__(self, name: str) -> "Folder":
        self._join(name)  # refuses names that lead out of this folder
        return Folder(f"{self._base}/{name}{self._query}")

    def __str__(self) -> str:
        return self.uri

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return Folder, (self.uri,)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self._base.rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        return Folder((self._base.rpartition("/")[0] or "/") + self._query)

    @property
    def local_path(self) -> Path | None:
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    @property
    def has_folders(self) -> bool:
        """False in an object store, where folders are parts of names and need not be created.

        pyarrow would write an empty object for each of them, also for those above the storage,
        where a user may have no right to write.
        """
        return self.filesystem.type_name not in _OBJECT_STORES

    def contains(self, other: "Folder") -> bool:
        """Whether another folder is this one or lies below it."""
        if self.filesystem.type_name != other.filesystem.type_name:
            return False
        if self.local_path is None:
            return f"{other.path}/".startswith(f"{self.path}/")
        ours, theirs = os.path.realpath(self.path), os.path.realpath(other.path)
        return os.path.commonpath([ours, theirs]) == ours

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder; without a name, whether this folder exists."""
        with self._friendly_read_errors(name):
            info = self.filesystem.get_file_info(self._join(name))
        return bool(info.type != pafs.FileType.NotFound)

    def names(self) -> list[str]:
        """Names of the folder's files and folders, sorted; empty if it does not exist.

        Without hidden ones: files that are being written, and what file managers leave behind.
        """
        # pyarrow lists folders of GCS only if an object stands for them.
        recursive = self.filesystem.type_name == "gcs"
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        with self._friendly_read_errors(""):
            infos = self.filesystem.get_file_info(selector)
        above = self.path.rstrip("/") + "/"
        names = {info.path.removeprefix(above).partition("/")[0] for info in infos}
        return sorted(name for name in names if not name.startswith("."))

    def read_bytes(self, name: str) -> bytes:
        """The content of a file."""
        with (
            self._friendly_read_errors(name),
            self.filesystem.open_input_file(self._join(name)) as stream,
        ):
            return bytes(stream.read())

    @contextlib.contextmanager
    def _friendly_read_errors(self, name: str) -> Iterator[None]:
        """Replace the system's error with one that names the remedy."""
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"no such file: {self.uri}/{name}") from None
        except PermissionError:
            raise StorageError(
                f"{self.uri}/{name} cannot be read by this user: grant read access, or give "
                "another path"
            ) from None
        except OSError as error:
            if error.errno in _IMPOSSIBLE_PATHS:
                raise DataError(
                    f"{self.uri}/{name} cannot be a path here: {os.strerror(error.errno)}"
                ) from None
            if self.local_path is not None and (self.local_path / name).is_dir():
                raise DataError(f"{self.uri}/{name} is a folder, not a file") from None
            if error.errno is not None:
                raise
            # From an object store: its errors have no errno.
            raise _unreachable(f"{self.uri}/{name}", error) from None
        except pa.ArrowInvalid as error:  # such as s3://bucket//key
            if self.local_path is not None:
                raise
            reason = " ".join(str(error).split())
            raise StorageError(f"{self.uri}/{name} is no possible path ({reason})") from None

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write or replace a file, and the folders above it; after a power failure it is the old
        or the new file, not an empty one.
        """
        if self.has_folders or len(content) > _ONE_UPLOAD_BYTES:
            with self._new_file(name, on_disk=True) as stream:
                stream.write(content)
        else:
            self._upload(name, content)

    def _upload(self, name: str, content: bytes) -> None:
        """Write a small file of an object store in one go, to its own name.

        In a thread, where no signal raises an exception: pyarrow completes the upload of a stream
        that is closed or forgotten halfway, and the file would be empty.
        """

        def upload() -> None:
            with self._opened(self._join(name), name) as stream:
                stream.write(content)

        with self._friendly_write_errors(name), ThreadPoolExecutor(1) as thread:
            thread.submit(upload).result()

    @contextlib.contextmanager
    def _new_file(self, name: str, *, on_disk: bool = False) -> Iterator[pa.NativeFile]:
        """Stream for a file that gets its name when the block ends without an error; ``on_disk``,
        when its content is not only in the system's memory.
        """
        target = self._join(name)
        temporary = _temporary(target)
        with self._friendly_write_errors(name):
            try:
                with self._opened(temporary, name) as stream:
                    yield stream
            except BaseException:
                self._delete_cut_file(temporary)
                raise
            if on_disk and self.local_path is not None:
                _write_to_disk(temporary)
            self.filesystem.move(temporary, target)

    def _opened(self, path: str, name: str) -> pa.NativeFile:
        """Stream to a new file; ``name`` is the one to call it by in errors."""
        try:
            self._create_folder_of(path)
            return self.filesystem.open_output_stream(path)
        except pa.ArrowException as error:  # such as an impossible name of a bucket
            if self.has_folders:
                raise
            raise self._refused(name, error) from None

    def _create_folder_of(self, path: str) -> None:
        if self.has_folders:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)

    def _refused(self, name: str, error: Exception) -> StorageError:
        reason = " ".join(str(error).split())
        return StorageError(
            f"{self.uri}/{name} cannot be written ({reason}): check the bucket's name and the "
            "credentials' write permission"
        )

    @contextlib.contextmanager
    def _friendly_write_errors(self, name: str) -> Iterator[None]:
        """Replace the system's error with one that names the remedy."""
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_IS_FULL:
                raise StorageError(
                    f"no space left to write {self.uri}/{name}: free some and submit again; files "
                    "written earlier are complete"
                ) from None
            if error.errno in _NOT_WRITABLE and not self.has_folders:
                raise self._refused(name, error) from None
            if error.errno in _NOT_WRITABLE:
                raise StorageError(
                    f"{self.uri}/{name} cannot be written ({os.strerror(error.errno)}): grant "
                    "write access, or give another storage"
                ) from None
            if error.errno is not None:
                raise
            # From an object store: its errors have no errno.
            if any(word in str(error) for word in _REFUSED):
                raise self._refused(name, error) from None
            raise _unreachable(f"{self.uri}/{name}", error) from None

    def _delete_cut_file(self, path: str) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):  # the first error is reported
            self.filesystem.delete_file(path)

    def create_file(self, name: str, content: bytes, *, mode: int = 0o666) -> bool:
        """Create a file in a local or mounted folder; False if it exists, leaving it unchanged.

        Where there are no hard links, it is visible for a moment before it is complete.

        ``mode``: its permissions, less the umask.
        """
        target = self._join(name)
        temporary = _temporary(target)
        with self._friendly_write_errors(name):
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            try:
                _write_new(temporary, content, mode)
                try:
                    os.link(temporary, target)  # never visible half-written
                except OSError as error:
                    if error.errno not in _HAS_NO_LINKS:
                        raise
                    _write_new(target, content, mode)
            except FileExistsError:
                # On NFS a repeated request for a link may be answered like this though it was made.
                return os.stat(temporary).st_nlink == 2
            finally:
                Path(temporary).unlink(missing_ok=True)
            return True

    def delete_file(self, name: str, *, missing_ok: bool = False) -> None:
        if not missing_ok or self.exists(name):
            self.filesystem.delete_file(self._join(name))

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.uri}/{name} is not JSON: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json_lines(self, name: str) -> list[Any]:
        """One value per line; an incomplete last line, as left by a crash, is skipped."""
        if not self.exists(name):
            return []
        try:
            lines = self.read_bytes(name).decode().split("\n")[:-1]
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.uri}/{name} is not JSON Lines: {error}") from None

    def write_json_lines(self, name: str, values: list[Any]) -> None:
        text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        self.write_bytes(name, text.encode())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file, or all Parquet files of a folder."""
        with self._friendly_read_errors(name), self._friendly_damage_errors(name):
            return pq.read_table(self._join(name), columns=columns, filesystem=self.filesystem)

    @contextlib.contextmanager
    def _friendly_damage_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError):  # Arrow's have no errno
            raise
        except (pa.ArrowInvalid, OSError) as error:
            is_remote_error = self.local_path is None and isinstance(error, OSError)
            if is_remote_error or (isinstance(error, OSError) and error.errno is not None):
                raise
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{self.uri}/{name} cannot be read, it may be damaged: {reason}"
            ) from None

    @contextlib.contextmanager
    def open_table(self, name: str, *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
        """A Parquet file, to read some of its row groups within the block; with ``buffer_size``,
        also some of the rows of one, whose columns are then read in pieces of so many bytes.
        """
        with (
            self._friendly_read_errors(name),
            self._friendly_damage_errors(name),
            self.filesystem.open_input_file(self._join(name)) as stream,
        ):
            yield pq.ParquetFile(stream, pre_buffer=not buffer_size, buffer_size=buffer_size)

    def row_groups(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """Row groups of a Parquet file, one in memory at a time."""
        with self.open_table(name) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=columns)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file, which is on the disk before it gets its name."""
        with self.table_writer(name, table.schema, on_disk=True) as writer:
            writer.write_table(table)

    def write_csv(self, name: str, table: pa.Table) -> None:
        """For spreadsheets: see `without_formulas`."""
        with self.csv_writer(name, table.schema) as writer:
            writer.write_table(without_formulas(table))

    @contextlib.contextmanager
    def csv_writer(self, name: str, schema: pa.Schema) -> Iterator[pa_csv.CSVWriter]:
        with self._new_file(name) as stream, pa_csv.CSVWriter(stream, schema) as writer:
            yield writer

    @contextlib.contextmanager
    def table_writer(
        self, name: str, schema: pa.Schema, *, on_disk: bool = False
    ) -> Iterator[pq.ParquetWriter]:
        """Writer of a Parquet file; each table written becomes a row group. With ``on_disk``, it is
        on the disk before it gets its name.
        """
        # For images, dictionaries and statistics take longer than writing them.
        described = [field.name for field in schema if not _holds_bytes(field.type)]
        with (
            self._new_file(name, on_disk=on_disk) as stream,
            pq.ParquetWriter(
                stream,
                schema,
                compression="lz4",
                use_dictionary=described,
                write_statistics=described,
            ) as writer,
        ):
            yield writer

    def create(self) -> None:
        """Create the folder before it has files, where there are folders: nodes look for it."""
        if self.has_folders:
            self.filesystem.create_dir(self.path, recursive=True)

    def delete(self) -> None:
        """Delete the folder and its contents, if it exists."""
        if not self.exists():
            return
        try:
            self.filesystem.delete_dir(self.path)
        except FileNotFoundError:  # GCS has deleted the files, and finds none for the folder itself
            if self.exists():
                raise

    @contextlib.contextmanager
    def rebuilt(self, last: str) -> Iterator["Folder"]:
        """An empty folder to fill; replaces this one when the block ends without an error.

        If the block fails, nothing is left of it. ``last`` is the file that marks it as complete,
        to be written after all others.
        """
        self.restore(last)
        building = self._beside("rebuilt")
        building.delete()
        try:
            yield building
        except BaseException:
            with contextlib.suppress(OSError, BrainrayError):  # would hide the first error
                building._discard(last)
            raise
        self.restore(last)

    def restore(self, last: str) -> None:
        """Replace this folder by a complete rebuilt one, which an interrupted job may have left.

        Object stores cannot rename folders: there, the old files are deleted and the new ones
        copied.
        """
        building, aside = self._beside("rebuilt"), self._beside("replaced")
        if building.exists(last):
            if self.local_path is None:
                self._discard(last)
                building._copy_to(self, last)
                building._discard(last)
            else:
                if self.exists():
                    self.filesystem.move(self.path, aside.path)
                self.filesystem.move(building.path, self.path)
        elif aside.exists() and not self.exists():  # somebody has deleted the rebuilt one
            self.filesystem.move(aside.path, self.path)
        aside.delete()

    def _beside(self, what: str) -> "Folder":
        return self.parent / f".{self.name}.{what}"

    def _discard(self, last: str) -> None:
        """Delete the folder, first the file that marks it as complete."""
        self.delete_file(last, missing_ok=True)
        self.delete()

    def _copy_to(self, target: "Folder", last: str) -> None:
        """Copy to a folder of the same object store, the file ``last`` after all others."""
        selector = pafs.FileSelector(self.path, recursive=True)
        paths = [info.path for info in self.filesystem.get_file_info(selector) if info.is_file]

        def copy(path: str) -> None:
            copied = target.path + path.removeprefix(self.path)
            target._create_folder_of(copied)
            target.filesystem.copy_file(path, copied)

        with target._friendly_write_errors(""), ThreadPoolExecutor(_COPIES_AT_ONCE) as threads:
            # list: the first error is raised, and no further file is begun.
            list(threads.map(copy, (path for path in paths if path != self._join(last))))
            copy(self._join(last))

    def _join(self, name: str) -> str:
        if ".." in name.split("/") or name.startswith("/") or "\0" in name:
            raise DataError(f"{name!r} leads out of {self.uri}: use a relative name without '..'")
        return f"{self.path}/{name}" if name else self.path


def check_is_folder(given: Folder, key: str) -> None:
    """Check that what a setting names is a folder; ``key`` is the setting's, for errors.

    Raises:
        DataError: there is none, or it is a file.
    """
    if not given.exists():
        raise DataError(f"no such folder: {key}={given}")
    if given.local_path is not None and not given.local_path.is_dir():
        raise DataError(f"{key}={given} is a file: give the folder that contains it")


def without_formulas(table: pa.Table) -> pa.Table:
    """The table with an apostrophe before texts that a spreadsheet would evaluate as a formula.

    File names, for example, may come from strangers.
    """
    for position, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            texts = table[field.name]
            is_formula = pc.match_substring_regex(texts, "^[=+@\\t\\r-]")
            quoted = pc.binary_join_element_wise("'", texts, "")
            table = table.set_column(position, field, pc.if_else(is_formula, quoted, texts))
    return table


def _write_to_disk(path: str) -> None:
    """Wait until a local file's content is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: str, content: bytes, mode: int) -> None:
    """Raises FileExistsError if there is such a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
    except BaseException:
        Path(path).unlink()
        raise


def _one_request_option(uri: str) -> str:
    """By which pyarrow writes a small file to S3 in one request instead of three."""
    if not uri.startswith("s3://"):
        return ""
    return ("&" if "?" in uri else "?") + "allow_delayed_open=true"


def _unreachable(uri: str, error: OSError) -> UnreachableError:
    reason = " ".join(str(error).split())
    return UnreachableError(
        f"{uri} cannot be reached ({reason}): check the address, the network and the credentials"
    )


def _temporary(path: str) -> str:
    """Path of a file until it is moved; pyarrow ignores hidden files in folders."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/.{name}.tmp-{uuid.uuid4().hex[:12]}"


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)

"""Image files of a source, with the split, class and subject from folders or a labels table."""

import hashlib
import hmac
import json
import os
import re
import shlex
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from brainray.errors import DataError
from brainray.log import log
from brainray.mri.decode import DICOM_HEAD_BYTES, SUFFIXES, looks_like_dicom
from brainray.orchestration.preprocessing.labels_table import (
    SPLIT_NAMES,
    FileMetadata,
    nfc,
    read_labels_table,
)
from brainray.schema import TRAIN
from brainray.storage import Folder, check_is_folder

_LINK_OUT = "link out of the source folder"  # the author of the source may not read all our files
_NOT_UTF8 = "file name is not UTF-8"
_NO_FILE = "not a regular file"
_RENAMING = "rename it, such as with convmv -f latin1 -t utf8"
_REMEDIES = {_LINK_OUT: "copy the file into the source", _NOT_UTF8: _RENAMING}
_HIDDEN = frozenset(
    {
        "__macosx",  # of archives from macOS
        *("@eadir", "#recycle", "#snapshot"),  # of file servers
        *("$recycle.bin", "system volume information", "lost+found"),  # of file systems
    }
)
"""Names in lower case."""
_MAX_CLASS_NAME = 100
_NO_LABEL = frozenset({"unlabelled", "unlabeled"})  # folders and labels of slices without a class

_TASKS_OF_REST = 2  # tasks per CPU, if all remaining tasks had the size of the next one
_MIN_FILES_PER_TASK, _MAX_FILES_PER_TASK = 16, 1024
_NUM_OPENERS = 32
_MAX_SUFFIXES, _MAX_SUFFIX = 4, 8  # of ignored files: how many are logged, how long
_MAX_BYTES_PER_TASK = 64 * 2**20  # file sizes: volumes contain many slices


@dataclass(frozen=True)
class FoundFile:
    """A file below the source, as listed by the file system."""

    path: str  # relative to the source; printable even if the name is not UTF-8
    num_bytes: int
    mtime_ns: int  # 0 if the file system does not report it
    problem: str | None = None  # why it cannot be read at all

    @property
    def remedy(self) -> str:
        """What to do about the problem; may be empty."""
        return _REMEDIES.get(self.problem or "", "")


@dataclass(frozen=True)
class SourceFile(FileMetadata):
    """A file to preprocess, with its metadata from folders or a labels table."""

    file: FoundFile = field(kw_only=True)

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes


AnyFile = TypeVar("AnyFile", FoundFile, SourceFile)


@dataclass(frozen=True)
class Listing:
    """All image files of a source, sorted by path."""

    files: list[SourceFile]
    ignored: Counter[str]  # files of other types, by suffix
    idle_renames: list[str]  # classes in ``classes.map`` that no slice has

    @property
    def num_ignored(self) -> int:
        return self.ignored.total()

    @property
    def remarks(self) -> str:
        """Suffix for a log line: ignored files and unused renames; empty if there are none."""
        remarks = ignored_note(self.ignored)
        if self.idle_renames:
            remarks += (
                f"; no slice has these classes of classes.map: {', '.join(self.idle_renames)}"
            )
        return remarks

    def fingerprint(self, salt: bytes) -> str:
        """Changes with any file or its metadata; a keyed hash, since subjects are included."""
        rows = [
            (f.path, f.file.num_bytes, f.file.mtime_ns, f.split, f.label, f.subject)
            + tuple(sorted(f.label_of_frame.items()))
            for f in self.files
        ]
        return hmac.new(salt, json.dumps(rows).encode(), hashlib.sha256).hexdigest()[:12]


def list_source(
    source: Folder,
    labels: Folder | None,
    class_map: Mapping[str, str | None],
    *,
    reads_splits: bool = True,
    storage: Folder | None = None,
) -> Listing:
    """Find the image files below ``source`` and the metadata of each.

    Supported layouts: Training/ and Testing/ folders of class folders, class folders, and bare
    files. With a labels table, folder names are not used as classes and files without a row are
    unlabelled. If not ``reads_splits``, the table's split column is ignored. A ``storage`` within
    the source is left out: its figures are no slices.

    Raises:
        DataError: no such folder, no image file in it, a folder whose files cannot be read,
            another folder next to Training/ and Testing/, or an invalid labels table.
    """
    found, ignored = find_images(source, storage)
    files = _from_folders(found) if labels is None else _from_table(found, labels, reads_splits)
    class_map = {nfc(name): None if to is None else nfc(to) for name, to in class_map.items()}
    renamed = [_renamed(file, class_map) for file in files]
    names = sorted(set[str]().union(*(file.labels for file in renamed)))
    for name in names:
        _check_class_name(name)
    _check_spellings(names)
    was = set[str]().union(*(file.labels for file in files))
    return Listing(renamed, ignored, sorted(set(class_map) - was))


def _renamed(file: SourceFile, class_map: Mapping[str, str | None]) -> SourceFile:
    def name(label: str | None) -> str | None:
        mapped = None if label is None else class_map.get(label, label)
        return None if mapped is None or mapped.casefold() in _NO_LABEL else mapped

    label_of_frame = {frame: name(label) for frame, label in file.label_of_frame.items()}
    return replace(file, label=name(file.label), label_of_frame=label_of_frame)


def files_of_tasks(
    files: Sequence[AnyFile], files_per_task: int, num_cpus: int = 1
) -> Iterator[Sequence[AnyFile]]:
    """The files of each task, in order: as many as requested, or fewer if they are large.

    ``files_per_task=0`` chooses the number by guided self-scheduling (Polychronopoulos & Kuck
    1987): tasks get shorter towards the end, so that no CPU waits long for the others.
    """
    start = num_bytes = 0
    limit = files_per_task or _guided(len(files), num_cpus)
    for end, file in enumerate(files):
        num_bytes += file.num_bytes
        if end > start and (end - start == limit or num_bytes > _MAX_BYTES_PER_TASK):
            yield files[start:end]
            start, num_bytes = end, file.num_bytes
            limit = files_per_task or _guided(len(files) - start, num_cpus)
    if files:
        yield files[start:]


def _guided(num_left: int, num_cpus: int) -> int:
    """Number of files in the next task."""
    share = -(-num_left // (_TASKS_OF_REST * num_cpus))
    return min(max(share, _MIN_FILES_PER_TASK), _MAX_FILES_PER_TASK)


def _check_class_name(name: str) -> None:
    """Names appear in metrics, tables and reports: a path, a dash or a long text is a mistake."""
    is_bare = any(map(str.isalnum, name)) and name == name.strip()
    is_plain = name.isprintable() and not set(name) & set("/\\$")
    if len(name) > _MAX_CLASS_NAME or not (is_bare and is_plain):
        shown = name if len(name) <= _MAX_CLASS_NAME else f"{name[:_MAX_CLASS_NAME]} ..."
        raise DataError(
            f"{shown!r} is not a valid class name (up to {_MAX_CLASS_NAME} printable characters, "
            "with a letter or digit, without slashes, $ or surrounding spaces): rename it in the "
            "labels table or by classes.map"
        )


def _check_spellings(names: Sequence[str]) -> None:
    """Refuse names that are spellings of one: one class would be learned as two."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(re.sub(r"[\s_-]+", " ", name.casefold()), name)
        if other != name:
            rename = shlex.quote(f"classes.map.{other}={name}")
            raise DataError(
                f"the classes {other!r} and {name!r} differ only in case, blanks, _ or -: merge "
                f"them with --set {rename}, or rename one"
            )


def find_images(source: Folder, storage: Folder | None) -> tuple[list[FoundFile], Counter[str]]:
    """The image files below ``source``, sorted by path, and the number of other files by suffix.

    A ``storage`` within the source is left out.

    Raises:
        DataError: no such folder, no image file in it, or a folder whose files cannot be read.
    """
    check_is_folder(source, "source")
    files = list(_walk(source, storage))
    with ThreadPoolExecutor(_NUM_OPENERS) as pool:  # network requests wait in parallel
        may_hold = list(pool.map(lambda file: _may_hold_slices(file, source), files))
    found = [file for file, may in zip(files, may_hold, strict=True) if may]
    ignored = Counter(
        _suffix(file.path) for file, may in zip(files, may_hold, strict=True) if not may
    )
    if not found:
        raise DataError(
            f"source={source} contains no image file ({', '.join(SUFFIXES)}, or DICOM without "
            "suffix): check the folder" + ignored_note(ignored)
        )
    return sorted(found, key=lambda file: file.path), ignored


def ignored_note(ignored: Counter[str]) -> str:
    """Suffix for a log line: the ignored files by type; empty if there are none."""
    if not ignored:
        return ""
    suffixes = ", ".join(
        f"{suffix or 'no suffix'} {count}" for suffix, count in ignored.most_common(_MAX_SUFFIXES)
    )
    more = ", ..." if len(ignored) > _MAX_SUFFIXES else ""
    return f"; ignored files of other types: {ignored.total()} ({suffixes}{more})"


def _suffix(path: str) -> str:
    """Lower-case suffix of the file name, such as ``.webp``; empty if it has none."""
    _, dot, last = path.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if dot and len(last) <= _MAX_SUFFIX else ""


def _may_hold_slices(file: FoundFile, source: Folder) -> bool:
    """Decides by suffix; a name without one, as written by scanners, by the DICOM signature."""
    if file.problem == _LINK_OUT:
        return True  # so that it is listed as rejected
    if file.path.lower().endswith(SUFFIXES):
        return True
    # Names such as MR.1.2.840.113619.2 end in a UID, not in a suffix.
    _, dot, last = file.path.rpartition("/")[2].rpartition(".")
    if (dot and not last.isdigit()) or file.problem is not None:
        return False
    try:
        with source.filesystem.open_input_file(f"{source.path}/{file.path}") as stream:
            return looks_like_dicom(stream.read(DICOM_HEAD_BYTES))
    except OSError:
        return True  # reading it records why it cannot be read


def _walk(source: Folder, storage: Folder | None) -> Iterator[FoundFile]:
    """All visible files below the source but not in the storage.

    Links to folders are not followed: those within the source have names of their own.
    """
    if source.local_path is None:
        if storage is not None and not source.contains(storage):
            storage = None
        selector = pafs.FileSelector(source.path, recursive=True)
        for info in source.filesystem.get_file_info(selector):
            if info.type == pafs.FileType.File:
                path = info.path.removeprefix(source.path).lstrip("/")
                if any(_is_hidden(part) for part in path.split("/")):
                    continue
                if storage is not None and info.path.startswith(f"{storage.path}/"):
                    continue
                yield FoundFile(path, int(info.size or 0), int(info.mtime_ns or 0))
        return
    root = os.path.realpath(source.local_path)
    left_out = None
    if storage is not None and storage.local_path is not None:
        left_out = os.path.realpath(storage.local_path)  # maybe by a link out of the source

    def is_left_out(path: str) -> bool:
        if left_out is None or _is_below(root, left_out):
            return False
        return _is_below(os.path.realpath(path), left_out)

    for folder, subfolders, names in os.walk(source.local_path, onerror=_refuse):
        relative = os.path.relpath(folder, source.local_path)
        prefix = "" if relative == "." else f"{relative}/"
        subfolders[:] = sorted(
            name for name in subfolders if not (_is_hidden(name) or is_left_out(f"{folder}/{name}"))
        )
        for name in subfolders:
            _check_folder(prefix + name, f"{folder}/{name}", root)
        for name in names:
            if _is_hidden(name):
                continue
            if _leads_out(f"{folder}/{name}", root):
                yield FoundFile(printable(prefix + name), 0, 0, problem=_LINK_OUT)
            else:
                yield _found(folder, prefix + name, name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _HIDDEN


def _refuse(error: OSError) -> None:
    raise DataError(
        f"cannot read the folder {error.filename} ({error.strerror}), so its slices would be "
        "missing: fix its permissions or move it out of the source"
    )


def _check_folder(name: str, path: str, root: str) -> None:
    """Refuse a folder of which no file would be read: a whole class may be missing."""
    if os.path.islink(path):
        parts = os.path.relpath(os.path.realpath(path), root).split("/")
        if parts != ["."] and any(map(_is_hidden, parts)):  # as "..", which leads out
            raise DataError(
                f"the folder {printable(name)} is a link out of the source or to a hidden folder, "
                "which is not followed: copy what it leads to into the source, or remove the link"
            )
    if not _is_utf8(name):
        raise DataError(f"the name of the folder {printable(name)} is not UTF-8: {_RENAMING}")


def _leads_out(path: str, root: str) -> bool:
    """Whether a path is a link to a target outside the folder ``root``."""
    return os.path.islink(path) and not _is_below(os.path.realpath(path), root)


def _is_below(path: str, folder: str) -> bool:
    """Whether an absolute path is a folder or leads into it."""
    return os.path.commonpath([folder, path]) == folder


def printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _found(folder: str, path: str, name: str) -> FoundFile:
    if not _is_utf8(path):
        return FoundFile(printable(path), 0, 0, problem=_NOT_UTF8)
    try:
        status = os.stat(os.path.join(folder, name))
    except OSError:  # a broken link, or deleted meanwhile: reading it will fail
        return FoundFile(path, 0, 0)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its writer
        return FoundFile(path, 0, 0, problem=_NO_FILE)
    mtime_ns = status.st_mtime_ns
    is_date = -(2**63) <= mtime_ns < 2**63  # not so where a share gives 1601 for an unknown time
    return FoundFile(path, status.st_size, mtime_ns if is_date else 0)


def _from_folders(found: list[FoundFile]) -> list[SourceFile]:
    top_folders = {file.path.split("/")[0] for file in found if "/" in file.path}
    with_splits = {name for name in top_folders if name.lower() in SPLIT_NAMES}
    stray = sorted(top_folders - with_splits)
    if with_splits and stray:
        raise DataError(
            f"the source contains {', '.join(sorted(with_splits))} next to {', '.join(stray)}: "
            "keep either split folders or class folders at the top level (validation slices are "
            "drawn from the training ones)"
        )
    _check_depth(found, top_folders)
    files = []
    folders_in: defaultdict[str, set[str]] = defaultdict(set)  # with files, by class folder
    for file in found:
        *folders, _ = file.path.split("/")
        split = None
        if folders and folders[0].lower() in SPLIT_NAMES:
            split = SPLIT_NAMES[folders.pop(0).lower()]
        label = nfc(folders[0].strip()) if folders else ""
        files.append(SourceFile(split, label or None, file=file))
        if folders:
            folders_in[folders[0]].add("/".join(folders))
    _note_inner_folders(folders_in.values(), files)
    return files


def _note_inner_folders(folders_in: Iterable[set[str]], files: list[SourceFile]) -> None:
    """Tell if the folders within class folders look like the classes.

    ``folders_in`` are the folders with files in each class folder. Of a folder that contains
    nothing but one other, as archives unpack, the inner one counts.
    """
    inner = {}
    for paths in folders_in:
        outer = os.path.commonpath(paths)
        if paths == {outer}:
            outer = os.path.dirname(outer)
        if outer:
            inner[outer] = {p.removeprefix(f"{outer}/").split("/")[0] for p in paths - {outer}}
    num_classes_with = Counter(name for names in inner.values() for name in names)
    is_only_class = len(inner) == len({file.label for file in files}) == 1
    names = {name for name, count in num_classes_with.items() if is_only_class or count > 1}
    if len(names) > 1:
        outers = sorted(outer for outer, inside in inner.items() if inside & names)
        remedy = "put them at the top level or within Training/ and Testing/"
        if is_only_class and files[0].split is None:
            remedy = f"give source=.../{outers[0]}"
        log(
            f"note: {', '.join(sorted(names)[:5])} within {' and '.join(outers)} are not read as "
            f"classes: if they are the classes, {remedy}"
        )


def _check_depth(found: list[FoundFile], top_folders: set[str]) -> None:
    """Refuse split or class folders one level too low: they would not be read as such.

    Raises:
        DataError: such a folder was found; the message gives the remedy.
    """
    for file in found:
        top, *below = file.path.split("/")[:-1] or [""]
        inner = [name for name in below if name.lower() in SPLIT_NAMES]
        if inner:
            raise DataError(
                f"the source contains the folder {inner[0]} within {top}, where it is not read as "
                "a split: split folders must be at the top level and contain class folders; give "
                f"their parent folder as source, move {top} out of the source, or give a labels "
                "table"
            )
        repeated = sorted(top_folders.intersection(below[:1]) - {top})
        if repeated:
            raise DataError(
                f"the source contains the class folder {repeated[0]} both at the top level and "
                f"within {top}: keep one of the two, give a labels table or, if {top} is the "
                f"whole data set, source=.../{top}"
            )


def _from_table(found: list[FoundFile], labels: Folder, reads_splits: bool) -> list[SourceFile]:
    metadata = read_labels_table(labels, [file.path for file in found], reads_splits=reads_splits)
    # If the table gives splits, files without a row are unlabelled training slices.
    has_splits = any(row.split is not None for row in metadata.values())
    default = FileMetadata(split=TRAIN if has_splits else None)
    return [
        SourceFile(**vars(row), file=file)
        for file in found
        for row in [metadata.get(file.path, default)]
    ]


def check_frames(files: Iterable[SourceFile], slices: pa.Table) -> None:
    """Compare the frames that a labels table names with those that were decoded.

    Empty slices of a volume are skipped, so a table of all its slices may name more.

    Args:
        files: as listed.
        slices: rows with ``path`` and ``frame``, including rejected slices.

    Raises:
        DataError: a file that was read has none of the slices named for it.
    """
    named = {file.path: file.label_of_frame for file in files if file.label_of_frame}
    if not named:
        return
    frames: defaultdict[str, list[str]] = defaultdict(list)
    for path, frame, digest in zip(
        *(slices[name].to_pylist() for name in ("path", "frame", "sample_id")), strict=True
    ):
        if path in named and digest is not None:
            frames[path].append(frame)
    missing = []
    for path in sorted(frames):
        there = set(frames[path])
        missing += [(path, frame) for frame in sorted(named[path]) if not _is_among(frame, there)]
    num_missing = Counter(path for path, _ in missing)
    for path, frame in missing:
        if num_missing[path] == len(named[path]):
            remedy = "it has a single slice, so leave its frame empty"
            if frames[path] != [""]:
                remedy = f"its frames are such as {frames[path][0]!r}"
            if frames[path][0].startswith("volume="):
                remedy += ", without empty slices (preprocess.volume.axis and min_foreground)"
            raise DataError(
                f"the labels table names the frame {frame!r} of {path!r}, which has none of the "
                f"frames named for it: {remedy}"
            )
    if missing:
        path, frame = missing[0]
        log(
            f"note: slices of the labels table that their files do not have, or that are empty: "
            f"{len(missing)}, such as frame {frame!r} of {path!r}"
        )


def _is_among(frame: str, frames: Set[str]) -> bool:
    """Whether a frame was decoded, or rejected alone or with its whole volume."""
    return frame in frames or frame.partition("/")[0] in frames


def renaming_advice(unknown: Collection[str], class_map: Mapping[str, str | None]) -> str:
    """How to handle unknown classes, some of which ``class_map`` may have produced."""
    made = [f"classes.map.{name}={to}" for name, to in class_map.items() if to in unknown]
    if made:
        return f"{min(made)} makes such a class: map to a known one instead"
    rename, leave_out = (shlex.quote(f"classes.map.{min(unknown)}={to}") for to in ("NAME", "null"))
    others = f"; likewise for {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return f"rename with --set {rename}, or leave its slices out with --set {leave_out}{others}"

"""Image files of a source, with the split, class and subject from folders or a labels table."""

import hashlib
import hmac
import io
import json
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from brainray.errors import BrainrayError, DataError
from brainray.mri.decode import DICOM_HEAD_BYTES, SUFFIXES, looks_like_dicom
from brainray.mri.slices import names_nobody
from brainray.schema import TEST, TRAIN
from brainray.storage import Folder

_SPLIT_FOLDERS = {
    "training": TRAIN,
    "train": TRAIN,
    "testing": TEST,
    "test": TEST,
}


_LINK_OUT = "link out of the source folder"  # the author of the source may not read all our files
_MAX_CLASS_NAME = 100
_LABEL_COLUMNS = ("path", "label", "split", "subject")
_MISSING = ("", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "NULL", "null")  # of R, pandas, SQL

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


@dataclass(frozen=True)
class SourceFile:
    """One file to preprocess, with its metadata from folders or a labels table."""

    file: FoundFile
    split: str | None  # train | test, if given by the source
    label: str | None
    subject: str | None

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
            for f in self.files
        ]
        return hmac.new(salt, json.dumps(rows).encode(), hashlib.sha256).hexdigest()[:12]


def list_source(
    source: Folder,
    labels: Folder | None,
    class_map: Mapping[str, str | None],
    *,
    reads_splits: bool = True,
) -> Listing:
    """Find the image files below ``source`` and the metadata of each.

    Supported layouts: Training/ and Testing/ folders of class folders, class folders, and bare
    files. With a labels table, folder names are not used as classes and files without a row are
    unlabelled. If not ``reads_splits``, the table's split column is ignored.

    Raises:
        DataError: no such folder, no image file in it, another folder next to Training/ and
            Testing/, or an invalid labels table.
    """
    found, ignored = find_images(source)
    files = _from_folders(found) if labels is None else _from_table(found, labels, reads_splits)
    class_map = {_normal(name): to for name, to in class_map.items()}
    renamed = [
        replace(file, label=None if file.label is None else class_map.get(file.label, file.label))
        for file in files
    ]
    names = sorted({file.label for file in renamed if file.label is not None})
    for name in names:
        _check_class_name(name)
    _check_spellings(names)
    return Listing(renamed, ignored, sorted(set(class_map) - {file.label for file in files}))


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
    """Names appear in metrics, tables and reports: a path or a long text is a mistake."""
    is_bare = name != "" and name == name.strip()
    is_plain = name.isprintable() and not set(name) & set("/\\$")
    if len(name) > _MAX_CLASS_NAME or not (is_bare and is_plain):
        shown = name if len(name) <= _MAX_CLASS_NAME else f"{name[:_MAX_CLASS_NAME]} ..."
        raise DataError(
            f"{shown!r} is not a valid class name (up to {_MAX_CLASS_NAME} printable characters, "
            "without slashes, $ or surrounding spaces): rename it in the labels table or by "
            "classes.map"
        )


def _check_spellings(names: Sequence[str]) -> None:
    """Refuse names that differ only in case: one class would be learned as two."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            rename = shlex.quote(f"classes.map.{other}={name}")
            raise DataError(
                f"the classes {other!r} and {name!r} differ only in case: merge them with --set "
                f"{rename}, or rename one"
            )


def find_images(source: Folder) -> tuple[list[FoundFile], Counter[str]]:
    """The image files below ``source``, sorted by path, and the number of other files by suffix.

    Raises:
        DataError: no such folder, or no image file in it.
    """
    if not source.exists():
        raise DataError(f"no such folder: source={source}")
    if source.local_path is not None and not source.local_path.is_dir():
        raise DataError(f"source={source} is a file: give the folder that contains it")
    files = list(_walk(source))
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
        return False


def _walk(source: Folder) -> Iterator[FoundFile]:
    """All visible files below the source; links to folders within it are followed once."""
    if source.local_path is None:
        selector = pafs.FileSelector(source.path, recursive=True)
        for info in source.filesystem.get_file_info(selector):
            if info.type == pafs.FileType.File:
                path = info.path.removeprefix(source.path).lstrip("/")
                if any(_is_hidden(part) for part in path.split("/")):
                    continue
                yield FoundFile(path, int(info.size or 0), int(info.mtime_ns or 0))
        return
    root = os.path.realpath(source.local_path)
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(source.local_path, followlinks=True, onerror=_refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link back into the tree
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        relative = os.path.relpath(folder, source.local_path)
        prefix = "" if relative == "." else f"{relative}/"
        for name in [name for name in subfolders if _leads_out(f"{folder}/{name}", root)]:
            subfolders.remove(name)
            yield FoundFile(_printable(prefix + name), 0, 0, problem=_LINK_OUT)
        for name in names:
            if _is_hidden(name):
                continue
            if _leads_out(f"{folder}/{name}", root):
                yield FoundFile(_printable(prefix + name), 0, 0, problem=_LINK_OUT)
            else:
                yield _found(folder, prefix + name, name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # metadata that macOS adds to archives


def _refuse(error: OSError) -> None:
    raise DataError(
        f"cannot read the folder {error.filename} ({error.strerror}), so its slices would be "
        "missing: fix its permissions or move it out of the source"
    )


def _leads_out(path: str, root: str) -> bool:
    """Whether a path is a link to a target outside the folder ``root``."""
    return os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _found(folder: str, path: str, name: str) -> FoundFile:
    try:
        path.encode()
    except UnicodeEncodeError:
        return FoundFile(_printable(path), 0, 0, problem="file name is not UTF-8")
    try:
        status = os.stat(os.path.join(folder, name))
    except OSError:  # a broken link, or deleted meanwhile: reading it will fail
        return FoundFile(path, 0, 0)
    return FoundFile(path, status.st_size, status.st_mtime_ns)


def _from_folders(found: list[FoundFile]) -> list[SourceFile]:
    top_folders = {file.path.split("/")[0] for file in found if "/" in file.path}
    with_splits = {name for name in top_folders if name.lower() in _SPLIT_FOLDERS}
    stray = sorted(top_folders - with_splits)
    if with_splits and stray:
        raise DataError(
            f"the source contains {', '.join(sorted(with_splits))} next to {', '.join(stray)}: "
            "keep either split folders or class folders at the top level"
        )
    _check_depth(found, top_folders)
    files = []
    for file in found:
        *folders, _ = file.path.split("/")
        split = None
        if folders and folders[0].lower() in _SPLIT_FOLDERS:
            split = _SPLIT_FOLDERS[folders.pop(0).lower()]
        label = _normal(folders[0].strip()) if folders else ""
        files.append(SourceFile(file, split, label or None, None))
    return files


def _check_depth(found: list[FoundFile], top_folders: set[str]) -> None:
    """Refuse split or class folders one level too low: they would not be read as such.

    Raises:
        DataError: such a folder was found; the message gives the remedy.
    """
    for file in found:
        top, *below = file.path.split("/")[:-1] or [""]
        inner = [name for name in below if name.lower() in _SPLIT_FOLDERS]
        if inner:
            raise DataError(
                f"the source contains the folder {inner[0]} within {top}, where it is not read as "
                "a split: split folders must be at the top level and contain class folders; give "
                "their parent folder as source, or a labels table"
            )
        repeated = sorted(top_folders.intersection(below[:1]) - {top})
        if repeated:
            raise DataError(
                f"the source contains the class folder {repeated[0]} both at the top level and "
                f"within {top}: keep one of the two, or give a labels table"
            )


def _from_table(found: list[FoundFile], labels: Folder, reads_splits: bool) -> list[SourceFile]:
    """Metadata of each file: its own rows in the table, completed by the rows of its folders,
    nearest first. Several rows for one path complete each other.
    """
    rows: dict[str, _Said] = {}
    places = {folder for file in found for folder in _folders_of(file.path)}
    places |= {file.path for file in found}
    known = {_normal(place): place for place in places} | {place: place for place in places}
    unknown: list[str] = []
    for row in _read_labels(labels):
        told = str(row["path"] or "").replace("\\", "/").removeprefix("./")
        spellings = (told, told.strip(), _normal(told.strip()), _normal(told.strip()).rstrip("/"))
        path = next((known[spelling] for spelling in spellings if spelling in known), None)
        if not told.strip():
            raise DataError(f"labels={labels}: a row has no path; add it or delete the row")
        if path is None:
            unknown.append(told)
            continue
        split = _text(row.get("split")) if reads_splits else None
        if split is not None and split.lower() not in _SPLIT_FOLDERS:
            raise DataError(
                f"labels={labels}: split {split!r} of {path!r} is neither train nor test"
            )
        subject = _text(row.get("subject"))
        new = _Said(
            split=None if split is None else _SPLIT_FOLDERS[split.lower()],
            label=_text(row.get("label")),
            subject=None if subject is None or names_nobody(subject) else subject,
        )
        before = rows.get(path, _Said())
        if column := before.contradicted_by(new):
            raise DataError(
                f"labels={labels}: rows of {path!r} have different values in column {column!r}; "
                "keep one of them"
            )
        rows[path] = before.completed_by(new)
    if unknown:
        more = f" (nor are the paths of {len(unknown) - 1} more rows)" if len(unknown) > 1 else ""
        raise DataError(
            f"labels={labels}: {unknown[0]!r} is neither an image file below the source nor a "
            f"folder with one{more}; paths must be relative to the source, and supported types are "
            f"{', '.join(SUFFIXES)}"
        )
    said = {}
    for file in found:
        of_file = [rows[place] for place in (file.path, *_folders_of(file.path)) if place in rows]
        if of_file:
            said[file.path] = reduce(_Said.completed_by, of_file)
    # If the table gives splits, files without a row are unlabelled training slices.
    speaks_of_splits = any(row.split is not None for row in said.values())
    nothing = _Said(split=TRAIN if speaks_of_splits else None)
    return [
        SourceFile(file, row.split, row.label, row.subject)
        for file in found
        for row in [said.get(file.path, nothing)]
    ]


@dataclass(frozen=True)
class _Said:
    """A row of the labels table, for a file or for all files of a folder."""

    split: str | None = None
    label: str | None = None
    subject: str | None = None

    def completed_by(self, other: "_Said") -> "_Said":
        return _Said(
            self.split or other.split, self.label or other.label, self.subject or other.subject
        )

    def contradicted_by(self, other: "_Said") -> str | None:
        """The first column in which both have a value, but not the same one."""
        mine, theirs = self.completed_by(other), other.completed_by(self)
        columns = (field.name for field in fields(self))
        return next((c for c in columns if getattr(mine, c) != getattr(theirs, c)), None)


def _folders_of(path: str) -> list[str]:
    """Paths of the folders that contain a file, nearest first."""
    *folders, _ = path.split("/")
    return ["/".join(folders[:end]) for end in range(len(folders), 0, -1)]


def _read_labels(labels: Folder) -> list[dict[str, Any]]:
    try:
        content = labels.parent.read_bytes(labels.path.rpartition("/")[2])  # name without escapes
        if labels.name.lower().endswith((".parquet", ".pq")):
            table = pq.read_table(io.BytesIO(content))
        else:
            # Where numbers have decimal commas, spreadsheets separate cells by semicolons.
            first_line = content.partition(b"\n")[0]
            has_semicolons = b";" in first_line and b"," not in first_line
            cells = pa_csv.ParseOptions(delimiter=";" if has_semicolons else ",")
            # Labels such as 0 and 1, or a subject 007, are names, not numbers.
            header = pa_csv.open_csv(io.BytesIO(content), parse_options=cells).schema.names
            options = pa_csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                strings_can_be_null=True,
                null_values=_MISSING,
            )
            table = pa_csv.read_csv(
                io.BytesIO(content), parse_options=cells, convert_options=options
            )
        table = table.rename_columns([name.strip().lower() for name in table.column_names])
        columns = [name for name in _LABEL_COLUMNS if name in table.column_names]
        repeated = [name for name in columns if table.column_names.count(name) > 1]
        if repeated:
            raise DataError(
                f"labels={labels}: column {repeated[0]} appears more than once; drop one"
            )
        rows = table.select(columns).to_pylist()
    except BrainrayError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        # Arrow quotes the row that does not parse, and a row may name a patient.
        reason = " ".join(re.sub(r"(got \d+).*", r"\1", str(error), flags=re.DOTALL).split())[:200]
        advice = "save it as CSV in UTF-8"
        if re.search(r"Expected \d+ columns", reason):
            advice = "quote cells with commas"
        raise DataError(
            f"labels={labels} cannot be read as CSV or Parquet: {reason} ({advice})"
        ) from None
    missing = {"path", "label"} - set(columns)
    if missing:
        # Not the column names: without a header they are the first row, which may name a patient.
        raise DataError(
            f"labels={labels}: missing column {' and '.join(sorted(missing))} (columns found: "
            f"{table.num_columns}); path and label are required and separated by commas or "
            "semicolons, split and subject are optional"
        )
    return [row for row in rows if any(_text(cell) is not None for cell in row.values())]


def _text(value: object) -> str | None:
    """Text of a cell, stripped; None if it is a missing value.

    pandas writes whole numbers of a column with gaps as floats: 7.0 is read as 7.
    """
    text = "" if value is None else _normal(str(value).strip())
    if re.fullmatch(r"-?\d+\.0", text):
        text = text.removesuffix(".0")
    return None if text in _MISSING else text


def _normal(name: str) -> str:
    """Unicode NFC form: some systems decompose accented characters in file names."""
    return unicodedata.normalize("NFC", name)


def renaming_advice(unknown: Collection[str], class_map: Mapping[str, str | None]) -> str:
    """How to handle unknown classes, some of which ``class_map`` may have produced."""
    made = [f"classes.map.{name}={to}" for name, to in class_map.items() if to in unknown]
    if made:
        return f"{min(made)} makes such a class: map to a known one instead"
    rename, leave_out = (shlex.quote(f"classes.map.{min(unknown)}={to}") for to in ("NAME", "null"))
    others = f"; likewise for {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return f"rename with --set {rename}, or leave its slices out with --set {leave_out}{others}"

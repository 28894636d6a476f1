"""Which files a source holds, and what their folders or a labels table say of them."""

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
from dataclasses import dataclass, replace
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


_LINK_OUT = "link out of the source folder"  # whoever wrote the source may not read all of ours
_MAX_CLASS_NAME = 100
_LABEL_COLUMNS = ("path", "label", "split", "subject")
_MISSING = ("", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "NULL", "null")  # as R, pandas, SQL write

_TASKS_OF_REST = 2  # of a CPU, were all that is left done in tasks as long as the next
_MIN_FILES_PER_TASK, _MAX_FILES_PER_TASK = 16, 1024
_NUM_OPENERS = 32
_MAX_SUFFIXES, _MAX_SUFFIX = 4, 8  # of other files that are told, and their length
_MAX_BYTES_PER_TASK = 64 * 2**20  # of files: volumes hold many slices


@dataclass(frozen=True)
class FoundFile:
    """A file below the source, as the file system shows it."""

    path: str  # relative to the source; printable also where the name is not UTF-8
    num_bytes: int
    mtime_ns: int  # 0 where the file system does not tell
    problem: str | None = None  # why it cannot even be read


@dataclass(frozen=True)
class SourceFile:
    """One file to preprocess, and what folders or a labels table say of it."""

    file: FoundFile
    split: str | None  # train | test, where the source says so
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
    """All image files of a source, in the order of their paths."""

    files: list[SourceFile]
    ignored: Counter[str]  # files of other types, by suffix
    idle_renames: list[str]  # classes that ``classes.map`` names and no slice has

    @property
    def num_ignored(self) -> int:
        return self.ignored.total()

    @property
    def remarks(self) -> str:
        """What was passed over, to end a line of the log; empty where nothing was."""
        remarks = ignored_told(self.ignored)
        if self.idle_renames:
            remarks += (
                f"; classes.map names what no slice is called: {', '.join(self.idle_renames)}"
            )
        return remarks

    def fingerprint(self, salt: bytes) -> str:
        """Changes when a file or what is said of it does; a keyed hash, since subjects are said."""
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
    """Find the image files below ``source`` and what is known of each.

    Understood are Training/ and Testing/ folders of class folders, class folders, and bare files;
    with a labels table the folders name no classes and files without a row are unlabelled. The
    splits that a table names are passed over where they are not to be read.

    Raises:
        DataError: no such folder, no image file in it, a folder beside Training/ and Testing/, or
            a labels table that does not fit.
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
    """The files of each task, in order: as many as asked for, or fewer where they are large.

    ``files_per_task`` of 0 chooses their number: guided self-scheduling (Polychronopoulos & Kuck
    1987), whose tasks get shorter towards the end, so that no CPU waits long for the others.
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
    """Files of the next task."""
    share = -(-num_left // (_TASKS_OF_REST * num_cpus))
    return min(max(share, _MIN_FILES_PER_TASK), _MAX_FILES_PER_TASK)


def _check_class_name(name: str) -> None:
    """Names go into metrics, tables and pages: one that is a path or a text is a mistake."""
    is_bare = name != "" and name == name.strip()
    is_plain = name.isprintable() and not set(name) & set("/\\$")
    if len(name) > _MAX_CLASS_NAME or not (is_bare and is_plain):
        shown = name if len(name) <= _MAX_CLASS_NAME else f"{name[:_MAX_CLASS_NAME]} ..."
        raise DataError(
            f"{shown!r} is no class name: up to {_MAX_CLASS_NAME} printable characters without "
            "blanks around, slashes and $; rename it in the labels table or by classes.map"
        )


def _check_spellings(names: Sequence[str]) -> None:
    """Refuse names that differ in case alone: one class would be learned as two."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            rename = shlex.quote(f"classes.map.{other}={name}")
            raise DataError(
                f"the classes {other!r} and {name!r} differ in upper and lower case alone: join "
                f"them with --set {rename}, or rename one"
            )


def find_images(source: Folder) -> tuple[list[FoundFile], Counter[str]]:
    """The image files below ``source`` in the order of their paths, and how many others there are
    of each suffix.

    Raises:
        DataError: no such folder, or no image file in it.
    """
    if not source.exists():
        raise DataError(f"no such folder: source={source}")
    if source.local_path is not None and not source.local_path.is_dir():
        raise DataError(f"source={source} is a file: name the folder that it is in")
    files = list(_walk(source))
    with ThreadPoolExecutor(_NUM_OPENERS) as pool:  # a network's answers are waited for together
        may_hold = list(pool.map(lambda file: _may_hold_slices(file, source), files))
    found = [file for file, may in zip(files, may_hold, strict=True) if may]
    ignored = Counter(
        _suffix(file.path) for file, may in zip(files, may_hold, strict=True) if not may
    )
    if not found:
        raise DataError(
            f"source={source} holds no image file ({', '.join(SUFFIXES)}, or DICOM without suffix)"
            + ignored_told(ignored)
        )
    return sorted(found, key=lambda file: file.path), ignored


def ignored_told(ignored: Counter[str]) -> str:
    """What files are passed over, to end a line of the log; empty where there are none."""
    if not ignored:
        return ""
    suffixes = ", ".join(
        f"{suffix or 'without suffix'} {count}"
        for suffix, count in ignored.most_common(_MAX_SUFFIXES)
    )
    more = ", ..." if len(ignored) > _MAX_SUFFIXES else ""
    return f"; {ignored.total()} of other types are ignored ({suffixes}{more})"


def _suffix(path: str) -> str:
    """Such as ``.webp``, in lower case; of a file's name, which may have none."""
    _, dot, last = path.rpartition("/")[2].rpartition(".")
    return f".{last.lower()}" if dot and len(last) <= _MAX_SUFFIX else ""


def _may_hold_slices(file: FoundFile, source: Folder) -> bool:
    """By suffix; a name without one, as scanners write them, by the mark of DICOM."""
    if file.problem == _LINK_OUT:
        return True  # to be listed among the rejected
    if file.path.lower().endswith(SUFFIXES):
        return True
    # Names such as MR.1.2.840.113619.2 end as UIDs do, not in a suffix.
    _, dot, last = file.path.rpartition("/")[2].rpartition(".")
    if (dot and not last.isdigit()) or file.problem is not None:
        return False
    try:
        with source.filesystem.open_input_file(f"{source.path}/{file.path}") as stream:
            return looks_like_dicom(stream.read(DICOM_HEAD_BYTES))
    except OSError:
        return False


def _walk(source: Folder) -> Iterator[FoundFile]:
    """All visible files below the source; linked folders within it are followed once."""
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
    return name.startswith(".") or name == "__MACOSX"  # macOS's notes in an archive


def _refuse(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}): its slices would be "
        "missing; give it the right permissions or take it out of the source"
    )


def _leads_out(path: str, root: str) -> bool:
    """Whether a path is a link to what lies outside of the folder ``root``."""
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
    except OSError:  # a broken link, or gone since: reading it will tell
        return FoundFile(path, 0, 0)
    return FoundFile(path, status.st_size, status.st_mtime_ns)


def _from_folders(found: list[FoundFile]) -> list[SourceFile]:
    top_folders = {file.path.split("/")[0] for file in found if "/" in file.path}
    with_splits = {name for name in top_folders if name.lower() in _SPLIT_FOLDERS}
    stray = sorted(top_folders - with_splits)
    if with_splits and stray:
        raise DataError(
            f"the source holds {', '.join(sorted(with_splits))} beside {', '.join(stray)}: "
            "keep either split folders or class folders at the top"
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
    """Refuse folders that look like splits or classes one level too low: they would not be read.

    Raises:
        DataError: with the folder to give in place of the source.
    """
    for file in found:
        top, *below = file.path.split("/")[:-1] or [""]
        inner = [name for name in below if name.lower() in _SPLIT_FOLDERS]
        if inner:
            raise DataError(
                f"the source holds the folder {inner[0]} within {top}, where it names no split: "
                "split folders stand at the top, with class folders in them; give the folder that "
                "holds them as source, or a labels table"
            )
        repeated = sorted(top_folders.intersection(below[:1]) - {top})
        if repeated:
            raise DataError(
                f"the source holds the class folder {repeated[0]} at the top and within {top}: "
                "keep one of the two, or give a labels table"
            )


def _from_table(found: list[FoundFile], labels: Folder, reads_splits: bool) -> list[SourceFile]:
    """What the table says of each file: its own rows, completed by those of its folders, the
    nearest first. Several rows of one path complete each other.
    """
    rows: dict[str, _Said] = {}
    places = {folder for file in found for folder in _folders_of(file.path)}
    places |= {file.path for file in found}
    known = {_normal(place): place for place in places} | {place: place for place in places}
    for row in _read_labels(labels):
        told = str(row["path"] or "").replace("\\", "/").removeprefix("./")
        spellings = (told, told.strip(), _normal(told.strip()), _normal(told.strip()).rstrip("/"))
        path = next((known[spelling] for spelling in spellings if spelling in known), None)
        if path is None:
            raise DataError(
                f"labels={labels} names {row['path']!r}, which is neither an image file below the "
                f"source nor a folder with one: paths are relative to the source, and the types "
                f"that are read are {', '.join(SUFFIXES)}"
            )
        split = _text(row.get("split")) if reads_splits else None
        if split is not None and split.lower() not in _SPLIT_FOLDERS:
            raise DataError(f"labels={labels}: split {split!r} of {path!r} is not train or test")
        subject = _text(row.get("subject"))
        new = _Said(
            split=None if split is None else _SPLIT_FOLDERS[split.lower()],
            label=_text(row.get("label")),
            subject=None if subject is None or names_nobody(subject) else subject,
        )
        before = rows.get(path, _Said())
        if before.contradicts(new):
            raise DataError(
                f"labels={labels} names {path!r} twice, with different values: keep one of the rows"
            )
        rows[path] = before.completed_by(new)
    said = {}
    for file in found:
        of_file = [rows[place] for place in (file.path, *_folders_of(file.path)) if place in rows]
        if of_file:
            said[file.path] = reduce(_Said.completed_by, of_file)
    # Files without a row are unlabelled training slices where the table speaks of splits.
    speaks_of_splits = any(row.split is not None for row in said.values())
    nothing = _Said(split=TRAIN if speaks_of_splits else None)
    return [
        SourceFile(file, row.split, row.label, row.subject)
        for file in found
        for row in [said.get(file.path, nothing)]
    ]


@dataclass(frozen=True)
class _Said:
    """What a labels table says of a file, or of all files of a folder."""

    split: str | None = None
    label: str | None = None
    subject: str | None = None

    def completed_by(self, other: "_Said") -> "_Said":
        return _Said(
            self.split or other.split, self.label or other.label, self.subject or other.subject
        )

    def contradicts(self, other: "_Said") -> bool:
        return self.completed_by(other) != other.completed_by(self)


def _folders_of(path: str) -> list[str]:
    """Paths of the folders that a file lies in, the nearest first."""
    *folders, _ = path.split("/")
    return ["/".join(folders[:end]) for end in range(len(folders), 0, -1)]


def _read_labels(labels: Folder) -> list[dict[str, Any]]:
    try:
        content = labels.parent.read_bytes(labels.path.rpartition("/")[2])  # not as a URI has it
        if labels.name.lower().endswith((".parquet", ".pq")):
            table = pq.read_table(io.BytesIO(content))
        else:
            # Labels such as 0 and 1, or a subject 007, are names, not numbers.
            header = pa_csv.open_csv(io.BytesIO(content)).schema.names
            options = pa_csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                strings_can_be_null=True,
                null_values=_MISSING,
            )
            table = pa_csv.read_csv(io.BytesIO(content), convert_options=options)
        table = table.rename_columns([name.strip() for name in table.column_names])
        columns = [name for name in _LABEL_COLUMNS if name in table.column_names]
        repeated = [name for name in columns if table.column_names.count(name) > 1]
        if repeated:
            raise DataError(f"labels={labels} has the column {repeated[0]} twice: drop one")
        rows = table.select(columns).to_pylist()
    except BrainrayError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        # Arrow quotes the row that does not fit, and a row may name a patient.
        reason = " ".join(re.sub(r"(got \d+).*", r"\1", str(error), flags=re.DOTALL).split())[:200]
        advice = "save it as CSV in UTF-8"
        if re.search(r"Expected \d+ columns", reason):
            advice = "quote cells with commas"
        raise DataError(
            f"labels={labels} is neither CSV nor Parquet: {reason} ({advice})"
        ) from None
    missing = {"path", "label"} - set(columns)
    if missing:
        # Not their names: without a header they are the first row's, which may name a patient.
        raise DataError(
            f"labels={labels} lacks the column {' and '.join(sorted(missing))} among its "
            f"{table.num_columns}: it needs path and label, in lower case and parted by commas, "
            "and may have split and subject"
        )
    return [row for row in rows if any(_text(cell) is not None for cell in row.values())]


def _text(value: object) -> str | None:
    """Of a cell, without blanks around it; None where nothing is said.

    Whole numbers of a column with gaps are floats to pandas: its 7.0 is 7.
    """
    text = "" if value is None else _normal(str(value).strip())
    if re.fullmatch(r"-?\d+\.0", text):
        text = text.removesuffix(".0")
    return None if text in _MISSING else text


def _normal(name: str) -> str:
    """In Unicode's composed form (NFC): some systems take the accents of names apart."""
    return unicodedata.normalize("NFC", name)


def renaming_advice(unknown: Collection[str], class_map: Mapping[str, str | None]) -> str:
    """What to do about classes that do not fit, some of which ``class_map`` may have made."""
    made = [f"classes.map.{name}={to}" for name, to in class_map.items() if to in unknown]
    if made:
        return f"such as {min(made)} makes: rename to one that fits"
    rename, leave_out = (shlex.quote(f"classes.map.{min(unknown)}={to}") for to in ("NAME", "null"))
    others = f", and so for {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return f"rename with --set {rename}, or leave its slices out with --set {leave_out}{others}"

"""Which files a source holds, and what their folders or a labels table say of them."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from brainray.errors import BrainrayError, DataError
from brainray.mri.decode import SUFFIXES
from brainray.schema import TEST, TRAIN
from brainray.storage import Folder

_SPLIT_FOLDERS = {
    "training": TRAIN,
    "train": TRAIN,
    "testing": TEST,
    "test": TEST,
}


@dataclass(frozen=True)
class SourceFile:
    """One file to preprocess."""

    path: str  # relative to the source
    split: str | None  # train | test, where the source says so
    label: str | None
    subject: str | None


@dataclass(frozen=True)
class Listing:
    """All image files of a source, in the order of their paths."""

    files: list[SourceFile]
    num_ignored: int  # files without the suffix of an image

    @property
    def fingerprint(self) -> str:
        """Changes when a path, split, label or subject does."""
        rows = [(file.path, file.split, file.label, file.subject) for file in self.files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def list_source(source: Folder, labels: Folder | None, class_map: dict[str, str]) -> Listing:
    """Find the image files below ``source`` and what is known of each.

    Understood are Training/ and Testing/ folders of class folders, class folders, and bare files;
    with a labels table the folders name no classes and files without a row are unlabelled.

    Raises:
        DataError: no such folder, no image file in it, a folder beside Training/ and Testing/, or
            a labels table that does not fit.
    """
    if not source.exists():
        raise DataError(f"no such folder: source={source}")
    paths, num_ignored = [], 0
    for path in _walk(source):
        if path.lower().endswith(SUFFIXES):
            paths.append(path)
        else:
            num_ignored += 1
    if not paths:
        raise DataError(
            f"source={source} holds no image file ({', '.join(SUFFIXES)})"
            + (f"; {num_ignored} other files were ignored" if num_ignored else "")
        )
    paths.sort()
    files = _from_folders(paths) if labels is None else _from_table(paths, labels)
    renamed = [
        SourceFile(
            file.path,
            file.split,
            None if file.label is None else class_map.get(file.label, file.label),
            file.subject,
        )
        for file in files
    ]
    return Listing(renamed, num_ignored)


def _walk(source: Folder) -> Iterator[str]:
    """Relative paths of all visible files below the source; linked folders are followed once."""
    if source.local_path is None:
        selector = pafs.FileSelector(source.path, recursive=True)
        for info in source.filesystem.get_file_info(selector):
            if info.type == pafs.FileType.File:
                yield info.path.removeprefix(source.path).lstrip("/")
        return
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(source.local_path, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link back into the tree
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, source.local_path)
        for name in names:
            if not name.startswith("."):
                yield name if relative == "." else f"{relative}/{name}"


def _from_folders(paths: list[str]) -> list[SourceFile]:
    top_folders = {path.split("/")[0] for path in paths if "/" in path}
    with_splits = {name for name in top_folders if name.lower() in _SPLIT_FOLDERS}
    stray = sorted(top_folders - with_splits)
    if with_splits and stray:
        raise DataError(
            f"the source holds {', '.join(sorted(with_splits))} beside {', '.join(stray)}: "
            "keep either split folders or class folders at the top"
        )
    files = []
    for path in paths:
        *folders, _ = path.split("/")
        split = None
        if folders and folders[0].lower() in _SPLIT_FOLDERS:
            split = _SPLIT_FOLDERS[folders.pop(0).lower()]
        files.append(SourceFile(path, split, folders[0] if folders else None, None))
    return files


def _from_table(paths: list[str], labels: Folder) -> list[SourceFile]:
    rows = {}
    known = set(paths)
    for row in _read_labels(labels).to_pylist():
        path = (_text(row["path"]) or "").replace("\\", "/").removeprefix("./")
        if path not in known:
            raise DataError(
                f"labels={labels} names {path!r}, which is no image file below the source: "
                "paths are relative to it"
            )
        if path in rows:
            raise DataError(f"labels={labels} names {path!r} twice")
        split = _text(row.get("split"))
        if split is not None and split.lower() not in _SPLIT_FOLDERS:
            raise DataError(f"labels={labels}: split {split!r} of {path!r} is not train or test")
        rows[path] = SourceFile(
            path,
            None if split is None else _SPLIT_FOLDERS[split.lower()],
            _text(row.get("label")),
            _text(row.get("subject")),
        )
    splits = Counter(file.split for file in rows.values())
    # Files without a row are unlabelled training slices where the table speaks of splits.
    default_split = TRAIN if set(splits) - {None} else None
    return [rows.get(path, SourceFile(path, default_split, None, None)) for path in paths]


def _read_labels(labels: Folder) -> pa.Table:
    parent, _, name = str(labels).rpartition("/")
    try:
        content = Folder(parent or "/").read_bytes(name)
        if name.lower().endswith((".parquet", ".pq")):
            table = pq.read_table(io.BytesIO(content))
        else:
            # Labels such as 0 and 1, or a subject 007, are names, not numbers.
            text = {column: pa.string() for column in ("path", "label", "split", "subject")}
            options = pa_csv.ConvertOptions(
                column_types=text, strings_can_be_null=True, null_values=[""]
            )
            table = pa_csv.read_csv(io.BytesIO(content), convert_options=options)
    except BrainrayError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"labels={labels} is neither CSV nor Parquet: {error}") from None
    missing = {"path", "label"} - set(table.column_names)
    if missing:
        raise DataError(
            f"labels={labels} lacks the column {' and '.join(sorted(missing))}: "
            "it needs path and label, and may have split and subject"
        )
    return table


def _text(value: object) -> str | None:
    return None if value is None or value == "" else str(value)

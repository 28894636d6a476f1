"""The labels table: classes, splits and subjects of a source's files, and classes of slices."""

import codecs
import gzip
import io
import re
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from brainray.errors import BrainrayError, DataError
from brainray.log import log
from brainray.mri.decode import SUFFIXES
from brainray.mri.slices import GZIP, names_nobody
from brainray.schema import TEST, TRAIN
from brainray.storage import Folder

SPLIT_NAMES = {
    "training": TRAIN,
    "train": TRAIN,
    "testing": TEST,
    "test": TEST,
}
"""Names of splits in folders and tables, in lower case."""

_COLUMNS = ("path", "frame", "label", "split", "subject")
_ALIASES = {
    "subject": re.compile("subjectid|(patient|participant|case)(id)?"),
    "split": re.compile("set|subset|partition"),
}
"""Names, without case, blanks, _ and -, of columns that must not be left out unnoticed."""
_MAX_NAMED = 10  # columns in a log line

_DELIMITERS = (",", ";", "\t")
_MAX_HEADER = 2**16  # bytes
_PARQUET = b"PAR1"
_SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, which are ZIP archives; .xls
_SEPARATOR_LINE = re.compile(rb'(?i)\A(\xef\xbb\xbf)?"?sep=.[^\r\n]*(\r\n|\r|\n)')  # of Excel
_SPREADSHEET_ERROR = re.compile(r"#(N/A|N/D|NV|[^\sa-z]+[!?])|Err:\d+")  # in several languages
_PLACEHOLDER = re.compile(r"[\s._/<>?\-\u2013\u2014]")
_MISSING = frozenset({"", "na", "nan", "null"})  # of R, pandas, SQL: what else a cell contains


@dataclass(frozen=True)
class FileMetadata:
    """What folders or a table say of a file, or of all files in a folder."""

    split: str | None = None  # train | test
    label: str | None = None
    subject: str | None = None
    label_of_frame: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    """Labels of single slices in a volume or multi-frame file, by frame."""

    def label_of(self, frame: str) -> str | None:
        """Label of one of the file's slices."""
        return self.label_of_frame.get(frame, self.label)

    @property
    def labels(self) -> set[str]:
        """The different labels of the file's slices."""
        return {label for label in (self.label, *self.label_of_frame.values()) if label is not None}

    def completed_by(self, other: "FileMetadata") -> "FileMetadata":
        """Completed for the whole file, not for single slices."""
        return FileMetadata(
            self.split or other.split,
            self.label or other.label,
            self.subject or other.subject,
            self.label_of_frame,
        )

    def contradicted_by(self, other: "FileMetadata") -> str | None:
        """The first column in which both have a value for the whole file, but not the same one."""
        mine, theirs = self.completed_by(other), other.completed_by(self)
        columns = ("split", "label", "subject")
        return next((c for c in columns if getattr(mine, c) != getattr(theirs, c)), None)


def read_labels_table(
    labels: Folder, paths: Collection[str], *, reads_splits: bool
) -> dict[str, FileMetadata]:
    """Metadata of the files ``paths`` that the table names, by path: a file's own rows, completed
    by the rows of its folders, nearest first. Columns that are not read are noted in the log.

    Several rows for one path complete each other. The label of a row with a ``frame`` is for that
    slice only; its split and subject are for the whole file. If not ``reads_splits``, the column
    ``split`` is ignored.

    Raises:
        DataError: the table cannot be read, contradicts itself, names something that is not among
            the files and their folders, has an unknown split, or has subjects or splits in a
            column of another name.
    """
    valid_paths = {folder for path in paths for folder in _folders_of(path)} | set(paths)
    known = {nfc(place): place for place in valid_paths} | {place: place for place in valid_paths}
    metadata: dict[str, FileMetadata] = {}
    frames: dict[str, dict[str, str | None]] = {}
    unknown: list[str] = []
    table, unread = _read_columns(labels, known)
    _check_unread(labels, table.column_names, unread, reads_splits)
    for row in _filled_rows(table, labels):
        written = str(row["path"] or "")
        path = next((known[name] for name in _spellings(written) if name in known), None)
        if not written.strip():
            raise DataError(f"labels={labels}: a row has no path; add it or delete the row")
        if path is None:
            unknown.append(written)
            continue
        before, new = (
            metadata.get(path, FileMetadata()),
            _metadata_of(row, path, labels, reads_splits),
        )
        frame, frame_label = text_of(row.get("frame")), None
        if frame is not None:
            frame_label, new = new.label, replace(new, label=None)
        contradicted = before.contradicted_by(new)
        if frame_label is not None:
            previous_label = frames.setdefault(path, {}).setdefault(str(frame), frame_label)
            contradicted = contradicted or ("label" if previous_label != frame_label else None)
        if contradicted:
            raise DataError(
                f"labels={labels}: rows of {path!r} have different values in column "
                f"{contradicted!r}; keep one of them"
            )
        metadata[path] = before.completed_by(new)
    if unknown:
        more = f" (nor are the paths of {len(unknown) - 1} more rows)" if len(unknown) > 1 else ""
        slashed = unknown[0].replace("\\", "/").removeprefix("./")
        nearest = _nearest_path(slashed, valid_paths)
        remedy = f"did you mean {nearest!r}? Paths" if nearest else "paths"
        raise DataError(
            f"labels={labels}: {unknown[0]!r} is neither an image file below the source nor a "
            f"folder with one{more}; {remedy} must be relative to the source, and supported types "
            f"are {', '.join(SUFFIXES)}"
        )
    folders = sorted(frames.keys() - set(paths))
    if folders:
        raise DataError(
            f"labels={labels}: a row names a frame of {folders[0]!r}, which is a folder: give "
            "the path of the file with this slice"
        )
    found = {}
    for path in paths:
        applicable = [metadata[place] for place in (path, *_folders_of(path)) if place in metadata]
        if applicable:
            whole = reduce(FileMetadata.completed_by, applicable)
            found[path] = replace(whole, label_of_frame=frames.get(path, {}))
    return found


def _spellings(written: str) -> Iterator[str]:
    """A path as it is, and as it is if it was written on Windows or by a spreadsheet."""
    for slashed in (written, written.replace("\\", "/")):
        bare = slashed.removeprefix("./")
        yield from (bare, bare.strip(), nfc(bare.strip()), nfc(bare.strip()).rstrip("/"))
        yield bare.removeprefix("'")  # as in our own lists: Folder.write_csv


def _nearest_path(written: str, paths: Collection[str]) -> str | None:
    """The one path that differs in upper and lower case, in leading folders or in the suffix."""

    def last_part(path: str) -> str:
        return path.rstrip("/").rpartition("/")[2].casefold()

    def stem(path: str) -> str:
        name = last_part(path)
        return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)

    for form in (str.casefold, last_part, stem):
        fitting = [path for path in paths if form(path) == form(written)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def _metadata_of(
    row: Mapping[str, Any], path: str, labels: Folder, reads_splits: bool
) -> FileMetadata:
    split = text_of(row.get("split")) if reads_splits else None
    if split is not None and split.lower() not in SPLIT_NAMES:
        raise DataError(
            f"labels={labels}: split {split!r} of {path!r} is neither train nor test; validation "
            "slices are drawn from train"
        )
    subject = text_of(row.get("subject"))
    return FileMetadata(
        split=None if split is None else SPLIT_NAMES[split.lower()],
        label=text_of(row.get("label")),
        subject=None if subject is None or names_nobody(subject) else subject,
    )


def _folders_of(path: str) -> list[str]:
    """Paths of the folders that contain a file, nearest first."""
    *folders, _ = path.split("/")
    return ["/".join(folders[:end]) for end in range(len(folders), 0, -1)]


def _check_unread(
    labels: Folder, columns: Collection[str], unread: Sequence[str], reads_splits: bool
) -> None:
    """Name the columns that are not read in the log.

    Raises:
        DataError: one of them evidently holds what the table lacks under its own name.
    """
    for column, alias in _ALIASES.items():
        meant = [name for name in unread if alias.fullmatch(re.sub(r"[\s_-]", "", name))]
        if meant and column not in columns and (column != "split" or reads_splits):
            raise DataError(
                f"labels={labels}: column {meant[0]!r} is not read: rename it to {column!r} or, to "
                "leave it out, to another name"
            )
    read = [name for name in columns if name != "split" or reads_splits]
    unread = [*unread, *(name for name in columns if name not in read)]
    if unread:
        more = ", ..." if len(unread) > _MAX_NAMED else ""
        log(
            f"note: {labels}: columns read: {', '.join(read)}; not read: "
            f"{', '.join(unread[:_MAX_NAMED])}{more}"
        )


def read_rows(labels: Folder) -> list[dict[str, Any]]:
    """The rows of a CSV or Parquet table that have any of its columns filled in.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    return _filled_rows(_read_columns(labels, {})[0], labels)


def _read_columns(labels: Folder, known: Mapping[str, str]) -> tuple[pa.Table, list[str]]:
    """The columns of a table that are ours, and the names of the others.

    ``known`` are paths whose rows no other cell may contain.
    """
    try:
        table = _parsed(_content_of(labels), labels, known)
        table = table.rename_columns([name.strip().lower() for name in table.column_names])
        columns = [name for name in _COLUMNS if name in table.column_names]
        repeated = [name for name in columns if table.column_names.count(name) > 1]
        if repeated:
            raise DataError(
                f"labels={labels}: column {repeated[0]} appears more than once; drop one"
            )
        ours = _as_text(table.select(columns))
    except BrainrayError:
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError, zlib.error) as error:
        # Arrow quotes the row that does not parse, and a row may name a patient.
        reason = " ".join(re.sub(r"(got \d+).*", r"\1", str(error), flags=re.DOTALL).split())[:200]
        advice = "save it as CSV in UTF-8"
        counts = re.search(r"Expected (\d+) columns, got (\d+)", reason)
        if counts and int(counts[2]) < int(counts[1]):
            advice = "give each row as many cells as the header, even if the last are empty"
        elif counts:
            advice = "quote cells with commas"
        raise DataError(
            f"labels={labels} cannot be read as CSV or Parquet: {reason} ({advice})"
        ) from None
    missing = {"path", "label"} - set(columns)
    if missing:
        # Not the column names: without a header they are the first row, which may name a patient.
        raise DataError(
            f"labels={labels}: missing column {' and '.join(sorted(missing))} (columns found: "
            f"{table.num_columns}); path and label are required and separated by commas, "
            "semicolons or tabs, frame, split and subject are optional"
        )
    return ours, [name for name in table.column_names if name and name not in columns]


def _content_of(labels: Folder) -> bytes:
    content = labels.parent.read_bytes(labels.path.rpartition("/")[2])  # name without escapes
    if content.startswith(GZIP):
        content = gzip.decompress(content)
    if content.startswith(_SPREADSHEETS):
        raise DataError(
            f"labels={labels} is a spreadsheet file or an archive: save it as CSV in UTF-8"
        )
    return content


def _parsed(content: bytes, labels: Folder, known: Mapping[str, str]) -> pa.Table:
    if content.startswith(_PARQUET) or labels.name.lower().endswith((".parquet", ".pq")):
        return pq.read_table(io.BytesIO(content))
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16").encode()  # "Unicode text" of spreadsheets
    if b"\0" in content[:_MAX_HEADER]:
        raise DataError(
            f"labels={labels} contains NUL bytes, as text in UTF-16 does: save it as CSV in UTF-8"
        )
    content = _SEPARATOR_LINE.sub(b"", content)
    cells = pa_csv.ParseOptions(delimiter=_delimiter(content, labels), newlines_in_values=True)
    # Labels such as 0 and 1, or a subject 007, are names, not numbers.
    header = pa_csv.open_csv(io.BytesIO(content), parse_options=cells).schema.names
    options = pa_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
    table = pa_csv.read_csv(io.BytesIO(content), parse_options=cells, convert_options=options)
    _check_quotes(table, cells.delimiter, known, labels)
    return table


def _filled_rows(table: pa.Table, labels: Folder) -> list[dict[str, Any]]:
    rows = table.to_pylist()
    for row in rows:
        for column, cell in row.items():
            if isinstance(cell, str) and _SPREADSHEET_ERROR.fullmatch(cell.strip()):
                raise DataError(
                    f"labels={labels}: {cell.strip()} in column {column} is a spreadsheet error: "
                    "correct the table"
                )
    return [row for row in rows if any(text_of(cell) is not None for cell in row.values())]


def _check_quotes(
    table: pa.Table, delimiter: str, known: Mapping[str, str], labels: Folder
) -> None:
    """Check that no cell has swallowed the rows of known paths, as one does that begins with a
    quote and does not end with one.

    Raises:
        DataError: a line within a cell is such a row.
    """
    names = [name.strip().lower() for name in table.column_names]
    if "path" not in names:
        return
    for column in table.columns:
        for cell in column.filter(pc.match_substring_regex(column, r"[\r\n]")).to_pylist():
            for line in cell.splitlines()[1:]:
                fields = line.split(delimiter)
                path = fields[names.index("path")] if len(fields) == len(names) else ""
                if any(spelling in known for spelling in _spellings(path.strip('"'))):
                    raise DataError(
                        f'labels={labels}: a cell contains whole rows: close its quote ("), or '
                        "write a quote that belongs to it twice"
                    )


def _delimiter(content: bytes, labels: Folder) -> str:
    """What separates the cells of a table: where numbers have decimal commas, spreadsheets use
    semicolons. A header may also contain a comma.

    Raises:
        DataError: the header is not the first line.
    """
    lines = content[:_MAX_HEADER].removeprefix(codecs.BOM_UTF8).splitlines()
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in filled:
        for mark in _DELIMITERS:
            names = {cell.strip(b' "').lower() for cell in line.split(mark.encode())}
            if {b"path", b"label"} <= names:
                if number > filled[0][0]:
                    raise DataError(
                        f"labels={labels}: the header is line {number}: delete the lines above it"
                    )
                return mark
    return next((mark for mark in _DELIMITERS if filled and mark.encode() in filled[0][1]), ",")


def _as_text(table: pa.Table) -> pa.Table:
    """The table with binary columns, as some programs write text, as text."""
    fields = [
        field.with_type(pa.string()) if _is_bytes(field.type) else field for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def text_of(value: object) -> str | None:
    """Text of a cell, stripped; None if it is a missing value, such as "n.a." or a dash.

    A plus, which may be a finding, is none: as a class it is refused by name.

    pandas writes whole numbers of a column with gaps as floats: 7.0 is read as 7.
    """
    text = "" if value is None else nfc(str(value).strip())
    if re.fullmatch(r"-?\d+\.0", text):
        text = text.removesuffix(".0")
    return None if _PLACEHOLDER.sub("", text).casefold() in _MISSING else text


def nfc(name: str) -> str:
    """Unicode NFC form: some systems decompose accented characters in file names."""
    return unicodedata.normalize("NFC", name)

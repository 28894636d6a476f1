"""Ray Data tasks that decode files and write a store's final rows.

They run in one process per core, started for the job. Nothing imported here, even indirectly, may
load PyTorch or a plotting library, which would cost every process seconds and hundreds of
megabytes. A test of the import rules checks this.
"""

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.compute as pc
import ray

from brainray.config import PreprocessConfig
from brainray.errors import DataError
from brainray.mri.identity import content_hash
from brainray.mri.slices import RejectedImage
from brainray.orchestration.paths import check_is_here
from brainray.orchestration.preprocessing.slice_rows import (
    DECODED,
    LIGHT_COLUMNS,
    PART,
    SLICES,
    decode_to_predict,
    preprocess_file,
    read_file,
    rejected_row,
)
from brainray.orchestration.preprocessing.source import FoundFile, SourceFile
from brainray.schema import IMAGE_STORE, TRAIN
from brainray.storage import Folder

_FOUND = [
    pa.field("path", pa.string()),
    pa.field("num_bytes", pa.int64()),
    pa.field("mtime_ns", pa.int64()),
    pa.field("problem", pa.string()),
]

TO_PART = pa.schema([*_FOUND, PART])
"""Files of a task, and the part to which their slices are written."""

TO_PREDICT = pa.schema(
    [
        *_FOUND,
        ("label", pa.string()),
        ("subject", pa.string()),
        ("label_of_frame", pa.map_(pa.string(), pa.string())),
    ]
)
"""Files of a task, with labels and subject from a labels table."""

PART_SLICES = pa.schema(
    [*(SLICES.field(name) for name in LIGHT_COLUMNS), SLICES.field("thumbnail"), PART]
)
"""What a task returns about the slices whose pixels it has written."""

_SLICES_AT_ONCE = 128  # in memory and per row group; with 1,024, each slice takes 15 % longer
_NUM_READERS = 8  # files that a task reads at a time ...
_MAX_BYTES_AHEAD = 2**26  # ... up to this total size


def decode_part(
    batch: pa.Table,
    *,
    source: Folder,
    preprocess: PreprocessConfig,
    salt: bytes,
    known_hashes: "ray.ObjectRef[set[str]]",
    parts: Folder,
) -> pa.Table:
    """Decode the files in ``TO_PART`` rows and write their pixels to a part; ``PART_SLICES`` rows.

    Files whose hash is already known are not decoded: their rows have no sample_id.
    """
    configure_task_process()
    check_is_here(parts)
    name = batch["part"][0].as_py()
    known: set[str] = ray.get(known_hashes)
    tables = []
    with parts.table_writer(name, SLICES) as writer:
        for slices in _decoded(_files(batch), source, preprocess, salt, known):
            has_pixels = pc.is_valid(slices["image"])
            writer.write_table(slices.filter(has_pixels))
            names = pc.if_else(has_pixels, name, pa.scalar(None, pa.string()))
            tables.append(
                slices.drop_columns("image").append_column(PART, names).select(PART_SLICES.names)
            )
    return pa.concat_tables(tables).cast(PART_SLICES)


def _decoded(
    files: Sequence[FoundFile],
    source: Folder,
    config: PreprocessConfig,
    salt: bytes,
    known_hashes: Container[str],
) -> Iterator[pa.Table]:
    """``SLICES`` rows of the files, a few at a time."""
    rows: list[dict[str, Any]] = []
    for file, read in zip(files, _read_ahead(source, files), strict=True):
        content = None
        try:
            content = read()
            digest = content_hash(content)
            if digest in known_hashes:
                about = {"path": file.path, "mtime_ns": file.mtime_ns, "num_bytes": len(content)}
                rows.append(about | {"frame": "", "sha256": digest})
            else:
                rows += preprocess_file(content, file, config, salt)
        except RejectedImage as rejection:
            rows.append(rejected_row(file, content, rejection))
        if len(rows) >= _SLICES_AT_ONCE:
            yield pa.Table.from_pylist(rows, schema=SLICES)
            rows.clear()
    if rows:
        yield pa.Table.from_pylist(rows, schema=SLICES)


def _files(batch: pa.Table) -> list[FoundFile]:
    return [FoundFile(**row) for row in batch.select([f.name for f in _FOUND]).to_pylist()]


def _read_ahead(source: Folder, files: Sequence[FoundFile]) -> Iterator[Callable[[], bytes]]:
    """For each file, a function that returns its bytes or raises RejectedImage; reads ahead.

    An object store takes tens of milliseconds to respond, longer than decoding a slice.
    """
    reads: deque[tuple[int, Future[bytes]]] = deque()
    num_bytes = 0
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for file in files:
            num_bytes += file.num_bytes
            while reads and (len(reads) == _NUM_READERS or num_bytes > _MAX_BYTES_AHEAD):
                first_bytes, first = reads.popleft()
                num_bytes -= first_bytes
                yield first.result
            reads.append((file.num_bytes, pool.submit(read_file, source, file)))
        while reads:
            yield reads.popleft()[1].result


def write_parts(
    batch: pa.Table,
    *,
    parts: Folder,
    new_parts: Container[str],
    previous_parts: Folder,
    images: Folder,
) -> pa.Table:
    """Write parts with the pixels of new or earlier parts and the final rows; the number of rows.

    ``batch`` contains all rows of each of its parts.
    """
    configure_task_process()
    for name in pc.unique(batch[PART.name]).to_pylist():
        final = batch.filter(pc.equal(batch[PART.name], name))
        _write_part(name, final, parts if name in new_parts else previous_parts, images)
    return pa.table({"num_rows": [batch.num_rows]})


def _write_part(name: str, final: pa.Table, source: Folder, images: Folder) -> None:
    waiting: dict[str, list[int]] = defaultdict(list)
    for row, identity in enumerate(final["sample_id"].to_pylist()):
        waiting[identity].append(row)
    with images.table_writer(name, IMAGE_STORE) as writer:
        for pixels in source.row_groups(name, ["sample_id", "image", "thumbnail"]):
            rows, places = [], []
            for place, identity in enumerate(pixels["sample_id"].to_pylist()):
                found = waiting.pop(identity, [])
                rows += found
                places += [place] * len(found)
            slices = final.take(pa.array(rows, pa.int64()))
            for column in ("image", "thumbnail"):
                taken = pixels[column].take(pa.array(places, pa.int64()))
                slices = slices.append_column(column, taken)
            writer.write_table(slices.select(IMAGE_STORE.names).cast(IMAGE_STORE))
    if waiting:
        raise DataError(
            f"{source}/{name}: {len(waiting)} slices are missing, such as {min(waiting)}; delete "
            "the store and preprocess again"
        )


def decode_files(
    batch: pa.Table, *, source: Folder, preprocess: PreprocessConfig, salt: bytes
) -> pa.Table:
    """``DECODED`` rows of the files in ``TO_PREDICT`` rows."""
    configure_task_process()
    files = _files(batch)
    metadata = batch.select(["label", "subject", "label_of_frame"]).to_pylist(
        maps_as_pydicts="strict"
    )
    rows = []
    for file, about, read in zip(files, metadata, _read_ahead(source, files), strict=True):
        source_file = SourceFile(**about, file=file)
        rows += decode_to_predict(source_file, read, preprocess, salt)
    return pa.Table.from_pylist(rows, schema=DECODED)


def select_slices(batch: pa.Table, *, sample_ids: "ray.ObjectRef[pa.Array]") -> pa.Table:
    """``DECODED`` rows of the given training slices in a store; their labels are not read."""
    wanted = pc.and_(
        pc.is_in(batch["sample_id"], ray.get(sample_ids)), pc.equal(batch["split"], TRAIN)
    )
    rows = batch.filter(wanted)
    read = set(rows.column_names)
    columns = [
        rows[field.name] if field.name in read else pa.nulls(rows.num_rows, field.type)
        for field in DECODED
    ]
    return pa.table(columns, names=DECODED.names).cast(DECODED)


@cache
def configure_task_process() -> None:
    """Avoid needless costs in a process that runs tasks; runs once per process."""
    cv2.setNumThreads(1)  # Ray runs a task on every core
    # Ray triggers a garbage collection after every task; traversing all imported modules takes a
    # sixth of a second.
    gc.freeze()

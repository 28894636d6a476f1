"""Preprocessing on Ray Data: files to the image store, streaming, in two passes.

The first pass decodes, checks, strips and resizes every file into parts. The driver then looks at
the light columns of all slices at once (hashes, thumbnails) to find copies, groups and splits. The
second pass adds these to the parts and leaves removed copies out. The store appears whole: it is
built under another name and renamed.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from brainray import layout
from brainray.config import Config, PreprocessConfig
from brainray.errors import ConfigError, DataError
from brainray.mri import resize
from brainray.mri.decode import RejectedImage, check_content, decode_slice
from brainray.mri.duplicates import content_hash
from brainray.mri.skull_strip import apply_mask, otsu_mask
from brainray.orchestration.plan import plan_store
from brainray.orchestration.source import Listing, list_source
from brainray.orchestration.store import ImageStore, differing_settings, settings_of
from brainray.report.store_figures import draw_store_figures
from brainray.schema import IMAGE_STORE, REJECTED, TRAIN
from brainray.storage import Folder

_PART_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),  # null where the file could not be read
        ("num_bytes", pa.int64()),
        ("reason", pa.string()),  # null where the slice was accepted
        ("detail", pa.string()),
        ("format", pa.string()),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("source_split", pa.string()),
        ("label", pa.string()),
        ("subject_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixel_sum", pa.int64()),
        ("pixel_square_sum", pa.int64()),
        ("thumbnail", IMAGE_STORE.field("thumbnail").type),
        ("image", pa.binary()),
    ]
)
_PART_INDEX_COLUMNS = [name for name in _PART_SCHEMA.names if name != "image"]

Log = Callable[[str], None]

_NUM_EXAMPLES = 8


def preprocess(config: Config, log: Log = print) -> ImageStore:
    """Make the store ``config.name`` of ``config.source``, or reuse an equal one.

    Raises:
        ConfigError: name or source is missing.
        DataError: nothing readable, too much rejected, classes that do not fit, or an existing
            store of that name with other settings or files.
    """
    if config.name is None or config.source is None:
        raise ConfigError("preprocessing needs --set name=NAME source=DIR")
    source = Folder(config.source)
    target = Folder(config.storage) / "datasets" / config.name
    labels = None if config.labels is None else Folder(config.labels)
    listing = list_source(source, labels, config.classes.map)
    drawn = config.split.mode == "grouped" or not any(file.split for file in listing.files)
    settings = settings_of(config.preprocess, config.split, config.classes.map, drawn=drawn)
    existing = _reusable_store(target, settings, listing)
    if existing is not None:
        log(f"image store {target}: made with the same settings and files, reused")
        return existing
    log(f"preprocessing {len(listing.files)} files of {source}")
    building = Folder(config.storage) / "datasets" / f".{config.name}.building"
    building.delete()
    try:
        manifest = _build(config, source, listing, settings, building, log)
        building.move_to(target, last=layout.MANIFEST)
    except BaseException:
        building.delete()
        raise
    return ImageStore(target, manifest)


def _build(
    config: Config,
    source: Folder,
    listing: Listing,
    settings: dict[str, Any],
    building: Folder,
    log: Log,
) -> dict[str, Any]:
    """Make the whole store in ``building``; returns its manifest."""
    started = time.monotonic()
    parts = building / "parts"
    index = _decode_all(source, listing, config.preprocess, parts, log)
    log(f"decoded in {time.monotonic() - started:.0f} s")
    plan = plan_store(index, config)
    _write_images(parts, building / layout.IMAGES, plan.rows)
    parts.delete()
    rejected = _rejected_table(index)
    building.write_table(layout.REJECTED, rejected)
    building.write_table(layout.DUPLICATES, plan.duplicates)
    building.write_json(layout.LEAKAGE, plan.leakage)
    manifest = {
        "format": "brainray-image-store/1",
        "name": config.name,
        "source": config.source,
        "listing": listing.fingerprint,
        "num_files": len(listing.files),
        "num_ignored_files": listing.num_ignored,
        **settings,
        **plan.statistics,
        "num_rejected": rejected.num_rows,
        "rejected_reasons": dict(Counter(rejected["reason"].to_pylist()).most_common()),
        "seconds": round(time.monotonic() - started, 1),
    }
    samples = _before_and_after(source, plan.rows, config.preprocess)
    draw_store_figures(building, plan.statistics["num_slices"], samples)
    building.write_json(layout.MANIFEST, manifest)
    return manifest


def preprocess_file(content: bytes, config: PreprocessConfig) -> dict[str, Any]:
    """The part columns that a file's bytes decide: METHOD A, steps 1, 3 and 4.

    The thumbnail is of the slice before stripping: the fingerprint must not depend on a mask.

    Raises:
        RejectedImage: the file is left out.
    """
    decoded = decode_slice(content, min_side=config.min_side, max_pixels=config.max_pixels)
    check_content(decoded.image, min_intensity_std=config.min_intensity_std)
    image = decoded.image
    if config.skull_strip == "otsu":
        image = apply_mask(image, otsu_mask(image))
    if config.intensity == "min_max":
        image = resize.min_max(image)
    shape = resize.letterbox if config.resize == "letterbox" else resize.stretch
    image = shape(image, config.image_size)
    height, width = decoded.image.shape
    wide = image.astype(np.int64)
    return {
        "format": decoded.format,
        "original_height": height,
        "original_width": width,
        "height": config.image_size,
        "width": config.image_size,
        "pixel_sum": int(wide.sum()),
        "pixel_square_sum": int((wide * wide).sum()),
        "thumbnail": resize.thumbnail(decoded.image).tobytes(),
        "image": image.tobytes(),
    }


def _reusable_store(
    target: Folder, settings: dict[str, Any], listing: Listing
) -> ImageStore | None:
    if not target.exists(layout.MANIFEST):
        if target.names():
            raise DataError(f"{target} exists and is no image store: choose another name")
        return None
    store = ImageStore.open(target)
    stored = {key: store.manifest[key] for key in settings}
    difference = differing_settings(stored, settings)
    if difference:
        raise DataError(
            f"the image store {target} was made with other settings ({difference}): "
            "choose another name or delete it"
        )
    if store.manifest["listing"] != listing.fingerprint:
        raise DataError(
            f"the image store {target} was made from {store.manifest['num_files']} files of "
            f"{store.manifest['source']}, which differ from the {len(listing.files)} files now "
            "given: choose another name or delete it"
        )
    return store


def _decode_all(
    source: Folder, listing: Listing, config: PreprocessConfig, parts: Folder, log: Log
) -> pa.Table:
    """First pass; returns the light columns of all files, in the order of the listing."""
    parts.filesystem.create_dir(parts.path, recursive=True)
    files = listing.files
    tables: list[pa.Table] = []
    for start in range(0, len(files), config.files_per_task):
        chunk = files[start : start + config.files_per_task]
        columns = {
            "path": [file.path for file in chunk],
            "source_split": [file.split for file in chunk],
            "label": [file.label for file in chunk],
            "subject_id": [file.subject for file in chunk],
            "part": [f"part-{len(tables):06d}.parquet"] * len(chunk),
        }
        text = pa.schema([(name, pa.string()) for name in columns])
        tables.append(pa.table(columns, schema=text))

    def decode_part(batch: pa.Table) -> pa.Table:
        part = _decode_part(batch, source, config)
        parts.write_table(batch["part"][0].as_py(), part)
        return part.select(_PART_INDEX_COLUMNS)

    dataset = ray.data.from_arrow(tables).map_batches(
        decode_part, batch_size=None, batch_format="pyarrow"
    )
    index = [_PART_SCHEMA.empty_table().select(_PART_INDEX_COLUMNS)]
    for batch in with_progress(dataset, len(files), "decoded", log):
        index.append(batch.cast(index[0].schema))
    return pa.concat_tables(index).sort_by("path")


def _decode_part(batch: pa.Table, source: Folder, config: PreprocessConfig) -> pa.Table:
    rows = []
    for file in batch.drop_columns("part").to_pylist():
        row = dict.fromkeys(_PART_SCHEMA.names) | file
        try:
            content = read_file(source, file["path"])
            row |= {"sha256": content_hash(content), "num_bytes": len(content)}
            row |= preprocess_file(content, config)
        except RejectedImage as rejection:
            row |= {"reason": rejection.reason, "detail": rejection.detail}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_PART_SCHEMA)


def read_file(source: Folder, path: str) -> bytes:
    """A file's bytes; one that has vanished or may not be read is a RejectedImage."""
    try:
        with source.filesystem.open_input_file(f"{source.path}/{path}") as stream:
            return bytes(stream.read())
    except OSError as error:
        raise RejectedImage("unreadable file", str(error)) from None


def _rejected_table(index: pa.Table) -> pa.Table:
    rejected = index.filter(pc.is_valid(index["reason"]))
    return rejected.select(REJECTED.names).cast(REJECTED)


def _write_images(parts: Folder, images: Folder, rows: pa.Table) -> None:
    """Second pass: parts to the store's final rows."""
    images.filesystem.create_dir(images.path, recursive=True)
    added = rows.select(["path", "sample_id", "split", "label", "duplicate_group_id"])
    reference = ray.put(added)

    def write_part(batch: pa.Table) -> pa.Table:
        name = batch["name"][0].as_py()
        part = parts.read_table(name).drop_columns("label")
        final = part.join(ray.get(reference), keys="path", join_type="inner").sort_by("path")
        if final.num_rows:
            images.write_table(name, final.select(IMAGE_STORE.names).cast(IMAGE_STORE))
        return pa.table({"num_rows": [final.num_rows]})

    names = [pa.table({"name": [name]}) for name in parts.names()]
    written = ray.data.from_arrow(names).map_batches(
        write_part, batch_size=None, batch_format="pyarrow"
    )
    total = 0
    for batch in _arrow_batches(written):
        total += sum(batch["num_rows"].to_pylist())
    assert total == rows.num_rows, f"{total} of {rows.num_rows} slices written"


def with_progress(
    dataset: ray.data.Dataset, total: int, verb: str, log: Log, every_s: float = 10.0
) -> Iterator[pa.Table]:
    """The dataset's blocks as they come, with a line of progress every ten seconds."""
    started = last = time.monotonic()
    done = 0
    for batch in _arrow_batches(dataset):
        done += batch.num_rows
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            rate = done / (now - started)
            log(f"{verb} {done} of {total} files, {(total - done) / rate:.0f} s left")
        yield batch


def _before_and_after(
    source: Folder, rows: pa.Table, config: PreprocessConfig
) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """(title, slice as read, slice as stored) of training slices, spread over the classes."""
    chosen: dict[str | None, list[str]] = {}
    train = rows.filter(pc.equal(rows["split"], TRAIN)).sort_by("sample_id")
    for row in train.select(["label", "path"]).to_pylist():
        chosen.setdefault(row["label"], []).append(row["path"])
    num_each = -(-_NUM_EXAMPLES // len(chosen))
    samples = []
    for label, paths in sorted(chosen.items(), key=lambda item: item[0] or ""):
        for path in paths[:num_each]:
            content = read_file(source, path)
            before = decode_slice(content, min_side=config.min_side, max_pixels=config.max_pixels)
            stored = preprocess_file(content, config)
            after = np.frombuffer(stored["image"], np.uint8).reshape(stored["height"], -1)
            samples.append((label or "unlabelled", before.image, after))
    return samples[:_NUM_EXAMPLES]


def _arrow_batches(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The dataset's blocks, as they come."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(batch, pa.Table)
        yield batch

"""Preprocessing on Ray Data: files to the image store, streaming, in two passes.

The first pass decodes, checks, strips and resizes every new file into parts; slices of unchanged
files are reused from an earlier run. The driver then reads the light columns (hashes, fingerprints)
of all slices at once to find copies, groups and splits. The second pass adds these to the parts and
leaves out removed copies. The store becomes visible only when it is complete: it is built under
another name and renamed.
"""

import shlex
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from brainray import layout
from brainray.config import Config
from brainray.errors import ConfigError, DataError
from brainray.log import Stopwatch, log
from brainray.mri import subjects
from brainray.mri.row_file import RowFile
from brainray.mri.slices import RejectedImage
from brainray.mri.thumbnails import thumbnail_matrix
from brainray.orchestration.blocks import arrow_blocks, map_blocks, with_progress
from brainray.orchestration.lock import held
from brainray.orchestration.manifest import Manifest, settings_of
from brainray.orchestration.preprocessing.examples import draw_figures
from brainray.orchestration.preprocessing.plan import official_splits, plan_store
from brainray.orchestration.preprocessing.previous_records import (
    LIGHT,
    Place,
    PreviousRecords,
    unchanged,
)
from brainray.orchestration.preprocessing.slice_rows import (
    CHANGED,
    UNREADABLE,
    preprocess_file,
    read_file,
)
from brainray.orchestration.preprocessing.slice_tasks import (
    PART_SLICES,
    TO_PART,
    decode_part,
    write_parts,
)
from brainray.orchestration.preprocessing.source import (
    FoundFile,
    Listing,
    files_of_tasks,
    list_source,
)
from brainray.orchestration.preprocessing.subject_salt import (
    SALT_VARIABLE,
    salt_id,
    subject_salt,
)
from brainray.orchestration.records import check_same_settings
from brainray.orchestration.store import ImageStore, describe
from brainray.report.leakage_table import leakage_markdown
from brainray.schema import IMAGE_INDEX_COLUMNS, REJECTED, THUMBNAIL_SIDE
from brainray.storage import Folder

_WRITES_PER_CPU = 4
_MANY_CLASSES = 10  # folders that may be something else
_MAX_TRIED = 8  # files without a split that are decoded in advance


def preprocess(config: Config, *, data_hash: str | None = None) -> ImageStore:
    """Make the store ``config.name`` from ``config.source``, or reuse it, or bring it up to date.

    An update decodes only new and changed files.

    Args:
        config: name, source and labels; settings of preprocessing, split and class names.
        data_hash: hash that the store must have for the run that resumes on it; None accepts any.

    Raises:
        ConfigError: name or source is missing, a store of that name was made with other settings,
            or the source gives different slices from those of ``data_hash``; the store is then
            left unchanged.
        DataError: no readable file, too many rejected files, or classes that do not fit.
    """
    name, source = config.given("name"), Folder(config.given("source"))
    target = Folder(config.storage) / layout.DATASETS / name
    labels = None if config.labels is None else Folder(config.labels)
    reads_splits = config.split.mode != "grouped"
    listing = list_source(
        source,
        labels,
        config.classes.map,
        reads_splits=reads_splits,
        storage=Folder(config.storage),
    )
    salt = subject_salt(Folder(config.storage))
    fingerprint = listing.fingerprint(salt)
    drawn = config.split.mode == "grouped" or not any(file.split for file in listing.files)
    settings = settings_of(config.preprocess, config.split, config.classes.map, drawn=drawn)
    with held(Folder(config.storage), layout.DATASETS, name):
        previous = _previous_store(target)
        if previous is not None:
            _check_source(previous, listing, config)
            check_same_settings(
                f"the image store {target}",
                previous.manifest.settings,
                settings,
                "choose another name, or delete it",
            )
            is_same = previous.manifest.listing == fingerprint
            if is_same and not _may_change(previous, listing, source):
                log(f"image store {target}: up to date (same settings and files), reusing it")
                return previous
            if previous.has_outdated_subjects():
                raise ConfigError(
                    f"another version of brainray estimated the subjects of the image store "
                    f"{target}: choose another name, or delete it"
                )
        _check_splits(listing, source, config, salt)
        log(f"preprocessing {len(listing.files)} files of {source}{listing.remarks}")
        if labels is None:
            _note_many_classes(listing)
        with target.rebuilt(layout.MANIFEST) as building:
            about = {
                "listing": fingerprint,
                "subject_salt": salt_id(salt),
                "subject_version": subjects.VERSION,
                **settings,
            }
            manifest = _build(config, listing, about, previous, building)
            if data_hash not in {None, manifest.data_hash}:
                raise _other_slices(config, target, manifest.data_hash, data_hash)
            manifest.write(building)
    store = ImageStore(target, manifest)
    log(describe(store))
    log(store.folder.read_bytes(layout.LEAKAGE_TABLE).decode())
    return store


def _check_splits(listing: Listing, source: Folder, config: Config, salt: bytes) -> None:
    """Refuse splits that cannot be used before decoding, which takes most of the time.

    Files without a split may be unusable, as a DICOMDIR is: then they are only rejected.
    """
    with_split = [file for file in listing.files if file.split]
    others = [file for file in listing.files if with_split and not file.split][:_MAX_TRIED]
    usable = [file for file in others if _is_usable(file.file, source, config, salt)]
    official_splits(with_split + usable, config)


def _other_slices(config: Config, target: Folder, found: str, expected: str | None) -> ConfigError:
    given = [f"name={config.name}", f"source={config.source}"]
    given += [f"labels={config.labels}"] if config.labels else []
    return ConfigError(
        f"{config.source} gives different slices (hash {found}) from those that the pipeline's run "
        f"started with ({expected}); the image store {target} was left unchanged: update it with "
        f"jobs/preprocess.py --set {shlex.join(given)} and the settings of the pipeline (its test "
        "slices stay test slices), then train under another name"
    )


def _note_many_classes(listing: Listing) -> None:
    """Folders of patients or series look like those of classes."""
    names = sorted(set[str]().union(*(file.labels for file in listing.files)))
    if len(names) > _MANY_CLASSES:
        log(
            f"note: {len(names)} folders are read as classes, from {names[0]!r} to {names[-1]!r}; "
            "if they are patients or series, give a labels table (--set labels=FILE)"
        )


def _build(
    config: Config,
    listing: Listing,
    about: dict[str, Any],
    previous: ImageStore | None,
    building: Folder,
) -> Manifest:
    """Make the store in ``building``, but for its manifest: returns it, with ``about``."""
    stopwatch = Stopwatch()
    source, parts = Folder(config.given("source")), building / "parts"
    records = PreviousRecords.from_store(previous)
    _check_salt(previous, records, about["subject_salt"])
    fingerprints = RowFile(THUMBNAIL_SIDE**2, np.uint8)
    slices, num_decoded = _slices_of_all_files(config, listing, records, parts, fingerprints)
    stopwatch.lap("decode")
    plan = plan_store(slices, fingerprints, listing, config, records)
    stopwatch.lap("plan")
    _write_images(parts, previous, building / layout.IMAGES, plan.rows)
    parts.delete()
    stopwatch.lap("write")
    building.write_table(layout.FILES, plan.files)
    now = (plan.rows[name].to_pylist() for name in ("split", "generation"))
    places = records.places() | dict(
        zip(plan.rows["sample_id"].to_pylist(), map(Place, *now), strict=True)
    )
    placed = [{"sample_id": name} | place._asdict() for name, place in sorted(places.items())]
    building.write_table(layout.SPLITS, pa.Table.from_pylist(placed))
    rejected = slices.filter(pc.is_valid(slices["reason"])).select(REJECTED.names).cast(REJECTED)
    building.write_table(layout.REJECTED, rejected)
    building.write_table(layout.DUPLICATES, plan.duplicates)
    building.write_json(layout.LEAKAGE, plan.leakage)
    building.write_bytes(layout.LEAKAGE_TABLE, leakage_markdown(plan.leakage).encode() + b"\n")
    draw_figures(building, source, plan, config.preprocess)
    stopwatch.lap("figures")
    return Manifest(
        format=layout.STORE_FORMAT,
        name=config.given("name"),
        source=config.given("source"),
        generation=records.generation,
        seconds={stage: round(spent, 2) for stage, spent in stopwatch.seconds.items()},
        num_files=len(listing.files),
        num_files_decoded=num_decoded,
        num_ignored_files=listing.num_ignored,
        num_rejected=rejected.num_rows,
        rejected_reasons=dict(Counter(rejected["reason"].to_pylist()).most_common()),
        **about,
        **plan.statistics,
    )


def _may_change(store: ImageStore, listing: Listing, source: Folder) -> bool:
    """Whether a file can be read now that could not be (because of a mount, network or writer)."""
    if set(store.manifest.rejected_reasons).isdisjoint({UNREADABLE, CHANGED}):
        return False
    rejected = store.folder.read_table(layout.REJECTED, columns=["path", "reason"]).to_pylist()
    unread = {row["path"] for row in rejected if row["reason"] in {UNREADABLE, CHANGED}}
    return any(_is_readable(file.file, source) for file in listing.files if file.path in unread)


def _is_usable(file: FoundFile, source: Folder, config: Config, salt: bytes) -> bool:
    """Whether a file has a slice that preprocessing accepts."""
    try:
        slices = preprocess_file(read_file(source, file), file, config.preprocess, salt)
    except RejectedImage:
        return False
    return any(row.get("reason") is None for row in slices)


def _is_readable(file: FoundFile, source: Folder) -> bool:
    try:
        read_file(source, file)
    except RejectedImage:
        return False
    return True


def _previous_store(target: Folder) -> ImageStore | None:
    target.restore(layout.MANIFEST)
    if target.exists(layout.MANIFEST):
        return ImageStore.open(target)
    if target.names():
        raise DataError(
            f"{target} exists but is not an image store (it has no {layout.MANIFEST}): choose "
            "another name, or delete it"
        )
    return None


def _check_source(previous: ImageStore, listing: Listing, config: Config) -> None:
    """Check that a folder in another place has most of the files that a store was made from.

    Raises:
        DataError: it has not, so it is another source, with which the store would be replaced.
    """
    if previous.manifest.source == config.source:
        return
    stored = previous.folder.read_table(layout.FILES, columns=["path", "num_bytes"])
    before = {(row["path"], row["num_bytes"]) for row in stored.to_pylist()}
    num_found = len(before & {(file.path, file.num_bytes) for file in listing.files})
    if 2 * num_found < len(before):
        raise DataError(
            f"the image store {previous.folder} was made from {previous.manifest.source}, and "
            f"{config.source} has {num_found} of its {len(before)} files: choose another name with "
            "--set name=NAME, or delete the store"
        )


def _check_salt(previous: ImageStore | None, records: PreviousRecords, salt: str) -> None:
    """Check that all subjects of a store use one salt; two would turn one patient into two.

    Raises:
        DataError: the subjects given by file headers were hashed with a different salt.
    """
    if previous is None:
        return
    made_with = previous.manifest.subject_salt
    names_subjects = pc.any(pc.is_valid(records.files["header_subject"])).as_py()
    if names_subjects and made_with != salt:
        raise DataError(
            f"the subjects of the image store {previous.folder} were hashed with a different salt "
            f"from that of {SALT_VARIABLE} or storage: use the salt that it was made with, or "
            "choose another name"
        )


def _slices_of_all_files(
    config: Config,
    listing: Listing,
    records: PreviousRecords,
    parts: Folder,
    fingerprints: RowFile,
) -> tuple[pa.Table, int]:
    """LIGHT rows of every file, ordered by path and frame, and the number of decoded files.

    Fingerprints are appended to ``fingerprints``.
    """
    reusable = records.reusable(fingerprints)
    found = [file.file for file in listing.files]
    same = unchanged(found, reusable)
    to_read = [file for file in found if file.path not in same]
    kept = reusable.filter(pc.is_in(reusable["path"], pa.array(sorted(same), pa.string())))
    started = time.monotonic()
    read = pa.concat_tables(
        _light_rows(block, fingerprints)
        for block in _decode_all(config, to_read, reusable["sha256"], records.generation, parts)
    ).cast(LIGHT)
    known = read.filter(_is_known(read))
    new = read.filter(pc.invert(_is_known(read)))
    num_decoded = len(set(new["path"].to_pylist()))
    log(
        f"decoded {num_decoded} files in {time.monotonic() - started:.0f} s"
        + (f"; reused {len(found) - num_decoded} from before" if records.generation else "")
    )
    slices = pa.concat_tables([kept, _under_new_paths(known, reusable), new])
    return slices.sort_by([("path", "ascending"), ("frame", "ascending")]), num_decoded


def _light_rows(block: pa.Table, fingerprints: RowFile) -> pa.Table:
    """Replace thumbnails by their row number in ``fingerprints``; frees the block's memory."""
    has_thumbnail = pc.is_valid(block["thumbnail"])
    numbers = pc.add(pc.cumulative_sum(has_thumbnail.cast(pa.int64())), len(fingerprints) - 1)
    fingerprints.append(thumbnail_matrix(block["thumbnail"].filter(has_thumbnail).to_pylist()))
    light = block.drop_columns("thumbnail").append_column(
        "fingerprint", pc.if_else(has_thumbnail, numbers, pa.scalar(None, pa.int64()))
    )
    return light.take(pa.array(range(light.num_rows), pa.int64()))


def _is_known(read: pa.Table) -> pa.ChunkedArray:
    """Mask of files whose bytes were decoded before, under any path."""
    return pc.and_(pc.is_null(read["reason"]), pc.is_null(read["sample_id"]))


def _under_new_paths(known: pa.Table, reusable: pa.Table) -> pa.Table:
    """The slices of known bytes, with their current path, size and modification time."""
    about_file = ["path", "num_bytes", "mtime_ns"]
    first_path = reusable.group_by("sha256").aggregate([("path", "min")])
    slices = reusable.filter(pc.is_in(reusable["path"], first_path["path_min"]))
    joined = known.select(["sha256", *about_file]).to_pylist()
    by_hash: dict[str, list[dict[str, Any]]] = {}
    for row in slices.filter(pc.is_in(slices["sha256"], known["sha256"])).to_pylist():
        by_hash.setdefault(row["sha256"], []).append(row)
    rows = [row | file for file in joined for row in by_hash[file["sha256"]]]
    return pa.Table.from_pylist(rows, schema=LIGHT)


def _decode_all(
    config: Config,
    files: list[FoundFile],
    known_hashes: pa.ChunkedArray,
    generation: int,
    parts: Folder,
) -> Iterator[pa.Table]:
    """First pass: yields the files' rows without their pixels, as they are decoded."""
    parts.create()
    yield PART_SLICES.empty_table()
    if not files:
        return
    decode = partial(
        decode_part,
        source=Folder(config.given("source")),
        preprocess=config.preprocess,
        salt=subject_salt(Folder(config.storage)),
        known_hashes=ray.put(set(known_hashes.to_pylist())),
        parts=parts,
    )
    tables: list[pa.Table] = []
    for chunk in files_of_tasks(files, config.preprocess.files_per_task, _num_cpus()):
        part = {"part": f"part-{generation:04d}-{len(tables):06d}.parquet"}
        tables.append(pa.Table.from_pylist([asdict(file) | part for file in chunk], schema=TO_PART))
    dataset = map_blocks(ray.data.from_arrow(tables), decode)
    yield from with_progress(dataset, len(files), "decoded")


def _num_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _write_images(
    parts: Folder, previous: ImageStore | None, images: Folder, rows: pa.Table
) -> None:
    """Second pass: write the store's final rows with the pixels of new and earlier parts."""
    images.create()
    new_parts = set(parts.names())
    previous_parts = parts if previous is None else previous.folder / layout.IMAGES

    write = partial(
        write_parts, parts=parts, new_parts=new_parts, previous_parts=previous_parts, images=images
    )
    final_rows = rows.select([*IMAGE_INDEX_COLUMNS, "part"])
    names = pc.unique(rows["part"])
    # Several parts per task: one alone is written faster than the executor schedules the next.
    at_once = -(-len(names) // (_WRITES_PER_CPU * _num_cpus()))
    tables = [
        final_rows.filter(pc.is_in(rows["part"], names[first : first + at_once]))
        for first in range(0, len(names), at_once)
    ]
    written = map_blocks(ray.data.from_arrow(tables), write)
    total = sum(pc.sum(batch["num_rows"]).as_py() for batch in arrow_blocks(written))
    assert total == rows.num_rows, f"{total} of {rows.num_rows} slices written"

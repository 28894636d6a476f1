"""From one file to the rows of its slices; shared by preprocessing and prediction."""

import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray import schema
from brainray.config import PreprocessConfig
from brainray.errors import DataError
from brainray.mri import resize
from brainray.mri.decode import check_content, decode_file
from brainray.mri.identity import content_hash, sample_id
from brainray.mri.intracranial import MIN_CONFIDENCE, intracranial_mask
from brainray.mri.skull_strip import StrippedSlice, apply_mask, otsu_mask, without_frame
from brainray.mri.slices import (
    STUDY_PREFIX,
    DecodedSlice,
    DecodeOptions,
    RejectedImage,
    subject_hash,
    volume_hash,
)
from brainray.orchestration.preprocessing.source import FoundFile, SourceFile
from brainray.storage import Folder

SLICES = pa.schema(
    [
        ("path", pa.string()),
        ("frame", pa.string()),
        ("sha256", pa.string()),  # of the file; null where it could not be read
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),  # null where the slice was accepted
        ("detail", pa.string()),
        ("sample_id", pa.string()),
        ("format", pa.string()),
        ("header_subject", pa.string()),  # salted hash; null where the file gives none
        ("header_study", pa.string()),  # the same
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("skull_strip", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixel_sum", pa.int64()),
        ("pixel_square_sum", pa.int64()),
        ("thumbnail", schema.IMAGE_STORE.field("thumbnail").type),
        ("image", pa.binary()),
    ]
)
"""One row per slice of a file, or a single row for a rejected file."""

LIGHT_COLUMNS = [name for name in SLICES.names if name not in {"image", "thumbnail"}]
PART = pa.field("part", pa.string())  # part of images/ with the pixels; null where there are none

# Transient reasons: the file may be readable at the next attempt.
UNREADABLE = "unreadable file"
CHANGED = "file changed while being read"

NO_CLASS_TO_SCORE = "no class to score"  # of a slice in a file of which single slices are labelled

DECODED = pa.schema(
    [
        ("label", pa.string()),
        ("subject_id", pa.string()),
        ("subject_source", pa.string()),
        *(SLICES.field(name) for name in SLICES.names),
    ]
)
"""A decoded slice for prediction."""


def decode_to_predict(
    source_file: SourceFile, content: Callable[[], bytes], config: PreprocessConfig, salt: bytes
) -> list[dict[str, Any]]:
    """``DECODED`` rows of a file, or a single row with the reason if it cannot be read.

    If a table labels single slices of the file, the others have the reason `NO_CLASS_TO_SCORE`.
    ``content`` returns the file's bytes or raises RejectedImage.
    """
    read = None
    try:
        read = content()
        rows = preprocess_file(read, source_file.file, config, salt)
    except RejectedImage as rejection:
        rows = [rejected_row(source_file.file, read, rejection)]
    decoded = []
    for row in rows:
        header = row.get("header_subject")
        subject = named_subject(source_file.subject, header, row["sha256"], salt)
        about = {
            "label": source_file.label_of(row["frame"]),
            "subject_id": subject.name,
            "subject_source": subject.source,
        }
        # A volume that was rejected as a whole has the frame "volume=N".
        contains_labelled = any(
            name.startswith(f"{row['frame']}/") for name in source_file.label_of_frame
        )
        if (
            source_file.label_of_frame
            and row["frame"]
            and about["label"] is None
            and not contains_labelled
        ):
            about |= {"reason": NO_CLASS_TO_SCORE, "detail": None, "image": None, "thumbnail": None}
        decoded.append(row | about)
    return decoded


class Subject(NamedTuple):
    """Whom a slice shows."""

    name: str | None = None  # a keyed hash, or that of an estimated group; None if unknown
    source: str | None = None  # TABLE, HEADER, STUDY, VOLUME or ESTIMATED


def named_subject(
    in_table: str | None, in_header: str | None, sha256: str | None, salt: bytes
) -> Subject:
    """A slice's subject in metadata; a table takes precedence over a header.

    Args:
        in_table: subject as written in the labels table.
        in_header: hash of the patient, study or volume, as returned by decoding.
        sha256: hash of the file.
        salt: salt of the hashes.
    """
    if in_table is not None:
        return Subject(subject_hash("patient", in_table, salt), schema.TABLE)
    if in_header is None or sha256 is None:
        return Subject()
    if in_header.startswith(STUDY_PREFIX):
        return Subject(in_header, schema.STUDY)
    is_volume = in_header == volume_hash(sha256, salt)
    return Subject(in_header, schema.VOLUME if is_volume else schema.HEADER)


def read_file(source: Folder, file: FoundFile) -> bytes:
    """A file's bytes.

    Raises:
        RejectedImage: it cannot be read, no longer exists, or changed while being read.
    """
    if file.problem is not None:
        raise RejectedImage(file.problem, file.remedy)
    path = f"{source.path}/{file.path}"
    try:
        with source.filesystem.open_input_file(path) as stream:
            content = bytes(stream.read())
        now = source.filesystem.get_file_info(path)
    except (OSError, UnicodeError, MemoryError) as error:
        if not source.exists():
            raise DataError(
                f"{source} does not exist on node {socket.gethostname()}: make it available on "
                "every node"
            ) from None
        raise RejectedImage(UNREADABLE, type(error).__name__) from None
    if file.mtime_ns and (now.size, now.mtime_ns) != (len(content), file.mtime_ns):
        raise RejectedImage(CHANGED)
    return content


def preprocess_file(
    content: bytes, file: FoundFile, config: PreprocessConfig, salt: bytes
) -> list[dict[str, Any]]:
    """The ``SLICES`` rows of a file: METHOD A, steps 1, 3 and 4, for each of its slices.

    A rejected slice has a row with the reason; the other slices are still processed.

    Raises:
        RejectedImage: the whole file is rejected.
    """
    digest = content_hash(content)
    about_file = {
        "path": file.path,
        "frame": "",
        "sha256": digest,
        "num_bytes": len(content),
        "mtime_ns": file.mtime_ns,
    }
    rows = []
    for decoded in decode_file(content, decode_options(config, salt)):
        row = about_file | {"frame": decoded.frame, "sample_id": sample_id(digest, decoded.frame)}
        try:
            if decoded.rejection is not None:
                raise decoded.rejection
            check_content(decoded.image, min_intensity_std=config.min_intensity_std)
            rows.append(row | _slice_columns(decoded, config))
        except RejectedImage as rejection:
            rows.append(row | {"reason": rejection.reason, "detail": rejection.detail})
    return rows


def rejected_row(
    file: FoundFile, content: bytes | None, rejection: RejectedImage
) -> dict[str, Any]:
    """The ``SLICES`` row of a rejected file; ``content`` is None if it was not read."""
    return {
        "path": file.path,
        "frame": "",
        "sha256": None if content is None else content_hash(content),
        "num_bytes": file.num_bytes if content is None else len(content),
        "mtime_ns": file.mtime_ns,
        "reason": rejection.reason,
        "detail": rejection.detail,
    }


def decode_options(config: PreprocessConfig, salt: bytes) -> DecodeOptions:
    return DecodeOptions(
        min_side=config.min_side,
        max_pixels=config.max_pixels,
        max_voxels=config.volume.max_voxels,
        axis=config.volume.axis,
        window_percentiles=(config.volume.window_low, config.volume.window_high),
        min_foreground=config.volume.min_foreground,
        salt=salt,
    )


def strip(image: NDArray[np.uint8], config: PreprocessConfig) -> StrippedSlice:
    """METHOD A, step 3, after removing the frame if requested."""
    before = without_frame(image) if config.frame == "remove" else image
    mask, method = _mask(before, config.skull_strip)
    return StrippedSlice(before, mask, before if mask is None else apply_mask(before, mask), method)


def _mask(image: NDArray[np.uint8], method: str) -> tuple[NDArray[np.bool_] | None, str]:
    if method == "none":
        return None, method
    if method == "intracranial":
        found = intracranial_mask(image)
        if found.confidence >= MIN_CONFIDENCE:
            return found.mask, method
    return otsu_mask(image), "otsu"


def _slice_columns(decoded: DecodedSlice, config: PreprocessConfig) -> dict[str, Any]:
    """Columns of an accepted slice.

    The thumbnail shows the slice before stripping: fingerprints must not depend on the mask.

    Raises:
        RejectedImage: nothing is left of it, such as of a white page with a frame removed.
    """
    stripped = strip(decoded.image, config)
    image, mask = stripped.after, stripped.mask
    if config.crop == "foreground":
        image = resize.crop_foreground(image, otsu_mask(image) if mask is None else mask)
    if config.intensity == "min_max":
        image = resize.min_max(image)
    shape = resize.letterbox if config.resize == "letterbox" else resize.stretch
    image = shape(image, config.image_size)
    if not image.any():
        raise RejectedImage("blank", "nothing is left after frame, skull and crop")
    height, width = decoded.image.shape
    wide = image.astype(np.int64)
    return {
        "format": decoded.format,
        "header_subject": decoded.subject_id,
        "header_study": decoded.study_id,
        "original_height": height,
        "original_width": width,
        "skull_strip": stripped.method,
        "height": config.image_size,
        "width": config.image_size,
        "pixel_sum": int(wide.sum()),
        "pixel_square_sum": int((wide * wide).sum()),
        "thumbnail": resize.thumbnail(decoded.image).tobytes(),
        "image": image.tobytes(),
    }

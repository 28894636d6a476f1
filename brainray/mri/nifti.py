"""Decode NIfTI volumes: sliced in a chosen plane, shown in radiological convention."""

import gzip
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from brainray.mri.identity import content_hash
from brainray.mri.slices import (
    GZIP,
    MIN_GREYS,
    DecodedSlice,
    DecodeOptions,
    RejectedImage,
    Values,
    foreground_threshold,
    foreground_window,
    in_float32,
    nifti_head,
    replace_non_finite,
    to_square_pixels,
    to_uint8,
    volume_hash,
)

_AXES = ("sagittal", "coronal", "axial")  # of a volume (X, Y, Z) pointing right, front and up
_MAX_EXTENSION_BYTES = 64 * 2**20  # header extensions, such as a complete DICOM header or XML
_MAX_TRAILING_BYTES = 2**20
_MIN_AIR = 0.25  # share of the voxels
_SAMPLED = 4  # stride along each axis for the first check
_INTENT_LABEL = 1002  # NIFTI_INTENT_LABEL


@dataclass(frozen=True)
class _Layout:
    """Contents that a header announces."""

    header_class: type[Nifti1Header]
    shape: tuple[int, ...]  # (X, Y, Z, T)
    num_bytes: int  # of header, extensions and voxels


def decode_nifti(
    content: bytes, options: DecodeOptions, *, maps: bool = False
) -> list[DecodedSlice]:
    """Slice a NIfTI-1 or NIfTI-2 file, `.nii` or `.nii.gz`, of one or several volumes.

    Volumes are reoriented to the closest axes of the patient, without resampling, and shown in
    radiological convention: axial slices with the front up and the patient's right on the left,
    coronal slices likewise with the head up, sagittal slices with the head up, facing left. A file
    with a single slice is shown in its own plane, whatever the chosen one. Pixels are made square.

    Intensities: percentiles of the foreground of each volume map to 0 and 255, so that slices of
    a volume are comparable. Air that is not dark, as in standardised volumes, becomes so. Slices
    with too little foreground and constant volumes of a series are skipped; the slice numbers in
    ``frame`` count from the left, the back and the bottom. A volume of a series that cannot be used
    is listed with its rejection.

    The subject is the file, as the hash of its content. Memory: the uncompressed file, the slices,
    and one volume in double precision.

    Masks and label maps are not scans, and are only decoded with ``maps``.

    Raises:
        RejectedImage: the file has an unsupported type or number of dimensions, is truncated, or
            exceeds a limit; or every volume is blank or a label map, or has non-finite voxels.
        Exception: anything that nibabel raises on corrupt bytes.
    """
    layout = _read_layout(content, options, maps)
    raw = _uncompressed(content, layout.num_bytes)
    header = layout.header_class.from_fileobj(io.BytesIO(raw))
    affine = _usable_affine(header)
    orientation = io_orientation(affine)
    # Voxel size along the reoriented axes X, Y and Z.
    sizes = np.empty(3)
    sizes[orientation[:, 0].astype(int)] = voxel_sizes(affine)

    subject = volume_hash(content_hash(content), options.salt)
    stored = ArrayProxy(io.BytesIO(raw), header)
    slices: list[DecodedSlice] = []
    rejected: dict[str, RejectedImage] = {}
    for number in range(layout.shape[3]):
        part = stored[_volume_index(stored.shape, number)]
        name = f"volume={number}"
        try:
            values = replace_non_finite(in_float32(part).reshape(layout.shape[:3]))
            if not maps:
                _check_greys(values)
                _darken_air(values)
            volume = apply_orientation(values, orientation)
            axis = _slicing_axis(volume.shape, options)
            spacing = _display_spacing(sizes, axis)
            for position, plane in _planes(volume, axis, options):
                shown = to_square_pixels(plane, spacing, options)
                frame = f"{name}/{_AXES[axis]}={position}"
                if layout.shape[3] == 1 and volume.shape[axis] == 1:
                    frame = ""
                slices.append(DecodedSlice(shown, "NIfTI", frame, subject))
        except RejectedImage as rejection:
            rejected[name] = rejection
    if not slices:
        blank = RejectedImage("blank", "no slice shows enough of the head")
        raise next(iter(rejected.values()), blank)
    empty = np.empty((0, 0), np.uint8)
    return slices + [
        DecodedSlice(empty, "NIfTI", name, subject, rejection=rejection)
        for name, rejection in rejected.items()
    ]


def _read_layout(content: bytes, options: DecodeOptions, maps: bool) -> _Layout:
    """Read and check the header only, so that an oversized volume is never decompressed."""
    head = nifti_head(content)
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise RejectedImage("no pixel data", "a NIfTI header with its voxels in an .img file")
    header_class = Nifti2Header if head[4:8] == b"n+2\0" else Nifti1Header
    header = header_class.from_fileobj(io.BytesIO(head), check=False)
    if header.get_data_dtype().kind not in "iuf":
        raise RejectedImage("unsupported data type", "voxels are neither integer nor float")
    if int(header["intent_code"]) == _INTENT_LABEL and not maps:
        raise RejectedImage("no scan", "a label map")
    shape = tuple(int(length) for length in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape += (1,) * (3 - len(shape))
    if len(shape) > 4:
        raise RejectedImage("too many dimensions", f"{len(shape)}, limit 4")
    if min(shape) < 1:
        raise RejectedImage("corrupt or truncated", "no voxels")
    num_voxels = math.prod(shape)
    options.check_num_voxels(num_voxels)
    offset = int(header.get_data_offset())
    if not header.single_vox_offset <= offset <= _MAX_EXTENSION_BYTES:
        raise RejectedImage("corrupt or truncated", "voxels outside the file")
    num_bytes = offset + num_voxels * header.get_data_dtype().itemsize
    shape = shape if len(shape) == 4 else (*shape, 1)
    return _Layout(header_class, shape, num_bytes)


def _check_greys(values: Values) -> None:
    """Reject masks and label maps, which have few distinct values where a scan has hundreds."""
    few = _count_values(values[::_SAMPLED, ::_SAMPLED, ::_SAMPLED]) < MIN_GREYS
    if few and 1 < _count_values(values) < MIN_GREYS:
        raise RejectedImage("no scan", f"fewer than {MIN_GREYS} greys: a mask or label map")


def _count_values(values: Values) -> int:
    return len(np.unique(values))


def _uncompressed(content: bytes, num_bytes: int) -> bytes:
    if content.startswith(GZIP):
        limit = num_bytes + _MAX_TRAILING_BYTES
        # Read up to the end, where the checksum is.
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(limit + 1)
        if len(content) > limit:
            raise RejectedImage("corrupt or truncated", "more bytes than the header announces")
    if len(content) < num_bytes:
        raise RejectedImage("corrupt or truncated", f"{len(content)} of {num_bytes} bytes")
    return content


def _usable_affine(header: Nifti1Header) -> NDArray[np.float64]:
    """The voxel-to-patient matrix: sform, else qform, else from the voxel sizes."""
    candidates = (header.get_sform(coded=True)[0], _qform(header), header.get_base_affine())
    for matrix in candidates:
        if matrix is None:
            continue
        affine = np.asarray(matrix, dtype=np.float64)
        with np.errstate(all="ignore"):
            if np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3:
                return affine
    return np.eye(4)


def _qform(header: Nifti1Header) -> NDArray[np.float64] | None:
    """The matrix of the quaternions; None if they, or its code, are invalid."""
    try:
        return header.get_qform(coded=True)[0]
    except ValueError:  # quaternions longer than 1
        return None


def _volume_index(shape: tuple[int, ...], number: int) -> tuple[slice | int, ...]:
    """Index of one volume of a file of any rank, so that only its voxels are read."""
    if len(shape) <= 3:
        return (slice(None),) * len(shape)
    return (*(slice(None),) * 3, number, *(0,) * (len(shape) - 4))


def _darken_air(volume: Values) -> None:
    """Set air that would count as head to the smallest value, in place.

    Standardised within a mask, as before many networks, a brain has values on both sides of those
    outside of it, which are usually 0. Air is what equals all corners, if a quarter does.
    """
    corners = volume[np.ix_((0, -1), (0, -1), (0, -1))]
    value, darkest = corners.flat[0], volume.min()
    if value > darkest and (corners == value).all():
        air = volume == value
        if air.mean() > _MIN_AIR and value > foreground_threshold(volume):
            volume[air] = darkest


def _slicing_axis(shape: tuple[int, ...], options: DecodeOptions) -> int:
    single = [axis for axis in range(3) if shape[axis] == 1]
    return single[0] if len(single) == 1 else _AXES.index(options.axis)


def _display_spacing(sizes: NDArray[np.float64], axis: int) -> tuple[float, float]:
    across, upwards = np.delete(sizes, axis)
    return float(upwards), float(across)


def _planes(
    volume: Values, axis: int, options: DecodeOptions
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Position and 8-bit image, in display order, of each slice that shows some of the head."""
    if volume.max() <= volume.min():
        return
    threshold = foreground_threshold(volume)
    low, high = foreground_window(volume, options.window_percentiles)
    for position, plane in enumerate(np.moveaxis(volume, axis, 0)):
        if np.count_nonzero(plane > threshold) < options.min_foreground * plane.size:
            continue
        # Rows from the top or the front, columns from the patient's right or front.
        yield position, np.ascontiguousarray(to_uint8(plane[::-1, ::-1].T, low, high))

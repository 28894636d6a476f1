"""Decode DICOM files: every frame is a slice, with the file's window; no header data is kept.

Compressed pixels are decoded by imagecodecs (BSD-3-Clause; libjpeg-turbo, CharLS, OpenJPEG),
which is registered with pydicom as a plug-in; RLE is decoded by pydicom itself. Among pydicom's own
plug-ins, GDCM kills the process on a corrupt stream, and no other plug-in with a permissive licence
reads lossless JPEG, which archives use most.
"""

import importlib.util
import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import Decoder, DecodeRunner, get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from brainray.mri.identity import content_hash
from brainray.mri.slices import (
    STUDY_PREFIX,
    DecodedSlice,
    DecodeOptions,
    RejectedImage,
    Values,
    foreground_window,
    in_float32,
    names_nobody,
    replace_non_finite,
    subject_hash,
    to_square_pixels,
    to_uint8,
    volume_hash,
)

_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NO_SCANS = ("SEG", "RTDOSE")  # modalities whose pixels are drawn or computed
_PLUGIN = "imagecodecs"
_END_OF_IMAGE = b"\xff\xd9"
_START_OF_FRAME = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xF7})  # JPEG and JPEG-LS
_START_OF_J2K = b"\xff\x4f\xff\x51"
_CODING_STYLE = b"\xff\x52\x00"

DECODER_DEPENDENCIES: dict[str, tuple[str, ...]] = dict.fromkeys(
    (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes), (_PLUGIN,)
)
"""Read by pydicom, like `is_available`, when this module is registered as a plug-in."""


def decode_dicom(content: bytes, options: DecodeOptions) -> list[DecodedSlice]:
    """Decode every frame of a DICOM file.

    Stored values are converted to real values (rescale or modality LUT), then to 0..255 by the
    file's window or VOI LUT. If it has none, or all frames would be constant, percentiles of the
    frame's foreground are used instead. If only some would be, such as air at the end of a volume,
    these are listed with a rejection. MONOCHROME1 is inverted, colour is converted to luminance,
    pixels are made square.

    The subject is the patient ID. Without a usable one it is the study, then the series, then, if
    there are several frames, the file. The study is given in any case.

    Raises:
        RejectedImage: there are no pixels, it is not a scan, the pixels may identify the patient,
            the transfer syntax is not supported, or a limit is exceeded.
        Exception: anything that pydicom raises on corrupt bytes; its text may quote the header.
    """
    dataset = _read(content)
    _check_kind(dataset)
    num_frames = _check_announced_size(dataset, options)
    subject, study = _subject(dataset, options.salt), _study(dataset, options.salt)
    if subject is None and num_frames > 1:
        subject = volume_hash(content_hash(content), options.salt)
    slices: list[DecodedSlice] = []
    outside: list[DecodedSlice] = []  # of the window
    for index, (pixels, properties) in enumerate(_frames(dataset, num_frames)):
        image, is_outside = _to_grayscale(pixels, properties, dataset, index, options)
        image = to_square_pixels(image, _spacing(dataset, index), options)
        frame = f"frame={index}" if num_frames > 1 else ""
        shown = DecodedSlice(image, "DICOM", frame, subject, study)
        (outside if is_outside else slices).append(shown)
    num_found = len(slices) + len(outside)
    if num_found != num_frames:
        raise RejectedImage("corrupt or truncated", f"{num_found} of {num_frames} frames")
    if not slices:  # the window may be in other units than the pixels
        return outside
    blank = RejectedImage("blank", "constant in the file's window")
    return slices + [replace(each, rejection=blank) for each in outside]


def _read(content: bytes) -> FileDataset:
    has_preamble = content[128:132] == b"DICM"
    if has_preamble or content[:2] == b"\x02\0":
        # pydicom inflates this syntax without a limit: reject it before pydicom reads the file.
        start = io.BytesIO(content[132:] if has_preamble else content)
        meta = read_dataset(start, False, True, stop_when=lambda tag, *_: tag.group != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise _unsupported(DeflatedExplicitVRLittleEndian, "store the file uncompressed")
    dataset = dcmread(io.BytesIO(content), force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


def _check_kind(dataset: Dataset) -> None:
    if not any(dataset.get(keyword) for keyword in _PIXEL_KEYWORDS):
        if "Rows" in dataset:
            raise RejectedImage("corrupt or truncated", "an image header without pixels")
        raise RejectedImage("no pixel data", "not an image object (report, plan, directory, ...)")
    if dataset.get("Modality") in _NO_SCANS:
        raise RejectedImage("no scan", "a segmentation or dose map")
    kinds = dataset.get("ImageType") or ()
    if "MOSAIC" in kinds:
        raise RejectedImage("no scan", "a mosaic of many slices: convert it to NIfTI")
    has_text = str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES"
    if has_text or "SCREEN SAVE" in kinds:
        raise RejectedImage("burned-in annotation", "the pixels may identify the patient")


def _check_announced_size(dataset: Dataset, options: DecodeOptions) -> int:
    """Check the announced size against the limits and return the number of frames."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    options.check_size(rows, columns)
    if num_frames < 1 or int(dataset.SamplesPerPixel) not in (1, 3):
        raise RejectedImage("corrupt or truncated", "impossible number of frames or samples")
    options.check_num_voxels(rows * columns * num_frames)
    return num_frames


def _subject(dataset: Dataset, salt: bytes) -> str | None:
    patient = str(dataset.get("PatientID") or "").strip()
    if any(letter.isalnum() and letter != "0" for letter in patient) and not names_nobody(patient):
        return subject_hash("patient", patient, salt)
    # A study belongs to one patient and contains several series: prefer it as the wider group.
    return _study(dataset, salt) or _study(dataset, salt, "SeriesInstanceUID")


def _study(dataset: Dataset, salt: bytes, keyword: str = "StudyInstanceUID") -> str | None:
    uid = str(dataset.get(keyword) or "").strip()
    if not re.search("[1-9]", uid):  # empty, 0.0, or a word written by de-identification tools
        return None
    return STUDY_PREFIX + subject_hash("study", uid, salt)


# --- Pixels --------------------------------------------------------------------------------------


def _frames(dataset: FileDataset, num_frames: int) -> Iterator[tuple[NDArray[Any], dict[str, Any]]]:
    """Frames (H, W) or (H, W, 3), each with its pydicom properties."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    plugin = ""
    if syntax in DECODER_DEPENDENCIES:
        # Our own instance: pydicom's decoders are shared, and try GDCM if it is installed.
        decoder = Decoder(syntax)
        decoder.add_plugin(_PLUGIN, (__name__, "decode_frame"))
        plugin = _PLUGIN
    elif syntax == RLELossless:
        decoder = get_decoder(syntax)
        plugin = "pydicom"
    elif syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian):
        bits = int(dataset.get("BitsStored") or 0)
        if int(dataset.get("HighBit") or 0) > bits - 1 > 0:  # pydicom reads the lowest bits
            raise RejectedImage("unsupported data type", "pixels are not stored in the lowest bits")
        decoder = get_decoder(syntax)
    else:
        raise _unsupported(syntax, "store the file uncompressed")
    if not decoder.is_available:
        raise _unsupported(syntax, f"needs: pip install {_PLUGIN}")
    frames = decoder.iter_array(dataset, decoding_plugin=plugin, allow_excess_frames=False)
    return islice(frames, num_frames)


def _unsupported(syntax: UID, remedy: str) -> RejectedImage:
    # An unknown UID is arbitrary text from the file, so it is not quoted.
    name = syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "unknown"
    return RejectedImage("unsupported transfer syntax", f"{name}: {remedy}")


def _to_grayscale(
    pixels: NDArray[Any],
    properties: dict[str, Any],
    dataset: Dataset,
    index: int,
    options: DecodeOptions,
) -> tuple[NDArray[np.uint8], bool]:
    """A frame (H, W), and whether percentiles were used because its window leaves it constant."""
    interpretation = properties["photometric_interpretation"]
    if interpretation == "PALETTE COLOR":
        colours = apply_color_lut(pixels, dataset)
        bits = 8 * colours.dtype.itemsize
        return _luminance(colours, bits=8 if bits > 8 and _keeps_bytes(dataset) else bits), False
    if pixels.ndim == 3:
        return _luminance(pixels, bits=int(properties["bits_stored"])), False
    attributes = _attributes(dataset, "PixelValueTransformationSequence", index)
    real = _rescaled(pixels, attributes)
    values = replace_non_finite(real.astype(np.float32))
    inverted = interpretation == "MONOCHROME1"  # the lowest value is white
    padding = _is_padding(pixels, dataset)
    image = _window(
        _without_padding(values, padding, inverted),
        _attributes(dataset, "FrameVOILUTSequence", index),
    )
    if image is not None and image.max() > image.min():
        image = 255 - image if inverted else image
        if not padding.all():
            image[padding] = 0  # the scan's darkest pixel may be tissue
        return image, False
    values = _without_padding(replace_non_finite(in_float32(real)), padding, inverted)
    shown = -values if inverted else values  # air must be dark for the foreground to be found
    percentiles = foreground_window(shown, options.window_percentiles)
    return to_uint8(shown, *percentiles), image is not None


def _without_padding(values: Values, padding: NDArray[np.bool_], inverted: bool) -> Values:
    """The values, with padding as dark as the darkest pixel of the scan."""
    if padding.any() and not padding.all():
        scanned = values[~padding]
        values[padding] = scanned.max() if inverted else scanned.min()
    return values


def _rescaled(pixels: NDArray[Any], attributes: Dataset) -> NDArray[Any]:
    """Real values; the stored values if slope or intercept is empty, or the slope 0."""
    slope, intercept = (attributes.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    if (not slope or intercept is None) and not attributes.get("ModalityLUTSequence"):
        return pixels
    return np.asarray(apply_modality_lut(pixels, attributes))


def _is_padding(pixels: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Mask (H, W) of pixels outside the scan: the padding value, or the range up to its limit.

    Source: DICOM PS3.3, C.7.5.1.1.2.
    """
    value, limit = (
        _first(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    )
    low, high = sorted((value, value if math.isnan(limit) else limit))
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 1:
        # Written with a different signedness from the pixels: -2000 for 63536.
        held = np.iinfo(pixels.dtype)
        if high < held.min:
            low, high = low + 2.0**held.bits, high + 2.0**held.bits
        elif low > held.max:
            low, high = low - 2.0**held.bits, high - 2.0**held.bits
    return np.asarray((pixels >= low) & (pixels <= high))  # NaN matches nothing


def _keeps_bytes(dataset: Dataset) -> bool:
    """Whether a 16-bit palette only has 8-bit entries, as some software writes it."""
    tables = [
        np.frombuffer(dataset.get(f"{colour}PaletteColorLookupTableData") or b"", np.uint16)
        for colour in ("Red", "Green", "Blue")
    ]
    return max((int(table.max()) for table in tables if len(table)), default=2**16) <= 255


def _luminance(colours: NDArray[Any], *, bits: int) -> NDArray[np.uint8]:
    if bits != 8:
        colours = to_uint8(colours.astype(np.float64), 0.0, 2.0**bits - 1.0)
    return np.asarray(Image.fromarray(colours.astype(np.uint8)).convert("L"))


def _window(values: Values, attributes: Dataset) -> NDArray[np.uint8] | None:
    """Apply the window, or else the VOI LUT; None if neither is usable.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
    centre, width = _first(attributes, "WindowCenter"), _first(attributes, "WindowWidth")
    function = attributes.get("VOILUTFunction") or "LINEAR"
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1.0
    if math.isfinite(centre) and math.isfinite(width) and width > 0.0:
        if function == "SIGMOID":
            exponent = np.clip(-4.0 * (values - centre) / width, -50.0, 50.0)
            image = to_uint8(1.0 / (1.0 + np.exp(exponent)), 0.0, 1.0)
        else:
            image = to_uint8(values, centre - width / 2.0, centre + width / 2.0)
    elif attributes.get("VOILUTSequence"):
        image = _looked_up(values, attributes)
    else:
        return None
    return image


def _looked_up(values: Values, attributes: Dataset) -> NDArray[np.uint8]:
    """Apply the VOI LUT; values outside it map to its first or last entry."""
    table = attributes.VOILUTSequence[0]
    num_entries, first, bits = (int(value) for value in table.LUTDescriptor)
    num_entries = num_entries or 2**16
    stored = table.LUTData
    if isinstance(stored, bytes):
        word = "<u2" if attributes.original_encoding[1] else ">u2"
        # 8-bit entries may be bytes.
        stored = np.frombuffer(stored, word if len(stored) >= 2 * num_entries else np.uint8)
    places = np.clip(values.round() - first, 0, num_entries - 1).astype(np.int64)
    return to_uint8(np.asarray(stored, np.float64)[places], 0.0, 2.0**bits - 1.0)


def _first(attributes: Dataset, keyword: str) -> float:
    """The first of one or several values; NaN if there is none."""
    value = attributes.get(keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return math.nan if value in (None, "") else float(value)


def _spacing(dataset: Dataset, index: int) -> tuple[float, float]:
    """Distance between rows and between columns; in mm, or unitless from the aspect ratio."""
    attributes = _attributes(dataset, "PixelMeasuresSequence", index)
    for keyword in ("PixelSpacing", "PixelAspectRatio"):
        value = attributes.get(keyword)
        if isinstance(value, MultiValue) and len(value) == 2:
            return float(value[0]), float(value[1])
    return 1.0, 1.0


def _attributes(dataset: Dataset, keyword: str, index: int) -> Dataset:
    """The dataset with a frame's attributes: its functional group, the shared one, or the root."""
    for groups, position in (
        ("PerFrameFunctionalGroupsSequence", index),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        items = dataset.get(groups) or []
        if position < len(items) and items[position].get(keyword):
            return items[position][keyword][0]
    return dataset


# --- Plug-in -------------------------------------------------------------------------------------


def is_available(uid: str) -> bool:
    """Whether this plug-in can decode a transfer syntax in this environment; called by pydicom."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec(_PLUGIN) is not None


def decode_frame(source: bytes, runner: DecodeRunner) -> bytearray:
    """Decode one JPEG, JPEG-LS or JPEG 2000 stream; called by pydicom.

    Raises:
        ValueError: the stream does not have the size that the header announces. Decoders allocate
            what the stream announces, which may be far more.
    """
    import imagecodecs

    shape: tuple[int, ...] = (runner.rows, runner.columns)
    syntax = runner.transfer_syntax
    if syntax in JPEG2000TransferSyntaxes:
        source = source[max(source.find(_START_OF_J2K), 0) :]  # some wrap it in a JP2 file
    if _stream_size(source) != shape:
        raise ValueError("frame and header differ in size")
    if syntax in JPEG2000TransferSyntaxes:
        array = imagecodecs.jpeg2k_decode(source)
        # OpenJPEG has reversed the transform.
        if runner.samples_per_pixel == 3 and _has_component_transform(source):
            runner.set_option("photometric_interpretation", "RGB")
    elif syntax in JPEGLSTransferSyntaxes:
        # CharLS may loop forever on a stream without an end marker.
        if not source.rstrip(b"\0").endswith(_END_OF_IMAGE):
            raise ValueError("frame without an end marker")
        array = imagecodecs.jpegls_decode(source)
    else:
        # Keep the stored colour space: the header is more reliable than the stream.
        stored = "RGB" if runner.photometric_interpretation == "RGB" else "YCBCR"
        space = stored if runner.samples_per_pixel == 3 else None
        array = imagecodecs.jpeg8_decode(source, colorspace=space, outcolorspace=space)
    if runner.samples_per_pixel == 3:
        shape = (*shape, 3)
        runner.set_option("planar_configuration", 0)
    if array.shape != shape:
        raise ValueError("frame and header differ in shape")
    runner.set_option("bits_allocated", 8 * array.dtype.itemsize)
    return bytearray(array.tobytes())  # writable, as pydicom corrects signs in place


def _has_component_transform(source: bytes) -> bool:
    """Whether a JPEG 2000 stream stores luminance and colour differences, from its COD marker.

    Source: ISO/IEC 15444-1, A.6.1.
    """
    coding = source.find(_CODING_STYLE)
    return coding >= 0 and source[coding + 8 : coding + 9] != b"\0"


def _stream_size(source: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG, JPEG-LS or JPEG 2000 stream announces."""
    if source.startswith(_START_OF_J2K):
        right, bottom, left, top = struct.unpack_from(">4I", source, 8)
        return bottom - top, right - left
    position = 2
    while position + 9 <= len(source):
        marker, length = source[position + 1], struct.unpack_from(">H", source, position + 2)[0]
        if source[position] != 0xFF:
            return None
        if marker in _START_OF_FRAME:
            return struct.unpack_from(">HH", source, position + 5)
        if marker in (0xFF, 0xD8):  # padding, or SPIFF's second start of image
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + length
    return None

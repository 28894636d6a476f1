"""Handles requests to a served model; imported by MLflow, without Ray."""

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from brainray import layout
from brainray.engine.export import load_safetensors
from brainray.engine.slice_model import Reference, SliceModel
from brainray.errors import BrainrayError
from brainray.mri.slices import RejectedImage
from brainray.orchestration.preprocessing.slice_rows import (
    DECODED,
    UNREADABLE,
    decode_to_predict,
    read_file,
)
from brainray.orchestration.preprocessing.source import FoundFile, SourceFile, printable
from brainray.storage import Folder

REQUIREMENTS = (
    "faiss-cpu",
    "nibabel",
    "numba",
    "numpy",
    "opencv-python-headless",
    "pandas",
    "pillow",
    "psutil",
    "pyarrow",
    "pydantic",
    "pydicom",
    "pyyaml",
    "safetensors",
    "scikit-learn",
    "scipy",
    "threadpoolctl",
    "torch",
    "torchvision",
)
"""Distributions that a served model needs in addition to its own code and MLflow."""


class ServedModel:
    """Predicts image files or bytes; returns the rows that ``jobs/predict.py`` writes."""

    def __init__(self, folder: Path) -> None:
        """``folder`` contains ``model.safetensors`` and optionally ``fitted.parquet``."""
        checkpoint, self._preprocess = load_safetensors(folder / layout.SAFETENSORS)
        self._model = SliceModel(checkpoint, precision="fp32")
        fitted = folder / layout.FITTED
        self._reference = Reference(pq.read_table(fitted) if fitted.exists() else None)
        # Only a hash of a DICOM's patient is computed, and it never leaves this object.
        self._salt = secrets.token_bytes(32)

    def predict(self, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """``PREDICTED_SLICES`` rows in the order of the input, one per slice.

        ``model_input`` has a column ``image`` (bytes of a file), ``path`` (of a file that this
        process can read), or both. With both, the path is only a name unless the image is empty.
        An unreadable image has a row with the reason.

        Raises:
            ValueError: the input has neither column.
        """
        if not {"path", "image"} & set(model_input.columns):  # MLflow has dropped all others
            raise ValueError(
                'nothing to predict: send records with "path" (of a file that the server can read) '
                'or "image" (the bytes of a file, in JSON as base64)'
            )
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        for number, request in enumerate(model_input.to_dict(orient="records")):
            file, content = _requested_file(request, number)
            decoded = decode_to_predict(file, content, self._preprocess, self._salt)
            rows += decoded
            numbers += [number] * len(decoded)
        slices = pa.Table.from_pylist(rows, schema=DECODED)
        slices = slices.append_column("number", pa.array(numbers, pa.int64()))
        predictions = self._model.predict(slices, ["reason", "detail", "number"])
        order = pc.sort_indices(predictions["number"])
        predicted = self._reference.rows(predictions).take(order)
        # As objects, so that missing values stay None, which JSON can represent.
        return pd.DataFrame(predicted.to_pylist(), columns=predicted.column_names, dtype=object)


def _load_pyfunc(path: str) -> ServedModel:
    """MLflow's entry point; it requires this name."""
    return ServedModel(Path(path))


def _requested_file(request: dict[str, Any], number: int) -> tuple[SourceFile, Callable[[], bytes]]:
    """The file named by a request, and a function that reads it."""
    path, image = request.get("path"), request.get("image")
    name = path if isinstance(path, str) and path else f"image {number}"
    content: Callable[[], bytes]
    if isinstance(image, bytes | bytearray | memoryview) and len(image):
        content = partial(bytes, image)
    elif name == path:
        content = partial(_read, path)
    else:
        content = _raise_nothing_to_predict
    return SourceFile(file=FoundFile(printable(name), 0, 0)), content


def _read(path: str) -> bytes:
    try:
        whole = Folder(path if "://" in path else Path(path).expanduser().absolute())
        local = whole.local_path
        if local is not None and local.exists() and not local.is_file():
            raise RejectedImage(UNREADABLE, "not a regular file")
        name = whole.path.rpartition("/")[2]  # without escapes
        return read_file(whole.parent, FoundFile(name, 0, 0))
    except (BrainrayError, OSError, RuntimeError, ValueError) as error:  # unknown ~user, NUL, ...
        raise RejectedImage(UNREADABLE, str(error)) from None


def _raise_nothing_to_predict() -> bytes:
    raise RejectedImage("nothing to predict", "give path or image")

"""Requests to a served model: what is read, and in which order the answers come."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig
from brainray.mri.slices import RejectedImage
from brainray.orchestration.prediction import serving
from brainray.orchestration.prediction.serving import ServedModel, _requested_file
from brainray.orchestration.preprocessing.source import SourceFile
from brainray.schema import FITTED, PREDICTED_SLICES


@pytest.mark.parametrize(
    ("request_", "name", "content"),
    [
        ({"path": "FILE"}, "FILE", b"of the file"),
        ({"image": b"sent"}, "image 3", b"sent"),
        ({"path": "FILE", "image": b"sent"}, "FILE", b"sent"),
        ({"path": "FILE", "image": b""}, "FILE", b"of the file"),
        ({"path": "FILE", "image": math.nan}, "FILE", b"of the file"),
        ({"path": "a name", "image": memoryview(b"sent")}, "a name", b"sent"),
        ({"path": math.nan, "image": b"sent"}, "image 3", b"sent"),
        ({"path": None, "image": None}, "image 3", None),
        ({"path": "", "image": b""}, "image 3", None),
    ],
)
def test_an_image_that_is_sent_is_read_and_a_file_without_one(
    tmp_path: Path, request_: dict[str, Any], name: str, content: bytes | None
) -> None:
    here = str(tmp_path / "1.png")
    Path(here).write_bytes(b"of the file")
    given = {key: here if value == "FILE" else value for key, value in request_.items()}
    file, read = _requested_file(given, 3)
    assert file.path == name.replace("FILE", here)
    if content is None:
        with pytest.raises(RejectedImage, match="nothing to predict"):
            read()
    else:
        assert read() == content


@pytest.mark.parametrize("name", ["a b.png", "a%20b.png", "é#?.png"])
def test_a_file_is_read_by_its_path_or_its_uri(tmp_path: Path, name: str) -> None:
    path = tmp_path / "100%25 of them" / name
    path.parent.mkdir()
    path.write_bytes(b"of the file")
    for given in (str(path), path.as_uri()):
        _, read = _requested_file({"path": given}, 3)
        assert read() == b"of the file"
    _, read = _requested_file({"path": path.parent.as_uri()}, 3)
    with pytest.raises(RejectedImage, match="unreadable file"):
        read()


def test_answers_are_in_the_order_of_the_requests_and_of_the_slices_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeModel:
        """Returns rejected slices after the others, as the model does."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def predict(self, slices: pa.Table, keep: list[str]) -> pa.Table:
            known = {name: slices[name] for name in ("path", "frame", "sample_id", *keep)}
            fields = [*PREDICTED_SLICES, FITTED.field("coordinates"), pa.field("head", pa.string())]
            for field in fields:
                known.setdefault(field.name, pa.nulls(slices.num_rows, field.type))
            return pa.table(known).sort_by([("reason", "ascending")])

    def decode(file: SourceFile, *_: Any) -> list[dict[str, Any]]:
        reason = "not an image" if file.path == "b" else None
        frames = ["frame=0", "frame=1"] if file.path == "c" else [""]
        return [{"path": file.path, "frame": frame, "reason": reason} for frame in frames]

    monkeypatch.setattr(serving, "load_safetensors", lambda _: (None, PreprocessConfig()))
    monkeypatch.setattr(serving, "SliceModel", FakeModel)
    monkeypatch.setattr(serving, "decode_to_predict", decode)
    answers = ServedModel(tmp_path).predict(pd.DataFrame({"path": ["d", "b", "c", "a"]}))
    assert list(zip(answers["path"], answers["frame"], strict=True)) == [
        *[("d", ""), ("b", ""), ("c", "frame=0"), ("c", "frame=1"), ("a", "")]
    ]
    assert answers["reason"].tolist() == [None, "not an image", None, None, None]

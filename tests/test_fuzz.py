"""Hostile files end in a result or a BrainrayError, whatever their bytes: found by Hypothesis.

A few hundred inputs in `make test`, over 100,000 in `make test-faults`.
"""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Image
from PIL import Image

from brainray.config_text import known_keys, load_config
from brainray.errors import BrainrayError, DataError
from brainray.layout import MANIFEST, RUN, RUN_FORMAT, STORE_FORMAT
from brainray.mri.decode import decode_file
from brainray.mri.slices import RejectedImage
from brainray.orchestration.manifest import Manifest
from brainray.orchestration.preprocessing.source import list_source
from brainray.orchestration.records import Record
from brainray.orchestration.run import Run, RunRecord
from brainray.orchestration.store import ImageStore, describe
from brainray.schema import TRAIN
from brainray.storage import Folder
from tests.mri.decoding import OPTIONS
from tests.mri.test_dicom import make_dicom

RAMP = np.tile(np.arange(24, dtype=np.uint8) * 10, (20, 1))

AMOUNTS = [pytest.param("few"), pytest.param("many", marks=pytest.mark.faults)]


def fuzz(amount: str, strategy: st.SearchStrategy[Any], few: int, many: int, work: Any) -> None:
    """Call ``work`` with so many values; the first that raises anything is shrunk and shown."""
    run = given(strategy)(work)
    settings(
        max_examples=few if amount == "few" else many,
        deadline=None,
        database=None,
        derandomize=amount == "few",  # make test gives the same answer every time
        suppress_health_check=list(HealthCheck),
    )(run)()


def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; None where it is refused in one line."""
    try:
        return work(*arguments)
    except (BrainrayError, RejectedImage) as refusal:
        check_one_line(str(refusal))
        return None


def check_one_line(text: str) -> None:
    assert text
    assert "\n" not in text


def picture(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, file_format)
    return buffer.getvalue()


def pages() -> bytes:
    buffer = io.BytesIO()
    first, second = Image.fromarray(RAMP), Image.fromarray(RAMP[::-1])
    first.save(buffer, "TIFF", save_all=True, append_images=[second], compression="tiff_lzw")
    return buffer.getvalue()


def nifti(compressed: bool) -> bytes:
    volume = np.random.default_rng(0).integers(0, 200, (18, 17, 3)).astype(np.int16)
    content = Nifti1Image(volume, np.eye(4)).to_bytes()
    if not compressed:
        return bytes(content)
    import gzip

    return gzip.compress(content)


SEEDS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: picture("JPEG"),
    "PNG": lambda: picture("PNG"),
    "TIFF": lambda: picture("TIFF"),
    "TIFF stack": pages,
    "BMP": lambda: picture("BMP"),
    "GIF": lambda: picture("GIF"),
    "DICOM": lambda: make_dicom(np.tile(np.arange(24, dtype=np.uint16) * 99, (20, 1))),
    "NIfTI": lambda: nifti(compressed=False),
    "NIfTI.gz": lambda: nifti(compressed=True),
}

INTERESTING_BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
]


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut, and with bytes replaced, inserted, taken out or repeated."""
    place = st.integers(0, len(content)) | st.integers(0, min(400, len(content)))
    edit = st.tuples(
        place,
        st.integers(0, 8),
        st.sampled_from(INTERESTING_BYTES) | st.binary(min_size=1, max_size=8),
    )

    def apply(edits: list[tuple[int, int, bytes]], length: int) -> bytes:
        changed = bytearray(content)
        for start, replaced, inserted in edits:
            changed[start : start + replaced] = inserted
        return bytes(changed[:length])

    lengths = st.just(len(content) + 99) | st.integers(0, len(content))
    return st.builds(apply, st.lists(edit, max_size=6), lengths)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("name", SEEDS)
def test_damaged_images_are_decoded_or_rejected(name: str, amount: str) -> None:
    def decode(content: bytes) -> None:
        for one in attempt(decode_file, content, OPTIONS) or []:
            assert one.image.dtype == np.uint8
            assert one.image.ndim == 2
            assert one.image.size <= OPTIONS.max_voxels

    seed = SEEDS[name]()
    decode_file(seed, OPTIONS)
    fuzz(amount, damaged(seed), 40, 9_000, decode)


FRAGMENTS = [
    *("\n", "\n  ", "\n- ", ": ", "a", "train:", "seed", "[", "]", "{", "}", ",", "&x ", "*x"),
    *("!!python/object:os.system ", "!!binary ", "!!timestamp ", "!!set ", "!x ", "%YAML 9.9\n"),
    *("2024-13-45", "2024-01-01T99:99:99", "0b", "0x", "1_", "1e999", ".inf", ".nan", "~", "<<"),
    *(
        "'",
        '"',
        '"\\x',
        '"\\U00110000"',
        "|",
        ">",
        "\t",
        "\0",
        "\x85",
        "\ud800",
        "9" * 5000,
        "--- ",
    ),
    *("? ", "-1:59:59", "=", "#", " #", "null", "true", "num_epochs: ", "tune:", "space:", "map: "),
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def tree_of(entries: dict[str, Any]) -> str:
    tree: dict[str, Any] = {}
    for key, value in entries.items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return str(yaml.safe_dump(tree))


YAMLS = (
    st.binary(max_size=60)
    | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
    )
    | st.dictionaries(st.sampled_from(known_keys()), PLAIN, max_size=4).map(
        lambda entries: tree_of(entries).encode()
    )
)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_config_file_is_read_or_explained_in_one_line(amount: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    def load(content: bytes) -> None:
        path.write_bytes(content)
        attempt(load_config, path)

    fuzz(amount, YAMLS, 60, 12_000, load)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_an_override_is_applied_or_explained_in_one_line(amount: str) -> None:
    values = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join) | st.text(max_size=20)
    overrides = st.builds(
        "{}={}".format, st.sampled_from(known_keys()) | st.text(max_size=8), values
    )

    def load(override: str) -> None:
        attempt(load_config, None, [override])

    fuzz(amount, overrides, 40, 6_000, load)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
WHOLE_MANIFEST: dict[str, Any] = {
    "format": STORE_FORMAT,
    "name": "mri",
    "source": "/data/mri",
    "generation": 0,
    "seconds": {"decode": 1.5},
    "listing": "abc",
    "num_files": 8,
    "num_files_decoded": 8,
    "num_ignored_files": 1,
    "num_rejected": 2,
    "rejected_reasons": {"unreadable": 2},
    "num_removed_copies": 0,
    "preprocess": {"image_size": 64},
    "split": {"mode": "official"},
    "classes_map": {},
    "decode_version": 1,
    "skull_strip_used": {"otsu": 6},
    "subject_salt": "0123",
    "classes": ["a", "b"],
    "pixel_mean": 0.2,
    "pixel_std": 0.1,
    "data_hash": "abc",
    "slices_hash": "def",
    "num_slices": {"train": {"a": 3, "": 2}, "test": {"a": 1}},
}

WHOLE_RUN: dict[str, Any] = {
    "format": RUN_FORMAT,
    "name": "a",
    "dataset": "mri",
    "data_hash": "abc",
    "classes": ["a", "b"],
    "preprocess": {"image_size": 64},
    "versions": {"decode_version": 1},
    "subject_salt": "0123",
    "num_slices": {"labelled": 3},
}


def changed_json(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """The object with other values, or without some; or its text damaged."""
    values = st.dictionaries(st.sampled_from(sorted(whole)), JSON, max_size=2)
    gone = st.sets(st.sampled_from(sorted(whole)), max_size=2)

    def build(new: dict[str, Any], without: set[str]) -> bytes:
        merged = {key: value for key, value in (whole | new).items() if key not in without}
        return json.dumps(merged).encode()

    return (
        st.builds(build, values, gone)
        | damaged(json.dumps(whole).encode())
        | JSON.map(lambda value: json.dumps(value).encode())
    )


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_manifest_is_read_or_explained_in_one_line(amount: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)

    def read(content: bytes) -> None:
        (tmp_path / MANIFEST).write_bytes(content)
        store = attempt(ImageStore.open, folder)
        if store is None:
            return
        assert math.isfinite(store.manifest.pixel_mean)
        assert store.manifest.pixel_std > 0
        assert TRAIN in store.manifest.num_slices
        assert describe(store).count("skull strip") == 1
        store.manifest.write(folder)
        assert ImageStore.open(folder) == store

    read(json.dumps(WHOLE_MANIFEST | {"format": "\n"}).encode())
    read(json.dumps(WHOLE_MANIFEST).encode())
    ImageStore.open(folder)
    fuzz(amount, changed_json(WHOLE_MANIFEST), 40, 6_000, read)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_the_record_of_a_run_is_read_or_explained_in_one_line(amount: str, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        (tmp_path / RUN).write_bytes(content)
        run = attempt(Run.open, folder)
        if run is None:
            return
        assert run.record.format == RUN_FORMAT
        run.record.write(folder)
        assert Run.open(folder) == run

    folder = Folder(tmp_path)
    read(json.dumps(WHOLE_RUN | {"format": "\n"}).encode())
    read(json.dumps(WHOLE_RUN).encode())
    Run.open(folder)
    fuzz(amount, changed_json(WHOLE_RUN), 30, 3_000, read)


@pytest.mark.parametrize(
    ("record", "whole", "key"),
    [
        (Manifest, WHOLE_MANIFEST, "decode_version"),
        (RunRecord, WHOLE_RUN, "versions"),
        (RunRecord, WHOLE_RUN, "subject_salt"),
    ],
)
def test_a_record_without_the_versions_or_salt_of_its_slices_is_damaged(
    record: type[Record], whole: dict[str, Any], key: str, tmp_path: Path
) -> None:
    without = {name: value for name, value in whole.items() if name != key}
    (tmp_path / record.FILE).write_text(json.dumps(without))
    with pytest.raises(DataError, match=rf"is damaged \({key}: Field required\)"):
        record.read(Folder(tmp_path))


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_labels_table_is_read_or_explained_in_one_line(
    kind: str, amount: str, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "source" / name).write_bytes(b"x")
    source, path = Folder(tmp_path / "source"), tmp_path / f"labels.{kind}"
    columns = {"path": ["1.jpg", "2.jpg"], "label": ["a", None], "split": ["train", "test"]}
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
        contents = damaged(path.read_bytes())
    else:
        cells = st.sampled_from(
            ["1.jpg", "2.jpg", "../1.jpg", "a", "train", "test", '"', "\n", ",", "\0", "\xff", ""]
        )
        rows = st.lists(cells, max_size=12).map(",".join)
        heads = st.sampled_from(["path,label\n", "path,label,split,subject\n", "path,path\n", ""])
        texts = st.builds("{}{}".format, heads, rows).map(lambda text: text.encode("latin-1"))
        contents = texts | damaged(b"path,label,split\n1.jpg,a,train\n2.jpg,,test\n")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        listing = attempt(list_source, source, Folder(path), {})
        if listing is not None:
            assert {file.path for file in listing.files} == {"1.jpg", "2.jpg"}

    fuzz(amount, contents, 40, 3_000, read)

"""The settings of a store that exists, and a config that names it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from brainray.config import PreprocessConfig, SplitConfig
from brainray.config_text import load_config, parse_config
from brainray.errors import ConfigError, DataError
from brainray.mri import subjects
from brainray.orchestration.manifest import Manifest, settings_of, versions_of
from brainray.orchestration.records import differing_settings, with_defaults
from brainray.orchestration.store import (
    ImageStore,
    as_store_was_made,
    read_images,
)
from brainray.storage import Folder

SPLIT = {"mode": "grouped", "test_fraction": 0.25, "seed": 3}


def made(folder: Path, **settings: Any) -> ImageStore:
    preprocess = PreprocessConfig(resize="letterbox", image_size=128, **settings)
    manifest = Manifest.model_construct(
        preprocess=preprocess, split=SPLIT, classes_map={"tumor": "glioma"}
    )
    return ImageStore(Folder(folder), manifest)


def test_what_a_config_leaves_out_is_as_the_store_was_made(tmp_path: Path) -> None:
    config = as_store_was_made(load_config(None, ["split.labelled_fraction=0.1"]), made(tmp_path))
    assert (config.preprocess.resize, config.preprocess.image_size) == ("letterbox", 128)
    assert (config.split.mode, config.split.test_fraction) == ("grouped", 0.25)
    assert (config.split.labelled_fraction, config.split.seed) == (0.1, 0)
    # A trial of a sweep and a saved config.yaml say all of it themselves.
    stored = parse_config(config.model_dump(mode="json"))
    assert as_store_was_made(stored, made(tmp_path)) == config


def test_a_damaged_part_is_named_in_the_error(tmp_path: Path) -> None:
    store = made(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 64), np.uint8)
    ids = [f"{number:02d}" for number in range(20)]
    columns = {"split": ["train"] * 20, "sample_id": ids, "height": [8] * 20, "width": [8] * 20}
    table = pa.table(columns | {"image": [row.tobytes() for row in pixels]})
    store.folder.write_table("images/part-0.parquet", table)
    assert read_images(store.folder, ["07"], "train", 8).ravel().tolist() == pixels[7].tolist()
    file = tmp_path / "images" / "part-0.parquet"
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"images/part-0\.parquet cannot be read, it may be damag"):
        read_images(store.folder, ["07"], "train", 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split.mode=official", r"\(split\.mode: grouped here, official requested\)"),
        ("split.test_fraction=0.2", r"test_fraction: 0\.25 here, 0\.2 requested"),
        ("classes.map.tumor=meningioma", r"classes\.map\.tumor: glioma here, meningioma requested"),
        ("preprocess.resize=stretch", r"preprocess\.resize: letterbox here, stretch requested"),
    ],
)
def test_what_it_says_otherwise_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_store_was_made(load_config(None, [override]), made(tmp_path))


def test_a_config_may_name_some_settings_of_a_section_which_a_store_may_lack(
    tmp_path: Path,
) -> None:
    """A manifest of before ``min_foreground``, whose default is 0.05."""
    store = made(tmp_path, volume={"axis": "coronal"})
    config = as_store_was_made(load_config(None, ["preprocess.volume.min_foreground=0.05"]), store)
    volume = config.preprocess.volume
    assert (volume.axis, volume.min_foreground) == ("coronal", 0.05)
    with pytest.raises(
        ConfigError, match=r"\(preprocess\.volume\.min_foreground: 0\.05 here, 0\.2"
    ):
        as_store_was_made(load_config(None, ["preprocess.volume.min_foreground=0.2"]), store)


def test_a_store_with_other_slices_than_expected_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.model_construct(data_hash="0123")
    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr(Manifest, "read", lambda _: manifest)
    for expected in (None, "0123"):
        assert ImageStore.open(Folder(tmp_path), expected).manifest is manifest
    with pytest.raises(DataError, match=r"has changed \(hash 4567 before, 0123 now\)"):
        ImageStore.open(Folder(tmp_path), "4567")


def test_a_class_that_is_ignored_differs_from_one_that_is_not_mentioned() -> None:
    assert differing_settings({"map": {}}, {"map": {"other": None}}) == (
        "map.other: unset here, None requested"
    )
    assert differing_settings({"map": {"other": None}}, {"map": {"other": None}}) == ""


def test_images_are_those_of_the_split_as_often_as_they_are_asked_for(tmp_path: Path) -> None:
    store = made(tmp_path)
    pixels = np.arange(3 * 32, dtype=np.uint8).reshape(3, 32)
    columns = {"split": ["train", "test", "train"], "sample_id": ["a", "a", "b"]}
    sizes = {"height": [4] * 3, "width": [8] * 3}
    images = {"image": [row.tobytes() for row in pixels]}
    store.folder.write_table("images/part-0.parquet", pa.table(columns | sizes | images))
    found = read_images(store.folder, ["b", "a", "b"], "train", 4)[:, 0, :, 0]
    firsts = [row.reshape(4, 8)[:, :2].mean(axis=1) for row in pixels[[2, 0, 2]]]
    np.testing.assert_allclose(found, firsts, atol=0.5)
    (tested,) = read_images(store.folder, ["a"], "test", 4)[:, 0, :, 0]
    np.testing.assert_allclose(tested, pixels[1].reshape(4, 8)[:, :2].mean(axis=1), atol=0.5)


@pytest.mark.parametrize(
    ("sources", "version", "is_outdated"),
    [
        (["header", "estimated"], subjects.VERSION - 1, True),
        (["header", "estimated"], subjects.VERSION, False),
        (["header", None], subjects.VERSION - 1, False),
    ],
)
def test_subjects_are_outdated_if_another_version_estimated_them(
    tmp_path: Path, sources: list[str | None], version: int, is_outdated: bool
) -> None:
    manifest = Manifest.model_construct(subject_version=version, preprocess=PreprocessConfig())
    store = ImageStore(Folder(tmp_path), manifest)
    rows = pa.table({"subject_source": pa.array(sources, pa.string())})
    store.folder.write_table("images/part-0.parquet", rows)
    assert store.has_outdated_subjects() is is_outdated


def test_only_a_drawn_split_depends_on_its_size_and_seed() -> None:
    preprocess, split = PreprocessConfig(), SplitConfig(test_fraction=0.3, seed=4)
    given, drawn = (settings_of(preprocess, split, {}, drawn=drawn) for drawn in (False, True))
    assert given["split"] == {"mode": split.mode}
    assert drawn["split"] == {"mode": split.mode, "test_fraction": 0.3, "seed": 4}
    assert "files_per_task" not in given["preprocess"]
    assert set(versions_of(preprocess)) == {"decode_version"}
    assert set(versions_of(PreprocessConfig(skull_strip="intracranial"))) == {
        "decode_version",
        "intracranial_version",
    }


def test_settings_that_one_side_lacks_are_told_only_if_nothing_else_differs() -> None:
    stored, wanted = {"a": {"b": 1}, "old": 2}, {"a": {"b": 3}}
    assert differing_settings(stored, wanted) == "a.b: 1 here, 3 requested"
    assert differing_settings({"old": 2}, {}) == "old: 2 here, unset requested"


def test_settings_of_an_earlier_version_are_as_stored_as_far_as_they_exist() -> None:
    stored = {"a": {"b": 1, "old": 2}, "old": {"b": 3}}
    defaults = {"a": {"b": 0, "c": 5}, "d": 6}
    expected = {"a": {"b": 1, "c": 5}, "d": 6}
    assert with_defaults(stored, defaults) == expected

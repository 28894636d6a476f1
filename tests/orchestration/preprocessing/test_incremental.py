"""A second run decodes what is new, and moves nothing that is old."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from brainray.errors import ConfigError, DataError
from brainray.mri.phantom import write_phantoms
from brainray.mri.split import draw_roles
from brainray.orchestration.preprocessing import driver
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.store import ImageStore
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module", autouse=True)
def without_figures() -> Iterator[None]:
    """Drawing takes most of the time, and nothing here looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "draw_figures", lambda *_: None)
        yield


def made(storage: Path, source: Path, *overrides: str) -> ImageStore:
    return preprocess(tiny_config(storage, "name=mri", f"source={source}", *overrides))


def pixels(store: ImageStore) -> dict[str, bytes]:
    table = store.folder.read_table("images", ["path", "image"])
    return dict(zip(table["path"].to_pylist(), table["image"].to_pylist(), strict=True))


def index(store: ImageStore) -> pd.DataFrame:
    return store.index(thumbnails=True).to_pandas().set_index("path").sort_index()


@pytest.fixture(scope="module")
def stores(
    phantoms: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Storage of a store made with the official split, and with one of our own."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in ("official", "grouped")}
    for mode, folder in folders.items():
        made(folder, phantoms, f"split.mode={mode}")
    return folders


@pytest.fixture
def source(phantoms: Path, stores: dict[str, Path], tmp_path: Path) -> Path:
    """A source that changes, beside ``a``, the storage of its store."""
    folder = tmp_path / "source"
    shutil.copytree(phantoms, folder)
    shutil.copytree(stores["official"], tmp_path / "a")
    return folder


def opened(storage: Path) -> ImageStore:
    return ImageStore.open(Folder(storage) / "datasets" / "mri")


def grow(source: Path) -> set[str]:
    """Add four slices; touch one, rename one, and replace one by other bytes."""
    write_phantoms(
        source.parent / "more", num_training_per_class=1, num_testing_per_class=0, seed=9, size=64
    )
    new = set()
    for path in sorted((source.parent / "more" / "Training").rglob("*.jpg")):
        target = source / "Training" / path.parent.name / f"new-{path.name}"
        shutil.copy(path, target)
        new.add(str(target.relative_to(source)))
    folder = source / "Training" / "notumor"
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("new-"))
    os.utime(files[0], (1, 1))
    files[1].rename(files[1].with_name("renamed.jpg"))
    return new


def test_only_new_bytes_are_decoded_and_the_store_is_as_if_made_anew(
    source: Path, tmp_path: Path
) -> None:
    before = opened(tmp_path / "a")
    assert before.manifest.num_files_decoded == before.manifest.num_files
    new = grow(source)
    after = made(tmp_path / "a", source)
    assert after.manifest.num_files_decoded == len(new)
    fresh = made(tmp_path / "b", source)
    assert pixels(after) == pixels(fresh)
    same = ["sample_id", "label", "split", "duplicate_group_id", "thumbnail", "num_bytes"]
    pd.testing.assert_frame_equal(index(after)[same], index(fresh)[same])
    for key in ("pixel_mean", "pixel_std", "num_slices", "num_removed_copies"):
        assert getattr(after.manifest, key) == getattr(fresh.manifest, key), key
    assert not (tmp_path / "a" / "datasets" / ".mri.replaced").exists()


def test_a_store_that_a_run_goes_on_with_is_not_replaced_by_other_slices(
    source: Path, tmp_path: Path
) -> None:
    before = opened(tmp_path / "a")
    config = tiny_config(tmp_path / "a", "name=mri", f"source={source}")
    touched = next((source / "Training").rglob("*.jpg"))
    os.utime(touched, (1, 1))
    was = before.manifest.data_hash
    assert preprocess(config, data_hash=was).manifest.data_hash == was
    grow(source)
    with pytest.raises(
        ConfigError, match=r"the image store .* was left unchanged: update it with jobs/pre"
    ):
        preprocess(config, data_hash=was)
    assert index(opened(tmp_path / "a")).equals(index(before))


@pytest.mark.parametrize("mode", ["official", "grouped"])
def test_old_slices_keep_split_group_and_role(
    source: Path, stores: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    before = index(opened(stores[mode]))
    grow(source)
    shutil.copytree(stores[mode], tmp_path / mode)
    after = index(made(tmp_path / mode, source, f"split.mode={mode}"))
    keys = ["sample_id", "split"]
    old = before.set_index(keys).sort_index()
    now = after.set_index(keys).sort_index()
    assert set(old.index) <= set(now.index)
    for column in (
        "duplicate_group_id",
        "draw_group_id",
        "kin_group_id",
        "split_group_id",
        "generation",
    ):
        pd.testing.assert_series_equal(old[column], now.loc[old.index, column])
    assert set(now.drop(old.index)["generation"]) == {1}
    for fraction in (0.2, 0.5):
        roles = [
            dict(
                zip(
                    train["sample_id"],
                    draw_roles(
                        train["label"].tolist(),
                        train["draw_group_id"].tolist(),
                        train["generation"].tolist(),
                        related_groups=train["kin_group_id"].tolist(),
                        labelled_fraction=fraction,
                        validation_fraction=0.2,
                        seed=0,
                    ),
                    strict=True,
                )
            )
            for train in (frame[frame["split"] == "train"] for frame in (before, after))
        ]
        assert roles[0].items() <= roles[1].items()


@pytest.mark.parametrize(("side", "every"), [("test", 1), ("train", 2)])
def test_slices_that_were_away_come_back_to_their_side_of_the_split(
    source: Path, stores: dict[str, Path], tmp_path: Path, side: str, every: int
) -> None:
    shutil.copytree(stores["grouped"], tmp_path / "g")
    before = index(opened(tmp_path / "g"))
    away = [path for path, split in before["split"].items() if split == side][::every]
    for path in away:
        (source / path).rename(tmp_path / path.replace("/", "-"))
    without = index(made(tmp_path / "g", source, "split.mode=grouped"))
    assert not set(without.index) & set(away)
    for path in away:
        (tmp_path / path.replace("/", "-")).rename(source / path)
    after = index(made(tmp_path / "g", source, "split.mode=grouped"))
    assert set(after.loc[away, "split"]) == {side}
    # So do those of a label draw, so that a run goes on with the same labels.
    assert opened(tmp_path / "g").manifest.data_hash == opened(stores["grouped"]).manifest.data_hash


def test_a_subject_that_is_corrected_comes_apart(phantoms: Path, tmp_path: Path) -> None:
    paths = sorted(str(path.relative_to(phantoms)) for path in phantoms.rglob("*.jpg"))

    def made_with(subjects: list[str]) -> pd.DataFrame:
        table = pd.DataFrame({"path": paths, "subject": subjects})
        table["label"] = [path.split("/")[1] for path in paths]
        table.to_csv(tmp_path / "labels.csv", index=False)
        labels = f"labels={tmp_path / 'labels.csv'}"
        return index(made(tmp_path / "storage", phantoms, labels, "split.mode=grouped"))

    wrong = made_with([path.split("/")[1] for path in paths])
    assert wrong["draw_group_id"].nunique() <= 4
    right = made_with([f"{path.split('/')[1]}{row % 5}" for row, path in enumerate(paths)])
    kept, subjects = right["draw_group_id"], right["subject_id"]
    assert kept.nunique() > 4
    assert (kept.groupby(subjects).nunique() == 1).all()


def test_an_old_store_whose_splits_have_no_generation_keeps_its_draws(
    source: Path, tmp_path: Path
) -> None:
    before = index(opened(tmp_path / "a"))
    folder = Folder(tmp_path / "a" / "datasets" / "mri")
    splits = folder.read_table("splits.parquet")
    folder.write_table("splits.parquet", splits.drop_columns("generation"))
    new = grow(source)
    after = index(made(tmp_path / "a", source))
    assert set(after.loc[sorted(new), "generation"]) == {1}
    old = after.set_index(["sample_id", "split"])["generation"]
    assert set(old.loc[list(zip(before["sample_id"], before["split"], strict=True))]) == {0}


def test_a_store_is_not_replaced_by_one_of_another_source(source: Path, tmp_path: Path) -> None:
    before = index(made(tmp_path / "a", source))
    write_phantoms(
        tmp_path / "others", num_training_per_class=3, num_testing_per_class=1, seed=9, size=64
    )
    for settings in ([], ["split.mode=grouped"]):  # which would also be refused
        with pytest.raises(DataError, match=r"others has 0 of its \d+ files: choose another name"):
            made(tmp_path / "a", tmp_path / "others", *settings)
    source.rename(tmp_path / "moved")
    pd.testing.assert_frame_equal(index(made(tmp_path / "a", tmp_path / "moved")), before)


def test_new_labels_need_no_decoding(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    paths = sorted((source / "Training").rglob("*.jpg"))
    for number, path in enumerate(paths):
        shutil.copy(path, bare / f"{number:03d}.jpg")
    table = tmp_path / "labels.csv"
    names = [path.parent.name for path in paths]

    def labelled(count: int) -> ImageStore:
        rows = [f"{number:03d}.jpg,{name}" for number, name in enumerate(names[:count])]
        table.write_text("\n".join(["path,label", *rows]) + "\n")
        return made(tmp_path / "b", bare, f"labels={table}")

    before = labelled(20)
    first = index(before)
    again = labelled(40)
    # A warm-up and features, which read no label, are found again.
    assert again.manifest.slices_hash == before.manifest.slices_hash
    assert again.manifest.data_hash != before.manifest.data_hash
    assert again.manifest.num_files_decoded == 0
    assert first["label"].notna().sum() < index(again)["label"].notna().sum()
    # What was held out before somebody labelled more of it is held out still.
    pd.testing.assert_series_equal(
        *(table.set_index("sample_id")["split"].sort_index() for table in (first, index(again)))
    )


def test_a_store_from_before_a_setting_came_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a" / "datasets" / "mri")
    manifest = folder.read_json("manifest.json")
    del manifest["preprocess"]["frame"]  # came later than the first stores
    folder.write_json("manifest.json", manifest)
    (source / "Training" / "glioma" / "copied.jpg").unlink()
    assert made(tmp_path / "a", source).manifest.preprocess.frame == "keep"
    with pytest.raises(ConfigError, match=r"preprocess\.frame: keep here, remove requested"):
        made(tmp_path / "a", source, "preprocess.frame=remove")


def test_a_rejected_file_is_read_again(source: Path, tmp_path: Path) -> None:
    folder = source / "Training" / "notumor"
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    assert made(tmp_path / "a", source).manifest.num_rejected == 1
    shutil.copy(sorted(folder.glob("notumor_*.jpg"))[0], folder / "copy.jpg")
    after = made(tmp_path / "a", source)
    assert after.manifest.num_files_decoded == 1  # the copy's bytes are known


def test_a_file_that_stays_unreadable_is_not_waited_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = source / "Training" / "notumor" / "broken.jpg"
    broken.symlink_to(source / ".away.jpg")
    assert made(tmp_path / "a", source).manifest.num_rejected == 1
    capsys.readouterr()
    made(tmp_path / "a", source)
    assert "up to date (same settings and files), reusing it" in capsys.readouterr().out
    # What is there again, with the size and time that it had, is read.
    content = next((source / "Training" / "glioma").glob("*.jpg")).read_bytes()
    (source / ".away.jpg").write_bytes(content)
    assert made(tmp_path / "a", source).manifest.num_rejected == 0


def test_more_files_may_be_rejected_than_when_the_store_was_made(
    source: Path, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "a" / "datasets" / "mri")
    before = opened(tmp_path / "a")
    manifest = folder.read_json("manifest.json")
    manifest["preprocess"]["max_rejected_fraction"] = 0.5  # as earlier versions wrote it
    folder.write_json("manifest.json", manifest)
    for number in range(90):
        (source / "Training" / "notumor" / f"broken{number}.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(DataError, match=r"more than preprocess\.max_rejected_fraction=0\.5"):
        made(tmp_path / "a", source)
    after = made(tmp_path / "a", source, "preprocess.max_rejected_fraction=0.9")
    assert after.manifest.data_hash == before.manifest.data_hash


def test_test_slices_are_found_where_they_are_now(source: Path, tmp_path: Path) -> None:
    before, paths = opened(tmp_path / "a"), opened(tmp_path / "a").test_paths()
    (source / "Testing").rename(source / "test")
    after = made(tmp_path / "a", source)
    assert after.manifest.data_hash == before.manifest.data_hash
    assert after.test_paths() == {path.replace("Testing/", "test/", 1) for path in paths} != paths


@pytest.mark.parametrize("has_table", [False, True])
def test_a_slice_without_a_split_is_refused_before_decoding(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_table: bool
) -> None:
    monkeypatch.setattr(driver, "_decode_all", Mock(side_effect=AssertionError))
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)
    (source / "DICOMDIR").write_bytes(bytes(128) + b"DICM")  # of no use, and does no harm
    settings = []
    if has_table:
        paths = [path.relative_to(source) for path in sorted(source.rglob("*.jpg"))]
        rows = [f"{path},a,{path.parts[0] if n else ''}" for n, path in enumerate(paths)]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
        settings = [f"labels={tmp_path}/labels.csv"]
        message = "has no split, which others have: give every row of the labels table a split"
    else:
        shutil.copy(next(source.rglob("*.jpg")), source / "cover.jpg")
        message = r"^cover\.jpg has no split, which others have: move it into the folder of a split"
    with pytest.raises(DataError, match=message):
        made(tmp_path / "new", source, *settings)
    if not has_table:
        (source / "cover.jpg").unlink()
        with pytest.raises(AssertionError):  # decoding has begun
            made(tmp_path / "new", source)


def test_a_store_below_its_source_is_not_read_as_slices(source: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "a", source / "out")
    folder = source / "out" / "datasets" / "mri" / "figures"
    folder.mkdir()
    shutil.copy(next(source.rglob("*.jpg")), folder / "contact_sheet.png")
    before = opened(source / "out")
    after = made(source / "out", source)
    assert after.manifest.num_files_decoded == before.manifest.num_files_decoded  # reused
    assert after.manifest.data_hash == before.manifest.data_hash


def test_a_deleted_file_leaves_the_store(source: Path, tmp_path: Path) -> None:
    before = index(opened(tmp_path / "a"))
    gone = sorted((source / "Training" / "notumor").glob("*.jpg"))[0]
    gone.unlink()
    after = made(tmp_path / "a", source)
    assert after.manifest.num_files_decoded == 0
    assert set(before.index) - set(index(after).index) == {str(gone.relative_to(source))}


def test_an_original_may_go_when_its_copy_stays(source: Path, tmp_path: Path) -> None:
    before = opened(tmp_path / "a")
    (removed,) = [
        row for row in before.folder.read_table("duplicates.parquet").to_pylist() if row["removed"]
    ]
    picture = pixels(before)[removed["kept_path"]]
    (source / removed["kept_path"]).unlink()
    after = made(tmp_path / "a", source)
    assert removed["path"] in index(after).index
    assert pixels(after)[removed["path"]] == picture


def test_an_interrupted_exchange_is_mended(source: Path, tmp_path: Path) -> None:
    before = opened(tmp_path / "a")
    datasets = tmp_path / "a" / "datasets"
    shutil.copytree(datasets / "mri", datasets / ".mri.rebuilt")
    (datasets / "mri").rename(datasets / ".mri.replaced")
    again = made(tmp_path / "a", source)
    assert again.manifest == before.manifest
    assert sorted(path.name for path in datasets.iterdir()) == ["mri"]

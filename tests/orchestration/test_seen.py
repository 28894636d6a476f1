"""Test slices are held against all that a run has seen, also before it began."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from brainray.config import Config
from brainray.errors import ConfigError, DataError
from brainray.mri.leakage import Fingerprints
from brainray.mri.phantom import CLASSES, make_series
from brainray.orchestration.prediction.evaluation import with_comparable_names
from brainray.orchestration.prediction.inference import find_predictor
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.preprocessing.subject_salt import SALT_VARIABLE
from brainray.orchestration.run import open_run
from brainray.orchestration.seen import seen_by_run, seen_by_weights, training_slices
from brainray.orchestration.store import ImageStore
from brainray.orchestration.study.data import seen_by_features, study_set
from brainray.orchestration.training import draws
from brainray.orchestration.training.draws import draw_name, train_draws
from brainray.orchestration.training.driver import TrainedRun
from brainray.orchestration.training.start import begin_run
from brainray.storage import Folder
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_what_an_encoder_was_warmed_up_on_is_not_clean(
    storage: Path, phantoms: Path, tmp_path: Path
) -> None:
    """It learned on the published split; a split of our own tests on some of the same slices."""
    seen = training_slices(ImageStore.open(Folder(storage) / "datasets" / "mri"))
    encoder = Folder(tmp_path) / "encoders" / "published"
    encoder.write_bytes("encoder.pt", b"its weights are not read here")
    encoder.write_table("seen.parquet", seen.drop_columns("frame"))  # as earlier versions did
    learned_on = set(seen["sample_id"].to_pylist())

    store = preprocess(
        tiny_config(tmp_path, "name=own", f"source={phantoms}", "split.mode=grouped")
    )
    clean = {}
    for name, weights in {"new": "random", "started": f"{encoder}/encoder.pt"}.items():
        config = tiny_config(tmp_path, f"name={name}", "dataset=own", f"encoder.weights={weights}")
        test = begin_run(config, store, 1).folder.read_table("test.parquet")
        clean[name] = set(test.filter(test["clean"])["sample_id"].to_pylist())
    assert clean["new"] & learned_on
    assert not clean["started"] & learned_on

    # What starts from that run has seen what the encoder saw, too.
    run = Folder(tmp_path) / "runs" / "started"
    rows = seen_by_run(run)
    assert rows is not None
    own = set(run.read_table("seen.parquet")["sample_id"].to_pylist())
    elsewhere = rows.filter(rows["elsewhere"])["sample_id"].to_pylist()
    assert set(elsewhere) == learned_on - own
    assert set(rows["sample_id"].to_pylist()) == learned_on | own
    assert seen_by_weights("run:started", Folder(tmp_path)) == seen_by_weights(
        f"{run}/best/model.pt", Folder(tmp_path)
    )
    assert seen_by_weights("imagenet", Folder(tmp_path)) is None


def test_what_a_studys_starting_weights_have_seen_is_not_clean(
    storage: Path, phantoms: Path, trained: TrainedRun, tmp_path: Path
) -> None:
    seen = trained.run.folder.read_table("seen.parquet")
    store = preprocess(
        tiny_config(tmp_path, "name=own", f"source={phantoms}", "split.mode=grouped")
    )
    name = trained.run.record.name
    features = {"drawn": "random", "trained": f"run:{name}"}
    clean = {}
    for feature, weights in features.items():
        config = tiny_config(
            storage,
            f"study.features.{feature}.encoder=resnet18",
            f"study.features.{feature}.weights={weights}",
        )
        studied = study_set(store, Folder(tmp_path) / feature, seen_by_features(config)).slices
        ids = np.asarray(studied.table["sample_id"].to_pylist())
        clean[feature] = set(ids[studied.subsets["clean"]])
    learned_on = set(seen["sample_id"].to_pylist())
    assert clean["drawn"] & learned_on
    assert clean["trained"] < clean["drawn"]
    assert not clean["trained"] & learned_on


def test_weights_that_know_the_validation_labels_are_refused(
    storage: Path, trained: TrainedRun
) -> None:
    weights = f"encoder.weights={trained.run.folder}/best/model.pt"
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    other = tiny_config(storage, "name=other-draw", "dataset=mri", weights, "split.seed=5")
    with pytest.raises(ConfigError, match=r"was trained on the labels of \d+ of this run's \d+ va"):
        begin_run(other, store, 1)
    assert not (storage / "runs" / "other-draw").exists()
    begin_run(tiny_config(storage, "name=same-draw", "dataset=mri", weights), store, 1)


def test_what_linked_weights_have_seen_is_known(trained: TrainedRun, tmp_path: Path) -> None:
    best, storage = Path(f"{trained.run.folder}/best"), Folder(tmp_path)
    expected = seen_by_weights(f"{best}/model.pt", storage)
    assert expected is not None
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "latest.pt").symlink_to(best / "model.pt")
    (tmp_path / "folder").symlink_to(best)
    # As with tools that keep large files in a cache, under the hash of their content.
    shutil.copytree(best.parent, tmp_path / "run")
    (tmp_path / "run" / "best" / "model.pt").rename(tmp_path / "file" / "0123")
    (tmp_path / "run" / "best" / "model.pt").symlink_to(tmp_path / "file" / "0123")
    for path in ("file/latest.pt", "folder/model.pt", "run/best/model.pt"):
        assert seen_by_weights(f"{tmp_path}/{path}", storage) == expected, path
    for path in ("file/latest.pt", "folder"):
        config = tiny_config(tmp_path, f"checkpoint={tmp_path}/{path}")
        predictor = find_predictor(config)
        assert predictor.run is not None
        assert predictor.run.record == trained.run.record


def test_weights_that_know_copies_of_validation_slices_are_refused(
    storage: Path, trained: TrainedRun, tmp_path: Path
) -> None:
    """The bytes are others, the slice is the same."""
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    shutil.copytree(f"{trained.run.folder}", tmp_path / "copied")
    copied = Folder(tmp_path / "copied")
    seen = copied.read_table("seen.parquet")
    others = pa.array([identity[::-1] for identity in seen["sample_id"].to_pylist()])
    roles = ["labelled" if role == "validation" else role for role in seen["role"].to_pylist()]
    for name, column in {"sample_id": others, "role": pa.array(roles)}.items():
        seen = seen.set_column(seen.column_names.index(name), name, column)
    copied.write_table("seen.parquet", seen)
    weights = f"encoder.weights={copied}/best/model.pt"
    config = tiny_config(storage, "name=of-copies", "dataset=mri", weights)
    num_validation = trained.run.record.num_slices["validation"]
    message = f"labels of {num_validation} of this run's {num_validation} validation slices, or of"
    with pytest.raises(ConfigError, match=message):
        begin_run(config, store, 1)


def test_names_hashed_with_another_salt_are_not_compared(
    storage: Path, trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(storage, f"run={trained.run.record.name}")
    blank = bytes(96 * 96)
    accepted = pa.table(
        {
            "sample_id": ["a", "b"],
            "subject_id": ["12ab", "0f3c"],
            "subject_source": ["table", "header"],
            "thumbnail": [blank, blank],
        }
    )
    named = Fingerprints.from_table(with_comparable_names(accepted, config, trained.run))
    assert named.subjects == ["12ab", "0f3c"]
    monkeypatch.setenv(SALT_VARIABLE, "another salt than the run's")
    nameless = Fingerprints.from_table(with_comparable_names(accepted, config, trained.run))
    assert nameless.subjects == [None, None]


def test_validation_by_subject_shares_no_subject_with_what_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for subject in range(16):
        name = CLASSES[subject % 4]
        (source / name).mkdir(parents=True, exist_ok=True)
        series = make_series(name, np.random.default_rng([7, subject]), 5, 128)
        for number, phantom in enumerate(series):
            cv2.imwrite(str(source / name / f"{subject:02d}-{number}.png"), phantom.image)
    store = preprocess(tiny_config(tmp_path, "name=series", f"source={source}"))
    subjects_of = {}
    for unit in ("slice", "subject"):
        config = tiny_config(
            tmp_path,
            f"name={unit}",
            "dataset=series",
            "split.validation_fraction=0.3",
            f"split.validation={unit}",
        )
        seen = begin_run(config, store, 1).folder.read_table("seen.parquet").to_pylist()
        found: dict[str, set[str]] = {}
        for row in seen:
            found.setdefault(row["role"], set()).add(row["subject_id"])
        subjects_of[unit] = found
    parted, whole = subjects_of["slice"], subjects_of["subject"]
    assert parted["validation"] & parted["labelled"]
    assert parted["validation"] & parted["unlabelled"]
    assert not whole["validation"] & (whole["labelled"] | whole["unlabelled"])
    assert whole["left_out"] <= whole["validation"]

    index = store.index(thumbnails=True)
    column = index.column_names.index("subject_id")
    nameless = index.set_column(column, "subject_id", pa.nulls(index.num_rows, pa.string()))
    monkeypatch.setattr(ImageStore, "index", lambda *_, **__: nameless)
    config = tiny_config(tmp_path, "name=refused", "dataset=series", "split.validation=subject")
    with pytest.raises(ConfigError, match=r"has no subjects.* or set split\.validation=slice"):
        begin_run(config, store, 1)


def test_draws_are_compared_with_a_control_of_the_same_draws_only(storage: Path) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    for number in range(2):
        control = tiny_config(
            storage, f"name={draw_name('fewer', number)}", "dataset=mri", f"split.seed={number}"
        )
        run = begin_run(control, store, 1)
        run.folder.write_json("summary.json", {})
    overrides = [
        "name=more",
        "dataset=mri",
        "evaluation.num_label_draws=2",
        "evaluation.control=fewer",
    ]
    message = r"other labels \(split\.labelled_fraction: 0\.5 here, 0\.9 requested\)"
    with pytest.raises(ConfigError, match=message):
        train_draws(tiny_config(storage, *overrides, "split.labelled_fraction=0.9"))
    with pytest.raises(ConfigError, match=r"split\.validation: slice here, subject requested"):
        train_draws(tiny_config(storage, *overrides, "split.validation=subject"))


def test_complete_draws_are_not_compared_with_a_control_on_other_data(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore.open(Folder(storage) / "datasets" / "mri")
    for number in range(2):
        for name in ("older", "newer"):
            settings = [f"name={draw_name(name, number)}", "dataset=mri", f"split.seed={number}"]
            run = begin_run(tiny_config(storage, *settings), store, 1)
            run.folder.write_json("summary.json", {})
            if name == "older":
                earlier = run.record.model_copy(update={"data_hash": "of before an update"})
                earlier.write(run.folder)

    def train(config: Config, data_hash: str | None) -> TrainedRun:
        run = open_run(Folder(storage), str(config.name))
        return TrainedRun(run, {"chosen_epoch": 1.0}, None, "")

    monkeypatch.setattr(draws, "train", train)
    overrides = ["name=newer", "dataset=mri", "evaluation.num_label_draws=2"]
    with pytest.raises(DataError, match="was updated between this run and the run older-draw1"):
        train_draws(tiny_config(storage, *overrides, "evaluation.control=older"))

"""Phantoms must be reproducible, anatomically honest, and hard for anything but an image model."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.models import resnet18

from brainray.engine.forward import autocast
from brainray.engine.recipe import resolve_precision
from brainray.errors import DataError
from brainray.mri import phantom
from brainray.mri.phantom import CLASSES, PhantomSlice, make_series, make_slice, write_phantoms
from brainray.mri.slices import ORIENTATIONS

TUMOURS = tuple(name for name in CLASSES if name != "notumor")
CPU = torch.device("cpu")
NUM_SUBJECTS = 16  # per class and orientation, where a claim is checked on every one of them


@cache
def _slices(class_name: str, orientation: str) -> list[PhantomSlice]:
    """The same subjects for every class."""
    return [
        make_slice(class_name, np.random.default_rng([5, subject]), 160, orientation)
        for subject in range(NUM_SUBJECTS)
    ]


def _grown(mask: NDArray[np.bool_], num_pixels: int) -> NDArray[np.bool_]:
    kernel = np.ones((2 * num_pixels + 1, 2 * num_pixels + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel) > 0


def _centre(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean row and column of a mask."""
    return np.argwhere(mask).mean(axis=0)


# --- Reproducible --------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", CLASSES)
def test_equal_generators_give_equal_slices(class_name: str) -> None:
    first, second = (make_slice(class_name, np.random.default_rng(3), 96) for _ in range(2))
    assert first.image.dtype == np.uint8
    assert first.image.shape == first.brain_mask.shape == first.lesion_mask.shape == (96, 96)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.brain_mask, second.brain_mask)
    np.testing.assert_array_equal(first.lesion_mask, second.lesion_mask)
    assert first.orientation == second.orientation
    other = make_slice(class_name, np.random.default_rng(4), 96)
    assert (first.image != other.image).mean() > 0.5


def _bytes_by_path(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.jpg"))
    }


def test_asking_for_more_slices_leaves_the_earlier_files_as_they_are(tmp_path: Path) -> None:
    write_phantoms(
        tmp_path / "few", num_training_per_class=2, num_testing_per_class=1, seed=8, size=64
    )
    write_phantoms(
        tmp_path / "more", num_training_per_class=4, num_testing_per_class=3, seed=8, size=64
    )
    few, more = _bytes_by_path(tmp_path / "few"), _bytes_by_path(tmp_path / "more")
    assert len(few) == 4 * (2 + 1)
    assert len(more) == 4 * (4 + 3)
    assert few == {path: more[path] for path in few}
    assert len(set(more.values())) == len(more), "two files hold the same slice"


def test_another_seed_gives_other_files(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_phantoms(
            tmp_path / str(seed),
            num_training_per_class=1,
            num_testing_per_class=1,
            seed=seed,
            size=64,
        )
    first, second = (_bytes_by_path(tmp_path / str(seed)) for seed in (0, 1))
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty: remove it or choose another"):
        write_phantoms(tmp_path, num_training_per_class=1, num_testing_per_class=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_phantoms(tmp_path, num_training_per_class=1, num_testing_per_class=0, seed=0, size=64)
    assert len(_bytes_by_path(tmp_path)) == 4
    assert sorted(path.name for path in (tmp_path / "Testing").iterdir()) == list(CLASSES)


def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_written = 0

    def write_until_full(path: Path, image: NDArray[np.uint8]) -> None:
        nonlocal num_written
        num_written += 1
        if num_written > 5:
            raise OSError("No space left on device")
        path.write_bytes(image.tobytes())

    monkeypatch.setattr(phantom, "_write_jpeg", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        write_phantoms(
            tmp_path / "set", num_training_per_class=3, num_testing_per_class=1, seed=0, size=64
        )
    assert num_written == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("class_name", "size", "orientation", "message"),
    [
        ("tumour", 64, None, "unknown phantom class 'tumour': choose from glioma"),
        ("glioma", 64, "oblique", "unknown orientation 'oblique': choose from axial"),
        ("glioma", 8, None, "8 pixels is too small"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    class_name: str, size: int, orientation: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_slice(class_name, np.random.default_rng(0), size, orientation)


# --- Anatomy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_class_shows_nowhere_outside_the_skull(orientation: str) -> None:
    healthy_slices = _slices("notumor", orientation)
    for class_name in TUMOURS:
        for slice_, healthy in zip(_slices(class_name, orientation), healthy_slices, strict=True):
            outside = ~_grown(slice_.brain_mask, 6)
            np.testing.assert_array_equal(slice_.image[outside], healthy.image[outside])
            unchanged = ~slice_.lesion_mask
            np.testing.assert_array_equal(
                slice_.brain_mask[unchanged], healthy.brain_mask[unchanged]
            )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_brains_lie_within_the_picture_and_lesions_within_the_brain(
    class_name: str, orientation: str
) -> None:
    for slice_ in _slices(class_name, orientation):
        assert 0.10 < slice_.brain_mask.mean() < 0.60
        assert not (slice_.lesion_mask & ~slice_.brain_mask).any()
        share = slice_.lesion_mask.sum() / slice_.brain_mask.sum()
        if class_name == "notumor":
            assert share == 0.0
        else:
            assert 0.01 < share < 0.20


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("class_name", TUMOURS)
def test_lesions_stand_out_from_the_same_brain_without_them(
    class_name: str, orientation: str
) -> None:
    healthy_slices = _slices("notumor", orientation)
    for slice_, healthy in zip(_slices(class_name, orientation), healthy_slices, strict=True):
        brain_level = np.median(healthy.image[healthy.brain_mask])
        change = slice_.image.astype(float) - healthy.image
        assert np.abs(change[slice_.lesion_mask]).mean() > 0.2 * brain_level
        far = slice_.brain_mask & ~_grown(slice_.lesion_mask, 35)
        assert np.abs(change[far]).mean() < 0.05 * brain_level


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_gliomas_are_uneven_and_the_others_even(orientation: str) -> None:
    spread = {
        name: np.array(
            [
                np.std(slice_.image[slice_.lesion_mask]) / np.mean(slice_.image[slice_.lesion_mask])
                for slice_ in _slices(name, orientation)
            ]
        )
        for name in TUMOURS
    }
    assert np.median(spread["glioma"]) > 2.0 * np.median(spread["meningioma"])
    assert np.median(spread["glioma"]) > 2.0 * np.median(spread["pituitary"])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_meningiomas_touch_the_rim_of_the_brain_and_gliomas_do_not(orientation: str) -> None:
    for slice_ in _slices("meningioma", orientation):
        assert (_grown(slice_.lesion_mask, 2) & ~slice_.brain_mask).any()
    for slice_ in _slices("glioma", orientation):
        assert not (_grown(slice_.lesion_mask, 2) & ~slice_.brain_mask).any()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pituitary_tumours_lie_at_the_midline_or_base(orientation: str) -> None:
    for slice_ in _slices("pituitary", orientation):
        brain = np.argwhere(slice_.brain_mask)
        height, width = np.ptp(brain, axis=0)
        down, right = _centre(slice_.lesion_mask) - brain.mean(axis=0)
        if orientation == "axial":
            assert abs(right) < 0.15 * width
            assert abs(down) < 0.25 * height
        elif orientation == "coronal":
            assert abs(right) < 0.20 * width
            assert 0.10 * height < down < 0.50 * height
        else:
            assert abs(right) < 0.35 * width
            assert 0.10 * height < down < 0.50 * height


def test_sagittal_heads_face_either_way() -> None:
    # The hindbrain hangs at the back, so that the brain's lowest part tells where it looks.
    facing_right = 0
    for slice_ in _slices("notumor", "sagittal"):
        brain = np.argwhere(slice_.brain_mask)
        lowest = brain[brain[:, 0] > np.quantile(brain[:, 0], 0.95)]
        facing_right += bool(lowest[:, 1].mean() < brain[:, 1].mean())
    assert 0.2 * NUM_SUBJECTS < facing_right < 0.8 * NUM_SUBJECTS


# --- Series --------------------------------------------------------------------------------------


def _correlation(first: PhantomSlice, second: PhantomSlice) -> float:
    return float(np.corrcoef(first.image.ravel(), second.image.ravel())[0, 1])


def test_neighbours_in_a_series_are_more_alike_than_slices_of_other_subjects() -> None:
    series = [
        make_series(CLASSES[subject % 4], np.random.default_rng([6, subject]), 5, 96)
        for subject in range(12)
    ]
    neighbours = [_correlation(a, b) for slices in series for a, b in pairwise(slices)]
    strangers = [_correlation(a[2], b[2]) for index, a in enumerate(series) for b in series[:index]]
    assert min(neighbours) > max(strangers)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_series_is_one_lesion_in_one_head_that_changes_along_it(class_name: str) -> None:
    series = make_series(class_name, np.random.default_rng(9), 7, 96)
    assert len({slice_.orientation for slice_ in series}) == 1
    for here, there in pairwise(series):
        assert not np.array_equal(here.image, there.image)
        if class_name != "notumor":
            overlap = (here.lesion_mask & there.lesion_mask).sum()
            assert overlap > 0.6 * max(here.lesion_mask.sum(), there.lesion_mask.sum())
    assert _correlation(series[0], series[-1]) < _correlation(series[0], series[1])


def test_a_series_needs_a_slice() -> None:
    with pytest.raises(DataError, match="at least 1 slice"):
        make_series("glioma", np.random.default_rng(0), 0)


# --- Hardness ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImages:
    images: NDArray[np.uint8]  # (B, H, W)
    labels: NDArray[np.int64]  # (B,)


def _draw_set(split: int, num_per_class: int, size: int) -> LabelledImages:
    images, labels = [], []
    for label, class_name in enumerate(CLASSES):
        for index in range(num_per_class):
            rng = np.random.default_rng([11, split, label, index])
            images.append(make_slice(class_name, rng, size).image)
            labels.append(label)
    return LabelledImages(np.stack(images), np.array(labels))


def _histograms(images: NDArray[np.uint8], num_bins: int) -> NDArray[np.float64]:
    counts = [np.histogram(image, num_bins, (0, 256))[0] for image in images]
    return np.stack(counts) / images[0].size


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    small = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in images]
    flat = np.stack(small).reshape(len(images), -1).astype(float)
    return (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)


def _baseline_accuracies(train: LabelledImages, test: LabelledImages) -> dict[str, float]:
    """What brightness alone, and memory alone, score with all labels."""
    accuracies = {}
    for num_bins in (32, 64):
        seen, unseen = (_histograms(part.images, num_bins) for part in (train, test))
        logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        accuracies[f"histogram {num_bins}, logistic"] = logistic.fit(seen, train.labels).score(
            unseen, test.labels
        )
        for k in (1, 5, 15):
            neighbours = KNeighborsClassifier(k).fit(seen, train.labels)
            accuracies[f"histogram {num_bins}, {k}-NN"] = neighbours.score(unseen, test.labels)
    nearest = KNeighborsClassifier(1).fit(_thumbnails(train.images), train.labels)
    accuracies["thumbnails, 1-NN"] = nearest.score(_thumbnails(test.images), test.labels)
    return accuracies


def test_neither_brightness_nor_memory_tells_the_classes_apart() -> None:
    accuracies = _baseline_accuracies(_draw_set(0, 120, 96), _draw_set(1, 50, 96))
    assert max(accuracies.values()) <= 0.60, accuracies


def _to_input(images: NDArray[np.uint8], size: int) -> torch.Tensor:
    """(B, H, W) grey values to (B, 1, size, size), roughly standardised."""
    small = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images]
    return (torch.from_numpy(np.stack(small))[:, None].float() / 255.0 - 0.2) / 0.2


def _train_resnet(train: LabelledImages, *, size: int, num_steps: int) -> nn.Module:
    """ResNet-18 from random weights, cross entropy, with mirrored and shifted images."""
    torch.manual_seed(0)
    model = resnet18(num_classes=len(CLASSES))
    model.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=num_steps, pct_start=0.2
    )
    inputs, labels = _to_input(train.images, size), torch.from_numpy(train.labels)
    order = torch.cat(
        [torch.randperm(len(labels)) for _ in range(32 * num_steps // len(labels) + 1)]
    )
    for step in range(num_steps):
        batch = order[32 * step : 32 * (step + 1)]
        mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
        views = torch.where(mirrored, inputs[batch].flip(3), inputs[batch])
        shift = torch.randint(-size // 16, size // 16 + 1, (2,)).tolist()
        views = views.roll(shift, (2, 3)).contiguous(memory_format=torch.channels_last)
        with autocast(CPU, resolve_precision("auto", CPU)):
            loss = nn.functional.cross_entropy(model(views), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_an_encoder_beats_brightness_and_memory_by_25_points() -> None:
    train, test = _draw_set(0, 240, 224), _draw_set(1, 75, 224)
    model = _train_resnet(train, size=80, num_steps=240)
    with torch.no_grad(), autocast(CPU, resolve_precision("auto", CPU)):
        predicted = model(_to_input(test.images, 80)).argmax(dim=1).numpy()
    accuracy = float((predicted == test.labels).mean())
    baselines = _baseline_accuracies(train, test)
    assert accuracy >= 0.85
    assert accuracy >= max(baselines.values()) + 0.25, baselines

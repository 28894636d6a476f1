"""The atlas finds brains by other heads' brains, and can be made anew of heads that one has."""

from functools import cache
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from brainray.errors import DataError
from brainray.mri.brain_atlas import (
    GRID,
    NUM_LABELS,
    BrainAtlas,
    _looked_up,
    _mutual_information,
    _warped,
    brain_atlas,
)
from brainray.mri.head import Head, find_head
from brainray.mri.make_brain_atlas import main, write_atlas
from brainray.mri.phantom import CLASSES, PhantomSlice, make_series, make_slice
from brainray.mri.reference_heads import ReferenceSlice, dice, find_heads, reference_slices


@cache
def phantom(seed: int, orientation: str = "axial") -> PhantomSlice:
    return make_slice(CLASSES[seed % 4], np.random.default_rng(seed), orientation=orientation)


def head_of(image: np.ndarray) -> Head:
    head = find_head(np.ascontiguousarray(image))
    assert head is not None
    return head


def found_in(atlas: BrainAtlas, image: np.ndarray) -> np.ndarray:
    """(H, W) True where the atlas says brain."""
    probability = atlas.brain_probability(head_of(image))
    assert probability.min() >= 0.0
    assert probability.max() <= 1.0 + 1e-6
    return cv2.resize(probability, image.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5


def atlas_of(phantoms: list[PhantomSlice], folder: Path, number: int = 100) -> BrainAtlas:
    slices = [ReferenceSlice("axial", one.image, one.brain_mask) for one in phantoms]
    write_atlas(folder / "atlas.npz", slices, number)
    return BrainAtlas.read(folder / "atlas.npz")


def test_a_slice_that_the_atlas_knows_is_found_almost_as_it_is(tmp_path: Path) -> None:
    known = [phantom(seed) for seed in range(12)]
    atlas = atlas_of(known, tmp_path)
    for one in known:
        assert dice(found_in(atlas, one.image), one.brain_mask) >= 0.9


@pytest.mark.parametrize("degrees", [-15.0, 15.0])
def test_a_head_that_is_turned_shrunk_and_stretched_is_followed(
    degrees: float, tmp_path: Path
) -> None:
    known = phantom(0)
    atlas = atlas_of([known], tmp_path)
    side = len(known.image)
    change = cv2.getRotationMatrix2D((side / 2, side / 2), degrees, 0.8)
    change[0] *= 0.9  # narrower
    image = cv2.warpAffine(known.image, change, (side, side))
    brain = cv2.warpAffine(known.brain_mask.astype(np.uint8), change, (side, side)) > 0
    assert dice(found_in(atlas, image), brain) >= 0.96


def test_a_pose_means_the_same_to_the_search_and_to_what_is_laid_over() -> None:
    head = head_of(phantom(0).image)
    pattern = np.zeros((GRID, GRID), np.float32)
    pattern[8:16, 6:20] = 1.0
    pattern[20:24, 18:26] = 1.0
    pose = np.array([1.1, 0.2, -0.15, 1.1, 0.3], np.float32)
    there = np.round(_warped(head, pattern, pose))
    back = _looked_up(there, head, pose[None])[0]
    assert (back == pattern).mean() >= 0.97


def test_mutual_information_is_that_of_the_labels_and_the_greys() -> None:
    num_cells = GRID * GRID
    diagonal = np.zeros((NUM_LABELS, 17), np.intp)
    diagonal[[0, 1], [0, 1]] = num_cells // 2
    independent = np.zeros((NUM_LABELS, 17), np.intp)
    independent[:4, :4] = num_cells // 16
    both = _mutual_information(np.stack([diagonal, independent]))
    # The tenth of a cell that is added to each count takes some of it away.
    assert both[0] == pytest.approx(np.log(2.0), abs=0.03)
    assert both[1] == pytest.approx(0.0, abs=0.03)


def test_the_atlas_that_comes_along_knows_both_sides_of_a_face() -> None:
    atlas = brain_atlas()
    assert atlas.labels.shape == atlas.brains.shape
    known = {labels.tobytes() for labels in atlas.labels[:200]}
    assert len(atlas.labels) > 200
    assert all(labels[:, ::-1].tobytes() in known for labels in atlas.labels[200:])
    for seed in range(4):
        one = phantom(seed, "sagittal")
        as_it_is = found_in(atlas, one.image)
        mirrored = found_in(atlas, one.image[:, ::-1])[:, ::-1]
        assert dice(as_it_is, one.brain_mask) >= 0.75
        assert dice(as_it_is, mirrored) >= 0.92


def test_few_slices_stand_for_many(tmp_path: Path) -> None:
    # Three of one head and one of another: each head is to be represented.
    one, other = phantom(0), phantom(5, "sagittal")
    atlas = atlas_of([one, one, one, other], tmp_path, number=2)
    assert len(atlas.labels) == 2
    assert not np.array_equal(atlas.labels[0], atlas.labels[1])
    # No slice is taken twice, however many are asked for.
    assert len(atlas_of([one, one, other], tmp_path, number=3).labels) == 2


def volume(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    series = make_series("notumor", np.random.default_rng(0), 14, 96)
    for name, slices in (("one", series[:7]), ("two", series[7:])):
        images = np.stack([one.image for one in slices], axis=-1)
        brains = np.stack([one.brain_mask for one in slices], axis=-1).astype(np.uint8)
        # Slices of a phantom become axial ones with the front up, as they are shown; each is thick.
        for kind, stack in (("", images), ("_mask", brains)):
            thick = stack.repeat(8, axis=2).transpose(1, 0, 2)[::-1, ::-1]
            volume(tmp_path / f"{name}{kind}.nii.gz", thick)
    volume(tmp_path / "without.nii.gz", np.zeros((4, 4, 4), np.uint8))
    return tmp_path


def test_heads_with_masks_are_read_as_they_are_shown(heads: Path) -> None:
    found = find_heads(heads)
    assert [path.name for path in found] == ["one.nii.gz", "two.nii.gz"]
    first = next(reference_slices(found[0], "axial"))
    true = make_series("notumor", np.random.default_rng(0), 14, 96)[0]
    np.testing.assert_array_equal(first.brain, true.brain_mask)
    assert np.corrcoef(first.image.ravel(), true.image.ravel())[0, 1] > 0.99


def test_an_atlas_is_made_of_heads_and_read_back(heads: Path) -> None:
    out = heads / "atlas.npz"
    assert main(["--out", str(out), str(heads)]) == 0
    made = BrainAtlas.read(out)
    assert len(made.labels) >= 3
    axial = next(reference_slices(heads / "one.nii.gz", "axial"))
    assert dice(found_in(made, axial.image), axial.brain) >= 0.85


def test_a_folder_without_masks_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "atlas.npz"), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "atlas.npz").exists()


MASK = np.zeros((96, 96, 56), np.uint8)
MASK[30:60, 30:60, 10:40] = 1


@pytest.mark.parametrize(
    ("mask", "affine", "message"),
    [
        (MASK[:, :, :50], np.eye(4), "does not have the shape and affine"),
        (MASK, np.diag([-1.0, 1.0, 1.0, 1.0]), "does not have the shape and affine"),
        (MASK * 3 + np.roll(MASK, 40, axis=0), np.eye(4), "0 and one value"),
        (np.zeros_like(MASK), np.eye(4), "0 and one value"),
    ],
)
def test_a_mask_that_does_not_fit_its_head_is_reported(
    mask: np.ndarray, affine: np.ndarray, message: str, heads: Path
) -> None:
    volume(heads / "one_mask.nii.gz", mask, affine)
    with pytest.raises(DataError, match=f"one_mask.*{message}"):
        list(reference_slices(heads / "one.nii.gz", "axial"))


def test_a_volume_that_cannot_be_read_is_reported(heads: Path) -> None:
    for content in (b"no volume", (heads / "one.nii.gz").read_bytes()[:2000]):
        (heads / "one.nii.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"one\.nii\.gz"):
            list(reference_slices(heads / "one.nii.gz", "axial"))

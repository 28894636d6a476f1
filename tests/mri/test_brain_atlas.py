"""The atlas finds brains by other heads' brains, and can be made anew of heads that one has."""

from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest

from brainray.errors import DataError
from brainray.mri.brain_atlas import BrainAtlas, brain_atlas, main, make_atlas
from brainray.mri.head import Head, find_head
from brainray.mri.phantom import CLASSES, PhantomSlice, make_series, make_slice
from brainray.mri.reference_heads import ReferenceSlice, find_heads, reference_slices


@cache
def phantom(seed: int) -> PhantomSlice:
    return make_slice(CLASSES[seed % 4], np.random.default_rng(seed), orientation="axial")


def head_of(image: np.ndarray) -> Head:
    head = find_head(image)
    assert head is not None
    return head


def overlap(likely: np.ndarray, brain: np.ndarray) -> float:
    """Dice of what is likely brain at the working size."""
    height, width = likely.shape
    rows = np.arange(height) * brain.shape[0] // height
    columns = np.arange(width) * brain.shape[1] // width
    there, found = brain[rows][:, columns], likely > 0.5
    return float(2.0 * (there & found).sum() / (there.sum() + found.sum()))


def test_a_slice_that_the_atlas_knows_is_found_almost_as_it_is() -> None:
    known = [ReferenceSlice("axial", phantom(s).image, phantom(s).brain_mask) for s in range(12)]
    atlas, _ = make_atlas(iter(known), len(known))
    for one in known:
        assert overlap(atlas.likely_brain(head_of(one.image)), one.brain) >= 0.9


def test_shifted_turned_and_stretched_heads_are_followed() -> None:
    known = ReferenceSlice("axial", phantom(0).image, phantom(0).brain_mask)
    atlas, _ = make_atlas(iter([known]), 1)
    squeezed = known.image.repeat(5, axis=0)[::4]  # a quarter longer
    brain = known.brain.repeat(5, axis=0)[::4]
    assert overlap(atlas.likely_brain(head_of(squeezed)), brain) >= 0.9


def test_the_atlas_that_comes_along_knows_both_sides_of_a_face() -> None:
    atlas = brain_atlas()
    assert atlas.kinds.shape == atlas.brains.shape
    assert 0.0 <= atlas.brains.min() < atlas.brains.max() <= 1.0
    for seed in range(4):
        facing = make_slice("notumor", np.random.default_rng(seed), orientation="sagittal")
        for image, brain in (
            (facing.image, facing.brain_mask),
            (facing.image[:, ::-1], facing.brain_mask[:, ::-1]),
        ):
            head = head_of(np.ascontiguousarray(image))
            assert overlap(atlas.likely_brain(head), brain) >= 0.75


def volume(path: Path, voxels: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


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
    assert len(made.kinds) >= 3
    axial = next(reference_slices(heads / "one.nii.gz", "axial"))
    assert overlap(made.likely_brain(head_of(axial.image)), axial.brain) >= 0.85


def test_a_folder_without_masks_and_masks_of_other_heads_are_told(
    heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["--out", str(empty / "atlas.npz"), str(empty)]) == 2
    assert str(empty) in capsys.readouterr().err
    volume(heads / "one_mask.nii.gz", np.ones((9, 9, 9), np.uint8))
    with pytest.raises(DataError, match="one_mask"):
        list(reference_slices(heads / "one.nii.gz", "axial"))

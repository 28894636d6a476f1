"""The intracranial mask drops skull, scalp, face and neck, and keeps brain and lesion."""

from functools import cache

import cv2
import numpy as np
import pytest

from brainray.mri import intracranial
from brainray.mri.head import Head
from brainray.mri.intracranial import MIN_CONFIDENCE, intracranial_mask
from brainray.mri.phantom import CLASSES, PhantomSlice, make_slice
from brainray.mri.reference_heads import dice
from brainray.mri.skull_strip import otsu_mask
from brainray.mri.slices import ORIENTATIONS

NUM_SLICES = 16  # of each orientation


@cache
def phantoms(orientation: str) -> tuple[PhantomSlice, ...]:
    return tuple(
        make_slice(CLASSES[seed % 4], np.random.default_rng(seed), orientation=orientation)
        for seed in range(NUM_SLICES)
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_mask_agrees_with_the_brain_mask_far_better_than_the_head_mask_does(
    orientation: str,
) -> None:
    ours, heads = [], []
    for phantom in phantoms(orientation):
        ours.append(dice(intracranial_mask(phantom.image).mask, phantom.brain_mask))
        heads.append(dice(otsu_mask(phantom.image), phantom.brain_mask))
    assert np.mean(ours) >= 0.92
    assert np.quantile(ours, 0.1) >= 0.80
    assert np.mean(ours) > np.mean(heads) + 0.05


@pytest.mark.parametrize("class_name", ["glioma", "meningioma", "pituitary"])
def test_lesions_are_kept(class_name: str) -> None:
    kept = []
    for orientation in ORIENTATIONS:
        for phantom in phantoms(orientation)[CLASSES.index(class_name) :: 4]:
            mask = intracranial_mask(phantom.image).mask
            kept.append((mask & phantom.lesion_mask).sum() / phantom.lesion_mask.sum())
    assert np.mean(kept) >= 0.90


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_whole_heads_are_trusted_and_stripped_ones_are_not(orientation: str) -> None:
    whole, stripped = [], []
    for phantom in phantoms(orientation):
        brain_only = np.where(phantom.brain_mask, phantom.image, 0).astype(np.uint8)
        whole.append(intracranial_mask(phantom.image).confidence >= MIN_CONFIDENCE)
        stripped.append(intracranial_mask(brain_only).confidence >= MIN_CONFIDENCE)
    assert np.mean(whole) >= 0.8
    assert np.mean(stripped) <= 0.2


def test_a_scalp_darker_than_the_brain_is_known_by_the_skull_before_it() -> None:
    image = np.zeros((160, 160), np.uint8)
    for radius, grey in ((70, 80), (62, 40), (56, 100)):  # scalp, skull, brain
        cv2.circle(image, (80, 80), radius, grey, cv2.FILLED)
    assert intracranial_mask(image).confidence >= MIN_CONFIDENCE


@pytest.mark.parametrize("size", [64, 320, 1024])
def test_the_mask_hardly_depends_on_the_slices_size(size: int) -> None:
    image = phantoms("coronal")[0].image
    mask = intracranial_mask(image).mask
    resized = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    there = intracranial_mask(resized).mask.astype(np.float32)
    back = cv2.resize(there, mask.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
    assert dice(mask, back) >= 0.95


def test_the_mask_of_a_large_slice_covers_no_more_of_it() -> None:
    image = make_slice("glioma", np.random.default_rng(1), size=160).image  # the working size
    small = intracranial_mask(image).mask
    large = intracranial_mask(image.repeat(4, 0).repeat(4, 1)).mask
    assert large.mean() == pytest.approx(small.mean(), rel=0.005)


def test_a_wider_background_moves_nothing_but_the_frame() -> None:
    image = phantoms("axial")[0].image
    wide = np.pad(image, ((0, 0), (60, 60)))
    mask = intracranial_mask(wide).mask
    assert mask.shape == wide.shape
    assert not mask[:, :60].any()
    assert not mask[:, -60:].any()
    assert dice(mask[:, 60:-60], intracranial_mask(image).mask) >= 0.95


def test_a_head_squeezed_in_width_keeps_its_brain(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_overlap() -> float:
        overlaps = []
        for phantom in phantoms("axial"):
            height, width = phantom.image.shape
            image = cv2.resize(phantom.image, (7 * width // 10, height))
            brain = cv2.resize(phantom.brain_mask.astype(np.uint8), (7 * width // 10, height)) > 0
            overlaps.append(dice(intracranial_mask(image).mask, brain))
        return float(np.mean(overlaps))

    with_own_outline = mean_overlap()
    monkeypatch.setattr(intracranial, "_ELLIPTIC", 1.1)  # never
    assert with_own_outline >= 0.93
    assert with_own_outline > mean_overlap()


def test_a_caption_is_not_brain() -> None:
    image = phantoms("axial")[0].image.copy()
    cv2.putText(image, "R 3T", (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1)
    mask = intracranial_mask(image).mask
    assert not mask[:20, :50].any()
    assert dice(mask, phantoms("axial")[0].brain_mask) >= 0.93


def test_inverted_tissue_contrast_is_no_obstacle() -> None:
    # Fluid bright and tissue darker, as in T2; bone, air and scalp stay as they are.
    overlaps = []
    for phantom in phantoms("axial"):
        values = phantom.image.astype(np.float32)
        level = float(np.median(values[phantom.brain_mask]))
        inverted = np.clip(2.0 * level - values, 0.3 * level, 255.0)
        image = np.where(phantom.brain_mask, inverted, values).astype(np.uint8)
        overlaps.append(dice(intracranial_mask(image).mask, phantom.brain_mask))
    assert np.mean(overlaps) >= 0.92
    assert np.quantile(overlaps, 0.1) >= 0.85


def test_the_mask_is_one_piece_without_holes() -> None:
    for orientation in ORIENTATIONS:
        mask = intracranial_mask(phantoms(orientation)[1].image).mask.astype(np.uint8)
        assert cv2.connectedComponents(mask)[0] == 2
        assert cv2.connectedComponents(1 - mask, connectivity=4)[0] == 2


@pytest.mark.parametrize("shape", [(64, 64), (100, 300), (1, 1), (1, 500)])
def test_a_slice_without_a_head_is_not_trusted(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for image in (np.zeros(shape, np.uint8), np.full(shape, 200, np.uint8), noise):
        found = intracranial_mask(image)
        assert found.mask.shape == shape
        assert found.confidence < MIN_CONFIDENCE
    assert intracranial_mask(np.zeros(shape, np.uint8)).mask.all()


def test_the_same_slice_gives_the_same_mask() -> None:
    image = phantoms("sagittal")[2].image
    first, second = intracranial_mask(image), intracranial_mask(image.copy())
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.confidence == second.confidence


def test_a_speck_does_not_draw_the_outline_out() -> None:
    score = np.zeros((64, 64), np.float32)  # (angles, radii)
    score[:, 20] = 1.0
    score[30, 24] = 1.1
    np.testing.assert_array_equal(intracranial._best_closed_path(score), 20)


def test_an_outline_that_starts_and_ends_at_different_radii_is_closed_all_the_same() -> None:
    score = np.zeros((64, 64), np.float32)  # (angles, radii)
    score[:32, 10] = score[32:, 40] = 1.0
    path = intracranial._best_closed_path(score)
    assert abs(path[-1] - path[0]) <= intracranial._MAX_JUMP
    assert set(path) > {10, 40}


def test_the_rays_of_a_brain_that_curves_around_its_centroid_start_within_it() -> None:
    arch = np.zeros((160, 160), np.uint8)
    cv2.ellipse(arch, (80, 80), (50, 50), 0, 180, 360, 1, thickness=12)
    head = Head(
        mask=np.ones_like(arch),
        depth=np.zeros(arch.shape, np.float32),
        centre=np.array([80, 80], np.float32),
        radius=70.0,
        signal=np.zeros(arch.shape, np.float32),
    )
    outline = intracranial._outline_of(arch > 0, head)
    assert outline is not None
    x, y = (head.centre + head.radius * outline.origin).round().astype(int)
    assert arch[y, x]

"""A known warp is found again, and what is compared is the anatomy."""

import cv2
import numpy as np
import pytest
import torch

from brainray.config import NearDuplicateConfig
from brainray.mri import registration
from brainray.mri.phantom import make_series, make_slice
from brainray.mri.registration import (
    LEVELS,
    Alignment,
    align,
    compare,
    match_intensities,
    shrink,
)

SIDE = 96


def picture(image: np.ndarray) -> torch.Tensor:
    """(1, 96, 96) float32."""
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(small.astype(np.float32))[None]


def head(seed: int) -> np.ndarray:
    return make_slice("glioma", np.random.default_rng(seed), size=240).image


def aligned(fixed: torch.Tensor, moving: torch.Tensor) -> Alignment:
    alignment = match_intensities(fixed, moving)
    for side, num_steps, _ in LEVELS:
        alignment = align(shrink(fixed, side), shrink(moving, side), alignment, num_steps=num_steps)
    return alignment


def test_a_crop_is_recovered_as_shift_and_scale() -> None:
    image = head(0)
    cropped = image[6:, 4:-8]  # of 240: rows 6..240, columns 4..232
    alignment = aligned(picture(image), picture(cropped))
    # A row at y in the image (-1..1) lies at (240 y - 6) / 234 in the cropped one.
    expected = [-6 / 234, 240 / 234, 4 / 228, 240 / 228]
    np.testing.assert_allclose(alignment.frame[0], expected, atol=0.004)


def test_gain_and_bias_are_recovered_beside_clipped_pixels() -> None:
    image = head(1)
    darker = np.clip(0.9 * image.astype(float) - 30, 0, 255).astype(np.uint8)
    alignment = aligned(picture(darker), picture(image))
    assert float(alignment.gain[0]) == pytest.approx(0.9, abs=0.05)
    assert float(alignment.bias[0]) == pytest.approx(-30, abs=4)


def test_identical_slices_have_similarity_one_and_different_heads_do_not() -> None:
    fixed, other = picture(head(2)), picture(head(3))
    assert float(registration.similarity(fixed, fixed)[0]) == pytest.approx(1.0, abs=1e-4)
    assert float(registration.similarity(fixed, other)[0]) < 0.9


def test_a_cropped_copy_is_more_similar_than_a_neighbouring_slice() -> None:
    series = make_series("pituitary", np.random.default_rng(4), num_slices=3, size=240)
    fixed, neighbour = picture(series[1].image), picture(series[2].image)
    copy = picture(series[1].image[5:-9, 7:-3])
    found = registration.similarity(torch.cat([fixed, fixed]), torch.cat([copy, neighbour]))
    assert found[0] > found[1]


def test_a_dim_copy_is_found_and_a_dim_neighbour_is_not() -> None:
    series = make_series("pituitary", np.random.default_rng(4), num_slices=3, size=240)
    dim = [(0.1 * one.image).astype(np.uint8) for one in series]
    _, encoded = cv2.imencode(".jpg", dim[1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    copy = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))
    fixed = torch.cat([picture(dim[1])] * 3)
    moving = torch.cat([picture(dim[1]), picture(copy), picture(dim[2])])
    same, found, neighbour = registration.similarity(fixed, moving).tolist()
    assert same == pytest.approx(1.0, abs=1e-4)
    least = NearDuplicateConfig().similarity
    assert found >= least > neighbour


def test_a_darker_copy_is_found_and_a_darker_neighbour_is_not() -> None:
    """Neither slice reaches white, so that nothing is lost and nothing is to be allowed for."""
    series = make_series("meningioma", np.random.default_rng(0), num_slices=8, size=192)
    slices = [picture((0.8 * one.image).astype(np.uint8)) for one in series]
    fixed = torch.cat([slices[0], *slices[:-1]])
    darker = torch.cat([(0.8 * one).floor() for one in slices])
    copy, *neighbours = registration.similarity(fixed, darker).tolist()
    assert copy >= NearDuplicateConfig().similarity > max(neighbours)


def test_structure_that_only_one_of_two_slices_has_tells_them_apart() -> None:
    """Whichever of them has it."""
    spots = np.random.default_rng(0).choice([0.0, 255.0], (6, 6)).repeat(4, 0).repeat(4, 1)
    one = torch.full((1, SIDE, SIDE), 128.0)
    one[:, 12:36, 12:36] = torch.from_numpy(spots)
    two = one.clone()
    two[:, 60:84, 60:84] = torch.from_numpy(spots)
    unmoved = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(2, 4)
    alignment = Alignment(unmoved, torch.ones(2), torch.zeros(2))
    found = compare(torch.cat([one, two]), torch.cat([two, one]), alignment)
    assert (found < 0.5).all()


def test_grey_values_near_white_hardly_count_beside_a_clipped_slice() -> None:
    grey, near_white = 120.0, 254.0
    values = torch.full((1, SIDE, SIDE), grey)
    values[:, SIDE // 2 :] = near_white
    weight = registration._unclipped(values, torch.tensor([1.5]), torch.tensor([0.0]))
    assert weight[0, 30, 48] == 1.0
    assert weight[0, 60, 48] < 0.05


def test_a_frame_moves_as_far_as_its_edge_that_moves_the_farthest() -> None:
    frame = torch.tensor([[0.01, 1.1, -0.02, 0.95]])
    assert float(registration._movement(frame)[0]) == pytest.approx(0.01 + 0.1)


def test_pairs_that_differ_in_detail_alone_are_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """However similar they were at a coarser level."""
    by_side = {48: 0.99, 96: -0.5}
    monkeypatch.setattr(
        registration, "compare", lambda fixed, *_: torch.full((1,), by_side[fixed.shape[-1]])
    )
    fixed = picture(head(0))
    assert float(registration.similarity(fixed, fixed)[0]) == 0.0


def test_slices_without_structure_are_no_copies() -> None:
    flat = torch.full((1, SIDE, SIDE), 90.0)
    assert float(registration.similarity(flat, flat)[0]) == 0.0


def test_a_pair_is_judged_alike_in_any_batch() -> None:
    fixed = torch.cat([picture(head(seed)) for seed in range(5, 9)])
    moving = torch.cat([picture(head(seed)[4:, 4:]) for seed in range(5, 9)])
    together = registration.similarity(fixed, moving)
    alone = [registration.similarity(fixed[i : i + 1], moving[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, torch.stack(alone), atol=1e-5)

"""The head is found, and its grey values measured, alike in large slices and on grey."""

import numpy as np
from numpy.typing import NDArray

from brainray.mri.head import Head, find_head
from brainray.mri.phantom import make_slice


def phantom(least: int, most: int) -> NDArray[np.uint8]:
    """A slice of the working size whose grey values leave room on either side."""
    return make_slice("glioma", np.random.default_rng(1), size=160).image.clip(least, most)


def found_in(image: NDArray[np.uint8]) -> Head:
    head = find_head(image)
    assert head is not None
    return head


def test_noise_of_a_large_slice_is_averaged_out() -> None:
    image = phantom(40, 200)
    large = image.repeat(4, 0).repeat(4, 1)
    noise = np.random.default_rng(0).integers(-40, 40, large.shape, endpoint=True)
    signal = found_in((large + noise).astype(np.uint8)).signal
    # Averages of 16 pixels leave 2 grey values of noise, one pixel out of 16 would leave 8.
    assert (signal - found_in(image).signal).std() < 4


def test_a_grey_background_is_no_signal() -> None:
    image = phantom(0, 200)
    on_grey = found_in(image + 30)
    np.testing.assert_allclose(on_grey.signal, found_in(image).signal, atol=1)

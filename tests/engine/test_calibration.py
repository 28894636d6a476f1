"""Calibration: confidences that are too high are seen, and a temperature mends them."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from brainray.engine.calibration import calibration_error, fit_temperature, temper


def drawn(num: int = 20_000) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities (num, 3), and labels drawn from exactly these."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1.0, 1.0, 1.0], size=num)
    labels = (rng.random(num)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1)
    return probabilities, labels.astype(np.int64)


def test_the_error_by_hand() -> None:
    # Confidence 0.8 and accuracy 1/2 in one bin, confidence 0.6 and accuracy 1 in another.
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 1])
    assert calibration_error(probabilities, labels) == pytest.approx((0.3 + 0.4) / 2)


def test_bins_are_a_fifteenth_wide() -> None:
    # Of one bin, 0.61 right and 0.65 wrong: their mean confidence is 0.63, and half are right.
    probabilities = np.array([[0.61, 0.39], [0.65, 0.35]])
    assert calibration_error(probabilities, np.array([0, 1])) == pytest.approx(0.63 - 0.5)
    # 0.65 right and 0.68 wrong are parted by 10 / 15.
    probabilities[0, :] = 0.68, 0.32
    assert calibration_error(probabilities, np.array([1, 0])) == pytest.approx((0.68 + 0.35) / 2)


def test_a_confidence_of_one_has_no_bin_of_its_own() -> None:
    # Of one bin: mean confidence 0.98, of which half are right.
    probabilities = np.array([[1.0, 0.0], [0.96, 0.04]])
    assert calibration_error(probabilities, np.array([0, 1])) == pytest.approx(0.48, abs=1e-5)
    assert calibration_error(probabilities, np.array([1, 0])) == pytest.approx(0.48, abs=1e-5)


def test_true_probabilities_are_calibrated_and_need_no_temperature() -> None:
    probabilities, labels = drawn()
    assert calibration_error(probabilities, labels) < 0.01
    assert fit_temperature(probabilities, labels) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("too_cold", [0.4, 0.2])
def test_the_temperature_undoes_overconfidence(too_cold: float) -> None:
    probabilities, labels = drawn()
    overconfident = temper(probabilities, too_cold)
    assert calibration_error(overconfident, labels) > 0.1
    temperature = fit_temperature(overconfident, labels)
    assert temperature == pytest.approx(1 / too_cold, rel=0.03)
    assert calibration_error(temper(overconfident, temperature), labels) < 0.01


def test_one_confident_error_limits_how_far_confidences_are_raised() -> None:
    # The cross entropy is convex in 1 / T. Its minimum from a grid is 0.258: sharper predictions
    # gain little on the 99 right ones and lose much on the wrong one.
    probabilities = np.array([[0.6, 0.4]] * 99 + [[0.999, 0.001]])
    labels = np.array([0] * 99 + [1])
    assert fit_temperature(probabilities, labels) == pytest.approx(0.258, abs=0.002)


def test_slices_that_are_all_right_ask_for_no_temperature() -> None:
    assert fit_temperature(np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([0, 1])) == 1.0


def test_tempering_is_a_softmax_and_keeps_the_order() -> None:
    tempered = temper(np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]), 2.0)
    assert tempered.sum(axis=1) == pytest.approx(1.0)
    roots = np.sqrt([0.7, 0.2, 0.1])
    assert tempered[0] == pytest.approx(roots / roots.sum())
    assert math.isfinite(tempered[1, 1])

"""Calibration of confidences: calibration error and temperature scaling."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

_MAX_LOG_TEMPERATURE = math.log(20.0)
_NUM_BINS = 15


def fit_temperature(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature T that minimises the cross entropy of softmax(log p / T); Guo et al. 2017.

    1 if all predictions are right: the cross entropy then falls with T and has no minimum.

    Args:
        probabilities: p, (N, C), of slices not used in training.
        labels: (N,) in [0, C).
    """
    if (probabilities.argmax(axis=1) == labels).all():
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        tempered = _log_tempered(probabilities, math.exp(log_temperature))
        return float(-tempered[np.arange(len(labels)), labels].mean())

    bounds = (-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    return math.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x)


def temper(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Probabilities p (N, C) after temperature scaling: softmax(log p / T), (N, C)."""
    return np.exp(_log_tempered(probabilities, temperature))


def _log_tempered(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    log_probabilities = np.log(probabilities.astype(np.float64).clip(1e-12))
    return np.asarray(log_softmax(log_probabilities / temperature, axis=1))


def calibration_error(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 confidence bins; Naeini et al. 2015.

    The absolute difference between a bin's mean confidence and accuracy, averaged over the slices.
    0 is perfect.

    Args:
        probabilities: (N, C).
        labels: (N,) in [0, C).
    """
    confidences = probabilities.max(axis=1).astype(np.float64)
    is_right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidences * _NUM_BINS).astype(np.intp), _NUM_BINS - 1)
    differences = np.bincount(bins, weights=confidences - is_right)
    return float(np.abs(differences).sum() / len(labels))

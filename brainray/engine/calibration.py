"""Calibration of confidences: calibration error and temperature scaling."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torchmetrics.functional.classification import multiclass_calibration_error

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
        tempered = temper(probabilities, math.exp(log_temperature))
        return float(-np.log(tempered[np.arange(len(labels)), labels].clip(1e-12)).mean())

    bounds = (-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    return math.exp(minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x)


def temper(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Probabilities p (N, C) after temperature scaling: softmax(log p / T), (N, C)."""
    scaled = np.log(probabilities.astype(np.float64).clip(1e-12)) / temperature
    return np.asarray(softmax(scaled, axis=1))


def calibration_error(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 confidence bins; Naeini et al. 2015.

    Mean difference between confidence and accuracy over N slices; 0 is perfect.
    """
    found = multiclass_calibration_error(
        # A confidence of exactly 1 would get a separate bin.
        torch.from_numpy(probabilities.astype(np.float64).clip(max=1 - 1e-6)),
        torch.from_numpy(labels),
        num_classes=probabilities.shape[1],
        n_bins=_NUM_BINS,
    )
    return float(found)

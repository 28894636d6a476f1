"""Selection: the epoch that a run keeps, by its metrics of the validation slices."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainray.engine.calibration import calibration_error, fit_temperature
from brainray.engine.predictions import Predictions
from brainray.schema import Metrics


def validation_metrics(predictions: Predictions) -> Metrics:
    """Validation metrics, among them ``validation/score``, which `chosen_epoch` uses.

    The score is the balanced accuracy of the head. Ties are broken by the lower cross entropy,
    whose weight is too small to outweigh a slice.
    """
    labels = predictions.labels
    num_of_class = np.unique(labels, return_counts=True)[1]
    num_right = np.array([(predictions.head[labels == c] == c).sum() for c in np.unique(labels)])
    likelihood = predictions.probabilities[np.arange(len(labels)), labels]
    loss = float(-np.log(np.clip(likelihood, 1e-12, None)).mean())
    balanced = float(np.mean(num_right / num_of_class))
    return {
        "validation/head/accuracy": float((predictions.head == labels).mean()),
        "validation/head/balanced_accuracy": balanced,
        "validation/cluster/accuracy": float((predictions.cluster_classes == labels).mean()),
        "validation/loss": loss,
        "validation/calibration_error": calibration_error(predictions.probabilities, labels),
        "validation/temperature": fit_temperature(predictions.probabilities, labels),
        "validation/num_slices": float(len(labels)),
        "validation/score": balanced - 1e-6 * loss,
        "validation/score_error": _standard_error(num_right, num_of_class),
    }


def _standard_error(num_right: NDArray[np.int64], num_of_class: NDArray[np.int64]) -> float:
    """Standard error of a balanced accuracy (mean recall over classes) from counts (C,).

    Four pseudo-slices, half of them right, are spread over the classes (Agresti & Coull 1998), so
    that the error is above 0 even if no prediction is wrong.
    """
    num_classes = len(num_of_class)
    counts = num_of_class + 4 / num_classes
    recalls = (num_right + 2 / num_classes) / counts
    return float(np.sqrt((recalls * (1 - recalls) / counts).sum()) / num_classes)


def chosen_epoch(history: Sequence[Metrics]) -> int:
    """The last epoch within one standard error of the best score; 1-based.

    The one-standard-error rule is that of Breiman et al. 1984 ("Classification and Regression
    Trees", section 3.4.3): such scores cannot be distinguished with that number of slices, and the
    last of these epochs was trained at the lowest learning rate. If slices grow during training,
    only epochs with the largest slices count, since the run predicts at that size. As epochs are
    added, the choice either stays or moves to the newest epoch, so no other needs to be kept.

    Args:
        history: for each epoch, `validation_metrics` and ``train/image_size``.
    """
    side = "train/image_size"
    largest = max(metrics[side] for metrics in history)
    scores = {
        epoch: metrics["validation/score"]
        for epoch, metrics in enumerate(history, start=1)
        if metrics[side] == largest
    }
    best = max(scores, key=lambda epoch: scores[epoch])
    least = scores[best] - history[best - 1]["validation/score_error"]
    return max(epoch for epoch, score in scores.items() if score >= least)


def reported_metrics(history: Sequence[Metrics]) -> Metrics:
    """Metrics reported to Ray after an epoch: those of the epoch whose model is currently the best.

    Validation metrics only, so that nothing else can be used for selection.
    """
    kept = history[chosen_epoch(history) - 1]
    validation = {name: value for name, value in kept.items() if name.startswith("validation/")}
    return {"epoch": history[-1]["epoch"]} | validation

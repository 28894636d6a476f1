"""What a run logged: one flat dict of metrics an epoch, oldest first."""

from collections.abc import Mapping, Sequence

History = Sequence[Mapping[str, float]]


def best_epoch(history: History) -> int:
    """The first epoch with the highest validation score; 1-based."""
    scores = [metrics["validation/score"] for metrics in history]
    return scores.index(max(scores)) + 1

"""What ranks decide between epochs."""

from brainray.orchestration.worker import best_epoch


def history(*epochs: tuple[float, float]) -> list[dict[str, float]]:
    """Of (side, validation score)."""
    return [{"train/image_size": side, "validation/score": score} for side, score in epochs]


def test_the_first_of_the_best_epochs_is_chosen() -> None:
    assert best_epoch(history((64, 0.5), (64, 0.9), (64, 0.9), (64, 0.7))) == 2


def test_an_epoch_with_smaller_slices_is_chosen_only_until_they_grow() -> None:
    growing = history((64, 0.9), (64, 0.95), (96, 0.8), (96, 0.7))
    assert best_epoch(growing[:2]) == 2
    assert best_epoch(growing) == 3


def test_a_run_that_tells_no_size_is_of_one_size() -> None:
    earlier = [{"validation/score": score} for score in (0.5, 0.9, 0.7)]
    assert best_epoch(earlier) == 2
    assert best_epoch(earlier + history((128, 0.8))) == 2

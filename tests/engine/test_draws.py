"""Figures over draws of labels, by hand."""

import math
import statistics

import pytest

from brainray.engine.draws import summarise_draws

NAME = "test/clean/head/accuracy"
DRAWS = [{NAME: value, f"{NAME}_low": 0.0, "validation/loss": 1.0} for value in (0.90, 0.94, 0.95)]
CONTROL = [{NAME: value} for value in (0.80, 0.86, 0.89)]


def test_means_and_deviations_over_draws() -> None:
    found = summarise_draws(DRAWS)
    assert found["num_label_draws"] == 3
    assert found[NAME] == pytest.approx(0.93)
    # Deviations -0.03, 0.01, 0.02: sum of squares 0.0014 over n - 1 = 2.
    assert found[f"{NAME}_std"] == pytest.approx(math.sqrt(0.0007))
    assert set(found) == {"num_label_draws", NAME, f"{NAME}_std"}


def test_differences_are_paired_by_draw() -> None:
    intervals = {f"difference/{NAME}": (0.05, 0.12), f"fewer_errors/{NAME}": (0.4, 0.7)}
    found = summarise_draws(DRAWS, CONTROL, intervals)
    # Differences 0.10, 0.08, 0.06; t of 2 degrees of freedom at 97.5 % is 4.3027.
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert found[f"control/{NAME}"] == pytest.approx(0.85)
    deviation = statistics.stdev(draw[NAME] for draw in CONTROL)
    assert found[f"control/{NAME}_std"] == pytest.approx(deviation)
    assert found[f"difference/{NAME}"] == pytest.approx(0.08)
    assert found[f"difference/{NAME}_low"] == pytest.approx(0.08 - math.hypot(half, 0.03), abs=1e-6)
    assert found[f"difference/{NAME}_high"] == pytest.approx(
        0.08 + math.hypot(half, 0.04), abs=1e-6
    )
    # Of errors 0.20, 0.14, 0.11, the same share 8/15 would be spared in each draw but for these:
    share = 8 / 15
    rest = [0.10 - share * 0.20, 0.08 - share * 0.14, 0.06 - share * 0.11]
    half = 4.302653 * statistics.stdev(rest) / 0.15 / math.sqrt(3)
    low, high = (found[f"fewer_errors/{NAME}_{side}"] for side in ("low", "high"))
    assert found[f"fewer_errors/{NAME}"] == pytest.approx(share)
    assert low == pytest.approx(share - math.hypot(half, share - 0.4), abs=1e-6)
    assert high == pytest.approx(share + math.hypot(half, 0.7 - share), abs=1e-6)


def test_a_share_of_errors_that_is_the_same_in_every_draw_has_the_interval_over_subjects() -> None:
    control = [{NAME: 1 - 2 * (1 - draw[NAME])} for draw in DRAWS]  # twice as many errors
    found = summarise_draws(DRAWS, control, {f"fewer_errors/{NAME}": (0.3, 0.8)})
    limits = [found[f"fewer_errors/{NAME}{side}"] for side in ("", "_low", "_high")]
    assert limits == pytest.approx([0.5, 0.3, 0.8])


def test_no_more_than_all_errors_are_avoided() -> None:
    found = summarise_draws(DRAWS[:2], CONTROL[:2], {f"fewer_errors/{NAME}": (0.1, 0.99)})
    assert found[f"fewer_errors/{NAME}_high"] == 1


def test_without_an_interval_over_subjects_there_is_none_over_draws() -> None:
    found = summarise_draws(DRAWS, CONTROL)
    assert f"difference/{NAME}" in found
    assert f"difference/{NAME}_low" not in found


def test_what_a_draw_of_the_control_lacks_keeps_the_mean_and_is_not_compared() -> None:
    found = summarise_draws(DRAWS, [*CONTROL[:2], {}])
    assert found[NAME] == pytest.approx(0.93)
    assert f"{NAME}_std" in found
    assert not any(name.startswith(("control/", "difference/", "fewer")) for name in found)


def test_a_class_may_be_called_as_a_bound_is() -> None:
    names = [f"test/all/head/f1/{of_class}" for of_class in ("grade", "grade_low")]
    found = summarise_draws([dict.fromkeys(names, value) for value in (0.8, 0.9)])
    assert [found[name] for name in names] == [pytest.approx(0.85)] * 2


def test_a_control_on_more_slices_is_compared_on_those_of_the_subset_alone() -> None:
    by_mix = "test/all_as_clean/head/accuracy"
    sizes = {"test/clean/num_slices": 50.0, "test/all_as_clean/num_slices": 99.0}
    control = {NAME: 0.7, by_mix: 0.7, "test/clean/num_slices": 50.0}
    found = summarise_draws([{NAME: 0.8, by_mix: 0.9} | sizes], [control])
    assert found[f"difference/{NAME}"] == pytest.approx(0.1)
    assert found[f"difference/{by_mix}"] == pytest.approx(0.2)  # weighted as clean, of its slices
    other = control | {"test/clean/num_slices": 60.0}
    found = summarise_draws([{NAME: 0.8, by_mix: 0.9} | sizes], [other])
    assert not any(name.startswith("difference/") for name in found)


def test_subsets_of_other_slices_are_not_averaged() -> None:
    """As of draws that were made before and after the estimate of subjects changed."""
    sizes = [{"test/strict/num_slices": 30.0}, {"test/strict/num_slices": 22.0}]
    draws = [{NAME: 0.8, "test/strict/head/accuracy": 0.7} | size for size in sizes]
    found = summarise_draws(draws)
    assert found[NAME] == pytest.approx(0.8)
    assert not any("strict" in name for name in found)


def test_one_draw_has_no_deviation_and_no_interval() -> None:
    found = summarise_draws(DRAWS[:1], CONTROL[:1], {f"difference/{NAME}": (0.05, 0.12)})
    assert f"{NAME}_std" not in found
    assert f"difference/{NAME}_low" not in found
    assert found[f"difference/{NAME}"] == pytest.approx(0.10)


def test_subsets_of_other_slices_are_compared_by_the_differences_on_the_same_ones() -> None:
    """As with a control whose starting weights have seen other slices."""
    loss = "test/clean/head/loss"
    draws = [
        {NAME: 0.5, loss: 1.0, f"difference/{NAME}": gain, "test/clean/num_slices": 50.0}
        for gain in (0.04, 0.10)
    ]
    control = [{NAME: 0.7, loss: 0.5, "test/clean/num_slices": 100.0}] * 2
    found = summarise_draws(draws, control)
    assert found[f"difference/{NAME}"] == pytest.approx(0.07)
    assert found[f"control/{NAME}"] == pytest.approx(0.43)
    assert f"difference/{loss}" not in found
    assert found[loss] == 1

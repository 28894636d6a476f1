"""Measures beside their targets."""

import pytest

from brainray.benchmarks.result import Measure, measures_table


@pytest.mark.parametrize(
    ("value", "bounds", "target", "verdict"),
    [
        (1.7, {"at_least": 1.7}, ">= 1.7", "met"),
        (1.69, {"at_least": 1.7}, ">= 1.7", "missed"),
        (1e-6, {"at_most": 1e-6}, "<= 1e-06", "met"),
        (2e-6, {"at_most": 1e-6}, "<= 1e-06", "missed"),
        (0.0, {}, "", ""),
    ],
)
def test_a_measure_meets_its_target_or_misses_it(
    value: float, bounds: dict[str, float], target: str, verdict: str
) -> None:
    measure = Measure("speed-up", value, "x", **bounds)
    assert (measure.target, measure.verdict) == (target, verdict)
    cells = [cell.strip() for cell in measures_table([measure]).splitlines()[2].split("|")[1:-1]]
    assert cells == ["speed-up", "x", target, verdict, f"{value:.4g}"]

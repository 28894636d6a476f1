"""A run and its control, slice by slice, as a table."""

import pytest

from brainray.report.comparison_table import comparison_table, verdict

NAME = "test/clean/head/accuracy"
COMPARED = {
    f"difference/{NAME}": 0.016,
    f"difference/{NAME}_low": 0.002,
    f"difference/{NAME}_high": 0.029,
    f"fewer_errors/{NAME}": 0.17,
    f"only_run/{NAME}": 1200.0,
    f"only_control/{NAME}": 34.0,
    f"p/{NAME}": 0.0123,
}


def test_a_comparison_has_a_row_for_what_was_compared() -> None:
    table = comparison_table(COMPARED, "c")
    assert table is not None
    assert table.title == "Paired comparison with the control (c), slice by slice"
    cells = ["+0.016 [+0.002, +0.029]", "17 %", "1,200 of 1,234", "0.012"]
    assert table.rows == [["head", "clean", *cells]]
    assert comparison_table({}, "c") is None


@pytest.mark.parametrize(
    ("low", "high", "found", "interval"),
    [
        (0.002, 0.029, "ahead of", "[+0.002, +0.029]."),
        (-0.03, -0.001, "behind", "[-0.030, -0.001]."),
        (-0.01, 0.04, "not distinguishable from", "[-0.010, +0.040] includes 0."),
        (0.0, 0.04, "not distinguishable from", "[+0.000, +0.040] includes 0."),
    ],
)
def test_a_verdict_follows_from_the_interval(
    low: float, high: float, found: str, interval: str
) -> None:
    metrics = COMPARED | {f"difference/{NAME}_low": low, f"difference/{NAME}_high": high}
    said = f"The head is {found} its control c in accuracy on clean test slices: +0.016 {interval}"
    assert verdict(metrics, "c") == said


def test_without_clean_slices_all_are_judged_and_without_an_interval_nothing() -> None:
    assert verdict({"difference/test/all/head/accuracy": 0.25}, "c") == (
        "The head is not distinguishable from its control c in accuracy on all test slices: "
        "+0.250, without an interval."
    )
    assert verdict({}, "c") is None

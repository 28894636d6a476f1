"""A run and its control, slice by slice, as a table."""

from brainray.report.comparison_table import comparison_table

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

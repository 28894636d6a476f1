"""Figures over draws of labels as a table."""

from brainray.engine.draws import summarise_draws
from brainray.report.draws_table import draws_table

CLEAN, ALL = "test/clean/head/accuracy", "test/all/head/accuracy"


def rows_of(table: str) -> list[list[str]]:
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_recipe_beside_its_control() -> None:
    draws = [{CLEAN: 0.90}, {CLEAN: 0.94}]
    control = [{CLEAN: 0.80}, {CLEAN: 0.86}]
    intervals = {f"difference/{CLEAN}": (0.05, 0.12)}
    header, _, row = rows_of(draws_table(summarise_draws(draws, control, intervals)))
    assert header[2:] == [
        "accuracy (mean ± standard deviation)",
        "control (mean)",
        "difference [95 %]",
        "fewer errors [95 %]",
    ]
    # Differences 0.10 and 0.08: by draws, half an interval is 12.706 * 0.01414 / sqrt(2) = 0.127.
    assert row == ["head", "clean", "0.920 ± 0.028", "0.830", "+0.090 [-0.043, +0.221]", "53 %"]


def test_what_was_not_measured_is_a_dash() -> None:
    alone = rows_of(draws_table(summarise_draws([{ALL: 0.9}])))[2:]
    assert alone == [["head", "all", "0.900", "–", "–", "–"]]


def test_a_share_of_no_errors_is_a_dash() -> None:
    row = rows_of(draws_table({ALL: 1.0, f"fewer_errors/{ALL}": float("nan")}))[2]
    assert row[-1] == "–"


def test_a_share_of_avoided_errors_has_its_interval() -> None:
    limits = {f"fewer_errors/{ALL}_low": -0.0312, f"fewer_errors/{ALL}_high": 0.368}
    row = rows_of(draws_table({ALL: 0.9, f"fewer_errors/{ALL}": 0.174} | limits))[2]
    assert row[-1] == "17 % [-3, 37]"

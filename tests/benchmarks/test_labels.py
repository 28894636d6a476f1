"""The label-efficiency curve: which runs it trains, and what it reports."""

import pytest

from brainray.benchmarks import labels
from brainray.config_text import load_config


@pytest.mark.parametrize(
    ("overrides", "quick", "expected"),
    [([], False, 3), ([], True, 1), (["evaluation.num_label_draws=1"], False, 1)],
)
def test_it_trains_on_the_requested_number_of_draws(
    overrides: list[str], quick: bool, expected: int
) -> None:
    config = load_config(None, overrides)
    assert labels._num_draws(config, quick=quick) == expected


def test_the_table_has_a_row_for_every_share_and_no_deviation_of_one_draw() -> None:
    key = "test/clean/head/accuracy"
    one = {"num_label_draws": 1.0, key: 0.9, f"control/{key}": 0.8, f"fewer_errors/{key}": 0.5}
    table = labels._table({0.01: one, 0.2: one})
    rows = [line for line in table.splitlines() if "%" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["1%", "20%"]
    assert "±" not in table
    assert "50%" in rows[0]

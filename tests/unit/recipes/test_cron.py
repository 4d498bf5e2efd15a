"""Five fields, standard meaning."""

from __future__ import annotations

import pytest

from kontext_batch.recipes.cron import parse_cron


def test_fields_are_sets_of_numbers() -> None:
    minute, hour, day, month, weekday = parse_cron("*/20 22-23 1,15 jan-mar mon,7")
    assert minute == {0, 20, 40}
    assert hour == {22, 23}
    assert day == {1, 15}
    assert month == {1, 2, 3}
    assert weekday == {0, 1}


def test_a_start_with_a_step_goes_on_to_the_end() -> None:
    assert parse_cron("50/5 * * * *")[0] == {50, 55}


@pytest.mark.parametrize(
    "line",
    ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "5-1 * * * *",
     "*/0 * * * *", "a * * * *", "@daily", "1,,2 * * * *", "* * * foo *", "1-2-3 * * * *", "-1 * * * *"],
)  # fmt: skip
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="cron line"):
        parse_cron(line)

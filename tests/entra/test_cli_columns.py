"""What the columns of a file are taken for, alone."""

import pytest

from entra.cli.columns import CHECKED, DETAIL_COLUMNS, correct_column, first, problem_column, row_names, score_prefixes
from entra.rows import Row


def rows(*columns):
    return [Row(each) for each in columns]


def test_the_first_that_is_there_counts():
    assert first(CHECKED, ["answer", "entry"]) == "entry"
    assert first(CHECKED, ["prompt"]) is None


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([{"correct": 0.5, "reward": 1}], "correct"),
        ([{"reward": 1}, {"reward": None}, {"reward": False}], "reward"),
        ([{"reward": 1}, {"reward": 0.7}], None),
        ([{"reward": "1"}], None),
        ([{"answer": "4"}], None),
    ],
)
def test_a_reward_tells_right_from_wrong_only_where_it_is_0_or_1(columns, expected):
    assert correct_column([rows(*columns)], list(columns[0])) == expected


def test_ids_are_problems_only_where_the_files_share_one():
    one, other = rows({"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}), rows({"id": 2, "prompt": "c"})
    assert problem_column([one, other], ["id", "prompt"]) == "id"
    assert problem_column([one, rows({"id": 3, "prompt": "a"})], ["id", "prompt"]) == "prompt"
    assert problem_column([one, rows({"id": 3})], ["id"]) == "id"
    assert problem_column([one], ["completion"]) is None


def test_a_file_that_was_scored_twice_has_two_prefixes():
    names = [prefix + name for prefix in ("", "b_") for name in ("reward", *DETAIL_COLUMNS)]
    assert score_prefixes(names) == ["", "b_"]
    assert score_prefixes([name for name in names if name != "b_protected"]) == [""]


def test_rows_are_called_by_what_all_have_and_no_two_share():
    assert row_names([{"id": 7, "name": "x"}, None]) == ["7", "row 2"]
    assert row_names([{"id": 7, "name": "x"}, {"id": "7", "name": "y"}]) == ["x", "y"]
    assert row_names([{"id": 7}, {}]) == ["row 1", "row 2"]

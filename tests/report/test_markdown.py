"""A table has a head, a rule and its rows."""

from entrust_jax.report import markdown


def test_a_table_is_a_head_a_rule_and_rows():
    found = markdown.table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert found == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]
    assert markdown.table(["a"], []) == ["| a |", "| --- |"]


def test_a_figure_has_its_interval_where_there_is_one():
    assert markdown.figure({"value": 0.25, "ci95": [0.125, 0.5]}) == "0.250 [0.125, 0.500]"
    assert markdown.figure({"value": 2, "ci95": None}) == "2.000"
    assert markdown.figure({"value": None, "ci95": None}) == markdown.figure(None) == "-"
